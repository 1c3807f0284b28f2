"""Bytes are counted to the byte and as the allocator's own trace has them; seconds add up."""

from __future__ import annotations

import time

import pytest
import torch

from training.meter import ByteCounter, Stopwatch, count_bytes, gemm_seconds

KB = torch.float32.itemsize * 256


def test_storages_are_counted_once_and_subtracted_when_freed():
    weight = torch.ones(256)
    with count_bytes([weight, weight.view(16, 16), weight[3:]]) as counter:
        assert counter.live == KB
        a = weight + 1
        view = a.reshape(16, 16)[2:]
        assert counter.live == 2 * KB
        b = a * 2
        del b
        assert (counter.live, counter.peak) == (2 * KB, 3 * KB)
        del a
        assert counter.live == 2 * KB  # the view keeps it
        del view
        assert (counter.live, counter.peak) == (KB, 3 * KB)
        weight.add_(1)
        assert counter.live == KB


def test_what_frees_memory_lowers_the_peak():
    def chain(keep: bool) -> int:
        with ByteCounter() as counter:
            value, kept = torch.ones(256), []
            for _ in range(10):
                value = value + 1
                kept += [value] if keep else []
        return counter.peak

    assert chain(keep=True) == 10 * KB and chain(keep=False) == 2 * KB


def test_it_sees_nothing_outside_its_block():
    with count_bytes([]) as counter:
        pass
    torch.ones(1000)
    assert counter.peak == counter.live == 0


def net() -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(128, 512), torch.nn.GELU(), torch.nn.Linear(512, 128), torch.nn.LayerNorm(128)]
    return torch.nn.Sequential(*layers), torch.randn(64, 128)


def step(model: torch.nn.Module, batch: torch.Tensor) -> None:
    model(batch).square().mean().backward()


def traced_peak(model: torch.nn.Module, batch: torch.Tensor) -> int:
    """Returns the peak of what torch's allocator handed out during one step, by the profiler's trace."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step(model, batch)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def counted_peak(model: torch.nn.Module, batch: torch.Tensor) -> int:
    with count_bytes([*model.parameters(), batch]) as counter:
        before = counter.live
        step(model, batch)
    return counter.peak - before


def test_it_equals_the_allocators_trace_and_repeats_to_the_byte():
    counted = [counted_peak(*net()) for _ in range(3)]
    assert counted[0] == counted[1] == counted[2]
    assert counted[0] == pytest.approx(traced_peak(*net()), rel=0.01)


def test_a_stopwatch_adds_up_what_was_between_start_and_stop():
    watch = Stopwatch("cpu")
    for _ in range(2):
        watch.start()
        time.sleep(0.02)
        assert watch.stop() >= 0.02
        time.sleep(0.05)
    assert 0.04 <= watch.seconds < 0.09


def test_the_speed_of_the_core_is_measured():
    assert 0 < gemm_seconds(64, 3) < 1


def test_a_sparse_gradient_counts_by_its_parts():
    weight = torch.zeros(1000, 4, requires_grad=True)
    with count_bytes([weight]) as counter:
        torch.nn.functional.embedding(torch.tensor([1, 2, 3]), weight, sparse=True).sum().backward()
    assert weight.grad.is_sparse and 16_000 + 3 * 16 <= counter.peak < 17_000
