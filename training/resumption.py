"""The whole state of a run on disk, by which it goes on as if nothing had happened.

Owns: `Checkpoints`: when one is due, writing, proving and reading them. Must not know: when a run ends, studies, Ray.

A checkpoint is an artifact (written aside, synced, renamed, manifest last): weights.safetensors and optimizer.safetensors hold
all that is trained and its moments as whole tensors by name, whatever number of workers shared them; state.json the rest: step,
scaler, random numbers of each worker, ranks of AdaLoRA, and what the loop wants to know again. Nothing is pickled. The order of
the rows follows from the seed, so the step is the position in the data, also for another number of workers.
"""

from __future__ import annotations

import json
import random
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from training import artifact, shards
from training.adapters import method_of
from training.errors import InputError
from training.recipe import Recipe
from training.run import Run
from training.world import World

KEPT = 2  # checkpoints: where the newest is damaged, the one before it is used
NAME = re.compile(r"step-(\d{8})")
# Of a recipe: where its model lies, how a batch is cut and where its state is kept change no result.
FREE = {"model", "revision", "micro_batch", "packing", "zero_stage", "offload"}
CONSTANT = {"qmap1", "qmap2"}  # tables of bitsandbytes, shared by all tensors


def identity(recipe: Recipe, steps: int, rows: int) -> dict[str, Any]:
    """Returns what a checkpoint and the run that goes on from it must have in common."""
    return {"recipe": recipe.model_dump(mode="json", exclude=FREE), "steps": steps, "rows": rows}


def unkept(run: Run) -> str:
    """Returns why a run cannot be kept in a checkpoint, or ""."""
    if run.engine is not None and run.recipe.optimizer.endswith("8bit"):
        return f"{run.recipe.optimizer} has one scale per block of what a worker holds, which ZeRO does not give back whole"
    return ""


@dataclass
class Checkpoints:
    """The checkpoints of one run, in a folder of its own that every worker sees. Its methods are called by all workers alike.

    `refused` says of each checkpoint that was passed over why.
    """

    folder: Path
    every: float
    identity: dict[str, Any]
    world: World
    refused: list[str] = field(default_factory=list)
    _last: float = field(default_factory=time.monotonic)

    def due(self) -> bool:
        """Says on this worker whether `every` seconds have passed since the last one."""
        return time.monotonic() - self._last >= self.every

    def write(self, run: Run, step: int, said: dict[str, Any]) -> None:
        """Writes the run after `step` optimizer steps, with what the loop `said`, and drops all but the last two."""
        weights, states, kept = _state(run, self.world.rank == 0)
        kept |= {"random": self.world.gather({"random": [_random()]})["random"], "workers": self.world.size, "done": run.done,
                 "scaler": run.scaler.state_dict(), "step": step, "said": said}  # fmt: skip

        def fill(aside: Path) -> dict:
            save_file(weights, aside / "weights.safetensors")
            save_file(states, aside / "optimizer.safetensors")
            (aside / "state.json").write_text(json.dumps(kept), encoding="utf-8")
            return {"identity": self.identity}

        if self.world.rank == 0:
            artifact.write(self.folder / f"step-{step:08d}", fill)
            for path in _found(self.folder)[KEPT:]:
                artifact.remove(path)
        self._last = time.monotonic()

    def newest(self) -> Path | None:
        """Returns the newest checkpoint that is whole and of this run; None where there is none."""
        chosen = None
        if self.world.rank == 0:
            for path in _found(self.folder):
                try:
                    manifest = artifact.verify(path, what="checkpoint", remedy="The one before it is used.").manifest
                    if manifest.get("identity") == self.identity:
                        chosen = path.name
                        break
                    self.refused.append(f"{path.name}: of another recipe or other rows")
                except InputError as error:
                    self.refused += [f"{path.name}: {problem.rule}" for problem in error.problems]
        chosen = self.world.agree(chosen)
        return self.folder / chosen if chosen else None

    def restore(self, run: Run, path: Path) -> tuple[int, dict[str, Any]]:
        """Puts a checkpoint into a run that was set up alike; returns its step and what the loop had said."""
        kept = json.loads((path / "state.json").read_text(encoding="utf-8"))
        weights, states = load_file(path / "weights.safetensors"), load_file(path / "optimizer.safetensors")
        _put(run, weights, states, kept)
        run.done = kept["done"]
        if kept["scaler"]:
            run.scaler.load_state_dict(kept["scaler"])
        if kept["workers"] == self.world.size:
            _set_random(kept["random"][self.world.rank])
        else:  # other workers have drawn other numbers: theirs follow from seed, step and rank, as at the start
            torch.manual_seed(run.recipe.seed + self.world.rank + 1_000_003 * kept["step"])
        self._last = time.monotonic()
        return kept["step"], kept["said"]


def _found(folder: Path) -> list[Path]:
    """Returns the checkpoints of a folder, newest first."""
    return sorted((p for p in folder.glob("step-*") if NAME.fullmatch(p.name)), reverse=True) if folder.is_dir() else []


def _state(run: Run, main: bool) -> tuple[dict, dict, dict]:
    """Returns weights, optimizer's tensors and the rest; with ZeRO all workers take part."""
    method = method_of(run.recipe.adapter).state
    extra, ranks = method(run.inner) if method else ({}, None)
    if run.engine is not None:
        (weights, states), rest = shards.gather(run, main), {}
    elif main:
        weights = {name: parameter.detach().cpu().clone() for name, parameter in run.trained()}
        states, rest = _optimizer(run)
    else:
        return {}, {}, {}
    states |= {f"//{name}": tensor.detach().cpu().clone() for name, tensor in extra.items()}
    return weights, states, {"optimizer": rest, "ranks": ranks}


def _optimizer(run: Run) -> tuple[dict, dict]:
    states, rest = {}, {}
    for name, parameter in run.trained():
        for key, value in run.optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                if key not in CONSTANT:
                    states[f"{name}//{key}"] = value.detach().cpu().clone()
            elif value is not None:
                rest.setdefault(name, {})[key] = value
    return states, rest


def _put(run: Run, weights: dict, states: dict, kept: dict) -> None:
    expected = {name: tuple(p.ds_shape if hasattr(p, "ds_shape") else p.shape) for name, p in run.trained()}
    if {name: tuple(tensor.shape) for name, tensor in weights.items()} != expected:
        raise RuntimeError("the checkpoint's tensors are not those of this run, though its recipe is")
    extra = {name.removeprefix("//"): states.pop(name) for name in list(states) if name.startswith("//")}
    if restore := method_of(run.recipe.adapter).restore:
        restore(run.inner, {name: tensor.to(run.device) for name, tensor in extra.items()}, kept["ranks"])
    if run.engine is not None:
        shards.scatter(run, weights, states)
        return
    with torch.no_grad():
        for name, parameter in run.trained():
            parameter.copy_(weights[name])
    by_name: dict[str, dict] = {name: dict(rest) for name, rest in kept["optimizer"].items()}
    for name, tensor in states.items():
        parameter, _, key = name.rpartition("//")
        by_name.setdefault(parameter, {})[key] = tensor
    _fill(run.optimizer, dict(run.trained()), by_name)


def _fill(optimizer: torch.optim.Optimizer, parameters: dict[str, torch.nn.Parameter], by_name: dict[str, dict]) -> None:
    own = hasattr(optimizer, "init_state")  # bitsandbytes makes its states itself: paged ones, and the tables they share
    names = {parameter: name for name, parameter in parameters.items()}
    optimizer.state.clear()
    if own and not optimizer.initialized:
        optimizer.check_overrides()
        optimizer.initialized = True
    for g, group in enumerate(optimizer.param_groups):
        for i, parameter in enumerate(group["params"]):
            given = by_name.get(names[parameter])
            if not given:
                continue
            if own:
                optimizer.init_state(group, parameter, g, i)
            state = optimizer.state[parameter]
            for key, value in given.items():
                if not isinstance(value, torch.Tensor):
                    state[key] = value
                elif own and isinstance(state[key], torch.Tensor):
                    state[key].copy_(value)
                else:
                    state[key] = int(value) if own else value.to(parameter.device)


def _random() -> dict[str, Any]:
    version, numbers, gauss = random.getstate()
    cuda = bytes(torch.cuda.get_rng_state().tolist()).hex() if torch.cuda.is_initialized() else None
    return {"python": [version, list(numbers), gauss], "torch": bytes(torch.get_rng_state().tolist()).hex(), "cuda": cuda}


def _set_random(kept: dict[str, Any]) -> None:
    version, numbers, gauss = kept["python"]
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(torch.tensor(list(bytes.fromhex(kept["torch"])), dtype=torch.uint8))
    if kept["cuda"] and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(torch.tensor(list(bytes.fromhex(kept["cuda"])), dtype=torch.uint8))
