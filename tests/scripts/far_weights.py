"""Results have the same bits whether tiles ask for weights ahead or not: for numbers of rows of which tiles of any
height come, whole and partial vectors of units, and weights in one part and in several."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from problems import everything, problem

from fastcells import cells, functional
from fastcells.cpu import engine, layer


def main():
    sizes = [(6, 46, 40), (16, 40, 76), (20, 33, 112), (33, 700, 40)]
    for c in (cells.lstm, cells.gru, cells.rnn_tanh):
        for rows, inputs, hidden in sizes:
            arguments, leaves, _ = problem(c, 3, rows, inputs, hidden, dtype=torch.float32)
            found = []
            for engine.AHEAD_BYTES in (1 << 40, 0):
                layer.forget()
                outputs, grads = everything(functional.layer, arguments, leaves)
                found.append([*outputs, *grads])
            assert all(map(torch.equal, *found)), (c.name, rows, inputs, hidden)
    print("done")


if __name__ == "__main__":
    main()
