"""What only a GPU can show. Skipped, with the reason, where there is none.

    python -m pytest tests/gpu -m gpu
"""

from __future__ import annotations

import pytest
import torch

from training import host, memory, warm
from training.loop import train
from training.model import describe
from training.recipe import DataConfig, EvaluationConfig, Job, Recipe, Resources

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]
DATA = DataConfig(
    train="embedded:train.jsonl",
    validation="embedded:validation.jsonl",
    test="embedded:test.jsonl",
    template="{instruction}\nAnswer:",
    limit=256,
)


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_loss_falls_and_peak_bytes_come_from_the_allocator(bits):
    recipe = Recipe(bits=bits, precision="bf16", learning_rate=5e-3, epochs=1, max_length=128)
    job = Job(recipe=recipe, data=DATA, evaluation=EvaluationConfig(rows=64), resources=Resources(gpus=1))
    seen = []
    outcome = train(job, lambda progress: seen.append(progress.metrics["train_loss"]))
    assert outcome.ended == "complete"
    assert seen[-1] < 0.8 * seen[0]
    predicted = memory.predict(recipe, describe("embedded"), tokens_per_row=65).total
    assert outcome.peak_bytes > predicted * 0.3
    assert torch.cuda.get_device_name() == outcome.conditions["device"]


def test_out_of_memory_is_a_result_and_frees_the_gpu():
    recipe = Recipe(precision="bf16", batch_size=65536, steps=2, max_length=128)
    blocked = torch.empty(int(torch.cuda.mem_get_info()[0] * 0.97), dtype=torch.uint8, device="cuda")
    outcome = train(Job(recipe=recipe, data=DATA, evaluation=EvaluationConfig(rows=8), resources=Resources(gpus=1)))
    del blocked
    assert outcome.ended == "infeasible" and "out of memory" in outcome.reason
    again = train(Job(recipe=recipe.model_copy(update={"batch_size": 8}), data=DATA, resources=Resources(gpus=1)))
    assert again.ended == "complete"


@pytest.mark.parametrize("bits", [16, 4])
def test_packed_trials_come_to_what_they_come_to_alone(bits):
    same = {"bits": bits, "precision": "bf16", "dropout": 0.0, "learning_rate": 1e-3, "steps": 40, "batch_size": 4}
    recipes = [Recipe(rank=rank, max_length=128, **same) for rank in (4, 16, 8)]
    given = {"data": DATA, "evaluation": EvaluationConfig(rows=64, reports=1), "resources": Resources(gpus=1)}
    jobs = [Job(recipe=recipe, **given) for recipe in recipes]
    with warm.keeping():
        alone, table, packed = [train(job) for job in jobs], host.Host(3), {}
        for number, job in enumerate(jobs):
            assert table.enter(str(number), job, lambda progress: None) is None
        while table.names:
            packed |= dict(table.tick())
        table.close()
    for number, one in enumerate(alone):
        mine = packed[str(number)]
        assert mine.loss == pytest.approx(one.loss, rel=0.05)  # bf16: rounding differs
        assert mine.peak_bytes == pytest.approx(one.peak_bytes, rel=0.1)
        assert mine.seconds == pytest.approx(one.seconds, rel=0.5)
