"""A model card says what the record holds, nothing else, and no place of anybody's machine."""

from __future__ import annotations

import pytest

from training.card import UNKNOWN, card, licence_of
from training.recipe import Recipe

LINEAGE = {
    "study": "quick|start\n# not a title", "trial": 7, "recipe": Recipe(rank=8, bits=4, adapter="rslora").model_dump(mode="json"),
    "rows": "all", "digest": "ab" * 32, "machine": {"torch": "2.13.0", "python": "3.11"},
    "data": {"train": "/somebody/train.jsonl", "task": "instruction"},
}  # fmt: skip


def scored(who: str, value: float, low: float, high: float) -> dict:
    return {"who": who, "number": 7, "rows": 600, "accuracy": {"value": value, "low": low, "high": high}, "loss": 0.1234}


RECORD = {
    "name": "quickstart", "version": 3, "lineage": LINEAGE, "kept": "retrained", "why": "the retrained adapter", "refused": "",
    "scores": [scored("untuned", 0, 0, 0.006), scored("trial", 0.371, 0.33, 0.41), scored("retrained", 0.99, 0.98, 0.997)],
    "gain": {"value": 0.99, "low": 0.98, "high": 0.997}, "parameters": 795520, "bytes": 1594136,
    "checks": {
        "precision": "bf16", "prompts": 16, "positions": 549, "scale": 20.42,
        "merge": {"difference": 1e-6, "bound": 1e-4}, "trained": {"difference": 2e-6, "bound": 1e-4},
        "stored": {"difference": 0.011, "bound": 0.05}, "greedy": {"texts_equal": 0.9375, "tokens_equal": 0.984, "bound": 0.8},
    },
}  # fmt: skip


def on(**recipe) -> dict:
    return RECORD | {"lineage": LINEAGE | {"recipe": LINEAGE["recipe"] | recipe}}


def front(text: str) -> dict:
    from ruamel.yaml import YAML

    return YAML(typ="safe").load(text.split("---\n")[1])


def test_everything_in_the_record_is_said():
    text = card(RECORD)
    for said in (
        "# quickstart v3", "795,520 parameters", "bfloat16", "1.6 MB", "the training and the validation rows", "ab" * 32,
        "| trial | 37.1 % | 33.0 % to 41.0 % | 0.1234 | 600 |", "untuned base: +99.0 points (95 % interval +98.0 to +99.7",
        "1.1e-02 | 5.0e-02", "93.8% of the texts", "| rank | 8 |", "| bits | 4 |", "trial 7", "torch 2.13.0", "549 positions",
        "Kept: the retrained adapter.", "base of 4 bits",
    ):  # fmt: skip
        assert said in text, said


def test_the_front_matter_is_what_the_hub_reads():
    from huggingface_hub import ModelCard

    found = front(card(RECORD))
    assert found["license"] == "apache-2.0" and found["library_name"] == "transformers" and "rslora" in found["tags"]
    assert "base_model" not in found  # the embedded one is not on the hub
    assert ModelCard(card(RECORD)).data.license == "apache-2.0"
    hub = on(model="some/model", revision="main") | {"licence": "mit"}
    assert front(card(hub))["base_model"] == "some/model" and front(card(hub))["license"] == "mit"


def test_the_least_record_gives_a_card_that_claims_nothing():
    text = card({"lineage": {"recipe": Recipe().model_dump(mode="json")}})
    assert "Scores" not in text and "checked" not in text and "Data" not in text and "None" not in text
    assert text.startswith("---\n") and text.endswith("\n")


def test_a_model_below_its_thresholds_says_so():
    assert "Below" not in card(RECORD)
    assert "**Below its own thresholds**: accuracy 0.1" in card(RECORD | {"refused": "accuracy 0.1"})


def test_a_registered_model_is_a_record():
    from hpo.certificate import Interval, Scored
    from hpo.model import Lineage, Model

    interval = Interval(value=0.5, low=0.4, high=0.6)
    lineage = Lineage(study="s", trial=1, recipe=Recipe(), rows="train", data={"task": "completion"}, digest="d", base="embedded")
    model = Model(name="n", version=1, key="k", folder="/somebody/f", digest="e", created=0, lineage=lineage, kept="trial",
                  why="w", scores=(Scored(who="untuned", number=None, rows=9, accuracy=interval, loss=1.5),),
                  gain=interval, checks=RECORD["checks"])  # fmt: skip
    text = card(model.model_dump(mode="json"))
    assert "| untuned | 50.0 % | 40.0 % to 60.0 % | 1.5000 | 9 |" in text and "# n v1" in text and "somebody" not in text


def test_text_of_users_stays_text():
    text = card(RECORD | {"name": "a`b`[x](y)"})
    assert "quick\\|start \\# not a title" in text and "\n# not" not in text and "# a\\`b\\`\\[x\\](y)" in text


def test_no_folder_of_this_machine_is_published(tmp_path):
    model = tmp_path / "somebody" / "their-model"
    model.mkdir(parents=True)
    text = card(on(model=str(model)))
    assert str(tmp_path) not in text and "somebody" not in text and "their-model" in text  # the data's place neither
    assert front(text)["license"] == "other" and front(text)["license_name"] == UNKNOWN
    assert "The licence of the base model is not known" in text


@pytest.mark.parametrize(("readme", "licence"), [
    ("---\nlicense: llama3.2\ntags:\n- x\n---\n# A", "llama3.2"),
    ("---\nlicense: 'mit'\n---\n", "mit"),
    ("---\nlicense:\n- mit\n---\n", None),
    ("# A\nlicense: mit\n", None),
    ("---\nlicense: x\ninjected: [\n", None),
    ("", None),
    (None, None),
])  # fmt: skip
def test_the_licence_is_that_of_the_base(tmp_path, readme, licence):
    if readme is not None:
        (tmp_path / "README.md").write_text(readme)
    assert licence_of(str(tmp_path)) == licence


def test_the_licence_of_a_model_that_cannot_be_reached_is_unknown():
    assert licence_of("nobody/nothing") is None and licence_of("embedded") == "apache-2.0"
