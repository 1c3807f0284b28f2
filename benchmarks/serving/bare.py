"""The same model without a server, in a process of its own: the peer's `generate`, one request at a time, and the bare engine.

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
