"""Tilings of the kernels, as data: a table that ships, and one that a user has measured."""

import functools
import json
import pathlib
from typing import Any

from astraea_jax import files
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
        rows = json.loads(path.read_text())
        for row in rows:
            if not {*KEYS, "tiling"} <= row.keys():
                raise Refusal(f"a row lacks one of {', '.join(KEYS)}, tiling")
    except (ValueError, AttributeError, TypeError) as error:
        raise Refusal(f"can't read the tilings in {path} ({error}): delete the file") from error
    return rows
