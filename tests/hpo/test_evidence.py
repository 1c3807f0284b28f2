"""Training again within the allowance: in whole studies, interrupted ones too."""

from __future__ import annotations

import pytest
from contracts import simulated

import hpo
from hpo import certify, evidence
from hpo.entry import snapshot
from hpo.spec import load
from training import again, simulate
from training.recipe import Job, Outcome


def study(tmp_path, **changes):
    return simulated(tmp_path, **({"budget": {"trials": 7}, "objectives": ["accuracy", "seconds"]} | changes))


def test_what_is_trained_again_stays_within_the_allowance_and_is_on_the_certificate(tmp_path):
    done = hpo.run(study(tmp_path, certify={"extra": 1.0}))
    made = done.certificate
    assert made.reruns and made.allowed == pytest.approx(sum(t.outcome.seconds for t in done.history()))
    assert sum(r.seconds for r in made.reruns) <= made.allowed
    assert {r.number for r in made.reruns} >= {made.winner}
    seeds = {n: sorted(r.seed for r in made.reruns if r.number == n) for n in {r.number for r in made.reruns}}
    assert all(found == list(range(1, len(found) + 1)) and len(found) >= 2 for found in seeds.values())
    assert made.verdict.kind in ("winner", "tie", "beaten")
    assert made.optimism.seeds == len(seeds[made.winner])
    assert any("Optimism of the search" in said for said in made.said) and any("Trained again with" in said for said in made.said)


def test_the_default_allowance_of_a_short_study_buys_nothing_and_says_so(tmp_path):
    made = hpo.run(study(tmp_path, budget={"trials": 2})).certificate
    assert made.reruns == () and made.verdict is None
    assert any("15% of the search's training" in said and "too little" in said for said in made.said)


def test_without_an_allowance_nothing_is_trained_again(tmp_path):
    made = hpo.run(study(tmp_path, certify={"extra": 0})).certificate
    assert (made.reruns, made.said) == ((), ())


def test_an_interrupted_certification_goes_on_where_it_was(tmp_path):
    trained, first = [], [True]

    def train(job: Job, report) -> Outcome:
        if job.recipe.seed and first[0] and len(trained) == 3:
            first[0] = False
            raise KeyboardInterrupt
        if job.recipe.seed:
            trained.append((job.recipe.rank, job.recipe.learning_rate, job.recipe.seed))
        return simulate.train(job, report)

    written = study(tmp_path, certify={"extra": 1.0})
    with pytest.raises(KeyboardInterrupt):
        hpo.run(written, train=train)
    assert len(trained) == 3
    made = hpo.run(written, train=train).certificate
    assert len(trained) == len(set(trained)) == len(made.reruns) > 3


def test_a_rival_that_is_surely_better_with_other_seeds_becomes_the_winner(tmp_path):
    # The chosen one had a lucky seed; with any other it is far behind, and the rival is not.
    written = study(tmp_path, certify={"extra": 3.0, "rivals": 1}, budget={"trials": 6})

    def train(job: Job, report) -> Outcome:
        lucky = job.recipe.rank == 32 and job.recipe.seed == 0
        accuracy = 0.9 if lucky else 0.2 if job.recipe.rank == 32 else 0.8
        return Outcome(scores={"accuracy": accuracy + 1e-3 * job.recipe.seed}, seconds=2.0 if job.recipe.rank == 32 else 1.0,
                       peak_bytes=1, loss=1.0)  # fmt: skip

    done = hpo.run(written | {"space": {"rank": {"type": "choice", "values": [4, 32]}}}, train=train)
    made = done.certificate
    assert made.winner == next(t.number for t in done.history() if t.recipe.rank != 32)
    assert "with other seeds trial" in made.reason and "is better than trial" in made.reason
    assert made.verdict.kind == "winner"


def test_a_seed_that_diverges_is_told(tmp_path):
    def train(job: Job, report) -> Outcome:
        if job.recipe.seed == 1:
            return Outcome(ended="diverged", reason="the loss became inf", share=0.5, seconds=1.0)
        return simulate.train(job, report)

    made = hpo.run(study(tmp_path, certify={"extra": 2.0}), train=train).certificate
    assert made.verdict.kind == "open" and made.winner in made.verdict.failed
    assert any("diverged with seed 1" in said for said in made.said)


def test_another_rule_than_the_best_score_has_no_rivals(tmp_path):
    made = hpo.run(study(tmp_path, certify={"extra": 1.0}, choose={"by": "knee"})).certificate
    assert made.verdict is None and made.optimism is not None
    assert {r.number for r in made.reruns} == {made.winner}


def test_the_start_of_a_fresh_group_counts_where_every_training_needs_one(tmp_path):
    spec = load(study(tmp_path, certify={"extra": 0.5})).spec
    trials = hpo.run(study(tmp_path)).history()
    winner = certify.choose(trials, spec.targets)[0]
    alone, together = (len(evidence.plan(spec, trials, winner, spec.data, start=s).jobs) for s in (evidence.START, 0.0))
    assert alone < together


def test_what_was_kept_of_another_job_is_not_taken_for_this_one(tmp_path):
    job = Job.model_validate({"recipe": {}, "data": {"train": "embedded:train.jsonl"}, "output": str(tmp_path / "a")})
    again.keep(job, {"ended": "complete", "seconds": 1.0})
    assert again.kept(job) == {"ended": "complete", "seconds": 1.0}
    assert again.kept(job.model_copy(update={"recipe": job.recipe.model_copy(update={"rank": 3})})) is None


def test_the_loop_trains_again_and_compares_in_one_call_and_never_twice(tmp_path, monkeypatch):
    written = {
        "name": "real", "storage": str(tmp_path), "data": {"train": "embedded:train.jsonl", "limit": 32},
        "space": {"rank": [4, 8]}, "recipe": {"max_length": 128, "steps": 2}, "evaluation": {"rows": 8, "test_rows": 8},
        "budget": {"trials": 1}, "resources": {"mode": "local"}, "objectives": ["loss"], "algorithm": "random",
        "certify": {"extra": 10, "seeds": 2},
    }  # fmt: skip
    names, in_turn = [], again.in_turn

    def seen(calls):
        names.append([name for name, _ in calls])
        return in_turn(calls)

    monkeypatch.setattr(again, "in_turn", seen)
    done = hpo.run(written)
    made = done.certificate
    assert names == [["training.again.rerun", "training.measure.compare"]]
    assert [(r.number, r.seed, r.ended) for r in made.reruns] == [(0, 1, "complete"), (0, 2, "complete")]
    assert made.reruns[0].score != made.reruns[1].score, "other seeds train other models"
    assert (made.optimism.rows, made.optimism.seeds) == (8, 2)
    assert not list((tmp_path / "real/certify").glob("*/adapter_model.safetensors"))
    monkeypatch.setattr("training.loop.train", lambda *_: pytest.fail("trained twice"))
    planned = evidence.plan(done.spec, done.history(), done.winner(), snapshot(done.spec, done.record.digest), start=0)
    (_, arguments), = planned.calls
    assert [one["ended"] for one in again.rerun(**arguments)] == ["complete"] * 2
