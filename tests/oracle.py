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


def denoise(model, latents, context, *, solver, levels, config, guidance, key):
    """Latents after all steps, by plain loops over steps and blocks."""
    geometry = model.geometry(latents.shape)
    prepared = model.prepare(context, geometry)
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
    modulation = model.modulation(timestep)
    tokens = model.embed(latents)
    layers, index, entering = model.layers(prepared), 0, tokens
    for layer in range(geometry.num_layers):
        for kind, groups in enumerate(geometry.groups):
            out, lse = _whole_block(model, layers, layer, kind, prepared, modulation, tokens)
            # With scope "step" a kind's first block selects for all of its kind, on the tokens that
            # enter the step; kinds for which one selection does share that of the first.
            slot, seen = index, tokens
            if config.scope == "step":
                slot, seen = (0 if shared(geometry) else kind), entering
            if config.scope == "block" or (layer == 0 and slot == kind):
                fresh = _fresh(seen, slot, groups, level, config, memory, key)
                new = selection.heads_reduced(lse, config)
                age = memory.get(("age", slot), jnp.zeros(fresh.shape, jnp.int32))
                memory["lse", slot] = jnp.where(fresh, new, memory.get(("lse", slot), new))
                memory["age", slot] = jnp.where(fresh, 0, age + 1)
                memory["fresh", slot] = fresh
                _remember(seen, slot, fresh, config, memory)
            fresh = memory["fresh", slot]
            out = _merge(tokens, out, index, fresh, config, memory)
            tokens, index = out, index + 1
    velocity = model.head(tokens, modulation)
    if config.velocity == "kept" and "velocity" in memory:
        velocity = jnp.where(fresh[..., None], velocity, memory["velocity"])
    memory["velocity"] = velocity


def shared(geometry):
    """Whether equal rows in the first kind's groups are equal rows in every kind's."""
    tenths = {rows_per_level(geometry.num_tokens, each.number) for each in geometry.groups}
    return len(tenths) == 1 and all(each.number == 1 for each in geometry.groups[1:])


@functools.partial(jax.jit, static_argnames="kind")
def _whole_block(model, layers, layer, kind, prepared, modulation, tokens):
    """One block on every token."""
    block = model.bind(jax.tree.map(lambda x: x[layer], layers), prepared, modulation)[kind]
    return core.apply_block(block, tokens, None, block.keys_values(tokens))


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
