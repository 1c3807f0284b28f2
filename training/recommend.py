"""First values for a recipe, each with its reason and where it is published: from the task, the rows, the model and the memory.

Owns: `recommend`, `largest_rank`, `remarks`. Pure; works from the model's shape alone. Must not know: studies, files.

They are where a search begins, not what it is held to: the best values are what the search is for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from training import memory
from training.model import Shape, match
from training.recipe import Recipe

FRACTION = 0.8  # of the device's memory that may be predicted to be used
RANKS = (8, 16, 32, 64, 128)
FEW, MANY, MASSES = 1_000, 10_000, 50_000  # rows
SMALL, LARGE = 50_000_000, 20_000_000_000  # parameters
# What a task needs: Hu et al. 2021 (table 6) find no gain beyond 8 in classification; Axolotl's examples take 16 (1B) and 32 (8B)
# for instructions and conversations; Biderman et al. 2024 find that new knowledge, as in plain text, needs more.
TASKS = {
    "classification": (8, "a choice of labels is a small change of the model (Hu et al. 2021, table 6)"),
    "instruction": (16, "following instructions is a small to medium change (Axolotl, examples/llama-3/lora-1b.yml)"),
    "chat": (32, "conversations are varied (Axolotl, examples/llama-3/lora-8b.yml)"),
    "completion": (32, "plain text brings new knowledge, which low ranks learn less of (Biderman et al. 2024)"),
}


@dataclass(frozen=True)
class Advice:
    """A value for one field of a recipe, and why; the source stands in brackets."""

    value: Any
    why: str


@dataclass(frozen=True)
class Recommendation:
    """Advice by field, the bundled space to search in and why, and the predicted memory of the recipe (None: it fits nowhere)."""

    advice: dict[str, Advice]
    space: Advice
    memory: memory.Memory | None

    @property
    def fields(self) -> dict[str, Any]:
        """The values alone, as a recipe takes them."""
        return {name: advice.value for name, advice in self.advice.items()}


def recommend(
    shape: Shape, task: str, *, rows: int, tokens_per_row: int, device: str = "cpu", capacity: int | None = None,
    workers: int = 1, given: Mapping[str, Any] | None = None,
) -> Recommendation:  # fmt: skip
    """Returns where to begin.

    Args:
        shape: of the base.
        task: classification, instruction, chat or completion.
        rows: training rows.
        tokens_per_row: length that nearly all rows keep to.
        device: "cpu" or "cuda".
        capacity: bytes of the device's memory; None: not known, and taken as enough.
        workers: data-parallel processes of a trial.
        given: values that the user has set; they win, and the others follow from them.
    """
    found: dict[str, Advice] = {name: Advice(value, "as you have set it") for name, value in (given or {}).items()}

    def advise(name: str, value: Any, why: str) -> Any:
        return found.setdefault(name, Advice(value, why)).value

    def fits(**more: Any) -> bool:
        return capacity is None or _bytes(_recipe(found, more), shape, tokens_per_row, device, workers).total <= limit

    limit = int(FRACTION * (capacity or 0))
    context = int(shape.config.get("max_position_embeddings") or shape.config.get("n_positions") or 1_000_000)
    length = max(8, min(context, -(-tokens_per_row // 32) * 32))
    advise("max_length", length, "holds all rows but one in 200" if length < context else "the model's context")
    if device == "cuda":
        advise("precision", "bf16", "as exact as training needs, and no scaled loss (Kalamkar et al. 2019)")
    else:
        advise("precision", "fp32", "bf16 gains nothing on most CPUs")
    advise("batch_size", *_batch(rows))
    whole = 16 if device == "cuda" else 32
    least = {"micro_batch": 1, "gradient_checkpointing": True}
    smallest = least | {"rank": RANKS[0]}
    full = task == "completion" and rows >= MASSES and fits(adapter="full", bits=whole, **least)
    advise("adapter", "full" if full else "lora",
           f"{rows:,} rows of plain text, where all weights learn more than LoRA (Biderman et al. 2024), and they fit" if full
           else "nearly as good as all weights at a fraction of the bytes (Hu et al. 2021)")  # fmt: skip
    in_whole = found["adapter"].value == "full" or fits(bits=whole, **smallest)
    advise("bits", whole if in_whole else 4, f"the base fits in {whole} bits" if in_whole and capacity
           else f"{whole} bits, as the memory is not known" if in_whole
           else f"at {whole} bits it does not fit into {FRACTION:.0%} of the memory (QLoRA, Dettmers et al. 2023)")  # fmt: skip
    if found["adapter"].value != "full":
        _size(advise, shape, task, rows, lambda rank: fits(**smallest | {"rank": rank}))
    checkpointing = not fits(micro_batch=1)
    advise("gradient_checkpointing", checkpointing, "activations would not fit otherwise (Chen et al. 2016)" if checkpointing
           else "activations fit, and computing them twice takes about a third longer")  # fmt: skip
    advise("learning_rate", *_rate(found["adapter"].value, shape.parameters))
    advise("epochs", *_epochs(rows))
    predicted = _bytes(_recipe(found, {"micro_batch": 1}), shape, tokens_per_row, device, workers)
    fitting = capacity is None or predicted.total <= limit
    return Recommendation(found, _space(found, shape, device), predicted if fitting else None)


def largest_rank(
    recipe: Recipe, shape: Shape, *, capacity: int, fraction: float = FRACTION, tokens_per_row: int = 0, device: str = "cpu",
    workers: int = 1,
) -> tuple[int, float, memory.Memory] | None:  # fmt: skip
    """Returns the largest rank whose predicted peak stays within a fraction of the memory, its alpha, and the prediction.

    Found by binary search between 1 and the narrowest target's width; alpha keeps the recipe's proportion to the rank. None where
    not even rank 1 fits.
    """

    def predicted(rank: int) -> memory.Memory:
        return _bytes(recipe.model_copy(update={"rank": rank}), shape, tokens_per_row or recipe.max_length, device, workers)

    low, high = 0, _narrowest(recipe.targets, shape)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if predicted(middle).total <= fraction * capacity else (low, middle - 1)
    return (low, recipe.alpha / recipe.rank * low, predicted(low)) if low else None


def remarks(recipe: Recipe, shape: Shape) -> list[str]:
    """Returns what is unusual about a pair of rank and alpha; nothing for most."""
    ratio, narrow, found = recipe.alpha / recipe.rank, _narrowest(recipe.targets, shape), []
    if recipe.adapter == "full":
        return []
    if recipe.rank > narrow:
        found.append(f"rank {recipe.rank} is beyond the narrowest target ({narrow}).")
    if not 0.5 <= ratio <= 8:
        found.append(f"alpha / rank is {ratio:g}; published recipes keep it between 0.5 and 8; the rate acts through it.")
    if recipe.rank >= 64 and recipe.adapter == "lora" and ratio < 1:
        found.append(f"alpha / rank is {ratio:g} at rank {recipe.rank}, where gradients vanish; adapter: rslora keeps them.")
    return found


def _recipe(found: Mapping[str, Advice], more: Mapping[str, Any]) -> Recipe:
    fields = {name: advice.value for name, advice in found.items()} | dict(more)
    if fields.get("bits") == 16:
        fields["precision"] = "bf16"
    return Recipe(**fields)


def _bytes(recipe: Recipe, shape: Shape, tokens_per_row: int, device: str, workers: int) -> memory.Memory:
    return memory.predict(recipe, shape, workers=workers, tokens_per_row=tokens_per_row, device=device)


def _narrowest(targets: Any, shape: Shape) -> int:
    return min(min(size) for size in match(targets, shape).values())


def _size(advise, shape: Shape, task: str, rows: int, fits) -> None:
    """Advises on rank, alpha and dropout."""
    rank, why = TASKS[task]
    if rows >= MANY:
        rank, why = 2 * rank, f"{why}; twice that for {rows:,} rows"
    elif rows < FEW and rank > RANKS[0]:
        rank, why = rank // 2, f"{why}; half of that for only {rows:,} rows"
    narrow = _narrowest("all-linear", shape)
    most = max((r for r in RANKS if r <= narrow and fits(r)), default=min(narrow, RANKS[0]))
    if rank > most:
        rank, why = most, f"the largest that fits the memory and the narrowest layer ({narrow}); the task would take {rank}"
    rank = advise("rank", rank, why)
    times = 1 if rank >= 64 else 2
    advise("alpha", times * rank, "as large as a high rank (Biderman et al. 2024 hold alpha / rank low there)" if times == 1
           else "twice the rank (Axolotl, examples/llama-3/lora-1b.yml)")  # fmt: skip
    few = rows < FEW
    advise("dropout", 0.1 if few else 0.05, "few rows are soon learned by heart (QLoRA, Dettmers et al. 2023, takes 0.1)" if few
           else "Axolotl's and PEFT's examples")  # fmt: skip


def _batch(rows: int) -> tuple[int, str]:
    size = 8 if rows < FEW else 16 if rows < MASSES else 32
    return size, f"{rows:,} rows then make {max(1, rows // size):,} steps an epoch (QLoRA: 16, Dettmers et al. 2023, table 9)"


def _rate(adapter: str, parameters: int) -> tuple[float, str]:
    if adapter == "full":
        return 2e-5, "a tenth of LoRA's, which is what training all weights takes (Touvron et al. 2023b; Biderman et al. 2024)"
    if parameters < SMALL:
        return 1e-3, "small models take larger steps; large ones 2e-4 (Dettmers et al. 2023)"
    if parameters > LARGE:
        return 1e-4, "half of the usual above 20 billion parameters (QLoRA, Dettmers et al. 2023, table 9)"
    return 2e-4, "QLoRA's up to 13B (Dettmers et al. 2023, table 9), and Axolotl's; about ten times that of training all weights"


def _epochs(rows: int) -> tuple[int, str]:
    count = 3 if rows < FEW else 2 if rows < MANY else 1
    return count, "few rows are seen several times (Alpaca: 3 epochs)" if count > 1 else "many rows; a second epoch gains little"


def _space(found: Mapping[str, Advice], shape: Shape, device: str) -> Advice:
    if found["adapter"].value == "full":
        return Advice("full", "all weights are trained")
    if device == "cpu" or shape.parameters < SMALL:
        return Advice("tiny", "it varies what trades quality for cost where a trial takes seconds to minutes")
    if found["bits"].value == 4:
        return Advice("qlora", "it varies the bits of the base too; what does not fit is never launched")
    return Advice("qlora", "it compares 16 bits with 4, which trade memory for time")
