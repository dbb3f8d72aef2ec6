"""The generated code: what the inner loops of the tiles come to on a processor with AVX2 or AVX-512."""

import re

import pytest
import torch

from fastcells import cells
from fastcells.cpu import store
from fastcells.cpu.geometry import DOT_UNITS, LATENCY_CHAINS, UNROLL, tiling_of
from fastcells.cpu.host import host
from fastcells.cpu.layer import ready
from fastcells.cpu.tile import ALONG_ROW

REGISTER = {32: "ymm", 64: "zmm"}.get(host().vector_bytes)  # the name of a vector's
STACK = r"\(%rsp", r"-\d+\(%rbp\)"  # addresses on it; the latter where the function keeps a pointer to its frame
known = host().triple.startswith("x86_64") and REGISTER is not None and "fma" in host().features


def inner_loops(text):
    """Instructions of each block that ends with a jump to its own beginning."""
    blocks = re.split(r"^(\.L\w+):.*$", text, flags=re.MULTILINE)
    for label, body in zip(blocks[1::2], blocks[2::2], strict=True):
        lines = [line.strip() for line in body.splitlines() if line.startswith("\t") and line.strip()[0] not in ".#"]
        jumps = [k for k, line in enumerate(lines) if re.match(rf"j\w+\s+{re.escape(label)}$", line)]
        if jumps:
            yield lines[: jumps[0] + 1]


def interleaved(chains):
    """Sums of a tile of so many that has steps of the depth in sums of their own, until they hide the latency."""
    return chains * next(k for k in (1, 2, 4) if k == 4 or chains * k >= LATENCY_CHAINS)


@pytest.mark.skipif(not known, reason="needs AVX2 and FMA, or AVX-512")
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("cell", [cells.lstm, cells.gru, cells.rnn_tanh], ids=lambda c: c.name)
def test_full_tiles_keep_their_sums_in_registers(cell, direction):
    """Of the loops of full tiles, and of those of the rest of the units, as tall: a multiply-add for every sum and step
    of the depth, and nothing of them on the stack."""
    run = getattr(ready(cell, False, torch.float32, host().lanes(4)), direction)
    text = store.assembly(run._make())
    loops, stack = list(inner_loops(text)), STACK if "movq\t%rsp, %rbp" in text else STACK[:1]
    adds = [sum(line.startswith("vfmadd") and "ps" in line for line in loop) for loop in loops]
    (stage,) = run.program.stages
    shape = tiling_of(stage, host().registers, host().lanes(4))
    sums = {shape.rows * shape.block * len(s.targets) for s in stage.segments}
    expected = {UNROLL * n for n in sums}
    for width in (w for w in shape.widths[1:-1] if w < shape.block):
        expected |= {interleaved(shape.rows * width * len(s.targets)) for s in stage.segments}
    assert expected <= set(adds)
    if direction == "forward":  # of dot products, which read rows of weights as they lie, of one row and of several
        expected |= {ALONG_ROW * shape.lanes, shape.dot_rows * DOT_UNITS}
        assert expected <= set(adds)
    if host().halves:  # of tiles of half a vector
        narrow = [sum(line.startswith("vfmadd") and "ymm" in line for line in loop) for loop in loops]
        assert {interleaved(shape.rows * len(s.targets)) for s in stage.segments} <= set(narrow)
    for loop, count in zip(loops, adds, strict=True):
        if count in expected:
            spilled = [line for line in loop if REGISTER in line and re.search("|".join(stack), line)]
            assert not spilled, spilled
