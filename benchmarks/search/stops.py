"""Whether an early stop frees its worker group at once, on a real Ray cluster, with Ray's dashboard and without.

    python -m benchmarks.search.stops [--quick] [--storage DIR]

Twenty stops of fresh groups of two workers and two hundred of the lightest worker group there is (one worker with a hundredth of
a CPU), each with the dashboard and without. A trial reports until it is told to end; the rule `fixed` ends all but the first.
Counted are seconds from the decision until the group is removed, groups and cleaners that are left, and studies that hang.
Finished parts are kept in --storage; the same command goes on with the next. Each part has a cluster and a process of its own.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks import record

KINDS = {
    "two workers": (20, {"workers": 2, "cpus": 1, "mode": "fresh"}),
    "lightest": (200, {"workers": 1, "cpus": 0.01, "mode": "fresh"}),
}
QUICK = 2
PATIENCE = 120.0  # seconds per stop after which a study counts as hanging
LOOK = 0.1
CLEANED = 60.0  # seconds after which a cleaner counts as left


def trial(job, report):
    """A train function that is worse and slower with each number, and reports until it is told to end."""
    from training.recipe import Outcome, Progress

    number = int(Path(job.output).name)
    seconds, steps = 1.0 + number, 20 if number == 0 else 600
    for step in range(1, steps + 1):
        share = step / steps
        metrics = {"accuracy": 0.9 / (1 + number)}
        if reason := report(Progress(step=step, steps=steps, tokens=step, share=share, seconds=seconds * share, metrics=metrics)):
            return Outcome(ended="stopped", reason=reason, share=share, scores=metrics, seconds=seconds * share)
        time.sleep(0.05)
    return Outcome(scores=metrics, seconds=seconds, peak_bytes=1)


def part(kind: str, dashboard: bool, stops: int, each: dict[str, Any], folder: str, out: str) -> None:
    """Runs one study in this process and writes what was seen of it."""
    from ray import cloudpickle

    from hpo import spec as specs
    from hpo import tune
    from hpo.search import Search
    from hpo.store import open_store

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    loaded = specs.load({
        "name": "stops", "storage": folder, "data": {"train": "embedded:train.jsonl"}, "objectives": ["accuracy", "seconds"],
        "space": {"learning_rate": {"type": "float", "low": 1e-5, "high": 1e-2, "log": True}}, "algorithm": "random",
        "stopping": {"name": "fixed", "share": 0.01}, "budget": {"trials": stops + 1}, "resources": each,
    })  # fmt: skip
    with tune.connect(dashboard=dashboard):
        store = open_store(folder)
        kept = store.add_study(loaded.spec, loaded.written, "")
        watch = _Watch()
        with store.hold(kept.id) as holder:
            search = Search(store, kept, holder)
            began = time.monotonic()
            tune.run_search(search, loaded.spec.data, parallel=1, train=trial, on_change=watch.see)
            took = time.monotonic() - began
        found = watch.ended() | {"states": [t.state for t in search.trials], "seconds_per_trial": round(took / (stops + 1), 2)}
    Path(out).write_text(json.dumps(found))


class _Watch:
    """Looks at the cluster's placement groups in a thread of its own."""

    def __init__(self):
        self.decided: dict[int, float] = {}
        self.seen: dict[str, list[float | None]] = {}  # group -> when it was first and when it was no longer there
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def see(self, search) -> None:
        for number in search._watch.behind:
            self.decided.setdefault(number, time.monotonic())

    def _look(self) -> None:
        from ray.util import placement_group_table

        while not self._over.wait(LOOK):
            now = time.monotonic()
            for name, group in placement_group_table().items():
                times = self.seen.setdefault(name, [now, None])
                if group["state"] == "REMOVED" and times[1] is None:
                    times[1] = now

    def ended(self) -> dict[str, Any]:
        """Returns what was seen, a moment after the study ended."""
        import ray
        from ray.util import placement_group_table

        ended = time.monotonic()
        while (left := _cleaners()) and time.monotonic() < ended + CLEANED:
            time.sleep(LOOK)
        gone = None if left else round(time.monotonic() - ended, 1)
        self._over.set()
        self._thread.join()
        back = []
        for at in self.decided.values():
            mine = max((t for t in self.seen.values() if t[0] <= at), key=lambda t: t[0], default=None)
            back.append(round(mine[1] - at, 2) if mine and mine[1] is not None else None)
        groups = [g["state"] for g in placement_group_table().values() if g["state"] != "REMOVED"]
        free = ray.available_resources().get("CPU", 0) == ray.cluster_resources()["CPU"]
        return {"back": back, "groups_left": len(groups), "cleaners_left": left, "cleaners_gone_seconds": gone,
                "all_free": free}  # fmt: skip


def _cleaners() -> int:
    import psutil

    return sum("cleaner" in process.name().lower() for process in psutil.Process().children(recursive=True))


def measure(quick: bool, storage: Path) -> dict[str, Any]:
    """Returns of each kind of group, with the dashboard and without: seconds until it is free, what is left, what hangs."""
    storage.mkdir(parents=True, exist_ok=True)
    found = {}
    for kind, (count, each) in KINDS.items():
        for dashboard in (False, True):
            name, stops = f"{kind}, dashboard {'on' if dashboard else 'off'}", QUICK if quick else count
            out = storage / f"stops-{kind.replace(' ', '-')}-{dashboard}-{stops}.json"
            if not out.is_file():
                print(f"{name} ...", file=sys.stderr, flush=True)
                _one(kind, dashboard, stops, each, out)
            found[name] = _summary(json.loads(out.read_text()) if out.is_file() else None, stops)
            if quick:
                out.unlink(missing_ok=True)
    return {"stops": found}


def _one(kind: str, dashboard: bool, stops: int, each: dict[str, Any], out: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="pt-stops-", ignore_cleanup_errors=True) as folder:
        # Not a daemon: it has children of its own.
        work = multiprocessing.get_context("spawn").Process(target=part, args=(kind, dashboard, stops, each, folder, str(out)))
        work.start()
        work.join(PATIENCE * (stops + 1))
        if work.is_alive():
            work.kill()
            work.join()


def _summary(found: dict[str, Any] | None, stops: int) -> dict[str, Any]:
    if found is None:
        return {"hangs": True, "stops": stops}
    back = sorted(value for value in found["back"] if value is not None)
    return {
        "hangs": False, "stops": len(found["back"]), "stopped": found["states"].count("stopped"),
        "back_seconds_median": back[len(back) // 2] if back else None,
        "back_seconds_p95": back[max(0, -(-95 * len(back) // 100) - 1)] if back else None,
        "never_back": found["back"].count(None),
        "groups_left": found["groups_left"], "cleaners_left": found["cleaners_left"],
        "cleaners_gone_seconds": found["cleaners_gone_seconds"], "all_free": found["all_free"],
        "seconds_per_trial": found["seconds_per_trial"],
    }  # fmt: skip


def main() -> None:
    options = record.arguments(__doc__.split("\n")[0])
    found = measure(options.quick, Path(options.storage).absolute() / "stops")
    for name, said in found["stops"].items():
        print(name, said)
    record.finish("stops", found, quick=options.quick)


if __name__ == "__main__":
    main()
