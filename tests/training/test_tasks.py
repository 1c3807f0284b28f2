"""Every kind of task keeps its contract; classification chooses the likeliest label."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from training import tasks
from training.data import prepare, read
from training.model import load_model, load_tokenizer
from training.recipe import DataConfig, Recipe

NAMES = tasks.NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_task_has_what_the_others_have(name):
    task = tasks.load(name)
    assert set(task.OPTIONAL) <= set(task.COLUMNS) and callable(task.score)
    assert re.findall(r"\{(\w+)\}", task.TEMPLATE) and f"{{{task.RESPONSE}}}" not in task.TEMPLATE
    json.loads(task.__doc__.strip().splitlines()[-1])  # an example row


def test_the_folder_holds_the_tasks_and_no_more():
    files = {path.stem for path in Path(tasks.__file__).parent.glob("*.py")} - {"__init__"}
    assert files == set(NAMES)


def prepared(tmp_path, tokenizer):
    labels = ("red", "dark green", "blue")
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"thing {i}", "label": labels[i % 3]}) + "\n" for i in range(30)))
    config = DataConfig(train=str(path), task="classification")
    return prepare(read(config), config, tokenizer, 64)


@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_classification_is_by_the_likelihood_of_the_whole_label(llama, tmp_path, batch_size):
    model, tokenizer = load_model(Recipe(model=llama)), load_tokenizer(Recipe(model=llama))
    found = prepared(tmp_path, tokenizer)
    scores = tasks.load("classification").score(model, found.train, batch_size=batch_size, labels=found.labels)
    model.eval()
    for i, (ids, length) in enumerate(zip(found.train.ids, found.train.prompt_lengths, strict=True)):
        likelihoods = []
        for label in found.labels:
            with torch.no_grad():
                predicted = model(torch.tensor([ids[:length] + label])).logits[0].log_softmax(-1)
            likelihoods.append(sum(predicted[length - 1 + k, token].item() for k, token in enumerate(label)))
        own = found.labels.index(ids[length:])
        assert scores["nll"][i] == pytest.approx(-likelihoods[own], abs=1e-3)
        assert scores["right"][i] == float(max(range(3), key=likelihoods.__getitem__) == own)
        assert scores["tokens"][i] == len(found.labels[own])
    assert 0 < sum(scores["right"]) < len(found.train)  # a random model prefers one label


def test_completion_is_scored_as_instructions_are():
    assert tasks.load("completion").score is tasks.load("instruction").score
    divide = tasks.load("completion").divide
    assert divide({"text": "all of it"}, None) == {"prompt": "", "response": "all of it"}
    assert divide({"text": "a: b: c "}, ":") == {"prompt": "a: b:", "response": "c"}
    assert divide({"text": "a: "}, ":") is None and divide({"text": "a"}, ":") is None
