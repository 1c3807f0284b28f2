"""What a practitioner would run instead: Hugging Face's Trainer on a PEFT model, with the recipe's own settings.

It gets what is known to help it: a fused AdamW, padding to the longest row of a batch, no logging, no saving, and the LoRA layers
of `training.adapters`, which are up to a tenth faster than PEFT's. The rows come in the order in which our loop takes them, or,
`grouped`, in the Trainer's own order by length.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from dataclasses import dataclass

import torch

from training.adapters import attach
from training.data import Tokenized
from training.model import describe, load_model
from training.recipe import Recipe
from training.run import Run, set_up
from training.schedule import Plan, rate, supervised


@dataclass(frozen=True)
class Rows(torch.utils.data.Dataset):
    """Rows as the Trainer takes them: token ids, and labels of -100 where nothing is learned."""

    rows: Tokenized
    order: list[int]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, at: int) -> dict:
        row, prompt = self.rows.ids[self.order[at]], self.rows.prompt_lengths[self.order[at]]
        return {"input_ids": row, "labels": [-100] * prompt + list(row[prompt:])}


def collate(entries: list[dict]) -> dict[str, torch.Tensor]:
    """Pads to the longest row, on the right, as transformers' collators do."""
    width = max(len(entry["input_ids"]) for entry in entries)

    def padded(name: str, value: int) -> torch.Tensor:
        return torch.tensor([list(entry[name]) + [value] * (width - len(entry[name])) for entry in entries])

    mask = torch.tensor([[1] * len(e["input_ids"]) + [0] * (width - len(e["input_ids"])) for e in entries])
    return {"input_ids": padded("input_ids", 2), "labels": padded("labels", -100), "attention_mask": mask}


def trainer_of(recipe: Recipe, rows: Tokenized, planned: Plan, *, grouped: bool, warm: int):
    """Returns a Trainer ready for `planned.steps` steps, and a list that will hold the time after `warm` steps and at the end."""
    import transformers
    from transformers.trainer_pt_utils import LengthGroupedSampler

    model = attach(load_model(recipe), recipe, describe(recipe.model), steps=planned.steps)
    moments: list[float] = []
    order = list(planned.order[: planned.steps * planned.batch])

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **more):
            if state.global_step in (warm, planned.steps):
                moments.append(time.perf_counter())

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_):
            if not grouped:
                return torch.utils.data.SequentialSampler(self.train_dataset)
            lengths = [len(rows.ids[row]) for row in order]
            return LengthGroupedSampler(recipe.batch_size, lengths=lengths, generator=torch.Generator().manual_seed(recipe.seed))

        def create_scheduler(self, num_training_steps, optimizer=None):  # ours, which does not begin at 0
            times = [rate(recipe, step, planned.steps) / recipe.learning_rate for step in range(planned.steps)] + [0.0]
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, times.__getitem__)
            return self.lr_scheduler

    arguments = transformers.TrainingArguments(
        tempfile.mkdtemp(), per_device_train_batch_size=planned.micro, gradient_accumulation_steps=planned.batch // planned.micro,
        max_steps=planned.steps, learning_rate=recipe.learning_rate, weight_decay=recipe.weight_decay, max_grad_norm=recipe.clip,
        optim="adamw_torch_fused", use_cpu=True, bf16=recipe.precision == "bf16", report_to=[], save_strategy="no",
        logging_strategy="no", disable_tqdm=True, remove_unused_columns=False, dataloader_num_workers=0, seed=recipe.seed,
        gradient_checkpointing=recipe.gradient_checkpointing,
    )  # fmt: skip
    made = InOrder(model=model, args=arguments, train_dataset=Rows(rows, order), data_collator=collate, callbacks=[Clock()])
    return made, moments


def theirs(recipe: Recipe, rows: Tokenized, planned: Plan, *, grouped: bool, warm: int) -> tuple[float, torch.nn.Module]:
    """Returns the seconds of the steps after the first `warm`, and the trained model."""
    trainer, moments = trainer_of(recipe, rows, planned, grouped=grouped, warm=warm)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    return moments[1] - moments[0], trainer.model


def ours(job, rows: Tokenized, planned: Plan, world, *, warm: int) -> tuple[float, Run]:
    """Returns the same of our loop."""
    recipe = job.recipe
    run = set_up(job, describe(recipe.model), planned, world, "cpu")
    began = 0.0
    for step in range(planned.steps):
        if step == warm:
            began = time.perf_counter()
        run.step(rows, planned.micro_batches(step, 0, 1), supervised(rows, planned, step), rate(recipe, step, planned.steps))
    return time.perf_counter() - began, run
