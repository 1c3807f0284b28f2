"""The workers of one trial, seen from one of them; and what software they run.

Owns: `World`: rank, size and the few collectives that the loop needs. Must not know: Ray, models.
"""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass

import torch
import torch.distributed as dist

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "ray", "deepspeed")


@dataclass(frozen=True)
class World:
    """Rank and number of data-parallel workers; with one worker every collective is the identity."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls) -> World:
        """Returns the world of this process: that of torch.distributed where it is set up, else a single worker."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def total(self, value: float) -> float:
        """Returns the sum over all workers."""
        return self._reduce(value, dist.ReduceOp.SUM)

    def largest(self, value: float) -> float:
        """Returns the maximum over all workers."""
        return self._reduce(value, dist.ReduceOp.MAX)

    def _reduce(self, value: float, operation) -> float:
        if self.size == 1:
            return value
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        tensor = torch.tensor(float(value), dtype=torch.float64, device=device)
        dist.all_reduce(tensor, operation)
        return tensor.item()

    def agree(self, said: str | None) -> str | None:
        """Returns on every worker what the main worker said."""
        if self.size == 1:
            return said
        box = [said]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, lists: dict[str, list]) -> dict[str, list]:
        """Returns the lists of all workers joined, by name, in the order from which every worker had taken `[rank::size]`."""
        if self.size == 1:
            return lists
        boxes: list = [None] * self.size
        dist.all_gather_object(boxes, lists)
        joined = {}
        for name in lists:
            joined[name] = [None] * sum(len(box[name]) for box in boxes)
            for rank, box in enumerate(boxes):
                joined[name][rank :: self.size] = box[name]
        return joined


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the libraries that a result depends on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
