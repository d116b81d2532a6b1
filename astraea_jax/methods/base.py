"""What a method is: static modes, a mode a step as data, a pytree of state, and a forward pass."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Integer, Key

from astraea_jax import checks
from astraea_jax import model as core
from astraea_jax.checks import Refusal
from astraea_jax.model import Geometry, Groups, Modulation, Prepared, VideoDiT
from astraea_jax.schedule import rows_per_level


class Mode(NamedTuple):
    """A way to run one step; static, each is compiled once.

    Attributes:
      kind: "dense", "skip", "sparse", or what a method calls it.
      level: tenths of the tokens, 1..9, or None where the level is data.
    """

    kind: str
    level: int | None = None


DENSE = Mode("dense", 10)
SKIP = Mode("skip", 0)


class StepInputs(NamedTuple):
    """What a forward pass is given at one step.

    Attributes:
      latents: noised latents, a row for each guidance branch and prompt (branch first), float32.
      timestep: what the model is told, 0..1000, one a row.
      level: tenths of the tokens to compute, 0..10.
      key: for methods that draw; differs at every step.
    """

    latents: Float[Array, "B F Y X C"]
    timestep: Float[Array, "B"]
    level: Int[Array, ""]
    key: Key[Array, ""]


class Trace(NamedTuple):
    """What a step did, for pictures and tables.

    Attributes:
      computed: share of the blocks that computed each token, 0..1.
      overlap: mean Jaccard index of consecutive blocks' selections, 0..1.
    """

    computed: Float[Array, "B N"]
    overlap: Float[Array, "B"]


class Forward(NamedTuple):
    """What a forward pass gives.

    Attributes:
      velocity: patches.
      state: for the next step.
      trace: what was done.
      fresh: tokens whose velocity was computed now; only of methods with a true `correct`. The
        guidance branches' may differ, unless the method has a true `fresh_alike`.
    """

    velocity: Float[Array, "B N P"]
    state: Any
    trace: Trace
    fresh: Bool[Array, "B N"] | None = None


@runtime_checkable
class Method(Protocol):
    """An acceleration method; a frozen dataclass, so that it hashes and compares by value."""

    @property
    def name(self) -> str:
        """What tables call it; of the registry's methods, its name there."""
        ...

    @property
    def modes(self) -> tuple[Mode, ...]:
        """The modes of a loop whose levels are data."""
        ...

    def static_mode(self, level: int) -> Mode:
        """The mode of a step whose level is known; Refusal for a level it can't do."""
        ...

    def decide(self, state: Any, inputs: StepInputs) -> Int[Array, ""]:
        """Index into `modes` for this step."""
        ...

    def init(self, geometry: Geometry, batch: int, dtype: jnp.dtype) -> Any:
        """The state before the first step: a pytree of zeros."""
        ...

    def forward(
        self,
        mode: Mode,
        model: VideoDiT,
        prepared: Prepared,
        geometry: Geometry,
        inputs: StepInputs,
        state: Any,
        num_branches: int,
    ) -> Forward:
        """One evaluation of the model, or what stands in for it."""
        ...


def check(method: Any) -> Method:
    """Returns `method` if it is one.

    Raises:
      Refusal: it is something else: a method's name, or its class.
    """
    if isinstance(method, type) or not isinstance(method, Method):
        raise Refusal(
            "method must be an acceleration method, as Astraea() is or methods.make gives it by "
            f"name; got {checks.shown(method)}"
        )
    return method


def splits(geometry: Geometry) -> tuple[Groups, ...]:
    """The ways of splitting the tokens into groups for which a step needs a selection each.

    Mostly one: a selection with equally many rows in each of some groups has them in coarser
    groups too.
    """
    kept: list[Groups] = []
    for groups in geometry.groups:
        if not any(_serves(each, groups, geometry.num_tokens) for each in kept):
            kept = [each for each in kept if not _serves(groups, each, geometry.num_tokens)]
            kept.append(groups)
    return tuple(kept)


def split_of(geometry: Geometry, groups: Groups) -> int:
    """Which of the `splits` serves a kind of block that has these groups."""
    serving = [_serves(each, groups, geometry.num_tokens) for each in splits(geometry)]
    return serving.index(True)


def _serves(split: Groups, groups: Groups, num_tokens: int) -> bool:
    """Whether equal rows in each group of `split` are as many, and equal, in each of `groups`."""
    one, other = (rows_per_level(num_tokens, each.number) for each in (split, groups))
    alike = split.contiguous == groups.contiguous and split.number % groups.number == 0
    return one == other and (alike or groups.number == 1)


def scan_blocks(model, prepared: Prepared, modulation: Modulation, geometry: Geometry, step, carry):
    """Runs `step(carry, block, index, groups) -> carry` over every block in order.

    `index` counts blocks, 0..L - 1 (traced); the layer loop is a scan, so a block compiles once.
    """
    kinds = len(geometry.groups)

    def layer_step(carry, xs):
        layer, layer_index = xs
        for kind, block in enumerate(model.bind(layer, prepared, modulation)):
            carry = step(carry, block, layer_index * kinds + kind, geometry.groups[kind])
        return carry, None

    numbers = jnp.arange(geometry.num_layers, dtype=jnp.int32)
    return lax.scan(layer_step, carry, (model.layers(prepared), numbers))[0]


def dense_block(block: core.Block, tokens: Float[Array, "B N H"], *, residual: bool = False):
    """A block on every token: (tokens that leave it, LSE, what is kept of them).

    The barrier keeps what surrounds the block from being fused into it, so that every method's
    dense step gives the same bits as the plain model. What is kept is the tokens that leave, or
    with `residual` what the block added to them: made in the same pass, where the tokens were, or
    XLA would keep those aside in each block.
    """
    out, lse = core.apply_block(block, tokens, None, block.keys_values(tokens))
    if not residual:
        out, lse = lax.optimization_barrier((out, lse))
        return out, lse, out
    return lax.optimization_barrier((out, lse, out - tokens))


def dense_tokens(model, prepared: Prepared, modulation: Modulation, geometry: Geometry, tokens):
    """Every block on every token, with no cache."""

    def step(tokens, block, index, groups):
        del index, groups
        return dense_block(block, tokens)[0]

    return scan_blocks(model, prepared, modulation, geometry, step, tokens)


def full_trace(batch: int, num_tokens: int) -> Trace:
    """The trace of a dense step."""
    return Trace(jnp.ones((batch, num_tokens), jnp.float32), jnp.ones((batch,), jnp.float32))


def empty_trace(batch: int, num_tokens: int) -> Trace:
    """The trace of a skipped step."""
    return Trace(jnp.zeros((batch, num_tokens), jnp.float32), jnp.ones((batch,), jnp.float32))


def no_level(name: str, level: int, allowed: str) -> Refusal:
    """The error for a schedule that a method can't run."""
    return Refusal(
        f"{name} computes {allowed}; the schedule asks for level {level}: use another schedule"
    )


def is_dense(level: Int[Array, ""]) -> Bool[Array, ""]:
    """Whether a level computes every token."""
    return level >= 10


def seeded(*numbers: int) -> Key[Array, ""]:
    """The key of a seed in 0..2^32-1, and of a place in what is drawn from it; see `fold`.

    The numbers are sent to the device by name, as a transfer guard asks; `jax.random.key` does not.
    """
    return _seeded(*jax.device_put([np.uint32(number) for number in numbers]))


@jax.jit
def _seeded(seed, *numbers):
    return fold(jax.random.key(seed), *numbers)


def fold(key: Key[Array, ""], *numbers: int | np.integer | Integer[Array, ""]) -> Key[Array, ""]:
    """A key for a place in the computation."""
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return key
