"""An adapter and its base become one plain model, and what was written is proved to be what was trained.

Owns: `dense_base`, `merge`, `package`, `difference`. Called on a worker by dotted name;
takes and returns JSON. Must not know: studies, endpoints.

The base is made dense first, the adapter is merged in fp32 and only then cast: merging into 4 or 8 bits would quantize a second
time. A merge is compared with the trial's own model, at its own bits, on prompts, and again after it was written and read back;
where a bound is broken nothing is left behind.
"""

from __future__ import annotations

import gc
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from training import artifact
from training.agreement import EXACT, STORED, Exam, bound_of, differ, greedy, same_answers, see, set_exam
from training.checkpoint import load_adapter, make_savable
from training.errors import wrong
from training.model import load_model, load_tokenizer
from training.recipe import Recipe

MERGED, MODEL = "merged", "model"
CHAT = "chat_template.jinja"  # where transformers looks first
SERVED = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PROMPTS = (
    "Good morning, I would like to ask you something about my last order.",
    "The weather was fine yesterday, and so we went down to the",
    "Write a short note to a friend who has moved to another town.",
    "List three things that one needs for a garden:",
)


def dense_base(recipe: Recipe, *, device: str = "cpu"):
    """Returns the base in fp32, in eval mode, with exactly the weights that an adapter of this recipe is trained against.

    At 4 and 8 bits every layer is quantized as for training and then dequantized; at 16 bits the values are those of bf16.

    Raises:
        InputError: the base comes quantized already.
    """
    recipe = recipe.model_copy(update={"gradient_checkpointing": False})
    dense = load_model(recipe.model_copy(update={"bits": 32, "precision": "fp32"}), device=device)
    if getattr(dense.config, "quantization_config", None) is not None:
        raise wrong("recipe.model", f"{recipe.model} is quantized already, so there are no dense weights to merge into.",
                    "Use the model that it was made from.")  # fmt: skip
    if recipe.bits < 32:
        trained = load_model(recipe, device=device)
        with torch.no_grad():
            for name, parameter in dense.named_parameters():
                parent = name.rpartition(".")[0]
                weight = trained.get_parameter(name)
                values = _dequantized(trained.get_submodule(parent), weight)
                if values is not weight and type(dense.get_submodule(parent)).__name__ == "Conv1D":
                    values = values.T  # quantizing turned GPT-2's (in, out) into (out, in)
                if values.shape != parameter.shape:
                    raise wrong(name, f"has shape {list(values.shape)} at {recipe.bits} bits and {list(parameter.shape)} dense.")
                parameter.copy_(values)
    return dense.eval()


def _dequantized(module, weight) -> torch.Tensor:
    kind = type(weight).__name__
    if kind not in ("Params4bit", "Int8Params"):
        return weight
    import bitsandbytes

    if kind == "Params4bit":
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    scales = weight.SCB if weight.SCB is not None else module.state.SCB
    return weight.data.float() * (scales.float() / 127).unsqueeze(1)


def merge(recipe: dict, adapter: str, output: str, *, precision: str = "fp32", prompts: list[str] | None = None,
          record: dict | None = None, device: str = "cpu") -> dict[str, Any]:  # fmt: skip
    """Merges an adapter into its dense base, casts, writes a plain Hugging Face folder, and verifies what was written.

    Where all weights were trained there is nothing to merge, and all the rest is the same.

    Args:
        recipe: what the adapter, or the whole model, was trained with.
        adapter: its folder, as `training.checkpoint` writes it.
        output: becomes an artifact of kind "merged"; nothing is there where a check fails.
        precision: of the weights as served: fp32, bf16 or fp16.
        prompts: real ones, as the model is asked, as plain text; 8 to 16 are enough; default: a few plain sentences.
        record: what the manifest says besides.
        device: where the adapter was trained, so that the base is quantized in the same way; the models are compared there.

    Returns:
        `folder`, `digest`, `parameters`, `bytes` (of the weights' files), `answers` (the greedy texts of what was written, at
        most 32 tokens each, in the order of the prompts), `commit` (of a hub's base) and `checks`: `precision`, the number of
        `prompts` and `positions`, `scale` (the largest |logit|), and each `difference` (a share of it) with its `bound`:
        `merge` (adapter beside the dense base against merged, both fp32), `trained` (the trial's own model against merged),
        `stored` (merged against what was written and read back); `greedy`: shares of equal answers and answer tokens, between
        the trial's model and the stored.

    Raises:
        InputError: the adapter does not belong to the recipe, is not finite or incomplete, or a bound is broken; names where.
    """
    given = Recipe.model_validate(recipe).model_copy(update={"gradient_checkpointing": False})
    if precision not in SERVED:
        raise wrong("precision", f"must be one of {', '.join(SERVED)}, got {precision!r}.")
    proven = artifact.verify(adapter, what="checkpoint", remedy="Run the trial again.")
    _same_recipe(given, proven)
    _finite_adapter(proven.folder)
    found: dict[str, Any] = {}

    def fill(aside: Path) -> dict:
        found.update(_merge_into(aside, given, proven.folder, precision, prompts or list(PROMPTS), device))
        own = {"kind": MERGED, "recipe": given.model_dump(mode="json"), "adapter": proven.digest, "precision": precision}
        return (record or {}) | own | {name: value for name, value in found.items() if name != "answers"}

    written = artifact.write(output, fill)
    return {"folder": str(written.folder), "digest": written.digest} | found


def _same_recipe(recipe: Recipe, adapter: artifact.Artifact) -> None:
    trained = adapter.manifest.get("recipe")
    trained = trained if isinstance(trained, dict) else {}
    own = recipe.model_dump(mode="json")
    names = ("model", "revision", "bits", "precision", "adapter", "rank", "alpha", "targets")
    if other := [name for name in names if name in trained and trained[name] != own[name]]:
        said = ", ".join(f"{name} {trained[name]!r}, not {own[name]!r}" for name in other)
        raise wrong(str(adapter.folder), f"the adapter was trained with {said}.", "Give the recipe of its own trial.")


def _finite_adapter(folder: Path) -> None:
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                if not torch.isfinite(file.get_tensor(name)).all():
                    raise wrong(str(folder), f"the adapter's {name} has NaN or infinite values.", "Choose another trial.")


def _merge_into(folder: Path, recipe: Recipe, adapter: Path, precision: str, prompts: list[str], device: str) -> dict:
    """Does the work of `merge` in a folder that others do not see yet; at most two models are in memory at once."""
    tokenizer = load_tokenizer(recipe)
    own = load_adapter(load_model(recipe, device=device), adapter)
    exam = set_exam(own, prompts, tokenizer, longest=recipe.max_length, precision=recipe.precision)
    trained = see(own, exam.batch, precision=recipe.precision)
    del own
    gc.collect()

    base = dense_base(recipe, device=device)
    shapes = {name: tensor.shape for name, tensor in base.state_dict().items()}
    beside = load_adapter(base, adapter)
    unmerged = see(beside, exam.batch)
    model = _merged(beside)
    _same_tensors(shapes, model)
    merged = see(model, exam.batch)
    checks: dict[str, Any] = {"precision": precision, "prompts": len(prompts), "positions": int(merged.counts.sum())}
    checks["scale"] = merged.scale
    checks["merge"] = differ("merged and adapter beside the dense base", unmerged, merged, EXACT)
    checks["trained"] = differ(f"merged and the trial's own model at {recipe.bits} bits", trained, merged, bound_of(recipe))
    del unmerged

    model.to(SERVED[precision])
    _finite(model, f"in {precision}")
    make_savable(model.generation_config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    served = _read_back(folder, model, precision, tokenizer, exam)
    stored = see(served, exam.batch)
    checks["stored"] = differ(f"as written in {precision} and merged in fp32", merged, stored, STORED[precision])
    exact = precision == "fp32" and bound_of(recipe) == EXACT
    again = greedy(served, exam.asked, tokenizer)
    checks["greedy"] = same_answers(trained, stored, exam.answers, again, exact=exact)
    return {
        "checks": checks,
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        "answers": tokenizer.batch_decode(again, skip_special_tokens=True),
        "commit": getattr(base.config, "_commit_hash", None),  # of a hub's model: a branch or a tag may move on
    }


def _merged(beside):
    if not hasattr(beside, "merge_and_unload"):  # all weights were trained: it is merged already
        return beside
    try:
        model = beside.merge_and_unload(safe_merge=True)
    except ValueError as error:  # PEFT found NaN in a merged layer
        raise wrong("merge", f"the adapter breaks the base ({error}).", "Choose another trial.") from None
    _finite(model, "after the merge")
    return model


def _finite(model, when: str) -> None:
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise wrong(name, f"has NaN or infinite values {when}.", "Serve it in fp32, or choose another trial.")


def _same_tensors(shapes: dict[str, torch.Size], model) -> None:
    found = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if other := sorted(name for name in {*shapes, *found} if shapes.get(name) != found.get(name)):
        raise wrong(other[0], f"and {len(other) - 1} more tensors of the merged model are not those of the base.")


def _read_back(folder: Path, model, precision: str, tokenizer, exam: Exam):
    """Returns the written model, loaded as anybody would without PEFT, after comparing its tokens and every weight."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reader = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    texts = [tokenizer.decode(row) for row in exam.asked]
    if reader(texts)["input_ids"] != tokenizer(texts)["input_ids"] or reader.chat_template != tokenizer.chat_template:
        raise wrong("tokenizer", "as written it gives other tokens than the base's own.")
    served = AutoModelForCausalLM.from_pretrained(
        folder, dtype=SERVED[precision], use_safetensors=True, trust_remote_code=False, attn_implementation="sdpa"
    )
    if getattr(served.config, "quantization_config", None) is not None:
        raise wrong("config.json", "as written it still speaks of quantization.")
    served = served.to(exam.batch["input_ids"].device).eval()
    wanted, found = model.state_dict(), served.state_dict()
    for name in sorted({*wanted, *found}):
        if name not in wanted or name not in found or not torch.equal(found[name], wanted[name]):
            raise wrong(name, "as written is not what was merged.", "Is the disk sound? Try again.")
    return served


def package(
    merged: str, adapter: str, card: str, output: str, record: dict, *, chat_template: str | None = None
) -> dict[str, str]:
    """Puts a merged model, its adapter and its card into one artifact of kind "model"; returns `folder` and `digest`.

    Files are linked where the file system allows, so a package costs no second copy of the weights.

    Args:
        card: the text of the model card.
        record: what the manifest says besides what it says of the merge.
        chat_template: asks as the model was asked in training; default: the base's own.

    Raises:
        InputError: one of the folders is not what was written, or the adapter is not the one that was merged.
    """
    model = artifact.verify(merged, what="merged model", remedy="Merge it again.")
    trained = artifact.verify(adapter, what="checkpoint", remedy="Run the trial again.")
    if model.manifest.get("kind") != MERGED:
        raise wrong(str(model.folder), f"is of kind {model.manifest.get('kind')!r}, not {MERGED!r}.", "Merge the adapter first.")
    if model.manifest.get("adapter") != trained.digest:
        raise wrong(str(trained.folder), "is not the adapter that was merged.", "Merge it, then package.")

    def fill(aside: Path) -> dict:
        for name in model.manifest["files"]:
            _link(model.folder / name, aside / name)
        for name in (*trained.manifest["files"], artifact.MANIFEST):
            _link(trained.folder / name, aside / "adapter" / name)
        (aside / "README.md").write_text(card, encoding="utf-8")
        if chat_template is not None:
            (aside / CHAT).unlink(missing_ok=True)  # a link: writing into it would change the merged model
            (aside / CHAT).write_text(chat_template, encoding="utf-8")
        told = {name: value for name, value in model.manifest.items() if name != "files"}
        return told | record | {"kind": MODEL}

    written = artifact.write(output, fill)
    return {"folder": str(written.folder), "digest": written.digest}


def difference(one: str, other: str) -> dict[str, Any]:
    """Returns how far the weights of two merged or packaged models are apart, after verifying both.

    Returns:
        `largest`: the largest |difference| of a weight as a share of the largest |weight| of its tensor; `tensor`: where.

    Raises:
        InputError: one of them is not what was written or not finite, or their tensors are not the same.
    """
    tensors = [_tensors(artifact.verify(folder, what="model").folder) for folder in (one, other)]
    if different := sorted(tensors[0].keys() ^ tensors[1].keys()):
        raise wrong(different[0], f"and {len(different) - 1} more tensors are in one of the models only.")
    largest, where = 0.0, next(iter(tensors[0]), "")
    for name in sorted(tensors[0]):
        a, b = (_read(each[name], name) for each in tensors)
        if a.shape != b.shape:
            raise wrong(name, f"has shape {list(a.shape)} in one model and {list(b.shape)} in the other.")
        apart = ((a - b).abs().max() / a.abs().max().clamp(min=1e-12)).item() if a.numel() else 0.0
        if not math.isfinite(apart):
            raise wrong(name, "has NaN or infinite values in one of the models.")
        if apart > largest:
            largest, where = apart, name
    return {"largest": largest, "tensor": where}


def _tensors(folder: Path) -> dict[str, Path]:
    """Returns in which file each tensor of a model is."""
    from safetensors import safe_open

    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def _read(path: Path, name: str) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.get_tensor(name).float()


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


__all__ = ["dense_base", "difference", "merge", "package"]
