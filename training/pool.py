"""Warm groups: Ray Train worker groups that stay up and take one piece of work after another.

Owns: `Pool` (how many groups there are) and what such a group does. Work is handed in at `training.desk`.
Must not know: Tune, studies, searches.

A group takes work from the mailbox as long as there is some; what trials share (base, tokenized rows) it keeps, see
`training.warm`. With several seats it trains as many recipes at once, see `training.host`. One that dies takes its runs with it
and is replaced while there is work; one that has nothing to do for a while goes home, and so its resources can be had. Groups
have one worker each: a group of several fails as one.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray
import torch
from ray.util import get_current_placement_group

from training import host, own, preemption, warm, workers
from training.errors import InputError, WorkersFailed, WorkersLost
from training.ledger import out_of_memory
from training.mailbox import GRACE, LOOK
from training.recipe import Job, Outcome, Pause, Progress, Resources
from training.workers import HEARING, Fit

PATIENCE = 60.0  # seconds without work after which a group goes home


class Pool:
    """Keeps as many warm groups as there is work for, up to `size`. Use as a context; at its end all groups are gone."""

    def __init__(self, mailbox: Any, resources: Resources, size: int, *, storage: str, name: str, train: Callable | None = None,
                 ahead: int = 0, patience: float = PATIENCE, seats: int = 1):  # fmt: skip
        """Starts nothing yet.

        Args:
            mailbox: a Mailbox actor of this pool's own.
            resources: of the one worker of each group.
            size: groups at most.
            storage: folder for Ray Train's own files.
            name: of the groups, unique in the cluster.
            train: the train function; default `training.loop.train`. Must be picklable.
            ahead: groups that are started before there is work for them.
            patience: seconds without work after which a group goes home.
            seats: recipes that one group trains at a time, where they can be packed.
        """
        self.mailbox, self.started, self._ahead = mailbox, 0, ahead
        self._resources, self._size, self._storage, self._name = resources, size, storage, f"{name}-{time.time_ns()}"
        self._config = {"mailbox": mailbox, "train": train, "own": own.now(), "threads": workers.threads_of(resources),
                        "patience": patience, "seats": seats if train is None else 1}  # fmt: skip
        self._groups: dict[str, Fit] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"pool-{name}", daemon=True)

    def __enter__(self) -> Pool:
        self._thread.start()
        return self

    def __exit__(self, kind, *_) -> None:
        self._closing.set()
        ray.get(self.mailbox.close.remote())
        if kind is not KeyboardInterrupt:  # for which nobody waits: the groups end with the mailbox
            self._thread.join()

    def _work(self) -> None:
        demand = 0
        for _ in range(min(self._size, self._ahead)):
            self._start()
        while not self._closing.is_set():
            self._reap()
            demand = ray.get(self.mailbox.demand.remote(demand, LOOK))
            while len(self._groups) < min(self._size, demand):
                self._start()
        # A group that still waits for resources is told so by `leave`; one that waits for work, by the mailbox.
        for group in self._groups.values():
            group.leave()
        end = time.monotonic() + GRACE
        while self._groups and time.monotonic() < end:
            self._reap()
            time.sleep(0.05)

    def _start(self) -> None:
        name = f"{self._name}-{self.started}"
        self.started += 1
        alone = self._resources.model_copy(update={"workers": 1})
        self._groups[name] = Fit(_serve, self._config | {"group": name}, alone, name, self._storage)

    def _reap(self) -> None:
        for name, fit in list(self._groups.items()):
            if fit.ended:
                del self._groups[name]
                if fit.error is not None:
                    ray.get(self.mailbox.lost.remote(name, _said_of(fit.error)))


def _said_of(error: BaseException) -> dict:
    """Returns the result of the run that a group was doing when it ended with an error."""
    try:
        return {"outcome": workers.classify(error).model_dump_json()}
    except WorkersLost as lost:
        return {"lost": str(lost)}
    except WorkersFailed as failed:
        return {"failed": str(failed)}
    except InputError as wrong:
        return _wrong(wrong)


def _wrong(error: InputError) -> dict:
    return {"wrong": [(problem.where, problem.rule, problem.remedy) for problem in error.problems]}


# On a worker


def _serve(config: dict) -> None:
    """Takes work until there is none, or this process is told to leave, or something went wrong that might have left traces."""
    import peft  # noqa: F401, now and not when the first piece of work is there

    mailbox, name, here = config["mailbox"], config["group"], get_current_placement_group()
    torch.set_num_threads(config["threads"])
    workers.quiet()
    ear, table = _Ear(mailbox), host.Host(config["seats"])
    asked, since = None, time.monotonic()
    with warm.keeping(), own.given(config["own"]):
        while True:
            idle = not table.names
            leaves = preemption.noticed() or (idle and time.monotonic() - since > config["patience"])
            if asked is None and table.free and not leaves:
                asked = mailbox.take.remote(name, here, LOOK, table.key)
            if asked is None and idle:
                return
            if asked is not None and (idle or ray.wait([asked], timeout=0)[0]):
                work, asked = ray.get(asked), None
                if work is None and idle and ray.get(mailbox.closed.remote()):
                    return
                if work is not None:
                    if not _begun(work, table, mailbox, ear, config["train"]):
                        return
                    since = time.monotonic()
            if table.names:
                if not _ticked(table, mailbox):
                    return
                since = time.monotonic()


def _begun(work: dict, table: host.Host, mailbox: Any, ear: _Ear, train: Callable | None) -> bool:
    """Gives work a seat, or does it at once where it can have none; returns whether this process can take more."""
    run = work["run"]
    if work.get("pack") is not None and table.seats > 1 and train is None:
        try:
            outcome = table.enter(run, Job.model_validate_json(work["job"]), _reporter(run, mailbox))
        except InputError as error:
            ray.get(mailbox.answer.remote(run, _wrong(error)))
            return True
        except ray.exceptions.RayActorError:
            raise
        except ValueError:
            if table.names:  # its turn comes again, alone
                ray.get(mailbox.answer.remote(run, {"lost": "this model cannot be packed"}))
                return True
        except Exception as error:
            return _broken([run, *table.names], error, mailbox)
        else:
            if outcome is not None:
                ray.get(mailbox.answer.remote(run, {"outcome": outcome.model_dump_json()}))
            return True
    table.close()
    with ear.listening(run):
        result, sound = _done(work, mailbox, train)
    ray.get(mailbox.answer.remote(run, result))
    return sound


def _ticked(table: host.Host, mailbox: Any) -> bool:
    try:
        for run, outcome in table.tick():
            ray.get(mailbox.answer.remote(run, {"outcome": outcome.model_dump_json()}))
    except ray.exceptions.RayActorError:
        raise
    except Exception as error:
        return _broken(table.names, error, mailbox)
    return True


def _broken(runs: list[str], error: Exception, mailbox: Any) -> bool:
    """Splits a pack in which something went wrong: each of its runs is tried again alone, where it hurts nobody else."""
    for run in runs:
        ray.get(mailbox.answer.remote(run, {"lost": f"its pack of {len(runs)} failed ({type(error).__name__}: {error})"}))
    return False


def _reporter(run: str, mailbox: Any) -> Callable[[Progress], str | None]:
    return lambda progress: ray.get(mailbox.report.remote(run, progress.model_dump_json()))


def _done(work: dict, mailbox: Any, train: Callable | None) -> tuple[dict, bool]:
    """Returns what came of a piece of work, and whether this process can take another one."""
    try:
        if "function" in work:
            return {"value": workers.called(work)}, True
        since = time.perf_counter()
        outcome = workers.trained(Job.model_validate_json(work["job"]), train, _reporter(work["run"], mailbox))
        outcome.conditions["billed_seconds"] = time.perf_counter() - since
        return {"outcome": outcome.model_dump_json()}, "out of memory" not in outcome.reason
    except InputError as error:
        return _wrong(error), True
    except ray.exceptions.RayActorError:
        raise
    except Exception as error:
        if out_of_memory(error):
            said = f"out of memory: {type(error).__name__}: {error}"[:200]
            return {"outcome": Outcome(ended="infeasible", reason=said, share=0).model_dump_json()}, False
        return {"failed": f"{type(error).__name__}: {error}"}, False


class _Ear:
    """A thread that hears whether the run is to pause, or the node is about to be taken away: the next report may be far."""

    def __init__(self, mailbox: Any):
        self._mailbox, self._lock, self._run = mailbox, threading.Lock(), None
        threading.Thread(target=self._listen, name="listen", daemon=True).start()

    @contextlib.contextmanager
    def listening(self, run: str) -> Iterator[None]:
        """Makes the run the one that a pause is for."""
        self._run = run
        try:
            yield
        finally:
            with self._lock:
                self._run = None
                preemption.go_on()

    def _listen(self) -> None:
        while True:
            time.sleep(HEARING)
            if workers.drained():
                preemption.notice()
            run = self._run
            try:
                pause = run is not None and isinstance(ray.get(self._mailbox.heard.remote(run)), Pause)
            except ray.exceptions.RayActorError:
                return
            with self._lock:
                if pause and run == self._run:
                    preemption.pause()
