"""A masked oracle of ASTRAEA: everything is computed densely, then stale tokens are put back.

It shares the model's sub-layers and the scores with the library, and none of its gathering,
scattering, chunking or caching in place.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from astraea_jax import model as core
from astraea_jax import selection, solvers
from astraea_jax.methods.base import fold
from astraea_jax.schedule import LEVELS, rows_per_level


def denoise(model, latents, conditions, *, solver, levels, config, guidance, key):
    """Latents after all steps, by plain loops over steps and blocks."""
    geometry = model.geometry(latents.shape)
    prepared = model.prepare(conditions, geometry)
    history, memory = solvers.init(latents), {}
    for index, level in enumerate(levels):
        row = jax.tree.map(lambda leaf, i=index: jnp.asarray(leaf[i]), solver)
        if level:
            repeated = jnp.concatenate([latents, latents])
            timestep = jnp.full((repeated.shape[0],), row.timestep)
            _velocity(
                model, repeated, timestep, prepared, geometry, level, config, memory,
                fold(key, index),
            )  # fmt: skip
        elif config.count_skipped:
            for name in [n for n in memory if n[0] == "age"]:
                memory[name] = memory[name] + 1
        conditional, unconditional = jnp.split(model.unpatchify(memory["velocity"], geometry), 2)
        velocity = unconditional + guidance * (conditional - unconditional)
        latents, history = solvers.step(row, history, latents, velocity)
    return latents


def _velocity(model, latents, timestep, prepared, geometry, level, config, memory, key):
    """One evaluation; what blocks remember is in `memory`, by (name, block)."""
    modulation = model.modulation(timestep, prepared)
    tokens, side = model.embed(latents, prepared)
    entering, kinds = tokens, geometry.kinds
    first = {id(kind): None for kind in kinds}
    for index, (stack, kind_index, layer) in enumerate(order(geometry)):
        kind = geometry.stacks[stack].kinds[kind_index]
        place = kinds.index(kind)
        out, lse, side = _whole_block(
            model, stack, layer, kind_index, prepared, modulation, tokens, side
        )
        # With scope "step" a kind's first block selects for all of its kind, on the tokens that
        # enter the step; kinds for which one selection does share that of the first.
        slot, seen = index, tokens
        if config.scope == "step":
            slot, seen = (0 if shared(geometry) else place), entering
        if config.scope == "block" or (first[id(kind)] is None and slot == place):
            groups = kind.groups
            if config.scope == "step" and shared(geometry):
                groups = max((each.groups for each in kinds), key=lambda each: each.number)
            fresh = _fresh(seen, slot, groups, level, config, memory, key)
            new = selection.heads_reduced(lse, config)
            age = memory.get(("age", slot), jnp.zeros(fresh.shape, jnp.int32))
            memory["lse", slot] = jnp.where(fresh, new, memory.get(("lse", slot), new))
            memory["age", slot] = jnp.where(fresh, 0, age + 1)
            memory["fresh", slot] = fresh
            _remember(seen, slot, fresh, config, memory)
        first[id(kind)] = index
        fresh = memory["fresh", slot]
        tokens = _merge(tokens, out, index, fresh, config, memory)
    velocity = model.head(tokens, modulation)
    if config.velocity == "kept" and "velocity" in memory:
        velocity = jnp.where(fresh[..., None], velocity, memory["velocity"])
    memory["velocity"] = velocity


def order(geometry):
    """The blocks: their stack, which of a layer's they are, and their layer."""
    for stack, each in enumerate(geometry.stacks):
        for layer in range(each.layers):
            for kind in range(len(each.kinds)):
                yield stack, kind, layer


def shared(geometry):
    """Whether equal rows in the finest groups are equal rows in every kind's."""
    numbers = {kind.groups.number for kind in geometry.kinds}
    tenths = {rows_per_level(geometry.num_tokens, number) for number in numbers}
    return len(tenths) == 1 and len(numbers - {1}) <= 1


@functools.partial(jax.jit, static_argnames=("stack", "kind"))
def _whole_block(model, stack, layer, kind, prepared, modulation, tokens, side):
    """One block on every token."""
    layers = jax.tree.map(lambda x: x[layer], model.layers(stack, prepared))
    block = model.bind(stack, layers, prepared, modulation)[kind]
    shared, side = block.shared(core.Rows(tokens), side)
    out = core.apply_block(block, core.Rows(tokens), shared)
    return out.rows, out.lse, side


def _fresh(tokens, index, groups, level, config, memory, key):
    """Mask of the tokens to compute."""
    batch, num_tokens, _ = tokens.shape
    if level == LEVELS:
        return jnp.ones((batch, num_tokens), bool)
    age = memory["age", index]
    if config.rank == "random":
        drawn = selection.random_score(fold(key, index), (batch, num_tokens), config, 2)
        scores = drawn
    else:
        before = memory["reference", index]
        now = selection.view(tokens, config)
        delta = selection.change(now, before, config)
        scores = selection.score(memory["lse", index], delta, age, config)
        if config.branches == "shared":
            scores = selection.shared_score(scores, 2)
    size = num_tokens // groups.number
    count = min(size, level * rows_per_level(size))
    tie = selection.tie_breaker(num_tokens)
    mask = np.zeros((batch, num_tokens), bool)
    for row in range(batch):
        for group in range(groups.number):
            if groups.contiguous:
                members = np.arange(group * size, (group + 1) * size)
            else:
                members = np.arange(group, num_tokens, groups.number)
            rank = np.lexsort(
                (tie[members], -np.asarray(age[row])[members], -np.asarray(scores[row])[members])
            )
            mask[row, members[rank[:count]]] = True
    return jnp.asarray(mask)


def _remember(tokens, index, fresh, config, memory):
    """The input that the next step's change is measured against."""
    now = selection.view(tokens, config)
    if config.reference != "previous":
        now = jnp.where(fresh[..., None], now, memory.get(("reference", index), now))
    memory["reference", index] = now


def _merge(tokens, out, index, fresh, config, memory):
    """Fresh rows as computed, stale ones from memory."""
    kept = out - tokens if config.reuse == "residual" else out
    kept = jnp.where(fresh[..., None], kept, memory.get(("out", index), kept))
    memory["out", index] = kept
    stale = tokens + kept if config.reuse == "residual" else kept
    return jnp.where(fresh[..., None], out, stale)
