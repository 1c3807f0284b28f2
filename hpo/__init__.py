"""Paretune in a notebook: `import hpo`.

    study = hpo.run("quickstart")        # or hpo.start(...), which returns at once
    study.front(), study.trials(), study.winner(), study.plot()

Importing this loads no heavy library; each is loaded by what needs it.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpo.proxy import transfer
    from hpo.study import Study, open_study, run, start

__version__ = "0.1.0"
__all__ = ["Study", "open_study", "run", "start", "transfer"]


def _check_not_shadowed() -> None:
    # The folders that users are asked for are the packages; a user's own training/ next to a notebook would hide ours.
    for name, file in {"training": "recipe.py", "serving": "endpoint.py", "search_spaces": "lora.yaml"}.items():
        found = importlib.util.find_spec(name)
        where = [Path(p) for p in (found.submodule_search_locations or [])] if found else []
        if not any((p / file).is_file() for p in where):
            shown = where[0] if where else "nowhere"
            raise ImportError(
                f"hpo needs its own package {name!r}, but Python finds {shown}. Rename that folder, or start Python elsewhere."
            )


_check_not_shadowed()


def __getattr__(name: str):
    if name in __all__:
        return getattr(importlib.import_module("hpo.proxy" if name == "transfer" else "hpo.study"), name)
    raise AttributeError(f"module 'hpo' has no attribute {name!r}")
