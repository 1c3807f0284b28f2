"""Every command in the README is executed here, or named with the test that executes it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import hpo

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
COMMANDS = [line.strip() for language, block in BLOCKS if language == "sh" for line in block.splitlines() if line.strip()]
SMALL_PROMOTED = ["--set", "promote.gain=-1"]  # two trials on few rows learn nothing
SMALL = ["--set", "budget.trials=2", "--set", "data.limit=64", "--set", "evaluation.rows=16", "--set", "evaluation.test_rows=16"]

EXECUTED = {
    "make quickstart": "test_make_quickstart_runs_the_main_job",
    "make test": "runs this; CI runs it in a clean clone",
    ". .venv/bin/activate": "test_own_data_goes_from_init_to_a_report",
    "hpo init my.jsonl --model path/or/hub-id": "test_own_data_goes_from_init_to_a_report",
    "hpo check my.yaml": "test_own_data_goes_from_init_to_a_report",
    "hpo run my.yaml": "test_own_data_goes_from_init_to_a_report",
    "hpo model promote support": "test_from_a_front_to_an_endpoint_that_an_openai_client_asks",
    "hpo endpoint deploy support": "test_from_a_front_to_an_endpoint_that_an_openai_client_asks",
    'hpo endpoint ask support "Where is my order?"': "test_from_a_front_to_an_endpoint_that_an_openai_client_asks",
    "ray up cluster.yaml": "tests/test_cluster_yaml.py, up to where it needs a cloud account",
    "ray job submit --working-dir . -- hpo run my.yaml": "tests/ray/test_job_submit.py",
}


def environment(tmp_path: Path) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "HPO_STORAGE": str(tmp_path / "storage"), "PATH": path, "HOME": str(tmp_path)}


def run(command: list[str], tmp_path: Path, cwd: Path) -> subprocess.CompletedProcess:
    done = subprocess.run(command, cwd=cwd, env=environment(tmp_path), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_each_command_of_the_readme_is_known_here():
    assert set(COMMANDS) == set(EXECUTED)


@pytest.mark.ray
@pytest.mark.skipif(not (ROOT / ".venv/.ready").exists(), reason="make sets up .venv; this checkout uses another environment")
def test_make_quickstart_runs_the_main_job(tmp_path):
    done = run(["make", "quickstart", f"STUDY=quickstart {' '.join([*SMALL, *SMALL_PROMOTED])}"], tmp_path, ROOT)
    assert "Front:" in done.stdout and "Winner" in done.stdout and "Next:" in done.stdout
    assert (tmp_path / "storage/quickstart/report.html").stat().st_size > 1_000_000
    for part in ("quickstart@v1", "live", "untuned", "tuned", "expected"):
        assert part in done.stdout
    study = hpo.open_study("quickstart", storage=str(tmp_path / "storage"))
    trials = study.history(curves=True)
    assert [t.state for t in trials] == ["complete", "complete"]
    kept = [t for t in trials if t.outcome.checkpoint]  # those of the front and the defaults
    assert {t.number for t in study.front()} | {0} <= {t.number for t in kept} and all(t.curve for t in trials)
    assert all((Path(t.outcome.checkpoint) / "adapter_model.safetensors").is_file() for t in kept)
    assert study.certificate.winner in {t.number for t in study.front()}


def test_own_data_goes_from_init_to_a_report(tmp_path):
    rows = [json.dumps({"instruction": f"say {i % 7} again", "output": f"it is {i % 7}"}) for i in range(120)]
    rows = [row.replace("say", f"please {i} say") for i, row in enumerate(rows)]
    (tmp_path / "my.jsonl").write_text("\n".join(rows))
    local = ["--set", "resources.mode=local", *SMALL]
    run(["hpo", "init", "my.jsonl", "--model", "embedded"], tmp_path, tmp_path)
    checked = run(["hpo", "check", "my.yaml"], tmp_path, tmp_path)
    assert "Nothing was started" in checked.stdout
    assert not (tmp_path / "storage").exists()
    done = run(["hpo", "run", "my.yaml", *local], tmp_path, tmp_path)
    assert "Winner" in done.stdout
    assert "my" in run(["hpo", "list"], tmp_path, tmp_path).stdout
    for command in (["show", "my"], ["report", "my"], ["export", "my", "--out", "trials.csv"]):
        run(["hpo", *command], tmp_path, tmp_path)
    assert (tmp_path / "trials.csv").read_text().count("\n") == 3


def test_from_a_front_to_an_endpoint_that_an_openai_client_asks(tmp_path):
    study = tmp_path / "support.yaml"
    study.write_text('name: support\ndata: {train: "embedded:train.jsonl"}\nspace: tiny\nrecipe: {max_length: 128, steps: 5}\n')
    run(["hpo", "run", "support.yaml", "--set", "resources.mode=local", *SMALL, *SMALL_PROMOTED], tmp_path, tmp_path)
    run(["hpo", "model", "promote", "support"], tmp_path, tmp_path)
    deploy = ["hpo", "endpoint", "deploy", "support", "--target", "local"]  # tests/ray/test_serve.py has Ray Serve
    serving = subprocess.Popen(
        deploy, cwd=tmp_path, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        while (line := serving.stderr.readline()) and "Serving until Ctrl-C" not in line:
            pass
        assert run(["hpo", "endpoint", "ask", "support", "Where is my order?"], tmp_path, tmp_path).stdout.strip()
        folder = tmp_path / "storage/endpoints/support"
        url = json.loads((folder / "address.json").read_text())["url"]
        code = next(block for language, block in BLOCKS if language == "python" and "OpenAI" in block)
        assert "http://127.0.0.1:8000/support/v1" in code
        code = code.replace("http://127.0.0.1:8000/support/v1", f"{url}/v1").replace("paretune/endpoints", "storage/endpoints")
        (tmp_path / "ask.py").write_text(code.replace("client.chat", "said = client.chat", 1) + "\nprint(said.model)\n")
        assert "support" in run([sys.executable, "ask.py"], tmp_path, tmp_path).stdout
        run(["hpo", "model", "export", "support", "--format", "gguf-q8_0", "--out", "support.gguf"], tmp_path, tmp_path)
        assert (tmp_path / "support.gguf").stat().st_size > 500_000
    finally:
        serving.send_signal(signal.SIGINT)
        serving.communicate(timeout=60)
    assert serving.returncode == 0


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    code = next(block for language, block in BLOCKS if language == "python" and "hpo.run" in block)
    assert 'hpo.run("quickstart")' in code
    sets = [value for value in [*SMALL, *SMALL_PROMOTED] if value != "--set"] + ["resources.mode=local"]
    code = code.replace('hpo.run("quickstart")', f'hpo.run("quickstart", {sets!r})')
    (tmp_path / "notebook.py").write_text(code + "\nassert len(study.trials()) == 2\n")
    run([sys.executable, "notebook.py"], tmp_path, tmp_path)


def test_the_yaml_of_the_readme_is_a_study(tmp_path):
    from hpo import spec, written

    text = next(block for language, block in BLOCKS if language == "yaml")
    assert spec.build(written.parse(text), tmp_path).name == "support"


def test_the_tree_of_the_readme_is_there():
    tree = next(block for _, block in BLOCKS_ANY if "search_spaces/  " in block)
    named = re.findall(r"[\w/]+\.py|[\w/]+/(?=\s)", tree)
    present = {p.name for p in ROOT.rglob("*.py")} | {p.name for p in ROOT.rglob("*") if p.is_dir() and ".venv" not in p.parts}
    assert named and all(name.rstrip("/").rsplit("/", 1)[-1] in present for name in named)


BLOCKS_ANY = re.findall(r"```(\w*)\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
