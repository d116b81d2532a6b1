"""The folder of a training run: who holds it, what it trains, and its checkpoints."""

import contextlib
import errno
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from astraea_jax import files, report
from astraea_jax.checks import Refusal

KEPT = 2
"""Checkpoints that are kept."""


@contextlib.contextmanager
def owned(folder: pathlib.Path) -> Iterator[None]:
    """Holds a run's folder; the hold ends with the process, even one that is killed.

    Raises:
      Refusal: another process holds it, or it can't be made or written to.
    """
    with files.held(folder / "run.lock", choose="another --output"):
        yield


def saved_settings(folder: pathlib.Path) -> dict[str, Any] | None:
    """What the run in a folder trains, or None where there is none.

    Raises:
      Refusal: a run.json that can't be read.
    """
    path = folder / "run.json"
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Refusal(f"{path} can't be read ({error}): choose another --output") from error


def check_settings(folder: pathlib.Path, settings: Mapping[str, Any]) -> None:
    """Writes run.json, or holds it against what is asked for.

    Raises:
      Refusal: the folder's run trains another model, or in another way.
    """
    asked = json.loads(json.dumps(settings))
    found = saved_settings(folder)
    if found is None:
        report.write_json(folder / "run.json", asked)
        return
    other = [
        f"{name}: expected {found.get(name)}, got {asked.get(name)}"
        for name in sorted({*found, *asked})
        if found.get(name) != asked.get(name)
    ]
    if other:
        raise Refusal(
            f"{folder} holds a run of another kind ({'; '.join(other)}): ask for the same to take "
            "it up again, or choose another --output"
        )


class Checkpoints:
    """The last states of a run, each written whole or not at all."""

    def __init__(self, folder: pathlib.Path):
        """Those in `folder`, which is made if need be."""
        import orbax.checkpoint as ocp  # slow to import, and only training needs it

        self._ocp = ocp
        self._folder = folder.absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=KEPT, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def latest(self) -> int | None:
        """The step of the last one."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Writes a state.

        Raises:
          Refusal: the disk is full or can't be written to; what was there before is kept.
        """
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self._folder).free
        try:
            if free < 1.2 * needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._manager.save(step, args=self._ocp.args.StandardSave(_named(state)))
            self._manager.wait_until_finished()
        except Exception as error:  # tensorstore's own say ENOSPC in words only
            kept = self.latest()
            raise Refusal(
                f"the checkpoint of step {step} could not be written to {self._folder} "
                f"({_reason(error)}; it takes {report.human_bytes(needed)}, "
                f"{report.human_bytes(free)} are free); "
                + (f"that of step {kept} is kept" if kept is not None else "there is none before")
                + ": make room and run the same command again"
            ) from error

    def restore(self, template: Any) -> Any:
        """The last state, placed as the template's arrays are.

        Raises:
          Refusal: it can't be read, or its arrays are not the template's.
        """
        step = self.latest()
        named = _named(template)
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), named
        )
        try:
            found = self._manager.restore(step, args=self._ocp.args.StandardRestore(abstract))
        except Exception as error:  # of many classes; for the user all one
            raise Refusal(
                f"the checkpoint of step {step} in {self._folder} does not fit this run or is "
                f"broken ({_reason(error)}): delete it to go back to the one before, or choose "
                "another --output"
            ) from error
        return jax.tree.unflatten(jax.tree.structure(template), [found[name] for name in named])

    def close(self) -> None:
        """Lets go of the folder."""
        self._manager.close()


def _named(state: Any) -> dict[str, jax.Array]:
    """A pytree's leaves by place and name, in order."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    clean = [re.sub(r"[^\w.]+", "_", name) for name in names]
    return {f"{i:04d}.{clean[i]}": leaf for i, (_, leaf) in enumerate(leaves)}


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0][
        :200
    ]
