"""What a model is, for whoever finds it: the model card of a merged model.

Owns: `card` (text from a record, nothing else) and `licence_of`. Must not know: where the record comes from.

Only what the record holds is said; a model in a local folder is named by its last part, because a card is published.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.model import where_is

UNKNOWN = "unknown: see the base model"
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
USE = """## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # of this card
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", use_safetensors=True)
```"""


def licence_of(model: str, revision: str | None = None) -> str | None:
    """Returns the licence that a base model's README names in its front matter; None where it says nothing.

    Args:
        model: as in a recipe. For a Hugging Face id the README is read from the cache or the hub.
    """
    if model == "embedded":
        return "apache-2.0"  # training/embedded/README.md
    place = where_is(model)
    path = place / "README.md" if isinstance(place, Path) else _readme(place, revision)
    if path is None or not path.is_file():
        return None
    front = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", path.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    found = (
        re.search(r"^license:[ \t]*['\"]?([A-Za-z0-9][A-Za-z0-9.+_-]*)['\"]?[ \t]*$", front[1], re.MULTILINE) if front else None
    )
    return found[1] if found else None


def _readme(name: str, revision: str | None) -> Path | None:
    import huggingface_hub as hub

    try:
        return Path(hub.hf_hub_download(name, "README.md", revision=revision))
    except Exception:  # no README, no network, offline: all mean that nothing is known
        return None


def card(record: dict[str, Any]) -> str:
    """Returns a Hugging Face model card in Markdown.

    Args:
        record: what is known of the model. Needed: `lineage` with the `recipe`. Said where there: `name`, `version`;
            of the lineage `study`, `trial`, `rows` (train, or all: with the validation rows), `data` (a DataConfig), `digest`,
            `machine`; `why` and `refused`; `scores` (each `who`, `rows`, `accuracy` with its 95 % interval as `value`, `low`,
            `high`, and `loss`), `gain` over the untuned base (likewise); `checks`, `parameters`, `bytes` as
            `training.merge.merge` returns them; `licence` (default: the base's own).
    """
    recipe = record["lineage"]["recipe"]
    model = str(recipe.get("model", "embedded"))
    licence = record.get("licence") or licence_of(model, recipe.get("revision"))
    title = f"{record.get('name', 'model')}" + (f" v{record['version']}" if record.get("version") else "")
    parts = [_front(model, licence, recipe), f"# {_plain(title)}", _opening(record, model), _scores(record)]
    parts += [_data(record["lineage"]), _recipe(recipe), _interventions(record)]
    parts += [_merge(record), USE, _limits(record, licence), _made(record)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front(model: str, licence: str | None, recipe: dict) -> str:
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    # The hub knows licences by their identifiers; everything else is "other" with a name.
    lines += [f"license: {json.dumps(licence)}"] if licence else ["license: other", f"license_name: {json.dumps(UNKNOWN)}"]
    if not isinstance(where_is(model), Path):  # the hub links what is named here
        lines += [f"base_model: {json.dumps(model)}"]
    tags = ["paretune", "fine-tuned", str(recipe.get("adapter", "lora")), "safetensors"]
    return "\n".join([*lines, "tags:", *(f"- {json.dumps(tag)}" for tag in tags), "---"])


def _name(model: str) -> str:
    """Returns how a base may be called in public: no folder of anybody's machine."""
    if model == "embedded":
        return "Paretune's embedded model"
    return Path(model).name if isinstance(where_is(model), Path) else model


def _opening(record: dict, model: str) -> str:
    size = f" of {record['parameters']:,} parameters" if record.get("parameters") else ""
    precision = (record.get("checks") or {}).get("precision")
    kind = f" in {PRECISIONS.get(precision, precision)}" if precision else ""
    weight = f" ({record['bytes'] / 1e6:,.1f} MB)" if record.get("bytes") else ""
    revision = record["lineage"]["recipe"].get("revision")
    at = f" at revision {_plain(revision)}" if revision else ""
    how = "fine-tuned with an adapter that is merged into its weights. The adapter itself is in `adapter/`"
    if record["lineage"]["recipe"].get("adapter") == "full":
        how = "fine-tuned in full"
    return f"A language model{size}{kind}{weight}: {_plain(_name(model))}{at}, {how}."


def _scores(record: dict) -> str:
    if not record.get("scores"):
        return ""
    rows = []
    for entry in record["scores"]:
        accuracy, loss = entry["accuracy"], entry.get("loss")
        span = f"{_percent(accuracy['low'])} to {_percent(accuracy['high'])}"
        rows.append([entry["who"], _percent(accuracy["value"]), span, "" if loss is None else f"{loss:.4f}", entry["rows"]])
    head = ["model", "accuracy", "95 % interval", "loss (nats per token)", "test rows"]
    text = "## Scores\n\nOn test rows that no training saw. The last one is this model.\n\n" + _table(head, rows)
    if gain := record.get("gain"):
        span = f"95 % interval {_points(gain['low'])} to {_points(gain['high'])}, paired over the rows"
        text += f"\n\nGain over the untuned base: {_points(gain['value'])} points ({span})."
    if record.get("why"):
        text += f"\n\nKept: {_plain(record['why'])}."
    if record.get("refused"):
        text += f"\n\n**Below its own thresholds**: {_plain(record['refused'])}."
    return text


def _data(lineage: dict) -> str:
    trained = {"train": "the training rows", "all": "the training and the validation rows"}.get(lineage.get("rows"))
    task = (lineage.get("data") or {}).get("task")
    lines = [f"- task: {_plain(task)}"] if task else []
    lines += [f"- trained on {trained}"] if trained else []
    lines += [f"- SHA-256 of the rows and of how they are read: `{_plain(lineage['digest'])}`"] if lineage.get("digest") else []
    return "## Data\n\n" + "\n".join(lines) if lines else ""


def _recipe(recipe: dict) -> str:
    shown = {name: value for name, value in recipe.items() if value is not None} | {"model": _name(str(recipe.get("model")))}
    return "## Recipe\n\n" + _table(["setting", "value"], [[name, _value(value)] for name, value in shown.items()])


def _interventions(record: dict) -> str:
    if not (done := record.get("interventions")):
        return ""
    said = [", ".join(f"{name} {_value(value)}" for name, value in one["values"].items()) for one in done]
    rows = [[one["step"], one["did"], one["why"], values] for one, values in zip(done, said, strict=True)]
    text = f"## Interventions\n\nThe training went wrong {len(done)} times and went on, changed as follows:\n\n"
    return text + _table(["step", "what was done", "why", "values"], rows)


def _value(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _merge(record: dict) -> str:
    if not (checks := record.get("checks")):
        return ""
    said = {
        "merge": "adapter beside the dense base against merged, both in fp32",
        "trained": f"the trial's own model at {record['lineage']['recipe'].get('bits', 32)} bits against merged",
        "stored": f"merged in fp32 against the files here ({checks.get('precision', 'fp32')})",
    }
    rows = [[said[name], f"{checks[name]['difference']:.1e}", f"{checks[name]['bound']:.1e}"] for name in said if name in checks]
    text = "## The merge was checked\n\n" + (
        "The base was made dense, the adapter merged in fp32, the result cast, written, and read back without PEFT. Largest "
        f"difference of logits at {checks['positions']:,} positions of {checks['prompts']:,} prompts, as a share of the largest "
        f"logit ({checks['scale']:.3g}):\n\n" + _table(["compared", "difference", "bound"], rows)
    )
    if greedy := checks.get("greedy"):
        text += (
            f"\n\nGreedy answers equal to those of the trial's own model: {greedy['texts_equal']:.1%} of the texts, "
            f"{greedy['tokens_equal']:.1%} of the tokens."
        )
    return text


def _limits(record: dict, licence: str | None) -> str:
    lines = [
        "- It was tuned for one task and scored on rows like those it was tuned on; on anything else nothing is known.",
        "- What is wrong, unfair or private in the base model or in the rows can come back in its answers.",
    ]
    if record.get("scores") and (record["lineage"].get("data") or {}).get("task") != "classification":
        lines += ["- The accuracy counts a row only where every token of the expected answer is the most likely one."]
    if not licence:
        lines += ["- The licence of the base model is not known here: read it before using or passing on this model."]
    if (bits := record["lineage"]["recipe"].get("bits", 32)) < 16:
        lines += [f"- It was tuned on a base of {bits} bits; the weights here are those, made dense."]
    return "## Limits\n\n" + "\n".join(lines)


def _made(record: dict) -> str:
    lineage = record["lineage"]
    made = [f"study {_plain(lineage['study'])}"] if lineage.get("study") else []
    made += [f"trial {_plain(lineage['trial'])}"] if lineage.get("trial") is not None else []
    text = f"Made by Paretune{' from ' + ', '.join(made) if made else ''}."
    if machine := lineage.get("machine"):
        text += " On: " + ", ".join(f"{_plain(name)} {_plain(value)}" for name, value in machine.items()) + "."
    return "## How it was made\n\n" + text


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"


def _plain(text: Any) -> str:
    """Returns text that stays text in Markdown: one line, no table borders, no markup."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(str(text).split()))


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell if line[0] == "---" else _plain(cell) for cell in line) + " |" for line in lines)
