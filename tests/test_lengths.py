"""Tables of the sequences that each time step has."""

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcells.cpu import team
from fastcells.cpu.lengths import Tables


def words(address, count):
    return list((ctypes.c_int64 * count).from_address(address))


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=9), empty=st.integers(0, 2))
@settings(max_examples=60, deadline=None)
def test_tables(lengths, empty):
    lengths.sort(reverse=True)
    counts = [sum(n > t for n in lengths) for t in range(lengths[0] + empty)]
    begins = [sum(counts[:t]) for t in range(len(counts))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(team, "size", lambda: 4)
        tables = Tables(torch.tensor(counts), sum(counts), [torch.arange(len(lengths)).flip(0)])
        assert (tables.rows, tables.total, tables.steps) == (len(lengths), sum(lengths), lengths[0])
        assert words(tables.counts(False), len(counts)) == counts
        assert words(tables.counts(True), len(counts)) == counts[::-1]
        assert words(tables.positions(False), len(counts)) == begins
        assert words(tables.positions(True), len(counts)) == begins[::-1]
        for threads in (2, 3, 4):
            first, *bounds, end = words(tables.bounds(threads), threads + 1)
            assert (first, end) == (0, len(lengths))
            for k, bound in enumerate(bounds, 1):  # the first share of all steps that is large enough
                assert sum(lengths[:bound]) * threads >= k * sum(lengths) > sum(lengths[: bound - 1]) * threads


@pytest.mark.parametrize(
    ("counts", "order"),
    [
        ([], []),
        ([0], []),
        ([2, 3], [0, 1]),
        ([3, -1], [0, 1, 2]),
        ([-1], []),
        ([1 << 62] * 4, [0]),
        ([3, 3], [0, 1, 2]),
        ([2, 1], [0, 2]),
        ([2, 1], [0, -1]),
        ([2, 1], [0, 1, 1]),
        ([2, 1], [0]),
    ],
    ids=str,
)
def test_what_are_no_counts_or_no_order(counts, order):
    """Of no more than 5 rows of all steps."""
    assert Tables(torch.tensor(counts, dtype=torch.int64), 5, [torch.tensor(order, dtype=torch.int64)]).rows == -1
