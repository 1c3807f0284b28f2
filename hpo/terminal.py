"""What all commands share: their common options, and the ways to say something."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="print one JSON object on standard output")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="override a field, for example --set budget.trials=30")]
Storage = Annotated[str | None, typer.Option(help="folder of the record; default HPO_STORAGE, else ~/paretune")]
Source = Annotated[str, typer.Argument(help="a bundled study (quickstart) or a file")]
Name = Annotated[str, typer.Argument(help="name of the study")]


def console():
    """Returns where texts for people go."""
    from rich.console import Console

    made = Console(highlight=False)
    # A narrow or absent terminal must not cut the front's numbers off: it wraps the lines itself.
    made.width = max(made.width, 120)
    return made


def pairs(items: list[str]) -> dict[str, Any]:
    """Returns what was typed as field=value, the values as YAML reads them."""
    from hpo.written import value_of

    found = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"must be field=value, got {item}")
        found[name] = value_of(text, name)
    return found


def say(text: str) -> None:
    """Says something beside the result, on standard error."""
    print(text, file=sys.stderr)


def print_json(value: Any) -> None:
    """Prints the result of a command as one line of JSON."""
    print(json.dumps(value, default=str))
