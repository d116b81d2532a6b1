"""What a method is: static modes, a plan or a decision at run time, and a pytree of state."""

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, Key

from astraea_jax import checks, flops
from astraea_jax.checks import Refusal
from astraea_jax.flops import Workload
from astraea_jax.model import Geometry, Groups, Prepared, VideoDiT
from astraea_jax.schedule import LEVELS, rows_per_level
from astraea_jax.solvers import Solver


class Mode(NamedTuple):
    """A way to run one step; static, each is compiled once.

    Attributes:
      kind: "dense", "skip", "sparse", or what a method calls it.
      level: tenths of the tokens, 1..9, or None where the level is data or has no say.
      reused: parts of blocks that are not run, as "cross" of every kind or "spatial.self" of one.
    """

    kind: str
    level: int | None = None
    reused: tuple[str, ...] = ()


DENSE = Mode("dense", 10)
SKIP = Mode("skip", 0)


class Evaluation(NamedTuple):
    """What the steps of a run share.

    Attributes:
      model: the video diffusion transformer.
      prepared: what it made of the conditions.
      geometry: static sizes.
      branches: guidance branches, 1 or 2.
      steps: of the run, T; data, so that runs of any length share their programs.
    """

    model: VideoDiT
    prepared: Prepared
    geometry: Geometry
    branches: int
    steps: Int[Array, ""]


class StepInputs(NamedTuple):
    """What a forward pass is given at one step.

    Attributes:
      latents: noised latents, a row for each guidance branch and prompt (branch first), float32.
      timestep: what the model is told, 0..1000, one a row.
      level: tenths of the tokens to compute, 0..10.
      index: of the step, 0..T - 1, the noisiest first.
      key: for methods that draw; differs at every step.
    """

    latents: Float[Array, "B F Y X C"]
    timestep: Float[Array, "B"]
    level: Int[Array, ""]
    index: Int[Array, ""]
    key: Key[Array, ""]


class Trace(NamedTuple):
    """What a step did, for pictures and tables.

    Attributes:
      computed: share of the blocks that computed each token, 0..1.
      overlap: mean Jaccard index of consecutive blocks' selections, 0..1.
      parts: share of the blocks with a part of that name that ran it, on the tokens computed.
    """

    computed: Float[Array, "B N"]
    overlap: Float[Array, "B"]
    parts: dict[str, Float[Array, ""]]


class Forward(NamedTuple):
    """What a forward pass gives.

    Attributes:
      velocity: patches.
      state: for the next step.
      trace: what was done.
      fresh: tokens whose velocity was computed now; only of methods that correct. The guidance
        branches' may differ, unless the method has a true `fresh_alike`.
    """

    velocity: Float[Array, "B N P"]
    state: Any
    trace: Trace
    fresh: Bool[Array, "B N"] | None = None


@runtime_checkable
class Method(Protocol):
    """An acceleration method; a frozen dataclass, so that it hashes and compares by value.

    `ByLevel` and `OwnPlan` answer most of it for a method that inherits from one of them.
    """

    @property
    def name(self) -> str:
        """What tables call it; of the registry's methods, its name there."""
        ...

    @property
    def modes(self) -> tuple[Mode, ...]:
        """The modes of a loop whose levels are data."""
        ...

    @property
    def by_level(self) -> bool:
        """Whether a step's level alone says what it computes."""
        ...

    @property
    def corrects(self) -> bool:
        """Whether steps that reused a velocity are taken again once the next one is known."""
        ...

    @property
    def fresh_alike(self) -> bool:
        """Whether a token is computed in both guidance branches of a step, or in none."""
        ...

    def check(self, geometry: Geometry) -> None:
        """Refusal for a model that lacks what the method reuses."""
        ...

    def check_levels(self, levels: Sequence[int]) -> None:
        """Refusal for levels that the method can't do."""
        ...

    def static_mode(self, level: int) -> Mode:
        """The mode of a step at a level; Refusal where that can't be done or has no say."""
        ...

    def plan(self, levels: Sequence[int], solver: Solver) -> Sequence[Mode] | None:
        """The mode of each step, or None where it is decided as they run."""
        ...

    def decide(
        self, evaluation: Evaluation, inputs: StepInputs, state: Any
    ) -> tuple[Int[Array, ""], Any]:
        """Index into `modes` for this step, and the state, in which it may keep count."""
        ...

    def init(self, geometry: Geometry, batch: int, dtype: jnp.dtype) -> Any:
        """The state before the first step: a pytree of zeros."""
        ...

    def forward(
        self, mode: Mode, evaluation: Evaluation, inputs: StepInputs, state: Any
    ) -> Forward:
        """One evaluation of the model, or what stands in for it."""
        ...

    def work(self, mode: Mode, workload: Workload) -> float:
        """Operations of a step in a mode, on one branch of one video."""
        ...


class ByLevel:
    """A method whose steps compute what their level says: what it need not say itself."""

    corrects = False
    fresh_alike = False

    @property
    def modes(self) -> tuple[Mode, ...]:
        """Skip, or the plain model."""
        return (SKIP, DENSE)

    def check(self, geometry: Geometry) -> None:
        """Runs on every model."""
        del geometry

    @property
    def by_level(self) -> bool:
        """Whether a step's level alone says what it computes: unless a subclass decides itself."""
        return type(self).decide is ByLevel.decide

    def decide(
        self, evaluation: Evaluation, inputs: StepInputs, state: Any
    ) -> tuple[Int[Array, ""], Any]:
        """The mode of the level's kind; a level that the method can't do is skipped."""
        del evaluation
        kinds = [mode.kind for mode in self.modes]
        places = np.zeros(LEVELS + 1, np.int32)
        for level in range(LEVELS + 1):
            with contextlib.suppress(Refusal):
                places[level] = kinds.index(self.static_mode(level).kind)
        return jnp.asarray(places)[jnp.clip(inputs.level, 0, LEVELS)], state

    def static_mode(self, level: int) -> Mode:
        """The mode of a step whose level is known; Refusal for a level it can't do."""
        checks.whole("level", level, 0, LEVELS)
        return {0: SKIP, LEVELS: DENSE}.get(level, Mode("sparse", level))

    def check_levels(self, levels: Sequence[int]) -> None:
        """Refuses levels that `static_mode` refuses."""
        for level in sorted(set(levels)):
            self.static_mode(level)

    def plan(self, levels: Sequence[int], solver: Solver) -> Sequence[Mode] | None:
        """By each level."""
        del solver
        return [self.static_mode(level) for level in levels]

    def work(self, mode: Mode, workload: Workload) -> float:
        """That of the level."""
        if mode.level is None:
            raise ValueError(f"expected a mode with a level; got {mode}")
        return flops.step_flops(workload, mode.level)


class OwnPlan:
    """A method that decides for itself what a step computes: its schedule is dense."""

    name: str
    by_level = False
    corrects = False
    fresh_alike = True

    def check(self, geometry: Geometry) -> None:
        """Runs on every model."""
        del geometry

    def check_levels(self, levels: Sequence[int]) -> None:
        """Refuses a schedule that says what to compute."""
        for level in levels:
            if level != LEVELS:
                raise no_level(self.name, level, "what its own rule says")

    def static_mode(self, level: int) -> Mode:
        """None: a level has no say."""
        raise no_level(self.name, level, "what its own rule says, step by step")

    def work(self, mode: Mode, workload: Workload) -> float:
        """That of the parts that run; nothing is computed of a skipped step."""
        level = 0 if mode.kind == SKIP.kind else LEVELS
        return flops.step_flops(workload, level, reused=mode.reused)


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
    for groups in (kind.groups for kind in geometry.kinds):
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


def no_level(name: str, level: int, allowed: str) -> Refusal:
    """The error for a schedule that a method can't run."""
    return Refusal(
        f"{name} computes {allowed}; the schedule asks for level {level}: use another schedule"
    )


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
