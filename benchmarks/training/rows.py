"""What reading rows costs: validation and tokenization in rows per second, and peak memory against the size of the file.

    python -m benchmarks.training.rows [--quick]

Rows are the embedded task's own, with numbers that make each of them another one. Speed is that of short rows that stay on disk:
from the file to the cache that trials read (validated, compared with each other by hash, split, rendered by the tokenizer's chat
template, tokenized). Memory is that of long rows, each file in a process of its own; the full run makes a file of 2 GB for it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from training.data import locate

SHORT = {True: 3000, False: 400_000}  # rows
SIZES = {True: (1, 4), False: (125, 2000)}  # MB of rows of 2 kB
READ = """
import json, resource, sys, time
from training import shelf, tokens
from training.data import prepare, read
from training.model import load_tokenizer
from training.recipe import DataConfig, Recipe
config, tokenizer = DataConfig(train=sys.argv[1], stream_above=0), load_tokenizer(Recipe())
if sys.argv[2] == "quick":
    shelf.BATCH = tokens.CHUNK = 256
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began = time.perf_counter()
rows = read(config)
validated = time.perf_counter()
prepare(rows, config, tokenizer, 2048)
done = time.perf_counter()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"rows": rows.read["train"], "read_seconds": validated - began, "tokenize_seconds": done - validated,
                  "peak_mb": round(peak / 1000, 1), "grown_mb": round((peak - before) / 1000, 1)}))
"""


def measure(quick: bool) -> dict:
    """Returns `rows_per_second` over both stages, and `memory`: for each size of a file its peak in MB."""
    texts = [json.loads(line) for line in locate("embedded:train.jsonl").read_text().splitlines()]
    with tempfile.TemporaryDirectory(prefix="paretune-rows-") as name:
        folder = Path(name)
        if shutil.disk_usage(folder).free < 5e6 * max(SIZES[quick]) + 2e9:
            raise OSError(f"{folder} needs five times {max(SIZES[quick])} MB for a while")
        short = _read(_written(folder, texts, rows=SHORT[quick]), folder, quick)
        memory = []
        for size in SIZES[quick]:
            found = _read(_written(folder, texts, megabytes=size), folder, quick)
            memory.append({"file_mb": size, **found})
    both = short["read_seconds"] + short["tokenize_seconds"]
    return {
        "rows_per_second": round(short["rows"] / both, 1),
        "validated_rows_per_second": round(short["rows"] / short["read_seconds"], 1),
        "tokenized_rows_per_second": round(short["rows"] / short["tokenize_seconds"], 1),
        "memory_growth_ratio": round(memory[-1]["peak_mb"] / memory[0]["peak_mb"], 3),
        "memory": memory,
    }


def _written(folder: Path, texts: list[dict], *, rows: int | None = None, megabytes: int | None = None) -> Path:
    """Writes so many short rows, or so many megabytes of rows of about 2 kB."""
    path, written, number = folder / "rows.jsonl", 0, 0
    with path.open("w") as file:
        while number < rows if rows else written < 1e6 * megabytes:
            row = texts[number % len(texts)]
            question = next(value for value in row.values() if isinstance(value, str))
            again = 1 if rows else max(1, 1900 // len(question))
            asked = f"{number}: " + " ".join([question] * again)
            line = json.dumps({"instruction": asked, "response": f"answer {number % 997}"}) + "\n"
            file.write(line)
            written, number = written + len(line), number + 1
    return path


def _read(path: Path, folder: Path, quick: bool) -> dict:
    environment = os.environ | {"PARETUNE_CACHE": str(folder / "cache"), "TOKENIZERS_PARALLELISM": "true"}
    command = [sys.executable, "-c", READ, str(path), "quick" if quick else "full"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    shutil.rmtree(folder / "cache")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(measure("--quick" in sys.argv)))
