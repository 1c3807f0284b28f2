"""How fast and lean training is beside HF Trainer + PEFT, how well its memory is foretold, and what reading rows costs.

    python -m benchmarks.training [--quick] [--storage DIR] [--only PART ...]

Each part is a module of this package with `measure(quick) -> dict`; what it measures and against which peer is said there. A part
runs in a process of its own, so that none leaves its threads and caches to the next. Finished parts are kept in --storage; the
same command goes on with the next.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import record

PARTS = ("speed", "bytes", "memory", "rows", "zero")
# What was promised of it: the figure, and whether it holds.
TARGETS = {
    "tokens_per_second_ratio": ("at least 1.3", lambda value: value >= 1.3),
    "peak_bytes_ratio": ("at most 1", lambda value: value <= 1),
    "rows_per_second": ("at least 10000", lambda value: value >= 10_000),
    "memory_error_p95": ("at most 0.03", lambda value: value <= 0.03),
    "zero_loss_gap": ("at most 0.0001", lambda value: value <= 1e-4),
}
RUN = "import json, sys; from {module} import measure; open(sys.argv[2], 'w').write(json.dumps(measure(sys.argv[1] == 'quick')))"


def main() -> None:
    options = record.arguments(__doc__.split("\n")[0], PARTS)
    storage = Path(options.storage).absolute() / ("training-quick" if options.quick else "training")
    storage.mkdir(parents=True, exist_ok=True)
    present = [name for name in PARTS if name in options.only and importlib.util.find_spec(f"benchmarks.training.{name}")]
    for name in present:
        if options.quick or not (storage / f"{name}.json").is_file():
            _part(name, storage, options.quick)
    parts = {name: json.loads((storage / f"{name}.json").read_text()) for name in present}
    for name, found in parts.items():
        print(f"\n{name} ({found['took_seconds']} s)")
        for key, value in found.items():
            record.show(key, value)
    names = [*TARGETS, "tokens_per_second_ratio_grouped"]
    figures = {name: next((found[name] for found in parts.values() if name in found), None) for name in names}
    print()
    for name, (wanted, holds) in TARGETS.items():
        value = figures[name]
        print(f"{name:26} {value!s:>12}   {wanted:16} {'not measured' if value is None else 'yes' if holds(value) else 'NO'}")
    record.finish("training", figures | parts, quick=options.quick or set(options.only) != set(PARTS))


def _part(name: str, storage: Path, quick: bool) -> None:
    """Measures one part in a process of its own and keeps what it found."""
    print(f"{name} ...", file=sys.stderr, flush=True)
    began, aside = time.monotonic(), storage / f".{name}.json"
    code = RUN.format(module=f"benchmarks.training.{name}")
    subprocess.run([sys.executable, "-c", code, "quick" if quick else "full", str(aside)], check=True)
    # A part that is there is taken over by a later run: it says of which commit it is.
    found = json.loads(aside.read_text()) | {"took_seconds": round(time.monotonic() - began, 1), "commit": record.commit()}
    aside.write_text(json.dumps(found, indent=1))
    aside.replace(storage / f"{name}.json")


if __name__ == "__main__":
    main()
