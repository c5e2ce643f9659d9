"""``python -m bench [NAME...]``: measure, print one table, exit 1 where a bound is missed by more than the spread."""

from __future__ import annotations

import importlib
import sys

from bench.table import Row, table

NAMES = ("loads", "doors", "events", "recovery", "replicas", "overload", "trees", "virtual")


def main() -> None:
    """Run the benchmarks named, or all."""
    names = sys.argv[1:] or list(NAMES)
    unknown = sorted(set(names) - set(NAMES))
    if unknown:
        raise SystemExit(f"there is no benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}")
    rows: list[Row] = []
    for name in names:
        print(f"measuring {name} ...", file=sys.stderr)
        rows += importlib.import_module(f"bench.bench_{name}").run()
    print(table(rows))
    if any(row.missed for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
