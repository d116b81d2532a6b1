"""Where what was made is kept when it can't be written, or decoded, as it was to be."""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Callable, Sequence

import numpy as np
from av.error import FFmpegError

from astraea_jax import files, video
from astraea_jax.checks import Refusal

NOWHERE = "and nowhere else is there room for what was made"


def video_or_latents(suffix: str, picture: np.ndarray, arrays: Sequence[np.ndarray]) -> str:
    """Keeps a video, or where it can't be encoded the latents of each run; says where.

    Args:
      suffix: of the file that could not be written.
      picture: the video.
      arrays: the latents.
    """

    def write(folder: pathlib.Path) -> str:
        with contextlib.suppress(OSError, FFmpegError, Refusal):
            path = folder / f"video{suffix.lower()}"
            video.write_video(path, picture)
            return f"the video is kept as {path}"
        return _write_latents(folder, arrays)

    return _somewhere(write)


def latents(arrays: Sequence[np.ndarray]) -> str:
    """Keeps the latents of each run, one after another; says where."""
    return _somewhere(lambda folder: _write_latents(folder, arrays))


def _write_latents(folder: pathlib.Path, arrays: Sequence[np.ndarray]) -> str:
    path = folder / "latents.npy"
    with files.replacing(path) as partial:
        np.save(partial, np.concatenate(arrays))
    return f"the latents are kept as {path}"


def _somewhere(write: Callable[[pathlib.Path], str]) -> str:
    """Writes into a new folder among temporary files or here, wherever there is room."""
    for parent in dict.fromkeys((tempfile.gettempdir(), os.getcwd())):
        with contextlib.suppress(OSError):
            folder = pathlib.Path(tempfile.mkdtemp(prefix="astraea-", dir=parent))
            try:
                return write(folder)
            except (OSError, Refusal):
                folder.rmdir()
    return NOWHERE


def why(path: pathlib.Path, error: Exception) -> str:
    """Why a file was not written."""
    said = isinstance(error, Refusal)
    return str(error) if said else f"can't write {path} ({files.reason(error)})"
