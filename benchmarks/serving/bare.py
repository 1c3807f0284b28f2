"""The same model without a server, in a process of its own: `generate`, one request at a time and in batches; the bare engine.

    python -m benchmarks.serving.bare FOLDER < jobs

One job per line in, one result per line out, both JSON. One torch thread.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from serving.endpoint import EngineSettings
from serving.generate import Engine, Sampling


def generate(model, tokenizer, job: dict) -> dict:
    """Returns what transformers' own `generate` says, one request after the other."""
    rows, began = [], time.monotonic()
    for request in job["requests"]:
        start = time.monotonic()
        found = tokenizer(request["prompt"], return_tensors="pt")
        with torch.inference_mode():
            out = model.generate(**found, max_new_tokens=request["tokens"], do_sample=False)
        new = out[0, found.input_ids.shape[1] :]
        text = tokenizer.decode(new, skip_special_tokens=True)
        rows.append({"text": text, "tokens": len(new), "began": start, "ended": time.monotonic()})
    return {"rows": rows, "seconds": time.monotonic() - began}


def batches(model, tokenizer, job: dict) -> dict:
    """Returns what `generate` says to so many requests at a time, padded: what dynamic batching (serve.batch) would do.

    Every batch takes as long as its longest answer; each request's own answer is cut from it.
    """
    rows, began, size = [], time.monotonic(), job["clients"]
    tokenizer.padding_side = "left"
    for first in range(0, len(job["requests"]), size):
        some, start = job["requests"][first : first + size], time.monotonic()
        found = tokenizer([request["prompt"] for request in some], return_tensors="pt", padding=True)
        with torch.inference_mode():
            out = model.generate(**found, max_new_tokens=max(request["tokens"] for request in some), do_sample=False)
        for request, row in zip(some, out[:, found.input_ids.shape[1] :], strict=True):
            own = row[: request["tokens"]]
            text = tokenizer.decode(own, skip_special_tokens=True)
            rows.append({"text": text, "tokens": len(own), "began": start, "ended": time.monotonic()})
    return {"rows": rows, "seconds": time.monotonic() - began}


async def answers(engine: Engine, job: dict) -> dict:
    """Returns what the engine says to so many clients, each of which asks again as soon as it is answered."""
    requests, rows = job["requests"], [{} for _ in job["requests"]]
    turns = iter(range(len(requests)))

    async def one() -> None:
        for index in turns:
            start = time.monotonic()
            ids = engine.encode(requests[index]["prompt"])
            piece = await engine.answer(ids, Sampling(max_tokens=requests[index]["tokens"]))
            rows[index] = {
                "text": piece.text, "tokens": piece.completion_tokens, "began": start, "ended": time.monotonic()
            }  # fmt: skip

    began = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for _ in range(job["clients"]):
            group.create_task(one())
    return {"rows": rows, "seconds": time.monotonic() - began}


def main() -> None:
    torch.set_num_threads(1)
    folder, engine = sys.argv[1], None
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for line in sys.stdin:
        job = json.loads(line)
        if job["do"] == "generate":
            found = generate(model, tokenizer, job)
        elif job["do"] == "batches":
            found = batches(model, tokenizer, job)
        else:
            if engine is None:  # it takes the model over
                engine = Engine(model, tokenizer, EngineSettings())
                engine.start()
            found = asyncio.run(answers(engine, job))
        print(json.dumps(found), flush=True)
    if engine is not None:
        engine.close()


if __name__ == "__main__":
    main()
