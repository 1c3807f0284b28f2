"""What is measured and where it runs: a packaged model, its endpoint, a private Ray cluster, processes beside it.

All of it listens on loopback alone, and ends with the block that started it.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from serving.endpoint import EngineSettings, Limits, Table, Version, digest_of, new_token, write_table
from serving.pool import living
from training import artifact
from training.model import EMBEDDED

ROOT = Path(__file__).parents[2]
SHORTEST, LONGEST, SHORT = 8, 160, 8  # new tokens: of the mixed requests, and of the short one


def package(folder: Path) -> artifact.Artifact:
    """Writes the embedded model as a package in fp32. It ends no answer by itself: each has as many tokens as are asked."""

    def fill(aside: Path) -> dict:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model, tokenizer = (
            AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32),
            AutoTokenizer.from_pretrained(EMBEDDED),
        )
        tokenizer.eos_token = tokenizer.pad_token  # which the model never says
        model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.pad_token_id
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        return {"kind": "model"}

    return artifact.write(folder, fill)


def requests(count: int) -> list[dict]:
    """Returns requests with real prompts and skewed lengths: half of them have fewer than 17 new tokens, one in eight over 80."""
    rows = [json.loads(line) for line in (EMBEDDED.parent / "test.jsonl").read_text().splitlines()]
    chance = random.Random(0)
    lengths = [round(SHORTEST * (LONGEST / SHORTEST) ** chance.random() ** 2) for _ in range(count)]
    return [{"prompt": row["instruction"], "tokens": tokens} for row, tokens in zip(rows, lengths, strict=False)]


def short(count: int) -> list[dict]:
    """Returns short requests."""
    return [request | {"tokens": SHORT} for request in requests(count)]


def publish(folder: Path, made: artifact.Artifact, *, engine: dict | None = None, limits: dict | None = None) -> str:
    """Writes the table of an endpoint with one version, named like the folder, and returns its token."""
    shutil.rmtree(folder, ignore_errors=True)
    token = new_token(folder)
    version = Version(version=1, folder=str(made.folder), digest=made.digest, share=1)
    write_table(folder, Table(name=folder.name, generation=1, versions=(version,), engine=EngineSettings(**(engine or {})),
                              limits=Limits(**(limits or {})), tokens=(digest_of(token),)))  # fmt: skip
    return token


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


@contextlib.contextmanager
def cluster() -> Iterator[None]:
    """A private Ray cluster with two CPUs' worth of room; its files are in a folder of its own, which goes with it."""
    folder = tempfile.mkdtemp(prefix="pt-", dir="/tmp")  # short: Unix sockets lie in it
    own = {"PARETUNE_RAY_TEMP": f"{folder}/r", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0",
           "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # fmt: skip
    os.environ.update(own)  # before ray is imported; the last one makes it listen on loopback alone
    os.environ.pop("RAY_ADDRESS", None)
    from hpo.tune import connect

    try:
        with connect():
            yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def on_ray(folder: Path) -> Iterator[str]:
    """Serves an endpoint on Ray Serve, and yields its address."""
    from serving.targets import ray_serve

    url = ray_serve.deploy(folder, port=free_port())
    try:
        yield url
    finally:
        ray_serve.remove(folder.name)


@contextlib.contextmanager
def on_uvicorn(folder: Path) -> Iterator[str]:
    """Serves an endpoint in a process of its own, and yields its address."""
    port = free_port()
    with _process("-c", f"from serving.targets import local; local.serve({str(folder)!r}, port={port})"):
        until = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"


class Worker:
    """A process that does one job per line: JSON in, JSON out."""

    def __init__(self, process: subprocess.Popen):
        self._process = process

    def begin(self, **job) -> None:
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()

    def end(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args[2]} ended with {self._process.wait()}")
        return json.loads(line)

    def do(self, **job) -> dict:
        self.begin(**job)
        return self.end()


@contextlib.contextmanager
def worker(module: str, *arguments: str) -> Iterator[Worker]:
    """A module of this package in a process of its own."""
    with _process("-m", f"benchmarks.serving.{module}", *arguments) as process:
        yield Worker(process)


@contextlib.contextmanager
def _process(*arguments: str) -> Iterator[subprocess.Popen]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error",
                                "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def alive(folder: Path) -> list[dict]:
    """Returns what the replicas said whose processes are there, the oldest first."""
    return sorted((said for said in living(folder) if _lives(said["pid"])), key=lambda said: said["started"])


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError:
        return False
    return True


def kill(replica: dict) -> float:
    """Kills a replica at once and returns when (monotonic)."""
    os.kill(replica["pid"], signal.SIGKILL)
    return time.monotonic()
