"""What is refused, and that everything else is let through."""

import json
import math
import sys

import numpy as np
import pytest

from astraea_jax import checks
from astraea_jax.checks import Refusal


@pytest.mark.parametrize("value", [0, 7, np.int64(7), np.uint8(7)])
def test_integers_of_any_kind_are_whole(value):
    got = checks.whole("steps", value, 0, 7)
    assert got == value and type(got) is int


@pytest.mark.parametrize(
    "value", [True, 1.0, "1", None, -1, 8, 10**30, float("nan"), [1], np.float32(1), {}]
)
def test_what_is_no_integer_in_the_range_is_refused(value):
    with pytest.raises(Refusal, match=r"^steps must be an integer in 0\.\.7; got "):
        checks.whole("steps", value, 0, 7)


@pytest.mark.parametrize("value", [0, 1, 0.5, np.float32(0.5), np.int8(1)])
def test_numbers_of_any_kind(value):
    assert checks.number("share", value, 0, 1) == float(value)


@pytest.mark.parametrize(
    "value", [True, "0.5", None, -1e-30, 1.1, math.nan, math.inf, 10**400, [0.5], {}]
)
def test_what_is_no_number_in_the_range_is_refused(value):
    with pytest.raises(Refusal, match=r"^share must be a number at least 0 and at most 1; got "):
        checks.number("share", value, 0, 1)


def test_a_number_may_have_to_lie_above_its_bound():
    with pytest.raises(Refusal, match="above 0"):
        checks.number("share", 0.0, 0, 1, above=True)


@pytest.mark.parametrize("value", [None, 3, "text", [1.0], object])
def test_what_is_no_array_is_refused(value):
    with pytest.raises(Refusal, match=r"video must be an array \[F, H\]; got"):
        checks.array("video", value, "[F, H]")
    zeros = np.zeros(3)
    assert checks.array("video", zeros) is zeros


def test_a_flag_is_true_or_false():
    assert checks.flag("on", True) and not checks.flag("on", False)
    for value in (1, "true", None):
        with pytest.raises(Refusal, match="on must be true or false; got"):
            checks.flag("on", value)


def test_one_of_knows_true_from_one():
    assert checks.one_of("kind", "a", ("a", "b")) == "a"
    for value in (True, 1.0, "1"):
        with pytest.raises(Refusal):
            checks.one_of("number", value, (1, 2))


RULES = {
    "layers": checks.Whole(1, 100),
    "eps": checks.Number(0, 1, above=True),
    "sizes": checks.ListOf(checks.Whole(1, 9), 2, 3),
    "name": checks.Text(5),
    "flag": checks.Flag(),
    "maybe": checks.OrNone(checks.OneOf((1, "x"))),
    "costs": checks.ByName(checks.Number(0, math.inf), most=2),
}
SOUND = {
    "layers": 3,
    "eps": 1e-6,
    "sizes": [1, 9],
    "name": "abc",
    "flag": False,
    "maybe": None,
    "costs": {"budget": 0.5},
}


def test_a_sound_file_goes_through():
    assert checks.fields(SOUND, RULES, name="config.json") == SOUND


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("layers", [0, 101, 10**30, 2.0, True, "3", None, [3], {"a": 1}]),
        ("eps", [0, -1, 2, math.nan, math.inf, "1e-6", None, True]),
        ("sizes", [[1], [1, 2, 3, 4], [1, True], [0, 1], "12", 1, None, {}]),
        ("name", ["", "abcdef", 3, None, ["a"]]),
        ("flag", [0, 1, "true", None]),
        ("maybe", [2, True, 1.0, "y", []]),
        ("costs", [{"a": -1}, {"a": math.nan}, {"a": "1"}, {"a": 1, "b": 1, "c": 1}, [], 3]),
    ],
)
def test_every_wrong_field_is_refused_by_its_name(field, values):
    for value in values:
        with pytest.raises(Refusal, match=rf"config\.json: {field} "):
            checks.fields(SOUND | {field: value}, RULES, name="config.json")


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(Refusal) as refused:
        checks.fields({"eps": -1, "other": 2}, RULES, name="a file", required=["layers"])
    said = str(refused.value).splitlines()
    assert said[0].startswith("a file: 3 fields are wrong")
    assert [line.split()[0] for line in said[1:]] == ["layers", "eps", "'other'"]


def test_fields_without_a_rule_are_let_through_where_that_is_asked_for():
    assert checks.fields({"other": 2}, RULES, name="a file", others=True) == {}


@pytest.mark.parametrize("content", [None, 3, "text", [1]])
def test_what_is_no_object_is_refused(content):
    with pytest.raises(Refusal, match="to be an object"):
        checks.fields(content, RULES, name="a file")


def test_long_values_are_cut():
    assert len(checks.shown("x" * 10_000)) < 120
    assert checks.shown(10**5000) == "a int"


def test_messages_hold_what_json_may_hold():
    deep = json.loads("[" * 900 + "]" * 900)
    assert len(checks.shown(deep)) < 120


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
