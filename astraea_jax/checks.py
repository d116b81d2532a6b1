"""What is refused, and in which words: numbers out of range, fields of files that are not as said.

A `Refusal` is a mistake of whoever called, told in a message made to be read; any other ValueError
is a fault of the program or of a library, and keeps its traceback.
"""

import dataclasses
import math
import operator
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

SHOWN = 80
"""Letters of a value that a message shows."""

PROBLEMS = 20
"""Wrong fields of one file that a message lists."""


class Refusal(ValueError):
    """What was asked for can't be done; the message says expected, got, and what to do."""


def shown(value: Any) -> str:
    """A value for a message: its repr, cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, a list in itself
        text = f"a {type(value).__name__}"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text)} letters)"


def hold(name: str, value: Any, rule: "Rule") -> None:
    """Refuses, under its name, a value that a rule says is wrong."""
    problem = rule.problem(value)
    if problem is not None:
        raise Refusal(f"{name} {problem}")


def whole(name: str, value: Any, low: int, high: int, *, unit: str = "") -> int:
    """Returns `value` as an int if it is an integer (NumPy's too, no bool) in low..high.

    Raises:
      Refusal: it is not.
    """
    hold(name, value, Whole(low, high, unit))
    return operator.index(value)


def number(name: str, value: Any, low: float, high: float, *, above: bool = False) -> float:
    """Returns `value` as a float if it is a finite number in low..high.

    Args:
      name: of the value, for the message.
      value: an int or a float, NumPy's too; no bool.
      low: the least.
      high: the largest.
      above: whether `low` itself is refused.

    Raises:
      Refusal: it is not.
    """
    hold(name, value, Number(low, high, above))
    return float(value)


def array(name: str, value: Any, shape: str = "") -> Any:
    """Returns `value` if it is an array, NumPy's or JAX's (traced too).

    Args:
      name: of the value, for the message.
      value: anything.
      shape: what the message says of the shape that is expected.

    Raises:
      Refusal: it is none.
    """
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        expected = f"an array {shape}".rstrip()
        raise Refusal(f"{name} must be {expected}; got {shown(value)}")
    return value


def flag(name: str, value: Any) -> bool:
    """Returns `value` if it is True or False; raises Refusal otherwise."""
    hold(name, value, Flag())
    return value


def one_of(name: str, value: Any, allowed: Collection[Any]) -> Any:
    """Returns `value` if it is among `allowed`, by type and value.

    Raises:
      Refusal: it is not.
    """
    hold(name, value, OneOf(tuple(allowed)))
    return value


@runtime_checkable
class Rule(Protocol):
    """What a field of a file may hold."""

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value, as "must be ...; got ..."; None if nothing is."""
        ...


@dataclasses.dataclass(frozen=True)
class Whole:
    """An integer in low..high; no bool."""

    low: int
    high: int
    unit: str = ""

    def problem(self, value: Any) -> str | None:
        """See `Rule`."""
        kind = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if kind and self.low <= value <= self.high:
            return None
        unit = f" {self.unit}" if self.unit else ""
        return f"must be an integer in {self.low}..{self.high}{unit}; got {shown(value)}"


@dataclasses.dataclass(frozen=True)
class Number:
    """A finite number in low..high; no bool. With `above`, `low` itself is refused."""

    low: float
    high: float
    above: bool = False

    def problem(self, value: Any) -> str | None:
        """See `Rule`."""
        kind = isinstance(value, int | float | np.number) and not isinstance(value, bool)
        # Compared before any conversion: an int may be too large for a float.
        if kind and self.low <= value <= self.high and not (self.above and value == self.low):
            return None
        least = f"above {self.low:g}" if self.above else f"at least {self.low:g}"
        most = "" if math.isinf(self.high) else f" and at most {self.high:g}"
        return f"must be a number {least}{most}; got {shown(value)}"


@dataclasses.dataclass(frozen=True)
class Text:
    """A string of up to `longest` letters; not empty unless `empty`."""

    longest: int = 1000
    empty: bool = False

    def problem(self, value: Any) -> str | None:
        """See `Rule`."""
        least = 0 if self.empty else 1
        if isinstance(value, str) and least <= len(value) <= self.longest:
            return None
        return f"must be text of {least} to {self.longest} letters; got {shown(value)}"


@dataclasses.dataclass(frozen=True)
class Flag:
    """True or false."""

    def problem(self, value: Any) -> str | None:
        """See `Rule`."""
        return None if isinstance(value, bool) else f"must be true or false; got {shown(value)}"


@dataclasses.dataclass(frozen=True)
class OneOf:
    """One of some values; 1, 1.0 and True are three."""

    values: tuple[Any, ...]

    def problem(self, value: Any) -> str | None:
        """See `Rule`."""
        if any(type(value) is type(known) and value == known for known in self.values):
            return None
        known = " or ".join(map(shown, self.values))
        return f"must be {known}; got {shown(value)}"


@dataclasses.dataclass(frozen=True)
class ListOf:
    """A list of `low` to `high` values of one rule."""

    each: Rule
    low: int
    high: int

    def problem(self, value: Any) -> str | None:
        """See `Rule`."""
        if not isinstance(value, list | tuple) or not self.low <= len(value) <= self.high:
            count = self.low if self.low == self.high else f"{self.low} to {self.high}"
            got = f"{len(value)} values" if isinstance(value, list | tuple) else shown(value)
            return f"must be a list of {count} values; got {got}"
        for index, item in enumerate(value):
            problem = self.each.problem(item)
            if problem is not None:
                return f"[{index}] {problem}"
        return None


@dataclasses.dataclass(frozen=True)
class ByName:
    """An object of up to `most` values of one rule, by name."""

    each: Rule
    most: int = 1000

    def problem(self, value: Any) -> str | None:
        """See `Rule`."""
        if not isinstance(value, Mapping) or len(value) > self.most:
            got = f"{len(value)} names" if isinstance(value, Mapping) else shown(value)
            return f"must be an object of up to {self.most} names; got {got}"
        for key, item in value.items():
            problem = self.each.problem(item)
            if problem is not None:
                return f"{shown(key)} {problem}"
        return None


@dataclasses.dataclass(frozen=True)
class OrNone:
    """What another rule takes, or null."""

    rule: Rule

    def problem(self, value: Any) -> str | None:
        """See `Rule`."""
        return None if value is None else self.rule.problem(value)


@dataclasses.dataclass(frozen=True)
class EitherOf:
    """What any of several rules takes."""

    rules: tuple[Rule, ...]

    def problem(self, value: Any) -> str | None:
        """See `Rule`."""
        problems = [rule.problem(value) for rule in self.rules]
        return None if None in problems else " or ".join(map(str, problems))


@dataclasses.dataclass(frozen=True)
class Anything:
    """A field that is known and not used here."""

    def problem(self, value: Any) -> str | None:
        """See `Rule`."""
        return None


def fields(
    content: Any,
    rules: Mapping[str, Rule],
    *,
    name: str,
    required: Collection[str] = (),
    others: bool = False,
    advice: str = "mend the file or fetch it again",
) -> dict[str, Any]:
    """Returns an object's fields if every one is as its rule says.

    Args:
      content: what a file of JSON holds.
      rules: of each field that is known.
      name: of the file or object, for the message.
      required: fields that must be there.
      others: whether fields without a rule are let through (and left out of the result).
      advice: what the message proposes.

    Returns:
      The fields that have a rule and are there.

    Raises:
      Refusal: all that is wrong with it, in one message.
    """
    if not isinstance(content, Mapping):
        raise Refusal(f"expected {name} to be an object of fields; got {shown(content)}: {advice}")
    problems = [f"{key} is missing" for key in required if key not in content]
    for key, value in content.items():
        rule = rules.get(key)
        if rule is not None:
            problem = rule.problem(value)
            if problem is not None:
                problems.append(f"{key} {problem}")
        elif not others:
            problems.append(f"{shown(key)} is not known here; got {shown(value)}")
    refuse(name, problems, advice)
    return {key: value for key, value in content.items() if key in rules}


def refuse(name: str, problems: Sequence[str], advice: str) -> None:
    """Raises a Refusal that lists `problems`, if there are any."""
    if not problems:
        return
    if len(problems) == 1:
        raise Refusal(f"{name}: {problems[0]}; {advice}")
    lines = [f"  {problem}" for problem in problems[:PROBLEMS]]
    if len(problems) > PROBLEMS:
        lines.append(f"  and {len(problems) - PROBLEMS} more")
    raise Refusal("\n".join([f"{name}: {len(problems)} fields are wrong; {advice}", *lines]))
