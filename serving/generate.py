"""Text from a model, many requests in one batch.

Owns: `Engine` (transformers' continuous batching behind asyncio), `Sampling`, `Piece`, incremental text, stop strings.
Must not know: HTTP, tables, versions, adapters.

One thread runs the batch; tokens come back on the event loop of whoever asked. A request's text depends on its prompt, its
sampling and the model, not on what else is in the batch: noise comes from (seed, position) alone.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedTokenizerFast
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor
from transformers.generation.continuous_batching.continuous_api import OutputRouter

from serving.endpoint import EngineSettings
from training.errors import wrong

PAGE = 32  # tokens; small pages waste little on short answers
BATCH_TOKENS = 512  # a longer prompt is read in several steps, so that it does not hold up the others
NO_TOKEN = -1
REPLACEMENT = "\ufffd"


class EngineError(RuntimeError):
    """The engine cannot answer; not the request's fault."""


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens. Temperature 0 takes the likeliest; without a seed one is drawn."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Piece:
    """The next text of an answer, or all of it. Counts are of tokens so far, the end-of-sequence token among them; `first` is
    when the answer's first token came (`time.monotonic`)."""

    text: str
    finish: Literal["stop", "length"] | None
    prompt_tokens: int
    completion_tokens: int
    first: float


class Engine:
    """A model that answers many requests at once.

    Args:
        model: a plain transformers model (of an adapter: the inner one, its layers in place); its attention must be sdpa or eager
        tokenizer: its tokenizer
        settings: `cache_tokens` bounds the tokens of all requests held at once
    """

    def __init__(self, model, tokenizer, settings: EngineSettings):
        self._model, self._tokenizer = model, tokenizer
        self._blocks = settings.cache_tokens // PAGE
        self._ends = _end_tokens(model, tokenizer)
        self._special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._lock = threading.Lock()  # a tokenizer keeps its settings in itself
        self._boxes: dict[str, _Box] = {}
        self._sampler = _Sampler(self._boxes)
        self._manager = None

    def start(self) -> None:
        """Starts the batch's thread."""
        self._manager = self._model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=NO_TOKEN, pad_token_id=0),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=PAGE, num_blocks=self._blocks, max_batch_tokens=min(BATCH_TOKENS, self._blocks * PAGE),
                allow_block_sharing=False, auto_switch_to_flash=False, use_async_batching=False, use_cuda_graph=False,
            ),
        )  # fmt: skip
        self._manager.output_router = _Router()
        self._sampler.join(self._manager.logit_processor)
        # A thread inherits being a daemon: a process that forgets close() still ends.
        starter = threading.Thread(target=self._manager.start, daemon=True)
        starter.start()
        starter.join()

    def close(self) -> None:
        """Stops the thread; requests still in the batch fail. Closing twice is fine."""
        manager, self._manager = self._manager, None
        if manager is not None:
            manager.stop(block=True, timeout=10, hard_stop=True)
            for box in list(self._boxes.values()):
                box.fail()

    def healthy(self) -> bool:
        """Tells whether the engine runs and can take requests."""
        manager = self._manager
        return manager is not None and manager.is_running() and manager.background_thread_status.can_accept_new_requests() is None

    @property
    def context(self) -> int:
        """Most tokens of a prompt and its answer together."""
        longest = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        room = self._blocks * PAGE
        return min(longest, room) if longest else room

    @property
    def running(self) -> int:
        """Requests in the batch or on their way into it."""
        return len(self._boxes)

    @property
    def waiting(self) -> int:
        """Those of them that have no token yet."""
        return sum(box.first is None for box in list(self._boxes.values()))

    @property
    def batch(self) -> int:
        """Requests in the last step; `largest_batch` is the most there ever were."""
        return self._sampler.last if self._boxes else 0

    @property
    def largest_batch(self) -> int:
        return self._sampler.largest

    def encode(self, prompt: str) -> list[int]:
        """Returns the prompt's tokens. A special token's name in it is text; those that the tokenizer adds itself are there."""
        with self._lock:
            return self._tokenizer(prompt, split_special_tokens=True)["input_ids"]

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Returns the tokens of a conversation rendered by the model's chat template, up to where the answer begins.

        Raises:
            InputError: there is no template, it refuses the messages, or they spell a special token together.
        """
        tokenizer = self._tokenizer
        if not tokenizer.chat_template:
            raise wrong("messages", "the model has no chat template.", "Use /v1/completions.")
        self._refuse_tokens_spelled_together(messages)
        try:
            with self._lock:
                return tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, sanitize_control_tokens=True, return_dict=False
                )
        except Exception as error:  # templates raise whatever Jinja has: a refusal, or an index that is not there
            first = (str(error).splitlines() or [""])[0][:200]
            raise wrong("messages", f"the model's chat template refuses them ({first}).", "Change roles or order.") from None

    def _refuse_tokens_spelled_together(self, messages: list[dict[str, str]]) -> None:
        # Each message is sanitized by itself, but a template may put two side by side.
        texts = [message["content"] for message in messages]
        joined = "".join(texts)
        for token in self._special:
            if joined.count(token) > sum(text.count(token) for text in texts):
                raise wrong("messages", "several messages together spell a special token.", "Write it in one message.")

    async def generate(self, ids: list[int], sampling: Sampling) -> AsyncIterator[Piece]:
        """Yields an answer as it comes; the last piece has `finish`. Closing the iterator takes the request out of the batch.

        Raises:
            EngineError: the engine stopped, or the model's output is not finite. NaN spreads to those in the same step, which
                fail too; later requests are not touched.
        """
        text, seen = _Text(self._tokenizer, sampling.stop), 0
        with self._in_batch(ids, sampling, streaming=True) as box:
            while True:
                tokens = await self._news(box)
                new, finish = "", None
                while seen < len(tokens) and finish is None:
                    token, seen = tokens[seen], seen + 1
                    finish = "stop" if token in self._ends else "length" if seen == sampling.max_tokens else None
                    new += text.end() if token in self._ends else text.add(token)
                    if text.stopped:
                        finish = "stop"
                    elif finish == "length":
                        new += text.end()
                        finish = "stop" if text.stopped else finish
                if new or finish:
                    yield Piece(new, finish, len(ids), seen, box.first)
                if finish:
                    return

    async def answer(self, ids: list[int], sampling: Sampling) -> Piece:
        """Returns what the pieces of `generate` make together. Nobody wakes at each token, which leaves the batch's thread
        alone. Cancelling takes the request out of the batch.

        Raises:
            EngineError: as `generate`.
        """
        if sampling.stop:  # each token's text must be looked at
            async with aclosing(self.generate(ids, sampling)) as pieces:
                parts = [piece async for piece in pieces]
            return replace(parts[-1], text="".join(piece.text for piece in parts))
        with self._in_batch(ids, sampling, streaming=False) as box:
            tokens = await self._news(box)
            count = next((number for number, token in enumerate(tokens, 1) if token in self._ends), len(tokens))
            ended = tokens[count - 1] in self._ends
            text = _Text(self._tokenizer, ()).whole(tokens[: count - ended])
            return Piece(text, "stop" if ended else "length", len(ids), count, box.first)

    @contextmanager
    def _in_batch(self, ids: list[int], sampling: Sampling, *, streaming: bool) -> Iterator[_Box]:
        """Holds a request in the batch; its box has news with each token, or where it is not streaming at its end."""
        if not ids or len(ids) + sampling.max_tokens > self.context:
            raise ValueError(f"{len(ids)} and {sampling.max_tokens} tokens do not fit {self.context}")
        if sampling.seed is None:
            sampling = replace(sampling, seed=secrets.randbits(63))
        name, box = secrets.token_hex(8), _Box(asyncio.get_running_loop())
        self._boxes[name] = box
        try:
            self._submit(name, box, ids, sampling, streaming)
            yield box
        finally:
            self._take_out(name, box)

    async def _news(self, box: _Box) -> list[int]:
        """Waits for news and returns all tokens so far."""
        await box.news.wait()
        box.news.clear()
        output = box.output
        if output is None or output.error is not None or box.broken:
            raise EngineError("the engine stopped" if self._manager is None else "the model failed")
        return output.generated_tokens

    def _submit(self, name: str, box: _Box, ids: list[int], sampling: Sampling, streaming: bool) -> None:
        manager = self._manager
        if manager is None or not self.healthy():
            raise EngineError("the engine is not running")
        manager.register_result_handler(name, box.put)
        manager.add_request(ids, name, max_new_tokens=sampling.max_tokens, streaming=streaming, eos_token_id=sorted(self._ends),
                            sampling=sampling)  # fmt: skip
        # A loop that ended meanwhile may have emptied its queue before the request was in it.
        if not self.healthy():
            raise EngineError("the engine stopped")

    def _take_out(self, name: str, box: _Box) -> None:
        self._boxes.pop(name, None)
        manager = self._manager
        if manager is not None:
            manager.output_router.forget(name)
            if box.output is None or not box.output.is_finished():
                manager.cancel_request(name)


def _end_tokens(model, tokenizer) -> frozenset[int]:
    found = {tokenizer.eos_token_id}
    configured = getattr(model.generation_config, "eos_token_id", None)
    found |= set(configured) if isinstance(configured, (list, tuple)) else {configured}
    return frozenset(int(token) for token in found if token is not None and token >= 0)


@dataclass
class _Box:
    """Where a request's news lies: each output holds all tokens so far, so only the last one counts."""

    loop: asyncio.AbstractEventLoop
    output: object = None
    first: float | None = None  # when its first token came
    broken: bool = False  # a token was chosen from what is no number
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, output) -> None:
        self.output = output
        self.news.set()

    def fail(self) -> None:
        self.output = None
        try:
            self.loop.call_soon_threadsafe(self.news.set)
        except RuntimeError:  # its loop is closed, and so is whoever waited
            pass


class _Router(OutputRouter):
    """Delivers to several event loops, survives a closed one, and drops what nobody waits for any more.

    The original keeps such outputs for ever and stops the batch where a loop is closed.
    """

    def deliver(self, output) -> None:
        self.deliver_batch([output])

    def deliver_batch(self, outputs) -> None:
        calls: dict = {}
        with self._lock:
            for output in outputs:
                if output.request_id in self.result_handlers:
                    call, loop = self.result_handlers[output.request_id]
                    calls.setdefault(loop, []).append((call, output))
        for loop, waiting in calls.items():
            try:
                loop.call_soon_threadsafe(_call_all, waiting)
            except RuntimeError:
                for _, output in waiting:
                    self.forget(output.request_id)

    def forget(self, name: str) -> None:
        with self._lock:
            self.result_handlers.pop(name, None)


def _call_all(waiting) -> None:
    for call, output in waiting:
        call(output)


class _Sampler(ContinuousBatchingLogitsProcessor):
    """Chooses each request's token from its own seed; the batch then takes the argmax.

    The choice is by inverse cumulative probability in the vocabulary's order, so it is an exact sample, and a rounding error
    in the logits moves only the borders between tokens.
    """

    supported_kwargs: dict[str, type] = {"sampling": Sampling}
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, boxes: dict[str, _Box]):
        self._boxes = boxes
        self.rows: list[tuple[str, int, Sampling]] = []
        self.last = self.largest = 0

    def join(self, processors) -> None:
        """Becomes the only processor of a manager's list."""
        processors.clear()
        processors.logits_processor.append(self)
        processors.tensors_required = 1
        processors.supported_keys = dict(self.supported_kwargs)
        processors.do_processing = True

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token) -> torch.Tensor:
        # Kept as Python values: without graphs and asynchronous batches the forward of the same rows follows at once.
        # The position counts prompt and answer: it stays the same where a request is put back and read again.
        states = [request.state for request in requests_with_new_token]
        self.rows = [
            (s.request_id, len(s.initial_tokens) + len(s.generated_tokens), s.logit_processor_kwargs["sampling"]) for s in states
        ]
        self.last = len(self.rows)
        self.largest = max(self.largest, self.last)
        return torch.zeros(len(self.rows), dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        now = time.monotonic()
        for (name, _, _), finite in zip(self.rows, scores[: len(self.rows)].amax(-1).isfinite().tolist(), strict=True):
            box = self._boxes.get(name)
            if box is not None:  # else it was called off meanwhile
                box.first = box.first or now
                box.broken |= not finite  # NaN is the largest of its row
        drawn = [row for row, (_, _, sampling) in enumerate(self.rows) if sampling.temperature > 0]
        if drawn:
            chosen = _draw(scores[drawn], [self.rows[row] for row in drawn])
            scores[drawn, chosen] = torch.inf
        return scores


def _draw(scores: torch.Tensor, rows: list[tuple[str, int, Sampling]]) -> torch.Tensor:
    def column(values) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=scores.device).unsqueeze(1)

    logits = torch.nan_to_num(scores.double(), nan=0.0)
    logits -= logits.amax(-1, keepdim=True)  # before the division, which may be by next to nothing
    probabilities = (logits / column([sampling.temperature for _, _, sampling in rows])).softmax(-1)
    shares = [sampling.top_p for _, _, sampling in rows]
    if min(shares) < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        beyond = ordered.cumsum(-1) - ordered >= column(shares)
        beyond[:, 0] = False
        probabilities = probabilities.masked_fill(beyond.scatter(-1, order, beyond) & (column(shares) < 1), 0.0)
    reached = probabilities.cumsum(-1)
    wanted = reached[:, -1:] * column([_uniform(sampling.seed, position) for _, position, sampling in rows])
    return torch.searchsorted(reached, wanted, right=True).squeeze(1).clamp(max=scores.size(-1) - 1)


def _uniform(seed: int, position: int) -> float:
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


class _Text:
    """Tokens to text, piece by piece: whole characters only, and nothing that may yet become a stop string."""

    def __init__(self, tokenizer, stops: tuple[str, ...]):
        self._tokenizer, self._stops = tokenizer, stops
        self._ids: list[int] = []
        self._before = self._shown = 0  # text of ids[before:shown] was given; it is the context of what follows
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        self._ids.append(token)
        new = self._decoded()
        # An unfinished character decodes to the replacement character: wait for the rest.
        if not new or new.endswith(REPLACEMENT):
            return ""
        self._before, self._shown = self._shown, len(self._ids)
        return self._without_stops(new)

    def whole(self, tokens: list[int]) -> str:
        """Returns what all of them add up to."""
        return self._decode(tokens).rstrip(REPLACEMENT)

    def end(self) -> str:
        """Returns what was held back; half a character is dropped."""
        rest = self._without_stops(self._decoded().rstrip(REPLACEMENT))
        if not self.stopped:
            rest, self._held = rest + self._held, ""
        return rest

    def _decoded(self) -> str:
        given = self._decode(self._ids[self._before : self._shown])
        return self._decode(self._ids[self._before :])[len(given) :]

    def _decode(self, ids: list[int]) -> str:
        if not ids:
            return ""
        tokenizer = self._tokenizer
        if getattr(type(tokenizer), "_decode", None) is PreTrainedTokenizerFast._decode:  # the same without ten times its cost
            return tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=True)
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _without_stops(self, new: str) -> str:
        if self.stopped or not self._stops:
            return "" if self.stopped else new
        text = self._held + new
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Returns how many last characters of the text begin the stop string."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
