"""Which model a command means."""

import dataclasses
from typing import Annotated, Literal

from tyro.conf import Suppress, UseAppendAction, arg

from astraea_jax import checks
from astraea_jax.checks import Refusal
from astraea_ports.checkpoints import lora
from astraea_ports.pipeline import Pipeline
from astraea_ports.text import embeddings

Dtype = Literal["float32", "bfloat16"]
Precision = Literal["reference", "fast"]
Size = Literal["1.3B", "14B"]


@dataclasses.dataclass(frozen=True)
class ModelChoice:
    """A model as the options name it.

    Attributes:
      model: "tiny" (ships with the package), the folder of a model in Diffusers' layout, the
        original's, or as `astraea convert` wrote it, or a hub id.
      revision: Of a hub id: a branch, a tag or a commit.
      random: Random weights of Wan's real size instead, for timing; the video is noise.
      dtype: Of the weights; left out, what the model's folder says or holds, and bfloat16 for a
        large model held in float32 and for random weights.
      precision: What stays float32 with bfloat16 weights; "fast" also rounds the tokens.
      lora: A file of low-rank changes to merge, with ":strength" or without; once for each file.
      staged: Whether parts are loaded for their stage only; None: those of a large model.
    """

    model: str = "tiny"
    revision: str | None = None
    random: Size | None = None
    dtype: Dtype | None = None
    precision: Precision = "reference"
    lora: UseAppendAction[tuple[str, ...]] = ()
    staged: Suppress[bool | None] = None

    def open(self) -> Pipeline:
        """The pipeline.

        Raises:
          Refusal: options that contradict each other, or no such model.
        """
        changes = [read_lora(text) for text in self.lora]
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


def read_lora(text: str) -> lora.Lora:
    """`file.safetensors` or `file.safetensors:0.8`.

    Raises:
      Refusal: a strength that is no number in -100..100.
    """
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
