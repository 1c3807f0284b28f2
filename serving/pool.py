"""The models in one process: they follow the endpoint's table while requests are being answered.

Owns: `Pool` (what is loaded, what answers, what is closed), what a replica says of itself. Must not know: HTTP, Ray, how a model
is loaded.

One thread watches the table; another one loads and closes. What answers is replaced at once, under a lock, and only by what is
ready; a request holds its model by a lease from its first token to its last, so every answer comes from one model alone.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import platform
import secrets
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from serving.endpoint import REPLICAS, Table, Version, read_table, replace, replicas
from serving.lease import GONE, Held, Lease, Unavailable, Unknown, name_of
from serving.traffic import Statistics, compare, pick, total
from training.errors import InputError, wrong

log = logging.getLogger(__name__)
WATCH, SAY, RETRY = 0.5, 1.0, 60.0  # seconds between looks at the table, reports, and tries of what did not load
STALE = 10.0  # seconds after which a silent replica is taken for dead
GRACE = 10.0  # seconds that requests have to end when the pool is closed


def _identity(version: Version) -> tuple[int, str, str]:
    return version.version, version.digest, version.folder


class Pool:
    """The models of one endpoint in this process.

    Args:
        folder: the endpoint's; its table is followed.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.table: Table = read_table(folder)  # the newest: limits and tokens hold at once, models when they are loaded
        self.id = f"{platform.node()}-{os.getpid()}-{secrets.token_hex(3)}"
        self._lock = threading.Lock()
        self._versions: dict[tuple, Held] = {}  # loaded, by identity
        self._route: tuple[Version, ...] = ()  # those among which shares are divided
        self._adapters: dict[str, Held] = {}
        self._failed: dict[tuple | str, tuple[str, float]] = {}  # identity or adapter -> reason, when it may be tried again
        self._retired: list[Held] = []  # closed as soon as nobody holds them
        self._generation = self._settled = 0  # of the table that the route follows; of the last one that was gone through
        self._trouble: str | None = None  # with the table itself
        self._statistics: dict[str, Statistics] = {}
        self._settings = self.table.engine.model_dump(mode="json")  # those that this process was started with
        self._bases = None
        self._loads = ThreadPoolExecutor(1, "load")  # one at a time: loading takes memory and threads
        self._following: Future | None = None
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._started = time.time()

    def start(self) -> None:
        """Loads the versions of the table and begins to follow it; see `healthy` and `problems` for what came of it.

        Raises:
            InputError: the endpoint is for another engine.
        """
        if self.table.engine.kind != "transformers":
            raise wrong("engine.kind", f"{self.table.engine.kind} models are not served by this process.", "Use Ray Serve.")
        import torch

        from serving.loading import Bases

        torch.set_num_threads(max(1, int(self.table.engine.cpus)))
        self._bases = Bases()
        _forget_the_dead(self.folder)
        self._loads.submit(self._follow).result()
        self._say()
        self._watcher.start()

    def close(self, grace: float = GRACE) -> None:
        """Waits for requests to end, at most so many seconds, closes all models and takes back what the replica said."""
        self._ended.set()
        if self._watcher.is_alive():
            self._watcher.join()
        with self._lock:
            held = [*self._versions.values(), *self._adapters.values()]
            self._versions, self._adapters, self._route = {}, {}, ()
            self._retired += held
        until = time.monotonic() + grace
        while any(one.active for one in self._retired) and time.monotonic() < until:
            time.sleep(0.02)
        self._loads.submit(self._close_retired, True).result()
        self._loads.shutdown()
        self._path.unlink(missing_ok=True)

    def healthy(self) -> bool:
        """Says whether requests can be answered: those versions that take them run. An endpoint without shares is healthy when a
        version is ready, which can be asked by its number, and one without versions as soon as it is started."""
        with self._lock:
            held = [self._versions[_identity(version)] for version in self._route]
            if not held and not any(version.share for version in self.table.versions):
                held = list(self._versions.values())
        if self._ended.is_set() or not self._watcher.is_alive():
            return False
        return all(one.engine.healthy() for one in held) if held else not self.table.versions

    def problems(self) -> list[str]:
        """Returns why versions and adapters of the table are not ready."""
        with self._lock:
            reasons = [reason for reason, _ in self._failed.values()]
        return [*([self._trouble] if self._trouble else []), *reasons]

    def names(self) -> list[str]:
        """Returns what can be asked for: the endpoint, its versions, its adapters."""
        table = self.table
        parts = [name_of(what) for what in (*table.versions, *table.adapters)]
        return [*([table.name] if table.versions else []), *(f"{table.name}@{part}" for part in parts)]

    def pick(self, model: str, key: str) -> Lease:
        """Returns the lease of the model that answers, to be taken with `with` or `async with`.

        Args:
            model: `NAME` by shares, `NAME@v2` that version whatever its share, `NAME@fast` an adapter.
            key: the user, session or request; the same key has the same version.

        Raises:
            Unknown: there is no such model.
            Unavailable: when the lease is taken: it is not ready, broken, or no adapter in memory is idle.
        """
        table = self.table
        if model not in self.names():
            raise Unknown(model, self.names())
        part = model.partition("@")[2]
        pinned = {f"v{version.version}": version.version for version in table.versions}
        wanted = pinned.get(part, part) if part else None
        return Lease(table.name, lambda: self._hold(wanted, key), self._let_go)

    def record(self, version: str, **said) -> None:
        """Counts one answered request; see `Statistics.add`."""
        with self._lock:
            self._statistics.setdefault(version, Statistics()).add(**said)

    def feedback(self, version: str, score: float) -> None:
        """Counts a user's score from 0 to 1 of an answer of this version."""
        with self._lock:
            self._statistics.setdefault(version, Statistics()).add_feedback(score)

    def comparison(self) -> list[dict]:
        """Returns how the versions compare over all living replicas, the one with the largest share first."""
        others = [said.get("statistics", {}) for said in living(self.folder) if said.get("id") != self.id]
        with self._lock:
            own = {name: one.to_json() for name, one in self._statistics.items()}
        found = total([own, *others])
        shares = {f"v{version.version}": version.share for version in self.table.versions}
        return compare(dict(sorted(found.items(), key=lambda item: (-shares.get(item[0], -1), item[0]))))

    def status(self) -> dict:
        """Returns what this replica says of itself, as JSON.

        `generation` is that of the last table it has gone through; `ready` are the versions of that table which can answer,
        `failed` the others with reasons; `serves` is the generation that shares are taken from: an older one as long as
        nothing of the newer one can answer.
        """
        with self._lock:
            route = {_identity(version): version.share for version in self._route}
            known = {_identity(version): version for version in (*self.table.versions, *self._route)}
            versions = {}
            for identity, version in known.items():
                state = "ready" if identity in self._versions else "failed" if identity in self._failed else "loading"
                versions[f"v{version.version}"] = {
                    "state": state, "digest": version.digest, "share": route.get(identity, 0),
                    "running": self._versions[identity].active if identity in self._versions else 0,
                }  # fmt: skip
            named = [_identity(version) for version in self.table.versions]
            failed = {str(identity[0]): self._failed[identity][0] for identity in named if identity in self._failed}
            ready = [identity[0] for identity in named if identity in self._versions]
            adapters = {}
            for adapter in self.table.adapters:
                held, reason = self._adapters.get(adapter.name), self._failed.get(adapter.name, (None, 0))[0]
                state = "failed" if reason else "idle" if held is None else "ready" if held.ready else "loading"
                adapters[adapter.name] = {"state": state, "reason": reason, "running": held.active if held else 0}
            return {
                "id": self.id, "host": platform.node(), "pid": os.getpid(), "started": self._started, "time": time.time(),
                "generation": self._settled, "serves": self._generation, "table": self.table.generation,
                "trouble": self._trouble, "ready": ready, "failed": failed, "versions": versions, "adapters": adapters,
                "engine": self._settings, "closing": len(self._retired),
                "statistics": {name: one.to_json() for name, one in self._statistics.items()},
            }  # fmt: skip

    # What follows the table.

    @property
    def _path(self) -> Path:
        return self.folder / REPLICAS / f"{self.id}.json"

    def _watch(self) -> None:
        said, before = 0.0, None
        while not self._ended.wait(WATCH):
            self._read()
            if self._following is not None and self._following.done() and (error := self._following.exception()):
                self._trouble = _said(error)
            if self._behind() and (self._following is None or self._following.done()):
                self._following = self._loads.submit(self._follow)
            now = self.status()
            states = {name: one["state"] for part in ("versions", "adapters") for name, one in now[part].items()}
            changed = now["generation"], now["serves"], now["table"], now["trouble"], states
            if time.monotonic() - said >= SAY or changed != before:
                self._say()
                said, before = time.monotonic(), changed

    def _read(self) -> None:
        try:
            self.table, self._trouble = read_table(self.folder), None
        except (InputError, OSError) as error:  # the last one that was good stays in force
            self._trouble = str(error)

    def _behind(self) -> bool:
        with self._lock:
            waiting = any(when <= time.monotonic() for key, (_, when) in self._failed.items() if isinstance(key, tuple))
            dead = any(held.ready and not held.engine.healthy() for held in self._versions.values())
            idle = any(held.ended for held in self._retired)
        return self._settled != self.table.generation or waiting or dead or idle

    def _follow(self) -> None:
        """Loads what the table names and is not there, then lets it answer, then closes what is no longer named."""
        while not self._ended.is_set():
            table = self.table
            self._retire_the_dead()
            if table.generation != self._settled:  # somebody changed something: what failed may be sound now
                with self._lock:
                    self._failed = {key: (reason, 0.0) for key, (reason, _) in self._failed.items()}
            for version in table.versions:
                if self.table.generation != table.generation or self._ended.is_set():
                    break  # a newer one came meanwhile
                self._load(version)
            else:
                self._switch(table)
                self._close_retired()
                return

    def _load(self, version: Version) -> None:
        from serving import loading

        identity = _identity(version)
        with self._lock:
            if identity in self._versions or self._failed.get(identity, ("", 0))[1] > time.monotonic():
                return
        done: Future = Future()
        try:
            done.set_result(loading.load_version(version, self.table.engine))
        except Exception as error:  # whatever it is: the others go on answering
            log.warning("%s@v%d is not served: %s", self.table.name, version.version, _said(error))
            with self._lock:
                self._failed[identity] = (_said(error), _again(error))
            return
        with self._lock:
            self._failed.pop(identity, None)
            self._versions[identity] = Held(version, done)

    def _switch(self, table: Table) -> None:
        with self._lock:
            wanted = [version for version in table.versions if version.share]
            ready = tuple(version for version in wanted if _identity(version) in self._versions)
            # Where none of those that should answer is ready, those that answered until now go on. One without a share never
            # answers for them: it may be there to be checked.
            if ready or not wanted:
                self._route, self._generation = ready, table.generation
            named = {_identity(version) for version in (*table.versions, *self._route)}
            for identity in [identity for identity in self._versions if identity not in named]:
                self._retired.append(self._versions.pop(identity))
            adapters = {adapter.name: adapter for adapter in table.adapters}
            for name in [name for name, held in self._adapters.items() if adapters.get(name) != held.what]:
                self._retired.append(self._adapters.pop(name))
            self._failed = {key: why for key, why in self._failed.items() if key in named or key in adapters}
            self._settled = table.generation
        self._bases.keep(table.adapters)

    def _retire_the_dead(self) -> None:
        with self._lock:
            for identity, held in list(self._versions.items()):
                if not held.engine.healthy():
                    self._route = tuple(version for version in self._route if _identity(version) != identity)
                    self._retired.append(self._versions.pop(identity))

    def _close_retired(self, all_: bool = False) -> None:
        with self._lock:
            ended = [held for held in self._retired if all_ or held.ended]
            self._retired = [held for held in self._retired if held not in ended]
        for held in ended:
            if held.ready:
                held.engine.close()
                held.loading = GONE  # whoever kept a lease keeps no weights
        if ended:
            gc.collect()  # models hold themselves in circles

    # What a request holds.

    def _hold(self, wanted: str | int | None, key: str) -> Held:
        with self._lock:
            if isinstance(wanted, str):
                return self._hold_adapter(wanted)
            choice = [version for version in self._route if wanted is None]
            choice += [v for v in self.table.versions if v.version == wanted and _identity(v) in self._versions]
            if not choice:
                raise Unavailable(f"{self.table.name}{f'@v{wanted}' if wanted else ''} is not ready")
            held = self._versions[_identity(pick(choice, key, self.table.name))]
            held.active += 1
            return held

    def _hold_adapter(self, name: str) -> Held:
        adapter = next((adapter for adapter in self.table.adapters if adapter.name == name), None)
        held = self._adapters.get(name)
        # Another one of that name came since, or its engine died.
        if held is not None and (held.what != adapter or held.ready and not held.engine.healthy()):
            self._retired.append(self._adapters.pop(name))
            held = None
        if adapter is None or self._ended.is_set() or self._failed.get(name, ("", 0))[1] > time.monotonic():
            raise Unavailable(f"{self.table.name}@{name} cannot be loaded")
        if held is None:
            while len(self._adapters) >= self.table.engine.adapters_loaded:
                idle = [other for other, one in self._adapters.items() if not one.active]
                if not idle:
                    raise Unavailable("all adapters in memory are in use", busy=True)
                least = min(idle, key=lambda other: self._adapters[other].used)
                self._retired.append(self._adapters.pop(least))
            held = self._adapters[name] = Held(adapter, Future())
            self._loads.submit(self._load_adapter, held)
        held.active += 1
        return held

    def _load_adapter(self, held: Held) -> None:
        self._close_retired()  # first: its memory may be needed
        name = held.what.name
        with self._lock:
            if self._ended.is_set() or self._adapters.get(name) is not held and not held.active:  # nobody waits any more
                held.loading.set_exception(Unavailable("not needed any more"))
                return
        try:
            engine = self._bases.load(held.what, self.table.engine)
        except Exception as error:
            log.warning("%s@%s cannot be loaded: %s", self.table.name, name, _said(error))
            with self._lock:
                self._failed[name] = (_said(error), _again(error))
                if self._adapters.get(name) is held:
                    del self._adapters[name]
            held.loading.set_exception(error)
            return
        with self._lock:
            self._failed.pop(name, None)
        held.loading.set_result(engine)

    def _let_go(self, held: Held) -> None:
        with self._lock:
            held.active -= 1
            held.used = time.monotonic()

    def _say(self) -> None:
        with contextlib.suppress(OSError):  # a full disk stops no answers
            self._path.parent.mkdir(parents=True, exist_ok=True)
            replace(self._path, json.dumps(self.status(), indent=1))


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _again(error: Exception) -> float:
    # What is wrong with a model stays wrong until somebody registers another one; storage and memory may come back.
    return time.monotonic() + (RETRY if not isinstance(error, InputError) else 10 * RETRY)


def living(folder: str | Path, now: float | None = None) -> list[dict]:
    """Returns what each replica said that was heard from lately."""
    now = time.time() if now is None else now
    return [said for said in replicas(folder) if now - said.get("time", 0) < STALE]


def _forget_the_dead(folder: Path) -> None:
    """Removes what replicas said that were killed: on this machine as soon as the process is gone, else after a while."""
    for said in replicas(folder):
        here = said.get("host") == platform.node()
        if not _lives(said["pid"]) if here else time.time() - said.get("time", 0) > 10 * STALE:
            (folder / REPLICAS / f"{said['id']}.json").unlink(missing_ok=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # under another user
        return True
    return True
