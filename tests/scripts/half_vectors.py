"""The same bits on any number of threads, by code for a processor whose widest vectors pass in halves: of a last vector
that is no more than half, half is computed, if there are rows enough; a thread's may be too few."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from problems import problem, same_bits

from fastcells import cells, plan
from fastcells.cpu import team
from fastcells.cpu.host import host


def main():
    assert host().halves
    team.processors = lambda: 5
    plan.share = lambda rows, flops, most, **_: plan.Share(most, "rows")
    for dtype, hidden in ((torch.float64, 75), (torch.float32, 120), (torch.float32, 23)):
        for c, lengths in ((cells.gru, [9, 9, 8, 6, 5, 3, 1]), (cells.lstm, [4, 4, 4])):
            arguments, leaves, _ = problem(
                c, max(lengths), len(lengths), 33, hidden, dtype=dtype, lengths=lengths, given=False
            )
            assert same_bits(arguments, leaves), (c.name, dtype, hidden)
    print("done")


if __name__ == "__main__":
    main()
