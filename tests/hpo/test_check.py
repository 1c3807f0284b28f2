"""What would run: shape, rows, predicted memory; looked at without starting or writing anything."""

from __future__ import annotations

import json
import os

import pytest
from contracts import simulated

from hpo import check
from hpo.errors import SpecError
from hpo.gate import judge
from hpo.spec import load
from training.beside import seats
from training.memory import predict
from training.model import describe
from training.recipe import Recipe, Resources


def spec(storage, **changes):
    written = simulated(storage, data={"train": "embedded:train.jsonl", "limit": 100}, recipe={"max_length": 128})
    return load({name: value for name, value in (written | changes).items() if name != "train"}).spec


def test_what_was_found_is_about_the_model_and_the_rows(tmp_path):
    given = spec(tmp_path / "store")
    found = check.inspect(given)
    assert found.spec == given
    assert found.shape == describe("embedded")
    assert len(found.rows.train) == 100
    assert 0 < found.tokens_per_row <= 128
    assert found.smallest <= found.memory.total <= found.largest
    assert (found.refused, found.example, found.cut) == (0.0, "", 0)
    assert not (tmp_path / "store").exists()


def test_the_share_of_the_space_that_cannot_fit_is_that_of_the_gate(tmp_path):
    free = check.inspect(spec(tmp_path, space={"rank": [4, 64]}))
    recipes = [free.spec.recipe.model_copy(update={"rank": rank}) for rank in (4, 64)]
    small, large = (
        judge(
            r.model_copy(update={"batch_size": 1}), free.shape, free.spec.limits, free.spec.resources, free.tokens_per_row
        ).predicted
        for r in recipes
    )
    limit = (small + large) // 2
    found = check.inspect(spec(tmp_path, space={"rank": [4, 64]}, limits={"peak_bytes": limit}))
    assert 0.4 < found.refused < 0.6
    assert "rank 64" in found.example
    assert f"over the limit of {limit:,}" in found.example


def test_prompts_that_lose_their_beginning_are_counted_and_noted(tmp_path):
    found = check.inspect(spec(tmp_path, recipe={"max_length": 16}))
    assert found.cut > 0 or any("lose their beginning" in note for note in found.notes)
    assert found.tokens_per_row <= 16


def test_a_simulated_study_and_one_with_a_train_function_of_its_own_need_no_model(tmp_path):
    written = simulated(tmp_path, data={"train": "nowhere.jsonl"}, recipe={"model": "./nowhere"})
    assert check.inspect(load(written).spec).shape is None
    real = load({name: value for name, value in written.items() if name != "train"}).spec
    assert check.inspect(real, trained_elsewhere=True).rows is None
    with pytest.raises(SpecError):
        check.inspect(real)


def test_a_train_function_of_its_own_still_needs_a_place_to_write(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SpecError, match="storage"):
        check.inspect(spec(tmp_path / "file" / "x"), trained_elsewhere=True)


def test_looking_at_the_storage_leaves_it_as_it_was(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").write_text("x")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("mine")}
    check.inspect(load(simulated(tmp_path / "there" / "a" / "b")).spec)
    check.inspect(load(simulated(tmp_path / "there")).spec)
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["mine"]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("mine")} == before


def test_a_cluster_is_not_measured_by_this_machine(tmp_path, monkeypatch):
    many = spec(tmp_path, resources={"workers": 1024, "gpus": 1}, recipe={"batch_size": 1024}, space={"rank": [8]})
    with pytest.raises(SpecError, match="CPUs and this machine has"):
        check.inspect(many)
    monkeypatch.setenv("RAY_ADDRESS", "ray://elsewhere:10001")
    assert check.inspect(many).shape is not None


def test_a_rank_of_the_layers_own_width_is_the_largest_that_is_allowed(tmp_path):
    limit = min(min(size) for size in describe("embedded").linear.values())
    check.inspect(spec(tmp_path, recipe={"rank": limit}))
    with pytest.raises(SpecError, match=rf"recipe.rank: rank {limit + 1} is beyond .*Use at most {limit}"):
        check.inspect(spec(tmp_path, recipe={"rank": limit + 1}))


def test_gpus_are_counted_without_torch(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert check.gpus() == 0
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert check.gpus() == (len(os.listdir("/proc/driver/nvidia/gpus")) if os.path.isdir("/proc/driver/nvidia/gpus") else 0)


CLASHES = [
    ({"adapter": "full", "bits": 4}, {}, "recipe.adapter: full trains the weights themselves, which 4 bits cannot hold."),
    ({"adapter": "full", "bits": 8}, {}, "Set bits: 32, or 16 with precision: bf16, or train an adapter."),
    ({"adapter": "full", "lora_plus_ratio": 4}, {}, "recipe.lora_plus_ratio: full has no A and B"),
    ({"adapter": "adalora"}, {"workers": 2}, "recipe.adapter: adalora decides on ranks by the gradients of one process"),
    ({"adapter": "adalora", "zero_stage": 1}, {}, "with workers: 1 and zero_stage: 0, got 1 and 1."),
    ({"precision": "fp16", "zero_stage": 2}, {"workers": 2}, "recipe.precision: fp16 needs a scaled loss"),
    ({"optimizer": "paged_adamw_8bit"}, {}, "there is no GPU. Set optimizer: adamw_8bit, or resources.gpus."),
    ({"adapter": "dora", "bits": 8}, {}, "recipe.adapter: dora cannot read a base of 8 bits on a CPU"),
]


@pytest.mark.parametrize(("recipe", "resources", "said"), CLASHES)
def test_defaults_that_do_not_go_together_are_refused(tmp_path, recipe, resources, said):
    given = spec(tmp_path, recipe={"max_length": 128, "batch_size": 8} | recipe, resources=resources, space={"rank": [4, 8]})
    with pytest.raises(SpecError) as found:
        check.inspect(given)
    assert said in str(found.value)
    check.inspect(given, trained_elsewhere=True)  # who trains with a function of their own knows what it can do


def test_a_space_that_mixes_methods_is_sound_and_what_clashes_in_it_is_counted(tmp_path):
    found = check.inspect(spec(tmp_path, space={"adapter": ["lora", "full"], "bits": [32, 4], "rank": [4, 8]}))
    assert 0.15 < found.refused < 0.35  # a quarter of it
    assert "adapter full, bits 4" in found.example and "which 4 bits cannot hold. Set bits: 32" in found.example


def test_a_value_of_the_space_that_goes_with_no_other_is_refused(tmp_path):
    with pytest.raises(SpecError, match=r"space.adapter: 'full' goes with no other value here: adapter: full trains"):
        check.inspect(spec(tmp_path, recipe={"max_length": 128, "bits": 4}, space={"adapter": ["lora", "full"]}))
    with pytest.raises(SpecError, match=r"space.adapter: 'adalora' goes with no other value"):
        written = {"adapter": ["lora", "adalora"], "rank": [4, 8]}
        check.inspect(spec(tmp_path, space=written, recipe={"max_length": 128, "batch_size": 8}, resources={"workers": 2}))
    kinds = {"adapter": ["full", "adalora"], "bits": [8, 4]}
    with pytest.raises(SpecError) as found:
        check.inspect(spec(tmp_path, space=kinds, recipe={"max_length": 128}))
    assert "space.adapter: 'full'" in str(found.value) and "adalora" not in str(found.value)


def test_a_start_that_does_not_go_together_is_refused(tmp_path):
    with pytest.raises(SpecError, match=r"start\[1\]: adapter: full trains the weights themselves"):
        check.inspect(spec(tmp_path, space={"adapter": ["lora", "full"], "bits": [32, 4]},
                           start=[{"adapter": "full", "bits": 32}, {"adapter": "full", "bits": 4}]))  # fmt: skip


def test_several_mistakes_are_said_together(tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps({"q": 1}))
    wrong = spec("/proc/nothing/here", data={"train": str(tmp_path / "d.jsonl")}, recipe={"targets": "c_attn"})
    with pytest.raises(SpecError) as raised:
        check.inspect(wrong)
    assert {problem.where for problem in raised.value.problems} >= {"storage", "recipe.targets", "data.train"}


def test_it_says_how_trials_run_and_which_cannot_be_run_so(tmp_path, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def said(recipes=({}, {}, {"adapter": "dora"}, {"bits": 8}), parallel=None, best=None, **resources):
        given = spec(tmp_path, resources=resources, budget={"trials": 9, "parallel": parallel})
        return check.how_trials_run(given, [Recipe(**changes) for changes in recipes], best)

    assert said() == said(mode="warm") == ["worker groups stay up and take trial after trial"]
    packed = said(parallel=8)
    assert packed[0].endswith("several at once in each (packed): 8 at a time, and 2 workers here")
    assert packed[1].startswith("25 % of the trials are trained alone, adapter: dora") and "bits: 8" in packed[2]
    assert said(mode="local") == [] and said(mode="fresh") == ["mode: fresh starts a worker group for each trial"]
    assert said(workers=2)[0].startswith("a worker group is started for each trial: resources.workers: 2")
    pays = seats(Recipe(model="embedded", batch_size=1), describe("embedded"), 35, Resources())
    assert pays.count == 8 and pays.gain > 2
    assert said(best=pays, mode="packed")[0].endswith(pays.why) and said(best=pays) == said()
    usual = predict(Recipe(model="embedded", batch_size=1), describe("embedded"), tokens_per_row=40)
    room = usual.weights + 3 * (usual.total - usual.weights)
    tight = seats(Recipe(model="embedded", batch_size=1), describe("embedded"), 35, Resources(), memory=usual, room=room)
    assert tight.count == 3 and tight.gain < pays.gain and "as many as fit" in said(best=tight, mode="packed")[0]
    full = seats(Recipe(model="embedded", batch_size=64), describe("embedded"), 100, Resources())
    assert (full.count, full.gain) == (1, 1.0) and said(best=full) == said()
    assert said(({}, {"zero_stage": 2}))[1].startswith("50 % of the trials get a group of their own: recipe.zero_stage: 2")
