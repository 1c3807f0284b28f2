"""bayes after 60 trials against Optuna's default sampler after 100, and against random search all the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.search import problems, race

AT = (20, 40, 60, 100)
SEEDS = 20


def measure(quick: bool, storage: Path) -> dict[str, Any]:
    """Returns the ratio of hypervolumes by problem, with paired intervals, and ours against random at each of AT."""
    seeds, at = (range(2), (12, 14)) if quick else (range(SEEDS), AT)
    names = problems.available()[:1] if quick else problems.available()
    wanted = [
        {"problem": problem, "algorithm": algorithm, "seed": seed, "options": {}, "at": list(at)}
        for problem in names for algorithm in ("bayes", "optuna", "random") for seed in seeds
    ]  # fmt: skip
    found = race.runs(wanted, storage / "bayes.jsonl")
    volumes = {(run["problem"], run["algorithm"], run["seed"]): run["volumes"] for run in found}
    rows, against = [], {}
    for problem in names:
        ours, optuna, chance = ([volumes[problem, who, seed] for seed in seeds] for who in ("bayes", "optuna", "random"))
        against[problem] = race.compare([run[-2] for run in ours], [run[-1] for run in optuna])
        row = {"problem": problem, f"bayes_{at[-2]}/optuna_{at[-1]}": against[problem]["ratio"]}
        row |= {"difference": against[problem]["difference"]}
        for i, trials in enumerate(at):
            row[f"random_{trials}"] = race.compare([run[i] for run in ours], [run[i] for run in chance])["difference"]
        rows.append(row)
    worse = [f"{row['problem']} at {name.removeprefix('random_')}" for row in rows
             for name, value in row.items() if name.startswith("random_") and value[1] < 0]  # fmt: skip
    return {
        "bayes_60_vs_optuna_100": {problem: found["ratio"] for problem, found in against.items()},
        "bayes": rows,
        "below_random": worse,
        "problems_missing": [name for name in problems.NAMES if name not in problems.available()],
    }
