"""What goes over the wire: OpenAI's requests, answers and errors.

Owns: the models of requests and answers, which parameters are refused and in which words, limits of every number.
Must not know: engines, pools, HTTP servers.

A parameter that changes nothing here (`frequency_penalty: 0`) is accepted, one that would change something and is not there
(`logprobs: true`) is refused by name, and an unknown one too: no request is answered as if it had not asked.
"""

from __future__ import annotations

import difflib
import secrets
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from serving.endpoint import Limits
from serving.generate import Sampling

COMPLETION_TOKENS = 16  # OpenAI's own default of /v1/completions


class Refusal(Exception):
    """An answer other than 200: `status`, OpenAI's `type`, `param` and `code`, and seconds to `retry` after."""

    TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}

    def __init__(self, status: int, message: str, *, code: str, param: str | None = None, retry: int | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry = status, message, code, param, retry

    def body(self, request_id: str) -> dict:
        """Returns OpenAI's form of it, with the request's id."""
        kind = self.TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {
            "error": {"message": self.message, "type": kind, "param": self.param, "code": self.code, "request_id": request_id}
        }


def _only(*values) -> Any:
    """A parameter that is known and not supported: only the values that ask for nothing."""

    def check(value: Any) -> Any:
        if not any(value == one and isinstance(value, bool) is isinstance(one, bool) for one in values):
            allowed = " or ".join("null" if one is None else repr(one).lower() for one in values)
            raise PydanticCustomError(
                "unsupported", "is not supported; leave it out or set it to {allowed}", {"allowed": allowed}
            )
        return value

    return Annotated[Any, BeforeValidator(check), WithJsonSchema({"enum": list(values), "description": "not supported"})]


class _Wire(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


def _encodable(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("not_text", "holds half a surrogate pair, which is no character") from None
    return value


Text = Annotated[str, AfterValidator(_encodable)]
Name = Annotated[Text, Field(min_length=1, max_length=256)]
Label = Annotated[Text, Field(max_length=256)]


class StreamOptions(_Wire):
    """What a stream tells besides text."""

    include_usage: bool | None = Field(None, description="a last chunk with the tokens counted")
    include_obfuscation: _only(False, None) = None


class Asked(_Wire):
    """What requests for text have in common."""

    model: Name = Field(description="NAME, NAME@vN or NAME@alias; see /v1/models")
    max_tokens: int | None = Field(None, ge=1, le=1_000_000, description="most tokens of the answer")
    temperature: float | None = Field(None, ge=0, le=2, description="0 takes the likeliest token; default 1")
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=128, description="answers to one prompt")
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1, description="the same seed gives the same text")
    stop: Name | Annotated[list[Name], Field(max_length=64)] | None = Field(
        None, description="texts before which the answer ends"
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Label | None = Field(None, description="the same user is answered by the same version")

    frequency_penalty: _only(0, None) = None
    presence_penalty: _only(0, None) = None
    logit_bias: _only({}, None) = None
    metadata: _only({}, None) = None
    store: _only(False, None) = None
    service_tier: _only("auto", "default", None) = None

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Asked:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", "stream_options go with stream: true")
        return self

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def most(self) -> int | None:
        """Tokens asked for at most; None: what the context leaves."""
        return self.max_tokens

    @property
    def prompts(self) -> int:
        return 1

    def sampling(self, room: int, limits: Limits) -> Sampling:
        """Returns how to choose tokens where the context leaves `room` of them.

        Raises:
            Refusal: more are asked for than that.
        """
        if room < 1 or (self.most or 0) > room:
            raise Refusal(400, f"prompt and answer do not fit the context: it leaves {max(room, 0)} tokens for the answer"
                          + (f", {self.most} are asked for" if self.most else ""),
                          code="context_length_exceeded", param="max_tokens" if room >= 1 else "messages")  # fmt: skip
        return Sampling(
            max_tokens=self.most or min(room, limits.output_tokens),
            temperature=1.0 if self.temperature is None else float(self.temperature),
            top_p=1.0 if self.top_p is None else float(self.top_p),
            seed=self.seed, stop=self.stops,
        )  # fmt: skip


class TextPart(_Wire):
    """A part of a message; images and sounds are refused."""

    type: Literal["text"]
    text: Text


class Message(_Wire):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=256)]
    name: _only(None) = None
    refusal: _only(None) = None
    tool_calls: _only([], None) = None
    function_call: _only(None) = None
    audio: _only(None) = None
    annotations: _only([], None) = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Asked):
    """The body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=10_000)
    max_completion_tokens: int | None = Field(None, ge=1, le=1_000_000, description="the newer name of max_tokens")

    logprobs: _only(False, None) = None
    top_logprobs: _only(0, None) = None
    response_format: _only({"type": "text"}, None) = None
    tools: _only([], None) = None
    tool_choice: _only("none", "auto", None) = None
    functions: _only([], None) = None
    function_call: _only("none", "auto", None) = None
    modalities: _only(["text"], None) = None
    audio: _only(None) = None
    prediction: _only(None) = None
    reasoning_effort: _only("none", None) = None
    verbosity: _only(None) = None
    web_search_options: _only(None) = None
    parallel_tool_calls: bool | None = Field(None, description="changes nothing: there are no tools")
    safety_identifier: Label | None = Field(None, description="not used")
    prompt_cache_key: Label | None = Field(None, description="not used")

    @model_validator(mode="after")
    def _one_maximum(self) -> ChatRequest:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise PydanticCustomError("max_tokens", "max_tokens and max_completion_tokens differ; give one of them")
        return self

    @model_validator(mode="after")
    def _something_is_asked(self) -> ChatRequest:
        if not all(message.text.strip() for message in self.messages if message.role == "user"):
            raise PydanticCustomError("blank", "a message of the user is empty")
        if not any(message.text.strip() for message in self.messages):
            raise PydanticCustomError("blank", "all messages are empty")
        return self

    @property
    def most(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def texts(self) -> list[str]:
        return [message.text for message in self.messages]

    @property
    def conversation(self) -> list[dict[str, str]]:
        """The messages as chat templates know them."""
        return [{"role": "system" if m.role == "developer" else m.role, "content": m.text} for m in self.messages]


class CompletionRequest(Asked):
    """The body of POST /v1/completions."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=128)] = Field(description="texts; token ids are refused")

    best_of: _only(1, None) = None
    echo: _only(False, None) = None
    logprobs: _only(None) = None
    suffix: _only("", None) = None

    @model_validator(mode="after")
    def _something_is_asked(self) -> CompletionRequest:
        if not all(text.strip() for text in self.texts):
            raise PydanticCustomError("blank", "a prompt is empty")
        return self

    @property
    def texts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)

    @property
    def prompts(self) -> int:
        return len(self.texts)

    @property
    def most(self) -> int | None:
        return self.max_tokens or COMPLETION_TOKENS


class Feedback(_Wire):
    """The body of POST /v1/feedback: how good an answer was."""

    id: Name = Field(description="the answer's id")
    score: float = Field(ge=0, le=1)


def within(asked: Asked, limits: Limits) -> None:
    """Checks a request against the endpoint's own limits.

    Raises:
        Refusal: naming the parameter and the limit.
    """
    found = [
        ("max_tokens", asked.most or 0, limits.output_tokens),
        ("n", asked.choices * asked.prompts, limits.choices),
        ("stop", len(asked.stops), limits.stops),
        ("messages", len(asked.messages) if isinstance(asked, ChatRequest) else 0, limits.messages),
    ]
    for param, given, most in found:
        if given > most:
            raise Refusal(400, f"{param}: at most {most} here, got {given}", code="over_limit", param=param)


def refusal_of(problems: list[dict]) -> Refusal:
    """Returns the 400 for what pydantic found wrong with a body; nothing of the body itself is repeated."""
    first = problems[0]
    if first["type"] == "string_type" and len(problems) > 1 and problems[1]["type"] != "list_type":
        first = problems[1]  # of "a text or a list" a list was given, so what is wrong is in it
    kind = first["type"]
    where = [str(part) for part in first["loc"] if part != "body"]
    if kind != "extra_forbidden":  # names of a union's branches are no business of the asker's
        where = [part for part in where if part not in ("str", "function-after", "list") and "[" not in part]
    name = ".".join(where)[:128] or None
    if kind == "json_invalid":
        return Refusal(400, "the body is not JSON", code="invalid_json")
    if kind == "missing" and name is None:
        return Refusal(400, "the body is empty", code="invalid_json")
    if kind == "extra_forbidden":
        known = {field for model in (ChatRequest, CompletionRequest) for field in model.model_fields}
        near = difflib.get_close_matches(where[-1][:64], known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return Refusal(400, f"{name}: there is no such parameter{hint}", code="unknown_parameter", param=name)
    code = "unsupported_parameter" if kind == "unsupported" else "invalid_value"
    return Refusal(400, f"{name}: {first['msg']}" if name else first["msg"], code=code, param=name)


# Answers. They are built as plain dictionaries; these models are what the document says of them, and tests hold them to it.


class Usage(_Wire):
    """Tokens counted; of the answer its end-of-sequence token too."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatMessage(_Wire):
    """The answer's message."""

    role: Literal["assistant"]
    content: str
    refusal: None = None


FINISH = Literal["stop", "length", "content_filter"]


class ChatChoice(_Wire):
    """One answer of a chat."""

    index: int
    message: ChatMessage
    finish_reason: FINISH
    logprobs: None = None


class ChatCompletion(_Wire):
    """The answer of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class TextChoice(_Wire):
    """One continuation of a text."""

    index: int
    text: str
    finish_reason: FINISH
    logprobs: None = None


class Completion(_Wire):
    """The answer of POST /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage


class Model(_Wire):
    """Something that can be asked."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class Models(_Wire):
    """The answer of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[Model]


class Failure(_Wire):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str
    request_id: str


class Error(_Wire):
    """Every answer but 200."""

    error: Failure


def new_id(kind: str, version: str) -> str:
    """Returns an answer's id, which names the version, so that any replica knows what feedback is about."""
    return f"{kind}-{secrets.token_hex(12)}-{version}"


def version_of(answer_id: str) -> str | None:
    """Returns the version that `new_id` wrote, or None."""
    kind, _, rest = answer_id.partition("-")
    number, _, version = rest.partition("-")
    known = kind in ("chatcmpl", "cmpl") and len(number) == 24 and set(number) <= set("0123456789abcdef")
    return version if known and version else None


def usage(prompt_tokens: int, completion_tokens: int) -> dict:
    """Returns OpenAI's count."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


def choice(chat: bool, index: int, text: str, finish: str) -> dict:
    """Returns one whole answer."""
    said = {"message": {"role": "assistant", "content": text, "refusal": None}} if chat else {"text": text}
    return {"index": index, **said, "finish_reason": finish, "logprobs": None}


def delta(chat: bool, index: int, text: str, finish: str | None, first: bool) -> dict:
    """Returns the next part of an answer."""
    if not chat:
        return {"index": index, "text": text, "finish_reason": finish, "logprobs": None}
    said = ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})
    return {"index": index, "delta": said, "finish_reason": finish, "logprobs": None}
