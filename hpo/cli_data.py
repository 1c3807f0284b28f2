"""The command line's look at data: `hpo data`. One call on the library; nothing is decided here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hpo.terminal import Json, console, print_json

if TYPE_CHECKING:
    from training.quality import Quality


def data(
    file: Annotated[str, typer.Argument(help="rows (a file, a folder, hub:OWNER/NAME), or a study file")],
    model: Annotated[str | None, typer.Option(help="counts tokens: `embedded`, a folder or a Hugging Face id")] = None,
    as_json: Json = False,
):
    """Look at rows before anything is trained on them: what is wrong, what stands on two sides, how long they are."""
    from hpo import draft, spec
    from training import quality
    from training.model import load_tokenizer
    from training.recipe import Clean, Recipe

    recipe, limit = Recipe(model=model or "embedded"), None
    if Path(file).suffix.lower() in (".yaml", ".yml"):
        study = spec.load(file).spec
        config, limit = study.data, study.recipe.max_length
        recipe = study.recipe if model is None else recipe
        model = recipe.model
    else:
        config, _ = draft.guess(file, quality.lenient(Clean()))
        config = config.model_copy(update={"clean": Clean()})
    found = quality.examine(config, tokenizer=load_tokenizer(recipe) if model else None, max_length=limit)
    if as_json:
        print_json(found.model_dump(mode="json") | {"refused": found.refused})
    else:
        console().print(_text(found))
    if found.refused:
        raise typer.Exit(2)


def _text(found: Quality):
    from rich import box
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    sides = Table(box=box.SIMPLE, title=f"task {found.task}", title_justify="left")
    for name in ("split", "rows", "answers", "characters: median", "95 %", "longest", "tokens: median", "95 %", "longest", "cut"):
        sides.add_column(name, justify="right")
    for name, side in found.splits.items():
        cells = [side.rows, side.answers]
        for lengths in (side.characters, side.tokens):
            cells += [lengths.median, lengths.p95, lengths.largest] if lengths else ["-"] * 3
        cells.append("-" if side.too_long is None else side.too_long)
        sides.add_row(name, *(f"{cell:,g}" if isinstance(cell, (int, float)) else cell for cell in cells))
    problems = Table(box=box.SIMPLE, title="Found", title_justify="left")
    for name in ("what", "rows", "of", "so it is", "where"):
        problems.add_column(name, justify="right" if name == "rows" else "left", overflow="fold")
    done = {"keep": "kept", "drop": "left out", "error": "refused"}
    for one in found.findings:
        more = ", ..." if one.count > len(one.places) else ""
        problems.add_row(
            one.kind, f"{one.count:,}", one.split, done[one.action], escape(f"{', '.join(one.places)}{more}: {one.what}")
        )
    end = "A study with these rows is refused; data.clean says what else may happen." if found.refused else ""
    return Group(sides, problems if found.findings else "Nothing is wrong with the rows.", *map(escape, found.notes), end)
