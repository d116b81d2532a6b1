"""Compiled programs, kept on disk for the next run."""

import pathlib
import warnings

import jax

from astraea_jax import files

NO_HOME = "not kept: there is no home folder; set XDG_CACHE_HOME"


def folder() -> pathlib.Path | None:
    """Where compiled programs are kept: private to the user, since they are run."""
    return files.cache_folder("compiled")


def keep() -> None:
    """Keeps compiled programs on disk, unless the user has said where (or that none are kept).

    Warns:
      UserWarning: there is no folder for them; it is done without.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return
    path = folder()
    if path is None:
        warnings.warn(f"compiled programs are {NO_HOME}", stacklevel=2)
        return
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        said = f"compiled programs are not kept: {path} can't be made ({files.reason(error)})"
        warnings.warn(said, stacklevel=2)
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
