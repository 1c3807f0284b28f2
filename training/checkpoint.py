"""Adapters on disk: written aside, synced, renamed, manifest last; read only when the manifest proves them.

Owns: `save_adapter`, `load_adapter`. Must not know: how the adapter was trained.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

from training.errors import wrong

MANIFEST = "manifest.json"


def save_adapter(model, folder: str | Path, record: dict) -> str:
    """Writes the adapter in PEFT's format with a manifest of SHA-256 digests; returns the folder.

    Args:
        model: a PEFT model.
        folder: is replaced as a whole, so that it is never half old and half new.
        record: what the manifest says beside the digests (recipe, tokens, ...), as JSON.
    """
    folder = Path(folder)
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    model.save_pretrained(aside, safe_serialization=True)
    (aside / "README.md").unlink(missing_ok=True)  # PEFT's model card template
    files = {}
    for path in sorted(aside.iterdir()):
        files[path.name] = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}
        _sync(path)
    (aside / MANIFEST).write_text(json.dumps({"files": files} | record, indent=1, sort_keys=True))
    _sync(aside / MANIFEST)
    _sync(aside)
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        folder.rename(old)
    try:
        aside.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
    return str(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def verify(folder: str | Path) -> dict:
    """Returns the manifest of a checkpoint after comparing every file with it.

    Raises:
        InputError: no manifest, or a file is missing, changed or extra.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise wrong(str(folder), "no manifest, so this is no finished checkpoint.", "Run the trial again.")
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        digests = {name: entry["sha256"] for name, entry in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise wrong(str(folder / MANIFEST), "the manifest is damaged.", "Run the trial again.") from None
    present = {path.name for path in folder.iterdir()} - {MANIFEST}
    if present != set(digests):
        raise wrong(str(folder), f"files {sorted(present ^ set(digests))} do not match the manifest.", "Run the trial again.")
    for name, digest in digests.items():
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
            raise wrong(str(folder / name), "the file is not what was written (SHA-256 differs).", "Run the trial again.")
    return manifest


def load_adapter(model, folder: str | Path):
    """Returns the base model with the verified adapter, in eval mode, nothing trainable."""
    from peft import PeftModel
    from safetensors import safe_open

    verify(folder)
    loaded = PeftModel.from_pretrained(model, str(folder), use_safetensors=True).eval()
    with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as file:
        stored = {name.replace(".weight", "") for name in file.keys()}
    present = {n.replace(".default.weight", "") for n, _ in loaded.named_parameters() if "lora_" in n}
    if stored != present:  # PEFT only warns where tensors are missing
        raise wrong(
            str(folder), f"{len(stored ^ present)} adapter tensors do not match the model.", "Was it trained on another base?"
        )
    return loaded
