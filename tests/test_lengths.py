"""Tables of the sequences that each time step has, and of the stretches of a batch between resets."""

import ctypes

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcells.cpu import team
from fastcells.cpu.lengths import Stretches, Tables


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


@given(data=st.data(), size=st.integers(1, 5), steps=st.integers(1, 7), first=st.booleans(), reverse=st.booleans())
@settings(max_examples=100, deadline=None)
def test_stretches(data, size, steps, first, reverse):
    """Against a loop over sequences and steps. first: the batch is [N, T]."""
    ends = np.array(data.draw(st.lists(st.integers(0, steps), min_size=size, max_size=size)))
    resets = np.array(data.draw(st.lists(st.booleans(), min_size=size * steps, max_size=size * steps)))
    resets = resets.reshape(size, steps) if first else resets.reshape(steps, size).T
    given = resets if data.draw(st.booleans()) else None
    time, sequence = (1, steps) if first else (size, 1)
    found = []
    for n, end in enumerate(ends if ends.any() else [1] + [0] * (size - 1)):
        cuts = [t for t in range(1, end) if given is not None and given[n, t]]
        found += [(n, start, stop, stop < end) for start, stop in zip([0, *cuts], [*cuts, end], strict=True) if stop]
    found.sort(key=lambda s: s[1] - s[2])  # which keeps the order of equally long ones
    cut = Stretches(ends, given, steps, time, sequence, reverse)
    assert cut.column.tolist() == [n for n, *_ in found]
    assert cut.counts.tolist() == [sum(b - a > t for _, a, b, _ in found) for t in range(found[0][2] - found[0][1])]
    assert cut.first.tolist() == [(b - 1 if reverse else a) * time + n * sequence for n, a, b, _ in found]
    entered = [given is not None and bool(given[n, a]) for n, a, _, _ in found]
    assert [t.astype(bool).tolist() for t in cut.after] == [entered, [follows for *_, follows in found]]
    for leaves, last in zip(cut.leaves, ([not f for *_, f in found], [a == 0 for _, a, _, _ in found]), strict=True):
        for k, ((n, *_), chosen) in enumerate(zip(found, last, strict=True)):
            assert not chosen or leaves[n] == k
    expected = [len(found), ends.sum(), found[0][2] - found[0][1], 0, (ends == 0).sum(), any(entered)]
    assert list(cut.found.values()) == [*expected, any(follows for *_, follows in found)]


def test_what_are_no_steps_of_sequences():
    assert Stretches(np.array([3, -1, 4, 2]), None, 3, 4, 1, False).found["wrong"] == 2
