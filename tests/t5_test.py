"""The text encoders against recorded tensors of UMT5 and a plain numpy T5."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import FIXTURES, LAYOUTS, full_size
from safetensors.numpy import load_file, save_file

from astraea_ports import checkpoints, tiny
from astraea_ports.checkpoints.matching import best_table, match_tensors
from astraea_ports.text import t5
from astraea_ports.text.t5 import T5Config, T5Encoder, load_text_encoder

TINY = tiny.FOLDER / "text_encoder"
DEV = {
    "model_type": "umt5",
    "d_model": 32,
    "num_heads": 4,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "vocab_size": 97,
}
WEIGHTS = FIXTURES / "wan/umt5_diffusers.safetensors"
TOLERANCE = 2e-5  # the recordings' README
ENCODE = jax.jit(T5Encoder.__call__)


@pytest.fixture(scope="module")
def recorded():
    tensors = load_file(FIXTURES / "wan/umt5_io.safetensors")
    return {k: jnp.asarray(v, "int32" if v.dtype == np.int64 else None) for k, v in tensors.items()}


@pytest.fixture(scope="module")
def encoder():
    return load_text_encoder(WEIGHTS, config=DEV)


def test_buckets(recorded):
    buckets = t5.relative_position_buckets(np.asarray(recorded["rel_offsets"]))
    np.testing.assert_array_equal(buckets, recorded["rel_bucket"])


@pytest.mark.parametrize("layer", [0, 1])
def test_position_bias(encoder, recorded, layer):
    bias = encoder.bias(encoder.position_bias[...][layer], 12)
    np.testing.assert_array_equal(bias, recorded[f"pos_bias_layer{layer}"][0])


def test_first_block(encoder, recorded):
    block = jax.tree.map(lambda leaf: leaf[0], encoder.blocks)
    x = encoder.embedding[...][recorded["ids"]]
    bias = encoder.bias(encoder.position_bias[...][0], x.shape[1])
    out = block(x, bias, recorded["mask"])
    np.testing.assert_allclose(out, recorded["i.block0_out"], atol=TOLERANCE)


def test_all_rows(encoder, recorded):
    out = ENCODE(encoder, recorded["ids"], recorded["mask"])
    np.testing.assert_allclose(out, recorded["out"], atol=TOLERANCE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_that_are_looked_up_often_get_their_whole_gradient(dtype):
    # The first row a thousand times, as padding and "a" are in a batch of captions.
    ids = jnp.concatenate([jnp.zeros(1000, jnp.int32), jnp.arange(8)]).reshape(12, 84)
    table = jnp.ones((8, 4), dtype)

    def total(table):
        return (t5.look_up(table, ids) * jnp.arange(1, 5)).astype(jnp.float32).sum()

    found = jax.grad(total)(table)
    assert found.dtype == table.dtype
    expected = np.array([1001] + [1] * 7)[:, None] * np.arange(1, 5)
    rounding = 2.0**-8 if dtype == "bfloat16" else 1e-6
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=rounding)


@pytest.mark.parametrize("name", ["square", "wide"])
def test_shipped_checkpoint(name):
    fixture = load_file(FIXTURES / f"tiny_wan/{name}.safetensors")
    out = ENCODE(load_text_encoder(TINY), fixture["ids"], fixture["mask"])
    zeroed = np.where(fixture["mask"][..., None] > 0, out, 0)
    np.testing.assert_allclose(zeroed, fixture["text_embedding"], atol=1e-5)


def t5_file(folder, **changes):
    """UMT5's weights as a T5 has them: relative positions in the first block only."""
    tensors = load_file(WEIGHTS)
    del tensors["encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"]
    path = folder / "model.safetensors"
    save_file({k: v for k, v in (tensors | changes).items() if v is not None}, path)
    return path


def test_t5_shares_the_first_table(tmp_path, encoder, recorded):
    shared = load_text_encoder(t5_file(tmp_path), config=DEV | {"model_type": "t5"})
    assert shared.position_bias.shape == (1, 32, 4)
    table = encoder.position_bias[...]
    copied = jax.tree.map(lambda leaf: leaf, encoder)
    copied.position_bias = nnx.Param(jnp.stack([table[0], table[0]]))
    ids, mask = recorded["ids"], recorded["mask"]
    np.testing.assert_array_equal(ENCODE(shared, ids, mask), ENCODE(copied, ids, mask))


def test_embedding_under_either_name_or_both(tmp_path):
    embedding = load_file(WEIGHTS)["shared.weight"]
    config = DEV | {"model_type": "t5"}
    other = "encoder.embed_tokens.weight"
    for changes in ({"shared.weight": None, other: embedding}, {other: embedding.copy()}):
        loaded = load_text_encoder(t5_file(tmp_path, **changes), config=config)
        np.testing.assert_array_equal(loaded.embedding[...], embedding.astype(np.float32))
    with pytest.raises(ValueError, match=r"expected one value for embedding, got two that differ"):
        load_text_encoder(t5_file(tmp_path, **{other: embedding + 1}), config=config)
    with pytest.raises(ValueError, match=r"1 missing.*\n.*embedding.*shared"):
        load_text_encoder(t5_file(tmp_path, **{"shared.weight": None}), config=config)


def test_padding_changes_nothing(encoder, recorded):
    ids, mask = recorded["ids"], recorded["mask"]
    length = int(mask[1].sum())
    other = jnp.where(mask > 0, ids, (ids + 5) % 97)
    out = ENCODE(encoder, ids, mask)
    np.testing.assert_allclose(ENCODE(encoder, other, mask)[1, :length], out[1, :length], atol=1e-6)
    alone = ENCODE(encoder, ids[1:, :length], mask[1:, :length])
    np.testing.assert_allclose(alone[0], out[1, :length], atol=TOLERANCE)


def test_the_original_layout_is_the_same_model(encoder):
    same = load_text_encoder(FIXTURES / "wan/umt5_original.safetensors", config=DEV)
    jax.tree.map(np.testing.assert_array_equal, same, encoder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_full_size_keys(layout):
    config = T5Config.from_dict(t5.UMT5_XXL)
    keys = full_size("umt5_xxl", layout, config.num_layers)
    template = jax.eval_shape(lambda: T5Encoder(config, nnx.Rngs(0)))
    slots = checkpoints.parameter_shapes(template)
    tensors = [checkpoints.Tensor(k, "BF16", tuple(s), Path("x")) for k, s in keys.items()]
    matches = match_tensors(tensors, slots, best_table(tensors, (t5.TABLE, t5.ORIGINAL)))
    assert sorted(m.tensor.key for found in matches.values() for m in found) == sorted(keys)
    assert sum(np.prod(slot.shape) for slot in slots.values()) == 5_680_910_336
    ids = jax.ShapeDtypeStruct((2, 512), "int32")
    assert jax.eval_shape(T5Encoder.__call__, template, ids, ids).shape == (2, 512, 4096)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "model_type must be 'umt5' or 't5'; got 'bert'"),
        ({"feed_forward_proj": "relu"}, "feed_forward_proj must be 'gated-gelu'"),
        ({"d_model": None}, r"d_model must be an integer in 1\.\.65536; got None"),
        ({"num_heads": 0, "d_kv": "8"}, r"2 fields are wrong(.|\n)*num_heads(.|\n)*d_kv|d_kv"),
        ({"model_type": "t5", "shared_position_bias": False}, "shared_position_bias must be True"),
    ],
)
def test_config_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        T5Config.from_dict(DEV | changes)


def test_wrong_number_of_layers():
    with pytest.raises(ValueError, match=r"10 unexpected(.|\n)*layers 0\.\.0 only"):
        load_text_encoder(WEIGHTS, config=DEV | {"num_layers": 1})
    with pytest.raises(ValueError, match=r"10 missing(.|\n)*layer 2: expected a key like"):
        load_text_encoder(WEIGHTS, config=DEV | {"num_layers": 3})


def test_single_file_needs_config():
    with pytest.raises(ValueError, match="pass config"):
        load_text_encoder(WEIGHTS)


def test_shapes_refused(as_a_user, encoder):
    with pytest.raises(ValueError, match=r"expected ids and mask .* got \[3\] and \[3\]"):
        encoder(np.zeros(3, np.int32), np.zeros(3, np.int32))
    with pytest.raises(ValueError, match=r"got \[1, 3\] and \[1, 4\]"):
        encoder(np.zeros((1, 3), np.int32), np.zeros((1, 4), np.int32))


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
