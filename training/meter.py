"""Seconds and bytes of training itself.

Owns: `count_bytes`, which counts live tensor storage on any device; `Stopwatch`.
Must not know: what is trained.
"""

from __future__ import annotations

import time
import weakref
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):
            return
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

    def __init__(self, device: str):
        self._cuda = device.startswith("cuda")
        self.seconds = 0.0
        self._since: float | None = None

    def start(self) -> None:
        self._wait()
        self._since = time.perf_counter()

    def stop(self) -> float:
        """Returns the seconds since `start` and adds them to the total."""
        self._wait()
        elapsed = time.perf_counter() - self._since
        self.seconds += elapsed
        self._since = None
        return elapsed

    def _wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()


def gemm_seconds(size: int = 384, repeats: int = 20) -> float:
    """Returns the median seconds of one fp32 matrix product of `size`: how fast this core is right now."""
    a = torch.ones(size, size)
    times = []
    for _ in range(repeats):
        before = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - before)
    return sorted(times)[len(times) // 2]
