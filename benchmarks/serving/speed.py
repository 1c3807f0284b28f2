"""How many tokens per second, and what a short request costs: the peer, the bare engine, uvicorn, Ray Serve."""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks.serving import place

CLIENTS = 16


def throughput(folder: Path, *, quick: bool) -> dict:
    """The same requests to `generate`, one at a time and in batches, the bare engine, and Ray Serve, in turn; ratios are within a
    round.

    `serve` and `stream` ask an endpoint with a replica for each of two cores, `serve_one` one with a single replica. Half a CPU
    each, so that both endpoints have room in the cluster at once: a replica has one torch thread all the same.
    """
    made = place.package(folder / "model")
    requests, rounds = place.requests(64 if quick else 256), 1 if quick else 3
    one, two = folder / "one", folder / "two"
    tokens = {path: place.publish(path, made, engine={"cpus": 0.5, "replicas": n}) for n, path in ((1, one), (2, two))}
    found: dict[str, list[dict]] = {way: [] for way in ("generate", "batches", "engine", "serve_one", "serve", "stream")}
    with (
        place.worker("bare", str(made.folder)) as peer, place.worker("bare", str(made.folder)) as engine,
        place.worker("load") as load, place.on_ray(one) as url_of_one, place.on_ray(two) as url,
    ):  # fmt: skip
        web = {"url": url, "token": tokens[two], "model": "two", "clients": CLIENTS}
        ways = {
            "generate": lambda some: peer.do(do="generate", requests=some),
            "batches": lambda some: peer.do(do="batches", requests=some, clients=CLIENTS),
            "engine": lambda some: engine.do(do="engine", requests=some, clients=CLIENTS),
            "serve_one": lambda some: load.do(**web | {"url": url_of_one, "token": tokens[one], "model": "one"}, requests=some),
            "serve": lambda some: load.do(**web, requests=some),
            "stream": lambda some: load.do(**web, requests=some, stream=True),
        }
        for ask in ways.values():
            ask(requests[: 2 * CLIENTS])  # warms up
        for _ in range(rounds):
            for way, ask in ways.items():
                found[way].append(ask(requests))
    return _rates(found, requests)


def _rates(found: dict[str, list[dict]], requests: list[dict]) -> dict:
    reference = [row["text"] for row in found["generate"][0]["rows"]]
    tokens = sum(row["tokens"] for row in found["generate"][0]["rows"])
    rates = {way: [sum(r["tokens"] for r in one["rows"]) / one["seconds"] for one in rounds] for way, rounds in found.items()}
    ways: dict[str, dict] = {}
    for way, rounds in found.items():
        rows = [row for one in rounds for row in one["rows"]] if way != "generate" else found["generate"][0]["rows"]
        at = [row.get("index", number % len(requests)) for number, row in enumerate(rows)]
        seconds = sorted(row["ended"] - row["began"] for row in rows)
        ways[way] = {
            "tokens_per_second": round(statistics.median(rates[way])),
            "ratio": round(statistics.median(own / peer for own, peer in zip(rates[way], rates["generate"], strict=True)), 2),
            "equal_texts": sum(row["text"] == reference[index] for index, row in zip(at, rows, strict=True)), "of": len(rows),
            "seconds_p50": round(statistics.median(seconds), 4), "seconds_p99": round(quantile(seconds, 0.99), 4),
        }  # fmt: skip
    first = [row["first"] - row["began"] for one in found["stream"] for row in one["rows"] if row["first"]]
    ways["stream"]["first_token_ms_p50"] = milliseconds(first)
    lengths = sorted(request["tokens"] for request in requests)
    return {
        "throughput_ratio_16": ways["serve"]["ratio"], "engine_ratio_16": ways["engine"]["ratio"],
        "batches_ratio_16": ways["batches"]["ratio"],
        "one_replica_ratio_16": ways["serve_one"]["ratio"], "stream_ratio_16": ways["stream"]["ratio"],
        "clients": CLIENTS, "requests": len(requests), "rounds": len(rates["serve"]),
        "tokens": tokens, "length_p50": statistics.median(lengths), "length_max": lengths[-1], "ways": ways,
        "all_equal": all(way["equal_texts"] == way["of"] for way in ways.values()),
    }  # fmt: skip


def latency(folder: Path, *, quick: bool) -> dict:
    """A short request by one client: the bare engine, uvicorn, Ray Serve, in turn in small blocks, so that all see the same."""
    made = place.package(folder / "model")
    token = place.publish(folder / "endpoint", made)
    place.publish(folder / "local", made)
    local_token = place.new_token(folder / "local")
    blocks, requests = 3 if quick else 15, place.short(20)
    seconds: dict[str, list[float]] = {"engine": [], "uvicorn": [], "serve": []}
    with (
        place.worker("bare", str(made.folder)) as engine, place.worker("load") as load,
        place.on_uvicorn(folder / "local") as local, place.on_ray(folder / "endpoint") as url,
    ):  # fmt: skip
        web = {"clients": 1, "requests": requests}
        ways = {
            "engine": lambda: engine.do(do="engine", clients=1, requests=requests),
            "uvicorn": lambda: load.do(**web, url=local, token=local_token, model="local"),
            "serve": lambda: load.do(**web, url=url, token=token, model="endpoint"),
        }
        for block in range(blocks + 1):
            for way, ask in ways.items():
                rows = ask()["rows"]
                if any(row.get("status", 200) != 200 for row in rows):
                    raise RuntimeError(f"{way}: {next(row for row in rows if row.get('status', 200) != 200)}")
                if block:  # the first one warms up
                    seconds[way] += [row["ended"] - row["began"] for row in rows]
    p50 = {way: milliseconds(found) for way, found in seconds.items()}
    return {
        "short_request_ms_p50": p50["serve"], "overhead_ms_p50": round(p50["serve"] - p50["engine"], 2),
        "uvicorn_overhead_ms_p50": round(p50["uvicorn"] - p50["engine"], 2),
        "serve_over_uvicorn_ms_p50": round(p50["serve"] - p50["uvicorn"], 2), "ms_p50": p50,
        "ms_p95": {way: milliseconds(found, 0.95) for way, found in seconds.items()},
        "tokens": place.SHORT, "requests": len(seconds["serve"]),
    }  # fmt: skip


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def milliseconds(seconds: list[float], share: float = 0.5) -> float | None:
    return round(1000 * quantile(seconds, share), 2) if seconds else None
