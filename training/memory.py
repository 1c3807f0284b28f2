"""Peak bytes of a recipe, predicted before it is launched.

Owns: `predict` and its parts. Pure; works from the model's shape alone. Must not know: devices, studies.
"""

from __future__ import annotations

from dataclasses import dataclass

from training.model import Shape, match
from training.recipe import Recipe

BYTES = {32: 4.0, 16: 2.0, 8: 1.0, 4: 0.5}
# NF4 keeps one absmax per 64 weights; double quantization stores it in 8 bits with an fp32 scale and state per 256 blocks.
NF4_OVERHEAD = 1 / 64 + 4 / (64 * 256)
INT8_OVERHEAD = 4  # an fp32 scale per output row


@dataclass(frozen=True)
class Memory:
    """Predicted bytes on one worker at the peak of a training step."""

    weights: int
    adapters: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.adapters + self.activations + self.logits


def predict(recipe: Recipe, shape: Shape, *, workers: int = 1, tokens_per_row: int = 0) -> Memory:
    """Returns the predicted peak bytes of training on one worker.

    Adapters: fp32 weight, gradient and two AdamW moments, 16 bytes per parameter (ZeRO-2 shares gradient and moments among
    workers). Activations: what a Llama-shaped block keeps for its backward pass per token, in the computation's precision;
    with checkpointing one block and the inputs of all. Logits: of the last position to all supervised ones at most, with
    their gradient and the fp32 copy.

    Args:
        tokens_per_row: of the longest row; 0 means the recipe's max_length.
    """
    size = 4 if recipe.precision == "fp32" else 2
    rest = shape.parameters - shape.linear_parameters
    weights = rest * (2 if recipe.bits == 16 else size if recipe.bits < 16 else 4)
    weights += int(shape.linear_parameters * BYTES[recipe.bits])
    if recipe.bits == 4:
        weights += int(shape.linear_parameters * NF4_OVERHEAD)
    if recipe.bits == 8:
        weights += INT8_OVERHEAD * sum(out for out, _ in shape.linear.values())
    targets = match(recipe.targets, shape)
    parameters = recipe.rank * sum(a + b for a, b in targets.values())
    adapters = parameters * 4 + parameters * 12 // (workers if recipe.zero_stage >= 1 else 1)
    share = max(1, recipe.batch_size // workers)
    tokens = min(recipe.micro_batch or share, share) * (min(tokens_per_row, recipe.max_length) or recipe.max_length)
    per_layer = _block_bytes(recipe, shape, targets, size)
    layers = shape.layers
    kept = per_layer + layers * shape.hidden * size if recipe.gradient_checkpointing else per_layer * layers
    # Dequantized copies of one weight live while it is used.
    scratch = max((a * b for a, b in shape.linear.values()), default=0) * size if recipe.bits < 16 else 0
    logits = int(tokens * SUPERVISED * shape.vocabulary * (size + 4 + 4))
    return Memory(int(weights), int(adapters), int(tokens * kept) + scratch, logits)


SUPERVISED = 0.35  # share of positions whose logits are computed: the columns of the longest response in a batch


def _block_bytes(recipe: Recipe, shape: Shape, targets: dict, size: int) -> float:
    """Returns the bytes per token that one block keeps: inputs of norms and linears, attention, the gated product, adapters."""
    hidden = shape.hidden
    wide = int(shape.config.get("intermediate_size") or 4 * hidden)
    heads = int(shape.config.get("num_attention_heads") or 1)
    share = int(shape.config.get("num_key_value_heads") or heads) / heads
    # Two norms keep fp32 input and normalised value; queries, keys, values, rotated ones and the output of attention;
    # gate, up, their activation and product.
    kept = hidden * (4 * 4 + 2 * size) + hidden * size * (3 + 4 * share) + wide * size * 4
    for name, (_, width) in targets.items():
        kept += (recipe.rank * size + (width * (size + 1) if recipe.dropout else 0)) / _copies(name, shape)
    return kept


def _copies(name: str, shape: Shape) -> float:
    return max(1, shape.layers)


__all__ = ["Memory", "predict"]
