"""Parts of a study, put together."""

import json
import os
import pathlib
import sys

import pytest
import studies

from astraea_jax.checks import Refusal

collect = studies.study("collect")
quality = studies.study("quality")
read_rows = studies.study("search_study").read_rows
tables = studies.study("tables")

STUDY = {"model": "m", "options": {"prompts": 2, "steps": 4}}
ROW = {"method": "dense", "solver": "euler", "pattern": "fewer steps", "cost": 0.5, "psnr": 30.0}
FOUND = {"what": "EA", "method": "dense", "solver": "euler", "budget": 0.5, "levels": [10, 0]}


def shipped_rows(study: str) -> list:
    return json.loads((studies.FOLDER / f"{study}.json").read_text())["rows"]


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
    collect.command(tuple(parts), study=study, output=output, about="both")
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
    collect.command(tuple(paths), study="search", output=tmp_path / "c.json")
    assert read_rows(tmp_path / "c.json") == [{**row, "psnr": 30.123457, "run": 0}]


def test_a_row_names_the_run_that_made_it_however_often_it_is_collected(tmp_path):
    row = {"method": "dense", "solver": "euler", "pattern": "fewer steps", "psnr": 30.0}
    for name, cost in (("a", 0.3), ("b", 0.5), ("c", 0.7)):
        part = {"model": "m", "environment": name, "rows": [{**row, "cost": cost}]}
        (tmp_path / f"{name}.json").write_text(json.dumps(part))

    def together(*names: str) -> None:
        output, *paths = (tmp_path / f"{name}.json" for name in names)
        collect.command(tuple(paths), study="quality", output=output)

    together("first", "b", "c")
    together("both", "a", "first")
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
def test_what_is_no_part_is_refused(texts, words, tmp_path):
    paths = []
    for index, text in enumerate(texts):
        paths.append(tmp_path / f"{index}.json")
        paths[-1].write_text(text)
    output = tmp_path / "whole.json"
    with pytest.raises(Refusal, match=words):
        collect.command(tuple(paths), study="quality", output=output)
    assert not output.exists()


@pytest.fixture
def part(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return pathlib.Path("part.json")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "an object of fields"),
        ([], "an object of fields"),
        ({**STUDY}, "rows is missing"),
        ({**STUDY, "rows": {}}, "rows must be a list"),
        ({**STUDY, "rows": [3]}, "row 0 to be an object"),
        ({**STUDY, "rows": [{**ROW, "method": None}]}, "method must be text"),
        ({**STUDY, "rows": [{**ROW, "cost": "half"}]}, "cost must be a number"),
        ({**STUDY, "rows": [{**ROW, "cost": 10**400}]}, "cost must be a number"),
        ({**STUDY, "rows": [{**ROW, "method": ["dense"]}]}, "method must be text"),
        ({**STUDY, "rows": [{**ROW, "rank": {}}]}, "rank must be text"),
        ({**STUDY, "rows": [{**ROW, "psnr": "high"}]}, "psnr must be"),
        ({**STUDY, "model": 3, "rows": [ROW]}, "model must be text"),
        ({**STUDY, "options": 3, "rows": [ROW]}, "options must be an object"),
        ({**STUDY, "rows": [ROW], "runs": [{}]}, "run is missing"),
        ({**STUDY, "rows": [{**ROW, "run": 1}], "runs": [{}]}, "run must be an integer in 0..0"),
        ({**STUDY, "rows": [ROW], "runs": 3}, "runs must be a list"),
    ],
)
def test_rows_of_a_study_are_checked_by_field(content, words, part):
    part.write_text(json.dumps(content))
    with pytest.raises(Refusal, match=words) as refused:
        collect.command((part,), study="quality", output=pathlib.Path("out.json"))
    assert "part.json" in str(refused.value)
    if "run" not in words:  # runs are of what was collected
        with pytest.raises(Refusal, match=words):
            quality.command(known=part, output=pathlib.Path("out.json"))
    assert not os.path.exists("out.json")


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"levels": [10, 11]}, "levels"), ({"budget": "half"}, "budget"), ({"what": 3}, "what")],
)
def test_rows_of_a_search_are_checked_by_field(changes, words, part):
    part.write_text(json.dumps({"model": "m", "rows": [FOUND | changes]}))
    with pytest.raises(Refusal, match=words):
        collect.command((part,), study="search", output=pathlib.Path("out.json"))


@pytest.mark.parametrize("output", ["part.json", "same.json", "./part.json"])
def test_no_output_is_an_input(output, part):
    content = json.dumps({**STUDY, "rows": [ROW]})
    part.write_text(content)
    os.symlink("part.json", "same.json")
    with pytest.raises(Refusal, match="over what is read"):
        collect.command((part,), study="quality", output=pathlib.Path(output))
    with pytest.raises(Refusal, match="are one file"):
        quality.command(known=part, output=pathlib.Path(output))
    assert part.read_text() == content


@pytest.mark.parametrize(
    ("study", "row", "read"),
    [
        ("quality", {**ROW, "psnr": "inf", "psnr_half_width": "nan"}, quality.read),
        ("search", {**FOUND, "psnr": "inf", "psnr_each": ["inf", 3.0]}, read_rows),
    ],
)
def test_what_json_has_no_number_for_is_collected_as_a_word(study, row, read, part):
    part.write_text(json.dumps({"model": "m", "rows": [row]}))
    output = pathlib.Path("out.json")
    collect.command((part,), study=study, output=output)
    assert read(output) and "Infinity" not in output.read_text()


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
