"""What is recommended stays inside the published bands and the memory, follows the task, and gives way to the user."""

from __future__ import annotations

import pytest

from training import memory, recommend
from training.model import Shape, describe
from training.recipe import Recipe


def llama(hidden: int, layers: int, wide: int, *, vocabulary: int = 32_000) -> Shape:
    """A Llama's shape without its weights."""
    block = {f"self_attn.{n}_proj": (hidden, hidden) for n in "qkvo"}
    block |= {"mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden), "mlp.down_proj": (hidden, wide)}
    linear = {f"model.layers.{i}.{name}": size for i in range(layers) for name, size in block.items()}
    weights = sum(a * b for a, b in linear.values())
    config = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": hidden // 128, "vocab_size": vocabulary,
              "max_position_embeddings": 4096, "tie_word_embeddings": False, "model_type": "llama"}  # fmt: skip
    return Shape(config, linear, weights + 2 * vocabulary * hidden, weights)


SEVEN, SEVENTY = llama(4096, 32, 11008), llama(8192, 80, 28672)
GB = 10**9


def ask(shape=SEVEN, task="instruction", rows=5_000, capacity=80 * GB, **more):
    return recommend.recommend(
        shape, task, **{"rows": rows, "tokens_per_row": 500, "capacity": capacity, "device": "cuda", **more}
    )


@pytest.mark.parametrize("task", recommend.TASKS)
@pytest.mark.parametrize("rows", [50, 5_000, 200_000])
@pytest.mark.parametrize("capacity", [9, 16, 24, 80])
def test_it_is_a_recipe_that_is_predicted_to_fit_with_a_rank_of_the_tables(task, rows, capacity):
    found = ask(task=task, rows=rows, capacity=capacity * GB)
    recipe = Recipe(**found.fields)
    assert found.memory.total <= 0.8 * capacity * GB
    if recipe.adapter == "lora":
        assert recipe.rank in recommend.RANKS and 1 <= recipe.alpha / recipe.rank <= 2
    assert all(advice.why for advice in found.advice.values())
    assert recommend.remarks(recipe, SEVEN) == []


def test_less_memory_means_fewer_bits_and_then_checkpointing():
    recipes = [Recipe(**ask(capacity=capacity * GB).fields) for capacity in (80, 24, 9)]
    assert [r.bits for r in recipes] == [16, 16, 4]
    assert not recipes[0].gradient_checkpointing and recipes[2].gradient_checkpointing
    assert ask(capacity=2 * GB).memory is None  # and it is said


def test_rank_follows_the_task_and_the_rows():
    ranks = {task: ask(task=task).fields["rank"] for task in recommend.TASKS}
    assert ranks["classification"] < ranks["instruction"] < ranks["chat"]
    assert ask(rows=100).fields["rank"] < ask().fields["rank"] < ask(rows=20_000).fields["rank"]
    assert ask(rows=100).fields["epochs"] > ask(rows=20_000).fields["epochs"]


def test_all_weights_only_for_much_plain_text_that_fits_at_a_tenth_of_the_rate():
    full = ask(task="completion", rows=200_000, capacity=400 * GB)
    assert (full.fields["adapter"], full.space.value) == ("full", "full")
    assert full.fields["learning_rate"] == pytest.approx(ask().fields["learning_rate"] / 10)
    assert ask(task="completion", rows=200_000, capacity=24 * GB).fields["adapter"] == "lora"


def test_what_the_user_has_set_wins_and_the_rest_follows_from_it():
    found = ask(given={"rank": 128, "bits": 4})
    assert (found.fields["rank"], found.fields["bits"], found.advice["rank"].why) == (128, 4, "as you have set it")
    assert found.fields["alpha"] == 128


def test_large_models_take_smaller_steps_and_small_ones_larger():
    rates = [ask(shape, capacity=None).fields["learning_rate"] for shape in (SEVENTY, SEVEN, describe("embedded"))]
    assert rates == sorted(rates)


def test_the_largest_rank_fits_and_the_next_does_not():
    recipe = Recipe(bits=4, precision="bf16", max_length=1024, micro_batch=1, gradient_checkpointing=True)
    rank, alpha, predicted = recommend.largest_rank(recipe, SEVEN, capacity=16 * GB, device="cuda")
    assert predicted.total <= 0.8 * 16 * GB and alpha == 2 * rank
    more = memory.predict(recipe.model_copy(update={"rank": rank + 1}), SEVEN, device="cuda")
    assert more.total > 0.8 * 16 * GB
    assert recommend.largest_rank(recipe, SEVEN, capacity=GB, device="cuda") is None
    embedded = recommend.largest_rank(Recipe(), describe("embedded"), capacity=100 * GB)
    assert embedded[0] == 64  # no rank beyond the narrowest layer


@pytest.mark.parametrize(
    ("fields", "said"),
    [({"rank": 128}, "narrowest"), ({"alpha": 320}, "alpha / rank is 20"), ({"rank": 64, "alpha": 16}, "0.25")],
)
def test_an_unusual_pair_is_remarked_on(fields, said):
    assert said in " ".join(recommend.remarks(Recipe(**fields), describe("embedded")))
