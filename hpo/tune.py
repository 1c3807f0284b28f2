"""Runs a search on a Ray cluster: Ray Tune drives, each trial is a Ray Train worker group.

Owns: the one Searcher and the one scheduler that adapt a Search to Tune, connecting to a cluster, concurrency.
Must not know: algorithms. It may add only concurrency to what `hpo.local` specifies.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from hpo.errors import BackendError
from hpo.search import Search, job_of
from training.recipe import DataConfig, Outcome, Progress, Resources
from training.workers import ENVIRONMENT, WorkersFailed, WorkersLost, call_on_group, flags_of, run_group

# The trial's own process drives its worker group and computes nothing. A share of a CPU would come out of the cluster and
# could keep the last worker group waiting for ever.
DRIVER = {"cpu": 0, "node:__internal_head__": 0.001}
BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")  # what `ray up` leaves on a head node


@contextlib.contextmanager
def connect(*, dashboard: bool = False) -> Iterator[None]:
    """Joins the cluster at RAY_ADDRESS, or starts one on this machine that ends with the block."""
    environment = {name: os.environ.get(f"PARETUNE_{name}", value) for name, value in ENVIRONMENT.items()}
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new output prints a banner even when told to be quiet
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
    mine = not ray.is_initialized()
    if mine:
        options: dict[str, Any] = {
            "runtime_env": {"env_vars": environment},
            "log_to_driver": False,
            "logging_level": logging.ERROR,
        }
        if not os.environ.get("RAY_ADDRESS"):
            options |= {"address": "local", "include_dashboard": dashboard, "_temp_dir": os.environ.get("PARETUNE_RAY_TEMP")}
        try:
            ray.init(**options)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise BackendError(f"Ray does not start or answer: {error}") from error
    try:
        yield
    finally:
        if mine:
            ray.shutdown()


def capacity() -> dict[str, float]:
    """Returns the resources that the cluster has, or can grow to where an autoscaler says so."""
    now = dict(ray.cluster_resources())
    grown = ray._private.state.state.get_max_resources_from_cluster_config() or _bootstrap_resources()
    return {name: max(now.get(name, 0), grown.get(name, 0)) for name in {*now, *grown}}


def _bootstrap_resources() -> dict[str, float]:
    path = BOOTSTRAP.expanduser()
    if not path.is_file():
        return {}
    from ruamel.yaml import YAML

    return growth(YAML(typ="safe", pure=True).load(path.read_text()))


def growth(cluster: dict[str, Any]) -> dict[str, float]:
    """Returns the resources of a `ray up` cluster with every node type at its maximum.

    Args:
        cluster: the parsed cluster.yaml.
    """
    total: dict[str, float] = {}
    head = cluster.get("head_node_type")
    left = cluster.get("max_workers", math.inf)
    for name, kind in cluster.get("available_node_types", {}).items():
        workers = min(kind.get("max_workers", 0), left)
        left -= workers
        for resource, amount in (kind.get("resources") or {}).items():
            total[resource] = total.get(resource, 0) + amount * (workers + (name == head))
    return total


def concurrency(resources: Resources, have: dict[str, float], asked: int | None) -> int:
    """Returns how many trials run at a time: what fits into the cluster, at most what the user asked for.

    Raises:
        BackendError: not even one trial fits.
    """
    need = {"CPU": resources.cpus * resources.workers, "GPU": resources.gpus * resources.workers}
    fits = [math.floor(have.get(name, 0) / amount + 1e-9) for name, amount in need.items() if amount]
    most = min(fits, default=asked or 1)
    if most < 1:
        short = ", ".join(
            f"{amount:g} {name} of {have.get(name, 0):g}" for name, amount in need.items() if amount > have.get(name, 0)
        )
        raise BackendError(
            f"resources: a trial needs more than the cluster can have ({short}). Lower resources.workers, resources.cpus or resources.gpus."
        )
    return min(most, asked or most)


def run_search(
    search: Search,
    data: DataConfig,
    *,
    parallel: int,
    train: Callable | None = None,
    on_change: Callable[[Search], None] = lambda search: None,
) -> None:
    """Runs trials until the search has no more. Ray must be connected.

    Args:
        search: says which trial is next and keeps what came of it.
        data: the study's own copy of the rows, where every node sees it.
        parallel: trials at a time.
        train: a user's own train function; default is the loop.
        on_change: is called after every report and every result.
    """
    folder = search.spec.folder / "ray"
    folder.mkdir(parents=True, exist_ok=True)
    with flags_of(search.spec.name) as flags:
        searcher = _Searcher(search, data, parallel, on_change)
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(_drive, flags=flags, storage=str(folder), train=train), DRIVER),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=_Scheduler(search, flags, on_change),
                num_samples=-1,
                metric="share",
                mode="max",
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="tune", storage_path=str(folder), verbose=0, failure_config=tune.FailureConfig(max_failures=0)
            ),
        )
        _fit(tuner, search, flags, searcher)
    if searcher.error is not None:
        raise searcher.error


def _fit(tuner: tune.Tuner, search: Search, flags: Any, searcher: _Searcher) -> None:
    # Tune runs in a thread of its own, so that Ctrl-C and SIGTERM reach this one and running trials can end by themselves.
    box: list[BaseException] = []

    def fit():
        try:
            tuner.fit()
        except BaseException as error:
            box.append(error)

    thread = threading.Thread(target=fit, name="tune", daemon=True)
    thread.start()
    while thread.is_alive():
        try:
            thread.join(0.2)
        except KeyboardInterrupt:
            if searcher.interrupted:
                raise  # the second time: at once
            searcher.interrupted = True
        if searcher.interrupted or search.stopping:
            for number in list(searcher.live.values()):
                flags.stop.remote(_run_name(search, number), search.stopping or "interrupted")
    if box:
        raise BackendError(f"Ray Tune ended with {type(box[0]).__name__}: {box[0]}") from box[0]


def call(function: str, payload: dict[str, Any], resources: Resources, *, storage: str) -> Any:
    """Returns `function(**payload)` as called on a worker with these resources, where models can be loaded."""
    return call_on_group(function, payload, resources, run=f"call-{os.getpid()}-{function.rpartition('.')[2]}", storage=storage)


def _run_name(search: Search, number: int) -> str:
    attempts = next((t.attempts for t in search.trials if t.number == number), 1)
    return f"{search.spec.name}-{number:05d}-{attempts}"


def _drive(config: dict, flags: Any = None, storage: str = "", train: Callable | None = None) -> None:
    """One Tune trial: drives one worker group and ends normally with what came of it, so that the reason is never lost."""
    from training.recipe import Job

    try:
        outcome = run_group(
            Job.model_validate_json(config["job"]),
            config["run"],
            flags,
            storage=storage,
            callbacks=[TuneReportCallback()],
            train=train,
        )
    except WorkersLost as error:
        tune.report({"share": 0.0, "lost": str(error)})
    except WorkersFailed as error:
        tune.report({"share": 0.0, "failed": str(error)})
    else:
        tune.report({"share": outcome.share, "outcome": outcome.model_dump_json()})


class _Scheduler(FIFOScheduler):
    """Passes reports on to the search, and its decision to end a trial on to the flag that the trial's loop reads."""

    def __init__(self, search: Search, flags: Any, on_change: Callable):
        super().__init__()
        self._search, self._flags, self._on_change = search, flags, on_change

    def __getstate__(self) -> dict:
        return {}  # Tune writes this to its own files, which are never read: the store is the truth

    def on_trial_result(self, tune_controller, trial, result: dict) -> str:
        if "progress" in result:
            number = trial.config["number"]
            if reason := self._search.report(number, Progress.model_validate_json(result["progress"])):
                self._flags.stop.remote(trial.config["run"], reason)
            self._on_change(self._search)
        return TrialScheduler.CONTINUE


class _Searcher(Searcher):
    """Hands the search's trials to Tune and Tune's results to the search."""

    def __init__(self, search: Search, data: DataConfig, parallel: int, on_change: Callable):
        super().__init__(metric="share", mode="max")
        self._search, self._data, self._parallel, self._on_change = search, data, parallel, on_change
        self._again: list = []
        self.live: dict[str, int] = {}
        self.error: BaseException | None = None
        self.interrupted = False

    def __getstate__(self) -> dict:
        return {}

    def set_search_properties(self, metric, mode, config, **spec) -> bool:
        return True

    def set_max_concurrency(self, max_concurrent: int) -> bool:
        return True

    def suggest(self, trial_id: str) -> dict | str | None:
        if self.interrupted:
            self._search.stop("interrupted", resume=True)
        if len(self.live) >= self._parallel:
            return None
        try:
            trial = self._again.pop(0) if self._again else self._search.ask()
        except Exception as error:  # Tune would log it and go on; the study must end with it
            self.error = error
            self._search.stop(str(error), resume=True)
            trial = None
        if trial is None:
            return None if self.live else Searcher.FINISHED
        self.live[trial_id] = trial.number
        self._on_change(self._search)
        job = job_of(trial, self._search.spec, self._data)
        return {"number": trial.number, "run": _run_name(self._search, trial.number), "job": job.model_dump_json()}

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        number = self.live.pop(trial_id)
        if self.interrupted:
            self._search.stop("interrupted", resume=True)
        result = result or {}
        if "outcome" in result:
            self._search.tell(number, Outcome.model_validate_json(result["outcome"]))
        elif "failed" in result:
            self._search.fail(number, result["failed"], retry=False)
        else:
            said = result.get("lost", "the process that drove the trial died")
            if (again := self._search.fail(number, said, retry=True)) is not None:
                self._again.append(again)
        self._on_change(self._search)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the store is the truth."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the store is the truth."""
