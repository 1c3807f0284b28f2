"""How large a study may be: ten thousand simulated trials, the memory they take, and how long it takes to list them.

Owns: `measure`.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from hpo import store as tables
from hpo.simulator import closed_form, simulate
from hpo.spec import load
from hpo.store import Store
from hpo.study import Study
from training import simulate as training

TRIALS = 10_000


def measure(quick: bool, storage: Path) -> dict[str, Any]:
    """Returns seconds for the whole study, memory it added per thousand trials, and seconds to list it from SQLite."""
    count = 300 if quick else TRIALS
    with tempfile.TemporaryDirectory() as folder:
        written = {
            "name": "large", "storage": folder, "data": {"train": "embedded:train.jsonl"}, "algorithm": "random",
            "space": {"learning_rate": {"type": "float", "low": 1e-5, "high": 1e-2, "log": True},
                      "rank": {"type": "choice", "values": [4, 8, 16, 32]}},
            "stopping": "front", "train": "simulated", "resources": {"mode": "local"}, "budget": {"trials": count},
        }  # fmt: skip
        loaded = load(written)
        before, began = _resident(), time.perf_counter()
        made = simulate(loaded.spec, closed_form(loaded.spec, training.train), slots=8, curves=False)
        took, grown = time.perf_counter() - began, _resident() - before
        store = Store(f"sqlite:///{folder}/hpo.db")
        record = store.add_study(loaded.spec, loaded.written, "")
        rows = [{"study": record.id, "number": t.number, "state": t.state, "trial": t.model_dump_json(exclude={"curve"})}
                for t in made.trials]  # fmt: skip
        with store._begin() as db:  # one by one they would be ten thousand transactions
            db.execute(tables._trials.insert(), rows)
        since = time.perf_counter()
        store.studies()
        listed = time.perf_counter() - since
        since = time.perf_counter()
        Study(store, "large").history()
        read = time.perf_counter() - since
        store.close()
    return {
        "scale_trials": len(made.trials), "scale_seconds": round(took, 1), "scale_list_seconds": round(listed, 3),
        "scale_history_seconds": round(read, 3), "scale_megabytes": round(grown / 1e6, 1),
        "scale_kilobytes_per_trial": round(grown / 1e3 / len(made.trials), 1),
    }  # fmt: skip


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
