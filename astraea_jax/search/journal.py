"""An append-only journal of every evaluation of a search: the search goes on from it.

A search draws the same schedules from the same key, and those that the journal holds are not
computed again.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from astraea_jax import checks, files
from astraea_jax.checks import Refusal
from astraea_jax.schedule import LEVELS, Schedule
from astraea_jax.search.scoring import Evaluation

JOURNAL = "journal.jsonl"

JOURNAL_BYTES = 1 << 30
"""The largest journal that is read: two million evaluations of fifty steps."""

_OPENING = b'{"header": '
"""What a journal begins with."""

_HEADER = {"header": checks.ByName(checks.Anything())}

_ERROR = checks.EitherOf((checks.Number(0, 1e39), checks.OneOf(("nan", "inf", "-inf"))))

_FIELDS = {
    "levels": checks.ListOf(checks.Whole(0, LEVELS), 1, 10_000),
    "errors": checks.ListOf(_ERROR, 1, 10_000),
    "seconds": checks.Number(0, 1e9),
    "stopped": checks.Flag(),
    "search": checks.Text(1000, empty=True),
}
"""What a line says of an evaluation."""


class Journal:
    """JSON lines: what is searched, then an evaluation a line. One process at a time may write."""

    def __init__(self, file, evaluations: list[Evaluation]):
        """Made by `open_journal`."""
        self._file = file
        self.evaluations = evaluations

    def append(self, evaluation: Evaluation) -> None:
        """Writes an evaluation through to the disk.

        Raises:
          Refusal: the disk is full or gone; what was written before is intact.
        """
        _append(self._file, dataclasses.asdict(evaluation))
        self.evaluations.append(evaluation)


@contextlib.contextmanager
def open_journal(
    folder: str | os.PathLike,
    header: Mapping[str, Any],
    *,
    steps: int | None = None,
    prompts: int | None = None,
) -> Iterator[Journal]:
    """Opens or starts the journal of a folder, and holds it until the block ends.

    Args:
      folder: made where it is missing.
      header: what the evaluations depend on: the model's fingerprint, prompts, steps, solver. A
        journal with another header is refused.
      steps: levels of each evaluation, where all have as many.
      prompts: errors of each evaluation that was not stopped, where all have as many.

    Raises:
      Refusal: a folder that can't be written, a journal that another process holds, one of
        another search, or one that is no journal.
    """
    path = files.as_path(folder) / JOURNAL
    for name, value in (("steps", steps), ("prompts", prompts)):
        if value is not None:
            checks.whole(name, value, 1, 1_000_000)
    try:
        plain = json.loads(json.dumps(checks.fields({"header": header}, _HEADER, name="header")))
    except (TypeError, RecursionError) as error:
        raise Refusal(
            f"expected JSON values in the header ({files.reason(error)}): convert them"
        ) from error
    with files.held(path) as file:
        yield Journal(file, _read(file, path, plain["header"], steps, prompts))


def _read(file, path: pathlib.Path, header: dict, steps, prompts) -> list[Evaluation]:
    """The evaluations that the file holds; writes the header into an empty one."""
    files.check_input(path, what="search journal", largest=JOURNAL_BYTES)
    file.seek(0)
    content = file.read()
    whole = content.rfind(b"\n") + 1
    lines = content[:whole].splitlines()
    if not lines and content[: len(_OPENING)] != _OPENING[: len(content)]:
        raise Refusal(f"{path} is no search journal: choose another folder")
    evaluations = _parsed(lines, path, header, steps, prompts) if lines else []
    # Only now: a file that is no journal is left as it was.
    if whole < len(content):
        warnings.warn(
            f"the last line of {path} was cut off ({len(content) - whole} bytes) and is dropped; "
            f"{len(lines)} lines are intact",
            stacklevel=4,
        )
        file.truncate(whole)
    if not lines:
        _append(file, {"header": header})
    return evaluations


def _parsed(lines: list[bytes], path: pathlib.Path, header: dict, steps, prompts):
    """The evaluations of a journal's lines, if its header is the one asked for."""
    evaluations = []
    for number, line in enumerate(lines, 1):
        found = None
        try:
            content = json.loads(line)
            if number == 1:
                found = checks.fields(content, _HEADER, name="header", required=_HEADER)["header"]
            else:
                evaluations.append(_evaluation(content, steps, prompts))
        except (ValueError, RecursionError) as error:
            raise Refusal(
                f"{path} is no search journal (line {number}: {files.reason(error)}): choose "
                "another folder"
            ) from error
        if found is not None:
            _same_search(found, header, path)
    return evaluations


def _same_search(found: dict, header: dict, path: pathlib.Path) -> None:
    differing = [key for key in {**found, **header} if found.get(key) != header.get(key)]
    if differing:
        said = "; ".join(
            f"{key}: {_short(found.get(key))} there, {_short(header.get(key))} asked for"
            for key in differing
        )
        raise Refusal(f"{path} is the journal of another search ({said}): choose another folder")


def _evaluation(line: Any, steps: int | None, prompts: int | None) -> Evaluation:
    known = checks.fields(line, _FIELDS, name="evaluation", required=_FIELDS)
    levels = Schedule(tuple(known["levels"])).levels
    errors = tuple(float(value) for value in known["errors"])
    if steps not in (None, len(levels)):
        raise Refusal(f"expected {steps} levels, one a step; got {len(levels)}")
    enough = prompts is None or known["stopped"] or len(errors) == prompts
    if not enough or len(errors) > (prompts or len(errors)):
        raise Refusal(f"expected {prompts} errors, one a prompt; got {len(errors)}")
    return Evaluation(levels, errors, float(known["seconds"]), known["stopped"], known["search"])


def _append(file, content: dict) -> None:
    """One line, there whole or (after an error) not at all."""
    # NaN is written as a word, as `float` reads it.
    plain = {
        key: [str(v) if isinstance(v, float) and not np.isfinite(v) else v for v in value]
        if isinstance(value, list | tuple)
        else value
        for key, value in content.items()
    }
    line = (json.dumps(plain) + "\n").encode()
    before = file.seek(0, os.SEEK_END)
    try:
        if file.write(line) != len(line):
            raise OSError(28, "no space left on the device")
        os.fsync(file.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):
            file.truncate(before)
        raise Refusal(
            f"can't write to the journal {file.name} ({error.strerror}); what it holds is intact: "
            "make room and run again to go on"
        ) from error


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."
