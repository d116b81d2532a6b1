"""Which tokens a step computes, and what the cache keeps of the selections."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from astraea_jax import cache as token_cache
from astraea_jax import selection
from astraea_jax.cache import TokenCache
from astraea_jax.methods import base
from astraea_jax.model import Geometry, Groups, Modulation
from astraea_jax.selection import SelectionConfig


class Choice(NamedTuple):
    """One selection.

    Attributes:
      indices: positions by falling score, padded with N; see `selection.order`.
      fresh: which tokens are computed.
    """

    indices: Int[Array, "B M"]
    fresh: Bool[Array, "B N"]


def older(age: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
    """Ages a step later; int8 holds up to 127, beyond any cap."""
    return jnp.minimum(age, 126) + jnp.int8(1)


@dataclasses.dataclass(frozen=True)
class Choosing:
    """What the parts of an evaluation share, and how they select.

    Attributes:
      config: of the selection.
      evaluation: what the steps of the run share.
      modulation: of the model, at this step.
      inputs: of this step.
    """

    config: SelectionConfig
    evaluation: base.Evaluation
    modulation: Modulation
    inputs: base.StepInputs

    @property
    def geometry(self) -> Geometry:
        """Static sizes."""
        return self.evaluation.geometry

    def choose_all(self, tokens, cache: TokenCache, level) -> tuple[tuple[Choice, ...], TokenCache]:
        """Selects the tokens of all blocks, and what the cache then holds of the selections."""
        choices, ages, references = [], [], []
        for slot, groups in enumerate(base.splits(self.geometry)):
            before = cache.reference[slot]
            choice = self.choose(tokens, before, cache, slot, groups, level)
            choices.append(choice)
            ages.append(jnp.where(choice.fresh, 0, older(cache.age[slot])))
            references.append(self.merge_reference(before, tokens, choice.fresh))
        return tuple(choices), cache._replace(
            age=jnp.stack(ages).astype(cache.age.dtype),
            reference=jnp.stack(references).astype(cache.reference.dtype),
        )

    def choose(self, tokens, before, cache: TokenCache, slot, groups, level) -> Choice:
        """Selects the tokens of one block, or with scope "step" of all that a split serves."""
        config = self.config
        batch, num_tokens, _ = tokens.shape
        age = cache.age[slot]
        if config.rank == "random":
            key: Key[Array, ""] = base.fold(self.inputs.key, slot)
            shape = (batch, num_tokens)
            scores = selection.random_score(key, shape, config, self.evaluation.branches)
        else:
            delta = selection.change(selection.view(tokens, config), before, config)
            scores = selection.score(cache.lse[slot], delta, age, config)
            if config.branches == "shared":
                scores = selection.shared_score(scores, self.evaluation.branches)
        ordered = selection.order(scores, age, groups=groups.number, contiguous=groups.contiguous)
        count = level * (ordered.shape[1] // selection.LEVELS)
        return Choice(ordered, selection.selected_mask(ordered, count, num_tokens))

    def slot(self, index, groups: Groups):
        """Where the cache holds LSE and age of a block's selection: at its index, or its split."""
        return index if self.config.scope == "block" else base.split_of(self.geometry, groups)

    def write_selection(self, stack, index, groups: Groups, rows):
        """Stores LSE or age of a block; where one selection serves many, of their first alone."""
        slot = self.slot(index, groups)
        if self.config.scope == "step":
            rows = jnp.where(index == self._first_of(slot), rows.astype(stack.dtype), stack[slot])
        return token_cache.write_block(stack, slot, rows)

    def _first_of(self, slot: int) -> int:
        """The first block that a split serves."""
        before = 0
        for stack in self.geometry.stacks:
            for place, kind in enumerate(stack.kinds):
                if base.split_of(self.geometry, kind.groups) == slot:
                    return before + place
            before += stack.layers * len(stack.kinds)
        raise AssertionError(slot)

    def with_reference(self, cache: TokenCache, tokens: Float[Array, "B N W"]) -> TokenCache:
        """The cache with the one reference that serves all blocks."""
        reference = jnp.broadcast_to(tokens.astype(cache.reference.dtype), cache.reference.shape)
        return cache._replace(reference=reference)

    def write_reference(self, stack, index, tokens):
        """Stores a block's whole input where blocks keep references of their own."""
        if self.config.scope == "step" or self.config.chained:
            return stack
        return token_cache.write_block(stack, index, selection.view(tokens, self.config))

    def merge_reference(self, before, tokens, fresh):
        """The reference after a step: all tokens as they are now, or only the computed ones."""
        now = selection.view(tokens, self.config)
        if self.config.reference == "previous":
            return now
        return jnp.where(fresh[..., None], now, before)
