"""A trial in a pack comes to what it comes to alone, whoever else is there."""

from __future__ import annotations

import random

import pytest
import torch

from benchmarks.packing import Operations
from training import pack
from training.data import prepare, read
from training.model import describe, load_tokenizer
from training.recipe import DataConfig, Job, Recipe
from training.run import set_up
from training.schedule import plan, rate, supervised
from training.stacked import LoopLinear, StackedLinear
from training.world import World

BASE = Recipe(max_length=64, steps=4, dropout=0.0)
DATA = DataConfig(train="embedded:train.jsonl", limit=120)


@pytest.fixture(scope="module")
def rows():
    return prepare(read(DATA), DATA, load_tokenizer(BASE), BASE.max_length).train


def some_recipes(count: int, rng: random.Random, **changes) -> list[Recipe]:
    return [
        BASE.model_copy(update={
            "rank": rng.choice([1, 3, 8, 16]), "alpha": rng.choice([4.0, 16.0, 33.0]), "dropout": rng.choice([0.0, 0.0, 0.2]),
            "learning_rate": rng.choice([1e-4, 1e-3, 5e-3]), "batch_size": rng.choice([1, 2, 3]), "seed": rng.randrange(1000),
            "weight_decay": rng.choice([0.0, 0.1]), "clip": rng.choice([0.3, 1.0]), "steps": rng.choice([2, 4, 5]),
            "adapter": rng.choice(["lora", "rslora"]), "schedule": rng.choice(["cosine", "linear", "constant"]),
            "lora_plus_ratio": rng.choice([1.0, 1.0, 4.0]),
        } | changes) for _ in range(count)
    ]  # fmt: skip


def opened(rows, seats: int, *, base: Recipe = BASE, dtype=torch.float64, kind: str = "stacked") -> pack.Pack:
    return pack.Pack(base, describe(base.model), rows, seats=seats, rank=16, dtype=dtype, kind=kind)


def train(packed: pack.Pack, recipes: list[Recipe]) -> list[dict]:
    """Trains the recipes, each entering as soon as a seat is free; returns losses, norms and adapter of each."""
    waiting, results, of = list(enumerate(recipes)), [{"losses": [], "norms": []} for _ in recipes], {}
    while waiting or packed.present:
        while waiting and None in packed.seats:
            number, recipe = waiting.pop(0)
            of[id(packed.enter(recipe, plan(recipe, packed.rows, workers=1)))] = number
        for step in packed.tick():
            result = results[of[id(step.seat)]]
            result["losses"].append(step.loss)
            result["norms"].append(step.norm)
        for seat in [seat for seat in packed.present if seat.done]:
            results[of.pop(id(seat))]["adapter"] = packed.adapter(seat)
            packed.leave(seat)
    return results


def difference(one: dict, other: dict, start: dict) -> float:
    """Returns the largest relative difference of what two runs have learned, over modules and both sides."""
    worst = 0.0
    for name, pair in one["adapter"].items():
        for mine, theirs, first in zip(pair, other["adapter"][name], start[name], strict=True):
            worst = max(worst, ((mine - theirs).norm() / (theirs - first).norm()).item())
    return worst


def alone(rows, recipe: Recipe, **options) -> tuple[dict, dict]:
    """Returns what a recipe comes to in a pack of its own, and its adapter before the first step."""
    packed = opened(rows, 1, **options)
    seat = packed.enter(recipe, plan(recipe, rows, workers=1))
    start = packed.adapter(seat)
    packed.leave(seat)
    return train(packed, [recipe])[0], start


@pytest.mark.parametrize("seed", range(4))
def test_packed_equals_alone(rows, seed):
    recipes = some_recipes(5, random.Random(seed))
    together = train(opened(rows, 3), recipes)  # three seats: two trials enter where others have left
    for recipe, result in zip(recipes, together, strict=True):
        own, start = alone(rows, recipe, kind="loop")
        assert len(result["losses"]) == recipe.steps
        assert result["losses"] == pytest.approx(own["losses"], rel=1e-11)
        assert difference(result, own, start) < 1e-11


def test_a_pack_of_one_equals_peft(rows):
    recipe = BASE.model_copy(update={"learning_rate": 2e-3, "batch_size": 3, "rank": 5, "weight_decay": 0.1, "steps": 6})
    result, start = alone(rows, recipe, dtype=torch.float32)
    planned = plan(recipe, rows, workers=1)
    run = set_up(Job(recipe=recipe, data=DATA), describe(recipe.model), planned, World(), "cpu")
    weights = {name: (weight, weight.detach().clone()) for name, weight in run.inner.named_parameters() if weight.requires_grad}
    for name, (a, b) in start.items():
        assert torch.equal(weights[f"base_model.model.{name}.lora_A.default.weight"][1], a)
        assert torch.equal(weights[f"base_model.model.{name}.lora_B.default.weight"][1], b)
    losses = [
        run.step(rows, planned.micro_batches(step, 0, 1), supervised(rows, planned, step), rate(recipe, step, planned.steps))[0]
        for step in range(planned.steps)
    ]
    assert result["losses"] == pytest.approx(losses, rel=1e-4)
    for name, (a, b) in result["adapter"].items():
        for side, mine in (("A", a), ("B", b)):
            theirs, first = weights[f"base_model.model.{name}.lora_{side}.default.weight"]
            assert (mine - theirs).norm() < 5e-3 * (theirs - first).norm()  # fp32: Adam turns rounding into steps


def test_a_neighbour_that_diverges_hurts_nobody(rows):
    sound = BASE.model_copy(update={"learning_rate": 1e-3, "rank": 8})
    wild = BASE.model_copy(update={"learning_rate": 1e3, "weight_decay": 10.0, "clip": 1e9, "seed": 1})
    own, start = alone(rows, sound)
    packed = opened(rows, 3)
    seats = [packed.enter(recipe, plan(recipe, rows, workers=1)) for recipe in (wild, sound, wild)]
    packed.stack.arrays["weights"][0][seats[2].number] = float("inf")
    losses = []
    while not seats[1].done:
        losses += [step.loss for step in packed.tick() if step.seat is seats[1]]
    assert losses == pytest.approx(own["losses"], rel=1e-11)
    assert difference({"adapter": packed.adapter(seats[1])}, own, start) < 1e-11


def test_a_step_that_is_not_finite_is_told_and_changes_no_weight(rows):
    packed = opened(rows, 1)
    seat = packed.enter(BASE, plan(BASE, rows, workers=1))
    packed.stack.arrays["weights"][0][0] = float("nan")
    packed.stack.arrays["weights"][1][0] = 0.5
    (step,) = packed.tick()
    assert step.loss != step.loss and seat.step == 1
    assert (packed.stack.arrays["weights"][1][0] == 0.5).all() and not packed.stack.arrays["gradient"][1].any()


def test_padding_of_ranks_stays_zero(rows):
    packed = opened(rows, 2, dtype=torch.float32)
    seats = [packed.enter(BASE.model_copy(update={"rank": rank}), plan(BASE, rows, workers=1)) for rank in (2, 16)]
    for _ in range(3):
        packed.tick()
    for array in (array for pair in packed.stack.arrays.values() for array in pair):
        assert not array[seats[0].number, 2:].any()


def test_a_long_batch_is_taken_in_parts_and_comes_to_the_same(rows):
    whole = BASE.model_copy(update={"batch_size": 6, "learning_rate": 1e-3})
    parts = whole.model_copy(update={"micro_batch": 4})
    (one, start), (other, _) = alone(rows, whole), alone(rows, parts)
    assert one["losses"] == pytest.approx(other["losses"], rel=1e-11)
    assert difference(one, other, start) < 1e-10


@pytest.mark.parametrize("changes", [{"gradient_checkpointing": True}, {"bits": 4}, {"precision": "bf16", "bits": 16}])
def test_how_the_base_is_held_does_not_mix_trials(rows, changes):
    base = BASE.model_copy(update=changes)
    recipes = some_recipes(3, random.Random(7), dropout=0.2, **changes)
    together = train(opened(rows, 3, base=base, dtype=torch.float32), recipes)
    for recipe, result in zip(recipes, together, strict=True):
        own, _ = alone(rows, recipe, base=base, dtype=torch.float32)
        assert result["losses"] == pytest.approx(own["losses"], rel=0.02 if base.precision == "bf16" else 1e-3)


def test_checkpointing_draws_the_same_dropout_again(rows):
    recipe = BASE.model_copy(update={"dropout": 0.5, "learning_rate": 1e-3})
    again = recipe.model_copy(update={"gradient_checkpointing": True})
    (one, start), (other, _) = alone(rows, recipe), alone(rows, again, base=again)
    assert one["losses"] == pytest.approx(other["losses"], rel=1e-11)
    assert difference(one, other, start) < 1e-10


def test_dropout_keeps_its_share_and_differs_by_layer_step_and_row():
    from training.stacked import Layout, kept

    keys = torch.arange(400).unsqueeze(1) * pack.ODD[3] + 12345
    layout = Layout((400,), torch.tensor([400], dtype=torch.int32), torch.ones(400, 1), torch.full((400, 1), 0.9), keys)
    masks = [kept(layout, number, torch.zeros(400, 256)) for number in range(3)]
    for mask in masks:
        assert mask.unique().tolist() == pytest.approx([0.0, 1 / 0.9])
        assert (mask > 0).float().mean().item() == pytest.approx(0.9, abs=0.004)
        assert (mask > 0).float().mean(0).std() < 0.02 and (mask > 0).float().mean(1).std() < 0.025  # binomial: 0.015, 0.019
    both = ((masks[0] == 0) & (masks[1] == 0)).float().mean().item()
    assert both == pytest.approx(0.01, abs=0.002)


def test_a_pack_of_eight_needs_a_fifth_of_the_operations_for_each_step(rows):
    recipe = BASE.model_copy(update={"batch_size": 2, "dropout": 0.05})
    planned = plan(recipe, rows, workers=1)
    run = set_up(Job(recipe=recipe, data=DATA), describe(recipe.model), planned, World(), "cpu")
    packed = opened(rows, 8, dtype=torch.float32)
    for seed in range(8):
        packed.enter(recipe.model_copy(update={"seed": seed}), planned)
    run.step(rows, planned.micro_batches(0, 0, 1), 10, 1e-3)  # the first one builds the optimizer's state
    packed.tick()
    with Operations() as one:
        run.step(rows, planned.micro_batches(1, 0, 1), 10, 1e-3)
    with Operations() as eight:
        assert len(packed.tick()) == 8
    assert eight.count / 8 < one.count / 5


def test_what_cannot_be_packed_is_refused_with_the_reason(rows):
    for changes, said in (({"adapter": "dora"}, "dora"), ({"optimizer": "adamw_8bit"}, "adamw_8bit"), ({"bits": 4}, "no place"),
                          ({"adapter": "full"}, "full")):  # fmt: skip
        recipe = BASE.model_copy(update=changes)
        with pytest.raises(ValueError, match=said):
            opened(rows, 1).enter(recipe, plan(BASE, rows, workers=1))


def test_a_larger_rank_makes_room_and_changes_nothing_for_those_who_are_there(rows):
    small, large = (BASE.model_copy(update={"rank": rank, "learning_rate": 1e-3, "steps": 4}) for rank in (8, 40))
    packed = opened(rows, 2)
    first = packed.enter(small, plan(small, rows, workers=1))
    losses = [step.loss for step in packed.tick()]
    second = packed.enter(large, plan(large, rows, workers=1))
    while not first.done:
        losses += [step.loss for step in packed.tick() if step.seat is first]
    (own, start), learned = alone(rows, small), {"adapter": packed.adapter(first)}
    assert losses == pytest.approx(own["losses"], rel=1e-11) and difference(learned, own, start) < 1e-11
    packed.leave(first)
    while not second.done:
        packed.tick()
    own, start = alone(rows, large)
    assert difference({"adapter": packed.adapter(second)}, own, start) < 1e-10


def test_the_fast_product_is_that_of_the_loop_to_the_bit():
    generator = torch.Generator().manual_seed(0)
    tokens, weights = torch.randn(21, 12, generator=generator), torch.randn(4, 12, 8, generator=generator)
    layout = pack.Layout((5, 0, 9, 7), torch.tensor([5, 5, 14, 21], dtype=torch.int32), torch.ones(21, 1))
    assert torch.equal(StackedLinear.product(tokens, weights, layout), LoopLinear.product(tokens, weights, layout))
