"""The models that training is measured on, besides the embedded one: Llamas with random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from training.model import EMBEDDED

# `small` has the shape of Karpathy's stories260K; `medium` has 45 million parameters, of which 16 are its vocabulary of 32,000.
SHAPES = {
    "small": {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 5, "num_attention_heads": 8,
              "num_key_value_heads": 4, "vocab_size": 512},
    "medium": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 9, "num_attention_heads": 8,
               "num_key_value_heads": 4, "vocab_size": 32_000},
}  # fmt: skip


def llama(name: str, folder: Path) -> str:
    """Writes a random Llama of one of SHAPES with the embedded model's tokenizer under a folder; returns where it is."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    special = {
        key: json.loads((EMBEDDED / "config.json").read_text())[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPES[name], max_position_embeddings=2048, tie_word_embeddings=True, **special))
    model.save_pretrained(folder / name)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(EMBEDDED / file, folder / name / file)
    return str(folder / name)
