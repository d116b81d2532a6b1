"""Files of weights to parameters, by a table that every tensor must match exactly once.

Loading is strict both ways and reads the headers first: whatever does not fit is reported, all of
it together, before a single weight is read. Weights then come one tensor at a time: the host never
holds more than the parameters and a copy or two of one tensor.
"""

import collections
import hashlib
import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jax.typing import DTypeLike

from astraea_jax.checks import Refusal, shown
from astraea_ports.checkpoints import converted
from astraea_ports.checkpoints.folders import (
    ModelFolder,
    Source,
    as_source,
    checkpoint_files,
    find_model,
    read_config,
)
from astraea_ports.checkpoints.matching import (
    Entry,
    Match,
    best_table,
    match_tensors,
    parameter_shapes,
)
from astraea_ports.checkpoints.tensor_files import TensorFiles, aligned_empty, all_finite

Table = Sequence[Entry]

Deltas = Mapping[tuple[str, int | None], Callable[[], np.ndarray]]
"""What is added to a parameter (dotted path, layer) while it is read, float32."""

ReadDeltas = Callable[[Mapping[str, jax.ShapeDtypeStruct], Sequence[Table]], Deltas]
"""Reads deltas for these parameters, their files' keys as in one of these tables."""


@runtime_checkable
class Loadable[M](Protocol):
    """A module that can be had: what it will look like, and the way to get it."""

    @property
    def template(self) -> M:
        """The module with `jax.ShapeDtypeStruct` for leaves."""
        ...

    def load(self) -> M:
        """The module."""
        ...


class Checkpoint[M](NamedTuple):
    """Weights whose headers fit a module; none is read yet.

    Attributes:
      template: the module built under `jax.eval_shape`; its leaves say shapes and dtypes.
      files: what holds the weights.
      matches: the tensors of each parameter, by its dotted path.
      deltas: what is added to them.
    """

    template: M
    files: TensorFiles
    matches: Mapping[str, list[Match]]
    deltas: Deltas

    def load(self) -> M:
        """The module with jax arrays for leaves.

        Raises:
          Refusal: a parameter holds NaN, infinity or more than its dtype can; or was saved under
            two names and the two differ.
        """
        arrays = []
        for path, slot in parameter_shapes(self.template).items():
            values = self._read(path, slot)
            # Aligned, so that on a CPU the array takes over the memory instead of copying it.
            arrays.append(jax.device_put(values))
        return jax.tree.unflatten(jax.tree.structure(self.template), arrays)

    def _read(self, path: str, slot: jax.ShapeDtypeStruct) -> np.ndarray:
        """The tensors of one parameter in one array, allocated once."""
        out = aligned_empty(slot.shape, slot.dtype)
        first: dict[int | None, str] = {}
        for tensor, entry, layer in self.matches[path]:
            target = out if layer is None else out[layer]
            values = entry.transform(self.files.read(tensor))
            changed = (path, layer) in self.deltas
            if changed:
                values = values.astype(np.float32) + self.deltas[path, layer]()
            if layer not in first:
                first[layer] = tensor.key
                with np.errstate(over="ignore"):  # told here, by the name
                    target[...] = values
                if (changed or values.dtype != slot.dtype) and not all_finite(target):
                    raise Refusal(
                        f"{tensor.key}: expected numbers within the range of {slot.dtype}, got "
                        "larger ones: choose a wider dtype"
                    )
            elif not np.array_equal(target, values.astype(slot.dtype)):
                raise Refusal(
                    f"expected one value for {path}, got two that differ: {first[layer]} and "
                    f"{tensor.key}; remove the wrong one from the checkpoint"
                )
        return out


def open_checkpoint[M](
    source: str | os.PathLike[str], template: M, *tables: Table, deltas: ReadDeltas | None = None
) -> Loadable[M]:
    """Holds a checkpoint against a module, by the headers.

    Args:
      source: a file of weights, or a folder holding one (`diffusion_pytorch_model.safetensors` or
        `model.safetensors`), its shards and their `*.safetensors.index.json`, or what
        `astraea convert` wrote.
      template: the module built under `jax.eval_shape`; its leaves say shapes and dtypes.
      tables: of each layout that the checkpoint may have; the one that more keys match counts.
      deltas: reads what is added to the weights.

    Raises:
      Refusal: the source is no readable checkpoint, or does not fit: keys missing, unexpected,
        of the wrong shape or dtype, matched by two entries. All such problems come in one error.
    """
    if converted.is_converted(source):
        if deltas is not None:
            raise Refusal(f"{source} is converted: merge a LoRA when converting, not after")
        return converted.Converted(template, Path(source))
    files = TensorFiles(checkpoint_files(source))
    tensors, slots = files.tensors(), parameter_shapes(template)
    table = best_table(tensors, tables)
    matches = match_tensors(tensors, slots, table, name=str(source))
    return Checkpoint(template, files, matches, {} if deltas is None else deltas(slots, tables))


def load_parameters[M](
    source: str | os.PathLike[str],
    template: M,
    *tables: Table,
    dtype: DTypeLike | None = None,
) -> M:
    """Fills a module with the weights of a checkpoint; see `open_checkpoint`.

    A parameter may come twice (tied weights saved under both names) if both copies are equal.

    Args:
      source: of the weights.
      template: the module built under `jax.eval_shape`.
      tables: one for each layout.
      dtype: of the parameters; None keeps the template's.
    """
    if dtype is not None:
        template = with_dtype(template, dtype)
    return open_checkpoint(source, template, *tables).load()


STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
"""Names of dtypes in files, and NumPy's."""


def stored_dtype(loadable: Loadable) -> str:
    """The dtype that most bytes of a checkpoint have, by the headers; NumPy's name of it."""
    if isinstance(loadable, converted.Converted):
        return converted.stored_dtype(loadable.folder)
    assert isinstance(loadable, Checkpoint)
    held = collections.Counter[str]()
    for match in itertools.chain.from_iterable(loadable.matches.values()):
        name = STORED.get(match.tensor.dtype, match.tensor.dtype)
        width = np.dtype(name).itemsize if match.tensor.dtype in STORED else 1  # fp8
        held[name] += math.prod(match.tensor.shape) * width
    return max(held, key=held.__getitem__)


def retyped[M](loadable: Loadable[M], template: M) -> Loadable[M]:
    """What loads the same weights in the dtypes of another template of the same shapes."""
    assert isinstance(loadable, Checkpoint | converted.Converted)
    return loadable._replace(template=template)


Precision = Literal["reference", "fast"]
"""What of a model stays float32 beside bfloat16 weights: what upstream keeps, or less."""

FLOATS = ("float32", "bfloat16", "float16", "float64")
"""Dtypes that a model can have."""


def float_dtype(dtype: DTypeLike) -> DTypeLike:
    """Returns `dtype` if it is one that a model can have.

    Raises:
      Refusal: it is another, or none.
    """
    try:
        name = np.dtype(dtype).name if dtype is not None else None
    except TypeError:
        name = None
    if name not in FLOATS:
        raise Refusal(f"dtype must be {' or '.join(FLOATS)}; got {shown(dtype)}")
    return dtype


def with_dtype[M](template: M, dtype: DTypeLike) -> M:
    """The template with another dtype for every leaf."""
    float_dtype(dtype)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), template)


class Place(NamedTuple):
    """Where one part of a model lies, and what its config says.

    Attributes:
      config: of the part.
      model: the folder that it is part of.
      folder: the part's own in it, "" where that is the same.
      single: names that the part's file may have instead, the first that is there counts.
    """

    config: Mapping[str, Any]
    model: ModelFolder
    folder: str = ""
    single: Sequence[str] = ()

    def weights(self) -> Path:
        """The part's folder or file; fetched now where the model is on the hub.

        Raises:
          Refusal: it can't be fetched, or none of the files is there.
        """
        if not self.single:
            self.model.fetch_weights(self.folder)
            return self.model.path / self.folder
        for name in self.single:
            self.model.fetch(name)
            if os.path.isfile(self.model.path / name):
                return self.model.path / name
        raise Refusal(
            f"expected {' or '.join(self.single)} in {self.model.name or self.model.path}, got "
            "neither; point to the folder of a whole model"
        )


def find_part(
    source: Source,
    *,
    folder: str,
    kinds: Sequence[str],
    config: Mapping[str, Any] | None,
    single: Sequence[str] = (),
    single_config: Mapping[str, Any] | None = None,
    revision: str | None = None,
) -> Place:
    """Finds a part of a model and its config; weights are not fetched yet.

    Args:
      source: a file of weights; the part's folder; the model's folder or hub id.
      folder: the part's name in the Diffusers layout.
      kinds: what its config.json may describe.
      config: what config.json would hold; None reads it.
      single: names of the part's file in a model's folder of the original layout.
      single_config: the config of such a file, which has none beside it.
      revision: of a hub id.

    Raises:
      Refusal: there is no such part, or a file comes without a config.
    """
    if not isinstance(source, ModelFolder):
        path = Path(os.path.expanduser(as_source(source)))
        if os.path.isfile(path):
            if config is None and path.name in single:
                config = single_config
            if config is None and os.path.lexists(path.with_name("config.json")):
                config = read_config(path.parent, expected=kinds)
            if config is None:
                raise Refusal(
                    f"{path} has no config.json beside it; pass config={{...}} or a folder"
                )
            return Place(config, ModelFolder(path.parent), single=(path.name,))
    model = find_model(source, revision=revision)
    if os.path.isfile(model.path / "model_index.json"):
        found = read_config(model.path / folder, expected=kinds) if config is None else config
        return Place(found, model, folder)
    if single_config is not None and _is_single(model, kinds, single):
        return Place(single_config if config is None else config, model, single=tuple(single))
    found = read_config(model.path, expected=kinds) if config is None else config
    return Place(found, model)


def _is_single(model: ModelFolder, kinds: Sequence[str], single: Sequence[str]) -> bool:
    """Whether a part is one file in a model's folder of the original layout."""
    if any(os.path.isfile(model.path / name) for name in single):
        return True
    # On the hub it may be there and not fetched; the config beside it is the transformer's.
    described = read_config(model.path) if model.name is not None else {}
    return (
        bool(described) and described.get("_class_name", described.get("model_type")) not in kinds
    )


def fingerprint(loadable: Loadable) -> str:
    """Stands for a checkpoint's content: a hash of its headers and of samples of its numbers.

    Of each file the first 64 KiB (a safetensors header lies there) and 64 KiB at fifteen more
    places, its size and name, and the dtype asked for; a whole text encoder takes a minute to read.
    """
    content = hashlib.sha256()
    for path, slot in parameter_shapes(loadable.template).items():
        content.update(f"{path} {slot.shape} {slot.dtype}\n".encode())
    if isinstance(loadable, Checkpoint):
        paths = list(loadable.files.files)
    else:
        paths = converted.files(loadable)
    for path in sorted(paths):
        size = path.stat().st_size
        content.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for place in range(16):
                file.seek(place * size // 16)
                content.update(file.read(1 << 16))
    return content.hexdigest()
