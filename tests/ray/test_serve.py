"""An endpoint on Ray Serve: real HTTP on loopback, tokens, restarts, and what is left when it goes."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import threading
import time
import urllib.parse
from pathlib import Path

import pytest
from endpoints import PROMPTS, TOKENS, answers, packaged, publish, version, wait_until

from serving.endpoint import digest_of, new_token
from serving.pool import living
from training.errors import InputError

pytestmark = pytest.mark.ray
serve = pytest.importorskip("ray.serve")
from serving.targets import ray_serve  # noqa: E402


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packages")
    return {1: packaged(folder / "one"), 2: packaged(folder / "two", seed=2)}


@pytest.fixture(scope="module")
def said(made):
    return {f"tiny@v{number}": answers(one.folder) for number, one in made.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, made):
    folder = tmp_path_factory.mktemp("endpoints") / "tiny"
    publish(folder, version(1, made[1], 1), tokens=(digest_of(new_token(folder)),))
    return folder


@pytest.fixture(scope="module")
def address(cluster, folder):
    yield ray_serve.deploy(folder, port=free_port())
    ray_serve.remove("tiny")


def request(address: str, path: str, body: dict | None = None, token: str | None = None):
    """Returns status, headers and body; an answer that breaks off raises."""
    parts = urllib.parse.urlsplit(address)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    with contextlib.closing(connection):
        connection.request("POST" if body else "GET", parts.path + path, body and json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read().decode()


def question(prompt: str = PROMPTS[0], **more) -> dict:
    return {"model": "tiny", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0} | more


def descendants() -> set[int]:
    """Returns the processes that this one started, and theirs."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def listening(pids: set[int]) -> set[str]:
    """Returns the addresses, in hexadecimal, on which these processes listen."""
    inodes = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    inodes.add(os.readlink(link))
    found = set()
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            part = line.split()
            if part[3] == "0A" and f"socket:[{part[9]}]" in inodes:
                found.add(part[1].partition(":")[0])
    return found


def test_a_deployed_endpoint_answers_whole_and_in_a_stream_as_the_model_does(address, folder, said):
    token = new_token(folder)
    status, headers, text = request(address, "/v1/completions", question(), token)
    found = json.loads(text)
    assert (status, found["choices"][0]["text"]) == (200, said["tiny@v1"][PROMPTS[0]])
    assert found["system_fingerprint"] == "tiny@v1"
    status, headers, text = request(address, "/v1/completions", question(stream=True), token)
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert events.pop() == "[DONE]" and len(events) > 2
    pieces = [choice["text"] for event in events for choice in json.loads(event)["choices"]]
    assert "".join(pieces) == said["tiny@v1"][PROMPTS[0]]


def test_without_its_token_nothing_is_answered_but_health_and_ray_s_own_token_opens_nothing(address):
    assert request(address, "/health")[0] == 200
    for token in (None, "wrong", os.environ["RAY_AUTH_TOKEN"]):
        for path, body in (("/v1/models", None), ("/v1/completions", question()), ("/metrics", None), ("/v1/endpoint", None)):
            status, headers, text = request(address, path, body, token)
            assert (status, json.loads(text)["error"]["code"]) == (401, "invalid_api_key") and "tiny" not in text


def test_only_this_machine_can_reach_it(address):
    processes = descendants()
    found = listening(processes)
    assert "haproxy" in {Path(f"/proc/{pid}/comm").read_text().strip() for pid in processes if Path(f"/proc/{pid}/comm").exists()}
    assert found and found <= {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}


def test_deploying_again_changes_nothing(address, folder):
    (before,) = living(folder)
    assert ray_serve.deploy(folder) == address
    assert [said["id"] for said in living(folder)] == [before["id"]]
    assert list(serve.status().applications) == ["tiny"]
    assert ray_serve.status("tiny") == {"status": "RUNNING", "message": "", "replicas": {"RUNNING": 1}}


def test_an_endpoint_that_cannot_answer_is_not_deployed_and_says_why(address, tmp_path, made, cluster):
    broken = tmp_path / "other"
    publish(broken, version(1, made[1], 1).model_copy(update={"digest": "0" * 64}))
    with pytest.raises(InputError, match="other: cannot be served: .*digest differs"):
        ray_serve.deploy(broken, name="other")
    assert ray_serve.status("other")["status"] == "NOT_STARTED"


def test_a_killed_replica_is_replaced_within_ten_seconds_and_nothing_wrong_is_answered_meanwhile(address, folder, said):
    token, seen, done = new_token(folder), [], threading.Event()

    def ask():
        while not done.is_set():
            with contextlib.suppress(OSError, http.client.HTTPException):
                status, _, text = request(address, "/v1/completions", question(), token)
                seen.append((time.monotonic(), status, text))
            done.wait(0.05)

    clients = [threading.Thread(target=ask) for _ in range(2)]
    for client in clients:
        client.start()
    wait_until(lambda: len(seen) > 4)
    (replica,) = living(folder)
    killed = time.monotonic()
    os.kill(replica["pid"], signal.SIGKILL)
    wait_until(lambda: any(when > killed + 0.2 and status == 200 for when, status, _ in list(seen)), 10, "an answer")
    done.set()
    for client in clients:
        client.join()
    for _, status, text in seen:
        if status == 200:
            assert json.loads(text)["choices"][0]["text"] == said["tiny@v1"][PROMPTS[0]]
        else:
            assert status in (500, 502, 503, 504)
    back = min(when for when, status, _ in seen if when > killed + 0.2 and status == 200) - killed
    print(f"answers again after {back:.1f} s")


def test_another_version_takes_over_without_a_failed_request_or_a_new_process(address, folder, made, said):
    wait_until(lambda: len(living(folder)) >= 1)
    token, seen, done = new_token(folder), [], threading.Event()

    def ask():
        while not done.is_set():
            seen.append(request(address, "/v1/completions", question(), token))

    clients = [threading.Thread(target=ask) for _ in range(2)]
    for client in clients:
        client.start()
    wait_until(lambda: len(seen) > 4)
    publish(folder, version(2, made[2], 1), tokens=(digest_of(token),))
    wait_until(lambda: json.loads(seen[-1][2]).get("system_fingerprint") == "tiny@v2", 20, "the new version's answer")
    done.set()
    for client in clients:
        client.join()
    assert {status for status, _, _ in seen} == {200}
    found = [json.loads(text) for _, _, text in seen]
    assert all(one["choices"][0]["text"] == said[one["system_fingerprint"]][PROMPTS[0]] for one in found)


def test_other_engine_settings_replace_the_replica_without_a_gap(address, folder, made):
    token, (before,) = new_token(folder), living(folder)
    publish(folder, version(2, made[2], 1), tokens=(digest_of(token),), engine={"cpus": 0.5})
    statuses, done = [], threading.Event()

    def ask():
        while not done.is_set():
            statuses.append(request(address, "/v1/completions", question(), token)[0])

    client = threading.Thread(target=ask)
    client.start()
    try:
        assert ray_serve.deploy(folder) == address
    finally:
        done.set()
        client.join()
    assert set(statuses) == {200}
    wait_until(lambda: before["id"] not in [said["id"] for said in living(folder)])
    assert [said["engine"]["cpus"] for said in living(folder)] == [0.5]


def test_the_importable_builder_takes_a_folder_and_refuses_an_endpoint_without_a_token(folder, tmp_path, made):
    assert isinstance(ray_serve.build({"folder": str(folder)}), serve.Application)
    for args in ({}, {"folder": str(folder), "port": "1"}):
        with pytest.raises(InputError, match="must be folder alone"):
            ray_serve.build(args)
    publish(tmp_path, version(1, made[1], 1))
    with pytest.raises(InputError, match="asks for no token"):
        ray_serve.build({"folder": str(tmp_path)})
    with pytest.raises(InputError, match="asks for no token"):
        ray_serve.deploy(tmp_path, host="0.0.0.0")


def test_what_is_removed_ends_its_last_answer_and_gives_back_what_it_held(address, folder, cluster):
    parts, token, lines = urllib.parse.urlsplit(address), new_token(folder), []
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)
    body = json.dumps(question(max_tokens=200, stream=True, temperature=1.0, seed=1))
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
    connection.request("POST", parts.path + "/v1/completions", body, headers)
    answer = connection.getresponse()
    lines.append(answer.readline())
    reader = threading.Thread(target=lambda: lines.extend(answer.read().splitlines()))
    reader.start()
    ray_serve.remove("tiny")
    reader.join()
    connection.close()
    events = [line for line in lines if line.startswith(b"data: ")]
    assert events[-1] == b"data: [DONE]" and b"error" not in b"".join(events)
    assert ray_serve.status("tiny")["status"] == "NOT_STARTED"
    wait_until(lambda: cluster.available_resources().get("CPU") == 2, 30, "giving back what the endpoint held")
    wait_until(lambda: not list((folder / "replicas").iterdir()), 10, "taking back what replicas said")
    with pytest.raises(OSError):
        request(address, "/health")
    ray_serve.remove("tiny")  # nothing is left to be removed
