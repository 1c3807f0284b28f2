"""What a user can get wrong about a model, data or a recipe, said so that it can be put right.

Owns: `Problem` (where, rule, value, remedy) and `InputError`, which carries all the problems found at once.
Must not know: studies, stores, Ray.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One mistake: `where` it stands, the `rule` it breaks with the value, and the `remedy`."""

    where: str
    rule: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.rule}" + (f" {self.remedy}" if self.remedy else "")


class InputError(Exception):
    """The user's mistake, with every problem that was found. Picklable: it crosses worker borders."""

    def __init__(self, *problems: Problem):
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))

    def __reduce__(self):
        return type(self), self.problems


def wrong(where: str, rule: str, remedy: str = "") -> InputError:
    """Returns an InputError with one problem; raise it."""
    return InputError(Problem(where, rule, remedy))


class WorkersLost(Exception):
    """A worker process or its node died: not the recipe's fault."""


class WorkersFailed(Exception):
    """The training code raised: the same recipe would raise it again."""
