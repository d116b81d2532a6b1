"""The parts that a pipeline runs, found and checked before any weight is read."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax

from astraea_jax import solvers
from astraea_jax.flops import Workload
from astraea_jax.model import VideoDiT
from astraea_ports.checkpoints import Loadable
from astraea_ports.pipeline.tiles import VAE
from astraea_ports.text.t5 import T5Encoder
from astraea_ports.text.tokenizer import Tokenizer


@runtime_checkable
class Denoiser(VideoDiT, Protocol):
    """A video diffusion transformer that a pipeline can run."""

    @property
    def patch_size(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns that make a token."""
        ...

    def workload(self, latents_shape: tuple[int, ...], text_tokens: int) -> Workload:
        """Sizes for `astraea_jax.flops`.

        Args:
          latents_shape: of one video: frames, rows, columns, channels.
          text_tokens: of a prompt.
        """
        ...


class Defaults(NamedTuple):
    """What a call uses where it is not told; a folder's astraea.json may say otherwise.

    Attributes:
      frames: of the video.
      height: pixels.
      width: pixels.
      steps: denoising steps.
      guidance: scale of classifier-free guidance.
    """

    frames: int
    height: int
    width: int
    steps: int
    guidance: float


class Parts(NamedTuple):
    """What a model is made of, not loaded yet.

    Attributes:
      tokenizer: text to ids.
      text_encoder: ids to embeddings.
      transformer: the denoiser.
      vae: latents to pixels.
      shift: the model's flow shift.
      grid: whose noise levels it is sampled on.
      defaults: of a call.
      text_name: stands for the text encoder's weights, where embeddings are kept.
      large: whether parts are loaded for their stage, unless told.
      index: what model_index.json says of the whole, where a copy of the model has to.
      scheduler: likewise scheduler_config.json.
      folder: where the model lies; None for one of random weights.
    """

    tokenizer: Tokenizer
    text_encoder: Loadable[T5Encoder]
    transformer: Loadable[Any]
    vae: Loadable[VAE]
    shift: float
    grid: solvers.Grid
    defaults: Defaults
    text_name: str
    large: bool
    index: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    folder: Path | None = None


LARGE = 500_000_000
"""Parameters of a large model: its parts are loaded for their stage, unless told."""


def is_large(*parts: Loadable) -> bool:
    """Whether parts together have more than `LARGE` parameters, by their shapes."""
    leaves = jax.tree.leaves([part.template for part in parts])
    return sum(math.prod(leaf.shape) for leaf in leaves) > LARGE


def own_dtype(stored: str, large: bool) -> str:
    """The dtype that a model runs in where neither the call nor its astraea.json says one.

    That of its transformer's weights, with two exceptions. A large model of float32 weights runs in
    bfloat16: the originals keep float32 on disk and run bfloat16, and few devices hold the other.
    And float16 runs nowhere here: a small model of it runs in float32, which holds the same
    numbers.
    """
    return "bfloat16" if large or stored == "bfloat16" else "float32"


def main_dtype(transformer: Any) -> str:
    """NumPy's name of the dtype that the large products of a transformer have."""
    return max(jax.tree.leaves(transformer), key=lambda leaf: leaf.size).dtype.name
