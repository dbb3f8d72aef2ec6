"""Settings of all tests."""

import os

import torch

os.environ.setdefault("FASTCELLS_QUIET", "1")
torch.set_num_threads(1)  # several test processes may share the machine; tests of threads set their own
