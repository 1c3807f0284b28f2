"""How good the search is: against what people use, on surrogates and tables recorded by others and by ourselves.

    python -m benchmarks.search [--quick] [--storage DIR] [--only PART ...]

Each part is a module of this package with `measure(quick, storage) -> dict`; what it measures and against which peer is said
there. Every run of a seed is appended to a file in --storage as it ends; the same command goes on with those that lack. Problems
need the bench extra (pip install -e '.[bench]') and the data in PARETUNE_SHARED; those whose data is absent are named.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import time
from pathlib import Path

from benchmarks import record

PARTS = ("bayes", "nsga2", "slots", "speed", "prior", "stopping")
# What was promised of it: the figure, and whether it holds.
TARGETS = {
    "bayes_60_vs_optuna_100": ("at least 1 each", lambda value: min(value.values()) >= 1),
    "nsga2_vs_pymoo_300": ("at least 1 each", lambda value: min(value.values()) >= 1),
    "utilisation": ("at least 0.90", lambda value: value >= 0.9),
    "stopping_cost_ratio": ("at least 3", lambda value: value >= 3),
    "stopping_hypervolume_ratio": ("at least 0.99", lambda value: value >= 0.99),
    "stopping_vs_fixed_share": ("above 1 each", lambda value: min(value.values() if isinstance(value, dict) else [value]) > 1),
    "oom_share_gate": ("at most 0.02", lambda value: value <= 0.02),
    "oom_share_plain": ("at most 0.10", lambda value: value <= 0.1),
    "suggest_ms_1000": ("at most 100", lambda value: value <= 100),
    "prior_cost": ("at most 0.10", lambda value: value <= 0.1),
}


def main() -> None:
    options = record.arguments(__doc__.split("\n")[0], PARTS)
    storage = Path(options.storage).absolute() / ("search-quick" if options.quick else "search")
    storage.mkdir(parents=True, exist_ok=True)
    parts = {}
    for name in PARTS:
        if name in options.only and importlib.util.find_spec(f"benchmarks.search.{name}"):
            parts[name] = _part(name, storage, options.quick)
            print(f"\n{name} ({parts[name]['took_seconds']} s)")
            for key, value in parts[name].items():
                record.show(key, value)
    figures = {name: next((found[name] for found in parts.values() if name in found), None) for name in TARGETS}
    print()
    for name, (wanted, holds) in TARGETS.items():
        value = figures[name]
        shown = min(value.values()) if isinstance(value, dict) else value
        print(f"{name:28} {shown!s:>10}   {wanted:16} {'not measured' if value is None else 'yes' if holds(value) else 'NO'}")
    record.finish("search", figures | parts, quick=options.quick or set(options.only) != set(PARTS))


def _part(name: str, storage: Path, quick: bool) -> dict:
    print(f"{name} ...", file=sys.stderr, flush=True)
    began = time.monotonic()
    if quick:  # it shows that all of it works, so it is always a new one
        (storage / f"{name}.jsonl").unlink(missing_ok=True)
    found = importlib.import_module(f"benchmarks.search.{name}").measure(quick, storage)
    return json.loads(json.dumps(found)) | {"took_seconds": round(time.monotonic() - began, 1)}


if __name__ == "__main__":
    main()
