"""Where a model lies: a local folder or the hub, its JSON configs and the files of its weights."""

import glob
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from astraea_jax import checks, files
from astraea_jax.checks import Refusal, shown
from astraea_ports.checkpoints import hub

SINGLE_FILES = ("diffusion_pytorch_model.safetensors", "model.safetensors")

PARTS = ("text_encoder", "transformer", "vae")
"""The folders of a model's weights in the Diffusers layout."""


SHIPPED = {"tiny": Path(__file__).parents[1] / "tiny"}
"""Models inside the package, by name."""


class ModelFolder(NamedTuple):
    """Where a model lies.

    Attributes:
      path: its folder; of a model of the hub, with what was fetched so far: at first its JSON.
      name: on the hub, or None.
      revision: of the hub's files.
    """

    path: Path
    name: str | None = None
    revision: str | None = None

    def __str__(self):
        return self.name or str(self.path)

    def fetch(self, *patterns: str) -> None:
        """Fetches more files where the model is on the hub; see `hub.fetch`."""
        if self.name is not None:
            hub.fetch(self.name, patterns, self.revision)

    def fetch_weights(self, part: str) -> None:
        """Fetches a part's files of weights and no others: `part` is its folder, "" the model's."""
        if self.name is None:
            return
        index = _index(self.path / part)
        names = SINGLE_FILES if index is None else tuple(shard_names(index))
        within = f"{part}/" if part else ""
        self.fetch(*(within + glob.escape(name) for name in names), f"{within}orbax/*")


Source = str | os.PathLike[str] | ModelFolder
"""A folder, a hub id `owner/name`, or what was found of either."""


def as_source(source: Any) -> str:
    """What a model is called, as text; Refusal for what is neither text nor a path."""
    if not isinstance(source, str | os.PathLike):
        raise Refusal(
            f"expected the folder of a model or a hub id `owner/name`, got {shown(source)}"
        )
    return os.fspath(source)


def find_model(source: Source, *, revision: str | None = None) -> ModelFolder:
    """A model's folder: itself, or one that holds the JSON files of a model of the hub.

    Args:
      source: a folder, a hub id `owner/name`, or the name of a model that ships.
      revision: of the hub's files: a branch, a tag or a commit. All that is fetched later is of
        the same commit.

    Raises:
      Refusal: it is neither, a revision is asked of a folder, or it can't be fetched.
    """
    if isinstance(source, ModelFolder):
        return source
    name = as_source(source)
    path = os.path.expanduser(SHIPPED.get(name, name))
    if os.path.isdir(path):
        if revision is not None:
            raise Refusal(
                f"a revision is of a model on the hub; {name!r} is a folder: leave it out"
            )
        return ModelFolder(Path(path))
    if os.path.exists(path) or not hub.NAME.fullmatch(name):
        what = "a file" if os.path.exists(path) else "no such folder"
        raise Refusal(
            f"expected the folder of a model or a hub id `owner/name`, got {shown(name)} ({what})"
        )
    folder = hub.fetch(name, hub.JSON, revision)
    pinned = folder.name if hub.COMMIT.fullmatch(folder.name) else revision
    return ModelFolder(folder, name, pinned)


def model_folder(source: Source, *, revision: str | None = None) -> Path:
    """The folder of a whole model in the Diffusers layout; see `find_model`."""
    model = find_model(source, revision=revision)
    for part in PARTS:
        model.fetch_weights(part)
    model.fetch("tokenizer/*.json")
    return model.path


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
    path = files.as_path(folder) / name
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
    if os.path.isfile(folder):
        return [folder]
    if not os.path.isdir(folder):
        raise Refusal(f"expected a .safetensors file or a folder with one; {folder} is neither")
    single = [folder / name for name in SINGLE_FILES if os.path.isfile(folder / name)]
    index = _index(folder)
    if len(single) + (index is not None) > 1:
        found = ", ".join(path.name for path in (*single, *((index,) if index else ())))
        raise Refusal(f"expected one checkpoint in {folder}, got {found}; name the file to load")
    if single:
        return single
    if index is not None:
        return _shards(index)
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
    raise Refusal(
        f"expected {' or '.join(SINGLE_FILES)} or an index of shards (*.safetensors.index.json) in "
        f"{folder}, got {found}; convert other formats (.bin, .pth) to safetensors first, or name "
        "the .pth file"
    )


def _index(folder: Path) -> Path | None:
    """The index of a checkpoint's shards: of the usual name, else the only one.

    Raises:
      Refusal: there are several, none of the usual name.
    """
    usual = [folder / f"{name}.index.json" for name in SINGLE_FILES]
    # Others are of the same weights in another precision, as a rule.
    found = [path for path in usual if os.path.isfile(path)]
    found = found or sorted(folder.glob("*.safetensors.index.json"))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise Refusal(f"expected one checkpoint in {folder}, got {names}; name the file to load")
    return found[0] if found else None


def _shards(index: Path) -> list[Path]:
    root = index.parent.resolve()
    roots = [root]
    # The hub's cache keeps a snapshot as links into the blobs folder of the same model.
    snapshots = next((p for p in (root, *root.parents) if p.name == "snapshots"), None)
    if snapshots is not None and os.path.isdir(snapshots.parent / "blobs"):
        roots.append(snapshots.parent / "blobs")
    found = []
    for name in shard_names(index):
        file = index.parent / name
        real = Path(os.path.realpath(file))  # `resolve` fails for links in a circle
        if not any(real.is_relative_to(allowed) for allowed in roots):
            raise Refusal(_outside(index, name))
        if not os.path.isfile(file):
            raise Refusal(f"{index} names {name}, which is not there; fetch the missing shard")
        found.append(file)
    return found


def _outside(index: Path, name: str) -> str:
    return (
        f"{index} names {name!r}, which lies outside its folder; expected files of that folder "
        "only: do not trust this checkpoint"
    )


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
      Refusal: the index is broken, or names none, far too many, or one outside its folder.
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
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise Refusal(_outside(index, name))
    return names


def _read_json(path: Path) -> dict[str, Any]:
    config = files.read_json(path)
    if not isinstance(config, dict):
        raise Refusal(f"expected a JSON object in {path}, got a {type(config).__name__}")
    return config
