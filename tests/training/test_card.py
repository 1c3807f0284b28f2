"""A model card says what the record holds, nothing else, and no place of anybody's machine."""

from __future__ import annotations

import pytest

from training.card import UNKNOWN, card, licence_of
from training.recipe import Recipe

RECORD = {
    "name": "quickstart", "version": 3, "study": "quick|start\n# not a title", "trial": 7,
    "recipe": Recipe(rank=8, bits=4, adapter="rslora").model_dump(mode="json"),
    "data": {"digest": "ab" * 32, "task": "instruction", "rows": {"train": 1200, "validation": 400, "test": 600}},
    "scores": [
        {"who": "untuned", "accuracy": 0.0, "low": 0.0, "high": 0.006, "loss": 4.2, "rows": 600},
        {"who": "defaults", "accuracy": 0.371, "low": 0.33, "high": 0.41, "rows": 600},
        {"who": "trial 7", "accuracy": 0.99, "low": 0.98, "high": 0.997, "rows": 600},
    ],
    "gain": {"value": 0.619, "low": 0.58, "high": 0.66, "over": "defaults"},
    "checks": {
        "prompts": 16, "positions": 549, "scale": 20.42,
        "merge": {"difference": 1e-6, "bound": 1e-4}, "trained": {"difference": 2e-6, "bound": 1e-4},
        "stored": {"difference": 0.011, "bound": 0.05}, "greedy": {"texts_equal": 0.9375, "tokens_equal": 0.984, "bound": 0.8},
    },
    "precision": "bf16", "parameters": 795520, "bytes": 1594136, "versions": {"torch": "2.13.0", "python": "3.11"},
}  # fmt: skip


def front(text: str) -> dict:
    from ruamel.yaml import YAML

    return YAML(typ="safe").load(text.split("---\n")[1])


def test_everything_in_the_record_is_said():
    text = card(RECORD)
    for said in (
        "# quickstart v3", "795,520 parameters", "bfloat16", "1.6 MB", "1,200 train, 400 validation, 600 test", "ab" * 32,
        "| defaults | 37.1 % | 33.0 % to 41.0 % |", "Gain over defaults: +61.9 points (95 % interval +58.0 to +66.0).",
        "1.1e-02 | 5.0e-02", "93.8% of the texts", "| rank | 8 |", "| bits | 4 |", "trial 7", "torch 2.13.0", "549 positions",
    ):  # fmt: skip
        assert said in text, said


def test_the_front_matter_is_what_the_hub_reads():
    from huggingface_hub import ModelCard

    found = front(card(RECORD))
    assert found["license"] == "apache-2.0" and found["library_name"] == "transformers" and "rslora" in found["tags"]
    assert "base_model" not in found  # the embedded one is not on the hub
    assert ModelCard(card(RECORD)).data.license == "apache-2.0"
    hub = RECORD | {"recipe": RECORD["recipe"] | {"model": "some/model", "revision": "main"}, "licence": "mit"}
    assert front(card(hub))["base_model"] == "some/model" and front(card(hub))["license"] == "mit"


def test_the_least_record_gives_a_card_that_claims_nothing():
    text = card({"recipe": Recipe().model_dump(mode="json")})
    assert "Scores" not in text and "checked" not in text and "Data" not in text and "None" not in text
    assert text.startswith("---\n") and text.endswith("\n")


def test_text_of_users_stays_text():
    text = card(RECORD | {"name": "a`b`[x](y)"})
    assert "quick\\|start \\# not a title" in text and "\n# not" not in text and "# a\\`b\\`\\[x\\](y)" in text


def test_no_folder_of_this_machine_is_published(tmp_path):
    model = tmp_path / "somebody" / "their-model"
    model.mkdir(parents=True)
    text = card(RECORD | {"recipe": RECORD["recipe"] | {"model": str(model)}})
    assert str(tmp_path) not in text and "somebody" not in text and "their-model" in text
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
