"""A whole model's weights in the layout and dtype that they run in, kept by Orbax."""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.typing import DTypeLike

import astraea_ports
from astraea_jax import files
from astraea_jax.checks import Refusal
from astraea_ports.checkpoints import converted
from astraea_ports.checkpoints.folders import PARTS
from astraea_ports.checkpoints.lora import Lora
from astraea_ports.pipeline import parts
from astraea_ports.pipeline.parts import Parts
from astraea_ports.pipeline.plan import OURS

_ALONG = ("*.json", "LICENSE*", "schedules/*.json")
"""Files that mean something to whoever runs the model."""

_WEIGHTS = ("config.json", "*.index.json")
"""Of those, what describes weights in the layout that is left behind."""


def convert_model(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    lora: Sequence[Lora] = (),
    revision: str | None = None,
    stage: Callable[[str], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> None:
    """Writes a model's folder in the Diffusers layout, with Orbax's checkpoints for the weights.

    What else the model's folder says goes along: its scheduler, the defaults of a call, captions
    and, unless a LoRA makes another model of it, the schedules that were searched for it. One part
    is held at a time. The folder appears under its name when it is whole; whatever stops that,
    nothing is left, and what a killed conversion left is removed by the next to the same target.

    Args:
      source: a model's folder or hub id, in either layout.
      target: the folder to make.
      dtype: of the transformer and the text encoder, but for what always is float32; None is the
        model's own, as for `Pipeline.from_pretrained`. The copy runs in it.
      lora: files of low-rank changes to merge.
      revision: of a hub id: a branch, a tag or a commit.
      stage: a context for each part, by its name: to show progress.

    Raises:
      Refusal: no such model, a target that exists or can't be written, which is noticed before any
        weight is read, or a disk that is full.
    """
    target = _check_target(target)
    with _whole_folder(target) as partial:
        found = astraea_ports.open_parts(source, dtype=dtype, lora=lora, revision=revision)
        _check_room(partial, found)
        with _writing(target):
            _describe(found, partial, merged=bool(lora))
        for name in PARTS:
            with stage(f"convert {name}"):
                module = getattr(found, name).load()
                with _writing(target):
                    converted.save(module, partial / name)
                del module


def _describe(found: Parts, folder: Path, *, merged: bool) -> None:
    """Writes all but the weights."""
    source = found.folder
    assert source is not None, "the model is read from a folder"
    taken = _along(source)
    if merged and any(path.parent != source for path in taken):
        warnings.warn(
            "the schedules in the model's folder were searched for the model without the LoRA: the "
            "copy goes without them, search anew for it",
            skip_file_prefixes=(OURS,),
        )
        taken = [path for path in taken if path.parent == source]
    for path in taken:
        copy = folder / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
    scheduler = source / "scheduler/scheduler_config.json"
    if os.path.isfile(scheduler):
        (folder / "scheduler").mkdir()
        shutil.copyfile(scheduler, folder / "scheduler" / scheduler.name)
    else:
        _write_json(folder / "scheduler/scheduler_config.json", found.scheduler)
    if not os.path.isfile(folder / "model_index.json"):
        _write_json(folder / "model_index.json", found.index)
    settings = {"grid": found.grid, "dtype": parts.main_dtype(found.transformer.template)}
    _write_json(folder / "astraea.json", found.defaults._asdict() | settings)
    found.tokenizer.save(folder / "tokenizer")
    for name in PARTS:
        config = getattr(found, name).template.config
        _write_json(folder / name / "config.json", config.to_dict())


def _along(source: Path) -> list[Path]:
    """The files of a model's folder that a copy of other weights' layout takes along."""
    return [
        path
        for pattern in _ALONG
        for path in sorted(source.glob(pattern))
        if os.path.isfile(path) and not any(path.match(left) for left in _WEIGHTS)
    ]


def _check_target(target: str | os.PathLike[str]) -> Path:
    """The folder to make, if it can be made."""
    path = Path(os.path.expanduser(target))
    try:
        os.lstat(path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # too long a name, a null byte
        raise Refusal(f"can't make {path} ({files.reason(error)}): choose another name") from error
    else:
        raise Refusal(f"expected a folder that does not exist yet; {path} does: name another")
    if not os.path.isdir(path.parent):
        raise Refusal(f"can't make {path}: {path.parent} is no folder that can be written to")
    try:
        path.mkdir()  # trying is the only test that sees all that may be wrong
        path.rmdir()
    except OSError as error:
        raise Refusal(f"can't make {path} ({files.reason(error)}): choose another name") from error
    return path


def _check_room(folder: Path, found: Parts) -> None:
    """Refuses a disk without room for the weights."""
    leaves = jax.tree.leaves([getattr(found, name).template for name in PARTS])
    needed = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise Refusal(
            f"expected room for {needed / 2**30:.1f} GiB beside {folder.parent}; "
            f"{free / 2**30:.1f} GiB are free: make room or choose another folder"
        )


@contextlib.contextmanager
def _whole_folder(target: Path) -> Iterator[Path]:
    """A folder under a temporary name, renamed if the block ends well, else removed.

    The name is the same for every conversion to the target, and short whatever the target's. One
    at a time holds it: what is there under it is of one that was killed.
    """
    mark = hashlib.sha256(os.fsencode(target.name)).hexdigest()[:8]
    partial = target.with_name(f".{mark}.partial")
    lock = target.with_name(f".{mark}.lock")
    held = False
    try:
        with files.held(lock, choose="another name"):
            held = True
            _remove(partial)
            with _writing(target):
                partial.mkdir()
            yield partial
            with _writing(target):
                os.replace(partial, target)
    finally:
        if held:
            _remove(partial)
            with contextlib.suppress(OSError):
                lock.unlink()


def _remove(folder: Path) -> None:
    """Removes a folder that threads may still be writing to: Orbax's do where it is interrupted."""
    for _ in range(100):
        if not os.path.lexists(folder):
            return
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.1)  # long enough for such a thread to make it anew


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Says a system's error as a refusal; those of Orbax and tokenizers have it in words only."""
    try:
        yield
    except Exception as error:
        found = re.search(r"[^\n;\[]*\[?os error[^\n;]*", str(error), re.IGNORECASE)
        if not isinstance(error, OSError) and found is None:
            raise
        reason = found[0].strip() if found else files.reason(error)
        raise Refusal(f"can't write {target} ({reason}): make room or choose another") from error


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(content), indent=1))
