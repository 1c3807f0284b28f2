"""A study of short trials, whole: ours against Ray Tune with Hugging Face's Trainer and PEFT in each trial.

    python -m benchmarks.study [--quick]

Sixteen trials on the CPUs of this machine, rows, recipes and final losses alike. The peer runs as people write it (a function
per trial) and tuned (actors reused, libraries and rows loaded once, the concurrency of this machine). Cluster and groups are up
before either is timed; what that takes is reported beside. Then what a trial costs besides its training (alone in a warm group,
and through Tune at 1 and 8 seats), the share of 60 s trials that is not the trial, a thousand early stops, and how far the
seconds and bytes told of packed trials are from those of the same trials alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from benchmarks import record

TRIALS, ROUNDS = 16, 5
DATA = {"train": "embedded:train.jsonl", "validation": "embedded:validation.jsonl", "test": "embedded:test.jsonl",
        "template": "{instruction}\nAnswer:"}  # fmt: skip
RANKS, RATES, BATCHES = (4, 8, 16, 32), (5e-4, 1e-3, 2e-3, 4e-3), (1, 2, 2, 4)


def points(count: int) -> list[dict[str, Any]]:
    """Returns the recipes of the trials, as far as they differ."""
    return [{"rank": RANKS[i % 4], "alpha": 2.0 * RANKS[i % 4], "learning_rate": RATES[i // 4 % 4], "batch_size": BATCHES[i % 4]}
            for i in range(count)]  # fmt: skip


def recipe_of(point: dict[str, Any], steps: int):
    """Returns the recipe of a point."""
    from training.recipe import Recipe

    return Recipe(model="embedded", max_length=128, dropout=0.0, steps=steps, **point)


# The peer


def peer_trial(config: dict, kept: dict | None = None) -> float:
    """Trains one recipe as practitioners do, and returns its loss on the held-out rows."""
    import torch

    torch.set_num_threads(1)
    from benchmarks.training import peer
    from training import data, evaluate
    from training.model import load_tokenizer
    from training.recipe import DataConfig
    from training.schedule import plan

    recipe = recipe_of(config["point"], config["steps"])
    kept = {} if kept is None else kept
    if "rows" not in kept:
        given = DataConfig(**DATA)
        kept["rows"] = data.prepare(data.read(given), given, load_tokenizer(recipe), recipe.max_length)
    rows = kept["rows"]
    _, model = peer.theirs(recipe, rows.train, plan(recipe, rows.train, workers=1), grouped=False, warm=1)
    held_out = data.sample(rows.validation, config["rows"], seed=0)
    nll, tokens, _ = evaluate.response_scores(model, held_out.ids, held_out.prompt_lengths, batch_size=32)
    return sum(nll) / sum(tokens)


def peer_study(count: int, steps: int, rows: int, *, tuned: bool, parallel: int) -> tuple[float, list[float]]:
    """Returns the seconds of the peer's whole study, and the final losses in the order of the points."""
    from ray import tune

    def function(config):
        tune.report({"loss": peer_trial(config["trial"])})

    class Reused(tune.Trainable):
        def setup(self, config):
            self.given, self.kept = config, {}

        def reset_config(self, new_config):
            self.given = new_config
            return True

        def step(self):
            return {"loss": peer_trial(self.given["trial"], self.kept), "done": True}

        def save_checkpoint(self, checkpoint_dir):
            return None

        def load_checkpoint(self, checkpoint):
            pass

    grid = [{"number": i, "point": point, "steps": steps, "rows": rows} for i, point in enumerate(points(count))]
    tuner = tune.Tuner(
        # Our groups hold the CPUs, idle, while the peer runs; the number of its trials at a time is bounded below.
        tune.with_resources(Reused if tuned else function, {"cpu": 0, "node:__internal_head__": 0.001}),
        param_space={"trial": tune.grid_search(grid)},
        tune_config=tune.TuneConfig(max_concurrent_trials=parallel, reuse_actors=tuned),
        run_config=tune.RunConfig(verbose=0),
    )
    since = time.perf_counter()
    results = tuner.fit()
    took = time.perf_counter() - since
    found = {result.config["trial"]["number"]: result.metrics["loss"] for result in results}
    return took, [found[i] for i in range(count)]


# Ours


@contextlib.contextmanager
def our_groups(storage: Path, size: int, *, seats: int = 1, cpus: float = 1, train: Callable | None = None) -> Iterator[Any]:
    """Yields warm groups that are up."""
    from hpo import tune
    from training.recipe import Resources

    name = f"bench-{time.time_ns()}"
    resources = Resources(cpus=cpus, mode="packed" if seats > 1 else "warm")
    with tune.groups_of(name, resources, size, storage=str(storage / name), ahead=size, seats=seats, train=train) as groups:
        until_up(groups, size)
        yield groups


def until_up(groups, size: int) -> None:
    """Waits until so many warm groups are up; one that has had nothing to do for a minute has gone home."""
    up: set[int] = set()
    while len(up) < size:
        with ThreadPoolExecutor(size) as pool:
            names = [f"up-{i}-{time.time_ns()}" for i in range(size)]
            up = set(pool.map(lambda name: groups.call("benchmarks.study.rest", {"seconds": 0.5}, name), names))


def rest(seconds: float) -> int:
    """Waits, and returns which process has waited."""
    time.sleep(seconds)
    return os.getpid()


def our_study(storage: Path, name: str, count: int, steps: int, rows: int, groups, *, parallel: int, train=None) -> tuple:
    """Returns the seconds of our whole study, and its trials."""
    from hpo import spec as specs
    from hpo import tune
    from hpo.search import Search
    from hpo.store import open_store

    written = {
        "name": name, "storage": str(storage), "data": DATA, "algorithm": "random",
        "objectives": ["loss", "seconds", "peak_bytes"],
        "recipe": {"model": "embedded", "max_length": 128, "dropout": 0.0, "steps": steps, **points(1)[0]},
        "space": {"rank": {"type": "choice", "values": [2, *RANKS]},
                  "alpha": {"type": "choice", "values": [1.0, 8.0, 16.0, 32.0, 64.0]},
                  "learning_rate": {"type": "float", "low": 1e-4, "high": 1e-2, "log": True},
                  "batch_size": {"type": "choice", "values": [1, 2, 4]}},
        "start": points(count)[1:], "budget": {"trials": count, "parallel": parallel}, "keep": "none",
        "evaluation": {"rows": rows, "reports": 1},
    }  # fmt: skip
    loaded = specs.load(written)
    store = open_store(loaded.spec.storage)
    record_ = store.add_study(loaded.spec, loaded.written, "")
    with store.hold(record_.id) as holder:
        search = Search(store, record_, holder)
        since = time.perf_counter()
        tune.run_search(search, loaded.spec.data, parallel=parallel, groups=groups, train=train)
        took = time.perf_counter() - since
    trials = store.trials(record_.id)
    bad = [t for t in trials if t.state != "complete"]
    if bad:
        raise RuntimeError(f"trial {bad[0].number} ended {bad[0].state}: {bad[0].error}")
    return took, trials


def compare(storage: Path, count: int, steps: int, rows: int, rounds: int) -> dict[str, Any]:
    """Returns trials per hour of ours against the peer's, interleaved, every round all three."""
    cores = len(os.sched_getaffinity(0))
    took: dict[str, list[float]] = {"default": [], "tuned": [], "warm": [], "packed": []}
    losses, since = {}, time.perf_counter()
    # Groups of both kinds are there at once, and idle while others work; half a CPU each is what they hold, not what they use.
    with our_groups(storage, cores, cpus=0.5) as warm, our_groups(storage, cores, cpus=0.5, seats=4) as packed:
        up = (time.perf_counter() - since) / 2
        for number in range(rounds):
            for kind, groups, parallel in (("warm", warm, cores), ("packed", packed, 4 * cores)):
                until_up(groups, cores)
                name = f"{kind}-{number}-{time.time_ns()}"
                seconds, trials = our_study(storage, name, count, steps, rows, groups, parallel=parallel)
                took[kind].append(seconds)
                losses[kind] = [t.outcome.loss for t in trials]
            for kind in ("tuned", "default"):
                seconds, losses[kind] = peer_study(count, steps, rows, tuned=kind == "tuned", parallel=cores)
                took[kind].append(seconds)
    gaps = [abs(a - b) / b for kind in ("warm", "packed") for a, b in zip(losses[kind], losses["tuned"], strict=True)]
    best = "packed" if statistics.median(took["packed"]) < statistics.median(took["warm"]) else "warm"
    ratio = {kind: statistics.median(a / b for a, b in zip(took[kind], took[best], strict=True)) for kind in took}
    steady = max(took["tuned"]) / min(took["tuned"])
    return {
        "vs_tuned": round(ratio["tuned"], 2), "vs_default": round(ratio["default"], 2), "best": best,
        "seconds": {kind: [round(one, 1) for one in each] for kind, each in took.items()},
        "trials_per_hour": {kind: round(3600 * count / statistics.median(each)) for kind, each in took.items()},
        "groups_up_seconds": round(up, 1), "largest_loss_gap": round(max(gaps), 4),
        "tuned_slowest_over_fastest": round(steady, 2),
    }  # fmt: skip


# What a trial costs besides


def warm_trial_ms(storage: Path, trials: int) -> dict[str, float]:
    """Returns the milliseconds of a trial in a warm group besides its steps: in all, and without counting bytes and scoring."""
    from training.recipe import DataConfig, EvaluationConfig, Job

    jobs = [
        Job(recipe=recipe_of(point, 2), data=DataConfig(**DATA), evaluation=EvaluationConfig(rows=8, reports=1),
            cache=str(storage / "cache")).model_dump(mode="json") for point in points(trials)
    ]  # fmt: skip
    with our_groups(storage, 1) as groups:
        inside = groups.call("benchmarks.study.inside", {"jobs": jobs}, f"inside-{time.time_ns()}")
        outside = []
        for i, raw in enumerate(jobs):
            since = time.perf_counter()
            outcome = groups.train(Job.model_validate(raw), f"outside-{i}-{time.time_ns()}")
            outside.append(time.perf_counter() - since - outcome.seconds)
    whole = statistics.median(outside)
    return {"warm_trial_ms": round(1000 * (whole - inside["measuring"]), 1), "with_probe_and_scores_ms": round(1000 * whole, 1)}


def inside(jobs: list[dict]) -> dict[str, float]:
    """Returns the median seconds per run that are spent on counting bytes and on scoring rows. Runs on a worker."""
    from training import loop
    from training import run as runs
    from training.recipe import Job

    spent: list[float] = []

    def timed(function, sign: int = 1):
        def call(*args, **named):
            since = time.perf_counter()
            try:
                return function(*args, **named)
            finally:
                spent[-1] += sign * (time.perf_counter() - since)

        return call

    probe, score, set_up = loop.probed, loop.scored, runs.set_up
    loop.probed, loop.scored = timed(probe), timed(score)
    runs.set_up = timed(set_up, -1)  # the probe's run becomes the trial's: setting it up is no measuring
    try:
        for raw in jobs:
            spent.append(0.0)
            loop.train(Job.model_validate(raw))
    finally:
        loop.probed, loop.scored, runs.set_up = probe, score, set_up
    return {"measuring": statistics.median(spent)}


def nothing(job, report):
    """A trial that does nothing."""
    from training.recipe import Outcome

    return Outcome(loss=1.0, seconds=1.0, peak_bytes=1, scores={"accuracy": 1.0})


def sleeping(job, report):
    """A trial of a minute."""
    from training.recipe import Outcome

    time.sleep(60)
    return Outcome(loss=1.0, seconds=60.0, peak_bytes=1, scores={"accuracy": 1.0})


def tune_trial_ms(storage: Path, seats: int, trials: int) -> float:
    """Returns the milliseconds that a trial which does nothing takes through Tune; without the first, which start processes."""
    with our_groups(storage, seats, cpus=0.2 if seats > 2 else 1, train=nothing) as groups:
        name = f"nothing-{time.time_ns()}"
        _, found = our_study(storage, name, trials, 1, 1, groups, parallel=seats, train=nothing)
    ended = sorted(t.finished for t in found)[max(1, trials // 5) :]
    return round(1000 * (ended[-1] - ended[0]) / (len(ended) - 1), 1)


def orchestration_share(storage: Path) -> float:
    """Returns the share of a study of four trials of a minute each, two at a time, in which no trial ran."""
    with our_groups(storage, 2, train=sleeping) as groups:
        _, found = our_study(storage, f"sleeping-{time.time_ns()}", 4, 1, 1, groups, parallel=2, train=sleeping)
    wall = max(t.finished for t in found) - min(t.started for t in found)
    first = min(t.finished for t in found) - min(t.started for t in found) - 60  # Tune's own processes, once
    return round(1 - 2 * 60 / (wall - first), 4)


def early_stops(storage: Path, count: int) -> dict[str, Any]:
    """Returns what is left behind by runs that were all stopped early: processes, threads, free CPUs, entries of the mailbox."""
    import ray

    from training.recipe import DataConfig, Job

    before = ray.available_resources().get("CPU", 0)
    with our_groups(storage, 1, train=endless) as groups:
        job, seen = Job(recipe=recipe_of(points(1)[0], 1), data=DataConfig(train="none")).model_dump_json(), []
        for i in range(count):
            if i == count // 2:
                seen.append(len(psutil.Process().children(recursive=True)))
            run = f"stop-{i}"
            ray.get(groups.mailbox.submit.remote(run, {"job": job, "pack": None}))
            ray.get(groups.mailbox.stop.remote(run, "enough"))
            while ray.get(groups.mailbox.poll.remote(run, 5.0))[3] is None:
                pass
            ray.get(groups.mailbox.forget.remote(run))
        seen.append(len(psutil.Process().children(recursive=True)))
        names = ray.get(groups.mailbox.names.remote())
    until = time.monotonic() + 30
    while ray.available_resources().get("CPU", 0) != before and time.monotonic() < until:
        time.sleep(0.1)
    return {"runs": count, "processes_more": seen[1] - seen[0], "runs_kept": len(names),
            "cpus_lost": before - ray.available_resources().get("CPU", 0)}  # fmt: skip


def endless(job, report):
    """A trial that goes on until it is told to end."""
    from training.recipe import Outcome, Progress

    step = 0
    while True:
        step += 1
        if reason := report(Progress(step=step, steps=10**6, tokens=1, share=step / 10**6, seconds=float(step))):
            return Outcome(ended="stopped", reason=reason, share=step / 10**6)
        time.sleep(0.001)


def told_against_alone(storage: Path, count: int, steps: int) -> dict[str, float]:
    """Returns how far the seconds and bytes told of packed trials are from those of the same trials when nothing else runs."""
    from hpo.search import job_of
    from hpo.store import open_store

    cores, name = len(os.sched_getaffinity(0)), f"told-{time.time_ns()}"
    with our_groups(storage, cores, seats=4) as groups:
        _, trials = our_study(storage, name, count, steps, 32, groups, parallel=4 * cores)
        store = open_store(str(storage))
        spec = store.study(name).spec
        jobs = [job_of(t, spec, spec.data).model_copy(update={"output": None, "resume": None}) for t in trials]
        alone = [groups.train(job, f"alone-{t.number}-{time.time_ns()}") for t, job in zip(trials, jobs, strict=True)]
    seconds = sorted(abs(t.outcome.seconds / a.seconds - 1) for t, a in zip(trials, alone, strict=True))
    sizes = sorted(abs(t.outcome.peak_bytes / a.peak_bytes - 1) for t, a in zip(trials, alone, strict=True))
    return {
        "time_error_median": round(statistics.median(seconds), 4), "time_error_p95": round(seconds[int(0.95 * len(seconds))], 4),
        "bytes_error_p95": round(sizes[int(0.95 * len(sizes))], 4),
    }  # fmt: skip


def main() -> None:
    options = record.arguments(__doc__.split("\n")[0])
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(Path(__file__).parents[1])}
    storage = Path(options.storage) / ("study-quick" if options.quick else "study")
    storage.mkdir(parents=True, exist_ok=True)
    from hpo import tune

    small = options.quick
    parts: dict[str, Callable[[], Any]] = {
        "warm": lambda: warm_trial_ms(storage, 4 if small else 12),
        "tune_trial_ms": lambda: {str(n): tune_trial_ms(storage, n, 6 if small else 60) for n in ((1,) if small else (1, 8))},
        "early_stops": lambda: early_stops(storage, 20 if small else 1000),
        "told": lambda: told_against_alone(storage, 4 if small else 24, 20 if small else 150),
        "compare": lambda: compare(storage, 4 if small else TRIALS, 5 if small else 40, 32, 1 if small else ROUNDS),
        "orchestration_share": lambda: None if small else orchestration_share(storage),
    }  # fmt: skip
    found: dict[str, Any] = {}
    with tune.session(), tune.connect():
        for name, measure in parts.items():
            place = storage / f"{name}.json"
            if options.quick or not place.is_file():
                place.write_text(json.dumps(measure()))
            found[name] = json.loads(place.read_text())
            record.show(name, found[name])
    figures = {"vs_tuned": found["compare"]["vs_tuned"], "vs_default": found["compare"]["vs_default"]}
    figures |= {"warm_trial_ms": found["warm"]["warm_trial_ms"], "tune_trial_ms": found["tune_trial_ms"]}
    figures |= {"orchestration_share": found["orchestration_share"], **found["told"]}
    record.finish("study", figures | {name: found[name] for name in ("compare", "warm", "early_stops")}, quick=options.quick)
    if not options.quick:
        shutil.rmtree(storage, ignore_errors=True)


if __name__ == "__main__":
    main()
