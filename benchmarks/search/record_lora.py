"""Records the LoRA table: real runs on the embedded model, one per rank x alpha / rank x learning rate x batch size x seed.

    python -m benchmarks.search.record_lora [--quick] [--storage DIR]

About 6 s a run on one quiet core, 240 runs. Every run is appended to a file in --storage as it ends, and the same command goes
on with those that lack; the last step writes benchmarks/data/lora_table.json.gz. Seconds are wall-clock ones of a machine that
may have been busy: readers take, for each rank and batch size, the least of all runs of that shape (see problems.py).
"""

from __future__ import annotations

import gzip
import itertools
import json
import random
import sys
from pathlib import Path

from benchmarks import record
from benchmarks.search import race

AXES = {
    "rank": (2, 8, 32),
    "alpha": (1, 4),  # times rank
    "learning_rate": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "batch_size": (4, 8, 16, 32),
}
SEEDS = (0, 1)
LIMIT, EPOCHS, ROWS, REPORTS = 300, 2, 200, 6  # training rows, passes over them, validation rows, points of a curve
TABLE = Path(__file__).parents[1] / "data" / "lora_table.json.gz"


def main() -> None:
    options = record.arguments(__doc__.split("\n")[0])
    folder = Path(options.storage).absolute() / "lora"
    folder.mkdir(parents=True, exist_ok=True)
    journal = folder / ("runs-quick.jsonl" if options.quick else "runs.jsonl")
    runs = race.read(journal)
    done = {_key(run) for run in runs}
    wanted = [dict(zip((*AXES, "seed"), values, strict=True)) for values in itertools.product(*AXES.values(), SEEDS)]
    random.Random(0).shuffle(wanted)  # what disturbs the machine for a while is not all of one rank
    wanted.sort(key=lambda point: point["seed"])
    for point in wanted[:2] if options.quick else wanted:
        if _key(point) not in done:
            runs.append(point | _train(point, str(folder / "cache"), quick=options.quick))
            with journal.open("a") as file:
                file.write(json.dumps(runs[-1]) + "\n")
            print(f"{len(runs)}/{len(wanted)} {runs[-1]['ended']} {runs[-1]['accuracy']}", file=sys.stderr, flush=True)
    if not options.quick:
        about = {"axes": AXES, "seeds": SEEDS, "training_rows": LIMIT, "epochs": EPOCHS, "validation_rows": ROWS,
                 "machine": record.machine(), "versions": record.versions(), "commit": record.commit()}  # fmt: skip
        TABLE.parent.mkdir(exist_ok=True)
        content = json.dumps(about | {"runs": sorted(runs, key=_key)}, separators=(",", ":")).encode()
        TABLE.write_bytes(gzip.compress(content, mtime=0))
    print(f"{len(runs)} runs; {TABLE if not options.quick else journal}")


def _key(run: dict) -> tuple:
    return tuple(run[name] for name in (*AXES, "seed"))


def _train(point: dict, cache: str, *, quick: bool) -> dict:
    from hpo import spec
    from training.loop import train
    from training.recipe import EvaluationConfig, Job, Recipe

    study = spec.load("quickstart").spec
    values = point | {"alpha": point["alpha"] * point["rank"], "epochs": 0.2 if quick else EPOCHS}
    curve = []
    outcome = train(
        Job(
            recipe=Recipe(**(study.recipe.model_dump() | values)), data=study.data.model_copy(update={"limit": LIMIT}),
            evaluation=EvaluationConfig(rows=20 if quick else ROWS, reports=REPORTS), cache=cache,
        ),
        lambda progress: curve.append(progress) if "accuracy" in progress.metrics else None,
    )  # fmt: skip
    points = [
        [round(p.share, 4), p.tokens, round(p.seconds, 4), p.metrics["accuracy"], round(p.metrics["loss"], 5)] for p in curve
    ]
    return {"ended": outcome.ended, "accuracy": outcome.scores.get("accuracy"), "loss": outcome.loss, "seconds": outcome.seconds,
            "peak_bytes": outcome.peak_bytes, "tokens": outcome.tokens, "curve": points}  # fmt: skip


if __name__ == "__main__":
    main()
