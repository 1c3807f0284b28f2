"""The real engine over the embedded model, shared by the session."""

from __future__ import annotations

import pytest

from serving.endpoint import EngineSettings
from training.model import EMBEDDED


@pytest.fixture(scope="session")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(EMBEDDED)


@pytest.fixture(scope="session")
def model():
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32, attn_implementation="sdpa").eval()


@pytest.fixture(scope="session")
def engine(model, tokenizer):
    from serving.generate import Engine

    started = Engine(model, tokenizer, EngineSettings())
    started.start()
    yield started
    started.close()
