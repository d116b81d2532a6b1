"""Schedules: budgets met, patterns, files, and what is refused."""

import json
import pathlib
import sys
import warnings
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from astraea_jax.schedule import (
    Schedule,
    check_budget,
    check_levels,
    check_steps,
    rows_at,
    rows_per_level,
)

pytestmark = [pytest.mark.core, pytest.mark.filterwarnings("ignore:a budget of:UserWarning")]

STEPS = st.integers(1, 60)
BUDGETS = st.floats(0.02, 1.0)


@settings(deadline=None, max_examples=200)
@given(steps=STEPS, budget=BUDGETS, dense_steps=st.integers(1, 5))
def test_uniform_meets_the_budget_to_the_nearest_tenth(steps, budget, dense_steps):
    assume(dense_steps <= steps and budget * steps >= dense_steps)
    schedule = Schedule.uniform(steps, budget, dense_steps=dense_steps)
    assert schedule.steps == steps
    assert abs(sum(schedule.levels) - 10 * budget * steps) <= 0.5 + 1e-9
    assert schedule.levels[:dense_steps] == (10,) * dense_steps
    rest = schedule.levels[dense_steps:]
    assert not rest or max(rest) - min(rest) <= 1


@settings(deadline=None, max_examples=200)
@given(steps=STEPS, budget=BUDGETS, dense_steps=st.integers(1, 5))
def test_skipping_meets_the_budget_to_the_nearest_step(steps, budget, dense_steps):
    assume(dense_steps <= steps and budget * steps >= dense_steps)
    schedule = Schedule.skipping(steps, budget, dense_steps=dense_steps)
    assert schedule.steps == steps and set(schedule.levels) <= {0, 10}
    assert abs(sum(schedule.levels) / 10 - budget * steps) <= 0.5 + 1e-9
    assert schedule.levels[:dense_steps] == (10,) * dense_steps
    # Runs of skipped steps between computed ones differ by one at most; it ends computed.
    computed = [i for i in range(dense_steps - 1, steps) if schedule.levels[i]]
    gaps = np.diff(computed)
    assert not len(gaps) or gaps.max() - gaps.min() <= 1
    assert not len(gaps) or computed[-1] == steps - 1


@settings(deadline=None, max_examples=200)
@given(steps=STEPS, budget=BUDGETS, whole_steps=st.booleans())
def test_for_budget_meets_it_after_a_dense_start(steps, budget, whole_steps):
    assume(budget * steps >= 1)
    schedule = Schedule.for_budget(steps, budget, whole_steps=whole_steps)
    tolerance = 5 if whole_steps else 0.5
    assert schedule.steps == steps
    assert abs(sum(schedule.levels) - 10 * budget * steps) <= tolerance + 1e-6
    assert set(schedule.levels) <= ({0, 10} if whole_steps else set(range(11)))


def test_patterns_by_hand():
    assert Schedule.dense(3).levels == (10, 10, 10)
    assert Schedule.uniform(5, 0.6).levels == (10, 5, 5, 5, 5)
    assert Schedule.uniform(5, 0.5).levels == (10, 3, 4, 4, 4)
    assert Schedule.uniform(6, 0.75, dense_steps=3).levels == (10, 10, 10, 5, 5, 5)
    assert Schedule.skipping(5, 0.6).levels == (10, 0, 10, 0, 10)
    assert Schedule.skipping(7, 3 / 7).levels == (10, 0, 0, 10, 0, 0, 10)
    assert Schedule.uniform(4, 1.0) == Schedule.skipping(4, 1.0) == Schedule.dense(4)
    assert Schedule.for_budget(10, 0.5, whole_steps=False).levels[:3] == (10, 10, 3)
    assert Schedule.skipping(7, 3 / 7, early=True).levels == (10, 10, 0, 0, 10, 0, 0)
    whole = Schedule.for_budget(10, 0.5, whole_steps=True).levels
    assert whole == (10, 10, 10, 0, 10, 0, 0, 10, 0, 0)


def test_budget_and_array():
    schedule = Schedule((10, 5, 0, 5))
    assert (schedule.steps, schedule.budget) == (4, 0.5)
    assert schedule.array().dtype == np.int8 and schedule.array().tolist() == [10, 5, 0, 5]


def test_numpy_levels_become_plain_integers(as_a_user):
    levels = Schedule((np.int8(10), np.int64(3))).levels
    assert levels == (10, 3) and all(type(level) is int for level in levels)


@pytest.mark.parametrize("tokens", [1, 7, 10, 96, 120, 1021])
def test_rows_and_realised_budget(tokens):
    rows = [rows_at(level, tokens) for level in range(11)]
    assert rows[0] == 0 and rows[10] == tokens
    assert rows == sorted(rows)
    assert rows[1] == rows_per_level(tokens) == int(np.ceil(tokens / 10))
    levels = (10, 9, 4, 0)
    expected = Fraction(sum(rows[level] for level in levels), tokens * len(levels))
    assert Schedule(levels).realised_budget(tokens) == pytest.approx(float(expected), rel=1e-12)
    if tokens % 10 == 0:
        assert Schedule(levels).realised_budget(tokens) == pytest.approx(Schedule(levels).budget)


@pytest.mark.parametrize(("tokens", "groups"), [(45, 3), (52, 4), (52, 13), (60, 60)])
def test_rows_of_groups_are_equal_in_each(tokens, groups):
    size = tokens // groups
    for level in range(11):
        rows = min(size, level * int(np.ceil(size / 10))) * groups
        assert rows_at(level, tokens, groups) == rows
    schedule = Schedule((10, 3, 0, 1))
    rows = [[rows_at(level, tokens, each) for level in schedule.levels] for each in (1, groups)]
    expected = np.mean(rows) / tokens
    assert schedule.realised_budget(tokens, (1, groups)) == pytest.approx(float(expected))


@pytest.mark.parametrize(
    ("steps", "budget", "realised"), [(4, 0.9, 1.0), (4, 0.6, 0.5), (4, 0.4, 0.5), (3, 0.5, 2 / 3)]
)
def test_a_budget_that_is_missed_by_a_tenth_is_said(steps, budget, realised):
    said = rf"a budget of {budget} comes out as {realised:.3g} of {steps} steps: take more steps"
    for make in (Schedule.skipping, lambda *each: Schedule.for_budget(*each, whole_steps=True)):
        with pytest.warns(UserWarning, match=said) as caught:
            schedule = make(steps, budget)
        assert schedule.budget == pytest.approx(realised)
        # It points at whoever called, not into the library.
        (warning,) = caught
        assert pathlib.Path(warning.filename).parent.name != "astraea_jax"


def test_a_budget_that_is_met_is_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for steps, budget in ((4, 0.5), (30, 0.3), (30, 0.5), (50, 0.7), (10, 0.55)):
            Schedule.for_budget(steps, budget, whole_steps=True)
            Schedule.for_budget(steps, budget, whole_steps=False)


def test_json_round_trip(tmp_path):
    schedule = Schedule((10, 0, 7, 3))
    path = tmp_path / "schedule.json"
    schedule.save(path, model="tiny", budget=0.5)
    assert Schedule.load(path) == schedule
    assert Schedule.load(str(path)) == schedule
    content = json.loads(path.read_text())
    assert content["levels"] == [10, 0, 7, 3] and content["steps"] == 4
    assert (content["model"], content["budget"]) == ("tiny", 0.5)
    assert [p.name for p in tmp_path.iterdir()] == ["schedule.json"], "no partial file stays"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", r"not valid JSON .* expected a schedule file"),
        (b"\xff\xfe", r"expected a schedule file \(JSON\) at .* can't be read"),
        ("[10, 5]", '"format": "astraea-schedule-1"; write it with save'),
        ('{"levels": [10]}', '"format": "astraea-schedule-1"'),
        ('{"format": "astraea-schedule-1", "levels": 7}', "levels must be a list of .* got 7"),
        ('{"format": "astraea-schedule-1", "levels": [10, 11]}', r"levels \[1\] .* got 11"),
        (
            '{"format": "astraea-schedule-1", "levels": [10, 5], "steps": 3}',
            "says 3 steps but holds 2 levels",
        ),
        *(
            (
                f'{{"format": "astraea-schedule-1", "levels": [10, 5], "steps": {steps}}}',
                r"schedule.json: steps must be an integer in 1\.\.10000; got",
            )
            for steps in ('"4"', "2.0", "true", "null", "[2]", "-1", "0", "1000000000")
        ),
    ],
)
def test_load_refuses(tmp_path, content, message):
    path = tmp_path / "schedule.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        Schedule.load(path)


def test_load_and_save_name_the_path(tmp_path):
    with pytest.raises(ValueError, match=r"expected a schedule file .*missing.json"):
        Schedule.load(tmp_path / "missing.json")
    with pytest.raises(ValueError, match="json"):
        Schedule((10,)).save(tmp_path / "schedule.txt")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Schedule(()), r"levels must be integers in 0\.\.10; got 0 values"),
        (lambda: Schedule((10,) * 10_001), r"in 0\.\.10; got 10001 values"),
        (lambda: Schedule((10, 12)), r"levels must be integers in 0\.\.10; level 2 is 12"),
        (lambda: Schedule((10, 3, -1)), r"in 0\.\.10; level 3 is -1"),
        (lambda: Schedule((9, 5)), "the first level must be 10 .* got 9"),
        (lambda: Schedule.dense(0), r"steps must be an integer in 1\.\.10000; got 0"),
        (lambda: Schedule.dense(10**9), r"steps must be .* 1\.\.10000; got 1000000000"),
        (lambda: Schedule.uniform(10, 0.0), "budget must be a number .* got 0.0"),
        (lambda: Schedule.uniform(10, 1.01), "budget must be a number .* at most 1; got 1.01"),
        (lambda: Schedule.uniform(10, float("nan")), "budget must be a number .* got nan"),
        (
            lambda: Schedule.skipping(10, 1e-300),
            "budget must be a number at least 0.0001 .* 1e-300",
        ),
        (lambda: Schedule.uniform(10, 0.01), "less than their 1 dense steps: ask for at least 0.1"),
        (lambda: Schedule.uniform(3, 0.9, dense_steps=4), r"dense_steps must be .* 1\.\.3 .* 4"),
        (lambda: Schedule.uniform(3, 0.9, dense_steps=0), r"dense_steps must be .* 1\.\.3 .* 0"),
        (lambda: Schedule.skipping(20, 0.01), "ask for at least 0.05"),
        (lambda: Schedule.skipping(10, 2), "budget must be a number"),
        (lambda: Schedule.for_budget(0, 0.5, whole_steps=True), "steps must be an integer"),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("level", [5.0, True, "5", None])
def test_a_level_that_is_no_integer_is_refused(as_a_user, level):
    with pytest.raises(ValueError, match=r"levels must be integers in 0\.\.10; level 2 is"):
        Schedule((10, level))


LEVELS_OF_5 = r"levels must be integers in 0\.\.10, one per step \(5\); "


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([10, 12, -3, 10, 0], "level 2 is 12"),
        ((10, 5, 0), "got 3 values"),
        ([10, 5, 12], "got 3 values, level 3 is 12"),
        (np.array([10, 0, 0, 0, -1]), "level 5 is -1"),
        (np.array([10.0, 5, 5, 5, 5]), "level 1 is 10.0"),
        (np.ones(5, bool), "level 1 is True"),
        (np.full((2, 5), 10), "got 2 values, level 1 is"),
        (np.int8(10), "got 10|got np.int8"),
        ("10000", "got '10000'"),
        (None, "got None"),
        ({10: 1}, "got {10: 1}"),
        (Schedule((10, 5)), "got 2 values"),
    ],
)
def test_levels_are_refused_in_the_same_words(as_a_user, levels, message):
    with pytest.raises(ValueError, match=f"{LEVELS_OF_5}({message})"):
        check_levels(levels, steps=5)


def test_levels_in_any_form():
    for levels in ([10, 5, 0], (10, 5, 0), np.array([10, 5, 0], np.uint8), Schedule((10, 5, 0))):
        found = check_levels(levels, steps=3)
        assert found == (10, 5, 0) and all(type(level) is int for level in found)
    with pytest.raises(ValueError, match=r"the first level must be 10 .* got 0"):
        check_levels([0, 10])
    assert check_levels([10, 10, 5], dense_start=2) == (10, 10, 5)
    with pytest.raises(ValueError, match=r"the first 3 levels must be 10 .* got 5"):
        check_levels([10, 10, 5], dense_start=3)


def test_numbers_of_numpy_are_numbers(as_a_user):
    assert type(check_steps(np.int64(30))) is int and type(check_budget(np.float32(1))) is float
    assert Schedule.uniform(np.int16(30), np.float32(0.5)) == Schedule.uniform(30, 0.5)


@pytest.mark.parametrize("budget", ["half", None, "0.5", True])
def test_a_budget_that_is_no_number_is_refused(as_a_user, budget):
    with pytest.raises(
        ValueError, match=r"budget must be a number at least 0.0001 and at most 1; got"
    ):
        check_budget(budget)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
