"""The process that measures: pinned before anything starts a thread, it writes a line of JSON for each result."""

from __future__ import annotations

import json
import sys
from time import perf_counter

from benchmarks import machine
from benchmarks.cases import Case


def main() -> None:
    begin, order = perf_counter(), json.loads(sys.argv[1])
    threads, seconds = order["threads"], 60 * order["minutes"]
    machine.pin(threads)
    from benchmarks import providers, runner

    found = providers.load()
    chosen = {name: found[name] for name in order["providers"] or found}
    facts = machine.describe(threads) | {"roof": machine.roof(threads)}
    print(json.dumps({"kind": "machine", **facts}), flush=True)
    cases = [Case(**fields) for fields in order["cases"]]
    effort = sum(case.effort for case in cases)
    for case in cases:  # what one does not need of its share of the time, those after it have
        spent = perf_counter() - begin
        if spent > 2 * seconds:
            rows = runner.late(case, chosen)
        else:
            share = max(0.0, seconds - spent) * case.effort / effort
            rows = runner.measure(case, chosen, order["suite"], share, facts["roof"])
        effort -= case.effort
        for row in rows:
            print(row.to_json(), flush=True)
        print("done", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
