"""Wan 2.1 text-to-video."""

from astraea_ports.checkpoints.lora import Lora as Lora
from astraea_ports.pipeline import Made as Made
from astraea_ports.pipeline import Result as Result
from astraea_ports.text.t5 import load_text_encoder as load_text_encoder
from astraea_ports.text.tokenizer import Tokenizer as Tokenizer
from astraea_ports.wan.config import CONFIGS as CONFIGS
from astraea_ports.wan.pipeline import Pipeline as Pipeline
from astraea_ports.wan.transformer import Transformer as Transformer
from astraea_ports.wan.transformer import TransformerConfig as TransformerConfig
from astraea_ports.wan.transformer_weights import load_transformer as load_transformer
from astraea_ports.wan.vae import VAE as VAE
from astraea_ports.wan.vae import VAEConfig as VAEConfig
from astraea_ports.wan.vae_weights import load_vae as load_vae
