"""Loading of safetensors checkpoints: what fits, and one error for everything that does not."""

import json
import math
import os
import struct
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from astraea_jax.checks import Refusal
from astraea_ports import checkpoints
from astraea_ports.checkpoints import (
    Entry,
    load_parameters,
    loading,
    model_folder,
    read_config,
    tensor_files,
)

TABLE = (
    Entry(r"layers\.(?P<layer>\d+)\.(weight)", r"blocks.kernel", checkpoints.linear),
    Entry(r"layers\.(?P<layer>\d+)\.bias", "blocks.bias"),
    Entry(r"(conv)\.weight", r"\1.kernel", checkpoints.conv2d),
    Entry(r"(conv)\.bias", r"\1.bias"),
)


class Part(nnx.Module):
    def __init__(self, *shape):
        self.kernel = nnx.Param(jnp.zeros(shape))
        self.bias = nnx.Param(jnp.zeros(shape[-1]))


class Model(nnx.Module):
    def __init__(self):
        self.blocks = jax.vmap(lambda _: Part(2, 3))(jnp.arange(2))
        self.conv = Part(3, 3, 2, 4)


@pytest.fixture
def template():
    return jax.eval_shape(Model)


def tensors(**changes):
    random = np.random.default_rng(0)
    shapes = {"conv.weight": (4, 2, 3, 3), "conv.bias": (4,)}
    for layer in range(2):
        shapes |= {f"layers.{layer}.weight": (3, 2), f"layers.{layer}.bias": (3,)}
    values = {k: random.normal(size=shape).astype(np.float32) for k, shape in shapes.items()}
    return {k: v for k, v in (values | changes).items() if v is not None}


def saved(folder, values, name="model.safetensors"):
    save_file(values, folder / name)
    return folder / name


def sharded(folder, weight_map=None):
    values = tensors()
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    parts = {name: dict(list(values.items())[i::2]) for i, name in enumerate(names)}
    for name, part in parts.items():
        saved(folder, part, name)
    full = {key: name for name, part in parts.items() for key in part}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map or full}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def check(model, values, dtype=np.float32):
    def equal(got, expected):
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, expected.astype(dtype))

    for layer in range(2):
        equal(model.blocks.kernel[...][layer], values[f"layers.{layer}.weight"].T)
        equal(model.blocks.bias[...][layer], values[f"layers.{layer}.bias"])
    equal(model.conv.kernel[...], values["conv.weight"].transpose(2, 3, 1, 0))
    equal(model.conv.bias[...], values["conv.bias"])


def test_transforms():
    array = np.arange(2 * 3 * 4 * 5 * 6).reshape(2, 3, 4, 5, 6)
    assert checkpoints.conv3d(array)[3, 4, 5, 2, 1] == array[1, 2, 3, 4, 5]
    assert checkpoints.conv2d(array[..., 0])[3, 4, 2, 1] == array[1, 2, 3, 4, 0]
    assert checkpoints.time_conv(array[..., :1, :1])[3, 2, 1] == array[1, 2, 3, 0, 0]
    assert checkpoints.linear(array[..., :1, :1, :1])[2, 1] == array[1, 2, 0, 0, 0]
    assert checkpoints.vector(array[:, :1, 0, 0, 0]).shape == (2,)
    assert checkpoints.identity(array) is array


def test_file_and_folder(tmp_path, template):
    path = saved(tmp_path, tensors())
    for source in (path, tmp_path, str(tmp_path)):
        check(load_parameters(source, template, TABLE), tensors())
    path.rename(tmp_path / "diffusion_pytorch_model.safetensors")
    check(load_parameters(tmp_path, template, TABLE), tensors())


def test_loaded_module_works_under_jit(tmp_path, template):
    model = load_parameters(saved(tmp_path, tensors()), template, TABLE)
    total = jax.jit(lambda model: sum(leaf.sum() for leaf in jax.tree.leaves(model)))(model)
    assert np.isclose(total, sum(v.sum() for v in tensors().values()), atol=1e-5)


@pytest.mark.parametrize("stored", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.bfloat16, jnp.float16])
def test_dtypes(tmp_path, template, stored, dtype):
    values = {k: v.astype(stored) for k, v in tensors().items()}
    model = load_parameters(saved(tmp_path, values), template, TABLE, dtype=dtype)
    check(model, values, dtype=dtype or np.float32)


def test_the_host_holds_a_parameter_once(tmp_path, template, monkeypatch):
    made, path = [], saved(tmp_path, tensors())
    allocate = loading.aligned_empty
    monkeypatch.setattr(
        loading, "aligned_empty", lambda *args: made.append(allocate(*args)) or made[-1]
    )
    with jax.default_device(jax.devices("cpu")[0]):
        model = load_parameters(path, template, TABLE)
    leaves = jax.tree.leaves(model)
    assert [leaf.unsafe_buffer_pointer() for leaf in leaves] == [a.ctypes.data for a in made]


def test_shards(tmp_path, template):
    sharded(tmp_path)
    check(load_parameters(tmp_path, template, TABLE), tensors())


def test_shards_in_the_cache_of_the_hub(tmp_path, template):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc" / "transformer"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    sharded(blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("../../../blobs") / path.name)
    check(load_parameters(snapshot, template, TABLE), tensors())


def test_all_problems_at_once(tmp_path, template):
    values = tensors(
        **{
            "extra": np.zeros(1, np.float32),
            "layers.2.bias": np.zeros(3, np.float32),
            "layers.0.weight": np.zeros((2, 3), np.float32),
            "layers.1.weight": np.zeros(2, np.float32),
            "layers.1.bias": None,
            "conv.bias": np.zeros(4, np.int32),
            "conv.weight": None,
        }
    )
    with pytest.raises(ValueError) as error:
        load_parameters(saved(tmp_path, values), template, TABLE)
    text = str(error.value)
    assert "2 unexpected" in text and "2 wrong shape" in text and "2 missing" in text
    assert "extra: no such tensor" in text
    assert "layers.2.bias: blocks.bias has layers 0..1 only" in text
    assert "layers.0.weight: expected [2, 3] for blocks.kernel, got [2, 3], that is [3, 2]" in text
    assert "layers.1.weight: expected [2, 3] for blocks.kernel, got [2], that is [2] here" in text
    assert r"blocks.bias, layer 1: expected a key like layers\.(?P<layer>\d+)\.bias" in text
    assert "conv.bias: expected one of BF16, F16, F32, F64, F8_E4M3, F8_E5M2, got I32" in text
    assert r"conv.kernel: expected a key like (conv)\.weight, got none" in text


def test_two_matches_and_unknown_path(tmp_path, template):
    table = (*TABLE[:3], Entry(r"conv\.(weight|bias)", r"conv.\1"))
    with pytest.raises(ValueError) as error:
        load_parameters(saved(tmp_path, tensors()), template, table)
    text = str(error.value)
    assert r"conv.weight: matches (conv)\.weight and conv\.(weight|bias)" in text
    table = (*TABLE[:3], Entry(r"conv\.bias", "conv.offset"))
    with pytest.raises(ValueError, match=r"conv\.bias: this model has no conv\.offset"):
        load_parameters(saved(tmp_path, tensors()), template, table)


def test_a_wholly_wrong_file_is_summed_up(tmp_path, template):
    values = {f"x{i}": np.zeros(1, np.float32) for i in range(500)}
    with pytest.raises(ValueError, match=r"500 unexpected(.|\n)*and 480 more") as error:
        load_parameters(saved(tmp_path, values), template, TABLE)
    assert len(str(error.value).splitlines()) < 50


def test_tied_weights(tmp_path, template):
    table = (*TABLE, Entry("tied", "conv.bias"))
    path = saved(tmp_path, tensors(tied=tensors()["conv.bias"]))
    check(load_parameters(path, template, table), tensors())
    path = saved(tmp_path, tensors(tied=tensors()["conv.bias"] + 1))
    with pytest.raises(ValueError, match=r"one value for conv\.bias, got two that differ"):
        load_parameters(path, template, table)


@pytest.mark.parametrize("cut", [0, 4, 30, -10])
def test_truncated_file(tmp_path, template, cut):
    path = saved(tmp_path, tensors())
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a readable safetensors file"):
        load_parameters(path, template, TABLE)


def test_other_formats(tmp_path, template):
    (tmp_path / "model.bin").write_bytes(b"\x80\x02}q\x00." * 100)
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_parameters(tmp_path / "model.bin", template, TABLE)
    with pytest.raises(ValueError, match=r"got model\.bin; convert"):
        load_parameters(tmp_path, template, TABLE)


# --- Files of weights that are broken, huge or something else.


def by_hand(file, header, data=b"", length=None):
    """Safetensors as the library would not write it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return file


def one(shape, dtype="F32", end=4, start=0):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


ENTRY = json.dumps(one([1])).encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"header": {}, "length": 2**63}, "its header would have 9223372036854775808 bytes"),
        ({"header": {}, "length": (16 << 20) + 1}, "its header would have"),
        ({"header": b"[" * 100_000}, "not a readable safetensors file"),
        ({"header": b'{"\xff": 1}'}, "not a readable safetensors file"),
        ({"header": b'{"a": %s, "a": %s}' % (ENTRY, ENTRY), "data": bytes(4)}, "name 'a' twice"),
        ({"header": {"a" * 501: one([1])}, "data": bytes(4)}, "a name of 501 letters"),
        ({"header": {f"a{i}": one([0], end=0) for i in range(10_001)}}, "at most 10000 tensors"),
        ({"header": {"conv.bias": one([2**40, 2**20], end=0)}}, "not a readable safetensors file"),
        ({"header": {"conv.bias": one([0, 2**63], end=0)}}, "too few or too many axes"),
        ({"header": {"conv.bias": one([0, 2**64 - 1], end=0)}}, "too few or too many axes"),
        ({"header": {"conv.bias": one([1] * 100)}, "data": bytes(4)}, "too few or too many axes"),
        ({"header": {"conv.bias": one([-1])}, "data": bytes(4)}, "not a readable safetensors file"),
        ({"header": {"conv.bias": one([1], end=8)}, "data": bytes(4)}, "not a readable"),
        ({"header": {"conv.bias": one([1])}, "data": bytes(9)}, "not a readable"),
        ({"header": {"conv.bias": one([4], "F8_E8M0")}, "data": bytes(4)}, "got F8_E8M0"),
        ({"header": {"conv.bias": one([8], "F4")}, "data": bytes(4)}, "got F4"),
        ({"header": {"layers." + "9" * 400 + ".bias": one([1])}, "data": bytes(4)}, "layers 0..1"),
    ],
)
def test_a_broken_header(tmp_path, template, content, message):
    file = by_hand(tmp_path / "model.safetensors", **content)
    with pytest.raises(Refusal, match=message):
        load_parameters(file, template, TABLE)


def test_every_flipped_bit_of_a_header_is_refused_or_read(tmp_path, template):
    whole = saved(tmp_path, tensors()).read_bytes()
    length = 8 + struct.unpack("<Q", whole[:8])[0]
    random = np.random.default_rng(0)
    for place in random.integers(0, length, 150):
        broken = bytearray(whole)
        broken[place] ^= 1 << random.integers(8)
        (tmp_path / "model.safetensors").write_bytes(broken)
        try:
            check(load_parameters(tmp_path, template, TABLE), tensors())
        except Refusal:
            continue


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGUF\3\0\0\0" + bytes(40), "a GGUF file"),
        (b"PK\3\4" + bytes(40), "a PyTorch pickle"),
        (b"\x80\2}q\0." * 9, "a Python pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "a git-lfs pointer"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"", "it is empty"),
    ],
)
def test_other_formats_are_named(tmp_path, template, content, message):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(Refusal, match=f"is not a readable safetensors file .{message}"):
        load_parameters(tmp_path, template, TABLE)


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    os.mkfifo(tmp_path / "model.pth")
    for file in (tmp_path / "model.safetensors", Path("/dev/zero"), tmp_path):
        with pytest.raises(Refusal, match=r"it is (no regular file|a folder)"):
            tensor_files.TensorFiles([file]).tensors()
    with pytest.raises(Refusal, match="it is no regular file"):
        tensor_files.TensorFiles([tmp_path / "model.pth"])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_nan_is_refused_by_the_name_of_its_parameter(tmp_path, template, dtype, value):
    values = {key: tensor.astype(dtype) for key, tensor in tensors().items()}
    values["layers.1.weight"][2, 1] = value
    with pytest.raises(Refusal, match=r"layers\.1\.weight in .* holds NaN or infinity"):
        load_parameters(saved(tmp_path, values), template, TABLE)


@pytest.mark.parametrize("dtype", [*tensor_files.FP8.values(), np.float16, ml_dtypes.bfloat16])
def test_patterns_of_bits_are_finite_or_not(dtype):
    width = np.dtype(dtype).itemsize
    values = np.arange(0, 256**width, 8 * width - 7, dtype=f"u{width}").view(dtype)
    finite = np.isfinite(values.astype(np.float32))
    assert all(tensor_files.all_finite(values[i : i + 1]) == finite[i] for i in range(len(finite)))
    large = np.zeros(1 << 19, np.float32)
    assert tensor_files.all_finite(large)
    large[-1] = math.nan
    assert not tensor_files.all_finite(large)
    assert tensor_files.all_finite(np.zeros((0, 3), np.float32))
    assert tensor_files.all_finite(np.array(7))


def test_numbers_that_the_dtype_cannot_hold(tmp_path, template):
    path = saved(tmp_path, tensors(**{"conv.bias": np.full(4, 1e5, np.float32)}))
    with pytest.raises(Refusal, match=r"conv\.bias: expected numbers within the range of float16"):
        load_parameters(path, template, TABLE, dtype=jnp.float16)
    assert load_parameters(path, template, TABLE, dtype=jnp.bfloat16).conv.bias[...][0] > 9e4


@pytest.mark.parametrize("stored", tensor_files.FP8)
def test_eight_bit_floats(tmp_path, template, stored):
    narrow = {key: value.astype(tensor_files.FP8[stored]) for key, value in tensors().items()}
    header, data = {}, b""
    for key, value in narrow.items():
        end = len(data) + value.nbytes
        header[key] = one(list(value.shape), stored, end, len(data))
        data += value.tobytes()
    path = by_hand(tmp_path / "model.safetensors", header, data)
    check(load_parameters(path, template, TABLE), narrow)
    header["conv.scale_weight"] = one([1], "F32", len(data) + 4, len(data))
    by_hand(path, header, data + bytes(4))
    with pytest.raises(Refusal, match="these are scaled 8-bit floats, whose scales are not read"):
        load_parameters(path, template, TABLE)


def test_what_another_program_wrote_is_said(tmp_path, template):
    values = {f"model.diffusion_model.{key}": value for key, value in tensors().items()}
    with pytest.raises(Refusal, match=r"every key begins with 'model\.diffusion_model\.'"):
        load_parameters(saved(tmp_path, values), template, TABLE)
    values = tensors(**{"conv.weight.absmax": np.zeros(3, np.float32)})
    with pytest.raises(Refusal, match="these are quantised weights"):
        load_parameters(saved(tmp_path, values), template, TABLE)


def test_read_tensors(tmp_path):
    path = saved(tmp_path, tensors())
    got = tensor_files.read_tensors(path, largest=1 << 20)
    assert all(np.array_equal(got[key], value) for key, value in tensors().items())
    for change, message in (
        (np.zeros(4, np.int8), "expected one of BF16, .* got I8"),
        (np.full(4, math.nan, np.float32), "conv.bias in .* holds NaN"),
    ):
        saved(tmp_path, tensors(**{"conv.bias": change}))
        with pytest.raises(Refusal, match=message):
            tensor_files.read_tensors(path, largest=1 << 20)
    with pytest.raises(Refusal, match="at most 100 bytes"):
        tensor_files.read_tensors(path, largest=100)


def test_no_checkpoint(tmp_path, template):
    with pytest.raises(ValueError, match=r"got nothing; convert"):
        load_parameters(tmp_path, template, TABLE)
    with pytest.raises(ValueError, match=r"nowhere is neither"):
        load_parameters(tmp_path / "nowhere", template, TABLE)
    sharded(tmp_path)
    saved(tmp_path, tensors())
    with pytest.raises(ValueError, match=r"expected one checkpoint .* name the file"):
        load_parameters(tmp_path, template, TABLE)


@pytest.mark.parametrize(
    "name", ["../out.safetensors", "/etc/passwd", "link.safetensors", "a/../b"]
)
def test_index_that_leaves_its_folder(tmp_path, template, name):
    folder = tmp_path / "model"
    folder.mkdir()
    outside = saved(tmp_path, tensors(), "out.safetensors")
    (folder / "link.safetensors").symlink_to(outside)
    sharded(folder, {"conv.weight": name})
    with pytest.raises(ValueError, match=r"lies outside its folder"):
        load_parameters(folder, template, TABLE)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "expected a JSON object .* got a list"),
        ("{}", "`weight_map` of key -> file name"),
        ('{"weight_map": {"a": 3}}', "`weight_map` of key -> file name"),
        ('{"weight_map": {}}', "names no file at all"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "names gone.safetensors, which is not there"),
    ],
)
def test_broken_index(tmp_path, template, index, message):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=message):
        load_parameters(tmp_path, template, TABLE)


def test_read_config(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(ValueError, match=r"expected the file .*config\.json.*check the folder"):
        read_config(tmp_path)
    path.write_text('{"_class_name": "Right", "x": 1}')
    assert read_config(tmp_path)["x"] == 1
    assert read_config(tmp_path, expected="Right")["x"] == 1
    with pytest.raises(ValueError, match=r"to describe umt5 or t5 .* got 'Right'"):
        read_config(tmp_path, expected=("umt5", "t5"))
    path.write_text('{"model_type": "t5"}')
    assert read_config(str(tmp_path), "config.json", expected=("umt5", "t5"))
    path.write_text("{}")
    with pytest.raises(ValueError, match="got None"):
        read_config(tmp_path, expected="Right")
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError, match="it can't be read"):
        read_config(tmp_path)
    with pytest.raises(ValueError, match="expected the file"):
        read_config(path)


def test_model_folder(tmp_path, monkeypatch):
    assert model_folder(tmp_path) == tmp_path
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"hub id `owner/name`.*\(a file\)"):
        model_folder(tmp_path / "file")
    for name in ("nowhere", "a/b/c", "../up", "./here/there", ""):
        monkeypatch.chdir(tmp_path / ".")
        if name:
            with pytest.raises(ValueError, match=r"expected the folder .*\(no such folder\)"):
                model_folder(name)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
