"""The page and its figures: complete, true to the trials, escaped, and without any network."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from random import Random

import pytest

from hpo import figures as drawing
from hpo import report
from hpo.certificate import Certificate, Interval, Measured, Scored, SideBySide
from hpo.figures import View, figures
from hpo.objectives import named
from hpo.pareto import eligible, front
from hpo.report import render, write
from hpo.space import Space
from hpo.trial import CurvePoint, Trial
from training.recipe import Outcome, Recipe

SPACE = Space.model_validate(
    {
        "rank": {"type": "choice", "values": [4, 8, 16, 32, 64]},
        "alpha": {"type": "choice", "values": [1, 2, 4], "times": "rank"},
        "learning_rate": {"type": "float", "low": 1e-5, "high": 1e-2, "log": True},
        "batch_size": {"type": "choice", "values": [4, 8, 16, 32]},
        "targets": {"type": "choice", "values": ["all-linear", "attention", "mlp"]},
        "bits": {"type": "choice", "values": [32, 4]},
        "gradient_checkpointing": {"type": "choice", "values": [False, True], "when": {"bits": 32}},
    }
)
OBJECTIVES = named(["accuracy", "seconds", "peak_bytes"])
ENDS = {4: "infeasible", 7: "diverged", 9: "failed", 12: "infeasible", 13: "stopped", 17: "running"}
CAUSES = {
    "infeasible": "peak_bytes: predicted 2,113 MB is above the limit of 1,600 MB. Allow 4 bits or smaller batches.",
    "diverged": "loss became NaN at step 34 of 120",
    "failed": "worker died twice: exit code 137 (killed for memory by the system)",
    "stopped": "dominated at half of its length by trials 2 and 6",
}


def study(objectives=OBJECTIVES, count=18, name="support-tickets") -> View:
    """Returns a study as it could have been: some trials end badly, the rest have outcomes that fit their recipes."""
    rng = Random(3)
    first = {"rank": 16, "alpha": 2, "learning_rate": 2e-4, "batch_size": 8, "targets": "all-linear", "bits": 32}
    trials = []
    clock = 1_760_000_000.0
    for number in range(count):
        params = first | {"gradient_checkpointing": False} if number == 0 else SPACE.sample(rng)
        state = ENDS.get(number, "complete")
        origin = "defaults" if number == 0 else "nsga2"
        trial = Trial(number=number, params=params, recipe=SPACE.resolve(params, Recipe()), state=state, origin=origin)
        started, clock = clock, clock + rng.uniform(55, 120)
        outcome, curve = _train(trial, rng)
        error = CAUSES["failed"] if state == "failed" else None
        more = {"started": started, "finished": None if state == "running" else clock, "error": error}
        attempts = 3 if state == "failed" else 1
        trials.append(trial.model_copy(update=more | {"outcome": outcome, "curve": curve, "attempts": attempts}))
    best = front(trials, objectives)
    return View(
        name=name,
        description="Sorts support tickets into five queues. LoRA on the embedded model.",
        objectives=tuple(objectives),
        space=SPACE,
        trials=trials,
        front=best,
        certificate=_certificate(best, rng) if best else None,
        settings={
            "algorithm": "nsga2 (population 8)",
            "seed": "0",
            "budget": "18 trials, 2 at a time",
            "limits": "peak memory 1,600 MB",
            "model": "embedded",
            "data": "embedded:train.jsonl, 2,000 training, 400 validation and 400 test rows",
        },
    )


def _train(trial: Trial, rng: Random):
    recipe, state = trial.recipe, trial.state
    place = math.log10(recipe.learning_rate)
    accuracy = 0.86 - 0.11 * (place + 2.9) ** 2 + 0.02 * math.log2(recipe.rank / 4) / 4 + rng.gauss(0, 0.012)
    accuracy += {"all-linear": 0.03, "attention": 0.0, "mlp": 0.01}[recipe.targets] - 0.015 * (recipe.bits == 4)
    accuracy = round(400 * min(max(accuracy, 0.22), 0.98)) / 400
    slow = 1 + 0.35 * (recipe.bits == 4) + 0.3 * recipe.gradient_checkpointing
    seconds = (28 + 90 / recipe.batch_size) * slow * rng.uniform(0.97, 1.05)
    size = 260 + 46 * recipe.batch_size * (0.4 if recipe.gradient_checkpointing else 1)
    size *= 0.6 if recipe.bits == 4 else 1
    conditions = {
        "validation_rows": 400,
        "device": "cpu",
        "workers": 1,
        "versions": {"torch": "2.10.0", "peft": "0.19.1"},
        "right": "".join("1" if rng.random() < accuracy else "0" for _ in range(400)),
        "slow_down": round(rng.uniform(1.3, 1.5), 2),
    }
    done = {"stopped": 0.5, "diverged": 0.5, "running": 0.25, "infeasible": 0, "failed": 0}.get(state, 1.0)
    curve = []
    for quarter in range(1, int(4 * done) + 1):
        share = quarter / 4
        near = 0.2 + (accuracy - 0.2) * (1 - math.exp(-3.2 * share)) / (1 - math.exp(-3.2))
        bad = state == "diverged" and quarter == 2
        metrics = {"accuracy": 0.2 if bad else near, "loss": 97.0 if bad else 2.4 - 2.2 * near + rng.gauss(0, 0.02)}
        point = {"share": share, "step": 30 * quarter, "tokens": 24_000 * quarter, "seconds": seconds * share}
        curve.append(CurvePoint(**point, metrics=metrics))
    if state in ("running", "failed"):
        return None, tuple(curve)
    if state == "infeasible":
        return Outcome(ended=state, reason=CAUSES[state], share=0.0), ()
    if state == "diverged":
        return Outcome(ended=state, reason=CAUSES[state], share=0.5, conditions=conditions), tuple(curve)
    outcome = Outcome(
        ended=state,
        reason=CAUSES.get(state, ""),
        share=done,
        scores={"accuracy": curve[-1].metrics["accuracy"]},
        loss=max(curve[-1].metrics["loss"], 0.1),
        seconds=seconds * done,
        peak_bytes=int(size * 1e6),
        tokens=int(96_000 * done),
        trainable=12_288 * recipe.rank,
        conditions=conditions,
    )
    return outcome, tuple(curve)


def _certificate(best: list[Trial], rng: Random) -> Certificate:
    def measured(trial: Trial) -> Measured:
        alone = trial.outcome.seconds / rng.uniform(1.3, 1.5)
        ends = {"low": alone * rng.uniform(0.94, 0.98), "high": alone * rng.uniform(1.02, 1.07)}
        own = {"peak_bytes": trial.outcome.peak_bytes, "in_study": trial.outcome.seconds}
        return Measured(seconds=alone, **ends, repeats=3, **own)

    queues = ["billing", "delivery", "returns", "account", "other"]
    texts = [
        "I was charged twice for order {}.",
        "Parcel {} has not arrived.\nIt is a week late.",
        "Send {} back, how?",
    ]
    rows = []
    for i in range(26):
        right, wrong = queues[i % 5], queues[(i + 2) % 5]
        before, after = (i % 4 != 1), (i % 9 != 0)
        defaults, winner = (right if before else wrong), (right if after else wrong)
        prompt = texts[i % 3].format(1000 + 37 * i)
        rows.append(SideBySide(prompt=prompt, expected=right, untuned="the the of", defaults=defaults, winner=winner))

    def scored(who: str, number: int | None, accuracy: tuple, loss: float) -> Scored:
        value, low, high = accuracy
        return Scored(who=who, number=number, rows=400, accuracy=Interval(value=value, low=low, high=high), loss=loss)

    winner = best[0].number
    return Certificate(
        winner=winner,
        reason=f"the best validation accuracy; no rival ties with it over 5 seeds ({len(best)} on the front)",
        measured={trial.number: measured(trial) for trial in best},
        scores=(
            scored("untuned", None, (0.2025, 0.165, 0.243), 4.871),
            scored("defaults", 0, (0.8, 0.76, 0.838), 0.712),
            scored("winner", winner, (0.8725, 0.838, 0.903), 0.471),
        ),
        gain=Interval(value=0.0725, low=0.0375, high=0.1075),
        rows=tuple(rows),
        machine={"device": "cpu", "cores": 2, "memory_gb": 7.8, "versions": {"python": "3.11.7", "ray": "2.56.0"}},
        made=1_760_003_000.0,
    )


class Page(HTMLParser):
    """Reads a page: open elements, loads, text, and what stands in scripts."""

    VOID = {"meta", "link", "br", "img", "input", "hr"}

    def __init__(self, html: str):
        super().__init__()
        self.open, self.loads, self.scripts, self.cells, self.text = [], [], [], set(), ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.loads += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        self.scripts += [""] if tag == "script" else []
        self.open += [tag] if tag not in self.VOID else []

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, (tag, self.open)
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        else:
            self.cells |= {data} if self.open and self.open[-1] == "td" else set()
            self.text += data


@pytest.fixture(scope="module")
def view() -> View:
    return study()


@pytest.fixture(scope="module")
def page(view) -> Page:
    return Page(render(view))


@pytest.fixture(scope="module")
def drawn(view) -> dict:
    return figures(view)


@pytest.fixture
def quick(monkeypatch):
    """Leaves out plotly.js and most of the resampling, which are the same in every page."""
    monkeypatch.setattr("plotly.offline.get_plotlyjs", lambda: "plotly")
    monkeypatch.setattr(sys.modules["hpo.importance"], "RESAMPLES", 2)


def trace(figure, name: str):
    return next(trace for trace in figure.data if trace.name == name)


def shown(html: str) -> str:
    """Returns the text of a page without plotly, with plain spaces."""
    return " ".join(Page(html).text.split())


def test_page_is_one_balanced_document_that_loads_nothing(page):
    assert page.open == []
    assert page.loads == []
    assert sum(len(script) > 1_000_000 for script in page.scripts) == 1


def test_page_forbids_every_load(view, quick):
    assert "content=\"default-src 'none'; script-src 'unsafe-inline'" in render(replace(view, trials=(), front=()))


def test_page_names_every_member_of_the_front_and_every_cause(view, page):
    for trial in view.front:
        assert str(trial.number) in page.cells
    for cause in CAUSES.values():
        assert cause in page.text
    assert "18 trials: 12 complete, 1 stopped, 2 infeasible, 1 diverged, 1 failed, 1 running." in page.text
    assert "validation accuracy (%)" in page.text and "peak memory (MB)" in page.text


def test_hostile_text_stays_text(quick):
    bad = "<script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 7 }}"
    view = study(named([bad, "seconds"]), name=bad)
    choices = Space.model_validate(SPACE.model_dump() | {"targets": {"type": "choice", "values": [bad, "mlp"]}})
    trials = []
    for trial in view.trials:
        scores = {bad: 0.1 + 0.01 * trial.number}
        trials.append(
            trial.model_copy(
                update={
                    "params": trial.params | {"targets": bad if trial.number % 2 else "mlp"},
                    "recipe": trial.recipe.model_copy(update={"targets": bad}),
                    "error": bad,
                    "outcome": trial.outcome and trial.outcome.model_copy(update={"scores": scores}),
                    "curve": tuple(point.model_copy(update={"metrics": {bad: 0.5}}) for point in trial.curve),
                }
            )
        )
    row = SideBySide(prompt=bad, expected=bad, untuned=bad, defaults=bad, winner="x")
    best = front(trials, view.objectives)
    told = {"rows": (row,), "reason": bad, "machine": {bad: bad}}
    certificate = _certificate(best, Random(0)).model_copy(update=told)
    hostile = replace(
        view, description=bad, space=choices, trials=trials, front=best, certificate=certificate, settings={bad: bad}
    )
    drawn = figures(hostile)
    assert {"front", "trials", "parallel", "importance", "curves", "scores"} <= set(drawn)
    assert all("<script" not in figure.to_json() and "<img" not in figure.to_json() for figure in drawn.values())
    page = Page(render(hostile))
    assert page.open == [] and page.loads == []
    assert len(page.scripts) == 1 + len(drawn)
    assert page.text.count(bad) > 10


def test_front_figures_have_the_points_of_the_front_and_no_value_of_other_states(view, drawn):
    values = {trial.number: (trial.outcome.seconds, 100 * trial.outcome.scores["accuracy"]) for trial in view.front}
    points = trace(drawn["front"], "front")
    assert sorted(zip(points.x, points.y, strict=True)) == sorted(values.values())
    others = trace(drawn["front"], "other complete trials")
    assert len(points.x) + len(others.x) == sum(map(eligible, view.trials)) == 12
    assert {"front", "front_accuracy_peak_bytes", "front_seconds_peak_bytes"} <= set(drawn)
    assert trace(drawn["front_accuracy_peak_bytes"], "front").x[0] in {t.outcome.peak_bytes / 1e6 for t in view.front}
    assert list(trace(drawn["front"], f"winner (trial {view.certificate.winner})").y) == [max(points.y)]


def test_error_bars_are_those_of_rows_and_timings(view, drawn):
    figure = drawn["front"]
    points = trace(figure, "front")
    p = points.y[0] / 100
    assert points.error_y.array[0] == pytest.approx(196 * math.sqrt(p * (1 - p) / 400))
    ends = sorted(m.high - m.seconds for m in view.certificate.measured.values())
    assert sorted(points.error_x.array) == pytest.approx(ends)


def test_trials_figure_has_values_of_complete_trials_only_and_a_monotone_best(view, drawn):
    figure = drawn["trials"]
    assert list(trace(figure, "complete").x) == [t.number for t in view.trials if eligible(t)]
    assert list(trace(figure, "infeasible").x) == [4, 12]
    assert set(trace(figure, "infeasible").y) == {"infeasible"}
    best = list(trace(figure, "best so far").y)
    assert best == sorted(best) and best[-1] == max(trace(figure, "complete").y)
    symbols = {trace(figure, state).marker.symbol for state in set(ENDS.values()) | {"complete"}}
    assert len(symbols) == len(set(ENDS.values())) + 1


def test_parallel_figure_draws_each_complete_trial_once_and_leaves_gaps_for_missing_dimensions(view, drawn):
    figure = drawn["parallel"]
    lines = [trace for trace in figure.data if trace.name != "winner"]
    ends = [i for line in lines for i, x in enumerate(line.x) if x is None]
    assert len(ends) == 12
    column = list(SPACE).index("gradient_checkpointing")
    places = [y for line in lines for x, y in zip(line.x, line.y, strict=True) if x == column]
    assert places.count(None) == sum(eligible(t) and t.params["bits"] == 4 for t in view.trials)
    assert all(0 <= y <= 1 for line in lines for y in line.y if y is not None)


@pytest.mark.parametrize(
    ("gain", "said", "unsaid"),
    [
        ((0.07, 0.03, 0.11), "a gain of +7.0 percentage points over the defaults (95 % interval +3.0 to +11.0)", "tie"),
        ((0.01, -0.02, 0.04), "a tie with the defaults: the difference is +1.0", "gain"),
        ((0.01, 0.0, 0.02), "a tie with the defaults", "gain"),
        ((-0.05, -0.08, -0.02), "a loss against the defaults of −5.0 percentage points", "gain"),
        (None, "The gain over the defaults was not measured.", "tie"),
    ],
)
def test_summary_claims_no_more_than_the_interval(view, gain, said, unsaid):
    interval = gain and Interval(**dict(zip(("value", "low", "high"), gain, strict=True)))
    certificate = view.certificate.model_copy(update={"gain": interval, "reason": "the best score"})
    summary = " ".join(report._summary(replace(view, certificate=certificate)))
    assert said in summary
    assert f"That is a {unsaid}" not in summary


def test_rows_that_the_winner_lost_come_first(view):
    answers = report._answers(view)
    kinds = [(before, after) for _, [_, (_, before), (_, after)] in answers["lines"]]
    assert kinds[: answers["lost"]] == [(True, False)] * answers["lost"] and answers["lost"] == 2
    assert kinds[2 : 2 + answers["won"]] == [(False, True)] * answers["won"]
    assert len(kinds) == 20 and answers["rows"] == 26


def test_rows_without_defaults_are_compared_with_the_untuned_model(view):
    rows = (SideBySide(prompt="p", expected="a", untuned="a", defaults=None, winner="b"),)
    answers = report._answers(replace(view, certificate=view.certificate.model_copy(update={"rows": rows})))
    assert (answers["lost"], answers["against"]) == (1, "untuned model")


def test_study_without_trials_says_so(quick):
    empty = study(count=0)
    assert figures(empty) == {}
    text = shown(render(empty))
    for sentence in ("There is no front", "No trial has started.", "No trial reported a curve.", "0 trials."):
        assert sentence in text


def test_study_without_a_complete_trial_says_so(view, quick):
    trials = [trial for trial in view.trials if not eligible(trial)]
    poor = replace(view, trials=trials, front=[], certificate=None)
    assert set(figures(poor)) == {"trials", "curves"}
    assert "Too few trials: 0 complete ones with a value, and 8 are needed." in shown(render(poor))


def test_study_without_certificate_claims_no_winner(view, quick):
    text = shown(render(replace(view, certificate=None)))
    assert "Nothing is certified yet" in text and "The winner is" not in text and "★" not in text


def test_one_objective_has_no_scatter(quick):
    single = study(named(["accuracy"]))
    assert not any(name.startswith("front") for name in figures(single))
    assert "With one objective the front is the best trial" in shown(render(single))


def test_trials_without_curves_and_with_points_outside_the_space_are_shown(view, quick):
    trials = [trial.model_copy(update={"curve": (), "params": {}}) for trial in view.trials]
    bare = replace(view, trials=trials, front=front(trials, view.objectives))
    assert set(figures(bare)) >= {"front", "trials", "scores"}
    assert "No trial reported a curve." in shown(render(bare))


def test_single_complete_trial_and_defaults_as_winner(quick):
    one = replace(study(count=1), settings={})
    assert {"front", "trials", "parallel"} <= set(figures(one))
    text = shown(render(one))
    assert "The winner is trial 0, the defaults themselves." in text and "over the defaults" not in text


def test_machine_names_conditions_once_with_their_range_and_leaves_out_single_rows(view):
    told = dict(report._machine(view))
    assert told["device"] == "cpu" and told["versions.torch"] == "2.10.0" and told["versions.ray"] == "2.56.0"
    low, high = map(float, told["slow_down"].split(" to "))
    assert 1.3 <= low < high <= 1.5
    assert "right" not in told and max(map(len, told.values())) < 40


@pytest.mark.parametrize(
    ("value", "log", "text"),
    [(2e-4, True, "2.0e-04"), (0.01, True, "1.0e-02"), (0.05, False, "0.05"), (0.0, True, "0"), (32.0, False, "32")]
    + [(None, False, "–"), (True, False, "yes"), (("q", "v"), False, "q, v"), (4, False, "4")],
)
def test_settings_are_written_compactly(value, log, text):
    assert drawing.plain(value, log) == text


@pytest.mark.parametrize(
    ("name", "outcome", "text"),
    [
        ("peak_bytes", {"peak_bytes": 812_345_678}, "812 MB"),
        ("peak_bytes", {"peak_bytes": 81_234_567_890}, "81.2 GB"),
        ("seconds", {"seconds": 42.345}, "42.3 s"),
        ("seconds", {"seconds": 7200.0}, "120 min"),
        ("loss", {"loss": 1.23456}, "1.235 nats/token"),
        ("accuracy", {"scores": {"accuracy": 0.8425}}, "84.2 %"),
        ("accuracy", {"scores": {"accuracy": 0.0}}, "0.0 %"),
    ],
)
def test_objectives_are_written_in_readable_units(name, outcome, text):
    trial = Trial(number=0, params={}, recipe=Recipe(), state="complete", outcome=Outcome(**outcome))
    axis = drawing._axis(named([name])[0], [trial])
    assert axis.measure(trial).replace("\u00a0", " ") == text


def test_write_replaces_the_file_and_leaves_nothing_beside_it(view, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")
    monkeypatch.setattr(report, "render", lambda view: "new")
    assert write(view, path) == path
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]

    def broken(view):
        raise RuntimeError("no page")

    monkeypatch.setattr(report, "render", broken)
    with pytest.raises(RuntimeError):
        write(view, path)
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_import_leaves_plotting_libraries_alone():
    code = "import sys, hpo.report; print([m for m in ('plotly', 'sklearn', 'jinja2', 'pandas') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


if __name__ == "__main__":  # python -m tests.hpo.test_report page.html, to look at it
    write(study(), sys.argv[1])
