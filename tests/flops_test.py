"""Analytic operations: the paper's Table 1, and what a step's parts add up to."""

import sys

import pytest

from astraea_jax.flops import (
    BlockSizes,
    Workload,
    block_flops,
    run_flops,
    speedup_bound,
    step_flops,
    text_flops,
)

pytestmark = pytest.mark.core


def wan(num_tokens):
    blocks = BlockSizes(number=30, ffn_width=8960, text_tokens=512, keys=num_tokens)
    return Workload(num_tokens, 1536, (blocks,))


SHORT, LONG = wan(14_040), wan(26_520)
BLOCKS = BlockSizes(number=2, ffn_width=12, text_tokens=3, keys=20)
SMALL = Workload(20, 4, (BLOCKS,))


def small(num_tokens=20, **sizes):
    return Workload(num_tokens, 4, (BLOCKS._replace(**sizes),))


@pytest.mark.parametrize(
    ("workload", "level", "published"),
    [(SHORT, 10, 7.29e15), (LONG, 10, 19.87e15), (SHORT, 5, 3.85e15), (LONG, 5, 10.32e15)],
)
def test_table_1_of_the_paper(workload, level, published):
    got = run_flops(workload, (level,) * 50, branches=2, text_every_step=True)
    assert got == pytest.approx(published, rel=1e-3)


def test_a_block_by_hand():
    rows, tokens, width = 6, 20, 4
    block = block_flops(SMALL, BLOCKS, rows)
    multiply_adds = {
        "keys_values": 2 * tokens * width**2,
        "self": 2 * rows * width**2 + 2 * rows * tokens * width,
        "cross": 2 * rows * width**2 + 2 * rows * 3 * width,
        "mlp": 2 * rows * width * 12,
    }
    assert block == {name: 2 * number for name, number in multiply_adds.items()}
    assert sum(block_flops(SMALL, BLOCKS, 0).values()) == 0
    assert step_flops(SMALL, 3) == 2 * sum(block.values())
    kept = step_flops(SMALL, 10, reused=("cross", "block.self"))
    assert kept == 2 * block_flops(SMALL, BLOCKS, 20)["mlp"]


def test_groups_attend_to_their_own_keys():
    grouped = BLOCKS._replace(keys=5)
    wide, narrow = (block_flops(SMALL, kind, 6)["self"] for kind in (BLOCKS, grouped))
    assert wide - narrow == 4 * 6 * 4 * (20 - 5)


def test_a_run_adds_its_steps():
    levels = (10, 0, 5)
    steps = step_flops(SMALL, 10) + step_flops(SMALL, 5)
    text = text_flops(SMALL)
    assert text == 2 * (2 * 2 * 3 * 4**2)
    assert run_flops(SMALL, levels) == 2 * (steps + text)
    assert run_flops(SMALL, levels, branches=1) == steps + text
    assert run_flops(SMALL, levels, text_every_step=True) == 2 * (steps + 2 * text)


def test_rows_are_rounded_as_the_loop_rounds_them():
    uneven = small(23, keys=23)
    for level, rows in ((3, 9), (10, 23)):
        step = 2 * sum(block_flops(uneven, uneven.kinds[0], rows).values())
        assert step_flops(uneven, level) == step
        assert run_flops(uneven, (level,), branches=1) == step + text_flops(uneven)


def test_rows_of_groups_are_those_that_the_selection_computes():
    # Frames of 15 tokens have two rows each at level 1, of 1.5: .133 of all, not .1.
    frames = small(45, keys=15, groups=3)
    assert [frames.rows_at(level) for level in (0, 1, 5, 8, 10)] == [0, 6, 30, 45, 45]
    step = 2 * sum(block_flops(frames, frames.kinds[0], 6).values())
    assert run_flops(frames, (1,), branches=1) == step + text_flops(frames)
    assert speedup_bound(frames, 1) == step_flops(frames, 10) / step


def test_speedup_bound():
    assert speedup_bound(SHORT, 10) == 1
    bounds = [speedup_bound(SHORT, level) for level in range(1, 11)]
    assert bounds == sorted(bounds, reverse=True)
    dense, half = step_flops(SHORT, 10), step_flops(SHORT, 5)
    assert speedup_bound(SHORT, 5) == pytest.approx(dense / half)
    # Keys and values are those of every token, so half the rows is less than twice as fast.
    assert 1.8 < speedup_bound(SHORT, 5) < 2


@pytest.mark.parametrize("level", [0, -1, 11])
def test_speedup_bound_refuses(level):
    with pytest.raises(ValueError, match=rf"level must be an integer in 1\.\.10; got {level}"):
        speedup_bound(SHORT, level)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
