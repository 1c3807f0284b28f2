"""The gate never lets in more than fit, keeps the order, and forgets nobody's place."""

from __future__ import annotations

import asyncio
import random

import pytest

from serving.admission import Full, Gate


async def hold(gate, places, seconds, log, name, *, concurrent=4, queue=100):
    async with gate.admitted(places, concurrent=concurrent, queue=queue):
        assert gate.running <= concurrent
        log.append(name)
        await asyncio.sleep(seconds)


def test_those_who_wait_go_in_order_also_past_a_large_one():
    async def run():
        gate, log = Gate(), []
        tasks = [asyncio.create_task(hold(gate, places, 0.01, log, name)) for name, places in enumerate((3, 3, 1, 9, 1))]
        await asyncio.sleep(0)
        assert (gate.running, gate.waiting) == (3, 4)
        await asyncio.gather(*tasks)
        assert log == [0, 1, 2, 3, 4] and (gate.running, gate.waiting) == (0, 0)

    asyncio.run(run())


def test_who_finds_the_queue_full_is_told_at_once():
    async def run():
        gate, log = Gate(), []
        inside = asyncio.create_task(hold(gate, 1, 0.05, log, "in", concurrent=1, queue=1))
        waits = asyncio.create_task(hold(gate, 1, 0, log, "waits", concurrent=1, queue=1))
        await asyncio.sleep(0)
        with pytest.raises(Full):
            await hold(gate, 1, 0, log, "late", concurrent=1, queue=1)
        with pytest.raises(Full):
            await hold(gate, 1, 0, log, "none may wait", concurrent=1, queue=0)
        await asyncio.gather(inside, waits)
        assert log == ["in", "waits"]

    asyncio.run(run())


@pytest.mark.parametrize("seed", range(5))
def test_whoever_leaves_whenever_no_place_is_lost(seed):
    async def run():
        draw, gate, log = random.Random(seed), Gate(), []
        tasks = [asyncio.create_task(hold(gate, draw.randint(1, 6), draw.random() / 500, log, n)) for n in range(60)]
        while not all(task.done() for task in tasks):
            draw.choice(tasks).cancel()
            await asyncio.sleep(draw.random() / 1000)
        assert (gate.running, gate.waiting) == (0, 0) and log == sorted(log)
        await asyncio.wait_for(hold(gate, 4, 0, log, "after"), 1)

    asyncio.run(run())
