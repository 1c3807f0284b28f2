"""One study, from outside: the facade that every door calls.

Owns: `run`, `open_study`, `Study`. Must not know: how a command line or a notebook shows things.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo import certify, check, choosing, endpoint, extensions, growth, keeping
from hpo import promote as promotion
from hpo.backend import Backend, backend_of
from hpo.certificate import Certificate
from hpo.endpoint import Endpoint
from hpo.entry import continued, enter, keep_quality, quality_of, snapshot
from hpo.errors import InputError, NotFound, Problem, SpecError, StoreError
from hpo.forecast import Left
from hpo.growth import Forecast
from hpo.model import Model
from hpo.pareto import front
from hpo.search import Search
from hpo.space import value_of
from hpo.spec import Loaded, Spec
from hpo.steer import Steer, hull, orders, steered
from hpo.store import Record, Store, open_store
from hpo.trial import Trial
from training import own, preemption
from training.recipe import DataConfig, Train

if TYPE_CHECKING:
    import pandas

    from hpo.replay import Replay


@dataclass
class Status:
    """Where a run is, for whoever shows it. `seconds` since the run began; `left` is an estimate, None while unknown."""

    phase: str = "checking"
    trials: int = 0
    finished: int = 0
    running: dict[int, float] = field(default_factory=dict)
    states: dict[str, int] = field(default_factory=dict)
    front: int = 0
    best: float | None = None
    seconds: float = 0.0
    left: float | None = None


OnStatus = Callable[[Status], None]


class Study:
    """A study in a store. Reading it starts nothing; it may be running elsewhere meanwhile."""

    def __init__(self, store: Store, name: str):
        self.store, self.name = store, name
        self._ended: threading.Event | None = None
        self._error: BaseException | None = None
        self._search: Search | None = None
        self._brought = own.now()  # what was an argument of the run

    def __repr__(self) -> str:
        return f"<Study {self.name} at {self.store.url.render_as_string(hide_password=True)}>"

    @property
    def record(self) -> Record:
        """The study as it is kept, read now."""
        return self.store.study(self.name)

    @property
    def spec(self) -> Spec:
        return self.record.spec

    @property
    def certificate(self) -> Certificate | None:
        """What may be claimed about the winner; None until a run has ended."""
        return self.record.certificate

    @property
    def advice(self) -> list[str]:
        """What was said of the search algorithm when the study began: why it was chosen, or why another would do better."""
        return [event["said"] for event in self.store.events(self.record.id, kinds=("advice",))]

    @property
    def steer(self) -> Steer:
        """Gives orders to the study while it runs, here or elsewhere: add, clone or stop a trial, another range or budget."""
        self.store.upgrade()
        return Steer(self.store, self.record)

    def history(self, *, curves: bool = False) -> list[Trial]:
        """Returns all trials by number; front members that were timed alone have those seconds."""
        record = self.record
        trials = self.store.trials(record.id, curves=curves)
        return certify.with_measured(trials, record.certificate.measured if record.certificate else {})

    def front(self) -> list[Trial]:
        """Returns the non-dominated trials, best score first; only trials trained to their end are on it."""
        return front(self.history(), self.spec.targets)

    def outlook(self, more: int = 10) -> Forecast | None:
        """Returns what more trials would probably add to the hypervolume, or None where too few have ended to say."""
        record = self.record
        trials, targets = self.store.trials(record.id), record.spec.targets
        kept = [event["point"] for event in self.store.events(record.id, kinds=("reference",))]
        point = kept[0] if kept else growth.reference(trials, targets, record.spec.limits_of_losses)
        return growth.forecast(growth.volumes(trials, targets, point), more=more) if point else None

    def replay(self) -> Replay:
        """Derives every suggestion and every decision to stop again from the record, and says where they part, if they do.

        Nothing is trained: outcomes are taken from the record.
        """
        from hpo.replay import replay

        return replay(self.store, self.record)

    def winner(
        self, by: str | None = None, *, weights: Mapping[str, float] | None = None, limits: Mapping[str, float] | None = None
    ) -> Trial | None:
        """Returns the chosen trial: the certified one, else by the study's rule from the front so far.

        Args:
            by: another rule: best, knee or weights.
            weights: by objective; means by: weights.
            limits: by objective: at most that of what is to be small, at least that of what is to be large.
        """
        certificate = self.certificate
        if certificate is not None and by is None and not weights and not limits:
            return next(t for t in self.history() if t.number == certificate.winner)
        chosen = self.choose(by, weights=weights, limits=limits)
        return chosen[0] if chosen else None

    def choose(
        self, by: str | None = None, *, weights: Mapping[str, float] | None = None, limits: Mapping[str, float] | None = None
    ) -> tuple[Trial, str] | None:
        """Returns a trial of the front and why it, by a rule as in `winner`; default: the study's own rule.

        Raises:
            InputError: there is no such rule or objective.
        """
        spec = self.spec
        how = spec.choose
        if by or weights or limits:
            how = choosing.rule(by, weights, limits)
        if wrong := choosing.problems(how, spec.objectives):
            raise InputError(*wrong)
        return choosing.choose(self.history(), spec.targets, how)

    def trials(self) -> pandas.DataFrame:
        """Returns a table of all trials: number, state, origin, the varied fields, the objectives, seconds in all, error."""
        import pandas

        spec = self.spec
        rows = []
        for trial in self.history():
            row: dict[str, Any] = {"number": trial.number, "state": trial.state, "origin": trial.origin}
            row |= {name: value_of(trial.recipe, name) for name in spec.space}
            row |= {o.name: o.of(trial.outcome) if trial.outcome else None for o in spec.targets}
            row |= {"share": trial.outcome.share if trial.outcome else None, "attempts": trial.attempts, "error": trial.error}
            rows.append(row)
        return pandas.DataFrame(rows)

    def to_optuna(self, storage: str | None = None):
        """Returns the study as one of Optuna's, in memory, or in a storage (a SQLAlchemy URL) for its dashboard.

        Raises:
            InputError: the storage cannot be used.
        """
        from hpo import exports

        spec = self.spec
        return exports.to_optuna(self.name, hull(spec, orders(self.store, self.record.id)), spec.targets, self.history(), storage)

    def export_to(self, program: str, path: str | Path, *, trial: int | None = None) -> list[str]:
        """Writes the winner, or another trial, as a training file of axolotl, llamafactory or trl.

        Returns:
            What that program cannot say, in sentences.

        Raises:
            InputError: no such program, or the file exists.
            NotFound: no such trial, or no winner yet.
        """
        from hpo import exports

        found = self.winner() if trial is None else next((t for t in self.history() if t.number == trial), None)
        if found is None:
            raise NotFound(f"Study {self.name} has no {'winner yet' if trial is None else f'trial {trial}'}.")
        spec, recipe = self.spec, found.recipe
        if "model" not in spec.space.root:
            recipe = recipe.model_copy(update={"model": spec.recipe.model})
        title = f"Trial {found.number} of the Paretune study {self.name}."
        return exports.to_file(program, recipe, spec.data, Path(path), workers=spec.resources.workers, title=title)

    def view(self):
        """Returns all that a report shows."""
        from hpo.figures import View

        spec, trials = self.spec, self.history(curves=True)
        given = orders(self.store, self.record.id)
        settings = {
            "algorithm": " ".join([spec.algorithm.name, *(f"{k}={v}" for k, v in spec.algorithm.options.items())]),
            "model": spec.recipe.model, "data": spec.data.said, "task": spec.data.task, "seed": str(spec.seed),
            "budget": ", ".join(f"{name} {value}" for name, value in spec.budget.model_dump().items() if value is not None),
            "limits": ", ".join(f"{k} {v:,}" for k, v in spec.limits.model_dump().items() if v is not None) or "none",
            "resources": ", ".join(f"{name} {value}" for name, value in spec.resources.model_dump().items()),
        } | ({"steered": "; ".join(str(order) for order in given if order.trial is not None)} if given else {})  # fmt: skip
        return View(
            name=spec.name, description=spec.description, objectives=spec.targets, space=hull(spec, given), trials=trials,
            front=front(trials, spec.targets), certificate=self.certificate, settings=settings,
            quality=quality_of(spec),
        )  # fmt: skip

    def plot(self, kind: str = "front"):
        """Returns a plotly figure: front, trials, parallel, importance or curves."""
        from hpo.figures import figures

        found = figures(self.view())
        if kind not in found:
            raise NotFound(f"No figure {kind!r} for this study. There are: {', '.join(found)}.")
        return found[kind]

    def insights(self) -> list[str]:
        """Returns what the trials say of the hyperparameters, in sentences; [] where they cannot tell."""
        certificate, last = self.certificate, max((t.finished or 0 for t in self.history()), default=0)
        if certificate is not None and certificate.made >= last:
            return list(certificate.insights)
        return self.view().insights

    def report(self, path: str | Path | None = None, *, view: Any = None) -> Path:
        """Writes the report as one HTML file and returns its path; by default into the study's folder."""
        from hpo import report

        path = Path(path) if path else self.spec.folder / "report.html"
        path.parent.mkdir(parents=True, exist_ok=True)
        report.write(view or self.view(), path)
        return path

    # From the winner to a model, and to an endpoint

    def promote(self, *, trial: int | None = None, on_status: OnStatus = lambda status: None) -> Model:
        """Retrains the winner, keeps the better of both, merges, verifies and registers it; returns the registered model.

        Whatever was finished before is not done again.

        Args:
            trial: number of another trial than the winner.
            on_status: is told of progress.

        Raises:
            InputError: there is nothing to promote, or a check failed.
            StudyBusy: the study is being run.
        """
        tell, record = _teller(on_status), self.record
        self.store.upgrade()
        with own.given(self._brought), self.store.hold(record.id), backend_of(record.spec, None, tell) as backend:
            data = snapshot(record.spec, record.digest)
            return promotion.promote(self.store, record, self.history(), data, backend.bench(tell), number=trial)

    def models(self) -> list[Model]:
        """Returns the registered models that were made from this study, oldest first."""
        return [m for m in self.store.models() if m.lineage.study == self.name]

    def deploy(self, model: Model | None = None, *, share: float = 1.0, on_status: OnStatus = lambda status: None) -> Endpoint:
        """Serves a model of this study, with the front as adapters beside it; returns the endpoint.

        Args:
            model: default: the newest.
            share: of the requests; below 1 the model that is live keeps the rest.

        Raises:
            InputError: nothing was promoted yet, or the model is below its thresholds.
        """
        made = [model] if model else self.models()
        if not made:
            raise InputError(Problem(self.name, "has no registered model.", f"Run hpo model promote {self.name}."))
        return deploy(self.store, made[-1], share=share, on_status=on_status)

    # A run in the background (hpo.start)

    def running(self) -> bool:
        """Says whether a live process runs the study."""
        return (self._ended is not None and not self._ended.is_set()) or self.store.held(self.record.id)

    def stop(self) -> None:
        """Asks a run that this process started to end; it can be continued later. Returns at once."""
        if self._search is not None:
            self._search.stop("stopped by the user", resume=True)

    def wait(self, timeout: float | None = None) -> Study:
        """Waits for a run that this process started; raises what ended it, if that was an error. Returns itself."""
        if self._ended is not None:
            self._ended.wait(timeout)
        if self._error is not None:
            raise self._error
        return self


def deploy(
    store: Store, model: Model, *, share: float = 1.0, target: str = "ray", on_status: OnStatus = lambda status: None
) -> Endpoint:
    """Deploys a registered model under its name: loads it beside what is live, checks it on real prompts, then switches.

    Args:
        store: the record that the model is on.
        model: what to serve.
        share: of the requests.
        target: what serves it where nothing does yet: ray (Ray Serve), or local (this process).
        on_status: is told of progress.
    """
    tell = _teller(on_status)
    study = Study(store, model.lineage.study)
    return endpoint.deploy(
        store, model, study.spec, study.front(), share=share, target=target, on_phase=lambda phase: tell(phase=phase)
    )


def side_by_side(made: Endpoint) -> list[dict[str, Any]]:
    """Asks the untuned base and the model the same question over HTTP; returns `who` and the answer of each."""
    model_name, store = made.name, open_store(str(made.folder.parent.parent), create=False)
    with contextlib.closing(store):
        model = store.model(model_name)
    record = Study(store, model.lineage.study).record
    rows = record.certificate.rows if record.certificate else ()
    if not rows:
        return []
    row = rows[0]
    asked = [{"who": "asked", "text": row.prompt}]
    for who, name in (("untuned", f"{made.name}@base"), ("tuned", made.name)):
        asked.append({"who": who, **made.ask(row.prompt, model=name, chat=False, max_tokens=32, stop=["\n"])})
    return [*asked, {"who": "expected", "text": row.expected}]


def reproduce(store: Store, model: Model, on_status: OnStatus = lambda status: None) -> dict[str, Any]:
    """Makes a registered model again from its record; returns whether it matches. See `hpo.promote.reproduce`."""
    tell, spec = _teller(on_status), store.study(model.lineage.study).spec
    with backend_of(spec, None, tell) as backend:
        return promotion.reproduce(model, spec, backend.bench(tell))


def _teller(on_status: OnStatus) -> Callable[..., None]:
    status, since = Status(), time.monotonic()

    def tell(**changes: Any) -> None:
        for name, value in (changes | {"seconds": time.monotonic() - since}).items():
            setattr(status, name, value)
        on_status(status)

    return tell


@contextlib.contextmanager
def session() -> Iterator[None]:
    """Keeps one cluster for what is done one after another inside: search, promotion, endpoint."""
    from hpo import tune

    with tune.session():
        yield


def open_study(name: str, *, storage: str | None = None, database: str | None = None) -> Study:
    """Returns a study by name from the record in a storage folder; nothing is written.

    Raises:
        NotFound: no such study.
        StoreError: no record there.
    """
    study = Study(open_the_store(storage, database), name)
    _ = study.record
    return study


def storage_of(given: str | None = None) -> Path:
    """Returns the storage folder: the given one, else HPO_STORAGE, else ~/paretune."""
    return Path(os.path.expandvars(given or os.environ.get("HPO_STORAGE", "~/paretune"))).expanduser()


def open_the_store(storage: str | None = None, database: str | None = None) -> Store:
    """Returns the record in a storage folder (default: HPO_STORAGE, else ~/paretune), which must be there."""
    return open_store(str(storage_of(storage)), database, create=False)


def run(
    source: Any, sets: Sequence[str] = (), *, train: Train | None = None, metrics: Mapping[str, Callable] | None = None,
    tasks: Mapping[str, Any] | None = None, methods: Mapping[str, Any] | None = None,
    on_status: OnStatus = lambda status: None,
) -> Study:  # fmt: skip
    """Runs a study to the end of its budget, or continues it, and returns it.

    Args:
        source: a bundled study's name, a path, or a dict.
        sets: overrides as path=value.
        train: a user's own train function with the signature of `training.loop.train`.
        metrics: name -> (answer, expected, prompt) -> number; each is a score of that name in every trial.
        tasks: name -> `training.tasks.Task`, for `data.task: given:NAME`.
        methods: name -> `training.adapters.Method`, for `recipe.adapter: given:NAME` or a space.
        on_status: is told of progress.

    Raises:
        SpecError: the study cannot run; nothing was started or written.
        StudyChanged, StudyBusy, StoreError, BackendError: as their names say.
    """
    with own.given(extensions.arguments(metrics=metrics, tasks=tasks, methods=methods)):
        return _run(*_loaded(source, sets, train, metrics), train, on_status, lambda study: None)


def _loaded(source: Any, sets: Sequence[str], train: Train | None, metrics: Mapping[str, Callable] | None):
    also = [f"{own.GIVEN}:{name}" for name in metrics or ()]
    return check.load(source, sets, trained_elsewhere=train is not None, also=also)


def start(
    source: Any, sets: Sequence[str] = (), *, train: Train | None = None, metrics: Mapping[str, Callable] | None = None,
    tasks: Mapping[str, Any] | None = None, methods: Mapping[str, Any] | None = None,
    on_status: OnStatus = lambda status: None,
) -> Study:  # fmt: skip
    """Starts a study in a thread of this process and returns it once it is on the record; see `Study.wait` and `stop`.

    Raises:
        As `run`, for what is found before the first trial.
    """
    brought = extensions.arguments(metrics=metrics, tasks=tasks, methods=methods)
    with own.given(brought):
        loaded, findings = _loaded(source, sets, train, metrics)
    ready, ended, box = threading.Event(), threading.Event(), {}

    def work():
        def began(study: Study) -> None:
            box["study"] = study
            ready.set()

        try:
            with own.given(brought):
                _run(loaded, findings, train, on_status, began)
        except KeyboardInterrupt:
            pass  # `Study.stop`: what was asked for is no error
        except BaseException as error:
            box["error"] = error
            if "study" in box:
                box["study"]._error = error
        finally:
            ended.set()
            ready.set()

    thread = threading.Thread(target=work, name=f"hpo-{loaded.spec.name}", daemon=True)
    thread.start()
    ready.wait()
    if "study" not in box:
        raise box["error"]
    box["study"]._ended = ended
    return box["study"]


def _run(
    loaded: Loaded, findings: check.Findings, train: Train | None, on_status: OnStatus, began: Callable[[Study], None]
) -> Study:
    tell = _teller(on_status)
    tell(trials=loaded.spec.budget.trials, phase="starting")
    digest = findings.rows.digest if findings.rows else ""
    if (study := _finished(loaded, digest)) is not None:
        began(study)
        tell(phase="done", finished=loaded.spec.budget.trials)
        return study
    with backend_of(loaded.spec, train, tell, ahead=loaded.spec.budget.trials, best=findings.seats) as backend:
        store = open_store(loaded.spec.storage, loaded.spec.database)
        record, data = enter(store, loaded, digest, findings.shape.hidden if findings.shape else None)
        study = Study(store, record.name)
        keep_quality(record.spec.model_copy(update={"data": loaded.spec.data}), digest)
        with store.hold(record.id) as holder:
            search = Search(store, record, holder, shape=findings.shapes, tokens_per_row=findings.longest)
            study._search, left = search, Left(record.spec, findings.shape, findings.trained)
            _advise(store, record)
            began(study)
            tell(phase="training", trials=record.spec.budget.trials)
            with _signals_end(search):
                try:
                    backend.search(search, data, on_change=lambda search: tell(**_progress(search, left)))
                finally:
                    search.close()
                if search.stopping is None or not search._resume:
                    _finish(study, search, data, backend, tell)
    tell(phase="done")
    if search.stopping and search._resume:
        raise KeyboardInterrupt(search.stopping)
    return study


def _advise(store: Store, record: Record) -> None:
    """Keeps with the study why its algorithm was chosen, or why another would do better, once."""
    said = {event["said"] for event in store.events(record.id, kinds=("advice",))}
    for advice in check.advice(record.spec):
        if advice not in said:
            store.add_event(record.id, "advice", said=advice)


def _finished(loaded: Loaded, digest: str) -> Study | None:
    """Returns a study that has nothing left to do, so that asking for it again starts nothing."""
    spec = loaded.spec
    if spec.database is None and not (Path(spec.storage) / "hpo.db").exists():
        return None
    store = open_store(spec.storage, spec.database)
    try:
        record = store.study(spec.name)
    except NotFound:
        return None
    trials = store.trials(record.id)
    given = orders(store, record.id)
    spec = steered(spec, given)
    launched = sum(1 for t in trials if t.attempts and t.state != "cancelled")
    certified = record.certificate is not None and record.certificate.made >= max((t.finished or 0 for t in trials), default=0)
    if launched < spec.budget.trials or not certified or not all(t.final for t in trials) or any(o.waits for o in given):
        return None
    spec = store.add_study(continued(record, loaded, digest), loaded.written, digest).spec
    with store.hold(record.id):  # `keep` may be another one now
        keeping.apply(store, record.id, spec, trials, winner=record.certificate.winner, settled=True)
    return Study(store, spec.name)


def _progress(search: Search, left: Left) -> dict[str, Any]:
    trials, spec = search.trials, search.spec
    members = front(trials, spec.targets)
    states: dict[str, int] = {}
    for trial in trials:
        states[trial.state] = states.get(trial.state, 0) + 1
    return {
        "phase": "training", "trials": spec.budget.trials, "finished": search.finished, "states": states,
        "running": dict(search.shares), "front": len(members),
        "best": spec.targets[0].of(members[0].outcome) if members else None,
        "left": left.seconds(trials, search.shares, spec.budget.trials - search.finished),
    }  # fmt: skip


def _finish(study: Study, search: Search, data: DataConfig, backend: Backend, tell: Callable) -> None:
    """Certifies the winner and writes the report, unless nothing has changed since the last time."""
    record = study.record
    trials = study.store.trials(record.id)
    known = record.certificate.measured if record.certificate else {}
    last = max((t.finished or 0 for t in trials), default=0)
    if record.certificate is None or record.certificate.made < last:
        made = certify.certify(
            record.spec,
            trials,
            data,
            backend.call,
            known=known,
            train=backend.again,
            real=backend.real,
            on_phase=lambda phase: tell(phase=phase, running={}, left=None),
        )
        study.store.set_certificate(record.id, made)
    if (made := study.certificate) is not None:
        search.retain(winner=made.winner, settled=True)
    tell(phase="writing the report", running={}, left=None)
    view = study.view()
    if (made := study.certificate) is not None and list(made.insights) != view.insights:
        study.store.set_certificate(record.id, made.model_copy(update={"insights": tuple(view.insights)}))
    study.report(view=view)


@contextlib.contextmanager
def _signals_end(search: Search) -> Iterator[None]:
    """Ctrl-C and SIGTERM end a search at its next report; a second one, or one after the search, at once.

    An exception raised from a handler can be lost where Python is when it arrives (in a destructor, in a library's callback),
    and with it the signal; a flag cannot.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number, frame):
        if search.interrupted or search.closed:
            raise KeyboardInterrupt
        search.interrupted = True
        preemption.notice()  # a run in this process leaves a checkpoint at its next step

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        preemption.forget()


__all__ = ["InputError", "SpecError", "Status", "StoreError", "Study", "open_study", "open_the_store", "run", "start"]
