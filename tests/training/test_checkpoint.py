"""A checkpoint is whole or it is not there; only what the manifest proves is read."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from training import artifact
from training.adapters import attach
from training.checkpoint import load_adapter, save_adapter, verify
from training.errors import InputError
from training.model import describe, load_model
from training.recipe import Recipe

IDS = torch.arange(5, 45).reshape(2, 20)


def tuned(llama: str, seed: int = 0, adapter: str = "lora"):
    """A model whose adapter is no longer the identity."""
    recipe = Recipe(model=llama, rank=4, dropout=0, seed=seed, adapter=adapter)
    model = attach(load_model(recipe), recipe, describe(llama))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(scope="module")
def model(llama):
    return tuned(llama)


@pytest.fixture
def saved(model, tmp_path) -> Path:
    return Path(save_adapter(model, tmp_path / "adapter", {"recipe": {"rank": 4}, "tokens": 7}))


@pytest.fixture
def base(llama):
    return load_model(Recipe(model=llama)).eval()


def test_what_was_saved_gives_the_same_logits(saved, model, base):
    before = logits(base)
    loaded = load_adapter(base, saved)
    assert torch.equal(logits(loaded), logits(model)) and not torch.equal(before, logits(model))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("adapter", ["dora", "adalora", "full"])
def test_every_method_comes_back_as_it_was(llama, base, tmp_path, adapter):
    model = tuned(llama, adapter=adapter)
    before = logits(base)
    loaded = load_adapter(base, save_adapter(model, tmp_path / "kept", {}))
    assert torch.equal(logits(loaded), logits(model)) and not torch.equal(before, logits(model))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    if adapter == "full":
        assert torch.equal(logits(base), before)  # others may stand on the base


@pytest.mark.filterwarnings("ignore")  # transformers reports what does not fit, too
def test_a_whole_model_of_another_base_is_refused(llama, tmp_path):
    folder = save_adapter(tuned(llama, adapter="full"), tmp_path / "kept", {})
    with pytest.raises(InputError, match="tensors do not match the model"):
        load_adapter(load_model(Recipe()), folder)


def test_plain_peft_reads_it_too(saved, model, base):
    from peft import PeftModel

    assert torch.equal(logits(PeftModel.from_pretrained(base, str(saved)).eval()), logits(model))


def test_the_manifest_tells_every_file_and_the_record(saved):
    manifest = verify(saved)
    assert manifest["recipe"] == {"rank": 4} and manifest["tokens"] == 7
    assert set(manifest["files"]) == {"adapter_config.json", "adapter_model.safetensors"}
    for name, entry in manifest["files"].items():
        content = (saved / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_flipped_bit_is_found(saved, name, base):
    content = bytearray((saved / name).read_bytes())
    content[len(content) // 2] ^= 1
    (saved / name).write_bytes(content)
    with pytest.raises(InputError, match="SHA-256 differs"):
        load_adapter(base, saved)


def test_a_missing_or_an_extra_file_is_found(saved):
    (saved / "extra.bin").write_text("")
    with pytest.raises(InputError, match=r"files \['extra.bin'\] do not match"):
        verify(saved)
    (saved / "extra.bin").unlink()
    (saved / "adapter_config.json").unlink()
    with pytest.raises(InputError, match=r"files \['adapter_config.json'\] do not match"):
        verify(saved)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"files": []}', '{"files": {"a": 1}}'])
def test_a_damaged_manifest_is_found(saved, text):
    (saved / "manifest.json").write_text(text)
    with pytest.raises(InputError, match="the manifest is damaged"):
        verify(saved)


def test_a_folder_without_manifest_is_no_checkpoint(saved):
    (saved / "manifest.json").unlink()
    with pytest.raises(InputError, match="no finished checkpoint"):
        verify(saved)


class Crash(BaseException):
    pass


def crash(*args, **kwargs):
    raise Crash


@pytest.mark.parametrize("moment", ["rename", "sync", "json"])
def test_a_crash_while_saving_leaves_the_old_checkpoint_whole(saved, llama, monkeypatch, moment):
    old = (saved / "adapter_model.safetensors").read_bytes()
    other = tuned(llama, seed=1)
    with monkeypatch.context() as patch:
        if moment == "rename":
            patch.setattr(Path, "rename", crash)
        elif moment == "sync":
            patch.setattr(artifact, "sync", crash)
        else:
            patch.setattr(artifact.json, "dumps", crash)
        with pytest.raises(Crash):
            save_adapter(other, saved, {})
    verify(saved)
    assert (saved / "adapter_model.safetensors").read_bytes() == old
    save_adapter(other, saved, {})  # and the next attempt gets through
    verify(saved)
    assert (saved / "adapter_model.safetensors").read_bytes() != old
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_full_disk_at_the_last_rename_brings_the_old_one_back(saved, llama, monkeypatch):
    old, rename = (saved / "adapter_model.safetensors").read_bytes(), Path.rename

    def fail(self, target):
        if target == saved and not self.name.endswith(".old"):
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="No space"):
        save_adapter(tuned(llama, seed=1), saved, {})
    verify(saved)
    assert (saved / "adapter_model.safetensors").read_bytes() == old


def test_saving_again_replaces_the_whole_folder(saved, model):
    (saved / "leftover").write_text("")
    save_adapter(model, saved, {})
    verify(saved)


def rewrite(folder: Path, change) -> None:
    """Changes the tensors of an adapter and its manifest, as somebody with a wrong file but a right manifest would have."""
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][path.name]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")
def test_an_adapter_with_missing_tensors_is_refused(saved, base):
    rewrite(saved, lambda tensors: dict(list(tensors.items())[1:]))
    with pytest.raises(InputError, match="1 adapter tensors do not match the model"):
        load_adapter(base, saved)


def test_pickled_adapters_are_not_read(saved, base):
    shutil.move(saved / "adapter_model.safetensors", saved / "adapter_model.bin")
    with pytest.raises(InputError, match="do not match the manifest"):
        load_adapter(base, saved)
