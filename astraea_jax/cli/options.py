"""What several commands ask for: a model, how it is sampled, the size of a video.

No jax is imported until a model is opened, as a command's help shows these options.
"""

import dataclasses
import pathlib
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Suppress, UseAppendAction, arg

from astraea_jax import checks
from astraea_jax.checks import Refusal

if TYPE_CHECKING:
    from astraea_ports.checkpoints.lora import Lora
    from astraea_ports.pipeline import Pipeline

Dtype = Literal["float32", "bfloat16"]
Precision = Literal["reference", "fast"]
Size = Literal["1.3B", "14B"]
Implementation = Literal["xla", "cudnn", "triton", "mosaic"]
GridName = Literal["diffusers", "original"]
SolverName = Literal["unipc", "dpm++", "euler"]
SearchMethod = Literal[
    "step-level-corrected", "step-level", "step-level-residual", "astraea-corrected", "astraea"
]
SearchSolver = Literal["unipc", "euler"]
MethodName = Literal[
    "dense",
    "astraea",
    "astraea-corrected",
    "astraea-published",
    "fixed-token",
    "step-level",
    "step-level-corrected",
    "step-level-residual",
    "pab-2-6",
    "teacache-0.08",
]


MOST_PROMPTS = 10_000
"""Of a file; a search takes hundreds of evaluations of each."""

MOST_LANES = 1024
"""Schedules denoised at a time: no device holds more."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightChoice:
    """How the weights of a model are read.

    Attributes:
      revision: Of a hub id: a branch, a tag or a commit.
      dtype: Of the weights; left out, what the model's folder says or holds, and bfloat16 for a
        large model held in float32 and for random weights.
      lora: A file of low-rank changes to merge, with ":strength" or without; once for each file.
    """

    revision: str | None = None
    dtype: Dtype | None = None
    lora: UseAppendAction[tuple[str, ...]] = ()

    def changes(self) -> "list[Lora]":
        """The files of low-rank changes.

        Raises:
          Refusal: a strength that is no number in -100..100.
        """
        return [read_lora(text) for text in self.lora]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelChoice(WeightChoice):
    """A model as the options name it.

    Attributes:
      model: "tiny" (ships with the package), the folder of a model in Diffusers' layout, the
        original's, or as `astraea convert` wrote it, or a hub id.
      random: Random weights of a real size instead, for timing; the video is noise.
      precision: What stays float32 with bfloat16 weights; "fast" also rounds the tokens.
      staged: Whether parts are loaded for their stage only; None: those of a large model.
    """

    model: str = "tiny"
    random: Size | None = None
    precision: Precision = "reference"
    staged: Suppress[bool | None] = None

    def open(self) -> "Pipeline":
        """The pipeline, whichever port the model is of.

        Raises:
          Refusal: options that contradict each other, or no such model.
        """
        from astraea_ports.pipeline import Pipeline
        from astraea_ports.text import embeddings

        changes = self.changes()
        if self.random is not None:
            if self.lora or self.revision is not None or self.model != "tiny":
                raise Refusal(
                    f"--random {self.random} makes the weights of a whole model: it takes no "
                    "--model, --revision or --lora"
                )
            return Pipeline.random(
                self.random,
                dtype=self.dtype or "bfloat16",
                precision=self.precision,
                staged=self.staged,
            )
        pipeline = Pipeline.from_pretrained(
            self.model,
            revision=self.revision,
            dtype=self.dtype,
            precision=self.precision,
            lora=changes,
            staged=self.staged,
        )
        # A small model encodes faster than it finds what it kept.
        cache = embeddings.cache_folder() if pipeline.loaders else None
        return dataclasses.replace(pipeline, text_cache=cache)


TINY = ModelChoice()
"""The small model that ships, unless told."""

RESIDENT = ModelChoice(staged=False)
"""The same for what is timed: all parts are there at once."""

Chosen = Annotated[ModelChoice, arg(name="")]
"""A command's options `--model`, `--revision`, `--random`, ...: the fields, by their own names."""

ChosenWeights = Annotated[WeightChoice, arg(name="")]
"""The same of a command that takes its model otherwise."""


def read_lora(text: str) -> "Lora":
    """`file.safetensors` or `file.safetensors:0.8`.

    Raises:
      Refusal: a strength that is no number in -100..100.
    """
    from astraea_ports.checkpoints import lora

    file, colon, strength = text.rpartition(":")
    # A colon may be the name's own, as in C:\\file.safetensors.
    if not colon or not file.lower().endswith(".safetensors"):
        return lora.Lora(text)
    try:
        value = float(strength)
    except ValueError:
        value = strength
    low, high = -lora.STRONGEST, lora.STRONGEST
    return lora.Lora(file, checks.number(f"strength of {file}", value, low, high))


@dataclasses.dataclass(frozen=True)
class VideoSize:
    """The size of a video; what is left out is the model's default.

    Attributes:
      frames: Frames of the video, 4k + 1.
      height: Pixels.
      width: Pixels.
    """

    frames: int | None = None
    height: int | None = None
    width: int | None = None

    def check(self) -> tuple[int | None, int | None, int | None]:
        """The three; Refusal for what no model has. The model's own limits come with the model."""
        check_size(self.frames, self.height, self.width)
        return self.frames, self.height, self.width


DEFAULT_SIZE = VideoSize()

ChosenSize = Annotated[VideoSize, arg(name="")]
"""A command's options `--frames`, `--height`, `--width`."""


def check_size(frames: int | None, height: int | None, width: int | None) -> None:
    """Refuses sizes of a video that no model has; the model's own limits come with the model."""
    for name, value, most, unit in (
        ("frames", frames, 10_001, ""),
        ("height", height, 8192, "pixels"),
        ("width", width, 8192, "pixels"),
    ):
        if value is not None:
            checks.whole(name, value, 1, most, unit=unit)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a model is sampled; what is left out is its default.

    Attributes:
      steps: Denoising steps.
      guidance: Scale of classifier-free guidance.
      negative_prompt: What the videos should not show.
      shift: Flow shift.
      grid: Whose noise levels; left out, those of the checkpoint's layout.
    """

    steps: int | None = None
    guidance: float | None = None
    negative_prompt: str = ""
    shift: float | None = None
    grid: GridName | None = None


DEFAULT_SAMPLING = Sampling()

ChosenSampling = Annotated[Sampling, arg(name="")]
"""A command's options `--steps`, `--guidance`, `--negative-prompt`, `--shift`, `--grid`."""

Output = Annotated[pathlib.Path, arg(aliases=["-o"])]
"""A file or folder to write, `--output` or `-o`."""
