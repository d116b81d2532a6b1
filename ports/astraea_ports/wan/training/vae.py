"""A Wan VAE as something that `training.run` trains."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from astraea_jax import video
from astraea_ports.checkpoints import export
from astraea_ports.training.part import PartTraining, fingerprint
from astraea_ports.wan import vae_weights
from astraea_ports.wan.training.vae_step import (
    WHOLE_FROM,
    Draw,
    VAERecipe,
    VAEState,
    optimiser,
    raw_latents,
    train_step,
)
from astraea_ports.wan.vae import VAE


@jax.jit
def _reconstructed(vae: VAE, pixels: Array) -> Array:
    return vae.decode(vae.encode(pixels))


class VAETraining(PartTraining):
    """A `training.run.Trainee`; any Wan 2.1 VAE in the Diffusers layout."""

    def __init__(
        self,
        model: str | pathlib.Path,
        draw: Draw,
        recipe: VAERecipe,
        *,
        from_nothing: bool = False,
        data: Mapping[str, Any] | None = None,
        revision: str | None = None,
    ):
        """Loads the VAE of a model; arguments as for `TransformerTraining`."""
        super().__init__(model, recipe, recipe.clips, revision=revision)
        self._draw = draw
        self._vae = vae_weights.load_vae(self.folder / "vae")
        self.check_source({"vae": (self._vae, vae_weights.TABLE)})
        if from_nothing:
            self._vae = VAE(self._vae.config, nnx.Rngs(recipe.seed))
        self._done = 0
        self.about = {
            "part": "vae",
            "vae": dataclasses.asdict(self._vae.config),
            "start": fingerprint(self._vae),
            "data": dict(data or {}),
        }

    def start(self) -> VAEState:
        """The first state, a copy on every device."""
        weights = jax.tree.map(lambda x: jnp.array(x, jnp.float32), self._vae)
        moments = optimiser(self.recipe).init(cast(Any, weights))
        state = VAEState(jnp.int32(0), weights, jax.tree.map(jnp.copy, weights), moments)
        return jax.device_put(state, self.copied)

    def prepare(self, step: int, say: Callable[[str], None]) -> None:
        """Clips are drawn within the step; only its number matters."""
        self._done = step

    def advance(self, state: VAEState) -> tuple[VAEState, jax.Array]:
        """One step, on crops or on whole clips."""
        whole = self._done >= WHOLE_FROM * self.steps
        return train_step(state, draw=self._draw, recipe=self.recipe, whole=whole, mesh=self.mesh)

    def export(self, state: VAEState, folder: pathlib.Path) -> None:
        """The average weights, with the mean and deviation of their latents in the config."""
        average = self.on_one(state.average)
        drawn = self._draw(jax.random.key(self.recipe.seed + 1), 8)
        latents = [raw_latents(average, 2 * clip[None] - 1) for clip in drawn.video]
        axes = (0, 1, 2, 3)
        mean, std = (np.asarray(f(jnp.concatenate(latents), axes)) for f in (jnp.mean, jnp.std))
        self.leave(folder, int(state.step), {"vae": (average, vae_weights.TABLE)})
        export.update_config(
            folder / "vae" / "config.json",
            latents_mean=[round(float(x), 4) for x in mean],
            latents_std=[round(float(x), 4) for x in std],
        )

    def sheet(self, state: VAEState) -> np.ndarray:
        """Two clips above what the VAE makes of them, and the error."""
        average = self.on_one(state.average)
        drawn = self._draw(jax.random.key(self.recipe.seed + 2), 2)
        panels, titles = [], []
        for clip in drawn.video:
            made = (_reconstructed(average, 2 * clip[None] - 1)[0] + 1) / 2
            noise = -10 * float(jnp.log10(jnp.mean(jnp.square(made - clip))))
            panels += [np.asarray(clip), np.asarray(jnp.clip(made, 0, 1))]
            titles += ["drawn", f"through the VAE: {noise:.1f} dB"]
        return video.contact_sheet(panels, titles, columns=2)
