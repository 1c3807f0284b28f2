"""The record of all studies: the truth, and the only meeting point of those who run, watch and read.

Owns: the database (SQLite by default, any SQLAlchemy URL). Must not know: algorithms, runners, Ray.

Contract: a write is on disk when the call returns. Final states never change: the first result of a trial wins and later
ones are refused. Values go in and come out as the frozen models, never as rows. A Store pickles to its URL.
"""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from hpo.certificate import Certificate
from hpo.errors import NotFound, StoreError, StudyBusy
from hpo.model import Model, Stage
from hpo.spec import Spec
from hpo.trial import FINAL, CurvePoint, State, Trial
from training.recipe import Outcome

VERSION = 3  # of the tables; an older database is brought up to it, a newer one is refused, never half understood
LEASE = 30.0  # seconds a run may be silent before another process on another machine may take its study over
BUSY = 30.0  # seconds to wait for a locked database
# Said first in a transaction that must not meet another one of its kind.
ALONE = {"sqlite": "BEGIN IMMEDIATE", "postgresql": "SELECT pg_advisory_xact_lock(71551760)"}

_meta = sa.MetaData()
_about = sa.Table("paretune", _meta, sa.Column("version", sa.Integer, primary_key=True))
_studies = sa.Table(
    "studies", _meta,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.String(63), unique=True, nullable=False),
    sa.Column("written", sa.Text, nullable=False),
    sa.Column("spec", sa.Text, nullable=False),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("created", sa.Float, nullable=False),
    sa.Column("spent", sa.Float, nullable=False, default=0.0),
    sa.Column("certificate", sa.Text),
    sa.Column("holder", sa.Text),
    sa.Column("holder_seen", sa.Float),
)  # fmt: skip
_trials = sa.Table(
    "trials", _meta,
    sa.Column("study", sa.ForeignKey("studies.id"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("state", sa.String(12), nullable=False),
    sa.Column("trial", sa.Text, nullable=False),
)  # fmt: skip
_points = sa.Table(
    "points", _meta,
    sa.Column("study", sa.ForeignKey("studies.id"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("attempt", sa.Integer, primary_key=True),
    sa.Column("step", sa.Integer, primary_key=True),
    sa.Column("point", sa.Text, nullable=False),
)  # fmt: skip
_events = sa.Table(
    "events", _meta,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("study", sa.ForeignKey("studies.id"), nullable=False, index=True),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("kind", sa.String(40), nullable=False),
    sa.Column("data", sa.Text, nullable=False),
)  # fmt: skip
# Since version 3: the order in which things became known, one row in the transaction of each write, so that a study can be
# derived again from what it knew. `said` is the reason that a stopping rule gave to a report.
_journal = sa.Table(
    "journal", _meta,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("study", sa.ForeignKey("studies.id"), nullable=False, index=True),
    sa.Column("kind", sa.String(12), nullable=False),
    sa.Column("number", sa.Integer),
    sa.Column("attempt", sa.Integer),
    sa.Column("step", sa.Integer),
    sa.Column("said", sa.Text),
)  # fmt: skip
# Since version 2.
_promotions = sa.Table(
    "promotions", _meta,
    sa.Column("key", sa.String(64), primary_key=True),
    sa.Column("study", sa.ForeignKey("studies.id"), nullable=False),
    sa.Column("steps", sa.Text, nullable=False),
)  # fmt: skip
_models = sa.Table(
    "models", _meta,
    sa.Column("name", sa.String(63), primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("key", sa.String(64), unique=True, nullable=False),
    sa.Column("stage", sa.String(12), nullable=False),
    sa.Column("model", sa.Text, nullable=False),
)  # fmt: skip


@dataclass(frozen=True)
class Record:
    """A study as it is kept. `written` is what the user wrote, `spec` what it resolved to, `digest` that of its rows."""

    id: int
    name: str
    written: dict[str, Any]
    spec: Spec
    digest: str
    created: float
    spent: float
    certificate: Certificate | None


class Store:
    """The studies in one database; cheap to open, safe to use from several processes."""

    def __init__(self, url: str | sa.URL, *, create: bool = True):
        """Opens the database, and makes its tables where it is new.

        Args:
            url: SQLAlchemy URL, for example sqlite:////data/hpo.db.
            create: False refuses a database that is not there, so that reading writes nothing.

        Raises:
            StoreError: cannot be opened, is damaged, is no database of ours, or is newer than this program.
        """
        try:
            self.url = sa.make_url(url)
            backend = self.url.get_backend_name()
            self._file = Path(self.url.database).absolute() if backend == "sqlite" and self.url.database else None
            self._alone = ALONE.get(backend)
            options = {"connect_args": {"timeout": BUSY}} if self._file is not None else {}
            self._engine = sa.create_engine(self.url, **options)
        except (sa.exc.ArgumentError, ImportError) as error:
            raise StoreError(
                f"The database URL cannot be used ({error}). Install its driver, or write it as sqlite:////data/hpo.db."
            ) from None
        if self._file is not None:
            if not create and not self._file.exists():
                raise self._absent()
            self._inspect()
            try:
                self._file.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StoreError(f"{self._file.parent} cannot be made ({error.strerror}).") from None
            sa.event.listen(self._engine, "connect", _durable)
        self._make_tables(create)

    def _make_tables(self, create: bool) -> None:
        with self._begin() as db:
            version = _version(db)
        if version is None:
            if not create:
                raise self._absent()
            with self._begin(alone=True) as db:
                _meta.create_all(db)
                if (version := _version(db)) is None:
                    db.execute(_about.insert().values(version=VERSION))
        elif version < VERSION and create:
            self.upgrade()
        if version is not None and version > VERSION:
            raise StoreError(
                f"{self._name} was written by a newer version (tables {version}, known {VERSION}). Upgrade paretune."
            )

    def upgrade(self) -> None:
        """Brings the tables of an older version up to this one; what they hold stays as it is."""
        with self._begin(alone=True) as db:
            _meta.create_all(db)
            db.execute(_about.update().where(_about.c.version < VERSION).values(version=VERSION))

    def _absent(self) -> StoreError:
        return StoreError(f"There is no study record at {self._name}. Run a study first, or name its storage with --storage.")

    def __reduce__(self):
        return Store, (self.url,)

    @property
    def _name(self) -> str:
        return str(self._file) if self._file else self.url.render_as_string(hide_password=True)

    def _inspect(self) -> None:
        # A damaged file must never be papered over with new tables, nor those of another program mixed with ours.
        if not self._file.exists() or self._file.stat().st_size == 0:
            return
        # Not mode=ro: a process that was killed while it wrote leaves a journal, which the next one to open must roll back.
        uri = f"{self._file.as_uri()}?mode=rw"
        try:
            with closing(sqlite3.connect(uri, uri=True, timeout=BUSY, isolation_level=None)) as db:
                db.execute("BEGIN")  # the size is compared while nobody can write
                said = " ".join(db.execute("PRAGMA quick_check(1)").fetchone()[0].split())
                tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
                pages, size = (db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size"))
                if self._file.stat().st_size < pages * size:
                    said = f"shorter than its {pages} pages"  # SQLite itself reads what is cut off as zeros
        except sqlite3.DatabaseError as error:
            if getattr(error, "sqlite_errorname", "") == "SQLITE_BUSY":
                raise StoreError(f"{self._file} is locked by another process. Try again.") from None
            said = str(error)
        if said != "ok":
            raise StoreError(
                f"{self._file} is damaged ({said}) and was left as it is. Restore a backup, or move it away to start anew."
            )
        if tables and _about.name not in tables:
            raise StoreError(f"{self._file} is a database of another program (it has {', '.join(sorted(tables)[:3])}).")

    @contextmanager
    def _begin(self, *, alone: bool = False) -> Iterator[sa.Connection]:
        try:
            with self._engine.begin() as db:
                if alone and self._alone:
                    db.exec_driver_sql(self._alone)
                yield db
        except sa.exc.SQLAlchemyError as error:
            raise StoreError(f"{self._name}: {getattr(error, 'orig', None) or error}") from error

    def close(self) -> None:
        """Lets go of the database."""
        self._engine.dispose()

    # Studies

    def add_study(self, spec: Spec, written: dict, digest: str) -> Record:
        """Adds a study, or updates what may change of the one with this name; returns its record."""
        values = {"written": json.dumps(written), "spec": spec.model_dump_json(), "digest": digest}
        with self._begin(alone=True) as db:
            found = db.execute(sa.select(_studies.c.id).where(_studies.c.name == spec.name)).first()
            if found:
                db.execute(_studies.update().where(_studies.c.id == found.id).values(**values))
            else:
                db.execute(_studies.insert().values(name=spec.name, created=time.time(), **values))
        return self.study(spec.name)

    def study(self, name: str) -> Record:
        """Returns a study by name; NotFound names those that exist."""
        with self._begin() as db:
            row = db.execute(sa.select(_studies).where(_studies.c.name == name)).mappings().first()
            known = list(db.scalars(sa.select(_studies.c.name).order_by(_studies.c.id)))
        if row is None:
            raise NotFound(f"No study {name!r} in {self._name}. There are: {', '.join(known) or 'none'}.")
        return _record(row)

    def studies(self) -> list[tuple[Record, dict[str, int]]]:
        """Returns all studies, oldest first, each with its number of trials by state."""
        with self._begin() as db:
            rows = db.execute(sa.select(_studies).order_by(_studies.c.id)).mappings().all()
            counted = db.execute(
                sa.select(_trials.c.study, _trials.c.state, sa.func.count()).group_by(_trials.c.study, _trials.c.state)
            ).all()
        return [(_record(row), {state: n for study, state, n in counted if study == row["id"]}) for row in rows]

    def set_certificate(self, study: int, certificate: Certificate | None) -> None:
        """Keeps what the study may claim about its winner."""
        text = certificate.model_dump_json() if certificate else None
        with self._begin() as db:
            db.execute(_studies.update().where(_studies.c.id == study).values(certificate=text))

    def add_spent(self, study: int, seconds: float) -> None:
        """Adds wall-clock seconds to what the study has used of `budget.hours`."""
        with self._begin() as db:
            db.execute(_studies.update().where(_studies.c.id == study).values(spent=_studies.c.spent + seconds))

    # Trials

    def trials(self, study: int, *, curves: bool = False) -> list[Trial]:
        """Returns the trials by number; with `curves`, each with the points of its last attempt, and of earlier ones those up to
        the step that it went on from."""
        with self._begin() as db:
            rows = db.scalars(sa.select(_trials.c.trial).where(_trials.c.study == study).order_by(_trials.c.number)).all()
            points = (
                db.execute(sa.select(_points).where(_points.c.study == study).order_by(_points.c.step)).all() if curves else []
            )
        trials = [Trial.model_validate_json(row) for row in rows]
        if not curves:
            return trials
        by_trial: dict[int, dict[int, list[CurvePoint]]] = {}
        for row in points:
            by_trial.setdefault(row.number, {}).setdefault(row.attempt, []).append(CurvePoint.model_validate_json(row.point))
        return [t.model_copy(update={"curve": joined(by_trial.get(t.number, {}), t.attempts)}) for t in trials]

    def points(self, study: int) -> dict[tuple[int, int, int], CurvePoint]:
        """Returns all reports by trial, attempt and step."""
        with self._begin() as db:
            rows = db.execute(sa.select(_points).where(_points.c.study == study)).all()
        return {(row.number, row.attempt, row.step): CurvePoint.model_validate_json(row.point) for row in rows}

    def start_trial(self, study: int, trial: Trial) -> None:
        """Adds a trial, or starts one again that is still running by the record (another attempt)."""
        with self._begin() as db:
            if self._update(db, study, trial):
                _note(db, study, "launch", number=trial.number, attempt=trial.attempts)
                return
            _note(db, study, "suggest", number=trial.number, attempt=trial.attempts)
            values = {
                "study": study,
                "number": trial.number,
                "state": trial.state,
                "trial": trial.model_dump_json(exclude={"curve"}),
            }
            db.execute(_trials.insert().values(**values))

    def finish_trial(self, study: int, trial: Trial) -> bool:
        """Keeps a trial's final state; returns False, and changes nothing, where it already had one."""
        with self._begin() as db:
            kept = self._update(db, study, trial)
            if kept:
                _note(db, study, "finish", number=trial.number, attempt=trial.attempts)
            return kept

    def drop_checkpoint(self, study: int, number: int, condition: str, why: str) -> Trial:
        """Takes a trial's checkpoint off the record, for a reason that is kept among its conditions; returns the trial."""
        place = sa.and_(_trials.c.study == study, _trials.c.number == number)
        with self._begin(alone=True) as db:
            trial = Trial.model_validate_json(db.scalar(sa.select(_trials.c.trial).where(place)))
            gone = {"checkpoint": None, "conditions": trial.outcome.conditions | {condition: why}}
            trial = trial.model_copy(update={"outcome": trial.outcome.model_copy(update=gone)})
            db.execute(_trials.update().where(place).values(trial=trial.model_dump_json(exclude={"curve"})))
        return trial

    def _update(self, db: sa.Connection, study: int, trial: Trial) -> bool:
        running = sa.and_(_trials.c.study == study, _trials.c.number == trial.number, _trials.c.state.not_in(FINAL))
        values = {"state": trial.state, "trial": trial.model_dump_json(exclude={"curve"})}
        return db.execute(_trials.update().where(running).values(**values)).rowcount == 1

    def add_point(self, study: int, number: int, attempt: int, point: CurvePoint, said: str | None = None) -> None:
        """Keeps one report of a trial, and what a stopping rule said to it; a report of the same step is replaced."""
        key = {"study": study, "number": number, "attempt": attempt, "step": point.step}
        with self._begin() as db:
            db.execute(_points.delete().where(*(_points.c[name] == value for name, value in key.items())))
            db.execute(_points.insert().values(**key, point=point.model_dump_json()))
            _note(db, study, "report", number=number, attempt=attempt, step=point.step, said=said)

    # Events

    def add_event(self, study: int, kind: str, **data: Any) -> int:
        """Appends to the study's log; returns the event's id, which is above those of all earlier ones."""
        with self._begin() as db:
            made = db.execute(_events.insert().values(study=study, at=time.time(), kind=kind, data=json.dumps(data)))
        return made.inserted_primary_key[0]

    def events(self, study: int, *, kinds: Sequence[str] = (), after: int = 0) -> list[dict[str, Any]]:
        """Returns the study's log, oldest first: `id`, `at`, `kind` and the event's own fields.

        Args:
            kinds: only these; default: all.
            after: only those with a greater id.
        """
        chosen = sa.select(_events).where(_events.c.study == study, _events.c.id > after).order_by(_events.c.id)
        if kinds:
            chosen = chosen.where(_events.c.kind.in_(kinds))
        with self._begin() as db:
            rows = db.execute(chosen).all()
        return [{"id": row.id, "at": row.at, "kind": row.kind, **json.loads(row.data)} for row in rows]

    def note(self, study: int, kind: str, *, number: int | None = None, said: str | None = None) -> None:
        """Appends to the order in which things became known what no write of a trial tells."""
        with self._begin() as db:
            _note(db, study, kind, number=number, said=said)

    def journal(self, study: int) -> list[dict[str, Any]]:
        """Returns the order in which things became known: `kind` (suggest, launch, report, ...), number, attempt, step, said."""
        with self._begin() as db:
            if not sa.inspect(db).has_table(_journal.name):  # written by an older version, and only read by this one
                return []
            rows = db.execute(sa.select(_journal).where(_journal.c.study == study).order_by(_journal.c.id)).mappings().all()
        return [{name: row[name] for name in ("kind", "number", "attempt", "step", "said")} for row in rows]

    # Promotions and models

    def steps(self, key: str) -> dict[str, Any]:
        """Returns what the finished steps of a promotion came to, by name, in their order."""
        with self._begin() as db:
            found = db.scalar(sa.select(_promotions.c.steps).where(_promotions.c.key == key))
        return json.loads(found) if found else {}

    def add_step(self, key: str, study: int, name: str, result: dict[str, Any]) -> None:
        """Keeps what a step of a promotion came to."""
        with self._begin(alone=True) as db:
            found = db.scalar(sa.select(_promotions.c.steps).where(_promotions.c.key == key))
            steps = json.dumps((json.loads(found) if found else {}) | {name: result})
            if found is None:
                db.execute(_promotions.insert().values(key=key, study=study, steps=steps))
            else:
                db.execute(_promotions.update().where(_promotions.c.key == key).values(steps=steps))

    def add_model(self, model: Model) -> Model:
        """Registers a model under the next version of its name, or returns the one that this promotion registered before."""
        with self._begin(alone=True) as db:
            if found := db.execute(sa.select(_models).where(_models.c.key == model.key)).first():
                return _model(found)
            last = db.scalar(sa.select(sa.func.max(_models.c.version)).where(_models.c.name == model.name)) or 0
            model = model.model_copy(update={"version": last + 1})
            values = {"key": model.key, "stage": model.stage, "model": model.model_dump_json()}
            db.execute(_models.insert().values(name=model.name, version=model.version, **values))
        return model

    def update_model(self, model: Model) -> Model:
        """Replaces what is kept of a registered model, but for its stage."""
        chosen = sa.and_(_models.c.name == model.name, _models.c.version == model.version)
        with self._begin() as db:
            db.execute(_models.update().where(chosen).values(model=model.model_dump_json()))
        return model

    def models(self, name: str | None = None) -> list[Model]:
        """Returns the registered models, or those of one name, oldest first; removed ones are left out."""
        with self._begin() as db:
            if not sa.inspect(db).has_table(_models.name):  # written by an older version, and only read by this one
                return []
            chosen = sa.select(_models).where(_models.c.stage != "removed").order_by(_models.c.name, _models.c.version)
            rows = db.execute(chosen if name is None else chosen.where(_models.c.name == name)).all()
        return [_model(row) for row in rows]

    def model(self, name: str, version: int | None = None) -> Model:
        """Returns a registered model: the named version, else the live one, else the newest.

        Raises:
            NotFound: there is none; the message names those that exist.
        """
        known = self.models(name)
        if version is not None:
            found = [m for m in known if m.version == version]
        else:
            found = [m for m in known if m.stage == "live"] or known[-1:]
        if not found:
            others = known or self.models()
            there = ", ".join(m.label if known else m.name for m in others)
            wanted = name if version is None else f"{name}@v{version}"
            raise NotFound(f"No model {wanted!r} in {self._name}. There are: {there or 'none'}.")
        return found[0]

    def set_live(self, name: str, version: int) -> None:
        """Makes a version the live one; the live one becomes the previous one, and the one before that is retired."""
        with self._begin(alone=True) as db:
            if db.scalar(sa.select(_models.c.stage).where(_models.c.name == name, _models.c.version == version)) == "live":
                return
            for old, new in (("previous", "retired"), ("live", "previous")):
                chosen = sa.and_(_models.c.name == name, _models.c.stage == old)
                db.execute(_models.update().where(chosen).values(stage=new))
            db.execute(_models.update().where(_models.c.name == name, _models.c.version == version).values(stage="live"))

    def set_stage(self, name: str, version: int, stage: Stage) -> None:
        """Sets where one version stands."""
        with self._begin() as db:
            db.execute(_models.update().where(_models.c.name == name, _models.c.version == version).values(stage=stage))

    # Who runs a study

    @contextmanager
    def hold(self, study: int) -> Iterator[Holder]:
        """Holds a study for this process; yields a Holder whose `beat` must be called more often than every LEASE seconds.

        Raises:
            StudyBusy: another live process holds it. One that died on this machine is replaced at once, one on another
                machine once it has been silent for LEASE seconds.
        """
        me = Holder(
            self,
            study,
            json.dumps({"host": _machine(), "pid": os.getpid(), "started": _started(os.getpid()), "key": uuid.uuid4().hex}),
        )
        with self._begin() as db:
            row = db.execute(
                sa.select(_studies.c.name, _studies.c.holder, _studies.c.holder_seen).where(_studies.c.id == study)
            ).one()
            if row.holder and _alive(json.loads(row.holder), row.holder_seen):
                other = json.loads(row.holder)
                raise StudyBusy(
                    f"Study {row.name} is being run by process {other['pid']} on {other['host']}. Wait for it, or stop it first."
                )
            taken = db.execute(
                _studies.update()
                .where(
                    _studies.c.id == study, _studies.c.holder.is_(None) if row.holder is None else _studies.c.holder == row.holder
                )
                .values(holder=me.key, holder_seen=time.time())
            ).rowcount
            if not taken:
                raise StudyBusy(f"Study {row.name} was taken by another process this moment. Wait for it.")
        try:
            yield me
        finally:
            with self._begin() as db:
                db.execute(_studies.update().where(_studies.c.id == study, _studies.c.holder == me.key).values(holder=None))

    def held(self, study: int) -> bool:
        """Says whether a live process runs the study."""
        with self._begin() as db:
            row = db.execute(sa.select(_studies.c.holder, _studies.c.holder_seen).where(_studies.c.id == study)).one()
        return bool(row.holder) and _alive(json.loads(row.holder), row.holder_seen)


@dataclass(frozen=True)
class Holder:
    """This process's hold on a study."""

    store: Store
    study: int
    key: str

    def beat(self) -> None:
        """Says that this process still runs the study.

        Raises:
            StudyBusy: it was silent for too long and another process has taken the study over.
        """
        with self.store._begin() as db:
            update = _studies.update().where(_studies.c.id == self.study, _studies.c.holder == self.key)
            if not db.execute(update.values(holder_seen=time.time())).rowcount:
                raise StudyBusy("Another process has taken this study over; this one stops.")


def joined(attempts: dict[int, list[CurvePoint]], last: int) -> tuple[CurvePoint, ...]:
    """Returns the curve of an attempt: what earlier ones reported up to the step that it went on from, and its own points."""
    curve: list[CurvePoint] = []
    for attempt in sorted(number for number in attempts if number <= last):
        own = attempts[attempt]
        begin, first = own[0].since, own[0].step
        curve = [point for point in curve if point.step <= begin and point.step < first] + own
    return tuple(curve) if last in attempts else ()


def _note(db: sa.Connection, study: int, kind: str, **known: Any) -> None:
    db.execute(_journal.insert().values(study=study, kind=kind, **known))


def _version(db: sa.Connection) -> int | None:
    return db.scalar(sa.select(_about.c.version)) if sa.inspect(db).has_table(_about.name) else None


def _model(row: Any) -> Model:
    return Model.model_validate_json(row.model).model_copy(update={"stage": row.stage, "version": row.version})


def _record(row: Any) -> Record:
    certificate = Certificate.model_validate_json(row["certificate"]) if row["certificate"] else None
    return Record(row["id"], row["name"], json.loads(row["written"]), Spec.model_validate_json(row["spec"]), row["digest"],
                  row["created"], row["spent"], certificate)  # fmt: skip


def _durable(connection, _record) -> None:
    # The rollback journal and full sync work on network file systems too; write-ahead logging does not.
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=ON")


def _machine() -> str:
    try:
        return f"{socket.gethostname()}/{Path('/proc/sys/kernel/random/boot_id').read_text().strip()[:8]}"
    except OSError:
        return socket.gethostname()


def _started(pid: int) -> str:
    """Returns when a process began, so that a reused process id is not mistaken for it; "" where it is gone or unknown."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        return ""


def _alive(holder: dict, seen: float) -> bool:
    if holder["host"] == _machine() and holder["started"]:
        return _started(holder["pid"]) == holder["started"]
    return time.time() - seen < LEASE


def with_state(
    trial: Trial, state: State, outcome: Outcome | None = None, error: str | None = None, *, at: float | None = None
) -> Trial:
    """Returns the trial in a final state, finished at a time (default: now)."""
    finished = time.time() if at is None else at
    return trial.model_copy(update={"state": state, "outcome": outcome, "error": error, "finished": finished})


def open_store(storage: str, database: str | None = None, *, create: bool = True) -> Store:
    """Returns the store of a storage folder: its hpo.db, unless a database URL is given."""
    # Not by pasting a URL together: a folder may have any character in its name.
    return Store(database or sa.URL.create("sqlite", database=str(Path(storage) / "hpo.db")), create=create)


__all__ = ["Holder", "Record", "Store", "joined", "open_store", "with_state"]
