"""A whole Wan on disk that compiles in a fraction of the shipped one's time."""

import json
import pathlib
import shutil

import numpy as np
from helpers import FIXTURES
from safetensors.numpy import load_file, save_file

from astraea_ports import tiny

WAN = FIXTURES / "wan"


KEPT = {
    "encoder.down_blocks": {"0": "0", "2": "1", "3": "2", "5": "3", "9": "4"},
    "decoder.up_blocks": {"0": "0", "2": "1", "3": "2"},
}
"""Of the recorded VAE's layers those of a smaller one, and what they are called there."""


def fewer_layers(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A VAE of three stages of one block each, where the recorded one has four of two."""
    smaller = {}
    for key, tensor in tensors.items():
        part, kind, *rest = key.split(".", 3)
        numbers = KEPT.get(f"{part}.{kind}")
        if numbers is None:
            smaller[key] = tensor
        elif rest[0] in numbers and not rest[1].startswith("resnets.2."):
            smaller[".".join((part, kind, numbers[rest[0]], rest[1]))] = tensor
    return smaller


def write_small_wan(folder: pathlib.Path) -> pathlib.Path:
    """A very small Wan in the Diffusers layout, from the recorded fixtures' weights."""
    for part in ("scheduler", "tokenizer"):
        shutil.copytree(tiny.FOLDER / part, folder / part)
    shutil.copy(tiny.FOLDER / "model_index.json", folder)
    encoder = load_file(WAN / "umt5_diffusers.safetensors")
    words = np.random.default_rng(0).normal(size=(512, 32)).astype(np.float32)
    encoder = {k: words if v.shape[0] == 97 else v for k, v in encoder.items()}
    weights = {
        "transformer/diffusion_pytorch_model": load_file(WAN / "transformer_diffusers.safetensors"),
        "vae/diffusion_pytorch_model": fewer_layers(load_file(WAN / "vae_diffusers.safetensors")),
        "text_encoder/model": encoder,
    }
    configs = {
        "transformer": {
            "num_attention_heads": 3, "attention_head_dim": 16, "num_layers": 2, "ffn_dim": 128,
            "text_dim": 32, "freq_dim": 64,
        },
        "vae": {
            "base_dim": 4, "dim_mult": [1, 2, 2], "num_res_blocks": 1,
            "temperal_downsample": [False, True],
            "scale_factor_spatial": 4, "scale_factor_temporal": 2,
        },
        "text_encoder": {"d_model": 32, "d_kv": 8, "d_ff": 64},
    }  # fmt: skip
    for part, changes in configs.items():
        (folder / part).mkdir()
        config = json.loads((tiny.FOLDER / part / "config.json").read_text())
        (folder / part / "config.json").write_text(json.dumps(config | changes))
    for name, tensors in weights.items():
        save_file(tensors, folder / f"{name}.safetensors")
    sizes = {"frames": 5, "height": 32, "width": 32, "steps": 2, "guidance": 2.0}
    (folder / "astraea.json").write_text(json.dumps(sizes))
    return folder
