"""A wrong study: everything that is wrong is said at once, with path, rule, value and remedy; nothing is started or written."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tracemalloc

import pytest
from contracts import command, one_object
from hypothesis import given, settings
from hypothesis import strategies as st

from hpo.errors import SpecError
from hpo.spec import load
from hpo.written import SIZE_LIMIT, parse
from training.model import EMBEDDED

JARGON = re.compile(
    r"[Ii]nput should|union|pydantic|NoneType|Traceback|dictionary|instance of|tuple|validation error|\bstr\b|parse string"
)
GOOD = {
    "name": "name: s",
    "storage": "storage: $STORE",
    "data": 'data: {train: "embedded:train.jsonl"}',
    "space": "space: tiny",
    "algorithm": "algorithm: random",
    "resources": "resources: {workers: 1}",
}


def study(changes: str) -> str:
    """Returns a study file that is right but for these lines."""
    kept = {name: line for name, line in GOOD.items() if not re.search(rf"^{name}:", changes, re.M)}
    return "\n".join([*kept.values(), changes]) + "\n"


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Returns a function that runs a study file which must be refused; gives {where: rule and remedy}."""
    monkeypatch.setenv("STORE", str(tmp_path / "store"))
    monkeypatch.chdir(tmp_path)

    def run(text: str | bytes, *arguments: str) -> dict[str, str]:
        file = tmp_path / "s.yaml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        before = sorted(tmp_path.rglob("*"))
        code, out, err = command(capsys, "run", file, "--json", *arguments)
        assert code == 2, out + err
        assert sorted(tmp_path.rglob("*")) == before, "something was written"
        ray = sys.modules.get("ray")
        assert ray is None or not ray.is_initialized(), "Ray was started"
        problems = one_object(out)["error"]["problems"]
        assert problems
        for problem in problems:
            assert problem["where"] and problem["rule"]
            assert not JARGON.search(" ".join(problem.values())), problem
        assert len({tuple(problem.items()) for problem in problems}) == len(problems), "said twice"
        found: dict[str, str] = {}
        for problem in problems:
            where = problem["where"].replace(str(file), "FILE")
            found[where] = f"{found.get(where, '')} {problem['rule']} {problem['remedy']}"
        return found

    return run


def check(found: dict[str, str], expected: dict[str, str]) -> None:
    assert set(found) == set(expected)
    for where, words in expected.items():
        for word in words.split(" | "):
            assert word in found[where], f"{word!r} is not in {where}: {found[where]}"


# (what was written, {path: what the rule and the remedy must have, divided by " | "})
WRONG = {
    "unknown field": ("budgett: {trials: 3}", {"budgett": "unknown field | budget?"}),
    "unknown field of data": (
        "data: {trian: x.jsonl}",
        {"data.train": "required | JSONL", "data.trian": "unknown field | train?"},
    ),
    "unknown field of recipe": ("recipe: {learning_rat: 0.1}", {"recipe.learning_rat": "unknown field | learning_rate?"}),
    "field of another library": ("recipe: {lora_alpha: 8}", {"recipe.lora_alpha": "unknown field | alpha?"}),
    "unknown field of budget": ("budget: {n_trials: 3}", {"budget.n_trials": "unknown field | trials?"}),
    "unknown field of resources": ("resources: {worker: 3}", {"resources.worker": "unknown field | workers?"}),
    "unknown field of evaluation": ("evaluation: {row: 3}", {"evaluation.row": "unknown field | rows?"}),
    "unknown field of limits": ("limits: {memory: 3}", {"limits.memory": "unknown field | peak_bytes?"}),
    "unknown field inside a section of a section": (
        'data: {train: "embedded:train.jsonl", clean: {leek: drop}}\nserving: {limits: {que: 3}}',
        {"data.clean.leek": "unknown field | leak?", "serving.limits.que": "unknown field | queue?"},
    ),
    "unknown field of a dimension": (
        "space: {learning_rate: {type: float, low: 1, hihg: 2}}",
        {"space.learning_rate.high": "required", "space.learning_rate.hihg": "unknown field | high?"},
    ),
    "no field of a recipe": (
        "space: {lr: {type: float, low: 0.1, high: 0.2}}",
        {"space.lr": "no field of a recipe | learning_rate?"},
    ),
    "no name, no data, no space": (
        "name: null\ndata: null\nspace: null",
        {"name": "text | nothing", "data": "mapping | {train: my.jsonl}", "space": "mapping | space: lora"},
    ),
    "low above high": (
        "space: {learning_rate: {type: float, low: 1, high: 0.1}}",
        {"space.learning_rate": "low must be below high | low=1.0 | high=0.1 | Swap"},
    ),
    "low is high": ("space: {rank: {type: int, low: 8, high: 8}}", {"space.rank": "low must be below high | low=8"}),
    "log from 0": (
        "space: {learning_rate: {type: float, low: 0, high: 1, log: true}}",
        {"space.learning_rate": "above 0 | log: true | low=0"},
    ),
    "step that does not divide": (
        "space: {rank: {type: int, low: 4, high: 9, step: 2}}",
        {"space.rank": "step must divide | step=2"},
    ),
    "step 0": ("space: {rank: {type: int, low: 4, high: 8, step: 0}}", {"space.rank": "step must be at least 1 | step=0"}),
    "no choices": ("space: {rank: {type: choice, values: []}}", {"space.rank": "must not be empty"}),
    "no choices, short": ("space: {rank: []}", {"space.rank": "must not be empty"}),
    "a choice twice": ("space: {rank: [8, 16, 8]}", {"space.rank": "must differ | [8, 16, 8]"}),
    "choices that are lists": (
        "space: {rank: [[8], null]}",
        {"space.rank.values[0]": "number", "space.rank.values[1]": "nothing"},
    ),
    "no type": ("space: {rank: {low: 1, high: 2}}", {"space.rank.type": "float, int or choice | For example"}),
    "unknown type": ("space: {rank: {type: chioce, values: [8]}}", {"space.rank.type": "'chioce' | Did you mean choice?"}),
    "a number for a dimension": ("space: {rank: 8}", {"space.rank": "mapping | got 8 | For example"}),
    "a list for a space": ("space: [rank]", {"space": "mapping | space: lora"}),
    "an empty space": ("space: {}", {"space": "no dimension | Name at least one"}),
    "an unknown space": ("space: loar", {"space": "'loar' | Did you mean lora? | tiny"}),
    "rank 0": ("recipe: {rank: 0}", {"recipe.rank": "at least 1 | got 0"}),
    "rank 0 in the space": (
        "space: {rank: {type: int, low: 0, high: 8}}",
        {"space.rank.low": "greater than or equal to 1 | got 0"},
    ),
    "fractional rank": ("space: {rank: {type: float, low: 1, high: 8}}", {"space.rank.type": "whole number | type: int"}),
    "rank beyond the layer": ("recipe: {rank: 4000}", {"recipe.rank": "4000 | beyond | Use at most"}),
    "rank of the space beyond the layer": ("space: {rank: [8, 4000]}", {"space.rank": "4000 | beyond | Use at most"}),
    "numbers out of range": (
        "recipe: {alpha: 0, dropout: 1, learning_rate: -1, batch_size: 0, epochs: 0, warmup: 1}",
        {
            "recipe.alpha": "above 0 | got 0",
            "recipe.dropout": "below 1",
            "recipe.learning_rate": "above 0 | got -1",
            "recipe.batch_size": "at least 1",
            "recipe.epochs": "above 0",
            "recipe.warmup": "below 1",
        },
    ),
    "not finite": (
        "recipe: {alpha: .nan, learning_rate: .inf, dropout: 1e400, clip: -.inf}",
        {
            "recipe.alpha": "finite | nan",
            "recipe.learning_rate": "finite | inf",
            "recipe.dropout": "finite",
            "recipe.clip": "finite",
        },
    ),
    "booleans for numbers": (
        "recipe: {rank: true, alpha: false}\nbudget: {trials: true}\nseed: false",
        {"recipe.rank": "number | boolean", "recipe.alpha": "number | boolean", "budget.trials": "boolean", "seed": "boolean"},
    ),
    "huge numbers": (
        "recipe: {rank: 99999999999999999999999, max_length: 1e30}\nseed: 9999999999",
        {"recipe.rank": "at most 4096", "recipe.max_length": "whole number", "seed": "at most 2147483647"},
    ),
    "words for numbers": (
        "recipe: {rank: high}\nlimits: {peak_bytes: 8GB}",
        {"recipe.rank": "whole number | 'high'", "limits.peak_bytes": "whole number | '8GB'"},
    ),
    "no and yes for true and false": (
        "recipe: {gradient_checkpointing: no}\nspace: {rank: {type: int, low: 1, high: 8, log: yes please}}",
        {"recipe.gradient_checkpointing": "true or false | 'no'", "space.rank.log": "true or false"},
    ),
    "words that do not exist": (
        "recipe: {adapter: qlora, schedule: cosin, bits: 5, precision: fp61}\nresources: {mode: locl}\ntrain: simulate",
        {
            "recipe.adapter": "'qlora' | lora with bits: 4",
            "recipe.schedule": "'cosin' | cosine?",
            "recipe.bits": "got 5",
            "recipe.precision": "'fp61' | fp16?",
            "resources.mode": "'locl' | local?",
            "train": "'simulate' | simulated?",
        },
    ),
    "a mapping expected": (
        "budget: 20\nrecipe: [rank]\nlimits: 8\nresources: two",
        {
            "budget": "mapping | {trials: 30}",
            "recipe": "mapping | {rank: 16}",
            "limits": "mapping",
            "resources": "mapping | 'two'",
        },
    ),
    "a list expected": (
        "objectives: accuracy\nstart: {rank: 8}",
        {"objectives": "list | 'accuracy' | [accuracy, seconds]", "start": "list | For example"},
    ),
    "targets that are numbers": ("recipe: {targets: [5]}", {"recipe.targets": "names"}),
    "no objective": ("objectives: []", {"objectives": "must not be empty"}),
    "an objective that is a number": ("objectives: [accuracy, 5]", {"objectives[1]": "text | got 5"}),
    "an objective in other words": (
        "objectives: [accuracy, memory]",
        {"objectives[1]": "'memory' | peak_bytes? | Known: accuracy"},
    ),
    "an objective twice": ("objectives: [accuracy, seconds, accuracy]", {"objectives": "must differ | Remove"}),
    "nsga2 with one objective": ("objectives: [accuracy]\nalgorithm: nsga2", {"objectives": "nsga2 needs at least two | bayes"}),
    "an unknown algorithm": ("algorithm: tpe", {"algorithm": "'tpe' | bayes? | nsga2"}),
    "an unknown option": (
        "algorithm: {name: nsga2, populaton: 8}",
        {"algorithm.populaton": "not an option of nsga2 | population?"},
    ),
    "a wrong option": ("algorithm: {name: grid, levels: true}", {"algorithm.levels": "integer | True"}),
    "a number for an algorithm": ("algorithm: 5", {"algorithm": "mapping | algorithm: bayes"}),
    "budget 0": (
        "budget: {trials: 0, hours: 0, parallel: 0, retries: -1}",
        {
            "budget.trials": "at least 1 | got 0",
            "budget.hours": "above 0",
            "budget.parallel": "at least 1",
            "budget.retries": "at least 0",
        },
    ),
    "a grid over the budget": ("algorithm: grid", {"budget.trials": "the grid has 864 points | 20 | Raise"}),
    "alpha times nothing": ("space: {alpha: {type: choice, values: [1], times: rnk}}", {"space.alpha.times": "rnk | rank?"}),
    "alpha times itself": (
        "space: {alpha: {type: choice, values: [1], times: alpha}}",
        {"space.alpha.times": "another field | alpha"},
    ),
    "times text": ("space: {alpha: {type: choice, values: [1], times: schedule}}", {"space.alpha.times": "both be numbers"}),
    "times times": (
        "space: {rank: {type: choice, values: [1], times: batch_size}, alpha: {type: choice, values: [1], times: rank}}",
        {"space.alpha.times": "rank is itself a multiple"},
    ),
    "when of no dimension": (
        "space: {dropout: {type: choice, values: [0.1], when: {bits: 4}}}",
        {"space.dropout.when": "must name an unconditional choice | bits | no choice to depend on"},
    ),
    "when of a value that is no choice": (
        "space: {bits: [32, 4], dropout: {type: choice, values: [0.1], when: {bits: 8}}}",
        {"space.dropout.when.bits": "[32, 4] | got 8 | bits"},
    ),
    "when of a mapping": (
        "space: {bits: [32, 4], rank: {type: choice, values: [8], when: {bits: {a: 4}}}}",
        {"space.rank.when.bits": "number"},
    ),
    "a start point outside": (
        "space: {rank: [8, 16], bits: [32, 4]}\nstart: [{rank: 5, bits: 4}, {rnk: 8, bits: 32}]",
        {"start[0].rank": "outside | got 5 | [8, 16]", "start[1].rnk": "no dimension | rank?", "start[1]": "lacks rank"},
    ),
    "a start point of lists": ("start: [{rank: [8]}]", {"start[0].rank": "number"}),
    "epochs and steps": ("recipe: {epochs: 1, steps: 5}", {"recipe": "one of epochs, steps and tokens | epochs and steps"}),
    "bits 16 with fp32": ("recipe: {bits: 16}", {"recipe": "needs precision: bf16 | fp32"}),
    "bits 16 with fp32 in the space": ("space: {bits: [32, 16]}", {"space.bits": "needs precision: bf16"}),
    "workers that do not divide the batch": (
        "resources: {workers: 3, cpus: 0.1}",
        {"resources.workers": "divide batch_size | 3 and 8"},
    ),
    "workers that divide only the ends of the batch": (
        "space: {batch_size: {type: int, low: 8, high: 16}}\nresources: {workers: 2}",
        {"resources.workers": "divide batch_size | 2 and 9"},
    ),
    "workers in one process": ("resources: {workers: 2, mode: local}", {"resources.workers": "must be 1 with mode: local"}),
    "more workers than CPUs": (
        "resources: {workers: 1024}\nspace: {rank: [8]}\nrecipe: {batch_size: 1024}",
        {"resources": "1024 CPUs | this machine has | RAY_ADDRESS"},
    ),
    "GPUs that are not there": ("resources: {gpus: 64}", {"resources.gpus": "64 GPUs | this machine has | gpus: 0"}),
    "a template with another column": (
        'data: {train: "embedded:train.jsonl", template: "{question}"}',
        {"data.template": "{question} | instruction, input"},
    ),
    "a template without a column": (
        'data: {train: "embedded:train.jsonl", template: "Answer:"}',
        {"data.template": "no column | {instruction}"},
    ),
    "an unknown task": ('data: {train: "embedded:train.jsonl", task: classify}', {"data.task": "'classify' | classification?"}),
    "no such file": ("data: {train: nothing.jsonl}", {"data.train": "no such file | nothing.jsonl | relative"}),
    "a folder for a file": ("data: {train: /}", {"data.train": "folder"}),
    "a user that does not exist": (
        'data: {train: "~nobody-here/x.jsonl"}\nrecipe: {model: "~nobody-here/m"}\nstorage: "~nobody-here/s"',
        {
            "storage": "absolute | ~nobody-here/s",
            "data.train": "~nobody-here/x.jsonl",
            "recipe.model": "~nobody-here/m",
        },
    ),
    "the file, the model, the rows, the space and the machine at once": (
        "objectives: [accuracy, time]\nrecipe: {rank: 999, dropout: 2}\ndata: {train: nowhere.jsonl}\n"
        "resources: {workers: 500, cpus: 1}\nspace: {batch_size: [500]}\nbudget: {trials: 0}",
        {
            "objectives[1]": "'time' | seconds",
            "recipe.rank": "999 | beyond",
            "recipe.dropout": "below 1",
            "data.train": "nowhere.jsonl",
            "resources": "500 CPUs",
            "resources.workers": "must divide",
            "budget.trials": "at least 1",
        },
    ),
    "what follows from a mistake is not said": (
        "recipe: {model: 7, rank: 999, batch_size: 0}\nspace: {rank: [], alpha: {type: float, low: 1, high: 2, times: rank}}\n"
        "start: [{rank: 8, alpha: 2}]\nresources: {workers: 2}",
        {"recipe.model": "text", "recipe.batch_size": "at least 1", "space.rank": "must not be empty"},
    ),
    "no such model": ("recipe: {model: ./nothing}", {"recipe.model": "no such folder | embedded"}),
    "targets that match nothing": ("recipe: {targets: [c_proj]}", {"recipe.targets": "'c_proj' | all-linear | q_proj"}),
    "targets of the space that match nothing": ("space: {targets: [mlp, c_attn]}", {"space.targets": "'c_attn' | q_proj"}),
    "relative storage": ("storage: runs", {"storage": "absolute | 'runs' | temporary folder"}),
    "a bucket": ("storage: s3://bucket/runs", {"storage": "folder | mount"}),
    "storage with a NUL": ('storage: "/tmp/a\\0b"', {"storage": "absolute"}),
    "a database that is no URL": ("database: hpo.db", {"database": "SQLAlchemy URL | postgresql://"}),
    "a database somewhere below": ("database: sqlite:///hpo.db", {"database": "absolute | four slashes"}),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_study_is_refused_with_path_rule_value_and_remedy(name, refused):
    text, expected = WRONG[name]
    check(refused(study(text)), expected)


def test_mistakes_in_all_sections_are_said_at_once(refused):
    found = refused(
        "nam: x\nstorage: $STORE\ndata: {trian: a}\nspace: {rnk: [1], learning_rate: {type: float, low: 1, high: 0.1}}\n"
        "budget: {trials: 0}\nobjectives: [time]\nalgorithm: tpe\nrecipe: {rank: 0}\nresources: {worker: 2}\n"
    )
    check(found, {
        "nam": "name?", "name": "required | my-study", "data.train": "required", "data.trian": "train?", "space.rnk": "rank?",
        "space.learning_rate": "Swap", "budget.trials": "at least 1", "objectives[0]": "seconds?", "algorithm": "bayes?",
        "recipe.rank": "at least 1", "resources.worker": "workers?",
    })  # fmt: skip


def test_mistakes_that_need_model_and_data_are_said_at_once(refused, tmp_path):
    (tmp_path / "d.jsonl").write_text('{"instruction": "a", "response": "b"}\n{"instruction": "c"}\nnot json\n')
    found = refused(study("data: {train: d.jsonl}\nrecipe: {targets: c_attn}\nresources: {workers: 1, gpus: 64}"))
    check(found, {
        "data.train": "d.jsonl:2: the field 'response' is missing | d.jsonl:3: is not JSON",
        "recipe.targets": "c_attn", "resources.gpus": "64",
    })  # fmt: skip


BAD_NAMES = [
    "", "a" * 64, "a" * 300,
    "../x", "/abs", "a/b", "..%2f", "%252e", "a b", "Big", "-x", ".x", "_x", "é", "😀", "a\u202eb", "a\\b",
    "a\nb", "a\0b", "hpo.db", "hpo.db-journal",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
def test_a_name_that_could_leave_the_storage_folder_is_refused(name, refused):
    check(refused(study(f"name: {json.dumps(name, ensure_ascii=False).replace(chr(0), '')}")), {"name": "must"})


@pytest.mark.parametrize("name", ["a", "a" * 63, "my-study_2.1", "0", "no", "on", "null-1"])
def test_an_ordinary_name_is_taken_as_text(name, tmp_path):
    (tmp_path / "s.yaml").write_text(study(f"name: {name}" if name != "0" else 'name: "0"').replace("$STORE", str(tmp_path)))
    assert load(tmp_path / "s.yaml").spec.name == name


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)
YAML = {
    "python tag": ('name: s\nseed: !!python/object/apply:os.mkdir ["hacked"]\n', {"FILE:2": "tag | plain values"}),
    "another tag": ("name: !shout s\n", {"FILE:1": "tag"}),
    "duplicate key": ("name: a\ndata: {}\nname: b\n", {"FILE:3": "duplicate key | name | Keep one"}),
    "nested duplicate key": (study("recipe: {rank: 8,\n  rank: 16}"), {"FILE:8": "duplicate key | rank"}),
    "tab": ("name: s\n\tdata: x\n", {"FILE:2": "Indent with spaces"}),
    "two documents": (study("") + "---\nname: b\n", {"FILE:8": "another document | one study"}),
    "undefined alias": ("name: *nothing\n", {"FILE:1": "alias"}),
    "open bracket": ("name: s\nspace: {rank: [1\n", {"FILE:3": "YAML"}),
    "control character": ("name: a\x01b\n", {"FILE": "not allowed"}),
    "a list": ("- name\n- data\n", {"FILE": "mapping of fields | a list | name: my-study"}),
    "a word": ("hello", {"FILE": "mapping of fields | one value"}),
    "nothing": ("", {"FILE": "mapping of fields | nothing"}),
    "only a comment": ("# later\n", {"FILE": "mapping of fields | nothing"}),
    "alias bomb": (BOMB, {"FILE": "more than 20000 values | aliases"}),
    "alias to itself": ("name: s\nrecipe: &r {x: *r}\n", {"FILE": "nested | 50"}),
    "deep list": ("name: " + "[" * 400 + "]" * 400, {"FILE": "nested | 50"}),
    "deep mapping": ("name: " + "{a: " * 60 + "1" + "}" * 60, {"FILE": "nested | 50"}),
    "a number of 5000 digits": ("name: s\nseed: " + "9" * 5000, {"FILE": "digits"}),
    "not UTF-8": (b"name: caf" + b"\xe9\n", {"FILE": "byte 9 | UTF-8"}),
    "2 MB": (b"name: s\n" + b"# x\n" * 500_000, {"FILE": f"2000008 bytes | {SIZE_LIMIT} | kilobytes"}),
    "a key that is no word": (study("5: x\nnull: y\n"), {"5": "unknown field", "None": "unknown field"}),
}


@pytest.mark.parametrize("name", YAML)
def test_what_is_no_study_file_is_refused_with_its_line(name, refused, tmp_path):
    text, expected = YAML[name]
    check(refused(text), expected)
    assert not (tmp_path / "hacked").exists()


def test_an_alias_bomb_takes_no_memory():
    tracemalloc.start()
    with pytest.raises(SpecError):
        parse(BOMB)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5_000_000


@pytest.mark.parametrize(
    ("item", "where", "words"),
    [
        ("budget.trials", "--set budget.trials", "path.in.file=value | --set budget.trials=30"),
        ("=5", "--set =5", "path.in.file=value"),
        ("budget.trials.more=5", "--set budget.trials.more=5", "trials is no mapping"),
        ("budget.trials=[", "--set budget.trials:1", "YAML"),
        ("budget.trials=!!python/name:os.system x", "--set budget.trials:1", "tag"),
        ("budget.trails=5", "budget.trails", "unknown field | trials?"),
        ("budgt.trials=5", "budgt", "unknown field | budget?"),
        ("budget.trials=", "budget.trials", "number | nothing"),
        ("space=loar", "space", "'loar' | lora?"),
        ("space.rank.low=5", "space.rank.low", "unknown field"),
        ("algorithm.levels=5", "algorithm.levels", "not an option of random"),
    ],
)
def test_a_wrong_override_is_refused(item, where, words, refused):
    check(refused(study("budget: {trials: 3}"), "--set", item), {where: words})


def test_an_unknown_study_names_the_nearest(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source in ("quikstart", "x" * 5000, ".", "a\0b"):
        code, out, _ = command(capsys, "run", source, "--json")
        message = one_object(out)["error"]["message"]
        assert code == 2
        assert "quickstart" in message
    assert "Did you mean quickstart?" in one_object(command(capsys, "check", "quikstart", "--json")[1])["error"]["message"]
    assert not list(tmp_path.iterdir())


# Files that are there, but not what they should be

DATA = {
    "empty": (b"", "empty"),
    "blank": (b"\n \n", "empty"),
    "a row without its field": (
        b'{"instruction": "a", "response": "b"}\n\n{"instruction": "a"}\n',
        "d.jsonl:3: the field 'response' is missing",
    ),
    "a row that is no text": (b'{"instruction": ["a"], "response": "b"}\n', "d.jsonl:1: the field 'instruction' must be text"),
    "an empty answer": (b'{"instruction": "a", "response": " "}\n', "d.jsonl:1: the field 'response' is empty"),
    "no JSON": (b'{"instruction": "a", "response": "b"}\n{"instruction"\n', "d.jsonl:2: is not JSON"),
    "an array": (b'[{"instruction": "a"}]', "one JSON array"),
    "other columns": (b'{"q": "a", "a": "b"}\n', "no column"),
    "binary": (b'{"instruction": "a"}\n\x00\x01', "d.jsonl:2: a NUL byte"),
    "Latin-1": (b'{"instruction": "caf\xe9", "response": "b"}\n', "d.jsonl:1: byte 20 is not UTF-8"),
    "one row": (b'{"instruction": "a", "response": "b"}\n', "no row is left"),
}


@pytest.mark.parametrize("name", DATA)
def test_rows_that_cannot_be_used_are_refused_with_file_and_line(name, refused, tmp_path):
    content, words = DATA[name]
    (tmp_path / "d.jsonl").write_bytes(content)
    found = refused(study("data: {train: d.jsonl}"))
    assert all(where.startswith("data.") for where in found)
    assert words in " ".join(found.values())


def test_a_model_folder_that_cannot_be_used_is_refused(refused, tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    wrong = study("recipe: {model: ./m}")
    check(refused(wrong), {"recipe.model": "no config.json"})
    shutil.copy(EMBEDDED / "config.json", folder)
    check(refused(wrong), {"recipe.model": "lacks the weights model.safetensors"})
    (folder / "pytorch_model.bin").write_bytes(b"x")
    check(refused(wrong), {"recipe.model": "only pickled weights | pytorch_model.bin | safetensors"})
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    check(refused(wrong), {"recipe.model": "no complete safetensors file"})


def test_a_model_without_a_tokenizer_is_refused(refused, tmp_path):
    shutil.copytree(EMBEDDED, tmp_path / "m", ignore=shutil.ignore_patterns("tokenizer*"))
    check(refused(study("recipe: {model: ./m}")), {"recipe.model": "tokenizer"})


def test_a_model_that_brings_code_is_refused(refused, tmp_path):
    shutil.copytree(EMBEDDED, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "x.Y"}}))
    check(refused(study("recipe: {model: ./m}")), {"recipe.model": "code of its own"})


def test_a_model_of_the_space_is_refused_where_it_stands(refused, tmp_path):
    check(refused(study("space: {model: [embedded, /nowhere/m]}")), {"space.model": "no such folder | /nowhere/m"})


def test_storage_that_cannot_be_written_is_refused(refused, tmp_path):
    (tmp_path / "file").write_text("")
    check(refused(study(f"storage: {tmp_path}/file/below")), {"storage": "cannot be written | Name a folder"})
    check(refused(study(f"storage: {tmp_path}/{'x' * 300}")), {"storage": "cannot be written"})


# As a user meets it: another process


@pytest.mark.parametrize("verb", ["run", "check"])
def test_the_command_ends_with_2_and_every_problem_on_standard_error(verb, tmp_path):
    (tmp_path / "s.yaml").write_text(
        study("recipe: {learning_rat: 1}\nbudget: {trials: 0}").replace("$STORE", str(tmp_path / "store"))
    )
    environment = os.environ | {"PARETUNE_RAY_TEMP": str(tmp_path / "ray"), "HPO_STORAGE": str(tmp_path / "other")}
    done = subprocess.run(
        [sys.executable, "-m", "hpo", verb, "s.yaml"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "2 problems, nothing was started:",
        "  recipe.learning_rat: unknown field. Did you mean learning_rate?",
        "  budget.trials: must be at least 1, got 0.",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["s.yaml"]


# Whatever stands where a value should be

junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["~x/y", "a\0b", "$HOME", "//"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
PATHS = """
name description storage database data data.train data.template data.columns data.labels data.limit evaluation
recipe recipe.model recipe.targets recipe.rank recipe.epochs space space.rank space.rank.values
space.alpha.times space.alpha.when space.learning_rate.low space.learning_rate.log start objectives limits
algorithm algorithm.name algorithm.options algorithm.levels budget budget.trials resources train seed
""".split()


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(PATHS), junk)
def test_no_value_anywhere_ends_in_anything_but_a_study_or_its_problems(path, value):
    study = {
        "name": "s", "storage": "/nowhere", "data": {"train": "embedded:train.jsonl"}, "recipe": {}, "budget": {},
        "space": {"rank": {"type": "choice", "values": [4, 8]}, "alpha": {"type": "choice", "values": [1], "times": "rank"},
                  "learning_rate": {"type": "float", "low": 0.1, "high": 0.2}}, "algorithm": {"name": "random"},
    }  # fmt: skip
    *parents, last = path.split(".")
    place = study
    for name in parents:
        place = place[name]
    place[last] = value
    try:
        load(study)
    except SpecError as error:
        assert all(problem.where and problem.rule for problem in error.problems)
        assert not re.search(r"[Ii]nput should|union|dictionary|instance of", str(error).replace(repr(value), ""))
