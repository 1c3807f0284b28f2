"""The command line on a real cluster: started by `ray start`, with a token, driven by `ray job submit`; and killed midway."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import psutil
import pytest

pytest.importorskip("ray.dashboard.modules.job.sdk")

from hpo.study import open_study  # noqa: E402

pytestmark = pytest.mark.ray

STUDY = """\
name: submitted
storage: {storage}
data:
  train: rows.jsonl
  validation: held_out.jsonl
  test: test.jsonl
  template: "{{instruction}}\\nAnswer:"
recipe: {{model: embedded, max_length: 128, steps: 4, batch_size: 4}}
evaluation: {{rows: 16, test_rows: 16, reports: 1}}
space:
  rank: {{type: choice, values: [4, 8, 16]}}
objectives: [accuracy, peak_bytes]   # without seconds nothing is timed alone afterwards
algorithm: random
keep: all   # the records of trials are compared
budget: {{trials: {trials}, parallel: {parallel}}}
"""


def write_study(folder: Path, storage: Path, *, trials: int, parallel: int) -> None:
    """Writes a study and its rows, as a user would have them side by side in a folder."""
    embedded = Path(__file__).parents[2] / "training" / "embedded"
    folder.mkdir(exist_ok=True)
    for name, source in (("rows", "train"), ("held_out", "validation"), ("test", "test")):
        lines = (embedded / f"{source}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:64]))
    (folder / "study.yaml").write_text(STUDY.format(storage=storage, trials=trials, parallel=parallel))


def free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(closing(socket.socket())) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def trials_of(storage: Path, name: str = "submitted") -> list:
    try:
        return open_study(name, storage=str(storage)).history()
    except Exception:  # not begun yet
        return []


def processes_of(temp: Path) -> list[str]:
    """Returns the processes of a Ray cluster, by the files they hold open in its folder.

    Two helpers are left out: they find out last that their cluster was killed, hold nothing, and end by themselves.
    """
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            mine = f"{temp}/" in " ".join([*process.cmdline(), *(f.path for f in process.open_files())])
            if mine and not process.name().startswith(("ray::DashboardAg", "ray::RuntimeEnvA")):
                found.append(f"{process.pid} {process.name()} {' '.join(process.cmdline())[:200]}")
    return found


@pytest.fixture
def head(short, monkeypatch):
    """Yields the address of the jobs server of a cluster of its own, which ends with the test."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    gcs, dashboard, client, agent, listen = free_ports(5)
    command = [
        shutil.which("ray", path=Path(sys.executable).parent), "start", "--head", "--block", "--num-cpus=2",
        "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--port={gcs}", f"--dashboard-port={dashboard}",
        f"--ray-client-server-port={client}", f"--dashboard-agent-grpc-port={agent}",
        f"--dashboard-agent-listen-port={listen}", f"--temp-dir={short / 'h'}", "--disable-usage-stats",
    ]  # fmt: skip
    with (short / "head.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        node = psutil.Process(process.pid)
        for one in [*node.children(recursive=True), node]:
            with suppress(psutil.Error):
                one.kill()
        process.wait()


def wait_until_up(address: str, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    token = {"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"}
    request = urllib.request.Request(f"{address}/api/version", headers=token)
    while True:
        try:
            urllib.request.urlopen(request, timeout=2)
            return
        except OSError:
            assert time.monotonic() < until, "the cluster does not come up"
            time.sleep(0.5)


def submit(address: str, folder: Path) -> None:
    """`ray job submit --working-dir . -- hpo run study.yaml`, followed to its end."""
    bin = Path(sys.executable).parent
    command = [bin / "ray", "job", "submit", "--address", address, "--working-dir", ".", "--", bin / "hpo", "run", "study.yaml"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_submitted_job_continues_its_study(head, short):
    folder, storage = short / "job", short / "storage"
    wait_until_up(head)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{head}/api/jobs/", timeout=5)
    assert refused.value.code in (401, 403)

    write_study(folder, storage, trials=2, parallel=2)
    submit(head, folder)
    first = trials_of(storage)
    assert [(t.number, t.state) for t in first] == [(0, "complete"), (1, "complete")]

    study = folder / "study.yaml"
    study.write_text(study.read_text().replace("trials: 2,", "trials: 3,  # one more\n         "))
    submit(head, folder)
    second = trials_of(storage)
    assert second[:2] == first, "what was finished is untouched"
    assert [(t.number, t.state, t.attempts) for t in second[2:]] == [(2, "complete", 1)]
    assert len(open_study("submitted", storage=str(storage)).store.studies()) == 1


def test_a_study_whose_driver_is_killed_is_finished_by_the_same_command(short, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PARETUNE_RAY_TEMP", str(short / "k"))
    folder, storage = short / "killed", short / "kept"
    write_study(folder, storage, trials=3, parallel=1)
    command = [Path(sys.executable).parent / "hpo", "run", "study.yaml"]

    with (short / "killed.log").open("wb") as log:
        driver = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    until = time.monotonic() + 180
    while not any(t.state == "complete" for t in trials_of(storage)):
        assert driver.poll() is None and time.monotonic() < until, (short / "killed.log").read_text()
        time.sleep(0.2)
    driver.kill()
    driver.wait()
    killed = [t for t in trials_of(storage) if t.final]
    assert 1 <= len(killed) < 3

    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    trials = trials_of(storage)
    assert [(t.number, t.state) for t in trials] == [(0, "complete"), (1, "complete"), (2, "complete")]
    assert trials[: len(killed)] == killed, "what was finished is neither lost nor repeated"

    until = time.monotonic() + 30
    while left := processes_of(short / "k"):
        assert time.monotonic() < until, left
        time.sleep(0.5)
