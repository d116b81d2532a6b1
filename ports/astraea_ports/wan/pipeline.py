"""Prompts to videos with a Wan model: encode the text, denoise, decode."""

import dataclasses
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from astraea_jax import denoise as loop
from astraea_jax import solvers
from astraea_jax.flops import Workload
from astraea_jax.methods import Dense, Method, Trace
from astraea_jax.schedule import Schedule
from astraea_jax.timing import Stopwatch, stopwatch, timed_jit
from astraea_ports import checkpoints, t5, tiny
from astraea_ports.wan import transformer_weights, vae
from astraea_ports.wan.text import Tokenizer
from astraea_ports.wan.transformer import Transformer

SHIPPED = {"tiny": tiny.FOLDER}
"""Models inside the package, by name."""

Stage = Literal["text", "denoise", "decode"]


class Defaults(NamedTuple):
    """What a call uses where it is not told; a folder's astraea.json may say otherwise.

    Attributes:
      frames: of the video, 4k + 1.
      height: pixels, a multiple of 16.
      width: pixels, a multiple of 16.
      steps: denoising steps.
      guidance: scale of classifier-free guidance.
    """

    frames: int = 81
    height: int = 480
    width: int = 832
    steps: int = 50
    guidance: float = 5.0


@dataclasses.dataclass(frozen=True)
class Result:
    """Videos and how they came to be.

    Attributes:
      video: in [0, 1], float32.
      latents: denoised, normalised.
      branches: guidance branches that were run, 1 or 2.
      schedule: the levels that were run.
      trace: which tokens each step computed, or () when it was not asked for.
      seconds: of each stage, compilation apart.
    """

    video: Float[Array, "B F height width 3"]
    latents: Float[Array, "B f h w 16"]
    branches: int
    schedule: Schedule
    trace: Trace | tuple[()]
    seconds: Mapping[Stage, Stopwatch]


@timed_jit()
def _encode_text(encoder: t5.T5Encoder, ids, mask):
    """Embeddings with every row past the text's end set to zero, as Wan was trained."""
    embeddings = encoder(ids, mask)
    return embeddings * mask[..., None].astype(embeddings.dtype)


@timed_jit()
def _decode(model: vae.VAE, latents):
    return (model.decode(latents) + 1) / 2


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A Wan model with its parts, ready to be called.

    Attributes:
      tokenizer: text to ids; knows the text length that the model was trained with.
      text_encoder: ids to embeddings.
      transformer: the denoiser.
      vae: latents to pixels.
      shift: flow shift of the model's scheduler.
      defaults: what a call uses where it is not told.
      folder: where the model was read from; it may carry searched schedules and prompts.
    """

    tokenizer: Tokenizer
    text_encoder: t5.T5Encoder
    transformer: Transformer
    vae: vae.VAE
    shift: float
    defaults: Defaults
    folder: Path | None = None

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike[str] = "tiny", *, dtype: DTypeLike = jnp.float32
    ) -> "Pipeline":
        """Loads every part of a model in the Diffusers layout.

        Args:
          source: a folder, a hub id, or "tiny" for the small model that ships.
          dtype: of the transformer and the text encoder; the VAE is float32, as upstream.

        Raises:
          ValueError: no such model, or a part that is missing, broken, or of another kind.
        """
        folder = checkpoints.model_folder(SHIPPED.get(str(source), source))
        checkpoints.read_config(folder, "model_index.json", expected="WanPipeline")
        scheduler = checkpoints.read_config(folder / "scheduler", "scheduler_config.json")
        return cls(
            tokenizer=Tokenizer.from_pretrained(folder / "tokenizer"),
            text_encoder=t5.load_text_encoder(folder / "text_encoder", dtype=dtype),
            transformer=transformer_weights.load_transformer(folder / "transformer", dtype=dtype),
            vae=vae.load_vae(folder / "vae"),
            shift=float(scheduler.get("flow_shift", scheduler.get("shift", 1.0))),
            defaults=_defaults(folder),
            folder=folder,
        )

    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        negative_prompt: str = "",
        seed: int = 0,
        latents: Float[Array, "B f h w 16"] | None = None,
        method: Method | None = None,
        schedule: Schedule | None = None,
        solver: str = "unipc",
        shift: float | None = None,
        driver: loop.Driver = "static",
        progress: Callable[[Stage, int, int], None] | None = None,
        trace: bool = False,
    ) -> Result:
        """Makes a video for each prompt.

        Args:
          prompts: one or more; none empty.
          frames: of each video, 4k + 1; None is the model's default, as for the next four.
          height: pixels, a multiple of 16.
          width: pixels, a multiple of 16.
          steps: denoising steps; a schedule's length where one is given.
          guidance: scale of classifier-free guidance; 1 or less runs no second branch.
          negative_prompt: what the unconditional branch reads; empty as in Diffusers.
          seed: of the noise; video i draws from (seed, i), whatever else is in the batch.
          latents: noise to start from instead.
          method: how steps are computed; None is the plain model.
          schedule: a level for each step; None is dense.
          solver: "unipc" or "euler".
          shift: flow shift; None is the model's own.
          driver: see `astraea_jax.denoise`.
          progress: called as progress(stage, done, total).
          trace: whether to return which tokens were computed.

        Returns:
          The videos, latents, and seconds of each stage.

        Raises:
          ValueError: any of these out of range, before any long work.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        size = self.size(frames, height, width)
        self._check_prompts(prompts)
        if steps is None:
            steps = self.defaults.steps if schedule is None else schedule.steps
        table = solvers.make(solver, steps, shift=self.shift if shift is None else shift)
        schedule = Schedule.dense(steps) if schedule is None else schedule
        if schedule.steps != steps:
            raise ValueError(
                f"expected a schedule of {steps} levels, one a solver step; got {schedule.steps}"
            )
        guidance = self.defaults.guidance if guidance is None else guidance
        if not math.isfinite(guidance):
            raise ValueError(
                f"guidance must be a finite number, 1 or less for none; got {guidance}"
            )
        noise = self._noise(len(prompts), size, seed, latents)
        report = progress or (lambda stage, done, total: None)

        report("text", 0, 1)
        with stopwatch() as text_watch:
            context = self.encode_text(prompts, negative_prompt if guidance > 1 else None)
        report("text", 1, 1)
        report("denoise", 0, steps)
        with stopwatch() as denoise_watch:
            denoised = loop.denoise(
                self.transformer,
                noise,
                context,
                solver=table,
                schedule=schedule,
                method=Dense() if method is None else method,
                guidance=guidance if guidance > 1 else None,
                key=jax.random.key(seed),
                driver=driver,
                progress=lambda done: report("denoise", done, steps),
                trace=trace,
            )
            jax.block_until_ready(denoised)
        report("decode", 0, len(prompts))
        with stopwatch() as decode_watch:
            videos = []
            for index in range(len(prompts)):
                # One at a time: the VAE's memory is that of the pixels.
                videos.append(_decode(self.vae, denoised.latents[index : index + 1]))
                jax.block_until_ready(videos[-1])
                report("decode", index + 1, len(prompts))
        seconds: dict[Stage, Stopwatch] = {
            "text": text_watch,
            "denoise": denoise_watch,
            "decode": decode_watch,
        }
        video = jnp.concatenate(videos)
        branches = 2 if guidance > 1 else 1
        return Result(video, denoised.latents, branches, schedule, denoised.trace, seconds)

    def encode_text(
        self, prompts: Sequence[str], negative_prompt: str | None = ""
    ) -> Float[Array, "rows M D"]:
        """Text embeddings for `denoise`: the prompts, then as often the negative prompt.

        Args:
          prompts: P of them.
          negative_prompt: None leaves it out (no guidance).

        Returns:
          [2 P, M, D] or [P, M, D], padded to the model's text length with zeros.
        """
        texts = list(prompts)
        if negative_prompt is not None:
            texts += [negative_prompt] * len(prompts)
        tokens = self.tokenizer(texts)
        return jax.block_until_ready(
            _encode_text(self.text_encoder, jnp.asarray(tokens.ids), jnp.asarray(tokens.mask))
        )

    def latents_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Latent frames, height, width and channels of a video's size."""
        config = self.vae.config
        space, time = config.spatial_factor, config.temporal_factor
        return (
            (frames - 1) // time + 1,
            height // space,
            width // space,
            config.latent_channels,
        )

    def workload(self, frames: int, height: int, width: int) -> Workload:
        """Sizes for `astraea_jax.flops` of a video's size."""
        config = self.transformer.config
        geometry = self.transformer.geometry((1, *self.latents_shape(frames, height, width)))
        return Workload(
            num_blocks=geometry.num_blocks,
            num_tokens=geometry.num_tokens,
            width=config.width,
            ffn_width=config.ffn_dim,
            text_tokens=self.tokenizer.length,
            keys=geometry.num_tokens,
        )

    def size(
        self, frames: int | None, height: int | None, width: int | None
    ) -> tuple[int, int, int]:
        """A video's frames, height and width, defaults filled in.

        Raises:
          ValueError: a size that the model can't do; the message says the nearest one.
        """
        default = self.defaults
        size = (
            default.frames if frames is None else frames,
            default.height if height is None else height,
            default.width if width is None else width,
        )
        config, patch = self.vae.config, self.transformer.config.patch_size
        pixels = config.spatial_factor * patch[1], config.spatial_factor * patch[2]
        for name, value, unit in (("height", size[1], pixels[0]), ("width", size[2], pixels[1])):
            if not isinstance(value, int) or value < unit or value % unit:
                raise ValueError(
                    f"{name} must be a multiple of {unit} pixels; got {value!r}: the nearest is "
                    f"{max(unit, unit * round(float(value) / unit))}"
                )
        time = config.temporal_factor
        if not isinstance(size[0], int) or size[0] < 1 or (size[0] - 1) % time:
            nearest = max(1, time * round((float(size[0]) - 1) / time) + 1)
            raise ValueError(
                f"frames must be a multiple of {time} plus 1; got {size[0]!r}: "
                f"the nearest is {nearest}"
            )
        self.transformer.geometry((1, *self.latents_shape(*size)))
        return size

    def _check_prompts(self, prompts: Sequence[str]) -> None:
        if not prompts:
            raise ValueError("expected at least one prompt; got none")
        for prompt in prompts:
            if not isinstance(prompt, str) or not prompt.strip():
                raise ValueError(
                    f"a prompt must say something; got {prompt!r}: describe the video to make"
                )
        unknown = [word for prompt in prompts for word in self.tokenizer.unknown_words(prompt)]
        if unknown:
            warnings.warn(
                f"the model does not know: {', '.join(dict.fromkeys(unknown))}; "
                "it can only spell such words, and the video may not show them",
                stacklevel=3,
            )

    def _noise(self, count: int, size, seed: int, latents) -> Float[Array, "B f h w 16"]:
        shape = self.latents_shape(*size)
        if latents is not None:
            if tuple(latents.shape) != (count, *shape):
                raise ValueError(
                    f"expected latents of shape {(count, *shape)}; got {tuple(latents.shape)}"
                )
            return jnp.asarray(latents, jnp.float32)
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise ValueError(f"seed must be an integer in 0..2^32-1; got {seed!r}")
        keys = [jax.random.fold_in(jax.random.key(seed), index) for index in range(count)]
        return jnp.stack([jax.random.normal(key, shape, jnp.float32) for key in keys])


def _defaults(folder: Path) -> Defaults:
    """Wan's own, or what the folder's astraea.json says."""
    if not (folder / "astraea.json").is_file():
        return Defaults()
    values = checkpoints.read_config(folder, "astraea.json")
    known = {name: values[name] for name in Defaults._fields if name in values}
    return Defaults(**known)
