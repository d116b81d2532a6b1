"""`astraea convert`: a model's weights as Orbax keeps them, quicker to load."""

import pathlib
from typing import Annotated

from tyro.conf import Positional, UseAppendAction, arg

from astraea_jax import report
from astraea_jax.bench.models import Dtype, read_lora
from astraea_ports.pipeline import convert


def command(
    source: Positional[str],
    /,
    *,
    output: Annotated[pathlib.Path, arg(aliases=["-o"])],
    dtype: Dtype | None = None,
    lora: UseAppendAction[tuple[str, ...]] = (),
    revision: str | None = None,
) -> None:
    """Writes a Wan model's weights in the layout and dtype they run in, for Orbax to load.

    Args:
      source: A model's folder or hub id, in Diffusers' layout or the original one.
      output: The folder to make; it must not exist yet. `--model` takes it like any other.
      dtype: Of the weights that are not always float32; left out, what the model would run in.
      lora: A file of low-rank changes to merge, with ":strength" or without; once for each file.
      revision: Of a hub id: a branch, a tag or a commit.
    """
    with report.Progress() as progress:
        convert.convert_model(
            source,
            output,
            dtype=dtype,
            lora=[read_lora(text) for text in lora],
            revision=revision,
            stage=progress.stage,
        )
    print(f"written: {output}")
