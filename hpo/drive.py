"""One trial of Ray Tune: hands a run in and passes on what is heard of it. In a process of its own, which loads little.

Owns: `drive`. Must not know: searches, studies, how a run is done.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from ray import tune

from training import own
from training.desk import Groups
from training.errors import InputError, WorkersFailed, WorkersLost
from training.recipe import Job, Progress


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
