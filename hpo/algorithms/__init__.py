"""Which point is next: one file per search algorithm, each a pure function of the history.

Owns: finding an algorithm by name, and checking options against its signature.
Must not know: any algorithm in particular, stores, Ray. Importing this package imports neither optuna nor pymoo.

Every public file in this folder is an algorithm and has

    suggest(space, objectives, history, rng, *, <options>) -> Params | None

`history` is every trial of the study by number, running ones included. The answer is a point of the space that is in no
trial of the history, or None when nothing is left. All randomness comes from `rng`, nothing is kept between calls, and
the history is not changed, so a study that was interrupted goes on as if it had not been. Options are keyword-only; the
annotation holds the type and the range, the default is what a study gets that does not name the option. A file that
begins with an underscore is shared by algorithms and is none itself.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import typing
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from hpo.errors import NotFound, nearest
from hpo.space import Params

Suggest = Callable[..., Params | None]


def names() -> list[str]:
    """Returns the names of all algorithms in this folder, sorted."""
    return sorted(found.name for found in pkgutil.iter_modules(__path__) if not found.name.startswith("_"))


def load(name: str) -> Suggest:
    """Returns the `suggest` of an algorithm.

    Raises:
        NotFound: there is no algorithm of this name.
    """
    if name not in names():
        raise NotFound(f"no algorithm {name!r}. {nearest(name, names())}There are {', '.join(names())}.")
    return importlib.import_module(f"{__name__}.{name}").suggest


def defaults(name: str) -> dict[str, Any]:
    """Returns the options of an algorithm with their defaults.

    Raises:
        NotFound: there is no algorithm of this name.
    """
    parameters = inspect.signature(load(name)).parameters
    return {option: parameters[option].default for option in _options(name)}


def check_options(name: str, options: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns (option, what is wrong) for options that the algorithm does not have, of a wrong type or out of range.

    Raises:
        NotFound: there is no algorithm of this name.
    """
    allowed = _options(name)
    found = []
    for option, value in options.items():
        if option not in allowed:
            known = f"its options are {', '.join(allowed)}" if allowed else "it has none"
            found.append((option, f"is not an option of {name}. {nearest(option, allowed)}{known[0].upper()}{known[1:]}"))
            continue
        try:
            allowed[option].validate_python(value, strict=True)  # strict: a boolean or "5" is no number
        except ValidationError as error:
            said = error.errors()[0]["msg"].replace("Input should be", "must be").replace("a valid integer", "an integer")
            found.append((option, f"{said}, got {value!r}"))
    return found


def require(name: str, **options: Any) -> None:
    """Raises ValueError with the rule and the value unless the options are legal; `suggest` calls it on its own."""
    wrong = check_options(name, options)
    if wrong:
        raise ValueError("; ".join(f"{option} {problem}" for option, problem in wrong))


@functools.cache
def _options(name: str) -> dict[str, TypeAdapter]:
    suggest = load(name)
    hints = typing.get_type_hints(suggest, include_extras=True)
    parameters = inspect.signature(suggest).parameters.values()
    return {p.name: TypeAdapter(hints[p.name]) for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
