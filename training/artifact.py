"""A folder that is whole or not there: written aside, synced, renamed; read only when its manifest proves every file.

Owns: `Artifact`, `write`, `verify`, `remove`. Must not know: what the files mean (this file imports neither
torch nor transformers).
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from training.errors import wrong

MANIFEST = "manifest.json"
PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")  # loading them can run code
# What write() puts beside a folder: .NAME.HOST~PID~RANDOM.STATE. `new` is being filled, `old` is what is about to be replaced,
# `gone` is being deleted. Host and process say whether somebody still works on it.
BESIDE = re.compile(r"\.(?P<name>.+)\.(?P<host>[^~/]*)~(?P<process>\d+)~[0-9a-f]{8}\.(?P<state>new|old|gone)")
DAY = 86_400  # seconds after which what another machine left is taken for abandoned


@dataclass(frozen=True)
class Artifact:
    """A verified folder: its manifest, and `digest`, the SHA-256 of the manifest's bytes, which stands for all files."""

    folder: Path
    manifest: dict
    digest: str


def write(folder: str | Path, fill: Callable[[Path], dict]) -> Artifact:
    """Writes a folder as a whole and returns it; whatever happens, the folder is the old one, the new one, or not there.

    Args:
        folder: is replaced where it exists. Between the two renames it is missing for a moment; a process that dies right
            then leaves the old one aside, and the next write beside it brings it back.
        fill: puts the files into the empty folder that it is given and returns what the manifest says beside their digests.

    Raises:
        InputError: `fill` left a link or pickled weights. Anything that `fill` raises goes through, and nothing is left behind.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _tidy(folder.parent)
    aside, old, gone = _beside(folder)
    try:
        aside.mkdir()
        record = fill(aside)
        content = _seal(aside, record)
        if folder.exists():
            folder.rename(old)
        try:
            aside.rename(folder)
        except BaseException:
            if old.exists():
                old.rename(folder)
            raise
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    sync(folder.parent)
    if old.exists():
        old.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
    return Artifact(folder, json.loads(content), hashlib.sha256(content).hexdigest())


def remove(folder: str | Path) -> None:
    """Removes a folder as a whole: whatever happens, it is there and whole, or not there. None that is there is no error."""
    folder = Path(folder)
    if not folder.exists():
        return
    _, _, gone = _beside(folder)
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)
    _tidy(folder.parent)  # what others could not finish


def _beside(folder: Path) -> tuple[Path, Path, Path]:
    mark = f".{folder.name}.{platform.node()}~{os.getpid()}~{secrets.token_hex(4)}"
    return folder.with_name(f"{mark}.new"), folder.with_name(f"{mark}.old"), folder.with_name(f"{mark}.gone")


def _seal(folder: Path, record: dict) -> bytes:
    """Syncs all files and then the manifest that lists them; returns the manifest's bytes."""
    files = {}
    for name, path in _files(folder, "Write plain files only.").items():
        files[name] = {"sha256": _digest(path), "bytes": path.stat().st_size}
        sync(path)
    _refuse_pickled(folder, files)
    content = json.dumps(record | {"files": files}, indent=1, sort_keys=True).encode()
    (folder / MANIFEST).write_bytes(content)
    sync(folder / MANIFEST)
    for below, _, _ in os.walk(folder):
        sync(Path(below))
    return content


def verify(folder: str | Path, *, what: str = "artifact", remedy: str = "Make it again.") -> Artifact:
    """Returns a folder after comparing every file in it, at any depth, with the manifest.

    Args:
        what: names the folder in messages.
        remedy: what the user can do where it is not sound.

    Raises:
        InputError: no manifest or a damaged one; a file is missing, changed or extra; a link; pickled weights.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise wrong(str(folder), f"no manifest, so this is no finished {what}.", remedy)
    content = (folder / MANIFEST).read_bytes()
    try:
        manifest = json.loads(content)
        listed = {str(name): entry["sha256"] for name, entry in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise wrong(str(folder / MANIFEST), "the manifest is damaged.", remedy) from None
    present = _files(folder, remedy)
    if set(present) != set(listed):
        raise wrong(str(folder), f"files {sorted(set(present) ^ set(listed))} do not match the manifest.", remedy)
    _refuse_pickled(folder, listed)
    for name, path in present.items():
        if _digest(path) != listed[name]:
            raise wrong(str(path), "the file is not what was written (SHA-256 differs).", remedy)
    return Artifact(folder, manifest, hashlib.sha256(content).hexdigest())


def _files(folder: Path, remedy: str) -> dict[str, Path]:
    """Returns every file but the manifest by its name relative to the folder; refuses links and whatever is no plain file."""
    found = {}
    for below, folders, names in os.walk(folder, onerror=_fail):
        for name in (*folders, *names):
            path = Path(below) / name
            if path.is_symlink() or not (path.is_dir() or path.is_file()):
                raise wrong(str(path), "is a link or no plain file.", remedy)
            if path.is_file() and path != folder / MANIFEST:
                found[path.relative_to(folder).as_posix()] = path
    return dict(sorted(found.items()))


def _fail(error: OSError) -> None:
    raise error  # os.walk would pass over a folder that cannot be read


def _refuse_pickled(folder: Path, names) -> None:
    if pickled := sorted(name for name in names if name.lower().endswith(PICKLED)):
        raise wrong(str(folder), f"pickled files are never loaded: {', '.join(pickled)}.", "Keep weights as safetensors.")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Puts a file or a folder's names on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _tidy(parent: Path) -> None:
    """Removes what dead processes left beside their folders, and brings back a folder that one of them had moved away."""
    for path in parent.iterdir():
        found = BESIDE.fullmatch(path.name)
        if not found or not _abandoned(path, found["host"], int(found["process"])):
            continue
        with suppress(OSError):  # somebody else may be tidying too
            if found["state"] == "old" and not path.with_name(found["name"]).exists():
                path.rename(path.with_name(found["name"]))
        shutil.rmtree(path, ignore_errors=True)


def _abandoned(path: Path, host: str, process: int) -> bool:
    if host != platform.node():
        with suppress(OSError):
            return time.time() - path.stat().st_mtime > DAY
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:  # it lives, under another user
        return False
    return False
