"""`astraea average`: the mean of several trained models."""

import pathlib
from typing import Annotated

from tyro.conf import Positional, arg

from astraea_ports import averaging
from astraea_ports.wan.parts import SHIPPED


def command(
    models: Positional[tuple[str, ...]],
    /,
    *,
    output: Annotated[pathlib.Path, arg(aliases=["-o"])],
    shares: tuple[float, ...] | None = None,
) -> None:
    """Writes the mean of models that were trained from the same weights: often better than each.

    Args:
      models: Folders in the Diffusers layout ("tiny" is the model that ships), at least two.
      output: The folder to make. `--model` takes it like any other.
      shares: Of each model; equal ones when left out.
    """
    averaging.average_models([SHIPPED.get(name, name) for name in models], output, shares=shares)
    print(f"written: {output}")
