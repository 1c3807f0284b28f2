"""The base model: where it is, what shape it has, and how it is loaded.

Owns: `describe` (names and shapes from the safetensors headers alone, without torch), `modules` (its linear layers for people to
read), `load_model`, `load_tokenizer`, the quantization settings. Must not know: adapters, data, studies.

Weights are read only from safetensors and no code comes with a model (`trust_remote_code` stays off).
"""

from __future__ import annotations

import json
import math
import re
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from training.errors import wrong
from training.families import CAUSAL, family_of
from training.recipe import Recipe

EMBEDDED = Path(__file__).parent / "embedded" / "model"
OUTPUT_HEADS = ("lm_head", "embed_out", "output")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj", "query_key_value", "c_attn", "query", "key", "value")
ATTENTION_PARENTS = ("attn", "attention", "self_attn", "self_attention", "SelfAttention", "EncDecAttention")  # of dense, q
POSITIONS = ("relative_attention_bias", "position_embeddings", "embed_positions")  # matrices in a block that are no linear layers
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # a recipe's precision -> torch's name
HEADER_LIMIT = 100_000_000  # bytes; the safetensors format's own limit


@dataclass(frozen=True)
class Shape:
    """A model without its weights: `linear` maps module name to (out, in); sizes in elements."""

    config: dict
    linear: dict[str, tuple[int, int]]
    parameters: int
    linear_parameters: int

    @property
    def layers(self) -> int:
        return int(self.config.get("num_hidden_layers") or self.config.get("n_layer") or self.config.get("num_layers") or 1)

    @property
    def hidden(self) -> int:
        return int(self.config.get("hidden_size") or self.config.get("n_embd") or self.config.get("d_model") or 0)

    @property
    def vocabulary(self) -> int:
        return int(self.config.get("vocab_size") or 0)

    @property
    def leaves(self) -> list[str]:
        """The distinct last parts of the linear modules' names, as users write them."""
        return sorted({name.rsplit(".", 1)[-1] for name in self.linear})


@dataclass(frozen=True)
class Module:
    """Equal linear layers of all blocks: their name with `*` for the block's number, outputs, inputs, and how many there are."""

    name: str
    attention: bool
    out: int
    width: int
    count: int

    @property
    def rank(self) -> int:
        """The largest useful rank: two factors of a higher one make no other matrices (Hu et al. 2021, section 4)."""
        return min(self.out, self.width)

    @property
    def weights(self) -> int:
        return self.out * self.width * self.count


def where_is(model: str) -> Path | str:
    """Returns the folder of a local model, or the Hugging Face id as it is."""
    if model == "embedded":
        return EMBEDDED
    path = Path(model).expanduser()
    if path.exists() or model.startswith((".", "/", "~")):
        return path
    return model


@lru_cache(maxsize=16)
def describe(model: str, revision: str | None = None) -> Shape:
    """Returns the shape of a causal language model from its configuration and safetensors headers; reads no weights.

    Raises:
        InputError: no such model, no causal language model, no safetensors weights, or code that comes with the model.
    """
    shape = detect(model, revision)
    names = shape.config.get("architectures") or []
    if not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        family, kind = family_of(shape.config)
        known = f" ({family}, {kind})" if kind != CAUSAL else ""
        raise wrong(
            "recipe.model",
            f"{model} is no causal language model{known}, its architectures are {names}.",
            "Name a ...ForCausalLM model.",
        )
    return shape


def detect(model: str, revision: str | None = None) -> Shape:
    """Returns the shape of any transformers model, also of one that cannot be trained here (T5, BERT); reads no weights.

    Raises:
        InputError: no such model, no safetensors weights, or code that comes with the model.
    """
    place = where_is(model)
    config, tensors = _read_folder(place) if isinstance(place, Path) else _read_hub(place, revision)
    if "auto_map" in config:
        raise wrong("recipe.model", f"{model} needs code of its own, which is never run.", "Use a model that transformers knows.")
    linear = _linear(tensors, conv1d=config.get("model_type") in ("gpt2", "openai-gpt"))
    return Shape(config, linear, sum(math.prod(s) for s in tensors.values()), sum(a * b for a, b in linear.values()))


def _read_folder(folder: Path) -> tuple[dict, dict[str, tuple[int, ...]]]:
    if not folder.is_dir():
        raise wrong("recipe.model", f"no such folder: {folder}.", "Give `embedded`, an existing folder or a Hugging Face id.")
    if not (folder / "config.json").is_file():
        raise wrong("recipe.model", f"{folder} has no config.json.", "Name the folder of a transformers model.")
    config = _json_object(folder / "config.json")
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.is_file():
        shards = _json_object(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise wrong("recipe.model", f"{index} has no weight_map.", "Download the model again.")
        files = sorted(set(shards.values()))
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
        if pickled and not index.is_file():
            raise wrong("recipe.model", f"{folder} has only pickled weights ({', '.join(pickled)}), which are never loaded.",
                        "Convert them to safetensors.")  # fmt: skip
        raise wrong("recipe.model", f"{folder} lacks the weights {', '.join(missing)}.", "Download the model again.")
    tensors: dict[str, tuple[int, ...]] = {}
    for name in files:
        tensors |= _header(folder / name)
    return config, tensors


def _json_object(path: Path) -> dict:
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise wrong("recipe.model", f"{path} is not a JSON object.", "Download the model again.")
    return found


def _header(path: Path) -> dict[str, tuple[int, ...]]:
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else HEADER_LIMIT + 1
        try:
            if length > HEADER_LIMIT:
                raise ValueError
            header = json.loads(file.read(length))
            data = path.stat().st_size - 8 - length
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            if max((entry["data_offsets"][1] for entry in entries.values()), default=0) != data:
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            raise wrong("recipe.model", f"{path} is no complete safetensors file.", "Download the model again.") from None
    return {name: tuple(entry["shape"]) for name, entry in entries.items()}


def _read_hub(name: str, revision: str | None) -> tuple[dict, dict[str, tuple[int, ...]]]:
    import huggingface_hub as hub

    try:
        config = json.loads(Path(hub.hf_hub_download(name, "config.json", revision=revision)).read_text())
        metadata = hub.get_safetensors_metadata(name, revision=revision)
    except Exception as error:  # the hub's client raises its own, requests' and OS errors: all mean "cannot be had"
        first = (str(error).splitlines() or [""])[0][:200]
        raise wrong("recipe.model",
                    f"{name} is no local folder and not to be had from the hub ({type(error).__name__}: {first}).",
                    "Check the name and the network, or download the model and name its folder.") from None  # fmt: skip
    return config, {t: tuple(i.shape) for f in metadata.files_metadata.values() for t, i in f.tensors.items()}


def _linear(tensors: dict[str, tuple[int, ...]], *, conv1d: bool) -> dict[str, tuple[int, int]]:
    found = {}
    for name, shape in tensors.items():
        module = name.removesuffix(".weight")
        leaf = module.rsplit(".", 1)[-1]
        numbered = any(part.isdigit() for part in module.split("."))  # embeddings and heads stand outside the layers
        if name.endswith(".weight") and len(shape) == 2 and numbered and leaf not in (*OUTPUT_HEADS, *POSITIONS):
            found[module] = (shape[1], shape[0]) if conv1d else (shape[0], shape[1])
    return found


def is_attention(module: str) -> bool:
    """Says whether a linear module belongs to attention, by its own name or its parent's."""
    *parents, leaf = module.split(".")
    return leaf in ATTENTION or any(parent in ATTENTION_PARENTS for parent in parents[-2:])  # BERT: attention.output.dense


def match(targets: str | tuple[str, ...], shape: Shape) -> dict[str, tuple[int, int]]:
    """Returns the linear modules that `targets` names, with (out, in).

    Raises:
        InputError: a name matches nothing; the message lists those that exist.
    """
    if targets == "all-linear":
        return dict(shape.linear)
    if targets in ("attention", "mlp"):
        wanted = {name: size for name, size in shape.linear.items() if is_attention(name) == (targets == "attention")}
        if wanted:
            return wanted
        targets = (targets,)
    names = (targets,) if isinstance(targets, str) else targets
    chosen = {}
    for wanted in names:
        hits = {name: size for name, size in shape.linear.items() if name == wanted or name.endswith("." + wanted)}
        if not hits:
            raise wrong("recipe.targets", f"{wanted!r} matches no linear module.",
                        f"There are: all-linear, attention, mlp, {', '.join(shape.leaves)}.")  # fmt: skip
        chosen |= hits
    return chosen


def modules(shape: Shape) -> list[Module]:
    """Returns the linear layers that adapters can stand on, equal ones of all blocks together, attention first."""
    counted: dict[tuple, int] = {}
    for name, (out, width) in shape.linear.items():
        key = re.sub(r"\.\d+\.", ".*.", name), is_attention(name), out, width
        counted[key] = counted.get(key, 0) + 1
    found = [Module(*key, count) for key, count in counted.items()]
    return sorted(found, key=lambda module: not module.attention)


def device_of(resources) -> str:
    """Returns "cuda" where a GPU was asked for (and must be there), else "cpu"."""
    import torch

    if resources.gpus > 0:
        if not torch.cuda.is_available():
            raise RuntimeError("resources.gpus is above 0, but torch sees no GPU in this process")
        return "cuda"
    return "cpu"


def load_tokenizer(recipe: Recipe):
    """Returns the model's tokenizer; a missing padding token is its end-of-sequence token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(where_is(recipe.model), revision=recipe.revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        first = (str(error).splitlines() or [""])[0][:200]
        raise wrong("recipe.model", f"{recipe.model} has no tokenizer that can be read ({first}).",
                    "Put its tokenizer.json into the folder.") from None  # fmt: skip
    if tokenizer.eos_token_id is None:
        raise wrong(
            "recipe.model",
            f"the tokenizer of {recipe.model} has no end-of-sequence token.",
            "Set eos_token in its configuration.",
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(recipe: Recipe, *, device: str = "cpu"):
    """Returns the frozen base at the recipe's bits, in train mode, on the device."""
    import torch
    from transformers import AutoModelForCausalLM

    compute = getattr(torch, DTYPES[recipe.precision])
    options: dict = {"dtype": torch.bfloat16 if recipe.bits == 16 else compute if recipe.bits < 16 else torch.float32}
    if recipe.bits < 16:
        options |= {"quantization_config": quantization(recipe.bits, compute), "device_map": {"": device}}
    model = AutoModelForCausalLM.from_pretrained(
        where_is(recipe.model), revision=recipe.revision, use_safetensors=True, trust_remote_code=False,
        attn_implementation="sdpa", **options,
    )  # fmt: skip
    if recipe.bits >= 16:
        model.to(device)
    _keep_weights_as_they_are(model)
    model.requires_grad_(False)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def computing(precision: str, device: str):
    """Returns the context in which a model computes in a recipe's precision: autocast, or none for fp32."""
    import torch

    return torch.autocast(device, getattr(torch, DTYPES[precision]) if precision != "fp32" else None, enabled=precision != "fp32")


def quantization(bits: int, compute):
    """Returns bitsandbytes settings: NF4 with double quantization (Dettmers et al. 2023, section 3), or LLM.int8."""
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )


def _keep_weights_as_they_are(model) -> None:
    # On a CPU with AVX512-BF16 bitsandbytes repacks 4-bit weights in place at the first forward in eval mode; every gradient
    # and merge after that is silently wrong. The flag keeps the plain kernel. A test compares gradients after an evaluation.
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
