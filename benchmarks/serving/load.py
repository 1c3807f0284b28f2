"""The clients: a process of its own, so that they wait for no lock of what they measure. They share its cores, though.

    python -m benchmarks.serving.load < jobs

One job per line in, one result per line out, both JSON. Sockets and JSON only, so that clients cost little.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
import urllib.parse

PATIENCE = 30.0  # seconds that a client waits for an answer
BACKOFF = 0.5  # seconds before a second try; OpenAI's own client waits as long
BROKEN = (OSError, EOFError, ValueError, asyncio.TimeoutError)  # what a connection that breaks off looks like


class Client:
    """One keep-alive connection."""

    def __init__(self, job: dict):
        self._url, self._job = urllib.parse.urlsplit(job["url"]), job
        self._reader = self._writer = None

    async def ask(self, request: dict) -> dict:
        """Returns status (0: broken off), text, tokens, Retry-After and times (monotonic: one clock for all processes)."""
        row = {"began": time.monotonic(), "first": None, "text": "", "tokens": 0, "retry_after": None}
        try:
            async with asyncio.timeout(PATIENCE):
                row |= await self._ask(request, row)
        except BROKEN as error:
            self.close()
            row |= {"status": 0, "said": type(error).__name__}
        return row | {"ended": time.monotonic()}

    async def _ask(self, request: dict, row: dict) -> dict:
        if self._writer is None or self._reader.at_eof():
            self.close()
            self._reader, self._writer = await asyncio.open_connection(self._url.hostname, self._url.port)
        self._writer.write(self._packed(request))
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        status, headers = int(head[0].split()[1]), dict(line.lower().split(": ", 1) for line in head[1:] if line)
        if "content-length" in headers:
            body = await self._reader.readexactly(int(headers["content-length"]))
        else:
            body = b"".join([part async for part in self._chunks(row)])
        if headers.get("connection") == "close":
            self.close()
        if status != 200:
            return {"status": status, "said": body.decode()[:200], "retry_after": headers.get("retry-after")}
        if headers["content-type"].startswith("text/event-stream"):
            return {"status": 200, **_joined(body)}
        found = json.loads(body)
        return {"status": 200, "text": found["choices"][0]["text"], "tokens": found["usage"]["completion_tokens"]}

    async def _chunks(self, row: dict):
        while size := int(await self._reader.readuntil(b"\r\n"), 16):
            row["first"] = row["first"] or time.monotonic()
            yield (await self._reader.readexactly(size + 2))[:-2]
        await self._reader.readexactly(2)

    def _packed(self, request: dict) -> bytes:
        body = {"model": self._job["model"], "prompt": request["prompt"], "max_tokens": request["tokens"], "temperature": 0}
        body |= {"stream": True, "stream_options": {"include_usage": True}} if self._job.get("stream") else {}
        packed = json.dumps(body).encode()
        head = (f"POST {self._url.path}/v1/completions HTTP/1.1\r\nHost: {self._url.netloc}\r\n"
                f"Authorization: Bearer {self._job['token']}\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(packed)}\r\n\r\n")  # fmt: skip
        return head.encode() + packed

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None


def _joined(body: bytes) -> dict:
    events = [line.removeprefix(b"data: ") for line in body.split(b"\n") if line.startswith(b"data: ")]
    if not events or events.pop() != b"[DONE]":
        raise EOFError
    found = [json.loads(event) for event in events]
    if "usage" not in found[-1]:
        raise EOFError  # it ended in an error
    text = "".join(choice["text"] for event in found for choice in event["choices"])
    return {"text": text, "tokens": found[-1]["usage"]["completion_tokens"]}


async def run(job: dict) -> dict:
    """Returns one row per request, and the seconds that all took together.

    The job: `url`, `token`, `model`, `requests` (prompt, tokens), `clients`, each of which asks again as soon as it is answered;
    `seconds` to go on for, from the first request again after the last (default: each request once); `stream`; `retry`: asks
    once more after a failure; `obeys`: waits as long as Retry-After says; `pause`: seconds between requests.
    """
    requests, rows = job["requests"], []
    until = time.monotonic() + job["seconds"] if job.get("seconds") else None
    turns = iter(itertools.cycle(range(len(requests))) if until else range(len(requests)))

    async def one() -> None:
        client = Client(job)
        while until is None or time.monotonic() < until:
            index = next(turns, None)
            if index is None:
                break
            row = await client.ask(requests[index])
            if job.get("retry") and row["status"] != 200:
                await asyncio.sleep(BACKOFF)
                again = await client.ask(requests[index])
                row = again | {"began": row["began"], "before": {key: row.get(key) for key in ("status", "said", "ended")}}
            rows.append(row | {"index": index})
            if job.get("obeys") and row["retry_after"]:
                await asyncio.sleep(float(row["retry_after"]))
            if job.get("pause"):
                await asyncio.sleep(job["pause"])
        client.close()

    began = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for _ in range(job["clients"]):
            group.create_task(one())
    return {"rows": rows, "seconds": time.monotonic() - began}


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(asyncio.run(run(json.loads(line)))), flush=True)


if __name__ == "__main__":
    main()
