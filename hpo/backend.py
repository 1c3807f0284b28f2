"""Where a study's trials run: on Ray, or in this process.

Owns: `Backend`, `backend_of`. Must not know: searches' insides, certificates, doors.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from hpo import local
from hpo import promote as promotion
from hpo.spec import Spec
from training import own
from training.beside import Seats
from training.recipe import Job, Outcome, Train


@dataclass
class Backend:
    """Where trials are searched, functions called and single jobs trained; `real` where our own loop trains."""

    search: Callable[..., None]  # (search, data, *, on_change)
    call: Callable[[str, dict[str, Any]], Any]
    train: Callable[[Job], Outcome]
    real: bool
    again: Callable[[Job], Outcome] | None  # trains as the trials were trained

    def bench(self, tell: Callable) -> promotion.Bench:
        """Returns where a promotion does its work, and whom it tells."""
        return promotion.Bench(self.call, self.train, lambda phase: tell(phase=phase))


@contextlib.contextmanager
def backend_of(
    spec: Spec, train: Train | None, tell: Callable, *, ahead: int = 1, best: Seats | None = None
) -> Iterator[Backend]:
    """Yields where trials run. With Ray the cluster is joined, and found large enough, before anything is written.

    Args:
        ahead: how many runs there will be at once to begin with.
        best: how many trials one worker should train at a time, where that is known.
    """
    real = train is None and spec.train == "loop"
    train = train or (own.load(spec.train, "train") if own.is_own(spec.train) else None)
    if spec.resources.mode == "local" or spec.train == "simulated":
        from training import simulate

        function = train or (simulate.train if spec.train == "simulated" else _loop())
        with _warm() if real else contextlib.nullcontext():
            yield Backend(
                lambda search, data, *, on_change: local.run_search(search, function, data, on_change=on_change),
                lambda name, payload: local.call(name, payload, spec.resources),
                alone := lambda job: function(job, lambda progress: None),
                real,
                alone,
            )
        return
    tell(phase="starting Ray")
    from hpo import tune

    with tune.connect():
        # What a user's own function trains can be anything, so nothing of it is packed.
        resources = spec.resources if train is None else spec.resources.model_copy(update={"mode": "warm"})
        plan = tune.layout(resources, tune.capacity(), spec.budget.parallel, best=best)
        folder = str(spec.folder / "ray")
        with tune.groups_of(
            spec.name, spec.resources, plan.groups, storage=folder, train=train, ahead=ahead, seats=plan.seats
        ) as groups:
            yield Backend(
                functools.partial(tune.run_search, parallel=plan.parallel, train=train, groups=groups),
                functools.partial(tune.call, groups),
                alone := lambda job: tune.train_alone(groups, job, f"{spec.name}-final"),
                real,
                alone if real else None,
            )


def _warm():
    from training import warm

    return warm.keeping()


def _loop() -> Train:
    import torch

    from training.loop import train

    torch.set_num_threads(1)
    return train
