"""Jobs trained together come to what each comes to alone, on the record too."""

from __future__ import annotations

import time

import pytest

from training import host, loop, measure, preemption, warm
from training.beside import key_of
from training.errors import InputError
from training.recipe import DataConfig, EvaluationConfig, Job, Limits, Outcome, Recipe, Resources

DATA = DataConfig(
    train="embedded:train.jsonl", validation="embedded:validation.jsonl", test="embedded:test.jsonl", limit=200,
    template="{instruction}\nAnswer:",
)  # fmt: skip
KINDS = (
    {"rank": 4, "learning_rate": 2e-3, "seed": 1},
    {"rank": 16, "alpha": 32.0, "batch_size": 3, "seed": 2},
    {"rank": 8, "adapter": "rslora", "batch_size": 1, "steps": 5, "seed": 3},
    {"rank": 2, "lora_plus_ratio": 4.0, "weight_decay": 0.1, "seed": 4},
    {"rank": 24, "learning_rate": 5e-4, "steps": 6, "seed": 5},
)


@pytest.fixture(autouse=True)
def keeping():
    with warm.keeping():
        yield
    preemption.forget()


def job(folder, name: str = "", *, peak: int | None = None, save: float = 3600, timing: str = "counted", **fields) -> Job:
    given = {"model": "embedded", "max_length": 64, "steps": 8, "batch_size": 2, "learning_rate": 1e-3, "dropout": 0.0} | fields
    return Job(
        recipe=Recipe(**given), data=DATA, cache=str(folder / "cache"), limits=Limits(peak_bytes=peak),
        resources=Resources(save=save),
        evaluation=EvaluationConfig(rows=12, test_rows=12, reports=2, timing=timing),
        output=str(folder / "out" / name) if name else None, resume=str(folder / "resume" / name) if name else None,
    )  # fmt: skip


def together(jobs: list[Job], seats: int, report=lambda number, progress: None) -> list[Outcome]:
    """Trains jobs, each entering as soon as a seat is free."""
    table, waiting, done = host.Host(seats), list(enumerate(jobs)), {}
    while waiting or table.names:
        while waiting and table.free:
            number, one = waiting.pop(0)
            ended = table.enter(str(number), one, lambda progress, number=number: report(number, progress))
            done |= {number: ended} if ended else {}
        done |= {int(name): outcome for name, outcome in table.tick()}
    table.close()
    return [done[number] for number in range(len(jobs))]


def same(one: Outcome, other: Outcome) -> None:
    assert (one.ended, one.share, one.tokens, one.trainable) == (other.ended, other.share, other.tokens, other.trainable)
    assert one.peak_bytes == other.peak_bytes and one.seconds == pytest.approx(other.seconds)
    assert one.loss == pytest.approx(other.loss, rel=1e-3)  # fp32: Adam turns rounding into steps


def test_jobs_together_come_to_what_each_comes_to_alone(tmp_path):
    reports: dict[int, list] = {}
    jobs = [job(tmp_path, **kind) for kind in KINDS]
    found = together(jobs, 3, lambda number, progress: reports.setdefault(number, []).append((progress.step, progress.share)))
    for number, (one, packed) in enumerate(zip(jobs, found, strict=True)):
        seen = []
        same(packed, loop.train(one, lambda progress, seen=seen: seen.append((progress.step, progress.share))))
        assert reports[number] == seen
        assert packed.conditions["seats"] == 3 and packed.conditions["right"]


def test_what_was_trained_loads_in_peft_and_scores_the_same(tmp_path):
    jobs = [job(tmp_path, f"{number}", **kind) for number, kind in enumerate(KINDS[:3])]
    for one, outcome in zip(jobs, together(jobs, 3), strict=True):
        assert outcome.checkpoint == one.output
        swapped = one.data.model_copy(update={"test": one.data.validation, "validation": one.data.test})
        on_validation = one.model_copy(update={"data": swapped})
        entry = {"who": "it", "recipe": one.recipe.model_dump(mode="json"), "checkpoint": outcome.checkpoint}
        (found,) = measure.judge([entry], on_validation.model_dump(mode="json"))["models"]
        assert sum(found["nll"]) / sum(found["tokens"]) == pytest.approx(outcome.loss, rel=1e-4)
        assert sum(found["right"]) / len(found["right"]) == pytest.approx(outcome.scores["accuracy"])


@pytest.mark.parametrize("again", ["together", "alone"])
def test_a_process_that_is_told_to_leave_lets_every_job_go_on_elsewhere(tmp_path, again):
    jobs = [job(tmp_path, f"{number}", **kind) for number, kind in enumerate(KINDS[:3])]

    def leave(number, progress):
        if progress.step >= 3:
            preemption.notice()

    paused = together(jobs, 3, leave)
    preemption.forget()
    assert [outcome.ended for outcome in paused] == ["paused"] * 3
    done = together(jobs, 3) if again == "together" else [loop.train(one) for one in jobs]
    for one, before, after in zip(jobs, paused, done, strict=True):
        assert 0 < after.conditions["resumed_at"] == round(before.share * one.recipe.steps)
        same(after, loop.train(one.model_copy(update={"resume": None, "output": None})))


def test_a_run_that_began_alone_goes_on_beside_others(tmp_path):
    one = job(tmp_path, "it", save=0)
    loop.train(one, lambda progress: "enough" if progress.step >= 4 else None)
    packed, _ = together([one, job(tmp_path, **KINDS[1])], 2)
    assert packed.conditions["resumed_at"] >= 2
    same(packed, loop.train(one.model_copy(update={"resume": None, "output": None})))


def test_a_stopped_job_leaves_at_once_and_the_next_has_its_seat(tmp_path):
    table, steps = host.Host(2), {"a": [], "b": [], "c": []}

    def reporter(name):
        return lambda progress: steps[name].append(progress.step) or ("behind" if name == "a" else None)

    assert table.enter("a", job(tmp_path), reporter("a")) is None and table.enter("b", job(tmp_path), reporter("b")) is None
    ended = list(table.tick())
    assert [(name, outcome.ended, outcome.reason) for name, outcome in ended] == [("a", "stopped", "behind")]
    assert table.names == ["b"] and table.free == 1
    assert table.enter("c", job(tmp_path, **KINDS[1]), reporter("c")) is None
    list(table.tick())
    assert (steps["a"], steps["b"], steps["c"]) == ([1], [1, 2], [1])


def test_one_that_diverges_ends_and_hurts_nobody(tmp_path):
    wild = {"learning_rate": 1e4, "weight_decay": 10.0, "clip": 1e9, "steps": 40}
    sound, diverged = together([job(tmp_path), job(tmp_path, **wild)], 2)
    assert diverged.ended == "diverged" and diverged.reason and diverged.share < 1
    same(sound, loop.train(job(tmp_path)))


def test_one_that_does_not_fit_never_takes_a_seat(tmp_path):
    small, large = job(tmp_path, rank=2), job(tmp_path, rank=64, peak=1_000)
    fits, does_not = together([small, large], 1)
    assert fits.ended == "complete" and does_not.ended == "infeasible" and "1,000" in does_not.reason
    assert does_not.peak_bytes == loop.train(large).peak_bytes


def test_a_users_mistake_is_told_and_the_others_go_on(tmp_path):
    table = host.Host(2)
    table.enter("sound", job(tmp_path), lambda progress: None)
    with pytest.raises(InputError, match="no linear module"):
        table.enter("wrong", job(tmp_path, targets=("nowhere",)), lambda progress: None)
    assert table.names == ["sound"] and table.free == 1


def test_what_each_was_billed_sums_to_the_wall_clock(tmp_path):
    jobs = [job(tmp_path, timing="measured", **kind) for kind in KINDS]
    warm.rows_of(jobs[0])
    since = time.perf_counter()
    found = together(jobs, 3)
    wall = time.perf_counter() - since
    assert sum(outcome.conditions["billed_seconds"] for outcome in found) == pytest.approx(wall, rel=0.03)
    assert all(0 < outcome.seconds < wall and "seconds_error" in outcome.conditions for outcome in found)


def test_only_jobs_with_the_same_base_and_rows_sit_together(tmp_path):
    one = job(tmp_path)
    for changes in ({"rank": 64}, {"alpha": 1.0, "dropout": 0.5}, {"batch_size": 7, "seed": 9}, {"adapter": "rslora"}):
        assert key_of(job(tmp_path, **changes)) == key_of(one)
    for changes in ({"bits": 4}, {"targets": "mlp"}, {"gradient_checkpointing": True}, {"max_length": 32}):
        assert key_of(job(tmp_path, **changes)) not in (None, key_of(one))
    for changes in ({"adapter": "dora"}, {"optimizer": "adamw_8bit"}, {"bits": 8}, {"packing": "off"}):
        assert key_of(job(tmp_path, **changes)) is None
    assert key_of(one.model_copy(update={"interventions": True})) is None
