"""Prompts to videos: encode the text, denoise, decode."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, Unpack, get_args

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

import astraea_ports
from astraea_jax import checks, solvers
from astraea_jax import denoise as loop
from astraea_jax.checks import Refusal
from astraea_jax.flops import Workload
from astraea_jax.methods import Method
from astraea_jax.schedule import Schedule
from astraea_jax.timing import Stopwatch, stopwatch
from astraea_ports.checkpoints import Loadable, Precision
from astraea_ports.checkpoints.lora import Lora
from astraea_ports.pipeline import parts, stages
from astraea_ports.pipeline import plan as plans
from astraea_ports.pipeline.parts import Defaults, Denoiser, Parts
from astraea_ports.pipeline.plan import Options, Plan
from astraea_ports.pipeline.stages import Made, Progress, Result, Stage, quiet
from astraea_ports.pipeline.tiles import VAE
from astraea_ports.text import embeddings
from astraea_ports.text.t5 import T5Encoder
from astraea_ports.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A model with its parts, ready to be called.

    Attributes:
      tokenizer: text to ids; knows the text length that the model was trained with.
      text_encoder: ids to embeddings.
      transformer: the denoiser.
      vae: latents to pixels.
      shift: flow shift of the model's scheduler.
      defaults: what a call uses where it is not told.
      grid: whose noise levels a call steps through unless told.
      loaders: the way to get a part that is shapes alone; it is loaded for its stage, then let go.
      text_cache: folder where embeddings are kept, or None.
      text_name: stands for the text encoder's weights there.
      folder: where the model was read from; it may carry searched schedules and prompts.
    """

    tokenizer: Tokenizer
    text_encoder: T5Encoder
    transformer: Denoiser
    vae: VAE
    shift: float
    defaults: Defaults
    grid: solvers.Grid = "diffusers"
    loaders: Mapping[str, Loadable] = dataclasses.field(default_factory=dict)
    text_cache: Path | None = None
    text_name: str = ""
    folder: Path | None = None

    open_parts = staticmethod(astraea_ports.open_parts)
    random_parts = staticmethod(astraea_ports.random_parts)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str] = "tiny",
        *,
        dtype: DTypeLike | None = None,
        precision: Precision = "reference",
        lora: Sequence[Lora] = (),
        staged: bool | None = None,
        text_cache: str | os.PathLike[str] | None = None,
        revision: str | None = None,
    ) -> Self:
        """Opens every part of a model, whichever port it is of.

        Args:
          source: a folder, a hub id, or "tiny" for the small model that ships.
          dtype: of the transformer and the text encoder; the VAE is float32, as upstream. None is
            the folder's own: what its astraea.json says, else that of its transformer's weights,
            but for a large model in float32, which runs in bfloat16 as the originals do.
          precision: what the transformer leaves in float32; see its port.
          lora: files of low-rank changes to the transformer.
          staged: loads each part for its stage and lets go of it after, instead of all now. None
            does so with a large model: one of more than 500 million parameters.
          text_cache: folder that keeps embeddings, by a hash of tokens and encoder.
          revision: of a hub id: a branch, a tag or a commit.

        Raises:
          Refusal: no such model, or a part that is missing, broken, or of another kind.
        """
        found = cls.open_parts(
            source, dtype=dtype, precision=precision, lora=lora, revision=revision
        )
        return cls.of(found, staged=staged, text_cache=text_cache)

    @classmethod
    def random(
        cls,
        size: str = "1.3B",
        *,
        dtype: DTypeLike = jnp.float32,
        precision: Precision = "reference",
        seed: int = 0,
        staged: bool | None = False,
    ) -> Self:
        """A model of a real size with random weights, for timing; it reads text with a stand-in.

        Raises:
          Refusal: an unknown size or policy.
        """
        made = cls.random_parts(size, dtype=dtype, precision=precision, seed=seed)
        return cls.of(made, staged=staged)

    @classmethod
    def of(
        cls,
        found: Parts,
        *,
        staged: bool | None = None,
        text_cache: str | os.PathLike[str] | None = None,
    ) -> Self:
        """The pipeline of parts that were found; options as of `from_pretrained`."""
        staged = found.large if staged is None else staged
        loaders: dict[str, Loadable] = {
            "text_encoder": found.text_encoder,
            "transformer": found.transformer,
            "vae": found.vae,
        }
        modules: dict[str, Any] = {
            name: loader.template if staged else loader.load() for name, loader in loaders.items()
        }
        return cls(
            tokenizer=found.tokenizer,
            shift=found.shift,
            defaults=found.defaults,
            grid=found.grid,
            loaders=loaders if staged else {},
            text_cache=None if text_cache is None else Path(os.path.expanduser(text_cache)),
            text_name=found.text_name,
            folder=found.folder,
            **modules,
        )

    @property
    def dtype(self) -> str:
        """NumPy's name of the dtype that the transformer's large products have."""
        return parts.main_dtype(self.transformer)

    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        driver: loop.Driver = "static",
        progress: Progress | None = None,
        trace: bool = False,
        **options: Unpack[Options],
    ) -> Result:
        """Makes a video for each prompt.

        Args:
          prompts: one or more; none empty.
          driver: see `astraea_jax.denoise`.
          progress: called as progress(stage, done, total).
          trace: whether to return which tokens were computed.
          **options: frames, height, width, steps, guidance, negative_prompt, seed, latents,
            method, schedule, solver, shift, grid: see `Options`.

        Returns:
          The videos, latents, and seconds of each stage.

        Raises:
          Refusal: any of these out of range, before any long work.
        """
        _check_run(driver, progress, trace)
        plan = self.plan(prompts, **options)
        made = self.denoise(plan, driver=driver, progress=progress, trace=trace)
        return self.finish(made, progress)[0]

    def plan(self, prompts: str | Sequence[str], **options: Unpack[Options]) -> Plan:
        """A call's arguments, checked and with the defaults filled in; no weight is read.

        For more than one run of a prompt: `denoise` it by several methods, then `finish` them.

        Raises:
          Refusal: any of these out of range.
        """
        plans.check_options(options)
        size = self.size(*(options.get(name) for name in ("frames", "height", "width")))
        model = plans.Model(
            tokenizer=self.tokenizer,
            latents=self.latents_shape(*size),
            steps=self.defaults.steps,
            guidance=self.defaults.guidance,
            shift=self.shift,
            grid=self.grid,
        )
        return plans.make(prompts, model, options)

    def denoise(
        self,
        plan: Plan,
        choose: Callable[[Denoiser], Sequence[tuple[Method, Schedule]]] | None = None,
        *,
        driver: loop.Driver = "static",
        progress: Progress | None = None,
        trace: bool = False,
    ) -> list[Made]:
        """Encodes the text and denoises, once for each run, with every part loaded once.

        Args:
          plan: of `Pipeline.plan`.
          choose: gives the method and the schedule of each run; it gets the transformer with its
            weights, which a searched schedule may have to know. None is the plan's own, once.
          driver: see `astraea_jax.denoise`.
          progress: called as progress(stage, done, total).
          trace: whether to keep which tokens were computed.

        Returns:
          The latents of each run; the seconds of what they share stand with the first.

        Raises:
          Refusal: NaN or infinity in a run's latents.
        """
        _check_run(driver, progress, trace)
        report = progress or quiet
        seconds: dict[Stage, Stopwatch] = {}
        report("text", 0, 1)
        with stopwatch() as seconds["text"]:
            context = self.encode_text(plan.prompts, plan.negative_prompt)
        report("text", 1, 1)
        # Held by this function alone: one that was loaded for its stage is gone when it returns.
        transformer = self._resident("transformer", report, seconds)
        runs = [(plan.method, plan.schedule)] if choose is None else choose(transformer)
        made = []
        for method, schedule in runs:
            own = plan._replace(method=method, schedule=schedule)
            seconds = {} if made else seconds
            made.append(
                stages.denoise(
                    transformer,
                    own,
                    context,
                    driver=driver,
                    trace=trace,
                    report=report,
                    seconds=seconds,
                )
            )
        return made

    def finish(self, made: Sequence[Made], progress: Progress | None = None) -> list[Result]:
        """Decodes what was denoised, with the VAE loaded once.

        Raises:
          Refusal: NaN or infinity in a video.
        """
        report = progress or quiet
        # The decoder may be the largest thing of all: loaded once, and gone when this returns.
        vae = self._resident("vae", report, made[0].seconds)
        decoder = dataclasses.replace(self, vae=vae)
        return [
            Result(
                video=decoder.decode(each.latents, report, each.seconds),
                latents=each.latents,
                branches=each.branches,
                schedule=each.schedule,
                trace=each.trace,
                seconds=each.seconds,
            )
            for each in made
        ]

    def decode(
        self,
        latents: Float[Array, "B f h w C"],
        report: Progress = quiet,
        seconds: dict[Stage, Stopwatch] | None = None,
    ) -> Float[Array, "B F height width 3"]:
        """Latents to videos in [0, 1], one video at a time, in pieces where it is large.

        Args:
          latents: denoised, normalised.
          report: takes progress.
          seconds: gets those of loading and decoding.

        Raises:
          Refusal: what are no latents, or a video with NaN in it.
        """
        if checks.array("latents", latents, "[B,f,h,w,C]").ndim != 5 or not latents.size:
            raise Refusal(f"expected latents [B,f,h,w,C]; got shape {tuple(latents.shape)}")
        seconds = {} if seconds is None else seconds
        model = self._resident("vae", report, seconds)
        with stopwatch() as seconds["decode"]:
            return stages.decode(model, latents, report)

    def _resident(self, name: str, report: Progress, seconds: dict[Stage, Stopwatch]):
        """A part with its weights: the pipeline's own, or loaded now."""
        return stages.resident(getattr(self, name), self.loaders.get(name), report, seconds)

    def encode_text(
        self, prompts: Sequence[str], negative_prompt: str | None = ""
    ) -> Float[Array, "rows M D"]:
        """Text embeddings for `denoise`: the prompts, then as often the negative prompt.

        Each text is encoded by itself, once, so that its embedding depends on no other.

        Args:
          prompts: P of them.
          negative_prompt: None leaves it out (no guidance).

        Returns:
          [2 P, M, D] or [P, M, D], padded to the model's text length with zeros.

        Raises:
          Refusal: no list of prompts, or the tokenizer has tokens of which the text encoder has no
            row.
        """
        config = self.text_encoder.config
        if self.tokenizer.num_tokens > config.vocab_size:
            raise Refusal(
                "the text encoder's vocab_size must be at least the tokenizer's "
                f"{self.tokenizer.num_tokens} tokens; got {config.vocab_size}: they are of "
                "different models"
            )
        listed = isinstance(prompts, Sequence) and not isinstance(prompts, str | bytes)
        if not listed or not len(prompts) or not all(isinstance(each, str) for each in prompts):
            raise Refusal(f"expected a list of prompts; got {checks.shown(prompts)}")
        texts = list(prompts)
        if negative_prompt is not None:
            texts += [negative_prompt] * len(prompts)
        return embeddings.encode(
            texts,
            self.tokenizer,
            config.d_model,
            lambda: self._resident("text_encoder", quiet, {}),
            cache=None if self.text_cache is None else (self.text_cache, self.text_name),
        )

    def latents_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Latent frames, height, width and channels of a video's size; Refusal for none."""
        for name, value in (("frames", frames), ("height", height), ("width", width)):
            checks.whole(name, value, 1, 1 << 20)
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
        shape = self.latents_shape(frames, height, width)
        return self.transformer.workload(shape, self.tokenizer.length)

    def size(
        self, frames: int | None, height: int | None, width: int | None
    ) -> tuple[int, int, int]:
        """A video's frames, height and width, defaults filled in.

        Raises:
          Refusal: a size that the model can't do; the message says the nearest one.
        """
        default = self.defaults
        size = (
            default.frames if frames is None else frames,
            default.height if height is None else height,
            default.width if width is None else width,
        )
        size = plans.check_size(size, self.vae.config, self.transformer.patch_size)
        self.transformer.geometry((1, *self.latents_shape(*size)))
        return size


def _check_run(driver: loop.Driver, progress: Progress | None, trace: bool) -> None:
    """Refuses, before any text is encoded, how a run is asked for."""
    checks.one_of("driver", driver, get_args(loop.Driver))
    checks.flag("trace", trace)
    if progress is not None and not callable(progress):
        raise Refusal(f"progress must be a function or None; got {checks.shown(progress)}")
