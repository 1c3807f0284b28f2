"""From a front to a claim: timed alone, one chosen, compared with the defaults on rows that no trial saw.

Owns: `settle`, `certify`. Must not know: where the work is done (it is handed a `call`).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from hpo import evidence, extensions, keeping
from hpo.certificate import Certificate, Interval, Measured, Scored, SideBySide
from hpo.choosing import choose
from hpo.comparison import breakdown, metrics_of, retained
from hpo.objectives import Objective
from hpo.pareto import eligible, front
from hpo.search import job_of
from hpo.spec import Spec
from hpo.trial import Trial
from training.recipe import DataConfig, Job, Outcome

RESAMPLES = 2000
BAND = 2.0  # standard errors of estimated seconds within which a trial may still be on the front
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
    """Returns the front's members timed alone, and those whose estimated seconds leave it open whether they are on it.

    A trial that comes onto the front because another one's time fell is timed too.

    Args:
        measure: times some trials alone.
        known: those timed before.
    """
    measured = dict(known)
    while todo := _in_question(with_measured(trials, measured), objectives, set(measured)):
        measured |= measure(todo)
    return measured


def _in_question(trials: Sequence[Trial], objectives: Sequence[Objective], measured: set[int]) -> list[Trial]:
    """Returns the trials not timed yet that are on the front, or would be at the lower end of their seconds' error."""
    found = [trial for trial in front(trials, objectives) if trial.number not in measured]
    for i, trial in enumerate(trials):
        error = trial.outcome.conditions.get("seconds_error") if eligible(trial) else None
        if error and trial.number not in measured and trial not in found:
            low = trial.outcome.model_copy(update={"seconds": trial.outcome.seconds * max(0.0, 1 - BAND * error)})
            others = [*trials[:i], trial.model_copy(update={"outcome": low}), *trials[i + 1 :]]
            found += [trial] if any(member.number == trial.number for member in front(others, objectives)) else []
    return found


def interval(values: Sequence[float], *, seed: int = 0) -> Interval:
    """Returns the mean with its 95 % percentile bootstrap interval over rows (Efron & Tibshirani 1993, chapter 13)."""
    import numpy as np

    rng = np.random.default_rng(seed)
    array = np.asarray(values, dtype=float)
    means = array[rng.integers(0, len(array), size=(RESAMPLES, len(array)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(value=float(array.mean()), low=float(low), high=float(high))


def certify(spec: Spec, trials: Sequence[Trial], data: DataConfig, call: Call, *, known: dict[int, Measured],
            train: Callable[[Job], Outcome] | None = None, real: bool = True,
            on_phase: Callable[[str], None] = lambda phase: None) -> Certificate | None:  # fmt: skip
    """Returns what the study may claim, or None where no trial is complete.

    Args:
        trials: all of the study.
        data: the study's own copy of the rows.
        call: runs a function of `training.measure` on a worker.
        known: front members timed before.
        train: trains one job as the study's trials were trained; None where only the workers of `call` can.
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
    alone = real and spec.evaluation.timing == "measured" and spec.resources.workers == 1 and "seconds" in spec.objectives
    measured = settle(trials, spec.targets, measure, known) if alone else {}
    settled = with_measured(trials, measured)
    chosen = choose(settled, spec.targets, spec.choose)
    if chosen is None:
        return None
    winner, reason = chosen
    if real and (why := keeping.why_gone(winner)):
        reason += f"; its adapter was deleted ({why}), so it is not compared on the test rows"
        return Certificate(winner=winner.number, reason=reason, measured=measured, made=time.time(), machine={})
    together = real and spec.resources.workers == 1  # one group trains them all, and compares
    start = 0.0 if together or spec.resources.mode == "local" or spec.train == "simulated" else evidence.START
    planned = evidence.plan(spec, settled, winner, data, start=start)
    if not together and train is None:
        planned = replace(planned, jobs={})
    certificate = Certificate(
        winner=winner.number, reason=reason, measured=measured, made=time.time(), machine={}, allowed=planned.allowed
    )
    found = {} if together else evidence.train_each(planned, train, on_phase)
    if not real:
        return _judged(certificate, spec, planned, settled, found, {})
    on_phase("comparing on untouched rows" + (f", after training again {len(planned.jobs)} times" if planned.jobs else ""))
    certificate, found, models = _looked(certificate, spec, planned, trials, data, call, found if not together else None)
    certificate = _judged(certificate, spec, planned, settled, found, models)
    if certificate.winner != winner.number and not keeping.why_gone(_by_number(settled, certificate.winner)):
        beside = _by_number(settled, certificate.winner)
        certificate = _compared(certificate, spec, beside, trials, call, _comparison(spec, beside, trials, data))
    return certificate


def _by_number(trials: Sequence[Trial], number: int) -> Trial:
    return next(t for t in trials if t.number == number)


def _judged(
    certificate: Certificate, spec: Spec, planned: evidence.Plan, trials: Sequence[Trial], found: dict, models: dict[int, dict]
) -> Certificate:
    """Returns the certificate with verdict and optimism; with other seeds a rival that is surely better becomes the winner."""
    score = spec.targets[0]
    verdict, optimism, reruns = evidence.weigh(planned, score, found, models)
    if verdict is not None and verdict.kind == "beaten" and verdict.over == "seeds":
        beaten = certificate.winner
        better = next(t for t in planned.rivals if t.number == verdict.better)
        others = (planned.winner, *(t for t in planned.rivals if t is not better))
        verdict, optimism, reruns = evidence.weigh(replace(planned, winner=better, rivals=others), score, found, models)
        why = f"{certificate.reason}; but with other seeds trial {better.number} is better than trial {beaten} (95 %)"
        certificate = certificate.model_copy(update={"winner": better.number, "reason": why})
    certificate = certificate.model_copy(update={"verdict": verdict, "optimism": optimism, "reruns": reruns})
    said = evidence.sentences(certificate, score, trials, spec.certify.extra)
    return certificate.model_copy(update={"said": said})


def _looked(certificate: Certificate, spec: Spec, planned: evidence.Plan, trials: Sequence[Trial], data: DataConfig, call: Call,
            found: dict | None) -> tuple[Certificate, dict, dict[int, dict]]:  # fmt: skip
    """Returns the certificate with what models did on the test rows, what training again came to, and the rows by trial.

    All of it is one call, because a fresh group of workers takes longer to start than most of this takes.

    Args:
        found: what training again came to where it was done before; None: it is done here.
    """
    winner, comparison = planned.winner, _comparison(spec, planned.winner, trials, data)
    job = comparison[1]["job"]
    calls: list[tuple[str, dict]] = []
    if found is None:
        calls += planned.calls
    rivals = planned.rivals if planned.over == "rows" else ()
    models = [_model(str(t.number), t, spec, t.outcome.checkpoint) for t in rivals if t.outcome.checkpoint]
    for key, one in (found or {}).items():
        if one.get("checkpoint"):
            trial = next(t for t in (winner, *planned.rivals) if t.number == key[0])
            models.append(_model(evidence.name_of(key), trial, spec, one["checkpoint"]))
    if models:
        calls.append(("training.measure.judge", {"models": models, "job": job}))
    calls.append(comparison)
    answers = call("training.again.in_turn", {"calls": calls}) if len(calls) > 1 else [call(*comparison)]
    by_name = dict(zip((name for name, _ in calls), answers, strict=True))
    if "training.again.rerun" in by_name:
        came = zip(planned.jobs, by_name["training.again.rerun"], strict=True)
        found = {key: one for key, one in came if one is not None}
    scored = by_name.get("training.measure.judge", {}).get("models", [])
    found = evidence.judged(planned.jobs, found or {}, scored) if found else {}
    by_trial = {int(one["who"]): one for one in scored if one["who"].isdigit()}
    by_trial[winner.number] = next(m for m in answers[-1]["models"] if m["who"] == "winner")
    return _compared(certificate, spec, winner, trials, lambda *_: answers[-1], comparison), found, by_trial


def _measured(trial: Trial, found: dict) -> Measured:
    peak = found["peak_bytes"] or trial.outcome.peak_bytes
    return Measured(**(found | {"peak_bytes": peak}), in_study=trial.outcome.seconds)


def _model(who: str, trial: Trial, spec: Spec, checkpoint: str | None) -> dict[str, Any]:
    recipe = trial.recipe
    if "model" not in spec.space.root:
        recipe = recipe.model_copy(update={"model": spec.recipe.model})
    return {"who": who, "checkpoint": checkpoint, "recipe": recipe.model_dump(mode="json")}


def _comparison(spec: Spec, winner: Trial, trials: Sequence[Trial], data: DataConfig) -> tuple[str, dict[str, Any]]:
    """Returns the call that compares the untuned model, the defaults' and the winner's on the test rows."""
    defaults = _defaults(trials)
    models = [_model("untuned", winner, spec, None)]
    if defaults is not None:
        models.append(_model("defaults", defaults, spec, defaults.outcome.checkpoint))
    models.append(_model("winner", winner, spec, winner.outcome.checkpoint))
    return "training.measure.compare", {"models": models, "job": job_of(winner, spec, data).model_dump(mode="json")}


def _defaults(trials: Sequence[Trial]) -> Trial | None:
    return next((t for t in trials if t.origin == "defaults" and t.outcome and t.outcome.checkpoint), None)


def _compared(
    certificate: Certificate, spec: Spec, winner: Trial, trials: Sequence[Trial], call: Call, comparison: tuple[str, dict]
) -> Certificate:
    found, defaults = call(*comparison), _defaults(trials)
    numbers = {"defaults": defaults.number if defaults else None, "winner": winner.number}
    right = {m["who"]: m["right"] for m in found["models"]}
    scores = tuple(
        Scored(
            who=m["who"],
            number=numbers.get(m["who"]),
            rows=len(m["right"]),
            accuracy=interval(m["right"]),
            loss=sum(m["nll"]) / sum(m["tokens"]),
        )
        for m in found["models"]
    )
    gain = interval([w - d for w, d in zip(right["winner"], right["defaults"], strict=True)]) if "defaults" in right else None
    rows = tuple(SideBySide(**({"defaults": None} | row)) for row in found["rows"])
    machine = found["machine"] | {"device": winner.outcome.conditions.get("device", "")} | _slow_down(trials, found["machine"])
    seen = {
        "metrics": metrics_of(found["models"], extensions.goals(spec)),
        "breakdown": breakdown(found["models"], found.get("groups", {})),
        "retained": retained(found["models"], spec.evaluation.retention or ""),
        "overlap": found.get("overlap"),
    }
    update = {"scores": scores, "gain": gain, "rows": rows, "machine": machine} | seen
    return Certificate.model_validate(certificate.model_dump() | update)


def _slow_down(trials: Sequence[Trial], machine: dict) -> dict[str, float]:
    """Returns how much slower a fixed matrix product was at the start of the trials than alone at the end (1 is not)."""
    seen = sorted(t.outcome.conditions["gemm_seconds"] for t in trials if t.outcome and "gemm_seconds" in t.outcome.conditions)
    if not seen or not machine.get("gemm_seconds"):
        return {}
    return {"slow_down": round(seen[len(seen) // 2] / machine["gemm_seconds"], 3)}
