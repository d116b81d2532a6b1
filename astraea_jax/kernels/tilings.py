"""Tilings of the kernels, as data: a table that ships, and one that a user has measured."""

import functools
import json
import pathlib
from typing import Any

from astraea_jax import checks, files
from astraea_jax.checks import Refusal

SHIPPED = pathlib.Path(__file__).with_name("tilings.json")
KEYS = ("implementation", "capability", "width", "queries", "keys")


def user_table() -> pathlib.Path | None:
    """Where `astraea bench attention --tune` writes what it measured on this machine.

    None where there is no home.
    """
    return files.cache_folder("tilings.json")


def find(
    implementation: str, capability: str, width: int, num_queries: int, num_keys: int
) -> dict[str, Any]:
    """The tiling of the first row that fits, the user's rows before the shipped ones.

    A row fits the implementation, the compute capability ("any" fits all), and head widths,
    queries and keys up to its own; null has no end.

    Raises:
      Refusal: the user's table can't be read.
    """
    wanted = (width, num_queries, num_keys)
    for row in (*_rows(user_table()), *_rows(SHIPPED)):
        limits = [row[key] for key in KEYS[2:]]
        if (
            row["implementation"] == implementation
            and row["capability"] in (capability, "any")
            and all(
                limit is None or size <= limit for size, limit in zip(wanted, limits, strict=True)
            )
        ):
            return row["tiling"]
    raise Refusal(f"no tiling for {implementation} with head width {width}")


def check_writable() -> None:
    """Refuses where `remember` could not write, before anything is measured."""
    path = user_table()
    if path is None:
        raise Refusal("there is no home folder to remember tilings in: set XDG_CACHE_HOME")
    files.check_folder(path.parent)
    if path.parent.is_dir():
        files.check_output(path, (".json",))
    _rows(path)


def remember(rows: list[dict[str, Any]]) -> pathlib.Path:
    """Puts measured rows before what the user's table holds; returns its path.

    Raises:
      Refusal: the user has no home, or the table can't be written.
    """
    path = user_table()
    if path is None:
        raise Refusal("there is no home folder to remember tilings in: set XDG_CACHE_HOME")
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    measured = [[row[key] for key in KEYS] for row in rows]
    old = [row for row in _rows(path) if [row[key] for key in KEYS] not in measured]
    # Narrow rows first, since the first that fits is taken.
    rows = sorted([*rows, *old], key=lambda row: [row[k] or float("inf") for k in KEYS[2:]])
    with files.replacing(path) as partial:
        partial.write_text(json.dumps(rows, indent=1) + "\n")
    return path


def _rows(path: pathlib.Path | None) -> list[dict[str, Any]]:
    """Rows of a table; none where there is none, or the user may not read it."""
    if path is None:
        return []
    try:
        return _read(path, path.stat().st_mtime_ns)
    except OSError:
        return []


@functools.cache
def _read(path: pathlib.Path, _changed: int) -> list[dict[str, Any]]:
    """Rows of a table; read again when the file has changed."""
    try:
        rows = files.read_json(path, what="table of tilings")
    except Refusal as error:
        raise Refusal(f"can't read the tilings in {path} ({error}): delete the file") from error
    problem = checks.ListOf(checks.Anything(), 0, 10_000).problem(rows)
    checks.refuse(str(path), [] if problem is None else [problem], "delete the file")
    for index, row in enumerate(rows):
        name = f"{path}: row {index}"
        checks.fields(row, _ROW, name=name, required=_ROW, others=True, advice="delete the file")
        required, rules = _TILINGS[row["implementation"]]
        checks.fields(
            row["tiling"],
            rules,
            name=f"{name}: tiling",
            required=required,
            advice="delete the file",
        )
    return rows


_SIZE = checks.OrNone(checks.Whole(1, 2**40))
_ROW = {
    "implementation": checks.OneOf(("mosaic", "triton")),
    "capability": checks.Text(20),
    **dict.fromkeys(KEYS[2:], _SIZE),
    "tiling": checks.ByName(checks.Anything()),
}

_NUMBER, _FLAG = checks.Whole(1, 2**16), checks.Flag()
_TILE = {"block_kv": _NUMBER, "stages": _NUMBER}
_HOPPER = {"width": _NUMBER, **_TILE}
_AMPERE = {"block_q": _NUMBER, "warps": _NUMBER, **_TILE}
_TILINGS = {
    "triton": (_AMPERE, _AMPERE),
    "mosaic": (_HOPPER, {**_HOPPER, "warpgroups": _NUMBER, "persistent": _FLAG, "whole": _FLAG}),
}
"""What a tiling must and may say, by implementation."""
