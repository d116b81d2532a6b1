"""Trained modules back to checkpoints: the way of `loading.py` in reverse.

A table's transforms only move numbers about. So the way back needs no table of its own: each
transform is run on the numbers 0, 1, 2, ... of a tensor, and what it gives says where each went.
"""

import json
import os
import pathlib
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from astraea_jax import checks, files
from astraea_jax.checks import Refusal
from astraea_ports.checkpoints import converted, folders, matching
from astraea_ports.checkpoints.matching import Entry
from astraea_ports.checkpoints.tensor_files import TensorFiles

_DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float16": np.float16}


def save_parameters(
    module: Any,
    source: str | os.PathLike[str],
    target: pathlib.Path,
    table: Sequence[Entry],
    *,
    dtype: str = "bfloat16",
) -> None:
    """Writes a module's weights under the keys that a checkpoint has.

    Args:
      module: of the kind that was loaded from `source`.
      source: a checkpoint in the same layout; its keys, shapes and file names are taken.
      target: folder to write to, as one file whole or not at all.
      table: of the layout, as for `checkpoints.load_parameters`.
      dtype: of what is written: "bfloat16", "float32" or "float16".

    Raises:
      Refusal: the source is no checkpoint of such a module, or the disk is full.
    """
    checks.one_of("dtype", dtype, tuple(_DTYPES))
    matches = match_source(module, source, table)
    slots = matching.parameter_shapes(module)
    values = dict(zip(slots, jax.tree.leaves(module), strict=True))
    arrays = {}
    for path, matched in matches.items():
        value = np.asarray(values[path]).astype(_DTYPES[dtype])
        for match in matched:
            part = value if match.layer is None else value[match.layer]
            arrays[match.tensor.key] = invert(match.entry, part, match.tensor.shape)
    name = folders.checkpoint_files(source)[0].name
    name = re.sub(r"-\d+-of-\d+(?=\.safetensors$)", "", name)
    write_tensors(target / name, arrays)


def match_source(
    module: Any, source: str | os.PathLike[str], table: Sequence[Entry]
) -> Mapping[str, list[matching.Match]]:
    """The tensors of a checkpoint that a module's parameters would be written as.

    Raises:
      Refusal: the source is no checkpoint of such a module in the table's layout.
    """
    if converted.is_converted(source):
        raise Refusal(
            f"expected weights in the Diffusers layout at {source}; these are as `astraea convert` "
            "writes them, and what is trained is not written so: start from the original model"
        )
    found = TensorFiles(folders.checkpoint_files(source)).tensors()
    slots = matching.parameter_shapes(module)
    return matching.match_tensors(found, slots, table, name=str(source))


def invert(entry: Entry, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor of `shape` from which the entry's transform makes `value`."""
    size = int(np.prod(shape))
    places = entry.transform(np.arange(size).reshape(shape))
    tensor = np.empty(size, value.dtype)
    tensor[places.reshape(-1)] = value.reshape(-1)
    return tensor.reshape(shape)


def write_tensors(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes safetensors; the file is there whole or not at all.

    Raises:
      Refusal: the disk is full or can't be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with files.replacing(path) as partial:
            contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
            save_file(contiguous, partial, metadata={"format": "pt"})
    except Exception as error:  # the library's own error says "No space left" in words only
        raise Refusal(f"{path} could not be written ({error}): make room there") from error


def copy_model(
    source: pathlib.Path, target: pathlib.Path, *, but: Sequence[str], without: Sequence[str] = ()
) -> None:
    """Copies a Diffusers folder's parts and JSON files.

    Weights that are there already, of the same size, are not copied again.

    Args:
      source: the folder.
      target: another, made if need be.
      but: parts whose weights stay behind.
      without: folders of which nothing is taken.
    """
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        top = relative.parts[0]
        trained = top in but and ".safetensors" in path.name
        kind = path.suffix in (".json", ".safetensors", ".model")
        if not path.is_file() or not kind or trained or top in without or len(relative.parts) > 2:
            continue
        copy = target / relative
        copy.parent.mkdir(exist_ok=True)
        small = path.suffix == ".json" or not copy.is_file()
        if small or copy.stat().st_size != path.stat().st_size:
            with files.replacing(copy) as partial:
                shutil.copyfile(path, partial)


def update_config(path: pathlib.Path, **values: Any) -> None:
    """Changes keys of a JSON file."""
    config = json.loads(path.read_text()) | values
    with files.replacing(path) as partial:
        partial.write_text(json.dumps(config, indent=2) + "\n")
