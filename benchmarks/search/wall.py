"""How often a launched trial runs out of memory: with a gate that predicts within 5 %, and by what the algorithm learns alone.

Owns: `measure`, the wall. The bytes are those that `training.memory` predicts for an 8B Llama with QLoRA, taken as the truth; a
gate sees them with an error. The peer is Optuna's TPE that is told of failures as failures, as Ray Tune tells it.
"""

from __future__ import annotations

import functools
import math
import statistics
import warnings
from pathlib import Path
from random import Random
from typing import Any

from hpo import gate
from hpo.gate import Verdict
from hpo.simulator import Course, simulate
from hpo.spec import Spec
from hpo.trial import Trial
from training import memory
from training.model import Shape
from training.recipe import Outcome, Recipe

SEEDS, TRIALS, ERROR = 20, 60, 0.05
LEARNED = 20  # launches in which an algorithm without a gate may find out where the wall is
LIMIT = 24e9
DEFAULTS = Recipe(bits=4, precision="bf16")
SPACE = {
    "batch_size": {"type": "int", "low": 1, "high": 64, "log": True},
    "max_length": {"type": "int", "low": 512, "high": 8192, "log": True},
    "rank": {"type": "int", "low": 4, "high": 128, "log": True},
    "learning_rate": {"type": "float", "low": 1e-5, "high": 1e-2, "log": True},
}
LINEAR = {"q_proj": (4096, 4096), "k_proj": (1024, 4096), "v_proj": (1024, 4096), "o_proj": (4096, 4096),
          "gate_proj": (14336, 4096), "up_proj": (14336, 4096), "down_proj": (4096, 14336)}  # fmt: skip


@functools.cache
def llama() -> Shape:
    """Returns the shape of Llama 3 8B."""
    layers = 32
    linear = {f"model.layers.{i}.{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}": size
              for i in range(layers) for name, size in LINEAR.items()}  # fmt: skip
    weights = sum(a * b for a, b in linear.values())
    config = {"num_hidden_layers": layers, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
              "num_key_value_heads": 8, "vocab_size": 128256, "model_type": "llama", "max_position_embeddings": 8192}  # fmt: skip
    return Shape(config, linear, weights + 2 * 128256 * 4096, weights)


def peak(recipe: Recipe) -> int:
    """Returns the bytes that a recipe takes here."""
    return memory.predict(recipe, llama(), tokens_per_row=recipe.max_length, device="cuda").total


def outcome(recipe: Recipe, seed: int) -> Outcome:
    """Returns what training comes to: longer rows and larger batches are better and quicker, and stand beyond the wall."""
    size = peak(recipe)
    if size > LIMIT:
        return Outcome(ended="infeasible", reason="out of memory", share=0, peak_bytes=size)
    off = math.log10(recipe.learning_rate / 3e-4)
    noise = Random(f"{seed}:{recipe.model_dump_json()}").gauss(0, 0.005)
    score = 0.5 + 0.06 * math.log2(recipe.max_length / 512) + 0.02 * math.log2(recipe.batch_size) - 0.1 * off**2 + noise
    seconds = 4000 * (1 + 4 / recipe.batch_size) * (1 + 0.02 * math.log2(recipe.rank))
    return Outcome(scores={"accuracy": score}, seconds=seconds, peak_bytes=size)


def measure(quick: bool, storage: Path) -> dict[str, Any]:
    """Returns the share of launches that ran out of memory: with the gate of all, else of those after the first LEARNED."""
    seeds, trials = (1, 16) if quick else (SEEDS, TRIALS)
    gate, plain = ([_ours(seed, trials, gated=gated) for seed in range(seeds)] for gated in (True, False))
    peer = [_optuna(seed, trials) for seed in range(seeds)]
    return {
        "oom_share_gate": round(statistics.fmean(gate), 4), "oom_share_plain": round(statistics.fmean(plain), 4),
        "oom_share_optuna_told_of_failures": round(statistics.fmean(peer), 4), "oom_share_random": round(_share(), 4),
    }  # fmt: skip


def _share() -> float:
    from hpo.space import Space

    space, chance = Space(SPACE), Random(0)
    return statistics.fmean(peak(space.resolve(space.sample(chance), DEFAULTS)) > LIMIT for _ in range(1000))


def _ours(seed: int, trials: int, *, gated: bool) -> float:
    spec = Spec.model_validate({
        "name": "wall", "storage": "/nowhere", "data": {"train": "nothing"}, "space": SPACE, "recipe": DEFAULTS.model_dump(),
        "limits": {"peak_bytes": int(LIMIT)}, "seed": seed, "budget": {"trials": trials}, "resources": {"gpus": 1},
    })  # fmt: skip

    def predicted(recipe: Recipe) -> int:
        return int(peak(recipe) * (1 + Random(f"{seed}:{recipe.model_dump_json()}").uniform(-ERROR, ERROR)))

    ran_out: list[int] = []
    measured: list[tuple[int, int]] = []

    def judge(params, recipe: Recipe) -> Verdict:
        seen = predicted(recipe)
        over = gated and seen > gate.wall(int(LIMIT), ran_out, measured)
        return Verdict(recipe, seen if gated else None, f"{seen:,} bytes predicted" if over else None)

    def course(trial: Trial) -> Course:
        found = outcome(trial.recipe, seed)
        if found.ended == "infeasible":
            ran_out.append(predicted(trial.recipe))
        else:
            measured.append((predicted(trial.recipe), found.peak_bytes))
        return Course([], found)

    made = simulate(spec, course, judge=judge)
    launched = [t.state == "infeasible" for t in made.trials if t.attempts]
    return statistics.fmean(launched if gated else launched[LEARNED:] or launched)


def _optuna(seed: int, trials: int) -> float:
    """Optuna's TPE as it comes; a trial that runs out of memory is FAIL, of which it learns nothing."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sampler = optuna.samplers.TPESampler(seed=seed)
        study = optuna.create_study(sampler=sampler, directions=["maximize", "minimize", "minimize"])
    failed = []
    for _ in range(trials):
        trial = study.ask()
        params = {
            name: trial.suggest_float(name, d["low"], d["high"], log=True) if d["type"] == "float"
            else trial.suggest_int(name, d["low"], d["high"], log=True) for name, d in SPACE.items()
        }  # fmt: skip
        found = outcome(DEFAULTS.model_copy(update=params), seed)
        failed.append(found.ended == "infeasible")
        if failed[-1]:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, [found.scores["accuracy"], found.seconds, found.peak_bytes])
    return statistics.fmean(failed[LEARNED:] or failed)


