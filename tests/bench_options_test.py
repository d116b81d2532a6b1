"""What every bench refuses, in one message, before it loads a model or writes a file."""

import dataclasses
import inspect
import json
import os
import pathlib
import sys
import typing

import pytest
from command_line import refused

from astraea_jax.bench import compile as bench_compile
from astraea_jax.bench import denoise, exactness, models, quality, search_study
from astraea_jax.checks import Refusal
from astraea_jax.cli import BENCHES, COMMANDS
from astraea_ports import checkpoints, wan
from astraea_ports.wan import parts
from astraea_ports.wan.training import transformer as transformer_training

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")

STUDY = {"model": "m", "options": {"prompts": 2, "steps": 4}}
ROW = {"method": "dense", "solver": "euler", "pattern": "fewer steps", "cost": 0.5, "psnr": 30.0}
FOUND = {"what": "EA", "method": "dense", "solver": "euler", "budget": 0.5, "levels": [10, 0]}


@pytest.fixture(autouse=True)
def no_model(monkeypatch):
    """Loading a model within these tests is a fault."""

    def load(*_, **__):
        raise AssertionError("a model was loaded before all options were checked")

    monkeypatch.setattr(wan.Pipeline, "from_pretrained", load)
    monkeypatch.setattr(wan.Pipeline, "random", load)
    monkeypatch.setattr(models.ModelChoice, "open", load)
    monkeypatch.setattr(parts, "random_parts", load)
    monkeypatch.setattr(transformer_training, "Pipeline", wan.Pipeline)


NUMBERS = [
    ("attention", "--rounds", ("0", "1000000000")),
    ("attention", "--shares", ("0", "nan", "1e-300", "1.5", "inf")),
    ("attention", "--shapes", ("moon",)),
    ("batches", "--batches", ("0", "1000000000")),
    ("batches", "--budgets", ("0", "nan", "2")),
    ("batches", "--rounds", ("0", "1000000000")),
    ("batches", "--method", ("none",)),
    ("compile", "--frames", ("0", "1000000000", "4")),
    ("compile", "--height", ("0", "16384", "17")),
    ("compile", "--width", ("-16", "1000000000")),
    ("compile", "--levels", ("0", "11")),
    ("denoise", "--levels", ("0", "11")),
    ("denoise", "--steps", ("1", "1000000000")),
    ("denoise", "--rounds", ("0", "1000000000")),
    ("denoise", "--seconds", ("nan", "0", "-1")),
    ("denoise", "--frames", ("0", "1000000000")),
    ("denoise", "--height", ("16384",)),
    ("denoise", "--method", ("none",)),
    ("exactness", "--methods", ("none",)),
    ("exactness", "--frames", ("0", "1000000000")),
    ("quality", "--prompts", ("1", "65", "1000000000")),
    ("quality", "--steps", ("0", "1000000000")),
    ("quality", "--budgets", ("nan", "0", "1e-300")),
    ("quality", "--solver", ("none",)),
    ("quality", "--only", ("no such row",)),
    ("scoring", "--candidates", ("0", "1000000000")),
    ("scoring", "--steps", ("0", "1000000000")),
    ("scoring", "--prompts", ("0", "1000000000")),
    ("scoring", "--lanes", ("0", "-1", "1000000000")),
    ("scoring", "--methods", ("none",)),
    ("scoring", "--plans", ("none",)),
    ("scoring", "--width", ("0", "16384")),
    ("search", "--minutes", ("nan", "-1", "inf")),
    ("search", "--steps", ("0", "1000000000")),
    ("search", "--budgets", ("nan", "0")),
    ("search", "--frames", ("0", "1000000000")),
    ("search", "--population", ("0", "1000000000")),
    ("sheet", "--count", ("0", "65", "1000000000")),
    ("sheet", "--columns", ("0", "-1", "1000000000")),
    ("training", "--steps", ("0", "1000000000")),
    ("training", "--batch", ("0", "1000000000")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("bench", "option", "value"),
    [(bench, option, value) for bench, option, values in NUMBERS for value in values],
)
def test_a_number_that_is_none_is_refused(bench, option, value, capsys):
    name = option.removeprefix("--").replace("_", " ")
    line = refused(capsys, "bench", bench, option, value)
    # Of the option's kind, and what was given.
    assert name.rstrip("s") in line or "row" in line
    assert not os.listdir()


def test_a_study_of_a_gpu_ends(capsys):
    for minutes in ("nan", "-1", "1e300"):
        line = refused(capsys, "bench", "gpu", "--output", "a.json", "--minutes", minutes)
        assert "minutes must be a number" in line
    pathlib.Path("a.json").write_text('{"parts": 3}')
    line = refused(capsys, "bench", "gpu", "--output", "a.json", "--minutes", "0")
    assert "parts must be an object" in line
    pathlib.Path("a.json").write_text("no JSON")
    assert "not valid JSON" in refused(
        capsys, "bench", "gpu", "--output", "a.json", "--minutes", "0"
    )


WRITES = sorted(set(BENCHES) - {"tables", "compile", "collect", "search"})


@pytest.mark.parametrize("bench", WRITES)
def test_an_output_is_tried_before_work_begins(bench, capsys):
    suffix = ".png" if bench == "sheet" else ".json"
    os.mkdir("folder" + suffix)
    os.mkfifo("pipe" + suffix)
    os.symlink("nowhere/file", "dangling" + suffix)
    os.symlink("loop" + suffix, "loop" + suffix)
    before = sorted(os.listdir())
    for name, words in (
        ("n" * 300, "can't write"),
        ("none/file", "an existing folder"),
        ("folder", "is a folder"),
        ("pipe", "no regular file"),
        ("dangling", "is a link to"),
        ("loop", "can't write"),
    ):
        assert words in refused(capsys, "bench", bench, "--output", name + suffix)
    assert "ends in" in refused(capsys, "bench", bench, "--output", "file.txt")
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize("name", [(72 * "ü") + ".json", "a\nb.json", "clip [final].json"])
def test_odd_names_that_can_be_written_are_taken(name, capsys):
    """The next check is what refuses, not the name."""
    line = refused(capsys, "bench", "quality", "--only", "no such row", "--output", name)
    assert "no row's description" in line and not os.listdir()


READS = {
    "quality": ["--output", "out.json", "--known"],
    "search": ["--known"],
    "collect": ["--study", "quality", "--output", "out.json"],
    "tables": ["--readme"],
}


@pytest.mark.parametrize("bench", READS)
def test_what_is_no_regular_file_is_not_read(bench, capsys):
    os.mkfifo("pipe.json")
    os.mkdir("folder.json")
    os.symlink("/dev/zero", "zero.json")
    pathlib.Path("broken.json").write_bytes(b"\xff\x00\xfe")
    for name in ("pipe.json", "folder.json", "zero.json", "broken.json", "none.json"):
        words = [*READS[bench], name] if bench != "collect" else [name, *READS[bench]]
        assert name in refused(capsys, "bench", bench, *words)
    assert not os.path.exists("out.json") and not os.path.exists("out_study")


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
def test_rows_of_a_study_are_checked_by_field(content, words, capsys):
    pathlib.Path("part.json").write_text(json.dumps(content))
    collect = ["bench", "collect", "part.json", "--study", "quality", "--output", "out.json"]
    said = refused(capsys, *collect)
    assert words in said and "part.json" in said
    if "run" not in words:  # runs are of what was collected
        known = ["bench", "quality", "--known", "part.json", "--output", "out.json"]
        assert words in refused(capsys, *known)
    assert not os.path.exists("out.json")


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"levels": [10, 11]}, "levels"), ({"budget": "half"}, "budget"), ({"what": 3}, "what")],
)
def test_rows_of_a_search_are_checked_by_field(changes, words, capsys):
    pathlib.Path("part.json").write_text(json.dumps({"model": "m", "rows": [FOUND | changes]}))
    collect = ["bench", "collect", "part.json", "--study", "search", "--output", "out.json"]
    assert words in refused(capsys, *collect)
    for option in ("--known", "--starts"):
        assert words in refused(capsys, "bench", "search", option, "part.json")


def test_no_output_is_an_input(capsys):
    content = json.dumps({**STUDY, "rows": [ROW]})
    pathlib.Path("part.json").write_text(content)
    os.symlink("part.json", "same.json")
    for output in ("part.json", "same.json", "./part.json"):
        words = ["part.json", "--study", "quality", "--output", output]
        assert "over what is read" in refused(capsys, "bench", "collect", *words)
        words = ["--known", "part.json", "--output", output]
        assert "are one file" in refused(capsys, "bench", "quality", *words)
    assert pathlib.Path("part.json").read_text() == content


def test_what_json_has_no_number_for_is_collected_as_a_word():
    rows = [{**ROW, "psnr": "inf", "psnr_half_width": "nan"}]
    found = [{**FOUND, "psnr": "inf", "psnr_each": ["inf", 3.0]}]
    for study, each in (("quality", rows), ("search", found)):
        pathlib.Path("part.json").write_text(json.dumps({"model": "m", "rows": each}))
        BENCHES["collect"](
            (pathlib.Path("part.json"),), study=study, output=pathlib.Path("out.json")
        )
        read = quality.read if study == "quality" else search_study.read_rows
        assert read(pathlib.Path("out.json"))
        assert "Infinity" not in pathlib.Path("out.json").read_text()


def test_a_function_refuses_what_the_command_line_can_not_say(as_a_user):
    with pytest.raises(ValueError, match=r"drivers of .*; got 'none'"):
        denoise.command(drivers=("none",))  # pyright: ignore
    with pytest.raises(ValueError, match="1 to 1000 methods; got 0"):
        exactness.command(methods=())
    with pytest.raises(ValueError, match="dtype must be"):
        bench_compile.command(dtype="float8")  # pyright: ignore
    with pytest.raises(ValueError, match="a level must be an integer"):
        denoise.command(levels=(True,))


def options_of(command):
    """Names and types of a command's options, those of `ModelChoice` by their own names."""
    for parameter in inspect.signature(command).parameters.values():
        kind = typing.get_args(parameter.annotation)[:1] or (parameter.annotation,)
        if kind[0] is models.ModelChoice:
            yield from ((field.name, field.type) for field in dataclasses.fields(kind[0]))
        else:
            yield parameter.name, parameter.annotation


MODELS = {"model", "from_", "source"}
"""What an option is called that names a model."""


def test_every_command_that_opens_a_model_takes_a_revision():
    named = {
        name: {option for option, _ in options_of(command)}
        for name, command in {**COMMANDS, **BENCHES}.items()
    }
    opens = {name for name, options in named.items() if options & MODELS}
    assert {"generate", "convert", "search", "train-tiny", "score-tiny", "sheet"} <= opens
    assert [name for name in sorted(opens) if "revision" not in named[name]] == []


@pytest.mark.parametrize("command", ["sheet", "quality", "scoring", "search"])
def test_the_revision_comes_to_whoever_opens_the_model(command, monkeypatch):
    def opened(source, *, revision=None, **_):
        raise Refusal(f"{source} at {revision}")

    monkeypatch.setattr(wan.Pipeline, "from_pretrained", opened)
    with pytest.raises(Refusal, match="a/b at v2"):
        output = pathlib.Path("out" if command == "search" else "out.json")
        output = output.with_suffix(".png") if command == "sheet" else output
        BENCHES[command](output=output, model="a/b", revision="v2")


def test_the_revision_comes_to_scoring_and_training(monkeypatch):
    def opened(source, *, revision=None, **_):
        raise Refusal(f"{source} at {revision}")

    monkeypatch.setattr(wan.Pipeline, "from_pretrained", opened)
    monkeypatch.setattr(checkpoints, "model_folder", opened)
    with pytest.raises(Refusal, match="a/b at v2"):
        COMMANDS["score-tiny"](model="a/b", revision="v2")
    for part in ("transformer", "vae", "reader"):
        with pytest.raises(Refusal, match="a/b at v2"):
            COMMANDS["train-tiny"](from_="a/b", revision="v2", part=part, steps=1)
    assert os.listdir() == []


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
