"""From a registered model to an endpoint: loaded, checked, switched; whatever goes wrong before that, the old one serves."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from contracts import command, one_object

import hpo
from hpo import endpoint as endpoints
from hpo.errors import BackendError, InputError, NotFound
from hpo.study import deploy, side_by_side
from serving.endpoint import read_table, replicas

STUDY = {
    "name": "bot", "recipe": {"max_length": 128, "steps": 60, "learning_rate": 0.01},
    "data": {"train": "embedded:train.jsonl", "validation": "embedded:validation.jsonl", "test": "embedded:test.jsonl",
             "template": "{instruction}\nAnswer:"},
    "evaluation": {"rows": 40, "test_rows": 60, "reports": 1}, "space": {"rank": [8, 16], "bits": [32, 4]},
    "algorithm": "random", "budget": {"trials": 2}, "resources": {"mode": "local"}, "promote": {"gain": -1, "rows": "train"},
}  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study that was really trained, with both of its trials promoted: bot@v1 and bot@v2."""
    study = hpo.run(STUDY | {"storage": str(tmp_path_factory.mktemp("storage"))})
    for number in (0, 1):
        study.promote(trial=number)
    return study


@pytest.fixture
def served(study):
    """bot@v1, live on an endpoint in this process; everything is put back afterwards."""
    made = deploy(study.store, study.store.model("bot", 1), target="local")
    yield made
    made.close()
    shutil.rmtree(made.folder)
    for model in study.models():
        study.store.set_stage("bot", model.version, "candidate")


def spec_of(study):
    return study.spec


def stages(study) -> dict[int, str]:
    return {m.version: m.stage for m in study.models()}


def test_a_deployed_model_answers_what_it_answered_when_it_was_merged(study, served):
    model = study.store.model("bot")
    assert (model.version, model.stage) == (1, "live")
    for prompt, answer in model.prompts[:3]:
        assert served.ask(prompt, chat=False, max_tokens=32)["text"].strip() == answer.strip()
        question = prompt.removesuffix("\nAnswer:")
        assert served.ask(question, max_tokens=32)["text"].strip() == answer.strip()  # its chat template asks as the rows did
    assert (served.folder / "token").stat().st_mode & 0o777 == 0o600
    assert served.token not in (served.folder / "endpoint.json").read_text()


def test_what_is_deployed_is_the_model_that_was_named_and_not_a_newer_one(study, served):
    older = study.store.model("bot", 1)
    study.deploy()  # the newest
    assert served.ask("hello", max_tokens=2)["model"] == "bot@v2"
    study.deploy(older)
    assert served.ask("hello", max_tokens=2)["model"] == "bot@v1" and stages(study) == {1: "live", 2: "previous"}


def test_the_front_is_served_as_adapters_beside_it_by_name(study, served):
    names = {a.name for a in served.table.adapters}
    members = {t.number for t in study.front()}
    assert names == {"base", "fast", "small", *(f"trial-{n}" for n in members)}
    asked = side_by_side(served)
    assert [entry["who"] for entry in asked] == ["asked", "untuned", "tuned", "expected"]
    said = {name: served.ask(study.store.model("bot", 1).prompts[0][0], model=f"bot@{name}", chat=False) for name in names}
    assert asked[1]["text"].startswith(said["base"]["text"].split("\n")[0])
    for version in (1, 2):  # a trial as an adapter says what its merged model says, unless the retrained one was kept
        model = study.store.model("bot", version)
        if model.kept == "trial" and model.lineage.trial in members:
            text = served.ask(model.prompts[0][0], model=f"bot@trial-{model.lineage.trial}", chat=False, max_tokens=32)["text"]
            assert text.strip() == model.prompts[0][1].strip()
    with pytest.raises(BackendError, match="404"):
        served.ask("x", model="bot@../../etc/passwd")


def test_another_version_takes_over_without_a_failed_request_and_a_rollback_goes_back(study, served):
    prompt = study.store.model("bot", 1).prompts[0][0]
    wanted = {f"bot@v{m.version}": m.prompts[0][1].strip() for m in study.models()}
    seen, ended, failures = [], threading.Event(), []

    def keep_asking():
        while not ended.is_set():
            try:
                said = served.ask(prompt, chat=False, max_tokens=32)
                seen.append((said["model"], said["text"].strip()))
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=keep_asking) for _ in range(3)]
    for thread in threads:
        thread.start()
    again = deploy(study.store, study.store.model("bot", 2))
    assert not again.mine and again.url == served.url
    assert stages(study) == {1: "previous", 2: "live"}
    assert served.ask(prompt, chat=False)["model"] == "bot@v2"
    assert [v.version for v in served.table.versions] == [2]
    back = endpoints.rollback(study.store, spec_of(study), "bot")
    ended.set()
    for thread in threads:
        thread.join()
    assert back.version == 1 and stages(study) == {1: "live", 2: "previous"}
    assert failures == []
    assert {label for label, _ in seen} == {"bot@v1", "bot@v2"}
    assert all(text == wanted[label] for label, text in seen), "an answer was mixed"


def test_a_canary_takes_its_share_and_the_versions_are_compared(study, served, capsys):
    deploy(study.store, study.store.model("bot", 2), share=0.25)
    assert {v.version: v.share for v in served.table.versions} == {1: 0.75, 2: 0.25}
    assert stages(study) == {1: "live", 2: "candidate"}
    said = [served.ask("hello", user=f"user-{n}", max_tokens=1)["model"] for n in range(80)]
    assert 8 <= said.count("bot@v2") <= 36
    assert [served.ask("hello", user=f"user-{n}", max_tokens=1)["model"] for n in range(10)] == said[:10]
    storage = ("--storage", study.spec.storage)
    time.sleep(1.5)  # replicas write what they counted every second
    code, out, _ = command(capsys, "endpoint", "traffic", "bot", "--json", *storage)
    shown = one_object(out)
    assert code == 0 and {row["version"] for row in shown["comparison"]} >= {"v1", "v2"}
    code, out, _ = command(capsys, "endpoint", "traffic", "bot", *storage)
    assert code == 0 and "95 %" in out
    code, _, _ = command(capsys, "endpoint", "traffic", "bot", "1=0", "2=1", *storage)
    assert code == 0 and stages(study) == {1: "previous", 2: "live"}
    code, _, err = command(capsys, "endpoint", "traffic", "bot", "1=0.5", "2=0.9", *storage)
    assert code == 2 and "add up to 1" in err


def test_a_version_that_does_not_load_or_answers_otherwise_is_not_switched_to(study, served, tmp_path):
    good = study.store.model("bot", 2)
    broken = tmp_path / "broken"
    shutil.copytree(good.folder, broken)
    weights = broken / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1000] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InputError, match="bot@v2: does not load: .*SHA-256"):
        deploy(study.store, good.model_copy(update={"folder": str(broken)}))
    others = tuple((prompt, "something else") for prompt, _ in good.prompts)
    with pytest.raises(InputError, match="bot@v2: answers .* where the merged model answered 'something else'"):
        deploy(study.store, good.model_copy(update={"prompts": others}))
    assert [v.version for v in served.table.versions] == [1]
    assert stages(study) == {1: "live", 2: "candidate"}
    assert served.ask("hello", max_tokens=2)["model"] == "bot@v1"


KILLED = """
import os, sys
from hpo import endpoint, study
storage, phase = sys.argv[1:]
real = endpoint._switch if phase == "switched" else None
def tell(status):
    if status.phase == phase:
        os._exit(9)
if real:
    def _switch(*given):
        real(*given)
        os._exit(9)
    endpoint._switch = _switch
opened = study.open_study("bot", storage=storage)
study.deploy(opened.store, opened.store.model("bot", 2), on_status=tell)
"""


def test_a_deployment_killed_at_any_moment_leaves_the_old_one_serving_and_is_finished_by_the_same_command(study, served):
    for phase in ("deploy", "check", "switch"):
        done = subprocess.run([sys.executable, "-c", KILLED, study.spec.storage, phase], capture_output=True, text=True)
        assert done.returncode == 9, done.stderr
        assert served.ask("hello", max_tokens=2)["model"] == "bot@v1"
        assert stages(study) == {1: "live", 2: "candidate"}
    deploy(study.store, study.store.model("bot", 2))
    assert served.ask("hello", max_tokens=2)["model"] == "bot@v2"
    assert stages(study) == {1: "previous", 2: "live"}
    assert [v.version for v in read_table(served.folder).versions] == [2]


def test_a_live_version_cannot_be_removed_and_a_first_one_cannot_be_a_canary(study, served):
    with pytest.raises(InputError, match="bot@v1: answers requests"):
        endpoints.remove_model(study.store, spec_of(study), study.store.model("bot", 1))
    assert Path(study.store.model("bot", 1).folder).is_dir()
    with pytest.raises(InputError, match="no other version"):
        deploy(study.store, study.store.model("bot", 1), share=0.5)
    with pytest.raises(InputError, match="share: must be above 0"):
        deploy(study.store, study.store.model("bot", 1), share=1.5)


def test_an_endpoint_is_found_listed_and_asked_by_commands_and_forgotten_when_removed(study, served, capsys):
    at = ("--storage", study.spec.storage)
    code, out, _ = command(capsys, "endpoint", "ask", "bot", "hello", "--json", *at)
    assert code == 0 and one_object(out)["model"] == "bot@v1"
    code, out, _ = command(capsys, "endpoint", "list", "--json", *at)
    (listed,) = one_object(out)["endpoints"]
    assert listed["url"] == served.url and listed["versions"] == {"1": 1.0} and listed["replicas"] == 1
    assert served.token not in out
    code, _, err = command(capsys, "endpoint", "ask", "nobody", "hello", *at)
    assert code == 2 and "There are: bot" in err
    for name in ("../bot", "/etc", "bot/..", ""):
        with pytest.raises(NotFound):
            endpoints.open_endpoint(study.spec.storage, name)


def test_hpo_endpoint_deploy_serves_until_it_is_interrupted(study, tmp_path):
    arguments = ["-m", "hpo", "endpoint", "deploy", "bot", "--target", "local", "--storage", study.spec.storage]
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    folder = endpoints.folder_of(study.spec.storage, "bot")
    try:
        said = [process.stderr.readline()]
        while said[-1] and "Serving until Ctrl-C" not in said[-1]:
            said.append(process.stderr.readline())
        made = endpoints.open_endpoint(study.spec.storage, "bot")
        assert made.ask("hello", max_tokens=2)["model"] == "bot@v2", said  # the newest, as none is live
    finally:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    assert "Endpoint bot at http://127.0.0.1:" in out
    assert replicas(folder) == []
    with pytest.raises(BackendError, match="does not answer"):
        made.ask("hello")
    # Removed, which ends the process that serves it.
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "Serving until Ctrl-C" not in process.stderr.readline():
        assert process.poll() is None
    endpoints.remove(study.spec.storage, "bot")
    assert process.wait(90) == 0 and not folder.exists()
    process.communicate()
    for model in study.models():
        study.store.set_stage("bot", model.version, "candidate")
