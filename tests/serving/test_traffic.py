"""Traffic: shares, stickiness, and intervals held against a brute-force search and simulation."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys

import pytest

from serving.endpoint import Version
from serving.traffic import Statistics, compare, pick, total, wilson

Z = 1.959963984540054


def versions(*shares: float, start: int = 1) -> list[Version]:
    return [Version(version=start + k, folder="f", digest="d", share=share) for k, share in enumerate(shares)]


def owners(choice: list[Version], keys: int = 20_000, endpoint: str = "e") -> list[int]:
    return [pick(choice, f"user-{k}", endpoint).version for k in range(keys)]


@pytest.mark.parametrize("shares", [(1.0,), (0.9, 0.1), (0.5, 0.3, 0.2), (0.99, 0.01), (0.0, 1.0)])
def test_every_version_gets_its_share_of_the_keys(shares):
    found = owners(versions(*shares))
    for number, share in enumerate(shares, start=1):
        tolerance = 4 * math.sqrt(share * (1 - share) / len(found))
        assert abs(found.count(number) / len(found) - share) <= tolerance


def test_the_same_key_has_the_same_version_in_another_process_and_in_another_order():
    choice = versions(0.5, 0.3, 0.2)
    here = owners(choice, 200)
    code = (
        "from serving.endpoint import Version; from serving.traffic import pick\n"
        f"choice = [Version(**v) for v in {[v.model_dump() for v in choice[::-1]]!r}]\n"
        "print([pick(choice, f'user-{k}', 'e').version for k in range(200)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == here
    assert owners(choice, 200, "another") != here


def test_when_a_share_grows_only_as_many_keys_move_as_must_and_all_of_them_to_it():
    before, after = owners(versions(0.9, 0.1)), owners(versions(0.8, 0.2))
    moved = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
    assert set(moved) == {(1, 2)}
    assert abs(len(moved) / len(before) - 0.1) <= 4 * math.sqrt(0.1 * 0.9 / len(before))
    before, after = owners(versions(0.6, 0.3, 0.1)), owners(versions(0.4, 0.2, 0.4))  # the third takes from both alike
    moved = {(a, b) for a, b in zip(before, after, strict=True) if a != b}
    assert moved == {(1, 3), (2, 3)}


def test_the_share_of_a_version_that_cannot_answer_goes_to_the_others_and_moves_no_other_key():
    choice = versions(0.5, 0.3, 0.2)
    before, after = owners(choice), owners([choice[0], choice[2]])
    assert all(a == b for a, b in zip(before, after, strict=True) if a != 2)
    assert set(b for a, b in zip(before, after, strict=True) if a == 2) == {1, 3}


def test_without_any_share_the_newest_answers_and_without_versions_nothing_does():
    assert pick(versions(0, 0), "k").version == 2
    with pytest.raises(ValueError, match="no version"):
        pick([], "k")


def test_any_text_is_a_key():
    for key in ("", "\0", "\ud800", "é" * 10_000):
        assert pick(versions(0.5, 0.5), key) == pick(versions(0.5, 0.5), key)


def filled(rng: random.Random, count: int, mean: float, error: float = 0.0, liked: float = 0.5) -> Statistics:
    own = Statistics()
    for _ in range(count):
        own.add(seconds=max(rng.gauss(mean, 0.2), 0), first_token=0.1, prompt_tokens=3, tokens=5, error=rng.random() < error)
        own.add_feedback(float(rng.random() < liked))
    return own


def test_statistics_of_replicas_add_up_to_those_of_one():
    rng = random.Random(0)
    one, two, both = Statistics(), Statistics(), Statistics()
    for k in range(100):
        said = {"seconds": rng.random(), "first_token": rng.random(), "tokens": k, "prompt_tokens": 1, "error": k % 7 == 0}
        (one if k % 2 else two).add(**said)
        both.add(**said)
    merged = total([{"v1": json.loads(json.dumps(part.to_json())) | {"of a later release": 1}} for part in (one, two)])["v1"]
    for name, value in both.to_json().items():
        assert merged.to_json()[name] == pytest.approx(value)
    assert both.count == 100 and both.errors == 15 and both.timed == 85


def test_a_score_beyond_its_range_is_refused():
    for score in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="between 0 and 1"):
            Statistics().add_feedback(score)


@pytest.mark.parametrize("hits, count", [(0, 5), (1, 5), (5, 5), (3, 40), (200, 1000)])
def test_the_interval_of_a_share_is_all_that_the_score_test_does_not_reject(hits, count):
    share, step = hits / count, 1e-4
    kept = [p for k in range(10_001) if abs(share - (p := k * step)) <= Z * math.sqrt(p * (1 - p) / count) + 1e-12]
    low, high = wilson(share, count, Z)
    assert abs(low - kept[0]) <= step and abs(high - kept[-1]) <= step


def test_the_interval_of_a_mean_is_that_of_the_numbers_themselves():
    rng = random.Random(1)
    numbers = [rng.expovariate(1) for _ in range(500)]
    own = Statistics()
    for number in numbers:
        own.add(seconds=number)
    (row,) = compare({"v1": own})
    mean = math.fsum(numbers) / 500
    error = math.sqrt(math.fsum((x - mean) ** 2 for x in numbers) / 499 / 500)
    assert row["seconds"] == pytest.approx({"count": 500, "value": mean, "low": mean - Z * error, "high": mean + Z * error})


def test_intervals_of_differences_hold_the_truth_as_often_as_they_say():
    rng, held, rounds = random.Random(2), {"errors": 0, "seconds": 0, "feedback": 0}, 400
    for _ in range(rounds):
        first = filled(rng, 60, 1.0, error=0.1, liked=0.7)
        second = filled(rng, 90, 1.1, error=0.2, liked=0.6)
        found = compare({"v1": first, "v2": second})[1]["difference"]
        for what, truth in (("errors", 0.1), ("seconds", 0.1), ("feedback", -0.1)):
            held[what] += found[what]["low"] <= truth <= found[what]["high"]
    for count in held.values():
        assert 0.91 <= count / rounds <= 0.99


def test_a_verdict_names_what_differs_and_what_is_only_noise_is_no_difference():
    rng = random.Random(3)
    rows = compare({
        "v1": filled(rng, 400, 1.0, liked=0.5),
        "v2": filled(rng, 400, 0.5, error=0.1, liked=0.5),
        "v3": filled(rng, 400, 1.0, liked=0.5),
        "v4": Statistics(),
    })  # fmt: skip
    assert "verdict" not in rows[0]
    assert (
        "better than v1: less seconds, by 0.4" in rows[1]["verdict"]
        and "worse than v1: more share of errors" in rows[1]["verdict"]
    )
    assert rows[2]["verdict"] == "no difference from v1 is shown"
    assert rows[3]["verdict"] == "too few answers to compare with v1"
    assert rows[3]["seconds"]["value"] is None and rows[3]["difference"]["seconds"] is None
    json.dumps(rows, allow_nan=False)
