"""Which trials keep their adapters, so that a long study does not fill a disk.

Owns: `given_up`, a pure function of the history, and `apply`, which deletes and puts it on record.
Must not know: who runs trials.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from hpo.objectives import Objective
from hpo.pareto import eligible
from hpo.spec import Keep, Spec
from hpo.store import Store
from hpo.trial import Trial
from serving.endpoint import TABLE
from training import artifact

TIMED = {"seconds", "device_hours", "cost", "tokens_per_second"}
MARGIN = 1.5  # what is timed while other trials run may be so many times too long
DELETED = "checkpoint_deleted"  # of an outcome's conditions: why its adapter is gone


def output_folder(spec: Spec, number: int) -> Path:
    """Returns where a trial leaves what it trained."""
    return spec.folder / "trials" / f"{number:05d}"


def why_gone(trial: Trial) -> str | None:
    """Returns why a trial's adapter was deleted, or None where it was not."""
    return trial.outcome.conditions.get(DELETED) if trial.outcome is not None and trial.outcome.checkpoint is None else None


def given_up(
    keep: Keep, trials: Sequence[Trial], objectives: Sequence[Objective], *, winner: int | None = None, settled: bool = False
) -> dict[int, str]:
    """Returns the trials whose adapters are no longer wanted, number -> reason.

    Args:
        keep: all; front: those that may be on the front, the defaults and the winner; best: the winner; none.
        trials: all of the study.
        objectives: of the study. Until the front is timed alone at the end, a trial may come onto it because others were slow:
            so it is given up only where it is beaten by far in what is timed.
        winner: the certified one, where there is one.
        settled: the search has ended and its winner was compared. Before that `best` and `none` keep what may win.
    """
    holding = [t for t in trials if t.final and t.outcome is not None and t.outcome.checkpoint]
    if keep == "all":
        return {}
    if keep in ("best", "none") and settled:
        return {t.number: f"keep: {keep}" for t in holding if keep == "none" or t.number != winner}
    found, known = {}, [t for t in trials if eligible(t)]
    for trial in holding:
        if not eligible(trial):
            found[trial.number] = f"keep: {keep}; the trial is {trial.state}"
        elif trial.number == winner or trial.origin == "defaults":
            continue
        elif (better := next((t for t in known if t is not trial and _beats(t, trial, objectives)), None)) is not None:
            found[trial.number] = f"keep: {keep}; trial {better.number} is better"
    return found


def _beats(one: Trial, other: Trial, objectives: Sequence[Objective]) -> bool:
    better = False
    for objective in objectives:
        a, b = objective.of(one.outcome), objective.of(other.outcome)
        if a is None or b is None:
            return False
        if objective.goal == "maximize":
            a, b = (b, a) if objective.name in TIMED else (-a, -b)
        if a * (MARGIN if objective.name in TIMED else 1.0) > b:
            return False
        better = better or a < b
    return better


def apply(
    store: Store, study: int, spec: Spec, trials: Sequence[Trial], *, winner: int | None = None, settled: bool = False
) -> list[Trial]:
    """Deletes adapters that are no longer wanted and returns their trials as they are now on record.

    The record first, then the folder; what a process that died in between left is deleted by the next one. An adapter that an
    endpoint serves stays until none does, and what lies elsewhere than in the study's own folder is not ours to delete.
    """
    served = [path.read_text(encoding="utf-8") for path in (Path(spec.storage) / "endpoints").glob(f"*/{TABLE}")]
    by_number, changed = {t.number: t for t in trials}, []
    for number, why in given_up(spec.keep, trials, spec.targets, winner=winner, settled=settled).items():
        folder = str(output_folder(spec, number))
        if by_number[number].outcome.checkpoint == folder and not any(json.dumps(folder) in text for text in served):
            changed.append(store.drop_checkpoint(study, number, DELETED, why))
    for number in [t.number for t in changed] + [t.number for t in trials if why_gone(t)]:
        artifact.remove(output_folder(spec, number))
    return changed


def bytes_kept(spec: Spec) -> tuple[int, int]:
    """Returns how many trials have their adapters, and the bytes of these and of running trials' checkpoints."""
    folders = [path for path in (spec.folder / "trials").glob("[0-9]*") if path.is_dir()]
    below = [path for part in ("trials", "running") for path in (spec.folder / part).rglob("*")]
    return len(folders), sum(path.stat().st_size for path in below if path.is_file())
