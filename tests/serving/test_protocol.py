"""What is accepted, what is refused and in which words, and what answers look like."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import Completion as OpenAICompletion
from openai.types.chat import ChatCompletion as OpenAIChatCompletion
from openai.types.chat import ChatCompletionChunk
from pydantic import ValidationError

from serving import protocol
from serving.endpoint import Limits
from serving.protocol import ChatRequest, CompletionRequest, Feedback, Refusal

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
TEXT = {"model": "m", "prompt": "hello"}
NUMBERS = {
    "max_tokens": (1, 1_000_000),
    "temperature": (0, 2),
    "top_p": (1e-300, 1),
    "n": (1, 128),
    "seed": (-(2**63), 2**63 - 1),
}
NEUTRAL = {
    "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "metadata": {}, "store": False, "service_tier": "auto",
    "logprobs": False, "top_logprobs": 0, "response_format": {"type": "text"}, "tools": [], "tool_choice": "auto",
    "functions": [], "function_call": "none", "modalities": ["text"], "reasoning_effort": "none",
}  # fmt: skip
KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 413: "invalid_request_error",
    429: "rate_limit_error", 503: "server_error",
}  # fmt: skip


def refusal(body, model=ChatRequest) -> Refusal:
    with pytest.raises(ValidationError) as found:
        model.model_validate(body)
    return protocol.refusal_of(found.value.errors())


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_parameter_that_asks_for_nothing_is_accepted_and_any_other_value_is_refused_by_name(name):
    ChatRequest.model_validate(CHAT | {name: NEUTRAL[name]})
    ChatRequest.model_validate(CHAT | {name: None})
    for value in (True, 7, "high", ["x"], {"a": 1}):
        if value != NEUTRAL[name]:
            said = refusal(CHAT | {name: value})
            assert (said.status, said.code, said.param) == (400, "unsupported_parameter", name) and name in said.message


def test_false_is_not_0_and_0_is_not_false():
    assert refusal(CHAT | {"logprobs": 0}).code == "unsupported_parameter"
    assert refusal(CHAT | {"frequency_penalty": False}).code == "unsupported_parameter"


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_is_bounded_and_a_number(name):
    low, high = NUMBERS[name]
    for model, body in ((ChatRequest, CHAT), (CompletionRequest, TEXT)):
        for fine in (low, high, None):
            model.model_validate(body | {name: fine})
        for wrong in (
            low - 1,
            high + 1,
            float("nan"),
            float("inf"),
            -float("inf"),
            True,
            False,
            "1",
            [],
            {},
            10**400,
            -(10**400),
        ):
            said = refusal(body | {name: wrong}, model)
            assert (said.status, said.param) == (400, name), wrong


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner, max_size=3)
                    | st.dictionaries(st.text(), inner, max_size=3), max_leaves=8),
       st.sampled_from([*ChatRequest.model_fields, "other", "", "a[b]", "str"]))  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_whatever_stands_in_a_field_is_accepted_or_refused_in_form(value, name):
    try:
        asked = ChatRequest.model_validate(CHAT | {name: value})
    except ValidationError as error:
        said = protocol.refusal_of(error.errors())
        body = json.dumps(said.body("id"), ensure_ascii=False).encode()
        protocol.Error.model_validate_json(body)
        assert said.status == 400 and len(body) < 2000
    else:
        json.dumps(asked.model_dump()).encode()


def test_an_unknown_parameter_is_named_with_its_nearest():
    said = refusal(CHAT | {"temprature": 1})
    assert (said.code, said.param) == ("unknown_parameter", "temprature") and "did you mean temperature?" in said.message
    assert refusal(CHAT | {"\ud800x": 1}).status == 400
    assert refusal(CHAT | {"messages": [{"role": "user", "content": "a", "weight": 1}]}).param == "messages.0.weight"


def test_what_is_said_of_a_body_repeats_nothing_of_it():
    for bad in ({"messages": [{"role": "zebra", "content": "zebra"}]}, {"temperature": "zebra"}, {"stop": ["zebra", ""]},
                {"model": ["zebra"]}, {"response_format": {"type": "zebra"}}):  # fmt: skip
        assert "zebra" not in refusal(CHAT | bad).message


@pytest.mark.parametrize("text", ["", " ", "\n\t\u2003"])
def test_nothing_asked_is_refused(text):
    assert refusal(CHAT | {"messages": [{"role": "user", "content": text}]}).code == "invalid_value"
    assert refusal(TEXT | {"prompt": text}, CompletionRequest).code == "invalid_value"
    assert refusal(TEXT | {"prompt": ["a", text]}, CompletionRequest).code == "invalid_value"


def test_half_a_surrogate_pair_is_no_text():
    for bad in ({"model": "\ud800"}, {"user": "\udfff"}, {"stop": "\ud800"}, {"stop": ["\ud800"]},
                {"messages": [{"role": "user", "content": "\ud800"}]},
                {"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}]}):  # fmt: skip
        assert "surrogate" in refusal(CHAT | bad).message, bad
    assert refusal({"id": "\ud800", "score": 1}, Feedback).status == 400


def test_the_endpoints_own_limits_hold():
    limits = Limits(output_tokens=10, choices=2, stops=1, messages=1)
    protocol.within(ChatRequest.model_validate(CHAT | {"max_tokens": 10, "n": 2, "stop": "x"}), limits)
    over = [CHAT | {"max_tokens": 11}, CHAT | {"max_completion_tokens": 11}, CHAT | {"n": 3}, CHAT | {"stop": ["x", "y"]},
            CHAT | {"messages": CHAT["messages"] * 2}]  # fmt: skip
    asked = [ChatRequest.model_validate(body) for body in over] + [
        CompletionRequest.model_validate(TEXT | {"prompt": ["a", "b"], "n": 2})
    ]
    for one in asked:
        with pytest.raises(Refusal, match="at most") as found:
            protocol.within(one, limits)
        assert (found.value.status, found.value.code) == (400, "over_limit")


def test_an_answer_is_as_long_as_asked_and_as_fits():
    limits = Limits(output_tokens=50)
    chat, text = ChatRequest.model_validate(CHAT), CompletionRequest.model_validate(TEXT)
    assert (chat.sampling(20, limits).max_tokens, chat.sampling(900, limits).max_tokens) == (20, 50)
    assert text.sampling(900, limits).max_tokens == 16, "OpenAI's default"
    assert (chat.sampling(20, limits).temperature, chat.sampling(20, limits).top_p) == (1.0, 1.0)
    for room, asked in ((0, CHAT), (-5, CHAT), (9, CHAT | {"max_tokens": 10})):
        with pytest.raises(Refusal) as found:
            ChatRequest.model_validate(asked).sampling(room, limits)
        assert found.value.code == "context_length_exceeded"


def test_developers_are_the_system_and_parts_are_one_text():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked = ChatRequest.model_validate({"model": "m", "messages": [{"role": "developer", "content": "be brief"},
                                                                  {"role": "user", "content": parts}]})  # fmt: skip
    assert asked.conversation == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "ab"}]
    assert asked.texts == ["be brief", "ab"]


def test_a_message_that_was_answered_can_be_sent_back():
    sent = protocol.choice(True, 0, "an answer", "stop")["message"]
    extra = {"annotations": [], "audio": None, "function_call": None, "tool_calls": None}
    ChatRequest.model_validate({"model": "m", "messages": [*CHAT["messages"], sent | extra, *CHAT["messages"]]})


def test_an_id_names_its_version():
    for version in ("v3", "trial-7", "fast", "a.b_c-d"):
        for kind in ("chatcmpl", "cmpl"):
            assert protocol.version_of(protocol.new_id(kind, version)) == version
    for wrong in (
        "",
        "x",
        "chatcmpl-abc-v1",
        "chatcmpl-" + "g" * 24 + "-v1",
        "cmpl-" + "0" * 24,
        "cmpl-" + "0" * 24 + "-",
        "-" * 30,
    ):
        assert protocol.version_of(wrong) is None


def test_answers_are_openais():
    frame = {"id": "x", "created": 1, "model": "m", "system_fingerprint": "m@v1"}
    count = {"usage": protocol.usage(3, 4)}
    chat = frame | {"object": "chat.completion", "choices": [protocol.choice(True, 0, "hi", "stop")]} | count
    text = frame | {"object": "text_completion", "choices": [protocol.choice(False, 0, "hi", "content_filter")]} | count
    for ours, theirs, answer in (
        (protocol.ChatCompletion, OpenAIChatCompletion, chat),
        (protocol.Completion, OpenAICompletion, text),
    ):
        ours.model_validate(answer)
        theirs.model_validate(answer, strict=True)
    for first in (True, False):
        part = frame | {"object": "chat.completion.chunk", "choices": [protocol.delta(True, 0, "", "stop", first)]}
        ChatCompletionChunk.model_validate(part, strict=True)


@pytest.mark.parametrize(("status", "kind"), KINDS.items())
def test_errors_are_openais(status, kind):
    body = Refusal(status, "said", code="why", param="n").body("id-1")
    assert body == {"error": {"message": "said", "type": kind, "param": "n", "code": "why", "request_id": "id-1"}}
    protocol.Error.model_validate(body)
