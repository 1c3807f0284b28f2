"""nsga2 in steady state against pymoo's generational NSGA-II after 300 evaluations, random search beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.search import problems, race

SEEDS = 20


def measure(quick: bool, storage: Path) -> dict[str, Any]:
    """Returns the ratio of hypervolumes by problem, with paired intervals."""
    seeds, at = (range(2), (30, 40)) if quick else (range(SEEDS), (100, 300))
    names = problems.available()[:1] if quick else problems.available()
    options = {"nsga2": {"population": race.POPULATION}}
    wanted = [
        {"problem": problem, "algorithm": algorithm, "seed": seed, "options": options.get(algorithm, {}), "at": list(at)}
        for problem in names for algorithm in ("nsga2", "pymoo", "random") for seed in seeds
    ]  # fmt: skip
    found = race.runs(wanted, storage / "nsga2.jsonl")
    volumes = {(run["problem"], run["algorithm"], run["seed"]): run["volumes"] for run in found}
    rows = []
    for problem in names:
        ours, pymoo, chance = ([volumes[problem, who, seed] for seed in seeds] for who in ("nsga2", "pymoo", "random"))
        row = {"problem": problem}
        for i, trials in enumerate(at):
            found = race.compare([run[i] for run in ours], [run[i] for run in pymoo])
            row |= {f"pymoo_{trials}": found["ratio"], f"difference_{trials}": found["difference"]}
            row[f"random_{trials}"] = race.compare([run[i] for run in ours], [run[i] for run in chance])["difference"]
        rows.append(row)
    return {"nsga2_vs_pymoo_300": {row["problem"]: row[f"pymoo_{at[-1]}"] for row in rows}, "nsga2": rows}
