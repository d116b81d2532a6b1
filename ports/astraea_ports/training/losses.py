"""The losses of a run: the file that keeps them, and a picture of them."""

import math
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from astraea_jax import files

_FILE = "losses.npy"


def write_losses(folder: pathlib.Path, losses: Sequence[float]) -> None:
    """Keeps the loss of every step in a run's folder."""
    with files.replacing(folder / _FILE) as partial:
        np.save(partial, np.asarray(losses, np.float32))


def read_losses(folder: pathlib.Path, steps: int) -> Float[np.ndarray, " steps"]:
    """The loss of each of a run's first steps; NaN where none was kept."""
    try:
        losses = np.load(files.check_input(folder / _FILE), allow_pickle=False)
        losses = losses.astype(np.float32, casting="same_kind").reshape(len(losses))
    except (OSError, ValueError, TypeError, EOFError, MemoryError):  # none, or no such file
        losses = np.zeros(0, np.float32)
    # A picture without its beginning is no reason not to go on.
    return np.pad(losses[:steps], (max(0, steps - len(losses)), 0), constant_values=math.nan)


def draw_losses(path: pathlib.Path, losses: np.ndarray) -> None:
    """The loss of every step and its running mean, as a picture."""
    # Without pyplot, whose backend is the user's. Slow to import.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(losses, color="0.8", linewidth=0.5)
    window = max(1, len(losses) // 100)
    if len(losses):
        mean = np.convolve(losses, np.ones(window) / window, "valid")
        axes.plot(np.arange(window - 1, len(losses)), mean, color="C0")
        shown = losses[np.isfinite(losses)]
        if len(shown):
            axes.set_ylim(*np.quantile(shown, (0.0, 0.995)) * (0.95, 1.05))
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    with files.replacing(path) as partial:
        figure.savefig(partial, dpi=120)
