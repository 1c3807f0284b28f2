"""How a model on disk becomes an engine that has proved that it answers.

Owns: `load_version`, `Bases` (dense bases shared by adapters), the check of an engine before it takes requests. Must not know:
traffic, tables' changes, HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy

from pydantic import ValidationError

from serving.endpoint import Adapter, EngineSettings, Version
from serving.generate import Engine, Sampling
from training.artifact import verify
from training.errors import wrong
from training.recipe import Recipe

CHECK = "The"  # any text will do
CHECK_TOKENS, CHECK_SECONDS = 4, 120


def device_of(settings: EngineSettings) -> str:
    """Returns where engines run."""
    return "cuda" if settings.gpus > 0 else "cpu"


def _quietly() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()  # a server's log is no terminal


def load_version(version: Version, settings: EngineSettings) -> Engine:
    """Returns a started engine of a packaged model whose files are the registered ones and which answers with finite numbers.

    Raises:
        InputError: another digest, missing or changed files, weights that are not finite.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _quietly()
    _require(version.folder, version.digest, f"version {version.version}")
    model = AutoModelForCausalLM.from_pretrained(
        version.folder, dtype="auto", use_safetensors=True, trust_remote_code=False, attn_implementation="sdpa"
    )
    tokenizer = AutoTokenizer.from_pretrained(version.folder, trust_remote_code=False)
    return _started(model.to(device_of(settings)), tokenizer, settings, f"version {version.version}")


class Bases:
    """Dense bases, each held once for all adapters trained on it. One thread at a time may use this."""

    def __init__(self):
        self._held: dict[tuple, object] = {}

    def load(self, adapter: Adapter, settings: EngineSettings) -> Engine:
        """Returns a started engine of an adapter on its base, whose weights it shares with every other one on that base.

        Raises:
            InputError: another digest, missing or changed files, an adapter of another base, weights that are not finite.
        """
        from training.model import load_tokenizer

        _quietly()
        recipe = Recipe.model_validate(adapter.recipe)
        if adapter.folder is not None:
            _require(adapter.folder, adapter.digest, f"adapter {adapter.name}")
        model = _sharing(self._base(recipe, settings))
        if adapter.folder is not None:
            from training.checkpoint import load_adapter

            model = load_adapter(model, adapter.folder)
            if hasattr(model, "get_base_model"):  # else it was trained as a whole, and took the base's place
                model = model.get_base_model()  # with its adapters' layers in place
        tokenizer = load_tokenizer(recipe)
        if adapter.chat_template is not None:
            tokenizer.chat_template = adapter.chat_template
        return _started(model, tokenizer, settings, f"adapter {adapter.name}")

    def keep(self, adapters: tuple[Adapter, ...]) -> None:
        """Lets go of the bases that none of these adapters stands on."""
        wanted = set()
        for adapter in adapters:
            with contextlib.suppress(ValidationError):  # said when it is loaded
                wanted.add(_base_of(Recipe.model_validate(adapter.recipe)))
        self._held = {key: base for key, base in self._held.items() if key in wanted}

    def _base(self, recipe: Recipe, settings: EngineSettings):
        from training.merge import dense_base

        key = _base_of(recipe)
        if key not in self._held:
            self._held[key] = dense_base(recipe, device=device_of(settings)).eval().requires_grad_(False)
        return self._held[key]


def _base_of(recipe: Recipe) -> tuple:
    # What is not quantized in a quantized model is held in the precision of the computation.
    return recipe.model, recipe.revision, recipe.bits, recipe.precision if recipe.bits < 16 else None


def _sharing(base):
    # A copy of everything but the numbers: adapters are put into the copy's modules and leave the base's as they are.
    tensors = [*base.parameters(), *base.buffers()]
    return copy.deepcopy(base, {id(tensor): tensor for tensor in tensors})


def _require(folder: str, digest: str | None, what: str) -> None:
    found = verify(folder)
    if digest is not None and found.digest != digest:
        raise wrong(folder, f"this is not the {what} that was registered (its digest differs).", "Register it again.")


def _started(model, tokenizer, settings: EngineSettings, what: str) -> Engine:
    import torch

    model = model.eval().requires_grad_(False)
    for name, values in model.state_dict().items():
        if values.is_floating_point() and not torch.isfinite(values).all():
            raise wrong(what, f"{name} holds values that are no finite numbers.", "Register a sound model.")
    ids = tokenizer(CHECK, return_tensors="pt").input_ids.to(model.device)
    with torch.inference_mode():  # before the engine takes the model over
        if not torch.isfinite(model(ids).logits).all():
            raise wrong(what, "the model's answer holds values that are no finite numbers.", "Register a sound model.")
    engine = Engine(model, tokenizer, settings)
    engine.start()
    try:
        written = asyncio.run(_tokens(engine))
        if not written or not engine.healthy():
            raise wrong(what, "the engine answers nothing.", "See the log of the replica.")
    except BaseException:
        engine.close()
        raise
    return engine


async def _tokens(engine: Engine) -> int:
    written = 0
    async with asyncio.timeout(CHECK_SECONDS):
        async for piece in engine.generate(engine.encode(CHECK), Sampling(max_tokens=CHECK_TOKENS)):
            written = piece.completion_tokens
    return written
