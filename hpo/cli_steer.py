"""The command line's orders to a running study: `hpo steer`. Each is one call on the library; nothing is decided here."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated, Any

import typer

from hpo.terminal import Json, Name, Storage, console, pairs, print_json, say


def steer(
    name: Name,
    what: Annotated[str | None, typer.Argument(help="add, clone, stop, range, budget; nothing: list the orders")] = None,
    values: Annotated[list[str] | None, typer.Argument(help="field=value ...; of clone and stop the trial's number first; "
                                                       "of range the field and its ends or values")] = None,
    storage: Storage = None,
    as_json: Json = False,
):  # fmt: skip
    """Steer a running study: `add rank=16`, `clone 3 rank=32`, `stop 5`, `range learning_rate 1e-4 1e-2`, `budget trials=40`.

    The run follows an order at its next trial or report; where none runs, the next one does.
    """
    from hpo.study import open_study

    study = open_study(name, storage=storage)
    if what is None:
        given = study.steer.orders()
        print_json({"orders": [_record(order) for order in given]}) if as_json else console().print(_table(given))
        return
    if what not in ORDERS:
        raise typer.BadParameter(f"must be {', '.join(ORDERS)}, got {what}")
    order = ORDERS[what](study.steer, values or [])
    if as_json:
        print_json(_record(order))
    else:
        say(f"Ordered: {order}. " + ("The run follows it at its next trial or report." if study.running() else
                                     f"No process runs {name}; its next run follows it."))  # fmt: skip


def _number(values: list[str], what: str) -> int:
    if not values or not values[0].isdigit():
        raise typer.BadParameter(f"{what} needs a trial's number, got {values[0] if values else 'nothing'}")
    return int(values[0])


def _range(steer: Any, values: list[str]):
    from hpo.written import value_of

    if len(values) < 2:
        raise typer.BadParameter("range needs a field and its ends, for example range learning_rate 1e-4 1e-2")
    return steer.range(values[0], *(value_of(text, values[0]) for text in values[1:]))


ORDERS: dict[str, Callable[[Any, list[str]], Any]] = {
    "add": lambda steer, values: steer.add(**pairs(values)),
    "clone": lambda steer, values: steer.clone(_number(values, "clone"), **pairs(values[1:])),
    "stop": lambda steer, values: steer.stop(_number(values, "stop")),
    "range": _range,
    "budget": lambda steer, values: steer.budget(**pairs(values)),
}


def _record(order: Any) -> dict[str, Any]:
    return {"id": order.id, "at": order.at, "do": order.do, **order.data, "trial": order.trial, "refused": order.refused}


def _table(given: list):
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    for head in ("when", "order", "what became of it"):
        table.add_column(head)
    for order in given:
        became = f"refused: {order.refused}" if order.refused else "waits" if order.waits else f"from trial {order.trial} on"
        if order.trial is not None and order.do in ("add", "clone"):
            became = f"trial {order.trial}"
        table.add_row(time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(order.at)), escape(str(order)), escape(became))
    return table if given else "No orders yet."
