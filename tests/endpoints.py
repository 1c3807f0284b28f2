"""Endpoints for tests: packaged models whose answers differ, adapters that do something, and tables of them."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import torch

from serving.endpoint import Adapter, EngineSettings, Table, Version, read_table, write_table
from training import artifact
from training.adapters import attach
from training.checkpoint import save_adapter
from training.model import EMBEDDED, describe, load_model, load_tokenizer
from training.recipe import Recipe

PROMPTS = ("The story of", "Dear team,", "A letter about", "In the morning")
TOKENS = 24


def packaged(folder: Path, *, seed: int | None = None, spoil: bool = False) -> artifact.Artifact:
    """Writes the embedded model as a package; a seed changes its weights, so that it says something else."""

    def fill(aside: Path) -> dict:
        from transformers import AutoModelForCausalLM

        shutil.copytree(EMBEDDED, aside, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.md", "__pycache__"))
        if seed is not None or spoil:
            model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
            generator = torch.Generator().manual_seed(seed or 0)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter *= 1 + 0.3 * torch.randn(parameter.shape, generator=generator)
                if spoil:
                    model.model.layers[0].mlp.up_proj.weight[3, 5] = torch.nan
            model.save_pretrained(aside)
        return {"kind": "model", "seed": seed}

    return artifact.write(folder, fill)


def adapter(folder: Path, name: str, *, seed: int = 0, **recipe) -> Adapter:
    """Writes an adapter of the embedded model that changes its answers."""
    made = Recipe(**({"rank": 4, "dropout": 0, "seed": seed} | recipe))
    model = attach(load_model(made), made, describe(made.model))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    save_adapter(model, folder, {"recipe": made.model_dump(mode="json")})
    return Adapter(name=name, recipe=made.model_dump(mode="json"), folder=str(folder), digest=artifact.verify(folder).digest)


def version(number: int, made: artifact.Artifact, share: float = 0.0) -> Version:
    """Returns a table's line for a package."""
    return Version(version=number, folder=str(made.folder), digest=made.digest, share=share)


def publish(folder: Path, *versions: Version, **fields) -> Table:
    """Writes the table of the endpoint `tiny`, one generation on where there is one."""
    try:
        generation = read_table(folder).generation + 1
    except Exception:
        generation = 1
    engine = EngineSettings(**({"cache_tokens": 4096, "adapters_loaded": 2} | fields.pop("engine", {})))
    table = Table(name="tiny", generation=generation, versions=versions, engine=engine, **fields)
    write_table(folder, table)
    return table


def greedy(model, tokenizer, prompt: str, tokens: int = TOKENS) -> str:
    """Returns what transformers' own generate says."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def answers(folder: str | Path) -> dict[str, str]:
    """Returns the greedy answers of a packaged model, by prompt."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return {prompt: greedy(model, tokenizer, prompt) for prompt in PROMPTS}


def answers_of_peft(made: Adapter) -> dict[str, str]:
    """Returns the greedy answers of an adapter on its base at the recipe's own bits."""
    from training.checkpoint import load_adapter

    recipe = Recipe.model_validate(made.recipe)
    model = load_model(recipe).eval()
    if made.folder:
        model = load_adapter(model, made.folder)
    tokenizer = load_tokenizer(recipe)
    return {prompt: greedy(model, tokenizer, prompt) for prompt in PROMPTS}


def wait_until(true, seconds: float = 20.0, what: str = "it") -> None:
    """Waits until a function returns something true, or fails."""
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, f"{what} did not come about within {seconds} s"
        time.sleep(0.02)
