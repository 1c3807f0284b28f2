"""What was trained, on disk: written aside, synced, renamed, manifest last; read only when the manifest proves them.

Owns: `save_adapter`, `load_adapter`: an adapter in PEFT's format, or, where all weights were trained, the whole model in that
of transformers. The folder tells which. Must not know: how it was trained.
"""

from __future__ import annotations

import warnings
from pathlib import Path

from training import artifact
from training.errors import wrong


def save_adapter(model, folder: str | Path, record: dict) -> str:
    """Writes the adapter, or a whole model, with a manifest of SHA-256 digests; returns the folder.

    Args:
        model: a PEFT model, or a plain one all of whose weights were trained.
        folder: is replaced as a whole, so that it is never half old and half new.
        record: what the manifest says beside the digests (recipe, tokens, ...), as JSON.
    """

    def fill(aside: Path) -> dict:
        if not hasattr(model, "peft_config"):
            make_savable(model.generation_config)
        model.save_pretrained(aside, safe_serialization=True)
        (aside / "README.md").unlink(missing_ok=True)  # PEFT's model card template
        return record

    return str(artifact.write(folder, fill).folder)


def make_savable(generation) -> None:
    """Says `do_sample` where a base sets a temperature without it, which transformers reads but refuses to write."""
    try:
        generation.validate(strict=True)
    except ValueError:
        generation.do_sample = True


def is_adapter(folder: str | Path) -> bool:
    """Says whether a checkpoint is an adapter, and not a whole model."""
    return (Path(folder) / "adapter_config.json").is_file()


def verify(folder: str | Path) -> dict:
    """Returns the manifest of a checkpoint after comparing every file with it.

    Raises:
        InputError: no manifest, or a file is missing, changed or extra.
    """
    return artifact.verify(folder, what="checkpoint", remedy="Run the trial again.").manifest


def load_adapter(model, folder: str | Path):
    """Returns the base model with the verified adapter, or the verified whole model; in eval mode, nothing trainable.

    The base may be another form of what the adapter was trained on: quantized or dense. A whole model takes the base's place,
    which is left as it is; only its precision and its device are those of the base.

    Raises:
        InputError: the checkpoint is damaged, or made on another base.
    """
    verify(folder)
    return _load_peft(model, folder) if is_adapter(folder) else _load_whole(model, folder)


def _load_peft(model, folder: str | Path):
    from peft import PeftConfig, PeftModel
    from safetensors import safe_open
    from transformers.pytorch_utils import Conv1D

    config = PeftConfig.from_pretrained(str(folder))
    # GPT-2's (in, out) layers become (out, in) ones when they are quantized: the model at hand decides, not the one trained on.
    config.fan_in_fan_out = any(isinstance(module, Conv1D) for module in model.modules())
    with warnings.catch_warnings():
        # What AdaLoRA writes as rank_pattern has names of its own, which PEFT warns of, and then reads.
        warnings.filterwarnings("ignore", "The following rank_pattern keys did not match", RuntimeWarning)
        loaded = PeftModel.from_pretrained(model, str(folder), config=config, use_safetensors=True).eval()
    with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as file:
        stored = {name.removesuffix(".weight") for name in file.keys()}
    named = (name for name, _ in loaded.named_parameters() if "lora_" in name)
    _same_names(folder, stored, {name.removesuffix(".weight").removesuffix(".default") for name in named}, "adapter tensors")
    return loaded


def _load_whole(model, folder: str | Path):
    from transformers import AutoModelForCausalLM

    loaded, told = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=model.dtype, use_safetensors=True, trust_remote_code=False, attn_implementation="sdpa",
        output_loading_info=True,
    )  # fmt: skip
    shapes = [{name: tuple(tensor.shape) for name, tensor in each.state_dict().items()} for each in (model, loaded)]
    other = {name for name in {*shapes[0], *shapes[1]} if shapes[0].get(name) != shapes[1].get(name)}
    _same_names(folder, other | {*told["missing_keys"], *told["unexpected_keys"]}, set(), "tensors")
    return loaded.to(model.device).eval().requires_grad_(False)


def _same_names(folder: str | Path, stored: set[str], present: set[str], what: str) -> None:
    if stored != present:  # the libraries only warn where tensors are missing
        raise wrong(str(folder), f"{len(stored ^ present)} {what} do not match the model.", "Was it trained on another base?")
