"""Problems whose trials have curves, as courses for the simulator: LCBench, LoRA on the embedded model, PEFT's comparison.

Owns: reading them. Must not know: rules, searches.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.search import problems
from hpo.objectives import Objective, losses, named
from hpo.pareto import hypervolume
from hpo.simulator import Course
from hpo.space import Params, Space
from hpo.trial import Trial
from training.recipe import Outcome, Progress

PEFT = problems.SHARED / "peft_method_comparison"


@dataclass(frozen=True)
class Curves:
    """A space, objectives, what training each point does, and the bounds of losses between which volume counts."""

    name: str
    space: Space
    objectives: tuple[Objective, ...]
    course: Callable[[Params], Course]
    bounds: Sequence[tuple[float, float]]

    def volume(self, trials: Sequence[Trial]) -> float:
        """Returns the hypervolume of the complete trials, losses scaled to the bounds, up to the upper ones."""
        rows = [row for t in trials if t.state == "complete" and (row := losses(t, self.objectives))]
        scaled = [[(v - low) / (high - low) for v, (low, high) in zip(row, self.bounds, strict=True)] for row in rows]
        return hypervolume(scaled, [1.0] * len(self.objectives))


def names() -> list[str]:
    """Returns the names of those whose data is here."""
    return [n for n in problems.available() if n.startswith(("lcbench", "lora"))] + (["peft"] if PEFT.is_dir() else [])


@functools.cache
def load(name: str) -> Curves:
    """Returns one by its name."""
    return _peft() if name == "peft" else _with_curves(name)


def _with_curves(name: str) -> Curves:
    """A problem of `problems`. Seconds are spread evenly over a trial's length.

    LCBench's surrogate has seconds for each epoch too, but they are no parts of those of the last one, and not even in order,
    which no training does; `front` would correct them by how earlier projections came out.
    """
    problem = problems.load(name)

    def course(params: Params) -> Course:
        points, end = problem.curve(params), problem.evaluate([params])[0]
        return Course(
            [Progress(step=p.step, steps=len(points), tokens=p.step, share=p.share, seconds=end.seconds * p.share,
                      peak_bytes=end.peak_bytes, metrics=p.metrics) for p in points],
            end,
        )  # fmt: skip

    return Curves(name, problem.space, problem.objectives, course, problem.bounds)


def _peft() -> Curves:
    """63 fine-tunings of Llama 3.2 3B by PEFT's methods: validation accuracy (noisy: of 50 rows) every 250 steps, and a test."""
    with (PEFT / "runs.csv").open() as file:
        runs = {row["experiment"]: row for row in csv.DictReader(file) if row["status"] == "success"}
    points: dict[str, list[dict]] = {name: [] for name in runs}
    with (PEFT / "curves.csv").open() as file:
        for row in csv.DictReader(file):
            if row["experiment"] in points:
                points[row["experiment"]].append(row)
    courses = {name: _course(run, points[name]) for name, run in runs.items()}
    objectives = named(["accuracy", "seconds", "peak_bytes"])
    space = Space({"experiment": {"type": "choice", "values": sorted(courses)}})
    columns = list(zip(*([o.loss(c.outcome) for o in objectives] for c in courses.values()), strict=True))
    bounds = [(min(column), max(column)) for column in columns]
    return Curves("peft", space, objectives, lambda params: courses[params["experiment"]], bounds)


def _course(run: dict, points: list[dict]) -> Course:
    seconds, peak, length = float(run["train_time_s"]), int(float(run["mem_max_bytes"])), int(run["max_steps"])
    end = Outcome(scores={"accuracy": float(run["test_accuracy"])}, seconds=seconds, peak_bytes=peak)
    reports = [
        Progress(step=int(p["step"]), steps=length, tokens=int(p["step"]), share=int(p["step"]) / length,
                 seconds=seconds * int(p["step"]) / length, peak_bytes=peak, metrics={"accuracy": float(p["valid_accuracy"])})
        for p in points
    ]  # fmt: skip
    return Course(reports, end)
