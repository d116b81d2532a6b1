"""Weights as Orbax keeps them: in the layout and dtype that they run in, quick to load.

Orbax writes them, and can read them; they are read here by TensorStore, which it stands on, each
parameter straight into its own memory. Orbax's own restore holds what it reads twice, and assembles
it anew.
"""

import collections
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from astraea_jax.checks import Refusal
from astraea_jax.files import read_json
from astraea_ports.checkpoints.matching import parameter_shapes
from astraea_ports.checkpoints.tensor_files import aligned_empty

FOLDER = "orbax"
"""Name of the checkpoint within a part's folder."""

PIECE = 1 << 26
"""Bytes of a file, and of what is read at once by each of `READERS`."""

READERS = 2
"""How many pieces are read at a time: more are held, and hardly faster."""

MARKER = ".zarray"
"""The file that makes a folder an array."""


def is_converted(source: str | os.PathLike[str]) -> bool:
    """Whether a part's folder holds converted weights."""
    return (Path(source) / FOLDER).is_dir()


class Converted[M](NamedTuple):
    """A converted module that is not read yet; see `checkpoints.Loadable`."""

    template: M
    folder: Path

    def load(self) -> M:
        """The module with jax arrays for leaves, in the template's dtypes.

        Raises:
          Refusal: the checkpoint is broken, or of another model.
        """
        slots = parameter_shapes(self.template)
        path = (self.folder / FOLDER).resolve()
        context = _tensorstore().Context(
            {name: {"limit": READERS} for name in ("file_io_concurrency", "data_copy_concurrency")}
        )
        names = {marker.parent.name for marker in path.glob(f"*/{MARKER}")}
        try:
            stores = {name: _open(path / name, context) for name in sorted(names)}
        except ValueError as error:
            raise Refusal(_broken(path, error)) from error
        wrong = [
            f"{name}: expected {list(slots[name].shape) if name in slots else 'nothing'}, got "
            f"{list(stores[name].shape) if name in stores else 'nothing'}"
            for name in sorted(slots.keys() | stores.keys())
            if name not in slots or name not in stores or stores[name].shape != slots[name].shape
        ]
        if wrong:
            raise Refusal(
                f"{path} does not fit this model: {len(wrong)} wrong; convert it again\n  "
                + "\n  ".join(wrong[:20])
            )
        try:
            leaves = [jax.device_put(_read(stores[name], slot)) for name, slot in slots.items()]
        except ValueError as error:
            raise Refusal(_broken(path, error)) from error
        return jax.tree.unflatten(jax.tree.structure(self.template), leaves)


def _open(folder: Path, context: Any) -> Any:
    """An array's store, its header read; a piece that is not there is an error, not zeros."""
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": os.fspath(folder)},
        "fill_missing_data_reads": False,
    }
    return _tensorstore().open(spec, read=True, open=True, context=context).result()


def _read(store: Any, slot: jax.ShapeDtypeStruct) -> np.ndarray:
    """A parameter in its slot's dtype, in memory that a CPU array of JAX takes over."""
    out = aligned_empty(slot.shape, slot.dtype)
    if store.dtype.numpy_dtype != out.dtype:
        store = _tensorstore().cast(store, out.dtype)
    _tensorstore().array(out).write(store).result()
    return out


def save(module: Any, folder: str | os.PathLike[str]) -> None:
    """Writes a module's parameters into a part's folder."""
    import orbax.checkpoint as orbax  # seconds to import, and needed here only

    arrays = dict(zip(parameter_shapes(module), jax.tree.leaves(module), strict=True))
    # Kept as they are, since weights hardly compress; large stacks are cut between the layers, so
    # that a piece is one run of the array.
    pieces = {
        name: orbax.SaveArgs(
            chunk_byte_size=PIECE,
            shard_axes=(0,) if array.ndim > 2 and array.nbytes > PIECE else (),
        )
        for name, array in arrays.items()
    }
    handler = orbax.PyTreeCheckpointHandler(use_compression=False, use_ocdbt=False)
    with orbax.Checkpointer(handler) as checkpointer:
        checkpointer.save(
            (Path(folder) / FOLDER).resolve(),
            args=orbax.args.PyTreeSave(arrays, pieces),
        )


def stored_dtype(folder: Path) -> str:
    """The dtype that most bytes of converted weights have, by NumPy's name.

    Raises:
      Refusal: the checkpoint is broken.
    """
    held = collections.Counter[str]()
    for marker in sorted((folder / FOLDER).glob(f"*/{MARKER}")):
        header = read_json(marker)
        try:
            dtype = np.dtype(header["dtype"])  # JAX has made NumPy know bfloat16
            held[dtype.name] += math.prod(header["shape"]) * dtype.itemsize
        except (KeyError, TypeError) as error:
            raise Refusal(_broken(folder / FOLDER, error)) from error
    return max(held, key=held.__getitem__, default="float32")


def files(loadable: Any) -> list[Path]:
    """The files of a converted module's numbers."""
    return [path for path in (loadable.folder / FOLDER).rglob("*") if os.path.isfile(path)]


def _tensorstore() -> Any:
    import tensorstore  # needed for converted weights only

    return tensorstore


def _broken(path: Path, error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{path} is not a readable checkpoint ({reason}): convert the model again"
