"""The folder of a training run: who holds it, what it trains, and its checkpoints."""

import contextlib
import errno
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from astraea_jax import checks, files, report
from astraea_jax.checks import Anything, ByName, Refusal, Text, Whole

KEPT = 2
"""Checkpoints that are kept."""


@contextlib.contextmanager
def owned(folder: pathlib.Path) -> Iterator[None]:
    """Holds a run's folder; the hold ends with the process, even one that is killed.

    What ends in an error before there is a first checkpoint leaves nothing that was not there.

    Raises:
      Refusal: another process holds it, or it can't be made or written to.
    """
    made = [each for each in (folder, *folder.parents) if not os.path.exists(each)]
    before = {name for name in _OWN if os.path.exists(folder / name)}
    try:
        with files.held(folder / "run.lock"):
            try:
                yield
            except BaseException:
                # While it is held: no other run may have begun in the folder.
                if not _steps_kept(folder / "checkpoints"):
                    _take_away([folder / name for name in _OWN if name not in before])
                raise
    except BaseException:
        for each in made:
            with contextlib.suppress(OSError):
                each.rmdir()  # only where it is empty
        raise


_OWN = ("run.json", "losses.npy", "checkpoints", "run.lock")
"""What a run writes up to its first checkpoint."""


def _steps_kept(checkpoints: pathlib.Path) -> list[int]:
    """Steps of the checkpoints that a folder holds, whole by their name."""
    try:
        return [int(path.name) for path in checkpoints.iterdir() if path.name.isdecimal()]
    except OSError:
        return []


def _take_away(paths: Sequence[pathlib.Path]) -> None:
    for path in paths:
        if os.path.isdir(path) and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):  # Windows keeps a file that is open
                path.unlink(missing_ok=True)


def saved_settings(folder: pathlib.Path) -> dict[str, Any] | None:
    """What the run in a folder trains, or None where there is none.

    Raises:
      Refusal: a run.json that can't be read, or is none.
    """
    path = folder / "run.json"
    if not os.path.lexists(path):
        return None
    try:
        content = files.read_json(path, what="run.json of a training")
    except Refusal as error:
        raise Refusal(f"{error}; or choose another folder") from error
    rules = {"part": Text(100), "recipe": ByName(Anything())}
    checks.fields(
        content, rules, name=str(path), required=("part",), others=True, advice=_OTHER_RUN
    )
    if _deeper(content, _DEEPEST):
        raise Refusal(f"{path} is nested too deep for a run's settings: {_OTHER_RUN}")
    return content


_DEEPEST = 8
"""Objects and lists within each other in run.json; there are five."""


def _deeper(value: Any, levels: int) -> bool:
    """Whether a value of JSON has more levels."""
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_deeper(each, levels - 1) for each in inner)


def saved_steps(folder: pathlib.Path, part: str) -> int | None:
    """The length of the run that is in a folder; it was settled when that began.

    Args:
      folder: of the run.
      part: what is to be trained.

    Raises:
      Refusal: as `saved_settings`, or it trains another part, or says no length.
    """
    settings = saved_settings(folder)
    if settings is None:
        return None
    _refuse_other(folder, {"part": settings["part"]}, {"part": part})
    rules = {"steps": Whole(1, 10**8)}  # as many as a recipe may have
    name = f"recipe in {folder / 'run.json'}"
    recipe = checks.fields(
        settings.get("recipe"), rules, name=name, required=rules, others=True, advice=_OTHER_RUN
    )
    return recipe["steps"]


_OTHER_RUN = "choose another folder"


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
    _refuse_other(folder, _flat(found), _flat(asked))


def check_some(folder: pathlib.Path, settings: Mapping[str, Any]) -> None:
    """Holds some settings against those of the run in a folder, where there is one.

    Before a model is loaded, of which `check_settings` compares the weights too.

    Raises:
      Refusal: as `saved_settings`, or one of these is another one there.
    """
    found = saved_settings(folder)
    if found is not None:
        there = {name: found[name] for name in settings if name in found}
        _refuse_other(folder, _flat(there), _flat(json.loads(json.dumps(settings))))


def _refuse_other(folder: pathlib.Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuses a folder whose run is not the one that is asked for; settings by one name each."""
    other = [
        f"{name if name in here else checks.shown(name)}: "
        f"expected {checks.shown(there.get(name))}, got {checks.shown(here.get(name))}"
        for name in sorted({*there, *here})
        if (name in there) != (name in here) or not _alike(there.get(name), here.get(name))
    ]
    if other:
        raise Refusal(
            f"{folder} holds a run of another kind ({'; '.join(other[: checks.PROBLEMS])}): ask "
            "for the same to take it up again, or choose another folder"
        )


def _alike(one: Any, other: Any) -> bool:
    """Whether two values of JSON are the same; true is no 1."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _flat(settings: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Settings within settings by one name each, as "recipe.batch"."""
    flat = {}
    for name, value in settings.items():
        inner = _flat(value, f"{before}{name}.") if isinstance(value, Mapping) else {}
        flat |= inner or {before + name: value}
    return flat


class Checkpoints:
    """The last states of a run, each written whole or not at all."""

    def __init__(self, folder: pathlib.Path):
        """Those in `folder`, which is made if need be.

        Raises:
          Refusal: it is no folder, or can't be made or read.
        """
        import orbax.checkpoint as ocp  # slow to import, and only training needs it

        self._ocp = ocp
        self._folder = folder.absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=KEPT, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(self._folder, options=options)
        except (OSError, ValueError) as error:
            raise Refusal(
                f"can't use {self._folder} for checkpoints ({files.reason(error)}): {_OTHER_RUN}"
            ) from error

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
                f"({files.reason(error)}; it takes {report.human_bytes(needed)}, "
                f"{report.human_bytes(free)} are free); "
                + (f"that of step {kept} is kept" if kept is not None else "there is none before")
                + ": make room and start the same run again"
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
                f"broken ({files.reason(error)}): delete it to go back to the one before, or "
                f"{_OTHER_RUN}"
            ) from error
        return jax.tree.unflatten(jax.tree.structure(template), [found[name] for name in named])

    def close(self) -> None:
        """Lets go of the folder; what was stopped half-written goes too."""
        self._manager.close()
        _take_away(list(self._folder.glob(f"*{_HALF_WRITTEN}*")))


_HALF_WRITTEN = ".orbax-checkpoint-tmp"


def _named(state: Any) -> dict[str, jax.Array]:
    """A pytree's leaves by place and name, in order."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    clean = [re.sub(r"[^\w.]+", "_", name) for name in names]
    return {f"{i:04d}.{clean[i]}": leaf for i, (_, leaf) in enumerate(leaves)}


@contextlib.contextmanager
def whole_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a new folder beside `folder`, which takes its place if the block ends well."""
    partial = folder.with_name(f".{folder.name}.partial")
    before = folder.with_name(f".{folder.name}.before")
    for left in (partial, before):  # by a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    try:
        partial.mkdir()
        yield partial
        if os.path.exists(folder):
            os.replace(folder, before)
        os.replace(partial, folder)
    finally:
        for left in (partial, before):
            shutil.rmtree(left, ignore_errors=True)
