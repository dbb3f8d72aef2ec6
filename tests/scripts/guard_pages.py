"""Run layers with every buffer, given or internal, ending at an unreadable page: a wrong bound ends this process."""

import ctypes
import itertools
import mmap
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from test_engine import BUILT_IN, everything, problem

from fastcells import cells, functional
from fastcells.cpu import script

PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
plain_empty = torch.empty
regions: list[tuple[int, int]] = []


def guarded(*shape, dtype=torch.float32, **options):
    """torch.empty whose last byte is followed by a page that cannot be read, and whose numbers are NaN."""
    shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
    size = torch.Size(shape).numel() * dtype.itemsize
    if options or size == 0:
        return plain_empty(shape, dtype=dtype, **options)
    pages = -(-size // PAGE)
    begin = libc.mmap(
        None, (pages + 1) * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0
    )
    assert libc.mprotect(begin + pages * PAGE, PAGE, 0) == 0
    regions.append((begin, (pages + 1) * PAGE))
    memory = (ctypes.c_char * size).from_address(begin + pages * PAGE - size)
    result = torch.frombuffer(memory, dtype=dtype).view(shape)
    return result.fill_(float("nan")) if dtype.is_floating_point else result


def guard(t):
    return None if t is None else guarded(t.shape, dtype=t.dtype).copy_(t.detach()).requires_grad_(t.requires_grad)


kept = []


def take(self, size):
    """Every piece of a call's memory is a mapping of its own."""
    kept.append(guarded(max(size, 1), dtype=torch.uint8))
    return kept[-1].data_ptr()


def main():
    torch.set_num_threads(1)
    from fastcells.cpu import layer

    script.Script.take = take
    shapes = [(1, 1, 1), (1, 3, 5), (2, 9, 7), (3, 17, 12), (4, 33, 31), (5, 2, 40)]
    for dtype, (rows, inputs, hidden), c in itertools.product((torch.float32, torch.float64), shapes, BUILT_IN):
        for lengths in (None, sorted((1 + n % 3 for n in range(rows)), reverse=True)):
            projects = (0, 3) if c is cells.lstm and hidden > 3 else (0,)
            for project in projects:
                (c, x, states, parameters, sizes), _, _ = problem(
                    c, 3, rows, inputs, hidden, dtype=dtype, lengths=lengths, directions=2, project=project
                )
                x, states = guard(x), tuple(guard(s) for s in states)
                parameters = [tuple(guard(w) for w in p) for p in parameters]
                leaves = [x, *states, *(w for p in parameters for w in p if w is not None)]
                torch.empty = guarded
                try:
                    outputs, grads = everything(functional.layer, (c, x, states, parameters, sizes), leaves)
                    with torch.no_grad():
                        functional.layer(c, x, states, parameters, sizes)
                finally:
                    torch.empty = plain_empty
                assert all(t.isfinite().all() for t in [*outputs, *grads]), (c, rows, inputs, hidden)
                del outputs, grads, x, states, parameters, leaves
                layer.forget()
                script.arena = script.Arena()  # its block was mapped here too
                kept.clear()
                while regions:
                    libc.munmap(*regions.pop())
    print("done")


if __name__ == "__main__":
    main()
