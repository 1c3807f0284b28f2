"""The engine answers as transformers does, many requests at once, each as if it were alone."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from contextlib import aclosing
from dataclasses import replace

import pytest
import torch

from serving.endpoint import EngineSettings
from serving.generate import Engine, EngineError, Sampling, _draw, _Text
from training.errors import InputError

PROMPTS = ("The story of", "Dear team,", "A letter about", "In the morning", "The drum", "She went to", "List of", "Note:")


async def answer(engine, prompt, **how):
    """Returns the text, the last piece and all pieces."""
    ids = prompt if isinstance(prompt, list) else engine.encode(prompt)
    pieces = [piece async for piece in engine.generate(ids, Sampling(**how))]
    return "".join(piece.text for piece in pieces), pieces[-1], pieces


def greedy(model, tokenizer, prompt, count):
    ids = tokenizer(prompt).input_ids
    with torch.no_grad():
        out = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                             max_new_tokens=count, do_sample=False, pad_token_id=2)[0, len(ids) :].tolist()  # fmt: skip
    return out, tokenizer.decode(out, skip_special_tokens=True)


def test_temperature_0_in_a_batch_is_what_transformers_generates_alone(engine, model, tokenizer):
    lengths = [3, 48, 7, 32, 1, 24, 64, 12]
    expected = [greedy(model, tokenizer, prompt, n) for prompt, n in zip(PROMPTS, lengths, strict=True)]

    async def together():
        return await asyncio.gather(*[answer(engine, p, max_tokens=n) for p, n in zip(PROMPTS, lengths, strict=True)])

    for (text, last, _), (ids, wanted), n in zip(asyncio.run(together()), expected, lengths, strict=True):
        assert text == wanted
        assert last.completion_tokens == len(ids) and last.prompt_tokens > 0
        assert last.finish == ("length" if len(ids) == n and ids[-1] != tokenizer.eos_token_id else "stop")
    assert engine.largest_batch > 1, "they shared a batch"


@pytest.mark.parametrize(
    "how", [{"temperature": 0.0}, {"temperature": 2.0}, {"stop": (" the",)}, {"temperature": 2.0, "stop": ("e", ".")}], ids=str
)
def test_a_whole_answer_is_what_its_pieces_make_together(engine, how):
    async def both(prompt, seed):
        sampling = Sampling(40, seed=seed, **how)
        whole, (text, last, _) = await asyncio.gather(
            engine.answer(engine.encode(prompt), sampling), answer(engine, prompt, max_tokens=40, seed=seed, **how)
        )
        return whole, replace(last, text=text, first=whole.first)

    async def all_of_them():
        return await asyncio.gather(*[both(prompt, seed) for seed, prompt in enumerate(PROMPTS)])

    found = asyncio.run(all_of_them())
    assert all(whole == pieces for whole, pieces in found)
    assert {whole.finish for whole, _ in found} <= {"stop", "length"} and engine.running == 0


def test_cancelling_a_whole_answer_takes_it_out_of_the_batch(engine):
    async def cancelled():
        asking = asyncio.create_task(engine.answer(engine.encode("The story of"), Sampling(200)))
        while engine.waiting or not engine.running:
            await asyncio.sleep(0.001)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    asyncio.run(cancelled())
    assert engine.running == 0
    until = time.monotonic() + 5
    while engine._manager.batch_processor.has_pending_requests():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_an_answer_that_ends_by_itself_stops_and_counts_its_end(engine):
    text, last, _ = asyncio.run(answer(engine, "Note:", max_tokens=200, temperature=1.0, seed=11))
    assert last.finish == "stop" and last.completion_tokens < 200
    assert "<|eos|>" not in text


def test_a_seed_gives_the_same_text_whatever_else_is_in_the_batch(engine):
    async def alone(seed):
        return (await answer(engine, "The story of", max_tokens=24, temperature=1.0, seed=seed))[0]

    async def crowded(seed):
        others = [asyncio.create_task(answer(engine, p, max_tokens=40, temperature=1.5, seed=i)) for i, p in enumerate(PROMPTS)]
        await asyncio.sleep(0.01)
        mine = await alone(seed)
        await asyncio.gather(*others)
        return mine

    async def both():
        return [(await alone(seed), await crowded(seed)) for seed in range(5)]

    pairs = asyncio.run(both())
    assert all(a == b for a, b in pairs)
    assert len({a for a, _ in pairs}) == 5, "different seeds differ"


def test_without_a_seed_answers_differ(engine):
    async def several():
        return await asyncio.gather(*[answer(engine, "The story of", max_tokens=16, temperature=1.0) for _ in range(4)])

    assert len({text for text, _, _ in asyncio.run(several())}) > 1


def test_next_to_no_temperature_is_greedy_and_breaks_nothing():
    logits = torch.tensor([[2.0, 1.0, 3.0, -1.0]]).repeat(50, 1)
    for temperature in (1e-6, 1e-300, 5e-324):
        assert set(_draw(logits.clone(), [("", p, Sampling(1, temperature, 0.9, seed=1)) for p in range(50)]).tolist()) == {2}


def test_a_drawn_token_follows_the_models_probabilities():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(4000, 1)
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.8)):
        rows = [("", position, Sampling(1, temperature, top_p, seed=7)) for position in range(4000)]
        seen = Counter(_draw(logits.clone(), rows).tolist())
        wanted = (logits[0].double() / temperature).softmax(-1)
        if top_p < 1:  # 0.644 alone is not enough, 0.644 + 0.237 is
            wanted = torch.tensor([wanted[0], wanted[1], 0, 0]) / (wanted[0] + wanted[1])
        for token, share in enumerate(wanted.tolist()):
            assert abs(seen[token] / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5 + 1e-12


def test_a_stop_string_ends_the_text_wherever_tokens_break_it(engine, model, tokenizer):
    ids, whole = greedy(model, tokenizer, "The story of", 32)
    sofar = [tokenizer.decode(ids[:count]) for count in range(33)]
    for begin in range(0, len(whole) - 6, 3):
        stop = whole[begin + 1 : begin + 6]
        text, last, _ = asyncio.run(answer(engine, "The story of", max_tokens=32, stop=("never this", stop)))
        assert text == whole[: whole.index(stop)] and last.finish == "stop"
        assert last.completion_tokens == next(count for count, text in enumerate(sofar) if stop in text)


def test_the_beginning_of_a_stop_string_that_does_not_come_is_given_in_the_end(engine):
    whole = asyncio.run(answer(engine, "The story of", max_tokens=8))[0]
    text, last, _ = asyncio.run(answer(engine, "The story of", max_tokens=8, stop=(whole[-3:] + "zzz",)))
    assert (text, last.finish) == (whole, "length")


@pytest.mark.parametrize("written", ["Grüße, 世界! 👩‍👩‍👧", "a\u0301 é 😀😀", "plain"])
def test_text_comes_in_whole_characters_and_adds_up(tokenizer, written):
    text = _Text(tokenizer, ())
    pieces = [text.add(token) for token in tokenizer(written, add_special_tokens=False).input_ids]
    assert "".join(pieces) + text.end() == written
    assert not any("\ufffd" in piece for piece in pieces)


def test_any_tokens_piece_by_piece_are_the_text_of_all_of_them(tokenizer):
    draw = random.Random(5)
    for _ in range(300):
        ids = [draw.randrange(tokenizer.vocab_size) for _ in range(draw.randrange(1, 40))]
        text = _Text(tokenizer, ())
        written = "".join(text.add(token) for token in ids) + text.end()
        assert written.rstrip("\ufffd") == tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd")


def test_half_a_character_at_the_end_is_dropped(tokenizer):
    ids = tokenizer("ab😀", add_special_tokens=False).input_ids
    text = _Text(tokenizer, ())
    assert "".join(text.add(token) for token in ids[:-1]) + text.end() == "ab"


def test_special_tokens_in_a_users_text_are_text(engine, tokenizer):
    special = set(tokenizer.all_special_ids)
    for written in ("stop <|eos|> here", "<|bos|><|pad|>", "<|eos|>"):
        assert not special & set(engine.encode(written))
        ids = engine.encode_chat([{"role": "user", "content": written}])
        assert not special & set(ids)
        assert written in tokenizer.decode(ids)
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    ids = engine.encode_chat(talk)
    assert ids.count(tokenizer.eos_token_id) == 1, "the template's own stay special"
    assert ids == tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)


def test_two_messages_cannot_spell_a_special_token_together(engine):
    with pytest.raises(InputError, match="special token"):
        engine.encode_chat([{"role": "user", "content": "<|eo"}, {"role": "user", "content": "s|>"}])


def test_messages_that_the_template_refuses_are_the_users_mistake(engine, tokenizer):
    kept = tokenizer.chat_template
    try:
        tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
        with pytest.raises(InputError, match="roles must alternate"):
            engine.encode_chat([{"role": "user", "content": "a"}])
        tokenizer.chat_template = None
        with pytest.raises(InputError, match="no chat template"):
            engine.encode_chat([{"role": "user", "content": "a"}])
    finally:
        tokenizer.chat_template = kept


def test_closing_the_iterator_takes_the_request_out_of_the_batch(engine):
    async def leave():
        async with aclosing(engine.generate(engine.encode("The story of"), Sampling(200))) as pieces:
            async for _ in pieces:
                break
        assert engine.running == 0
        scheduler = engine._manager.batch_processor.scheduler
        ended = time.monotonic() + 2
        while scheduler.has_pending_requests() and time.monotonic() < ended:
            await asyncio.sleep(0.01)
        assert not scheduler.has_pending_requests()
        assert engine._manager.output_router.result_handlers == {} and engine._manager.output_router.output_queue.empty()

    asyncio.run(leave())


def test_requests_beyond_the_cache_take_turns_and_answer_the_same(model, tokenizer):
    small = Engine(model, tokenizer, EngineSettings(cache_tokens=256))
    assert small.context == 256
    small.start()

    async def many():
        return await asyncio.gather(*[answer(small, p, max_tokens=100, temperature=1.0, seed=4) for p in PROMPTS])

    async def single():
        return [await answer(small, p, max_tokens=100, temperature=1.0, seed=4) for p in PROMPTS]

    try:
        for (crowded, a, _), (alone, b, _) in zip(asyncio.run(many()), asyncio.run(single()), strict=True):
            assert (crowded, a.finish, a.completion_tokens) == (alone, b.finish, b.completion_tokens)
    finally:
        small.close()


def test_a_prompt_that_does_not_fit_is_refused(engine):
    with pytest.raises(ValueError, match="do not fit"):
        asyncio.run(answer(engine, [5] * 250, max_tokens=7))
    with pytest.raises(ValueError, match="do not fit"):
        asyncio.run(answer(engine, [], max_tokens=7))
    assert asyncio.run(answer(engine, [5] * 250, max_tokens=6))[1].completion_tokens <= 6


def test_a_closed_event_loop_does_not_stop_the_engine(engine):
    loop = asyncio.new_event_loop()
    pieces = engine.generate(engine.encode("The story of"), Sampling(200))
    loop.run_until_complete(anext(pieces))
    loop.close()
    time.sleep(0.1)
    assert asyncio.run(answer(engine, "The drum", max_tokens=4))[1].completion_tokens == 4
    assert engine.healthy()
    with pytest.raises(StopIteration):
        pieces.aclose().send(None)  # what the collector does in the end: the request leaves the batch
    assert engine.running == 0


def test_an_engine_that_is_closed_or_broken_says_so(model, tokenizer, monkeypatch):
    other = Engine(model, tokenizer, EngineSettings())
    with pytest.raises(EngineError):
        asyncio.run(answer(other, "a", max_tokens=1))
    assert not other.healthy()
    other.start()
    assert other.healthy()

    async def closed_while_asked():
        task = asyncio.create_task(answer(other, "The story of", max_tokens=200))
        await asyncio.sleep(0.02)
        await asyncio.to_thread(other.close)
        await task

    with pytest.raises(EngineError):
        asyncio.run(closed_while_asked())
    other.close()
    assert not other.healthy() and other.running == 0


def test_a_model_that_fails_fails_the_request_at_once(model, tokenizer):
    other = Engine(model, tokenizer, EngineSettings())
    other.start()
    hook = model.model.layers[1].register_forward_hook(lambda *_: 1 / 0)
    try:
        with pytest.raises(EngineError):
            asyncio.run(answer(other, "a", max_tokens=1))
        assert not other.healthy()
    finally:
        hook.remove()
        other.close()


def test_output_that_is_not_finite_fails_its_request_and_no_later_one(model, tokenizer):
    other = Engine(model, tokenizer, EngineSettings())
    other.start()

    def spoil(module, inputs, output):
        rows = inputs[0][0] == 7
        return output.masked_fill(rows.unsqueeze(-1), float("nan"))

    hook = model.model.embed_tokens.register_forward_hook(spoil)

    async def one_after_the_other():
        before = await answer(other, [5, 6], max_tokens=12)
        for _ in range(3):
            with pytest.raises(EngineError):
                await answer(other, [7], max_tokens=12)
        return before, await answer(other, [5, 6], max_tokens=12)

    try:
        before, after = asyncio.run(one_after_the_other())
        assert (before[0], before[1].completion_tokens) == (after[0], after[1].completion_tokens)
        assert other.healthy() and other.running == 0
    finally:
        hook.remove()
        other.close()


def test_a_short_answer_takes_well_under_a_tenth_of_a_second(engine):
    async def times():
        took = []
        for _ in range(30):
            begin = time.perf_counter()
            await answer(engine, "The story of", max_tokens=8)
            took.append(time.perf_counter() - begin)
        return sorted(took)

    assert asyncio.run(times())[15] < 0.1
