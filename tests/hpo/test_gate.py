"""What is refused before it is launched, and how far a micro-batch is cut so that it is not."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from hpo import gate
from hpo.gate import judge
from training import memory
from training.model import describe
from training.recipe import Limits, Recipe, Resources

SHAPE = describe("embedded")


def predicted(recipe: Recipe, workers: int = 1, tokens: int = 128) -> int:
    return memory.predict(recipe, SHAPE, workers=workers, tokens_per_row=tokens).total


def test_without_a_limit_a_recipe_passes_unchanged_with_its_prediction():
    recipe = Recipe(batch_size=64)
    verdict = judge(recipe, SHAPE, Limits(), Resources(), 128)
    assert (verdict.recipe, verdict.predicted, verdict.refusal) == (recipe, predicted(recipe), None)


def test_without_a_shape_everything_passes():
    recipe = Recipe(batch_size=64)
    assert judge(recipe, None, Limits(peak_bytes=1), Resources(), 128).refusal is None


def test_what_fits_exactly_passes_and_a_byte_less_is_cut():
    recipe = Recipe(batch_size=16)
    need = predicted(recipe)
    assert judge(recipe, SHAPE, Limits(peak_bytes=need), Resources(), 128).recipe == recipe
    cut = judge(recipe, SHAPE, Limits(peak_bytes=need - 1), Resources(), 128)
    assert (cut.recipe.micro_batch, cut.refusal) == (8, None)
    assert cut.recipe.model_copy(update={"micro_batch": None}) == recipe, "nothing but the micro-batch is touched"


def test_what_does_not_fit_with_one_sequence_is_refused_with_both_numbers():
    need = predicted(Recipe(batch_size=16, micro_batch=1))
    refused = judge(Recipe(batch_size=16), SHAPE, Limits(peak_bytes=need - 1), Resources(), 128)
    assert refused.refusal == f"{need:,} peak bytes predicted, over the limit of {need - 1:,}"
    assert refused.predicted == need
    assert judge(Recipe(batch_size=16), SHAPE, Limits(peak_bytes=need), Resources(), 128).recipe.micro_batch == 1


def test_targets_that_match_nothing_are_refused_with_the_reason():
    assert "matches no linear module" in judge(Recipe(targets="c_attn"), SHAPE, Limits(), Resources(), 128).refusal


def test_values_that_do_not_go_together_are_refused_with_the_remedy():
    refused = judge(Recipe(adapter="full", bits=4), SHAPE, Limits(), Resources(), 128)
    assert refused.predicted is None and refused.recipe.bits == 4
    assert refused.refusal == (
        "adapter: full trains the weights themselves, which 4 bits cannot hold. "
        "Set bits: 32, or 16 with precision: bf16, or train an adapter."
    )
    assert judge(Recipe(adapter="full"), SHAPE, Limits(), Resources(), 128).refusal is None
    assert "adalora decides on ranks" in judge(Recipe(adapter="adalora"), SHAPE, Limits(), Resources(workers=2), 128).refusal
    assert judge(Recipe(adapter="full", bits=4), None, Limits(), Resources(), 128).refusal is None


def test_a_micro_batch_of_the_user_is_kept_where_it_fits_and_never_beyond_the_share_of_a_worker():
    assert judge(Recipe(batch_size=16, micro_batch=4), SHAPE, Limits(), Resources(), 128).recipe.micro_batch == 4
    many = judge(Recipe(batch_size=16, micro_batch=16), SHAPE, Limits(), Resources(workers=4), 128)
    assert many.predicted == predicted(Recipe(batch_size=16), workers=4)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([1, 2, 4]), st.sampled_from([4, 8, 12, 64]), st.integers(1, 60_000_000), st.sampled_from([4, 64]),
    st.integers(8, 128),
)  # fmt: skip
def test_a_verdict_is_within_the_limit_or_a_refusal_and_no_larger_halving_would_have_fitted(workers, batch, limit, rank, tokens):
    recipe = Recipe(batch_size=batch, rank=rank)
    verdict = judge(recipe, SHAPE, Limits(peak_bytes=limit), Resources(workers=workers), tokens)
    assert (verdict.refusal is None) == (verdict.predicted <= limit)
    micro = verdict.recipe.micro_batch
    if verdict.refusal is None and micro is not None:
        before = [m for m in range(1, batch // workers + 1) if (m + 1) // 2 == micro and m > micro]
        assert any(predicted(recipe.model_copy(update={"micro_batch": m}), workers, tokens) > limit for m in before)


def test_the_wall_is_lowered_by_the_worst_underestimate_and_below_what_ran_out_all_the_same():
    assert gate.wall(1000, []) == 1000
    assert gate.wall(None, []) is None
    assert gate.wall(1000, [], [(100, 90), (200, 210), (300, 300)]) == 952
    assert gate.wall(1000, [], [(100, 90)]) == 1000, "an overestimate costs nothing"
    assert gate.wall(1000, [], [(100, 900)]) == 800, "one that is far off says little about the others"
    assert gate.wall(1000, [990, 970]) == 969
    assert gate.wall(None, [500]) == 499
