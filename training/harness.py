"""The lm-evaluation-harness on a model folder, by the extra `paretune[lm-eval]`.

Owns: `run`, from task names to scores. Must not know: registers, studies; how a task scores.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.errors import wrong

REMEDY = "pip install 'paretune[lm-eval]'."


def run(
    folder: str | Path, tasks: Sequence[str], *, include: str | None = None, limit: int | None = None, shots: int | None = None,
    batch_size: int = 8, device: str = "cpu",
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Returns for each task its scores by name, with their standard errors as `<score>_stderr`, as the harness gives them.

    Args:
        folder: a merged model with its tokenizer.
        tasks: names of the harness's own tasks, which come from the hub, or of those in `include`.
        include: folder of tasks in YAML.
        limit: at most so many rows of each task: for trying, not for claims.
        shots: examples before each question; default: the task's own.
        batch_size: rows per forward.
        device: cpu or cuda.

    Raises:
        InputError: the extra is not installed, or there is no such task.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise wrong("hpo model evaluate", "needs the lm-evaluation-harness, which is not installed.", REMEDY)
    if include is not None and not Path(include).is_dir():
        raise wrong("--include", f"no such folder: {include}.", "Name a folder of tasks in YAML.")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(Path(include).resolve()) if include else None)
    if missing := [name for name in tasks if not manager.match_tasks([name])]:
        raise wrong("--tasks", f"the harness has no task {', '.join(missing)}.", "`lm_eval ls tasks` lists them.")
    model = HFLM(pretrained=str(folder), batch_size=batch_size, device=device, trust_remote_code=False, dtype="float32")
    found = simple_evaluate(
        model=model, tasks=list(tasks), task_manager=manager, limit=limit, num_fewshot=shots, random_seed=0, numpy_random_seed=0,
        torch_random_seed=0, fewshot_random_seed=0, bootstrap_iters=1000, log_samples=False, verbosity="ERROR",
    )  # fmt: skip
    return {name: _plain(scores) for name, scores in found["results"].items()}


def _plain(scores: dict[str, Any]) -> dict[str, Any]:
    """Returns `acc,none` as acc, and one with a filter as acc (filter); values that are no numbers stay as words."""
    found = {}
    for name, value in scores.items():
        score, comma, kind = name.partition(",")
        if comma:
            found[score if kind == "none" else f"{score} ({kind})"] = value if isinstance(value, (int, float)) else str(value)
    return found
