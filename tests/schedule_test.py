"""Schedules: budgets met, patterns, files, and what is refused."""

import json
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from astraea_jax.schedule import Schedule, check_budget, rows_at, rows_per_level

pytestmark = pytest.mark.core

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
        (lambda: Schedule(()), "levels must hold one integer a step; got none"),
        (lambda: Schedule((10, 12)), r"levels must be integers in 0\.\.10; level 2 is 12"),
        (lambda: Schedule((10, 3, -1)), r"in 0\.\.10; level 3 is -1"),
        (lambda: Schedule((9, 5)), "the first level must be 10 .* got 9"),
        (lambda: Schedule.dense(0), "steps must be an integer of at least 1; got 0"),
        (lambda: Schedule.uniform(10, 0.0), "budget must be a number above 0 .* got 0.0"),
        (lambda: Schedule.uniform(10, 1.01), "budget must be a number above 0 .* got 1.01"),
        (lambda: Schedule.uniform(10, float("nan")), "budget must be a number .* got nan"),
        (lambda: Schedule.uniform(10, 0.01), "less than their 1 dense steps: ask for at least 0.1"),
        (lambda: Schedule.uniform(3, 0.9, dense_steps=4), r"dense_steps must be in 1\.\.3 .* 4"),
        (lambda: Schedule.uniform(3, 0.9, dense_steps=0), r"dense_steps must be in 1\.\.3 .* 0"),
        (lambda: Schedule.skipping(20, 0.01), "ask for at least 0.05"),
        (lambda: Schedule.skipping(10, 2), "budget must be a number above 0"),
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


@pytest.mark.parametrize("budget", ["half", None])
def test_a_budget_that_is_no_number_is_refused(as_a_user, budget):
    with pytest.raises(ValueError, match=r"budget must be a number above 0 and at most 1, as 0.5"):
        check_budget(budget)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
