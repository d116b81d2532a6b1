"""`astraea search`, `astraea sensitivity`, and what `astraea generate` does with schedule files."""

import json
import os
import pathlib
import sys

import jax
import pytest
from command_line import refused

from astraea_jax import cli, report
from astraea_jax.bench.latency import latency_table
from astraea_jax.bench.models import ModelChoice
from astraea_jax.cli.generate import Request, suitable
from astraea_jax.methods import METHODS
from astraea_jax.model import fingerprint
from astraea_jax.schedule import Schedule
from astraea_jax.search import study
from astraea_jax.search.recipe import Recipe, recipes_in
from astraea_ports import tiny, wan

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("in_an_empty_folder")]

SIZE = ["--frames", "5", "--height", "32", "--width", "32"]
SMALL = [*SIZE, "--steps", "5", "--count", "1", "--heldout", "1", "--lanes", "2"]
SMALL += ["--population", "4", "--parents", "2", "--generations", "1", "--swaps", "3"]


def test_a_search_writes_a_schedule_that_generate_runs_and_goes_on_where_it_was(capsys):
    pathlib.Path("prompts.txt").write_text("a red circle\n\na blue square\n")
    arguments = ["search", "--budget", "0.6", "--prompts", "prompts.txt", *SMALL]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    for words in ("generation 0", "generation 1", "left", "realised budget", "held-out", "levels:"):
        assert words in printed
    recipe = Recipe.load("out.json")
    assert recipe.schedule.budget == 0.6 and recipe.method == "step-level-corrected"
    assert {"psnr", "ssim", "mse", "prompts"} <= set(recipe.quality)
    assert os.path.getsize("out_search/pareto.png") > 1000
    journal = pathlib.Path("out_search", study.JOURNAL).read_text()

    assert cli.main(arguments) == 0
    assert "0 computed now" in capsys.readouterr().out
    assert pathlib.Path("out_search", study.JOURNAL).read_text() == journal
    assert Recipe.load("out.json") == recipe

    line = refused(capsys, *arguments, "--solver", "euler")
    assert "another search" in line and "solver" in line

    run = ["generate", "a red circle", "--schedule", "out.json", "--no-compilation-cache"]
    assert cli.main([*run, *SIZE]) == 0
    captured = capsys.readouterr()
    assert "60.0 %" in captured.out and "corrected" in captured.out
    assert "warning" not in captured.err


def test_a_schedule_of_another_solver_is_warned_of_and_not_taken():
    pipeline = wan.Pipeline.from_pretrained()
    asked = dict.fromkeys(Request.__dataclass_fields__) | {"solver": "euler", "budget": 0.4}
    asked |= {"prompt": "a red circle", "model": ModelChoice(), "negative_prompt": "", "seed": 0}
    asked |= {"size": (None, None, None), "compare": False, "show_selection": False}
    asked |= {"output": pathlib.Path("out.mp4")}
    (recipe,) = [
        each
        for each in suitable(Request(**asked), pipeline)
        if each.schedule.budget == 0.4
    ]  # fmt: skip
    assert recipe.solver == "euler" and recipe.schedule.steps == pipeline.defaults.steps
    other = Request(**asked | {"solver": "unipc", "budget": None, "schedule": recipe})
    with pytest.warns(UserWarning, match="searched for solver euler, not unipc"):
        assert suitable(other, pipeline) == []
    assert suitable(Request(**asked | {"steps": 7}), pipeline) == []


def test_a_speed_up_is_met_by_the_step_times_of_this_machine():
    key = {"model": fingerprint(wan.Pipeline.from_pretrained().transformer), "size": [5, 32, 32]}
    key |= {"method": "step-level", "device": jax.devices()[0].device_kind}
    pathlib.Path("out_search").mkdir()
    # As measured earlier: five dense steps take 1 s, so 1.5 times faster is at most 667 ms.
    report.write_json("out_search/latency.json", {"of": key, "seconds": {0: 0.04, 10: 0.2}})
    arguments = ["search", "--speedup", "1.5", "--method", "step-level", "--sensitivities"]
    small = [*SMALL, "--generations", "0", "--swaps", "0"]
    assert cli.main([*arguments, *small, "--band", "0.5", "1.0"]) == 0
    recipe = Recipe.load("out.json")
    assert sorted(recipe.schedule.levels) == [0, 0, 0, 10, 10]
    assert recipe.cost["seconds"] == pytest.approx(0.52)
    assert recipe.cost["speedup"] == pytest.approx(1 / 0.52)


def test_step_times_are_measured_at_every_level():
    pipeline = wan.Pipeline.from_pretrained()
    table = latency_table(pipeline, (5, 32, 32), METHODS["step-level"], (0, 10), rounds=1)
    assert set(table) == {0, 10} and min(table.values()) > 0


def test_sensitivity_draws_a_line_a_prompt(capsys):
    arguments = ["sensitivity", *SIZE, "--steps", "4", "--count", "2", "--output", "fig.svg"]
    assert cli.main(arguments) == 0
    lines = json.loads(pathlib.Path("fig.json").read_text())["mse"]
    assert list(lines) == list(tiny.captions()[:2])
    assert all(len(values) == 4 and values[0] == 0 < min(values[1:]) for values in lines.values())
    assert "skipped step" in capsys.readouterr().out and os.path.getsize("fig.svg") > 1000


def test_a_study_judges_what_it_finds_goes_on_and_ships(capsys):
    small = [*SIZE, "--steps", "6", "--budgets", "0.5", "--solver", "euler", "--rows", "4"]
    small += ["--search-prompts", "1", "--seeds", "2", "--look", "1", "--heldout-prompts", "2"]
    small += ["--pool", "1", "--population", "4", "--generations", "1", "--swaps", "2"]
    parts = ["--reuses", "step-level", "--parts", "by-hand", "step-level"]
    study_of = ["bench", "search", "--output", "out_study", *small, *parts]
    assert cli.main([*study_of, "--ship", "schedules"]) == 0
    printed = capsys.readouterr().out
    found = json.loads(pathlib.Path("out_study/results.json").read_text())["rows"]
    by_hand = [row for row in found if row["what"].startswith("hand-made")]
    (best,) = [row for row in found if row["what"] == "step-level EA"]
    assert by_hand and best["validation"] > 0 and len(best["psnr_each"]) == 2
    assert sum(best["levels"]) == 30 and "best of " in printed
    (recipe,) = recipes_in("schedules")
    assert recipe.schedule.levels == tuple(best["levels"]) and recipe.quality["prompts"] == 2
    journal = pathlib.Path("out_study", study.JOURNAL).read_text()
    assert cli.main(study_of) == 0
    assert json.loads(pathlib.Path("out_study/results.json").read_text())["rows"] == found
    assert pathlib.Path("out_study", study.JOURNAL).read_text() == journal
    # A study of its own that begins at what this one found is no worse where both search.
    study_of[3] = "out_other"
    assert cli.main([*study_of, "--starts", "out_study/results.json"]) == 0
    rows = json.loads(pathlib.Path("out_other/results.json").read_text())["rows"]
    (other,) = [row for row in rows if row["what"] == "step-level EA"]
    assert float(other["fitness"]) <= float(best["fitness"])
    evaluated = pathlib.Path("out_other", study.JOURNAL).read_text()
    assert json.dumps(best["levels"], separators=(",", ":")) in evaluated.replace(" ", "")
    assert cli.main([*study_of, "--starts", "nowhere.json"]) == 2
    assert "no file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["search"], "one of --budget, --speedup, --seconds; got none"),
        (["search", "--budget", "0.5", "--speedup", "2"], "got --budget, --speedup"),
        (["search", "--budget", "1.5"], "budget must be"),
        (["search", "--budget", "0.5", "--population", "1"], "population of at least 2"),
        (["search", "--seconds", "-1"], "seconds must be"),
        (["search", "--budget", "0.5", "--heldout", "0"], "heldout"),
        (["search", "--budget", "0.5", "--count", "1", "--patience", "2"], "count of at least 2"),
        (["search", "--budget", "0.5", "--output", "a.txt"], ".json"),
        (["search", "--budget", "0.45", *SMALL], "0.4 and 0.6"),
        (["search", "--budget", "0.5", "--prompts", "none.txt", *SMALL], "file of prompts"),
        (["search", "--budget", "0.5", "--count", "64"], "ask for fewer"),
        (["sensitivity", "--output", "a.txt"], ".png"),
        (["sensitivity", "--count", "0"], "count must be"),
        (["bench", "search", "--heldout-prompts", "1"], "2 held-out"),
        (["bench", "search", "--parts", "transfer"], "--starts"),
        (["bench", "scoring", "--plans", "fast"], "plans among"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, arguments, words):
    assert words in refused(capsys, *arguments)


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
