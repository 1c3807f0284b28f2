"""One trial of Ray Tune: hands a run in and passes on what is heard of it. In a process of its own, which loads little.

Owns: `drive`, and `seat_of`, what it takes of the cluster. Must not know: searches, studies, how a run is done.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from ray import tune

from training import own
from training.desk import Groups
from training.errors import InputError, WorkersFailed, WorkersLost
from training.recipe import Job, Progress

# Trials' processes compute nothing. A share of a CPU would come out of the cluster and could keep the last worker group waiting
# for ever.
HEAD = "node:__internal_head__"
STRATEGIES = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")  # all the same for one process
SHARES = 25  # of the head node, in parts of 10,000


def seat_of(config: dict) -> tune.PlacementGroupFactory:
    """Returns the resources of a trial's own process: next to none, and other ones for each of 100 seats.

    Tune hands a process from trial to trial only where their resources are equal: so each seat has one, and no other trial takes
    it and has the process killed that was just being started for it.
    """
    share, strategy = divmod(config["seat"], len(STRATEGIES))
    return tune.PlacementGroupFactory([{"CPU": 0, HEAD: (1 + share % SHARES) * 1e-4}], strategy=STRATEGIES[strategy])


def drive(config: dict, groups: Groups, train: Callable | None, grace: float, brought: dict) -> None:
    """One Tune trial: drives one run and ends normally with what came of it, so that the reason is never lost."""

    # Everything is reported by this one thread. Ray's own TuneReportCallback reports from another process, and where Tune is
    # slow to fetch its last report, this one's final report and that one wait for each other for ever.
    def pass_on(progress: Progress) -> None:
        tune.report({"share": progress.share, "progress": progress.model_dump_json()})

    job = Job.model_validate_json(config["job"])
    try:
        with own.given(brought):
            # What was lost once is trained alone from then on: it, or who sat beside it, may have been the cause.
            alone = config["attempt"] > 1
            outcome = groups.train(job, config["run"], on_progress=pass_on, train=train, grace=grace, alone=alone)
    except InputError as error:
        tune.report({"share": 0.0, "wrong": json.dumps([(p.where, p.rule, p.remedy) for p in error.problems])})
    except WorkersLost as error:
        tune.report({"share": 0.0, "lost": str(error)})
    except WorkersFailed as error:
        tune.report({"share": 0.0, "failed": str(error)})
    else:
        tune.report({"share": outcome.share, "outcome": outcome.model_dump_json()})
