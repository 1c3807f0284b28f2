"""Rows mixed of several sources: drawn by weight, each as often as need be, held out whatever the weights."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from training import loop
from training.data import Tokenized, prepare, read
from training.errors import InputError
from training.model import load_tokenizer
from training.recipe import DataConfig, Recipe
from training.schedule import plan, weights

SIZES = {"small": 30, "large": 300}


def write(path: Path, rows) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def rows_of(name: str, count: int) -> list[dict]:
    return [{"instruction": f"{name} says {i}", "response": f"word {i}"} for i in range(count)]


@pytest.fixture
def mixture(tmp_path):
    def make(**given) -> DataConfig:
        train = {name: {"file": write(tmp_path / f"{name}.jsonl", rows_of(name, size))} for name, size in SIZES.items()}
        for name, said in given.pop("train", {}).items():
            train[name] |= said
        return DataConfig(train=train, **given)

    return make


def tokens(**parts: int) -> Tokenized:
    count = sum(parts.values())
    return Tokenized([[1, 2]] * count, [1] * count, parts=tuple(parts.items()), weights=dict.fromkeys(parts, 1.0))


def drawn(recipe: Recipe, rows: Tokenized) -> list[str]:
    names = [name for name, count in rows.parts for _ in range(count)]
    planned = plan(recipe, rows, workers=1)
    return [names[i] for i in planned.order[: planned.steps * planned.batch]]


@pytest.mark.parametrize("mix", [{"a": 3, "b": 1}, {"a": 0.1, "b": 0.7, "c": 0.2}, {"a": 1, "b": 0}, {"c": 1e-3}])
def test_every_beginning_has_each_source_by_its_weight_to_within_a_row(mix):
    rows = tokens(a=5, b=40, c=100)
    shares = weights(Recipe(mix=mix), rows)
    recipe = Recipe(mix=mix, steps=60, batch_size=10)
    order = plan(recipe, rows, workers=1).order
    names = [name for name, count in rows.parts for _ in range(count)]
    for step in range(1, 61):
        counted = Counter(names[i] for i in order[: 10 * step])
        assert all(abs(counted[name] - share * 10 * step) <= 1 for name, share in shares.items())
        assert set(counted) <= set(shares)


def test_no_row_comes_again_before_all_others_of_its_source_did():
    rows = tokens(a=7, b=20)
    order = plan(Recipe(mix={"a": 2, "b": 1}, steps=30, batch_size=9), rows, workers=1).order
    for start, stop in ((0, 7), (7, 27)):
        counts = Counter()
        for at, i in enumerate(order[:270], 1):
            counts[i] += start <= i < stop
            assert at % 9 or max(counts.values()) - min(counts[j] for j in range(start, stop)) <= 1


def test_an_epoch_is_as_many_rows_as_there_are_whatever_the_mix():
    rows = tokens(a=5, b=95)
    for mix in ({"a": 1, "b": 1}, {"a": 9, "b": 1}, None):
        assert len(drawn(Recipe(mix=mix, epochs=2, batch_size=10), rows)) == 200
    assert Counter(drawn(Recipe(epochs=1, batch_size=10), rows)) == {"a": 50, "b": 50}  # weights of 1 are those of the data


def test_the_order_follows_from_the_seed_and_a_batch_has_no_pattern():
    rows = tokens(a=50, b=50)
    one, again, other = (plan(Recipe(seed=seed, steps=20, batch_size=4), rows, workers=1).order for seed in (3, 3, 4))
    assert list(one) == list(again) != list(other)
    firsts = Counter("a" if i < 50 else "b" for i in one[:80:2])  # what one of two workers would see
    assert 10 < firsts["a"] < 30


def test_data_of_one_file_is_drawn_as_ever():
    rows = Tokenized([[1]] * 10, [0] * 10)
    assert list(plan(Recipe(epochs=1, batch_size=5, seed=1), rows, workers=1).order) == [6, 8, 9, 7, 5, 3, 0, 4, 1, 2]


def test_a_mix_of_unknown_sources_or_of_none_is_refused():
    with pytest.raises(InputError, match="recipe.mix: names c, which is no source of data.train. Known: a, b"):
        plan(Recipe(mix={"c": 1}), tokens(a=5, b=5), workers=1)
    with pytest.raises(InputError, match="recipe.mix: leaves no source a weight above 0"):
        plan(Recipe(mix={"a": 0, "b": 0}), tokens(a=5, b=5), workers=1)
    with pytest.raises(InputError, match="Known: none: data.train is no mapping"):
        plan(Recipe(mix={"a": 1}), Tokenized([[1]], [0]), workers=1)


def test_held_out_rows_come_from_each_source_and_do_not_depend_on_weights(mixture):
    usual = read(mixture())
    for other in (mixture(train={"small": {"weight": 9}}), mixture(train={"large": {"weight": 0.1}})):
        rows = read(other)
        assert (rows.validation, rows.test, rows.train) == (usual.validation, usual.test, usual.train)
        assert rows.digest != usual.digest  # other weights are other data, for a study that goes on
    for name in ("validation", "test"):
        counted = Counter(row["instruction"].split()[0] for row in getattr(usual, name))
        assert counted == {"small": 3, "large": {"validation": 27, "test": 30}[name]}
        assert usual.parts[name] == (("small", 3), ("large", counted["large"]))
    assert usual.weights == {"small": 1.0, "large": 1.0}
    assert "train: rows of small 24 (weight 1), large 243 (weight 1)" in usual.notes


def test_a_row_of_two_sources_stands_on_one_side(tmp_path):
    shared = rows_of("both", 100)
    train = {name: {"file": write(tmp_path / f"{name}.jsonl", shared + rows_of(name, 20))} for name in ("a", "b")}
    rows = read(DataConfig(train=train))
    train, validation, test = ({row["instruction"] for row in part} for part in (rows.train, rows.validation, rows.test))
    assert not train & validation and not train & test and not validation & test


def test_each_source_has_its_own_problems_columns_and_limit(tmp_path, mixture):
    config = mixture(train={"small": {"limit": 10}})
    assert dict(read(config).parts["train"]) == {"small": 10, "large": 243}
    other = write(tmp_path / "small.jsonl", [{"frage": f"f {i}", "antwort": "a"} for i in range(30)])
    with pytest.raises(InputError, match="data.train.small: the first row has no column"):
        read(config)
    columns = {"columns": {"instruction": "frage", "response": "antwort"}}
    config = config.model_copy(update={"train": config.train | {"small": config.train["small"].model_copy(update=columns)}})
    assert read(config).parts["train"][0] == ("small", 10)
    Path(other).write_text(Path(other).read_text() + "no json\n")
    Path(config.train["large"].file).unlink()
    with pytest.raises(InputError) as caught:
        read(config)
    said = [str(problem) for problem in caught.value.problems]
    assert said[0].startswith("data.train.large.file: no such file") and "data.train.small: " in said[1] and ":31" in said[1]


def test_the_cache_keeps_the_sources_and_rows_dropped_for_length_leave_theirs(tmp_path, mixture):
    config = mixture(too_long="drop")
    write(tmp_path / "small.jsonl", rows_of("small", 29) + [{"instruction": "long " * 40, "response": "x"}])
    tokenizer = load_tokenizer(Recipe())
    for _ in range(2):
        found = prepare(read(config), config, tokenizer, 40, cache=str(tmp_path / "cache"))
        held = read(config)
        lost = found.train.dropped
        assert dict(found.train.parts)["small"] == dict(held.parts["train"])["small"] - lost
        assert found.train.weights == {"small": 1.0, "large": 1.0} and sum(dict(found.train.parts).values()) == len(found.train)
    joined = found.train + found.validation
    assert len(joined) == len(found.train) + len(found.validation) and joined.ids[len(found.train)] == found.validation.ids[0]
    assert Counter(drawn(Recipe(steps=40, batch_size=10), joined)) == {"small": 200, "large": 200}


def test_validation_rows_of_their_own_are_drawn_like_the_average_in_a_final_model(mixture, tmp_path):
    config = mixture(validation=write(tmp_path / "v.jsonl", rows_of("held", 57)))
    found = prepare(read(config), config, load_tokenizer(Recipe()), 40)
    whole = found.train + found.validation
    shares = weights(Recipe(), whole)
    assert shares[""] == pytest.approx(57 / len(whole)) and shares["small"] == shares["large"]


def test_a_recipe_trains_on_its_mix(make_job, mixture):
    job = make_job(data=mixture(), mix={"small": 3, "large": 1}, max_length=32)
    outcome = loop.train(job)
    assert outcome.ended == "complete" and outcome.tokens > 0
    other = loop.train(job.model_copy(update={"recipe": job.recipe.model_copy(update={"mix": {"small": 0}})}))
    assert other.loss != outcome.loss
