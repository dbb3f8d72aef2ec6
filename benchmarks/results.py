"""Rows of results: one JSON object a line, each a measurement or, before them, a machine. Reading, ratios, gate."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import geometric_mean
from typing import Any, NamedTuple

import numpy as np

from benchmarks.cases import Case
from benchmarks.providers import OURS, PLAIN_LAYER


@dataclass
class Row:
    """A provider's measurement of a case.

    status: "ok", "wrong" (its answer), "absent" (not installed), "unsupported", "late" (no time was left) or "failed",
    `reason` says more; only "ok" has numbers. peer: one to be faster than. samples: seconds, or bytes where that is the
    unit, one a round; rounds are in step with those of the case's other providers. ratio: median of the samples over
    those of fastcells, round by round, more than 1 where fastcells is better. prepare_s: to build, compile and call
    once. share: of the roof named by `roof`.
    """

    case: Case
    provider: str
    status: str
    reason: str = ""
    peer: bool = True
    unit: str = "s"
    prepare_s: float | None = None
    samples: list[float] = field(default_factory=list)
    minimum: float | None = None
    quartile_1: float | None = None
    median: float | None = None
    quartile_3: float | None = None
    ratio: float | None = None
    ratio_quartile_1: float | None = None
    ratio_quartile_3: float | None = None
    gigaflops: float | None = None
    roof: str = ""
    share: float | None = None
    held_bytes: int | None = None

    def summarise(self, ours: Sequence[float]) -> None:
        """Fill in the statistics, `ours` being the samples of fastcells."""
        self.minimum = min(self.samples)
        self.quartile_1, self.median, self.quartile_3 = quartiles(self.samples)
        paired = [a / b for a, b in zip(self.samples, ours, strict=False) if b > 0]
        if paired:
            self.ratio_quartile_1, self.ratio, self.ratio_quartile_3 = quartiles(paired)

    def to_json(self) -> str:
        values = asdict(self)
        return json.dumps({"kind": "measurement", **values.pop("case"), **values})

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Row:
        case = Case(**{name: values.pop(name) for name in Case.__dataclass_fields__})
        return cls(case=case, **{name: values[name] for name in cls.__dataclass_fields__ if name in values})


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    first, middle, third = np.quantile(samples, (0.25, 0.5, 0.75))
    return float(first), float(middle), float(third)


class Results(NamedTuple):
    """A file of results. machines: by thread count."""

    machines: dict[int, dict[str, Any]]
    rows: list[Row]

    def add(self, text: str | bytes) -> Row | None:
        """Take in one line of a file."""
        values = json.loads(text)
        kind = values.pop("kind")
        if kind == "machine":
            self.machines[values["threads"]] = values
            return None
        self.rows.append(Row.from_json(values))
        return self.rows[-1]

    @property
    def by_case(self) -> dict[Case, dict[str, Row]]:
        """The rows by case and provider."""
        found: dict[Case, dict[str, Row]] = defaultdict(dict)
        for row in self.rows:
            found[row.case][row.provider] = row
        return dict(found)


def read(path: Path) -> Results:
    """Raises ValueError naming the file and the line that is no result, and OSError."""
    results = Results({}, [])
    for number, text in enumerate(path.read_bytes().splitlines(), 1):
        try:
            results.add(text)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: not a result of this suite ({error})") from error
    return results


#: A call of a few microseconds is mostly the caller's framework: autograd's own cost is torch's, whoever computes.
SINGLE_STEP = "training of a single step is compared with torch.nn alone: most of its time is torch's autograd engine"


def best_peer(rows: Mapping[str, Row]) -> Row | None:
    """The fastest peer of a case, or None. See also `SINGLE_STEP`."""
    peers = [row for name, row in rows.items() if name != OURS and row.peer and row.ratio is not None]
    if peers and single_step(peers[0].case):
        peers = [row for row in peers if row.provider == "torch.nn"]
    return min(peers, key=lambda row: row.ratio or 0.0, default=None)


def single_step(case: Case) -> bool:
    return case.T == 1 and case.how.call != "forward"


def over_plain(rows: Mapping[str, Row]) -> float | None:
    """Time of a variant over that of the plain layer at the same shape, None where that was not measured."""
    plain = rows.get(PLAIN_LAYER)
    return 1 / plain.ratio if plain is not None and plain.ratio else None


def ratios(results: Results) -> dict[Case, float]:
    """For each timed case, how many times faster than its best peer fastcells is."""
    peers = {case: best_peer(rows) for case, rows in results.by_case.items() if case.how.unit == "s"}
    return {case: peer.ratio for case, peer in peers.items() if peer is not None and peer.ratio is not None}


def gate(results: Results, geomean: float | None, worst: float | None) -> list[str]:
    """What keeps the results from passing: wrong answers, failures, ratios to the best peer under the thresholds."""
    found = [
        f"{row.case}: {row.provider} is {row.status}: {row.reason}" for row in results.rows if row.status == "wrong"
    ]
    found += [
        f"{row.case}: {OURS} is {row.status}: {row.reason}"
        for row in results.rows
        if row.provider == OURS and row.status not in ("ok", "wrong")
    ]
    against = ratios(results)
    if not against:
        return [*found, "no case has both fastcells and a peer to compare"]
    case, least = min(against.items(), key=lambda item: item[1])
    if geomean is not None and (mean := geometric_mean(against.values())) < geomean:
        found.append(f"geometric mean of the ratios to the best peer is {mean:.3f}, under {geomean}")
    if worst is not None and least < worst:
        found.append(f"worst ratio to the best peer is {least:.3f}, of {case}, under {worst}")
    return found


LEAST_MOVE = 1.03  # two processes differ by that much through where their memory lies


class Move(NamedTuple):
    """How a measurement changed. change: after over before. moved: beyond the quartiles of both, and LEAST_MOVE."""

    case: Case
    provider: str
    change: float
    moved: bool


def compare(before: Results, after: Results, reference: str | None = "torch.nn") -> list[Move]:
    """The measurements that both files have, each as the paired ratio to the case's `reference`, so that a machine that
    became faster or slower cancels out; as they are where there is none, and for the reference itself."""

    def measured(results: Results) -> dict[tuple[Case, str], tuple[float, float, float]]:
        found = {}
        for case, rows in results.by_case.items():
            base = rows.get(reference or "")
            for name, row in rows.items():
                if row.samples:
                    others = base.samples if base is not None and base.samples and name != reference else []
                    pairs = [a / b for a, b in zip(row.samples, others, strict=False) if b > 0]
                    found[case, name, bool(pairs)] = quartiles(pairs or row.samples)
        return found  # type: ignore[return-value]

    old, new = measured(before), measured(after)
    moves = []
    for key, (first, middle, third) in old.items():
        if key in new:
            change = new[key][1] / middle
            apart = new[key][0] > third or new[key][2] < first
            moves.append(Move(*key[:2], change, apart and max(change, 1 / change) > LEAST_MOVE))
    return sorted(moves, key=lambda move: move.change)
