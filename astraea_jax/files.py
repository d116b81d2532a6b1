"""Output files that are there whole or not at all."""

import contextlib
import fcntl
import os
import pathlib
import tempfile
from collections.abc import Collection, Iterator
from typing import BinaryIO


def check_output(path: str | os.PathLike, suffixes: Collection[str]) -> pathlib.Path:
    """Returns `path` if a file can be written there; call it before any long work.

    Args:
      path: the file to be written; it may exist already.
      suffixes: those allowed, as ".mp4"; compared without regard to case.

    Raises:
      ValueError: the folder does not exist or can't be written to, `path` is a folder, or its
        suffix is none of `suffixes`.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        raise ValueError(f"expected a file to write; {path} is a folder: add a file name")
    if path.suffix.lower() not in suffixes:
        known = " or ".join(suffixes)
        raise ValueError(f"expected a file name that ends in {known}; got {path.name!r}")
    if not path.parent.is_dir():
        raise ValueError(f"expected an existing folder for {path}; {path.parent} is none: make it")
    try:
        # Trying is the only test that sees read-only disks as well as permissions.
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ValueError(
            f"can't write to folder {path.parent} ({error.strerror}): choose another for {path}"
        ) from error
    return path


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Gives a temporary name beside `path`, and renames it to `path` if the block ends well.

    If it does not, Ctrl-C included, what was at `path` before is untouched and nothing is left.
    """
    path = pathlib.Path(path)
    # The suffix stays last: encoders choose the format by it.
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def held(path: str | os.PathLike, *, choose: str = "another folder") -> Iterator[BinaryIO]:
    """Opens a file for reading and appending, and holds it until the block or the process ends.

    One process holds a file at a time; the hold ends with it, even where it is killed. What is
    written goes to the disk unbuffered.

    Args:
      path: the file; it and its folder are made where they are missing.
      choose: what the message proposes.

    Raises:
      ValueError: another process holds the file, or it can't be made or written to.
    """
    path = pathlib.Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+b", buffering=0)  # noqa: SIM115
    except OSError as error:
        raise ValueError(f"can't write {path} ({error.strerror}): choose {choose}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"{path} is in use by another run: wait for it, or choose {choose}"
            ) from error
        yield file
