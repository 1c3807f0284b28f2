"""Shapes are read without weights and equal the real modules; broken or dangerous folders are refused; bits stay as loaded."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from training import evaluate, model, schedule
from training.data import Tokenized
from training.errors import InputError
from training.model import describe, device_of, is_attention, load_model, load_tokenizer, match
from training.recipe import Recipe, Resources
from training.run import set_up
from training.world import World


def linear_modules(folder: str) -> dict[str, tuple[int, int]]:
    from transformers.pytorch_utils import Conv1D

    loaded = load_model(Recipe(model=folder))
    found = {}
    for name, module in loaded.named_modules():
        if isinstance(module, torch.nn.Linear):
            found[name] = (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            found[name] = (module.weight.shape[1], module.weight.shape[0])
    return {name: size for name, size in found.items() if name.rsplit(".", 1)[-1] not in model.OUTPUT_HEADS}


@pytest.fixture(scope="module")
def others(save_model, special) -> dict[str, str]:
    from transformers import GPT2Config, GPTNeoXConfig, Phi3Config

    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, **special}
    return {
        "gpt2": save_model("gpt2", GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, **special)),
        "phi3": save_model("phi3", Phi3Config(**small)),
        "neox": save_model("neox", GPTNeoXConfig(**small)),
    }


@pytest.mark.parametrize("name", ["embedded", "llama", "gpt2", "phi3", "neox"])
def test_a_shape_equals_the_real_modules(name, llama, others):
    folder = {"embedded": "embedded", "llama": llama, **others}[name]
    shape = describe(folder)
    expected = linear_modules(folder)
    assert shape.linear == expected
    assert shape.linear_parameters == sum(a * b for a, b in expected.values())
    loaded = load_model(Recipe(model=folder))
    assert shape.parameters == sum(p.numel() for p in loaded.parameters())
    assert (shape.layers, shape.hidden) == (loaded.config.num_hidden_layers, loaded.config.hidden_size)
    assert shape.vocabulary == loaded.config.vocab_size


SHARED = Path(os.environ.get("PARETUNE_SHARED", Path(__file__).parents[3] / "shared" / "data"))


def test_a_model_made_by_others_has_the_shape_of_its_modules():
    folder = SHARED / "models" / "stories260K" / "hf"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there; set PARETUNE_SHARED to a folder with models/stories260K/hf")
    assert describe(str(folder)).linear == linear_modules(str(folder))
    assert load_tokenizer(Recipe(model=str(folder))).pad_token_id is not None


def test_a_sharded_model_has_the_shape_of_the_whole(llama, tmp_path):
    load_model(Recipe(model=llama)).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert describe(str(tmp_path)).linear == describe(llama).linear
    sorted(tmp_path.glob("*.safetensors"))[0].unlink()
    describe.cache_clear()
    assert "lacks the weights model-00001" in refused(tmp_path)


def refused(folder) -> str:
    with pytest.raises(InputError) as caught:
        describe(str(folder))
    return str(caught.value)


@pytest.fixture
def copied(llama, tmp_path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


def change(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def test_a_missing_folder_is_refused(tmp_path):
    assert refused(tmp_path / "none") == (
        f"recipe.model: no such folder: {tmp_path}/none. Give `embedded`, an existing folder or a Hugging Face id."
    )


def test_a_folder_without_configuration_is_refused(copied):
    (copied / "config.json").unlink()
    assert "has no config.json" in refused(copied)


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000])
def test_a_broken_configuration_is_refused(copied, text):
    (copied / "config.json").write_text(text)
    assert "config.json is not a JSON object" in refused(copied)


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_a_broken_index_of_shards_is_refused(copied, text):
    (copied / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in refused(copied)


def test_a_folder_without_weights_is_refused(copied):
    (copied / "model.safetensors").unlink()
    assert "lacks the weights model.safetensors" in refused(copied)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights_are_refused(copied, keep):
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "is no complete safetensors file" in refused(copied)


@pytest.mark.parametrize("header", [b"[]", b"{", b'{"a": 1}', b'{"a": {"shape": [1]}}', b'{"a": {"data_offsets": []}}'])
def test_a_broken_header_is_refused(copied, header):
    (copied / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert "is no complete safetensors file" in refused(copied)


def test_code_that_comes_with_a_model_is_refused_and_never_run(copied):
    trace = copied / "was_run"
    (copied / "mine.py").write_text(f"open({str(trace)!r}, 'w')\nclass Mine: pass\n")
    change(copied, auto_map={"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine"}, model_type="mine")
    assert "needs code of its own, which is never run" in refused(copied)
    with pytest.raises(ValueError, match="trust_remote_code|custom code|model type"):
        load_model(Recipe(model=str(copied)))
    assert not trace.exists()


def test_another_architecture_is_refused(copied):
    change(copied, architectures=["LlamaForSequenceClassification"])
    assert "is no causal language model, its architectures are ['LlamaForSequenceClassification']" in refused(copied)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickled_weights_are_refused_and_never_opened(copied, tmp_path):
    trace = tmp_path / "exploded"
    (copied / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(trace)))
    load_model(Recipe(model=str(copied)))  # safetensors stand beside it
    (copied / "model.safetensors").unlink()
    assert "has only pickled weights (pytorch_model.bin), which are never loaded" in refused(copied)
    with pytest.raises(OSError, match="safetensors"):
        load_model(Recipe(model=str(copied)))
    assert not trace.exists()
    pickle.loads((copied / "pytorch_model.bin").read_bytes()).close()
    assert trace.exists()  # it is a real one


def test_a_model_without_tokenizer_is_refused(copied):
    for path in copied.glob("token*"):
        path.unlink()
    with pytest.raises(InputError, match="has no tokenizer that can be read"):
        load_tokenizer(Recipe(model=str(copied)))


def test_a_tokenizer_needs_an_end_of_sequence_and_pads_with_it(copied):
    config = json.loads((copied / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (copied / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(Recipe(model=str(copied)))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id is not None
    del config["eos_token"]
    (copied / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="has no end-of-sequence token"):
        load_tokenizer(Recipe(model=str(copied)))


def test_a_hub_that_cannot_be_reached_is_told_as_such(monkeypatch):
    with pytest.raises(InputError, match="no local folder and not to be had from the hub"):
        describe("nobody/no-such-model")


def test_a_gpu_that_is_not_there_is_no_cpu():
    if torch.cuda.is_available():
        assert device_of(Resources(gpus=1)) == "cuda"
    else:
        with pytest.raises(RuntimeError, match="torch sees no GPU"):
            device_of(Resources(gpus=1))
    assert device_of(Resources()) == "cpu"


# Targets


def test_targets_are_found_by_kind_and_by_name(others):
    shape = describe("embedded")
    attention, mlp = match("attention", shape), match("mlp", shape)
    assert {name.rsplit(".", 1)[-1] for name in attention} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert {name.rsplit(".", 1)[-1] for name in mlp} == {"gate_proj", "up_proj", "down_proj"}
    assert match("all-linear", shape) == attention | mlp == shape.linear
    assert set(match(("q_proj", "layers.0.mlp.up_proj"), shape)) == {
        *(f"model.layers.{i}.self_attn.q_proj" for i in range(shape.layers)), "model.layers.0.mlp.up_proj"
    }  # fmt: skip
    assert {name[-11:] for name in match("attention", describe(others["gpt2"]))} == {"attn.c_attn", "attn.c_proj"}
    assert not is_attention("h.0.mlp.c_proj") and is_attention("layers.0.attention.dense")


def test_a_target_that_matches_nothing_is_told_with_those_that_exist():
    with pytest.raises(InputError) as caught:
        match(("q_proj", "c_attn"), describe("embedded"))
    assert str(caught.value) == (
        "recipe.targets: 'c_attn' matches no linear module. There are: all-linear, attention, mlp, "
        "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj."
    )
    with pytest.raises(InputError, match="'proj' matches no"):
        match("proj", describe("embedded"))  # no part of a name


# Bits


@pytest.mark.parametrize(
    ("bits", "precision", "weight", "rest"),
    [
        (32, "fp32", torch.float32, torch.float32),
        (32, "bf16", torch.float32, torch.float32),
        (16, "bf16", torch.bfloat16, torch.bfloat16),
        (8, "fp32", torch.int8, torch.float32),
        (4, "fp32", torch.uint8, torch.float32),
        (4, "bf16", torch.uint8, torch.bfloat16),
    ],
)
def test_the_base_has_the_bits_asked_for_and_is_frozen(llama, bits, precision, weight, rest):
    loaded = load_model(Recipe(model=llama, bits=bits, precision=precision))
    assert loaded.model.layers[0].mlp.up_proj.weight.dtype == weight
    assert loaded.model.embed_tokens.weight.dtype == rest
    assert loaded.training and not any(p.requires_grad for p in loaded.parameters())


def gradients(run, rows: Tokenized) -> dict[str, torch.Tensor]:
    batch = evaluate.batch_of(rows.ids, rows.prompt_lengths, pad=0, device="cpu")
    run.inner.zero_grad()
    logits = evaluate.logits_of(run.inner, batch)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100).backward()
    return {name: p.grad.clone() for name, p in run.inner.named_parameters() if p.requires_grad}


def error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    difference = sum((found[name] - expected[name]).square().sum() for name in expected)
    return float((difference / sum(value.square().sum() for value in expected.values())).sqrt())


def prepared_run(job, rows: Tokenized):
    run = set_up(job, describe(job.recipe.model), schedule.plan(job.recipe, rows, workers=1), World(), "cpu")
    torch.manual_seed(1)
    for parameter in run.parameters:  # as after some training: B is no longer zero
        parameter.data += 0.05 * torch.randn_like(parameter)
    return run


def dequantize_into_dense(quantized, dense) -> None:
    """Gives a dense model the values that the 4-bit model stands for."""
    import bitsandbytes as bnb

    layers = {name: module for name, module in quantized.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert layers
    for name, module in dense.named_modules():
        if name in layers:
            weight = layers[name].weight
            module.weight.data = bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()


RANDOM = Tokenized([[(7 * i + 3 * j) % 900 + 5 for j in range(20 + i)] for i in range(6)], [12] * 6)


def evaluated_gradients(make_job) -> tuple[dict, dict, dict]:
    """Returns the gradients of a 4-bit model before and after an evaluation, and those of the dense model it stands for."""
    quantized = prepared_run(make_job(bits=4, batch_size=6), RANDOM)
    dense = prepared_run(make_job(batch_size=6), RANDOM)
    dequantize_into_dense(quantized.inner, dense.inner)
    before = gradients(quantized, RANDOM)
    evaluate.response_scores(quantized.inner, RANDOM.ids, RANDOM.prompt_lengths, batch_size=4)
    return before, gradients(quantized, RANDOM), gradients(dense, RANDOM)


def test_an_evaluation_does_not_change_the_gradients_of_a_4_bit_model(make_job):
    before, after, dense = evaluated_gradients(make_job)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert error(before, dense) < 1e-4
    assert error(after, dense) < 1e-4


def test_without_the_guard_they_would_change(make_job, monkeypatch):
    if "avx512_bf16" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("bitsandbytes repacks weights only on CPUs with AVX512-BF16")
    monkeypatch.setattr(model, "_keep_weights_as_they_are", lambda model: None)
    with pytest.warns(UserWarning):
        before, after, dense = evaluated_gradients(make_job)
    assert error(after, dense) > 0.1
