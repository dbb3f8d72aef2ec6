"""Run layers with every buffer, given or internal, ending at an unreadable page: a wrong bound ends this process."""

import ctypes
import itertools
import mmap
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from problems import BUILT_IN, everything, normed, peephole, problem, regularised

from fastcells import cells, functional, plan
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


def guard(value):
    """The same tensors, also those in lists and tuples, in guarded memory."""
    if isinstance(value, list | tuple):
        return type(value)(map(guard, value))
    if value is None or not value.is_floating_point():
        return value
    return guarded(value.shape, dtype=value.dtype).copy_(value.detach()).requires_grad_(value.requires_grad)


kept = []


def take(self, size):
    """Every piece of a call's memory is a mapping of its own."""
    kept.append(guarded(max(size, 1), dtype=torch.uint8))
    return kept[-1].data_ptr()


def cases():
    """(cell, dtype, rows, inputs, hidden): the built-in cells in both formats, in float64 one each with parameters of
    its own, sums over the units, and extra inputs."""
    shapes = [(1, 1, 1), (1, 3, 5), (1, 17, 33), (2, 9, 7), (3, 17, 12), (4, 33, 31), (5, 2, 40)]
    for dtype, shape, c in itertools.product((torch.float32, torch.float64), shapes, BUILT_IN):
        yield c, dtype, *shape
    for shape, c in itertools.product(shapes[1:5], (peephole, normed, regularised)):
        yield c, torch.float64, *shape


def calls(c, steps, rows, hidden):
    """(options of `problem`, options of the call): packed, projected, cut by lengths and resets."""
    generator = torch.Generator().manual_seed(0)
    lengths = [1 + n % 3 for n in range(rows)]
    reset = torch.rand(steps, rows, generator=generator) < 0.5
    yield {}, {}
    yield {"lengths": sorted(lengths, reverse=True)}, {}
    yield {}, {"lengths": lengths, "reset": reset, "reset_to": 0}
    if c is cells.lstm and hidden > 3:
        yield {"project": 3}, {}


def main():
    torch.set_num_threads(1)
    from fastcells.cpu import layer

    script.Script.take = take
    plan.BESIDE_STEPS, plan.NEAR_BYTES = 16, 0
    for c, dtype, rows, inputs, hidden in cases():
        steps = 27 if rows == 1 else 3  # of one sequence, so many that input projections are made beside its recurrence
        for given, options in calls(c, steps, rows, hidden):
            (c, *arguments), _, _ = problem(c, steps, rows, inputs, hidden, dtype=dtype, directions=2, **given)
            arguments = guard(arguments)
            leaves = [t for t in tensors(arguments) if t.requires_grad]
            run = partial(functional.layer, c, *arguments, **options)
            torch.empty = guarded
            try:
                outputs, grads = everything(run, (), leaves)
                with torch.no_grad():
                    run()
            finally:
                torch.empty = plain_empty
            assert all(t.isfinite().all() for t in [*outputs, *grads]), (c, rows, inputs, hidden, given, options)
            del outputs, grads, arguments, leaves, run
            layer.forget()
            script.arena = script.Arena()  # its block was mapped here too
            kept.clear()
            while regions:
                libc.munmap(*regions.pop())
    print("done")


def tensors(value):
    if isinstance(value, list | tuple):
        return [t for item in value for t in tensors(item)]
    return [] if value is None else [value]


if __name__ == "__main__":
    main()
