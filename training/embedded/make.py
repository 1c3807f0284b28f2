"""Makes the embedded model and its task: `python -m training.embedded.make all --out DIR --seed 0`.

Owns the steps, in their order: text (generated, `text.py`), tokenizer, pretraining, task files (`task.py`), general text.
Each step reads what the one before wrote below `--out`, so one can be repeated alone.
"""

import argparse
import itertools
import json
import math
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from training.embedded import task
from training.embedded.text import documents

DOCUMENTS = 90_000
VOCABULARY = 1024
CONTEXT = 256
SHORT = 64
GENERAL = 200
SHORT_SHARE = 0.85
TOKENS_PER_STEP = 2048
PEAK_RATE = 3e-3
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"

# Renders a conversation to the prompt form of the task: `{instruction}\nAnswer: {response}<eos>`.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '\\nAnswer: ' + message['content'] + eos_token }}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\nAnswer:' }}{% endif %}"
)


def make_text(out: Path, seed: int, count: int) -> None:
    """Writes `text.jsonl`: one document per line, as a JSON string."""
    with (out / "text.jsonl").open("w", encoding="utf-8") as file:
        for document in itertools.islice(documents(random.Random(seed)), count):
            file.write(json.dumps(document) + "\n")


def make_general(out: Path, seed: int, count: int) -> None:
    """Writes `general.jsonl`: what comes next in the text that the model was pretrained on, one document per row."""
    following = itertools.islice(documents(random.Random(seed)), count, count + GENERAL)
    lines = (json.dumps({"text": document}, ensure_ascii=False) + "\n" for document in following)
    (out / "general.jsonl").write_text("".join(lines), encoding="utf-8")


def _read_text(out: Path) -> list[str]:
    with (out / "text.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def make_tokenizer(out: Path) -> None:
    """Writes a byte-level BPE tokenizer with the splitting rule of GPT-2 into `model/`, trained on part of the text.

    It adds no special tokens by itself: the prompt form says where the text ends.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_read_text(out)[-50_000:], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.save_pretrained(out / "model")
    path = out / "model" / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    # The name that every release knows; the newest writes one that older ones refuse.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Widths are multiples of 64, the block of NF4, so that the model can be loaded at 4 bits."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=448,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        # About 1 / sqrt(hidden_size): the usual 0.02 suits larger widths and leaves attention flat for long here.
        initializer_range=0.08,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _rows(texts: list[str], tokenizer: PreTrainedTokenizerFast, width: int, rng: random.Random) -> torch.Tensor:
    """Returns rows of `width` tokens that hold whole documents one after the other, padded at the end.

    Half of the documents begin with bos: fine-tuning does not use it, a chat server may. Documents that are longer than a
    row are left out.
    """
    rows: list[list[int]] = [[]]
    for ids in tokenizer(texts)["input_ids"]:
        ids = ([tokenizer.bos_token_id] if rng.random() < 0.5 else []) + ids + [tokenizer.eos_token_id]
        if len(ids) > width:
            continue
        if len(rows[-1]) + len(ids) > width:
            rows.append([])
        rows[-1] += ids
    return torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])


def _batches(texts: list[str], tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> list[torch.Tensor]:
    """Returns the batches in training order: short rows first, the full context for the last part.

    Copying is learnt much sooner where little text lies between a word and its repetition.
    """
    cut = int(len(texts) * SHORT_SHARE)
    batches = []
    for part, width in ((texts[:cut], SHORT), (texts[cut:], CONTEXT)):
        rows = _rows(part, tokenizer, width, rng)
        batches += list(rows.split(TOKENS_PER_STEP // width))[:-1]
    return batches


def _rate(step: int, steps: int) -> float:
    """Share of the peak rate: linear warm-up over the first 2 %, then cosine to a tenth."""
    warmup = max(1, steps // 50)
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def pretrain(out: Path, seed: int) -> None:
    """Trains the model on the text, one pass, and writes it in bfloat16 into `model/`.

    Args:
        out: Where `text.jsonl` and `model/` lie.
        seed: Of the first weights.
    """
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    batches = _batches(_read_text(out), tokenizer, random.Random(seed))
    torch.manual_seed(seed)
    model = LlamaForCausalLM(_config(tokenizer))
    steps = len(batches)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    print(f"{model.num_parameters():,} parameters, {steps} steps of {TOKENS_PER_STEP} tokens", flush=True)
    start, losses = time.perf_counter(), []
    for step, batch in enumerate(batches):
        labels = batch.masked_fill(batch == tokenizer.pad_token_id, -100)
        loss = model(input_ids=batch, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 100 == 0 or step == steps - 1:
            recent = statistics.fmean(losses[-100:])
            print(f"step {step + 1} loss {recent:.4f} seconds {time.perf_counter() - start:.0f}", flush=True)
    model.to(torch.bfloat16).save_pretrained(out / "model")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the chosen step, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=("text", "tokenizer", "pretrain", "task", "general", "all"))
    parser.add_argument("--out", type=Path, required=True, help="folder that receives model/ and the task files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--documents", type=int, default=DOCUMENTS, help="length of the pretraining text")
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args(arguments)
    chosen.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(chosen.threads)
    steps = {
        "text": lambda: make_text(chosen.out, chosen.seed, chosen.documents),
        "tokenizer": lambda: make_tokenizer(chosen.out),
        "pretrain": lambda: pretrain(chosen.out, chosen.seed),
        "task": lambda: task.write(chosen.out, random.Random(chosen.seed)),
        "general": lambda: make_general(chosen.out, chosen.seed, chosen.documents),
    }
    for name, step in steps.items():
        if chosen.step in (name, "all"):
            step()


if __name__ == "__main__":
    main()
