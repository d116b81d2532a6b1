"""How a video transformer is trained: the numbers, and the optimisers that follow from them."""

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from astraea_jax.checks import ListOf, Number, OneOf, Refusal, Rule, Whole

MOST_STEPS = 10**8
"""Of a run: two weeks of the fastest steps. The loss of each is kept."""

MOST_CLIPS = 2**16
"""Of a step, over all devices: more than the memory of hundreds of them holds."""

MOST_SEED = 2**31 - 1


def check_fields(settings: Any, rules: Mapping[str, Rule]) -> None:
    """Holds a dataclass's fields against their rules; NumPy's numbers become Python's.

    Raises:
      Refusal: all that is wrong.
    """
    problems = []
    for name, rule in rules.items():
        value = getattr(settings, name)
        problem = rule.problem(value)
        if problem is not None:
            problems.append(f"{name} {problem}")
        elif isinstance(value, np.generic):
            object.__setattr__(settings, name, value.item())  # before a frozen one is seen
    if problems:
        raise Refusal("; ".join(problems))


SHARE, RATE = Number(0, 1), Number(0, 1)

SHARED_RULES: Mapping[str, Rule] = {
    "steps": Whole(1, MOST_STEPS),
    "muon_rate": RATE,
    "adam_rate": RATE,
    "seed": Whole(0, MOST_SEED),
}
"""Of what every recipe says."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to train; two runs of one recipe, one model and one device kind give the same weights.

    Attributes:
      steps: of the whole run.
      batch: clips a step, over all devices.
      muon_rate: step size on block matrices, whose update is orthogonal.
      adam_rate: step size on everything else.
      text_rate: factor on `adam_rate` for the text encoder.
      muon_decay: weight decay of block matrices.
      clip: largest norm of all gradients together.
      average: decay of the moving average of the weights, which is what is exported.
      text_dropout: share of the clips whose caption is left empty, for guidance.
      wrong_text: share of the other clips that get another clip's caption, as happens in captions
        that were not made by a program. With captions that are always right, guidance of 5
        overshoots where the noise still hides everything: an answer between the right one and the
        one without a caption makes it about `5 * (1 - wrong_text)` there, and 5 further on.
      time_width: standard deviation of the times' logits before the shift.
      time_even: share of the times drawn evenly before the shift, as a solver's grid visits them:
        the logit-normal hardly ever draws the noisiest tenth, where the layout is decided.
      shift: flow shift of the times, the model's own.
      motion_weight: how much more an error counts where a clip differs from its first frame.
      span: part of the rate's schedule that the run goes through, for a run in several sittings on
        several machines: (0, 0.5), then (0.5, 1).
      seed: of the noise, the times and the order of the clips.
      dtype: of the products.
    """

    steps: int
    batch: int = 128
    muon_rate: float = 6e-3
    adam_rate: float = 1.5e-3
    text_rate: float = 1.0
    muon_decay: float = 0.01
    clip: float = 1.0
    average: float = 0.999
    text_dropout: float = 0.1
    wrong_text: float = 0.0
    time_width: float = 1.1
    time_even: float = 0.4
    shift: float = 3.0
    motion_weight: float = 0.5
    span: tuple[float, float] = (0.0, 1.0)
    seed: int = 0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"

    def __post_init__(self):
        """Refuses what is out of range."""
        check_fields(self, _RULES)
        if not self.span[0] < self.span[1]:
            raise Refusal(f"span must rise within 0..1; got {self.span}")


_RULES: Mapping[str, Rule] = {
    **SHARED_RULES,
    "batch": Whole(1, MOST_CLIPS),
    "text_rate": Number(0, 100),
    "muon_decay": SHARE,
    "clip": Number(1e-6, 1e6),
    "average": SHARE,
    "text_dropout": SHARE,
    "wrong_text": SHARE,
    "time_width": Number(0.01, 10),
    "time_even": SHARE,
    "shift": Number(0.01, 100),
    "motion_weight": Number(0, 100),
    "span": ListOf(SHARE, 2, 2),
    "dtype": OneOf(("bfloat16", "float32")),
}


def loss_and_gradients[M](
    loss: Callable[[M, Any], Array], weights: M, batch: Any, mesh: Mesh
) -> tuple[Float[Array, ""], M]:
    """The batch's loss and its gradients, the same on every device of the mesh.

    Every device goes through its own clips as if it were alone, and only gradients travel: left to
    the compiler's partitioning, devices gather what attention sees, and four GPUs were 1.4 times as
    fast as one.

    Args:
      loss: of weights and a device's share of the batch; the batch's is the mean over devices.
      weights: copied to every device.
      batch: arrays that are split along their first axis.
      mesh: one axis of devices.
    """
    (axis,) = mesh.axis_names

    def share(weights: M, batch: Any) -> tuple[Array, M]:
        return jax.lax.pmean(jax.value_and_grad(loss)(weights, batch), axis)

    whole, split = PartitionSpec(), PartitionSpec(axis)
    return jax.shard_map(
        share, mesh=mesh, in_specs=(whole, split), out_specs=whole, check_vma=False
    )(weights, batch)


def descend[M](
    rule: optax.GradientTransformation, gradients: M, moments: Any, weights: M
) -> tuple[M, Any]:
    """One step of an optimiser: the weights after it, and its moments."""
    # optax takes any pytree, but its annotations say arrays.
    updates, moments = rule.update(cast(Any, gradients), moments, cast(Any, weights))
    return cast(M, optax.apply_updates(cast(Any, weights), updates)), moments


def moving_average[M](average: M, weights: M, step: Int[Array, ""], decay: float, warm: int) -> M:
    """The average after a step; short of memory at first, so that it forgets where it started.

    Args:
      average: before the step.
      weights: after it.
      step: steps done before it.
      decay: of the average, once about `warm / (1 - decay)` steps are done.
      warm: the average of `n` steps remembers about `n / warm` of them.
    """
    keep = jnp.minimum(decay, step / (step + warm))
    return jax.tree.map(lambda a, w: keep * a + (1 - keep) * w, average, weights)


def rate_factor(fraction: Float[Array, ""]) -> Float[Array, ""]:
    """The schedule of the rates: up over 2 %, level to 30 %, then straight down to 1 %."""
    down = 0.01 + 0.99 * (1 - fraction) / 0.7
    return jnp.clip(jnp.minimum(fraction / 0.02, down), 0.01, 1.0)


Label = Literal["matrix", "text", "rest"]
"""Muon on stacks of matrices, Adam at the text encoder's rate, Adam."""


def optimiser(
    recipe: Recipe, steps: int | Int[Array, ""], labels: Callable[[Any], Any]
) -> optax.GradientTransformation:
    """Clipping, then Muon on the block matrices and Adam on the rest.

    Args:
      recipe: the step sizes, at their largest.
      steps: of the run; traced, so that a run of another length is the same program.
      labels: gives a `Label` for each of the weights, in the same pytree. A "matrix" is a stack of
        them, [L, in, out].
    """
    first, last = recipe.span
    warm_up = jnp.clip(steps // 50, 1, 200)

    def rate(base: float) -> Callable[[Any], Any]:
        def at(count):
            fraction = count / steps
            # Every run starts without moments, so every one warms up, wherever its span begins.
            warm = jnp.minimum(1.0, (count + 1) / warm_up)
            return base * warm * rate_factor(first + (last - first) * fraction)

        return at

    muon = optax.contrib.muon(
        rate(recipe.muon_rate),
        weight_decay=recipe.muon_decay,
        muon_weight_dimension_numbers=optax.contrib.MuonDimensionNumbers((1,), (2,)),
    )

    def adam(base: float) -> optax.GradientTransformation:
        return optax.adamw(rate(base), b1=0.9, b2=0.98, weight_decay=1e-4)

    by_label: dict[Hashable, optax.GradientTransformation] = {
        "matrix": by_shape(muon),
        "text": adam(recipe.adam_rate * recipe.text_rate),
        "rest": adam(recipe.adam_rate),
    }
    return optax.chain(optax.clip_by_global_norm(recipe.clip), optax.partition(by_label, labels))


def by_shape(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Runs `inner` on all leaves of one shape at once: few large products, not many small ones.

    Leaves are stacks along their first axis, and `inner` sees longer ones.
    """

    def gather(tree):
        groups: dict[str, list[Array]] = {}
        for leaf in jax.tree.leaves(tree):
            groups.setdefault("x".join(map(str, leaf.shape[1:])), []).append(leaf)
        return {name: jnp.concatenate(leaves) for name, leaves in groups.items()}

    def scatter(groups, tree):
        leaves, tree_def = jax.tree.flatten(tree)
        taken = dict.fromkeys(groups, 0)
        out = []
        for leaf in leaves:
            name = "x".join(map(str, leaf.shape[1:]))
            out.append(groups[name][taken[name] : taken[name] + leaf.shape[0]])
            taken[name] += leaf.shape[0]
        return jax.tree.unflatten(tree_def, out)

    def update(updates, state, params=None):
        grouped, state = inner.update(gather(updates), state, gather(params))
        return scatter(grouped, updates), state

    return optax.GradientTransformation(lambda params: inner.init(gather(params)), update)
