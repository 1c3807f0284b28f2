"""A study as one page.

Owns: `render` and `write`: one HTML file that needs no network. Must not know: stores, Ray, how a certificate is made.

Every text from outside is escaped, by jinja2 in the template (`report.html.j2`) and by `hpo.figures` in figures.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hpo.certificate import Certificate
from hpo.figures import Axis, View, counts, duration, figures, plain, points, setting
from hpo.importance import reason
from hpo.pareto import eligible
from hpo.report_comparison import tables
from hpo.trial import Trial

ROWS = 20  # held-out rows shown
ENDED = 200  # trials without a result shown


def render(view: View) -> str:
    """Returns one self-contained HTML page."""
    from importlib import resources

    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup
    from plotly.io import to_html
    from plotly.offline import get_plotlyjs

    # The bar of buttons would lie on the legends; zoom by dragging, and back by a double click, work without it.
    config = {"displayModeBar": False, "responsive": True}
    drawn = {
        # The name of an objective is the user's, so it does not become an id.
        name: Markup(to_html(figure, config, full_html=False, include_plotlyjs=False, div_id=f"figure-{i}"))
        for i, (name, figure) in enumerate(figures(view).items())
    }
    template = resources.files("hpo").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    silent: dict[str, list[str]] = {}
    for axis in view.axes:
        if why := reason(view.space, view.trials, axis.objective):
            silent.setdefault(why, []).append(axis.title)
    return environment.from_string(template).render(
        view=view,
        plotly=Markup(get_plotlyjs()),
        figures=drawn,
        fronts=[figure for name, figure in drawn.items() if name.startswith("front")],
        summary=_summary(view),
        table=_table(view),
        undrawn=counts(trial for trial in view.trials if not eligible(trial)),
        silent=silent,
        scores=_scored(view),
        comparison=tables(view.certificate),
        answers=_answers(view),
        ended=_ended(view),
        more=max(0, sum(_without_result(trial) for trial in view.trials) - ENDED),
        machine=_machine(view),
        quality=view.quality,
    )


def write(view: View, path: str | Path) -> Path:
    """Writes the page to `path` and returns it; a reader never sees half a page."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(render(view), encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return path


# Words and tables of the page


def _summary(view: View) -> list[str]:
    sentences = []
    if view.certificate is not None:
        sentences += [*_claims(view, view.certificate), *view.certificate.said]
    elif view.front:
        best, axis = view.front[0], view.axes[0]
        sentences.append(f"So far trial {best.number} leads in {axis.title}, with {axis.measure(best)}.")
        sentences.append("Nothing is certified yet: this value was picked as the best of many and is likely too good.")
    else:
        sentences.append("No trial is complete with a value for every objective, so there is no front and no winner.")
    times = [time for trial in view.trials for time in (trial.started, trial.finished) if time is not None]
    spent = sum(t.outcome.seconds for t in view.trials if t.outcome and t.outcome.seconds)
    count = len(view.trials)
    counted = f"{count} trial{'' if count == 1 else 's'}" + (f": {counts(view.trials)}." if count else ".")
    sentences.append(counted)
    if len(times) > 1:
        sentences.append(f"From the first start to the last end {duration(max(times) - min(times))} passed.")
    if spent:
        sentences.append(f"Training steps alone took {duration(spent)}, summed over trials.")
    return sentences


def _claims(view: View, certificate: Certificate) -> list[str]:
    is_defaults = view.defaults is not None and certificate.winner == view.defaults.number
    why = certificate.reason.strip().rstrip(".")
    said = [f"The winner is trial {certificate.winner}{', the defaults themselves' if is_defaults else ''}."]
    said += [f"Why: {why}."] if why else []
    score = {one.who: one for one in certificate.scores}
    if "winner" in score:
        own = score["winner"]
        others = [
            f"{100 * score[who].accuracy.value:.1f} % for {name}"
            for who, name in (("defaults", "the defaults"), ("untuned", "the untuned model"))
            if who in score and not (is_defaults and who == "defaults")
        ]
        against = f", against {' and '.join(others)}" if others else ""
        interval = f"{100 * own.accuracy.low:.1f} to {100 * own.accuracy.high:.1f}"
        share = f"{100 * own.accuracy.value:.1f} % (95 % interval {interval})"
        said.append(f"On {own.rows:,} test rows that no trial saw its accuracy is {share}{against}.")
    gain = certificate.gain
    if is_defaults:
        return said
    if gain is None:
        return [*said, "The gain over the defaults was not measured."]
    span = f"95 % interval {points(gain.low)} to {points(gain.high)}"
    if gain.low > 0:
        said.append(f"That is a gain of {points(gain.value)} percentage points over the defaults ({span}).")
    elif gain.high < 0:
        said.append(f"That is a loss against the defaults of {points(gain.value)} percentage points ({span}).")
    else:
        said.append(
            f"That is a tie with the defaults: the difference is {points(gain.value)} percentage points, "
            f"and its {span} includes 0."
        )
    both = view.winner in view.complete and view.defaults in view.complete
    costs = [
        f"{axis.title} {axis.measure(view.winner)} (defaults {axis.measure(view.defaults)})"
        for axis in view.axes
        if both and axis.objective.name != "accuracy"
    ]
    return [*said, f"It takes {', '.join(costs)}."] if costs else said


def _table(view: View) -> dict[str, Any] | None:
    if not view.front and view.winner is None:
        return None
    shown = list(view.front)
    numbers = {trial.number for trial in shown}
    for trial in (view.winner, view.defaults):
        if trial is not None and trial.number not in numbers:
            shown.append(trial)
            numbers.add(trial.number)
    measured = view.certificate.measured if view.certificate else {}
    time = next((axis for axis in view.axes if axis.objective.name == "seconds"), None)
    time = time or Axis(view.objectives[0], "training time", "s", 1.0, 1)
    members = {trial.number for trial in view.front}
    lines = []
    for trial in shown:
        alone = measured.get(trial.number)
        cells = [setting(view, trial, name) for name in view.space] + [axis.text(axis.of(trial)) for axis in view.axes]
        if measured and alone:
            low, high, busy = (time.text(time.factor * part) for part in (alone.low, alone.high, alone.in_study))
            cells.append(f"{low}–{high}; {busy}")
        elif measured:
            cells.append("–")
        lines.append((trial, view.roles(trial), trial.number in members, cells))
    heads = [*view.space, *(axis.label for axis in view.axes)]
    if measured:
        heads.append(f"timings alone; time in the search ({time.unit})")
    return {"heads": heads, "lines": lines}


def _scored(view: View) -> list[tuple[str, ...]]:
    return [
        (
            score.who,
            "–" if score.number is None else str(score.number),
            f"{score.rows:,}",
            f"{100 * score.accuracy.value:.1f} [{100 * score.accuracy.low:.1f}–{100 * score.accuracy.high:.1f}]",
            f"{score.loss:.3f}",
        )
        for score in (view.certificate.scores if view.certificate else ())
    ]


def _answers(view: View) -> dict[str, Any] | None:
    """Returns the held-out rows to show: what the winner lost first, then what it won, then what both missed."""
    rows = view.certificate.rows if view.certificate else ()
    if not rows:
        return None

    def right(answer: str | None, row) -> bool | None:
        return None if answer is None else answer.strip() == row.expected.strip()

    def order(row) -> int:
        before, after = right(row.defaults if row.defaults is not None else row.untuned, row), right(row.winner, row)
        return {(True, False): 0, (False, True): 1, (False, False): 2, (True, True): 3}[before, after]

    shown = sorted(rows, key=order)[:ROWS]
    lines = [(row, [(text, right(text, row)) for text in (row.untuned, row.defaults, row.winner)]) for row in shown]
    counts = Counter(map(order, rows))
    return {"lines": lines, "rows": len(rows), "lost": counts[0], "won": counts[1], "against": (
        "defaults" if any(row.defaults is not None for row in rows) else "untuned model")}  # fmt: skip


def _without_result(trial: Trial) -> bool:
    return trial.final and trial.state != "complete"


def _ended(view: View) -> list[tuple[Trial, str, str]]:
    lines = []
    for trial in [trial for trial in view.trials if _without_result(trial)][:ENDED]:
        why = trial.error or (trial.outcome.reason if trial.outcome else "") or "no reason was recorded"
        lines.append((trial, why, ", ".join(f"{name} {setting(view, trial, name)}" for name in view.space)))
    return lines


def _machine(view: View) -> list[tuple[str, str]]:
    told = dict(_flat(view.certificate.machine)) if view.certificate else {}
    seen: dict[str, list[Any]] = {}
    for trial in view.trials:
        for name, value in _flat(trial.outcome.conditions if trial.outcome else {}):
            if name != "right":  # a digit for each validation row: of the model, not of the machine
                seen.setdefault(name, []).append(value)
    lines = {name: plain(value) for name, value in told.items()}
    for name, values in seen.items():
        texts = list(dict.fromkeys(map(plain, values)))
        numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
        text = f"{plain(min(values))} to {plain(max(values))}" if numbers else ", ".join(texts[:6])
        text = texts[0] if len(texts) == 1 else text + (", …" if not numbers and len(texts) > 6 else "")
        if lines.get(name) != text:
            lines[name if name not in lines else f"{name} (trials)"] = text
    return list(lines.items())


def _flat(tree: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value
