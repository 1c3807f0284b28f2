"""From a winner to a registered model, in steps that may be killed anywhere and run again.

    choose -> retrain -> keep the better on untouched rows -> merge and verify -> package -> register

Owns: `promote`, `reproduce` and the order of the steps. Must not know: where the work is done (it is handed `call` and `train`),
how a model is served.

What a step came to is on the record when it is done, under a key that follows from what is promoted; so the same promotion
finds its finished steps, never does one again, and registers one model. What it makes on disk appears by rename.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpo import comparison
from hpo.certificate import Retained, Scored
from hpo.certify import Call, interval
from hpo.errors import InputError, NotFound, Problem
from hpo.keeping import why_gone
from hpo.model import Lineage, Model
from hpo.search import job_of
from hpo.spec import Promote, Spec
from hpo.store import Record, Store
from hpo.trial import Trial
from training import artifact
from training.recipe import DataConfig, Job, Outcome, Recipe

PROMPTS = 8  # real prompts that merged and adapter model are compared on, and the endpoint is checked with
MOMENTARY = ("gemm_seconds", "slow_down", "threads")  # how fast the machine was, not what it was
TOLERANCE = 1e-4  # a reproduced model matches where no weight differs by more, relative to the largest of its tensor


@dataclass(frozen=True)
class Bench:
    """Where the work of a promotion is done."""

    call: Call
    train: Callable[[Job], Outcome]
    on_phase: Callable[[str], None] = lambda phase: None


@dataclass(frozen=True)
class Promotion:
    """One trial of one study on its way to the register."""

    store: Store
    record: Record
    trial: Trial
    data: DataConfig
    bench: Bench
    prompts: tuple[str, ...]

    @property
    def spec(self) -> Spec:
        return self.record.spec

    @property
    def name(self) -> str:
        return self.spec.promote.model or self.spec.name

    @property
    def job(self) -> Job:
        """The trial's own job, on all the rows that it may be retrained on, where what goes wrong is answered and on record."""
        job = job_of(self.trial, self.spec, self.data)
        # The validation rows may be trained on, so their score says nothing: one, at the end, is all that the loop asks for.
        update = {"rows": self.spec.promote.rows, "output": str(self.work / "retrained"), "interventions": True,
                  "resume": str(self.work / "running")}  # fmt: skip
        return job.model_copy(update=update | {"evaluation": job.evaluation.model_copy(update={"reports": 1, "metrics": ()})})

    @property
    def precision(self) -> str:
        return self.spec.promote.precision or self.trial.recipe.precision

    @property
    def key(self) -> str:
        promote = self.spec.promote.model_dump(exclude={"accuracy", "gain", "retention"}) | {"model": self.name}
        if self.spec.evaluation.retention is not None:
            promote |= {"retention": self.spec.evaluation.retention}
        said = [
            self.spec.name,
            self.record.created,
            self.record.digest,
            self.trial.number,
            promote,
            self.trial.recipe.model_dump(),
        ]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def work(self) -> Path:
        return self.spec.folder / "promotions" / self.key

    @property
    def folder(self) -> Path:
        return Path(self.spec.storage) / "models" / self.name / self.key


def promote(
    store: Store, record: Record, trials: Sequence[Trial], data: DataConfig, bench: Bench, *, number: int | None = None
) -> Model:
    """Returns the registered model of a study's winner, made where it is not there yet.

    Args:
        trials: all of the study.
        data: the study's own copy of the rows.
        number: another trial than the winner.

    Raises:
        InputError: there is nothing to promote; or what was made does not pass its checks, and why.
    """
    trial = _chosen(record, trials, number)
    certificate = record.certificate
    prompts = tuple(row.prompt for row in certificate.rows)[:PROMPTS] if certificate else ()
    promotion = Promotion(store, record, trial, data, bench, prompts)
    done = store.steps(promotion.key)
    for name, step in STEPS.items():
        if name not in done or not _stands(done, name):
            done = {earlier: done[earlier] for earlier in STEPS if earlier in done and _before(earlier, name)}
            bench.on_phase(name)
            done[name] = step(promotion, done)
            store.add_step(promotion.key, record.id, name, done[name])
    shutil.rmtree(promotion.work, ignore_errors=True)
    model = store.model(promotion.name, done["register"]["version"])
    refused = refusal(record.spec.promote, model.scores, model.retained)
    if model.refused != refused:  # the thresholds were edited since
        model = store.update_model(model.model_copy(update={"refused": refused}))
    return model


def _before(one: str, other: str) -> bool:
    names = list(STEPS)
    return names.index(one) < names.index(other)


def _stands(done: dict[str, Any], name: str) -> bool:
    """Says whether what a finished step left on disk is still there, where a later step needs it."""
    later = [other for other in STEPS if _before(name, other)]
    if not later or later[0] in done:
        return True
    folder = done[name].get("folder")
    return folder is None or Path(folder).is_dir()


def _chosen(record: Record, trials: Sequence[Trial], number: int | None) -> Trial:
    name, certificate = record.name, record.certificate
    if number is None and certificate is None:
        raise InputError(
            Problem(name, "has no certified winner, so there is nothing to promote.", f"Run hpo run {name} to its end.")
        )
    number = certificate.winner if number is None else number
    found = [t for t in trials if t.number == number]
    if not found:
        raise NotFound(f"Study {name} has no trial {number}. It has 0 to {len(trials) - 1}.")
    trial = found[0]
    if trial.state != "complete" or trial.outcome is None:
        rule = f"trial {number} is {trial.state}; only a complete one can be promoted."
        raise InputError(Problem(name, rule, "Name a trial of the front: hpo show lists them."))
    if trial.outcome.checkpoint is None and why_gone(trial) is None:
        rule = f"trial {number} left no adapter: it was simulated, or trained by a function of its own."
        raise InputError(Problem(name, rule, "Promote a trial that the study's own loop trained."))
    return trial


# The steps. Each takes the promotion and what the earlier ones came to, and returns JSON.


def _choose(promotion: Promotion, done: dict[str, Any]) -> dict[str, Any]:
    from training.checkpoint import verify

    if promotion.trial.outcome.checkpoint is not None:
        verify(promotion.trial.outcome.checkpoint)
    certificate = promotion.record.certificate
    reason = certificate.reason if certificate and certificate.winner == promotion.trial.number else "named by the user"
    return {"trial": promotion.trial.number, "reason": reason}


def _retrain(promotion: Promotion, done: dict[str, Any]) -> dict[str, Any]:
    outcome, interventions = train_within_memory(promotion.job, promotion.bench.train)
    artifact.remove(promotion.job.resume)
    if outcome.checkpoint is None and (why := why_gone(promotion.trial)):
        rule = f"the retraining ended {outcome.ended} ({outcome.reason}), and the trial's own adapter was deleted ({why})."
        raise InputError(Problem(promotion.name, rule, "Promote another trial: hpo show lists them."))
    return {"ended": outcome.ended, "reason": outcome.reason, "folder": outcome.checkpoint, "seconds": outcome.seconds,
            "interventions": interventions}  # fmt: skip


def train_within_memory(job: Job, train: Callable[[Job], Outcome]) -> tuple[Outcome, list[dict[str, Any]]]:
    """Returns what a job came to, and all interventions; where memory runs out, it goes on with half the micro-batch.

    The batch and what is learnt stay as they are: twice as many forwards make up one optimizer step.
    """
    halved: list[dict[str, Any]] = []
    while True:
        outcome = train(job)
        micro = job.recipe.micro_batch or job.recipe.batch_size // job.resources.workers
        if outcome.ended != "infeasible" or not outcome.reason.startswith("out of memory") or micro == 1:
            return outcome, halved + list(outcome.conditions.get("interventions", ()))
        less = micro // 2
        step = int((re.findall(r"at step (\d+)", outcome.reason) or ["0"])[0])
        halved.append({"step": step, "did": "halve the micro-batch", "why": outcome.reason,
                       "values": {"micro_batch": [micro, less]}})  # fmt: skip
        job = job.model_copy(update={"recipe": job.recipe.model_copy(update={"micro_batch": less})})


def _keep(promotion: Promotion, done: dict[str, Any]) -> dict[str, Any]:
    recipe, retrained = promotion.job.recipe.model_dump(mode="json"), done["retrain"]["folder"]
    models = [{"who": "untuned", "checkpoint": None}]
    if promotion.trial.outcome.checkpoint is not None:
        models += [{"who": "trial", "checkpoint": promotion.trial.outcome.checkpoint}]
    models += [{"who": "retrained", "checkpoint": retrained}] if retrained else []
    payload = {"models": [m | {"recipe": recipe} for m in models], "job": promotion.job.model_dump(mode="json")}
    found = promotion.bench.call("training.measure.judge", payload)["models"]
    scored = {m["who"]: _scored(m, promotion.trial.number) for m in found}
    if "trial" in scored:
        kept, why = better(scored["trial"], scored.get("retrained"), done["retrain"])
    else:
        kept, why = "retrained", f"the retrained adapter: the trial's own was deleted ({why_gone(promotion.trial)})"
    right = {m["who"]: m["right"] for m in found}
    gain = interval([a - b for a, b in zip(right[kept], right["untuned"], strict=True)])
    both = [m for m in found if m["who"] in ("untuned", kept)]
    retained = comparison.retained(both, promotion.spec.evaluation.retention or "")
    return {"kept": kept, "why": why, "gain": gain.model_dump(), "scores": [s.model_dump() for s in scored.values()],
            "retained": retained.model_dump() if retained else None,
            "folder": retrained if kept == "retrained" else promotion.trial.outcome.checkpoint}  # fmt: skip


def _scored(found: dict[str, Any], number: int) -> Scored:
    return Scored(
        who=found["who"], number=None if found["who"] == "untuned" else number, rows=len(found["right"]),
        accuracy=interval(found["right"]), loss=sum(found["nll"]) / sum(found["tokens"]),
    )  # fmt: skip


def better(trial: Scored, retrained: Scored | None, ended: dict[str, Any]) -> tuple[str, str]:
    """Returns which of the two is kept, and why: the more accurate on the untouched rows; of equals the one of lower loss."""
    if retrained is None:
        return "trial", f"the trial's own adapter: the retraining ended {ended['ended']} ({ended['reason']})"
    a, b = (retrained.accuracy.value, -retrained.loss), (trial.accuracy.value, -trial.loss)
    first, kept = (retrained, "retrained") if a > b else (trial, "trial")
    other = trial if first is retrained else retrained
    said = {"trial": "the trial's own adapter", "retrained": "the retrained adapter"}[kept]
    by = "at a lower loss, " if first.accuracy.value == other.accuracy.value else ""
    return kept, (
        f"{said}: {first.accuracy.value:.3f} against {other.accuracy.value:.3f} of the {other.who} one, {by}"
        f"on {first.rows} rows that neither was trained on"
    )


def refusal(thresholds: Promote, scores: Sequence[Scored], retained: Retained | None = None) -> str:
    """Returns why a model may not be deployed, or "": accuracy or gain over the untuned base too small, too much forgotten.

    Args:
        scores: the untuned base first, the kept model last.
        retained: what both know of the general text, where there is one.
    """
    untuned, kept = scores[0], scores[-1]
    if kept.accuracy.value < thresholds.accuracy:
        return f"accuracy {kept.accuracy.value:.3f} on the test rows is below promote.accuracy, {thresholds.accuracy:g}"
    gain = kept.accuracy.value - untuned.accuracy.value
    if gain <= thresholds.gain:
        return f"the gain over the untuned base, {gain:+.3f} on the test rows, is not above promote.gain, {thresholds.gain:g}"
    if thresholds.retention is None:
        return ""
    if retained is None or not retained.rise:
        return "how much of general text it forgot (promote.retention) was not measured when it was made"
    (rise,) = retained.rise.values()
    if rise.value > thresholds.retention:
        return (f"its perplexity on {retained.text} is {100 * rise.value:+.1f} % against the untuned base's, above "
                f"promote.retention, {100 * thresholds.retention:g} %")  # fmt: skip
    return ""


def _merge(promotion: Promotion, done: dict[str, Any]) -> dict[str, Any]:
    payload = {
        "recipe": promotion.job.recipe.model_dump(mode="json"), "adapter": done["keep"]["folder"],
        "output": str(promotion.work / "merged"), "precision": promotion.precision, "prompts": list(promotion.prompts),
        "record": {"study": promotion.spec.name, "trial": promotion.trial.number, "data": promotion.record.digest},
    }  # fmt: skip
    return promotion.bench.call("training.merge.merge", payload)


def _package(promotion: Promotion, done: dict[str, Any]) -> dict[str, Any]:
    from training.card import card
    from training.data import chat_template_of
    from training.merge import package
    from training.model import load_tokenizer

    model = _model(promotion, done, folder=str(promotion.folder), digest="")
    said = model.model_dump(mode="json", exclude={"stage", "version", "digest", "folder", "created", "prompts"})
    told = said | {"lineage": {name: value for name, value in said["lineage"].items() if name != "data"}}  # paths of this storage
    asks = chat_template_of(promotion.data, load_tokenizer(promotion.job.recipe))
    return package(
        done["merge"]["folder"], done["keep"]["folder"], card(said), str(promotion.folder), told, chat_template=asks
    )  # fmt: skip


def _register(promotion: Promotion, done: dict[str, Any]) -> dict[str, Any]:
    made = done["package"]
    model = promotion.store.add_model(_model(promotion, done, folder=made["folder"], digest=made["digest"]))
    return {"version": model.version}


def _model(promotion: Promotion, done: dict[str, Any], *, folder: str, digest: str) -> Model:
    keep, recipe = done["keep"], promotion.job.recipe
    scores = [Scored.model_validate(s) for s in keep["scores"]]
    # The kept one last, the untuned base first; the other of trial and retrained between them.
    scores.sort(key=lambda s: (s.who != "untuned", s.who == keep["kept"]))
    certificate = promotion.record.certificate
    lineage = Lineage(
        study=promotion.spec.name, trial=promotion.trial.number, recipe=recipe,
        rows=promotion.spec.promote.rows if keep["kept"] == "retrained" else "train",
        data=promotion.data.model_dump(mode="json"), digest=promotion.record.digest,
        base=recipe.model + (f"@{commit}" if (commit := done["merge"].get("commit") or recipe.revision) else ""),
        machine={n: v for n, v in (certificate.machine if certificate else {}).items() if n not in MOMENTARY},
    )  # fmt: skip
    merged = done["merge"]
    retained = Retained.model_validate(keep["retained"]) if keep.get("retained") else None
    return Model(
        name=promotion.name, version=0, key=promotion.key, folder=folder, digest=digest, created=time.time(), lineage=lineage,
        interventions=done["retrain"].get("interventions", ()) if keep["kept"] == "retrained" else (),
        kept=keep["kept"], why=keep["why"], refused=refusal(promotion.spec.promote, scores, retained), scores=tuple(scores),
        retained=retained,
        gain=keep["gain"], checks=merged["checks"],
        prompts=tuple(zip(promotion.prompts, merged.get("answers", ()), strict=False)),
    )  # fmt: skip


STEPS: dict[str, Callable[[Promotion, dict[str, Any]], dict[str, Any]]] = {
    "choose": _choose, "retrain": _retrain, "keep": _keep, "merge": _merge, "package": _package, "register": _register,
}  # fmt: skip


def reproduce(model: Model, spec: Spec, bench: Bench) -> dict[str, Any]:
    """Trains and merges a registered model again from its record and compares the weights.

    Returns:
        `matches`, `largest` (difference of a weight, relative to the largest of its tensor), `tolerance`, `tensor`, `differs`
        (what is not as it was when the model was made: versions, device).

    Raises:
        InputError: the retraining ended early, or what it is made from has changed.
    """
    from training.world import versions

    lineage = model.lineage
    work = spec.folder / "promotions" / f"reproduce-{model.key}"
    recipe: Recipe = lineage.recipe
    job = Job(
        recipe=recipe, data=DataConfig.model_validate(lineage.data), evaluation=spec.evaluation.model_copy(update={"reports": 1}),
        resources=spec.resources, limits=spec.limits, rows=lineage.rows, output=str(work / "adapter"),
        interventions=model.kept == "retrained", resume=str(work / "running"),
    )  # fmt: skip
    try:
        bench.on_phase("retrain")
        outcome, _ = train_within_memory(job, bench.train)
        if outcome.checkpoint is None:
            raise InputError(
                Problem(model.label, f"the retraining ended {outcome.ended}: {outcome.reason}.", "Look at its data.")
            )
        bench.on_phase("merge")
        merged = bench.call("training.merge.merge", {
            "recipe": recipe.model_dump(mode="json"), "adapter": outcome.checkpoint, "output": str(work / "merged"),
            "precision": model.checks.get("precision", recipe.precision), "prompts": [p for p, _ in model.prompts], "record": {},
        })  # fmt: skip
        bench.on_phase("compare")
        found = bench.call("training.merge.difference", {"one": model.folder, "other": merged["folder"]})
    finally:
        shutil.rmtree(work, ignore_errors=True)
    now = versions()
    differs = {n: [then, now[n]] for n, then in lineage.machine.items() if n in now and now[n] != then}
    return found | {"matches": found["largest"] <= TOLERANCE, "tolerance": TOLERANCE, "differs": differs}
