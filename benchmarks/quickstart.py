"""How long the quickstart takes after installation, what promotion and deployment add, and whether its front is a front.

    python -m benchmarks.quickstart [--quick]

Runs `hpo run quickstart --promote --deploy` as a user does, in a process of its own with a new record: 12 trials, two at a time,
on Ray; then the winner retrained, merged, verified, registered, served and asked over HTTP.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time

from benchmarks import record


def main() -> None:
    options = record.arguments(__doc__.split("\n")[0])
    storage = f"{options.storage}/quickstart"
    shutil.rmtree(storage, ignore_errors=True)  # a time from start to end cannot be resumed
    sets = ["--set", f"storage={storage}"] + (["--set", "budget.trials=2", "--set", "data.limit=200"] if options.quick else [])
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "hpo", "run", "quickstart", "--promote", "--deploy", "--json", *sets]
    before, searched = time.perf_counter(), None
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True) as process:
        for line in process.stderr:  # one line for every change, with the phase
            print(line, end="", file=sys.stderr, flush=True)
            if line.rstrip().endswith("  choose"):
                searched = time.perf_counter() - before
        printed = process.stdout.read()
    seconds = time.perf_counter() - before
    if process.returncode:
        sys.exit(process.returncode)
    found = json.loads(printed)
    trials = {t["number"]: t["objectives"] for t in found["trials"]}
    front = [trials[number] for number in found["front"]]
    measured = found["certificate"]["measured"]
    noise = max((m["high"] / m["low"] - 1 for m in measured.values()), default=0.0)
    figures = {
        "seconds": round(searched, 1), "seconds_with_endpoint": round(seconds, 1), "added_seconds": round(seconds - searched, 1),
        "kept": found["model"]["why"], "asked": found["asked"], "trials": len(trials), "front_points": len(front),
        "accuracy_span": [round(f(t["accuracy"] for t in front), 4) for f in (min, max)],
        "seconds_span": round(max(t["seconds"] for t in front) / min(t["seconds"] for t in front), 3),
        "bytes_span": round(max(t["peak_bytes"] for t in front) / min(t["peak_bytes"] for t in front), 3),
        "timing_noise": round(noise, 3),
        "gain": found["certificate"]["gain"], "winner": found["winner"],
        "scores": {s["who"]: s["accuracy"] for s in found["certificate"]["scores"]},
    }  # fmt: skip
    for name, value in figures.items():
        print(f"{name:16} {value}")
    record.finish("quickstart", figures, quick=options.quick)


if __name__ == "__main__":
    main()
