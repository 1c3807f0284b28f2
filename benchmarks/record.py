"""What every benchmark writes beside its figures: machine, versions, date; and where."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from training.world import versions

RESULTS = Path(__file__).parent / "results"


def arguments(about: str, parts: tuple[str, ...] = ()) -> argparse.Namespace:
    """Returns the options that all benchmarks share; `only` is there where one has parts."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--quick", action="store_true", help="the smallest run that exercises everything; records nothing")
    parser.add_argument(
        "--storage", default=os.path.join(tempfile.gettempdir(), "paretune-benchmarks"), help="where it can be resumed"
    )
    if parts:
        parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="measure these parts alone; records nothing")
    return parser.parse_args()


def machine() -> dict[str, Any]:
    """Returns the processor, its cores and the memory in GB."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "memory_gb": round(memory, 1)}


def commit() -> str:
    """Returns the short hash of the checkout, or "" outside one."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent, check=False
    )
    return done.stdout.strip()


def show(key: str, value: object) -> None:
    """Prints a figure, or a table where it is a list of equal records."""
    if not (isinstance(value, list) and value and isinstance(value[0], dict)):
        print(f"  {key:26} {value}")
        return
    print(f"  {key}")
    columns = list(value[0])
    widths = [max(len(str(name)), *(len(str(row.get(name))) for row in value)) for name in columns]
    for row in [dict(zip(columns, columns, strict=True)), *value]:
        print("    " + "  ".join(str(row.get(name)).rjust(width) for name, width in zip(columns, widths, strict=True)))


def finish(name: str, figures: dict[str, Any], *, quick: bool) -> None:
    """Writes the figures to results/NAME.json (not with --quick) and prints them as the last line."""
    result = {"benchmark": name, **figures, "machine": machine(), "versions": versions(), "commit": commit(),
              "date": time.strftime("%Y-%m-%d"), "quick": quick}  # fmt: skip
    if not quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
