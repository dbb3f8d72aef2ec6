"""The generated code: what the inner loops of the tiles come to on a processor with AVX2 or AVX-512."""

import re

import pytest
import torch

from fastcells import cells
from fastcells.cpu import store
from fastcells.cpu.geometry import DOT_UNITS, LATENCY_CHAINS, UNROLL, tiling_of
from fastcells.cpu.host import host
from fastcells.cpu.layer import ready
from fastcells.cpu.products import ALONG_ROW
from fastcells.cpu.tall import make_tall

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


def multiply_adds(loop):
    return sum(line.startswith("vfmadd") and "ps" in line for line in loop)


def spilled(text, loop):
    """The instructions that have a vector on the stack."""
    stack = STACK if "movq\t%rsp, %rbp" in text else STACK[:1]
    return [line for line in loop if REGISTER in line and re.search("|".join(stack), line)]


@pytest.mark.skipif(not known, reason="needs AVX2 and FMA, or AVX-512")
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("cell", [cells.lstm, cells.gru, cells.rnn_tanh], ids=lambda c: c.name)
def test_full_tiles_keep_their_sums_in_registers(cell, direction):
    """Of the loops of full tiles, and of those of the rest of the units, as tall: a multiply-add for every sum and step
    of the depth, and nothing of them on the stack."""
    run = getattr(ready(cell, False, torch.float32, host().lanes(4)), direction)
    (stage,) = run.program.stages
    shape, targets = tiling_of(stage, host().registers, host().lanes(4)), [len(s.targets) for s in stage.segments]
    widths = [w for w in shape.widths[1:-1] if w < shape.block]
    full = {UNROLL * shape.rows * shape.block * n for n in targets}
    full |= {interleaved(shape.rows * width * n) for width in widths for n in targets}
    single = {interleaved(width * n) for width in shape.widths[:1] for n in targets}
    dots = {shape.dot_rows * DOT_UNITS}  # which read rows of weights as they lie
    texts = {store.assembly(run._make()): single | ({ALONG_ROW * shape.lanes} if direction == "forward" else set())}
    for family in run.families():
        kernel = make_tall(family, "float32", host().registers, host().lanes(4))
        texts[store.assembly(kernel)] = dots if family.dot else full
    assert len(texts) == (3 if direction == "forward" else 2)
    for text, expected in texts.items():
        loops = list(inner_loops(text))
        assert expected <= set(map(multiply_adds, loops))
        assert not [line for loop in loops if multiply_adds(loop) in expected for line in spilled(text, loop)]
        if host().halves and expected == full:  # of tiles of half a vector
            narrow = [sum(line.startswith("vfmadd") and "ymm" in line for line in loop) for loop in loops]
            assert {interleaved(shape.rows * n) for n in targets} <= set(narrow)
