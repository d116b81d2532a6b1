"""Low-rank changes to a Wan transformer (LoRA), in the spellings that files have, merged on load.

A change to a weight W is `strength * scale * up @ down`, where scale is alpha / rank or what
`lora_scale` finds said; some files also hold whole differences of weights and biases.
"""

import functools
import math
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from astraea_jax import checks, files
from astraea_jax.checks import Refusal
from astraea_ports.checkpoints import lora_names, lora_scale, matching
from astraea_ports.checkpoints.lora_names import Words
from astraea_ports.checkpoints.matching import Entry
from astraea_ports.checkpoints.tensor_files import (
    FLOAT_DTYPES,
    INTEGER_DTYPES,
    Tensor,
    TensorFiles,
    all_finite,
)

STRONGEST = 100.0
"""The largest strength, either way; files in use have one of about 1."""


class Lora(NamedTuple):
    """A file of changes, and how strongly to apply it.

    Attributes:
      file: .safetensors.
      strength: a factor on all changes, within -100..100; 1 is as trained.
    """

    file: str | os.PathLike[str]
    strength: float = 1.0


class _Change(NamedTuple):
    """How one weight or bias changes.

    Attributes:
      key: of the weight or bias.
      parts: the tensors, by what they are.
      scale: of the product.
    """

    key: str
    parts: Mapping[str, Tensor]
    scale: float


def check(loras: Sequence[Lora]) -> list[Lora]:
    """Returns the files to merge if each can be one; call it before any long work.

    Raises:
      Refusal: no such file, another kind of file, or a strength that is no number in -100..100.
    """
    checked = []
    # A string is a sequence of strings, and one Lora of its fields: the likely slips.
    several = isinstance(loras, Sequence) and not isinstance(loras, str | Lora)
    for item in loras if several else [loras]:
        if not several or not isinstance(item, tuple) or len(item) != 2:
            raise Refusal(f"expected a list of Lora(file, strength); got {checks.shown(item)}")
        file, strength = item
        name = checks.shown(os.fspath(file) if isinstance(file, os.PathLike) else file)
        if not isinstance(file, str | os.PathLike) or Path(file).suffix != ".safetensors":
            raise Refusal(f"expected a LoRA as an existing .safetensors file; got {name}")
        path = files.check_input(os.path.expanduser(file), what="LoRA")
        strength = checks.number(f"strength of {name}", strength, -STRONGEST, STRONGEST)
        checked.append(Lora(path, strength))
    return checked


def read_deltas(
    loras: Sequence[Lora],
    slots: Mapping[str, jax.ShapeDtypeStruct],
    tables: Sequence[Sequence[Entry]],
    *,
    words: Words,
):
    """What the files add to each parameter (path, layer), as functions that compute it.

    Raises:
      Refusal: as `check`; a file that is no plain LoRA of this model: a tensor that belongs to no
        weight, of the wrong shape, rank or dtype, or without its partner, or scales that
        contradict each other; all problems of a file in one error.
    """
    added = defaultdict(list)
    for file, strength in check(loras):
        opened = TensorFiles([Path(file)])
        changes, problems, unknown = _changes(opened, Path(file), words)
        places = set()
        for change in changes:
            fitted = _fit(change, slots, tables)
            if isinstance(fitted, str):
                problems.append(fitted)
                unknown += [tensor.key for tensor in change.parts.values()]
                continue
            place, entry = fitted
            if place in places:
                problems.append(f"{change.key}: changed twice, under both of its names")
            places.add(place)
            added[place].append(functools.partial(_delta, opened, change, entry, strength))
        if problems or not changes:
            kind = lora_names.other_kind(unknown, words)
            holds = f"; it holds {kind}" if kind else ""
            shown = "\n  ".join(["", *problems[: matching.SHOWN_PER_KIND]])
            raise Refusal(
                f"{file} does not fit this model: {len(problems)} problems{holds}; use a LoRA of "
                f"{words.size}{shown if problems else ', this file holds no tensor'}"
            )
    return {place: functools.partial(_sum, parts) for place, parts in added.items()}


def _changes(
    opened: TensorFiles, file: Path, words: Words
) -> tuple[list[_Change], list[str], list[str]]:
    """The changes of a file; what is wrong with it; the keys that are no LoRA's."""
    modules: dict[str, dict[str, Tensor]] = defaultdict(dict)
    problems, unknown, adapters = [], [], set()
    for tensor in opened.tensors():
        name = lora_names.parse(tensor.key, words)
        if name is None:
            problems.append(f"{tensor.key}: expected a name ending in lora_A, lora_up, diff, ...")
            unknown.append(tensor.key)
            continue
        wrong = _wrong_tensor(tensor, name.kind)
        if wrong or name.kind in modules[name.module]:
            twice = f"{tensor.key}: {name.kind} of {name.module} comes twice; expected it once"
            problems.append(wrong or twice)
            continue
        modules[name.module][name.kind] = tensor
        if name.kind in ("down", "up"):
            adapters.add(name.adapter)
    if len(adapters) > 1:
        names = ", ".join(sorted(str(name) for name in adapters))
        problems.append(f"expected one adapter, got {names}: save one of them by itself")
    said, changes = lora_scale.sources(file, opened.metadata(file)), []
    for module, parts in modules.items():
        found = _module_changes(opened, module, parts, said, words)
        if isinstance(found, str):
            problems.append(found)
        else:
            changes += found
    return changes, problems, unknown


def _wrong_tensor(tensor: Tensor, kind: str) -> str | None:
    allowed = FLOAT_DTYPES | INTEGER_DTYPES if kind == "alpha" else FLOAT_DTYPES
    if tensor.dtype not in allowed:
        wanted = ", ".join(sorted(FLOAT_DTYPES))
        return f"{tensor.key}: expected one of {wanted}, got {tensor.dtype}"
    if kind == "alpha" and math.prod(tensor.shape) != 1:
        return f"{tensor.key}: expected one number, got {list(tensor.shape)}"
    return None


def _module_changes(
    opened: TensorFiles,
    module: str,
    parts: Mapping[str, Tensor],
    said: Sequence[lora_scale.Source],
    words: Words,
) -> list[_Change] | str:
    """How a module's weight and bias change, or what is wrong."""
    weight = lora_names.weight_of(module, words)
    if ("down" in parts) != ("up" in parts) or parts.keys() <= {"alpha", "up_b"}:
        return f"{weight}: expected lora_A and lora_B (down and up), got {list(parts)}"
    scale = 1.0
    if "down" in parts:
        up, down = parts["up"].shape, parts["down"].shape
        if min(len(up), len(down)) < 2 or not up[1] == down[0] > 0 or math.prod(up[2:]) != 1:
            return f"{weight}: expected down [rank, in] and up [out, rank], got {down} and {up}"
        alpha = opened.read(parts["alpha"]).item() if "alpha" in parts else None
        scale = lora_scale.scale(said, module, down[0], alpha)
        if isinstance(scale, str):
            return scale
    changes = []
    # A bias beside up is scaled as the product is; a whole difference is not.
    for key, kinds in ((weight, ("down", "up", "diff")), (f"{module}.bias", ("up_b", "diff_b"))):
        found = {kind: parts[kind] for kind in kinds if kind in parts}
        if found:
            changes.append(_Change(key, found, scale))
    return changes


def _fit(change: _Change, slots, tables) -> tuple[tuple[str, int | None], Entry] | str:
    """The parameter that a change is for, or what is wrong with it."""
    shapes = [t.shape for kind, t in change.parts.items() if kind not in ("down", "up")]
    if "up" in change.parts:
        shapes.append((change.parts["up"].shape[0], *change.parts["down"].shape[1:]))
    if len(set(shapes)) > 1:
        return f"{change.key}: expected changes of one shape, got {shapes[0]} and {shapes[1]}"
    tensor = Tensor(change.key, "F32", shapes[0], Path())
    said = f"{change.key}: no such weight in this model"
    for table in tables:
        hits = [(m, e) for e in table if (m := re.fullmatch(e.pattern, change.key))]
        for hit, entry in hits:
            layer = hit.groupdict().get("layer")
            path, number = hit.expand(entry.path), None if layer is None else int(layer)
            misfit = matching.misfit(matching.Match(tensor, entry, number), path, slots)
            if misfit is None:
                return (path, number), entry
            said = misfit[1]
    return said


def _delta(opened: TensorFiles, change: _Change, entry: Entry, strength: float) -> np.ndarray:
    """The change in the parameter's layout, float32."""
    with np.errstate(over="ignore", invalid="ignore"):  # told below, by the name
        parts = {kind: opened.read(t).astype(np.float32) for kind, t in change.parts.items()}
        total = sum(parts[kind] for kind in ("diff", "diff_b") if kind in parts)
        if "up" in parts:
            up, down = parts["up"], parts["down"]
            product = up.reshape(len(up), len(down)) @ down.reshape(len(down), -1)
            total = total + change.scale * product.reshape(len(up), *down.shape[1:])
        if "up_b" in parts:
            total = total + change.scale * parts["up_b"]
        values = np.asarray(total * strength, np.float32)
    if not all_finite(values):
        raise Refusal(
            f"{opened.files[0]}: the change of {change.key} is past float32's range at strength "
            f"{strength:g}; expected finite numbers: use another file or less strength"
        )
    return entry.transform(values)


def _sum(parts) -> np.ndarray:
    """All that files add to one parameter."""
    return np.sum([part() for part in parts], axis=0)
