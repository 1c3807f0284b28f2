"""What a wrong prior costs bayes: it begins with the worst points in accuracy that 500 draws found, a tenth of the trials.

The comparison is the same seed without a prior, after the same number of trials, the wrong ones counted.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks.search import problems, race
from hpo import prior

SEEDS, TRIALS = 20, 60
NAMES = ("lcbench_189873", "table_phoneme", "xgboost_12")


def measure(quick: bool, storage: Path) -> dict[str, Any]:
    """Returns the share of the hypervolume that a wrong prior costs, the worst of the problems, and each with its interval."""
    seeds, trials = (range(2), 14) if quick else (range(SEEDS), TRIALS)
    names = [name for name in NAMES if name in problems.available()][: 1 if quick else None]
    wanted = [
        {"problem": name, "algorithm": "bayes", "seed": seed, "options": {}, "at": [trials], "given": given}
        for name in names for seed in seeds for given in (0, prior.count(trials))
    ]  # fmt: skip
    found = race.runs(wanted, storage / "prior.jsonl")
    rows = []
    for name in names:
        misled, without = (
            [run["volumes"][0] for run in found if run["problem"] == name and bool(run["given"]) == given]
            for given in (True, False)
        )
        rows.append({"problem": name, "cost": round(1 - statistics.fmean(misled) / statistics.fmean(without), 4),
                     "difference": race.compare(misled, without)["difference"]})  # fmt: skip
    return {"prior_cost": max((row["cost"] for row in rows), default=None), "prior": rows}
