"""A whole model's weights in the layout and dtype that they run in, kept by Orbax."""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jax.typing import DTypeLike

from astraea_jax.checks import Refusal
from astraea_ports import converted
from astraea_ports.wan import parts
from astraea_ports.wan.lora import Lora


def convert_model(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    dtype: DTypeLike,
    lora: Sequence[Lora] = (),
    stage: Callable[[str], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> None:
    """Writes a model's folder in the Diffusers layout, with Orbax's checkpoints for the weights.

    One part is held at a time. The folder appears under its name when it is whole.

    Args:
      source: a model's folder or hub id, in either layout.
      target: the folder to make.
      dtype: of the transformer and the text encoder, but for what always is float32.
      lora: files of low-rank changes to merge.
      stage: a context for each part, by its name: to show progress.

    Raises:
      Refusal: no such model, or a target that exists or can't be written.
    """
    target = _check_target(target)
    found = parts.open_parts(source, dtype=dtype, precision="reference", lora=lora)
    with _whole_folder(target) as partial:
        found.tokenizer.save(partial / "tokenizer")
        settings = found.defaults._asdict() | {"grid": found.grid}
        for name, content in (
            ("model_index.json", {"_class_name": "WanPipeline"}),
            ("scheduler/scheduler_config.json", {"flow_shift": found.shift}),
            ("astraea.json", settings),
        ):
            _write_json(partial / name, content)
        for name in ("text_encoder", "transformer", "vae"):
            loadable = getattr(found, name)
            _write_json(partial / name / "config.json", _config(name, loadable.template.config))
            with stage(f"convert {name}"):
                converted.save(loadable.load(), partial / name)


def _config(name: str, config: Any) -> dict[str, Any]:
    """What config.json says of a part."""
    if name == "vae":
        return config.to_dict()
    kind = {"transformer": {"_class_name": "WanTransformer3DModel"}}
    if name == "text_encoder":
        kind[name] = {"model_type": "t5" if config.shared_position_bias else "umt5"}
    return kind[name] | dataclasses.asdict(config)


def _check_target(target: str | os.PathLike[str]) -> Path:
    path = Path(target).expanduser()
    if path.exists():
        raise Refusal(f"expected a folder that does not exist yet; {path} does: name another")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise Refusal(f"can't make {path}: {path.parent} is no folder that can be written to")
    return path


@contextlib.contextmanager
def _whole_folder(target: Path) -> Iterator[Path]:
    """A folder under a temporary name, renamed if the block ends well, else removed."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        yield partial
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1))
