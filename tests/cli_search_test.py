"""`astraea search`, `astraea sensitivity`, and what `astraea generate` does with schedule files."""

import dataclasses
import json
import os
import pathlib
import sys

import jax
import numpy as np
import pytest
from command_line import refused

from astraea_jax import cli
from astraea_jax.checks import Refusal
from astraea_jax.cli import searching, subject, target
from astraea_jax.cli.latency import latency_table
from astraea_jax.cli.options import ModelChoice, Sampling, VideoSize
from astraea_jax.cli.request import Choice, Request
from astraea_jax.methods import METHODS
from astraea_jax.model import fingerprint
from astraea_jax.schedule import Schedule
from astraea_jax.search import journal as journals
from astraea_jax.search.recipe import Recipe, recipes_in
from astraea_ports import tiny, wan
from astraea_ports.pipeline import tiles

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")

SIZE = ["--frames", "5", "--height", "32", "--width", "32"]
SMALL = [*SIZE, "--steps", "5", "--count", "1", "--heldout", "1", "--lanes", "2"]
SMALL += ["--population", "4", "--parents", "2", "--generations", "1", "--swaps", "3"]


def no_memory(*_):
    raise MemoryError


@pytest.mark.slow
def test_a_search_writes_a_schedule_that_generate_runs_and_goes_on_where_it_was(
    capsys, monkeypatch
):
    pathlib.Path("prompts.txt").write_text("a red circle\n\na blue square\n")
    arguments = ["search", "--budget", "0.6", "--prompts", "prompts.txt", *SMALL]
    arguments += ["--guidance", "3", "--shift", "2.5", "--negative-prompt", "noise"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    for words in ("generation 0", "generation 1", "left", "realised budget", "held-out", "levels:"):
        assert words in printed
    recipe = Recipe.load("out.json")
    assert recipe.schedule.budget == 0.6 and recipe.method == "step-level-corrected"
    assert {"psnr", "ssim", "mse", "prompts"} <= set(recipe.quality)
    assert (recipe.guidance, recipe.shift, recipe.negative_prompt) == (3.0, 2.5, "noise")
    assert (recipe.dtype, recipe.precision, recipe.lora) == ("float32", "reference", ())
    assert os.path.getsize("out_search/pareto.png") > 1000
    journal = pathlib.Path("out_search", journals.JOURNAL).read_text()

    assert cli.main(arguments) == 0
    assert "0 computed now" in capsys.readouterr().out
    assert pathlib.Path("out_search", journals.JOURNAL).read_text() == journal
    assert Recipe.load("out.json") == recipe

    # What was found is there before whole videos are decoded, which may take all memory.
    os.remove("out.json")
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(searching, "measure", no_memory)
        cli.main(arguments)
    assert Recipe.load("out.json") == dataclasses.replace(recipe, quality={})

    line = refused(capsys, *arguments, "--solver", "euler")
    assert "another search" in line and "solver" in line

    run = ["generate", "a red circle", "--schedule", "out.json", "--no-compilation-cache", *SIZE]
    run += ["--guidance", "3", "--shift", "2.5"]
    assert cli.main([*run, "--negative-prompt", "noise"]) == 0
    captured = capsys.readouterr()
    assert "60.0 %" in captured.out and "corrected" in captured.out
    assert "warning" not in captured.err
    assert cli.main([*run, "--guidance", "4"]) == 0
    assert "guidance 3.0, not 4.0 and negative prompt 'noise', not ''" in capsys.readouterr().err


@pytest.mark.slow
def test_another_reduction_of_the_same_errors_has_a_fitness_of_its_own(capsys):
    def fitness(*more):
        assert cli.main([*BUDGET, *SMALL, "--count", "2", "--budget", "0.6", *more]) == 0
        said = capsys.readouterr().out
        return [line.split()[3] for line in said.splitlines() if line.startswith("generation")]

    first = fitness("--reduce", "log")
    shared = fitness("--reduce", "mean")
    assert shared == fitness("--reduce", "mean", "--folder", "alone")
    assert shared and shared[0] != first[0]


@pytest.mark.slow
def test_a_schedule_of_another_solver_is_warned_of_and_not_taken():
    pipeline = wan.Pipeline.from_pretrained()
    asked = dict.fromkeys(Request.__dataclass_fields__) | {"solver": "euler", "budget": 0.4}
    asked |= {"prompt": "a red circle", "model": ModelChoice(), "sampling": Sampling(), "seed": 0}
    asked |= {"size": (None, None, None), "compare": False, "show_selection": False}
    asked |= {"output": pathlib.Path("out.mp4")}
    (recipe,) = Choice(Request(**asked), pipeline).suitable(pipeline.transformer)
    assert recipe.solver == "euler" and recipe.schedule.steps == pipeline.defaults.steps
    other = Request(**asked | {"solver": "unipc", "budget": None, "schedule": recipe})
    with pytest.warns(UserWarning, match="searched for solver euler, not unipc"):
        assert Choice(other, pipeline).suitable(pipeline.transformer) == []
    shorter = Choice(Request(**asked | {"sampling": Sampling(steps=7)}), pipeline)
    assert shorter.suitable(pipeline.transformer) == []


@pytest.mark.slow
def test_a_speed_up_is_met_by_the_step_times_of_this_machine(monkeypatch, capsys):
    # As if measured: five dense steps take 1 s, so 1.5 times faster is at most 667 ms.
    times = [{0: 0.04, 10: 0.2}]
    monkeypatch.setattr(target, "latency_table", lambda *_, **__: times.pop())
    arguments = ["search", "--speedup", "1.5", "--method", "step-level", "--sensitivities"]
    arguments += [*SMALL, "--generations", "0", "--swaps", "0", "--band", "0.5", "1.0"]
    assert cli.main(arguments) == 0
    recipe = Recipe.load("out.json")
    assert sorted(recipe.schedule.levels) == [0, 0, 0, 10, 10]
    assert recipe.cost["seconds"] == pytest.approx(0.52)
    assert recipe.cost["speedup"] == pytest.approx(1 / 0.52)
    # They are kept for the next search; what a refused one measured leaves nothing behind.
    assert cli.main(arguments) == 0 and "0 computed now" in capsys.readouterr().out
    times.append({0: 0.04, 10: 0.2})
    line = refused(capsys, *arguments, "--speedup", "900", "--folder", "other")
    assert "no schedule of 5 steps" in line and not os.path.exists("other")


@pytest.mark.slow
def test_step_times_are_measured_at_every_level():
    pipeline = wan.Pipeline.from_pretrained()
    table = latency_table(pipeline, (5, 32, 32), METHODS["step-level"], (0, 10), rounds=1)
    assert set(table) == {0, 10} and min(table.values()) > 0


@pytest.mark.slow
def test_sensitivity_draws_a_line_a_prompt(capsys):
    arguments = ["sensitivity", *SIZE, "--steps", "4", "--count", "2", "--output", "fig.svg"]
    assert cli.main(arguments) == 0
    lines = json.loads(pathlib.Path("fig.json").read_text())["mse"]
    assert list(lines) == list(tiny.captions()[:2])
    assert all(len(values) == 4 and values[0] == 0 < min(values[1:]) for values in lines.values())
    assert "skipped step" in capsys.readouterr().out and os.path.getsize("fig.svg") > 1000


BUDGET = ["search", "--budget", "0.5"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["search"], "one of --budget, --speedup, --seconds; got none"),
        ([*BUDGET, "--speedup", "2"], "got --budget, --speedup"),
        (["search", "--budget", "1.5"], "budget must be"),
        ([*BUDGET, "--population", "1"], "population of at least 2"),
        ([*BUDGET, "--population", "1000000000"], "population must be an integer in 0..10000"),
        ([*BUDGET, "--generations", "1000000000"], "generations must be"),
        ([*BUDGET, "--lanes", "0"], "lanes must be an integer in 1..1024"),
        ([*BUDGET, "--lanes", "1000000000"], "lanes must be"),
        ([*BUDGET, "--swaps", "-1"], "swaps must be"),
        ([*BUDGET, "--seed", str(2**64)], "seed must be"),
        ([*BUDGET, "--steps", "1000000000"], "steps must be"),
        ([*BUDGET, "--dense-start", "0"], "dense_start must be"),
        ([*BUDGET, "--band", "nan", "1"], "band"),
        ([*BUDGET, "--band", "1e-300", "1e300"], "band"),
        ([*BUDGET, "--band", "1.1", "0.9"], "low <= high"),
        ([*BUDGET, "--guidance", "nan"], "guidance must be"),
        ([*BUDGET, "--shift", "1e308"], "shift must be"),
        (["search", "--speedup", "nan"], "speedup must be"),
        (["search", "--speedup", "inf"], "speedup must be"),
        (["search", "--seconds", "-1"], "seconds must be"),
        ([*BUDGET, "--heldout", "0"], "heldout"),
        ([*BUDGET, "--count", "1", "--patience", "2"], "count of at least 2"),
        ([*BUDGET, "--patience", "0.5"], "patience must be"),
        ([*BUDGET, "--patience", "nan"], "patience must be"),
        ([*BUDGET, "--patience", "2", "--distributed"], "--distributed out"),
        ([*BUDGET, "--count", "1000000000"], "count must be"),
        ([*BUDGET, "--count", "64"], "ask for fewer"),
        ([*BUDGET, "--output", "a.txt"], ".json"),
        ([*BUDGET, "--output", "a" * 300 + ".json"], "choose another"),
        ([*BUDGET, "--folder", "a" * 300], "choose another"),
        ([*BUDGET, "--folder", "/dev/null"], "choose another"),
        ([*BUDGET, "--prompts", "none.txt", *SMALL], "file of prompts"),
        ([*BUDGET, "--prompts", "/dev/zero"], "no regular file"),
        ([*BUDGET, "--prompts", "."], "is a folder"),
        ([*BUDGET, "--random", "1.3B"], "give --prompts"),
        ([*BUDGET, "--negative-prompt", "noise", "--guidance", "1"], "guidance above 1"),
        (["search", "--budget", "0.45", *SMALL], "0.4 and 0.6"),
        (["search", "--budget", "1", *SMALL], "nothing to search"),
        ([*BUDGET, "--dense-start", "6", *SMALL], "dense_start must be an integer in 1..5"),
        (["sensitivity", "--output", "a.txt"], ".png"),
        (["sensitivity", "--output", "a" * 251 + ".png"], "choose another"),
        (["sensitivity", "--count", "0"], "count must be"),
        (["sensitivity", "--lanes", "0"], "lanes must be"),
        (["sensitivity", "--steps", "1"], "at least 2 steps"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2_and_leaves_nothing(capsys, arguments, words):
    assert words in refused(capsys, *arguments)
    assert os.listdir() == []


@pytest.mark.parametrize("command", ["search --budget 0.5", "sensitivity --output out.png"])
def test_what_is_read_is_not_written_over(capsys, command):
    pathlib.Path("out.json").write_text("a red circle\n" * 8)
    line = refused(capsys, *command.split(), "--prompts", "out.json")
    assert "out.json would be written over" in line
    assert os.listdir() == ["out.json"]


def test_a_fifo_is_no_file_of_prompts(capsys):
    os.mkfifo("prompts.txt")
    assert "no regular file" in refused(capsys, *BUDGET, "--prompts", "prompts.txt")
    os.mkdir("out_search")
    os.mkfifo("out_search/latency.json")
    line = refused(capsys, "search", "--speedup", "2")
    assert "no regular file" in line


@pytest.mark.parametrize(
    "captions",
    [{"a": 1}, "a red circle", [["a red circle"]], [], [3], [""], ["  "], None, ["x" * 20_000]],
)
def test_captions_are_a_list_of_texts(captions):
    pathlib.Path("captions.json").write_text(json.dumps(captions))
    with pytest.raises(Refusal, match=r"captions.json: captions .*--prompts"):
        subject.read_prompts(None, ModelChoice(model=os.getcwd()))


def test_a_model_without_prompts_is_refused_before_any_weight_is_read(capsys, monkeypatch):
    monkeypatch.setattr(ModelChoice, "open", no_memory)
    os.mkdir("model")
    line = refused(capsys, *BUDGET, "--model", "model", "--count", "1", "--heldout", "1")
    assert "give --prompts" in line


@pytest.mark.parametrize(
    "content",
    [
        [1],
        {"of": {}},
        {"of": 3, "seconds": {}},
        {"of": {}, "seconds": {"10": -1}},
        {"of": {}, "seconds": {"10": 0}},
        {"of": {}, "seconds": {"10": "0.1"}},
        {"of": {}, "seconds": {"10": [0.1]}},
        {"of": {}, "seconds": [0.1]},
    ],
)
def test_a_table_of_step_times_is_checked_by_field(content):
    pathlib.Path("latency.json").write_text(json.dumps(content))
    with pytest.raises(Refusal, match=r"latency.json"):
        target.Latencies(pathlib.Path())


@pytest.mark.slow
def test_a_staged_model_reads_what_a_search_needs_and_no_more(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", os.getcwd())
    choice = ModelChoice(staged=True)
    asked = subject.Asked(choice, None, 2, "step-level", "euler", Sampling(3), VideoSize(5, 32, 32))
    opened = asked.open()
    assert not any(map(is_loaded, (opened.pipeline.transformer, opened.pipeline.text_encoder)))
    found = opened.load()
    pipeline = found.with_decoder().pipeline
    assert is_loaded(found.pipeline.transformer) and not is_loaded(found.pipeline.vae)
    assert is_loaded(pipeline.vae) and not is_loaded(pipeline.text_encoder)
    assert found.part(slice(1, None)).context.shape[0] == 2
    # Decoded as the pipeline does: in pieces where a video is large.
    cut = []
    monkeypatch.setattr(tiles, "MOST_PIXELS", 1 << 10)
    monkeypatch.setattr(
        tiles,
        "decode",
        lambda model, latents, **how: cut.append(how) or np.zeros((1, 5, 8, 8, 3)),
    )
    assert found.with_decoder().decode(found.noise).shape[0] == 2 and len(cut) == 2


def is_loaded(module):
    return not any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(module))


@pytest.mark.slow
def test_every_shipped_schedule_is_for_the_model_that_carries_it():
    pipeline = wan.Pipeline.from_pretrained()
    recipes = recipes_in(tiny.FOLDER / "schedules")
    assert {(each.solver, each.schedule.budget) for each in recipes} >= {
        (solver, budget) for solver in ("unipc", "euler") for budget in (0.3, 0.4, 0.5, 0.7)
    }
    for recipe in recipes:
        run = {"solver": recipe.solver, "shift": pipeline.shift, "steps": pipeline.defaults.steps}
        run["grid"] = pipeline.grid
        assert not recipe.differences(model=fingerprint(pipeline.transformer), **run)
        assert recipe.method in METHODS and recipe.quality["psnr"] > 25
        assert isinstance(recipe.schedule, Schedule)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
