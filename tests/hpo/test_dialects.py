"""Files of other programs: read into a study, written from a winner, and the same after both."""

from __future__ import annotations

from pathlib import Path

import pytest
from contracts import command, one_object, simulated

import hpo
from hpo import dialects, spec, written
from hpo.adopt import adopt
from hpo.errors import InputError
from hpo.exports import to_file
from training.recipe import DataConfig, Recipe

FILES = Path(__file__).parent / "files"


def read(name: str, **options) -> dialects.Foreign:
    return dialects.read(written.parse((FILES / name).read_text()), **options)


# Read


def test_an_axolotl_file_is_read_and_what_it_cannot_mean_here_is_listed():
    found = read("axolotl.yml")
    recipe = Recipe(**found.recipe)
    assert (recipe.model, recipe.adapter, recipe.bits, recipe.precision) == ("mistralai/Mistral-7B-v0.3", "lora", 4, "bf16")
    assert (recipe.rank, recipe.alpha, recipe.dropout, recipe.targets) == (64, 128, 0.1, "attention")
    assert (recipe.batch_size, recipe.micro_batch, recipe.epochs, recipe.max_length) == (16, 2, 3, 2048)
    assert (recipe.schedule, recipe.warmup, recipe.learning_rate, recipe.seed) == ("cosine_min", 0.05, 3e-4, 7)
    assert (recipe.optimizer, recipe.gradient_checkpointing, recipe.zero_stage) == ("paged_adamw_8bit", True, 2)
    data = DataConfig(**found.data)
    assert (data.train, data.columns, data.split.validation) == (
        "hub:support/tickets", {"instruction": "question", "response": "reply"}, 0.05,
    )  # fmt: skip
    left = {key: what for key, _, what in found.left}
    assert set(left) == {"model_type", "sample_packing", "wandb_project", "output_dir", "flux_capacitor"}
    assert "no counterpart" in left["flux_capacitor"] and "storage" in left["output_dir"]


def test_a_llamafactory_file_is_read_with_its_registry_and_its_own_defaults():
    registry = {"tickets": {"file_name": "tickets.jsonl", "columns": {"prompt": "ask", "response": "say"}}}
    found = read("llamafactory.yaml", registry=registry)
    recipe, data = Recipe(**found.recipe), DataConfig(**found.data)
    assert (recipe.adapter, recipe.rank, recipe.alpha, recipe.bits, recipe.dropout) == ("dora", 16, 16, 8, 0)
    assert (recipe.steps, recipe.epochs, recipe.warmup, recipe.batch_size) == (400, None, 0.1, 8)
    assert (recipe.targets, recipe.gradient_checkpointing, recipe.seed) == ("all-linear", True, 42)
    assert (data.train, data.limit, data.columns["response"]) == ("data/tickets.jsonl", 5000, "say")
    assert {key for key, *_ in found.left} == {"stage", "do_train", "template", "plot_loss"}


def test_a_trl_file_is_read():
    found = read("trl.yaml")
    recipe = Recipe(**found.recipe)
    assert (recipe.adapter, recipe.rank, recipe.alpha, recipe.bits, recipe.precision) == ("lora", 32, 16, 16, "bf16")
    assert (recipe.schedule, recipe.warmup, recipe.batch_size, recipe.gradient_checkpointing) == ("linear", 0, 16, False)
    assert found.data["train"] == "hub:support/chats"
    assert [key for key, *_ in found.left] == ["logging_steps"]


def test_a_file_of_no_known_program_is_refused():
    with pytest.raises(InputError, match="no file of Axolotl"):
        dialects.read({"learning_rate": 1e-4})


# Written, and read again

RECIPES = {
    "lora": Recipe(model="a/b", rank=8, alpha=16, dropout=0.1, learning_rate=3e-4, batch_size=16, micro_batch=4, epochs=2),
    "qlora": Recipe(model="a/b", bits=4, precision="bf16", targets="attention", optimizer="paged_adamw", steps=100, epochs=None),
    "8bit": Recipe(model="a/b", bits=8, targets=("q_proj", "v_proj"), schedule="constant", warmup=0.2, seed=3, epochs=1),
    "dora": Recipe(model="a/b", adapter="dora", targets="mlp", gradient_checkpointing=True, schedule="linear", epochs=3),
    "rslora": Recipe(model="a/b", adapter="rslora", schedule="cosine_min", weight_decay=0.01, clip=0.5, epochs=1),
    "bf16": Recipe(model="a/b", bits=16, precision="bf16", optimizer="adamw_8bit", max_length=1024, revision="v1", epochs=1),
    "full": Recipe(model="a/b", adapter="full", learning_rate=1e-5, epochs=1),
}
DATA = {
    "hub": DataConfig(train="hub:o/n", task="chat", columns={"messages": "messages"}),
    "file": DataConfig(train="/d/rows.jsonl", task="instruction", columns={"instruction": "q", "response": "a"}),
}


@pytest.mark.parametrize("program", dialects.NAMES)
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_the_same_after_it_was_written_and_read(program, name):
    recipe = RECIPES[name]
    out, _, wrong = dialects.write(program, recipe, DATA["file"])
    again = Recipe(**dialects.read(out).recipe)
    assert again == recipe
    assert not [one for one in wrong if not one.startswith(("data.", "template"))]


@pytest.mark.parametrize("program", dialects.NAMES)
@pytest.mark.parametrize("name", DATA)
def test_rows_are_the_same_after_they_were_written_and_read(program, name):
    data = DATA[name]
    out, registry, wrong = dialects.write(program, RECIPES["lora"], data)
    found = dialects.read(out, registry=registry).data
    assert found["train"] == data.train
    if program != "trl":  # which tells the kind of rows by their columns
        assert (found["task"], found["columns"]) == (data.task, data.columns)


def test_what_a_program_cannot_say_is_listed():
    recipe = Recipe(adapter="adalora", tokens=1000, lora_plus_ratio=4, zero_stage=1)
    said = " ".join(dialects.write("trl", recipe, DATA["file"])[2])
    assert all(word in said for word in ("adalora", "tokens 1,000", "lora_plus_ratio 4", "zero_stage 1", "data.columns"))


# Doors


@pytest.mark.parametrize("name", ["axolotl.yml", "llamafactory.yaml", "trl.yaml"])
def test_a_study_file_is_made_of_each_and_its_defaults_are_what_the_file_says(name, tmp_path):
    made = adopt(FILES / name, folder=tmp_path)
    built = spec.build(written.parse(made.text), tmp_path)
    assert built.recipe == Recipe(**read(name).recipe)
    assert all(key in made.text for key, *_ in made.left)


def test_init_from_and_export_to_are_each_others_inverse_on_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = command(capsys, "init", "--from", FILES / "axolotl.yml", "--out", tmp_path / "mine.yaml", "--json")
    told = one_object(out)
    assert code == 0 and "flux_capacitor" in {one["key"] for one in told["left"]}
    assert command(capsys, "init", "--from", FILES / "axolotl.yml", "rows.jsonl")[0] == 2
    assert command(capsys, "init")[0] == 2
    recipe = read("axolotl.yml").recipe
    hpo.run(simulated(tmp_path / "s", recipe=recipe, budget={"trials": 1}, resources={"mode": "local"}))
    where = ["--storage", tmp_path / "s"]
    for program in dialects.NAMES:
        file = tmp_path / f"{program}.yaml"
        assert command(capsys, "export", "small", "--to", program, "--trial", 0, "--out", file, *where)[0] == 0
        again = dialects.read(written.parse(file.read_text())).recipe
        same = set(recipe) - ({"zero_stage"} if program == "trl" else set())
        assert {key: again.get(key) for key in same} == {key: recipe[key] for key in same}
    assert command(capsys, "export", "small", "--to", "trl", "--out", tmp_path / "trl.yaml", *where)[0] == 2, "never overwritten"
    assert command(capsys, "export", "small", "--to", "trl", "--trial", 9, "--out", tmp_path / "x.yaml", *where)[0] == 2
    assert command(capsys, "export", "small", "--to", "torchtune", "--out", tmp_path / "x.yaml", *where)[0] == 2


def test_a_registry_of_llamafactory_is_written_beside_its_file(tmp_path):
    to_file("llamafactory", RECIPES["lora"], DATA["file"], tmp_path / "run.yaml", title="from a test")
    assert (tmp_path / "run" / "dataset_info.json").is_file()
    made = adopt(tmp_path / "run.yaml", folder=tmp_path)
    assert spec.build(written.parse(made.text), tmp_path).data.columns == DATA["file"].columns
