"""Peak bytes of a recipe, predicted before it is launched.

Owns: `predict` and its parts. Pure; works from the model's shape alone. Must not know: studies.

What is counted are the tensors of a training step, as `training.run.probe_bytes` counts them on a CPU and the allocator on
a GPU; the interpreter, the libraries and the allocator's slack are not. Blocks are taken to be Llama's: two RMS norms, grouped
attention through `scaled_dot_product_attention`, a gated feed-forward part. The test holds the result within 5 % of what
is counted for such a model; for other blocks it is an estimate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from training.adapters import start_rank
from training.model import Shape, is_attention, match
from training.recipe import Recipe
from training.schedule import Load
from training.zero import BUCKET

BYTES = {32: 4.0, 16: 2.0, 8: 1.0, 4: 0.5}  # of one weight of a linear layer
FP32 = 4
# NF4 keeps one absmax per 64 weights; double quantization stores it in 8 bits, with one fp32 scale per 256 of them.
NF4_OVERHEAD = 1 / 64 + FP32 / (64 * 256)
INT8_OVERHEAD = FP32  # a scale per output row
INDICES = 3 * 8  # input ids, mask and positions of a token, int64
ALLOCATOR = 3  # AdaLoRA's scores of every element: its importance, the mean of that, and of its deviation
# bitsandbytes: moments in 8 bits of tensors from SMALL elements on, with an fp32 scale per 256; those from PAGE on may be paged.
SMALL, BLOCK, PAGE = 4096, 256, 100_000
OUT = ("o_proj", "out_proj", "c_proj", "dense")  # output projections of attention
SUPERVISED = 0.35  # share of a row that is response, where the caller does not know


@dataclass(frozen=True)
class Memory:
    """Predicted bytes on one worker at the peak of a training step.

    `adapters` are what is trained besides the base's own weights, and moments, gradients and buffers of all that is trained;
    `activations` are what the forward pass keeps and the temporaries at the peak; `logits` are those at the peak.
    """

    weights: int
    adapters: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.adapters + self.activations + self.logits


@dataclass(frozen=True)
class _Block:
    """Sizes of one block in elements per token, and what is adapted in it."""

    hidden: int
    attention: int  # heads x head size
    head: int
    heads: int
    keys: int  # heads of keys x head size
    wide: int  # inner width of the feed-forward part
    into: int  # outputs of the linear layers into it: twice `wide` where it is gated
    attention_inputs: list[int]  # input widths of the trained modules
    inner_inputs: list[int]
    attention_outputs: int  # their outputs together
    inner_outputs: int
    out: bool  # the output projection of attention is adapted
    down: bool  # the layer out of the feed-forward part is adapted


def predict(
    recipe: Recipe, shape: Shape, *, workers: int = 1, tokens_per_row: int = 0, response: int = 0, device: str = "cpu",
    forwards: Sequence[Load] = (),
) -> Memory:  # fmt: skip
    """Returns the predicted peak bytes of training on one worker.

    The peak is the largest of some moments: the end of the forward pass, the loss, the backward pass through the last
    feed-forward part, the one through the first block, and its end, when all gradients are there.

    Args:
        recipe: decides sizes and what is adapted.
        shape: of the base model.
        workers: data-parallel processes; they share the batch, and with ZeRO the optimizer's state.
        tokens_per_row: of the longest row; 0 means the recipe's max_length.
        response: tokens of the longest response; 0 means a share of `tokens_per_row`.
        device: "cpu" or "cuda"; the mask of dropout is a number per element on the one and a byte on the other.
        forwards: of the heaviest step on this worker, where they are known (`schedule.loads`); else every row is taken to be as
            long as the longest.
    """
    peak = _Peak(recipe, shape, workers, device)
    moments = [
        moment for i, load in enumerate(forwards or _loads(recipe, workers, tokens_per_row, response))
        for moment in peak.moments(load, later=i > 0)
    ]  # fmt: skip
    more, activations, logits = max(moments, key=sum)
    return Memory(int(_weight_bytes(recipe, shape, workers)), int(peak.standing + more), int(activations), int(logits))


def _loads(recipe: Recipe, workers: int, tokens_per_row: int, response: int) -> list[Load]:
    """Returns the forwards of a step whose rows are all as long as the longest: a whole one, another, and the rest."""
    width = min(tokens_per_row or recipe.max_length, recipe.max_length)
    answer = min(response or int(SUPERVISED * width), width - 1)
    share = max(1, recipe.batch_size // workers)
    micro = min(recipe.micro_batch or share, share)
    counts = [micro] * min(2, share // micro) + [share % micro] * bool(share % micro)
    scored = answer if recipe.packing == "auto" else answer + 1
    return [Load(rows * width, rows * scored, width) for rows in counts]


class _Peak:
    """What a forward and its backward pass hold at the moments where it may be most, beside the weights."""

    def __init__(self, recipe: Recipe, shape: Shape, workers: int, device: str):
        self.recipe, self.shape = recipe, shape
        self.size = FP32 if recipe.precision == "fp32" else 2
        self.block = _block(recipe, shape)
        self.dropout = bool(recipe.dropout) and recipe.adapter != "full"
        self.mask = 0 if not self.dropout else 1 if device == "cuda" else FP32
        trained = _trained(recipe, shape)
        self.standing, self.gradients = _adapter_bytes(recipe, trained, workers)
        self.casts, self.head = _casts(recipe, shape, sum(trained))

    def moments(self, load: Load, *, later: bool) -> list[tuple[float, float, float]]:
        """Returns the bytes of (gradients, activations, logits) at each moment.

        Args:
            later: whether gradients of earlier forwards of the step are there.
        """
        recipe, block, size, mask = self.recipe, self.block, self.size, self.mask
        layers, full = self.shape.layers, recipe.adapter == "full"
        attention, inner = _kept(recipe, block, size, mask, load)
        standing, kept, again, unseen = self._per_token(attention, inner)
        copies, norms = _dora_bytes(recipe, _trained_modules(recipe, self.shape), size)
        ends = _embedding_bytes(recipe, self.shape)
        # Padding of queries, keys, values and outputs of attention.
        copies += self.casts + layers * load.padding * 2 * (block.attention + block.keys) * size
        once = copies / layers  # of one block
        resting = self.head + (0 if recipe.gradient_checkpointing else copies)  # where no block is at work
        copies = once if recipe.gradient_checkpointing else copies
        wide, hidden = block.wide * size, block.hidden * size
        shared = _shared(recipe)  # adapters keep their input itself, else a copy of their own
        down = block.wide * (size + mask) if block.down else 0  # freed once it was used
        if recipe.bits == 8 and not recipe.gradient_checkpointing and not (block.down and shared):
            down += block.wide * size
        product = 0 if shared or recipe.bits == 8 else block.wide * size  # else it is kept already
        cast = FP32 * block.wide * (2 if self.dropout else 1) if block.down and size < FP32 and not full else 0
        # Copies of the product in fp32 for dropout and adapter, with the output of the base; or, if more, the outputs of base and
        # adapter and the two ends of the residual stream, which a block that runs again does not get to.
        tail = cast + hidden if cast else 0
        tail = tail + FP32 * block.hidden * bool(cast) if recipe.gradient_checkpointing else max(tail, 4 * hidden)
        inside = norms if block.inner_inputs else 0
        scratch = max((a * b for a, b in self.shape.linear.values()), default=0) * size if recipe.bits < 16 else 0
        earlier = self.gradients if later else 0
        most = max(earlier, self.gradients * (layers - 1) / layers)
        rerun = product + tail if recipe.gradient_checkpointing else 0
        tokens, scores = load.tokens, load.scored * self.shape.vocabulary
        return [
            # End of forward, in the last feed-forward part; or, where that has no norm of DoRA's, in the attention before it.
            (earlier, tokens * (kept + product + tail) + copies + inside, 0),
            (earlier, tokens * (kept - inner) + copies + norms, 0),
            # Loss: the logits' logarithm and two gradients, in fp32.
            (earlier, tokens * standing + resting, 3 * FP32 * scores),
            # Backward through the last feed-forward part: gradients of product, activation and gate, and the residual's; or a
            # dequantized weight.
            (earlier, tokens * (again - down + 3 * wide + hidden) + copies + ends / 2, 0),
            (earlier, tokens * (again + hidden) + copies + scratch, 0),
            # End of backward: the first block, and the gradients of all others; then all gradients alone.
            (most, tokens * (attention + inner + unseen + 3 * wide + hidden) + once, 0),
            (most, tokens * (attention + inner + unseen + rerun) + once + inside * recipe.gradient_checkpointing, 0),
            (self.gradients, tokens * hidden + ends * (1.5 if later else 1), 0),
        ]

    def _per_token(self, attention: float, inner: float) -> tuple[float, float, float, float]:
        """Returns bytes per token: what stands where no block is at work, what there is while the last block runs and while its
        backward pass does, and what LLM.int8 keeps where checkpointing does not see it, to the end.

        Args:
            attention, inner: what these parts of a block keep.
        """
        block, layers, size = self.block, self.shape.layers, self.size
        standing = 2 * block.head * size + INDICES  # rotary tables, indices
        stream = (FP32 if self.recipe.bits == 32 else size) * block.hidden  # of the residual stream
        if not self.recipe.gradient_checkpointing:
            standing += (FP32 * block.hidden + stream) * (self.recipe.adapter == "full")  # the last norm, its weight trained
            standing += layers * (attention + inner) - _below(block, attention, size, self.mask)
            return standing, standing, standing, 0
        # The inputs of all blocks and the last norm's, and what one block keeps while it runs again.
        unseen = layers * (2 * block.hidden + block.attention + block.wide) * size if self.recipe.bits == 8 else 0
        standing += unseen + layers * stream
        again = standing + attention + inner - (stream if stream == FP32 * block.hidden else 0)  # an fp32 norm's input is its own
        standing += FP32 * block.hidden
        return standing, standing + attention + inner, again, unseen


def _weight_bytes(recipe: Recipe, shape: Shape, workers: int) -> float:
    """Returns the bytes of the base, with what its quantization needs."""
    size = FP32 if recipe.precision == "fp32" else 2
    rest = shape.parameters - shape.linear_parameters
    weights = shape.linear_parameters * BYTES[recipe.bits] + rest * (FP32 if recipe.bits == 32 else size)
    if recipe.bits == 4:
        weights += shape.linear_parameters * NF4_OVERHEAD
    if recipe.bits == 8:
        weights += INT8_OVERHEAD * sum(out for out, _ in shape.linear.values())
    if recipe.zero_stage == 3:  # a part on each worker, or on the host; and two blocks gathered
        blocks = min(weights, 2 * weights * shape.linear_parameters / shape.parameters / shape.layers)
        return blocks + (0 if recipe.offload else weights / workers)
    return weights


def _casts(recipe: Recipe, shape: Shape, trained: int) -> tuple[float, float]:
    """Returns the bytes of weights' copies that autocast makes and the backward pass needs: of blocks, of the output layer."""
    if recipe.precision == "fp32":
        return 0, 0
    adapters = 0 if recipe.adapter == "full" else 2 * trained
    base = recipe.bits == 32
    return adapters + 2 * shape.linear_parameters * base, 2 * shape.vocabulary * shape.hidden * base


def _trained_modules(recipe: Recipe, shape: Shape) -> dict[str, tuple[int, int]]:
    return shape.linear if recipe.adapter == "full" else match(recipe.targets, shape)


def _trained(recipe: Recipe, shape: Shape) -> list[int]:
    """Returns the elements of every tensor that is trained; of a whole model all but the linear layers counts as one."""
    if recipe.adapter == "full":
        return [a * b for a, b in shape.linear.values()] + [shape.parameters - shape.linear_parameters]
    rank, found = start_rank(recipe), []
    for out, width in match(recipe.targets, shape).values():
        found += [rank * width, rank * out]
        found += {"dora": [out], "adalora": [rank]}.get(recipe.adapter, [])
    return found


def _adapter_bytes(recipe: Recipe, tensors: list[int], workers: int) -> tuple[float, float]:
    """Returns the bytes of what is trained that always stand (weights of adapters, moments, buffers), and of gradients."""
    if recipe.offload:  # AdamW's state, and at stage 3 the weights' parts, lie in the host's memory
        return _offloaded(recipe, tensors)
    full, parameters = recipe.adapter == "full", sum(tensors)
    size = BYTES[recipe.bits] if full else FP32
    weights = 0 if full else FP32 * parameters  # those of a whole model are counted with the base
    moments, gradients, buffer = _moments(recipe, tensors, size), size * parameters, 0
    if recipe.zero_stage:  # the moments are shared, and each worker keeps an fp32 copy of its share of the weights
        moments = (moments + FP32 * parameters) / workers
        buffer = FP32 * min(BUCKET, parameters)
    elif workers > 1:  # data-parallel training reduces gradients in buckets of their own
        buffer = size * parameters
    if recipe.zero_stage >= 2:
        gradients /= workers
    if recipe.zero_stage == 3:  # gradients have a place of their own besides, and weights lie in parts; a block's are whole
        weights, moments = weights / workers, moments + gradients
    if recipe.adapter == "adalora":
        moments += ALLOCATOR * FP32 * parameters
        # For the backward pass: A times E of each layer; and of the penalty the products A A' and B' B.
        rank = start_rank(recipe)
        buffer += FP32 * sum(tensors[::3]) + 2 * FP32 * rank * rank * len(tensors[::3])
    return weights + moments + buffer, gradients


def _offloaded(recipe: Recipe, tensors: list[int]) -> tuple[float, float]:
    """Returns the bytes on the device where the optimizer and its state are on the host: weights and the bucket of gradients."""
    parameters = sum(tensors)
    weights = 0 if recipe.adapter == "full" or recipe.zero_stage == 3 else FP32 * parameters
    return weights + FP32 * min(BUCKET, parameters), 0 if recipe.zero_stage >= 2 else FP32 * parameters


def _moments(recipe: Recipe, tensors: list[int], size: float) -> float:
    """Returns the bytes of the optimizer's two moments on the device; what may be paged out is not counted there."""
    total = 0.0
    for elements in tensors:
        if recipe.optimizer.startswith("paged") and elements >= PAGE:
            continue
        eight = recipe.optimizer.endswith("8bit") and elements >= SMALL
        total += 2 * elements * (1 + FP32 / BLOCK if eight else size if recipe.optimizer == "adamw" else FP32)
    return total


def _dora_bytes(recipe: Recipe, targets: dict[str, tuple[int, int]], size: int) -> tuple[float, float]:
    """Returns the bytes of weights that DoRA keeps in the computation's precision for its backward pass, and of one norm.

    With dropout PEFT computes the base's output once more, from dropped inputs. For the norm it multiplies A and B out through
    an identity matrix as wide as the layer's input, and adds the product to the weight.
    """
    if recipe.adapter != "dora":
        return 0, 0
    converted = recipe.bits < 16 or size < FP32
    copies = size * sum(a * b for a, b in targets.values()) if recipe.dropout and converted else 0
    return copies, max(size * width * width + (3 + converted) * FP32 * out * width for out, width in targets.values())


def _embedding_bytes(recipe: Recipe, shape: Shape) -> float:
    """Returns the bytes of two more gradients of a trained embedding that is the output layer as well: they are added up."""
    tied = recipe.adapter == "full" and shape.config.get("tie_word_embeddings", True)
    return 2 * BYTES[recipe.bits] * shape.vocabulary * shape.hidden if tied else 0


def _shared(recipe: Recipe) -> bool:
    """Says whether what is trained keeps its layer's input as it is, and no cast or dropped copy of its own."""
    if recipe.adapter == "full":
        return recipe.precision == "fp32" or recipe.bits == 16
    return recipe.precision == "fp32" and not recipe.dropout


def _block(recipe: Recipe, shape: Shape) -> _Block:
    heads = int(shape.config.get("num_attention_heads") or shape.config.get("n_head") or 1)
    head = int(shape.config.get("head_dim") or shape.hidden // heads)
    inner = {name: size for name, size in shape.linear.items() if not is_attention(name)}
    wide = max((width for out, width in inner.values() if out == shape.hidden), default=shape.hidden)
    into = sum(out for out, width in inner.values() if width == shape.hidden) // shape.layers
    first = next(iter(shape.linear), "").split(".")
    layer = ".".join(first[: next((i for i, part in enumerate(first) if part.isdigit()), 0) + 1]) + "."
    trained = {name: each for name, each in _trained_modules(recipe, shape).items() if name.startswith(layer)}
    chosen = {name: width for name, (_, width) in trained.items()}
    return _Block(
        hidden=shape.hidden, attention=heads * head, head=head, heads=heads,
        keys=int(shape.config.get("num_key_value_heads") or heads) * head, wide=wide, into=into,
        attention_inputs=[width for name, width in chosen.items() if is_attention(name)],
        inner_inputs=[width for name, width in chosen.items() if not is_attention(name)],
        attention_outputs=sum(out for name, (out, _) in trained.items() if is_attention(name)),
        inner_outputs=sum(out for name, (out, _) in trained.items() if not is_attention(name)),
        out=any(is_attention(name) and name.rsplit(".", 1)[-1] in OUT for name in trained),
        down=any(not is_attention(name) and width == wide for name, width in chosen.items()),
    )  # fmt: skip


def _below(block: _Block, attention: float, size: int, mask: int) -> float:
    """Returns the bytes per token that the first block does not keep, because nothing below its first adapter has a gradient."""
    if block.attention_inputs:
        return mask * block.hidden * (len(block.attention_inputs) - block.out)  # what was dropped of its input
    only_down = block.down and len(block.inner_inputs) == 1
    return attention + FP32 * block.hidden + (block.into * size if only_down else 0)


def _kept(recipe: Recipe, block: _Block, size: int, mask: int, load: Load) -> tuple[float, float]:
    """Returns the bytes per token that the attention and the feed-forward part of one block keep for the backward pass."""
    # The input of the norm and its scale in fp32; queries, keys, values, the output; the log-sum-exp of each head. In padded
    # batches keys and values are repeated to all heads, and there is a row of the attention mask.
    heads = 2 * block.attention + 2 * block.keys if recipe.packing == "auto" else 4 * block.attention + load.width
    attention = FP32 * (block.hidden + 1) + heads * size + FP32 * block.heads
    # The input of the norm and its scale in fp32; gate and up; where gated also the activation, which is multiplied.
    inner = FP32 * (block.hidden + 1) + block.into * size + (block.wide * size if block.into > block.wide else 0)
    full = recipe.adapter == "full"
    stream = FP32 if recipe.bits == 32 else size
    held = recipe.bits == 8 and not recipe.gradient_checkpointing  # those of a block that runs again are let go with its graph
    parts = (block.attention_inputs, block.attention_outputs, block.attention), (block.inner_inputs, block.inner_outputs, None)
    for inputs, outputs, own in parts:
        # The inner dimension; a norm whose weight is trained keeps what it multiplies; DoRA the outputs of base and adapter.
        added = stream * block.hidden if full else start_rank(recipe) * size * len(inputs)
        added += 2 * size * outputs if recipe.adapter == "dora" else 0
        if _shared(recipe):
            # The adapters share the input as it is. That of the output projection is kept by attention already, unless it is put
            # together from its parts.
            ahead = len(inputs) - block.out
            distinct = list(set(inputs)) if own is None else [block.hidden] * bool(ahead)
            distinct += [own] * (own is not None and (block.out or held) and load.apart)
            # Of a feed-forward part that is adapted in part LLM.int8 keeps the input of the last layer all the same.
            distinct += [block.wide] * (own is None and held and bool(inputs) and not block.down)
            added += size * sum(distinct)
        else:
            added += (size + mask) * sum(inputs)  # each adapter its own cast or dropped copy, and the mask
        if held and not (inputs and _shared(recipe)):
            # LLM.int8 keeps the inputs as well; that of the output projection may be kept by attention already.
            added += size * (block.hidden + (block.wide if own is None else block.attention * load.apart))
        attention, inner = (attention + added, inner) if own is not None else (attention, inner + added)
    return attention, inner


__all__ = ["Memory", "predict"]
