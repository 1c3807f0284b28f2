"""A Llama-shaped model as one GGUF file, the format that llama.cpp reads.

Owns: `write` (settings, weights), `read` (the file through transformers' own loader), what can be written and the
reasons why the rest cannot. Must not know: how a tokenizer is written; artifacts, adapters, studies.

Names of tensors and keys are those of the GGUF specification; llama.cpp turns pairs of neighbouring values where transformers
turns the two halves of a head, so the rows of q and k are put into that order for the architectures that need it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from training.errors import wrong
from training.gguf_tokens import INSTEAD, vocabulary

# Architecture of the file by model type; Mistral's mathematics is Llama's.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
BIASED = {"qwen2": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")}
LARGEST = 65504.0  # of float16
BLOCK = 32  # values that share one scale in Q8_0


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file: where its values are, and its form there ("F32", "F16" or "Q8_0")."""

    name: str
    source: str
    file: Path
    shape: tuple[int, ...]
    form: str


def needed():
    """Returns the `gguf` package.

    Raises:
        InputError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise wrong("export", "GGUF files need the package gguf.", "pip install 'paretune[gguf]'") from None
    return gguf


def write(folder: Path, path: Path, *, eight_bits: bool, name: str, about: dict[str, str] | None = None) -> dict:
    """Writes the model of a Hugging Face folder as a GGUF file; one tensor at a time is in memory.

    Args:
        folder: config, safetensors weights and tokenizer of a merged model.
        path: the file to write; what is there is overwritten.
        eight_bits: Q8_0 instead of float16 for matrices. Vectors stay float32, and matrices whose rows are no multiple of
            32 values stay float16.
        name: of the model, for people.
        about: further keys of the file's metadata.

    Returns:
        `architecture`; `tokenizer`, its name in the format; `left_at_f16`, the tensors that Q8_0 cannot hold.

    Raises:
        InputError: no package `gguf`, or a model or tokenizer that the format or this writer cannot hold, with the reason.
    """
    gguf = needed()
    config = _config(folder)
    architecture = ARCHITECTURES[config.model_type]
    add_vocabulary = vocabulary(folder, config.vocab_size)
    tensors = _tensors(folder, config, eight_bits)
    writer = gguf.GGUFWriter(None, architecture)
    try:
        _add_settings(writer, config, name, gguf.LlamaFileType.MOSTLY_Q8_0 if eight_bits else gguf.LlamaFileType.MOSTLY_F16)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in (about or {}).items():
            writer.add_string(key, value)
        pre = add_vocabulary(writer)
        _add_tensors(writer, gguf, path, tensors, config)
    finally:
        writer.close()
    left = [tensor.name for tensor in tensors if eight_bits and tensor.form == "F16"]
    return {"architecture": architecture, "tokenizer": pre, "left_at_f16": left}


def read(path: Path, *, like=None):
    """Returns the model in float32 and the tokenizer that transformers' own loader reads from a GGUF file.

    Args:
        path: of the file.
        like: the configuration that it was written from. transformers does not read the divided frequencies of Llama 3 (llama.cpp
            does), so that these alone are taken from it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    given = {"gguf_file": path.name, "local_files_only": True}
    config = AutoConfig.from_pretrained(path.parent, **given)
    if like is not None and (like.rope_parameters or {}).get("rope_type") == "llama3":
        config.rope_parameters = like.rope_parameters
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, config=config, dtype=torch.float32, trust_remote_code=False, **given
    )
    # Not AutoTokenizer: for a Llama it takes the class with SentencePiece's rules, also where the file names others.
    return model.eval(), PreTrainedTokenizerFast.from_pretrained(path.parent, **given)


def _config(folder: Path):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise wrong("export", f"a model of type {kind} is not written as GGUF, only Llama-shaped ones are "
                    f"({', '.join(ARCHITECTURES)}): their files can be read back and compared.", INSTEAD)  # fmt: skip
    rope = getattr(config, "rope_parameters", None) or {}
    window = getattr(config, "sliding_window", None)
    windowed = getattr(config, "use_sliding_window", window is not None)
    reasons = {
        f"rope type {rope.get('rope_type')}": rope.get("rope_type", "default") not in ("default", "llama3"),
        "biased attention": getattr(config, "attention_bias", False),
        "biased feed-forward layers": getattr(config, "mlp_bias", False),
        f"the activation {config.hidden_act}": config.hidden_act != "silu",
        f"attention within a window of {window} tokens": windowed and window and window < config.max_position_embeddings,
        "quantized weights": getattr(config, "quantization_config", None) is not None,
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        raise wrong("export", f"this {kind} model has {' and '.join(found)}, which this writer of GGUF does not carry.", INSTEAD)
    return config


def _head(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _slower(config):
    """Returns by what each frequency of Llama 3's position embedding is divided, float32 (head / 2); None where there is none."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = config.rope_parameters or {}
    if rope.get("rope_type") != "llama3":
        return None
    import numpy

    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    steps = numpy.arange(0, _head(config), 2, dtype=numpy.float64) / _head(config)
    return (float(rope["rope_theta"]) ** -steps / frequencies.double().numpy()).astype(numpy.float32)


def _add_settings(writer, config, name: str, file_type: int) -> None:
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head(config))
    writer.add_value_length(_head(config))
    writer.add_rope_dimension_count(_head(config))
    writer.add_rope_freq_base(float((config.rope_parameters or {}).get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _tensors(folder: Path, config, eight_bits: bool) -> list[Tensor]:
    """Plans the file from the headers alone, and refuses a tensor that is missing or that has no place in it."""
    from safetensors import safe_open

    places: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            places |= {key: (file, tuple(opened.get_slice(key).get_shape())) for key in opened.keys()}
    names = {f"{old}.weight": f"{new}.weight" for old, new in OUTSIDE.items()}
    if config.tie_word_embeddings:
        places.pop("lm_head.weight", None)
        del names["lm_head.weight"]
    for number in range(config.num_hidden_layers):
        for old, new in LAYER.items():
            for part in ("weight", "bias") if old in BIASED.get(config.model_type, ()) else ("weight",):
                names[f"model.layers.{number}.{old}.{part}"] = f"blk.{number}.{new}.{part}"
    if odd := sorted(set(names) ^ set(places)):
        what = "is missing" if odd[0] in names else "has no place in a GGUF file"
        raise wrong("export", f"the tensor {odd[0]} {what}, and {len(odd) - 1} more are odd.", INSTEAD)

    def form(shape: tuple[int, ...]) -> str:
        if len(shape) == 1:
            return "F32"
        return "Q8_0" if eight_bits and shape[-1] % BLOCK == 0 else "F16"

    return [Tensor(new, old, *places[old], form(places[old][1])) for old, new in names.items()]


def _add_tensors(writer, gguf, path: Path, tensors: list[Tensor], config) -> None:
    import numpy
    from safetensors import safe_open

    slower = _slower(config)
    if slower is not None:
        writer.add_tensor_info("rope_freqs.weight", slower.shape, slower.dtype, slower.nbytes)
    for tensor in tensors:
        form = gguf.GGMLQuantizationType[tensor.form]
        block, size = gguf.GGML_QUANT_SIZES[form]
        # With the form given, the kind of number only says whether the shape counts bytes or values: here it counts values.
        writer.add_tensor_info(
            tensor.name, tensor.shape, numpy.dtype(numpy.float16), math.prod(tensor.shape) // block * size, raw_dtype=form
        )
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if slower is not None:
        writer.write_tensor_data(slower)
    turned = ARCHITECTURES[config.model_type] == "llama"
    for tensor in tensors:
        with safe_open(tensor.file, "pt") as opened:
            values = opened.get_tensor(tensor.source).float().numpy()
        largest = float(numpy.abs(values).max(initial=0.0))
        if not math.isfinite(largest) or (tensor.form != "F32" and largest > LARGEST):
            raise wrong("export", f"the tensor {tensor.source} holds {largest}, which float16 does not.", INSTEAD)
        if turned and tensor.name.endswith((".attn_q.weight", ".attn_k.weight")):
            heads = config.num_attention_heads if "attn_q" in tensor.name else config.num_key_value_heads
            values = values.reshape(heads, 2, -1, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)
        form = gguf.GGMLQuantizationType[tensor.form]
        writer.write_tensor_data(numpy.ascontiguousarray(gguf.quants.quantize(numpy.ascontiguousarray(values), form)))
