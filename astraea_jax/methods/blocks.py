"""How methods go through a model's blocks: in order, on every token, or some of them."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from astraea_jax import model as core
from astraea_jax.methods.base import Evaluation, StepInputs, Trace
from astraea_jax.model import Geometry, Kind, Modulation, Rows, Side


class Place(NamedTuple):
    """Where a block stands.

    Attributes:
      index: of all blocks, 0..L - 1, traced: layers are scanned, so that a block compiles once.
      stack: which, of `geometry.stacks`.
      kind: of block.
    """

    index: Int[Array, ""]
    stack: int
    kind: Kind


Body = Callable[[Any, core.Block, Place], Any]


def run_blocks(
    evaluation: Evaluation,
    modulation: Modulation,
    body: Body,
    carry: Any,
    *,
    first: int = 0,
    last: int | None = None,
) -> Any:
    """Runs `carry = body(carry, block, place)` over the blocks in order.

    Args:
      evaluation: what the steps of the run share.
      modulation: of the step.
      body: of every block.
      carry: a pytree of fixed shapes.
      first: layer to begin with, counted over all stacks.
      last: layer to end before; None runs to the end.
    """
    layers = before = 0
    for number, stack in enumerate(evaluation.geometry.stacks):
        end = stack.layers if last is None else min(max(last - layers, 0), stack.layers)
        begin = min(max(first - layers, 0), end)
        if begin < end:
            run = _Stack(evaluation, modulation, body, number, before)
            carry = run.layers(carry, begin, end)
        layers += stack.layers
        before += stack.layers * len(stack.kinds)
    return carry


class _Stack(NamedTuple):
    """A stack of which some layers are run; `before` counts the blocks of the stacks before."""

    evaluation: Evaluation
    modulation: Modulation
    body: Body
    number: int
    before: int

    def layers(self, carry, begin: int, end: int):
        """Layers `begin` to `end`; of fewer than all each is looked up, or they would be copied."""
        stacked = self.evaluation.model.layers(self.number, self.evaluation.prepared)
        places = jnp.arange(begin, end, dtype=jnp.int32)
        if end - begin == self.evaluation.geometry.stacks[self.number].layers:
            return lax.scan(self.layer, carry, (stacked, places))[0]

        def look_up(carry, place):
            layer = jax.tree.map(
                lambda leaf: lax.dynamic_index_in_dim(leaf, place, keepdims=False), stacked
            )
            return self.layer(carry, (layer, place))

        return lax.scan(look_up, carry, places)[0]

    def layer(self, carry, xs):
        """One layer of a scan."""
        layer, place = xs
        kinds = self.evaluation.geometry.stacks[self.number].kinds
        blocks = self.evaluation.model.bind(
            self.number, layer, self.evaluation.prepared, self.modulation
        )
        for position, (kind, block) in enumerate(zip(kinds, blocks, strict=True)):
            index = self.before + place * len(kinds) + position
            carry = self.body(carry, block, Place(index, self.number, kind))
        return carry, None


class DenseBlock(NamedTuple):
    """What a block gives of every token.

    Attributes:
      tokens: that leave it.
      side: tokens beside the video's, moved on.
      lse: log-sum-exp of its attention.
      cached: what a cache is to hold: the tokens that leave, or what the block added to them.
    """

    tokens: Float[Array, "B N H"]
    side: Side
    lse: Float[Array, "B A N"]
    cached: Float[Array, "B N H"]


def dense_block(
    block: core.Block, tokens: Float[Array, "B N H"], side: Side, *, residual: bool = False
) -> DenseBlock:
    """A block on every token.

    The barrier keeps what surrounds the block from being fused into it, so that every method's
    dense step gives the same bits as the plain model. What is cached is the tokens that leave, or
    with `residual` what the block added to them: made in the same pass, where the tokens were, or
    XLA would keep those aside in each block.
    """
    shared, side = block.shared(Rows(tokens), side)
    out = core.apply_block(block, Rows(tokens), shared)
    if not residual:
        leaving, side, lse = lax.optimization_barrier((out.rows, side, out.lse))
        return DenseBlock(leaving, side, lse, leaving)
    return DenseBlock(*lax.optimization_barrier((out.rows, side, out.lse, out.rows - tokens)))


def dense_tokens(
    evaluation: Evaluation, modulation: Modulation, tokens: Float[Array, "B N H"], side: Side
) -> Float[Array, "B N H"]:
    """Every block on every token, with no cache."""

    def body(carry, block, place):
        del place
        out = dense_block(block, *carry)
        return out.tokens, out.side

    return run_blocks(evaluation, modulation, body, (tokens, side))[0]


def shared_for(
    block: core.Block, tokens: Rows, side: Side, known: Mapping[str, Array]
) -> tuple[core.Shared, Side]:
    """What the parts that are not known read of all tokens: nothing, where none of them does.

    Where tokens go beside the video's, they are moved on all the same.
    """
    read = any(part.shares for part in block.parts if part.name not in known)
    if read or jax.tree.leaves(side):
        return block.shared(tokens, side)
    return None, side


def run_residual(
    evaluation: Evaluation, inputs: StepInputs, residual: Float[Array, "B N H"]
) -> tuple[Float[Array, "B N P"], Float[Array, "B N H"]]:
    """The model's velocity, and what all blocks together added to the tokens."""
    modulation = evaluation.model.modulation(inputs.timestep, evaluation.prepared)
    tokens, side = evaluation.model.embed(inputs.latents, evaluation.prepared)
    leaving = dense_tokens(evaluation, modulation, tokens, side)
    velocity = evaluation.model.head(leaving, modulation)
    return velocity, (leaving - tokens).astype(residual.dtype)


def reuse_residual(
    evaluation: Evaluation, inputs: StepInputs, residual: Float[Array, "B N H"]
) -> tuple[Float[Array, "B N P"], Float[Array, "B N H"]]:
    """The velocity as if the blocks added what they did when they last ran; head and time now."""
    modulation = evaluation.model.modulation(inputs.timestep, evaluation.prepared)
    tokens, _ = evaluation.model.embed(inputs.latents, evaluation.prepared)
    return evaluation.model.head(tokens + residual, modulation), residual


def full_trace(geometry: Geometry, batch: int) -> Trace:
    """The trace of a dense step."""
    return _trace(geometry, batch, 1.0)


def empty_trace(geometry: Geometry, batch: int) -> Trace:
    """The trace of a skipped step."""
    return _trace(geometry, batch, 0.0)


def _trace(geometry: Geometry, batch: int, share: float) -> Trace:
    return Trace(
        jnp.full((batch, geometry.num_tokens), share, jnp.float32),
        jnp.ones((batch,), jnp.float32),
        part_shares(geometry, share),
    )


def part_shares(
    geometry: Geometry, share: float, reused: tuple[str, ...] = ()
) -> dict[str, Float[Array, ""]]:
    """Of `Trace.parts`: a share of the blocks for each part, none where it is reused."""
    run: dict[str, float] = {}
    blocks: dict[str, int] = {}
    for stack in geometry.stacks:
        for kind in stack.kinds:
            for part in kind.parts:
                blocks[part] = blocks.get(part, 0) + stack.layers
                computed = 0.0 if is_reused(kind.name, part, reused) else share
                run[part] = run.get(part, 0.0) + stack.layers * computed
    return {part: jnp.float32(run[part] / blocks[part]) for part in sorted(blocks)}


def is_reused(kind: str, part: str, reused: tuple[str, ...]) -> bool:
    """Whether a part of a kind of block is among those that are named, as in `Mode.reused`."""
    return part in reused or f"{kind}.{part}" in reused
