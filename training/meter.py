"""Seconds and bytes of training itself.

Owns: `count_bytes`, which counts live tensor storage on any device; `Stopwatch`, and `Counted` in place of it.
Must not know: what is learned.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from training.model import Shape
from training.recipe import Recipe


class ByteCounter(TorchDispatchMode):
    """Counts the bytes of tensor storage alive while it is active; `peak` is their maximum so far.

    Storages are counted once however many tensors share them, from the operation that returned them until they are freed.
    What existed before must be handed to `hold`. Repeats to the byte, unlike resident memory of a process.
    """

    def __init__(self):
        super().__init__()
        self.live = 0
        self.peak = 0
        self._seen: dict[int, int] = {}

    def hold(self, tensors) -> None:
        """Counts tensors that exist already, such as weights."""
        for tensor in tensors:
            self._add(tensor)

    def _add(self, tensor: torch.Tensor) -> None:
        if tensor.layout is not torch.strided:  # its indices and values are tensors of their own
            return
        storage = tensor.untyped_storage()
        identity = storage._cdata
        if identity in self._seen:
            return
        size = storage.nbytes()
        self._seen[identity] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, identity)

    def _free(self, identity: int) -> None:
        self.live -= self._seen.pop(identity, 0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf)
        return out


@contextmanager
def count_bytes(held):
    """Yields a ByteCounter that already counts `held` (tensors) and sees every operation inside the block."""
    counter = ByteCounter()
    counter.hold(held)
    with counter:
        yield counter


class Stopwatch:
    """Adds up the seconds between `start` and `stop`; waits for the GPU at both, so that kernels are counted where they ran."""

    def __init__(self, device: str, clock: Callable[[], float] = time.perf_counter):
        self._cuda, self._clock = device.startswith("cuda"), clock
        self.seconds = 0.0
        self._since: float | None = None

    def start(self) -> None:
        self._wait()
        self._since = self._clock()

    def stop(self) -> float:
        """Returns the seconds since `start` and adds them to the total."""
        self._wait()
        elapsed = self._clock() - self._since
        self.seconds += elapsed
        self._since = None
        return elapsed

    def _wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()


class Counted:
    """In place of a Stopwatch: seconds that a fixed rate of operations would take, the same on every machine and every time."""

    RATE = 1e11
    """Operations per second: about a CPU core's; a GPU does hundreds of times as many. Only ratios mean something."""

    def __init__(self):
        self.seconds = 0.0

    def start(self) -> None:
        """Nothing: time does not count."""

    def stop(self) -> float:
        """Returns 0.0: time does not count."""
        return 0.0

    def count(self, operations: float) -> None:
        """Adds operations of training steps."""
        self.seconds += operations / self.RATE


def operations(recipe: Recipe, shape: Shape, trainable: int, lengths: Sequence[int]) -> float:
    """Returns the operations of training on rows of these lengths, padding left out.

    Per token two for each weight forward, as many for the gradients of what is passed on, and two for each trained weight
    (Kaplan et al. 2020, section 2.1); with checkpointing the forward pass again. Attention adds four per layer, element and
    pair of tokens forward and twice that backward, halved because it only looks back.
    """
    weights = shape.linear_parameters + shape.vocabulary * shape.hidden
    again = 2 * weights if recipe.gradient_checkpointing else 0
    each = 4 * weights + again + 2 * trainable
    pairs = (8 if recipe.gradient_checkpointing else 6) * shape.layers * shape.hidden
    return sum(each * length + pairs * length * length for length in lengths)


def gemm_seconds(size: int = 384, repeats: int = 7) -> float:
    """Returns the median seconds of one fp32 matrix product of `size`: how fast this core is right now."""
    a = torch.ones(size, size)
    times = []
    for _ in range(repeats):
        before = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - before)
    return sorted(times)[len(times) // 2]
