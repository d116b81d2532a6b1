"""Evolutionary search over schedules, in pure JAX: keys in, keys out.

Source: ASTRAEA 3.3 and Algorithm 2, equations 7-8.
"""

import dataclasses
import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from astraea_jax import checks
from astraea_jax.checks import Refusal
from astraea_jax.schedule import LEVELS, Schedule
from astraea_jax.search.patterns import step_patterns
from astraea_jax.search.space import Space

_ATTEMPTS = 64

MOST_CHILDREN = 10_000
"""Of a generation: children are compared pair by pair, 200 MB here."""

MOST_GENERATIONS = 100_000
"""Of a search: a generation takes seconds at best."""

LEAST_MUTATION = 1e-6
"""Below it no step of a whole search mutates."""


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """How the search goes; static and hashable.

    Attributes:
      population: children of a generation.
      parents: survivors that children are made from.
      generations: how many, after the first population.
      p0: share of a child's steps that mutate in the first generation.
      p_final: in the last.
      replacement: "plus": parents stay as long as they are better than children (section 3.3).
        "generational": children replace them (Algorithm 2).

    Raises:
      Refusal: a number out of range; a population of 1 has no pair of parents.

    Source: ASTRAEA 4.1 (50 candidates, 30 generations, 0.1 to 0.01).
    """

    population: int = 50
    parents: int = 10
    generations: int = 30
    p0: float = 0.1
    p_final: float = 0.01
    replacement: Literal["plus", "generational"] = "plus"

    def __post_init__(self):
        checks.whole("population", self.population, 0, MOST_CHILDREN, unit="children")
        checks.whole("parents", self.parents, 0, MOST_CHILDREN)
        if self.population < 2 or not 2 <= self.parents <= self.population:
            raise Refusal(
                "expected a population of at least 2, and 2 parents up to the population; "
                f"got {self.population} and {self.parents}"
            )
        checks.whole("generations", self.generations, 0, MOST_GENERATIONS)
        for name in ("p0", "p_final"):
            share = checks.number(name, getattr(self, name), 0, 1)
            if 0 < share < LEAST_MUTATION:
                raise Refusal(f"{name} must be 0 or at least {LEAST_MUTATION:g}; got {share:g}")
        if self.p_final > self.p0:
            raise Refusal(f"expected 0 <= p_final <= p0 <= 1; got {self.p_final} and {self.p0}")
        checks.one_of("replacement", self.replacement, ("plus", "generational"))

    def mutation(self, generation: Int[Array, ""] | int) -> Float[Array, ""]:
        """Probability that a step mutates in a generation, 1..generations (equation 8)."""
        share = jnp.asarray(generation, jnp.float32) / max(self.generations, 1)
        return self.p0 - share * (self.p0 - self.p_final)


class SearchState(NamedTuple):
    """What goes from generation to generation: a pytree of arrays.

    Attributes:
      key_data: of the key that the next generation is drawn from.
      generation: finished ones; 0 after the first population.
      genes: survivors, the best first.
      fitness: of each; lower is better, infinite where there is none yet.
      best_genes: of the best schedule so far.
      best_fitness: its fitness.
    """

    key_data: UInt32[Array | np.ndarray, "words"]
    generation: Int[Array | np.ndarray, ""]
    genes: Int[Array | np.ndarray, "K T"]
    fitness: Float[Array | np.ndarray, "K"]
    best_genes: Int[Array | np.ndarray, "T"]
    best_fitness: Float[Array | np.ndarray, ""]


def start(space: Space, config: SearchConfig, key: Key[Array, ""]) -> SearchState:
    """The state before any schedule has been scored."""
    dense = jnp.full((space.steps,), len(space.choices) - 1, jnp.int8)
    return SearchState(
        key_data=jax.random.key_data(key),
        generation=jnp.int32(0),
        genes=jnp.tile(dense, (config.parents, 1)),
        fitness=jnp.full((config.parents,), jnp.inf, jnp.float32),
        best_genes=dense,
        best_fitness=jnp.float32(jnp.inf),
    )


def initial_population(
    space: Space,
    config: SearchConfig,
    key: Key[Array, ""],
    given: tuple[Schedule, ...] = (),
) -> Int[np.ndarray, "P T"]:
    """The first population: what is given, the uniform schedule, step patterns, then random ones.

    Skipping whole steps is a strong baseline, so patterns of only levels 0 and 10 take up to
    half of what is left.

    Args:
      space: where to search.
      config: its size.
      key: for the random ones.
      given: schedules to start from, as that of `sensitivity.allocate`; those outside the space
        are repaired into it.
    """
    if not isinstance(given, list | tuple) or not all(isinstance(s, Schedule) for s in given):
        raise Refusal(f"given must be Schedules; got {checks.shown(given)}")
    chosen = [_nearest(space, schedule) for schedule in given]
    chosen.append(_nearest(space, Schedule((LEVELS,) * space.dense_start + _even(space))))
    if space.choices[0] == 0:
        patterns = _patterns(space)
        room = max(0, config.population - len(chosen)) // 2
        # Spread over the list, which is sorted by the length of the dense start.
        taken = np.unique(np.linspace(0, len(patterns) - 1, min(room, len(patterns))).astype(int))
        chosen += [patterns[index] for index in taken]
    chosen = np.array(chosen[: config.population], np.int8)
    padded = np.zeros((config.population, space.steps), np.int8)
    padded[: len(chosen)] = chosen
    genes, usable = _first(space.without_band(), space.band, key, padded, len(chosen))
    genes = np.asarray(genes)[np.asarray(usable)]
    if len(genes) < 2:
        raise Refusal(space.too_small(len(genes)))
    return genes


def next_children(
    space: Space, config: SearchConfig, state: SearchState
) -> tuple[Int[np.ndarray, "P T"], SearchState]:
    """Children of the survivors, none alike and none a survivor, and the state with the key moved.

    In a space so small that new schedules run out there may be fewer than the population.
    """
    key, use = jax.random.split(jax.random.wrap_key_data(jnp.asarray(state.key_data)))
    genes, usable = _children(
        space.without_band(), config.population, space.band, use,
        state.genes, state.fitness, config.mutation(int(state.generation) + 1),
    )  # fmt: skip
    moved = state._replace(key_data=jax.random.key_data(key))
    return np.asarray(genes)[np.asarray(usable)], moved


def survive(
    config: SearchConfig,
    state: SearchState,
    genes: Int[np.ndarray, "P T"],
    fitness: Float[np.ndarray, "P"],
) -> SearchState:
    """The state after a population has been scored; NaN counts as infinite."""
    fitness = np.where(np.isnan(fitness), np.inf, fitness).astype(np.float32)
    first = bool(np.isinf(state.best_fitness))
    if config.replacement == "plus" and not first:
        genes = np.concatenate([np.asarray(state.genes), genes])
        fitness = np.concatenate([np.asarray(state.fitness), fitness])
    order = np.argsort(fitness, kind="stable")
    kept = np.resize(order, config.parents)  # repeats where there are too few
    best = order[0]
    better = fitness[best] < state.best_fitness
    return state._replace(
        generation=jnp.int32(state.generation + (0 if first else 1)),
        genes=jnp.asarray(genes[kept], jnp.int8),
        fitness=jnp.asarray(fitness[kept], jnp.float32),
        best_genes=jnp.asarray(genes[best] if better else state.best_genes, jnp.int8),
        best_fitness=jnp.float32(fitness[best] if better else state.best_fitness),
    )


def uniform_crossover(
    key: Key[Array, ""], first: Int[Array, "T"], second: Int[Array, "T"]
) -> Int[Array, "T"]:
    """Each gene from either parent with equal probability."""
    return jnp.where(jax.random.bernoulli(key, jnp.float32(0.5), first.shape), first, second)


def block_crossover(
    key: Key[Array, ""], first: Int[Array, "T"], second: Int[Array, "T"]
) -> Int[Array, "T"]:
    """One run of steps from one parent, the rest from the other."""
    ends = jax.random.randint(key, (2,), 0, first.shape[0] + 1, jnp.int32)
    index = jnp.arange(first.shape[0], dtype=jnp.int32)
    return jnp.where((index >= ends.min()) & (index < ends.max()), first, second)


def mutate(
    space: Space, key: Key[Array, ""], genes: Int[Array, "T"], probability: Float[Array, ""]
) -> Int[Array, "T"]:
    """Each free step takes any choice with a probability."""
    whether, which = jax.random.split(key)
    drawn = jax.random.randint(which, genes.shape, 0, len(space.choices), genes.dtype)
    free = jnp.arange(space.steps, dtype=jnp.int32) >= space.dense_start
    mask = jax.random.bernoulli(whether, probability, genes.shape) & free
    return jnp.where(mask, drawn, genes)


def repair(
    space: Space, band: Int[Array, "2"], key: Key[Array, ""], genes: Int[Array, "T"]
) -> Int[Array, "T"]:
    """Moves random free steps by one choice until the cost lies in the band, which is data.

    Where costs are so uneven that this does not end in the band, the last try is returned:
    `in_space` tells.
    """
    costs = jnp.asarray(space.costs, jnp.int32)
    top = len(space.choices) - 1
    free = jnp.arange(space.steps, dtype=jnp.int32) >= space.dense_start
    genes = jnp.where(free, genes, top).astype(genes.dtype)

    def outside(carry):
        _, genes, turn = carry
        return ~in_space(space, band, genes) & (turn < 2 * top * space.steps)

    def move(carry):
        key, genes, turn = carry
        key, use = jax.random.split(key)
        down = costs[genes].sum() > band[1]
        movable = free & jnp.where(down, genes > 0, genes < top)
        weight = jnp.where(movable, jax.random.uniform(use, genes.shape, jnp.float32), -1.0)
        change = jnp.where(down, -1, 1).astype(genes.dtype)
        return key, genes.at[jnp.argmax(weight)].add(change), turn + 1

    return lax.while_loop(outside, move, (key, genes, jnp.int32(0)))[1]


def in_space(space: Space, band: Int[Array, "2"], genes: Int[Array, "T"]) -> Bool[Array, ""]:
    """Whether a row of genes costs what it may, its pinned steps being dense."""
    total = jnp.asarray(space.costs, jnp.int32)[genes].sum()
    return (total >= band[0]) & (total <= band[1])


def distinct(
    space: Space,
    band: Int[Array, "2"],
    key: Key[Array, ""],
    genes: Int[Array, "P T"],
    known: Int[Array, "K T"],
) -> tuple[Int[Array, "P T"], Bool[Array, "P"]]:
    """Mutates rows that another row, or a known one, equals, until none does.

    Returns:
      The rows, and which of them are in the space and like no other: all, but in small spaces.
    """
    number = genes.shape[0]
    earlier = jnp.arange(number, dtype=jnp.int32)[:, None] > jnp.arange(number, dtype=jnp.int32)
    taken = _digest(known)

    def usable(genes):
        mine = _digest(genes)
        alike = ((mine[:, None] == mine[None]).all(axis=-1) & earlier).any(axis=1)
        alike |= (mine[:, None] == taken[None]).all(axis=-1).any(axis=1)
        return ~alike & jax.vmap(functools.partial(in_space, space, band))(genes)

    def again(carry):
        key, genes, turn = carry
        key, use = jax.random.split(key)
        keys = jax.random.split(use, (number, 2))
        # Ever more steps, so that rows leave a crowded neighbourhood.
        probability = jnp.minimum(0.05 * (turn + 1), 1.0)

        def renew(keys, row):
            return repair(space, band, keys[1], mutate(space, keys[0], row, probability))

        renewed = jax.vmap(renew)(keys, genes)
        return key, jnp.where(usable(genes)[:, None], genes, renewed), turn + 1

    def unfinished(carry):
        return ~usable(carry[1]).all() & (carry[2] < _ATTEMPTS)

    _, genes, _ = lax.while_loop(unfinished, again, (key, genes, jnp.int32(0)))
    return genes, usable(genes)


def _digest(genes: Int[Array, "P T"]) -> UInt32[Array, "P 2"]:
    """Two hashes of each row. Rows that differ and collide would only be mutated once more."""
    factors = np.random.default_rng(0).integers(1, 2**32, (genes.shape[1], 2), np.uint32)
    return (genes.astype(jnp.uint32)[..., None] * factors).sum(axis=1, dtype=jnp.uint32)


# One program serves all budgets and generations: the band and the rate are data.


@functools.partial(jax.jit, static_argnums=(0, 1))
def _children(space: Space, population: int, band, key, parents, fitness, probability):
    """A generation of children, vmapped; see `next_children`."""
    keys = jax.random.split(key, population + 1)
    alive = jnp.isfinite(fitness)
    weights = alive / jnp.maximum(alive.sum(), 1)

    def child(key):
        pair, kind, cross, change, mend = jax.random.split(key, 5)
        first, second = jax.random.choice(pair, parents.shape[0], (2,), replace=False, p=weights)
        crossed = jnp.where(
            jax.random.bernoulli(kind, jnp.float32(0.5)),
            uniform_crossover(cross, parents[first], parents[second]),
            block_crossover(cross, parents[first], parents[second]),
        )
        return repair(space, band, mend, mutate(space, change, crossed, probability))

    return distinct(space, band, keys[0], jax.vmap(child)(keys[1:]), parents)


@functools.partial(jax.jit, static_argnums=0)
def _first(space: Space, band, key, given, number):
    """The first `number` given rows, then random ones, all repaired and none alike."""
    population, steps = given.shape
    fill, apart = jax.random.split(key)

    def filled(index, keys, row):
        dense = jnp.full((steps,), len(space.choices) - 1, jnp.int8)
        row = jnp.where(index < number, row, mutate(space, keys[0], dense, jnp.float32(1.0)))
        return repair(space, band, keys[1], row)

    keys = jax.random.split(fill, (population, 2))
    rows = jax.vmap(filled)(jnp.arange(population, dtype=jnp.int32), keys, given)
    return distinct(space, band, apart, rows, rows[:0])


def _nearest(space: Space, schedule: Schedule) -> np.ndarray:
    """Genes whose levels are the nearest choices."""
    distance = np.abs(np.asarray(schedule.levels)[:, None] - np.asarray(space.choices))
    return distance.argmin(axis=1).astype(np.int8)


def _even(space: Space) -> tuple[int, ...]:
    """The same level at every free step, near the middle of the band."""
    middle = (space.low + space.high) / 2 - space.costs[-1] * space.dense_start
    share = np.abs(np.asarray(space.costs) - middle / max(space.free_steps, 1)).argmin()
    return (space.choices[int(share)],) * space.free_steps


def _patterns(space: Space) -> list[np.ndarray]:
    """Step patterns that lie in the space as they are."""
    rows = []
    for computed in range(1, space.steps + 1):
        cost = computed * space.costs[-1] + (space.steps - computed) * space.costs[0]
        if space.low <= cost <= space.high:
            found = step_patterns(space.steps, computed).values()
            rows += [_nearest(space, each) for each in found]
    return [row for row in rows if space.holds(row)]
