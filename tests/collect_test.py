"""Parts of a study, put together."""

import json
import sys

import pytest
from astraea_jax.bench.search_study import read_rows

from astraea_jax import cli
from astraea_jax.bench import tables

FOLDER = tables.RESULTS


def shipped_rows(study: str) -> list:
    return json.loads((FOLDER / f"{study}.json").read_text())["rows"]


def parts_of(study: str, folder, by: str) -> list:
    """What ships of a study, as runs that each made the rows of one solver or of one budget."""
    rows = shipped_rows(study)
    parts = []
    for value in sorted({row[by] for row in rows if row[by] is not None}):
        path = folder / f"{study}_{value}.json"
        mine = [row for row in rows if row[by] in (value, None)]
        path.write_text(json.dumps({"model": "m", "environment": {"of": value}, "rows": mine}))
        parts.append(path)
    return parts


@pytest.mark.parametrize(("study", "by"), [("search", "budget"), ("quality", "solver")])
def test_parts_make_the_table_of_the_whole(study, by, tmp_path, capsys):
    output = tmp_path / "whole.json"
    parts = parts_of(study, tmp_path, by)
    words = [*map(str, parts), "--study", study, "--output", str(output), "--about", "both"]
    assert cli.main(["bench", "collect", *words]) == 0
    whole = json.loads(output.read_text())
    shipped = shipped_rows(study)
    # A row that several parts have is there once.
    assert len(parts) > 1 and len(whole["rows"]) == len(shipped)
    assert f"{len(shipped)} rows of {len(parts)} files" in capsys.readouterr().out
    assert (whole["about"], whole["model"]) == ("both", "m")
    assert [run["environment"]["of"] for run in whole["runs"]] == [
        json.loads(path.read_text())["environment"]["of"] for path in parts
    ]
    make = tables.TABLES[study][1]
    assert make(whole) == make({"rows": shipped})


def test_the_first_part_that_has_a_row_counts(tmp_path):
    row = {"what": "EA", "method": "astraea", "solver": "euler", "budget": 0.5, "levels": [10, 0]}
    paths = []
    for name, psnr in (("a", 30.123456789), ("b", 20.0)):
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps({"model": "m", "rows": [{**row, "psnr": psnr}]}))
    words = ["--study", "search", "--output", str(tmp_path / "c.json")]
    assert cli.main(["bench", "collect", *map(str, paths), *words]) == 0
    assert read_rows(tmp_path / "c.json") == [{**row, "psnr": 30.123457, "run": 0}]


def test_a_row_names_the_run_that_made_it_however_often_it_is_collected(tmp_path):
    row = {"method": "dense", "solver": "euler", "pattern": "fewer steps", "psnr": 30.0}
    for name, cost in (("a", 0.3), ("b", 0.5), ("c", 0.7)):
        part = {"model": "m", "environment": name, "rows": [{**row, "cost": cost}]}
        (tmp_path / f"{name}.json").write_text(json.dumps(part))

    def collect(*names: str) -> None:
        paths = [str(tmp_path / f"{name}.json") for name in names]
        words = [*paths[1:], "--study", "quality", "--output", paths[0]]
        assert cli.main(["bench", "collect", *words]) == 0

    collect("first", "b", "c")
    collect("both", "a", "first")
    both = json.loads((tmp_path / "both.json").read_text())
    by = {each["cost"]: both["runs"][each["run"]]["environment"] for each in both["rows"]}
    assert by == {0.3: "a", 0.5: "b", 0.7: "c"}


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ([], "say which results"),
        (["no JSON"], "not valid JSON"),
        (['{"rows": []}'], "model is missing"),
        (['{"rows": [], "model": "m"}', '{"rows": [], "model": "n"}'], "results of one model"),
    ],
)
def test_what_is_no_part_is_refused(texts, words, tmp_path, capsys):
    paths = []
    for index, text in enumerate(texts):
        paths.append(tmp_path / f"{index}.json")
        paths[-1].write_text(text)
    output = tmp_path / "whole.json"
    given = [*map(str, paths), "--study", "quality", "--output", str(output)]
    assert cli.main(["bench", "collect", *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line and not output.exists()


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
