"""Rows laid end to end give the losses and gradients of padded ones, and none of them sees another."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import transformers

from tests.training.test_families import FAMILIES
from training import evaluate, loop, packing
from training.data import Tokenized
from training.model import describe
from training.recipe import Recipe
from training.run import set_up
from training.schedule import Plan, by_length, heaviest
from training.world import World

# Lengths and prompts: equal ones, one token of prompt or none, a whole row, the shortest that has a response.
LENGTHS, PROMPTS = (9, 17, 9, 5, 2, 30), (4, 10, 1, 0, 1, 29)
SLIDING = {"sliding_window": 6}


def some_rows(seed: int = 0) -> Tokenized:
    generator = torch.Generator().manual_seed(seed)
    return Tokenized([torch.randint(5, 500, (n,), generator=generator).tolist() for n in LENGTHS], list(PROMPTS))


def tokens_of(rows: Tokenized) -> int:
    return sum(len(ids) - max(prompt, 1) for ids, prompt in zip(rows.ids, rows.prompt_lengths, strict=True))


def a_run(job, **fields):
    """Returns a fresh run of the job's model with adapters that are no zeros."""
    job = job.model_copy(update={"recipe": job.recipe.model_copy(update=fields)})
    planned = Plan(1, len(LENGTHS), len(LENGTHS), list(range(len(LENGTHS))))
    run = set_up(job, describe(job.recipe.model), planned, World(), "cpu")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in run.inner.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return run


def gradients(run, rows: Tokenized, chunks: list[list[int]]) -> tuple[float, list[torch.Tensor]]:
    """Returns a step's loss and the gradients that it would have gone by."""
    kept = []
    run._update = lambda total: kept.extend(p.grad.clone() for p in run.parameters) or 0.0
    loss, _ = run.step(rows, chunks, tokens_of(rows), 0.0)
    return loss, kept


def far(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """Returns the distance of two gradients as a share of their size."""
    size = math.sqrt(sum(float(b.double().pow(2).sum()) for b in other))
    return math.sqrt(sum(float((a - b).double().pow(2).sum()) for a, b in zip(one, other, strict=True))) / size


@pytest.fixture(scope="module", params=[*sorted(FAMILIES), "sliding mistral"])
def folder(request, save_model, special) -> str:
    known = FAMILIES[request.param.split()[-1]]
    options = known.options | special | (SLIDING if request.param.startswith("sliding") else {})
    return save_model(request.param, getattr(transformers, known.config)(**options))


def test_every_family_is_packed_and_steps_as_it_does_with_padding(folder, make_job):
    rows, all_rows = some_rows(), [list(range(len(LENGTHS)))]
    packed, padded = (a_run(make_job(model=folder, packing=way)) for way in ("auto", "off"))
    assert packed.packed and not padded.packed
    for run in (packed, padded):
        run.inner.double().eval()  # in fp64 only the order of sums is left; some families have dropout of their own
    (loss, found), (expected, wanted) = gradients(packed, rows, all_rows), gradients(padded, rows, all_rows)
    assert loss == pytest.approx(expected, rel=1e-6)  # the loss itself is computed in fp32
    assert far(found, wanted) < 1e-5


@pytest.mark.parametrize("fields", [
    {"gradient_checkpointing": True}, {"bits": 4}, {"precision": "bf16", "bits": 16}, {"precision": "bf16"},
    {"precision": "fp16"}, {"adapter": "dora"}, {"adapter": "full"}, {"adapter": "adalora", "bits": 4},
    {"bits": 8}, {"gradient_checkpointing": True, "bits": 4, "precision": "bf16"},
], ids=str)  # fmt: skip
def test_whatever_the_recipe_packed_and_padded_steps_are_equal(make_job, fields):
    rows, chunks = some_rows(), [[0, 1, 2], [3, 4, 5]]
    packed, padded = (gradients(a_run(make_job(packing=way, **fields)), rows, chunks) for way in ("auto", "off"))
    half = fields.get("precision", "fp32") != "fp32" or fields.get("bits") == 8
    assert packed[0] == pytest.approx(padded[0], rel=2e-3 if half else 1e-5)
    assert far(packed[1], padded[1]) < (0.1 if half else 1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_with_dropout_no_row_sees_another_either(make_job, checkpointing):
    run = a_run(make_job(dropout=0.3, gradient_checkpointing=checkpointing))
    losses = []
    for changed in (None, 0, 3):
        rows = some_rows()
        if changed is not None:
            rows.ids[changed] = [t + 1 for t in rows.ids[changed]]
        torch.manual_seed(3)  # the same elements are dropped
        logits = packing.logits_of(run.forward, packing.batch_of(rows.ids, rows.prompt_lengths, device="cpu"))
        losses.append(logits.detach())
    order = sorted(range(len(LENGTHS)), key=lambda i: LENGTHS[i])
    counts = [LENGTHS[i] - max(PROMPTS[i], 1) for i in order]
    for changed, found in zip((0, 3), losses[1:], strict=True):
        for i, before, after in zip(order, losses[0].split(counts), found.split(counts), strict=True):
            assert torch.equal(before, after) == (i != changed)


def test_what_is_not_finite_in_one_row_stays_there(make_job):
    run, rows = a_run(make_job()), some_rows()
    with torch.no_grad():
        run.inner.get_input_embeddings().weight[7] = math.nan
    rows.ids[:] = [[t if t != 7 else 8 for t in ids] for ids in rows.ids]
    rows.ids[1][0] = 7
    logits = packing.logits_of(run.forward, packing.batch_of(rows.ids, rows.prompt_lengths, device="cpu"))
    bad = (~logits.isfinite()).any(-1)
    order = sorted(range(len(LENGTHS)), key=lambda i: LENGTHS[i])
    parts = bad.split([LENGTHS[i] - max(PROMPTS[i], 1) for i in order])
    assert {i for i, part in zip(order, parts, strict=True) if part.any()} == {1}


def test_a_model_that_mixes_tokens_outside_its_attention_is_not_packed(save_model, special, make_job):
    config = transformers.MambaConfig(hidden_size=32, num_hidden_layers=1, state_size=4, **special)
    assert not packing.packs(transformers.MambaForCausalLM(config))
    leaky = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            attn_implementation="sdpa",
            **special,
        )
    )
    assert packing.packs(leaky) and leaky.config._attn_implementation == packing.NAME
    leaky.set_attn_implementation("sdpa")
    leaky.model.layers[0].register_forward_hook(lambda module, given, out: out + out.roll(1, dims=1))  # a convolution
    assert not packing.packs(leaky) and leaky.config._attn_implementation == "sdpa"


def test_the_rows_of_a_step_and_its_curve_are_those_of_padding(make_job):
    curves = {}
    for way in ("auto", "off"):
        seen = curves.setdefault(way, [])
        loop.train(make_job(packing=way, micro_batch=3, steps=6), seen.append)
    for one, other in zip(curves["auto"], curves["off"], strict=True):
        assert one.tokens == other.tokens
        assert one.metrics == pytest.approx(other.metrics, rel=1e-4)


def test_padded_forwards_hold_rows_of_like_length_and_all_of_them():
    rows = some_rows()
    chunks = by_length([[0, 1, 2, 3], [4, 5]], rows)
    assert [len(chunk) for chunk in chunks] == [4, 2] and sorted(sum(chunks, [])) == list(range(6))
    assert max(LENGTHS[r] for r in chunks[0]) <= min(LENGTHS[r] for r in chunks[1])


def test_the_heaviest_step_has_the_most_tokens_in_one_forward_as_it_is_laid_out():
    rows = Tokenized([[0] * n for n in (10, 10, 10, 10, 25, 1, 1, 1)], [1] * 8)
    planned = Plan(2, 4, 4, list(range(8)))
    assert heaviest(planned, rows, World(), packed=True) == 0  # 40 tokens against 28
    assert heaviest(planned, rows, World(), packed=False) == 1  # 40 against 4 rows as wide as 25
    assert heaviest(replace(planned, micro=2), rows, World(), packed=False) == 1


def test_a_batch_has_each_token_once_and_labels_where_they_are_predicted():
    rows = some_rows()
    batch = packing.batch_of(rows.ids, rows.prompt_lengths, device="cpu")
    assert batch["input_ids"].shape == (1, sum(LENGTHS)) and len(batch["labels"]) == tokens_of(rows)
    assert batch["rows"].groups == ((5, 17), (1, 30))  # rows of 2, 5, 9, 9 and 17: 3 + 2 * 4 + 4 * 8 tokens of padding
    assert batch["rows"].padded.tolist().count(sum(LENGTHS)) == 43
    following = batch["input_ids"][0, batch["keep"] + 1]
    assert torch.equal(following, batch["labels"])
    padded = evaluate.batch_of(rows.ids, rows.prompt_lengths, pad=0, device="cpu")
    assert sorted(batch["labels"].tolist()) == sorted(padded["labels"][padded["labels"] != -100].tolist())


def test_what_is_padded_for_attention_is_not_kept_as_it_was_too():
    tokens, kept = torch.randn(12, 2, 4, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda kept_: kept.append(kept_) or kept_, lambda kept_: kept_):
        rows = packing.grouped([[3, 4], [5]], device="cpu")
        parts = rows.taken(tokens)
        back = rows.given_back([part.transpose(1, 2) for part in parts])
    assert [part.shape for part in parts] == [(2, 2, 4, 4), (1, 2, 5, 4)] and not parts[0][0, :, 3].any()
    assert torch.equal(back, tokens) and all(not each.is_floating_point() for each in kept)


def test_packing_is_auto_or_off():
    assert Recipe().packing == "auto"
    with pytest.raises(ValueError, match="packing"):
        Recipe(packing="always")


def test_an_outcome_says_whether_its_rows_were_packed(make_job):
    from training.loop import train

    for packing_, packed in (("auto", True), ("off", False)):
        assert train(make_job(steps=1, packing=packing_)).conditions["packed"] is packed
