"""Memory that is lent again and again: what training keeps stays its own for as long as it is needed."""

import gc
import mmap
import re
from pathlib import Path

import pytest
import torch

import fastcells
from fastcells.cpu import blocks


@pytest.fixture
def pool(monkeypatch):
    if not hasattr(blocks.mmap, "MADV_FREE"):
        pytest.skip("no MADV_FREE on this system")
    monkeypatch.setattr(blocks, "LARGE", 1)
    monkeypatch.setattr(blocks, "pool", blocks.Pool())
    return blocks.pool


def test_blocks_come_back_and_are_lent_again(pool):
    a = blocks.empty((100, 3), torch.float32)
    assert (a.shape, a.dtype, pool.spare) == ((100, 3), torch.float32, 0)
    at, view = a.data_ptr(), a[1:]
    del a
    gc.collect()
    assert pool.spare == 0, "a view still needs it"
    del view
    assert pool.spare == 1200
    b = blocks.empty((140,), torch.float64)
    assert (b.data_ptr(), pool.spare) == (at, 0), "a block of nearly that size"
    c = blocks.empty((150,), torch.float64)
    assert c.data_ptr() != at
    del b, c
    assert pool.spare == 2400
    d = blocks.empty((10,), torch.float32)  # far smaller
    assert pool.spare <= 2400 - 40, "no more is kept than was in use at one time"
    del d
    pool.release()
    assert pool.spare == 0


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_gradients_of_graphs_that_live_at_the_same_time(kind, pool):
    layer = getattr(fastcells.nn, kind)(3, 8, num_layers=2, bidirectional=True, dtype=torch.float64)
    theirs = getattr(torch.nn, kind)(3, 8, num_layers=2, bidirectional=True, dtype=torch.float64)
    theirs.load_state_dict(layer.state_dict())
    inputs = [torch.randn(40, 8, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    for _ in range(3):
        graphs = [(module(x)[0], x) for x in inputs for module in (layer, theirs)]
        grads = [torch.autograd.grad(y.square().sum(), x)[0] for y, x in reversed(graphs)]
        for ours, other in zip(grads[1::2], grads[::2], strict=True):
            torch.testing.assert_close(ours, other, rtol=0, atol=1e-12)
        del graphs
    assert pool.spare > 0


def test_large_memory_alone_is_kept():
    assert blocks.empty((7,), torch.float32).untyped_storage().resizable(), "as torch makes it"


def flags(address):
    """What the system says of the memory at an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []


@pytest.mark.skipif(blocks.HUGE is None or not Path("/proc/self/smaps").exists(), reason="no large pages to ask for")
@pytest.mark.parametrize("make", [blocks.empty, blocks.result])
def test_large_memory_is_on_large_pages(make):
    """As far as the system has them: "hg" is the advice, without which it does not give them."""
    try:
        mmap.mmap(-1, blocks.LARGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).madvise(blocks.HUGE)
    except OSError:
        pytest.skip("a system without them")
    large = make((blocks.LARGE // 4,), torch.float32)
    assert "hg" in flags(large.data_ptr() + large.nbytes // 2)
    assert not blocks.is_large((blocks.LARGE // 4 - 1,), torch.float32)  # whose memory NumPy may have asked for, too
    assert large.fill_(1.0).sum() == len(large)
