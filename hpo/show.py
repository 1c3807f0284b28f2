"""How things look on a terminal and as JSON. Decides nothing.

Owns: texts for `hpo check | run | list | show | schema | doctor`, the progress display. Must not know: how results are made.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hpo.space import value_of

if TYPE_CHECKING:
    from hpo.check import Findings
    from hpo.forecast import Prediction
    from hpo.growth import Forecast
    from hpo.replay import Replay
    from hpo.study import Status, Study
    from hpo.trial import Trial


def number(value: float | None, unit: str = "") -> str:
    """Returns a value for people: bytes in MB or GB (powers of ten), seconds, shares to three digits."""
    if value is None:
        return "-"
    if isinstance(value, bool) or isinstance(value, str):
        return str(value)
    if unit == "bytes":
        return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"
    if unit == "s":
        return f"{value:.1f} s" if value < 600 else f"{value / 60:.1f} min"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.2e}"


# check


def check_text(findings: Findings):
    """Returns what would run, as a renderable."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    spec, each = findings.spec, findings.spec.resources
    table = Table(show_header=False, box=None, pad_edge=False)
    size = spec.space.size
    rows = [
        ("study", f"{spec.name}" + (f": {spec.description}" if spec.description else "")),
        ("space", f"{len(spec.space)} dimensions, {'infinitely many' if math.isinf(size) else f'{size:,.0f}'} points"),
        (
            "search",
            f"{spec.algorithm.name} towards {', '.join(spec.objectives)}; {spec.budget.trials} trials, the defaults first",
        ),
        (
            "each trial",
            f"{each.workers} worker(s) with {each.cpus:g} CPU, {each.gpus:g} GPU; mode {each.mode}",
        ),
        ("storage", str(spec.folder)),
    ]
    if findings.shape and findings.rows:
        held = findings.rows
        parts = {
            name: number(getattr(findings.memory, name), "bytes")
            for name in ("total", "weights", "adapters", "activations", "logits")
        }
        rows += [
            ("model", f"{spec.recipe.model}: {findings.shape.parameters:,} parameters, {findings.shape.layers} layers"),
            ("rows", f"{len(held.train):,} training, {len(held.validation):,} validation, {len(held.test):,} test; "
                     f"longest {findings.tokens_per_row} tokens"),
            ("memory", "defaults about {total} (weights {weights}, adapters {adapters}, activations {activations}, "
                       "logits {logits})".format(**parts)),
            ("over the space", f"{number(findings.smallest, 'bytes')} to {number(findings.largest, 'bytes')} predicted"),
        ]  # fmt: skip
        limit = spec.limits.peak_bytes
        if limit is not None:
            said = f"{findings.refused:.0%} of the space is over {number(limit, 'bytes')} even one sequence at a time"
            rows.append(("does not fit", said + (f"; for example {findings.example}" if findings.example else "")))
    for name, said in [*rows, *(("note", note) for note in findings.notes)]:
        table.add_row(f"[bold]{name}[/bold]", escape(said))
    return Group(table, "Nothing was started. To run it, write run in place of check.")


def check_record(findings: Findings) -> dict[str, Any]:
    """Returns the same as plain values."""
    size, memory = findings.spec.space.size, findings.memory
    return {
        "study": findings.spec.name, "points": None if math.isinf(size) else size, "trials": findings.spec.budget.trials,
        "rows": {s: len(getattr(findings.rows, s)) for s in ("train", "validation", "test")} if findings.rows else None,
        "parameters": findings.shape.parameters if findings.shape else None, "tokens_per_row": findings.tokens_per_row,
        "predicted_peak_bytes":
            {"defaults": memory.total, "smallest": findings.smallest, "largest": findings.largest} if memory else None,
        "refused_share": findings.refused, "notes": list(findings.notes),
    }  # fmt: skip


def prediction_record(forecast: Prediction) -> dict[str, Any]:
    """Returns predicted seconds as plain values: of a trial and of the study with their error, and what the study costs."""
    return {
        "trial": forecast.trial.seconds, "least": forecast.least, "most": forecast.most, "study": forecast.study.seconds,
        "error": forecast.trial.error, "cost": forecast.cost, "probes": forecast.runs,
    }  # fmt: skip


def prediction_text(forecast: Prediction) -> str:
    """Returns predicted seconds in two sentences."""
    trial, study = forecast.trial, forecast.study
    cost = f", which cost {forecast.cost:,.2f}" if forecast.cost is not None else ""
    return (f"Training steps of a trial are predicted to take {number(trial.seconds, 's')} on average "
            f"({number(forecast.least, 's')} to {number(forecast.most, 's')} over the space), give or take {trial.error:.0%}.\n"
            f"Those of the study: {number(study.seconds, 's')} ({number(study.low, 's')} to {number(study.high, 's')}){cost}; "
            f"from {forecast.runs} short runs here.")  # fmt: skip


# a study


def study_text(study: Study):
    """Returns states, front and winner of a study, as a renderable."""
    from rich.console import Group
    from rich.markup import escape

    trials, spec = study.history(), study.spec
    states: dict[str, int] = {}
    for trial in trials:
        states[trial.state] = states.get(trial.state, 0) + 1
    counted = ", ".join(f"{count} {state}" for state, count in states.items()) or "no trials yet"
    parts: list[Any] = [f"[bold]{spec.name}[/bold]: {counted}" + (" (running now)" if study.running() else "")]
    parts += [escape(said) for said in study.advice]
    members = study.front()
    if members:
        parts.append(front_table(study, members))
    parts += [
        escape(f"trial {t.number} {t.state}: {t.error}")
        for t in trials
        if t.state in ("failed", "diverged", "infeasible") and t.error
    ][:5]
    parts += [line for line in (*_winner_lines(study), _billed_line(study, trials), _kept_line(study, trials)) if line]
    if said := study.insights():
        parts += ["[bold]What mattered[/bold]", *(f"  {escape(line)}" for line in said)]
    if said := outlook_text(study.outlook()):
        parts.append(said)
    return Group(*parts)


def outlook_text(told: Forecast | None) -> str:
    """Returns in a sentence what more trials would probably bring, or "" where too few have ended to say."""
    if told is None:
        return ""
    return (
        f"{told.more} more trials would probably grow the hypervolume by {told.gain:.1%} "
        f"({told.low:.1%} to {told.high:.1%}, 80 %), if it goes on as it did; a search cannot know what it has not seen."
    )


def replay_text(found: Replay) -> str:
    """Returns what a replay came to."""
    from rich.markup import escape

    lines = [f"{found.suggestions:,} suggestions and {found.decisions:,} decisions on reports derived again"]
    if found.ordered:
        lines.append(f"{found.ordered} trials were ordered by you and taken as given")
    if found.unknown:
        lines.append(f"{found.unknown} trials are from before the record kept the order of things, and taken as they are")
    if (parted := found.difference) is None:
        return "; ".join([*lines, "all as recorded"]) + "."
    where = f"trial {parted.trial}" + (f" at step {parted.step}" if parted.step is not None else "")
    told = [f"{'; '.join(lines)}, then {where} differs:", f"  recorded {parted.recorded}", f"  derived  {parted.derived}"]
    told += [f"  {name} was {was} then and is {now} here" for name, was, now in found.versions]
    return escape("\n".join(told))


def front_table(study: Study, members: list[Trial]):
    """Returns the front as a table: recipes and objectives, the winner marked."""
    from rich import box
    from rich.table import Table

    spec, certificate = study.spec, study.certificate
    table = Table(title=f"Front: {len(members)} trials that no other beats in everything", box=box.SIMPLE, title_justify="left")
    for name in ("trial", *spec.space, *spec.objectives):
        table.add_column(name, justify="right", no_wrap=True)
    for trial in members:
        mark = "*" if certificate and certificate.winner == trial.number else ""
        values = [number(value_of(trial.recipe, name)) for name in spec.space]
        table.add_row(f"{mark}{trial.number}", *values, *(number(o.of(trial.outcome), o.unit) for o in spec.targets))
    return table


def _billed_line(study: Study, trials: list[Trial]) -> str:
    outcomes = [t.outcome for t in trials if t.outcome and t.attempts]  # what was refused has predicted seconds
    billed, steps = sum(t.billed for t in trials), sum(outcome.seconds or 0.0 for outcome in outcomes)
    if not billed or study.spec.evaluation.timing == "counted":
        return ""
    if again := sum(t.attempts > 1 or "resumed_at" in (t.outcome.conditions if t.outcome else {}) for t in trials):
        return f"Billed: {number(billed, 's')} of worker groups, without the earlier launches of {again} trials."
    if any("seats" in outcome.conditions for outcome in outcomes):
        return f"Billed: {number(billed, 's')} of worker groups, for training steps that take {number(steps, 's')} alone."
    if steps > billed:  # a simulation's
        return ""
    return f"Billed: {number(billed, 's')} of worker groups, {number(steps, 's')} of it training steps."


def _kept_line(study: Study, trials: list[Trial]) -> str:
    from hpo.keeping import bytes_kept, why_gone

    count, size = bytes_kept(study.spec)
    gone = sum(1 for t in trials if why_gone(t))
    deleted = f"; those of {gone} others were deleted (keep: {study.spec.keep})" if gone else ""
    return f"Adapters of {count} trials are kept, {number(size, 'bytes')}{deleted}." if count or gone else ""


def _winner_lines(study: Study) -> list[str]:
    from rich.markup import escape

    certificate, spec = study.certificate, study.spec
    if certificate is None:
        return []
    lines = [f"[bold]Winner[/bold] (*): {certificate.reason}."]
    if certificate.scores:
        said = [f"{s.who} {s.accuracy.value:.3f} [{s.accuracy.low:.3f}, {s.accuracy.high:.3f}]" for s in certificate.scores]
        lines.append(f"On {certificate.scores[-1].rows} rows that no trial saw, accuracy: {', '.join(said)}.".replace("[", "\\["))
    if (gain := certificate.gain) is not None:
        if certificate.winner == 0:
            lines.append("The defaults themselves are the winner.")
        elif gain.low <= 0 <= gain.high:
            lines.append(
                f"Against the defaults that is a tie: {gain.value:+.3f}, 95 % interval {gain.low:+.3f} to {gain.high:+.3f}."
            )
        else:
            lines.append(f"Against the defaults: {gain.value:+.3f}, 95 % interval {gain.low:+.3f} to {gain.high:+.3f}.")
    lines += [escape(said) for said in certificate.said]
    if certificate.measured and "seconds" in spec.objectives:
        lines.append("Seconds of the front's members were measured alone, after the search.")
    return lines


def choice_text(chosen: tuple[Trial, str] | None) -> str:
    """Returns what another rule would choose, and why."""
    from rich.markup import escape

    if chosen is None:
        return "No trial is complete, so there is nothing to choose."
    return f"[bold]By this rule[/bold]: {escape(chosen[1])}. To promote it: hpo model promote STUDY --trial {chosen[0].number}"


def next_text(study: Study) -> str:
    """Returns where the report is and what to do next."""
    from rich.markup import escape

    spec = study.spec
    return (
        f"Report: {escape(str(spec.folder / 'report.html'))}\n"
        f"Next: [bold]hpo show {spec.name} --storage {escape(spec.storage)}[/bold]; for a longer search of the same study, "
        f"run the same command with [bold]--set budget.trials={spec.budget.trials * 2}[/bold]"
    )


def study_record(study: Study) -> dict[str, Any]:
    """Returns the same as plain values."""
    spec, certificate, winner = study.spec, study.certificate, study.winner()

    def row(trial: Trial) -> dict[str, Any]:
        return {
            "number": trial.number, "state": trial.state, "params": trial.params,
            "recipe": {n: value_of(trial.recipe, n) for n in spec.space},
            "objectives": {o.name: o.of(trial.outcome) if trial.outcome else None for o in spec.targets}, "error": trial.error,
        }  # fmt: skip

    told = study.outlook()
    return {
        "study": spec.name, "running": study.running(), "outlook": dataclasses.asdict(told) if told else None,
        "trials": [row(t) for t in study.history()], "billed_seconds": sum(t.billed for t in study.history()),
        "front": [t.number for t in study.front()], "winner": winner.number if winner else None,
        "insights": study.insights(),
        "certificate": certificate.model_dump(exclude={"rows"}) if certificate else None,
        "report": str(spec.folder / "report.html"),
    }  # fmt: skip


def list_text(rows: list):
    """Returns the studies as a table."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    for name in ("study", "begun", "trials", "state"):
        table.add_column(name)
    for record, counts, held in rows:
        counted = ", ".join(f"{n} {state}" for state, n in counts.items())
        state = "running" if held else "done" if record.certificate else "can be continued"
        table.add_row(record.name, time.strftime("%Y-%m-%d %H:%M", time.localtime(record.created)), counted, state)
    return table if rows else "No studies yet."


# schema and doctor


def schema_text(model):
    """Returns the fields of a model with default and meaning, as a table."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    for name in ("field", "type", "default", "meaning"):
        table.add_column(name)
    schema = model.model_json_schema()
    for name, field in model.model_fields.items():
        about = schema["properties"].get(name, {})
        default = "required" if field.is_required() else "" if field.default_factory else str(about.get("default", ""))
        table.add_row(name, _type(about), default if len(default) < 40 else "", escape(field.description or ""))
    return table


def _type(about: dict) -> str:
    if "enum" in about:
        return " | ".join(str(value) for value in about["enum"])
    if "anyOf" in about:
        return " | ".join(_type(part) for part in about["anyOf"] if part.get("type") != "null")
    return str(about.get("const", about.get("$ref", about.get("type", ""))).rsplit("/", 1)[-1])


def doctor_text(findings: list):
    """Returns the findings as a table."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for finding in findings:
        mark = "[green]ok[/green]" if finding.ok else "[red]no[/red]" if finding.needed else "[yellow]--[/yellow]"
        table.add_row(mark, finding.name, escape(finding.found), "" if finding.ok else escape(finding.remedy))
    return table


def model_record(shape) -> dict[str, Any]:
    """Returns what `hpo doctor --model` prints as JSON: the family, sizes, and every kind of linear layer."""
    from training.families import family_of
    from training.model import modules

    family, kind = family_of(shape.config)
    rows = [{"name": m.name, "part": "attention" if m.attention else "mlp", "in": m.width, "out": m.out, "largest_rank": m.rank,
             "weights": m.weights, "count": m.count} for m in modules(shape)]  # fmt: skip
    return {"family": family, "kind": kind, "parameters": shape.parameters, "layers": shape.layers, "modules": rows}


def model_text(shape):
    """Returns a model's linear layers as a table."""
    from rich.console import Group
    from rich.table import Table

    found = model_record(shape)
    table = Table("layer", "part", "in", "out", "largest rank", "weights", "layers", box=None, pad_edge=False)
    for row in found["modules"]:
        table.add_row(row["name"], row["part"], *(f"{row[name]:,}" for name in ("in", "out", "largest_rank", "weights", "count")))
    head = f"{found['family']}, {found['kind']}: {found['parameters']:,} parameters, {found['layers']} layers"
    said = "" if found["kind"] == "causal" else "\nNo causal language model: its layers are found, but it cannot be trained here."
    return Group(head + said, table)


# progress


@contextmanager
def progress() -> Iterator[Callable[[Status], None]]:
    """Yields a function that shows a run's status: a bar on a terminal, else a line when something changes."""
    if sys.stderr.isatty():
        with _bar() as on_status:
            yield on_status
    else:
        yield _lines()


@contextmanager
def _bar() -> Iterator[Callable[[Status], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[said]}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("checking", total=None, said="")

        def show(status: Status) -> None:
            done = status.finished + sum(status.running.values()) if status.phase == "training" else None
            bar.update(
                task,
                description=status.phase,
                total=status.trials if done is not None else None,
                completed=done or 0,
                said=_said(status),
            )

        yield show


def _lines() -> Callable[[Status], None]:
    last: list[tuple] = [()]

    def show(status: Status) -> None:
        key = (status.phase, status.finished, tuple(sorted(status.running)) if status.phase == "training" else ())
        if key != last[0]:
            last[0] = key
            print(f"{status.seconds:6.0f} s  {status.phase}  {_said(status)}".rstrip(), file=sys.stderr, flush=True)

    return show


def _said(status: Status) -> str:
    if status.phase != "training":
        return ""
    parts = [f"{status.finished}/{status.trials} trials"]
    if status.running:
        parts.append("running " + ", ".join(str(number) for number in sorted(status.running)))
    bad = [f"{count} {state}" for state, count in status.states.items() if state in ("failed", "diverged", "infeasible")]
    parts += bad
    if status.best is not None:
        parts.append(f"front {status.front}, best {status.best:.3f}")
    if status.left is not None:
        parts.append(f"about {_minutes(status.left)} left")
    return ", ".join(parts)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
