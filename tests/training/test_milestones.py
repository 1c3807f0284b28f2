"""Checks of the milestones in docs/requirements.md that no other test shows by itself."""

from __future__ import annotations

import pytest
import torch

from training import evaluate, memory
from training.adapters import attach
from training.data import prepare, read, tokenize
from training.model import Shape, describe, load_model, load_tokenizer, match
from training.recipe import DataConfig, Recipe


def test_labels_are_the_response_and_nothing_else_for_a_pinned_tokenizer():
    tokenizer = load_tokenizer(Recipe())
    rows = [{"instruction": "I want to cancel.", "response": "orders | normal"}, {"instruction": "Hi", "response": "x"}]
    found = tokenize(rows, DataConfig(train="x", template="{instruction}\n"), tokenizer, 64)
    assert [len(ids) for ids in found.ids] == [15, 4]
    batch = evaluate.batch_of(found.ids, found.prompt_lengths, pad=2, device="cpu")
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    for i, (ids, length) in enumerate(zip(found.ids, found.prompt_lengths, strict=True)):
        assert batch["attention_mask"][i].sum() == len(ids)
        labels = batch["labels"][i]
        assert labels[labels != -100].tolist() == ids[length:] and ids[-1] == tokenizer.eos_token_id
        said = tokenizer.decode(ids[length:], skip_special_tokens=True)
        assert said.strip() == rows[i]["response"]


def test_the_trainable_weights_are_rank_times_in_plus_out_and_a_small_share_of_a_real_shape(llama):
    recipe = Recipe(model=llama, rank=4)
    model = attach(load_model(recipe), recipe, describe(llama))
    sizes = match("all-linear", describe(llama))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(4 * (a + b) for a, b in sizes.values())
    shape = seven_billion()
    share = sum(16 * (a + b) for a, b in match("all-linear", shape).values()) / shape.parameters
    assert 6.5e9 < shape.parameters < 7e9 and share < 0.01


def seven_billion() -> Shape:
    """Returns the shape of Llama-2-7B from its modules, without weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                         num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=4096)  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linear = {name: (module.out_features, module.in_features) for name, module in model.named_modules()
              if isinstance(module, torch.nn.Linear) and name != "lm_head"}  # fmt: skip
    return Shape(config.to_dict(), linear, sum(p.numel() for p in model.parameters()), sum(a * b for a, b in linear.values()))


def test_a_backward_reaches_every_adapter_and_no_weight_of_the_base(make_job):
    job = make_job()
    tokenizer = load_tokenizer(job.recipe)
    rows = prepare(read(job.data), job.data, tokenizer, 64).train
    model = attach(load_model(job.recipe), job.recipe, describe(job.recipe.model))
    for name, weight in model.named_parameters():  # B starts at zero, and then A has no gradient yet
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    batch = evaluate.batch_of(rows.ids[:4], rows.prompt_lengths[:4], pad=0, device="cpu")
    logits = evaluate.logits_of(model, batch)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100).backward()
    for name, weight in model.named_parameters():
        assert (weight.grad is not None and bool(weight.grad.abs().sum() > 0)) == ("lora_" in name), name


def test_four_bits_are_a_quarter_of_the_linear_weights_of_16_and_a_7b_model_fits_where_it_should():
    shape = seven_billion()

    def need(**given):
        recipe = Recipe(rank=16, batch_size=1, max_length=512, gradient_checkpointing=True, **given)
        return memory.predict(recipe, shape, workers=1, tokens_per_row=512, device="cuda")

    four, sixteen = need(bits=4, precision="bf16"), need(bits=16, precision="bf16")
    dense = 2 * (shape.parameters - sum(a * b for a, b in match("all-linear", shape).values()))
    assert (four.weights - dense) / (sixteen.weights - dense) == pytest.approx(0.25, rel=0.1)
    assert four.weights < 8e9 and four.total < 16e9


def test_four_bits_change_the_loss_of_the_embedded_model_little_and_measurably():
    config = DataConfig(train="embedded:train.jsonl", limit=60)
    losses = {}
    for bits in (32, 4):
        recipe = Recipe(bits=bits)
        rows = prepare(read(config), config, load_tokenizer(recipe), 96).train
        model = load_model(recipe)
        nll, counts, _ = evaluate.response_scores(model, rows.ids[:60], rows.prompt_lengths[:60], batch_size=20)
        losses[bits] = sum(nll) / sum(counts)
    assert losses[4] == pytest.approx(losses[32], rel=0.1) and losses[4] != losses[32]
