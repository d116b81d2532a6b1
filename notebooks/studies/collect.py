"""A study in parts, from several machines or processes, as one file.

`search.py` and `quality.py` take hours on one device, and their parts need nothing of each other;
what lies beside this file is such parts together.
"""

import json
import math
import pathlib
from collections.abc import Callable
from typing import Any, Literal

from tyro.conf import Positional

import quality
import search_study
import start
from astraea_jax import checks, files
from astraea_jax.checks import Refusal

Row = dict[str, Any]

NAMES: dict[str, Callable[[Row], tuple]] = {
    "search": search_study.name_of,
    "quality": quality.name_of,
}
"""What tells a study's rows apart."""

READ: dict[str, Callable[[pathlib.Path], list[Row]]] = {
    "search": search_study.read_rows,
    "quality": lambda path: quality.read(path)["rows"],
}
"""What reads a study's rows, each field of them checked."""


def command(
    results: Positional[tuple[pathlib.Path, ...]] = (),
    *,
    study: Literal["search", "quality"],
    output: pathlib.Path,
    about: str = "",
) -> None:
    """Puts the results of a study's parts into one file; where two have a row, the first counts.

    A row's "run" is the place of what made it in the file's "runs".

    Args:
      results: JSON files of `search.py` (results.json in its folder) or `quality`.
      study: Which of the two.
      output: A .json file.
      about: A sentence on what the file holds.
    """
    if not results:
        raise Refusal("say which results to put together: JSON files of a study's parts")
    parts = [_read(path, study) for path in results]
    files.check_output(output, (".json",))
    files.check_apart(output, *results)
    for path, part in zip(results, parts, strict=True):
        if part["model"] != parts[0]["model"]:
            raise Refusal(
                f"expected results of one model: {results[0]} is of {parts[0]['model']}, "
                f"{path} of {part['model']}"
            )
    rows: dict[tuple, Row] = {}
    runs: list[Row] = []
    for part in parts:
        for row in part["rows"]:
            made_by = len(runs) + (row.get("run", 0) if "runs" in part else 0)
            rows.setdefault(NAMES[study](row), {**row, "run": made_by})
        runs += part.get("runs") or [
            {key: part[key] for key in sorted({*part} - {"model", "rows"})}
        ]
    head = {"about": about, "model": parts[0]["model"], "runs": runs}
    _write(output, head, list(rows.values()))
    print(f"{len(rows)} rows of {len(parts)} files in {output}")


def _read(path: pathlib.Path, study: str) -> Row:
    """A part's results.

    Raises:
      Refusal: no such file, or one without rows and the model that they are of.
    """
    part = files.read_json(path, what="study's results")
    # What the rows say is the studies' own to check.
    rows = READ[study](path)
    rules = {"model": checks.Text(), "rows": checks.Anything(), "runs": _RUNS}
    checks.fields(
        part, rules, name=str(path), required=("model", "rows"), others=True, advice="run it again"
    )
    if "runs" in part:
        run = {"run": checks.Whole(0, len(part["runs"]) - 1)}
        for index, row in enumerate(rows):
            checks.fields(row, run, name=f"{path}: row {index}", required=run, others=True)
    return {**part, "rows": rows}


_RUNS = checks.ListOf(checks.ByName(checks.Anything()), 1, 10_000)


def _write(output: pathlib.Path, head: Row, rows: list[Row]) -> None:
    """A row a line, so that a later version can be compared with it."""
    lines = ",\n".join("  " + json.dumps(_rounded(row)) for row in rows)
    text = json.dumps(head, indent=1).removesuffix("\n}") + f',\n "rows": [\n{lines}\n ]\n}}\n'
    with files.replacing(output) as partial:
        partial.write_text(text)


def _rounded(value: Any) -> Any:
    """Floats to eight significant digits, more than any means; words for what JSON lacks."""
    if isinstance(value, float):
        return float(f"{value:.8g}") if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value


if __name__ == "__main__":
    start.run(command)
