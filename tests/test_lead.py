"""Scripts run on the team while that pays, and on one thread while its threads are not given their turn."""

import ctypes

import pytest
import torch

import fastcells
from fastcells.cpu import store, team
from fastcells.cpu.frame import SCRIPT, TEAM
from fastcells.cpu.lead import make_lead
from fastcells.cpu.team import ALONE, CREDIT, MOST_CREDIT

MS = 1_000_000  # nanoseconds


def test_a_library_may_lie_in_a_folder_with_a_space():
    lines = ["7f3a1000-7f3a2000 r-xp 00001000 fe:00 1234    /a b/libgomp-x.so.1\n", "7f3b1000-7f3b2000 rw-p 0 0:00 0\n"]
    assert team._mapped(lines) == {"/a b/libgomp-x.so.1"}


Words = ctypes.POINTER(ctypes.c_int64)
Clock = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int32, Words)
Parallel = ctypes.CFUNCTYPE(None, ctypes.c_int64, Words, ctypes.c_int32, ctypes.c_int32)
Driver = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)


class Machine:
    """A team, a clock, and a script of one millisecond on the team."""

    def __init__(self, threads: int = 2, alone: float = 2.0) -> None:
        self.time, self.late, self.ran = 10 * MS, 0, []

        def clock(_, place):
            place[0], place[1] = divmod(self.time, 10**9)
            return 0

        def parallel(member, given, count, flags):
            assert (member, count, flags) == (7, threads, 0)
            assert given[:4] == [self.address(self.driver), ctypes.addressof(self.script), 8, 9]
            self.ran.append("team")
            self.time += MS + self.late

        def driver(script, thread, count):
            assert (script, thread, count) == (ctypes.addressof(self.script), 0, 1)
            self.ran.append("alone")
            self.time += int(alone * MS)

        self.clock, self.parallel, self.driver = Clock(clock), Parallel(parallel), Driver(driver)
        self.fastest = (ctypes.c_int64 * 2)()
        self.script = self.frame(SCRIPT, threads=threads, team=threads, fastest=ctypes.addressof(self.fastest))
        functions = {"parallel": self.address(self.parallel), "clock": self.address(self.clock)}
        self.team = self.frame(TEAM, **functions, member=7, thread_num=8, num_threads=9, credit=CREDIT)
        self.kernel = store.kernel("lead", [], make_lead)

    @staticmethod
    def address(function) -> int:
        return ctypes.cast(function, ctypes.c_void_p).value

    @staticmethod
    def frame(names, **words):
        return (ctypes.c_int64 * len(names))(*[words.get(name, 0) for name in names])

    def run(self, times: int = 1, late: int = 0) -> list[str]:
        """What the script ran on each time, on a team that comes late by so much."""
        self.ran, self.late = [], late
        for _ in range(times):
            self.kernel.call(self.script, ctypes.addressof(self.team), self.address(self.driver))
        return self.ran

    def alone(self, late: int) -> int:
        """How often the script runs alone after a team that came so late."""
        assert self.run(late=late) == ["team"]
        count = 0
        while self.run() == ["alone"]:
            count += 1
        return count


def test_a_team_that_does_well():
    assert Machine().run(50) == ["team"] * 50


def test_a_late_team_is_left_alone_for_a_while():
    machine = Machine()
    machine.run()
    assert machine.alone(late=CREDIT + 3 * MS) == ALONE // (2 * MS)
    assert machine.run(late=CREDIT - 2 * MS) == ["team"]  # may lose as much as at first
    assert machine.alone(late=6 * MS) == ALONE // (2 * MS)


def test_a_turn_lost_now_and_then_costs_less_than_the_team_brings():
    machine = Machine()
    for _ in range(20):
        assert machine.run(20) + machine.run(late=15 * MS) == ["team"] * 21


def test_a_team_that_did_well_may_lose_more():
    machine = Machine()
    machine.run(1000)
    assert machine.run(late=MOST_CREDIT) == ["team"]
    assert machine.run() == ["team"]
    assert machine.alone(late=5 * MS) > 0


def test_many_threads_bring_more_than_a_late_one_costs():
    machine = Machine(threads=16, alone=16)
    machine.run()
    for _ in range(20):
        assert machine.run() + machine.run(late=9 * MS) == ["team"] * 2


def test_what_one_thread_takes_is_known_once_it_was_alone():
    machine = Machine(threads=4, alone=0.5)
    assert machine.run(200) == ["team"] * 200  # may be four times as fast
    machine.run(late=MOST_CREDIT + 4 * MS)
    machine.run()
    assert [*machine.fastest] == [MS, MS // 2]
    assert machine.run(2000).count("team") < 500


def test_a_clock_between_two_seconds():
    machine = Machine()
    machine.time = 10**18 + 999_999_999
    machine.run(3)
    assert machine.fastest[0] == MS


@pytest.mark.parametrize(
    ("files", "granted"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "250000 100000\n"}, 3),
        ({"cpu.max": "1000 100000\n"}, 1),
        ({"cpu.max": "1600000 100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
    ],
)
def test_no_more_threads_than_a_container_is_granted(files, granted, tmp_path):
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert team._granted(8, tmp_path) == granted


def test_no_more_threads_than_processors(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(64)
    try:
        monkeypatch.setattr(team, "processors", lambda: 3)
        assert team.size() == (3 if team.library() else 1)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(team._openmp() is None, reason="no library with a team")
def test_packed_weights_that_are_kept_while_the_team_comes_and_goes():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    words = team.leading()[1]
    layer, x = fastcells.nn.LSTM(128, 128), torch.randn(20, 16, 128)
    first, second = layer.weight_hh_l0.detach().clone(), torch.randn(512, 128)
    found, alone = [], TEAM.index("alone")
    try:
        with torch.no_grad():
            for weight in (first, first, first, second, first):
                words[alone] = (1 << 62) if weight is second else 0
                words[TEAM.index("credit")] = MOST_CREDIT
                layer.weight_hh_l0.data.copy_(weight)
                found.append(layer(x)[0])
            words[alone] = 0
            expected = torch.nn.LSTM(128, 128)
            expected.load_state_dict(layer.state_dict())
            torch.testing.assert_close(found[-1], expected(x)[0])
            assert all(torch.equal(found[k], found[0]) for k in (1, 2, 4))
    finally:
        words[alone] = 0
        torch.set_num_threads(threads)
