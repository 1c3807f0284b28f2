"""Points: drawn, encoded, resolved to recipes and found again; and every message about a space that cannot be."""

from __future__ import annotations

import json
import math
from collections import Counter
from random import Random

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from hpo.space import Choice, Float, Int, Space, key, problems
from training.recipe import Recipe

DEFAULTS = Recipe()


def space(**dimensions) -> Space:
    return Space(dimensions)


def floats(low: float = 0.5, high: float = 2.0, **more) -> dict:
    return {"type": "float", "low": low, "high": high, **more}


def ints(low: int = 1, high: int = 8, **more) -> dict:
    return {"type": "int", "low": low, "high": high, **more}


def choice(*values, **more) -> dict:
    return {"type": "choice", "values": list(values), **more}


CONDITIONAL = space(
    rank=ints(1, 3, when={"targets": "mlp"}),
    targets=choice("mlp", "attention"),
    dropout=choice(0.0, 0.1, 0.2, when={"targets": "attention", "schedule": "linear"}),
    schedule=choice("cosine", "linear"),
    weight_decay=choice(0.0, 0.1),
)


@st.composite
def dimensions(draw):
    kind = draw(st.sampled_from(["float", "log float", "int", "log int", "step", "choice"]))
    low = draw(st.integers(1, 50))
    span = draw(st.integers(1, 200))
    if kind == "float":
        return floats(low / 7, low / 7 + span / 3)
    if kind == "log float":
        return floats(low / 1e6, low / 1e6 * (1 + span), log=True)
    if kind == "int":
        return ints(low - 25, low - 25 + span)
    if kind == "log int":
        return ints(low, low + span, log=True)
    if kind == "step":
        step = draw(st.integers(2, 9))
        return ints(low, low + step * span, step=step)
    values = draw(st.lists(st.one_of(st.integers(-3, 3), st.booleans(), st.sampled_from(["a", "b"])), min_size=1))
    return choice(*{(type(value), value): value for value in values}.values())


NAMES = ["learning_rate", "rank", "dropout", "batch_size", "weight_decay"]


@st.composite
def spaces(draw):
    chosen = draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=5))
    flat = {name: draw(dimensions()) for name in chosen}
    if draw(st.booleans()):
        flat["targets"] = choice("attention", "mlp", "all-linear")
        for name in chosen:
            if draw(st.booleans()):
                flat[name]["when"] = {"targets": draw(st.sampled_from(["attention", "mlp"]))}
    return Space(flat)


# Points


@settings(deadline=None)
@given(spaces(), st.integers(0, 10**6))
def test_a_drawn_point_lies_in_the_space_in_the_order_of_the_space(space, seed):
    point = space.sample(Random(seed))
    assert space.contains(point)
    assert list(point) == [name for name in space if name in point]
    assert space.sample(Random(seed)) == point


@settings(deadline=None)
@given(spaces(), st.integers(0, 10**6))
def test_a_space_and_its_points_survive_json(space, seed):
    point = space.sample(Random(seed))
    again = json.loads(json.dumps(point))
    assert again == point
    assert key(again) == key(point)
    copy = Space.model_validate_json(space.model_dump_json())
    assert copy == space
    assert copy.sample(Random(seed)) == point


@settings(deadline=None)
@given(spaces(), st.integers(0, 10**6))
def test_a_point_with_more_or_less_than_exists_there_is_outside(space, seed):
    point = space.sample(Random(seed))
    assert not space.contains(point | {"seed": 1})
    for name in point:
        assert not space.contains({other: value for other, value in point.items() if other != name})
        assert not space.contains(point | {name: "not a value"})


@settings(deadline=None)
@given(dimensions(), st.floats(0, 1))
def test_every_place_of_the_unit_interval_is_a_value(dimension, unit):
    dimension = space(rank=dimension)["rank"]
    assert dimension.contains(dimension.decode(unit))


@settings(deadline=None)
@given(dimensions(), st.integers(1, 12))
def test_levels_are_distinct_values_within_the_range(dimension, count):
    dimension = space(rank=dimension)["rank"]
    levels = dimension.levels(count)
    assert all(dimension.contains(value) for value in levels)
    assert len({key({"x": value}) for value in levels}) == len(levels)
    if not isinstance(dimension, Choice):
        assert len(levels) <= count
        assert levels == sorted(levels)
        if count > 1:
            assert levels[0] == pytest.approx(dimension.low)
            assert levels[-1] == pytest.approx(dimension.high)


def test_one_level_is_the_middle():
    assert Float(low=1, high=100, log=True).levels(1) == [pytest.approx(10)]
    assert Float(low=0, high=1).levels(1) == [0.5]
    assert Int(low=0, high=10).levels(1) == [5]


def test_decode_gives_every_whole_number_an_equal_share():
    dimension = Int(low=4, high=64, step=4)
    shares = Counter(dimension.decode((i + 0.5) / 16_000) for i in range(16_000))
    assert set(shares) == set(range(4, 65, 4))
    assert set(shares.values()) == {1000}


def test_decode_gives_every_choice_an_equal_share():
    dimension = Choice(values=("a", "b", "c"))
    assert Counter(dimension.decode((i + 0.5) / 3000) for i in range(3000)) == {"a": 1000, "b": 1000, "c": 1000}


def test_decode_on_a_log_scale_gives_each_whole_number_its_part_of_the_scale():
    dimension = Int(low=2, high=32, log=True)
    count = 100_000
    shares = Counter(dimension.decode((i + 0.5) / count) for i in range(count))
    for value in range(2, 33):
        expected = math.log((value + 1) / value) / math.log(33 / 2)
        assert shares[value] / count == pytest.approx(expected, abs=2 / count)


def test_the_ends_of_a_range_are_reached():
    for dimension in (Float(low=1e-5, high=1e-2, log=True), Float(low=-1, high=3), Int(low=3, high=9, step=3)):
        assert dimension.decode(0.0) == pytest.approx(dimension.low)
        assert dimension.decode(1.0) == pytest.approx(dimension.high)


def test_a_boolean_is_no_number_and_one_is_not_true():
    assert not Float(low=0, high=2).contains(True)
    assert not Int(low=0, high=2).contains(True)
    assert not Int(low=0, high=2).contains(1.0)
    assert not Choice(values=(True, False)).contains(1)
    assert not Choice(values=(0, 1)).contains(False)
    assert Choice(values=(0, 1)).contains(1.0)


# Keys


@settings(deadline=None)
@given(spaces(), st.integers(0, 10**6))
def test_a_key_does_not_depend_on_the_order_of_the_fields(space, seed):
    point = space.sample(Random(seed))
    turned = dict(reversed(point.items()))
    assert key(turned) == key(point)
    assert hash(key(turned)) == hash(key(point))


def test_a_key_counts_twelve_digits():
    assert key({"learning_rate": 0.1 + 0.2}) == key({"learning_rate": 0.3})
    assert key({"learning_rate": 0.3000001}) != key({"learning_rate": 0.3})
    assert key({"alpha": 2}) == key({"alpha": 2.0})


def test_a_key_tells_true_from_one():
    assert key({"gradient_checkpointing": True}) != key({"gradient_checkpointing": 1})
    assert key({"gradient_checkpointing": False}) != key({"gradient_checkpointing": 0})


def test_a_key_tells_what_does_not_exist_from_any_value():
    assert key({"targets": "mlp"}) != key({"targets": "mlp", "rank": 8})


# Grids and sizes


@settings(deadline=None)
@given(spaces(), st.integers(1, 3))
def test_a_grid_has_points_of_the_space_once_in_a_fixed_order(space, levels):
    grid = space.grid(levels)
    assert all(space.contains(point) for point in grid)
    assert len({key(point) for point in grid}) == len(grid)
    assert space.grid(levels) == grid


def test_a_grid_of_enough_levels_is_the_whole_of_a_finite_space():
    flat = space(rank=ints(1, 3), bits=choice(4, 32), batch_size=ints(4, 12, step=4))
    assert flat.size == len(flat.grid(3)) == 18
    rng = Random(0)
    assert {key(flat.sample(rng)) for _ in range(2000)} == {key(point) for point in flat.grid(3)}


def test_a_grid_respects_conditions():
    rng = Random(0)
    drawn = {key(CONDITIONAL.sample(rng)) for _ in range(4000)}
    assert drawn == {key(point) for point in CONDITIONAL.grid(3)}
    # mlp: 2 schedules x 3 ranks; attention: 1 with cosine, 3 with linear; each with 2 decays.
    assert CONDITIONAL.size == len(CONDITIONAL.grid(3)) == (2 * 3 + 1 + 3) * 2


def test_the_last_dimension_of_a_grid_varies_fastest():
    grid = space(rank=ints(1, 2), bits=choice(4, 32)).grid(2)
    assert [tuple(point.values()) for point in grid] == [(1, 4), (1, 32), (2, 4), (2, 32)]


def test_what_others_depend_on_varies_slowest():
    grid = space(rank=ints(1, 2), dropout=choice(0.1, when={"targets": "mlp"}), targets=choice("mlp", "all")).grid(2)
    assert [point["targets"] for point in grid] == ["mlp", "mlp", "all", "all"]
    assert list(grid[0]) == ["rank", "dropout", "targets"]


def test_sizes():
    assert Space({}).size == 1
    assert Space({}).grid(3) == [{}]
    assert space(rank=ints(), dropout=floats(0, 0.5)).size == math.inf
    assert space(rank=ints(2, 8, step=2)).size == 4
    assert len(space(dropout=floats(0, 0.5), rank=ints(1, 256)).grid(4)) == 16


def test_the_size_of_a_large_conditional_space_is_counted_not_listed():
    large = space(steps=ints(1, 10**6), batch_size=ints(1, 10**4), rank=ints(1, 9, when={"bits": 4}), bits=choice(4, 32))
    assert large.size == 10**10 * (9 + 1)
    assert next(large.walk(3)) == {"steps": 1, "batch_size": 1, "rank": 1, "bits": 4}


# To recipes and back


RECIPES = space(
    learning_rate=floats(1e-5, 1e-2, log=True),
    rank=ints(1, 64, log=True),
    alpha=floats(0.5, 4.0, times="rank"),
    batch_size=ints(4, 64, step=4),
    targets=choice("attention", "mlp", "all-linear"),
    dropout=floats(0.0, 0.5, when={"targets": "mlp"}),
    gradient_checkpointing=choice(True, False),
    epochs=choice(0.5, 1.0, 2.0),
)


@settings(deadline=None)
@given(st.integers(0, 10**6))
def test_a_recipe_is_found_again_as_its_point(seed):
    point = RECIPES.sample(Random(seed))
    recipe = RECIPES.resolve(point, DEFAULTS)
    assert key(RECIPES.project(recipe)) == key(point)
    assert recipe.alpha == pytest.approx(point["alpha"] * recipe.rank)
    assert recipe.dropout == point.get("dropout", DEFAULTS.dropout)


@settings(deadline=None)
@given(st.integers(1, 500), st.sampled_from([0.1, 0.3, 0.7, 1, 2.5]))
def test_a_multiple_is_found_again_in_spite_of_rounding(rank, factor):
    multiples = space(rank=ints(1, 500), alpha=choice(0.1, 0.3, 0.7, 1, 2.5, times="rank"))
    point = {"rank": rank, "alpha": factor}
    assert multiples.project(multiples.resolve(point, DEFAULTS)) == point
    ends = space(rank=ints(1, 500), alpha=floats(0.1, factor, times="rank")) if factor > 0.1 else multiples
    assert ends.project(ends.resolve(point, DEFAULTS)) is not None


def test_the_defaults_of_a_recipe_are_a_point_where_they_lie_in_the_space():
    point = RECIPES.project(DEFAULTS)
    assert point["alpha"] == 2.0
    assert point["epochs"] == 1.0
    assert "dropout" not in point
    assert RECIPES.resolve(point, DEFAULTS) == DEFAULTS.model_copy(update={"epochs": 1.0})


@pytest.mark.parametrize(
    "dimensions",
    [
        {"rank": ints(32, 64)},
        {"rank": ints(4, 16, step=4), "dropout": floats(0.2, 0.3)},
        {"bits": choice(4, 8)},
        {"micro_batch": ints(1, 4)},
        {"tokens": ints(1, 100)},
        {"alpha": floats(3.0, 4.0, times="rank")},
        {"alpha": floats(3.0, 4.0, times="weight_decay")},
    ],
)
def test_a_recipe_outside_the_space_has_no_point(dimensions):
    assert Space(dimensions).project(DEFAULTS) is None


def test_a_whole_multiple_stays_a_whole_number():
    recipe = space(micro_batch=choice(0.5, 1.0, times="batch_size")).resolve({"micro_batch": 0.5}, DEFAULTS)
    assert recipe.micro_batch == 4
    assert isinstance(recipe.micro_batch, int)


@pytest.mark.parametrize(("field", "value"), [("steps", 10), ("tokens", 1000), ("epochs", 2.0)])
def test_a_length_of_the_point_takes_the_place_of_the_default_one(field, value):
    for default in ({}, {"epochs": 3}, {"steps": 7}, {"tokens": 99}):
        recipe = space(**{field: choice(value)}).resolve({field: value}, Recipe(**default))
        assert getattr(recipe, field) == value
        assert [recipe.epochs, recipe.steps, recipe.tokens].count(None) == 2


def test_the_default_length_stays_where_the_point_has_none():
    assert space(rank=ints()).resolve({"rank": 2}, Recipe(steps=7)).steps == 7


def test_what_recipe_refuses_is_an_error():
    with pytest.raises(ValidationError):
        space(rank=ints(-5, 5)).resolve({"rank": -1}, DEFAULTS)


# What cannot be


@pytest.mark.parametrize(
    ("dimension", "message"),
    [
        (floats(1.0, 0.1), "low must be below high, got low=1.0 and high=0.1. Swap them"),
        (floats(1.0, 1.0), "low must be below high, got low=1.0 and high=1.0. Swap them"),
        (floats(0.0, 1.0, log=True), "low must be above 0 with log: true, got low=0.0"),
        (floats(True, 2.0), "must be a number, got the boolean True"),
        (floats(float("nan"), 2.0), "Input should be a finite number"),
        (floats(0.0, float("inf")), "Input should be a finite number"),
        (floats(0.0, 1.0, log="yes"), "Input should be a valid boolean"),
        (floats(0.0, 1.0, step=0.1), "Extra inputs are not permitted"),
        (ints(8, 1), "low must be below high, got low=8 and high=1. Swap them"),
        (ints(0, 8, log=True), "low must be above 0 with log: true, got low=0"),
        (ints(1, 8, step=0), "step must be at least 1, got step=0"),
        (ints(1, 8, step=2), "step must divide high - low, got step=2 and 7"),
        (ints(2, 8, step=2, log=True), "step must be 1 with log: true, got step=2"),
        (ints(1.5, 8), "Input should be a valid integer"),
        (ints(False, 8), "must be a number, got the boolean False"),
        (choice(), "values must not be empty"),
        (choice(1, 2, 1), "values must differ, got [1, 2, 1]"),
        (choice(1, 1.0), "values must differ"),
        ({"type": "real", "low": 0, "high": 1}, "does not match any of the expected tags"),
        ({"low": 0, "high": 1}, "Unable to extract tag"),
    ],
)
def test_a_dimension_that_cannot_be_is_refused_with_rule_and_value(dimension, message):
    with pytest.raises(ValidationError) as caught:
        space(rank=dimension)
    assert message in str(caught.value)


def test_true_and_one_are_different_choices():
    assert space(x=choice(True, 1, False, 0)).size == 4


def test_a_space_cannot_be_changed():
    with pytest.raises(ValidationError):
        CONDITIONAL.root = {}
    with pytest.raises(ValidationError):
        CONDITIONAL["rank"].low = 7


def said(*, defaults: Recipe = DEFAULTS, **dimensions) -> list[tuple[str, str]]:
    return problems(Space(dimensions), defaults)


def test_a_space_that_fits_has_no_problems():
    assert problems(RECIPES, DEFAULTS) == []
    assert problems(CONDITIONAL, DEFAULTS) == []
    assert problems(Space({}), DEFAULTS) == []
    assert said(not_a_field=ints()) == []


@pytest.mark.parametrize(
    ("dimensions", "found"),
    [
        ({"rank": ints(0, 8)}, ("rank.low", "input should be greater than or equal to 1, got 0")),
        ({"dropout": floats(0, 1)}, ("dropout.high", "input should be less than 1, got 1.0")),
        ({"rank": choice(4, 8, 9999)}, ("rank.values[2]", "input should be less than or equal to 4096, got 9999")),
        ({"schedule": choice("cosine", "cos")}, ("schedule.values[1]", ", got 'cos'")),
        ({"rank": choice(True, 2)}, ("rank.values[0]", "must be a number, got the boolean True, got True")),
        ({"rank": floats(1.5, 8)}, ("rank.low", "got a number with a fractional part, got 1.5")),
        ({"rank": floats(1, 8)}, ("rank.type", "input should be a valid integer, got a number with a fractional part")),
        ({"alpha": ints(times="ranks")}, ("alpha.times", "must be another field of the recipe, got ranks")),
        ({"alpha": ints(times="alpha")}, ("alpha.times", "must be another field of the recipe, got alpha")),
        ({"alpha": ints(times="model")}, ("alpha.times", "alpha and model must both be numbers to be multiplied")),
        ({"tokens": ints(times="micro_batch")}, ("tokens.times", "tokens and micro_batch must both be numbers")),
        ({"alpha": choice("a", times="rank")}, ("alpha.times", "alpha and rank must both be numbers")),
        (
            {"rank": ints(times="batch_size"), "alpha": ints(times="rank")},
            ("alpha.times", "rank is itself a multiple; chain no multiples"),
        ),
        (
            {"alpha": floats(1, 5000, times="rank")},
            ("alpha.high", "input should be less than or equal to 65536, got 80000.0"),
        ),
        (
            {"alpha": floats(1, 1000, times="rank"), "rank": ints(1, 128)},
            ("alpha.high", "input should be less than or equal to 65536, got 128000.0"),
        ),
        ({"rank": ints(when={"bits": 4})}, ("rank.when", "must name an unconditional choice of the space, got bits")),
        (
            {"rank": ints(when={"batch_size": 4}), "batch_size": ints()},
            ("rank.when", "must name an unconditional choice of the space, got batch_size"),
        ),
        (
            {"rank": ints(when={"bits": 4}), "bits": choice(4, when={"targets": "mlp"}), "targets": choice("mlp")},
            ("rank.when", "must name an unconditional choice of the space, got bits"),
        ),
        ({"rank": ints(when={"bits": 8}), "bits": choice(4)}, ("rank.when.bits", "must be one of [4], got 8")),
        ({"epochs": ints(), "steps": ints()}, ("epochs", "give one of epochs, steps and tokens, got epochs and steps")),
        ({"bits": choice(16, 4)}, ("bits", "bits: 16 keeps the base in bf16 and needs precision: bf16")),
    ],
)
def test_what_does_not_fit_is_said_with_its_place(dimensions, found):
    problem = said(**dimensions)
    assert len(problem) == 1
    assert problem[0][0] == found[0]
    assert found[1] in problem[0][1]


def test_fields_that_go_together_at_every_point_are_no_problem():
    assert said(bits=choice(16, 4), defaults=Recipe(precision="bf16")) == []
    assert said(bits=choice(16, 4), precision=choice("bf16")) == []
    assert said(epochs=floats(when={"bits": 4}), steps=ints(when={"bits": 32}), bits=choice(4, 32)) == []
    assert said(epochs=floats(), defaults=Recipe(steps=10)) == []


def test_all_problems_are_said_at_once():
    places = [where for where, _ in said(rank=ints(0, 9999), dropout=floats(0, 2), alpha=ints(times="x"))]
    assert places == ["rank.low", "rank.high", "dropout.high", "alpha.times"]


@settings(deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(spaces(), st.integers(0, 10**6))
def test_a_space_without_problems_has_only_points_that_are_recipes(space, seed):
    assume(not problems(space, DEFAULTS))
    space.resolve(space.sample(Random(seed)), DEFAULTS)


def test_a_dimension_may_exist_for_several_values_of_another():
    several = space(
        adapter=choice("lora", "dora", "full"), rank=ints(1, 3, when={"adapter": ["lora", "dora"]}), warmup=choice(0.0, 0.1)
    )
    assert several.size == 2 * 3 * 2 + 2
    assert several.active({"adapter": "dora"}) == ["adapter", "rank", "warmup"]
    assert several.active({"adapter": "full"}) == ["adapter", "warmup"]
    assert Space.model_validate_json(several.model_dump_json()) == several
    assert problems(several, DEFAULTS) == []
    unknown = space(adapter=choice("lora", "full"), rank=ints(1, 3, when={"adapter": ["lora", "dora"]}))
    assert problems(unknown, DEFAULTS) == [("rank.when.adapter", "must be one of ['lora', 'full'], got 'dora'")]
