"""`astraea convert`: a model's weights as Orbax keeps them, quicker to load."""

import pathlib
from typing import Annotated

from tyro.conf import Positional, arg

from astraea_jax.cli.options import ChosenWeights, WeightChoice

AS_STORED = WeightChoice()


def command(
    source: Positional[str],
    /,
    *,
    output: Annotated[pathlib.Path, arg(aliases=["-o"])],
    weights: ChosenWeights = AS_STORED,
) -> None:
    """Writes a model's weights in the layout and dtype they run in, for Orbax to load.

    Args:
      source: A model's folder or hub id, in Diffusers' layout or the original one.
      output: The folder to make; it must not exist yet. `--model` takes it like any other.
      weights: How they are read.
    """
    from astraea_jax import report
    from astraea_ports.pipeline import convert

    with report.Progress() as progress:
        convert.convert_model(
            source,
            output,
            dtype=weights.dtype,
            lora=weights.changes(),
            revision=weights.revision,
            stage=progress.stage,
        )
    print(f"written: {output}")
