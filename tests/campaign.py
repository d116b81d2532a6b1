"""Bad input drawn by rule: what a campaign tries, and how an answer is judged."""

import contextlib
import dataclasses
import inspect
import io
import os
import pathlib
import signal
import threading
import time
import types
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

from astraea_jax import cli
from astraea_jax.checks import Refusal

OWN_SECONDS = 1.0
"""What a refusal may take of the process's own time."""

HANGS = 5
"""Seconds after which a call is given up."""

LONG = "x" * 300


@dataclasses.dataclass(frozen=True)
class Trial:
    """One bad input.

    Attributes:
      name: what is tried.
      call: raises Refusal, or returns the exit code of a command.
    """

    name: str
    call: Callable[[], Any]


class _Hung(BaseException):
    """Raised by the alarm; no `except Exception` may take it for an answer."""


def judge(trial: Trial, folder: pathlib.Path) -> str | None:
    """What is wrong with the answer to a bad input; None if it was refused as it should be."""
    before = _tree(folder)
    fault = _answer(trial)
    if fault is not None and fault.startswith("took"):  # perhaps a module was imported for it
        fault = _answer(trial)
    left = sorted(_tree(folder) - before)
    if fault is None and left:
        fault = f"left {left[:3]}"
    return None if fault is None else f"{trial.name}: {fault}"


def _answer(trial: Trial) -> str | None:
    out, errors = io.StringIO(), io.StringIO()
    began = time.process_time()
    try:
        with _alarm(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            code = trial.call()
    except Refusal as refusal:
        if not str(refusal).strip():
            return "refused without a word"
    except _Hung:
        return f"not refused within {HANGS} s"
    except BaseException as error:
        return f"crashed: {type(error).__name__}: {str(error)[:200]}"
    else:
        said = errors.getvalue()
        if code != 2:
            return f"accepted, with {code!r}: {said[-200:]!r}"
        if "Traceback" in said or "astraea: " not in said:
            return f"refused in other words: {said[-300:]!r}"
    seconds = time.process_time() - began
    return f"took {seconds:.1f} s of its own time" if seconds > OWN_SECONDS else None


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    def hung(*_):
        raise _Hung

    assert threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(HANGS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _tree(folder: pathlib.Path) -> set[str]:
    return {
        os.path.join(root, name)
        for root, folders, names in os.walk(folder)
        for name in (*folders, *names)
    }


BAD_INTEGERS = ("-1", "1000000000000000000000000000000", "1.5", "nan", "many", "")
BAD_NUMBERS = ("nan", "inf", "-inf", "1e308", "much", "")
BAD_WORDS = ("nonsense",)

OUTPUTS = {"output", "folder", "ship"}
"""Options that name what is written; other paths are read."""

LEGITIMATE = {
    # A negative scale is no guidance, as any below 1.
    ("guidance", "-inf"): False,
    # No limit is what "inf" says.
    ("bench denoise", "seconds", "inf"): True,
}


def commands() -> dict[str, tuple[Callable, list[str]]]:
    """Every command, and the words that it needs besides options."""
    needed = {
        "generate": ["a red circle"],
        "convert": ["tiny", "--output", "made"],
        "search": ["--budget", "0.5"],
        "bench collect": ["--study", "search", "--output", "made.json"],
        "bench gpu": ["--output", "made.json"],
    }
    every = {name: command for name, command in cli.COMMANDS.items() if name != "bench"}
    every |= {f"bench {name}": command for name, command in cli.BENCHES.items()}
    return {name: (command, needed.get(name, [])) for name, command in every.items()}


def option_trials(special: dict[str, pathlib.Path]) -> Iterator[Trial]:
    """Every option of every command with values that its type says are bad."""
    for name, (command, needed) in commands().items():
        hints = typing.get_type_hints(command, include_extras=True)
        for parameter in inspect.signature(command).parameters.values():
            if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
                continue
            option = _option(parameter.name, hints[parameter.name])
            kind = _kind(hints[parameter.name])
            for value in bad_values(parameter.name, kind, special):
                if LEGITIMATE.get((name, parameter.name, value)):
                    continue
                words = [*name.split(), *_without(needed, option), f"{option}={value}"]
                said = f"astraea {' '.join(words)}"
                yield Trial(said[:160], lambda words=words: cli.main(words))


def bad_values(name: str, kind: Any, special: dict[str, pathlib.Path]) -> list[str]:
    """Values that an option of this type can't have."""
    if kind is int:
        return list(BAD_INTEGERS)
    if kind is float:
        return list(BAD_NUMBERS)
    if kind is pathlib.Path:
        places = ("dangling", "loop", "missing folder", "long", "fifo")
        unread = ("fifo", "device", "folder", "missing", "empty", "binary", "deep")
        return [os.fspath(special[place]) for place in (places if name in OUTPUTS else unread)]
    if typing.get_origin(kind) is Literal:
        return list(BAD_WORDS)
    if name in ("model", "from_", "lora"):
        return [os.fspath(special[place]) for place in ("fifo", "device", "missing", "empty")]
    return []


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


def special_files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """What may stand where a file should."""
    made = {
        name: folder / f"{name}.json"
        for name in ("fifo", "device", "folder", "missing", "empty", "binary", "deep", "loop")
    }
    os.mkfifo(made["fifo"])
    made["device"].symlink_to("/dev/zero")
    made["folder"].mkdir()
    made["empty"].touch()
    made["binary"].write_bytes(bytes(range(256)) * 64)
    made["deep"].write_text("[" * 200_000)
    made["loop"].symlink_to(made["loop"])
    made["dangling"] = folder / "dangling.json"
    made["dangling"].symlink_to(folder / "nothing")
    made["missing folder"] = folder / "nowhere" / "out.json"
    made["long"] = folder / f"{LONG}.json"
    return made


BAD_JSON = {
    bool: (0, 1, "true", None, [True], {"a": True}),
    int: (-1, 0, True, 0.5, "4", 10**9, 10**30, None, [4], {"a": 4}, float("nan"), "NaN"),
    float: (-1e300, True, "0.5", 10**400, None, [0.5], {"a": 0.5}, "NaN", float("inf")),
    str: (0, True, "", None, ["a"], {"a": "b"}, "nonsense", "x" * 2000),
    list: (0, "text", None, [], [None], [["a"]], {"a": 1}, [10**30], [True] * 5000),
    dict: (0, "text", [], [1]),
    type(None): (),
}
"""Wrong values of a field by the type of its right one."""


def field_values(right: Any) -> tuple[Any, ...]:
    """Wrong values of a field whose right one is known."""
    return tuple(value for value in BAD_JSON[type(right)] if value != right)
