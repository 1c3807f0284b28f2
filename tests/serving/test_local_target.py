"""An endpoint in one process: real sockets, refusals before anything listens, an orderly end."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.parse
from contextlib import closing

import pytest
import torch
from endpoints import PROMPTS, TOKENS, answers, packaged, publish, version, wait_until

from serving.endpoint import digest_of, new_token
from serving.pool import living
from serving.targets.local import serve, serving
from training.errors import InputError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    torch.set_num_threads(1)
    return packaged(tmp_path_factory.mktemp("packages") / "one")


@pytest.fixture(scope="module")
def said(made):
    return answers(made.folder)


@pytest.fixture
def folder(tmp_path, made):
    folder = tmp_path / "tiny"
    publish(folder, version(1, made, 1), tokens=(digest_of(new_token(folder)),))
    return folder


def request(address: str, path: str, body: dict | None = None, token: str | None = None, **headers):
    parts = urllib.parse.urlsplit(address)
    headers |= {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    with closing(http.client.HTTPConnection(parts.hostname, parts.port, timeout=30)) as connection:
        connection.request("POST" if body else "GET", path, body and json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def question(**more) -> dict:
    return {"model": "tiny", "prompt": PROMPTS[0], "max_tokens": TOKENS, "temperature": 0} | more


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_it_answers_on_loopback_as_the_model_does_and_only_with_the_token(folder, said, host):
    with serving(folder, host) as address:
        assert request(address, "/health")[0] == 200
        assert request(address, "/v1/models")[0] == 401
        status, text = request(address, "/v1/completions", question(), new_token(folder))
        assert (status, json.loads(text)["choices"][0]["text"]) == (200, said[PROMPTS[0]])
        wait_until(lambda: living(folder)[0]["statistics"].get("v1", {}).get("count") == 1)
    assert living(folder) == []
    with pytest.raises(OSError):
        request(address, "/health")


def test_only_the_address_that_was_asked_for_listens(folder):
    with serving(folder) as address:
        port = urllib.parse.urlsplit(address).port
        socket.create_connection(("127.0.0.1", port), 2).close()
        with pytest.raises(OSError):  # it would answer if it listened on all addresses
            socket.create_connection(("127.0.0.2", port), 2)


def test_other_machines_are_served_only_with_a_token(tmp_path, made):
    publish(tmp_path / "open", version(1, made, 1))
    for host in ("0.0.0.0", "::", "192.0.2.7", "example.org"):
        with pytest.raises(InputError, match="asks for no token"), serving(tmp_path / "open", host):
            pass
    assert not (tmp_path / "open" / "replicas").exists()
    with serving(tmp_path / "open") as address:  # on loopback it may be open
        assert request(address, "/v1/models")[0] == 200


def test_a_port_in_use_and_an_endpoint_that_cannot_answer_say_so(folder, tmp_path, made):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"127.0.0.1:{port} cannot be listened on"):
            serve(folder, port=port)
    with pytest.raises(InputError, match="is no endpoint"):
        serve(tmp_path / "nowhere")
    broken = tmp_path / "broken"
    publish(broken, version(1, made, 1).model_copy(update={"digest": "0" * 64}))
    with pytest.raises(InputError, match="tiny: cannot be served: .*digest differs"), serving(broken):
        pass
    assert living(broken) == []


def test_headers_beyond_the_limit_are_refused(folder):
    with serving(folder) as address:
        status, _ = request(address, "/v1/models", token=new_token(folder), extra="x" * 20_000)
        assert status in (400, 431)
        assert request(address, "/v1/models", token=new_token(folder))[0] == 200


@pytest.mark.parametrize("way", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_running_requests_end_and_takes_back_what_the_replica_said(folder, said, way):
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    code = f"from serving.targets.local import serve; serve({str(folder)!r}, port={port})"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    address, found = f"http://127.0.0.1:{port}", []
    try:
        wait_until(lambda: process.poll() is not None or _up(address), 60, "the server")
        body = question(max_tokens=200)
        asking = threading.Thread(target=lambda: found.append(request(address, "/v1/completions", body, new_token(folder))))
        asking.start()
        wait_until(lambda: any(v["running"] for one in living(folder) for v in one["versions"].values()) or found)
        process.send_signal(way)
        asking.join(30)
        assert process.wait(30) == 0
    finally:
        process.kill()
        said_last = process.communicate()[1]
    ((status, text),) = found
    assert status == 200 and json.loads(text)["choices"][0]["text"].startswith(said[PROMPTS[0]])
    assert list((folder / "replicas").iterdir()) == [] and "Traceback" not in said_last


def _up(address: str) -> bool:
    try:
        return request(address, "/health")[0] == 200
    except OSError:
        return False
