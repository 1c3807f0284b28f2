"""The lm-evaluation-harness really runs on a model folder, and finds what is plainly computed; without it, a remedy."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from training import harness
from training.errors import InputError
from training.model import EMBEDDED, load_model, load_tokenizer
from training.recipe import Recipe

HERE = importlib.util.find_spec("lm_eval") is not None
CHOICES = ["billing | high", "delivery | low", "repairs | normal"]
TASK = """
task: routing
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{instruction}}}}\\nAnswer:"
doc_to_choice: {choices}
doc_to_target: "{{{{wanted}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.skipif(HERE, reason="the extra lm-eval is installed")
def test_without_the_extra_the_remedy_is_told():
    with pytest.raises(InputError, match=r"pip install 'paretune\[lm-eval\]'"):
        harness.run(EMBEDDED, ["arc_easy"])


@pytest.fixture
def rows(tmp_path, monkeypatch):
    for name in ("HF_DATASETS_CACHE", "HF_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    rows = [json.loads(line) for line in (EMBEDDED.parent / "test.jsonl").read_text().splitlines()[:12]]
    rows = [row | {"wanted": i % len(CHOICES)} for i, row in enumerate(rows)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "routing.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl", choices=json.dumps(CHOICES)))
    return rows


@pytest.mark.skipif(not HERE, reason="the extra lm-eval is not installed")
@pytest.mark.filterwarnings("default")
def test_a_task_of_ones_own_is_scored_as_a_plain_computation_does(rows, tmp_path):
    found = harness.run(EMBEDDED, ["routing"], include=str(tmp_path))
    model, tokenizer = load_model(Recipe()).eval(), load_tokenizer(Recipe())
    right = 0
    for row in rows:
        prompt = tokenizer(row["instruction"] + "\nAnswer:")["input_ids"]
        sums = []
        for choice in CHOICES:
            tail = tokenizer(" " + choice)["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([prompt + tail])).logits[0].log_softmax(-1)
            sums.append(sum(logits[len(prompt) + i - 1, token].item() for i, token in enumerate(tail)))
        right += sums.index(max(sums)) == row["wanted"]
    assert found["routing"]["acc"] == pytest.approx(right / len(rows))
    assert found["routing"]["acc_stderr"] >= 0
    with pytest.raises(InputError, match="the harness has no task no_such_task"):
        harness.run(EMBEDDED, ["no_such_task"], include=str(tmp_path))
