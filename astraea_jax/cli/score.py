"""`astraea score-tiny`: videos of the small model, read back and held against their captions."""

import pathlib
from typing import TYPE_CHECKING, Any, Literal

from astraea_jax import checks, files

if TYPE_CHECKING:
    from astraea_ports.tiny.scoring import Scored, Scoring

SHOWN = 12
"""Mistakes that are printed of each set of captions; the file holds all."""

SCORE_COLUMNS = {
    "objects": "captions with",
    "attribute": "attribute",
    "total": "asked for",
    "made": "made, %",
    "drawn": "the reader on truth, %",
    "passed": "on truth through the VAE, %",
}


def score_tiny(
    *,
    model: str = "tiny",
    revision: str | None = None,
    captions: Literal["held-out", "choice"] = "held-out",
    count: int = 256,
    batch: int = 16,
    steps: int | None = None,
    guidance: float | None = None,
    reader: pathlib.Path | None = None,
    output: pathlib.Path | None = None,
) -> None:
    """Scores videos of captions that training never saw against what the captions ask for.

    Args:
      model: "tiny", or a folder of a model like it.
      revision: Of a hub id: a branch, a tag or a commit.
      captions: "held-out" are those that scores are reported of; "choice" are 768 others, to
        choose between models by.
      count: How many captions with one object, and as many with two; seeds 0, 1, ...
      batch: Videos at once.
      steps: Solver steps; the model's default when left out.
      guidance: Scale of guidance; the model's default when left out.
      reader: Weights of another reader than the one that ships.
      output: A .json file for every number.
    """
    from astraea_jax import report
    from astraea_ports.tiny.scoring import Scoring

    checks.whole("batch", batch, 1, 1024)
    if output is not None:
        files.check_output(output, (".json",))
        files.check_apart(output, reader)
    asked: dict[str, Any] = {
        "model": model,
        "captions": captions,
        "count": count,
        "steps": steps,
        "guidance": guidance,
    }
    scoring = Scoring(**asked, revision=revision, reader=reader)
    found = {"environment": report.environment(), **asked, "rows": [], "mistakes": []}
    for objects, two in (("one object", False), ("two objects", True)):
        rows, mistakes = _rows(objects, _scored(scoring, objects, two, count, batch))
        _show(rows, mistakes, output)
        found["rows"] += rows
        found["mistakes"] += mistakes
        if output is not None:  # also between the two, lest the first be lost
            report.write_json(output, found)


def _scored(scoring: "Scoring", objects: str, two: bool, count: int, batch: int) -> "list[Scored]":
    """Scores a set of captions and says how far it is."""
    from astraea_jax import report

    parts = []
    with report.Progress() as progress, progress.stage(objects, count) as bar:
        for chosen, scored in scoring.batches(two, batch):
            parts.append(scored)
            for _ in range(chosen.start, chosen.stop):
                bar.advance()
    return parts


def _rows(objects: str, parts: "list[Scored]") -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A set's table, a row an attribute, and all that was wrong."""
    from astraea_ports.tiny import score

    totals = {
        name: score.add([getattr(part, name) for part in parts])
        for name in ("made", "drawn", "passed")
    }
    rows = [
        {"objects": objects, "attribute": attribute, "total": made.total}
        | {name: round(shares[attribute].percent, 1) for name, shares in totals.items()}
        for attribute, made in totals["made"].items()
    ]
    return rows, [dict(mistake) for part in parts for mistake in part.mistakes]


def _show(
    rows: list[dict[str, Any]], mistakes: list[dict[str, Any]], output: pathlib.Path | None
) -> None:
    """Prints a set's table, and what was wrong."""
    from astraea_jax import report

    print(report.markdown(rows, SCORE_COLUMNS))
    for each in mistakes[:SHOWN]:
        print(f"seed {each['seed']}, {each['caption']!r}: {each['read']}, not {each['asked']}")
    if len(mistakes) > SHOWN:
        print(f"and {len(mistakes) - SHOWN} more" + (f" in {output}" if output else ""))
    print(flush=True)
