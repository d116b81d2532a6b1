"""Journal and resume: what is on disk survives, whatever happens to the process."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from astraea_jax.checks import Refusal
from astraea_jax.schedule import Schedule
from astraea_jax.search import journal as journals
from astraea_jax.search import study
from astraea_jax.search.evolution import SearchConfig
from astraea_jax.search.recipe import Recipe, is_recipe, recipes_in
from astraea_jax.search.scoring import Evaluation, Evaluator, known_to
from astraea_jax.search.space import Space

ROOT = pathlib.Path(__file__).resolve().parents[1]
HEADER = {"model": "a", "steps": 8}
SPACE = Space.for_budget(8, 0.5)
CONFIG = SearchConfig(population=6, parents=3, generations=4)


def score(levels):
    weight = np.arange(8, 0, -1)
    left_out = (weight * (1 - np.asarray(levels) / 10) ** 2).sum(axis=1)
    return np.stack([left_out, left_out**2], axis=1)


def run(folder, *, score=score, config=CONFIG):
    """A whole search in a folder."""
    with journals.open_journal(folder, HEADER) as journal:
        evaluator = Evaluator(
            [score],
            batch=2,
            record=journal.append,
            known={each.levels: each for each in journal.evaluations},
        )
        states = pathlib.Path(folder) / study.STATES
        return study.evolve(SPACE, config, evaluator, jax.random.key(3), states=states)


def lines(folder):
    """The journal without what differs from run to run."""
    read = [json.loads(line) for line in (folder / journals.JOURNAL).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in read]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, kept_programs):
    """An uninterrupted search: its folder and result."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder)


KILLED = """
import os, sys, pathlib
sys.path[:0] = [{tests!r}]
import study_test
calls = 0
def score(levels):
    global calls
    calls += 1
    if calls == {at}:
        os.kill(os.getpid(), {signal})
    return study_test.score(levels)
study_test.run(pathlib.Path({folder!r}), score=score)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "at"), [(signal.SIGKILL, 6), (signal.SIGTERM, 2)])
def test_killed_at_any_instant_and_run_again_it_ends_the_same(
    kept_programs, tmp_path, whole, number, at
):
    code = KILLED.format(tests=str(ROOT / "tests"), folder=str(tmp_path), at=at, signal=int(number))
    path = os.pathsep.join(str(ROOT / part) for part in ("", "ports"))
    environment = {"PYTHONPATH": path, "JAX_COMPILATION_CACHE_DIR": str(kept_programs)}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, check=False
    )
    assert done.returncode == -number
    before = len(lines(tmp_path))
    assert 1 <= before < len(lines(whole[0]))
    again = run(tmp_path)
    assert again.best == whole[1].best and again.fitness == whole[1].fitness
    assert lines(tmp_path) == lines(whole[0])
    assert again.evaluations == whole[1].evaluations


@pytest.mark.slow
def test_a_finished_search_computes_nothing_when_run_again(whole):
    folder, result = whole

    def refuse(levels):
        raise AssertionError("computed again")

    again = run(folder, score=refuse)
    assert again.best == result.best and again.number == CONFIG.generations
    # Nor when the states are lost, or can't be read: the journal is enough.
    for path in (folder / study.STATES).rglob("*"):
        if path.is_file():
            path.write_bytes(b"broken")
    with pytest.warns(UserWarning, match="going on from the journal"):
        again = run(folder, score=refuse)
    assert again.best == result.best


@pytest.mark.slow
def test_more_generations_go_on_from_the_state(tmp_path):
    short = run(tmp_path, config=SearchConfig(6, 3, 2))
    longer = run(tmp_path, config=SearchConfig(6, 3, 4))
    assert short.number == 2 and longer.number == 4
    assert longer.evaluations > short.evaluations and longer.fitness <= short.fitness


def test_a_truncated_last_line_is_repaired_and_reported(tmp_path):
    with journals.open_journal(tmp_path, HEADER) as journal:
        journal.append(Evaluation((10, 0), (0.5, float("nan")), 0.1))
    path = tmp_path / journals.JOURNAL
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"levels": [10, ')
    with (
        pytest.warns(UserWarning, match=r"was cut off \(16 bytes\).*2 lines are intact"),
        journals.open_journal(tmp_path, HEADER) as journal,
    ):
        (kept,) = journal.evaluations
    assert kept.levels == (10, 0) and np.isnan(kept.errors[1])
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "content", [b"no line of a journal", b'{"header": 3}\n', b"[]\n", b"\n", b"[" * 10_000 + b"\n{"]
)
def test_what_is_no_journal_is_left_as_it_was(tmp_path, content):
    path = tmp_path / journals.JOURNAL
    path.write_bytes(content)
    with (
        pytest.raises(Refusal, match="no search journal"),
        journals.open_journal(tmp_path, HEADER),
    ):
        pass
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "changes",
    [
        {"levels": [10, 11]},
        {"levels": [0, 10]},
        {"levels": [10, True]},
        {"levels": [10]},
        {"levels": "10"},
        {"levels": 10**30},
        {"errors": [0.5]},
        {"errors": [0.5, -1]},
        {"errors": [0.5, "0.5"]},
        {"errors": [0.5, None]},
        {"errors": []},
        {"errors": [0.5, 0.5, 0.5]},
        {"seconds": -1},
        {"seconds": "1"},
        {"stopped": 1},
        {"search": None},
        {"other": 1},
    ],
)
def test_a_line_of_a_journal_is_checked_by_field(tmp_path, changes):
    known = {"steps": 2, "prompts": 2}
    with journals.open_journal(tmp_path, HEADER, **known) as journal:
        journal.append(Evaluation((10, 0), (0.5, float("inf")), 0.1))
        journal.append(Evaluation((10, 0), (0.5,), 0.1, stopped=True))
    with journals.open_journal(tmp_path, HEADER, **known) as journal:
        assert len(journal.evaluations) == 2
    path = tmp_path / journals.JOURNAL
    first, line, _ = path.read_text().splitlines()
    path.write_text(f"{first}\n{json.dumps(json.loads(line) | changes)}\n")
    with (
        pytest.raises(Refusal, match=r"no search journal \(line 2"),
        journals.open_journal(tmp_path, HEADER, **known),
    ):
        pass


def test_a_journal_that_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / journals.JOURNAL)
    with (
        pytest.raises(Refusal, match="no regular file"),
        journals.open_journal(tmp_path, HEADER),
    ):
        pass


def test_what_one_search_gave_up_another_sees_for_itself(tmp_path):
    parts = [lambda levels: score(levels)[:, :1], lambda levels: score(levels)[:, 1:]]
    # The third is given up under the strict patience, and is the best but one on both prompts.
    rows = np.full((3, 8), 10, np.int8)
    rows[0, 7], rows[1, 6], rows[2, 5] = 5, 7, 5
    fitness = {}
    for name, patience in (("strict", 1.0), ("lax", 1000.0), ("none", None)):
        with journals.open_journal(tmp_path, HEADER) as journal:
            known = known_to(name, journal.evaluations)
            assert sum(each.stopped for each in known.values()) == 0
            evaluator = Evaluator(
                parts, patience=patience, keep=1, batch=1, record=journal.append, search=name,
                known=known,
            )  # fmt: skip
            fitness[name] = evaluator(rows)
    assert np.isinf(fitness["strict"][2]) and np.isfinite(fitness["lax"]).all()
    assert np.array_equal(fitness["lax"], fitness["none"])
    # The strict one goes on with what it gave up, as far as nothing more is known of it.
    strict = [each for each in journal.evaluations if each.search == "strict"]
    assert known_to("strict", strict)[tuple(rows[2].tolist())].stopped


def test_two_processes_cannot_write_one_journal(tmp_path):
    with (
        journals.open_journal(tmp_path, HEADER),
        pytest.raises(ValueError, match="in use by another run"),
        journals.open_journal(tmp_path, HEADER),
    ):
        pass
    with journals.open_journal(tmp_path, HEADER):  # free again
        pass


def test_the_journal_of_another_search_is_refused_and_says_why(tmp_path):
    with journals.open_journal(tmp_path, HEADER):
        pass
    before = (tmp_path / journals.JOURNAL).read_bytes()
    with (
        pytest.raises(ValueError, match="model: a there, b asked for"),
        journals.open_journal(tmp_path, {**HEADER, "model": "b"}),
    ):
        pass
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / journals.JOURNAL).write_text("not a journal\n")
    with (
        pytest.raises(ValueError, match="no search journal"),
        journals.open_journal(tmp_path / "other", HEADER),
    ):
        pass
    assert (tmp_path / journals.JOURNAL).read_bytes() == before


def test_a_full_disk_leaves_the_journal_as_it_was(tmp_path, monkeypatch):
    with journals.open_journal(tmp_path, HEADER) as journal:
        before = (tmp_path / journals.JOURNAL).read_bytes()
        full = OSError(28, "No space left on device")
        monkeypatch.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(full))
        with pytest.raises(ValueError, match=r"No space left on device.*intact"):
            journal.append(Evaluation((10, 0), (0.5,), 0.1))
    assert (tmp_path / journals.JOURNAL).read_bytes() == before


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ValueError, match="can't write"),
        journals.open_journal(tmp_path / "file" / "folder", HEADER),
    ):
        pass


def test_pareto_keeps_what_nothing_beats():
    levels = [(10, 0, 0), (10, 10, 0), (10, 0, 10), (10, 10, 10)]
    errors = [3.0, 1.0, 2.0, 1.5]
    known = [Evaluation(each, (error,), 0.0) for each, error in zip(levels, errors, strict=True)]
    front = study.pareto(known, lambda each: each.errors[0])
    assert [point["fitness"] for point in front] == [3.0, 1.0]


@pytest.mark.slow
def test_the_search_stops_at_its_deadline_and_says_how_long_is_left(tmp_path):
    seen = []
    with journals.open_journal(tmp_path, HEADER) as journal:
        evaluator = Evaluator([score], record=journal.append)
        result = study.evolve(
            SPACE, CONFIG, evaluator, jax.random.key(0), progress=seen.append,
            deadline=time.perf_counter(),
        )  # fmt: skip
    assert result.number == 0 and len(seen) == 1 and seen[0].left > 0
    assert "about" in study.describe(seen[0])


RECIPE = Recipe(
    Schedule((10, 0, 10)), "step-level-corrected", "unipc", 3.0, "diffusers", "abc",
    {"psnr": 40.0, "prompts": 16}, {"budget": 2 / 3}, "0.1.0",
)  # fmt: skip


def test_a_recipe_comes_back_as_it_was_and_is_a_schedule_file(tmp_path):
    RECIPE.save(tmp_path / "a.json")
    assert Recipe.load(tmp_path / "a.json") == RECIPE
    assert Schedule.load(tmp_path / "a.json") == RECIPE.schedule
    assert recipes_in(tmp_path) == [RECIPE] and is_recipe(tmp_path / "a.json")
    assert recipes_in(tmp_path / "none") == []
    RECIPE.schedule.save(tmp_path / "plain.json")
    assert not is_recipe(tmp_path / "plain.json")
    with pytest.raises(ValueError, match="lacks"):
        Recipe.load(tmp_path / "plain.json")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"solver": 3}, "solver"),
        ({"shift": 0}, "shift"),
        ({"quality": {"psnr": "high"}}, "quality"),
        ({"cost": {"budget": 0.4}}, "budget 0.4"),
        ({"model": ""}, "model"),
        ({"levels": [10, 0]}, "3 steps but holds 2"),
        ({"levels": [10, 0, 11]}, r"levels \[2\]"),
        ({"levels": [10] * 10_001}, "levels"),
        ({"levels": {"0": 10}}, "levels"),
        ({"levels": [0, 10, 10]}, "first level"),
        ({"steps": "3"}, "steps"),
        ({"steps": 10**30}, "steps"),
        ({"shift": 1e308}, "shift"),
        ({"quality": {"psnr": 10**400}}, "quality"),
        ({"quality": [40.0]}, "quality"),
        ({"cost": {"seconds": -1}}, "cost"),
        ({"guidance": "5"}, "guidance"),
        ({"lora": "style.safetensors"}, "lora"),
        ({"solvr": "euler"}, "'solvr' is not known"),
        ({"grid": "a" * 2000}, "grid"),
        ({"version": None}, "version"),
    ],
)
def test_a_recipe_that_is_wrong_is_refused(tmp_path, as_a_user, changes, words):
    path = tmp_path / "a.json"
    RECIPE.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=words):
        Recipe.load(path)


def test_a_recipe_says_in_what_a_run_differs():
    run = {"model": "abc", "solver": "unipc", "shift": 3.0, "grid": "diffusers", "steps": 3}
    assert RECIPE.differences(**run) == []
    said = RECIPE.differences(**run | {"model": "x", "solver": "euler", "steps": 4})
    assert said == ["another model", "solver unipc, not euler", "steps 3, not 4"]
    # What it does not record differs from nothing.
    assert RECIPE.differences(**run, guidance=7.0, negative_prompt="noise") == []
    recorded = dataclasses.replace(RECIPE, guidance=5.0, negative_prompt="noise")
    assert recorded.differences(**run, guidance=5.0, negative_prompt="noise") == []
    said = recorded.differences(**run, guidance=1.0)
    assert said == ["guidance 5.0, not 1.0", "negative prompt 'noise', not ''"]


def test_files_of_schedules_are_regular_and_say_what_is_beside_the_levels(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    for read in (Recipe.load, Schedule.load, is_recipe, lambda path: recipes_in(path.parent)):
        with pytest.raises(Refusal, match="no regular file"):
            read(tmp_path / "a.json")
    for about in ({"levels": [10]}, {"a": float("nan")}, {"a": object()}):
        with pytest.raises(Refusal):
            Schedule((10, 0)).save(tmp_path / "b.json", **about)
    assert os.listdir(tmp_path) == ["a.json"]


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
