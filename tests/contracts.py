"""What several tests share: studies that run in milliseconds, and the command line in this process."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hpo import cli
from hpo.search import Search
from hpo.spec import load
from hpo.store import Store

SPACE = {
    "rank": {"type": "choice", "values": [4, 8, 16, 32]},
    "learning_rate": {"type": "float", "low": 1e-4, "high": 3e-2, "log": True},
    "batch_size": {"type": "choice", "values": [4, 8, 16]},
}


def simulated(storage: Any, **changes: Any) -> dict[str, Any]:
    """Returns a study as a user writes it, whose trials are a closed form: no Ray, no model."""
    study = {
        "name": "small", "storage": str(storage), "data": {"train": "embedded:train.jsonl"}, "space": SPACE,
        "algorithm": "random", "budget": {"trials": 4}, "resources": {"mode": "local"}, "train": "simulated",
    }  # fmt: skip
    return study | changes


@contextmanager
def searching(store: Store, written: dict[str, Any], **options: Any) -> Iterator[Search]:
    """Yields a Search of a study in a store, held by this process; options go to Search."""
    loaded = load(written)
    record = store.add_study(loaded.spec, loaded.written, "")
    with store.hold(record.id) as holder:
        yield Search(store, record, holder, **options)


def command(capsys: Any, *arguments: Any) -> tuple[int, str, str]:
    """Returns exit code, standard output and standard error of `hpo ARGUMENTS`, run in this process."""
    before = sys.argv
    sys.argv = ["hpo", *map(str, arguments)]
    capsys.readouterr()
    try:
        with warnings.catch_warnings():
            cli.main()
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = before
    said = capsys.readouterr()
    return code, said.out, said.err


def one_object(out: str) -> dict[str, Any]:
    """Returns the only thing on standard output, a JSON object on one line."""
    assert out.count("\n") == 1, out
    found = json.loads(out)
    assert isinstance(found, dict)
    return found
