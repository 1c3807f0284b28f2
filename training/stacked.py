"""Adapters of several trials in one model: each linear layer adds to every row the adapter of that row's own trial.

Owns: `Layout` (whose tokens are where), `Stack` (the weights of all seats and how they are drawn, put in and taken out),
`StackedLinear` (fast) and `LoopLinear` (obviously right), the optimizer over a stack.
Must not know: recipes' lengths, rows, reports.

A and B of all layers lie side by side, padded with zeros to the largest rank. Padding stays exactly zero, since the gradient of
each side is a product with the other's zeros. So clipping and AdamW are a few operations for each seat, however many layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import grouped_mm

BETAS, EPSILON = (0.9, 0.999), 1e-8  # torch.optim.AdamW's own
ARRAYS = ("weights", "gradient", "first", "second")  # the last two: moments
ALIGNED = 8  # grouped_mm wants rows of a multiple of 16 bytes
GROUPED = (torch.float32, torch.bfloat16, torch.float16)  # what grouped_mm takes


@dataclass(frozen=True)
class Layout:
    """Whose tokens a forward has, in the order of seats. Immutable: with checkpointing the forward runs again in the backward.

    Attributes:
        counts: tokens of each open seat, 0 for one that takes no part.
        ends: int32 (open seats,), where each seat's tokens end.
        scale: (tokens, 1), what each token's adapter output is multiplied by.
        keep: (tokens, 1), share of the adapter's input that dropout keeps; None where no seat drops anything.
        keys: int64 (tokens, 1), by which dropout is drawn: of seed, step, row and place in it, and so of nobody else's rows.
    """

    counts: tuple[int, ...]
    ends: torch.Tensor
    scale: torch.Tensor
    keep: torch.Tensor | None = None
    keys: torch.Tensor | None = None


class Stack(torch.nn.Module):
    """The adapters of all seats: weights, gradients and moments of A in arrays (seats, rank, all inputs), of B in others
    (seats, rank, all outputs); what a seat has lies in its first `rank` rows, so one seat's is one piece of memory.

    Args:
        sizes: module name -> (out, in), in the order in which a model has them.
        seats: how many trials there may be at a time.
        rank: the largest; at least a multiple of eight is kept for it.
    """

    def __init__(self, sizes: dict[str, tuple[int, int]], seats: int, rank: int, *, device, dtype=torch.float32):
        super().__init__()
        self.sizes, self.seats, self.rank = sizes, seats, math.ceil(rank / ALIGNED) * ALIGNED
        self.layout: Layout | None = None
        self.only: tuple[int, int, float] | None = None  # seat, rank and scale, where every row is of one trial
        widths = [sum(inside for _, inside in sizes.values()), sum(out for out, _ in sizes.values())]
        made = {name: [torch.zeros(seats, self.rank, width, device=device, dtype=dtype) for width in widths] for name in ARRAYS}
        self.arrays: dict[str, list[torch.Tensor]] = made
        self._at: dict[str, tuple[slice, slice]] = {}
        inside_at = out_at = 0
        for name, (out, inside) in sizes.items():
            self._at[name] = (slice(inside_at, inside_at + inside), slice(out_at, out_at + out))
            inside_at, out_at = inside_at + inside, out_at + out
        self._opened: tuple[int, int, int] | None = None
        self.open(0, seats, self.rank)

    def open(self, first: int, last: int, rank: int) -> None:
        """Makes the seats from `first` up to, not with, `last` those whose rows come next: only they get gradients.

        Args:
            rank: the largest of theirs; what is padded beyond it takes no part.
        """
        rank = min(self.rank, math.ceil(rank / ALIGNED) * ALIGNED)
        if self._opened == (first, last, rank):
            return
        self._opened = (first, last, rank)
        self.leaves = {
            name: [view[first:last, :rank].detach().requires_grad_() for view in self._of(name, "weights")]
            for name in self.sizes
        }
        self._gradients = [view[first:last, :rank] for name in self.sizes for view in self._of(name, "gradient")]

    def _of(self, name: str, array: str) -> list[torch.Tensor]:
        """Returns A (seats, rank, in) and B transposed (seats, rank, out) of a module, as views."""
        return [whole[:, :, at] for whole, at in zip(self.arrays[array], self._at[name], strict=True)]

    def weights(self, name: str) -> list[torch.Tensor]:
        """Returns A (seats, rank, in) and B transposed (seats, rank, out) of a module, as views."""
        return self._of(name, "weights")

    @property
    def dtype(self) -> torch.dtype:
        return self.arrays["weights"][0].dtype

    def grow(self, rank: int) -> None:
        """Makes room for a larger rank; what seats have stays as it is."""
        more = math.ceil(rank / ALIGNED) * ALIGNED - self.rank
        if more > 0:
            self.rank += more
            pad = (0, 0, 0, more)
            self.arrays = {name: [torch.nn.functional.pad(a, pad) for a in pair] for name, pair in self.arrays.items()}
            self._opened = None
            self.open(0, self.seats, self.rank)

    def draw(self, seat: int, rank: int, seed: int) -> None:
        """Gives a seat no moments, and the weights that PEFT gives an adapter of that rank after `torch.manual_seed(seed)`."""
        self.clear(seat)
        generator = torch.Generator().manual_seed(seed)
        for name, (out, inside) in self.sizes.items():
            a, b = torch.empty(rank, inside), torch.empty(out, rank)
            for drawn in (a, b, a):  # torch.nn.Linear draws A and B, and then PEFT draws A again
                torch.nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
            self._of(name, "weights")[0][seat, :rank] = a.to(self.dtype)

    def clear(self, seat: int) -> None:
        """Empties a seat."""
        for pair in self.arrays.values():
            for array in pair:
                array[seat] = 0

    def taken(self, seat: int, rank: int, array: str = "weights") -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Returns copies of a seat's (A, B) by module: (rank, in) and (out, rank); or of its moments, "first" and "second"."""
        views = {name: self._of(name, array) for name in self.sizes}
        return {name: (a[seat, :rank].clone(), b[seat, :rank].T.contiguous()) for name, (a, b) in views.items()}

    def put(
        self, seat: int, rank: int, given: dict[str, tuple[torch.Tensor, torch.Tensor]], array: str = "weights"
    ) -> None:
        """Puts into a seat what `taken` returns."""
        for name, (a, b) in given.items():
            for view, value in zip(self._of(name, array), (a, b.T), strict=True):
                view[seat, :rank] = value.to(view)

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradients of a loss to what there is."""
        leaves = [leaf for pair in self.leaves.values() for leaf in pair]
        torch._foreach_add_(self._gradients, list(torch.autograd.grad(loss, leaves)))

    def norm(self, seat: int, rank: int) -> torch.Tensor:
        """Returns the norm of a seat's whole gradient."""
        return torch.linalg.vector_norm(torch.stack([g[seat, :rank].norm() for g in self.arrays["gradient"]]))

    def update(self, seat: int, rank: int, *, shrink: float, rates: tuple[float, float], decay: float, step: int) -> None:
        """Does one step of AdamW in one seat and clears its gradient; the others keep everything to the bit.

        Args:
            shrink: what the gradient is multiplied by first.
            rates: of A and of B.
            decay: weight decay.
            step: the number of this step, from 1 on.
        """
        weights, gradient, first, second = ([array[seat, :rank] for array in self.arrays[name]] for name in ARRAYS)
        if shrink < 1:
            torch._foreach_mul_(gradient, shrink)
        counts = [torch.tensor(float(step), device=self.leaves_device) for _ in weights]
        for chosen in (slice(0, 2),) if rates[0] == rates[1] else (slice(0, 1), slice(1, 2)):
            torch._fused_adamw_(
                weights[chosen], gradient[chosen], first[chosen], second[chosen], [], counts[chosen], lr=rates[chosen.start],
                beta1=BETAS[0], beta2=BETAS[1], weight_decay=decay, eps=EPSILON, amsgrad=False, maximize=False,
            )  # fmt: skip
        torch._foreach_zero_(gradient)

    def forget(self, seat: int) -> None:
        """Clears a seat's gradient."""
        torch._foreach_zero_([array[seat] for array in self.arrays["gradient"]])

    @property
    def leaves_device(self) -> torch.device:
        return self.arrays["weights"][0].device


class StackedLinear(torch.nn.Module):
    """A frozen linear layer, quantized or not, and beside it the adapters of all seats, in one product for all of them."""

    def __init__(self, base: torch.nn.Module, stack: Stack, name: str, number: int):
        super().__init__()
        self.base, self.number = base, number
        self.name = name
        self.__dict__["stack"] = stack  # no submodule: the stack has the weights

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layout, (a, b) = self.stack.layout, self.stack.leaves[self.name]
        if layout is None:
            y = self.base(x)
            return y if self.stack.only is None else y + self._of_one(x).to(y.dtype)
        y = self.base(x.flatten(0, -2))
        kind = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else a.dtype
        tokens = x.reshape(-1, x.shape[-1]).to(kind)
        if layout.keep is not None:
            tokens = (tokens * kept(layout, self.number, tokens)).to(kind)
        z = self.product(tokens, a.to(kind).transpose(1, 2), layout) * layout.scale
        if len(layout.counts) == 1 and kind == y.dtype == z.dtype:
            y = y.addmm_(z, b[0])
        else:
            y = y.add_(self.product(z.to(kind), b.to(kind), layout).to(y.dtype))
        return y.unflatten(0, x.shape[:-1])

    def _of_one(self, x: torch.Tensor) -> torch.Tensor:
        (seat, rank, scale), (a, b) = self.stack.only, self.stack.weights(self.name)
        kind = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else a.dtype
        a, b = a[seat, :rank].to(kind), b[seat, :rank].to(kind)
        return ((x.to(kind) @ a.T) * scale) @ b

    @staticmethod
    def product(tokens: torch.Tensor, weights: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Returns each seat's tokens times its own matrix: (tokens, n) and (seats, n, m) -> (tokens, m)."""
        if len(layout.counts) == 1:
            return tokens @ weights[0]
        if tokens.dtype in GROUPED:
            return grouped_mm(tokens, weights, offs=layout.ends)
        return LoopLinear.product(tokens, weights, layout)


class LoopLinear(StackedLinear):
    """The same, one seat after another: what `StackedLinear` is compared with."""

    @staticmethod
    def product(tokens: torch.Tensor, weights: torch.Tensor, layout: Layout) -> torch.Tensor:
        return torch.cat([part @ weights[seat] for seat, part in enumerate(tokens.split(layout.counts))])


LINEARS = {"stacked": StackedLinear, "loop": LoopLinear}


def install(model: torch.nn.Module, stack: Stack, kind: str = "stacked") -> None:
    """Puts the stack's adapters into a model, in place."""
    for number, name in enumerate(stack.sizes):
        parent, _, leaf = name.rpartition(".")
        parent = model.get_submodule(parent) if parent else model
        setattr(parent, leaf, LINEARS[kind](getattr(parent, leaf), stack, name, number))


def uninstall(model: torch.nn.Module, stack: Stack) -> None:
    """Takes the stack's adapters out of a model again, in place."""
    for name in stack.sizes:
        parent, _, leaf = name.rpartition(".")
        parent = model.get_submodule(parent) if parent else model
        setattr(parent, leaf, getattr(parent, leaf).base)


def kept(layout: Layout, number: int, tokens: torch.Tensor) -> torch.Tensor:
    """Returns what dropout multiplies a layer's input with: 0, or 1 / keep.

    Drawn by a hash of the token's key, the layer and the column, with two rounds of a multiply and xor-shift (as in SplitMix,
    Steele et al. 2014): the same whoever else is in the pack, and again when checkpointing repeats the forward.
    """
    columns = torch.arange(tokens.shape[1], device=tokens.device, dtype=torch.int32)
    x = layout.keys.to(torch.int32) + (columns + number * 65_537) * -1_640_531_527
    x = (x ^ (x >> 15)) * -2_048_144_789
    x = (x ^ (x >> 13)) * -1_028_477_387
    uniform = (x ^ (x >> 16)) & 0xFFFFFF
    return (uniform < layout.keep * 0x1000000) / layout.keep
