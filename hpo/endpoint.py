"""From a registered model to an endpoint that answers, and what is done with it afterwards.

    load beside what is live -> check on real prompts -> switch

Owns: `deploy`, `traffic`, `rollback`, `remove`, `Endpoint`. Must not know: how a model was made, what runs in a replica.

Everything is a change of the endpoint's table, one file that the replicas follow (`serving.endpoint`). A version is loaded with
a share of nothing, so that whatever goes wrong before the switch, also a kill, leaves the old one serving.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpo.errors import BackendError, InputError, NotFound, Problem
from hpo.model import Model
from hpo.spec import Spec
from hpo.store import Store
from hpo.trial import Trial
from serving import endpoint as tables
from serving.endpoint import Adapter, Table, Version

ADDRESS = "address.json"
PATIENCE = 300.0  # seconds for a replica to load a model
ANSWER = 32  # tokens of the answers that a merge keeps for the check
FRESH = 10.0  # seconds; a replica that has been silent for longer is gone
OnPhase = Callable[[str], None]


@dataclass
class Endpoint:
    """A running endpoint. `url` is the base of its OpenAI-compatible routes, `folder` has its table and its token."""

    name: str
    folder: Path
    url: str
    mine: bool = False  # whether it is served by this process, and ends with it
    _cluster: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, repr=False)

    @property
    def token(self) -> str:
        """The bearer token that every route but /health asks for."""
        return tables.new_token(self.folder)

    @property
    def table(self) -> Table:
        return tables.read_table(self.folder)

    def ask(self, text: str, *, model: str | None = None, chat: bool = True, **options: Any) -> dict[str, Any]:
        """Asks one question and returns `text`, `model` (what answered), `finish`, `tokens`, `seconds`.

        Args:
            text: the user's message, or with chat=False a prompt to be continued.
            model: NAME, NAME@v2, NAME@base, NAME@fast, ...; default: by the endpoint's shares.
            options: of the route: max_tokens, temperature, seed, ...

        Raises:
            BackendError: it does not answer, or refuses; the message is its own.
        """
        body = {"model": model or self.name, "temperature": 0} | options
        body |= {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
        began = time.perf_counter()
        said = self.request("/v1/chat/completions" if chat else "/v1/completions", body)
        choice = said["choices"][0]
        answer = choice["message"]["content"] if chat else choice["text"]
        return {
            "text": answer, "model": said.get("system_fingerprint") or said["model"], "finish": choice["finish_reason"],
            "tokens": said["usage"]["completion_tokens"], "seconds": time.perf_counter() - began, "id": said["id"],
        }  # fmt: skip

    def request(self, route: str, body: Any = None) -> Any:
        """Returns what a route answers, as parsed JSON."""
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + route, data, headers), timeout=120) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise BackendError(f"Endpoint {self.name} answered {error.code}: {_message(error)}") from None
        except OSError as error:
            raise BackendError(f"Endpoint {self.name} does not answer at {self.url} ({error}).") from None

    def wait(self) -> None:
        """Serves on until the endpoint is removed, for a process that has nothing else to do."""
        while (self.folder / ADDRESS).exists():
            time.sleep(0.5)

    def close(self) -> None:
        """Ends the cluster that this process started for the endpoint; on a cluster of its own it goes on serving."""
        self._cluster.close()


def _message(error: urllib.error.HTTPError) -> str:
    try:
        return json.load(error)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return error.reason


def folder_of(storage: str | Path, name: str) -> Path:
    """Returns where an endpoint keeps its files; nothing that is no name reaches a path."""
    if not tables.NAME.fullmatch(name):
        raise NotFound(f"No endpoint {name!r}.")
    return Path(storage) / "endpoints" / name


def open_endpoint(storage: str | Path, name: str) -> Endpoint:
    """Returns an endpoint that was deployed, by name.

    Raises:
        NotFound: there is none; the message names those that exist.
    """
    folder = folder_of(storage, name)
    if not (folder / ADDRESS).is_file():
        known = ", ".join(e.name for e in endpoints(storage)) or "none"
        raise NotFound(f"No endpoint {name!r} in {storage}. There are: {known}.")
    return Endpoint(name, folder, json.loads((folder / ADDRESS).read_text())["url"])


def endpoints(storage: str | Path) -> list[Endpoint]:
    """Returns all endpoints that were deployed and not removed."""
    found = sorted((Path(storage) / "endpoints").glob(f"*/{ADDRESS}"))
    return [Endpoint(path.parent.name, path.parent, json.loads(path.read_text())["url"]) for path in found]


def live_replicas(folder: Path) -> list[dict[str, Any]]:
    """Returns what the replicas that are alive last said of themselves."""
    return [said for said in tables.replicas(folder) if time.time() - said.get("time", 0) < FRESH]


def deploy(
    store: Store, model: Model, spec: Spec, front: Sequence[Trial], *, share: float = 1.0, target: str = "ray",
    on_phase: OnPhase = lambda phase: None,
) -> Endpoint:  # fmt: skip
    """Returns the endpoint of a model's name, serving it: loaded beside what is live, checked on real prompts, then switched.

    Args:
        store: where the model is registered.
        model: a registered model whose files are there.
        spec: its study, for how it is served.
        front: trials to be served as adapters beside it.
        share: of the requests; the live version keeps the rest.
        target: what serves it where nothing does yet: ray (Ray Serve on the cluster), or local (this process).
        on_phase: is told of progress.

    Raises:
        InputError: the model is below its thresholds, or does not load, or does not answer as it must; the old one serves on.
    """
    if model.refused:
        raise InputError(
            Problem(model.label, f"is not deployed: {model.refused}.", "Improve it, or lower the threshold in promote.")
        )
    if not 0 < share <= 1:
        raise InputError(Problem("share", f"must be above 0 and at most 1, got {share:g}.", "For example 0.1."))
    folder = folder_of(spec.storage, model.name)
    before = _table(folder)
    if share < 1 and not any(v.share for v in before.versions if v.version != model.version):
        rule = f"there is no other version to answer the rest of a share of {share:g}."
        raise InputError(Problem(model.name, rule, "Deploy it with the whole share first."))
    entry = Version(version=model.version, folder=model.folder, digest=model.digest)
    others = tuple(v for v in before.versions if v.version != model.version)
    had = next((v for v in before.versions if v.version == model.version), None)
    token = tables.new_token(folder)
    table = before.model_copy(update={
        "name": model.name, "generation": before.generation + 1, "versions": (*others, had or entry),
        "adapters": _adapters(model, spec, front), "engine": spec.serving.engine, "limits": spec.serving.limits,
        "filters": spec.serving.filters,
        "tokens": before.tokens or (tables.digest_of(token),),
    })  # fmt: skip
    on_phase("deploy")
    tables.write_table(folder, table)
    made = Endpoint(model.name, folder, "")
    try:
        _serve(made, target)
        _wait(folder, table, [model.version])
        on_phase("check")
        _check(made, model)
    except BaseException:
        if others:  # the old ones go on; where there were none, nobody is served, and the next try finds the table
            tables.write_table(folder, before.model_copy(update={"generation": table.generation + 1}))
        made.close()
        raise
    on_phase("switch")
    _switch(store, made, {model.version: share})
    return made


def _table(folder: Path) -> Table:
    try:
        return tables.read_table(folder)
    except InputError:
        if (folder / tables.TABLE).exists():
            raise
        return Table(name=folder.name, generation=1)


def _adapters(model: Model, spec: Spec, front: Sequence[Trial]) -> tuple[Adapter, ...]:
    """Returns the front as adapters: the base itself, each member by its number, the fastest and the smallest by name too."""
    from training.artifact import verify
    from training.data import chat_template_of
    from training.model import load_tokenizer
    from training.recipe import DataConfig

    recipe = model.lineage.recipe
    asks = chat_template_of(DataConfig.model_validate(model.lineage.data), load_tokenizer(recipe))
    found = [Adapter(name="base", recipe=recipe.model_dump(mode="json"), chat_template=asks)]
    named: dict[str, Trial] = {}
    for alias, cost in (("fast", "seconds"), ("small", "peak_bytes")):
        costed = [t for t in front if t.outcome and getattr(t.outcome, cost) is not None]
        if costed:
            named[alias] = min(costed, key=lambda t: (getattr(t.outcome, cost), t.number))
    named |= {f"trial-{t.number}": t for t in front}
    for name, trial in named.items():
        if trial.outcome is not None and trial.outcome.checkpoint and Path(trial.outcome.checkpoint).is_dir():
            own = trial.recipe if "model" in spec.space.root else trial.recipe.model_copy(update={"model": recipe.model})
            found.append(Adapter(name=name, recipe=own.model_dump(mode="json"), folder=trial.outcome.checkpoint,
                                 digest=verify(trial.outcome.checkpoint).digest, chat_template=asks))  # fmt: skip
    return tuple(found)


def _serve(made: Endpoint, target: str) -> None:
    """Fills in the endpoint's address; starts serving where no replica is alive."""
    path = made.folder / ADDRESS
    if live_replicas(made.folder) and path.is_file():
        made.url = json.loads(path.read_text())["url"]
        return
    made.mine = True
    if target == "local":
        from serving.targets import local

        made.url = made._cluster.enter_context(local.serving(made.folder))
    else:
        from hpo import tune
        from serving.targets import ray_serve

        made._cluster.enter_context(tune.connect())
        made.url = ray_serve.deploy(made.folder, name=made.name)
        made.mine = not os.environ.get("RAY_ADDRESS")
    tables.replace(path, json.dumps({"url": made.url, "target": target}))


def _wait(folder: Path, table: Table, versions: Sequence[int]) -> None:
    """Waits until every live replica follows a table and has these versions loaded.

    Raises:
        InputError: one of them does not load, and why.
        BackendError: no replica got there in time.
    """
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        said = live_replicas(folder)
        for replica in said:
            found = {int(v): reason for v, reason in replica.get("failed", {}).items()} if _looked(replica, table) else {}
            for version in versions:
                if version in found:
                    rule = f"does not load: {found[version]}"
                    raise InputError(Problem(f"{table.name}@v{version}", rule, "What answered before goes on."))
        if said and all(_follows(replica, table, versions) for replica in said):
            return
        time.sleep(0.1)
    raise BackendError(f"Endpoint {table.name}: no replica had version {versions} loaded within {PATIENCE:g} s.")


def _looked(replica: Mapping[str, Any], table: Table) -> bool:
    return replica.get("generation", 0) >= table.generation


def _follows(replica: Mapping[str, Any], table: Table, versions: Sequence[int]) -> bool:
    return _looked(replica, table) and set(versions) <= {int(v) for v in replica.get("ready", ())}


def _check(made: Endpoint, model: Model) -> None:
    """Asks what the model was asked when it was merged: the answers must be those that it gave then.

    All of them where it is served in fp32. In bf16 and fp16 a near tie may fall otherwise in another batch, so half must be.
    """
    wrong = []
    for prompt, wanted in model.prompts:
        said = made.ask(prompt, model=model.label, chat=False, max_tokens=ANSWER)["text"]
        if said.strip() != wanted.strip():
            wrong.append((said, wanted))
    allowed = 0 if model.checks.get("precision", "fp32") == "fp32" else len(model.prompts) // 2
    if len(wrong) > allowed:
        said, wanted = wrong[0]
        rule = f"answers {said[:80]!r} where the merged model answered {wanted[:80]!r} ({len(wrong)} of {len(model.prompts)})."
        raise InputError(Problem(model.label, rule, "What answered before goes on. Promote it again."))
    if not model.prompts:
        made.ask("Hello", model=model.label, chat=False, max_tokens=4)


def _switch(store: Store, made: Endpoint, shares: Mapping[int, float]) -> None:
    """Gives versions their shares; the others keep the rest in their proportions, and who is left with nothing goes."""
    table = made.table
    rest = 1 - sum(shares.values())
    kept = sum(v.share for v in table.versions if v.version not in shares)
    given = {v.version: shares.get(v.version, v.share / kept * rest if kept and rest > 1e-9 else 0.0) for v in table.versions}
    versions = tuple(v.model_copy(update={"share": given[v.version]}) for v in table.versions if given[v.version] > 0)
    table = table.model_copy(update={"generation": table.generation + 1, "versions": versions})
    tables.write_table(made.folder, table)
    _wait(made.folder, table, [v.version for v in versions])
    if len(versions) == 1:
        store.set_live(made.name, versions[0].version)


def traffic(store: Store, spec: Spec, name: str, shares: Mapping[int, float], on_phase: OnPhase = lambda phase: None) -> Endpoint:
    """Divides the requests of an endpoint among registered versions; what is not loaded yet is loaded and checked first.

    Args:
        shares: version -> share; they add up to 1.
    """
    if not shares or abs(sum(shares.values()) - 1) > 1e-6 or min(shares.values()) < 0:
        raise InputError(Problem("shares", f"must add up to 1, got {dict(shares)}.", "For example 1=0.9 2=0.1."))
    made = open_endpoint(spec.storage, name)
    models = {version: store.model(name, version) for version in shares}
    for model in models.values():
        if model.refused:
            raise InputError(Problem(model.label, f"is not deployed: {model.refused}.", "Lower the threshold in promote."))
    table = made.table
    known = {v.version for v in table.versions}
    new = [Version(version=v, folder=m.folder, digest=m.digest) for v, m in models.items() if v not in known]
    if new:
        on_phase("deploy")
        wider = table.model_copy(update={"generation": table.generation + 1, "versions": (*table.versions, *new)})
        tables.write_table(made.folder, wider)
        try:
            _wait(made.folder, wider, [v.version for v in new])
            on_phase("check")
            for version in new:
                _check(made, models[version.version])
        except BaseException:
            tables.write_table(made.folder, table.model_copy(update={"generation": wider.generation + 1}))
            raise
    on_phase("switch")
    _switch(store, made, shares)
    return made


def rollback(store: Store, spec: Spec, name: str, on_phase: OnPhase = lambda phase: None) -> Model:
    """Makes the previous version of a model the live one again, and returns it."""
    previous = [m for m in store.models(name) if m.stage == "previous"]
    if not previous:
        raise NotFound(f"Model {name} has no previous version to go back to.")
    model = previous[-1]
    with contextlib.suppress(NotFound):
        if live_replicas(open_endpoint(spec.storage, name).folder):
            traffic(store, spec, name, {model.version: 1.0}, on_phase)
            return store.model(name, model.version)
    store.set_live(name, model.version)
    return store.model(name, model.version)


def comparison(made: Endpoint) -> list[dict[str, Any]]:
    """Returns how the versions did on the requests that they answered, with 95 % intervals; see `serving.traffic.compare`."""
    from serving import traffic as statistics

    found = statistics.total(replica.get("statistics", {}) for replica in tables.replicas(made.folder))
    shares = {f"v{version.version}": version.share for version in made.table.versions}
    return statistics.compare(dict(sorted(found.items(), key=lambda item: (-shares.get(item[0], -1), item[0]))))


def remove(storage: str | Path, name: str) -> None:
    """Stops serving an endpoint and removes its files; the models stay on the register.

    On a cluster its application is taken away; a process of this machine that serves it sees its address go, and ends.

    Raises:
        BackendError: it is still served after a minute.
    """
    made = open_endpoint(storage, name)
    if os.environ.get("RAY_ADDRESS"):
        from hpo import tune
        from serving.targets import ray_serve

        with tune.connect():
            ray_serve.remove(name)
    (made.folder / ADDRESS).unlink()
    until = time.monotonic() + 60
    while live_replicas(made.folder):
        if time.monotonic() > until:
            raise BackendError(f"Endpoint {name} is still served. End the process or the cluster that serves it.")
        time.sleep(0.2)
    shutil.rmtree(made.folder)


def remove_model(store: Store, spec: Spec, model: Model) -> None:
    """Removes a registered version and its files.

    Raises:
        InputError: it is live, or an endpoint has it loaded.
    """
    loaded = [v.version for e in endpoints(spec.storage) if e.name == model.name for v in e.table.versions]
    if model.stage == "live" or model.version in loaded:
        raise InputError(Problem(model.label, "answers requests.", "Deploy another version, or remove the endpoint first."))
    store.set_stage(model.name, model.version, "removed")
    shutil.rmtree(model.folder, ignore_errors=True)


def version_of(label: str) -> tuple[str, int | None]:
    """Returns name and version of NAME or NAME@v3."""
    found = re.fullmatch(r"(.+?)(?:@v(\d+))?", label)
    return found[1], int(found[2]) if found[2] else None
