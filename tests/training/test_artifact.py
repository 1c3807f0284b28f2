"""A folder is the old one, the new one or not there; every file in it is proved."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

from training import artifact
from training.artifact import MANIFEST, Artifact, verify, write
from training.errors import InputError


def fill(text: str):
    def into(aside: Path) -> dict:
        (aside / "config.json").write_text(text)
        (aside / "adapter").mkdir()
        (aside / "adapter" / "weights.safetensors").write_bytes(text.encode() * 100)
        (aside / "adapter" / MANIFEST).write_text("{}")  # only the outermost one is the manifest
        return {"kind": "model", "said": text}

    return into


@pytest.fixture
def made(tmp_path) -> Artifact:
    return write(tmp_path / "models" / "abc", fill("one"))


def around(found: Artifact) -> list[str]:
    return sorted(path.name for path in found.folder.parent.iterdir())


def test_what_was_written_is_verified_with_its_record_and_digest(made):
    found = verify(made.folder)
    assert found == made
    assert found.manifest["said"] == "one" and found.manifest["kind"] == "model"
    assert set(found.manifest["files"]) == {"config.json", "adapter/weights.safetensors", f"adapter/{MANIFEST}"}
    assert found.manifest["files"]["config.json"] == {"sha256": hashlib.sha256(b"one").hexdigest(), "bytes": 3}
    assert found.digest == hashlib.sha256((made.folder / MANIFEST).read_bytes()).hexdigest()
    assert around(made) == ["abc"]


def test_the_digest_stands_for_every_byte_and_for_the_record(tmp_path):
    same = [write(tmp_path / name, fill("one")).digest for name in "ab"]
    assert same[0] == same[1] != write(tmp_path / "c", fill("two")).digest


def flip(folder: Path) -> None:
    path = folder / "adapter" / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)


CHANGES = {
    "flipped": (flip, "SHA-256 differs"),
    "missing": (lambda f: (f / "config.json").unlink(), r"\['config.json'\] do not match"),
    "extra": (lambda f: (f / "adapter" / "more.json").write_text(""), r"\['adapter/more.json'\] do not match"),
    "hidden": (lambda f: (f / ".more").write_text(""), r"\['.more'\] do not match"),
    "pickled": (lambda f: (f / "pytorch_model.bin").write_text(""), "pytorch_model.bin"),
    "file link": (lambda f: (f / "more").symlink_to(f / "config.json"), "is a link"),
    "replaced by a link": (lambda f: ((f / "config.json").rename(f.parent / "c"), (f / "config.json").symlink_to(f.parent / "c")),
                           "is a link"),
    "folder link": (lambda f: (f / "more").symlink_to(f / "adapter"), "is a link"),
    "pipe": (lambda f: os.mkfifo(f / "pipe"), "no plain file"),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "no finished artifact"),
    "damaged": (lambda f: (f / MANIFEST).write_bytes(b"\xff{"), "the manifest is damaged"),
    "nested": (lambda f: (f / MANIFEST).write_text("[" * 100_000), "the manifest is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_was_changed_is_found(made, change):
    do, said = CHANGES[change]
    do(made.folder)
    with pytest.raises(InputError, match=said):
        verify(made.folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "optimizer.PT", "adapter/x.pkl"])
def test_pickled_files_are_refused_even_where_the_manifest_lists_them(made, name):
    (made.folder / name).write_bytes(b"x")
    manifest = dict(made.manifest)
    manifest["files"] = manifest["files"] | {name: {"sha256": hashlib.sha256(b"x").hexdigest(), "bytes": 1}}
    (made.folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="pickled files are never loaded"):
        verify(made.folder)


def test_names_in_a_manifest_reach_nothing_outside(made):
    (made.folder.parent / "secret").write_text("x")
    manifest = {"files": {"../secret": {"sha256": hashlib.sha256(b"x").hexdigest()}}}
    (made.folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="do not match the manifest"):
        verify(made.folder)


@pytest.mark.parametrize("bad", [lambda aside: (aside / "a.bin").write_text(""), lambda aside: (aside / "a").symlink_to("/")])
def test_pickled_files_and_links_are_never_written(made, bad):
    def into(aside: Path) -> dict:
        bad(aside)
        return {}

    with pytest.raises(InputError):
        write(made.folder, into)
    assert verify(made.folder) == made and around(made) == ["abc"]


def test_a_replaced_folder_has_nothing_of_the_old_one(made):
    (made.folder / "leftover").write_text("")
    again = write(made.folder, lambda aside: {"n": 2})
    assert verify(made.folder) == again and around(made) == ["abc"]
    assert [path.name for path in made.folder.iterdir()] == [MANIFEST]


def test_a_fill_that_fails_leaves_the_old_folder_and_nothing_beside(made):
    def into(aside: Path) -> dict:
        (aside / "half").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(made.folder, into)
    assert verify(made.folder) == made and around(made) == ["abc"]
    with pytest.raises(KeyboardInterrupt):
        write(made.folder.with_name("new"), into)
    assert around(made) == ["abc"]


DIE = """
import os, sys
from pathlib import Path
from training import artifact
where, moment = Path(sys.argv[1]), sys.argv[2]
def into(aside):
    (aside / "config.json").write_text("two")
    if moment == "fill":
        os._exit(9)
    return {}
rename = Path.rename
def dying(self, target):
    rename(self, target)
    if target.name.endswith("." + moment) or (moment == "in place" and self.name.endswith(".new")):
        os._exit(9)
Path.rename = dying
if moment == "seal":
    artifact._digest = lambda path: os._exit(9)
artifact.write(where, into)
"""


MOMENTS = [(True, moment) for moment in ("fill", "seal", "old", "in place", "gone")]
MOMENTS += [(False, moment) for moment in ("fill", "seal", "in place")]  # without an old folder nothing is moved away


@pytest.mark.parametrize(("existing", "moment"), MOMENTS)
def test_a_killed_process_leaves_no_half_folder_and_the_next_write_gets_through(tmp_path, existing, moment):
    where = tmp_path / "abc"
    if existing:
        old = write(where, fill("one"))
    done = subprocess.run([sys.executable, "-c", DIE, str(where), moment], cwd=Path(__file__).parents[2], timeout=60)
    assert done.returncode == 9
    if moment in ("in place", "gone"):
        assert (verify(where).folder / "config.json").read_text() == "two"
    elif existing and moment != "old":
        assert verify(where) == old
    else:
        assert not where.exists()
    write(tmp_path / "other", fill("three"))  # any write beside tidies up
    assert sorted(p.name for p in tmp_path.iterdir()) == (["abc", "other"] if existing or moment == "in place" else ["other"])
    if existing and moment == "old":
        assert verify(where) == old  # brought back
    again = write(where, fill("two"))
    assert verify(where) == again and sorted(p.name for p in tmp_path.iterdir()) == ["abc", "other"]


@pytest.mark.parametrize(("host", "age", "stays"), [
    (platform.node(), 0, True),  # this process itself
    ("elsewhere", 60, True),  # nobody here can say whether it lives
    ("elsewhere", 2 * artifact.DAY, False),
])  # fmt: skip
def test_what_a_living_process_writes_is_left_alone(tmp_path, host, age, stays):
    aside = tmp_path / f".abc.{host}~{os.getpid()}~0123abcd.new"
    aside.mkdir()
    os.utime(aside, (time.time() - age,) * 2)
    write(tmp_path / "other", fill("one"))
    assert aside.exists() == stays


def test_a_folder_that_only_looks_alike_is_left_alone(tmp_path):
    names = [".git", ".abc.new", ".abc.host~x~0123abcd.new", "abc.host~1~0123abcd.new"]
    for name in names:
        (tmp_path / name).mkdir()
    write(tmp_path / "other", fill("one"))
    assert all((tmp_path / name).exists() for name in names)
