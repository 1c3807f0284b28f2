"""What a process keeps between runs changes nothing in what they come to."""

import shutil

import pytest
import torch

from training import loop, warm
from training.model import EMBEDDED, load_model
from training.recipe import DataConfig, EvaluationConfig, Job, Recipe

RECIPES = {
    "lora": {},
    "another rank and seed": {"rank": 4, "seed": 3},
    "nf4": {"bits": 4},
    "int8": {"bits": 8},
    "bf16": {"bits": 16, "precision": "bf16"},
    "checkpointing": {"gradient_checkpointing": True},
    "dora": {"adapter": "dora"},
    "adalora": {"adapter": "adalora"},
    "padded": {"packing": "off"},
}


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    assert not warm._shelf.bases and not warm._shelf.rows and not warm._out


def job(folder, data="embedded:train.jsonl", **fields) -> Job:
    given = {"model": "embedded", "max_length": 64, "steps": 3, "batch_size": 4, "rank": 8, "dropout": 0.1} | fields
    return Job(
        recipe=Recipe(**given), cache=str(folder / "cache"), evaluation=EvaluationConfig(rows=8, reports=1),
        data=DataConfig(train=data, validation="embedded:validation.jsonl", template="{instruction}\nAnswer:"),
    )  # fmt: skip


def course(one: Job) -> tuple:
    """What a run reports and comes to, but for times."""
    seen = []
    outcome = loop.train(one, lambda progress: seen.append((progress.step, progress.metrics)))
    return seen, outcome.loss, outcome.scores, outcome.peak_bytes, outcome.trainable


@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
@pytest.mark.parametrize("name", RECIPES)
def test_a_run_after_others_is_to_the_bit_what_it_is_after_a_cold_start(tmp_path, name):
    cold = course(job(tmp_path, **RECIPES[name]))
    with warm.keeping():
        course(job(tmp_path, rank=2, learning_rate=0.5, seed=7))  # its neighbour, on another base or on this one
        course(job(tmp_path, **RECIPES[name]))
        before = warm.counts()
        assert course(job(tmp_path, **RECIPES[name])) == cold
        after = warm.counts()
        assert after == before | {"reused": after["reused"]} and after["reused"] > before["reused"]


def test_a_base_whose_weights_were_trained_is_not_kept(tmp_path):
    whole = {"adapter": "full", "learning_rate": 1e-3}
    cold = course(job(tmp_path, **whole))
    with warm.keeping():
        before = warm.counts()
        assert course(job(tmp_path, **whole)) == cold == course(job(tmp_path, **whole))
        assert warm.counts()["refused"] > before["refused"]
        assert course(job(tmp_path)) == course(job(tmp_path))


@pytest.mark.parametrize(
    "damage",
    [
        lambda model: model.get_submodule("model.layers.0.mlp.up_proj").weight.data.view(-1)[5].add_(1e-6),
        lambda model: model.get_submodule("model.norm").weight.requires_grad_(True),
        lambda model: model.model.layers[1].register_forward_hook(lambda *_: None),
        lambda model: setattr(model.model.layers[1], "mlp", torch.nn.Identity()),
        lambda model: model.eval(),
    ],
    ids=["one weight", "a gradient", "a hook", "a module", "eval mode"],
)
def test_a_base_that_came_back_changed_is_not_kept(damage):
    recipe = Recipe(model="embedded")
    with warm.keeping():
        model = warm.take(recipe)
        warm.give_back(model)
        assert warm.take(recipe) is model
        damage(model)
        warm.give_back(model)
        assert warm.take(recipe) is not model


def test_a_base_that_is_lent_is_nobody_elses():
    recipe = Recipe(model="embedded")
    with warm.keeping():
        assert warm.take(recipe) is not warm.take(recipe)


def test_another_model_at_the_same_place_is_another_base(tmp_path):
    shutil.copytree(EMBEDDED, tmp_path / "model")
    recipe = Recipe(model=str(tmp_path / "model"))
    with warm.keeping():
        model = warm.take(recipe)
        warm.give_back(model)
        (tmp_path / "model" / "config.json").touch()
        assert warm.take(recipe) is not model


def test_other_rows_at_the_same_place_are_read_again(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [f'{{"instruction": "say {i}", "response": "{i}"}}' for i in range(40)]
    path.write_text("\n".join(rows) + "\n")
    with warm.keeping():
        one = job(tmp_path, data=str(path)).model_copy(update={"cache": None})
        first = warm.rows_of(one)
        assert warm.rows_of(one) is first
        path.write_text("\n".join(rows[:30]) + "\n")
        assert len(warm.rows_of(one)[1].train) < len(first[1].train)


def test_bases_beyond_the_limit_go_the_least_recently_used_first():
    size = sum(p.numel() * 4 for p in load_model(Recipe(model="embedded")).parameters())
    with warm.keeping(limit=int(2.5 * size)):
        recipes = [Recipe(model="embedded"), Recipe(model="embedded", gradient_checkpointing=True)]
        models = [warm.take(recipe) for recipe in recipes]
        for model in models:
            warm.give_back(model)
        third = warm.take(Recipe(model="embedded", bits=16, precision="bf16"))
        warm.give_back(third)
        warm.give_back(warm.take(recipes[1]))  # used last, and no fourth
        kept = [model for model, _, _ in warm._shelf.bases.values()]
        assert kept[-1] is models[1] and third in kept


def test_nothing_is_kept_by_a_process_that_was_not_asked_to():
    recipe = Recipe(model="embedded")
    model = warm.take(recipe)
    warm.give_back(model)
    assert warm.take(recipe) is not model
