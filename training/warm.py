"""What a process keeps from one run to the next: frozen bases, tokenizers, tokenized rows.

Owns: `keeping`, `take` and `give_back` of a base, `rows_of`. Nothing is kept unless `keeping` says so. A base is kept only when
it is proven to be what was loaded: same modules, hooks and attributes, every weight the same to the checksum. So a run that finds
one here comes to what it comes to after a cold start, to the bit.
Must not know: Ray, runs, who comes next.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from training.data import Prepared, prepare, read
from training.model import load_model, load_tokenizer, where_is
from training.recipe import DataConfig, Job, Recipe

KEPT_ROWS = 4  # data at different lengths or with different tokenizers


@dataclass
class _Shelf:
    """What is kept, least recently used first, and how often it was used: deterministic counters for tests and benchmarks."""

    limit: int = 0  # bytes of bases
    bases: OrderedDict = field(default_factory=OrderedDict)  # key -> (model, proof, bytes)
    rows: OrderedDict = field(default_factory=OrderedDict)
    loaded: int = 0
    reused: int = 0
    refused: int = 0  # bases that came back changed


_shelf = _Shelf()
_out: dict[int, tuple] = {}  # id of a lent base -> key and proof


@contextlib.contextmanager
def keeping(limit: int = 2**31) -> Iterator[None]:
    """Keeps bases and rows from run to run while the block runs.

    Args:
        limit: bytes of all bases in host memory; the least recently used go first. On a GPU only one is kept, and it goes
            before another one is loaded.
    """
    before, _shelf.limit = _shelf.limit, limit
    try:
        yield
    finally:
        _shelf.limit = before
        if not before:
            forget()
            gc.unfreeze()


def forget() -> None:
    """Lets everything go."""
    _shelf.bases.clear()
    _shelf.rows.clear()
    _out.clear()


def counts() -> dict[str, int]:
    """Returns how many bases were `loaded`, `reused`, and `refused` because they came back changed."""
    return {"loaded": _shelf.loaded, "reused": _shelf.reused, "refused": _shelf.refused}


def take(recipe: Recipe, *, device: str = "cpu"):
    """Returns the frozen base as `training.model.load_model` does; nobody else gets it until it is given back."""
    if not _shelf.limit:
        return load_model(recipe, device=device)
    key = _key(recipe, device)
    if key in _shelf.bases:
        model, proof, _ = _shelf.bases.pop(key)
        _shelf.reused += 1
    else:
        if device != "cpu":
            _shelf.bases.clear()
        model = load_model(recipe, device=device)
        proof = _proof(model)
        _shelf.loaded += 1
        # What is here by now stays: without this every collection would walk through all libraries, 0.3 s each time.
        gc.freeze()
    _out[id(model)] = key, proof
    return model


def give_back(model) -> None:
    """Takes a base back, without anything attached to it, and keeps it if it is what was lent."""
    lent = _out.pop(id(model), None)
    if lent is None or not _shelf.limit:
        return
    key, proof = lent
    if _proof(model) != proof:
        _shelf.refused += 1
        return
    _shelf.bases[key] = model, proof, sum(t.untyped_storage().nbytes() for t in _tensors(model).values())
    while sum(size for _, _, size in _shelf.bases.values()) > _shelf.limit:
        _shelf.bases.popitem(last=False)


def rows_of(job: Job) -> tuple[Any, Prepared]:
    """Returns the job's tokenizer and its tokenized rows, as `load_tokenizer`, `read` and `prepare` do."""
    recipe, data = job.recipe, job.data
    key = (_place(recipe), data.model_dump_json(), job.cache, recipe.max_length, _stamps(data))
    if key not in _shelf.rows:
        tokenizer = load_tokenizer(recipe)
        found = tokenizer, prepare(read(data), data, tokenizer, recipe.max_length, cache=job.cache)
        if not _shelf.limit:
            return found
        _shelf.rows[key] = found
        while len(_shelf.rows) > KEPT_ROWS:
            _shelf.rows.popitem(last=False)
    _shelf.rows.move_to_end(key)
    return _shelf.rows[key]


def _place(recipe: Recipe) -> tuple:
    place = where_is(recipe.model)
    stamp = (place / "config.json").stat().st_mtime_ns if isinstance(place, Path) and place.is_dir() else None
    return str(place), recipe.revision, stamp


def _key(recipe: Recipe, device: str) -> tuple:
    compute = recipe.precision if recipe.bits < 16 else None  # what 4 and 8 bits are computed in is part of the model
    return (*_place(recipe), recipe.bits, compute, recipe.gradient_checkpointing, device)


def _stamps(data: DataConfig) -> tuple:
    """Returns size and time of each file of the data, so that another file of the same name is not taken for it."""
    found = []
    for origin in itertools.chain.from_iterable(data.origins(split).values() for split in ("train", "validation", "test")):
        path = Path(origin.file)
        found.append((path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else None)
    return tuple(found)


def _tensors(model) -> dict[str, torch.Tensor]:
    """Returns everything that the model's outputs depend on: parameters, buffers, quantization states."""
    found = dict(itertools.chain(model.named_parameters(), model.named_buffers()))
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        for part, owner in (("quant", state), ("quant2", getattr(state, "state2", None))):
            held = vars(owner) if owner is not None else {}
            found |= {f"{name}.{part}.{key}": value for key, value in held.items() if isinstance(value, torch.Tensor)}
    return found


def _proof(model) -> tuple:
    """Returns what tells a model from the same model with anything changed: structure and a checksum of every tensor."""
    structure = tuple(
        (name, type(module).__name__, module.training, len(module._forward_hooks) + len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    )
    tensors = tuple((name, id(tensor), tensor.requires_grad) for name, tensor in _tensors(model).items())
    sums = torch.stack([_sum(tensor).cpu() for tensor in _tensors(model).values()])
    # Handles of hooks on the embeddings, which are counted with the modules; PEFT replaces them.
    names = tuple(sorted(name for name in vars(model) if not name.startswith("_require_grads_hook")))
    return names, structure, tensors, tuple(sums.tolist())


def _sum(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the sum of a tensor's bytes, taken as 32-bit integers where they are a multiple of four: a change shows in it."""
    raw = tensor.detach().contiguous().reshape(-1)
    whole = not any(n * raw.element_size() % 4 for n in (raw.numel(), raw.storage_offset()))
    return raw.view(torch.int32 if whole else torch.uint8).sum(dtype=torch.int64)
