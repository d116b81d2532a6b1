"""What a model's folder says of its own use, in astraea.json; a file that no other program has."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from astraea_jax.checks import Number, OneOf, Whole
from astraea_ports import checkpoints
from astraea_ports.checkpoints import configs

RULES = {
    "frames": Whole(1, 1 << 16),
    "height": Whole(1, 1 << 16, "pixels"),
    "width": Whole(1, 1 << 16, "pixels"),
    "steps": Whole(1, 1000),
    "guidance": Number(0, 1000),
    "grid": OneOf(("diffusers", "original")),
    "dtype": OneOf(("float32", "bfloat16")),
}
"""The fields of astraea.json."""


def read(folder: Path) -> Mapping[str, Any]:
    """What a folder's astraea.json says, if it is there."""
    path = folder / "astraea.json"
    if not os.path.lexists(path):
        return {}
    return configs.read(checkpoints.read_config(folder, path.name), RULES, name=str(path))
