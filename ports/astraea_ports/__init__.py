"""The models. What a model's folder says it is decides which port opens it; see `PORTS`.

`pipeline.Pipeline.from_pretrained` opens any of them. Importing this package imports no jax.
"""

import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from astraea_ports.pipeline.parts import Parts


class Port(NamedTuple):
    """A family of models and the module that opens them.

    Attributes:
      module: has `open_parts(source, ...)` and `random_parts(size, ...)`.
      classes: beginnings of what its files say of themselves: `_class_name` of model_index.json
        and config.json, `model_type` of config.json.
      kinds: whole values of `model_type` that are its own too.
      folders: what only its models hold, where no file says what the whole is.
      sizes: names of its models that can be made with random weights.
    """

    module: str
    classes: tuple[str, ...]
    kinds: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()


PORTS: Mapping[str, Port] = {
    "wan": Port(
        "astraea_ports.wan.parts",
        classes=("Wan",),
        kinds=("t2v", "i2v", "flf2v", "vace", "ti2v", "s2v", "animate"),
        folders=("high_noise_model", "low_noise_model"),
        sizes=("1.3B", "14B"),
    ),
}
"""The ports by name. A folder that none of them knows is refused by what it says it is."""

SIZES = tuple(size for port in PORTS.values() for size in port.sizes)
"""Models of a real size that can be made with random weights."""


def open_parts(
    source: Any, *, revision: str | None = None, lora: Sequence[Any] = (), **options
) -> "Parts":
    """Finds a model's parts by the port that its folder names; nothing large is read.

    Args:
      source: a folder, a hub id, or the name of a model that ships.
      revision: of a hub id: a branch, a tag or a commit.
      lora: files of low-rank changes to the transformer, `checkpoints.lora.Lora`.
      **options: of the port's `open_parts`: dtype, precision.

    Raises:
      Refusal: no such model, none that a port knows, or what no model can be opened with; that is
        noticed before anything is fetched.
    """
    from astraea_ports import checkpoints  # with jax: a command's help needs neither
    from astraea_ports.checkpoints import lora as lora_files

    lora = lora_files.check(lora)
    if options.get("dtype") is not None:
        checkpoints.float_dtype(options["dtype"])
    model = checkpoints.find_model(source, revision=revision)
    module = importlib.import_module(PORTS[port_of(model.path)].module)
    return module.open_parts(model, lora=lora, **options)


def random_parts(size: str, **options) -> "Parts":
    """A model of a real size with random weights.

    Args:
      size: one of `SIZES`.
      **options: of the port's `random_parts`: dtype, precision, seed.

    Raises:
      Refusal: an unknown size.
    """
    from astraea_jax import checks

    checks.one_of("size", size, SIZES)
    port = next(port for port in PORTS.values() if size in port.sizes)
    return importlib.import_module(port.module).random_parts(size, **options)


def port_of(folder: Path) -> str:
    """The name of the port that opens a model's folder, by what its JSON files say.

    Raises:
      Refusal: no file says what it is, or none of the ports knows it.
    """
    from astraea_jax import checks
    from astraea_ports import checkpoints

    said: list[str] = []
    for name in ("model_index.json", "config.json"):
        if os.path.lexists(folder / name):
            config = checkpoints.read_config(folder, name)
            said += [str(config[key]) for key in ("_class_name", "model_type") if config.get(key)]
    for name, port in PORTS.items():
        named = any(each.startswith(port.classes) or each in port.kinds for each in said)
        if named or any(os.path.isdir(folder / held) for held in port.folders):
            return name
    known = " or ".join(f"{start}..." for port in PORTS.values() for start in port.classes)
    got = f"it says {', '.join(map(checks.shown, said))}" if said else "it has neither with one"
    raise checks.Refusal(
        f"expected a model_index.json or config.json in {folder} whose `_class_name` is {known}; "
        f"{got}: point to the folder of such a model"
    )
