"""The command line: `hpo`. Each command is one call on the library; nothing is decided here.

Exit codes: 0 done; 1 something broke; 2 the input is wrong, nothing was started; 3 another process runs the study;
4 the study ended without a complete trial; 130 interrupted, the same command continues.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from hpo.cli_data import data
from hpo.cli_models import endpoints, keep, models
from hpo.cli_steer import steer
from hpo.errors import HpoError, InputError, NotFound, StudyBusy
from hpo.terminal import Json, Name, Sets, Source, Storage, console, pairs, print_json, say

INTERRUPTED = 130

app = typer.Typer(help="Find good hyperparameters for fine-tuning language models.", no_args_is_help=True,
                  pretty_exceptions_enable=False, add_completion=False)  # fmt: skip

app.add_typer(models, name="model")
app.add_typer(endpoints, name="endpoint")
app.command()(data)
app.command()(steer)


@app.command()
def init(
    file: Annotated[str | None, typer.Argument(help="rows as JSONL or CSV, a folder, hub:OWNER/NAME")] = None,
    model: Annotated[str, typer.Option(help="`embedded`, a folder or a Hugging Face id")] = "embedded",
    out: Annotated[Path | None, typer.Option(help="where to write; default NAME.yaml here")] = None,
    name: Annotated[str | None, typer.Option(help="name of the study; default from the file")] = None,
    origin: Annotated[str | None, typer.Option("--from", help="a training file of Axolotl, LLaMA-Factory or TRL")] = None,
    as_json: Json = False,
):
    """Look at a data file, a model and this machine, or at another program's training file, and write a study file."""
    from hpo.adopt import adopt
    from hpo.draft import draft
    from hpo.written import parse

    if out is not None and not out.parent.is_dir():
        raise typer.BadParameter(f"{out} cannot be written (there is no folder {out.parent}).")
    if (file is None) == (origin is None):
        raise typer.BadParameter("name either a data file, or with --from a training file of another program.")
    folder = out.parent if out else None
    made = adopt(origin, name=name, folder=folder) if origin else draft(file, model, name=name, folder=folder)
    left = getattr(made, "left", ())
    path = out or Path(f"{parse(made.text)['name']}.yaml")
    if path.exists():
        raise typer.BadParameter(f"{path} exists. Name another file with --out, or remove it.")
    with _writing(path):
        path.write_text(made.text, encoding="utf-8")
    if as_json:
        also = {"left": [{"key": key, "value": value, "remedy": what} for key, value, what in left]} if origin else {}
        print_json({"path": str(path), "notes": made.notes} | also)
        return
    for note in made.notes:
        say(f"  {note}")
    for key, value, what in left:
        say(f"  {key}: {value} has no counterpart. {what}")
    say(f"Wrote {path}. Next: hpo check {path}")


@app.command()
def check(
    source: Source,
    sets: Sets = None,
    probe: Annotated[bool, typer.Option("--probe", help="time a few steps here, and predict seconds and cost")] = False,
    as_json: Json = False,
):
    """Say what would run: size of the space, trials, predicted memory, what does not fit. Starts and writes nothing."""
    from hpo import forecast, show
    from hpo.check import load

    _, findings = load(source, sets or ())
    found = forecast.probe(findings) if probe else None
    if as_json:
        print_json(show.check_record(findings) | ({"predicted_seconds": show.prediction_record(found)} if found else {}))
    else:
        console().print(show.check_text(findings), *([show.prediction_text(found)] if found else []))


@app.command()
def run(
    source: Source,
    sets: Sets = None,
    promote: Annotated[bool, typer.Option("--promote", help="then retrain, merge, verify and register the winner")] = False,
    deploy: Annotated[bool, typer.Option("--deploy", help="then serve it, and ask the untuned and the tuned model")] = False,
    keep_up: Annotated[bool, typer.Option("--keep", help="with --deploy: serve until Ctrl-C")] = False,
    as_json: Json = False,
):
    """Run a study to the end of its budget, or continue it; ends with the front, the winner and the report."""
    from hpo import show, show_models
    from hpo import study as studies

    if (deploy and not promote) or (keep_up and not deploy):
        raise typer.BadParameter("--deploy needs --promote, and --keep needs --deploy.")
    with contextlib.ExitStack() as stack:
        if promote:
            stack.enter_context(studies.session())
        model = made = None
        # Ray prints advice to standard output whatever it is told; it is in Ray's logs too.
        with show.progress() as on_status, open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            study = studies.run(source, sets or (), on_status=on_status)
            if promote and study.winner() is not None:
                model = study.promote(on_status=on_status)
                made = study.deploy(model, on_status=on_status) if deploy and not model.refused else None
                model = study.store.model(model.name, model.version)  # as it stands now
        said = studies.side_by_side(made) if made else []
        if as_json:
            also = {"model": show_models.model_record(model)} if model else {}
            also |= {"endpoint": show_models.endpoint_record(made), "asked": said} if made else {}
            print_json(show.study_record(study) | also)
        else:
            console().print(show.study_text(study))
            if model:
                console().print(show_models.model_text(model))
            if made:
                console().print(show_models.endpoint_text(made), show_models.asked_text(said))
            console().print(show.next_text(study))
        if made and keep_up:
            keep(made)
        elif made:
            made.close()
    if study.winner() is None:
        raise typer.Exit(4)


@app.command()
def transfer(
    proxy: Annotated[str, typer.Argument(help="an earlier study on something smaller, in the same storage")],
    source: Source,
    sets: Sets = None,
    top: Annotated[int, typer.Option(min=1, help="points from the top of the proxy's ranking")] = 4,
    spread: Annotated[int, typer.Option(min=0, help="further points, evenly from the rest of it")] = 4,
    least: Annotated[float, typer.Option(min=-1, max=1, help="rank correlation below which nothing is taken over")] = 0.5,
    as_json: Json = False,
):
    """Try what a smaller study found on the target, and say whether both rank alike; exits with 1 where they do not."""
    from hpo import show
    from hpo.proxy import transfer as transferred

    with show.progress() as on_status, open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        made = transferred(proxy, source, sets or (), top=top, spread=spread, least=least, on_status=on_status)
    if as_json:
        also = {"proxy": proxy, "correlation": made.correlation, "points": made.points, "holds": made.holds, "said": made.said}
        print_json(show.study_record(made.study) | {"transfer": also})
    else:
        console().print(show.study_text(made.study), made.said)
    if not made.holds:
        raise typer.Exit(1)


@app.command(name="list")
def list_studies(storage: Storage = None, as_json: Json = False):
    """List the studies on the record."""
    from hpo import show
    from hpo.study import open_the_store

    store = open_the_store(storage)
    rows = [(record, counts, store.held(record.id)) for record, counts in store.studies()]
    if as_json:
        print_json(
            {"studies": [{"name": r.name, "created": r.created, "running": held, "trials": counts} for r, counts, held in rows]}
        )
    else:
        console().print(show.list_text(rows))


@app.command()
def show(
    name: Name,
    choose: Annotated[str | None, typer.Option(help="another rule: best, knee, or weights as accuracy=2,seconds=1")] = None,
    within: Annotated[list[str] | None, typer.Option(help="with limits, for example seconds=30 or accuracy=0.9")] = None,
    storage: Storage = None,
    as_json: Json = False,
):
    """Show a study: its trials by state, the front, the winner, what mattered; with --choose or --within another choice."""
    from hpo import show as shown
    from hpo.study import open_study

    study = open_study(name, storage=storage)
    other = None
    if choose or within:
        weights = pairs(choose.split(",")) if choose and "=" in choose else None
        chosen = study.choose(None if weights else choose, weights=weights, limits=pairs(within or []))
        other = chosen or (None, "")
    if as_json:
        also = {"chosen": {"number": other[0] and other[0].number, "reason": other[1]}} if other else {}
        print_json(shown.study_record(study) | also)
    else:
        console().print(shown.study_text(study))
        if other:
            console().print(shown.choice_text(other if other[0] else None).replace("STUDY", name))


@app.command()
def replay(name: Name, storage: Storage = None, as_json: Json = False):
    """Derive every suggestion and every stop of a study again from its record; exits with 1 where they differ."""
    from hpo import show as shown
    from hpo.study import open_study

    found = open_study(name, storage=storage).replay()
    if as_json:
        print_json(dataclasses.asdict(found))
    else:
        console().print(shown.replay_text(found))
    if found.difference is not None:
        raise typer.Exit(1)


@app.command()
def report(
    name: Name,
    out: Annotated[Path | None, typer.Option(help="HTML file; default in the study's folder")] = None,
    storage: Storage = None,
):
    """Write the report of a study as one HTML file and print its path."""
    from hpo.study import open_study

    study = open_study(name, storage=storage)
    with _writing(out or study.spec.folder):
        print(study.report(out))


@app.command()
def export(
    name: Name,
    out: Annotated[str, typer.Option("--out", "--output", help="file to write, or with --format optuna a storage URL")],
    to: Annotated[str | None, typer.Option("--to", help="the winner as a training file: axolotl, llamafactory or trl")] = None,
    kind: Annotated[str | None, typer.Option("--format", help="csv, json, parquet (default: as --out ends) or optuna")] = None,
    trial: Annotated[int | None, typer.Option(help="with --to: another trial than the winner")] = None,
    storage: Storage = None,
):
    """Write a study's trials as a table or into an Optuna storage (for its dashboard), or its winner for another program."""
    from hpo.study import open_study

    study, file = open_study(name, storage=storage), Path(out)
    if trial is not None and to is None:
        raise typer.BadParameter("--trial needs --to.")
    if to is not None:
        with _writing(file):
            unsaid = study.export_to(to, file, trial=trial)
        for one in unsaid:
            say(f"  not said there: {one}")
        say(f"Wrote {file}")
        return
    if kind == "optuna":
        made = study.to_optuna(out)
        say(f"Wrote {len(made.trials)} trials to {out}. To look at them: optuna-dashboard {out}")
        return
    kind, table = kind or file.suffix.removeprefix("."), study.trials()
    writers = {"csv": lambda: table.to_csv(file, index=False), "json": lambda: table.to_json(file, orient="records", indent=1),
               "parquet": lambda: table.to_parquet(file, index=False)}  # fmt: skip
    if kind not in writers:
        raise typer.BadParameter(f"--out must end in {', '.join(f'.{one}' for one in writers)}, got {file.name}")
    with _writing(file):
        writers[kind]()
    say(f"Wrote {len(table)} trials to {file}")


@app.command()
def schema(
    what: Annotated[str, typer.Argument(help="study, recipe, data, spaces or studies")] = "study",
    as_json: Json = False,
):
    """Show the fields of a study file or a recipe, or what is bundled; with --json as JSON Schema."""
    from hpo import show
    from hpo.spec import Spec, bundled
    from training.recipe import DataConfig, Recipe

    models = {"study": Spec, "recipe": Recipe, "data": DataConfig}
    if what in ("spaces", "studies"):
        found = {name: path.read_text() for name, path in bundled(what).items()}
        if as_json:
            print_json(found)
        else:
            print("\n\n".join(f"# {name}\n{text.strip()}" for name, text in found.items()))
    elif what in models:
        if as_json:
            print_json(models[what].model_json_schema())
        else:
            console().print(show.schema_text(models[what]))
    else:
        raise typer.BadParameter(f"must be study, recipe, data, spaces or studies, got {what}")


@app.command()
def doctor(
    model: Annotated[str | None, typer.Option(help="show the linear layers of a model: `embedded`, a folder or an id")] = None,
    as_json: Json = False,
):
    """Say what this machine has and what will not work on it; or which layers of a model adapters can stand on."""
    from hpo import show
    from hpo.doctor import examine

    if model is not None:
        from training.model import detect

        shape = detect(model)
        if as_json:
            print_json(show.model_record(shape))
        else:
            console().print(show.model_text(shape))
        return
    findings = examine()
    if as_json:
        print_json({f.name: {"ok": f.ok, "found": f.found, "remedy": f.remedy} for f in findings})
    else:
        console().print(show.doctor_text(findings))
    if not all(f.ok for f in findings if f.needed):
        raise typer.Exit(1)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise typer.BadParameter(f"{path} cannot be written ({error.strerror or error}).") from None


def main() -> None:
    """Runs the command line; turns what was raised on purpose into a message and an exit code."""
    warnings.simplefilter("ignore")  # libraries' advice to developers; a study's own warnings are in its report
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Read when transformers is imported: its bars and advice have no place beside our own progress.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    wants_json = "--json" in sys.argv
    try:
        code = app(standalone_mode=False) or 0  # the code of a typer.Exit, which typer makes of Ctrl-C too
    except (InputError, HpoError, typer.TyperException) as error:
        code = _explain(error, wants_json)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:
        say("Interrupted. The same command continues.")
    sys.exit(code)


def _explain(error: Exception, as_json: bool) -> int:
    """Prints an error for a person, or as JSON; returns the exit code."""
    if isinstance(error, InputError):
        problems = [{"where": p.where, "rule": p.rule, "remedy": p.remedy} for p in error.problems]
        if as_json:
            print_json({"error": {"code": "input", "problems": problems}})
        else:
            number = len(problems)
            say(f"{number} {'problem' if number == 1 else 'problems'}, nothing was started:")
            for problem in error.problems:
                say(f"  {problem}")
        return 2
    usage = isinstance(error, typer.TyperException)
    message = error.format_message() if usage else str(error)
    if as_json:
        print_json({"error": {"code": "usage" if usage else type(error).__name__, "message": message}})
    else:
        say(message)
    return 3 if isinstance(error, StudyBusy) else 2 if usage or isinstance(error, NotFound) else 1


if __name__ == "__main__":
    main()
