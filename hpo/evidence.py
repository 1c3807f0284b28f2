"""Training the chosen point and its rivals again, and what that says, in numbers and in words.

Owns: which trainings there are (`plan`), what they are judged by, `sentences`. Must not know: where the work is done.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hpo.certificate import Certificate, Optimism, Rerun, Verdict
from hpo.choosing import kept_by
from hpo.objectives import Objective
from hpo.pareto import front
from hpo.search import job_of
from hpo.spec import Spec
from hpo.trial import Trial
from hpo.verdict import Scores, judge, optimism, rivals, seeds_for
from training import again
from training.recipe import DataConfig, Job, Limits, Outcome

START = 15.0  # seconds until a fresh worker group trains, which nobody else waits for
Key = tuple[int, int]  # trial, seed


@dataclass(frozen=True)
class Plan:
    """Who is compared with whom, and which trainings there are for it."""

    winner: Trial
    rivals: tuple[Trial, ...]
    jobs: dict[Key, Job]
    allowed: float

    @property
    def calls(self) -> list[tuple[str, dict]]:
        """The call that does all trainings on one worker."""
        jobs = [job.model_dump(mode="json") for job in self.jobs.values()]
        seconds = {t.number: t.outcome.seconds or 0 for t in (self.winner, *self.rivals)}
        expected = [seconds[number] for number, _ in self.jobs]
        return [("training.again.rerun", {"jobs": jobs, "expected": expected, "allowed": self.allowed})] if jobs else []

    @property
    def over(self) -> str:
        """`seeds` where the winner and at least one rival are trained again, else `rows`."""
        return "seeds" if len({number for number, _ in self.jobs}) > 1 else "rows"


def plan(spec: Spec, trials: Sequence[Trial], winner: Trial, data: DataConfig, *, start: float) -> Plan:
    """Returns the rivals and the trainings that `certify.extra` buys.

    Args:
        trials: all of the study, as settled.
        data: the study's own copy of the rows.
        start: seconds that each training costs beside its steps.
    """
    spent = sum(t.outcome.seconds for t in trials if t.outcome and t.outcome.seconds)
    allowed = spec.certify.extra * spent
    members = kept_by(spec.choose, front(trials, spec.targets), spec.targets) or front(trials, spec.targets)
    # By another rule than the best score a better score is no rival: there is nothing to be better in.
    others = rivals(winner, members, spec.targets, spec.certify.rivals) if spec.choose.by == "best" else []
    costs = [(t.outcome.seconds or 0) + start for t in (winner, *others)]
    bought = seeds_for(costs, allowed, spec.certify.seeds) if all(costs) else []
    jobs = {}
    for i in range(1, max(bought, default=0) + 1):  # a seed of each in turn, so that it can end early and stay balanced
        for trial, _ in zip((winner, *others), bought, strict=False):
            job = job_of(trial, spec, data)
            seed = (trial.recipe.seed + i) % 2**31
            jobs[trial.number, seed] = job.model_copy(update={
                "recipe": job.recipe.model_copy(update={"seed": seed}), "limits": Limits(),
                "evaluation": job.evaluation.model_copy(update={"reports": 1}), "resume": None,
                "output": str(spec.folder / "certify" / f"{trial.number:05d}-{seed}"),
            })  # fmt: skip
    return Plan(winner, tuple(others), jobs, allowed)


def train_each(planned: Plan, train: Callable[[Job], Outcome], on_phase: Callable[[str], None]) -> dict[Key, dict]:
    """Returns what the jobs came to, each trained as the trials were; one that left an adapter is still to be judged.

    What was done before is taken from what was kept; none is begun that would not fit into what is allowed.
    """

    def one(job: Job) -> dict:
        on_phase("training again with another seed")
        outcome = train(job)
        known = again.told(outcome) | ({"checkpoint": outcome.checkpoint} if outcome.checkpoint else {})
        again.keep(job, known)
        return known

    for _, arguments in planned.calls:
        found = again.each(list(planned.jobs.values()), one, arguments["expected"], planned.allowed)
        return {key: known for key, known in zip(planned.jobs, found, strict=True) if known is not None}
    return {}


def judged(jobs: Mapping[Key, Job], found: dict[Key, dict], scored: Sequence[dict]) -> dict[Key, dict]:
    """Returns what the jobs came to with their adapters' scores, which are kept, and the adapters removed."""
    by_name = {one["who"]: one for one in scored}
    for key, job in jobs.items():
        if (one := by_name.get(name_of(key))) is not None:
            found[key] = {n: v for n, v in found[key].items() if n != "checkpoint"} | one
            again.keep(job, found[key])
        shutil.rmtree(job.output, ignore_errors=True)
    return found


def name_of(key: Key) -> str:
    """Returns what a training again is called where models are scored."""
    return f"{key[0]}-{key[1]}"


def weigh(
    planned: Plan, objective: Objective, found: Mapping[Key, dict], models: Mapping[int, dict]
) -> tuple[Verdict | None, Optimism | None, tuple[Rerun, ...]]:
    """Returns what the trainings say of the winner.

    Args:
        objective: the score, of which larger is better but for the sign of a loss.
        found: what each training again came to.
        models: trial -> how its own model does on the test rows, for those that were scored.
    """
    reruns, failed = [], {}
    for (number, seed), one in found.items():
        done = one["ended"] == "complete"
        score = _scores(number, [one], objective) if done else None
        value = None if score is None else score.means()[0] * _sign(objective)
        reruns.append(Rerun(number=number, seed=seed, score=value, seconds=one["seconds"], ended=one["ended"],
                            reason=one["reason"]))  # fmt: skip
        if not done:
            failed[number] = f"{one['ended']} with seed {seed} ({one['reason']})"
    by_trial = {
        number: _scores(number, [one for (n, _), one in found.items() if n == number and one["ended"] == "complete"], objective)
        for number in {n for n, _ in found}
    }
    own = {number: _scores(number, [model], objective) for number, model in models.items()}
    held = by_trial.get(planned.winner.number) or own.get(planned.winner.number)
    return _verdict(planned, by_trial, own, failed), _optimism(planned.winner, objective, held), tuple(reruns)


def _verdict(planned: Plan, by_trial: Mapping, own: Mapping, failed: Mapping[int, str]) -> Verdict | None:
    if not planned.rivals:
        return None
    known = by_trial if planned.over == "seeds" else own
    ours = known.get(planned.winner.number)
    others = [known[t.number] for t in planned.rivals if known.get(t.number) is not None]
    if ours is None or not others:
        if planned.over == "seeds":
            return Verdict(kind="open", over="seeds", confidence=0, failed=dict(failed))
        return None
    return judge(ours, others, over=planned.over, failed=failed)


def _optimism(winner: Trial, objective: Objective, held: Scores | None) -> Optimism | None:
    if held is None:
        return None
    right = winner.outcome.conditions.get("right", "") if objective.name == "accuracy" else ""
    chosen = [float(digit) for digit in right] or [_sign(objective) * objective.of(winner.outcome)]
    return optimism(chosen, held)


def _sign(objective: Objective) -> int:
    return -1 if objective.goal == "minimize" else 1


def _scores(number: int, results: Sequence[dict], objective: Objective) -> Scores | None:
    """Returns what is to be compared: row by row where rows were scored for this objective, else a value for each seed."""
    if not results:
        return None
    if objective.name == "accuracy" and all("right" in one for one in results):
        return Scores(number, tuple(tuple(one["right"]) for one in results), (1.0,) * len(results[0]["right"]))
    if objective.name == "loss" and all("nll" in one for one in results):
        return Scores(number, tuple(tuple(-v for v in one["nll"]) for one in results), tuple(results[0]["tokens"]))
    if not all("outcome" in one for one in results):
        return None
    values = [objective.of(Outcome.model_validate(one["outcome"])) for one in results]
    if any(value is None for value in values):
        return None
    return Scores(number, tuple((_sign(objective) * value,) for value in values), (1.0,))


# In words


def sentences(certificate: Certificate, objective: Objective, trials: Sequence[Trial], share: float) -> tuple[str, ...]:
    """Returns what verdict, optimism and reruns say, in sentences.

    Args:
        share: of the study's training seconds that was allowed.
    """
    said = []
    sign = _sign(objective)
    if (verdict := certificate.verdict) is not None:
        said.append(_judgement(certificate, verdict, objective, sign))
    if (seen := certificate.optimism) is not None:
        said.append(_optimistic(certificate, seen, objective, sign))
    spent = sum(r.seconds or 0 for r in certificate.reruns)
    whole = sum(t.outcome.seconds for t in trials if t.outcome and t.outcome.seconds)
    if certificate.reruns and whole:
        said.append(f"Training again {len(certificate.reruns)} times took {spent:.3g} s of training, {spent / whole:.0%} of what "
                    f"the search took ({share:.0%} were allowed).")  # fmt: skip
    elif certificate.allowed is not None and whole and share:
        said.append(f"No recipe was trained again with another seed: {share:.0%} of the search's training are "
                    f"{certificate.allowed:.3g} s, too little for it.")  # fmt: skip
    return tuple(said)


def _judgement(certificate: Certificate, verdict: Verdict, objective: Objective, sign: int) -> str:
    winner, rivals = certificate.winner, verdict.rivals
    if verdict.kind == "open" or not verdict.scores:
        why = "; ".join(f"trial {number}: {text}" for number, text in verdict.failed.items()) or "too few trainings fitted"
        return f"Nothing can be said of the winner with other seeds: {why}."
    rows = certificate.optimism.rows if certificate.optimism else 0
    where = f"on {rows:,} rows that chose nothing" if rows > 1 else "by their score alone"
    how = f"Trained again with {_count(len(verdict.scores), 'other seed')} each and compared {where}"
    if verdict.over == "rows":
        how = f"The trained models themselves, compared {where} (other seeds may do otherwise)"
    ours = sign * sum(verdict.scores) / len(verdict.scores)
    scores = ", ".join(f"{sign * sum(r.scores) / len(r.scores):.4g} of trial {r.number} (ahead by {r.value:+.3g}, 95 % interval "
                       f"{r.low:+.3g} to {r.high:+.3g})" for r in rivals)  # fmt: skip
    against = f"its {objective.name} is {ours:.4g} against {scores}"
    failed = "".join(f" Trial {number} {text}." for number, text in verdict.failed.items())
    if verdict.kind == "winner":
        return f"{how}: trial {winner} is the winner with 95 % confidence; {against}.{failed}"
    if verdict.kind == "beaten":
        return f"{how}: trial {verdict.better} is better than the chosen trial {winner} with 95 % confidence; {against}.{failed}"
    names = ", ".join(map(str, [winner, *verdict.tied]))
    return f"{how}: a tie between trials {names}, none better with 95 % confidence; {against}.{failed}"


def _optimistic(certificate: Certificate, seen: Optimism, objective: Objective, sign: int) -> str:
    again_ = any(r.number == certificate.winner for r in certificate.reruns)
    rows = f"{seen.rows:,} rows" if seen.rows > 1 else ""
    seeds = _count(seen.seeds, "other seed") if again_ else ""
    outside = " and ".join(part for part in (rows, seeds) if part) or "what"
    span = "" if seen.low is None else f", 95 % interval {seen.low:+.3g} to {seen.high:+.3g}"
    return (
        f"Optimism of the search: {seen.value:+.3g} in {objective.name}{span}; trial {certificate.winner} had "
        f"{sign * seen.chosen:.4g} where it was chosen and has {sign * seen.held_out:.4g} on {outside} that did not choose it."
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


__all__ = ["START", "Plan", "judged", "name_of", "plan", "sentences", "train_each", "weigh"]
