"""The endpoint over HTTP: official clients, every limit, every way a client can misbehave; a real engine behind it."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import logging
import socket
import statistics
import subprocess
import threading
import time

import httpx2 as httpx
import openai
import pytest
import uvicorn

from serving.app import create_app
from serving.endpoint import EngineSettings, Limits, Table, digest_of
from serving.generate import Engine
from serving.lease import Unavailable, Unknown
from serving.traffic import Statistics

TOKEN = "a-token-of-the-tests"
HELLO = [{"role": "user", "content": "The story of"}]
ERROR = {"message", "type", "param", "code", "request_id"}


class Lease:
    def __init__(self, pool):
        self.pool, self.engine, self.label, self.version = pool, pool.engine, "tiny@v1", "v1"

    async def __aenter__(self):
        if self.pool.closed:
            raise Unavailable("tiny is not ready")
        self.pool.active += 1
        return self

    async def __aexit__(self, *_):
        self.pool.active -= 1


class OneModel:
    """A pool of one version, as serving.pool.Pool is asked."""

    def __init__(self, engine):
        self.engine, self.active, self.closed = engine, 0, False
        self.statistics = Statistics()

    def pick(self, model, key):
        if model not in self.names():
            raise Unknown(model, self.names())
        return Lease(self)

    def names(self):
        return ["tiny", "tiny@v1"]

    def healthy(self):
        return not self.closed and self.engine.healthy()

    def record(self, version, **said):
        self.statistics.add(**said)

    def feedback(self, version, score):
        self.statistics.add_feedback(score)

    def comparison(self):
        return []

    def status(self):
        return {"versions": {"v1": {"state": "ready", "reason": "/somewhere", "share": 1, "running": self.active}}}


class Served:
    """The app behind uvicorn on loopback; what was changed in `table` holds for the next request."""

    def __init__(self, engine, filters=None, buffer=None, **limits):
        self.pool = OneModel(engine)
        self.table = Table(name="tiny", tokens=(digest_of("another"), digest_of(TOKEN)), limits=Limits(**limits))
        self.app = create_app(self.pool, lambda: self.table, filters=filters)
        self.socket = socket.socket()
        if buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
        self.socket.bind(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = uvicorn.Server(uvicorn.Config(self.app, http="h11", log_level="warning"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})

    def __enter__(self):
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.http = httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=30)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=TOKEN, max_retries=0, timeout=30)
        return self

    def __exit__(self, *_):
        self.http.close()
        self.client.close()
        self.server.should_exit = True
        self.thread.join()
        self.socket.close()

    def ask(self, **asked):
        return self.http.post("/v1/chat/completions", json={"model": "tiny", "messages": HELLO, "max_tokens": 8} | asked)

    def complete(self, **asked):
        return self.http.post("/v1/completions", json={"model": "tiny", "prompt": "The story of", "max_tokens": 8} | asked)

    def quiet(self, seconds=2.0):
        """Waits until nothing runs any more, at most so long."""
        until = time.monotonic() + seconds
        while (self.pool.engine.running or self.pool.active) and time.monotonic() < until:
            time.sleep(0.01)
        return self.pool.engine.running == 0 and self.pool.active == 0

    def raw(self, head: str, body: bytes = b"") -> bytes:
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection:
            connection.sendall(head.replace("\n", "\r\n").encode() + body)
            return read_all(connection)


def read_all(connection) -> bytes:
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            found += part
    return found


def slow(model, seconds):
    """Makes each step of the batch take so long."""
    return model.model.norm.register_forward_hook(lambda *_: time.sleep(seconds))


def refused(response, status, code, param=None):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == ERROR and error["code"] == code, error
    assert error["param"] == param or param is None, error
    assert error["request_id"] == response.headers["x-request-id"]
    assert "Traceback" not in response.text and "/serving/" not in response.text and ".py" not in response.text
    return error["message"]


@pytest.fixture(scope="module")
def served(engine):
    with Served(engine) as one:
        yield one


# What an answer is.


def test_the_official_client_gets_the_greedy_text_whole_and_streamed(served, engine, tokenizer, model):
    import torch

    chat = {"model": "tiny", "messages": HELLO, "max_tokens": 24, "temperature": 0}
    whole = served.client.chat.completions.create(**chat)
    ids = tokenizer.apply_chat_template(HELLO, add_generation_prompt=True, return_dict=False)
    with torch.no_grad():
        out = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False, pad_token_id=2)[0, len(ids) :].tolist()
    choice = whole.choices[0]
    assert choice.message.content == tokenizer.decode(out, skip_special_tokens=True)
    assert choice.finish_reason == ("stop" if out[-1] == tokenizer.eos_token_id else "length")
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(ids), len(out))
    assert whole.usage.total_tokens == len(ids) + len(out)
    assert (whole.model, whole.system_fingerprint, whole.object) == ("tiny", "tiny@v1", "chat.completion")

    chunks = list(served.client.chat.completions.create(**chat, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == choice.message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == [choice.finish_reason]
    assert chunks[-1].usage == whole.usage and chunks[-1].choices == [] and len({c.id for c in chunks}) == 1
    assert all(c.usage is None for c in chunks[:-1])


def test_completions_take_one_prompt_or_several(served):
    one = served.client.completions.create(model="tiny", prompt="The story of", max_tokens=12, temperature=0)
    two = served.client.completions.create(model="tiny@v1", prompt=["The story of", "Dear team,"], max_tokens=12, temperature=0)
    assert one.choices[0].text == two.choices[0].text != two.choices[1].text
    assert [c.index for c in two.choices] == [0, 1]
    parts = list(served.client.completions.create(model="tiny", prompt="The story of", max_tokens=12, temperature=0, stream=True))
    assert "".join(part.choices[0].text for part in parts) == one.choices[0].text
    assert served.complete(max_tokens=None).json()["usage"]["completion_tokens"] <= 16


def test_several_answers_to_one_prompt(served):
    asked = {"model": "tiny", "messages": HELLO, "max_tokens": 12, "n": 3, "seed": 5}
    first, again = (served.client.chat.completions.create(**asked) for _ in range(2))
    texts = [c.message.content for c in first.choices]
    assert texts == [c.message.content for c in again.choices] and len(set(texts)) == 3
    single = served.client.chat.completions.create(**asked | {"n": 1})
    assert single.choices[0].message.content == texts[0]
    streamed = {0: "", 1: "", 2: ""}
    for chunk in served.client.chat.completions.create(**asked, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert list(streamed.values()) == texts
    assert first.usage.prompt_tokens == single.usage.prompt_tokens and first.usage.completion_tokens <= 36


def test_stop_strings_end_the_answer_and_never_leak(served):
    whole = served.ask(temperature=0, max_tokens=32).json()["choices"][0]["message"]["content"]
    for begin in range(0, len(whole) - 4, 5):
        stop = whole[begin : begin + 4]
        asked = {"temperature": 0, "max_tokens": 32, "stop": ["not there", stop]}
        choice = served.ask(**asked).json()["choices"][0]
        assert choice["message"]["content"] == whole[: whole.index(stop)] and choice["finish_reason"] == "stop"
        chunks = served.client.chat.completions.create(model="tiny", messages=HELLO, stream=True, **asked)
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole[: whole.index(stop)]


def test_max_completion_tokens_is_max_tokens(served):
    body = {"model": "tiny", "messages": HELLO, "temperature": 0}
    new, old = ({"max_completion_tokens": 5}, {"max_tokens": 5})
    answers = [served.http.post("/v1/chat/completions", json=body | extra).json()["choices"] for extra in (new, old, new | old)]
    assert answers[0] == answers[1] == answers[2] and answers[0][0]["finish_reason"] == "length"
    refused(served.ask(max_tokens=5, max_completion_tokens=6), 400, "invalid_value")


def test_curl_streams_an_answer(served):
    body = json.dumps({"model": "tiny", "messages": HELLO, "max_tokens": 4, "stream": True})
    headers = ["-H", f"Authorization: Bearer {TOKEN}", "-H", "Content-Type: application/json"]
    command = ["curl", "-sSN", f"{served.url}/v1/chat/completions", *headers, "-d", body]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    lines = [line for line in done.stdout.splitlines() if line]
    assert done.returncode == 0 and all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    assert all(json.loads(line[6:])["object"] == "chat.completion.chunk" for line in lines[:-1])


def test_models_are_listed_and_endpoint_tells_its_state_without_paths(served):
    assert {"tiny", "tiny@v1"} == {model.id for model in served.client.models.list()}
    assert served.client.models.retrieve("tiny@v1").id == "tiny@v1"
    refused(served.http.get("/v1/models/other"), 404, "model_not_found")
    state = served.http.get("/v1/endpoint").json()
    assert state["versions"] == {"v1": {"state": "ready", "share": 1, "running": 0}} and state["healthy"] is True
    assert "somewhere" not in json.dumps(state)


def test_feedback_counts_once_for_the_version_that_answered(served):
    answer = served.ask().json()["id"]
    assert served.http.post("/v1/feedback", json={"id": answer, "score": 1}).json()["version"] == "v1"
    refused(served.http.post("/v1/feedback", json={"id": answer, "score": 0}), 409, "scored_already")
    for wrong in ("chatcmpl-0-v1", answer.replace("v1", "v9"), "x"):
        refused(served.http.post("/v1/feedback", json={"id": wrong, "score": 1}), 404, "answer_not_found")
    for score in (-0.1, 1.1, True, "1", None):
        refused(served.http.post("/v1/feedback", json={"id": answer, "score": score}), 400, "invalid_value", "score")
    assert served.pool.statistics.feedback_count == 1


def test_every_answer_is_recorded_with_its_numbers(engine):
    with Served(engine) as served:
        usage = served.ask(n=2).json()["usage"]
        said = served.pool.statistics
        assert (said.count, said.errors) == (1, 0)
        assert (said.prompt_tokens, said.tokens) == (usage["prompt_tokens"], usage["completion_tokens"])
        assert 0 < said.first_token <= said.seconds < 5


# What is refused.


@pytest.mark.parametrize(
    ("extra", "code", "param"),
    [
        ({"logprobs": True}, "unsupported_parameter", "logprobs"),
        ({"top_logprobs": 2}, "unsupported_parameter", "top_logprobs"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "unsupported_parameter", "tools"),
        ({"response_format": {"type": "json_object"}}, "unsupported_parameter", "response_format"),
        ({"logit_bias": {"99999999": 5}}, "unsupported_parameter", "logit_bias"),
        ({"frequency_penalty": 0.5}, "unsupported_parameter", "frequency_penalty"),
        ({"presence_penalty": -1}, "unsupported_parameter", "presence_penalty"),
        ({"adapter_path": "../x"}, "unknown_parameter", "adapter_path"),
        ({"temprature": 1}, "unknown_parameter", "temprature"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"max_tokens": -1}, "invalid_value", "max_tokens"),
        ({"max_tokens": 10**9}, "invalid_value", "max_tokens"),
        ({"max_tokens": 10**400}, "invalid_value", "max_tokens"),
        ({"max_tokens": 1025}, "over_limit", "max_tokens"),
        ({"max_tokens": 1.5}, "invalid_value", "max_tokens"),
        ({"max_tokens": "8"}, "invalid_value", "max_tokens"),
        ({"max_tokens": True}, "invalid_value", "max_tokens"),
        ({"temperature": -1}, "invalid_value", "temperature"),
        ({"temperature": 2.1}, "invalid_value", "temperature"),
        ({"temperature": True}, "invalid_value", "temperature"),
        ({"top_p": 0}, "invalid_value", "top_p"),
        ({"top_p": 2}, "invalid_value", "top_p"),
        ({"n": 0}, "invalid_value", "n"),
        ({"n": 9}, "over_limit", "n"),
        ({"n": 10**6}, "invalid_value", "n"),
        ({"seed": 2**63}, "invalid_value", "seed"),
        ({"seed": 1.0}, "invalid_value", "seed"),
        ({"stop": ["x"] * 9}, "over_limit", "stop"),
        ({"stop": ["x"] * 1000}, "invalid_value", "stop"),
        ({"stop": ""}, "invalid_value", "stop"),
        ({"stop": "x" * 257}, "invalid_value", "stop"),
        ({"stream_options": {"include_usage": True}}, "invalid_value", None),
        ({"user": "u" * 257}, "invalid_value", "user"),
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": HELLO * 257}, "over_limit", "messages"),
        ({"messages": [{"role": "user", "content": ""}]}, "invalid_value", None),
        ({"messages": [{"role": "user", "content": " \n\t"}]}, "invalid_value", None),
        ({"messages": [{"role": "system", "content": ""}]}, "invalid_value", None),
        ({"messages": [{"role": "tool", "content": "x"}]}, "invalid_value", "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]}, "invalid_value", None),
        ({"messages": "hello"}, "invalid_value", "messages"),
        ({"messages": [{"role": "user", "content": "word " * 300}]}, "context_length_exceeded", "messages"),
        ({"max_tokens": 250}, "context_length_exceeded", "max_tokens"),
        ({"model": ""}, "invalid_value", "model"),
        ({"model": 5}, "invalid_value", "model"),
    ],
)
def test_a_parameter_that_is_wrong_or_not_there_is_named(served, extra, code, param):
    refused(served.ask(**extra), 400, code, param)
    assert served.pool.active == 0


@pytest.mark.parametrize("extra", [{"prompt": ""}, {"prompt": " \n"}, {"prompt": []}, {"prompt": ["a", ""]}, {"prompt": [1, 2]},
                                   {"echo": True}, {"best_of": 4}, {"suffix": "x"}, {"logprobs": 1},
                                   {"prompt": ["a"] * 9}, {"prompt": "word " * 300}])  # fmt: skip
def test_completions_refuse_the_same_way(served, extra):
    assert served.complete(**extra).status_code == 400


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e400", "1" * 5000])
def test_numbers_that_json_does_not_know_are_refused(served, value):
    for name in ("temperature", "top_p", "max_tokens", "n", "seed"):
        body = f'{{"model": "tiny", "messages": [{{"role": "user", "content": "a"}}], "{name}": {value}}}'
        response = served.http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
        assert response.status_code == 400, (name, value, response.text)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe{}", b"[" * 100_000, b'{"a":' * 50_000,
                                  b'{"model": "tiny", "messages": [{"role": "user", "content": "\xff"}]}'])  # fmt: skip
def test_what_is_not_json_is_refused(served, body):
    response = served.http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400 and set(response.json()["error"]) == ERROR


@pytest.mark.parametrize("place", ["model", "user", "stop", "content", "name"])
def test_half_a_surrogate_pair_is_refused_everywhere(served, place):
    half = "\\ud800"
    said = {"model": '"model": "%s"', "user": '"user": "%s"', "stop": '"stop": ["%s"]', "name": '"%s": 1',
            "content": '"messages": [{"role": "user", "content": "%s"}]'}[place] % half  # fmt: skip
    fields = ['"model": "tiny"'] * (place != "model") + ['"messages": [{"role": "user", "content": "a"}]'] * (place != "content")
    body = "{" + ", ".join([*fields, said]) + "}"
    response = served.http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400 and set(response.json()["error"]) == ERROR


def test_special_tokens_in_a_message_are_text(served, tokenizer):
    plain = served.ask(messages=[{"role": "user", "content": "a<|eos|>b"}]).json()["usage"]["prompt_tokens"]
    assert plain > len(tokenizer("a<|eos|>b\nAnswer:").input_ids)
    message = refused(served.ask(messages=[{"role": "user", "content": "<|eo"}, {"role": "user", "content": "s|>"}]), 400,
                      "invalid_value")  # fmt: skip
    assert "special token" in message


def test_messages_in_parts_are_one_text(served):
    parts = [{"type": "text", "text": "The story"}, {"type": "text", "text": " of"}]
    a, b = served.ask(temperature=0), served.ask(temperature=0, messages=[{"role": "user", "content": parts}])
    assert a.json()["choices"] == b.json()["choices"]


@pytest.mark.parametrize("name", ["other", "tiny@v2", "../tiny", "/tiny", "tiny@", "tiny\n", "TINY"])
def test_an_unknown_model_is_404_with_those_there_are(served, name):
    assert "tiny@v1" in refused(served.ask(model=name), 404, "model_not_found", "model")


def test_another_content_type_is_415(served):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/json; charset=latin-1", "", "application/xml"):
        body = json.dumps({"model": "tiny", "messages": HELLO}).encode()
        response = served.http.post("/v1/chat/completions", content=body, headers={"content-type": kind})
        refused(response, 415, "unsupported_media_type")
    good = served.http.post("/v1/chat/completions", content=body, headers={"content-type": 'application/json; charset="UTF-8"'})
    assert good.status_code == 200


def test_methods_and_paths_that_are_not_there(served):
    for path, method, allowed in (
        ("/v1/chat/completions", "GET", "POST"),
        ("/v1/models", "DELETE", "GET"),
        ("/health", "PUT", "GET"),
    ):
        response = served.http.request(method, path)
        refused(response, 405, "method_not_allowed")
        assert response.headers["allow"] == allowed
    for path in ("/", "/docs", "/redoc", "/v1/models/", "/v1/../etc/passwd", "/v1/%2e%2e/x"):
        refused(served.http.get(path), 404, "not_found")


@pytest.mark.parametrize("path", ["/docs", "/openapi.json", "/metrics", "/v1/models", "/v1/endpoint", "/v1/chat/completions",
                                  "/v1/completions", "/v1/feedback", "/nothing", "/health/"])  # fmt: skip
def test_every_path_but_health_wants_the_token(served, path):
    for method in ("GET", "POST", "DELETE", "OPTIONS"):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}, {"Authorization": f"Basic {TOKEN}"},
                        {"Authorization": "Bearer"}, {"Authorization": f"Bearer {digest_of(TOKEN)}"}):  # fmt: skip
            response = httpx.request(method, served.url + path, headers=headers)
            assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer", (method, headers)
            assert response.json()["error"]["type"] == "authentication_error"
    assert httpx.get(served.url + "/health").json() == {"status": "ok"}
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="wrong", max_retries=0).models.list()
    assert served.http.get(path, headers={"Authorization": "Bearer another"}).status_code != 401


def test_a_body_over_the_limit_is_413_without_reading_it(served):
    limit = served.table.limits.body_bytes
    head = f"POST /v1/chat/completions HTTP/1.1\nHost: x\nAuthorization: Bearer {TOKEN}\nContent-Type: application/json\n"
    answer = served.raw(head + f"Content-Length: {10**10}\n\n", b"{")
    assert answer.startswith(b"HTTP/1.1 413") and b"body_too_large" in answer and b"connection: close" in answer.lower()
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        connection.sendall((head + "Transfer-Encoding: chunked\n\n").replace("\n", "\r\n").encode())
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < limit + 65536:
                connection.sendall(chunk)
                sent += 65536
        assert read_all(connection).startswith(b"HTTP/1.1 413")
    body = json.dumps({"model": "tiny", "messages": HELLO}).encode()
    fits = served.http.post(
        "/v1/chat/completions", content=body + b" " * (limit - len(body)), headers={"content-type": "application/json"}
    )
    over = served.http.post(
        "/v1/chat/completions", content=body + b" " * (limit - len(body) + 1), headers={"content-type": "application/json"}
    )
    assert (fits.status_code, over.status_code) == (200, 413)
    refused(served.ask(messages=[{"role": "user", "content": "a " * 2**20}]), 413, "body_too_large")


def test_a_body_in_tiny_parts_takes_no_longer_than_its_size_deserves(engine):
    app = create_app(OneModel(engine), lambda: Table(name="tiny", tokens=(digest_of(TOKEN),)))
    body, sent = b" " * 262_144, []
    parts = ({"type": "http.request", "body": body[i : i + 1], "more_body": i + 1 < len(body)} for i in range(len(body)))
    headers = [(b"authorization", f"Bearer {TOKEN}".encode()), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": headers}

    async def receive():
        return next(parts)

    async def send(message):
        sent.append(message)

    begin = time.monotonic()
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 400 and time.monotonic() - begin < 5


def test_headers_over_the_limit_are_431(served):
    refused(served.http.get("/v1/models", headers={"x-long": "y" * 17_000}), 431, "headers_too_large")
    refused(served.http.get("/v1/models?" + "q" * 17_000), 431, "headers_too_large")
    many = served.raw(f"GET /v1/models HTTP/1.1\nHost: x\nAuthorization: Bearer {TOKEN}\n" + "a: b\n" * 5_000 + "\n")
    assert many.startswith(b"HTTP/1.1 431")


def test_shapes_of_smuggling_are_refused(served):
    head = f"POST /v1/completions HTTP/1.1\nHost: x\nAuthorization: Bearer {TOKEN}\nContent-Type: application/json\n"
    for extra in (
        "Content-Length: 5\nContent-Length: 6\n",
        "Content-Length: -1\n",
        "Content-Length: abc\n",
        "Transfer-Encoding: xchunked\n",
    ):
        assert served.raw(head + extra + "\n", b"{}").split(b" ")[1] in (b"400", b"501", b"413"), extra


def test_a_body_that_comes_too_slowly_is_408(engine):
    with Served(engine, seconds=0.5) as served:
        begin = time.monotonic()
        answer = served.raw(
            f"POST /v1/completions HTTP/1.1\nHost: x\nAuthorization: Bearer {TOKEN}\nContent-Length: 100\n\n", b"{"
        )
        assert answer.startswith(b"HTTP/1.1 408") and time.monotonic() - begin < 3


def test_request_ids_are_the_clients_where_they_are_sound(served):
    assert served.http.get("/v1/models", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    for bad in ("a b", "x" * 200, "<script>", ""):
        assert served.http.get("/v1/models", headers={"x-request-id": bad}).headers["x-request-id"] not in (bad, "")
    assert served.ask().headers["x-model-version"] == "tiny@v1"


# Load, time, leaving.


def test_a_full_queue_is_429_at_once_while_those_accepted_are_answered(model, engine):
    with Served(engine, concurrent=2, queue=2) as served:
        hook, found = slow(model, 0.02), []
        try:
            threads = [threading.Thread(target=lambda: found.append(served.ask(max_tokens=30, temperature=0))) for _ in range(4)]
            for thread in threads:
                thread.start()
            until = time.monotonic() + 2
            while served.http.get("/v1/endpoint").json()["waiting"] < 2 and time.monotonic() < until:
                pass
            begin = time.monotonic()
            response = served.ask()
            assert time.monotonic() - begin < 0.5
            refused(response, 429, "queue_full")
            assert int(response.headers["retry-after"]) >= 1
            refused(served.ask(stream=True), 429, "queue_full")
            for thread in threads:
                thread.join()
        finally:
            hook.remove()
        assert [response.status_code for response in found] == [200] * 4
        assert len({response.json()["choices"][0]["message"]["content"] for response in found}) == 1
        assert served.ask().status_code == 200


def test_many_answers_of_one_request_do_not_exceed_the_batch(engine):
    with Served(engine, concurrent=2, queue=0) as served:
        assert len(served.ask(n=8).json()["choices"]) == 8


def test_an_answer_that_takes_too_long_is_504(model, engine):
    with Served(engine, seconds=0.4) as served:
        hook = slow(model, 0.05)
        try:
            refused(served.ask(max_tokens=100, temperature=0, messages=HELLO), 504, "timeout")
            events = served.ask(max_tokens=100, temperature=0, stream=True).text.split("\n\n")
            assert json.loads(events[-3][6:])["error"]["code"] == "timeout" and events[-2] == "data: [DONE]"
        finally:
            hook.remove()
        assert served.quiet()
        assert served.pool.statistics.errors == 2


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_takes_its_request_along(model, engine, stream):
    with Served(engine) as served:
        hook = slow(model, 0.02)
        try:
            body = json.dumps({"model": "tiny", "messages": HELLO, "max_tokens": 200, "seed": 1, "n": 2, "stream": stream})
            connection = http.client.HTTPConnection("127.0.0.1", served.port)
            connection.request("POST", "/v1/chat/completions", body,
                               {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"})  # fmt: skip
            if stream:
                connection.getresponse().fp.readline()
            until = time.monotonic() + 2
            while engine.running < 2 and time.monotonic() < until:
                time.sleep(0.005)
            assert engine.running == 2
            begin = time.monotonic()
            connection.sock.shutdown(socket.SHUT_RDWR) if connection.sock else None
            connection.close()
            if stream:
                connection._HTTPConnection__response and connection._HTTPConnection__response.close()
            assert served.quiet(2), "its places in the batch are free"
            assert time.monotonic() - begin < 2
        finally:
            hook.remove()
        assert served.pool.statistics.count == 0
        assert served.ask().status_code == 200


def test_a_client_that_reads_slowly_holds_up_nobody_and_is_left_in_the_end(engine):
    with Served(engine, buffer=4096, concurrent=1, queue=4, seconds=2, choices=128) as served:
        body = json.dumps({"model": "tiny", "messages": HELLO, "max_tokens": 200, "n": 100, "stream": True, "seed": 3}).encode()
        stuck = socket.socket()
        stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        stuck.connect(("127.0.0.1", served.port))
        stuck.sendall((f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
                       f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n").encode() + body)  # fmt: skip
        stuck.recv(100)
        assert served.ask().status_code == 200, "although there is one place, and its reader does not read"
        broken = 'paretune_requests_total{model="tiny@v1",status="499"}'
        assert broken not in served.http.get("/metrics").text, "it is still being sent"
        until = time.monotonic() + 6
        while broken not in served.http.get("/metrics").text and time.monotonic() < until:
            time.sleep(0.05)
        assert broken in served.http.get("/metrics").text
        stuck.close()
        assert served.quiet()


def test_without_a_token_only_this_machine_is_answered(engine):
    with Served(engine) as served:
        served.table = Table(name="tiny")
        for host, status in (("localhost", 200), ("127.0.0.1:80", 200), ("[::1]:9", 200), ("evil.example", 403),
                             ("127.0.0.1.evil.example", 403), ("localhost@evil.example", 403)):  # fmt: skip
            assert httpx.get(f"{served.url}/v1/models", headers={"host": host}).status_code == status, host


# Filters, logs, metrics, health.


def no_secrets(text: str) -> str | None:
    if "break the filter" in text:
        raise RuntimeError(text)
    return "a secret" if "secret" in text or " the" in text and "forbid the" in no_secrets.mood else None


no_secrets.mood = ""


def test_a_content_filter_sees_what_goes_in_and_what_comes_out(engine):
    with Served(engine, filters=no_secrets) as served:
        free = served.ask(temperature=0, max_tokens=16).json()
        refused(served.ask(messages=[{"role": "user", "content": "my secret"}]), 400, "content_filter")
        refused(served.complete(prompt=["fine", "my secret"]), 400, "content_filter")
        refused(served.ask(messages=[{"role": "user", "content": "break the filter"}]), 503, "filter_failed")
        assert free["choices"][0]["message"]["content"]
        no_secrets.mood = "forbid the"
        try:
            prompt = {"prompt": "She went to", "temperature": 0, "max_tokens": 16}
            choice = served.complete(**prompt).json()["choices"][0]
            assert (choice["text"], choice["finish_reason"]) == ("", "content_filter")
            streamed = served.complete(**prompt, stream=True).text
            assert '"content_filter"' in streamed and " the" not in streamed
        finally:
            no_secrets.mood = ""


def test_the_operator_names_a_filter_in_the_table(engine):
    table = Table(name="tiny", filters="json:loads")
    create_app(OneModel(engine), lambda: table)
    with pytest.raises(ModuleNotFoundError):
        create_app(OneModel(engine), lambda: Table(name="tiny", filters="no_such_module:f"))


def test_nothing_that_is_asked_or_answered_is_logged(served, caplog):
    caplog.set_level(logging.DEBUG)
    text = served.ask(messages=[{"role": "user", "content": "quizzical zebra"}], user="someone-private", temperature=0).json()
    served.ask(messages=[{"role": "user", "content": "quizzical zebra"}], stream=True)
    served.ask(messages=[{"role": "user", "content": "quizzical zebra"}], zebra=1)
    served.http.get("/zebra%0aforged")
    ours = "\n".join(
        record.getMessage() for record in caplog.records if not record.name.startswith(("httpx", "httpcore", "openai"))
    )
    assert "POST /v1/chat/completions 200" in ours and "GET (other) 404" in ours
    for secret in ("zebra", "someone-private", TOKEN, text["choices"][0]["message"]["content"].strip() or "zebra"):
        assert secret not in ours


def test_metrics_tell_requests_times_tokens_queue_and_batch(served):
    served.ask(n=2)
    served.ask(max_tokens=0)
    text = served.http.get("/metrics").text
    for line in ('paretune_requests_total{model="tiny@v1",status="200"}', 'paretune_requests_total{model="",status="400"}',
                 'paretune_request_seconds_bucket{le="0.1",model="tiny@v1"}', "paretune_first_token_seconds_sum",
                 'paretune_tokens_total{direction="out",model="tiny@v1"}', "paretune_queue 0.0", "paretune_running 0.0",
                 'paretune_batch_largest{model="tiny@v1"}', 'paretune_batch_requests{model="tiny@v1"}'):  # fmt: skip
        assert line in text, line


def test_an_engine_that_fails_is_503_and_not_healthy(model, tokenizer):
    engine = Engine(model, tokenizer, EngineSettings())
    engine.start()
    try:
        with Served(engine) as served:
            hook = model.model.layers[1].register_forward_hook(lambda *_: 1 / 0)
            try:
                refused(served.ask(), 503, "engine_failed")
            finally:
                hook.remove()
            refused(served.ask(stream=True), 503, "engine_failed")
            assert served.ask().headers["retry-after"] == "5"
            assert not served.pool.healthy()
            assert served.http.get("/health").status_code == 503
            served.pool.closed = True
            refused(served.ask(), 503, "model_not_ready")
    finally:
        engine.close()


def test_a_fault_of_ours_is_500_without_a_trace(engine, caplog):
    with Served(engine) as served:
        served.pool.names = lambda: 1 / 0
        refused(served.http.get("/v1/models"), 500, "internal_error")
        assert "ZeroDivisionError" in caplog.text and "Traceback" not in caplog.text


def test_a_short_answer_takes_well_under_a_tenth_of_a_second(served):
    took = {False: [], True: []}
    for stream in took:
        for _ in range(25):
            begin = time.perf_counter()
            assert served.ask(temperature=0, stream=stream).status_code == 200
            took[stream].append(time.perf_counter() - begin)
    assert statistics.median(took[False]) < 0.1 and statistics.median(took[True]) < 0.1


# Against our own OpenAPI document.


def test_answers_conform_to_the_document_whatever_is_sent(served):
    schemathesis = pytest.importorskip("schemathesis")
    import hypothesis
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks as conform

    checks = [not_a_server_error, conform.status_code_conformance, conform.content_type_conformance,
              conform.response_schema_conformance, conform.negative_data_rejection, conform.unsupported_method]  # fmt: skip
    schema = schemathesis.openapi.from_dict(served.http.get("/openapi.json").json())
    seen: set[tuple[str, int]] = set()

    def conforms(operation, mode):
        @hypothesis.seed(7)
        @hypothesis.settings(max_examples=40, deadline=None, database=None, phases=[hypothesis.Phase.generate],
                             suppress_health_check=list(hypothesis.HealthCheck))  # fmt: skip
        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        def one(case):
            if isinstance(case.body, dict) and mode is schemathesis.GenerationMode.POSITIVE:
                case.body.update({"model": "tiny"} if "model" in case.body else {})
            response = case.call_and_validate(
                base_url=served.url, headers={"Authorization": f"Bearer {TOKEN}"}, checks=checks, timeout=20
            )
            seen.add((case.path, response.status_code))

        one()

    for found in schema.get_all_operations():
        operation = found.ok()
        conforms(operation, schemathesis.GenerationMode.POSITIVE)
        if operation.method == "post":
            conforms(operation, schemathesis.GenerationMode.NEGATIVE)
    assert len({path for path, _ in seen}) == 8
    assert {("/v1/chat/completions", 200), ("/v1/chat/completions", 400), ("/v1/completions", 200)} <= seen
    assert served.quiet()


def test_the_document_names_every_route_and_error(served):
    document = served.http.get("/openapi.json").json()
    chat = document["paths"]["/v1/chat/completions"]["post"]
    assert {"200", "400", "401", "404", "408", "413", "415", "429", "431", "500", "503", "504"} <= set(chat["responses"])
    assert "422" not in json.dumps(list(chat["responses"])) and chat["security"] == [{"token": []}]
    assert document["paths"]["/health"]["get"]["security"] == []


def test_answers_are_what_the_document_says(served):
    from serving import protocol

    protocol.ChatCompletion.model_validate_json(served.ask().content)
    protocol.Completion.model_validate_json(served.complete().content)
    protocol.Models.model_validate_json(served.http.get("/v1/models").content)
    protocol.Error.model_validate_json(served.ask(model="other").content)


def test_under_a_prefix_health_is_open_and_the_rest_is_not(engine):
    app = create_app(OneModel(engine), lambda: Table(name="tiny", tokens=(digest_of(TOKEN),)))

    async def ask():
        transport = httpx.ASGITransport(app, root_path="/tiny")
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            paths = ("/tiny/health", "/tiny/v1/models", "/v1/models/health", "/tiny/tiny/health")
            return [(await client.get(path)).status_code for path in paths]

    assert asyncio.run(ask()) == [200, 401, 401, 401]


def test_in_process_without_a_server(engine):
    app = create_app(OneModel(engine), lambda: Table(name="tiny"))

    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            body = {"model": "tiny", "messages": HELLO, "max_tokens": 4}
            whole, streamed = await asyncio.gather(
                *[client.post("/v1/chat/completions", json=body | {"stream": s}) for s in (False, True)]
            )
            return whole.status_code, streamed.text

    status, text = asyncio.run(ask())
    assert status == 200 and text.endswith("data: [DONE]\n\n")
