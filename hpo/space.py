"""What may vary: some Recipe fields with ranges.

Owns: `Space` and its dimensions, sampling and encoding of points, and the way from Params to a Recipe.
Must not know: trials, algorithms, files.

A point of a space (`Params`) is a dict from Recipe field to a plain Python value. Where a dimension says `times: rank`,
the point holds the factor and the Recipe gets factor x rank. A dimension with `when` exists only at points where
another choice has the given value, or one of those given; elsewhere the field keeps its default.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from random import Random
from typing import Annotated, Any, Literal

from pydantic import Field, RootModel, StrictBool, ValidationError, model_validator

from training.recipe import Frozen, Number, Recipe, Whole

Value = bool | int | float | str
Params = dict[str, Value]
LENGTHS = ("epochs", "steps", "tokens")
"""A recipe has at most one of these."""
MIX = "mix."
"""Begins the name of a dimension that is the weight of one source: `mix.chat` is `mix: {chat: ...}` of the recipe."""


def in_recipe(name: str) -> bool:
    """Says whether a dimension of this name means something: a field of a recipe, or the weight of a source."""
    return name in Recipe.model_fields or (name.startswith(MIX) and name != MIX)


def value_of(recipe: Recipe, name: str) -> Any:
    """Returns what a recipe has for a dimension; None for a source's weight that it leaves to the data."""
    return (recipe.mix or {}).get(name.removeprefix(MIX)) if name.startswith(MIX) else getattr(recipe, name)


class _Dimension(Frozen):
    times: str | None = Field(None, description="another dimension or field of the recipe that the value is multiplied by")
    when: dict[str, Value | tuple[Value, ...]] | None = Field(
        None, description="exists only where the other choice has this value, or one of these"
    )


class Float(_Dimension):
    """A real number in [low, high], uniform or log-uniform."""

    type: Literal["float"] = "float"
    low: Number
    high: Number
    log: StrictBool = False

    @model_validator(mode="after")
    def _ordered(self):
        return _ordered(self)

    def sample(self, rng: Random) -> float:
        return self.decode(rng.random())

    def decode(self, unit: float) -> float:
        """Returns the value at `unit` in [0, 1] of the range."""
        if self.log:
            value = math.exp(math.log(self.low) + unit * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + unit * (self.high - self.low)
        return min(max(value, self.low), self.high)

    def levels(self, count: int) -> list[float]:
        """Returns `count` values evenly spread over the range."""
        return [self.decode(i / (count - 1)) if count > 1 else self.decode(0.5) for i in range(count)]

    def contains(self, value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and self.low <= value <= self.high

    @property
    def size(self) -> float:
        return math.inf


class Int(_Dimension):
    """A whole number in [low, high], uniform or log-uniform, on a grid of `step`."""

    type: Literal["int"] = "int"
    low: Whole
    high: Whole
    log: StrictBool = False
    step: Whole = 1

    @model_validator(mode="after")
    def _ordered(self):
        if self.step < 1:
            raise ValueError(f"step must be at least 1, got step={self.step}")
        if (self.high - self.low) % self.step and self.low < self.high:
            raise ValueError(f"step must divide high - low, got step={self.step} and {self.high - self.low}")
        if self.log and self.step != 1:
            raise ValueError(f"step must be 1 with log: true, got step={self.step}")
        return _ordered(self)

    def sample(self, rng: Random) -> int:
        return self.decode(rng.random())

    def decode(self, unit: float) -> int:
        """Returns the value at `unit` in [0, 1] of the range; every value has an equal share (of the log range)."""
        if self.log:
            value = int(math.exp(math.log(self.low) + unit * (math.log(self.high + 1) - math.log(self.low))))
        else:
            value = self.low + int(unit * self.size) * self.step
        return min(max(value, self.low), self.high)

    def levels(self, count: int) -> list[int]:
        """Returns at most `count` distinct values evenly spread over the range."""
        if self.size <= count:
            return list(range(self.low, self.high + 1, self.step))
        if count == 1:
            return [self.decode(0.5)]
        ends = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        raw = [ends[0] + (ends[1] - ends[0]) * i / (count - 1) for i in range(count)]
        values = [math.exp(value) if self.log else value for value in raw]
        return sorted({self.low + round((value - self.low) / self.step) * self.step for value in values})

    def contains(self, value: Any) -> bool:
        whole = isinstance(value, int) and not isinstance(value, bool)
        return whole and self.low <= value <= self.high and (value - self.low) % self.step == 0

    @property
    def size(self) -> float:
        return (self.high - self.low) // self.step + 1


class Choice(_Dimension):
    """One of the listed values, in no order."""

    type: Literal["choice"] = "choice"
    values: tuple[Value, ...]

    @model_validator(mode="after")
    def _distinct(self):
        if not self.values:
            raise ValueError("values must not be empty")
        if len({(isinstance(value, bool), value) for value in self.values}) < len(self.values):
            raise ValueError(f"values must differ, got {list(self.values)}")
        return self

    def sample(self, rng: Random) -> Value:
        return rng.choice(self.values)

    def decode(self, unit: float) -> Value:
        return self.values[min(int(unit * len(self.values)), len(self.values) - 1)]

    def levels(self, count: int) -> list[Value]:
        return list(self.values)

    def contains(self, value: Any) -> bool:
        return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in self.values)

    @property
    def size(self) -> float:
        return len(self.values)


def _ordered(dimension):
    if dimension.low >= dimension.high:
        raise ValueError(f"low must be below high, got low={dimension.low} and high={dimension.high}. Swap them")
    if dimension.log and dimension.low <= 0:
        raise ValueError(f"low must be above 0 with log: true, got low={dimension.low}")
    return dimension


Dimension = Annotated[Float | Int | Choice, Field(discriminator="type")]


class Space(RootModel[dict[str, Dimension]]):
    """Recipe fields and their ranges. Iteration order is the order in which the user wrote them."""

    model_config = {"frozen": True}

    def __getitem__(self, name: str) -> Float | Int | Choice:
        return self.root[name]

    def __iter__(self):
        return iter(self.root)

    def __len__(self) -> int:
        return len(self.root)

    def items(self):
        return self.root.items()

    @property
    def size(self) -> float:
        """The number of distinct points, infinite with a float dimension; conditions are respected."""
        if any(math.isinf(dimension.size) for dimension in self.root.values()):
            return math.inf
        controllers, branches = self._branches(levels=None)
        rests = ([self[name].size for name in rest if name not in controllers] for _, rest in branches)
        return sum(math.prod(sizes) for sizes in rests)

    def active(self, params: Mapping[str, Value]) -> list[str]:
        """Returns the names of the dimensions that exist at a point."""
        return [name for name, dimension in self.items() if _holds(dimension.when, params)]

    def sample(self, rng: Random) -> Params:
        """Returns a random point."""
        return self.trim({name: dimension.sample(rng) for name, dimension in self.items()})

    def trim(self, params: Mapping[str, Value]) -> Params:
        """Returns the point without the dimensions that do not exist there."""
        return {name: params[name] for name in self.active(params)}

    def contains(self, params: Mapping[str, Value]) -> bool:
        """Says whether a point lies in the space, with exactly the dimensions that exist there."""
        return set(params) == set(self.active(params)) and all(self[name].contains(value) for name, value in params.items())

    def grid(self, levels: int) -> list[Params]:
        """Returns the full grid with at most `levels` values on each range, in a fixed order without duplicates."""
        return list(self.walk(levels))

    def walk(self, levels: int) -> Iterator[Params]:
        """Yields the points of the grid one by one, in its order.

        Choices that others depend on vary slowest; apart from that a dimension varies faster than those before it.
        """
        controllers, branches = self._branches(levels)
        for known, active in branches:
            rest = [name for name in active if name not in controllers]
            for values in itertools.product(*(self[name].levels(levels) for name in rest)):
                point = known | dict(zip(rest, values, strict=True))
                yield {name: point[name] for name in active}

    def _branches(self, levels: int | None) -> tuple[list[str], Iterator[tuple[Params, list[str]]]]:
        # The dimensions that others depend on, and for each assignment to them the names of all that exist there. A
        # grid or a size built branch by branch never meets a point twice, nor runs through what does not exist.
        needed = {other for dimension in self.root.values() for other in dimension.when or {}}
        controllers = [name for name in self if name in needed]
        axes = [self[name].levels(levels or int(self[name].size)) for name in controllers]
        known = (dict(zip(controllers, values, strict=True)) for values in itertools.product(*axes))
        return controllers, ((values, self.active(values)) for values in known)

    def resolve(self, params: Mapping[str, Value], defaults: Recipe) -> Recipe:
        """Returns the Recipe of a point: the defaults, overwritten, with `times` multiplied out.

        Raises:
            pydantic.ValidationError: a value is outside what Recipe allows.
        """
        mix = {name.removeprefix(MIX): value for name, value in params.items() if name.startswith(MIX)}
        values = defaults.model_dump() | {name: value for name, value in params.items() if not name.startswith(MIX)}
        if mix:
            values["mix"] = (defaults.mix or {}) | mix
        for name in params:
            if (factor := self[name].times) and not name.startswith(MIX):
                product = params[name] * values[factor]
                values[name] = int(product) if isinstance(product, float) and product.is_integer() else product
        if any(name in params for name in LENGTHS):
            values |= {name: None for name in LENGTHS if name not in params}
        return Recipe(**values)

    def project(self, recipe: Recipe) -> Params | None:
        """Returns the point of a Recipe, or None where the Recipe lies outside the space."""
        raw = recipe.model_dump()
        if raw["epochs"] is None and raw["steps"] is None and raw["tokens"] is None:
            raw["epochs"] = 1
        params: Params = {}
        for name, dimension in self.items():
            value = (raw["mix"] or {}).get(name.removeprefix(MIX)) if name.startswith(MIX) else raw[name]
            if dimension.times and value is not None:
                if not raw[dimension.times]:
                    return None
                # 0.1 x 3 / 3 is not 0.1; to 12 digits it is, as in `key`.
                value = float(f"{value / raw[dimension.times]:.12g}")
            if isinstance(dimension, Choice):
                value = next((one for one in dimension.values if one == value), value)
            elif isinstance(dimension, Int) and isinstance(value, float) and value.is_integer():
                value = int(value)
            params[name] = value
        active = self.trim(params)
        return active if self.contains(active) else None


def _holds(when: Mapping[str, Value | tuple[Value, ...]] | None, params: Mapping[str, Value]) -> bool:
    return all(params.get(name) in _listed(value) for name, value in (when or {}).items())


def _listed(value: Value | tuple[Value, ...]) -> tuple[Value, ...]:
    return value if isinstance(value, tuple) else (value,)


def key(params: Mapping[str, Value]) -> tuple:
    """Returns a hashable identity of a point; floats count to 12 digits, so that a round trip through JSON agrees."""
    # Python holds True == 1; a choice does not.
    digits = ((name, float(f"{v:.12g}") if isinstance(v, float) else v) for name, v in params.items())
    return tuple(sorted((name, isinstance(v, bool), v) for name, v in digits))


def problems(space: Space, defaults: Recipe) -> list[tuple[str, str]]:
    """Returns (dimension, what is wrong) for dimensions that do not fit Recipe or each other."""
    found = []
    for name, dimension in space.items():
        if not in_recipe(name):
            continue  # said by the caller, who knows the nearest name
        if dimension.times is not None:
            if dimension.times not in Recipe.model_fields or dimension.times == name or name.startswith(MIX):
                found.append((f"{name}.times", f"must be another field of the recipe, got {dimension.times}"))
                continue
            if space.root.get(dimension.times) is not None and space[dimension.times].times:
                found.append((f"{name}.times", f"{dimension.times} is itself a multiple; chain no multiples"))
                continue
            if not all(_number(value) for value in _ends(dimension) + _factors(space, dimension, defaults)):
                found.append((f"{name}.times", f"{name} and {dimension.times} must both be numbers to be multiplied"))
                continue
        for other, value in (dimension.when or {}).items():
            controller = space.root.get(other)
            if not isinstance(controller, Choice) or controller.when:
                found.append((f"{name}.when", f"must name an unconditional choice of the space, got {other}"))
            else:
                for one in _listed(value):
                    if not controller.contains(one):
                        found.append((f"{name}.when.{other}", f"must be one of {list(controller.values)}, got {one!r}"))
        found += _outside_recipe(space, name, dimension, defaults)
    return found or _refused_together(space, defaults)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _ends(dimension: Float | Int | Choice) -> list[Value]:
    return list(dimension.values) if isinstance(dimension, Choice) else [dimension.low, dimension.high]


def _factors(space: Space, dimension: Float | Int | Choice, defaults: Recipe) -> list[Any]:
    if not dimension.times:
        return [1]
    partner = space.root.get(dimension.times)
    return _ends(partner) if partner is not None else [getattr(defaults, dimension.times)]


def _outside_recipe(space: Space, name: str, dimension, defaults: Recipe) -> list[tuple[str, str]]:
    # The ends of a range and every choice must be legal values of the field; a multiple is tried at its partner's ends.
    found = []
    tried = [(f"{name}.{end}", value) for end, value in zip(("low", "high"), _ends(dimension), strict=False)]
    if isinstance(dimension, Choice):
        tried = [(f"{name}.values[{index}]", value) for index, value in enumerate(dimension.values)]
    elif isinstance(dimension, Float):
        tried.append((f"{name}.type", dimension.decode(0.38196601125)))  # a field of whole numbers may accept both ends
    for where, value in tried:
        if found and where.endswith(".type"):
            break  # said of an end already
        for factor in _factors(space, dimension, defaults):
            trial = value * factor if dimension.times else value
            field, _, source = name.partition(".")
            try:
                Recipe(**{field: {source: trial} if source else trial})
            except ValidationError as error:
                # What Recipe says of several fields at once depends on the others, see _refused_together.
                said = [problem for problem in error.errors() if problem["loc"][:1] == (field,)]
                if not said:
                    continue
                found.append((where, f"{_rule(said[0])}, got {trial!r}"))
                break
    return found


def _refused_together(space: Space, defaults: Recipe) -> list[tuple[str, str]]:
    # Fields that are legal one by one may not go together. Such rules are about choices, so ranges stay in the middle;
    # the cap keeps a space of many choices from delaying the start.
    for point in itertools.islice(space.walk(1), 4096):
        try:
            space.resolve({name: value for name, value in point.items() if in_recipe(name)}, defaults)
        except ValidationError as error:
            rule = _rule(error.errors()[0])
            where = next((name for name in point if name in rule), next(iter(point)))
            return [(where, f"{rule}, at {point}")]
    return []


def _rule(problem: Mapping[str, Any]) -> str:
    said = problem["msg"].removeprefix("Value error, ")
    return said[0].lower() + said[1:]
