"""The causal 3-D VAE of Wan 2.1: videos to latents and back.

Each frame sees itself and frames before it only; the first one stands for itself in time, so 4k+1
frames become k+1 latent ones. Here a clip goes through whole; `pipeline.tiles` cuts it in time and
space to bound the memory, with the same numbers.

Source: https://github.com/Wan-Video/Wan2.1 `wan/modules/vae.py`; Diffusers' `AutoencoderKLWan`.
"""

import itertools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from astraea_jax import checks
from astraea_jax.checks import Refusal
from astraea_ports.wan.vae_config import VAEConfig as VAEConfig
from astraea_ports.wan.vae_layers import Convolution, Down, Middle, Past, Residual, Up, norm_silu


class Encoder(nnx.Module):
    """Pixels to the mean and log variance of the latents, before the last 1x1x1 convolution."""

    def __init__(self, config: VAEConfig, rngs: nnx.Rngs):
        """Random weights."""
        widths = [config.encoder_width * m for m in (1, *config.multipliers)]
        self.conv_in = Convolution((3, 3, 3, config.image_channels, widths[0]), rngs)
        layers: list[Residual | Down] = []
        for i, (before, width) in enumerate(itertools.pairwise(widths)):
            for j in range(config.num_blocks):
                layers.append(Residual(width if j else before, width, rngs))
            if i < len(config.temporal):
                layers.append(Down(width, config.temporal[i], rngs))
        self.layers = nnx.List(layers)
        self.mid = Middle(widths[-1], rngs)
        self.norm_out = nnx.Param(jnp.ones(widths[-1], jnp.float32))
        self.conv_out = Convolution((3, 3, 3, widths[-1], 2 * config.latent_channels), rngs)

    def enter(self, x: Float[Array, "B F height width 3"], past: Past) -> Float[Array, "B f h w C"]:
        """The layers that see a neighbourhood only, down to the size of the latents."""
        x = self.conv_in.causal(x, past)
        for layer in self.layers:
            x = layer(x, past)
        return x

    def leave(self, x: Float[Array, "B f h w C"], past: Past) -> Float[Array, "B f h w D"]:
        """The rest, whose attention sees the whole of a frame."""
        return self.conv_out.causal(norm_silu(self.mid(x, past), self.norm_out[...]), past)


class Stage(nnx.Module):
    """One size of the decoder: residual blocks, then (but for the last) twice the size."""

    def __init__(self, num_in: int, width: int, num_blocks: int, up: bool | None, rngs: nnx.Rngs):
        """Random weights. `up`: also in time; None: stay at this size."""
        inputs = [num_in] + [width] * (num_blocks - 1)
        self.blocks = nnx.List([Residual(size, width, rngs) for size in inputs])
        self.up = None if up is None else Up(width, up, rngs)

    def __call__(
        self, x: Float[Array, "B f h w I"], past: Past
    ) -> Float[Array, "B F height width O"]:
        """Applies it."""
        for block in self.blocks:
            x = block(x, past)
        return x if self.up is None else self.up(x, past)


class Decoder(nnx.Module):
    """Latents, after the first 1x1x1 convolution, to pixels."""

    def __init__(self, config: VAEConfig, rngs: nnx.Rngs):
        """Random weights."""
        widths = [config.decoder_width * m for m in reversed(config.multipliers)]
        ups = (*reversed(config.temporal), None)
        self.conv_in = Convolution((3, 3, 3, config.latent_channels, widths[0]), rngs)
        self.mid = Middle(widths[0], rngs)
        # Each upsampling halves the channels that the next stage gets.
        inputs = [widths[0], *(width // 2 for width in widths[:-1])]
        self.stages = nnx.List(
            [
                Stage(num_in, width, config.num_blocks + 1, up, rngs)
                for num_in, width, up in zip(inputs, widths, ups, strict=True)
            ]
        )
        self.norm_out = nnx.Param(jnp.ones(widths[-1], jnp.float32))
        self.conv_out = Convolution((3, 3, 3, widths[-1], config.image_channels), rngs)

    def enter(self, x: Float[Array, "B f h w C"], past: Past) -> Float[Array, "B f h w D"]:
        """What happens at the size of the latents: its attention sees the whole of a frame."""
        return self.mid(self.conv_in.causal(x, past), past)

    def leave(self, x: Float[Array, "B f h w D"], past: Past) -> Float[Array, "B F height width 3"]:
        """The layers that see a neighbourhood only, up to the size of the pixels."""
        for stage in self.stages:
            x = stage(x, past)
        return self.conv_out.causal(norm_silu(x, self.norm_out[...]), past)


Before = Sequence[Array] | None
"""What a piece of a clip left for the next one; None starts a clip."""


class VAE(nnx.Module):
    """Videos to normalised latents and back. It computes in its weights' dtype.

    Both ways are plain functions of the module and its input: `jax.jit(VAE.decode)(vae, latents)`.
    Memory grows with the whole clip, about four times its frames at `decoder_width` channels.
    """

    def __init__(self, config: VAEConfig, rngs: nnx.Rngs):
        """Random weights."""
        channels = config.latent_channels
        self.config = config
        self.encoder = Encoder(config, rngs)
        self.quant = Convolution((2 * channels, 2 * channels), rngs)
        self.post_quant = Convolution((channels, channels), rngs)
        self.decoder = Decoder(config, rngs)

    def decode(
        self, latents: Float[Array, "B f h w C"], *, clamp: bool = True
    ) -> Float[Array, "B F height width 3"]:
        """Latents to a video.

        Args:
          latents: normalised, of mean 0 and standard deviation 1 for each channel.
          clamp: the video to -1..1; the decoder overshoots a little.

        Returns:
          A float32 video in -1..1, of 4f-3 frames of 8h x 8w pixels.

        Raises:
          Refusal: the shape is not that of latents.
        """
        features, _ = self.decode_enter(latents)
        video, _ = self.decode_leave(features)
        return jnp.clip(video, -1.0, 1.0) if clamp else video

    def encode(self, video: Float[Array, "B F height width 3"]) -> Float[Array, "B f h w C"]:
        """A video to the mean of its latents, nothing sampled.

        Args:
          video: in -1..1, of 4k+1 frames, height and width multiples of 8.

        Returns:
          k+1 frames of normalised latents, float32.

        Raises:
          Refusal: the shape is not that of such a video.
        """
        self.check_video(video)
        features, _ = self.encode_enter(video)
        return self.encode_leave(features)[0]

    def decode_enter(
        self, latents: Float[Array, "B f h w C"], before: Before = None
    ) -> tuple[Float[Array, "B f h w D"], list[Array]]:
        """The first part of `decode`, for a piece of a clip in time.

        Args:
          latents: the piece.
          before: what the piece before left; None starts a clip.

        Returns:
          Features, and what the next piece needs.
        """
        self.check_latents(latents)
        mean, std = self._statistics(latents.ndim)
        scaled = (latents.astype(jnp.float32) * std + mean).astype(self.post_quant.kernel.dtype)
        past = Past(before)
        return self.decoder.enter(self.post_quant.pointwise(scaled), past), past.kept

    def decode_leave(
        self, features: Float[Array, "B f h w D"], before: Before = None
    ) -> tuple[Float[Array, "B F height width 3"], list[Array]]:
        """The rest of `decode`, for a piece in time and space; not clamped."""
        past = Past(before)
        return self.decoder.leave(features, past).astype(jnp.float32), past.kept

    def encode_enter(
        self, video: Float[Array, "B F height width 3"], before: Before = None
    ) -> tuple[Float[Array, "B f h w D"], list[Array]]:
        """The first part of `encode`, for a piece in time and space."""
        past = Past(before)
        return self.encoder.enter(video.astype(self.quant.kernel.dtype), past), past.kept

    def encode_leave(
        self, features: Float[Array, "B f h w D"], before: Before = None
    ) -> tuple[Float[Array, "B f h w C"], list[Array]]:
        """The rest of `encode`, for a piece of a clip in time."""
        past = Past(before)
        encoded = self.quant.pointwise(self.encoder.leave(features, past))
        mean, std = self._statistics(encoded.ndim)
        means = encoded[..., : self.config.latent_channels].astype(jnp.float32)
        return (means - mean) / std, past.kept

    def check_latents(self, latents: Float[Array, "..."]) -> None:
        """Refuses what are no latents."""
        channels = self.config.latent_channels
        checks.array("latents", latents, "[B,f,h,w,C]")
        if latents.ndim != 5 or latents.shape[-1] != channels or 0 in latents.shape:
            raise Refusal(
                f"expected latents of shape [batch, frames, height, width, {channels}], got "
                f"{list(latents.shape)}; put the channels last"
            )

    def check_video(self, video: Float[Array, "..."]) -> None:
        """Refuses what is no video of a size that has latents."""
        config = self.config
        space, time = config.spatial_factor, config.temporal_factor
        checks.array("video", video, "[B,F,H,W,3]")
        if video.ndim != 5 or video.shape[-1] != config.image_channels or 0 in video.shape:
            raise Refusal(
                "expected a video of shape [batch, frames, height, width, "
                f"{config.image_channels}], got {list(video.shape)}; put the channels last"
            )
        frames, height, width = video.shape[1:4]
        if (frames - 1) % time or height % space or width % space:
            raise Refusal(
                f"expected {time}k+1 frames and a height and width that are multiples of {space}, "
                f"got {frames} frames of {height}x{width}; cut or pad the video"
            )

    def _statistics(self, rank: int) -> tuple[Array, Array]:
        both = (self.config.latents_mean, self.config.latents_std)
        mean, std = (np.asarray(x, np.float32).reshape((1,) * (rank - 1) + (-1,)) for x in both)
        return jnp.asarray(mean), jnp.asarray(std)
