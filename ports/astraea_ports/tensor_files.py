"""Files of weights: their headers, and one tensor at a time.

Safetensors files are mapped into memory for one tensor and let go, so that what was read does not
stay with the process. PyTorch's pickles are opened by torch's own loader for weights alone, where
torch is installed; nothing here unpickles.
"""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from astraea_jax.checks import Refusal

PICKLES = (".pth", ".pt")
"""Suffixes of PyTorch's own format, which holds code as well as numbers."""


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

    def tensors(self) -> list[Tensor]:
        """Every tensor of every file, by the headers.

        Raises:
          Refusal: a file is truncated, corrupt or of another format.
        """
        found = []
        for file in self.files:
            if file in self._pickled:
                for key, value in self._pickled[file].items():
                    name = _TORCH_DTYPES.get(str(value.dtype), str(value.dtype))
                    found.append(Tensor(key, name, tuple(value.shape), file))
                continue
            with _open(file) as handle:
                for key in handle.keys():  # noqa: SIM118 - a file handle, no mapping
                    view = handle.get_slice(key)
                    found.append(Tensor(key, view.get_dtype(), tuple(view.get_shape()), file))
        return found

    def read(self, tensor: Tensor) -> np.ndarray:
        """The numbers of a tensor."""
        if tensor.file in self._pickled:
            return _to_numpy(self._pickled[tensor.file][tensor.key])
        # Opened anew each time: closing is what takes the pages that were read off the process.
        with _open(tensor.file) as handle:
            return handle.get_tensor(tensor.key)


_TORCH_DTYPES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
}


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError, ValueError) as error:
        raise Refusal(
            f"{file} is not a readable safetensors file ({error}); it is truncated, corrupt or of "
            "another format: fetch or convert it again"
        ) from error


def _unpickle(file: Path) -> Mapping[str, Any]:
    """A state dict by torch's loader that runs no code from the file."""
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
        hasattr(value, "dtype") for value in state.values()
    ):
        raise Refusal(f"expected {file} to hold tensors by name; got a {type(state).__name__}")
    return state


def _to_numpy(value: Any) -> np.ndarray:
    """A torch tensor as numpy, which has no bfloat16 of its own."""
    if str(value.dtype) == "torch.bfloat16":
        bits = value.view(importlib.import_module("torch").uint16)
        return bits.numpy().view(ml_dtypes.bfloat16)
    return value.numpy()


def aligned_empty(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """An array of whatever is there, on a boundary that JAX's CPU arrays need."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)
