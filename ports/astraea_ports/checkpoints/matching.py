"""The table of a checkpoint: which tensor is which parameter, and what does not fit.

Every tensor must match exactly one entry and every parameter be fed; whatever does not fit is
reported, all of it together, from the headers alone.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from astraea_jax.checks import Refusal
from astraea_ports.checkpoints.tensor_files import FLOAT_DTYPES, Tensor

SHOWN_PER_KIND = 20  # a wrong file gives thousands of problems; the counts say the rest

_SCALES = re.compile(r".*\.(scale_weight|weight_scale|scale_input|input_scale)|scaled_fp8")
_QUANTISED = re.compile(r".*\.(comfy_quant|absmax|quant_map|quant_state\..*|qweight|qzeros)")
_WRAPPERS = ("model.diffusion_model.", "diffusion_model.", "model.", "module.", "_orig_mod.")
"""Prefixes that other programs' files have before every key."""

Transform = Callable[[np.ndarray], np.ndarray]


def identity(array: np.ndarray) -> np.ndarray:
    """The tensor as it is."""
    return array


def linear(array: np.ndarray) -> np.ndarray:
    """[out, in] -> [in, out]; trailing axes of length 1 (a 1x1 convolution) are dropped."""
    return array.reshape(array.shape[:2]).T


def conv2d(array: np.ndarray) -> np.ndarray:
    """[out, in, height, width] -> [height, width, in, out]."""
    return array.transpose(2, 3, 1, 0)


def conv3d(array: np.ndarray) -> np.ndarray:
    """[out, in, time, height, width] -> [time, height, width, in, out]."""
    return array.transpose(2, 3, 4, 1, 0)


def time_conv(array: np.ndarray) -> np.ndarray:
    """[out, in, time, 1, 1] -> [time, in, out]."""
    return array.reshape(array.shape[:3]).transpose(2, 1, 0)


def vector(array: np.ndarray) -> np.ndarray:
    """[channels, 1, ...] -> [channels]."""
    return array.reshape(array.shape[:1])


class Entry(NamedTuple):
    r"""One row of a checkpoint map.

    Attributes:
      pattern: regular expression that the whole key must match. A group named `layer` is the
        index on the parameter's leading (stacked) axis.
      path: dotted path of the parameter in the module; may use the groups (`\1`, `\g<name>`).
      transform: numpy array in the checkpoint's layout -> the parameter's layout.
    """

    pattern: str
    path: str
    transform: Transform = identity


class Match(NamedTuple):
    """A tensor, the entry it matches, and its layer where the parameter is stacked."""

    tensor: Tensor
    entry: Entry
    layer: int | None


def parameter_shapes(template: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """A module's parameters by dotted path, in the order of its leaves."""
    slots = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(template)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        slots[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return slots


def match_tensors(
    tensors: Iterable[Tensor],
    slots: Mapping[str, jax.ShapeDtypeStruct],
    table: Sequence[Entry],
    *,
    name: str = "the checkpoint",
) -> dict[str, list[Match]]:
    """Sends every tensor to its parameter; reads nothing but the headers.

    Raises:
      Refusal: they don't fit one to one; all problems in one error, under `name`.
    """
    compiled = [(re.compile(entry.pattern), entry) for entry in table]
    matches: dict[str, list[Match]] = defaultdict(list)
    problems: list[tuple[str, str]] = []
    unknown = []
    for tensor in tensors:
        hits = [(m, entry) for regex, entry in compiled if (m := regex.fullmatch(tensor.key))]
        if not hits:
            unknown.append(tensor.key)
            problems.append(("unexpected", f"{tensor.key}: no such tensor in this model"))
            continue
        if len(hits) > 1:
            patterns = " and ".join(entry.pattern for _, entry in hits)
            problems.append(("ambiguous", f"{tensor.key}: matches {patterns}; mend the table"))
            continue
        regex_match, entry = hits[0]
        layer = regex_match.groupdict().get("layer")
        match = Match(tensor, entry, None if layer is None else int(layer))
        path = regex_match.expand(entry.path)
        problem = misfit(match, path, slots)
        if problem:
            problems.append(problem)
        if problem is None or problem[0] != "unexpected":
            matches[path].append(match)
    problems += _missing(matches, slots, table)
    if problems:
        raise Refusal(_report(name, problems, _what_else(unknown)))
    return matches


def misfit(match: Match, path: str, slots: Mapping[str, Any]) -> tuple[str, str] | None:
    """The kind of misfit of a tensor for its parameter, and its description; None if it fits."""
    tensor, entry, layer = match
    if path not in slots:
        return "unexpected", f"{tensor.key}: this model has no {path}; check its config"
    expected = tuple(slots[path].shape)
    if layer is not None:
        if layer >= expected[0]:
            return "unexpected", (
                f"{tensor.key}: {path} has layers 0..{expected[0] - 1} only; "
                "check the number of layers in the config"
            )
        expected = expected[1:]
    if tensor.dtype not in FLOAT_DTYPES:
        wanted = ", ".join(sorted(FLOAT_DTYPES))
        return "wrong dtype", f"{tensor.key}: expected one of {wanted}, got {tensor.dtype}"
    try:
        # One element seen as an array of this shape: the transforms run on it and read no weights.
        got = entry.transform(np.broadcast_to(np.zeros((), np.int8), tensor.shape)).shape
    except (ValueError, IndexError, OverflowError):
        got = None
    if got == expected:
        return None
    detail = "which has too few or too many axes" if got is None else f"that is {list(got)} here"
    return "wrong shape", (
        f"{tensor.key}: expected {list(expected)} for {path}, got {list(tensor.shape)}, {detail}; "
        "check the config"
    )


def _missing(
    matches: Mapping[str, list[Match]], slots: Mapping[str, Any], table: Sequence[Entry]
) -> list[tuple[str, str]]:
    problems = []
    for path, leaf in slots.items():
        feeding = [entry for entry in table if entry.path == path]
        feeding = feeding or [entry for entry in table if _may_feed(entry, path)]
        stacked = any("(?P<layer>" in entry.pattern for entry in feeding)
        hint = " or ".join(entry.pattern for entry in feeding) or "nothing: mend the table"
        wanted = set(range(leaf.shape[0])) if stacked else {None}
        for layer in sorted(
            wanted - {match.layer for match in matches.get(path, ())}, key=lambda layer: layer or 0
        ):
            name = path if layer is None else f"{path}, layer {layer}"
            problems.append(("missing", f"{name}: expected a key like {hint}, got none"))
    return problems


def _may_feed(entry: Entry, path: str) -> bool:
    literal = re.split(r"\\(?:\d+|g<\w+>)", entry.path)
    return re.fullmatch(r"\w+".join(map(re.escape, literal)), path) is not None


def _what_else(keys: Sequence[str]) -> str:
    """What a file is that has names no model has, and what to do, where that can be told."""
    if any(_SCALES.fullmatch(key) for key in keys):
        return "; these are scaled 8-bit floats, whose scales are not read: use the unscaled file"
    if any(_QUANTISED.fullmatch(key) for key in keys):
        return "; these are quantised weights: use the file in bfloat16, float16 or float32"
    for prefix in _WRAPPERS:
        if keys and all(key.startswith(prefix) for key in keys):
            return f"; every key begins with {prefix!r}, as other programs write it: take that off"
    return ""


def _report(name: str, problems: Sequence[tuple[str, str]], what_else: str = "") -> str:
    kinds: dict[str, list[str]] = defaultdict(list)
    for kind, text in problems:
        kinds[kind].append(text)
    counts = ", ".join(f"{len(texts)} {kind}" for kind, texts in kinds.items())
    lines = [f"{name} does not fit this model: {counts}{what_else}"]
    for kind, texts in kinds.items():
        lines += [f"  {kind}: {text}" for text in texts[:SHOWN_PER_KIND]]
        if len(texts) > SHOWN_PER_KIND:
            lines.append(f"  {kind}: ... and {len(texts) - SHOWN_PER_KIND} more")
    return "\n".join(lines)


def best_table(tensors: Iterable[Tensor], tables: Sequence[Sequence[Entry]]) -> Sequence[Entry]:
    """The table that most keys match: the layout of the file."""
    if len(tables) == 1:
        return tables[0]
    keys = [tensor.key for tensor in tensors]

    def count(table: Sequence[Entry]) -> int:
        patterns = [re.compile(entry.pattern) for entry in table]
        return sum(any(pattern.fullmatch(key) for pattern in patterns) for key in keys)

    return max(tables, key=count)
