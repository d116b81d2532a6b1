"""Where a model lies: a local folder or the hub, its JSON configs and the files of its weights."""

import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from astraea_jax import checks, files
from astraea_jax.checks import Refusal, shown

SINGLE_FILES = ("diffusion_pytorch_model.safetensors", "model.safetensors")


def model_folder(
    source: str | os.PathLike[str], weights: Sequence[str] = ("*.safetensors",)
) -> Path:
    """The local folder of a model: itself, or a snapshot of it from the Hugging Face hub.

    Args:
      source: a folder, or a hub id `owner/name`. Only JSON, the tokenizer and weights are fetched;
        the hub's local cache stands in when the hub can't be reached.
      weights: patterns of the files of weights to fetch.

    Raises:
      Refusal: it is neither, or the hub has no such model or can't be reached.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    name = str(source)
    if folder.exists() or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        what = "a file" if folder.exists() else "no such folder"
        raise Refusal(
            f"expected the folder of a model or a hub id `owner/name`, got {name!r} ({what})"
        )
    import huggingface_hub  # slow to import, and most models are local

    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, allow_patterns=["*.json", *weights, "tokenizer/*"]
            )
        )
    except Exception as error:  # a dozen classes of several libraries: for the user all one
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Refusal(
            f"{name!r} is no folder here and could not be fetched from the hub ({reason}); check "
            "the name and the network, or download it and pass its folder"
        ) from error


def read_config(
    folder: str | os.PathLike[str],
    name: str = "config.json",
    *,
    expected: str | Collection[str] | None = None,
) -> dict[str, Any]:
    """A folder's JSON config.

    Args:
      folder: where it lies.
      name: of the file.
      expected: the `_class_name` (Diffusers) or `model_type` (Transformers) it must have, or
        several of which it must have one.

    Raises:
      Refusal: the file is missing or broken, or describes another kind of model.
    """
    path = Path(folder) / name
    if not os.path.lexists(path):
        raise Refusal(f"expected the file {path}, which is not there; check the folder")
    config = _read_json(path)
    allowed = (expected,) if isinstance(expected, str) else tuple(expected or ())
    got = config.get("_class_name", config.get("model_type"))
    if allowed and got not in allowed:
        raise Refusal(
            f"expected {path} to describe {' or '.join(allowed)} (`_class_name` or `model_type`), "
            f"got {shown(got)}; point to the folder of such a model"
        )
    return config


def checkpoint_files(source: str | os.PathLike[str]) -> list[Path]:
    """The safetensors files of a checkpoint: one, or the shards that its index names.

    Raises:
      Refusal: there is none, or the index is broken or names a file outside the folder.
    """
    folder = Path(source)
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise Refusal(f"expected a .safetensors file or a folder with one; {folder} is neither")
    single = [folder / name for name in SINGLE_FILES if (folder / name).is_file()]
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if len(single) + len(indexes) > 1:
        found = ", ".join(path.name for path in (*single, *indexes))
        raise Refusal(f"expected one checkpoint in {folder}, got {found}; name the file to load")
    if single:
        return single
    if indexes:
        return _shards(indexes[0])
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
    raise Refusal(
        f"expected {' or '.join(SINGLE_FILES)} or an index of shards (*.safetensors.index.json) in "
        f"{folder}, got {found}; convert other formats (.bin, .pth) to safetensors first, or name "
        "the .pth file"
    )


def _shards(index: Path) -> list[Path]:
    root = index.parent.resolve()
    roots = [root]
    # The hub's cache keeps a snapshot as links into the blobs folder of the same model.
    snapshots = next((p for p in (root, *root.parents) if p.name == "snapshots"), None)
    if snapshots is not None and (snapshots.parent / "blobs").is_dir():
        roots.append(snapshots.parent / "blobs")
    found = []
    for name in shard_names(index):
        file = index.parent / name
        plain = not Path(name).is_absolute() and ".." not in Path(name).parts
        if not plain or not any(file.resolve().is_relative_to(allowed) for allowed in roots):
            raise Refusal(
                f"{index} names {name!r}, which lies outside its folder; expected files of that "
                "folder only: do not trust this checkpoint"
            )
        if not file.is_file():
            raise Refusal(f"{index} names {name}, which is not there; fetch the missing shard")
        found.append(file)
    return found


SHARDS = 10_000
"""Files of one checkpoint: ten times those of the largest."""


class _FileName:
    """A file's name that every system takes."""

    def problem(self, value: Any) -> str | None:
        """See `checks.Rule`."""
        problem = checks.Text(255).problem(value)
        if problem is None and not value.isprintable():
            problem = f"must be a file's name; got {shown(value)}"
        return problem


def shard_names(index: Path) -> list[str]:
    """The files that an index of shards names, each once.

    Raises:
      Refusal: the index is broken, or names none or far too many.
    """
    try:
        weight_map = checks.fields(
            _read_json(index),
            {"weight_map": checks.ByName(_FileName(), most=1_000_000)},
            name=str(index),
            required=["weight_map"],
            others=True,
        )["weight_map"]
    except Refusal as error:
        raise Refusal(f"expected a `weight_map` of key -> file name: {error}") from error
    names = list(dict.fromkeys(weight_map.values()))
    if not names:
        raise Refusal(f"{index} names no file at all; fetch it again")
    if len(names) > SHARDS:
        raise Refusal(f"{index} names {len(names)} files; at most {SHARDS} are read")
    return names


def _read_json(path: Path) -> dict[str, Any]:
    config = files.read_json(path)
    if not isinstance(config, dict):
        raise Refusal(f"expected a JSON object in {path}, got a {type(config).__name__}")
    return config
