"""What is merged is what was trained, at every number of bits; what is not is refused and leaves nothing behind."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from training import agreement, artifact, loop, merge
from training.checkpoint import load_adapter
from training.data import prompt_of, read
from training.errors import InputError
from training.model import EMBEDDED, load_model, load_tokenizer
from training.recipe import EvaluationConfig, Recipe

ROOT = Path(__file__).parents[2]
KINDS = {
    "32 lora": {"bits": 32},
    "32 rslora bf16": {"bits": 32, "precision": "bf16", "adapter": "rslora"},
    "16 rslora": {"bits": 16, "precision": "bf16", "adapter": "rslora"},
    "8 lora": {"bits": 8},
    "4 lora": {"bits": 4},
    "4 rslora bf16": {"bits": 4, "precision": "bf16", "adapter": "rslora"},
    "32 lora fp16": {"bits": 32, "precision": "fp16"},
    "4 dora fp16": {"bits": 4, "precision": "fp16", "adapter": "dora"},
    "32 dora": {"bits": 32, "adapter": "dora"},
    "4 dora bf16": {"bits": 4, "precision": "bf16", "adapter": "dora"},
    "32 adalora": {"bits": 32, "adapter": "adalora"},
    "4 adalora": {"bits": 4, "adapter": "adalora"},
    "8 adalora": {"bits": 8, "adapter": "adalora"},
    "32 full": {"bits": 32, "adapter": "full", "learning_rate": 1e-3},
    "16 full bf16": {"bits": 16, "precision": "bf16", "adapter": "full", "learning_rate": 1e-3},
}


@pytest.fixture(scope="module")
def gpt2(save_model, special) -> str:
    """A random GPT-2: Conv1D layers, learned positions; not tied, so both kinds of head are tested."""
    from transformers import GPT2Config

    config = GPT2Config(
        n_embd=64, n_layer=2, n_head=4, n_positions=128, initializer_range=0.1, tie_word_embeddings=False, **special
    )
    return save_model("gpt2", config)


@pytest.fixture(scope="module")
def train(make_job, tmp_path_factory):
    """Trains a recipe briefly, once; returns the recipe as JSON and the adapter's folder."""
    done = {}

    def once(**fields) -> tuple[dict, str]:
        key = json.dumps(fields, sort_keys=True)
        if key not in done:
            given = {"model": "embedded", "rank": 8, "alpha": 16, "learning_rate": 5e-3, "steps": 6} | fields
            job = make_job(
                **given, evaluation=EvaluationConfig(reports=1, rows=4), output=str(tmp_path_factory.mktemp("a") / "a")
            )
            outcome = loop.train(job)
            assert outcome.ended == "complete"
            done[key] = job.recipe.model_dump(mode="json"), outcome.checkpoint
        return done[key]

    return once


@pytest.fixture(scope="module")
def prompts(rows) -> list[str]:
    found = read(rows)
    return [prompt_of(row, rows, load_tokenizer(Recipe())) for row in found.validation[:8]]


@pytest.fixture
def adapter(train, tmp_path) -> tuple[dict, Path]:
    """A copy of a trained adapter, to be damaged."""
    recipe, folder = train()
    return recipe, Path(shutil.copytree(folder, tmp_path / "adapter"))


def rewrite(folder: Path, change) -> None:
    """Changes the tensors of an adapter and its manifest, as somebody with a wrong file but a right manifest would have."""
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][path.name]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def logits(model) -> torch.Tensor:
    ids = torch.arange(5, 45).reshape(2, 20)
    with torch.no_grad():
        return model(ids).logits.float()


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).abs().max() / one.abs().max()).item()


@pytest.mark.parametrize("served", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_is_the_one_that_was_trained(kind, served, train, prompts, tmp_path):
    recipe, folder = train(**KINDS[kind])
    found = merge.merge(recipe, folder, str(tmp_path / "m"), precision=served, prompts=prompts, record={"study": "s"})
    json.dumps(found)
    checks = found["checks"]
    for name in ("merge", "trained", "stored"):
        assert 0 <= checks[name]["difference"] <= checks[name]["bound"] <= 0.1
    assert checks["merge"]["difference"] < 1e-5  # the arithmetic itself is exact, whatever the bits
    assert checks["prompts"] == 8 and checks["positions"] > 8 * agreement.BEFORE and checks["scale"] > 1
    if "16" not in kind and kind[:2] in ("32", "4 "):
        assert checks["trained"]["difference"] < 1e-5
        if served == "fp32":
            assert checks["greedy"] == {"texts_equal": 1.0, "tokens_equal": 1.0, "bound": 1.0}
    assert checks["stored"]["difference"] == 0 or served != "fp32"
    assert checks["precision"] == served and len(found["answers"]) == 8 and not any("<|" in answer for answer in found["answers"])
    manifest = artifact.verify(tmp_path / "m").manifest
    assert manifest["kind"] == "merged" and manifest["study"] == "s" and manifest["checks"] == checks
    assert found["digest"] == artifact.verify(found["folder"]).digest and found["parameters"] == 795_520
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("fields", [{"bits": 32}, {"bits": 16, "precision": "bf16"}, {"bits": 8}, {"bits": 4},
                                    {"bits": 4, "precision": "bf16"}])  # fmt: skip
@pytest.mark.parametrize("base", ["embedded", "gpt2"])
def test_the_dense_base_has_the_very_weights_that_were_trained_against(base, fields, gpt2):
    recipe = Recipe(model=gpt2 if base == "gpt2" else base, **fields)
    trained = load_model(recipe).eval()
    for module in trained.modules():
        if type(module).__name__ == "Linear8bitLt":
            module.train()  # as in training: weights of 8 bits, activations as they are
    trained.requires_grad_(False)
    dense = merge.dense_base(recipe)
    assert {p.dtype for p in dense.parameters()} == {torch.float32} and not dense.training
    bound = 0.05 if recipe.precision == "bf16" else 1e-5
    with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bf16"):
        assert apart(logits(trained), logits(dense)) < bound
    if recipe.bits < 16:  # and they are not those of the file
        assert apart(logits(dense), logits(merge.dense_base(Recipe(model=recipe.model)))) > 0.005


def test_the_merge_of_a_model_all_of_whose_weights_were_trained_is_that_model(train, prompts, tmp_path):
    recipe, folder = train(**KINDS["32 full"])
    merge.merge(recipe, folder, str(tmp_path / "m"), prompts=prompts)
    trained, merged = load_file(Path(folder) / "model.safetensors"), load_file(tmp_path / "m" / "model.safetensors")
    assert trained.keys() == merged.keys() and all(torch.equal(trained[name], merged[name]) for name in trained)
    base = load_model(Recipe()).state_dict()
    assert all(not torch.equal(trained[name], base[name]) for name in trained)  # each of them was trained


def test_merging_a_4_bit_adapter_into_the_original_weights_would_be_wrong(train, prompts, tmp_path):
    recipe, folder = train(bits=4)
    found = merge.merge(recipe, folder, str(tmp_path / "m"), prompts=prompts)
    own = logits(load_adapter(load_model(Recipe(**recipe)), folder))
    original = load_adapter(merge.dense_base(Recipe()), folder).merge_and_unload()
    right = apart(own, logits(plain(tmp_path / "m")))
    wrong = apart(own, logits(original))
    assert right < 1e-5 and found["checks"]["trained"]["difference"] < 1e-5
    assert wrong > 0.01 and wrong > 1000 * right


def plain(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("fields", [{"bits": 32}, {"bits": 8}, {"bits": 4, "adapter": "rslora"}])
def test_conv1d_layers_are_merged_the_right_way_round(fields, gpt2, train, prompts, tmp_path):
    recipe, folder = train(model=gpt2, **fields)
    found = merge.merge(recipe, folder, str(tmp_path / "m"), prompts=prompts)
    assert found["checks"]["merge"]["difference"] < 1e-5
    own = load_adapter(load_model(Recipe(**recipe)), folder)
    assert apart(logits(own), logits(plain(tmp_path / "m"))) < (1e-5 if fields["bits"] != 8 else agreement.INT8)
    assert "lm_head.weight" in load_file(tmp_path / "m" / "model.safetensors")  # this head is its own


def test_a_base_that_sets_a_temperature_without_sampling_can_be_written(gpt2, make_job, prompts, tmp_path):
    base = Path(shutil.copytree(gpt2, tmp_path / "base"))
    (base / "generation_config.json").write_text(json.dumps({"temperature": 0.5, "repetition_penalty": 3.0, "eos_token_id": 1}))
    job = make_job(model=str(base), steps=1, evaluation=EvaluationConfig(reports=1, rows=4), output=str(tmp_path / "a"))
    recipe, folder = job.recipe.model_dump(mode="json"), loop.train(job).checkpoint
    found = merge.merge(recipe, folder, str(tmp_path / "m"), prompts=prompts)
    kept = json.loads((tmp_path / "m" / "generation_config.json").read_text())
    assert kept["do_sample"] is True and kept["temperature"] == 0.5
    (base / "generation_config.json").unlink()
    plainly = merge.merge(recipe, folder, str(tmp_path / "plainly"), prompts=prompts)
    assert found["answers"] == plainly["answers"]  # greedy is the most likely token, whatever the base would like


def test_a_tied_head_is_stored_once_and_tied_again(train, tmp_path):
    recipe, folder = train()
    merge.merge(recipe, folder, str(tmp_path / "m"), precision="bf16")
    stored = load_file(tmp_path / "m" / "model.safetensors")
    assert set(stored) == set(load_file(EMBEDDED / "model.safetensors")) and "lm_head.weight" not in stored
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    model = plain(tmp_path / "m")
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == "bfloat16"


READ = """
import sys
sys.modules["peft"] = None  # as if it were not installed
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
for prompt in sys.argv[2:]:
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    out = model.generate(**ids, do_sample=False, max_new_tokens=32, pad_token_id=tokenizer.pad_token_id)
    print(repr(tokenizer.decode(out[0, ids["input_ids"].shape[1]:], skip_special_tokens=True)))
"""


def test_plain_transformers_without_peft_gives_the_adapters_own_text(train, prompts, tmp_path):
    recipe, folder = train(bits=4)
    found = merge.merge(recipe, folder, str(tmp_path / "m"), prompts=prompts)
    done = subprocess.run([sys.executable, "-c", READ, str(tmp_path / "m"), *prompts[:3]],
                          capture_output=True, text=True, timeout=120, check=True)  # fmt: skip
    own, tokenizer = load_adapter(load_model(Recipe(**recipe)), folder), load_tokenizer(Recipe())
    exam = agreement.set_exam(own, prompts[:3], tokenizer, longest=200)
    assert done.stdout.splitlines() == [repr(answer) for answer in found["answers"][:3]]
    assert done.stdout.splitlines() == [repr(tokenizer.decode(a, skip_special_tokens=True)) for a in exam.answers]
    config = (tmp_path / "m" / "config.json").read_text()
    assert "quantization" not in config and str(ROOT) not in config and str(folder) not in config
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "m" / name).is_file()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_is_refused(adapter, tmp_path, value):
    recipe, folder = adapter
    names = sorted(load_file(folder / "adapter_model.safetensors"))

    def poison(tensors):
        tensors[names[3]][0, 0] = value
        return tensors

    rewrite(folder, poison)
    with pytest.raises(InputError, match=f"{names[3]} has NaN or infinite"):
        merge.merge(recipe, str(folder), str(tmp_path / "m"))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")
def test_an_adapter_with_missing_tensors_is_refused(adapter, tmp_path):
    recipe, folder = adapter
    rewrite(folder, lambda tensors: dict(sorted(tensors.items())[1:]))
    with pytest.raises(InputError, match="1 adapter tensors do not match the model"):
        merge.merge(recipe, str(folder), str(tmp_path / "m"))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_changed_adapter_is_refused(adapter, tmp_path):
    recipe, folder = adapter
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="SHA-256 differs"):
        merge.merge(recipe, str(folder), str(tmp_path / "m"))


@pytest.mark.parametrize("fields", [{"bits": 4}, {"rank": 4}, {"alpha": 32}, {"adapter": "rslora"}])
def test_an_adapter_of_another_recipe_is_refused(train, tmp_path, fields):
    recipe, folder = train()
    with pytest.raises(InputError, match=f"was trained with {next(iter(fields))}"):
        merge.merge(recipe | fields, folder, str(tmp_path / "m"))
    assert not list(tmp_path.iterdir())


def test_weights_that_do_not_fit_into_fp16_are_refused_by_name(adapter, tmp_path):
    recipe, folder = adapter

    def swell(tensors):
        return {name: tensor * (1e5 if "layers.1.self_attn.q_proj" in name else 1) for name, tensor in tensors.items()}

    rewrite(folder, swell)
    with pytest.raises(InputError, match=r"layers\.1\.self_attn\.q_proj\.weight: has NaN or infinite values in fp16"):
        merge.merge(recipe, str(folder), str(tmp_path / "m"), precision="fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def other_base(recipe, **options):
    model = ORIGINAL["dense_base"](recipe, **options)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3] *= 1.5
    return model


def other_merge(beside):
    model = ORIGINAL["_merged"](beside)
    with torch.no_grad():
        model.model.layers[2].self_attn.v_proj.weight[0, 0] += 0.5
    return model


def other_file(folder, *rest):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1e-3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return ORIGINAL["_read_back"](folder, *rest)


def other_tokenizer(folder, *rest):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"add_prefix_space": false', '"add_prefix_space": true'))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return ORIGINAL["_read_back"](folder, *rest)


ORIGINAL = {name: getattr(merge, name) for name in ("dense_base", "_merged", "_read_back")}


@pytest.mark.parametrize(("name", "tampered", "where"), [
    ("dense_base", other_base, "layer 2 of 3: merged and the trial's own model at 32 bits part"),
    ("_merged", other_merge, "layer 3 of 3: merged and adapter beside the dense base part"),
    ("_read_back", other_file, "layers.0.mlp.up_proj.weight: as written is not what was merged"),
    ("_read_back", other_tokenizer, "tokenizer: as written it gives other tokens"),
])  # fmt: skip
def test_one_wrong_weight_anywhere_is_found_and_leaves_no_folder(name, tampered, where, train, prompts, tmp_path, monkeypatch):
    recipe, folder = train()
    monkeypatch.setattr(merge, name, tampered)
    with pytest.raises(InputError) as found:
        merge.merge(recipe, folder, str(tmp_path / "m"), prompts=prompts)
    assert where in str(found.value)
    assert not list(tmp_path.iterdir())


def test_a_served_model_that_answers_otherwise_is_found(train, prompts, tmp_path, monkeypatch):
    recipe, folder = train()
    monkeypatch.setattr(merge, "greedy", lambda *a, **k: [[5, 1]] * len(prompts))
    with pytest.raises(InputError, match="prompt 1: the written model answers otherwise from token 1 on"):
        merge.merge(recipe, folder, str(tmp_path / "m"), prompts=prompts)
    assert not list(tmp_path.iterdir())


DIE = """
import json, os, sys
from training import merge
merge._read_back = lambda *rest: os._exit(9)
merge.merge(json.loads(sys.argv[1]), sys.argv[2], sys.argv[3])
"""


def test_a_merge_that_is_killed_leaves_no_folder_and_a_rerun_works(train, tmp_path):
    recipe, folder = train()
    done = subprocess.run([sys.executable, "-c", DIE, json.dumps(recipe), folder, str(tmp_path / "m")], cwd=ROOT, timeout=120)
    assert done.returncode == 9
    assert not (tmp_path / "m").exists() and len(list(tmp_path.iterdir())) == 1  # the weights were there already
    found = merge.merge(recipe, folder, str(tmp_path / "m"))
    assert artifact.verify(tmp_path / "m").digest == found["digest"] and [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(("given", "said"), [
    ({"precision": "int8"}, "must be one of fp32, bf16, fp16"),
    ({"prompts": [""]}, "prompts: one of them is empty"),
])  # fmt: skip
def test_what_cannot_be_done_is_said(train, tmp_path, given, said):
    recipe, folder = train()
    if "prompts" in given:
        recipe = recipe | {"model": "embedded"}
    with pytest.raises(InputError, match=said):
        merge.merge(recipe, folder, str(tmp_path / "m"), **given)
    assert not list(tmp_path.iterdir())


def test_long_prompts_are_cut_to_the_context(train, tmp_path):
    recipe, folder = train()
    found = merge.merge(recipe, folder, str(tmp_path / "m"), prompts=["one two three " * 400, "short"])
    assert found["checks"]["prompts"] == 2


@pytest.fixture
def merged(train, tmp_path) -> tuple[str, str]:
    recipe, folder = train()
    return merge.merge(recipe, folder, str(tmp_path / "merged"), record={"study": "s"})["folder"], folder


def test_a_package_is_a_plain_model_with_its_adapter_and_card(merged, tmp_path):
    found = merge.package(*merged, "# card", str(tmp_path / "models" / "n" / "k"), {"name": "n"})
    model = artifact.verify(found["folder"])
    assert model.digest == found["digest"] and model.manifest["kind"] == "model"
    assert model.manifest["name"] == "n" and model.manifest["study"] == "s" and "checks" in model.manifest
    assert (model.folder / "README.md").read_text() == "# card"
    shutil.rmtree(tmp_path / "merged")  # the package needs nothing of it
    artifact.verify(model.folder)
    own = load_adapter(load_model(Recipe()), model.folder / "adapter")  # still a checkpoint of its own
    assert apart(logits(own), logits(plain(model.folder))) < 1e-5


def test_a_package_asks_as_the_model_was_asked_and_the_merged_model_stays_as_it_was(merged, tmp_path):
    from transformers import AutoTokenizer

    found = merge.package(*merged, "", str(tmp_path / "k"), {}, chat_template="Q {{ messages[0]['content'] }} A")
    asked = AutoTokenizer.from_pretrained(found["folder"]).apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert asked == "Q x A"
    artifact.verify(merged[0])


def test_the_difference_of_two_models_is_found_by_tensor(merged, train, tmp_path):
    recipe, folder = train()
    again = merge.merge(recipe, folder, str(tmp_path / "again"))["folder"]
    assert merge.difference(merged[0], again)["largest"] == 0
    name, path = "model.layers.1.mlp.up_proj.weight", Path(again) / "model.safetensors"
    tensors = load_file(path)
    tensors[name][0, 0] += 0.5 * tensors[name].abs().max()

    def change(aside):
        save_file(tensors, aside / "model.safetensors")
        return {}

    artifact.write(again, change)
    found = merge.difference(merged[0], again)
    assert found["tensor"] == name and 0.3 < found["largest"] <= 0.51
    tensors[name][0, 0] = float("nan")
    artifact.write(again, change)
    with pytest.raises(InputError, match=f"{name}: has NaN or infinite values"):
        merge.difference(merged[0], again)
    del tensors[name]
    artifact.write(again, change)
    with pytest.raises(InputError, match=f"{name}: and 0 more tensors are in one of the models only"):
        merge.difference(merged[0], again)


def test_a_package_of_another_adapter_or_of_a_changed_merge_is_refused(merged, train, tmp_path):
    other = train(seed=5)[1]
    with pytest.raises(InputError, match="is not the adapter that was merged"):
        merge.package(merged[0], other, "", str(tmp_path / "k"), {})
    with pytest.raises(InputError, match="no finished merged model|not 'merged'"):
        merge.package(other, other, "", str(tmp_path / "k"), {})
    path = Path(merged[0]) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match="SHA-256 differs"):
        merge.package(*merged, "", str(tmp_path / "k"), {})
    assert not (tmp_path / "k").exists()


def test_where_files_cannot_be_linked_they_are_copied(merged, tmp_path, monkeypatch):
    def refuse(*paths):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(merge.os, "link", refuse)
    found = merge.package(*merged, "", str(tmp_path / "k"), {})
    assert artifact.verify(found["folder"]).digest == found["digest"]
