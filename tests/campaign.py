"""Bad input drawn by rule: what a campaign tries, and how an answer is judged."""

import contextlib
import dataclasses
import io
import os
import pathlib
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np

from astraea_jax.checks import Refusal

OWN_SECONDS = 1.0
"""What a refusal may take of the process's own time."""

HANGS = 5
"""Seconds of the process's own time after which a call is given up."""

BLOCKS = 60
"""Seconds of waiting after which a call is given up: for a pipe that nobody writes into, say."""

TRIES = 3
"""A refusal is timed so often at most: the first may import a module, or share a core."""

MEMORY = 8 << 30
"""Bytes that the whole campaign may take beside what the process has."""

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
    for _ in range(TRIES - 1):
        if fault is not None and fault.startswith("took"):
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
        if not isinstance(code, int) or code != 2:
            return f"accepted, with {str(code)[:200]!r}: {said[-200:]!r}"
        if "Traceback" in said or "astraea: " not in said:
            return f"refused in other words: {said[-300:]!r}"
    seconds = time.process_time() - began
    return f"took {seconds:.1f} s of its own time" if seconds > OWN_SECONDS else None


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    def hung(*_):
        raise _Hung

    assert threading.current_thread() is threading.main_thread()
    clocks = {
        signal.SIGALRM: (signal.ITIMER_REAL, BLOCKS),
        signal.SIGPROF: (signal.ITIMER_PROF, HANGS),
    }
    before = {number: signal.signal(number, hung) for number in clocks}
    for clock, seconds in clocks.values():
        signal.setitimer(clock, seconds)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for number, (clock, _) in clocks.items():
            signal.setitimer(clock, 0)
            signal.signal(number, before[number])


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """Lets what asks for far too much memory fail, instead of the machine."""
    import resource  # not on Windows, where the campaign is not run

    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _tree(folder: pathlib.Path) -> set[str]:
    return {
        os.path.join(root, name)
        for root, folders, names in os.walk(folder)
        for name in (*folders, *names)
    }


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


UNREAD = ("fifo", "device", "folder", "missing", "empty", "binary", "deep", "loop", "long")
"""Of `special_files`, what can't be read."""

UNWRITTEN = ("dangling", "loop", "missing folder", "long", "fifo")
"""Of `special_files`, where nothing can be written."""

BAD_JSON = {
    bool: (0, 1, "true", None, [True], {"a": True}),
    int: (-1, 0, True, 0.5, "4", 10**9, 10**30, None, [4], {"a": 4}, float("nan"), "NaN"),
    float: (-1e300, True, "0.5", 10**400, None, [0.5], {"a": 0.5}, "NaN", float("inf")),
    str: (0, True, "", None, ["a"], {"a": "b"}, "nonsense", "x" * 2000),
    list: (0, "text", None, [], [None], [["a"]], {"a": 1}, [10**30], [True] * 5000),
    dict: (0, "text", [], [1]),
    type(None): (),
}
"""Wrong values of a field of a file by the type of its right one."""

OTHER = '{"a": 1}'
BROKEN = ("", "{", "[]", "null", "3", '"text"', "\x00", "[" * 100_000, OTHER)
"""Texts that no file of JSON fields has."""


def field_values(right: Any) -> tuple[Any, ...]:
    """Wrong values of a field whose right one is known."""
    return tuple(value for value in BAD_JSON[type(right)] if value != right)


_OBJECTS = (None, [1], {"a": 1}, object, b"bytes")

WHOLE = (-1, 10**30, 0.5, np.nan, np.inf, 1e308, "4", True, *_OBJECTS)
NUMBER = (np.nan, np.inf, -np.inf, 1e308, 10**400, "4", True, *_OBJECTS)
WORD = ("nonsense", "", LONG, 3, True, *_OBJECTS)
FLAG = ("yes", 2, *_OBJECTS)
LIST = (3, "text", (), (None,), (np.nan,), ("a", "b", "c"), (10**30,) * 4, None, {"a": 1}, object)
ARRAY = (
    *(3, "text", np.float32(3), np.zeros(0, np.float32), np.zeros((2, 0, 3), np.float32)),
    *(np.array(["a"]), np.array([None]), np.zeros((2, 3, 5, 7, 11, 13), np.float32), [[1.0], 2.0]),
    *_OBJECTS,
)
NAME = ("a\0b", 3, *_OBJECTS)
"""Wrong arguments by kind; a name is that of a file or folder."""

BY_TYPE = {int: WHOLE, float: NUMBER, bool: FLAG, str: WORD, tuple: LIST}


def trials(
    name: str, function: Callable[[Any], Any], values: Iterable[Any], but: tuple = ()
) -> Iterator[Trial]:
    """A function with each of some wrong values; `but` are those that are right for it."""
    for value in values:
        if any(type(value) is type(right) and value == right for right in but):
            continue
        shown = value.__name__ if isinstance(value, type) else repr(value)[:40]
        yield Trial(f"{name}: {shown}", lambda value=value: function(value))


def dataclass_trials(right: Any, but: dict[str, tuple] | None = None) -> Iterator[Trial]:
    """Each field of a dataclass with wrong values of its type."""
    for field, hint in get_type_hints(type(right)).items():
        if field not in {each.name for each in dataclasses.fields(right)}:
            continue
        kind = str if get_origin(hint) is Literal else type(getattr(right, field))
        optional = type(None) in get_args(hint)
        allowed = ((None,) if optional else ()) + (but or {}).get(field, ())
        yield from trials(
            f"{type(right).__name__}.{field}",
            lambda value, field=field: dataclasses.replace(right, **{field: value}),
            BY_TYPE.get(kind, _OBJECTS),
            allowed,
        )
