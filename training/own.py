"""What a user brings along: a metric, a task, a method, a train function.

Owns: `load`, from its name to the thing itself, and the things that were arguments (`given`). Must not know: what they are for.

A name is `module:attribute`, found on the import path of whatever process needs it, or `given:NAME`, an argument of `hpo.run`,
which is pickled to the workers beside their job. A study's record holds names alone.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from training.errors import wrong

NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
GIVEN = "given"
_given: ContextVar[Mapping[str, Any]] = ContextVar("given", default={})  # noqa: B039, never changed in place


def is_own(name: str) -> bool:
    """Says whether a name is that of something a user brings along."""
    return NAME.fullmatch(name) is not None


def short(name: str) -> str:
    """Returns the part after the colon: what a score or a method is called."""
    return name.partition(":")[2]


@contextmanager
def given(things: Mapping[str, Any] | None) -> Iterator[None]:
    """Makes arguments known as `given:NAME` in this thread while the block runs."""
    token = _given.set({**_given.get(), **(things or {})})
    try:
        yield
    finally:
        _given.reset(token)


def now() -> dict[str, Any]:
    """Returns the arguments known here, to be handed to another process."""
    return dict(_given.get())


def load(name: str, where: str) -> Any:
    """Returns what a name stands for.

    Args:
        name: `module:attribute` or `given:NAME`.
        where: the field that named it, for errors.

    Raises:
        InputError: it is not there, or its module raised while it was imported.
    """
    module, _, attribute = name.partition(":")
    if module == GIVEN:
        if attribute not in _given.get():
            raise wrong(where, f"{name} is an argument of hpo.run, and it was not given this time.",
                        f"Call hpo.run(...) with {attribute!r} again, or name it as module:{attribute}.")  # fmt: skip
        return _given.get()[attribute]
    try:
        found = importlib.import_module(module)
    except Exception as error:  # whatever a module of the user's raises when it is imported
        raise wrong(where, f"{name}: {module} cannot be imported ({type(error).__name__}: {error}).",
                    "Put the folder that holds it on PYTHONPATH, on every node.") from None  # fmt: skip
    if not hasattr(found, attribute):
        raise wrong(where, f"{name}: {module} has no {attribute}.", "Name one of its functions or values.")
    return getattr(found, attribute)
