"""Real tiny models and rows; and warnings as errors, but for those that other libraries raise about themselves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from training.model import EMBEDDED
from training.recipe import DataConfig, EvaluationConfig, Job, Recipe

FILTERS = (
    "error",
    # transformers 5.23 renames activation checkpointing, also inside PEFT; the old name is the only one that 5.0 knows.
    "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning",
    # torch.jit decorators used while torch, DeepSpeed and bitsandbytes are imported.
    "ignore:.*torch.jit.script.* is deprecated:DeprecationWarning",
)
DATA = Path(__file__).parents[2] / "training" / "embedded"


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings(*FILTERS), append=False)  # a test may add its own


@pytest.fixture(scope="session")
def save_model(tmp_path_factory):
    """Saves a random model of a transformers configuration with the embedded model's tokenizer; returns its folder."""

    def save(name: str, config) -> str:
        import torch
        from transformers import AutoModelForCausalLM

        folder = tmp_path_factory.mktemp("models") / name
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(EMBEDDED / file, folder / file)
        return str(folder)

    return save


@pytest.fixture(scope="session")
def special() -> dict:
    """The embedded tokenizer's size and special tokens, as a configuration wants them."""
    vocabulary = json.loads((EMBEDDED / "config.json").read_text())["vocab_size"]
    return {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


@pytest.fixture(scope="session")
def llama(save_model, special) -> str:
    """A random Llama of two layers."""
    from transformers import LlamaConfig

    return save_model("llama", LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256, **special,
    ))  # fmt: skip


@pytest.fixture(scope="session")
def rows(tmp_path_factory) -> DataConfig:
    """48, 16 and 16 rows of the embedded task."""
    folder = tmp_path_factory.mktemp("rows")
    for name, count in (("train", 48), ("validation", 16), ("test", 16)):
        lines = (DATA / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:count]))
    return DataConfig(**{name: str(folder / f"{name}.jsonl") for name in ("train", "validation", "test")})


@pytest.fixture(scope="session")
def make_job(llama, rows):
    """Returns a job on the random Llama: recipe fields, or a field of Job by name."""

    def make(**given) -> Job:
        parts = {name: given.pop(name) for name in list(given) if name in Job.model_fields}
        recipe = {"model": llama, "rank": 4, "dropout": 0, "batch_size": 8, "learning_rate": 1e-2} | given
        if not {"epochs", "tokens"} & set(recipe):
            recipe = {"steps": 4} | recipe
        return Job(**{"data": rows, "evaluation": EvaluationConfig(reports=2), "recipe": Recipe(**recipe), **parts})

    return make
