"""What every bench refuses, in one message, before it loads a model or writes a file."""

import dataclasses
import inspect
import os
import pathlib
import sys
import typing

import pytest
from command_line import refused

from astraea_jax.checks import Refusal
from astraea_jax.cli import BENCHES, COMMANDS, bench, options
from astraea_ports import checkpoints
from astraea_ports.pipeline import Pipeline
from astraea_ports.wan import parts

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


@pytest.fixture(autouse=True)
def no_model(monkeypatch):
    """Loading a model within these tests is a fault."""

    def load(*_, **__):
        raise AssertionError("a model was loaded before all options were checked")

    monkeypatch.setattr(Pipeline, "from_pretrained", load)
    monkeypatch.setattr(Pipeline, "random", load)
    monkeypatch.setattr(options.ModelChoice, "open", load)
    monkeypatch.setattr(parts, "random_parts", load)


NUMBERS = [
    ("attention", "--rounds", ("0", "1000000000")),
    ("attention", "--shares", ("0", "nan", "1e-300", "1.5", "inf")),
    ("attention", "--shapes", ("moon",)),
    ("denoise", "--levels", ("0", "11")),
    ("denoise", "--steps", ("1", "1000000000")),
    ("denoise", "--rounds", ("0", "1000000000")),
    ("denoise", "--seconds", ("nan", "0", "-1")),
    ("denoise", "--frames", ("0", "1000000000")),
    ("denoise", "--height", ("16384",)),
    ("denoise", "--method", ("none",)),
    ("exactness", "--methods", ("none",)),
    ("exactness", "--frames", ("0", "1000000000")),
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
    assert name.rstrip("s") in line
    assert not os.listdir()


@pytest.mark.parametrize("bench", BENCHES)
def test_an_output_is_tried_before_work_begins(bench, capsys):
    os.mkdir("folder.json")
    os.mkfifo("pipe.json")
    os.symlink("nowhere/file", "dangling.json")
    os.symlink("loop.json", "loop.json")
    before = sorted(os.listdir())
    for name, words in (
        ("n" * 300, "can't write"),
        ("none/file", "an existing folder"),
        ("folder", "is a folder"),
        ("pipe", "no regular file"),
        ("dangling", "is a link to"),
        ("loop", "can't write"),
    ):
        assert words in refused(capsys, "bench", bench, "--output", f"{name}.json")
    assert "ends in" in refused(capsys, "bench", bench, "--output", "file.txt")
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize("name", [(72 * "ü") + ".json", "a\nb.json", "clip [final].json"])
def test_odd_names_that_can_be_written_are_taken(name):
    with pytest.raises(AssertionError, match="a model was loaded"):  # all options were right
        bench.exactness(output=pathlib.Path(name))
    assert not os.listdir()


def test_a_function_refuses_what_the_command_line_can_not_say(as_a_user):
    with pytest.raises(ValueError, match=r"drivers of .*; got 'none'"):
        bench.denoise(drivers=("none",))  # pyright: ignore
    with pytest.raises(ValueError, match="1 to 1000 methods; got 0"):
        bench.exactness(methods=())
    with pytest.raises(ValueError, match="a level must be an integer"):
        bench.denoise(levels=(True,))


def options_of(command):
    """Names and types of a command's options, those of a dataclass by their own names."""
    for parameter in inspect.signature(command).parameters.values():
        kind = typing.get_args(parameter.annotation)[:1] or (parameter.annotation,)
        if dataclasses.is_dataclass(kind[0]):
            yield from ((field.name, field.type) for field in dataclasses.fields(kind[0]))
        else:
            yield parameter.name, parameter.annotation


MODELS = {"model", "from_", "source"}
"""What an option is called that names a model."""


def test_every_command_that_opens_a_model_takes_a_revision():
    named = {
        name: {option for option, _ in options_of(command.load())}
        for name, command in {**COMMANDS, **BENCHES}.items()
        if name != "bench"
    }
    opens = {name for name, options in named.items() if options & MODELS}
    assert {"generate", "convert", "search", "train-tiny", "score-tiny", "denoise"} <= opens
    assert [name for name in sorted(opens) if "revision" not in named[name]] == []


def test_the_revision_comes_to_scoring_and_training(monkeypatch):
    def opened(source, *, revision=None, **_):
        raise Refusal(f"{source} at {revision}")

    monkeypatch.setattr(Pipeline, "from_pretrained", opened)
    monkeypatch.setattr(checkpoints, "model_folder", opened)
    with pytest.raises(Refusal, match="a/b at v2"):
        COMMANDS["score-tiny"].load()(model="a/b", revision="v2")
    for part in ("transformer", "vae", "reader"):
        with pytest.raises(Refusal, match="a/b at v2"):
            COMMANDS["train-tiny"].load()(from_="a/b", revision="v2", part=part, steps=1)
    assert os.listdir() == []


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
