"""A GGUF file says what the model says, to transformers and to llama.cpp; what the format cannot hold is refused by name."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from training import export, gguf, gguf_tokens
from training.errors import InputError
from training.model import EMBEDDED

SHARED = Path(os.environ.get("PARETUNE_SHARED", Path(__file__).parents[3] / "shared" / "data"))
STORIES = SHARED / "models" / "stories260K" / "hf"
AWKWARD = (
    "It's 12345 o'clock, isn't it?",
    "two  spaces   three\n\n new\tlines \n",
    "Größe, naïve, 日本語, 🙂🙂",
    "don't DON'T 3.14159 1,000",
    "<|eos|> written out <|bos|>",
    "trailing space ",
    "x",
    "a_b-c/d\\e {f} [g] #1",
)

LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


@pytest.fixture(scope="module")
def shapes(save_model, special) -> dict[str, str]:
    from transformers import LlamaConfig, MistralConfig, Qwen2Config

    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, **special}
    found = {
        "llama": save_model("untied", LlamaConfig(**small, num_key_value_heads=2, tie_word_embeddings=False, rope_theta=5000.0)),
        "wide heads": save_model("wide", LlamaConfig(**small, num_key_value_heads=1, head_dim=32, rms_norm_eps=1e-5)),
        "llama 3": save_model("llama3", LlamaConfig(**small, num_key_value_heads=2, head_dim=32, rope_parameters=LLAMA_3)),
        "mistral": save_model("mistral", MistralConfig(**small, num_key_value_heads=2, sliding_window=None)),
        # Room for the token that transformers adds to every Qwen2, and numbers that no token has.
        "qwen2": save_model(
            "qwen2", Qwen2Config(**small | {"vocab_size": 1088}, num_key_value_heads=2, tie_word_embeddings=True)
        ),
    }
    for folder in found.values():  # what starts as nothing would hide where it goes
        file = Path(folder) / "model.safetensors"
        weights = load_file(file)
        generator = torch.Generator().manual_seed(1)
        for name, values in weights.items():
            spread = 1.0 if values.dim() == 1 else 2.0 / math.sqrt(values.shape[-1])
            # Values that float16 holds: then the file must say the same to the last digits.
            weights[name] = (torch.randn(values.shape, generator=generator) * spread).half().float()
        save_file(weights, file, metadata={"format": "pt"})
    return found


@pytest.fixture
def changed(tmp_path):
    """Copies a model's folder and changes files of it by name: a function of the parsed JSON."""

    def change(folder: str | Path, **edits) -> Path:
        copy = Path(shutil.copytree(folder, tmp_path / "changed"))
        for name, edit in edits.items():
            file = copy / f"{name}.json"
            content = json.loads(file.read_text())
            edit(content)
            file.write_text(json.dumps(content))
        return copy

    return change


def refused(folder, tmp_path, **given) -> str:
    with pytest.raises(InputError) as caught:
        gguf.write(Path(folder), tmp_path / "refused.gguf", **{"eight_bits": False, "name": "x"} | given)
    assert not (tmp_path / "refused.gguf").exists() or "holds" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["llama", "wide heads", "llama 3", "mistral", "qwen2"])
def test_every_shape_reads_back_with_its_logits(name, shapes, tmp_path):
    path = tmp_path / "m.gguf"
    gguf.write(Path(shapes[name]), path, eight_bits=False, name="m")
    check = export.compare(Path(shapes[name]), path, export.rows(8), (1e-5, 1e-5))
    assert check["logit_scale"] > 1


def test_the_divided_frequencies_of_llama_3_are_in_the_file(shapes, tmp_path):
    import gguf as package
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    folder = Path(shapes["llama 3"])
    gguf.write(folder, tmp_path / "m.gguf", eight_bits=True, name="m")
    stored = {tensor.name: tensor.data for tensor in package.GGUFReader(tmp_path / "m.gguf").tensors}["rope_freqs.weight"]
    plain = 10000.0 ** -(torch.arange(0, 32, 2) / 32)
    divided = LlamaRotaryEmbedding(AutoConfig.from_pretrained(folder)).inv_freq
    assert torch.allclose(plain / torch.tensor(stored), divided, rtol=1e-5)
    assert stored[0] == pytest.approx(1.0) and stored[-1] == pytest.approx(8.0)


def test_half_the_bits_are_about_half_the_bytes(tmp_path):
    sizes = []
    for eight_bits in (False, True):
        path = tmp_path / "m.gguf"
        assert gguf.write(EMBEDDED, path, eight_bits=eight_bits, name="m")["left_at_f16"] == []
        sizes.append(path.stat().st_size - 50_000)  # about what the tokenizer takes
    assert 0.5 < sizes[1] / sizes[0] < 0.56


@pytest.mark.parametrize("rule", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_awkward_text_is_cut_into_the_same_tokens(rule, changed, tmp_path):
    from transformers import AutoTokenizer

    folder = changed(EMBEDDED, tokenizer=split_by(rule))
    path = tmp_path / "m.gguf"
    assert gguf.write(folder, path, eight_bits=True, name="m")["tokenizer"] == f"gpt2/{rule}"
    tokenizer, reader = AutoTokenizer.from_pretrained(folder), gguf.read(path)[1]
    assert tokenizer.tokenize("12345/d") == PIECES[rule]
    gguf_tokens.restore(reader, tokenizer)
    for text in (*export.rows(), *AWKWARD):
        assert reader(text)["input_ids"] == tokenizer(text)["input_ids"], text
    assert (reader.bos_token_id, reader.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


PIECES = {
    "gpt-2": ["1234", "5", "/", "d"],
    "smollm": ["1", "2", "3", "4", "5", "/", "d"],
    "llama-bpe": ["123", "4", "5", "/d"],
    "qwen2": ["1", "2", "3", "4", "5", "/d"],
}


def split_by(rule: str):
    """Edits the embedded tokenizer: another splitting rule, and four merges that only some of the rules let happen."""

    def edit(content: dict) -> None:
        pattern = {name: pattern for pattern, name in gguf_tokens.SPLITS.items()}.get(rule)
        if rule == "smollm":
            steps = [{"type": "Digits", "individual_digits": True}, content["pre_tokenizer"]]
            content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
        elif pattern:
            level = content["pre_tokenizer"] | {"use_regex": False}
            split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
            content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, level]}
        model = content["model"]
        model["ignore_merges"] = rule == "llama-bpe"
        vocabulary = sorted(model["vocab"], key=model["vocab"].get)[:-4]  # the last tokens are those of the last merges
        model["vocab"] = {token: number for number, token in enumerate([*vocabulary, "12", "123", "1234", "/d"])}
        model["merges"] = [["1", "2"], ["12", "3"], ["123", "4"], ["/", "d"], *model["merges"][:-4]]

    return edit


def test_the_chat_template_and_the_special_tokens_come_along(tmp_path):
    gguf.write(EMBEDDED, tmp_path / "m.gguf", eight_bits=True, name="m", about={"paretune.note": "here"})
    reader = gguf.read(tmp_path / "m.gguf")[1]
    said = reader.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False, add_generation_prompt=True)
    assert said == "hello\nAnswer:"
    assert reader.convert_ids_to_tokens([0, 1, 2]) == ["<|bos|>", "<|eos|>", "<|pad|>"]


@pytest.mark.parametrize("eight_bits", [False, True])
def test_a_model_made_by_others_with_a_sentencepiece_tokenizer_reads_back(eight_bits, tmp_path):
    if not STORIES.is_dir():
        pytest.skip(f"{STORIES} is not there; set PARETUNE_SHARED to a folder with models/stories260K/hf")
    path = tmp_path / "m.gguf"
    said = gguf.write(STORIES, path, eight_bits=eight_bits, name="stories")
    assert said["tokenizer"] == "llama/default"
    # Rows of 172 values are no multiple of 32.
    assert said["left_at_f16"] == [f"blk.{n}.ffn_down.weight" for n in range(5) if eight_bits]
    story = ["Once upon a time, there was a little girl named Lily. She loved to play outside in the park.", *export.rows(8)]
    check = export.compare(STORIES, path, story, export.BOUNDS["gguf-q8_0" if eight_bits else "gguf-f16"])
    assert check["perplexity"] == pytest.approx(check["perplexity_before"], rel=0.02 if eight_bits else 0.001)


def test_a_model_of_another_shape_is_refused_with_the_reason(save_model, special, tmp_path):
    from transformers import GPT2Config

    folder = save_model("gpt2-export", GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, **special))
    assert refused(folder, tmp_path) == (
        "export: a model of type gpt2 is not written as GGUF, only Llama-shaped ones are (llama, mistral, qwen2): "
        "their files can be read back and compared. Export it as safetensors."
    )


LINEAR = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}


@pytest.mark.parametrize(
    ("edit", "reason"),
    [(LINEAR, "rope type linear"), ({"attention_bias": True}, "biased attention"),
     ({"hidden_act": "gelu"}, "the activation gelu"),
     ({"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 64}, "a window of 64 tokens")],
)  # fmt: skip
def test_what_the_writer_does_not_carry_is_refused_by_name(edit, reason, changed, tmp_path):
    assert reason in refused(changed(EMBEDDED, config=lambda content: content.update(edit)), tmp_path)


def spaced(content: dict) -> None:
    content["pre_tokenizer"]["add_prefix_space"] = True


def by_digits(content: dict) -> None:
    steps = [{"type": "Digits", "individual_digits": False}, content["pre_tokenizer"]]
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}


def lowered(content: dict) -> None:
    content["normalizer"] = {"type": "Lowercase"}


@pytest.mark.parametrize("edit", [spaced, by_digits, lowered])
def test_a_tokenizer_that_the_format_has_no_name_for_is_refused(edit, changed, tmp_path):
    assert "its splitting rule has no name in GGUF (known here: gpt-2," in refused(changed(EMBEDDED, tokenizer=edit), tmp_path)


def test_a_model_smaller_than_its_tokenizer_is_refused(changed, tmp_path):
    folder = changed(EMBEDDED, config=lambda content: content.update(vocab_size=1000))
    assert "the tokenizer has 1024 tokens, the model only 1000" in refused(folder, tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [("model.layers.1.mlp.up_proj.weight", 99840.0, "holds 99840.0"), ("model.norm.weight", math.nan, "holds nan"),
     ("model.layers.1.mlp.up_proj.weight", None, "the tensor model.layers.1.mlp.up_proj.weight is missing"),
     ("model.layers.0.mlp.gate.weight", 1.0, "the tensor model.layers.0.mlp.gate.weight has no place")],
)  # fmt: skip
def test_weights_that_have_no_place_in_the_file_are_refused(name, value, reason, changed, tmp_path):
    folder = changed(EMBEDDED)
    weights = load_file(folder / "model.safetensors")
    if value is None:
        del weights[name]
    else:
        weights.setdefault(name, torch.zeros(4, 4)).view(-1)[3] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert reason in refused(folder, tmp_path)


def test_without_the_package_the_user_is_told_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert refused(EMBEDDED, tmp_path) == "export: GGUF files need the package gguf. pip install 'paretune[gguf]'"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "eight_bits", "bound"),
    [("embedded", False, 0.005), ("embedded", True, 0.1), ("gpt-2 split", False, 0.005), ("smollm split", False, 0.005),
     ("llama-bpe split", False, 0.005), ("qwen2 split", False, 0.005), ("qwen2", False, 0.005),
     ("llama 3", False, 0.005), ("stories", False, 0.005), ("stories", True, 0.1)],
)  # fmt: skip
def test_llama_cpp_reads_the_file(name, eight_bits, bound, changed, shapes, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (it compiles): paretune[llama-cpp]")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if name == "stories" and not STORIES.is_dir():
        pytest.skip(f"{STORIES} is not there; set PARETUNE_SHARED to a folder with models/stories260K/hf")
    if name.endswith(" split"):
        folder = changed(EMBEDDED, tokenizer=split_by(name.removesuffix(" split")))
    else:
        folder = {"embedded": EMBEDDED, "stories": STORIES, **{key: Path(value) for key, value in shapes.items()}}[name]
    path = tmp_path / "m.gguf"
    gguf.write(folder, path, eight_bits=eight_bits, name="m")
    before = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    loaded = llama_cpp.Llama(str(path), n_ctx=256, n_threads=1, logits_all=True, verbose=False)
    try:
        difference = scale = 0.0
        loss, tokens = [0.0, 0.0], 0
        for text in (*export.rows(), *AWKWARD, "12345/d"):
            ids = tokenizer(text)["input_ids"]
            # Text is text here: what looks like a special token is one only for transformers.
            if "<|" not in text:
                begins = bool(ids) and ids[0] == tokenizer.bos_token_id
                assert loaded.tokenize(text.encode(), add_bos=begins, special=False) == ids, text
            if len(ids) < 2:
                continue
            loaded.reset()
            loaded.eval(ids)
            theirs = torch.tensor(loaded.scores[: len(ids)])
            with torch.inference_mode():
                ours = before(torch.tensor([ids])).logits[0]
            difference = max(difference, (ours - theirs).abs().max().item())
            scale = max(scale, ours.abs().max().item())
            for side, logits in enumerate((ours, theirs)):
                loss[side] += torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="sum").item()
            tokens += len(ids) - 1
        perplexity = [math.exp(side / tokens) for side in loss]
        print(f"\n{name}, eight_bits={eight_bits}: {difference:.4f} on {scale:.2f}, perplexity {perplexity}, {tokens} tokens")
        assert difference <= bound * scale
        assert perplexity[1] == pytest.approx(perplexity[0], rel=0.02 if eight_bits else 0.001)
    finally:
        loaded.close()
