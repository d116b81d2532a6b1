"""Selection: scores by hand, the order, groups, masks, and every choice of the config."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from astraea_jax import selection
from astraea_jax.schedule import rows_at, rows_per_level
from astraea_jax.selection import PUBLISHED, SelectionConfig

pytestmark = pytest.mark.core

rng = np.random.default_rng(0)


def zeros_age(scores):
    return jnp.zeros(scores.shape, jnp.int8)


def test_order_is_by_falling_score():
    scores = jnp.asarray(rng.permutation(40).reshape(1, 40), jnp.float32)
    ordered = np.asarray(selection.order(scores, zeros_age(scores)))
    assert np.array_equal(ordered[0], np.argsort(-np.asarray(scores[0])))


def test_ties_break_by_age_then_by_the_hash_and_not_by_position():
    scores = jnp.asarray(rng.integers(0, 3, (2, 60)), jnp.float32)
    age = jnp.asarray(rng.integers(0, 4, (2, 60)), jnp.int8)
    ordered = np.asarray(selection.order(scores, age))
    tie = (np.arange(60, dtype=np.uint64) * 2654435761 % 2**32).astype(np.uint32)
    for row in range(2):
        expected = np.lexsort((tie, -np.asarray(age[row]).astype(int), -np.asarray(scores[row])))
        assert np.array_equal(ordered[row], expected)
    # All alike: a tenth of the tokens is spread over the whole video.
    level = np.asarray(selection.order(jnp.zeros((1, 1000)), jnp.zeros((1, 1000), jnp.int8)))
    taken = level[0, :100]
    assert not np.array_equal(np.sort(taken), np.arange(100))
    assert all(5 <= n <= 15 for n in np.histogram(taken, 10, (0, 1000))[0])


def test_the_tie_breaker_is_a_permutation():
    for num_tokens in (1, 120, 75_600):
        assert len(np.unique(selection.tie_breaker(num_tokens))) == num_tokens


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize(("groups", "size"), [(6, 20), (4, 13), (5, 7)])
def test_groups_get_equally_many_rows_at_every_level(contiguous, groups, size):
    num_tokens = groups * size
    # Scores that favour one group by far: still every group has its share.
    scores = jnp.asarray(rng.normal(size=(2, num_tokens)) + np.arange(num_tokens), jnp.float32)
    ordered = np.asarray(
        selection.order(scores, zeros_age(scores), groups=groups, contiguous=contiguous)
    )
    tenth = -(-size // 10)
    assert ordered.shape == (2, 10 * rows_per_level(num_tokens, groups))
    for row in range(2):
        for level in range(1, 11):
            taken = ordered[row, : level * tenth * groups]
            taken = taken[taken < num_tokens]
            # What is booked is what is computed.
            assert len(taken) == rows_at(level, num_tokens, groups)
            group = taken // size if contiguous else taken % groups
            count = min(size, level * tenth)
            assert (np.bincount(group, minlength=groups) == count).all()
            for index in range(groups):
                every = np.arange(num_tokens)
                members = every[(every // size if contiguous else every % groups) == index]
                best = members[np.argsort(-np.asarray(scores[row])[members])][:count]
                assert set(best) == set(taken[group == index])
        assert np.array_equal(np.sort(ordered[row][ordered[row] < num_tokens]), range(num_tokens))


def test_entries_past_the_tokens_are_their_number():
    scores = jnp.asarray(rng.normal(size=(1, 23)), jnp.float32)
    ordered = np.asarray(selection.order(scores, zeros_age(scores)))[0]
    assert len(ordered) == 30 and (ordered[23:] == 23).all()
    assert np.array_equal(np.sort(ordered[:23]), np.arange(23))


@pytest.mark.parametrize("branches", ["shared", "separate"])
def test_a_video_is_ranked_in_a_batch_as_alone(branches):
    """The same bits in give the same order out, whatever lies beside them; also between ties."""
    config = SelectionConfig(branches=branches)
    # Of half precision, and few values: many ties.
    now, before = jnp.asarray(rng.integers(0, 3, (2, 2, 4, 50, 8)), jnp.bfloat16)
    lse = jnp.asarray(rng.uniform(1, 6, (2, 4, 50)), jnp.float32).round()
    age = jnp.asarray(rng.integers(0, 4, (2, 4, 50)), jnp.int8)

    def ordered(*inputs):
        now, before, lse, age = (x.reshape(-1, *x.shape[2:]) for x in inputs)
        scores = selection.score(lse, selection.change(now, before, config), age, config)
        assert scores.dtype == jnp.float32
        if branches == "shared":
            scores = selection.shared_score(scores, 2)
        return np.asarray(selection.order(scores, age)).reshape(*inputs[0].shape[:2], -1)

    inputs = now, before, lse, age
    together = ordered(*inputs)
    for video in range(4):
        alone = ordered(*(x[:, video : video + 1] for x in inputs))
        assert np.array_equal(alone[:, 0], together[:, video])


def test_selected_mask():
    ordered = jnp.array([[3, 1, 4, 0, 2, 5, 5], [0, 4, 2, 3, 1, 5, 5]])
    mask = np.asarray(selection.selected_mask(ordered, 2, 5))
    assert mask.tolist() == [[False, True, False, True, False], [True, False, False, False, True]]
    assert not np.asarray(selection.selected_mask(ordered, 0, 5)).any()
    # Entries that hold the number of tokens select nothing, and nothing is selected twice.
    assert np.asarray(selection.selected_mask(ordered, jnp.int32(7), 5)).all()


def test_overlap():
    first = jnp.array([[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]], bool)
    second = jnp.array([[0, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0], [0, 1, 1, 1]], bool)
    np.testing.assert_allclose(selection.overlap(first, second), [1 / 3, 1, 1, 0], rtol=1e-6)


def test_shared_score_is_the_branches_mean():
    scores = jnp.asarray(rng.normal(size=(6, 5)), jnp.float32)  # 2 branches of 3 prompts
    shared = np.asarray(selection.shared_score(scores, 2))
    mean = (np.asarray(scores[:3]) + np.asarray(scores[3:])) / 2
    np.testing.assert_allclose(shared, np.concatenate([mean, mean]), rtol=1e-6)


def test_random_score():
    key = jax.random.key(3)
    shared = np.asarray(selection.random_score(key, (6, 200), SelectionConfig(), 2))
    assert np.array_equal(shared[:3], shared[3:])
    separate = SelectionConfig(branches="separate")
    drawn = np.asarray(selection.random_score(key, (6, 200), separate, 2))
    assert drawn.shape == (6, 200) and len(np.unique(drawn)) > 1190
    assert drawn.min() >= 0 and drawn.max() < 1 and abs(drawn.mean() - 0.5) < 0.05
    other = np.asarray(selection.random_score(jax.random.key(4), (6, 200), separate, 2))
    assert not np.array_equal(drawn, other)


@pytest.mark.parametrize("normalise", ["mean", "none"])
def test_score_by_hand(normalise):
    config = SelectionConfig(w_alpha=0.7, w_beta=0.3, age_cap=4, normalise=normalise)
    lse = rng.uniform(-1, 6, (2, 50))
    delta = rng.uniform(0, 2, (2, 50))
    age = rng.integers(0, 9, (2, 50))
    got = selection.score(
        jnp.asarray(lse, jnp.float32), jnp.asarray(delta, jnp.float32),
        jnp.asarray(age, jnp.int8), config,
    )  # fmt: skip
    significance = np.maximum(lse, 1e-3) * delta
    if normalise == "mean":
        significance /= np.abs(significance).mean(axis=-1, keepdims=True)
    expected = 0.7 * significance + 0.3 * np.exp(np.minimum(age, 4))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_score_of_a_still_video_is_finite_and_grows_with_age():
    zeros = jnp.zeros((1, 12))
    age = jnp.arange(12, dtype=jnp.int8)[None]
    score = np.asarray(selection.score(zeros, zeros, age, SelectionConfig(age_cap=8)))[0]
    assert np.isfinite(score).all()
    assert (np.diff(score[:9]) > 0).all() and (np.diff(score[8:]) == 0).all()
    oldest = selection.score(zeros, zeros, age + 110, SelectionConfig(age_cap=80, w_beta=1.0))
    assert np.isfinite(np.asarray(oldest)).all()


def test_change_by_hand():
    now, before = rng.normal(size=(2, 2, 9, 16))
    args = jnp.asarray(now, jnp.float32), jnp.asarray(before, jnp.float32)
    difference = now - before
    for name, expected in (
        ("mean_square", np.square(difference).mean(-1)),
        ("abs", np.abs(difference).mean(-1)),
        ("signed", difference.mean(-1)),
    ):
        got = selection.change(*args, SelectionConfig(change=name))
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_change_of_half_precision_is_reduced_in_float32():
    now = jnp.full((1, 1, 4096), 1.0, jnp.bfloat16)
    got = selection.change(now, now * 0, SelectionConfig())
    assert got.dtype == jnp.float32 and float(got[0, 0]) == 1.0


def test_sketch_keeps_mean_squares():
    config = SelectionConfig(reference="sketch", sketch_width=256)
    before = rng.normal(size=(1, 40, 384))
    now = before + rng.normal(size=(1, 40, 384)) * np.linspace(0.1, 3, 40)[None, :, None]
    views = [selection.view(jnp.asarray(x, jnp.float32), config) for x in (now, before)]
    assert views[0].shape == (1, 40, 256) and views[0].dtype == jnp.float32
    got = np.asarray(selection.change(*views, config))
    exact = np.square(now - before).mean(-1)
    np.testing.assert_allclose(got / exact, 1, atol=0.3)


def test_a_narrow_sketch_ranks_as_the_tokens_do():
    before = rng.normal(size=(1, 40, 384))
    now = before + rng.normal(size=(1, 40, 384)) * np.linspace(0.1, 3, 40)[None, :, None]
    exact = np.square(now - before).mean(-1)
    narrow = SelectionConfig(reference="sketch")
    views = [selection.view(jnp.asarray(x, jnp.float32), narrow) for x in (now, before)]
    rank = np.argsort(np.argsort(np.asarray(selection.change(*views, narrow))[0]))
    assert np.corrcoef(rank, np.argsort(np.argsort(exact[0])))[0, 1] > 0.9


def test_view_is_the_tokens_themselves():
    tokens = jnp.ones((1, 3, 4), jnp.bfloat16)
    for reference in ("previous", "last_computed"):
        assert selection.view(tokens, SelectionConfig(reference=reference)) is tokens


def test_heads_reduced():
    lse = jnp.asarray(rng.normal(size=(2, 3, 5)), jnp.float32)
    np.testing.assert_allclose(
        selection.heads_reduced(lse, SelectionConfig()), np.asarray(lse).mean(1), rtol=1e-5,
        atol=1e-6,
    )  # fmt: skip
    highest = selection.heads_reduced(lse, SelectionConfig(lse_heads="max"))
    assert np.array_equal(highest, np.asarray(lse).max(1))


def test_published_is_the_paper_read_literally():
    assert SelectionConfig(
        scope="block", branches="separate", reuse="output", velocity="recomputed", rank="score",
        change="mean_square", reference="previous", normalise="none", lse_heads="mean",
        w_alpha=1.0, w_beta=0.5, age_cap=12, count_skipped=False, sketch_width=16,
    ) == PUBLISHED  # fmt: skip
    assert PUBLISHED.chained and not SelectionConfig().chained
    assert not dataclasses.replace(PUBLISHED, reuse="residual").chained
    assert hash(PUBLISHED) == hash(dataclasses.replace(PUBLISHED))


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"w_alpha": -1.0}, "w_alpha must be a number at least 0 .* got -1.0"),
        ({"w_beta": float("nan")}, "w_beta must be a number at least 0 .* got nan"),
        ({"age_cap": 81}, r"age_cap must be an integer in 0\.\.80 .* got 81"),
        ({"w_alpha": float("inf")}, "w_alpha must be a number .* got inf"),
        ({"w_beta": "4"}, "w_beta must be a number .* got '4'"),
        ({"age_cap": 0.5}, r"age_cap must be an integer in 0\.\.80 .* got 0.5"),
        ({"count_skipped": "yes"}, "count_skipped must be true or false; got 'yes'"),
        ({"age_cap": -1}, r"age_cap must be an integer in 0\.\.80 .* got -1"),
        ({"sketch_width": 0}, r"sketch_width must be an integer in 1\.\..* got 0"),
    ],
)
def test_numbers_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SelectionConfig(**changes)


@pytest.mark.parametrize(
    "name",
    ["scope", "branches", "reuse", "velocity", "rank", "change", "reference", "normalise",
     "lse_heads"],
)  # fmt: skip
def test_unknown_words_are_refused(as_a_user, name):
    with pytest.raises(ValueError, match=f"{name} must be one of .*, .*; got 'neither'"):
        SelectionConfig(**{name: "neither"})


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
