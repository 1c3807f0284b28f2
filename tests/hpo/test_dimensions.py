"""Dimensions that are no plain field: the weight of a source, the base model, the length of training."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from hpo import check
from hpo.errors import SpecError
from hpo.space import Space, problems
from tests.contracts import simulated
from training.recipe import Recipe

SPACE = Space(
    {
        "mix.chat": {"type": "float", "low": 0.1, "high": 4.0, "log": True},
        "mix.code": {"type": "choice", "values": [0, 1]},
        "rank": {"type": "int", "low": 1, "high": 8},
    }
)


def test_a_weight_of_a_source_goes_to_the_mix_of_the_recipe_and_back():
    defaults = Recipe(mix={"news": 2.0})
    point = {"mix.chat": 0.5, "mix.code": 1, "rank": 4}
    recipe = SPACE.resolve(point, defaults)
    assert recipe.mix == {"news": 2.0, "chat": 0.5, "code": 1} and recipe.rank == 4
    assert SPACE.project(recipe) == point
    assert SPACE.project(defaults) is None  # leaves the weights to the data
    assert problems(SPACE, defaults) == []


def test_a_weight_that_a_recipe_refuses_is_said_with_its_place():
    below = Space({"mix.chat": {"type": "float", "low": -1.0, "high": 1.0}})
    (where, said), *_ = problems(below, Recipe())
    assert where == "mix.chat.low" and "-1.0" in said
    times = Space({"mix.chat": {"type": "float", "low": 1.0, "high": 2.0, "times": "rank"}})
    assert problems(times, Recipe())[0][0] == "mix.chat.times"


def test_a_source_that_the_data_does_not_have_is_named(tmp_path):
    written = simulated(tmp_path, space={"mix.chat": {"type": "float", "low": 0.5, "high": 1.0}})
    with pytest.raises(SpecError, match="space.mix.chat: 'chat' is no source of data.train"):
        check.load(written)


def test_each_model_of_a_space_is_held_against_the_limit_by_its_own_shape(tmp_path):
    stories = Path(os.environ.get("PARETUNE_SHARED", Path(__file__).parents[3] / "shared" / "data")) / "models/stories260K/hf"
    if not stories.is_dir():
        pytest.skip(f"{stories} is not there; set PARETUNE_SHARED to a folder with models/stories260K/hf")
    other = tmp_path / "stories"
    shutil.copytree(stories, other)
    written = simulated(tmp_path, train="loop", recipe={"batch_size": 1}, space={"model": ["embedded", str(other)], "rank": [4]},
                        data={"train": "embedded:train.jsonl", "limit": 40, "template": "{instruction}\nAnswer:"})  # fmt: skip
    found = check.load(written)[1]
    assert set(found.shapes) == {"embedded", str(other)} == set(found.longest)
    assert found.longest["embedded"] != found.longest[str(other)]
    limited = check.load(written | {"limits": {"peak_bytes": (found.smallest + found.largest) // 2}})[1]
    assert 0 < limited.refused < 1
