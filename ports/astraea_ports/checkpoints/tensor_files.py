"""Files of weights: their headers, and one tensor at a time.

Safetensors files are mapped into memory for one tensor and let go, so that what was read does not
stay with the process. PyTorch's pickles are opened by torch's own loader for weights alone, where
torch is installed; nothing here unpickles. Whatever is read is finite, or refused by its name.
"""

import importlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from astraea_jax import files as disk
from astraea_jax.checks import Refusal

PICKLES = (".pth", ".pt")
"""Suffixes of PyTorch's own format, which holds code as well as numbers."""

FP8 = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
"""Floats of one byte by their name in a header; safetensors' NumPy side does not know them."""

FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16", *FP8})
"""What weights may be, by their name in a header."""

INTEGER_DTYPES = frozenset({"I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8"})

HEADER_BYTES, MOST_TENSORS, LONGEST_NAME = 16 << 20, 10_000, 500
"""Ceilings of a file: the largest models have headers of 200 KiB and 1,500 tensors."""

_INFINITE = {
    np.dtype(np.float64): 0x7FF0_0000_0000_0000,
    np.dtype(np.float32): 0x7F80_0000,
    np.dtype(np.float16): 0x7C00,
    np.dtype(ml_dtypes.bfloat16): 0x7F80,
    np.dtype(ml_dtypes.float8_e5m2): 0x7C,
    np.dtype(ml_dtypes.float8_e4m3fn): 0x7F,
}
"""The bits of an exponent that stand for NaN and infinity; e4m3fn has one NaN and no infinity."""

_CHECKED_AT_ONCE = 1 << 18  # values; what is checked stays in a core's own cache

_FORMATS = (
    (b"GGUF", "a GGUF file, quantised for other programs"),
    (b"PK\x03\x04", "a PyTorch pickle (.bin, .ckpt, .pth) or another zip archive"),
    (b"\x80", "a Python pickle"),
    (b"version https://git-lfs", "a git-lfs pointer, not the file that it stands for"),
    (b"<", "a web page"),
)
"""First bytes of what is taken for weights; looked at once a file is known to be none of ours."""


class Tensor(NamedTuple):
    """What a header says of a tensor, and the file it is in."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    file: Path


class TensorFiles:
    """Several files of weights, read tensor by tensor."""

    def __init__(self, files: Sequence[Path]):
        """Opens nothing but .pth files, whose tensors torch maps into memory."""
        self.files = tuple(files)
        self._pickled = {file: _unpickle(file) for file in files if file.suffix in PICKLES}
        self._headers: dict[Path, Mapping[str, Any]] = {}

    def tensors(self) -> list[Tensor]:
        """Every tensor of every file, by the headers.

        Raises:
          Refusal: a file is no regular file, truncated, corrupt, of another format, holds a name
            twice, or more tensors or longer names than any model has.
        """
        found = []
        for file in self.files:
            if file in self._pickled:
                for key, value in self._pickled[file].items():
                    name = _TORCH_DTYPES.get(str(value.dtype), str(value.dtype))
                    found.append(Tensor(key, name, tuple(value.shape), file))
                continue
            header = self._header(file)
            with _open(file) as handle:
                for key in handle.keys():  # noqa: SIM118 - a file handle, no mapping
                    about = header[key]
                    found.append(Tensor(key, about["dtype"], tuple(about["shape"]), file))
        if len(found) > MOST_TENSORS:
            raise Refusal(
                f"expected at most {MOST_TENSORS} tensors in {_listed(self.files)}; got "
                f"{len(found)}: it is no model of this kind"
            )
        return found

    def metadata(self, file: Path) -> Mapping[str, str]:
        """The texts that a safetensors header holds beside its tensors."""
        return self._header(file).get("__metadata__", {})

    def read(self, tensor: Tensor) -> np.ndarray:
        """The numbers of a tensor.

        Raises:
          Refusal: they can't be read, or one is NaN or infinite.
        """
        if tensor.file in self._pickled:
            values = _to_numpy(self._pickled[tensor.file][tensor.key])
        elif tensor.dtype in FP8:
            values = self._read_fp8(tensor)
        else:
            # Opened anew each time: closing is what takes the pages that were read off the process.
            with _open(tensor.file) as handle:
                values = handle.get_tensor(tensor.key)
        if not all_finite(values):
            raise Refusal(
                f"{tensor.key} in {tensor.file} holds NaN or infinity; expected numbers: the file "
                "is broken or its training failed, fetch it again or use another"
            )
        return values

    def _read_fp8(self, tensor: Tensor) -> np.ndarray:
        start, end = self._header(tensor.file)[tensor.key]["data_offsets"]
        with tensor.file.open("rb") as file:
            # Offsets count from the header's end; its length is the file's first eight bytes.
            file.seek(int.from_bytes(file.read(8), "little") + start, os.SEEK_CUR)
            values = np.frombuffer(file.read(end - start), np.uint8)
        return values.view(FP8[tensor.dtype]).reshape(tensor.shape)

    def _header(self, file: Path) -> Mapping[str, Any]:
        """What a header says, once the library found it sound."""
        if file not in self._headers:
            with _open(file), file.open("rb") as raw:
                text = raw.read(int.from_bytes(raw.read(8), "little"))
            self._headers[file] = json.loads(text, object_pairs_hook=lambda p: _once(file, p))
        return self._headers[file]


def read_tensors(file: str | os.PathLike[str], *, largest: int) -> dict[str, np.ndarray]:
    """All tensors of a small file of weights, by name.

    Args:
      file: .safetensors.
      largest: bytes that it may have.

    Raises:
      Refusal: as `TensorFiles`; or the file is larger, or a tensor holds other than finite floats.
    """
    path = disk.check_input(file, what="file of weights", largest=largest)
    opened = TensorFiles([path])
    arrays = {}
    for tensor in opened.tensors():
        if tensor.dtype not in FLOAT_DTYPES:
            raise Refusal(
                f"{tensor.key} in {path}: expected one of {', '.join(sorted(FLOAT_DTYPES))}; got "
                f"{tensor.dtype}"
            )
        arrays[tensor.key] = opened.read(tensor)
    return arrays


def all_finite(values: np.ndarray) -> bool:
    """Whether no value is NaN or infinite; of what is no float, none is.

    By the bits, in pieces: a third of what `np.isfinite` costs, and no array of the tensor's size.
    """
    infinite = _INFINITE.get(values.dtype)
    if infinite is None:
        return True
    bits = values.reshape(-1).view(f"u{values.itemsize}")
    exponents = np.empty(min(bits.size, _CHECKED_AT_ONCE), bits.dtype)
    for start in range(0, bits.size, _CHECKED_AT_ONCE):
        piece = bits[start : start + _CHECKED_AT_ONCE]
        found = np.bitwise_and(piece, bits.dtype.type(infinite), out=exponents[: piece.size])
        if found.max() == infinite:
            return False
    return True


_TORCH_DTYPES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2",
}


def _open(file: Path) -> Any:
    """The library's handle of a file whose header may be read."""
    disk.check_input(file, what="file of weights")
    try:
        with file.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
        if length > HEADER_BYTES:
            raise ValueError(f"its header would have {length} bytes")
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError, ValueError) as error:
        raise Refusal(
            f"{file} is not a readable safetensors file ({_format(file) or disk.reason(error)}); "
            "it is truncated, corrupt or of another format: fetch or convert it again"
        ) from error


def _format(file: Path) -> str | None:
    """What else than safetensors a file is, by its first bytes."""
    try:
        with file.open("rb") as raw:
            first = raw.read(32)
    except OSError:
        return None
    if not first:
        return "it is empty"
    return next((name for start, name in _FORMATS if first.lstrip().startswith(start)), None)


def _once(file: Path, pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a header, whose names come once and are no longer than any model's."""
    names = [name for name, _ in pairs]
    twice = [name for name, count in Counter(names).items() if count > 1]
    # Texts beside the tensors may be long, their names too.
    long = [len(name) for name, about in pairs if isinstance(about, dict)]
    if twice or max(long, default=0) > LONGEST_NAME:
        what = f"the name {twice[0][:80]!r} twice" if twice else f"a name of {max(long)} letters"
        raise Refusal(f"{file} holds {what}: do not trust it, or fetch it again")
    return dict(pairs)


def _listed(files: Sequence[Path]) -> str:
    return str(files[0]) + (f" and {len(files) - 1} more" if len(files) > 1 else "")


def _unpickle(file: Path) -> Mapping[str, Any]:
    """A state dict by torch's loader that runs no code from the file."""
    disk.check_input(file, what="file of weights")
    try:
        # By name: torch is no dependency, and no file of ours may need it to be imported.
        torch = importlib.import_module("torch")
    except ImportError as error:
        raise Refusal(
            f"{file.name} is a PyTorch pickle, which only torch can read: install the extra `pth` "
            "(pip install 'astraea-jax[pth]'), or convert it to .safetensors beside it"
        ) from error
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # pickle, zip and torch each have errors of their own
        # The first sentence: torch's next ones advise to load it without this safety.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
        raise Refusal(
            f"{file} is no file of weights alone ({reason}): do not trust it, or fetch it again"
        ) from error
    if not isinstance(state, Mapping) or not all(
        isinstance(key, str) and hasattr(value, "dtype") for key, value in state.items()
    ):
        raise Refusal(f"expected {file} to hold tensors by name; got a {type(state).__name__}")
    return state


def _to_numpy(value: Any) -> np.ndarray:
    """A torch tensor as numpy, which has no bfloat16 and no float of one byte of its own."""
    torch, name = importlib.import_module("torch"), _TORCH_DTYPES.get(str(value.dtype))
    if name == "BF16":
        return value.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    if name in FP8:
        return value.view(torch.uint8).numpy().view(FP8[name])
    return value.numpy()


def aligned_empty(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """An array of whatever is there, on a boundary that JAX's CPU arrays need."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)
