"""What a file of low-rank changes adds: its scale, wherever it is said, and what is refused."""

import json
import math
import os
import struct
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from astraea_jax.checks import Refusal
from astraea_jax.cli.options import read_lora
from astraea_ports import checkpoints
from astraea_ports.checkpoints import lora
from astraea_ports.checkpoints.lora import Lora
from astraea_ports.wan import transformer_weights
from astraea_ports.wan.config import TransformerConfig
from astraea_ports.wan.transformer_weights import LORA_WORDS

SIZES = {"dim": 48, "num_heads": 3, "in_dim": 16, "out_dim": 16, "text_dim": 32, "freq_dim": 64}
SIZES |= {"ffn_dim": 128, "num_layers": 2, "eps": 1e-6, "model_type": "t2v"}
RANK, ALPHA, WIDTH = 4, 16.0, 48
Q = "blocks.1.attn1.to_q"
PLACE = ("blocks.attn1.to_q.kernel", 1)
RANDOM = np.random.default_rng(0)
DOWN, UP = (RANDOM.normal(size=s).astype("f4") for s in ((RANK, WIDTH), (WIDTH, RANK)))


def read(files, model):
    return lora.read_deltas(files, *model, words=LORA_WORDS)


@pytest.fixture(scope="module")
def model():
    """Shapes and keys of a small Wan: `read_deltas` asks for no more."""
    template = transformer_weights.transformer_template(
        TransformerConfig.from_dict(SIZES), dtype=jnp.float32, precision="reference"
    )
    tables = (transformer_weights.TABLE, transformer_weights.ORIGINAL)
    return checkpoints.parameter_shapes(template), tables


def pair(prefix="transformer.", **more):
    return {f"{prefix}{Q}.lora_A.weight": DOWN, f"{prefix}{Q}.lora_B.weight": UP} | {
        f"{prefix}{Q}.{key}": value for key, value in more.items()
    }


def saved(folder, tensors, metadata=None, name="lora.safetensors"):
    save_file(tensors, folder / name, metadata=metadata)
    return folder / name


def raw(file, tensors):
    """Safetensors by hand: [dtype's name, shape, bytes] by key, where the library won't."""
    header, data = {}, b""
    for key, (dtype, shape, values) in tensors.items():
        offsets = [len(data), len(data) + len(values)]
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += values
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return file


def scale(model, file, strength=1.0):
    """By what the product was multiplied."""
    change = read([Lora(file, strength)], model)[PLACE]()
    unit = (UP @ DOWN).T
    found = float((change * unit).sum() / (unit * unit).sum())
    np.testing.assert_allclose(change, found * unit, rtol=1e-4, atol=1e-5)
    return pytest.approx(found, rel=1e-4)


# --- The scale.

SAID = {"r": RANK, "lora_alpha": ALPHA, "use_rslora": False, "use_dora": False}
SAID |= {"alpha_pattern": {}, "rank_pattern": {}, "target_modules": ["to_q"], "bias": "none"}


def diffusers(said, prefix="transformer."):
    return {"lora_adapter_metadata": json.dumps({prefix + k: v for k, v in said.items()})}


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, 4),
        ({"use_rslora": True}, ALPHA / math.sqrt(RANK)),
        ({"alpha_pattern": {"to_q": 2}}, 0.5),
        ({"alpha_pattern": {"to_k": 2, "attn1.to_q": 8.0}}, 2),
        ({"alpha_pattern": {r"blocks\.1\.attn1\.to_q": 2}}, 0.5),
        ({"alpha_pattern": {"^attn1.to_q": 2, "1.attn2.to_q": 3}}, 4),
        ({"alpha_pattern": {"o_q": 2}}, 4),
        ({"alpha_pattern": {r"blocks\.\d+\..*q": 2}}, 0.5),
        ({"r": 99, "rank_pattern": {"to_q": RANK}}, 4),
        ({"r": 99, "rank_pattern": {Q: RANK}, "use_rslora": True}, 8),
    ],
)
def test_a_scale_that_is_said_beside_the_tensors(tmp_path, model, more, expected):
    said = SAID | more
    assert scale(model, saved(tmp_path, pair(), diffusers(said))) == expected
    assert scale(model, saved(tmp_path, pair(""), diffusers(said, ""))) == expected
    texts = {f"transformer.{k}": str(v) for k, v in said.items() if not isinstance(v, dict)}
    texts |= {f"transformer.{k}": json.dumps(v) for k, v in said.items() if isinstance(v, dict)}
    assert scale(model, saved(tmp_path, pair(), texts), 0.5) == 0.5 * expected
    (tmp_path / "adapter_config.json").write_text(json.dumps(said | {"peft_type": "LORA"}))
    assert scale(model, saved(tmp_path, pair("base_model.model."))) == expected
    # Two places that agree.
    assert scale(model, saved(tmp_path, pair(), diffusers(said))) == expected


def test_where_no_scale_is_said(tmp_path, model):
    assert scale(model, saved(tmp_path, pair())) == 1
    # Of a file's own words for how it was trained kohya's reader makes none: its converter
    # multiplies the scale into the tensors, drops the alphas and keeps the words.
    texts = {"ss_network_alpha": "16", "ss_network_dim": "4", "ss_network_module": "networks.lora"}
    assert scale(model, saved(tmp_path, pair(), texts)) == 1
    said = {f"text_encoder.{key}": value for key, value in SAID.items()}
    texts = {"lora_adapter_metadata": json.dumps(said), "text_encoder.lora_alpha": "3"}
    assert scale(model, saved(tmp_path, pair(), texts)) == 1


def test_a_config_belongs_to_the_file_that_was_written_with_it(tmp_path, model):
    (tmp_path / "adapter_config.json").write_text(json.dumps(SAID))
    other = saved(tmp_path, pair())
    assert scale(model, other) == 4
    assert scale(model, saved(tmp_path, pair(), name="adapter_model.safetensors")) == 4
    assert scale(model, other) == 1


@pytest.mark.parametrize("alpha", [np.float32(6), np.float32([6]), np.int64(6), np.float16(6)])
def test_an_alpha_among_the_tensors_has_the_last_word(tmp_path, model, alpha):
    (tmp_path / "adapter_config.json").write_text(json.dumps(SAID | {"r": 9}))
    file = saved(tmp_path, pair(alpha=np.asarray(alpha)), diffusers(SAID | {"lora_alpha": 99}))
    assert scale(model, file, -2) == -3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"r": 8}, r"says rank 8, and its tensors have 4"),
        ({"rank_pattern": {"to_q": 8}}, r"says rank 8, and its tensors have 4"),
        ({"use_dora": True}, "says use_dora: expected a plain LoRA, got a DoRA"),
        ({"lora_alpha": None}, "lora_alpha must be a number above 0"),
        ({"lora_alpha": math.nan}, "lora_alpha must be a number above 0"),
        ({"lora_alpha": -4}, "lora_alpha must be a number above 0"),
        ({"lora_alpha": 1e30}, "lora_alpha must be a number above 0"),
        ({"lora_alpha": "many"}, "lora_alpha must be a number above 0"),
        ({"r": 0}, "r must be an integer in 1"),
        ({"use_rslora": 1}, "use_rslora must be true or false"),
        ({"alpha_pattern": {"to_q": "x"}}, "alpha_pattern 'to_q' must be a number"),
        ({"alpha_pattern": {"(a+)+$": 3}}, "expected names of modules"),
        ({"alpha_pattern": {".*.*.*q": 3}}, "expected names of modules"),
        ({"alpha_pattern": []}, "alpha_pattern must be an object"),
        ({"peft_type": "LOKR"}, "peft_type must be 'LORA'; got 'LOKR'"),
        ({"init_lora_weights": "pissa_niter_4"}, "own weights were changed before"),
    ],
)
def test_what_is_said_of_a_scale_is_checked(tmp_path, model, more, message):
    file = saved(tmp_path, pair(), diffusers(SAID | more))
    with pytest.raises(Refusal, match=message):
        read([Lora(file)], model)


def test_scales_that_contradict_each_other(tmp_path, model):
    (tmp_path / "adapter_config.json").write_text(json.dumps(SAID | {"lora_alpha": 8}))
    file = saved(tmp_path, pair(), diffusers(SAID))
    with pytest.raises(Refusal, match=r"expected one scale, got 4 by lora_adapter.* and 2 by"):
        read([Lora(file)], model)
    os.remove(tmp_path / "adapter_config.json")
    saved(tmp_path, pair(), {"lora_alpha": "3", "transformer.lora_alpha": "4"})
    with pytest.raises(Refusal, match=r"says lora_alpha twice, (3 and 4|4 and 3)"):
        read([Lora(file)], model)
    saved(tmp_path, pair(), {"lora_adapter_metadata": "{"})
    with pytest.raises(Refusal, match=r"lora_adapter_metadata in the header .* is not valid JSON"):
        read([Lora(file)], model)


def test_a_bias_beside_the_product_is_scaled_with_it(tmp_path, model):
    bias = RANDOM.normal(size=WIDTH).astype("f4")
    file = saved(tmp_path, pair() | {f"transformer.{Q}.lora_B.bias": bias}, diffusers(SAID))
    added = read([Lora(file, 0.5)], model)["blocks.attn1.to_q.bias", 1]()
    np.testing.assert_allclose(added, 0.5 * 4 * bias, rtol=1e-6)
    file = saved(tmp_path, pair(diff_b=bias), diffusers(SAID))
    added = read([Lora(file, 0.5)], model)["blocks.attn1.to_q.bias", 1]()
    np.testing.assert_allclose(added, 0.5 * bias, rtol=1e-6)


# --- Names.


@pytest.mark.parametrize(
    ("key", "place"),
    [
        ("diffusion_model.blocks.1.diff_m", ("blocks.scale_shift_table", 1)),
        ("diffusion_model.blocks.1.modulation.diff", ("blocks.scale_shift_table", 1)),
        ("transformer.blocks.1.scale_shift_table.diff", ("blocks.scale_shift_table", 1)),
        ("diffusion_model.head.diff_m", ("scale_shift_table", None)),
        ("diffusion_model.head.modulation.diff", ("scale_shift_table", None)),
    ],
)
def test_differences_of_a_modulation(tmp_path, model, key, place):
    rows = 6 if place[1] is not None else 2
    change = RANDOM.normal(size=(1, rows, WIDTH)).astype("f4")
    added = read([Lora(saved(tmp_path, {key: change}), 2)], model)
    np.testing.assert_allclose(added[place](), 2 * change[0], rtol=1e-6)


ONES = np.ones((WIDTH, WIDTH), "f4")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({f"{Q}.dora_scale": ONES[:, :1]}, "it holds a DoRA"),
        ({f"{Q}.lora_magnitude_vector": ONES[0]}, "it holds a DoRA"),
        ({f"{Q}.lora_magnitude_vector.default.weight": ONES[0]}, "it holds a DoRA"),
        ({"lycoris_blocks_0_self_attn_k.lokr_w1": ONES[:4, :4]}, "it holds a LoKr"),
        ({"lycoris_blocks_0_self_attn_k.hada_w1_a": ONES[:, :4]}, "it holds a LoHa"),
        ({"blocks.0.self_attn.k.oft_blocks": ONES}, "an adapter that is no LoRA"),
        ({"blocks.0.cross_attn.k_img.diff": ONES}, "of an image-to-video Wan"),
        ({"lora_unet_blocks_0_cross_attn_v_img.diff": ONES}, "of an image-to-video Wan"),
        ({"img_emb.proj.1.diff": ONES}, "of an image-to-video Wan"),
        ({"blocks.0.attn2.add_k_proj.diff": ONES}, "of an image-to-video Wan"),
        ({"transformer_2.blocks.0.attn1.to_k.diff": ONES}, "Wan 2.2, for its two experts"),
        ({"vace_blocks.0.self_attn.q.diff": ONES}, "of a Wan with VACE"),
        ({"lora_te_text_model_q.diff": ONES}, "of a text encoder too"),
        ({"blocks.0.attn1.to_k.weight": ONES}, "whole weights, no changes"),
        ({"what": ONES}, r"1 problems; use a LoRA.*\n.*what: expected a name ending in lora_A"),
        ({f"{Q}.lora_down.weight": DOWN}, r"down of blocks.1.attn1.to_q comes twice"),
        ({"blocks.1.self_attn.q.diff": ONES}, "changed twice, under both of its names"),
        ({"blocks.0.attn1.to_k.lora_A.a.weight": DOWN, "blocks.0.attn1.to_k.lora_B.a.weight": UP},
         "expected one adapter, got None, a"),
        ({"blocks.0.attn1.to_k.lora_A.weight": DOWN[:0],
          "blocks.0.attn1.to_k.lora_B.weight": UP[:, :0]}, r"expected down \[rank, in\]"),
        ({"blocks.0.attn1.to_k.lora_A.weight": DOWN,
          "blocks.0.attn1.to_k.lora_B.weight": np.ones((WIDTH, RANK, 3), "f4")},
         r"expected down \[rank, in\] and up \[out, rank\]"),
        ({f"{Q}.diff": ONES[..., None]}, "expected changes of one shape"),
        ({f"{Q}.alpha": ONES}, "alpha: expected one number, got"),
        ({f"{Q}.alpha": np.float32(1e30)[None]}, "alpha must be a number at least -1e"),
        ({f"{Q}.alpha": np.float32(math.nan)[None]}, "to_q.alpha in .* holds NaN or infinity"),
        ({f"{Q}.diff": ONES.astype(np.int8)}, "diff: expected one of BF16, .* got I8"),
    ],
)  # fmt: skip
def test_what_is_no_lora_of_this_model(tmp_path, model, more, message):
    file = saved(tmp_path, pair("") | more)
    with pytest.raises(Refusal, match=message):
        read([Lora(file)], model)


def test_an_empty_file(tmp_path, model):
    with pytest.raises(Refusal, match="this file holds no tensor"):
        read([Lora(saved(tmp_path, {}))], model)


# --- Numbers.


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_eight_bit_floats(tmp_path, model, dtype):
    narrow = ml_dtypes.float8_e4m3fn if dtype == "F8_E4M3" else ml_dtypes.float8_e5m2
    values = {key: value.astype(narrow) for key, value in pair().items()}
    file = raw(
        tmp_path / "x.safetensors",
        {key: (dtype, list(value.shape), value.tobytes()) for key, value in values.items()},
    )
    down, up = (value.astype(np.float32) for value in values.values())
    got = read([Lora(file)], model)[PLACE]()
    np.testing.assert_allclose(got, (up @ down).T, rtol=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", ["f8", "f4", "f2", ml_dtypes.bfloat16])
def test_nan_is_told_by_name_when_it_is_read(tmp_path, model, value, dtype):
    tensors = {key: tensor.astype(dtype) for key, tensor in pair().items()}
    tensors[f"transformer.{Q}.lora_B.weight"][40, 2] = value
    change = read([Lora(saved(tmp_path, tensors))], model)[PLACE]
    with pytest.raises(Refusal, match=r"to_q\.lora_B\.weight in .* holds NaN or infinity"):
        change()


def test_a_change_that_is_too_large(tmp_path, model):
    file = saved(tmp_path, {key: value * np.float32(1e20) for key, value in pair().items()})
    with pytest.raises(Refusal, match=r"change of blocks\.1\.attn1\.to_q\.weight is past float32"):
        read([Lora(file)], model)[PLACE]()


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize("strength", [math.nan, math.inf, -math.inf, 1e30, 101, "1", None, True])
def test_strengths(tmp_path, strength):
    file = saved(tmp_path, pair())
    with pytest.raises(Refusal, match=r"strength of .* must be a number"):
        lora.check([Lora(file, strength)])
    assert lora.check([Lora(file, np.float32(-100)), (str(file), 0)])[1] == (file, 0.0)


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize("given", ["x.safetensors", Lora("x.safetensors"), ["x.safetensors"], None])
def test_a_list_of_files_is_expected(given):
    with pytest.raises(Refusal, match=r"expected a list of Lora\(file, strength\)"):
        lora.check(given)


@pytest.mark.usefixtures("as_a_user")
def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "fifo.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    for name, message in (
        ("fifo.safetensors", "it is no regular file"),
        ("folder.safetensors", "it is a folder"),
        ("none.safetensors", "No such file"),
        ("a\0.safetensors", "null byte"),
        ("lora.pt", "an existing .safetensors file"),
    ):
        with pytest.raises(Refusal, match=message):
            lora.check([Lora(tmp_path / name)])
    with pytest.raises(Refusal, match=r"an existing \.safetensors file; got 3"):
        lora.check([Lora(3)])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:0.8", ("a.safetensors", 0.8)),
        ("a.safetensors:-1e-1", ("a.safetensors", -0.1)),
        (r"C:\x.safetensors", (r"C:\x.safetensors", 1.0)),
        (r"C:\x.safetensors:2", (r"C:\x.safetensors", 2.0)),
        ("a:b/c.safetensors", ("a:b/c.safetensors", 1.0)),
    ],
)
def test_files_with_and_without_a_strength(text, expected):
    assert read_lora(text) == expected


@pytest.mark.parametrize("strength", ["nan", "inf", "-inf", "1e30", "x", "", "0.8.safetensor"])
def test_a_strength_that_is_none(strength):
    with pytest.raises(Refusal, match=r"strength of file\.safetensors must be a number"):
        read_lora(f"file.safetensors:{strength}")


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
