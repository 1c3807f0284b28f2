"""Jobs trained together in this process: what each is told, measured and kept is that of the job alone.

Owns: `Host`: who may sit beside whom, entering with a short run alone, reports, scores, checkpoints and the end of each.
Must not know: Ray, studies, where jobs come from.

A trial's bytes are counted, and its seconds estimated, on a run of its own before it takes its seat: the same steps as
`training.loop` does, a few of them spread over its plan. What the process spent on it is kept apart (`billed_seconds`): its
share of each tick by the operations of its rows, and all that was done for it alone. Checkpoints and adapters are those of a
trial alone too: for a moment its weights and moments are put into such a run, and written from there.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from training import checkpoint, loop, pack, preemption, stability
from training.beside import key_of
from training.ledger import End, Ledger, check_limit, heed, open_ledger, rhythm, tell
from training.measure import step_seconds
from training.meter import Counted, operations
from training.recipe import Job, Outcome, Report
from training.resumption import Checkpoints, identity
from training.run import Run, probed, set_up
from training.world import World

WARM, SOLO = 2, 8  # steps of a trial alone: those that warm up, and those by which its seconds are estimated


class Estimated:
    """In place of a stopwatch: `rate` seconds for each optimizer step, estimated alone."""

    def __init__(self):
        self.seconds, self.rate = 0.0, 0.0

    def count(self, steps: int) -> None:
        """Adds steps."""
        self.seconds += steps * self.rate


@dataclass
class _Member:
    job: Job
    report: Report
    ledger: Ledger
    course: loop.Course
    seat: pack.Seat
    kept: Checkpoints | None
    every: int
    scored: set[int]
    before: int = 0  # tokens before the checkpoint that it went on from
    billed: float = 0.0

    def work(self, rows: list[int]) -> float:
        """Returns the operations of some of its rows."""
        lengths = [len(self.course.rows.ids[row]) for row in rows]
        return operations(self.job.recipe, self.ledger.shape, self.ledger.trainable, lengths)


class Host:
    """Seats for jobs. One at a time enters, all are trained together by `tick`, each leaves at its own end."""

    def __init__(self, seats: int):
        self.seats = seats
        self._members: dict[str, _Member] = {}
        self._pack: pack.Pack | None = None
        self._key: str | None = None

    @property
    def key(self) -> str | None:
        """What the next job must have in common with those that are here; None where nobody is."""
        return self._key if self._members else None

    @property
    def free(self) -> int:
        return self.seats - len(self._members)

    @property
    def names(self) -> list[str]:
        return list(self._members)

    def enter(self, name: str, job: Job, report: Report) -> Outcome | None:
        """Gives a job a seat after it was measured alone; returns its outcome where it ended before its first step.

        Raises:
            InputError: the model, the data or a target is not as the recipe says.
            ValueError: the model cannot have rows of several trials in one forward.
        """
        since, ledger = time.perf_counter(), open_ledger(job, World())
        if not isinstance(ledger.watch, Counted):
            ledger.watch = Estimated()
        try:
            member = self._seated(job, report, ledger)
        except End as end:
            ledger.conditions["billed_seconds"] = time.perf_counter() - since
            return ledger.outcome(end.ended, end.reason)
        self._members[name] = member
        member.billed = time.perf_counter() - since
        return None

    def tick(self) -> Iterator[tuple[str, Outcome]]:
        """Trains every job on its next rows and yields those that ended by it."""
        if not self._members:
            return
        by_seat = {member.seat.number: (name, member) for name, member in self._members.items()}
        since = time.perf_counter()
        shares = {name: member.work(member.seat.offer()) for name, member in self._members.items()}
        finished = self._pack.tick()
        took, total = time.perf_counter() - since, sum(shares.values())
        for name, member in self._members.items():
            member.billed += took * shares[name] / total
        for step in finished:
            name, member = by_seat[step.seat.number]
            since = time.perf_counter()
            outcome = self._after(member, step)
            member.billed += time.perf_counter() - since
            if outcome is not None:
                outcome.conditions["billed_seconds"] = member.billed
                self._pack.leave(member.seat)
                del self._members[name]
                yield name, outcome

    def close(self) -> None:
        """Lets the base go."""
        if self._pack is not None:
            self._pack.close()
            self._pack = self._key = None

    # Inside

    def _seated(self, job: Job, report: Report, ledger: Ledger) -> _Member:
        recipe, key = job.recipe, key_of(job)
        if self._key != key:
            self.close()
        course = loop.begin(job, ledger)
        if self._pack is None:
            self._pack = pack.Pack(recipe, ledger.shape, course.rows, seats=self.seats, rank=recipe.rank, device=ledger.device)
            self._key = key
        self._measure(job, ledger, course)
        ledger.trainable = recipe.rank * sum(sum(size) for size in self._pack.stack.sizes.values())
        ledger.conditions |= {"packed": True, "seats": self.seats}
        seat = self._pack.enter(recipe, course.planned)
        kept = None
        if job.resume:
            kept = Checkpoints(
                Path(job.resume), job.resources.save, identity(recipe, ledger.steps, len(course.rows)), ledger.world
            )
        member = _Member(job, report, ledger, course, seat, kept, *rhythm(job, ledger.steps))
        if kept is not None and (path := kept.newest()) is not None:
            with self._alone(member) as run:
                ledger.take_up(*kept.restore(run, path))
                self._put(run, seat)
            seat.step, member.before = ledger.step, ledger.tokens
            ledger.conditions["resumed_at"] = ledger.step
        if kept is not None and kept.refused:
            ledger.conditions["refused_checkpoints"] = list(kept.refused)
        return member

    def _measure(self, job: Job, ledger: Ledger, course: loop.Course) -> None:
        """Counts the bytes and estimates the seconds of a job on a run of its own."""
        device, planned, rows = ledger.device, course.planned, course.rows
        with self._pack.aside():
            neighbours = torch.cuda.memory_allocated() if device == "cuda" else 0
            if device == "cpu":
                ledger.peak, run = probed(job, ledger.shape, planned, rows, ledger.world, device)
            else:
                run = set_up(job, ledger.shape, planned, ledger.world, device)
            if device == "cuda":  # what is there now is the base, and what it had before is the others'
                neighbours -= sum(tensor.untyped_storage().nbytes() for tensor in run.held())
                neighbours += sum(p.untyped_storage().nbytes() for p in run.parameters)
                torch.cuda.reset_peak_memory_stats()
            took = []
            if isinstance(ledger.watch, Estimated):
                # One thread's own seconds are those that it would take alone, whoever else wants the processor now.
                own = device == "cpu" and torch.get_num_threads() == 1
                step_seconds(run, rows, planned, count=WARM)
                took = step_seconds(run, rows, planned, count=SOLO, clock=time.process_time if own else time.perf_counter)
            if device == "cuda":
                ledger.peak = torch.cuda.max_memory_allocated() - max(0, neighbours)
            run.close()
        check_limit(job.limits.peak_bytes, ledger.peak, "peak bytes")
        if isinstance(ledger.watch, Estimated):
            ledger.watch.rate = statistics.fmean(took)
            spread = statistics.stdev(took) / len(took) ** 0.5 if len(took) > 1 else 0.0
            ledger.conditions["seconds_error"] = round(spread / ledger.watch.rate, 4)

    def _after(self, member: _Member, step: pack.Step) -> Outcome | None:
        """Notes a finished step, and does what is due after it; returns the outcome where that was the end."""
        job, ledger, seat = member.job, member.ledger, member.seat
        ledger.seen = ledger.seen.see(step.loss, step.norm)
        ledger.step, ledger.tokens = seat.step, member.before + seat.tokens
        if isinstance(ledger.watch, Counted):
            batch = seat.plan.order[(seat.step - 1) * seat.plan.batch : seat.step * seat.plan.batch]
            ledger.watch.count(member.work(list(batch)))
        else:
            ledger.watch.count(1)
        try:
            if reason := stability.diverged(ledger.seen, step.loss, step.norm):
                raise End("diverged", reason)
            self._due(member)
        except End as end:
            return ledger.outcome(end.ended, end.reason)
        if not seat.done:
            return None
        folder = None
        if job.output:
            with self._alone(member) as run:
                folder = checkpoint.save_adapter(run.inner, job.output, ledger.record(job.recipe))
        return ledger.outcome(folder=folder)

    def _due(self, member: _Member) -> None:
        job, ledger = member.job, member.ledger
        telling = ledger.step % member.every == 0 or ledger.step in member.scored
        leave, due = preemption.noticed(), member.kept is not None and member.kept.due()
        if not (telling or leave or due):
            return
        score = (lambda: self._score(member)) if ledger.step in member.scored else None
        stop = tell(job, member.report, score, ledger) if telling else None
        if not member.seat.done:
            heed(job, stop, leave, due, ledger, (lambda *said: self._write(member, *said)) if member.kept else None)

    def _score(self, member: _Member) -> dict[str, float]:
        with self._pack.only(member.seat):
            return member.course.score(self._pack.model, member.job, member.ledger)

    def _write(self, member: _Member, step: int, said: dict) -> None:
        with self._alone(member) as run:
            member.kept.write(run, step, said)

    @contextmanager
    def _alone(self, member: _Member) -> Iterator[Run]:
        """Yields a run of the job alone with what its seat has learned."""
        with self._pack.aside():
            run = set_up(member.job, member.ledger.shape, member.course.planned, member.ledger.world, member.ledger.device)
            self._fill(run, member.seat)
            try:
                yield run
            finally:
                run.close()

    def _fill(self, run: Run, seat: pack.Seat) -> None:
        weights, first, second = (self._pack.stack.taken(seat.number, seat.recipe.rank, name) for name in
                                  ("weights", "first", "second"))  # fmt: skip
        for parameter, side in _sides(run):
            with torch.no_grad():
                parameter.copy_(side(weights))
            if seat.step:
                run.optimizer.state[parameter] = {
                    "step": torch.tensor(float(seat.step)), "exp_avg": side(first), "exp_avg_sq": side(second),
                }  # fmt: skip
        run.done = seat.step

    def _put(self, run: Run, seat: pack.Seat) -> None:
        def of(value: Callable[[torch.nn.Parameter], torch.Tensor]) -> dict:
            pairs: dict[str, list] = {}
            for parameter, side in _sides(run):
                pairs.setdefault(side.module, [None, None])[side.index] = value(parameter)
            return {module: tuple(pair) for module, pair in pairs.items()}

        state, stack, rank = run.optimizer.state, self._pack.stack, seat.recipe.rank
        stack.put(seat.number, rank, of(lambda parameter: parameter.detach()))
        for array, key in (("first", "exp_avg"), ("second", "exp_avg_sq")):
            stack.put(seat.number, rank, of(lambda parameter, key=key: state[parameter][key]), array)


@dataclass(frozen=True)
class _Side:
    """Which matrix of a pack's pairs a parameter of PEFT's is: of which module, 0 for A and 1 for B."""

    module: str
    index: int

    def __call__(self, pairs: dict) -> torch.Tensor:
        return pairs[self.module][self.index]


def _sides(run: Run) -> Iterator[tuple[torch.nn.Parameter, _Side]]:
    for name, parameter in run.trained():
        module, _, rest = name.removeprefix("base_model.model.").rpartition(".lora_")
        yield parameter, _Side(module, "AB".index(rest[0]))
