"""The shape of the code, read from its imports: who may know whom, and which library appears where."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("hpo", "training", "serving", "search_spaces")

# A module of hpo imports only from its own layer or from lower ones.
LAYERS = (
    # Words: what is searched, wanted, claimed; what a user typed, and what is said of it.
    ("errors", "space", "trial", "objectives", "pareto", "certificate", "model", "written", "wording"),
    # Pure functions of them.
    ("algorithms", "gate", "prior", "growth", "stopping", "importance", "insight", "extensions", "choosing", "verdict"),
    ("coherence",),  # what contradicts what in a study
    ("spec",),  # a study as a user writes it
    ("store", "steer"),  # the record, and orders to who runs a study
    ("keeping",),  # which of its files stay
    ("search",),  # the heart: ask, report, tell
    # What a run is made of.
    ("check", "local", "simulator", "replay", "drive", "tune", "evidence", "certify", "figures", "report", "promote", "endpoint",
     "comparison", "report_comparison", "entry"),
    ("backend", "forecast", "dialects", "exports"),  # where it runs, how long that takes; other programs' files
    ("study", "proxy", "draft", "adopt", "doctor"),  # the facade, and what helps to begin
    ("show", "show_models", "terminal", "cli_models", "cli_data", "cli_steer", "cli", "__init__", "__main__"),  # doors
)
# Nothing but these files may name these libraries.
ONLY = {
    "ray": {"hpo/drive.py", "hpo/tune.py", "training/desk.py", "training/mailbox.py", "training/pool.py", "training/workers.py",
            "serving/targets/ray_serve.py"},
    "optuna": {"hpo/algorithms/_optuna.py", "hpo/algorithms/_gp.py", "hpo/algorithms/_tpe.py", "hpo/exports.py"},
    "pymoo": {"hpo/algorithms/nsga2.py"},
    "moocore": {"hpo/pareto.py"},
    "sqlalchemy": {"hpo/store.py"},
    "sqlite3": {"hpo/store.py"},
    "typer": {"hpo/cli.py", "hpo/cli_models.py", "hpo/cli_data.py", "hpo/cli_steer.py", "hpo/terminal.py"},
    "bitsandbytes": {"hpo/doctor.py", "training/model.py", "training/optimizers.py", "training/merge.py"},
    "peft": {"training/adapters.py", "training/checkpoint.py", "training/merge.py", "training/pool.py"},
    "deepspeed": {"training/optimizers.py", "training/shards.py", "training/zero.py"},
    "gguf": {"training/gguf.py"},
    "lm_eval": {"training/harness.py"},
    "rouge_score": {"training/metrics.py"},
    "sacrebleu": {"training/metrics.py"},
}  # fmt: skip
# The packages of this repository that each one may import; serving takes some modules of training.
MAY = {
    "search_spaces": set(),
    "training": {"training"},
    "serving": {"serving", "training"},
    "hpo": {"hpo", "training", "serving"},
}
# What an artifact is, how a base and an adapter are loaded; nothing of how they were made.
SERVING_TAKES = {f"training.{name}" for name in ("artifact", "checkpoint", "errors", "merge", "model", "recipe")}


def test_the_process_of_a_trial_loads_no_torch():
    heavy = ("torch", "transformers", "hpo.tune", "hpo.search")
    code = f"import sys, hpo.drive; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def files() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in files()}


def imports(path: Path, *, load_time: bool = False) -> set[str]:
    """Returns the modules that a file imports anywhere, or only those that loading it loads."""
    tree = ast.parse(path.read_text())
    skipped = set()
    if load_time:
        for node in ast.walk(tree):
            typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            if typing_only or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                skipped |= set(ast.walk(node))
    found = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            # `from hpo import store` imports hpo.store; `from hpo.store import Store` imports hpo.store.
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return found


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_reading_of_imports_sees_those_inside_functions_and_none_that_are_not_there():
    seen = imports(ROOT / "hpo" / "study.py")
    assert {"hpo.tune", "pandas", "hpo.report"} <= seen
    assert "hpo.tune" not in imports(ROOT / "hpo" / "study.py", load_time=True)
    assert "hpo.study" not in imports(ROOT / "hpo" / "__init__.py", load_time=True)


@pytest.mark.parametrize("library", ONLY)
def test_a_library_appears_only_where_it_belongs(library):
    users = {named(path) for path in files() if any(name.split(".")[0] == library for name in imports(path))}
    assert users <= ONLY[library]
    assert users, "the list names a library that nothing uses"


@pytest.mark.parametrize("path", files(), ids=named)
def test_a_package_imports_only_what_it_may_know(path):
    package = path.relative_to(ROOT).parts[0]
    ours = {name for name in imports(path) if name.split(".")[0] in (*PACKAGES, "tests", "benchmarks", "examples")}
    assert {name.split(".")[0] for name in ours} <= MAY[package]
    if package == "serving":
        assert {name for name in ours if name.startswith("training.")} <= SERVING_TAKES


def layer_of(module: str) -> int:
    name = "__init__" if module == "hpo" else module.split(".")[1]
    found = [number for number, layer in enumerate(LAYERS) if name in layer]
    assert found, f"{module} is in no layer: add it to the list, where it belongs"
    return found[0]


@pytest.mark.parametrize("module", [name for name in MODULES if name.split(".")[0] == "hpo"])
def test_a_module_of_hpo_imports_from_its_own_layer_or_lower_ones(module):
    own = layer_of(module)
    for other in imports(MODULES[module]):
        # `import hpo` hands out what study has; it is read by nobody inside.
        if other.split(".")[0] == "hpo" and not _for_typing(module, other):
            assert layer_of(other) <= own, f"{module} (layer {own}) imports {other} (layer {layer_of(other)})"


def _for_typing(module: str, other: str) -> bool:
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            if any(isinstance(inner, ast.ImportFrom) and inner.module == other for inner in ast.walk(node)):
                return True
    return False


def test_every_layer_names_modules_that_exist():
    known = {"__init__" if name == "hpo" else name.split(".")[1] for name in MODULES if name.split(".")[0] == "hpo"}
    assert {name for layer in LAYERS for name in layer} - known <= {"figures"}


def test_no_import_goes_round_in_a_circle():
    graph = {name: imports(path, load_time=True) & set(MODULES) for name, path in MODULES.items()}
    done: set[str] = set()

    def walk(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way[way.index(name) :], name))
        if name not in done:
            for other in sorted(graph[name] - {name}):
                walk(other, (*way, name))
            done.add(name)

    for name in sorted(graph):
        walk(name, ())


def test_search_spaces_are_data():
    assert [path.name for path in (ROOT / "search_spaces").rglob("*.py")] == []
    assert {path.suffix for path in (ROOT / "search_spaces").rglob("*") if path.is_file()} <= {".yaml", ".md"}


@pytest.mark.parametrize("path", files(), ids=named)
def test_what_is_public_says_what_it_is_for(path):
    tree = ast.parse(path.read_text())
    if path.name != "__init__.py" or tree.body:
        assert ast.get_docstring(tree), "the module says what it owns"
    bare = [
        node.name
        for node in tree.body
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert bare == []


# Put together from parts, so that this file is not what it looks for.
HOSTS = ["py" + "pi.", "python" + "hosted.org", "arti" + "factory", "ana" + "conda.org", "registry." + "npm"]
# The user of cloud images and the cluster's shared volume are no machine of ours.
MACHINES = ["/ho" + "me/(?!ubuntu)[a-z]", "/ro" + "ot/", "/Us" + "ers/[A-Za-z]", "/wo" + "rk/(?:main|shared)"]


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if done.returncode:
        pytest.skip("no checkout")
    return [ROOT / name for name in done.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


def test_no_tracked_file_names_a_machine_or_a_package_registry():
    pattern = re.compile("|".join([*map(re.escape, HOSTS), *MACHINES]).encode())
    found = []
    for path in tracked():
        content = path.read_bytes()
        if b"\0" not in content[:8192]:
            found += [f"{named(path)}: {match.group().decode()}" for match in pattern.finditer(content)]
    assert found == []
