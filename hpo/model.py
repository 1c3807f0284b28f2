"""A model on the register: what it is, where it came from, how it did, and where it stands.

Owns: `Model`, its stages. Must not know: how it is made (promote), kept (store) or served (endpoint).
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from hpo.certificate import Interval, Retained, Scored
from training.recipe import Frozen, Recipe

# candidate: registered, answers nobody yet. live: answers. previous: answered before the live one; what a rollback returns to.
# retired: answered once. removed: its files are gone, its number is never given again.
Stage = Literal["candidate", "live", "previous", "retired", "removed"]


class Lineage(Frozen):
    """All that is needed to make the model again."""

    study: str
    trial: int
    recipe: Recipe
    rows: Literal["train", "all"] = Field(description="what the kept adapter was trained on: all is training and validation rows")
    data: dict[str, Any] = Field(description="a DataConfig: the study's own copy of the rows")
    digest: str = Field(description="SHA-256 of the rows")
    base: str = Field(description="the base model's name as written, and of a hub's model its commit")
    machine: dict[str, Any] = Field(default_factory=dict, description="device and versions of the libraries")


class Model(Frozen):
    """One version of a model. `key` names the promotion that made it, `digest` its manifest."""

    name: str
    version: int
    stage: Stage = "candidate"
    key: str
    folder: str
    digest: str
    created: float
    lineage: Lineage
    kept: Literal["trial", "retrained"]
    why: str = Field(description="why this one of trial and retrained model was kept")
    refused: str = Field("", description="why it may not be deployed; empty where it may")
    scores: tuple[Scored, ...] = ()
    gain: Interval | None = Field(None, description="accuracy of the model minus that of the untuned base, paired over rows")
    retained: Retained | None = Field(None, description="what it and the untuned base know of the study's general text")
    checks: dict[str, Any] = Field(default_factory=dict, description="merged against adapter: differences and their bounds")
    interventions: tuple[dict[str, Any], ...] = Field((), description="what the retraining did about steps that went wrong")
    prompts: tuple[tuple[str, str], ...] = Field((), description="real prompts with the answers that the merged model must give")

    @property
    def label(self) -> str:
        """What people call it: name@v3."""
        return f"{self.name}@v{self.version}"
