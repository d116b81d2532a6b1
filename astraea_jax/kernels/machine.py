"""What the kernels need to know of the GPU at hand: compute capability and processors."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

WIDEST = 128
"""Channels of a head that the kernels take at most."""

KINDS = {
    "GH200": (9, 0, 132),
    "H200": (9, 0, 132),
    "H100": (9, 0, 132),
    "A100": (8, 0, 108),
    "A10": (8, 6, 72),
    "RTX 3090": (8, 6, 82),
    "L40": (8, 9, 142),
    "L4": (8, 9, 58),
    "RTX 4090": (8, 9, 128),
    "B200": (10, 0, 148),
}
"""Name in the device's kind -> compute capability and processors, where only a name is given.

Longer names first, so that "H200" does not hide "GH200" nor "L4" "L40".
"""


class Gpu(NamedTuple):
    """The GPU that a program is traced for.

    Attributes:
      capability: compute capability, as (9, 0).
      processors: streaming multiprocessors.
      kind: its name.
    """

    capability: tuple[int, int]
    processors: int
    kind: str

    @property
    def version(self) -> str:
        """The compute capability as NVIDIA writes it: "9.0"."""
        return ".".join(map(str, self.capability))


def gpu() -> Gpu | None:
    """The GPU of the mesh in use if it names a device, else the first of this process, else None.

    A mesh that names a device (`jax.sharding.AbstractMesh(..., abstract_device=...)`) lets a
    machine without a GPU trace and lower for one.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        device = jax.devices()[0]
    if device.platform not in ("gpu", "cuda"):
        return None
    known = next((value for name, value in KINDS.items() if name in device.device_kind), None)
    major, minor, processors = known or (0, 0, 1)
    stated = getattr(device, "compute_capability", None)
    if stated:
        major, minor = (int(part) for part in str(stated).split("."))
    for name in ("core_count", "num_cores"):  # of a device, of the description of one
        processors = getattr(device, name, None) or processors
    return Gpu((major, minor), processors, device.device_kind)


def refusal(here: Gpu, width: int, dtype) -> str | None:
    """Why no kernel can take heads of this width and dtype on this GPU; None if one may."""
    if here.capability < (8, 0):
        return f"needs compute capability 8.0 or more; {here.kind} has {here.version}"
    if jnp.dtype(dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)):
        return f"takes bfloat16 and float16; got {jnp.dtype(dtype).name}: cast, or use xla"
    if width > WIDEST:
        return f"takes head widths to {WIDEST}; got {width}: use xla"
    return None
