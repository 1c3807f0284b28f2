"""What early stopping saves and what it loses, and how often trials run into a wall with a gate before it and without.

Owns: `measure`. Studies run on a virtual clock, by the same search and the same rules as real ones. For each seed the same
random points are trained without stopping, by `front`, by `asha` and by the control, which judges everybody at a fixed share
(`fixed`; at each of several shares, so that it is not beaten by a poor choice of it), all until the same cost is spent.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.search import curves, race, scale, wall
from benchmarks.search.curves import Curves
from hpo.growth import finished_in_order
from hpo.objectives import losses
from hpo.pareto import eligible, front
from hpo.simulator import simulate
from hpo.spec import Spec
from hpo.trial import Trial
from training.recipe import Recipe

SEEDS, TRIALS = 20, 60
RULES: dict[str, dict[str, Any]] = {
    "none": {}, "front": {}, "asha": {}, "fixed 0.1": {"share": 0.1}, "fixed 0.25": {"share": 0.25}, "fixed 0.5": {"share": 0.5},
}  # fmt: skip
BUDGETS = (0.1, 0.2, 0.3, 0.5, 0.75, 1.0)  # parts of what the study costs without stopping
MORE = 8  # times as many trials may be begun by who stops early, until the cost is spent


def measure(quick: bool, storage: Path) -> dict[str, Any]:
    """Returns cost and hypervolume of each rule against no stopping, `front` against the control at each budget, and the wall."""
    seeds, names = (2, curves.names()[:1]) if quick else (SEEDS, curves.names())
    journal = storage / "stopping.jsonl"
    known = {(run["problem"], run["seed"]): run for run in race.read(journal)}
    with journal.open("a") as file:
        for seed in range(seeds):
            for name in names:
                if (name, seed) not in known:
                    known[name, seed] = {"problem": name, "seed": seed, "rules": _rules(curves.load(name), seed)}
                    file.write(json.dumps(known[name, seed]) + "\n")
                    file.flush()
    runs = [known[name, seed] for name in names for seed in range(seeds)]
    return _figures(names, runs) | wall.measure(quick, storage) | scale.measure(quick, storage)


def _rules(problem: Curves, seed: int) -> dict[str, Any]:
    """Returns of each rule: cost and hypervolume of TRIALS trials, and the hypervolume at each budget of cost."""
    whole = _trials(problem, seed, "none", None)
    cost = sum(t.outcome.seconds for t in whole)
    found = {}
    for rule in RULES:
        long = whole if rule == "none" else _trials(problem, seed, rule, cost)
        first = sorted(long, key=lambda t: t.number)[:TRIALS]
        best = {t.number for t in front(whole, problem.objectives)}
        found[rule] = {
            "cost": sum(t.outcome.seconds for t in first), "hypervolume": problem.volume(first),
            # Who knew the front would train its members alone, and the others not at all.
            "oracle": sum(t.outcome.seconds for t in whole if t.number in best),
            "complete": sum(t.state == "complete" for t in first), "unfinished_on_front": _unfinished(problem, long),
            "at": [_at(problem, long, cost * part) for part in BUDGETS],
        }  # fmt: skip
    return found


def _trials(problem: Curves, seed: int, rule: str, cost: float | None) -> list[Trial]:
    name, _, _ = rule.partition(" ")
    spec = Spec.model_validate({
        "name": "simulated", "storage": "/nowhere", "data": {"train": "nothing"}, "space": problem.space.model_dump(),
        "objectives": [o.name for o in problem.objectives], "algorithm": {"name": "random"}, "seed": seed,
        "stopping": {"name": name, "options": RULES[rule]}, "resources": {"price": 3600},
        "budget": {"trials": TRIALS if cost is None else TRIALS * MORE, "cost": cost},
    })  # fmt: skip
    made = simulate(spec, lambda trial: problem.course(trial.params), resolve=lambda params: RECIPE)
    return [t for t in made.trials if t.outcome is not None]


RECIPE = Recipe()  # of every point: what is searched are no fields of a recipe


def _at(problem: Curves, trials: Sequence[Trial], cost: float) -> float:
    """Returns the hypervolume of what was complete when this was spent."""
    spent, there = 0.0, []
    for trial in finished_in_order(trials):
        spent += trial.outcome.seconds
        if spent > cost * (1 + 1e-9):
            break
        there.append(trial)
    return problem.volume(there)


def _unfinished(problem: Curves, trials: Sequence[Trial]) -> int:
    return sum(not eligible(t) or losses(t, problem.objectives) is None for t in front(trials, problem.objectives))


def _figures(names: Sequence[str], runs: Sequence[dict]) -> dict[str, Any]:
    table, against = [], {}
    for name in names:
        mine = [run["rules"] for run in runs if run["problem"] == name]
        for rule in RULES:
            table.append({
                "problem": name, "rule": rule,
                "cost_ratio": round(statistics.fmean(r["none"]["cost"] / r[rule]["cost"] for r in mine), 3),
                "hypervolume_ratio": round(statistics.fmean(r[rule]["hypervolume"] / r["none"]["hypervolume"] for r in mine), 4),
                "worst_seed": round(min(r[rule]["hypervolume"] / r["none"]["hypervolume"] for r in mine), 4),
                "complete": round(statistics.fmean(r[rule]["complete"] for r in mine), 1),
                **{f"at {part:g}": round(statistics.fmean(r[rule]["at"][i] for r in mine), 4) for i, part in enumerate(BUDGETS)},
            })  # fmt: skip
        controls = [rule for rule in RULES if rule.startswith("fixed")]
        for i, part in enumerate(BUDGETS):
            best = max(controls, key=lambda rule: statistics.fmean(r[rule]["at"][i] for r in mine))
            ours = statistics.fmean(r["front"]["at"][i] for r in mine)
            theirs = statistics.fmean(r[best]["at"][i] for r in mine)
            differences = [r["front"]["at"][i] - r[best]["at"][i] for r in mine]
            ratio = round(ours / theirs, 4) if theirs else None
            against[f"{name} at {part:g}"] = {"ratio": ratio, "control": best, "difference": _interval(differences)}
    ours = [row for row in table if row["rule"] == "front"]
    # The control that saves as much as `front` does judges at a quarter; those of all shares are in the tables.
    same = {f"at {part:g}": round(statistics.fmean(
                statistics.fmean(r["rules"]["front"]["at"][i] for r in runs if r["problem"] == name)
                / statistics.fmean(r["rules"]["fixed 0.25"]["at"][i] for r in runs if r["problem"] == name) for name in names), 4)
            for i, part in enumerate(BUDGETS)}  # fmt: skip
    return {
        "stopping_cost_ratio": round(statistics.fmean(row["cost_ratio"] for row in ours), 3),
        "stopping_hypervolume_ratio": round(statistics.fmean(row["hypervolume_ratio"] for row in ours), 4),
        "stopping_vs_fixed_share": same,
        "stopping_cost_ratio_by_problem": {row["problem"]: row["cost_ratio"] for row in ours},
        "stopping_cost_ratio_of_an_oracle": {
            name: round(statistics.fmean(r["rules"]["none"]["cost"] / r["rules"]["none"]["oracle"]
                                         for r in runs if r["problem"] == name), 3) for name in names
        },
        "unfinished_on_fronts": sum(r["rules"][rule]["unfinished_on_front"] for r in runs for rule in RULES),
        "stopping_against_the_best_control": against, "stopping_rules": table, "stopping_seeds": len(runs) // max(1, len(names)),
    }  # fmt: skip


def _interval(values: Sequence[float]) -> list[float]:
    """Returns the 95 % bootstrap interval of the mean over seeds."""
    chance = Random(0)
    draws = sorted(statistics.fmean(chance.choices(values, k=len(values))) for _ in range(2000))
    return [round(draws[49], 4), round(draws[1949], 4)]
