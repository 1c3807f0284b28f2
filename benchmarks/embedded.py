"""Is the embedded default honest? Untuned, defaults, best of 16, a poor choice and a diverging rate, over seeds.

    python -m benchmarks.embedded [--quick]

Every score is exact match on the 600 test rows, which no trial saw, except where it says validation.
"""

from __future__ import annotations

import statistics

import hpo
from benchmarks import record
from hpo import spec
from training.loop import train
from training.measure import compare
from training.recipe import Job, Recipe
from training.workers import quiet

SEEDS = (0, 1, 2)
POOR = {"rank": 4, "alpha": 4, "learning_rate": 2e-5, "epochs": 1}
DIVERGING = {"rank": 32, "alpha": 64, "learning_rate": 10.0, "epochs": 1, "warmup": 0.0}


def main() -> None:
    options = record.arguments(__doc__.split("\n")[0])
    seeds, trials = ((0,), 3) if options.quick else (SEEDS, 16)
    quiet()
    rows = [one(seed, trials, options) for seed in seeds]
    print(f"{'seed':>4} {'untuned':>8} {'poor':>8} {'defaults':>9} {'winner':>8} {'best (validation)':>18}  too large a rate")
    for row in rows:
        print(f"{row['seed']:>4} {row['untuned']:8.3f} {row['poor']:8.3f} {row['defaults']:9.3f} {row['winner']:8.3f} "
              f"{row['best_validation']:18.3f}  {row['diverging']}")  # fmt: skip
    figures = {
        name: round(statistics.mean(row[name] for row in rows), 4)
        for name in ("untuned", "poor", "defaults", "winner", "best_validation")
    }
    record.finish("embedded", figures | {"trials": trials, "rows": rows}, quick=options.quick)


def one(seed: int, trials: int, options) -> dict:
    sets = [f"name=embedded-{trials}-{seed}", f"storage={options.storage}", f"seed={seed}", f"recipe.seed={seed}",
            f"budget.trials={trials}", "resources.mode=local"]  # fmt: skip
    sets += ["data.limit=200", "evaluation.rows=50", "evaluation.test_rows=50"] if options.quick else []
    study = hpo.run("quickstart", sets)
    scores = {s.who: s.accuracy.value for s in study.certificate.scores}
    best = max(t.outcome.scores["accuracy"] for t in study.front())
    poor = _test_score(Recipe(**(study.spec.recipe.model_dump() | POOR)), study, options)
    large = train(_job(Recipe(**(study.spec.recipe.model_dump() | DIVERGING)), study, None))
    return {"seed": seed, **{k: scores[k] for k in ("untuned", "defaults", "winner")}, "poor": poor, "best_validation": best,
            "diverging": f"{large.ended}: {large.reason}", "winner_trial": study.winner().number,
            "states": study.trials()["state"].value_counts().to_dict()}  # fmt: skip


def _job(recipe: Recipe, study, output: str | None) -> Job:
    data = spec.load("quickstart").spec.data.model_copy(update={"limit": study.spec.data.limit})
    return Job(recipe=recipe, data=data, evaluation=study.spec.evaluation, output=output)


def _test_score(recipe: Recipe, study, options) -> float:
    job = _job(recipe, study, str(study.spec.folder / "poor"))
    outcome = train(job)
    found = compare(
        [{"who": "poor", "recipe": recipe.model_dump(), "checkpoint": outcome.checkpoint}], job.model_dump(mode="json"), shown=1
    )
    return statistics.mean(found["models"][0]["right"])


if __name__ == "__main__":
    main()
