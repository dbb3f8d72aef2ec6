"""Layers on code for the plainest processor of this architecture: vectors of 16 bytes, no fused multiply-add."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from problems import agree, problem

from fastcells import cells
from fastcells.cpu.host import host


def main():
    torch.set_num_threads(1)
    assert host().cpu == "generic"
    assert host().vector_bytes == 16
    for hidden in (1, 2, 3, 7, 16, 21):
        for rows in (1, 2, 5):
            agree(*problem(cells.gru, 3, rows, 4, hidden, directions=2))
    agree(*problem(cells.lstm, 3, 4, 30, 40, dtype=torch.float32), tolerance=2e-5)
    print("done")


if __name__ == "__main__":
    main()
