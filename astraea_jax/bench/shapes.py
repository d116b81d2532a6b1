"""Shapes of attention in real models, by name: what is timed, and what the tests trace."""

from typing import NamedTuple


class Shape(NamedTuple):
    """One attention of a model.

    Attributes:
      batch: rows of the batch; of OpenSora's, which attends within a frame or along time, groups.
      tokens: keys, N.
      heads: A.
      width: channels of a head, C.
    """

    batch: int
    tokens: int
    heads: int
    width: int

    def flops(self, queries: int) -> float:
        """Operations that are of use: two products, a multiplication and an addition each."""
        return 4.0 * self.batch * self.heads * queries * self.tokens * self.width

    def bytes(self, queries: int) -> float:
        """Bytes that must be moved at two a number: queries, keys and values in, rows out."""
        return 4.0 * self.batch * self.heads * (queries + self.tokens) * self.width

    def floor(self, queries: int) -> float:
        """Seconds below which no kernel can be on an H200: operations or bytes, the slower."""
        return max(self.flops(queries) / H200_FLOPS, self.bytes(queries) / H200_BYTES)


# What an H200 sustains in bfloat16 products and in copies, a second.
H200_FLOPS = 790e12
H200_BYTES = 4.3e12

SHAPES = {
    # Wan 2.1 1.3B, 480 x 832: 30 x 52 tokens for each of 9, 17 and 21 latent frames.
    "wan-33": Shape(1, 14_040, 12, 128),
    "wan-65": Shape(1, 26_520, 12, 128),
    "wan-81": Shape(1, 32_760, 12, 128),
    # Wan 2.1 14B, 720 x 1280, 81 frames: 45 x 80 x 21 tokens.
    "wan-14b-720p": Shape(1, 75_600, 40, 128),
    # OpenSora 1.2, 480p: 1590 tokens a frame, 15 or 30 latent frames.
    "opensora-spatial-15": Shape(15, 1590, 16, 72),
    "opensora-spatial-30": Shape(30, 1590, 16, 72),
    "opensora-temporal-15": Shape(1590, 15, 16, 72),
    "opensora-temporal-30": Shape(1590, 30, 16, 72),
}
SHARES = (1.0, 0.7, 0.5, 0.4, 0.1)


def rows(shape: Shape, share: float) -> int:
    """Selected queries, at least one."""
    return max(1, round(shape.tokens * share))
