"""From a front to a claim: timed alone, one chosen, compared with the defaults on rows that no trial saw.

Owns: `settle`, `choose`, `certify`. Must not know: where the work is done (it is handed a `call`).
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

from hpo.certificate import Certificate, Interval, Measured, Scored, SideBySide
from hpo.objectives import Objective
from hpo.pareto import eligible, front
from hpo.search import job_of
from hpo.spec import Spec
from hpo.trial import Trial
from training.recipe import DataConfig

CONFIDENT = 1.645  # standard errors: one-sided 95 %
RESAMPLES = 2000
Call = Callable[[str, dict[str, Any]], Any]


def with_measured(trials: Sequence[Trial], measured: dict[int, Measured]) -> list[Trial]:
    """Returns the trials, those timed alone with these seconds instead of the ones seen while others ran."""
    out = []
    for trial in trials:
        if (m := measured.get(trial.number)) is not None and trial.outcome is not None:
            update = {"seconds": m.seconds} | ({"peak_bytes": m.peak_bytes} if m.peak_bytes else {})
            trial = trial.model_copy(update={"outcome": trial.outcome.model_copy(update=update)})
        out.append(trial)
    return out


def settle(trials: Sequence[Trial], objectives: Sequence[Objective], measure: Callable[[list[Trial]], dict[int, Measured]],
           known: dict[int, Measured]) -> dict[int, Measured]:  # fmt: skip
    """Returns the front's members timed alone; a trial that comes onto the front because another one's time fell is timed too.

    Args:
        measure: times some trials alone.
        known: those timed before.
    """
    measured = dict(known)
    while todo := [t for t in front(with_measured(trials, measured), objectives) if t.number not in measured]:
        measured |= measure(todo)
    return measured


def choose(trials: Sequence[Trial], objectives: Sequence[Objective]) -> tuple[Trial, str] | None:
    """Returns the member of the front with the best score and, among statistical ties with it, the cheapest; and why.

    The score is the first objective. Two accuracies tie where the paired difference over the validation rows is within
    1.645 standard errors (one-sided 95 %). The cheapest has the smallest product of the other objectives, of which those to
    be maximised divide.
    """
    members = front(trials, objectives)
    if not members:
        return None
    best = members[0]
    tied = [t for t in members if t is not best and _ties(best, t)] if objectives[0].name == "accuracy" else []
    score = objectives[0]
    said = f"trial {best.number} has the best {score.name} ({_show(score, best)})"
    costs = objectives[1:]
    if not tied or not costs:
        return best, said

    def cost(trial: Trial) -> float:
        values = [(objective, abs(objective.of(trial.outcome))) for objective in costs]
        return sum(math.log(max(value, 1e-12)) * (-1 if objective.goal == "maximize" else 1) for objective, value in values)

    chosen = min([best, *tied], key=lambda t: (cost(t), t.number))
    names = ", ".join(str(t.number) for t in tied)
    said += f"; {'trial' if len(tied) == 1 else 'trials'} {names} {'ties' if len(tied) == 1 else 'tie'} with it (95 %)"
    if chosen is best:
        return best, f"{said}, but it is the cheapest of them"
    return chosen, f"{said}, and trial {chosen.number} ({_show(score, chosen)}) is the cheapest of them"


def _show(objective: Objective, trial: Trial) -> str:
    return f"{objective.of(trial.outcome):.4g}"


def _ties(best: Trial, other: Trial) -> bool:
    a, b = (t.outcome.conditions.get("right", "") for t in (best, other))
    if not a or len(a) != len(b):
        return False
    difference = [int(x) - int(y) for x, y in zip(a, b, strict=True)]
    mean = sum(difference) / len(difference)
    variance = sum((d - mean) ** 2 for d in difference) / max(len(difference) - 1, 1)
    return mean <= CONFIDENT * math.sqrt(variance / len(difference))


def interval(values: Sequence[float], *, seed: int = 0) -> Interval:
    """Returns the mean with its 95 % percentile bootstrap interval over rows (Efron & Tibshirani 1993, chapter 13)."""
    import numpy as np

    rng = np.random.default_rng(seed)
    array = np.asarray(values, dtype=float)
    means = array[rng.integers(0, len(array), size=(RESAMPLES, len(array)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(value=float(array.mean()), low=float(low), high=float(high))


def certify(spec: Spec, trials: Sequence[Trial], data: DataConfig, call: Call, *, known: dict[int, Measured],
            real: bool = True, on_phase: Callable[[str], None] = lambda phase: None) -> Certificate | None:  # fmt: skip
    """Returns what the study may claim, or None where no trial is complete.

    Args:
        trials: all of the study.
        data: the study's own copy of the rows.
        call: runs a function of `training.measure` on a worker.
        known: front members timed before.
        real: whether the trials were trained by our loop; what a simulation or a user's own train function made cannot be
            loaded, so it is neither timed again nor compared.
        on_phase: is told what is being done.
    """
    if not any(eligible(trial) for trial in trials):
        return None

    def measure(todo: list[Trial]) -> dict[int, Measured]:
        on_phase(f"timing {len(todo)} of the front alone")
        random.Random(spec.seed).shuffle(todo)  # so that a drift of the machine does not follow the front's order
        jobs = [job_of(t, spec, data).model_dump(mode="json") for t in todo]
        found = call("training.measure.time_alone", {"jobs": jobs})
        return {t.number: _measured(t, m) for t, m in zip(todo, found, strict=True)}

    # A group of several workers is timed as it ran: its time alone would be that of another set-up.
    alone = real and spec.resources.workers == 1 and "seconds" in spec.objectives
    measured = settle(trials, spec.targets, measure, known) if alone else {}
    settled = with_measured(trials, measured)
    chosen = choose(settled, spec.targets)
    if chosen is None:
        return None
    winner, reason = chosen
    certificate = Certificate(winner=winner.number, reason=reason, measured=measured, made=time.time(), machine={})
    if not real:
        return certificate
    on_phase("comparing on untouched rows")
    return _compared(certificate, spec, winner, trials, data, call)


def _measured(trial: Trial, found: dict) -> Measured:
    peak = found["peak_bytes"] or trial.outcome.peak_bytes
    return Measured(**(found | {"peak_bytes": peak}), in_study=trial.outcome.seconds)


def _compared(
    certificate: Certificate, spec: Spec, winner: Trial, trials: Sequence[Trial], data: DataConfig, call: Call
) -> Certificate:
    defaults = next((t for t in trials if t.origin == "defaults" and t.outcome and t.outcome.checkpoint), None)
    models = [{"who": "untuned", "recipe": winner.recipe, "checkpoint": None, "number": None}]
    if defaults is not None:
        models.append(
            {"who": "defaults", "recipe": defaults.recipe, "checkpoint": defaults.outcome.checkpoint, "number": defaults.number}
        )
    models.append({"who": "winner", "recipe": winner.recipe, "checkpoint": winner.outcome.checkpoint, "number": winner.number})
    job = job_of(winner, spec, data)
    if "model" not in spec.space.root:
        models = [m | {"recipe": m["recipe"].model_copy(update={"model": job.recipe.model})} for m in models]
    payload = [
        {name: m[name] for name in ("who", "checkpoint")} | {"recipe": m["recipe"].model_dump(mode="json")} for m in models
    ]
    found = call("training.measure.compare", {"models": payload, "job": job.model_dump(mode="json")})
    right = {m["who"]: m["right"] for m in found["models"]}
    scores = tuple(
        Scored(
            who=m["who"],
            number=n["number"],
            rows=len(m["right"]),
            accuracy=interval(m["right"]),
            loss=sum(m["nll"]) / sum(m["tokens"]),
        )
        for m, n in zip(found["models"], models, strict=True)
    )
    gain = interval([w - d for w, d in zip(right["winner"], right["defaults"], strict=True)]) if "defaults" in right else None
    rows = tuple(SideBySide(**({"defaults": None} | row)) for row in found["rows"])
    machine = found["machine"] | {"device": winner.outcome.conditions.get("device", "")} | _slow_down(trials, found["machine"])
    return certificate.model_copy(update={"scores": scores, "gain": gain, "rows": rows, "machine": machine})


def _slow_down(trials: Sequence[Trial], machine: dict) -> dict[str, float]:
    """Returns how much slower a fixed matrix product was at the start of the trials than alone at the end (1 is not)."""
    seen = sorted(t.outcome.conditions["gemm_seconds"] for t in trials if t.outcome and "gemm_seconds" in t.outcome.conditions)
    if not seen or not machine.get("gemm_seconds"):
        return {}
    return {"slow_down": round(seen[len(seen) // 2] / machine["gemm_seconds"], 3)}
