"""Runs a search on a Ray cluster: Ray Tune drives, each trial is a Ray Train worker group.

Owns: the one Searcher and the one scheduler that adapt a Search to Tune, connecting to a cluster, concurrency.
Must not know: algorithms. It may add only concurrency to what `hpo.local` specifies.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from hpo.drive import drive, seat_of
from hpo.errors import BackendError, InputError, Problem
from hpo.search import Search, job_of
from serving.targets import haproxy
from training import own
from training.beside import Seats
from training.desk import Groups
from training.errors import WorkersFailed, WorkersLost
from training.mailbox import GRACE, mailbox_of
from training.pool import Pool
from training.recipe import DataConfig, Job, Outcome, Pause, Progress, Resources
from training.workers import ENVIRONMENT

BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")  # what `ray up` leaves on a head node
GROWTH = "HPO_GROWTH"  # the same for clusters whose autoscaler does not say how far it goes, such as KubeRay's
SEATS = 4  # of a packed group where nothing says how many
TRIES = 3  # of what is measured after the search, when workers are lost

Node = dict[str, float]


@contextlib.contextmanager
def session() -> Iterator[None]:
    """Keeps the cluster that the first `connect` inside joins or starts until the block ends, for all that comes in it."""
    global _in_session
    before, _in_session = _in_session, True
    try:
        yield
    finally:
        _in_session = before
        if not before:
            _leave()


_in_session = False
_fronts: list[str] = []  # folders of HAProxy's, which go with the cluster


def _leave() -> None:
    if ray.is_initialized():
        ray.shutdown()
    while _fronts:
        shutil.rmtree(_fronts.pop(), ignore_errors=True)


@contextlib.contextmanager
def connect(*, dashboard: bool = False) -> Iterator[None]:
    """Joins the cluster at RAY_ADDRESS, or starts one on this machine that ends with the block (or the session around it)."""
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
    mine = not ray.is_initialized()
    if mine:
        options: dict[str, Any] = {
            "runtime_env": {"env_vars": environment()},
            "log_to_driver": False,
            "logging_level": logging.ERROR,
        }
        if not os.environ.get("RAY_ADDRESS"):
            options |= {"address": "local", "include_dashboard": dashboard, "_temp_dir": os.environ.get("PARETUNE_RAY_TEMP")}
            _fronts.append(tempfile.mkdtemp(prefix="pt-"))
            given = haproxy.environment(_fronts[-1])
            os.environ.update(given)
            options["runtime_env"]["env_vars"] |= given
        try:
            ray.init(**options)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise BackendError(f"Ray does not start or answer: {error}") from error
    try:
        yield
    finally:
        if mine and not _in_session:
            _leave()


def environment() -> dict[str, str]:
    """Returns the environment of all workers. PARETUNE_<name> here changes one of them; what a submitted job's own
    `--runtime-env` sets is left to it, because Ray refuses a variable that is set twice."""
    submitted = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}").get("runtime_env") or {}
    given = submitted.get("env_vars") or {}
    return {name: os.environ.get(f"PARETUNE_{name}", value) for name, value in ENVIRONMENT.items() if name not in given}


def capacity() -> list[Node]:
    """Returns the resources of each node that the cluster has, or can grow to where an autoscaler says so."""
    from ruamel.yaml import YAML

    yaml, path = YAML(typ="safe", pure=True), BOOTSTRAP.expanduser()
    if given := os.environ.get(GROWTH):
        return growth({"available_node_types": yaml.load(given)})
    if os.environ.get("RAY_ADDRESS") and path.is_file():
        return growth(yaml.load(path.read_text()))
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def growth(cluster: dict[str, Any]) -> list[Node]:
    """Returns the nodes of a `ray up` cluster with every node type at its maximum.

    Args:
        cluster: the parsed cluster.yaml.
    """
    nodes: list[Node] = []
    head = cluster.get("head_node_type")
    left = cluster.get("max_workers", math.inf)
    for name, kind in cluster.get("available_node_types", {}).items():
        workers = min(kind.get("max_workers", 0), left)
        left -= workers
        nodes += [dict(kind.get("resources") or {})] * (workers + (name == head))
    return nodes


def concurrency(resources: Resources, nodes: list[Node], asked: int | None) -> int:
    """Returns how many trials run at a time: what fits into the cluster, at most what the user asked for.

    A worker fits into one node; the workers of a trial may be spread over several.

    Raises:
        BackendError: not even one trial fits.
    """
    need = {name: amount for name, amount in (("CPU", resources.cpus), ("GPU", resources.gpus)) if amount}
    if not need:
        return asked or 1
    workers = sum(min(math.floor(node.get(name, 0) / amount + 1e-9) for name, amount in need.items()) for node in nodes)
    if workers < resources.workers:
        wanted = " and ".join(f"{amount:g} {name}" for name, amount in need.items())
        total = " and ".join(f"{sum(node.get(name, 0) for node in nodes):g} {name}" for name in need)
        raise BackendError(
            f"resources: not even one trial fits into the cluster: it needs {resources.workers} workers with {wanted} each, "
            f"and {workers} fit into {len(nodes)} nodes with {total} in all. "
            "Lower resources.workers, resources.cpus or resources.gpus."
        )
    return min(workers // resources.workers, asked or workers)


@dataclass(frozen=True)
class Layout:
    """How trials run: `parallel` at a time, in `groups` worker groups at a time, up to `seats` in each."""

    parallel: int
    groups: int
    seats: int


def layout(resources: Resources, nodes: list[Node], asked: int | None, *, best: Seats | None = None) -> Layout:
    """Returns how trials run on a cluster.

    Args:
        resources: of one trial, and the mode.
        nodes: of the cluster.
        asked: `budget.parallel`.
        best: how many trials one worker should train at a time, where that is known.

    Raises:
        BackendError: not even one trial fits.
    """
    fits = concurrency(resources, nodes, None if resources.cpus or resources.gpus else asked)
    packs = resources.workers == 1 and resources.mode in ("auto", "packed")
    if not packs:
        seats = 1
    elif asked:
        seats = min(math.ceil(asked / fits), resources.seats or asked)
    elif resources.seats or resources.mode == "packed":
        seats = resources.seats or (best.count if best else SEATS)
    else:  # not unasked: each seat costs a process of Tune's and a run alone, which short trials never earn (benchmarks/study)
        seats = 1
    groups = min(fits, math.ceil((asked or fits * seats) / seats))
    return Layout(min(groups * seats, asked or groups * seats), groups, seats)


def run_search(
    search: Search,
    data: DataConfig,
    *,
    parallel: int,
    train: Callable | None = None,
    on_change: Callable[[Search], None] = lambda search: None,
    grace: float = GRACE,
    groups: Groups | None = None,
) -> None:
    """Runs trials until the search has no more. Ray must be connected.

    Args:
        search: says which trial is next and keeps what came of it.
        data: the study's own copy of the rows, where every node sees it.
        parallel: trials at a time.
        train: a user's own train function; default is the loop.
        on_change: is called after every report and every result.
        grace: seconds that a running trial has to end after it was asked to; then its workers are killed.
        groups: where they run; default: groups that end with the search.
    """
    if groups is None:
        folder = str(search.spec.folder / "ray")
        with groups_of(search.spec.name, search.spec.resources, parallel, storage=folder, train=train) as groups:
            run_search(search, data, parallel=parallel, train=train, on_change=on_change, grace=grace, groups=groups)
        return
    course = _Course(search, data, parallel, groups.mailbox, on_change)
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(drive, groups=groups, train=train, grace=grace, brought=own.now()), seat_of),
        tune_config=tune.TuneConfig(
            search_alg=_Searcher(course), scheduler=_Scheduler(course), num_samples=-1, metric="share", mode="max",
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="tune", storage_path=groups.storage, verbose=0, failure_config=tune.FailureConfig(max_failures=0)
        ),
    )  # fmt: skip
    _fit(tuner, course)


def _fit(tuner: tune.Tuner, course: _Course) -> None:
    # Tune runs in a thread of its own, so that Ctrl-C and SIGTERM reach this one and running trials can end by themselves.
    # An event tells its end: in CPython before 3.13 a thread whose join was interrupted calls itself dead.
    box: list[BaseException] = []
    ended = threading.Event()

    def fit():
        try:
            tuner.fit()
        except BaseException as error:
            box.append(error)
        finally:
            ended.set()

    threading.Thread(target=fit, name="tune", daemon=True).start()
    while not ended.is_set():
        try:
            course.interrupted = course.interrupted or course.search.interrupted
            course.pass_on_stops()
            ended.wait(0.2)
        except KeyboardInterrupt:
            if course.interrupted:  # the second time: at once, and nothing more is kept
                course.error = KeyboardInterrupt()
                raise
            course.interrupted = True
    if course.error is not None:
        raise course.error
    if box:
        raise BackendError(f"Ray Tune ended with {type(box[0]).__name__}: {box[0]}") from box[0]


@contextlib.contextmanager
def groups_of(
    name: str, resources: Resources, size: int, *, storage: str, train: Callable | None = None, ahead: int = 0, seats: int = 1
) -> Iterator[Groups]:
    """Yields where runs are done by `resources.mode`, in up to `size` groups; all workers are gone when the block ends.

    Args:
        name: of the groups.
        resources: of one group.
        size: groups at a time.
        storage: folder for Ray's own files.
        train: a user's own train function.
        ahead: warm groups to start before there is work for them.
        seats: runs that a warm group does at a time, where they can be packed.
    """
    Path(storage).mkdir(parents=True, exist_ok=True)
    with mailbox_of(name) as mailbox, contextlib.ExitStack() as stack:
        warm = resources.mode in ("auto", "warm", "packed") and resources.workers == 1
        if warm:
            stack.enter_context(Pool(mailbox, resources, size, storage=storage, name=name, train=train, ahead=ahead, seats=seats))
        yield Groups(mailbox, resources, storage, warm)


def call(groups: Groups, function: str, payload: dict[str, Any]) -> Any:
    """Returns `function(**payload)` as called on a worker, where models can be loaded.

    Raises:
        BackendError: it raised, or workers were lost again and again.
    """
    name = function.rpartition(".")[2]
    for again in reversed(range(TRIES)):
        try:
            return groups.call(function, payload, f"call-{name}-{time.time_ns()}")
        except WorkersLost as error:
            if not again:
                raise BackendError(f"{name}: workers were lost {TRIES} times, last: {error}") from error
        except WorkersFailed as error:
            raise BackendError(f"{name}: {error}") from error


def train_alone(groups: Groups, job: Job, name: str) -> Outcome:
    """Returns the outcome of one job, outside any search.

    Raises:
        BackendError: the training code raised, or workers were lost again and again.
    """
    again = TRIES
    while True:
        try:
            outcome = groups.train(job, f"{name}-{time.time_ns()}")
            if outcome.ended != "paused":  # else its worker was told to leave, and it goes on from its checkpoint
                return outcome
        except WorkersLost as error:
            again -= 1
            if not again:
                raise BackendError(f"{name}: workers were lost {TRIES} times, last: {error}") from error
        except WorkersFailed as error:
            raise BackendError(f"{name}: {error}") from error


class _Course:
    """What the searcher and the scheduler share: the search, and which of its trials Tune has.

    Lives in Tune's thread, but for `pass_on_stops` and `interrupted`.
    """

    def __init__(self, search: Search, data: DataConfig, parallel: int, mailbox: Any, on_change: Callable[[Search], None]):
        self.search, self.data, self.parallel, self.mailbox, self.on_change = search, data, parallel, mailbox, on_change
        self.live: dict[str, tuple[int, str]] = {}  # Tune's trial -> number and run
        self.seats: dict[str, int] = {}  # of each of them
        self.again: list = []
        self.interrupted = False
        self.error: BaseException | None = None  # once set, nothing more is kept: what runs is launched again next time
        self._told: set[str] = set()

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        """Around whatever may raise: Tune would take an exception for a failure of one trial, or bury it in its own."""
        try:
            yield
        except Exception as error:
            self.error = self.error or error

    def heed_interrupt(self) -> None:
        """Stops the search where the user asked for it; the interrupt itself reaches another thread than the search's."""
        if self.interrupted:
            self.search.stop("interrupted", resume=True)

    def pass_on_stops(self) -> None:
        """Asks the runs to end that should; called again and again, because a run may begin at any time."""
        reason = Pause("interrupted") if self.interrupted else self.search.stopping
        reason = reason or (self.error and Pause("the search ended"))
        for _, run in list(self.live.values()) if reason else ():
            if run not in self._told:
                self._told.add(run)
                self.mailbox.stop.remote(run, reason)

    def next_trial(self):
        """Returns the next trial to launch, or None."""
        self.heed_interrupt()
        self.search.beat()
        if len(self.live) >= self.parallel:
            return None
        while self.again:
            trial = self.again.pop(0)
            if not self.search.stopping:
                return trial
            self.search.tell(trial.number, Outcome(ended="stopped", reason=self.search.stopping, share=0))
        return self.search.ask()

    def finish(self, number: int, run: str, result: dict) -> None:
        """Keeps what came of a run."""
        self.heed_interrupt()
        if "outcome" in result:
            self.search.tell(number, Outcome.model_validate_json(result["outcome"]))
        elif "wrong" in result:
            raise InputError(*(Problem(*said) for said in json.loads(result["wrong"])))
        elif "failed" in result:
            self.search.fail(number, result["failed"], retry=False)
        else:
            if "lost" not in result:
                self.mailbox.free.remote(run)  # nobody else is left to free its workers
            said = result.get("lost", "the process that drove the trial died")
            if (again := self.search.fail(number, said, retry=True)) is not None:
                self.again.append(again)
        self.on_change(self.search)


class _Scheduler(FIFOScheduler):
    """Passes reports on to the search, and its decision to end a trial on to the mailbox that the trial's loop reads."""

    def __init__(self, course: _Course):
        super().__init__()
        self._course = course
        self._kept: set = set()

    def __getstate__(self) -> dict:
        return {}  # Tune writes this to its own files, which are never read: the store is the truth

    def on_trial_add(self, tune_controller, trial) -> None:
        # Tune keeps a process for the next trial only where that one is there already, and ours comes of what this one tells.
        # It is a private part of Tune: a version without it works too, and starts more processes.
        kept, seat = getattr(tune_controller._tune_controller, "_actor_cache", None), trial.placement_group_factory
        if kept is not None and seat not in self._kept:
            self._kept.add(seat)
            kept.increase_max(seat)

    def on_trial_result(self, tune_controller, trial, result: dict) -> str:
        course = self._course
        if "progress" in result and course.error is None:
            with course.keeping():
                number, run = course.live[trial.trial_id]
                if reason := course.search.report(number, Progress.model_validate_json(result["progress"])):
                    course.mailbox.stop.remote(run, reason)
                course.on_change(course.search)
        return TrialScheduler.CONTINUE


class _Searcher(Searcher):
    """Hands the search's trials to Tune and Tune's results to the search."""

    def __init__(self, course: _Course):
        super().__init__(metric="share", mode="max")
        self._course = course

    def __getstate__(self) -> dict:
        return {}

    def set_search_properties(self, metric, mode, config, **spec) -> bool:
        return True

    def set_max_concurrency(self, max_concurrent: int) -> bool:
        return True

    def suggest(self, trial_id: str) -> dict | str | None:
        course, trial = self._course, None
        if course.error is None:
            with course.keeping():
                trial = course.next_trial()
                if trial is not None:
                    course.on_change(course.search)
        if trial is None or course.error is not None:
            return None if course.live else Searcher.FINISHED
        # Never the name of an earlier launch: Ray Train would take its folder up where that one left it.
        run = f"{course.search.spec.name}-{trial.number:05d}-{time.time_ns()}"
        course.live[trial_id] = (trial.number, run)
        course.seats[trial_id] = min(set(range(course.parallel)) - set(course.seats.values()))
        job = job_of(trial, course.search.spec, course.data).model_dump_json()
        return {"run": run, "attempt": trial.attempts, "seat": course.seats[trial_id], "job": job}

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        course = self._course
        number, run = course.live.pop(trial_id)
        del course.seats[trial_id]
        if course.error is None:
            with course.keeping():
                course.finish(number, run, result or {})

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the store is the truth."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the store is the truth."""
