"""The process that measures: pinned before anything starts a thread, it writes a line of JSON for each result."""

from __future__ import annotations

import json
import sys

from benchmarks import machine
from benchmarks.cases import Case


def main() -> None:
    order = json.loads(sys.argv[1])
    threads = order["threads"]
    machine.pin(threads)
    from benchmarks import providers
    from benchmarks.runner import measure

    found = providers.load()
    chosen = {name: found[name] for name in order["providers"] or found}
    facts = machine.describe(threads) | {"roof": machine.roof(threads)}
    print(json.dumps({"kind": "machine", **facts}), flush=True)
    for fields in order["cases"]:
        for row in measure(Case(**fields), chosen, order["suite"], order["seconds"], facts["roof"]):
            print(row.to_json(), flush=True)
        print("done", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
