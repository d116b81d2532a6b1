"""Selection: which tokens a step computes, from scores that cost almost nothing.

score = w_alpha * LSE * change / mean + w_beta * exp(min(age, cap)): tokens that weigh much in
attention and changed since they were last seen, and tokens that have waited long.

Source: ASTRAEA 3.2, equations 4-6 and Algorithm 1. The paper leaves much open; every such choice
is a field of `SelectionConfig`.
"""

import dataclasses
import typing
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from astraea_jax import checks
from astraea_jax.checks import Refusal
from astraea_jax.schedule import LEVELS, rows_per_level

LARGEST_WEIGHT = 1000
"""Times exp(80), the oldest age's, it is still a float32."""

WIDEST_SKETCH = 1 << 16
"""Channels: more than any model's tokens have, of which it is a sketch."""


@dataclasses.dataclass(frozen=True)
class SelectionConfig:
    """Every choice of the selection; static and hashable.

    The defaults are the best of each choice, tried alone on the small Wan, or within the noise of
    the best; the studies have the figures.

    Attributes:
      scope: "block": every block selects for itself, as the paper. "step": one selection a step,
        made on the tokens that enter the first block, serves all blocks (FIXED-TOKEN); where kinds
        of block split the tokens into unlike groups, one for each way of splitting them.
      branches: "separate": the guidance branches (conditional, unconditional) select each for
        itself. "shared": one selection, by their mean score; staleness that differs between the
        branches is multiplied by the guidance scale.
      reuse: what a stale token gets from the cache. "output": the block's output as it was.
        "residual": its input now, plus what the block added then.
      velocity: of a token that the last block did not compute. "recomputed": the head runs on its
        stale features. "kept": the velocity from when it was last computed.
      rank: "score", or "random": the control that every selection is compared with.
      change: how channels are reduced: "mean_square" (the comment of Algorithm 1), "abs", or
        "signed" (its formula).
      reference: what a block's input is compared with. "previous": its input one computed step
        earlier. "last_computed": its input when this token was last computed (one more tensor of
        the cache's size, or one token tensor for scope "step"). "sketch": the same through a
        random projection to `sketch_width` channels.
      normalise: "mean" divides LSE * change by its mean over the tokens; "none" leaves it raw.
      lse_heads: heads of the log-sum-exp reduced by "mean" or "max".
      w_alpha: weight of significance, 0..1000.
      w_beta: weight of waiting, 0..1000.
      age_cap: largest age that counts in exp(age), 0..80.
      count_skipped: whether a step at level 0 makes tokens older.
      sketch_width: channels of the sketch, 1..65536.

    Raises:
      Refusal: a choice that is none, or a number out of range.
    """

    scope: Literal["block", "step"] = "step"
    branches: Literal["separate", "shared"] = "shared"
    reuse: Literal["output", "residual"] = "residual"
    velocity: Literal["recomputed", "kept"] = "kept"
    rank: Literal["score", "random"] = "score"
    change: Literal["mean_square", "abs", "signed"] = "mean_square"
    reference: Literal["previous", "last_computed", "sketch"] = "previous"
    normalise: Literal["mean", "none"] = "mean"
    lse_heads: Literal["mean", "max"] = "mean"
    w_alpha: float = 1.0
    w_beta: float = 0.5
    age_cap: int = 8
    count_skipped: bool = False
    sketch_width: int = 16

    def __post_init__(self):
        for name, hint in typing.get_type_hints(type(self)).items():
            allowed = typing.get_args(hint)
            value = getattr(self, name)
            if allowed and checks.OneOf(allowed).problem(value):
                raise Refusal(
                    f"{name} must be one of {', '.join(allowed)}; got {checks.shown(value)}"
                )
        for name in ("w_alpha", "w_beta"):
            checks.number(name, getattr(self, name), 0, LARGEST_WEIGHT)
        checks.whole("age_cap", self.age_cap, 0, 80, unit="(exp overflows float32 past 88)")
        checks.flag("count_skipped", self.count_skipped)
        checks.whole("sketch_width", self.sketch_width, 1, WIDEST_SKETCH, unit="channels")

    @property
    def chained(self) -> bool:
        """Whether a block's old input is read off the cache of the block before.

        With output reuse a block's input at the step before is what the block before it had in
        the cache, so scope "block" needs no second tensor of the cache's size.
        """
        return (self.scope, self.reuse, self.reference) == ("block", "output", "previous")


PUBLISHED = SelectionConfig(
    scope="block",
    branches="separate",
    reuse="output",
    velocity="recomputed",
    normalise="none",
    age_cap=12,
)
"""The paper's text read literally: block outputs reused, every block and branch for itself."""


def heads_reduced(lse: Float[Array, "B A K"], config: SelectionConfig) -> Float[Array, "B K"]:
    """One log-sum-exp a token."""
    return lse.max(axis=1) if config.lse_heads == "max" else lse.mean(axis=1)


def sketch_matrix(width: int, config: SelectionConfig) -> Float[np.ndarray, "H R"]:
    """A fixed random projection; the mean square over R of a sketch expects that over H."""
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((width, config.sketch_width)) / np.sqrt(width)
    return matrix.astype(np.float32)


def view(tokens: Float[Array, "B N H"], config: SelectionConfig) -> Float[Array, "B N R"]:
    """What of the tokens is kept as the reference: themselves, or their sketch in float32."""
    if config.reference != "sketch":
        return tokens
    matrix = sketch_matrix(tokens.shape[-1], config)
    # A GPU would round both to TF32, and the score with them.
    return jnp.matmul(tokens.astype(jnp.float32), matrix, precision="highest")


def change(
    now: Float[Array, "B N R"], before: Float[Array, "B N R"], config: SelectionConfig
) -> Float[Array, "B N"]:
    """How much each token changed, float32, of two `view`s.

    A sketch's mean square is that of the tokens in expectation; its "abs" is proportional to
    their root mean square, and its "signed" mean has no meaning.
    """
    difference = now.astype(jnp.float32) - before.astype(jnp.float32)
    if config.change == "signed":
        return difference.mean(axis=-1)
    if config.change == "abs":
        return jnp.abs(difference).mean(axis=-1)
    return jnp.square(difference).mean(axis=-1)


def score(
    lse: Float[Array, "B N"],
    delta: Float[Array, "B N"],
    age: Int[Array, "B N"],
    config: SelectionConfig,
) -> Float[Array, "B N"]:
    """Significance plus penalty, float32; larger is computed first.

    Args:
      lse: natural log-sum-exp of each token's attention when it was last computed.
      delta: of `change`.
      age: computed steps since the token was last computed, at least 0.
      config: weights and normalisation.

    Source: ASTRAEA equations 4-6.
    """
    # A log-sum-exp below zero would turn a larger change into a lower score.
    significance = jnp.maximum(lse, 1e-3) * delta
    if config.normalise == "mean":
        mean = jnp.abs(significance).mean(axis=-1, keepdims=True)
        significance = significance / jnp.maximum(mean, jnp.finfo(jnp.float32).tiny)
    waited = jnp.exp(jnp.minimum(age, config.age_cap).astype(jnp.float32))
    return config.w_alpha * significance + config.w_beta * waited


def random_score(
    key: Key[Array, ""], shape: tuple[int, int], config: SelectionConfig, num_branches: int
) -> Float[Array, "B N"]:
    """Uniform scores in [0, 1); branches alike when they share a selection."""
    copies = num_branches if config.branches == "shared" else 1
    drawn = jax.random.uniform(key, (shape[0] // copies, shape[1]), jnp.float32)
    return jnp.tile(drawn, (copies, 1))


def shared_score(scores: Float[Array, "B N"], num_branches: int) -> Float[Array, "B N"]:
    """Mean over the guidance branches, given to each; rows are ordered [branch, prompt]."""
    mean = scores.reshape(num_branches, -1, scores.shape[-1]).mean(axis=0)
    return jnp.tile(mean, (num_branches, 1))


def tie_breaker(num_tokens: int) -> np.ndarray:
    """A fixed scatter of the positions (Knuth's multiplicative hash), uint32 [N].

    Ties broken by position would compute the first frames always and the last ones never.
    """
    return (np.arange(num_tokens, dtype=np.uint64) * 2654435761 % 2**32).astype(np.uint32)


def order(
    scores: Float[Array, "B N"],
    age: Int[Array, "B N"],
    *,
    groups: int = 1,
    contiguous: bool = True,
) -> Int[Array, "B M"]:
    """Positions of the tokens by falling score; ties by age, then by a fixed permutation.

    Every tenth of the answer (M / 10 = `rows_per_level` entries) is one level's worth of rows and
    holds as many rows of each group. Entries past the tokens are N.

    Args:
      scores: of `score`.
      age: of the same tokens.
      groups: groups that attend within themselves and must have equally many rows.
      contiguous: whether a group's tokens are adjacent or `groups` apart.
    """
    batch, num_tokens = scores.shape
    size = num_tokens // groups
    position = np.arange(num_tokens, dtype=np.int32)
    tie = np.broadcast_to(tie_breaker(num_tokens), (batch, num_tokens))

    def split(values):
        if contiguous:
            return values.reshape(batch, groups, size)
        return values.reshape(batch, size, groups).swapaxes(1, 2)

    operands = (-scores, -age.astype(jnp.int32), jnp.asarray(tie))
    *_, ranked = lax.sort(
        (*map(split, operands), split(jnp.broadcast_to(position, (batch, num_tokens)))),
        dimension=2,
        num_keys=3,
    )
    padding = LEVELS * rows_per_level(size) - size
    ranked = jnp.pad(ranked, ((0, 0), (0, 0), (0, padding)), constant_values=num_tokens)
    return ranked.swapaxes(1, 2).reshape(batch, -1)


def selected_mask(
    ordered: Int[Array, "B M"], count: int | Int[Array, ""], num_tokens: int
) -> Bool[Array, "B N"]:
    """Which tokens are among the first `count` entries of `ordered`."""
    taken = jnp.broadcast_to(jnp.arange(ordered.shape[1], dtype=jnp.int32) < count, ordered.shape)
    batch = jnp.arange(ordered.shape[0], dtype=jnp.int32)[:, None]
    empty = jnp.zeros((ordered.shape[0], num_tokens), bool)
    return empty.at[batch, ordered].set(taken, mode="drop")


def overlap(first: Bool[Array, "B N"], second: Bool[Array, "B N"]) -> Float[Array, "B"]:
    """Jaccard index of two selections, in 0..1; 1 where both are empty."""
    both = (first & second).sum(axis=-1, dtype=jnp.float32)
    either = (first | second).sum(axis=-1, dtype=jnp.float32)
    return jnp.where(either == 0, 1.0, both / jnp.maximum(either, 1))
