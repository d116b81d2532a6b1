"""The mean of several models that were trained from the same weights.

Runs that begin at one model and see other clips end in one basin, on its walls: their mean lies
nearer to the floor than any of them, and costs no more to run. Source: Wortsman et al. 2022, Model
soups.
"""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence

import ml_dtypes  # noqa: F401 - without it NumPy knows no bfloat16
import numpy as np
from safetensors import safe_open

from astraea_jax import report
from astraea_ports import checkpoints, export
from astraea_ports.checkpoints import Tensor


def average_models(
    models: Sequence[str | os.PathLike[str]],
    target: pathlib.Path,
    *,
    shares: Sequence[float] | None = None,
    parts: Sequence[str] = ("transformer", "text_encoder"),
) -> None:
    """Writes a Diffusers folder whose weights are the mean of several folders' weights.

    Args:
      models: folders or hub ids of one architecture; what is not averaged comes from the first.
      target: folder to make; it must not hold anything yet.
      shares: of each model, any numbers with a positive sum, which are scaled to 1; None is equal
        shares.
      parts: folders whose weights are averaged, in float32; written in the first's dtype.

    Raises:
      ValueError: fewer than two models, shares that don't fit them, models that differ in the keys
        or shapes of a part, a target that holds something, or a full disk.
    """
    if len(models) < 2:
        raise ValueError(f"a mean takes at least two models; got {len(models)}")
    weights = np.full(len(models), 1.0) if shares is None else np.asarray(shares, np.float64)
    if weights.shape != (len(models),):
        raise ValueError(f"expected a share for each of {len(models)} models; got {len(weights)}")
    if not (np.isfinite(weights).all() and weights.sum() > 0):
        raise ValueError(f"shares must be numbers with a positive sum; got {list(weights)}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} holds something already: name a new folder")
    weights = weights / weights.sum()
    folders = [checkpoints.model_folder(model) for model in models]
    found = {part: [_tensors(folder / part) for folder in folders] for part in parts}
    for part, of_models in found.items():
        _check_alike(of_models, folders, part)
    for part, of_models in found.items():
        name = checkpoints.checkpoint_files(folders[0] / part)[0].name
        means = {key: _mean(key, of_models, weights) for key in of_models[0]}
        export.write_tensors(target / part / name, means)
    export.copy_model(folders[0], target, but=tuple(parts), without=("schedules",))
    report.write_json(target / "training.json", _about(folders, weights))


def _tensors(folder: pathlib.Path) -> dict[str, Tensor]:
    return {tensor.key: tensor for tensor in export.checkpoint_tensors(folder)}


def _check_alike(
    found: Sequence[Mapping[str, Tensor]], folders: Sequence[pathlib.Path], part: str
) -> None:
    """Refuses models of another architecture than the first's."""
    shapes = [{key: tensor.shape for key, tensor in tensors.items()} for tensors in found]
    for folder, other in zip(folders[1:], shapes[1:], strict=True):
        odd = sorted(
            key for key in shapes[0].keys() | other if shapes[0].get(key) != other.get(key)
        )
        if odd:
            raise ValueError(
                f"the {part} of {folder} is not of the kind of {folders[0]}'s: {odd[0]} is "
                f"{other.get(odd[0], 'missing')} and not {shapes[0].get(odd[0], 'there')}"
            )


def _mean(key: str, found: Sequence[Mapping[str, Tensor]], weights: np.ndarray) -> np.ndarray:
    total, dtype = np.float32(0), None
    for tensors, weight in zip(found, weights, strict=True):
        with safe_open(tensors[key].file, framework="numpy") as handle:
            value = handle.get_tensor(key)
        dtype = dtype or value.dtype
        total = total + np.float32(weight) * value.astype(np.float32)
    return np.asarray(total).astype(dtype)


def _about(folders: Sequence[pathlib.Path], weights: np.ndarray) -> dict:
    """What the models say of their training, with their shares."""
    runs = []
    for folder, weight in zip(folders, weights, strict=True):
        path = folder / "training.json"
        said = json.loads(path.read_text()) if path.is_file() else {}
        runs.append({"share": round(float(weight), 6), "training": said})
    return {"mean of": runs}
