"""The pool follows its table while it answers: nothing fails, nothing is mixed, nothing broken answers."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import threading
import weakref
from contextlib import contextmanager, suppress

import pytest
import torch
from endpoints import PROMPTS, TOKENS, adapter, answers, answers_of_peft, packaged, publish, version, wait_until

from serving.endpoint import Adapter, replicas, write_table
from serving.generate import Sampling
from serving.pool import STALE, Pool, Unavailable, Unknown, living
from training.recipe import Recipe


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("packages")
    return {1: packaged(folder / "one"), 2: packaged(folder / "two", seed=2), 3: packaged(folder / "three", seed=3)}


@pytest.fixture(scope="module")
def said(made):
    """What each version answers to each prompt; all of them differ."""
    found = {f"v{number}": answers(one.folder) for number, one in made.items()}
    for prompt in PROMPTS:
        assert len({texts[prompt] for texts in found.values()}) == len(found)
    return found


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "endpoint"


@contextmanager
def running(folder):
    pool = Pool(folder)
    pool.start()
    try:
        yield pool
    finally:
        pool.close(grace=1)


async def ask(pool, model="tiny", key="k", prompt=PROMPTS[0], tokens=TOKENS):
    async with pool.pick(model, key) as lease:
        engine = lease.engine
        pieces = [piece.text async for piece in engine.generate(engine.encode(prompt), Sampling(max_tokens=tokens))]
        return lease.version, "".join(pieces)


def state(pool, name) -> str:
    return (pool.status()["versions"] | pool.status()["adapters"]).get(name, {}).get("state", "")


def test_a_table_that_changes_under_load_fails_no_request_and_mixes_no_answer(folder, made, said):
    publish(folder, version(1, made[1], 1))
    seen = []

    async def client(pool, number, done):
        while not done.is_set():
            prompt = PROMPTS[len(seen) % len(PROMPTS)]
            name, text = await ask(pool, key=f"{number}-{len(seen)}", prompt=prompt)
            seen.append((name, prompt, text))

    async def drive(pool):
        done = asyncio.Event()
        clients = [asyncio.create_task(client(pool, number, done)) for number in range(4)]
        for numbers in ((2,), (2, 3), (3,), (1,)):
            await asyncio.sleep(0.4)
            publish(folder, *(version(number, made[number], 1 / len(numbers)) for number in numbers))
            before = len(seen)
            while {name for name, _, _ in seen[before:]} != {f"v{number}" for number in numbers}:
                await asyncio.sleep(0.02)
                before = max(before, len(seen) - 12)
        done.set()
        await asyncio.gather(*clients)

    with running(folder) as pool:
        asyncio.run(asyncio.wait_for(drive(pool), 60))
    assert len(seen) > 40 and {name for name, _, _ in seen} == {"v1", "v2", "v3"}
    assert [found for found in seen if said[found[0]][found[1]] != found[2]] == []


def test_a_version_that_is_removed_is_closed_only_after_its_last_answer(folder, made, said):
    publish(folder, version(1, made[1], 1))

    async def drive(pool):
        async with pool.pick("tiny", "k") as lease:
            engine = lease.engine
            pieces = engine.generate(engine.encode(PROMPTS[0]), Sampling(max_tokens=TOKENS))
            text = (await anext(pieces)).text
            publish(folder, version(2, made[2], 1))
            while (await ask(pool))[0] != "v2":
                await asyncio.sleep(0.02)
            await asyncio.sleep(1.2)
            assert engine.healthy() and pool.status()["closing"] == 1
            async for piece in pieces:
                text += piece.text
        assert (lease.label, text) == ("tiny@v1", said["v1"][PROMPTS[0]])
        return lease, weakref.ref(engine), weakref.ref(engine._model)

    with running(folder) as pool:
        lease, engine, model = asyncio.run(drive(pool))  # who keeps a lease that has ended keeps no model
        wait_until(lambda: pool.status()["closing"] == 0, 3, "closing")
        wait_until(lambda: engine() is None and model() is None, 3, "letting go of the weights")
        assert set(pool.status()["versions"]) == {"v2"} and lease.label == "tiny@v1"
        with pytest.raises(Unknown, match="there are tiny, tiny@v2"):
            pool.pick("tiny@v1", "k")


def spoiled(kind, made, tmp_path):
    target = tmp_path / "broken"
    if kind == "weights that are no numbers":
        return version(2, packaged(target, seed=2, spoil=True), 1), "layers.0.mlp.up_proj.weight holds values that are no finite"
    shutil.copytree(made[2].folder, target)
    broken = version(2, made[2], 1).model_copy(update={"folder": str(target)})
    if kind == "another digest":
        return broken.model_copy(update={"digest": "0" * 64}), "digest differs"
    if kind == "a changed byte":
        path = target / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-7] ^= 1
        path.write_bytes(content)
        return broken, "SHA-256 differs"
    if kind == "a missing file":
        (target / "model.safetensors").unlink()
        return broken, "do not match the manifest"
    shutil.rmtree(target)
    return broken, "no manifest"


KINDS = ("weights that are no numbers", "another digest", "a changed byte", "a missing file", "no folder")


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_version_never_answers_says_why_and_the_old_one_goes_on(folder, made, said, tmp_path, kind):
    publish(folder, version(1, made[1], 1))
    broken, reason = spoiled(kind, made, tmp_path)
    with running(folder) as pool:
        publish(folder, broken)  # the old one is not even in the table any more
        wait_until(lambda: state(pool, "v2") == "failed")
        wait_until(lambda: [one for one in replicas(folder) if one["versions"].get("v2", {}).get("state") == "failed"])
        (own,) = replicas(folder)
        assert reason in own["failed"]["2"] and own["ready"] == []
        assert (own["generation"], own["serves"]) == (2, 1)
        assert pool.healthy() and pool.problems() == [own["failed"]["2"]]
        for key in range(20):
            assert asyncio.run(ask(pool, key=str(key), tokens=1))[0] == "v1"
        with pytest.raises(Unavailable, match="tiny@v2 is not ready"), pool.pick("tiny@v2", "k"):
            pass
        publish(folder, version(1, made[1], 0.5), broken.model_copy(update={"share": 0.5}))  # its share goes to the other
        wait_until(lambda: pool.status()["generation"] == 3)
        assert pool.status()["ready"] == [1] and pool.status()["serves"] == 3
        assert {asyncio.run(ask(pool, key=str(key), tokens=1))[0] for key in range(20)} == {"v1"}
        publish(folder, version(2, made[2], 1))  # the sound one
        wait_until(lambda: state(pool, "v2") == "ready")
        assert asyncio.run(ask(pool)) == ("v2", said["v2"][PROMPTS[0]])


def test_a_pool_without_any_sound_version_is_not_healthy_and_says_why(folder, made, tmp_path):
    broken, reason = spoiled("a missing file", made, tmp_path)
    publish(folder, broken)
    with running(folder) as pool:
        assert not pool.healthy()
        assert reason in pool.problems()[0] and reason in replicas(folder)[0]["failed"]["2"]
        with pytest.raises(Unavailable, match="tiny is not ready"), pool.pick("tiny", "k"):
            pass


def test_a_pinned_version_answers_whatever_its_share_and_shares_divide_the_rest(folder, made, said):
    publish(folder, version(1, made[1], 0.5), version(2, made[2], 0.5), version(3, made[3]))
    with running(folder) as pool:
        assert asyncio.run(ask(pool, "tiny@v3")) == ("v3", said["v3"][PROMPTS[0]])
        names = [asyncio.run(ask(pool, key=str(key), tokens=1))[0] for key in range(24)]
        assert set(names) == {"v1", "v2"}
        assert names == [asyncio.run(ask(pool, key=str(key), tokens=1))[0] for key in range(24)]


def test_a_version_without_a_share_is_there_to_be_checked_and_answers_for_no_other(folder, made, tmp_path):
    publish(folder, version(1, made[1]))
    with running(folder) as pool:
        assert pool.healthy() and pool.status()["ready"] == [1]
        assert asyncio.run(ask(pool, "tiny@v1", tokens=1))[0] == "v1"
        with pytest.raises(Unavailable, match="tiny is not ready"):
            asyncio.run(ask(pool))
        publish(folder, version(1, made[1]), spoiled("no folder", made, tmp_path)[0])
        wait_until(lambda: pool.status()["generation"] == 2)
        with pytest.raises(Unavailable, match="tiny is not ready"):
            asyncio.run(ask(pool))
        assert not pool.healthy()


def test_what_is_no_name_of_the_table_is_unknown_whatever_it_looks_like(folder, made):
    publish(folder, version(1, made[1], 1))
    with running(folder) as pool:
        for name in ("", "other", "tiny@", "tiny@v2", "tiny@1", "tiny@v01", "tiny@../../etc", "/etc/passwd", "../tiny", "tiny/..",
                     "tiny@" + str(made[1].folder), "TINY", "tiny@v1\0", "tiny@@v1"):  # fmt: skip
            with pytest.raises(Unknown) as caught:
                pool.pick(name, "k")
            assert caught.value.names == ["tiny", "tiny@v1"]


def test_a_damaged_table_changes_nothing_and_is_said(folder, made):
    table = publish(folder, version(1, made[1], 1))
    with running(folder) as pool:
        for content in ("{", "[]", '{"name": "../x"}', "\x00"):
            (folder / "endpoint.json").write_text(content)
            wait_until(lambda: "damaged" in (pool.status()["trouble"] or ""))
            assert asyncio.run(ask(pool, tokens=1))[0] == "v1" and pool.table == table and pool.healthy()
        (folder / "endpoint.json").unlink()
        wait_until(lambda: "no endpoint" in (pool.status()["trouble"] or ""))
        write_table(folder, table)
        wait_until(lambda: pool.status()["trouble"] is None)
        assert pool.healthy()


def test_an_engine_that_died_is_replaced(folder, made, said):
    publish(folder, version(1, made[1], 1))
    with running(folder) as pool:
        with pool.pick("tiny", "k") as lease:
            lease.engine.close()
        assert not pool.healthy()
        wait_until(pool.healthy)
        assert asyncio.run(ask(pool)) == ("v1", said["v1"][PROMPTS[0]])


# Adapters.


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "fast": adapter(folder / "fast", "fast", seed=1),
        "small": adapter(folder / "small", "small", seed=2, adapter="rslora", rank=8),
        "four": adapter(folder / "four", "four", seed=3, bits=4),
        "base": Adapter(name="base", recipe=Recipe().model_dump(mode="json")),
    }


def test_an_adapter_is_loaded_when_it_is_asked_for_and_answers_as_peft_does(folder, trained):
    publish(folder, adapters=tuple(trained.values()), engine={"adapters_loaded": 4})
    found = {name: answers_of_peft(one) for name, one in trained.items()}
    assert len({texts[PROMPTS[1]] for texts in found.values()}) >= 3, "the adapters differ"
    with running(folder) as pool:
        assert pool.healthy() and {one["state"] for one in pool.status()["adapters"].values()} == {"idle"}

        async def all_at_once():
            asked = [(name, prompt) for name in trained for prompt in PROMPTS]
            return dict(zip(asked, await asyncio.gather(*(ask(pool, f"tiny@{n}", prompt=p) for n, p in asked)), strict=True))

        for (name, prompt), (who, text) in asyncio.run(all_at_once()).items():
            assert (who, text) == (name, found[name][prompt])
        assert {one["state"] for one in pool.status()["adapters"].values()} == {"ready"}
        with pytest.raises(Unknown, match="there are tiny@fast"):
            pool.pick("tiny", "k")


def test_adapters_on_one_base_share_its_weights(folder, trained):
    publish(folder, adapters=(trained["fast"], trained["small"], trained["base"]), engine={"adapters_loaded": 3})
    with running(folder) as pool:
        leases = [pool.pick(f"tiny@{name}", "k").__enter__() for name in ("fast", "small", "base")]
        places = []
        for lease in leases:
            named = lease.engine._model.named_parameters()
            places.append({name.replace(".base_layer", ""): p.data_ptr() for name, p in named if "lora_" not in name})
            assert any("lora_" in name for name, _ in lease.engine._model.named_parameters()) == (lease.version != "base")
        assert places[0] == places[1] == places[2]
        for lease in leases:
            lease.release()


def test_the_least_recently_used_idle_adapter_makes_room_and_a_busy_one_never(folder, trained):
    publish(folder, adapters=tuple(trained.values()), engine={"adapters_loaded": 2})
    with running(folder) as pool:
        loaded = lambda: {name for name, one in pool.status()["adapters"].items() if one["state"] == "ready"}  # noqa: E731
        with pool.pick("tiny@fast", "k") as first:
            engine = first.engine
            with pool.pick("tiny@small", "k"):
                with pytest.raises(Unavailable, match="in use") as caught, pool.pick("tiny@base", "k"):
                    pass
                assert caught.value.busy and loaded() == {"fast", "small"}
            with pool.pick("tiny@base", "k"):
                assert loaded() == {"fast", "base"} and engine.healthy()
            with pool.pick("tiny@small", "k"):
                assert loaded() == {"fast", "small"}
        with pool.pick("tiny@base", "k"):  # small was let go before fast
            assert loaded() == {"fast", "base"}
        wait_until(lambda: pool.status()["closing"] == 0)


def test_a_broken_adapter_is_refused_and_says_why(folder, trained, tmp_path):
    other = trained["fast"].model_copy(update={"digest": "0" * 64})
    lost = trained["small"].model_copy(update={"folder": str(tmp_path / "nothing")})
    odd = Adapter(name="odd", recipe={"bits": 5})
    publish(folder, adapters=(other, lost, odd))
    with running(folder) as pool:
        for name, reason in (("fast", "digest differs"), ("small", "no manifest"), ("odd", "bits")):
            for _ in range(2):
                with pytest.raises(Unavailable, match=f"tiny@{name} cannot be loaded"):
                    asyncio.run(ask(pool, f"tiny@{name}"))
            assert reason in pool.status()["adapters"][name]["reason"]
        publish(folder, adapters=(trained["fast"], lost, odd))
        wait_until(lambda: pool.status()["generation"] == 2)
        assert asyncio.run(ask(pool, "tiny@fast"))[0] == "fast"


def test_who_leaves_while_an_adapter_loads_keeps_nobody_from_it(folder, trained):
    publish(folder, adapters=(trained["fast"],))

    async def drive(pool):
        gone, stays = (asyncio.create_task(ask(pool, "tiny@fast")) for _ in range(2))
        await asyncio.sleep(0.01)
        gone.cancel()
        with suppress(asyncio.CancelledError):
            await gone
        return await stays

    with running(folder) as pool:
        assert asyncio.run(drive(pool))[0] == "fast"
        assert pool.status()["adapters"]["fast"]["running"] == 0


def test_an_adapter_whose_engine_died_is_loaded_anew(folder, trained):
    publish(folder, adapters=(trained["fast"],))
    with running(folder) as pool:
        with pool.pick("tiny@fast", "k") as lease:
            lease.engine.close()
        assert asyncio.run(ask(pool, "tiny@fast"))[0] == "fast"


def test_adapters_that_nobody_waits_for_any_more_leave_nothing_behind(folder, trained):
    publish(folder, adapters=tuple(trained.values()), engine={"adapters_loaded": 1})

    async def drive(pool):
        for _ in range(2):
            for name in trained:
                task = asyncio.create_task(ask(pool, f"tiny@{name}"))
                await asyncio.sleep(0.02)
                task.cancel()
                with suppress(asyncio.CancelledError, Unavailable):
                    await task

    before = threading.active_count()
    with running(folder) as pool:
        asyncio.run(drive(pool))
        wait_until(lambda: pool.status()["closing"] == 0)
        assert asyncio.run(ask(pool, "tiny@small"))[0] == "small"
        wait_until(lambda: {one["state"] for one in pool.status()["adapters"].values()} == {"idle", "ready"})
    wait_until(lambda: threading.active_count() <= before, 5, "the end of all engines' threads")


# What a replica says.


def test_a_replica_says_what_it_is_doing_and_takes_it_back_when_it_ends(folder, made):
    publish(folder, version(1, made[1], 1))
    torn, stop = [], threading.Event()

    def read():
        while not stop.is_set():
            for path in (folder / "replicas").glob("*.json"):
                with suppress(FileNotFoundError):
                    text = path.read_text()
                    try:
                        json.loads(text)
                    except ValueError:
                        torn.append(text)

    reader = threading.Thread(target=read)
    reader.start()
    with running(folder) as pool:
        pool.record("v1", seconds=0.5, first_token=0.1, tokens=7)
        pool.record("v1", seconds=0.1, error=True)
        pool.feedback("v1", 0.75)
        wait_until(lambda: [one for one in replicas(folder) if one["statistics"]])
        (own,) = living(folder)
        assert own["statistics"]["v1"]["count"] == 2 and own["statistics"]["v1"]["errors"] == 1
        assert (own["pid"], own["generation"], own["versions"]["v1"]["state"]) == (os.getpid(), 1, "ready")
        assert living(folder, now=own["time"] + STALE + 1) == []
        (row,) = pool.comparison()
        assert (row["version"], row["requests"], row["feedback"]["value"]) == ("v1", 2, 0.75)
        before = own["time"]
        wait_until(lambda: living(folder)[0]["time"] > before, 3)
    stop.set()
    reader.join()
    assert list((folder / "replicas").iterdir()) == [] and torn == []


def test_statistics_of_all_replicas_are_compared(folder, made):
    publish(folder, version(1, made[1], 0.2), version(2, made[2], 0.8))
    with running(folder) as one, running(folder) as two:
        for pool, seconds in ((one, 0.2), (two, 0.4)):
            for _ in range(10):
                pool.record("v1", seconds=seconds)
                pool.record("v2", seconds=2 * seconds)
        wait_until(lambda: sum(bool(said["statistics"]) for said in living(folder)) == 2)
        for pool in (one, two):
            rows = pool.comparison()
            assert [(row["version"], row["requests"]) for row in rows] == [("v2", 20), ("v1", 20)]
            assert rows[0]["seconds"]["value"] == pytest.approx(0.6)
