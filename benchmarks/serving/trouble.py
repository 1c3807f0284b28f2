"""What happens to answers when replicas are killed, and when far too many ask."""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks.serving import place
from benchmarks.serving.speed import milliseconds, quantile

EVERY = 5.0  # seconds between two kills
STEADY, PAUSE = 4, 0.05  # clients that ask while replicas are killed, and how long each rests
CONCURRENT, QUEUE = 8, 16  # admission in the overload; the default's 16 and 64 would be 800 clients on the cores they measure
TIMES, SURGE = 10, 10.0  # so many times what is admitted, for so many seconds


def _reference(made, load_requests: list[dict]) -> list[str]:
    with place.worker("bare", str(made.folder)) as peer:
        return [row["text"] for row in peer.do(do="generate", requests=load_requests)["rows"]]


def _wrong(rows: list[dict], reference: list[str]) -> int:
    return sum(row["status"] == 200 and row["text"] != reference[row["index"]] for row in rows)


def recovery(folder: Path, *, quick: bool) -> dict:
    """The only replica is killed under load, a few times: until an answer to a request comes again."""
    made, requests = place.package(folder / "model"), place.requests(64)
    reference = _reference(made, requests)
    token = place.publish(folder / "endpoint", made)
    back, ready, wrong, asked, failed = [], [], 0, 0, {}
    with place.worker("load") as load, place.on_ray(folder / "endpoint") as url:
        for _ in range(1 if quick else 5):
            _wait(folder / "endpoint", 1)
            load.begin(url=url, token=token, model="endpoint", clients=STEADY, requests=requests, seconds=15, pause=PAUSE)
            time.sleep(2)
            (replica,) = place.alive(folder / "endpoint")
            killed, clock = place.kill(replica), time.time()
            rows = load.end()["rows"]
            after = [row["ended"] - killed for row in rows if row["status"] == 200 and row["ended"] > killed + 0.2]
            back.append(round(min(after), 2) if after else None)
            successors = [said for said in place.alive(folder / "endpoint") if said["started"] > clock]
            ready += [round(said["started"] - clock, 2) for said in successors[:1]]
            wrong, asked = wrong + _wrong(rows, reference), asked + len(rows)
            _count(failed, rows)
    return {"recovery_seconds": max(back) if None not in back else None, "each": back, "process_there_after": ready,
            "wrong_answers": wrong, "requests": asked, "not_200": failed}  # fmt: skip


def kills(folder: Path, *, quick: bool) -> dict:
    """Two replicas, of which the older one is killed every five seconds; a client tries a second time."""
    made, requests = place.package(folder / "model"), place.requests(64)
    reference = _reference(made, requests)
    token, lasting = place.publish(folder / "endpoint", made, engine={"replicas": 2}), 20 if quick else 120
    killed, alone = 0, 0
    with place.worker("load") as load, place.on_ray(folder / "endpoint") as url:
        _wait(folder / "endpoint", 2)
        load.begin(url=url, token=token, model="endpoint", clients=STEADY, requests=requests, seconds=lasting, pause=PAUSE,
                   retry=True)  # fmt: skip
        until, turn = time.monotonic() + lasting, time.monotonic() + EVERY
        while turn < until - 1:
            time.sleep(max(0.0, turn - time.monotonic()))
            turn += EVERY
            if there := place.alive(folder / "endpoint"):
                alone += len(there) == 1
                place.kill(there[0])
                killed += 1
        rows = load.end()["rows"]
    right = sum(row["status"] == 200 and row["text"] == reference[row["index"]] for row in rows)
    first = sum(row["status"] == 200 and "before" not in row for row in rows)
    seconds = [row["ended"] - row["began"] for row in rows if row["status"] == 200]
    return {
        "success_share_kill": round(right / len(rows), 5), "without_retry": round(first / len(rows), 5), "requests": len(rows),
        "wrong_answers": _wrong(rows, reference), "kills": killed, "kills_of_the_only_one": alone, "seconds": lasting,
        "not_200": _count({}, rows), "first_tries_not_200": _count({}, [row["before"] for row in rows if "before" in row]),
        "seconds_p50": round(quantile(seconds, 0.5), 3), "seconds_max": round(max(seconds), 2),
    }  # fmt: skip


def overload(folder: Path, *, quick: bool) -> dict:
    """Ten times as many clients as are admitted, who come back when they are told to; then one client again."""
    made, requests = place.package(folder / "model"), place.requests(64)
    reference, limits = _reference(made, requests), {"concurrent": CONCURRENT, "queue": QUEUE}
    token = place.publish(folder / "endpoint", made, limits=limits)
    clients = TIMES * (CONCURRENT + QUEUE)
    with place.worker("load") as load, place.on_ray(folder / "endpoint") as url:
        web = {"url": url, "token": token, "model": "endpoint", "requests": requests}
        load.do(**web, clients=1, seconds=1)
        idle = [row["ended"] - row["began"] for row in load.do(**web, clients=1, seconds=2)["rows"]]
        load.begin(**web, clients=clients, seconds=3 if quick else SURGE, obeys=True)
        rows = load.end()["rows"]
        over = time.monotonic()
        after = load.do(**web, clients=1, seconds=3 if quick else 10)["rows"]
    refused = [row for row in rows if row["status"] == 429]
    accepted = [row["ended"] - row["began"] for row in rows if row["status"] == 200]
    refusals = [row["ended"] - row["began"] for row in refused]
    normal = [row for row in after if row["status"] == 200 and row["ended"] - row["began"] < max(2 * quantile(idle, 0.95), 0.1)]
    return {
        "clients": clients, "limits": limits, "requests": len(rows), "accepted": len(accepted), "refused": len(refused),
        "retry_after_said": sum(row["retry_after"] is not None for row in refused),
        "refusal_ms_p50": milliseconds(refusals), "refusal_ms_p99": milliseconds(refusals, 0.99),
        "accepted_seconds_p50": round(quantile(accepted, 0.5), 3), "accepted_seconds_max": round(max(accepted), 3),
        "wrong_answers": _wrong(rows, reference), "not_200_or_429": _count({}, [row for row in rows if row["status"] != 429]),
        "normal_again_seconds": round(normal[0]["ended"] - over, 2) if normal else None,
        "idle_ms_p50": milliseconds(idle), "after_ms_p50": milliseconds([row["ended"] - row["began"] for row in after]),
    }  # fmt: skip


def _count(found: dict, rows: list[dict]) -> dict:
    for row in rows:
        if row["status"] != 200:
            what = str(row["status"]) if row["status"] else f"broken off ({row['said']})"
            found[what] = found.get(what, 0) + 1
    return found


def _wait(folder: Path, count: int) -> None:
    until = time.monotonic() + 60
    while len(place.alive(folder)) < count:
        if time.monotonic() > until:
            raise RuntimeError(f"{count} replicas did not come within 60 s")
        time.sleep(0.1)
