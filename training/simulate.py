"""A stand-in for training with its signature: an outcome from a closed form, in microseconds.

Owns: `train`. Must not know: torch. For trying searches, tests and demonstrations; its numbers are about nothing real.
"""

from __future__ import annotations

import math
import random

from training.recipe import Job, Outcome, Progress, Report


def train(job: Job, report: Report) -> Outcome:
    """Returns an outcome in which accuracy, seconds and bytes conflict as in real LoRA fine-tuning.

    Accuracy peaks at a learning rate that falls slowly with alpha / rank and grows with length and, slowly, with rank;
    seconds grow with length and with checkpointing; bytes grow with the batch and the bits. A too large rate diverges.
    """
    recipe = job.recipe
    epochs = recipe.epochs or 1.0
    scale = recipe.alpha / recipe.rank
    off = math.log10(recipe.learning_rate * math.sqrt(scale / 2)) - math.log10(2e-3)
    noise = random.Random(f"{recipe.model_dump_json()}").gauss(0, 0.004)
    best = 0.95 - 0.25 / recipe.rank - 0.02 * (recipe.bits == 4) - 0.15 * math.exp(-epochs)
    final = max(0.02, best * math.exp(-0.5 * (off / 0.8) ** 2) + noise)
    tokens = int(60_000 * epochs)
    seconds = (
        tokens / 9000 * (1 + 0.3 * (recipe.bits == 4)) * (1 + 0.35 * recipe.gradient_checkpointing) * (1 + 2 / recipe.batch_size)
    )
    activations = 900_000 * recipe.batch_size * (0.35 if recipe.gradient_checkpointing else 1)
    peak = int(4e6 * recipe.bits / 32 + 1e6 + 9_000 * recipe.rank * 16 + activations)
    steps = max(4, job.evaluation.reports)
    fixed = {"trainable": 9_000 * recipe.rank, "conditions": {"device": "simulated", "workers": 1}}
    if job.limits.peak_bytes is not None and peak > job.limits.peak_bytes:
        return Outcome(
            ended="infeasible",
            reason=f"{peak:,} peak bytes are over the limit of {job.limits.peak_bytes:,}",
            share=0,
            peak_bytes=peak,
        )
    for step in range(1, steps + 1):
        share = step / steps
        if recipe.learning_rate > 0.3 and share > 0.4:
            return Outcome(ended="diverged", reason="the loss became inf", share=share, seconds=seconds * share, peak_bytes=peak)
        accuracy = final * (1 - math.exp(-3 * share)) / (1 - math.exp(-3))
        metrics = {"accuracy": accuracy, "loss": -math.log(max(accuracy, 0.01))}
        stop = report(
            Progress(step=step, steps=steps, tokens=int(tokens * share), share=share, seconds=seconds * share,
                     peak_bytes=peak, metrics=metrics)
        )
        if stop and step < steps:
            return Outcome(ended="stopped", reason=stop, share=share, scores={"accuracy": accuracy}, loss=metrics["loss"],
                           seconds=seconds * share, peak_bytes=peak, tokens=int(tokens * share), **fixed)  # fmt: skip
    return Outcome(scores={"accuracy": final}, loss=metrics["loss"], seconds=seconds, peak_bytes=peak, tokens=tokens, **fixed)
