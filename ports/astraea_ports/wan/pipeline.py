"""Prompts to videos with a Wan model."""

from astraea_ports import pipeline
from astraea_ports.wan import parts
from astraea_ports.wan.transformer import Transformer
from astraea_ports.wan.vae import VAE


class Pipeline(pipeline.Pipeline):
    """A Wan model with its parts, in Diffusers' layout or the original one."""

    transformer: Transformer
    vae: VAE

    open_parts = staticmethod(parts.open_parts)
    random_parts = staticmethod(parts.random_parts)
