"""Files: inputs that are what they should be, outputs that are there whole or not at all."""

import contextlib
import hashlib
import json
import os
import pathlib
import stat
import sys
from collections.abc import Collection, Iterator
from typing import Any, BinaryIO

from astraea_jax.checks import Refusal, shown

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

JSON_BYTES = 16 << 20
"""The largest file of JSON or text that is read."""

_LOCKED_BYTE = 1 << 40
"""Where Windows locks a file: past all that it holds, since a locked byte can't be read."""


def as_path(path: Any) -> pathlib.Path:
    """Text or a path as a path; Refusal for anything else."""
    if not isinstance(path, str | os.PathLike):
        raise Refusal(f"expected the name of a file or folder; got {shown(path)}")
    return pathlib.Path(path)


def check_input(
    path: str | os.PathLike, *, what: str = "file", largest: int | None = None
) -> pathlib.Path:
    """Returns `path` if it is a regular file of at most `largest` bytes.

    Anything else may hang the one who reads it (a FIFO) or never end (a device).

    Raises:
      Refusal: there is no such file, it is no regular file, or it is too large.
    """
    path = as_path(path)
    try:
        found = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise Refusal(f"expected a {what} at {path} ({reason(error)}): check the name") from error
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "no regular file"
        raise Refusal(f"expected a {what} at {path}; it is {kind}: name a file")
    if largest is not None and found.st_size > largest:
        raise Refusal(
            f"expected a {what} of at most {largest} bytes at {path}; it has {found.st_size}: "
            "is it another kind of file?"
        )
    return path


def read_text(
    path: str | os.PathLike, *, what: str = "text file", largest: int = JSON_BYTES
) -> str:
    """What a regular file of UTF-8 text holds.

    Raises:
      Refusal: as `check_input`, or it can't be read or is no text.
    """
    path = check_input(path, what=what, largest=largest)
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(f"expected a {what} at {path}; it can't be read ({reason(error)})") from error


def read_json(
    path: str | os.PathLike, *, what: str = "file of JSON", largest: int = JSON_BYTES
) -> Any:
    """What a regular file of JSON holds; NaN and Infinity are no JSON.

    Raises:
      Refusal: as `check_input`, or it can't be read, is no JSON, or is nested too deep.
    """
    text = read_text(path, what=what, largest=largest)
    try:
        return json.loads(text, parse_constant=_no_json)
    except (ValueError, RecursionError) as error:
        said = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise Refusal(
            f"{path} is not valid JSON ({said}); expected a {what}: mend it or fetch it again"
        ) from error


def _no_json(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def reason(error: BaseException) -> str:
    """Why an operation failed, in a few words of one line."""
    said = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return said.splitlines()[0][:200]


def cache_folder(name: str) -> pathlib.Path | None:
    """The user's own folder `name` for what can be made again; None for a user without a home."""
    base = os.environ.get("XDG_CACHE_HOME")
    if not base:
        try:
            home = pathlib.Path.home()
        except RuntimeError:  # no HOME, and no account to ask for it
            return None
        if not home.is_absolute():
            return None
        base = home / ".cache"
    return pathlib.Path(base) / "astraea_jax" / name


def check_output(path: str | os.PathLike, suffixes: Collection[str]) -> pathlib.Path:
    """Returns `path` if a file can be written there; call it before any long work.

    Args:
      path: the file to be written; it may exist already. A link is followed.
      suffixes: those allowed, as ".mp4"; compared without regard to case.

    Raises:
      Refusal: its suffix is none of `suffixes`, or no file can be made there: the folder is not
        there, can't be written to or is full, the name is too long, or `path` is something else
        than a file.
    """
    path = as_path(path)
    target, found = _target(path)
    if found is not None and stat.S_ISDIR(found.st_mode):
        raise Refusal(f"expected a file to write; {path} is a folder: add a file name")
    if path.suffix.lower() not in suffixes:
        known = " or ".join(suffixes)
        raise Refusal(f"expected a file name that ends in {known}; got {path.name!r}")
    if found is not None and not stat.S_ISREG(found.st_mode):
        raise Refusal(f"expected a file to write; {path} is no regular file: choose another name")
    if found is not None and not os.access(target, os.W_OK):
        raise Refusal(f"{path} is there and may not be written to: choose another name")
    if not target.parent.is_dir():
        raise Refusal(f"expected an existing folder for {path}; {target.parent} is none: make it")
    partial = _partial(target)
    try:
        # Trying is the only test that sees read-only and full disks as well as permissions.
        with partial.open("wb") as file:
            file.write(bytes(4096))
            file.flush()
    except OSError as error:
        raise Refusal(
            f"can't write to folder {target.parent} ({reason(error)}): choose another for {path}"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    return path


def check_folder(path: str | os.PathLike) -> pathlib.Path:
    """Returns `path` if it is a folder, or one can be made there; what this tries is undone.

    Raises:
      Refusal: it is something else, or can't be made or written to.
    """
    path, made = as_path(path), []
    try:
        for each in reversed([path, *path.parents]):
            if not each.is_dir():
                each.mkdir()
                made.append(each)
        probe = _partial(path / "probe")
        with contextlib.suppress(FileNotFoundError):
            probe.unlink()
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise Refusal(f"can't write to folder {path} ({reason(error)}): choose another") from error
    finally:
        for each in reversed(made):
            with contextlib.suppress(OSError):
                each.rmdir()
    return path


def check_apart(output: str | os.PathLike, *inputs: str | os.PathLike | None) -> None:
    """Refuses an output that is one of the inputs: it would be lost."""
    for path in inputs:
        if path is not None and same_place(path, output):
            raise Refusal(f"{output} would be written over what is read: choose another name")


def same_place(one: str | os.PathLike, other: str | os.PathLike) -> bool:
    """Whether two names are of one place, links followed; Refusal for what is no path."""
    return _resolved(one) == _resolved(other)


def _resolved(path: str | os.PathLike) -> pathlib.Path:
    """The path with its links followed."""
    try:
        return as_path(path).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a null byte
        raise Refusal(f"{path} is no path ({reason(error)}): choose another name") from error


def _target(path: pathlib.Path) -> tuple[pathlib.Path, os.stat_result | None]:
    """The file that a path stands for, links followed, and what is there."""
    try:
        found = path.stat()
    except FileNotFoundError as error:
        if path.is_symlink():
            raise Refusal(
                f"{path} is a link to {os.readlink(path)}, which is not there: choose another name"
            ) from error
        return path, None
    except (OSError, ValueError) as error:  # too long a name, links in a circle, a null byte
        raise Refusal(f"can't write {path} ({reason(error)}): choose another name") from error
    return (_resolved(path) if path.is_symlink() else path), found


def _partial(target: pathlib.Path) -> pathlib.Path:
    """A temporary name beside a file, short whatever the file's.

    The suffix stays last: encoders choose the format by it.
    """
    mark = hashlib.sha256(os.fsencode(target.name)).hexdigest()[:8]
    return target.with_name(f".{mark}.{os.getpid()}.partial{target.suffix}")


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Gives a temporary name beside `path`, and renames it to `path` if the block ends well.

    If it does not, Ctrl-C included, what was at `path` before is untouched and nothing is left.

    Raises:
      Refusal: the system would not write it.
    """
    target, _ = _target(as_path(path))
    partial = _partial(target)
    try:
        yield partial
        os.replace(partial, target)
    except OSError as error:
        raise Refusal(
            f"can't write {path} ({reason(error)}): make room or choose another name"
        ) from error
    finally:
        with contextlib.suppress(OSError):
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
      Refusal: another process holds the file, it is no regular file, or it can't be made or
        written to.
    """
    path = as_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            check_input(path)
        file = open(path, "a+b", buffering=0)  # noqa: SIM115
    except (OSError, Refusal, ValueError) as error:  # ValueError: a null byte in the name
        raise Refusal(f"can't write {path} ({reason(error)}): choose {choose}") from error
    with file:
        try:
            _lock(file)
        except OSError as error:
            raise Refusal(
                f"{path} is in use by another run: wait for it, or choose {choose}"
            ) from error
        yield file


def _lock(file: BinaryIO) -> None:
    """Holds an open file against other processes; OSError where one of them has it."""
    if sys.platform == "win32":
        file.seek(_LOCKED_BYTE)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        file.seek(0)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
