"""How a command ends: by itself, by a signal, or with something to say on stderr."""

import contextlib
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator

from astraea_jax import files
from astraea_jax.checks import Refusal

ENDING = ("SIGTERM", "SIGHUP")
"""Signals that end a program, beside Ctrl-C; what a platform lacks is passed over."""

LONGEST = 2000
"""Letters of a line that is said."""


class Ended(KeyboardInterrupt):
    """A signal has come: everything is cleaned up as after Ctrl-C."""


@contextlib.contextmanager
def by_exception() -> Iterator[None]:
    """Makes an exception of the signals that end a program, where it is the default that they do.

    Only a main thread may set handlers; those of a program that calls `main` stay.
    """
    taken = []
    if threading.current_thread() is threading.main_thread():
        known = [getattr(signal, name) for name in ENDING if hasattr(signal, name)]
        taken = [each for each in known if signal.getsignal(each) == signal.SIG_DFL]

    def end(number: int, _frame) -> None:
        for each in taken:  # what cleans up is not ended
            signal.signal(each, signal.SIG_IGN)
        raise Ended(number)

    for each in taken:
        signal.signal(each, end)
    try:
        yield
    finally:
        for each in taken:
            signal.signal(each, signal.SIG_DFL)


def print_in_escapes() -> None:
    """A name that is no text in stdout's encoding is printed in escapes, as on stderr."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def flush() -> None:
    """Writes what stdout still holds; there is none where it was closed from the start.

    Raises:
      Refusal: it is closed or full; it is let go, or Python would fail once more when it ends.
    """
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError as error:
        with contextlib.suppress(OSError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        raise Refusal(f"can't print what was found ({files.reason(error)})") from error


def of_the_system(error: OSError) -> int:
    """Says in one line what the operating system refused, and about which files."""
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    with contextlib.suppress(Refusal):
        flush()
    return say(": ".join([*names, files.reason(error)]))


def say(message: str, code: int = 2) -> int:
    """Says why on stderr, if there is one; returns the exit code, by default that of a mistake."""
    with contextlib.suppress(OSError):
        lines = "\n".join(map(_cut, message.strip().splitlines()))
        print(f"astraea: {lines}", file=sys.stderr, flush=True)
    return code


def _cut(line: str) -> str:
    """A line of a sane length, whatever a library has put into it."""
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}... ({len(line)} letters)"


def show_warning(said: set[str], message, *_args, **_kwargs) -> None:
    """Says a warning once; of JAX's about each program that it can't keep, the first."""
    text = " ".join(str(message).split())
    kept = re.match(
        r"Error (?:reading|writing) persistent compilation cache entry for \S+ (.*)", text
    )
    text = f"compiled programs can't be kept: {kept[1]}" if kept else text
    topic = text.partition(":")[0] if kept else text
    if topic not in said:
        said.add(topic)
        say(f"warning: {text}")
