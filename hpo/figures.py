"""A study as plotly figures.

Owns: `View` (what is shown), its axes and units, `figures`. Must not know: stores, Ray, HTML.

Plotly reads a little HTML in its texts, so every text from outside is escaped. Colours are those of Okabe and Ito (2008),
which colour-blind readers can tell apart; nothing is said by colour alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from hpo.certificate import Certificate
from hpo.importance import Explained, explain, position
from hpo.insight import insights
from hpo.objectives import Objective, losses
from hpo.pareto import eligible
from hpo.space import Choice, Float, Int, Space
from hpo.trial import Trial

if TYPE_CHECKING:
    from training.quality import Quality

BLUE, VERMILLION, BLACK, GREY, SKY = "#0072B2", "#D55E00", "#000000", "#999999", "#56B4E9"
STATES = {  # colour and symbol
    "complete": (BLUE, "circle"),
    "stopped": (SKY, "triangle-down"),
    "infeasible": ("#E69F00", "square"),
    "diverged": ("#CC79A7", "triangle-up"),
    "failed": (VERMILLION, "x"),
    "cancelled": (GREY, "line-ew-open"),
    "running": ("#009E73", "circle-open"),
}
RING = {"color": BLACK, "size": 16, "symbol": "diamond-open", "line": {"width": 2}}
STAR = {"color": VERMILLION, "size": 17, "symbol": "star", "line": {"color": "white", "width": 1}}
TITLES = {
    "accuracy": "validation accuracy",
    "loss": "validation loss",
    "seconds": "training time",
    "peak_bytes": "peak memory",
    "device_hours": "device time",
    "adapter_bytes": "adapter size",
    "tokens_per_second": "throughput",
}


@dataclass(frozen=True)
class View:
    """What a report shows: a study with all its trials, its front, and what is certified of its winner."""

    name: str
    description: str
    objectives: tuple[Objective, ...]
    space: Space
    trials: Sequence[Trial]
    front: Sequence[Trial]
    certificate: Certificate | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    quality: Quality | None = None  # of the rows

    @cached_property
    def axes(self) -> list[Axis]:
        return [_axis(objective, self.trials) for objective in self.objectives]

    @cached_property
    def complete(self) -> list[Trial]:
        return [trial for trial in self.trials if eligible(trial)]

    @cached_property
    def winner(self) -> Trial | None:
        number = self.certificate.winner if self.certificate else None
        return next((trial for trial in self.trials if trial.number == number), None)

    @cached_property
    def defaults(self) -> Trial | None:
        return next((trial for trial in self.trials if trial.origin == "defaults"), None)

    @cached_property
    def explained(self) -> list[Explained]:
        """What the trials say of each objective."""
        return [explain(self.space, self.trials, objective) for objective in self.objectives]

    @cached_property
    def insights(self) -> list[str]:
        """The same in sentences."""
        return [one.text for one in insights(self.space, self.trials, self.objectives, self.explained)]

    def roles(self, trial: Trial) -> list[str]:
        named = {"winner": self.winner, "defaults": self.defaults}
        return [role for role, known in named.items() if known is not None and known.number == trial.number]


@dataclass(frozen=True)
class Axis:
    """An objective with the unit it is shown in: value shown = value x factor."""

    objective: Objective
    title: str
    unit: str
    factor: float
    digits: int

    @property
    def label(self) -> str:
        return f"{self.title} ({self.unit})" if self.unit else self.title

    def of(self, trial: Trial) -> float | None:
        loss = self.objective.loss(trial.outcome) if trial.outcome else None
        return None if loss is None else self.objective.of(trial.outcome) * self.factor

    def text(self, shown: float | None) -> str:
        return "–" if shown is None else f"{shown:,.{self.digits}f}"

    def measure(self, trial: Trial) -> str:
        return f"{self.text(self.of(trial))}\u00a0{self.unit}".rstrip()


def figures(view: View) -> dict[str, Any]:
    """Returns the plotly figures that the study has data for.

    Keys: front (the first pair of objectives; others as front_<y>_<x>), trials, parallel, importance, curves, scores.
    """
    made = {}
    pairs = [(y, x) for i, y in enumerate(view.axes) for x in view.axes[i + 1 :]]
    for i, (y, x) in enumerate(pairs):
        name = f"front_{y.objective.name}_{x.objective.name}" if i else "front"
        made[name] = _front(view, x, y)
    made |= {
        "trials": _trials(view),
        "parallel": _parallel(view),
        "importance": _importance(view),
        "curves": _curves(view),
        "scores": _scores(view),
    }
    return {name: figure for name, figure in made.items() if figure is not None}


# Units and words


def _axis(objective: Objective, trials: Sequence[Trial]) -> Axis:
    values = [abs(objective.of(t.outcome)) for t in trials if eligible(t) and objective.loss(t.outcome) is not None]
    top = max(values, default=0.0)
    unit, factor = objective.unit, 1.0
    if objective.name == "accuracy":
        unit, factor = "%", 100.0
    elif unit == "bytes":
        unit, factor = ("GB", 1e-9) if top >= 1e10 else ("MB", 1e-6) if top >= 1e5 else ("kB", 1e-3)
    elif unit == "s":
        unit, factor = ("h", 1 / 3600) if top >= 36_000 else ("min", 1 / 60) if top >= 600 else ("s", 1.0)
    # Three significant digits of the largest value, four where nothing scales it (a loss of 1.234).
    wanted = 4 if unit == objective.unit and unit != "s" else 3
    digits = wanted - 1 - math.floor(math.log10(top * factor)) if top else 1
    digits = 1 if unit == "%" else min(max(digits, 0), 6)
    return Axis(objective, TITLES.get(objective.name, objective.name.replace("_", " ")), unit, factor, digits)


def plain(value: Any, log: bool = False) -> str:
    """Returns a setting as people write it; small numbers of a log range all with an exponent."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        small = 0.1 if log else 0.001
        return f"{value:.1e}" if value and (abs(value) < small or abs(value) >= 1e6) else f"{value:.4g}"
    if isinstance(value, (tuple, list)):
        return ", ".join(map(plain, value))
    return str(value)


def setting(view: View, trial: Trial, name: str) -> str:
    """Returns a trial's value of a varied field as text."""
    log = getattr(view.space[name], "log", False)
    return plain(getattr(trial.recipe, name, trial.params.get(name)), log)


def duration(seconds: float) -> str:
    """Returns seconds in words: s, min or h."""
    minutes = round(seconds / 60)
    if seconds < 100:
        text = f"{seconds:.3g} s"
    else:
        text = f"{minutes} min" if minutes < 100 else f"{minutes // 60:,} h {minutes % 60} min"
    return text.replace(" ", "\u00a0")


def points(share: float) -> str:
    """Returns a share as signed percentage points."""
    return f"{100 * share:+.1f}".replace("-", "−")


def counts(trials: Iterable[Trial]) -> str:
    """Returns how many trials there are in each state, in words."""
    counted = Counter(trial.state for trial in trials)
    return ", ".join(f"{counted[state]} {state}" for state in STATES if counted[state])


def _hover(view: View, trial: Trial) -> str:
    lines = [f"<b>{' – '.join([f'trial {trial.number}', *view.roles(trial)])}</b>"]
    lines += [f"{axis.title}: {axis.measure(trial)}" for axis in view.axes]
    lines += [f"{name}: {setting(view, trial, name)}" for name in view.space]
    return "<br>".join([lines[0], *map(escape, lines[1:])])


# Figures


def _layout(height: int = 420, **more) -> dict[str, Any]:
    return {
        "template": "plotly_white",
        "height": height,
        "font": {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 13, "color": "#222"},
        "margin": {"l": 65, "r": 20, "t": 50, "b": 50},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "hovermode": "closest",
        "hoverlabel": {"align": "left"},
    } | more


def _bars(values, lows, highs, **style) -> dict[str, Any]:
    up = [max(0.0, high - value) for value, high in zip(values, highs, strict=True)]
    down = [max(0.0, value - low) for value, low in zip(values, lows, strict=True)]
    return {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "thickness": 1.2} | style


def _dots(view: View, trials: Sequence[Trial], xs, ys, name: str, **style):
    import plotly.graph_objects as go

    texts = [_hover(view, trial) for trial in trials]
    style = {"mode": "markers", "hoverinfo": "text", "hovertext": texts} | style
    return go.Scatter(x=list(xs), y=list(ys), name=name, **style)


def _front(view: View, x: Axis, y: Axis):
    import plotly.graph_objects as go

    place = {t.number: (x.of(t), y.of(t)) for t in view.complete if x.of(t) is not None and y.of(t) is not None}
    if not place:
        return None

    def dots(trials, name, **style):
        trials = [trial for trial in trials if trial is not None and trial.number in place]
        xs, ys = [place[trial.number][0] for trial in trials], [place[trial.number][1] for trial in trials]
        return _dots(view, trials, xs, ys, name, **style)

    members = {trial.number for trial in view.front}
    front = sorted((trial for trial in view.front if trial.number in place), key=lambda t: place[t.number])
    figure = go.Figure(layout=_layout(height=400))
    rest = [trial for trial in view.complete if trial.number not in members]
    figure.add_trace(dots(rest, "other complete trials", marker={"color": GREY, "size": 8, "opacity": 0.5}))
    if len(view.axes) == 2:
        # The edge of what the front attains; with more objectives a projection has no such edge.
        shape = "hv" if x.objective.goal == "minimize" else "vh"
        xs, ys = zip(*(place[trial.number] for trial in front), strict=True) if front else ((), ())
        line = {"color": BLUE, "width": 1, "shape": shape, "dash": "dot"}
        style = {"mode": "lines", "line": line, "hoverinfo": "skip", "showlegend": False}
        figure.add_trace(go.Scatter(x=xs, y=ys, name="edge", **style))
    bars = {f"error_{side}": bar for side, axis in (("x", x), ("y", y)) if (bar := _spread(view, axis, front))}
    texts = {"mode": "markers+text", "text": _labels(front, place), "textposition": "bottom right"}
    figure.add_trace(dots(front, "front", marker={"color": BLUE, "size": 10}, **texts, **bars))
    for trial, role, marker in ((view.defaults, "defaults", RING), (view.winner, "winner", STAR)):
        if trial is not None and trial.number in place:
            figure.add_trace(dots([trial], f"{role} (trial {trial.number})", marker=marker))
    for side, axis in ((0, x), (1, y)):
        values = [point[side] for point in place.values()]
        log = axis.objective.name != "accuracy" and min(values) > 0 and max(values) / min(values) > 30
        update = figure.update_yaxes if side else figure.update_xaxes
        update(title=escape(axis.label), type="log" if log else "linear", zeroline=False)
    return figure


def _spread(view: View, axis: Axis, trials: Sequence[Trial]) -> dict[str, Any] | None:
    """Returns error bars: of an accuracy by its rows, of seconds from the fastest to the slowest timing alone."""
    if axis.objective.name != "seconds":
        return _binomial(axis, trials)
    measured = view.certificate.measured if view.certificate else {}
    if not all(trial.number in measured for trial in trials):
        return None
    found = [measured[trial.number] for trial in trials]
    values, lows, highs = ([axis.factor * getattr(one, name) for one in found] for name in ("seconds", "low", "high"))
    return _bars(values, lows, highs, color=SKY)


def _binomial(axis: Axis, trials: Sequence[Trial]) -> dict[str, Any] | None:
    """Returns 95 % error bars of an accuracy over so many validation rows (normal approximation), or None."""
    counts = [trial.outcome.conditions.get("validation_rows") for trial in trials]
    if axis.objective.name != "accuracy" or not any(counts):
        return None
    shares = [axis.of(trial) / axis.factor for trial in trials]
    spread = [1.96 * math.sqrt(max(p * (1 - p), 0) / n) if n else 0 for p, n in zip(shares, counts, strict=True)]
    ends = [(max(p - s, 0), min(p + s, 1)) for p, s in zip(shares, spread, strict=True)]
    values, lows, highs = ([axis.factor * v for v in side] for side in (shares, *zip(*ends, strict=True)))
    return _bars(values, lows, highs, color=SKY)


def _labels(trials: Sequence[Trial], place: Mapping[int, tuple[float, float]]) -> list[str]:
    # A number at the lower right of each point, unless another point or an earlier number stands there.
    spans = [max(side) - min(side) or 1.0 for side in zip(*place.values(), strict=True)]
    at = {number: (x / spans[0], y / spans[1]) for number, (x, y) in place.items()}
    written: list[tuple[float, float]] = []
    texts = []
    for number in (trial.number for trial in trials):
        x, y = at[number]
        points = (point for other, point in at.items() if other != number)
        free = not any(-0.03 < px - x < 0.07 and -0.1 < py - y < 0.04 for px, py in points)
        free = free and all(abs(x - px) > 0.06 or abs(y - py) > 0.07 for px, py in written)
        texts.append(str(number) if free else "")
        written += [(x, y)] if free else []
    return texts


def _trials(view: View):
    if not view.trials or not view.axes:
        return None
    from plotly.subplots import make_subplots

    axis = view.axes[0]
    valued = sorted((t for t in view.complete if axis.of(t) is not None), key=lambda t: t.number)
    known = {trial.number for trial in valued}
    others = [trial for trial in view.trials if trial.number not in known]
    states = [state for state in reversed(STATES) if any(trial.state == state for trial in others)]
    # A panel without a trial shrinks to nothing.
    share = 0.999 if not valued else min(0.5, 0.07 * len(states) + 0.03) if states else 0.001
    figure = make_subplots(2, 1, shared_xaxes=True, row_heights=[1 - share, share], vertical_spacing=0.04)
    better = max if axis.objective.goal == "maximize" else min
    values = [axis.of(trial) for trial in valued]
    numbers = [trial.number for trial in valued]
    line = {"color": BLUE, "width": 1.5, "shape": "hv"}
    style = {"mode": "lines", "line": line, "hoverinfo": "skip"}
    figure.add_trace(_dots(view, valued, numbers, accumulate(values, better), "best so far", **style), 1, 1)
    marker = {"color": BLUE, "size": 8, "symbol": "circle"}
    figure.add_trace(_dots(view, valued, numbers, values, "complete", marker=marker), 1, 1)
    for trial, role, marker in ((view.defaults, "defaults", RING), (view.winner, "winner", STAR)):
        if trial is not None and trial.number in known:
            dot = _dots(view, [trial], [trial.number], [axis.of(trial)], role, marker=marker)
            figure.add_trace(dot, 1, 1)
    for state in states:
        color, symbol = STATES[state]
        these = [trial for trial in others if trial.state == state]
        marker = {"color": color, "symbol": symbol, "size": 9, "line": {"width": 2, "color": color}}
        # Their row says what they are, so they need no place in the legend.
        dots = _dots(view, these, [t.number for t in these], [state] * len(these), state, marker=marker)
        figure.add_trace(dots.update(showlegend=False), 2, 1)
    figure.update_layout(_layout(height=(360 if valued else 110) + 26 * len(states)))
    figure.update_yaxes(title=escape(axis.label), zeroline=False, visible=bool(valued), row=1, col=1)
    figure.update_yaxes(type="category", row=2, col=1, automargin=True, visible=bool(states))
    last = max(trial.number for trial in view.trials)
    figure.update_xaxes(title="trial", row=2, col=1, dtick=1 if last < 12 else None)
    figure.update_xaxes(zeroline=False, range=[-0.7, last + 0.7])
    return figure


def _parallel(view: View):
    trials = [t for t in view.complete if losses(t, view.objectives) is not None and view.space.contains(t.params)]
    columns = [*view.space, *view.axes]
    if not trials or len(columns) < 2:
        return None
    import plotly.graph_objects as go

    figure = go.Figure(layout=_layout(height=440))
    scales = [_column(view.space[c], c) if isinstance(c, str) else _outcomes(c, trials) for c in columns]
    ranked = sorted(trials, key=lambda trial: losses(trial, view.objectives))
    quarters = ["best quarter", "second quarter", "third quarter", "last quarter"] if len(trials) >= 8 else ["trials"]
    shades = ["#08519c", "#6baed6", "#bdd7e7", "#dcdcdc"]
    groups = [
        (
            name,
            ranked[i * len(ranked) // len(quarters) : (i + 1) * len(ranked) // len(quarters)],
            shades[i],
            2.2 - i / 3,
        )
        for i, name in enumerate(quarters)
    ]
    groups.insert(0, ("winner", [t for t in trials if "winner" in view.roles(t)], VERMILLION, 4))
    for name, members, color, width in reversed(groups):
        xs: list[float | None] = []
        ys: list[float | None] = []
        texts: list[str] = []
        for trial in members:
            xs += [*range(len(columns)), None]
            ys += [*(place(trial) for place, _ in scales), None]
            texts += [_hover(view, trial)] * (len(columns) + 1)
        style = {"line": {"color": color, "width": width}, "marker": {"size": 5 + width}, "connectgaps": False}
        text = {"hoverinfo": "text", "hovertext": texts}
        if members:
            figure.add_trace(go.Scatter(x=xs, y=ys, name=name, mode="lines+markers", **style, **text))
    for i, (_, ticks) in enumerate(scales):
        for at, text in ticks:
            label = {"text": escape(text), "xanchor": "left", "xshift": 7, "bgcolor": "rgba(255,255,255,0.8)"}
            figure.add_annotation(x=i, y=at, showarrow=False, font={"size": 11}, borderpad=1, **label)
    # One word a line: many names stand side by side.
    names = [_over(view.space, c) if isinstance(c, str) else c.label for c in columns]
    broken = [escape(name).replace("_", "_<br>").replace(" ", "<br>").replace("<br>/", " /") for name in names]
    figure.update_xaxes(tickvals=list(range(len(columns))), ticktext=broken, tickangle=0)
    figure.update_xaxes(range=[-0.3, len(columns) - 0.35], gridcolor="#777", zeroline=False)
    figure.update_yaxes(visible=False, range=[-0.06, 1.06])
    figure.update_layout(legend_traceorder="reversed")
    return figure


def _over(space: Space, name: str) -> str:
    return f"{name} / {space[name].times}" if space[name].times else name


def _column(dimension: Float | Int | Choice, name: str):
    # Returns (trial -> place or None where the dimension does not exist, [(place, text)]).
    levels = dimension.values if isinstance(dimension, Choice) else dimension.levels(3)
    ticks = [(position(dimension, level), plain(level, getattr(dimension, "log", False))) for level in levels]
    return lambda trial: position(dimension, trial.params[name]) if name in trial.params else None, ticks


def _outcomes(axis: Axis, trials: Sequence[Trial]):
    # Better is up on every objective, whatever its goal.
    values = [axis.of(trial) for trial in trials]
    low, high = min(values), max(values)
    if axis.objective.goal == "minimize":
        low, high = high, low
    if low == high:
        return lambda trial: 0.5, [(0.5, axis.text(low))]
    ticks = [(at, axis.text(low + at * (high - low))) for at in (0, 0.5, 1)]
    return lambda trial: (axis.of(trial) - low) / (high - low), ticks


def _importance(view: View):
    found = [(axis, known.importances) for axis, known in zip(view.axes, view.explained, strict=True)]
    found = [(axis, items) for axis, items in found if items]
    if not found:
        return None
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    names = dict.fromkeys(item.name for _, items in found for item in items)
    order = [escape(_over(view.space, name)) for name in reversed(names)]
    titles = [escape(axis.title) for axis, _ in found]
    figure = make_subplots(1, len(found), shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.05)
    for column, (axis, items) in enumerate(found, start=1):
        parts = zip(*((100 * item.share, 100 * item.low, 100 * item.high) for item in items), strict=True)
        shares, lows, highs = map(list, parts)
        texts = [f"{i.name}: {100 * i.share:.0f} % ({100 * i.low:.0f} to {100 * i.high:.0f} %)" for i in items]
        bars = go.Bar(
            x=shares,
            y=[escape(_over(view.space, item.name)) for item in items],
            orientation="h",
            name=escape(axis.title),
            error_x=_bars(shares, lows, highs, color="#444"),
            marker={"color": BLUE},
            hoverinfo="text",
            hovertext=[escape(text) for text in texts],
            textposition="none",
        )
        figure.add_trace(bars, 1, column)
    figure.update_layout(_layout(height=130 + 32 * len(order), showlegend=False))
    figure.update_annotations(font_size=13)
    figure.update_xaxes(title="share (%)", range=[0, 105], dtick=25)
    figure.update_yaxes(automargin=True, ticksuffix="  ", categoryorder="array", categoryarray=order)
    return figure


def _curves(view: View):
    drawn = [trial for trial in view.trials if trial.curve]
    names = list(dict.fromkeys(name for trial in drawn for point in trial.curve for name in point.metrics))
    names = [name for name in ("accuracy", "loss") if name in names] or names[:2]
    if not names:
        return None
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    front = {trial.number for trial in view.front}
    chosen = {trial.number for trial in (view.winner, view.defaults) if trial is not None}
    groups = [
        (
            "other trials",
            [t for t in drawn if t.number not in front | chosen],
            {"color": "#c4c4c4", "width": 1},
            "circle",
        ),
        ("front", [t for t in drawn if t.number in front - chosen], {"color": BLUE, "width": 1.5}, "circle"),
        ("defaults", [view.defaults], {"color": BLACK, "width": 2, "dash": "dash"}, "diamond"),
        ("winner", [view.winner], {"color": VERMILLION, "width": 3}, "star"),
    ]
    figure = make_subplots(1, len(names), horizontal_spacing=0.11)
    for column, metric in enumerate(names, start=1):
        factor = 100 if metric == "accuracy" else 1
        for label, trials, line, symbol in groups:
            xs, ys, texts = [], [], []
            for trial in trials:
                points = [point for point in (trial.curve if trial else ()) if metric in point.metrics]
                xs += [*(100 * point.share for point in points), None]
                ys += [*(factor * point.metrics[metric] for point in points), None]
                texts += [f"trial {trial.number}, {trial.state}<br>{p.tokens:,} tokens" for p in points] + [""]
            if len(xs) > len(trials):
                marker = {"size": 6, "symbol": symbol}
                style = {"line": line, "marker": marker, "legendgroup": label, "showlegend": column == 1}
                trace = go.Scatter(x=xs, y=ys, mode="lines+markers", name=label, hovertext=texts, **style)
                figure.add_trace(trace.update(hoverinfo="text+y"), 1, column)
        # A diverged trial would press all others flat, so complete ones set the range where there are any.
        values = [factor * p.metrics[metric] for t in view.complete for p in t.curve if metric in p.metrics]
        room = 0.06 * (max(values) - min(values)) if values else 0
        span = [min(values) - room, max(values) + room] if room else None
        unit = {"accuracy": " (%)", "loss": " (nats/token)"}.get(metric, "")
        figure.update_yaxes(title=escape(TITLES.get(metric, metric) + unit), range=span, zeroline=False, col=column)
    figure.update_xaxes(title="share of the training done (%)", range=[-2, 103], zeroline=False)
    figure.update_layout(_layout(height=380))
    return figure


def _scores(view: View):
    scores = view.certificate.scores if view.certificate else ()
    if not scores:
        return None
    import plotly.graph_objects as go

    values = [100 * score.accuracy.value for score in scores]
    lows = [100 * score.accuracy.low for score in scores]
    highs = [100 * score.accuracy.high for score in scores]
    error = _bars(values, lows, highs, width=8)
    colors = {"untuned": "#bbbbbb", "defaults": SKY, "winner": VERMILLION}
    labels = [escape(score.who) for score in scores]
    marker = {"color": [colors.get(score.who, GREY) for score in scores]}
    # Numbers stand inside the foot of each bar, where no error bar crosses them.
    text = {"text": [f"{value:.1f} %" for value in values], "textposition": "inside", "insidetextanchor": "start"}
    bars = go.Bar(x=labels, y=values, error_y=error, marker=marker, width=0.55, hoverinfo="skip", **text)
    figure = go.Figure(bars, layout=_layout(height=340, margin={"l": 65, "r": 20, "t": 20, "b": 40}))
    figure.update_traces(insidetextfont={"color": "black", "size": 14})
    top = max(highs)
    figure.update_yaxes(title="accuracy on test rows (%)", range=[0, min(102, 1.1 * top) or 1])
    return figure
