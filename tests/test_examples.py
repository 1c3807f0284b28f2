"""Examples run: the notebook, and studies on models and data that others made, where those are present."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import hpo

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("PARETUNE_SHARED", ROOT.parent / "shared" / "data"))
needs_shared = pytest.mark.skipif(
    not (SHARED / "models/stories260K/hf/model.safetensors").exists(), reason=f"no models and data of others at {SHARED}"
)
SMALL = ["budget.trials=2", "resources.mode=local", "evaluation.rows=40", "evaluation.test_rows=40"]


def test_the_notebook_searches_and_plots(tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("HPO_STORAGE", str(tmp_path / "storage"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    book = nbformat.read(ROOT / "examples/notebooks/search_and_plot.ipynb", as_version=4)
    for cell in book.cells:
        cell.source = cell.source.replace("data.limit=400", "data.limit=64").replace("evaluation.rows=100", "evaluation.rows=16")
    NotebookClient(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("application/vnd.plotly.v1+json" in output.get("data", {}) for output in shown)
    assert any("<table" in output.get("data", {}).get("text/html", "") for output in shown)


@needs_shared
def test_classification_on_clinc150_with_a_model_made_by_others(tmp_path, monkeypatch):
    out = tmp_path / "clinc150"
    subprocess.run([sys.executable, ROOT / "examples/clinc150.py", SHARED / "text/clinc150", out], check=True)
    monkeypatch.setenv("PARETUNE_DATA", str(tmp_path))
    monkeypatch.setenv("PARETUNE_MODELS", str(SHARED / "models"))
    sets = [*SMALL, "data.limit=400", "start=[{rank: 16, alpha: 2, learning_rate: 0.01, batch_size: 8, bits: 4}]"]
    study = hpo.run("clinc150", [f"storage={tmp_path / 'storage'}", *sets])
    assert list(study.trials()["state"]) == ["complete", "complete"]
    assert_loss_fell(study)


@needs_shared
def test_completion_on_wikisql_with_a_model_made_by_others(tmp_path, monkeypatch):
    monkeypatch.setenv("PARETUNE_DATA", str(SHARED / "text"))
    monkeypatch.setenv("PARETUNE_MODELS", str(SHARED / "models"))
    sets = [*SMALL, "data.limit=200", "start=[{rank: 16, alpha: 2, learning_rate: 0.01, batch_size: 4, bits: 32}]"]
    study = hpo.run("wikisql", [f"storage={tmp_path / 'storage'}", *sets])
    assert list(study.trials()["state"]) == ["complete", "complete"]
    assert_loss_fell(study)


def assert_loss_fell(study):
    untuned, *_, winner = study.certificate.scores
    assert winner.loss < 0.8 * untuned.loss
    for trial in study.history(curves=True):
        losses = [point.metrics["loss"] for point in trial.curve if "loss" in point.metrics]
        assert losses[-1] < losses[0]
