"""Every kind of block that people tune: the right modules are found, they learn, and they merge."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import transformers
from contracts import command, one_object

from training import loop, merge
from training.adapters import attach
from training.errors import InputError
from training.model import describe, detect, load_model, match, modules
from training.recipe import EvaluationConfig, Recipe

QKVO = {"q_proj", "k_proj", "v_proj", "o_proj"}
GATED = {"gate_proj", "up_proj", "down_proj"}
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.1}
LONG = {"intermediate_size": 128, "num_key_value_heads": 2, "max_position_embeddings": 256}


@dataclass(frozen=True)
class Family:
    """A tiny configuration, and the leaves that are attention and feed-forward layers in it."""

    config: str
    options: dict
    attention: set[str]
    mlp: set[str]


FAMILIES = {
    "llama": Family("LlamaConfig", SIZES | LONG, QKVO, GATED),
    "mistral": Family("MistralConfig", SIZES | LONG, QKVO, GATED),
    "qwen2": Family("Qwen2Config", SIZES | LONG, QKVO, GATED),
    "gemma": Family("GemmaConfig", SIZES | LONG | {"head_dim": 16}, QKVO, GATED),
    "phi": Family("PhiConfig", SIZES | LONG, {"q_proj", "k_proj", "v_proj", "dense"}, {"fc1", "fc2"}),
    "phi3": Family("Phi3Config", SIZES | LONG, {"qkv_proj", "o_proj"}, {"gate_up_proj", "down_proj"}),
    "gpt2": Family(
        "GPT2Config",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.1},
        {"attn.c_attn", "attn.c_proj"}, {"c_fc", "mlp.c_proj"},
    ),
    "gpt-neox": Family(
        "GPTNeoXConfig", SIZES | {"intermediate_size": 128, "max_position_embeddings": 256},
        {"query_key_value", "dense"}, {"dense_h_to_4h", "dense_4h_to_h"},
    ),
    "opt": Family(
        "OPTConfig",
        {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 128, "word_embed_proj_dim": 64,
         "max_position_embeddings": 256, "init_std": 0.1},
        {"q_proj", "k_proj", "v_proj", "out_proj"}, {"fc1", "fc2"},
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request, save_model, special) -> tuple[str, Family]:
    """The folder of a random model, and what is known of it."""
    known = FAMILIES[request.param]
    return save_model(request.param, getattr(transformers, known.config)(**known.options, **special)), known


def leaves(found, wanted: set[str]) -> set[str]:
    """Returns the wanted leaves that all found modules end with; a module that ends with none is returned itself."""
    return {next((leaf for leaf in wanted if name.endswith("." + leaf)), name) for name in found}


def test_targets_name_the_right_modules_and_never_heads_or_embeddings(family):
    folder, known = family
    shape = describe(folder)
    parts = {"attention": known.attention, "mlp": known.mlp, "all-linear": known.attention | known.mlp}
    for targets, wanted in parts.items():
        found = match(targets, shape)
        assert leaves(found, wanted) == wanted and len(found) == 2 * len(wanted)  # of both layers
        recipe = Recipe(model=folder, rank=4, targets=targets)
        model = attach(load_model(recipe), recipe, shape)
        adapted = {name.removeprefix("base_model.model.") for name, module in model.named_modules() if hasattr(module, "lora_A")}
        assert len(adapted) == len(found) and leaves(adapted, wanted) == wanted
        assert not any(part in name for name in adapted for part in ("lm_head", "embed", "wte", "wpe"))


@pytest.mark.parametrize("fields", [{}, {"adapter": "dora"}, {"adapter": "full"}], ids=str)
def test_it_learns_and_merges(family, fields, make_job, tmp_path):
    folder, _ = family
    job = make_job(model=folder, steps=8, rank=8, learning_rate=5e-3, output=str(tmp_path / "a"),
                   evaluation=EvaluationConfig(reports=2, rows=4), **fields)  # fmt: skip
    curve = []
    outcome = loop.train(job, curve.append)
    losses = [progress.metrics["train_loss"] for progress in curve]
    assert outcome.ended == "complete" and losses[-1] < losses[0]
    found = merge.merge(job.recipe.model_dump(mode="json"), outcome.checkpoint, str(tmp_path / "m"), prompts=["One two three"])
    assert all(found["checks"][name]["difference"] < 1e-4 for name in ("merge", "trained", "stored"))


OTHERS = {
    "t5": ("T5ForConditionalGeneration", "T5Config", {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
           "T5, encoder and decoder", {"q", "k", "v", "o"}, {"wi", "wo"}),
    "bert": ("BertForMaskedLM", "BertConfig",
             {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}, "BERT, encoder",
             {"query", "key", "value", "attention.output.dense"}, {"intermediate.dense", "output.dense"}),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_a_model_that_is_not_causal_is_known_with_its_layers_and_refused(name, special, tmp_path, capsys):
    kind, config, options, said, attention, mlp = OTHERS[name]
    model = getattr(transformers, kind)(getattr(transformers, config)(**options, **special))
    model.save_pretrained(tmp_path)
    shape = detect(str(tmp_path))
    linear = {n for n, module in model.named_modules() if type(module).__name__ == "Linear" and any(c.isdigit() for c in n)}
    assert set(shape.linear) == linear  # as torch has them: no embeddings, position biases, heads
    found = {True: set(), False: set()}
    for module in modules(shape):
        found[module.attention] |= leaves([module.name], attention if module.attention else mlp)
    assert found == {True: attention, False: mlp}
    assert sum(module.weights for module in modules(shape)) == shape.linear_parameters
    with pytest.raises(InputError, match=f"no causal language model \\({said}\\)"):
        describe(str(tmp_path))
    code, out, _ = command(capsys, "doctor", "--model", str(tmp_path), "--json")
    assert (code, one_object(out)["family"]) == (0, said.split(",")[0])


def test_the_largest_useful_rank_of_a_layer_is_its_narrower_side(capsys):
    code, out, _ = command(capsys, "doctor", "--model", "embedded")
    assert code == 0 and "Llama, causal: 795,520 parameters, 3 layers" in out
    rows = {module.name.rsplit(".", 1)[-1]: module for module in modules(describe("embedded"))}
    assert (rows["k_proj"].rank, rows["down_proj"].rank, rows["down_proj"].count) == (64, 128, 3)
