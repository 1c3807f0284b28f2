"""The command line's second half: `hpo model` and `hpo endpoint`. Each command is one call on the library."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hpo import show, show_models
from hpo.terminal import Json, Name, Storage, console, print_json, say

models = typer.Typer(help="The register of models: promote, list, show, export, roll back.", no_args_is_help=True)
endpoints = typer.Typer(help="Serve registered models: deploy, ask, divide the traffic.", no_args_is_help=True)

Label = Annotated[str, typer.Argument(help="a registered model: NAME or NAME@v2; NAME is the live version, else the newest")]
EndpointName = Annotated[str, typer.Argument(help="name of the endpoint, which is that of its model")]


@models.command()
def promote(
    name: Name,
    trial: Annotated[int | None, typer.Option(help="another trial than the winner")] = None,
    storage: Storage = None,
    as_json: Json = False,
):
    """Retrain a study's winner, keep the better of both, merge, verify and register it. Killed, the same command goes on."""
    from hpo.study import open_study

    study = open_study(name, storage=storage)
    with show.progress() as on_status:
        model = study.promote(trial=trial, on_status=on_status)
    _show_model(model, as_json)


@models.command(name="list")
def list_models(
    name: Annotated[str | None, typer.Argument(help="of one name only")] = None, storage: Storage = None, as_json: Json = False
):
    """List the registered models."""
    from hpo.study import open_the_store

    found = open_the_store(storage).models(name)
    if as_json:
        print_json({"models": [show_models.model_record(m) for m in found]})
    else:
        console().print(show_models.models_text(found))


@models.command(name="show")
def show_model(label: Label, storage: Storage = None, as_json: Json = False):
    """Show a registered model: where it came from, how it did, what was checked."""
    _show_model(_model(label, storage)[1], as_json)


@models.command()
def rollback(name: Annotated[str, typer.Argument(help="name of the model")], storage: Storage = None, as_json: Json = False):
    """Make the previous version the live one again; a running endpoint follows without a failed request."""
    from hpo import endpoint

    store, model = _model(name, storage)
    with show.progress() as on_status:
        back = endpoint.rollback(store, _spec(store, model), name, on_phase=_phases(on_status))
    say(f"{back.label} is live again.")
    if as_json:
        print_json(show_models.model_record(back))


@models.command()
def export(
    label: Label,
    out: Annotated[Path | None, typer.Option(help="file or folder to write")] = None,
    form: Annotated[str, typer.Option("--format", help="safetensors, adapter, gguf-f16, gguf-q8_0")] = "safetensors",
    replace: Annotated[bool, typer.Option("--replace", help="put it in place of an earlier export")] = False,
    hub: Annotated[str | None, typer.Option(help="a hub's repository id to push to; the token comes from HF_TOKEN")] = None,
    storage: Storage = None,
    as_json: Json = False,
):
    """Write a model as files for other programs, or push it to a hub."""
    from training import export as exports

    _, model = _model(label, storage)
    if hub is not None:
        said: Any = {"url": exports.push(model.folder, hub)}
    elif out is None:
        raise typer.BadParameter("give --out, or --hub")
    else:
        # Other forms are compared with the model on what it was really asked.
        text = [prompt + answer for prompt, answer in model.prompts] or None
        said = exports.export(model.folder, str(out), form, text=text, replace=replace)
    if as_json:
        print_json(said)
    else:
        say(f"Wrote {model.label} to {said.get('path') or said['url']}")


@models.command()
def evaluate(
    label: Label,
    tasks: Annotated[str, typer.Option(help="of the lm-evaluation-harness, by comma: arc_easy,hellaswag")],
    include: Annotated[str | None, typer.Option(help="folder of tasks of your own, in the harness's YAML")] = None,
    limit: Annotated[int | None, typer.Option(help="rows of each task at most: to try, not to claim", min=1)] = None,
    shots: Annotated[int | None, typer.Option(help="examples before each question; default: the task's own", min=0)] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    storage: Storage = None,
    as_json: Json = False,
):
    """Score a registered model by the lm-evaluation-harness (an extra: paretune[lm-eval])."""
    from training import harness

    _, model = _model(label, storage)
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    found = harness.run(model.folder, names, include=include, limit=limit, shots=shots, device=device)
    if as_json:
        print_json({"model": model.label, "tasks": found})
    else:
        console().print(show_models.harness_text(model, found))


@models.command()
def reproduce(label: Label, storage: Storage = None, as_json: Json = False):
    """Make a model again from its record, and say whether it matches. Exit code 1 where it does not."""
    from hpo.study import reproduce as reproduced

    store, model = _model(label, storage)
    with show.progress() as on_status:
        said = reproduced(store, model, on_status=on_status)
    if as_json:
        print_json(said)
    else:
        console().print(show_models.reproduced_text(model, said))
    if not said["matches"]:
        raise typer.Exit(1)


@models.command()
def remove(label: Label, storage: Storage = None):
    """Remove a version that does not answer anybody: its files, and its entry on the register."""
    from hpo import endpoint

    store, model = _model(label, storage)
    endpoint.remove_model(store, _spec(store, model), model)
    say(f"Removed {model.label}.")


@endpoints.command()
def deploy(
    label: Label,
    share: Annotated[float, typer.Option(help="of the requests; below 1 is a canary, the live version keeps the rest")] = 1.0,
    target: Annotated[str, typer.Option(help="ray (Ray Serve) or local (this process, without Ray)")] = "ray",
    storage: Storage = None,
    as_json: Json = False,
):
    """Serve a model: loaded beside what is live, checked on real prompts, then switched.

    Without a cluster (RAY_ADDRESS) and where nothing serves it yet, this command itself serves until Ctrl-C.
    """
    from hpo import study as studies

    store, model = _model(label, storage)
    with show.progress() as on_status:
        made = studies.deploy(store, model, share=share, target=target, on_status=on_status)
    if as_json:
        print_json(show_models.endpoint_record(made))
    else:
        console().print(show_models.endpoint_text(made))
    keep(made)


def keep(made: Any) -> None:
    """Serves on until Ctrl-C or the endpoint's removal, where it is this process that serves."""
    if not made.mine:
        return
    say("Serving until Ctrl-C.")
    try:
        made.wait()
    except KeyboardInterrupt:
        say("Stopping.")
    finally:
        made.close()


@endpoints.command()
def ask(
    name: EndpointName,
    text: Annotated[str, typer.Argument(help="the question")],
    model: Annotated[str | None, typer.Option(help="NAME@v2, NAME@base, NAME@fast, NAME@small, NAME@trial-7")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="a prompt to be continued, instead of a chat message")] = False,
    max_tokens: Annotated[int, typer.Option(help="most tokens of the answer")] = 64,
    storage: Storage = None,
    as_json: Json = False,
):
    """Ask an endpoint one question over HTTP."""
    from hpo.endpoint import open_endpoint
    from hpo.study import storage_of

    said = open_endpoint(storage_of(storage), name).ask(text, model=model, chat=not raw, max_tokens=max_tokens)
    if as_json:
        print_json(said)
    else:
        print(said["text"].strip())


@endpoints.command(name="list")
def list_endpoints(storage: Storage = None, as_json: Json = False):
    """List the endpoints: where they are, what they serve, which replicas are alive."""
    from hpo import endpoint
    from hpo.study import storage_of

    found = endpoint.endpoints(storage_of(storage))
    if as_json:
        print_json({"endpoints": [show_models.endpoint_record(e) for e in found]})
    else:
        console().print(show_models.endpoints_text(found))


@endpoints.command()
def traffic(
    name: EndpointName,
    shares: Annotated[list[str] | None, typer.Argument(help="VERSION=SHARE ..., adding up to 1: 1=0.9 2=0.1")] = None,
    storage: Storage = None,
    as_json: Json = False,
):
    """Divide the requests among versions; without shares, compare the versions that answer, with 95 % intervals."""
    from hpo import endpoint
    from hpo.study import open_the_store, storage_of

    if shares:
        store = open_the_store(storage)
        given = dict(_share(text) for text in shares)
        with show.progress() as on_status:
            made = endpoint.traffic(store, _spec(store, store.model(name)), name, given, on_phase=_phases(on_status))
    else:
        made = endpoint.open_endpoint(storage_of(storage), name)
    if as_json:
        print_json(show_models.endpoint_record(made) | {"comparison": endpoint.comparison(made)})
    else:
        console().print(show_models.endpoint_text(made), show_models.comparison_text(endpoint.comparison(made)))


@endpoints.command(name="remove")
def remove_endpoint(name: EndpointName, storage: Storage = None):
    """Stop serving an endpoint; its models stay on the register."""
    from hpo import endpoint
    from hpo.study import storage_of

    endpoint.remove(storage_of(storage), name)
    say(f"Removed endpoint {name}.")


def _model(label: str, storage: str | None):
    from hpo.endpoint import version_of
    from hpo.study import open_the_store

    store = open_the_store(storage)
    return store, store.model(*version_of(label))


def _spec(store: Any, model: Any) -> Any:
    return store.study(model.lineage.study).spec


def _show_model(model: Any, as_json: bool) -> None:

    if as_json:
        print_json(show_models.model_record(model))
    else:
        console().print(show_models.model_text(model))


def _phases(on_status: Any) -> Any:
    from hpo.study import Status

    return lambda phase: on_status(Status(phase=phase))


def _share(text: str) -> tuple[int, float]:
    version, _, share = text.removeprefix("v").partition("=")
    try:
        return int(version), float(share)
    except ValueError:
        raise typer.BadParameter(f"must be VERSION=SHARE such as 2=0.1, got {text!r}.") from None
