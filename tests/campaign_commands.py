"""Bad words, options and values of every command."""

import dataclasses
import inspect
import os
import pathlib
import types
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

from campaign import UNREAD, UNWRITTEN, Trial

from astraea_jax import cli

BAD_INTEGERS = ("-1", "1000000000000000000000000000000", "1.5", "nan", "many", "")
BAD_NUMBERS = ("nan", "inf", "-inf", "1e308", "much", "")
BAD_WORDS = ("nonsense", "")

OUTPUTS = {"output", "folder"}
"""Options that name what is written; other paths are read."""

FOLDERS = {
    *(("search", "folder"), ("sensitivity", "folder")),
    *(("train-tiny", "output"), ("convert", "output")),
}
"""Outputs that are folders: they are made with those that they lie in."""

LEGITIMATE = {
    # No limit is what "inf" says.
    ("bench denoise", "seconds", "inf"),
}


def commands() -> dict[str, tuple[Callable, list[str]]]:
    """Every command, and the words that it needs besides options."""
    needed = {
        "generate": ["a red circle"],
        "convert": ["tiny", "--output", "made"],
        "search": ["--budget", "0.5"],
    }
    every = {name: command.load() for name, command in cli.COMMANDS.items() if name != "bench"}
    every |= {f"bench {name}": command.load() for name, command in cli.BENCHES.items()}
    return {name: (command, needed.get(name, [])) for name, command in every.items()}


def word_trials() -> Iterator[Trial]:
    """Commands that there are not, options that a command does not have, words too many."""
    spoken = [["nonsense"], ["bench", "nonsense"], ["bench"], [""], ["\0"], ["--steps", "4"]]
    for name, (_, needed) in commands().items():
        words = [*name.split(), *needed]
        spoken += [[*words, "--no-such-option"], [*words, "one too many"], [*words, "-q"]]
        if needed:
            spoken.append(name.split())
    spoken += [["generate", ""], ["generate", " "], ["generate", "a red circle", "--steps"]]
    for words in spoken:
        yield Trial(f"astraea {' '.join(words)!r}", lambda words=words: cli.main(words))


def option_trials(special: dict[str, pathlib.Path]) -> Iterator[Trial]:
    """Every option of every command with values that its type says are bad."""
    for name, (command, needed) in commands().items():
        for option, field, hint in _options(command):
            for value in bad_values(name, field, hint, special):
                if (name, field, value) in LEGITIMATE:
                    continue
                words = [*name.split(), *_without(needed, option), f"{option}={value}"]
                said = f"astraea {' '.join(words)}"
                yield Trial(said[:160], lambda words=words: cli.main(words))


def _options(command: Callable) -> Iterator[tuple[str, str, Any]]:
    """How each option of a command is spelled, its name, and its type."""
    hints = typing.get_type_hints(command, include_extras=True)
    for parameter in inspect.signature(command).parameters.values():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        hint = hints[parameter.name]
        if not dataclasses.is_dataclass(_kind(hint)):
            yield _option(parameter.name, hint), parameter.name, hint
            continue
        for field, inner in typing.get_type_hints(_kind(hint), include_extras=True).items():
            yield _option(field, inner), field, inner


def bad_values(
    command: str, name: str, hint: Any, special: dict[str, pathlib.Path]
) -> tuple[str, ...]:
    """Values that an option of this type can't have."""
    kind = _kind(hint)
    if kind is int:
        return BAD_INTEGERS
    if kind is float:
        return BAD_NUMBERS
    if kind is pathlib.Path:
        places = UNWRITTEN if name in OUTPUTS else UNREAD
        if (command, name) in FOLDERS:
            places = [place for place in places if place != "missing folder"]
        return tuple(os.fspath(special[place]) for place in places)
    if typing.get_origin(kind) is Literal:
        return BAD_WORDS
    if name in ("model", "from_", "lora"):
        return tuple(os.fspath(special[place]) for place in UNREAD)
    return ()


def _option(name: str, hint: Any) -> str:
    """How an option is spelled."""
    if typing.get_origin(hint) is Annotated:
        for about in hint.__metadata__:
            name = getattr(about, "name", None) or name
    return "--" + name.replace("_", "-")


def _kind(hint: Any) -> Any:
    """The type of one value of an option."""
    while True:
        origin, inside = typing.get_origin(hint), typing.get_args(hint)
        if origin is Annotated:
            hint = inside[0]
        elif origin in (typing.Union, types.UnionType):
            hint = next(part for part in inside if part is not type(None))
        elif origin in (tuple, list):
            hint = inside[0]
        else:
            return hint


def _without(words: list[str], option: str) -> list[str]:
    """The words that a command needs, without an option that is tried."""
    if option not in words:
        return words
    place = words.index(option)
    return words[:place] + words[place + 2 :]
