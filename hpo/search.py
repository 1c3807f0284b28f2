"""The heart: ask for the next trial, report on it, tell what came of it.

Owns: `Search`, the order of trials and what becomes of each. Must not know: Ray, processes, how a trial is trained.

A search has no state of its own that matters: everything is in the store, and the algorithm is a function of the history.
So a search that dies is continued by making another one; the trials that were in flight are launched again.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hpo import algorithms, gate, growth, keeping, space, stopping
from hpo.errors import rule_of
from hpo.objectives import losses
from hpo.space import Params
from hpo.spec import Spec
from hpo.steer import ORIGIN, Inbox
from hpo.store import Holder, Record, Store, with_state
from hpo.trial import CurvePoint, State, Trial
from training import artifact
from training.recipe import DataConfig, Job, Limits, Outcome, Pause, Progress, Recipe

REFUSALS = 200  # points in a row that the gate may refuse before the space counts as exhausted
Judge = Callable[[Params, Recipe], gate.Verdict]
STATE_OF: dict[str, State] = {"complete": "complete", "stopped": "stopped", "infeasible": "infeasible", "diverged": "diverged"}


class Search:
    """One study being searched. Used by one thread; runners call it in the process that holds the study."""

    def __init__(self, store: Store, record: Record, holder: Holder, *, shape=None, tokens_per_row: int | Mapping[str, int] = 0,
                 judge: Judge | None = None, resolve: Callable[[Params], Recipe] | None = None,
                 clock: Callable[[], float] = time.time):  # fmt: skip
        """Takes up a study where the record leaves it.

        Args:
            store: keeps everything.
            record: the study.
            holder: this process's hold on it.
            shape: of the base model, or by model where the space holds several, for the memory gate; None lets everything pass.
            tokens_per_row: of the longest training row, for the memory gate; or by model.
            judge: says what is launched, in place of the gate: for trials that are not real.
            resolve: the recipe of a point, where the space's dimensions are no fields of a recipe.
            clock: seconds since the epoch.
        """
        self.store, self.study, self.holder = store, record, holder
        self._inbox = Inbox(store, record.id)
        self.spec = self._inbox.open(record.spec)  # with what was ordered since it was written
        self.stopping: str | None = None
        self._resume = False
        self.interrupted = False  # set from a signal handler, which may do no more than that
        self.closed = False
        self._sizes: dict[int, int | None] = {}  # predicted bytes of the trials
        self._seconds: dict[int, float] = {}  # of the running trials, as they reported them
        self.shares: dict[int, float] = {}  # of the running trials: how much of its own length each has done
        self._shape, self._tokens_per_row, self._clock = shape or None, tokens_per_row, clock
        self._began = self._counted = clock()
        self._judge, self._resolve = judge or self._gate, resolve
        self._trials = {trial.number: trial for trial in store.trials(record.id)}
        self._paid = sum(t.outcome.seconds or 0.0 for t in self._trials.values() if t.attempts and t.final and t.outcome)
        self._reference: list[float] | None = next((e["point"] for e in store.events(record.id, kinds=("reference",))), None)
        self._has_stalled: tuple[int, bool] = (-1, False)  # after so many finished trials: whether it has
        self._watch = watch_of(self.spec)
        if self._watch.name != "none":
            self._watch.recall(store.trials(record.id, curves=True))
        store.note(record.id, "begin", said=json.dumps(_session(self.spec)))
        # Trials that were in flight when an earlier process died; they are launched again with the same point and number.
        self._orphans = [trial for trial in self._trials.values() if not trial.final]
        self._left: dict[int, str] = {}  # why a trial among them left its workers, where that is known

    # What runners call

    def ask(self) -> Trial | None:
        """Returns the next trial, started and on the record, or None when there is none (budget, space or `stop`)."""
        self._steer()
        self.beat()
        if self.stopping or self._out_of_time():
            return None
        self._orphans = [t for t in self._orphans if not self._ended_by_order(t)]
        if self._orphans:
            trial = self._orphans.pop(0)
            return self._relaunch(trial, self._left.pop(trial.number, "its process died"))
        if self._stalled():
            return None
        for _ in range(REFUSALS):
            # What was ordered is tried whatever the budget of trials says, and counts against it.
            if self.launched >= self.spec.budget.trials and not self._inbox.points:
                return None
            if self._must_wait():
                return None
            trial = self._propose()
            if trial is None:
                return None
            self._trials[trial.number] = trial
            self.store.start_trial(self.study.id, trial)
            if trial.origin == ORIGIN:
                self._inbox.launched(self._inbox.points[0], trial.number)
            if not trial.final:
                self.shares[trial.number] = 0.0
                return trial
        return None

    def report(self, number: int, progress: Progress) -> str | None:
        """Keeps a report; returns None to go on, or the reason why the trial should end."""
        trial = self._trials[number]
        point = CurvePoint(
            share=progress.share, step=progress.step, tokens=progress.tokens, seconds=progress.seconds,
            peak_bytes=progress.peak_bytes, since=progress.since, metrics=progress.metrics,
        )  # fmt: skip
        said = self._watch.report(trial, point)
        self.store.add_point(self.study.id, number, trial.attempts, point, said)
        self.shares[number], self._seconds[number] = progress.share, progress.seconds
        self._steer()
        self.beat()
        return self.stopping or self._inbox.stops.get(number) or self._watch.behind.get(number)

    def tell(self, number: int, outcome: Outcome) -> Trial:
        """Keeps what came of a trial; returns it in its final state, or running where it goes on later. The first result wins."""
        if outcome.ended == "paused":
            return self._paused(number, outcome)
        state = STATE_OF[outcome.ended]
        error = outcome.reason or None
        if (
            state == "complete"
            and losses(self._trials[number].model_copy(update={"outcome": outcome}), self.spec.targets) is None
        ):
            state, error = "failed", f"an objective is missing or not finite: {', '.join(self.spec.objectives)}"
        if wrong := _invalid(outcome):
            state, error, outcome = "failed", error or f"the outcome cannot be kept: {wrong}", None
        ordered = number in self._inbox.stops
        if state == "stopped" and (ordered or (self.stopping and number not in self._watch.behind)):
            if self._resume and not ordered:
                return self.put_back(number)
            state = "cancelled"  # ended by us for a reason that says nothing about the point
        return self._finish(with_state(self._trials[number], state, outcome, error, at=self._clock()))

    def _paused(self, number: int, outcome: Outcome) -> Trial:
        """Keeps a trial that left a checkpoint because it was told to: it goes on with the study, or at once."""
        self.heed()
        if number in self._inbox.stops or (self.stopping and not self._resume):
            why = self._inbox.stops.get(number) or self.stopping
            return self._finish(with_state(self._trials[number], "cancelled", None, why, at=self._clock()))
        trial = self.put_back(number)
        if not self.stopping:  # its node or its worker is wanted for something else
            self._left[number] = outcome.reason
            self._orphans.append(trial)
        return trial

    def fail(self, number: int, error: str, *, retry: bool) -> Trial | None:
        """Keeps a failure; returns the trial to launch again where `retry` and the budget allow it, else None.

        Args:
            retry: the worker or node died, so that the point itself is not to blame. An exception raised by the training
                code is not retried: it would be raised again.
        """
        trial = self._trials[number]
        if retry and self.stopping and self._resume:
            self.put_back(number)  # Ctrl-C reaches workers too
            return None
        if retry and not self.stopping and trial.attempts <= self.spec.budget.retries:
            return self._relaunch(trial, error)
        self._finish(with_state(trial, "failed", None, error, at=self._clock()))
        return None

    def stop(self, reason: str, *, resume: bool = False) -> None:
        """Asks every running trial to end at its next report and starts no more.

        Args:
            reason: is kept with the study.
            resume: running trials stay so on the record and are launched again when the study is continued; otherwise they
                end as cancelled.
        """
        if not self.stopping:
            self.stopping, self._resume = Pause(reason) if resume else reason, resume
            self.store.add_event(self.study.id, "stopping", reason=reason)

    def put_back(self, number: int) -> Trial:
        """Leaves a trial that we ended as running on the record, to be launched again when the study is continued.

        The launch does not count as an attempt: nothing was wrong with the trial.
        """
        trial = self._trials[number].model_copy(update={"attempts": self._trials[number].attempts - 1})
        self.shares.pop(number, None)
        self._trials[number] = trial
        self.store.start_trial(self.study.id, trial)
        return trial

    def beat(self) -> None:
        """Says that this process is alive, counts the time spent, and heeds an interruption."""
        self.heed()
        now = self._clock()
        if now - self._counted > 5:
            self.holder.beat()
            self.store.add_spent(self.study.id, now - self._counted)
            self._counted = now
        if self._out_of_time() or (self.spec.budget.cost is not None and self.cost >= self.spec.budget.cost):
            self._steer()  # more may just have been given
        if self._out_of_time():
            self.stop(f"budget.hours ({self.spec.budget.hours}) is spent")
        if self.spec.budget.cost is not None and self.cost >= self.spec.budget.cost:
            self.stop(f"budget.cost ({self.spec.budget.cost:g}) is spent")

    def retain(self, *, winner: int | None, settled: bool = False) -> None:
        """Deletes the adapters that the study's `keep` no longer wants; see `hpo.keeping`."""
        gone = keeping.apply(self.store, self.study.id, self.spec, self.trials, winner=winner, settled=settled)
        self._trials |= {trial.number: trial for trial in gone}

    def heed(self) -> None:
        """Stops the search where a signal asked for it."""
        if self.interrupted:
            self.stop("interrupted", resume=True)

    def close(self) -> None:
        """Counts the last seconds."""
        self.closed = True
        self.store.add_spent(self.study.id, self._clock() - self._counted)
        self._counted = self._clock()

    # What is known

    @property
    def trials(self) -> list[Trial]:
        """All trials by number, without curves."""
        return list(self._trials.values())  # numbers are given in order

    @property
    def cost(self) -> float:
        """Currency units of the trials so far, running ones included: training seconds of all workers at `resources.price`."""
        rate = (self.spec.price or 0.0) / 3600 * self.spec.resources.workers
        return rate * (self._paid + sum(self._seconds.values()))

    @property
    def launched(self) -> int:
        """Trials that count against `budget.trials`: all but those refused before launch and those cancelled."""
        return sum(1 for t in self._trials.values() if t.attempts and t.state != "cancelled")

    @property
    def finished(self) -> int:
        """Launched trials in a final state."""
        return sum(1 for t in self._trials.values() if t.attempts and t.final and t.state != "cancelled")

    def _out_of_time(self) -> bool:
        hours = self.spec.budget.hours
        return hours is not None and self.study.spent + self._clock() - self._began > hours * 3600

    # Inside

    @property
    def _next(self) -> int:
        return max(self._trials, default=-1) + 1

    def _visible(self) -> list[Trial]:
        return visible(self.spec, self.trials, self._next)

    def _resolved(self, params: Params) -> Recipe:
        return self._resolve(params) if self._resolve else self.spec.space.resolve(params, self.spec.recipe)

    def _must_wait(self) -> bool:
        """Says whether a trial that the next one learns from has not ended yet; a runner asks again when one has."""
        lag = lag_of(self.spec)
        return lag is not None and any(not t.final for t in self._trials.values() if t.number <= self._next - lag)

    def _steer(self) -> None:
        """Follows what was ordered from outside since the last look."""
        self.spec = self._inbox.follow(self.spec, self._trials)

    def _ended_by_order(self, trial: Trial) -> bool:
        # Its process died between the order to stop it and its end.
        if (reason := self._inbox.stops.get(trial.number)) is not None:
            self._finish(with_state(trial, "cancelled", None, reason))
        return reason is not None

    def _predicted(self, trial: Trial) -> int | None:
        if trial.number not in self._sizes:
            shape, longest = self._known(trial.recipe)
            self._sizes[trial.number] = gate.predict(trial.recipe, shape, self.spec.resources, longest) if shape else None
        return self._sizes[trial.number]

    def _gate(self, params: Params, recipe: Recipe) -> gate.Verdict:
        seen, limits = self._visible(), self.spec.limits
        if self._shape is not None:
            ran_out = [self._predicted(t) for t in seen if t.attempts and t.state == "infeasible" and _out_of_memory(t, limits)]
            ended = [t for t in seen if t.attempts and t.state in ("complete", "stopped") and t.outcome.peak_bytes]
            measured = [(size, t.outcome.peak_bytes) for t in ended if (size := self._predicted(t)) is not None]
            most = gate.wall(limits.peak_bytes, [size for size in ran_out if size is not None], measured)
            limits = limits.model_copy(update={"peak_bytes": most})
        shape, longest = self._known(recipe)
        verdict = gate.judge(recipe, shape, limits, self.spec.resources, longest)
        seconds, refusal = gate.too_long(verdict.recipe, self.spec.seconds_limit, seen)
        return dataclasses.replace(verdict, seconds=seconds, refusal=verdict.refusal or refusal)

    def _known(self, recipe: Recipe) -> tuple[Any, int]:
        """Returns the shape of a recipe's model and the tokens of the longest row under its tokenizer."""
        known = (self._shape, self._tokens_per_row)
        shape, longest = (value.get(recipe.model) if isinstance(value, Mapping) else value for value in known)
        return shape, longest or 0

    def _stalled(self) -> bool:
        """Says whether the search finds nothing more by `budget.stall`; it is worked out once for each trial that ends."""
        stall = self.spec.budget.stall
        if stall is None or self._has_stalled[0] == (finished := self.finished):
            return stall is not None and self._has_stalled[1]
        targets, trials = self.spec.targets, self._visible()
        if self._reference is None and (point := growth.reference(trials, targets, self.spec.limits_of_losses)):
            self._reference = point
            self.store.add_event(self.study.id, "reference", objectives=list(self.spec.objectives), point=point)
        grown = growth.volumes(trials, targets, self._reference) if self._reference else []
        stalled = growth.stalled(grown, trials=stall.trials, gain=stall.gain)
        if stalled and not self._has_stalled[1]:
            self.store.add_event(self.study.id, "stalled", trials=stall.trials, gain=stall.gain, hypervolume=grown[-1])
        self._has_stalled = (finished, stalled)
        return stalled

    def _propose(self) -> Trial | None:
        number = self._next
        if self._inbox.points:
            params, origin = self._inbox.points[0].data["params"], ORIGIN
            recipe = self._resolved(params)
        else:
            params, recipe, origin = next_point(self.spec, self._visible(), number, self._resolve)
        if params is None:
            return None
        verdict = self._judge(params, recipe)
        trial = Trial(number=number, params=params, recipe=verdict.recipe, origin=origin, started=self._clock())
        if verdict.refusal:
            outcome = Outcome(
                ended="infeasible", reason=verdict.refusal, share=0, peak_bytes=verdict.predicted, seconds=verdict.seconds
            )
            refused, why = trial.model_copy(update={"attempts": 0}), f"refused before launch: {verdict.refusal}"
            return with_state(refused, "infeasible", outcome, why, at=self._clock())
        return trial

    def _relaunch(self, trial: Trial, error: str) -> Trial | None:
        again = trial.model_copy(update={"attempts": trial.attempts + 1, "started": self._clock()})
        if trial.attempts > self.spec.budget.retries:
            why = f"launched {trial.attempts} times, last: {error}"
            self._finish(with_state(trial, "failed", None, why, at=self._clock()))
            return self.ask()
        self._trials[trial.number] = again
        self._watch.launched(trial.number)
        self.store.start_trial(self.study.id, again)
        self.store.add_event(self.study.id, "relaunched", number=trial.number, attempt=again.attempts, error=error)
        return again

    def _finish(self, trial: Trial) -> Trial:
        self.shares.pop(trial.number, None)
        self._seconds.pop(trial.number, None)
        if self.store.finish_trial(self.study.id, trial):
            self._trials[trial.number] = trial
            self._paid += trial.outcome.seconds or 0.0 if trial.outcome else 0.0
            self._watch.ended(trial)
            artifact.remove(resume_folder(self.spec, trial.number))
            if trial.outcome is not None and trial.outcome.checkpoint:
                self.retain(winner=self.study.certificate.winner if self.study.certificate else None)
        else:
            self.store.add_event(self.study.id, "late result refused", number=trial.number, state=trial.state)
        return self._trials[trial.number]


def _out_of_memory(trial: Trial, limits: Limits) -> bool:
    peak = trial.outcome.peak_bytes or 0
    return "out of memory" in trial.outcome.reason or (limits.peak_bytes is not None and peak > limits.peak_bytes)


def lag_of(spec: Spec) -> int | None:
    """Returns by how many numbers a trial comes after those that it learns from, or None where it learns from all that ended."""
    return (spec.budget.parallel or 1) if spec.budget.order == "number" else None


def visible(spec: Spec, trials: Sequence[Trial], number: int) -> list[Trial]:
    """Returns the trials, given by number, as the one with this number may see them; see `Budget.order`."""
    lag = lag_of(spec)
    if lag is None:
        return list(trials)
    # What was refused was so before anything could happen to it; what may have ended or not counts as running.
    running = {"state": "running", "outcome": None, "error": None, "finished": None}
    seen = [t if t.number <= number - lag or not t.attempts else t.model_copy(update=running) for t in trials]
    return [t.model_copy(update={"finished": float(t.number)}) if t.final else t for t in seen]


def next_point(
    spec: Spec, trials: Sequence[Trial], number: int, resolve: Callable[[Params], Recipe] | None = None
) -> tuple[Params | None, Recipe | None, str]:
    """Returns the point of the next trial, its recipe and where it comes from: a pure function of what is known.

    The defaults are first, then the user's start points, then those of the prior, then the algorithm proposes; (None, None, "")
    when nothing is left.

    Args:
        spec: the study as it is now.
        trials: that the next one may learn from, by number.
        number: of the next one.
        resolve: the recipe of a point, where dimensions are no fields of a recipe; then there are no defaults to begin with.
    """
    if number == 0 and resolve is None:
        return spec.space.project(spec.recipe) or {}, spec.recipe, "defaults"
    resolve = resolve or functools.partial(spec.space.resolve, defaults=spec.recipe)
    given = [*((point, "start") for point in spec.start), *((point, "prior") for point in spec.prior.points)]
    tried = {trial.key for trial in trials} if given else set()
    for point, origin in given:
        if space.key(point) not in tried and (origin == "start" or spec.space.contains(point)):
            return point, resolve(point), origin
    history = [trial for trial in trials if trial.inside(spec.space)]
    suggest = algorithms.load(spec.algorithm.name)
    params = suggest(spec.space, spec.targets, history, random.Random(f"{spec.seed}:{number}"), **spec.algorithm.options)
    return (None, None, "") if params is None else (params, resolve(params), spec.algorithm.name)


def watch_of(spec: Spec) -> stopping.Watch:
    """Returns the stopping rule of a study, which has seen nothing yet."""
    return stopping.Watch(spec.stopping.name, spec.stopping.options, spec.targets, lag_of(spec))


def versions() -> dict[str, str]:
    """Returns the versions of the libraries that suggestions are computed with."""
    return {name: importlib.metadata.version(name) for name in ("optuna", "pymoo", "numpy", "scipy", "torch")}


def _session(spec: Spec) -> dict:
    """Returns what may differ between the sessions of a study and decides its trials, for a replay."""
    budget = {"parallel": spec.budget.parallel, "order": spec.budget.order}
    return {"algorithm": spec.algorithm.model_dump(mode="json"), "stopping": spec.stopping.model_dump(mode="json"),
            "budget": budget, "versions": versions()}  # fmt: skip


def _invalid(outcome: Outcome) -> str:
    """Returns why an outcome could not be read again from the record, or ""; a copy with changes was never checked."""
    try:
        Outcome.model_validate(outcome.model_dump())
    except ValidationError as error:
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))} {rule_of(first)}"
    return ""


def resume_folder(spec: Spec, number: int) -> Path:
    """Returns where a running trial keeps the checkpoints that it goes on from; they go when it has ended."""
    return spec.folder / "running" / f"{number:05d}"


def job_of(trial: Trial, spec: Spec, data: DataConfig) -> Job:
    """Returns what a worker needs to train a trial.

    Args:
        data: the study's own copy of the rows.
    """
    recipe = trial.recipe
    if "model" not in spec.space.root:  # a submitted job may find the model's folder elsewhere each time
        recipe = recipe.model_copy(update={"model": spec.recipe.model})
    limits = spec.limits.model_copy(update={"seconds": spec.seconds_limit})
    return Job(
        recipe=recipe, data=data, evaluation=spec.scoring, resources=spec.resources, limits=limits,
        output=str(keeping.output_folder(spec, trial.number)), cache=str(spec.folder / "cache"),
        resume=str(resume_folder(spec, trial.number)),
    )  # fmt: skip
