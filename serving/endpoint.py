"""The words of serving: what an endpoint is, as a file that every replica reads.

Owns: `Table` and its parts, reading and replacing `endpoint.json`, the token. Must not know: engines, HTTP, Ray, studies.

An endpoint is a folder on storage that every replica sees. Whoever deploys, shifts traffic or rolls back replaces one file in
it; replicas follow. So every change works the same on one machine and on a cluster, and survives whoever made it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from training.errors import wrong
from training.recipe import Frozen, Number, Whole

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
TABLE, TOKEN, REPLICAS = "endpoint.json", "token", "replicas"


class Limits(Frozen):
    """What one replica accepts; beyond it a request is refused at once."""

    body_bytes: Whole = Field(262_144, ge=1024, le=16_777_216)
    header_bytes: Whole = Field(16_384, ge=1024, le=1_048_576)
    seconds: Number = Field(60, gt=0, le=3600, description="from the request's first byte to the answer's last")
    output_tokens: Whole = Field(1024, ge=1, le=1_000_000, description="most tokens of one answer")
    prompt_tokens: Whole | None = Field(None, ge=1, description="most tokens of a prompt; default: what the context leaves")
    choices: Whole = Field(8, ge=1, le=128, description="largest n")
    stops: Whole = Field(8, ge=0, le=64, description="most stop strings")
    messages: Whole = Field(256, ge=1, le=10_000, description="most messages of a chat")
    concurrent: Whole = Field(16, ge=1, le=4096, description="requests in the batch at once")
    queue: Whole = Field(64, ge=0, le=65_536, description="requests that may wait; more are answered 429")


class EngineSettings(Frozen):
    """How models run in a replica, and how many replicas there are."""

    kind: Literal["transformers", "vllm"] = "transformers"
    cpus: Number = Field(1, gt=0, le=1024, description="per replica; also the threads of torch")
    gpus: Number = Field(0, ge=0, le=64, description="per replica")
    replicas: Whole = Field(1, ge=1, le=1000, description="at least so many")
    most_replicas: Whole | None = Field(None, ge=1, le=1000, description="autoscaled up to; default: no autoscaling")
    cache_tokens: Whole = Field(16_384, ge=256, le=100_000_000, description="tokens of all requests held by one engine's cache")
    adapters_loaded: Whole = Field(4, ge=1, le=1000, description="adapters in memory at once; the least recently used goes")

    @model_validator(mode="after")
    def _range(self) -> EngineSettings:
        if self.most_replicas is not None and self.most_replicas < self.replicas:
            raise ValueError(f"most_replicas must be at least replicas, got {self.most_replicas} and {self.replicas}")
        return self


class Version(Frozen):
    """A packaged model, and the share of the requests that it answers."""

    version: Whole = Field(ge=1)
    folder: str = Field(description="an artifact of kind model")
    digest: str = Field(description="of its manifest; another one is refused")
    share: Number = Field(0, ge=0, le=1)


class Adapter(Frozen):
    """A trial served unmerged on its base; without a folder the base itself."""

    name: str = Field(description="base, fast, small, trial-7")
    recipe: dict = Field(description="a Recipe: which base at how many bits")
    folder: str | None = None
    digest: str | None = Field(None, description="of its manifest; another one is refused")
    chat_template: str | None = Field(None, description="asks as its rows did; default: the tokenizer's own")

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        if not NAME.fullmatch(value) or re.fullmatch(r"v\d+", value):
            raise ValueError("must be 1 to 63 of a-z, 0-9, '.', '_' and '-', and not look like a version")
        return value


class Table(Frozen):
    """All that a replica needs to know. Each change raises `generation` by one."""

    name: str
    generation: Whole = Field(1, ge=1)
    versions: tuple[Version, ...] = ()
    adapters: tuple[Adapter, ...] = ()
    limits: Limits = Limits()
    engine: EngineSettings = EngineSettings()
    tokens: tuple[str, ...] = Field((), description="SHA-256 of each accepted token, in hex; none: no token is asked for")
    filters: str | None = Field(None, description="module:function of a content filter on the replica's own import path")

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        if not NAME.fullmatch(value):
            raise ValueError("must be 1 to 63 of a-z, 0-9, '.', '_' and '-', beginning with a letter or digit")
        return value

    @model_validator(mode="after")
    def _sound(self) -> Table:
        numbers = [v.version for v in self.versions]
        names = [a.name for a in self.adapters]
        if len(set(numbers)) < len(numbers) or len(set(names)) < len(names):
            raise ValueError("versions and adapters must differ")
        total = sum(v.share for v in self.versions)
        if self.versions and total and abs(total - 1) > 1e-6:
            raise ValueError(f"shares must add up to 1, got {total:g}")
        return self


def read_table(folder: str | Path) -> Table:
    """Returns the table of an endpoint's folder.

    Raises:
        InputError: there is none, or it is not one.
    """
    path = Path(folder) / TABLE
    try:
        return Table.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise wrong(str(folder), "is no endpoint: it has no endpoint.json.", "Deploy a model first.") from None
    except (ValidationError, ValueError) as error:
        raise wrong(str(path), f"is damaged ({str(error).splitlines()[0]}).", "Deploy the model again.") from None


def write_table(folder: str | Path, table: Table) -> None:
    """Replaces the table at once: a reader sees the old one or the new one."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    replace(folder / TABLE, table.model_dump_json(indent=1))


def replace(path: Path, text: str) -> None:
    """Writes a file aside, syncs it and renames it over the old one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def new_token(folder: str | Path) -> str:
    """Returns the endpoint's token, made where there is none; only its owner can read the file."""
    folder = Path(folder)
    path = folder / TOKEN
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_urlsafe(32))
    return path.read_text().strip()


def digest_of(token: str) -> str:
    """Returns what is stored of a token: its SHA-256 in hex."""
    return hashlib.sha256(token.encode()).hexdigest()


def replicas(folder: str | Path) -> list[dict]:
    """Returns what each replica last said of itself; a file that is being replaced is left out."""
    found = []
    for path in sorted((Path(folder) / REPLICAS).glob("*.json")):
        try:
            found.append(json.loads(path.read_text()))
        except (OSError, ValueError):
            continue
    return found
