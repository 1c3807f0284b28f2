"""Which kind of model a configuration describes.

Owns: `FAMILIES`, `family_of`. Pure. Must not know: weights, layers, adapters.
"""

from __future__ import annotations

CAUSAL, ENCODER, BOTH = "causal", "encoder", "encoder and decoder"
# transformers' model_type -> (name, what it is). Another type is known by its layers alone, and trained where it is causal.
FAMILIES = {
    "llama": ("Llama", CAUSAL), "mistral": ("Mistral", CAUSAL), "mixtral": ("Mixtral", CAUSAL), "qwen2": ("Qwen", CAUSAL),
    "qwen3": ("Qwen", CAUSAL), "gemma": ("Gemma", CAUSAL), "gemma2": ("Gemma", CAUSAL), "gemma3_text": ("Gemma", CAUSAL),
    "phi": ("Phi", CAUSAL), "phi3": ("Phi", CAUSAL), "gpt2": ("GPT-2", CAUSAL), "gptj": ("GPT-J", CAUSAL),
    "gpt_neo": ("GPT-Neo", CAUSAL), "gpt_neox": ("GPT-NeoX", CAUSAL), "opt": ("OPT", CAUSAL), "bloom": ("BLOOM", CAUSAL),
    "falcon": ("Falcon", CAUSAL), "t5": ("T5", BOTH), "mt5": ("T5", BOTH), "bart": ("BART", BOTH), "bert": ("BERT", ENCODER),
    "roberta": ("RoBERTa", ENCODER), "distilbert": ("DistilBERT", ENCODER), "electra": ("ELECTRA", ENCODER),
}  # fmt: skip


def family_of(config: dict) -> tuple[str, str]:
    """Returns the canonical name of a model's family, and whether it is causal, an encoder, or encoder and decoder."""
    kind = str(config.get("model_type") or "unknown")
    if kind in FAMILIES:
        return FAMILIES[kind]
    return kind, BOTH if config.get("is_encoder_decoder") else CAUSAL
