"""The command line: every command, one JSON object where it was asked for, and exit codes that mean what they say."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from contracts import command, one_object, simulated

from hpo import cli
from hpo.spec import load
from hpo.store import open_store
from hpo.study import run

COMMANDS = ["init", "data", "check", "run", "list", "show", "report", "export", "schema", "doctor", "steer", "replay", "transfer"]
GROUPS = {
    "model": ["promote", "list", "show", "rollback", "export", "evaluate", "reproduce", "remove"],
    "endpoint": ["deploy", "ask", "list", "traffic", "remove"],
}


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("HPO_STORAGE", str(tmp_path / "store"))
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(simulated(tmp_path / "store")))
    return path


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The storage folder of a finished study."""
    storage = tmp_path_factory.mktemp("done") / "store"
    run(simulated(storage))
    return storage


def hpo(*arguments, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "hpo", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


# Help


def test_all_commands_are_known_here():
    def names(app) -> list[str]:
        return sorted(info.name or info.callback.__name__ for info in app.registered_commands)

    assert names(cli.app) == sorted(COMMANDS)
    groups = {group.name: names(group.typer_instance) for group in cli.app.registered_groups}
    assert groups == {name: sorted(commands) for name, commands in GROUPS.items()}


@pytest.mark.parametrize("name", [*COMMANDS, *(f"{group} {name}" for group, names in GROUPS.items() for name in names)])
def test_every_command_explains_itself(name, capsys):
    code, out, err = command(capsys, *name.split(), "--help")
    assert (code, err) == (0, "")
    assert f"hpo {name}" in " ".join(out.split())
    assert all(info.callback.__doc__ for info in cli.app.registered_commands)


HEAVY = (
    "torch",
    "ray",
    "optuna",
    "pymoo",
    "pandas",
    "plotly",
    "sqlalchemy",
    "transformers",
    "numpy",
    "pydantic",
    "rich.progress",
)


@pytest.mark.parametrize("how", ["import hpo", "import sys, hpo.cli; sys.argv = ['hpo', '--help']; hpo.cli.main()"])
def test_nothing_heavy_is_loaded_before_it_is_needed(how):
    script = f"""
import atexit, sys
atexit.register(lambda: print("LOADED", *[name for name in {HEAVY[:8]!r} if name in sys.modules], file=sys.stderr))
{how}
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "LOADED"


def test_the_package_and_the_command_are_one_program():
    done = hpo("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in COMMANDS)


def test_a_folder_that_hides_a_package_of_ours_is_named(tmp_path):
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "__init__.py").write_text("")
    done = subprocess.run([sys.executable, "-c", "import hpo"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert f"hpo needs its own package 'training', but Python finds {tmp_path / 'training'}" in done.stderr


# JSON


def test_check_prints_one_object_and_writes_nothing(file, capsys, tmp_path):
    code, out, err = command(capsys, "check", file, "--json")
    assert (code, err) == (0, "")
    found = one_object(out)
    assert (found["study"], found["trials"], found["points"]) == ("small", 4, None)
    assert not (tmp_path / "store").exists()


def test_run_prints_one_object_and_progress_elsewhere(file, capsys):
    code, out, err = command(capsys, "run", file, "--set", "budget.trials=2", "--json")
    assert code == 0
    found = one_object(out)
    assert [trial["state"] for trial in found["trials"]] == ["complete", "complete"]
    assert found["winner"] in found["front"]
    assert os.path.isfile(found["report"])
    assert "2/2 trials" in err


def test_list_and_show_print_one_object(done, capsys):
    code, out, err = command(capsys, "list", "--storage", done, "--json")
    assert (code, err) == (0, "")
    (study,) = one_object(out)["studies"]
    assert (study["name"], study["running"], study["trials"]) == ("small", False, {"complete": 4})
    code, out, err = command(capsys, "show", "small", "--storage", done, "--json")
    assert (code, err) == (0, "")
    assert len(one_object(out)["trials"]) == 4


@pytest.mark.parametrize("what", ["study", "recipe", "data", "spaces", "studies"])
def test_schema_prints_one_object_or_a_table(what, capsys):
    code, out, _ = command(capsys, "schema", what, "--json")
    assert code == 0
    assert one_object(out)
    code, out, _ = command(capsys, "schema", what)
    assert code == 0
    assert {"study": "objectives", "recipe": "learning_rate", "data": "template", "spaces": "rank", "studies": "quickstart"}[
        what
    ] in out


def test_doctor_prints_one_object(capsys, file):
    code, out, _ = command(capsys, "doctor", "--json")
    found = one_object(out)
    assert {"python", "torch", "ray", "cores", "memory", "gpu", "4 bits", "storage"} <= set(found)
    assert code == (0 if all(found[name]["ok"] for name in ("python", "torch", "ray", "transformers", "peft", "storage")) else 1)


@pytest.mark.parametrize(
    "arguments", [("check",), ("check", "quickstart", "--nope"), ("schema", "foo"), ("nope",), ("show", "x")]
)
def test_errors_are_one_object_too(arguments, capsys, file):
    code, out, err = command(capsys, *arguments, "--json")
    assert code in (1, 2)
    assert err == ""
    assert set(one_object(out)["error"]) == {"code", "message"}


# For people


def test_check_and_show_and_list_are_for_people(file, done, capsys):
    code, out, _ = command(capsys, "check", file)
    assert code == 0
    assert "Nothing was started" in out
    code, out, _ = command(capsys, "show", "small", "--storage", done)
    assert code == 0
    assert "small: 4 complete" in out
    assert "Winner (*): trial" in out
    assert "small" in command(capsys, "list", "--storage", done)[1]


def test_run_ends_with_where_the_report_is_and_what_to_do_next(file, capsys):
    code, out, _ = command(capsys, "run", file)
    assert code == 0
    flat = "".join(out.split())
    assert "store/small/report.html" in flat
    assert "--setbudget.trials=8" in flat


def test_report_prints_its_path(done, tmp_path, capsys):
    code, out, _ = command(capsys, "report", "small", "--storage", done, "--out", tmp_path / "r.html")
    assert (code, out.strip()) == (0, str(tmp_path / "r.html"))
    assert (tmp_path / "r.html").is_file()


@pytest.mark.parametrize("suffix", ["csv", "json", "parquet"])
def test_trials_are_exported_as_a_table(done, tmp_path, suffix, capsys):
    import pandas

    out = tmp_path / f"t.{suffix}"
    assert command(capsys, "export", "small", "--storage", done, "--out", out)[0] == 0
    table = getattr(pandas, f"read_{suffix}")(out)
    assert list(table["number"]) == [0, 1, 2, 3]


def test_a_place_that_cannot_be_written_is_said_without_a_trace(done, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for arguments in (("export", "--out", tmp_path / "no" / "t.csv"), ("report", "--out", tmp_path / "file" / "r.html")):
        name, *rest = arguments
        code, _, err = command(capsys, name, "small", "--storage", done, *rest)
        assert code == 2
        assert "cannot be written" in err
    code, _, err = command(capsys, "export", "small", "--storage", done, "--out", tmp_path / "t.xls")
    assert (code, ".csv, .json, .parquet" in err) == (2, True)


# Exit codes


def test_1_is_that_something_broke(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HPO_STORAGE", str(tmp_path / "none"))
    code, _, err = command(capsys, "list")
    assert code == 1
    assert "no study record" in err
    assert not (tmp_path / "none").exists()


def test_2_is_that_the_input_is_wrong(file, done, capsys):
    assert command(capsys, "run", "quikstart")[0] == 2
    assert command(capsys, "show", "other", "--storage", done)[0] == 2
    assert command(capsys, "run", file, "--set", "budget.trials=0")[0] == 2
    assert command(capsys, "run", file)[0] == 0
    code, _, err = command(capsys, "run", file, "--set", "seed=5")
    assert code == 2
    assert "seed: was not written and is now 5." in err


def test_3_is_that_another_process_runs_the_study(file, capsys):
    loaded = load(file)
    store = open_store(loaded.spec.storage)
    record = store.add_study(loaded.spec, loaded.written, "")
    with store.hold(record.id):
        code, _, err = command(capsys, "run", file)
    assert code == 3
    assert f"is being run by process {os.getpid()}" in err
    store.close()


def test_4_is_that_no_trial_is_complete(file, capsys):
    code, out, _ = command(capsys, "run", file, "--set", "limits.peak_bytes=1", "--json")
    assert code == 4
    found = one_object(out)
    assert {trial["state"] for trial in found["trials"]} == {"infeasible"}
    assert (found["winner"], found["front"], found["certificate"]) == (None, [], None)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_130_is_that_it_was_interrupted_and_the_same_command_continues(file, tmp_path, number):
    arguments = [sys.executable, "-m", "hpo", "run", str(file), "--set", "budget.trials=100000", "--json"]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    record = tmp_path / "store" / "hpo.db"
    for line in process.stderr:
        if "1/100000 trials" in line:
            break
    time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate()
    assert process.returncode == 130
    assert out == ""
    assert err.splitlines()[-1] == "Interrupted. The same command continues."
    assert "Traceback" not in err
    store = open_store(str(record.parent), create=False)
    done = {trial.number: trial for trial in store.trials(1) if trial.final}
    store.close()
    again = hpo("run", file, "--set", f"budget.trials={max(done) + 2}", "--json")
    assert again.returncode == 0
    trials = {trial["number"]: trial for trial in one_object(again.stdout)["trials"]}
    assert sorted(trials) == list(range(max(done) + 2))
    assert all(trials[number]["params"] == trial.params for number, trial in done.items())


def test_doctor_ends_with_1_where_something_needed_is_missing(capsys, monkeypatch):
    monkeypatch.setenv("HPO_STORAGE", "/proc/nothing-can-be-kept-here")
    code, out, _ = command(capsys, "doctor", "--json")
    assert code == 1
    assert one_object(out)["storage"]["ok"] is False
