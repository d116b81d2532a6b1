"""Weights as Orbax keeps them: in the layout and dtype that they run in, quick to load."""

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from astraea_ports.matching import parameter_shapes

FOLDER = "orbax"
"""Name of the checkpoint within a part's folder."""

PIECE = 1 << 26
"""Bytes of a piece that is read or written at once."""


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
          ValueError: the checkpoint is broken, or of another model.
        """
        slots = parameter_shapes(self.template)
        path = (self.folder / FOLDER).resolve()
        orbax = _orbax()
        try:
            stored = orbax.StandardCheckpointer().metadata(path).item_metadata
            shapes = {name: tuple(leaf.shape) for name, leaf in dict(stored).items()}
        except Exception as error:  # tensorstore, JSON and the file system, each in its own words
            raise ValueError(_broken(path, error)) from error
        wrong = [
            f"{name}: expected {list(slots[name].shape) if name in slots else 'nothing'}, got "
            f"{list(shapes[name]) if name in shapes else 'nothing'}"
            for name in sorted(slots.keys() | shapes.keys())
            if name not in slots or shapes.get(name) != tuple(slots[name].shape)
        ]
        if wrong:
            raise ValueError(
                f"{path} does not fit this model: {len(wrong)} wrong; convert it again\n  "
                + "\n  ".join(wrong[:20])
            )
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        targets = {
            name: jax.ShapeDtypeStruct(slot.shape, slot.dtype, sharding=here)
            for name, slot in slots.items()
        }
        arrays: dict[str, jax.Array] = {}
        try:
            with _checkpointer() as checkpointer:
                for some in _groups(targets):
                    how = orbax.checkpoint_utils.construct_restore_args(some)
                    wanted = orbax.args.PyTreeRestore(some, how, partial_restore=True)
                    arrays |= checkpointer.restore(path, args=wanted)
        except Exception as error:
            raise ValueError(_broken(path, error)) from error
        leaves = [arrays[name] for name in slots]
        return jax.tree.unflatten(jax.tree.structure(self.template), leaves)


def save(module: Any, folder: str | os.PathLike[str]) -> None:
    """Writes a module's parameters into a part's folder.

    Raises:
      ValueError: Orbax is not installed.
    """
    arrays = dict(zip(parameter_shapes(module), jax.tree.leaves(module), strict=True))
    pieces = _orbax().SaveArgs(chunk_byte_size=PIECE)
    with _checkpointer() as checkpointer:
        checkpointer.save(
            (Path(folder) / FOLDER).resolve(),
            args=_orbax().args.PyTreeSave(arrays, dict.fromkeys(arrays, pieces)),
        )


def _groups(targets: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Parameters that are read together, no more than the largest one holds.

    Orbax holds what it reads twice, and otherwise reads all at once.
    """
    sizes = {name: math.prod(leaf.shape) * leaf.dtype.itemsize for name, leaf in targets.items()}
    group: dict[str, Any] = {}
    for name in sorted(targets, key=sizes.__getitem__):
        if sum(sizes[member] for member in group) + sizes[name] > max(sizes.values()):
            yield group
            group = {}
        group[name] = targets[name]
    yield group


def _checkpointer() -> Any:
    """A checkpointer that keeps numbers as they are: weights hardly compress."""
    orbax = _orbax()
    return orbax.Checkpointer(orbax.PyTreeCheckpointHandler(use_compression=False))


def files(loadable: Any) -> list[Path]:
    """The files of a converted module's numbers."""
    return [path for path in (loadable.folder / FOLDER).rglob("*") if path.is_file()]


def _orbax() -> Any:
    import orbax.checkpoint  # seconds to import, and needed for converted weights only

    return orbax.checkpoint


def _broken(path: Path, error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{path} is not a readable checkpoint ({reason}): convert the model again"
