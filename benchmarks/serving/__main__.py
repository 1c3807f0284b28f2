"""How fast an endpoint answers, what Ray Serve adds, and what kills and crowds do to its answers.

    python -m benchmarks.serving [--quick] [--storage DIR]

The embedded model, packaged in fp32, on a private Ray cluster, by the real app over HTTP on loopback. The peer is transformers'
own `generate`, one request at a time with one torch thread, in the same run. Clients are a process of their own, but they, what
passes requests on and the replicas share two cores. Finished parts are kept in --storage; the same command goes on with the next.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

from benchmarks import record
from benchmarks.serving import place, speed, trouble

PARTS = {
    "throughput": speed.throughput, "latency": speed.latency, "recovery": trouble.recovery, "kills": trouble.kills,
    "overload": trouble.overload,
}  # fmt: skip
# What was promised of it: the figure, and whether it holds.
TARGETS = {
    "throughput_ratio_16": ("at least 4", lambda value: value >= 4),
    "short_request_ms_p50": ("under 100", lambda value: value < 100),
    "overhead_ms_p50": ("at most 4", lambda value: value <= 4),
    "recovery_seconds": ("at most 10", lambda value: value is not None and value <= 10),
    "success_share_kill": ("at least 0.99", lambda value: value >= 0.99),
}


def main() -> None:
    options = record.arguments(__doc__.split("\n")[0])
    storage = Path(options.storage).absolute() / ("serving-quick" if options.quick else "serving")
    storage.mkdir(parents=True, exist_ok=True)
    missing = [name for name in PARTS if not (storage / f"{name}.json").is_file()]
    if missing:
        with place.cluster():
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # in place of Ray's, so that what was started is stopped
            for name in missing:
                _part(name, storage, options.quick)
    parts = {name: json.loads((storage / f"{name}.json").read_text()) for name in PARTS}
    for name in PARTS if options.quick else ():  # a quick run shows that all of it works, so it is always a new one
        (storage / f"{name}.json").unlink()
    for name, found in parts.items():
        print(f"\n{name} ({found['took_seconds']} s)")
        for key, value in found.items():
            for line in [f"{key:26} {value}"] if not isinstance(value, dict) else [f"{key}"] * bool(value):
                print(f"  {line}")
            for part, said in value.items() if isinstance(value, dict) else ():
                print(f"    {part:24} {said}")
    figures = {name: next(found[name] for found in parts.values() if name in found) for name in TARGETS}
    print()
    for name, (wanted, holds) in TARGETS.items():
        print(f"{name:26} {figures[name]!s:>10}   {wanted:14} {'yes' if holds(figures[name]) else 'NO'}")
    record.finish("serving", figures | parts, quick=options.quick)


def _part(name: str, storage: Path, quick: bool) -> None:
    print(f"{name} ...", file=sys.stderr, flush=True)
    began = time.monotonic()
    found = PARTS[name](storage / "work", quick=quick) | {"took_seconds": round(time.monotonic() - began, 1)}
    aside = storage / f".{name}.json"
    aside.write_text(json.dumps(found, indent=1))
    aside.replace(storage / f"{name}.json")


if __name__ == "__main__":
    main()
