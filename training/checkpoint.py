"""Adapters on disk: written aside, synced, renamed, manifest last; read only when the manifest proves them.

Owns: `save_adapter`, `load_adapter`. Must not know: how the adapter was trained.
"""

from __future__ import annotations

from pathlib import Path

from training import artifact
from training.errors import wrong


def save_adapter(model, folder: str | Path, record: dict) -> str:
    """Writes the adapter in PEFT's format with a manifest of SHA-256 digests; returns the folder.

    Args:
        model: a PEFT model.
        folder: is replaced as a whole, so that it is never half old and half new.
        record: what the manifest says beside the digests (recipe, tokens, ...), as JSON.
    """

    def fill(aside: Path) -> dict:
        model.save_pretrained(aside, safe_serialization=True)
        (aside / "README.md").unlink(missing_ok=True)  # PEFT's model card template
        return record

    return str(artifact.write(folder, fill).folder)


def verify(folder: str | Path) -> dict:
    """Returns the manifest of a checkpoint after comparing every file with it.

    Raises:
        InputError: no manifest, or a file is missing, changed or extra.
    """
    return artifact.verify(folder, what="checkpoint", remedy="Run the trial again.").manifest


def load_adapter(model, folder: str | Path):
    """Returns the base model with the verified adapter, in eval mode, nothing trainable.

    The base may be another form of what the adapter was trained on: quantized or dense.
    """
    from peft import PeftConfig, PeftModel
    from safetensors import safe_open
    from transformers.pytorch_utils import Conv1D

    verify(folder)
    config = PeftConfig.from_pretrained(str(folder))
    # GPT-2's (in, out) layers become (out, in) ones when they are quantized: the model at hand decides, not the one trained on.
    config.fan_in_fan_out = any(isinstance(module, Conv1D) for module in model.modules())
    loaded = PeftModel.from_pretrained(model, str(folder), config=config, use_safetensors=True).eval()
    with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as file:
        stored = {name.replace(".weight", "") for name in file.keys()}
    present = {n.replace(".default.weight", "") for n, _ in loaded.named_parameters() if "lora_" in n}
    if stored != present:  # PEFT only warns where tensors are missing
        raise wrong(
            str(folder), f"{len(stored ^ present)} adapter tensors do not match the model.", "Was it trained on another base?"
        )
    return loaded
