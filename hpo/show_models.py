"""How models and endpoints look on a terminal and as JSON. Decides nothing."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from hpo.show import number

if TYPE_CHECKING:
    from hpo.endpoint import Endpoint
    from hpo.model import Model


def model_record(model: Model) -> dict[str, Any]:
    """Returns a registered model as plain values."""
    return {"label": model.label} | model.model_dump(mode="json", exclude={"prompts"})


def model_text(model: Model):
    """Returns what is known of a model, as a renderable."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    lineage = model.lineage
    scores = [f"{s.who} {s.accuracy.value:.3f} [{s.accuracy.low:.3f}, {s.accuracy.high:.3f}]" for s in model.scores]
    rows = [
        ("stage", model.stage + (f"; not to be deployed: {model.refused}" if model.refused else "")),
        ("from", f"trial {lineage.trial} of study {lineage.study}; base {lineage.base}; rows {lineage.digest[:12]}"),
        ("kept", model.why),
        *((f"step {one['step']}", f"{one['did']}: {one['why']}") for one in model.interventions),
        ("accuracy", f"{', '.join(scores)} on {model.scores[-1].rows} rows that none of them saw"),
        ("checks", _checks(model.checks)),
        ("folder", model.folder),
        ("digest", model.digest),
    ]
    for name, said in rows:
        table.add_row(f"[bold]{name}[/bold]", escape(said))
    return Group(f"[bold]{model.label}[/bold]", table)


def _checks(checks: dict[str, Any]) -> str:
    """Returns how near merged, trained and stored model are: differences of logits as shares of the largest."""
    words = {"merge": "merged and adapter in fp32", "trained": "merged and the trial's own", "stored": "stored and merged"}
    found = [(said, checks[name]) for name, said in words.items() if name in checks]
    parts = [f"{said} {check['difference']:.1e} (bound {check['bound']:g})" for said, check in found]
    if "greedy" in checks:
        parts.append(f"equal answers {checks['greedy']['texts_equal']:.0%}")
    asked = f"on {checks.get('prompts', 0)} prompts, largest difference of logits: "
    return f"{asked}{'; '.join(parts)}; served in {checks.get('precision')}"


def models_text(found: list[Model]):
    """Returns models as a table."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    for name in ("model", "stage", "accuracy", "from", "base", "made"):
        table.add_column(name)
    for m in found:
        accuracy = m.scores[-1].accuracy
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(m.created))
        score = f"{accuracy.value:.3f} \\[{accuracy.low:.3f}, {accuracy.high:.3f}]"
        table.add_row(m.label, m.stage, score, f"trial {m.lineage.trial} of {m.lineage.study}", m.lineage.base, made)
    return table if found else "No models yet. Next: hpo model promote STUDY."


def reproduced_text(model: Model, said: dict[str, Any]) -> str:
    """Returns whether a model made again matches."""
    verdict = "matches" if said["matches"] else "does not match"
    text = (
        f"{model.label} made again {verdict}: the largest difference of a weight is {said['largest']:.2g} of its tensor's largest"
    )
    text += f" (tolerance {said['tolerance']:g})"
    if not said["matches"]:
        text += f", in {said.get('tensor')}"
    differs = [f"{name} was {then} and is {now}" for name, (then, now) in said["differs"].items()]
    return text + "." + (f" Not as it was then: {'; '.join(differs)}." if differs else "")


# endpoints


def endpoint_record(made: Endpoint) -> dict[str, Any]:
    """Returns an endpoint as plain values; never its token."""
    from hpo.endpoint import live_replicas

    table = made.table
    return {
        "endpoint": made.name, "url": made.url, "token_file": str(made.folder / "token"), "generation": table.generation,
        "replicas": len(live_replicas(made.folder)), "versions": {v.version: v.share for v in table.versions},
        "adapters": [f"{made.name}@{a.name}" for a in table.adapters],
    }  # fmt: skip


def endpoint_text(made: Endpoint) -> str:
    """Returns where an endpoint is and how it is asked."""
    said = endpoint_record(made)
    shares = ", ".join(f"v{version} {share:.0%}" for version, share in said["versions"].items())
    return (
        f"Endpoint {made.name} at {made.url} ({said['replicas']} replicas; {shares})\n"
        f"Beside it, from the front: {', '.join(said['adapters']) or 'nothing'}\n"
        f"Token: {said['token_file']}\n"
        f"Ask: hpo endpoint ask {made.name} TEXT, or any OpenAI client with base_url {made.url}/v1"
    )


def asked_text(asked: list[dict[str, Any]]):
    """Returns one question and what each model answered to it over HTTP."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for entry in asked:
        table.add_row(f"[bold]{entry['who']}[/bold]", escape(entry["text"].strip()))
    return table


def endpoints_text(found: list[Endpoint]):
    """Returns endpoints as a table."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    for name in ("endpoint", "url", "replicas", "versions", "adapters"):
        table.add_column(name)
    for made in found:
        said = endpoint_record(made)
        shares = ", ".join(f"v{version} {share:.0%}" for version, share in said["versions"].items())
        table.add_row(made.name, made.url, str(said["replicas"] or "none alive"), shares, str(len(said["adapters"])))
    return table if found else "No endpoints yet. Next: hpo endpoint deploy MODEL."


def comparison_text(rows: list[dict[str, Any]]):
    """Returns how the versions compare, as a table."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, title="Answers so far, with 95 % intervals", title_justify="left")
    shown = ("errors", "seconds", "first_token", "feedback")
    for name in ("version", "requests", *shown, "verdict"):
        table.add_column(name)
    for row in rows:
        cells = [_interval(row.get(name)) for name in shown]
        table.add_row(row["version"], str(row["requests"]), *cells, str(row.get("verdict", "")))
    return table if rows else "No requests yet."


def _interval(found: dict[str, Any] | None) -> str:
    if not found or found.get("value") is None:
        return "-"
    if found["low"] is None:
        return number(found["value"])
    return f"{number(found['value'])} \\[{number(found['low'])}, {number(found['high'])}]"


def harness_text(model: Model, found: dict[str, dict[str, Any]]):
    """Returns the scores of the lm-evaluation-harness, as a table."""
    from rich import box
    from rich.table import Table

    table = Table(title=f"{model.label} by the lm-evaluation-harness", box=box.SIMPLE, title_justify="left")
    for name in ("task", "score", "value", "standard error"):
        table.add_column(name)
    for task, scores in found.items():
        for name in [n for n in scores if not n.endswith("_stderr")]:
            error = scores.get(f"{name}_stderr")
            table.add_row(task, name, *(f"{v:.4g}" if isinstance(v, (int, float)) else "-" for v in (scores[name], error)))
    return table
