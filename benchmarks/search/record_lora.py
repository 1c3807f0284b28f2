"""Records the LoRA table: real runs on the embedded model, one per rank x alpha / rank x learning rate x batch size x seed.

    python -m benchmarks.search.record_lora [--quick] [--storage DIR]

900 runs, one process a core, each with a base that stays loaded; runs whose batch leaves the processor waiting are trained
several at a time (`training.host`). Each handful of 15 is appended to a file in --storage as it ends, and the same command goes
on with those that lack; the last step writes benchmarks/data/lora_table.json.gz. Seconds are those of the training steps alone:
measured where a run was alone, estimated by a short run alone where it was not. Readers take, for each rank and batch size, the
least of all runs of that shape (see problems.py).
"""

from __future__ import annotations

import gzip
import itertools
import json
import multiprocessing
import os
import sys
from pathlib import Path

from benchmarks import record
from benchmarks.search import race

AXES = {
    "rank": (2, 4, 8, 16, 32),
    "alpha": (1, 2, 4),  # times rank
    "learning_rate": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "batch_size": (4, 8, 16, 32),
}
SEEDS = (0, 1, 2)
LIMIT, EPOCHS, ROWS, REPORTS = 300, 2, 200, 6  # training rows, passes over them, validation rows, points of a curve
ROW_TOKENS = 35  # of a usual row, by which the seats are chosen
TABLE = Path(__file__).parents[1] / "data" / "lora_table.json.gz"
_kept: list = []  # of a process that trains: the base stays loaded until it ends


def main() -> None:
    options = record.arguments(__doc__.split("\n")[0])
    folder = Path(options.storage).absolute() / "lora"
    folder.mkdir(parents=True, exist_ok=True)
    journal = folder / ("runs-quick.jsonl" if options.quick else "runs.jsonl")
    runs = race.read(journal)
    done = {_key(run) for run in runs}
    wanted = [dict(zip((*AXES, "seed"), values, strict=True)) for values in itertools.product(*AXES.values(), SEEDS)]
    # Those of one batch size end about together, so they are the ones to train together.
    wanted.sort(key=_handful)
    wanted = [point for point in (wanted[:2] if options.quick else wanted) if _key(point) not in done]
    handfuls = [list(group) for _, group in itertools.groupby(wanted, key=_handful)]
    os.environ["OMP_NUM_THREADS"] = "1"
    with multiprocessing.get_context("spawn").Pool(race.CORES, _begin) as pool, journal.open("a") as file:
        for found in pool.imap_unordered(_train, [(handful, str(folder / "cache"), options.quick) for handful in handfuls]):
            file.writelines(json.dumps(run) + "\n" for run in found)
            file.flush()
            runs += found
            print(f"{len(runs)} of {len(done) + len(wanted)}: {[run['accuracy'] for run in found]}", file=sys.stderr, flush=True)
    if not options.quick:
        about = {"axes": AXES, "seeds": SEEDS, "training_rows": LIMIT, "epochs": EPOCHS, "validation_rows": ROWS,
                 "machine": record.machine(), "versions": record.versions(), "commit": record.commit()}  # fmt: skip
        TABLE.parent.mkdir(exist_ok=True)
        content = json.dumps(about | {"runs": sorted(runs, key=_key)}, separators=(",", ":")).encode()
        TABLE.write_bytes(gzip.compress(content, mtime=0))
    print(f"{len(runs)} runs; {TABLE if not options.quick else journal}")


def _key(run: dict) -> tuple:
    return tuple(run[name] for name in (*AXES, "seed"))


def _handful(point: dict) -> tuple:
    return point["seed"], point["learning_rate"], point["batch_size"]


def _begin() -> None:
    """Readies a process: one thread, and a base that stays loaded as long as it lives."""
    import torch

    from training import warm

    torch.set_num_threads(1)
    _kept.append(warm.keeping())
    _kept[0].__enter__()


def _train(asked: tuple[list[dict], str, bool]) -> list[dict]:
    """Returns the runs of some points, trained as many at a time as suits them."""
    from hpo import spec
    from training import loop
    from training.beside import seats
    from training.host import Host
    from training.model import describe
    from training.recipe import EvaluationConfig, Job, Recipe, Resources

    points, cache, quick = asked
    study = spec.load("quickstart").spec
    curves: list[list] = [[] for _ in points]

    def job(point: dict) -> Job:
        values = point | {"alpha": point["alpha"] * point["rank"], "epochs": 0.2 if quick else EPOCHS}
        return Job(
            recipe=Recipe(**(study.recipe.model_dump() | values)), data=study.data.model_copy(update={"limit": LIMIT}),
            evaluation=EvaluationConfig(rows=20 if quick else ROWS, reports=REPORTS), cache=cache,
        )  # fmt: skip

    def report(number: int):
        return lambda progress: curves[number].append(progress) if "accuracy" in progress.metrics else None

    jobs = [job(point) for point in points]
    chosen = seats(jobs[0].recipe, describe(jobs[0].recipe.model), ROW_TOKENS, Resources(cpus=1))
    outcomes = {}
    if chosen.count == 1:
        outcomes = {number: loop.train(one, report(number)) for number, one in enumerate(jobs)}
    else:
        host, waiting = Host(chosen.count), list(enumerate(jobs))
        while waiting or host.names:
            while waiting and host.free:
                number, one = waiting.pop(0)
                if ended := host.enter(str(number), one, report(number)):
                    outcomes[number] = ended
            outcomes |= {int(name): outcome for name, outcome in host.tick()}
        host.close()
    return [_run(point, outcomes[number], curves[number]) for number, point in enumerate(points)]


def _run(point: dict, outcome, curve: list) -> dict:
    return point | {
        "ended": outcome.ended, "accuracy": outcome.scores.get("accuracy"), "loss": outcome.loss, "seconds": outcome.seconds,
        "peak_bytes": outcome.peak_bytes, "tokens": outcome.tokens, "packed": outcome.conditions.get("seats", 1),
        "curve": [[round(p.share, 4), p.tokens, round(p.seconds, 4), p.metrics["accuracy"], round(p.metrics["loss"], 5)]
                  for p in curve],
    }  # fmt: skip


if __name__ == "__main__":
    main()
