"""Rows of results: one JSON object a line, each a measurement or, before them, a machine. Reading, ratios, gate."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import geometric_mean
from typing import Any, NamedTuple

import numpy as np

from benchmarks.cases import Case
from benchmarks.providers import OURS


@dataclass
class Row:
    """A provider's measurement of a case.

    status: "ok", "wrong" (its answer), "absent" (not installed), "unsupported" or "failed", `reason` says more; only
    "ok" has numbers. samples: seconds, or bytes where that is the unit, one a round; rounds are in step with those of
    the case's other providers. ratio: median of the samples over those of fastcells, round by round, more than 1 where
    fastcells is better. prepare_s: to build, compile and call once. share: of the roof named by `roof`.
    """

    case: Case
    provider: str
    status: str
    reason: str = ""
    device: str = "cpu"
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

    def add(self, text: str) -> Row | None:
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
    for number, text in enumerate(path.read_text().splitlines(), 1):
        try:
            results.add(text)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: not a result of this suite ({error})") from error
    return results


def best_peer(rows: Mapping[str, Row]) -> Row | None:
    """The fastest provider of a case on the same device other than fastcells, or None."""
    peers = [row for name, row in rows.items() if name != OURS and row.ratio is not None and row.device == "cpu"]
    return min(peers, key=lambda row: row.ratio or 0.0, default=None)


def ratios(results: Results) -> dict[Case, float]:
    """For each timed case, how many times faster than its best peer fastcells is."""
    peers = {case: best_peer(rows) for case, rows in results.by_case.items() if case.kind.unit == "s"}
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


class Move(NamedTuple):
    """How a measurement changed. change: median after over before. moved: beyond the quartiles of both."""

    case: Case
    provider: str
    change: float
    moved: bool


def compare(before: Results, after: Results) -> list[Move]:
    """The measurements that both files have."""

    def measured(rows: Iterable[Row]) -> dict[tuple[Case, str], Row]:
        return {(row.case, row.provider): row for row in rows if row.median}

    old, new = measured(before.rows), measured(after.rows)
    moves = []
    for (case, provider), a in old.items():
        if (b := new.get((case, provider))) is not None:
            apart = b.quartile_1 > a.quartile_3 or b.quartile_3 < a.quartile_1  # type: ignore[operator]
            moves.append(Move(case, provider, b.median / a.median, apart))  # type: ignore[operator]
    return sorted(moves, key=lambda move: move.change)
