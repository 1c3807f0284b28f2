"""Studies on a virtual clock are those of the real loop, with any number of slots."""

from __future__ import annotations

import pytest
from contracts import searching, simulated

from hpo import pareto
from hpo.local import run_search
from hpo.simulator import Course, closed_form, simulate
from hpo.spec import load
from hpo.store import Store
from training import simulate as training
from training.recipe import Outcome, Progress


def told(trials) -> list[tuple]:
    return [(t.number, t.params, t.state, t.origin, t.outcome and t.outcome.model_dump(), t.error) for t in trials]


@pytest.mark.parametrize("rule", ["none", "front", "asha", "fixed"])
def test_a_simulated_study_is_the_one_that_runs_in_this_process(rule):
    written = simulated("/x", budget={"trials": 25}, stopping=rule, evaluation={"reports": 10})
    spec = load(written).spec
    store = Store("sqlite://")
    with searching(store, written) as search:
        run_search(search, training.train, spec.data)
        real, order = search.trials, store.journal(search.study.id)
    made = simulate(spec, closed_form(spec, training.train))
    assert told(made.trials) == told(real) == told(store.trials(1))
    assert made.search.store.journal(1) == order
    assert any(t.state == "stopped" for t in real) == (rule != "none")
    store.close()


def test_stopped_trials_keep_what_they_came_to_and_are_on_no_front():
    spec = load(simulated("/x", budget={"trials": 40}, stopping="front", evaluation={"reports": 10})).spec
    made = simulate(spec, closed_form(spec, training.train), slots=3)
    stopped = [t for t in made.trials if t.state == "stopped"]
    assert stopped and all(0.05 <= t.outcome.share < 1 and t.outcome.seconds > 0 and t.error for t in stopped)
    assert not {t.number for t in stopped} & {t.number for t in pareto.front(made.trials, spec.targets)}
    whole = simulate(load(simulated("/x", budget={"trials": 40}, evaluation={"reports": 10})).spec,
                     closed_form(spec, training.train), slots=3)  # fmt: skip
    assert made.cost < whole.cost / 1.5


def test_slots_work_side_by_side_and_the_clock_says_how_long_it_took():
    spec = load(simulated("/x", budget={"trials": 9})).spec
    course = Course([Progress(step=1, steps=1, tokens=1, share=1.0, seconds=10.0, metrics={"accuracy": 0.5})],
                    Outcome(scores={"accuracy": 0.5}, seconds=10.0, peak_bytes=1), pause=2.0)  # fmt: skip
    made = simulate(spec, lambda trial: course, slots=4)
    assert (made.seconds, made.busy, made.cost) == (36.0, 108.0, 90.0)
    assert [t.started for t in made.trials] == [0.0] * 4 + [12.0] * 4 + [24.0]
    assert made.trials[-1].finished == 36.0
    hours = load(simulated("/x", budget={"trials": 9, "hours": 20 / 3600})).spec
    assert [t.state for t in simulate(hours, lambda trial: course, slots=4).trials] == ["complete"] * 4 + ["complete"] * 4


def test_a_refused_point_costs_nothing_and_a_wall_teaches():
    from hpo.gate import Verdict

    def judge(params, recipe):
        return Verdict(recipe, 10, "too big" if params.get("batch_size") == 16 else None)

    spec = load(simulated("/x", budget={"trials": 12})).spec
    made = simulate(spec, closed_form(spec, training.train), judge=judge)
    refused = [t for t in made.trials if not t.attempts]
    assert refused and all(t.state == "infeasible" and t.outcome.peak_bytes == 10 for t in refused)
    assert len(made.trials) - len(refused) == 12
