"""Clips as latents, a pool of them on the device, slowly replaced by new ones.

What the pool holds before a step is a function of the step alone, so a run that is taken up again
sees the clips that it would have seen.
"""

import concurrent.futures
import functools
import os
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from astraea_jax import checks, report
from astraea_jax.checks import Refusal
from astraea_ports.pipeline.tiles import VAE
from astraea_ports.text.tokenizer import TokenIds, Tokenizer
from astraea_ports.training.clips import Examples, Source


class Latents(NamedTuple):
    """The pool's arrays; clips along the first axis.

    Attributes:
      latents: normalised.
      ids: token ids of the captions.
      mask: 1 for tokens, 0 for padding.
    """

    latents: Float[Array, "P f h w C"]
    ids: Int[Array, "P L"]
    mask: Int[Array, "P L"]


MOST_POOLED = 2**20
"""Clips of a pool: those of the small Wan fill half of the largest GPU."""


def check_plan(size: int, block: int, refresh_every: int) -> None:
    """Refuses a pool's numbers that are none; see `LatentPool`."""
    checks.whole("the clips that are encoded at once", block, 1, MOST_POOLED)
    checks.whole("refresh_every", refresh_every, 0, 2**31 - 1, unit="steps")
    checks.whole("the pool's size", size, 1, MOST_POOLED, unit="clips")
    if size % block:
        raise Refusal(
            f"the pool's size must be a positive multiple of {block} (the clips that are "
            f"encoded at once); got {size}"
        )


def source_block(block: int, refreshed: int, num_blocks: int) -> int:
    """Which block of the stream a block of the pool holds after so many were replaced, in turn."""
    if refreshed <= block:
        return block
    return num_blocks + block + num_blocks * ((refreshed - 1 - block) // num_blocks)


class LatentPool:
    """A pool of clips in blocks; every `refresh_every` steps the oldest block is replaced."""

    def __init__(
        self,
        vae: VAE,
        tokenizer: Tokenizer,
        source: Source,
        *,
        size: int,
        block: int,
        refresh_every: int,
        mesh: Mesh | None = None,
    ):
        """A pool that `bring_to` fills.

        Args:
          vae: encodes the clips, in the dtype of its weights.
          tokenizer: reads the captions.
          source: of the clips.
          size: clips in the pool, a multiple of `block`.
          block: clips that are encoded at once.
          refresh_every: steps from one replaced block to the next; 0 for never.
          mesh: one axis of devices, which share a block's encoding and all hold the pool; None is
            the default device.

        Raises:
          Refusal: a size that is not a multiple of the block, or not positive; a block that
            the devices can't share.
        """
        check_plan(size, block, refresh_every)
        mesh = Mesh(np.array(jax.devices()[:1]), ("batch",)) if mesh is None else mesh
        if block % mesh.size:
            raise Refusal(
                f"the clips that are encoded at once must be a multiple of {mesh.size}, the "
                f"devices that share them; got {block}"
            )
        self.size, self.block, self.refresh_every = size, block, refresh_every
        self._devices = list(mesh.devices.flat)
        self._copied = NamedSharding(mesh, PartitionSpec())
        self._split = NamedSharding(mesh, PartitionSpec(mesh.axis_names[0]))
        self._vae = jax.device_put(vae, self._copied)
        self._tokenizer, self._source = tokenizer, source
        self._encode = jax.jit(
            functools.partial(_encode_shares, mesh=mesh), out_shardings=self._copied
        )
        self._put = jax.jit(_put, donate_argnums=0)
        self._refreshed = -1
        self._arrays: Latents | None = None
        self._worker = concurrent.futures.ThreadPoolExecutor(1)
        self._next: tuple[int, concurrent.futures.Future] | None = None

    @property
    def arrays(self) -> Latents:
        """What the pool holds now."""
        assert self._arrays is not None, "bring_to comes first"
        return self._arrays

    def allocate(self) -> None:
        """Makes the arrays, still empty, so that what reads them can be compiled."""
        first = self._worker.submit(self._make, 0)
        self._next = (0, first)
        shares, tokens = first.result()
        latents = jax.eval_shape(_encode, self._vae, self._drawn(shares))
        block = Latents(latents, *map(jnp.asarray, (tokens.ids, tokens.mask)))
        self._check_memory(sum(x.size * x.dtype.itemsize for x in block) * self.size // self.block)
        self._arrays = jax.tree.map(
            lambda x: jnp.zeros((self.size, *x.shape[1:]), x.dtype, device=self._copied), block
        )

    def _check_memory(self, needed: int) -> None:
        """Refuses a pool that a device can't hold: a CPU would go on until it is killed."""
        held = memory_bytes()
        if held is not None and needed > held:
            raise Refusal(
                f"a pool of {self.size} clips takes {report.human_bytes(needed)}, and the device "
                f"has {report.human_bytes(held)}: ask for a smaller pool"
            )

    def bring_to(self, step: int, said: Callable[[int, int], None] = lambda *_: None) -> None:
        """Makes the pool what `step` is to find; `said(clips done, clips in all)` as it fills."""
        refreshed = step // self.refresh_every if self.refresh_every else 0
        blocks = self.size // self.block
        if self._arrays is None:
            self.allocate()
        if self._refreshed < 0 or not 0 <= refreshed - self._refreshed <= 1:
            for index in range(blocks):
                self._fill(index, source_block(index, refreshed, blocks))
                said((index + 1) * self.block, self.size)
        elif refreshed != self._refreshed:
            self._fill((refreshed - 1) % blocks, blocks + refreshed - 1)
        self._refreshed = refreshed

    def refresh_seconds(self) -> float:
        """How long replacing a block takes, measured on blocks that come out as they were."""
        for block in (0, min(1, self.size // self.block - 1)):
            if self._next is not None:
                self._next[1].result()  # words are made while the device is at work
            jax.block_until_ready(self.arrays)
            began = time.perf_counter()
            self._fill(block, source_block(block, self._refreshed, self.size // self.block))
        jax.block_until_ready(self.arrays)
        return time.perf_counter() - began

    def _fill(self, block: int, number: int) -> None:
        shares, tokens = self._take(number)
        latents = self._encode(self._vae, self._drawn(shares))
        words = jax.device_put((tokens.ids, tokens.mask), self._copied)
        self._arrays = self._put(self.arrays, Latents(latents, *words), block * self.block)

    def _drawn(self, shares: Sequence[Examples]) -> Float[Array, "B F height width 3"]:
        """A block's clips, each drawn by the device that will encode it; all draw at once."""
        parts = []
        for device, examples in zip(self._devices, shares, strict=True):
            with jax.default_device(device):  # drawn and not traced: a source may use NumPy
                parts.append(jax.device_put(examples.video(), device))
        shape = (self.block, *parts[0].shape[1:])
        return jax.make_array_from_single_device_arrays(shape, self._split, parts)

    def _take(self, number: int) -> tuple[list[Examples], TokenIds]:
        """A block of the stream, its words made ahead while the device was at work."""
        if self._next is not None and self._next[0] == number:
            made = self._next[1].result()
        else:
            made = self._make(number)
        following = number + 1
        # Words are host work; the first fill and every refresh go through the stream in order,
        # but for the jump where a resumed pool wraps around, which is made on the spot.
        self._next = (following, self._worker.submit(functools.partial(self._make, following)))
        return made

    def _make(self, number: int) -> tuple[list[Examples], TokenIds]:
        """A block's clips in a share for each device, and the words of all of them."""
        share = self.block // len(self._devices)
        starts = range(number * self.block, (number + 1) * self.block, share)
        shares = [self._source(start, share) for start in starts]
        return shares, self._tokenizer([text for part in shares for text in part.captions])


def _encode(vae: VAE, video: Float[Array, "B F height width 3"]) -> Float[Array, "B f h w C"]:
    """Normalised latents in float16: of unit variance, so its finer mantissa beats bfloat16's."""
    return vae.encode(2 * video - 1).astype(jnp.float16)


def _encode_shares(vae: VAE, video: Array, *, mesh: Mesh) -> Array:
    """The same, each device by itself: left to the compiler, they gather every frame's features."""
    whole, split = PartitionSpec(), PartitionSpec(*mesh.axis_names)
    return jax.shard_map(
        _encode, mesh=mesh, in_specs=(whole, split), out_specs=split, check_vma=False
    )(vae, video)


def _put(pool: Latents, fresh: Latents, start) -> Latents:
    return jax.tree.map(
        lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, start, 0), pool, fresh
    )


def memory_bytes() -> int | None:
    """Bytes of the first device's memory, or of the host's where that is the device."""
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is None and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return limit
