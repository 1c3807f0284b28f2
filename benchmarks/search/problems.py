"""The problems that search is measured on: points of a space, and what came of training them, known beforehand.

Owns: reading the surrogates and tables made by others (PARETUNE_SHARED/hpo) and the LoRA table recorded by ourselves; the
reference points of hypervolumes. Must not know: who searches.

Hypervolumes are of losses on a linear scale on which 0 is the 1 % quantile of 4,000 points drawn at random and 1, the reference
point, the 99 % quantile: the ends themselves are outliers of the surrogates (13 GB, where 99 % lie under 0.45). Neither moves.
"""

from __future__ import annotations

import functools
import gzip
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from hpo.objectives import Objective, losses, named
from hpo.pareto import hypervolume
from hpo.space import Params, Space
from hpo.trial import CurvePoint, Trial
from training.recipe import Outcome, Recipe

SHARED = Path(os.environ.get("PARETUNE_SHARED", Path(__file__).parents[3] / "shared" / "data")) / "hpo"
LORA_TABLE = Path(__file__).parents[1] / "data" / "lora_table.json.gz"
RECIPE = Recipe()
SAMPLE = 4000
EPOCHS = 52  # the longest training that LCBench's surrogate knows


@dataclass(frozen=True)
class Problem:
    """A space, objectives, and the outcome of each point; `curve` is what a training reports on its way, where it is known."""

    name: str
    space: Space
    objectives: tuple[Objective, ...]
    evaluate: Callable[[Sequence[Params]], list[Outcome]]
    curve: Callable[[Params], list[CurvePoint]] | None = None

    @functools.cached_property
    def bounds(self) -> list[tuple[float, float]]:
        """The 1 % and the 99 % quantile of each loss over points drawn at random, always the same ones."""
        rng = Random(0)
        points = [self.space.sample(rng) for _ in range(SAMPLE)]
        rows = [losses(trial(0, point, outcome), self.objectives) for point, outcome in zip(points, self.evaluate(points))]  # noqa: B905
        columns = [sorted(column) for column in zip(*(row for row in rows if row), strict=True)]
        return [(column[len(column) // 100], column[-1 - len(column) // 100]) for column in columns]

    def volume(self, trials: Sequence[Trial]) -> float:
        """Returns the hypervolume of the complete trials."""
        rows = [row for t in trials if t.state == "complete" and (row := losses(t, self.objectives))]
        scaled = [[(v - low) / (high - low) for v, (low, high) in zip(row, self.bounds, strict=True)] for row in rows]
        return hypervolume(scaled, [1.0] * len(self.objectives))

    def trial(self, number: int, point: Params) -> Trial:
        """Returns the point trained."""
        return trial(number, point, self.evaluate([point])[0])


def trial(number: int, point: Params, outcome: Outcome) -> Trial:
    """Returns a trial in the state that its outcome says."""
    return Trial.model_construct(number=number, params=point, recipe=RECIPE, state=outcome.ended, outcome=outcome)


def load(name: str) -> Problem:
    """Returns a problem by its name; see NAMES.

    Raises:
        FileNotFoundError: the data it reads is not there.
    """
    family, _, instance = name.rpartition("_")
    return {"lcbench": _lcbench, "xgboost": _xgboost, "table": _table, "lora": _lora}[family](instance)


def available() -> list[str]:
    """Returns the names of the problems whose data is here."""
    there = {"lcbench": SHARED / "yahpo" / "lcbench", "xgboost": SHARED / "yahpo" / "rbv2_xgboost",
             "table": SHARED / "tables", "lora": LORA_TABLE}  # fmt: skip
    return [name for name in NAMES if there[name.rpartition("_")[0]].exists()]


NAMES = ("lcbench_167152", "lcbench_167185", "lcbench_189873", "xgboost_182", "xgboost_12", "table_credit-g", "table_phoneme",
         "table_vehicle", "lora_embedded")  # fmt: skip


class _Surrogate:
    """A network of YAHPO's: codes of the categorical inputs and values of the others, in, and the metrics out."""

    def __init__(self, folder: str, codes: Sequence[str], inputs: Sequence[str]):
        import onnxruntime

        where = SHARED / "yahpo" / folder
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(where / "model.onnx"), options, providers=["CPUExecutionProvider"])
        self.encoding = json.loads((where / "encoding.json").read_text())
        self.space = {h["name"]: h for h in json.loads((where / "config_space.json").read_text())["hyperparameters"]}
        self.codes, self.inputs = codes, inputs

    def __call__(self, rows: Sequence[Mapping[str, Any]]):
        import numpy

        # A dimension that does not exist is "#na#" among codes and 0 among values.
        codes = numpy.array([[self.encoding[n].get(row.get(n, "#na#")) for n in self.codes] for row in rows], numpy.int32)
        values = numpy.array([[row.get(n, 0) for n in self.inputs] for row in rows], numpy.float32)
        coded, valued = (entry.name for entry in self.session.get_inputs())
        return self.session.run(None, {coded: codes, valued: values})[0].astype(float).tolist()

    def dimension(self, name: str) -> dict[str, Any]:
        """Returns one of its hyperparameters as a dimension of ours."""
        known = self.space[name]
        if known["type"] == "categorical":
            return {"type": "choice", "values": known["choices"]}
        kind = known["type"].removeprefix("uniform_")
        return {"type": kind, "low": known["lower"], "high": known["upper"], "log": known["log"]}


LCBENCH = ("batch_size", "learning_rate", "momentum", "weight_decay", "num_layers", "max_units", "max_dropout")


def _lcbench(instance: str) -> Problem:
    surrogate = _Surrogate("lcbench", ["OpenML_task_id"], ["epoch", *LCBENCH])
    # In every point's row: which data set, and how long.
    fixed = {"OpenML_task_id": instance}

    def evaluate(points: Sequence[Params]) -> list[Outcome]:
        found = surrogate([point | fixed | {"epoch": EPOCHS} for point in points])
        return [Outcome(scores={"accuracy": accuracy / 100}, seconds=max(seconds, 0.0)) for seconds, accuracy, *_ in found]

    def curve(point: Params) -> list[CurvePoint]:
        found = surrogate([point | fixed | {"epoch": epoch} for epoch in range(1, EPOCHS + 1)])
        return [
            CurvePoint(
                share=epoch / EPOCHS, step=epoch, tokens=epoch, seconds=max(seconds, 0.0), metrics={"accuracy": accuracy / 100}
            )
            for epoch, (seconds, accuracy, *_) in enumerate(found, 1)
        ]

    space = Space({name: surrogate.dimension(name) for name in LCBENCH})
    return Problem(f"lcbench_{instance}", space, named(["accuracy", "seconds"]), evaluate, curve)


def _xgboost(instance: str) -> Problem:
    inputs = ["nrounds", "eta", "gamma", "lambda", "alpha", "subsample", "max_depth", "min_child_weight", "colsample_bytree",
              "colsample_bylevel", "rate_drop", "skip_drop", "trainsize", "repl"]  # fmt: skip
    surrogate = _Surrogate("rbv2_xgboost", ["task_id", "booster", "num.impute.selected.cpo"], inputs)
    fixed = {"task_id": instance, "trainsize": 1.0, "repl": 10}

    def evaluate(points: Sequence[Params]) -> list[Outcome]:
        rows = surrogate([point | fixed for point in points])
        # Seconds and megabytes; the network says 0 and less where it knows of none.
        return [
            Outcome(scores={"accuracy": row[0]}, seconds=max(row[6], 0.001), peak_bytes=int(max(row[8], 1.0) * 1e6))
            for row in rows
        ]

    trees = {"when": {"booster": ["dart", "gbtree"]}}
    exists = dict.fromkeys(("colsample_bylevel", "colsample_bytree", "eta", "gamma", "max_depth", "min_child_weight"), trees)
    exists |= dict.fromkeys(("rate_drop", "skip_drop"), {"when": {"booster": "dart"}})
    names = ["booster", "num.impute.selected.cpo", *inputs[:-2]]
    space = Space({name: surrogate.dimension(name) | exists.get(name, {}) for name in names})
    return Problem(f"xgboost_{instance}", space, named(["accuracy", "seconds", "peak_bytes"]), evaluate)


FEATURES = {"credit-g": 20, "phoneme": 5, "vehicle": 18}
"""Columns of the data sets on OpenML (31, 1489, 54), for the size of the networks."""


def _table(instance: str) -> Problem:
    import numpy

    content = numpy.load(SHARED / "tables" / f"hpobench_{instance.replace('-', '_')}.npz", allow_pickle=False)
    axes = json.loads(bytes(content["axes"]))
    scores = content["values"].mean(axis=-1)  # over the seeds

    def outcome(point: Params) -> Outcome:
        depth, width = axes["depth"][point["depth"]], axes["width"][point["width"]]
        # The table holds scores alone. What a network weighs follows from its shape: in, between, and out.
        weights = FEATURES[instance] * width + (depth - 1) * width * width + width
        return Outcome(scores={"accuracy": float(scores[tuple(point[name] for name in axes)])}, peak_bytes=4 * weights)

    # Places on the axes, which are in order; all peers get the same.
    space = Space({name: {"type": "int", "low": 0, "high": len(values) - 1} for name, values in axes.items()})
    return Problem(f"table_{instance}", space, named(["accuracy", "peak_bytes"]), lambda points: [outcome(p) for p in points])


def _lora(instance: str) -> Problem:
    import numpy
    from scipy.interpolate import RegularGridInterpolator

    content = json.loads(gzip.decompress(LORA_TABLE.read_bytes()))
    axes: dict[str, list[float]] = content["axes"]
    shape = [len(values) for values in axes.values()]
    runs = content["runs"]
    length = max(len(run["curve"]) for run in runs)
    table = numpy.zeros((*shape, length + 2))  # accuracy along the curve, then seconds, then bytes
    counted = numpy.zeros(shape)
    least = numpy.full(shape, numpy.inf)
    for run in runs:
        at = tuple(axes[name].index(run[name]) for name in axes)
        scores = [point[3] for point in run["curve"]]
        # What diverged has learned nothing from there on.
        table[at][:length] += scores + [0.0] * (length - len(scores))
        table[at][length + 1] += run["peak_bytes"]
        counted[at] += 1
        if run["ended"] == "complete":
            least[at] = min(least[at], run["seconds"])
    table /= counted[..., None]
    # Seconds depend on rank and batch alone; of all runs of that shape the least was disturbed the least.
    table[..., length] = least.min(axis=(1, 2), keepdims=True)
    grid = [numpy.log(numpy.array(values, float)) for values in axes.values()]
    between = RegularGridInterpolator(grid, table, method="linear")

    def values(points: Sequence[Params]):
        return between(numpy.log(numpy.array([[point[name] for name in axes] for point in points], float)))

    def evaluate(points: Sequence[Params]) -> list[Outcome]:
        return [
            Outcome(scores={"accuracy": float(row[length - 1])}, seconds=float(row[length]), peak_bytes=int(row[length + 1]))
            for row in values(points)
        ]

    def curve(point: Params) -> list[CurvePoint]:
        row = values([point])[0]
        return [
            CurvePoint(share=(i + 1) / length, step=i + 1, tokens=i + 1, seconds=float(row[length]) * (i + 1) / length,
                       metrics={"accuracy": float(row[i])})
            for i in range(length)
        ]  # fmt: skip

    kinds = {"rank": "int", "alpha": "float", "learning_rate": "float", "batch_size": "int"}
    space = Space(
        {name: {"type": kinds[name], "low": values[0], "high": values[-1], "log": True} for name, values in axes.items()}
    )
    return Problem("lora_embedded", space, named(["accuracy", "seconds", "peak_bytes"]), evaluate, curve)
