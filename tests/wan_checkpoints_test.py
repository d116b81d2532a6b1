"""Whole Wan models: the recorded run from ids to a video, both layouts, LoRA, random weights."""

import json
import shutil
import sys
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import FIXTURES, LAYOUTS, slow_but
from safetensors.numpy import load_file, save_file

from astraea_jax import denoise as loop
from astraea_jax import solvers
from astraea_jax.checks import Refusal
from astraea_jax.methods import Astraea, Dense
from astraea_jax.schedule import Schedule
from astraea_ports import tiny
from astraea_ports.checkpoints import lora
from astraea_ports.pipeline import convert
from astraea_ports.text import embeddings, t5
from astraea_ports.wan import parts, vae_weights
from astraea_ports.wan.config import T2V_1_3B, TransformerConfig
from astraea_ports.wan.pipeline import Pipeline
from astraea_ports.wan.transformer import Transformer
from astraea_ports.wan.transformer_weights import load_transformer
from astraea_ports.wan.vae import VAE
from astraea_ports.wan.vae_weights import load_vae

WAN = FIXTURES / "wan"
SIZES = {"dim": 48, "num_heads": 3, "in_dim": 16, "out_dim": 16, "text_dim": 32, "freq_dim": 64}
SIZES |= {"ffn_dim": 128, "num_layers": 2, "eps": 1e-6, "model_type": "t2v"}
"""The recorded transformer, as the original's config.json says it."""

TEXT = {"model_type": "umt5", "d_model": 32, "num_heads": 4, "d_kv": 8, "d_ff": 64}
TEXT |= {"num_layers": 2, "vocab_size": 97}
IMAGE = vae_weights.WAN_VAE | {"base_dim": 4, "dim_mult": [1, 2, 2, 2]}
WITHIN = 2e-4  # the recordings' README
PROMPT = "a red circle moving left over a blue background"


@pytest.fixture(scope="module")
def recorded():
    tensors = load_file(WAN / "e2e.safetensors")
    for name in ("latents_init", "latents_traj", "noise_pred", "video"):
        tensors[name] = np.moveaxis(tensors[name], -4, -1)
    return tensors


# --- From ids to a video.


@pytest.mark.parametrize("layout", slow_but({"original"}, LAYOUTS))
def test_the_recorded_run(recorded, layout):
    transformer = load_transformer(WAN / f"transformer_{layout}.safetensors", config=SIZES)
    encoder = t5.load_text_encoder(WAN / f"umt5_{layout}.safetensors", config=TEXT)
    image = load_vae(WAN / f"vae_{layout}.safetensors", config=IMAGE)
    ids, mask = (
        jnp.asarray(np.concatenate([recorded[f"{name}_{branch}"] for branch in ("cond", "uncond")]))
        for name in ("ids", "mask")
    )
    context = encoder(ids.astype("int32"), mask.astype("int32")) * mask[..., None]
    start = jnp.asarray(recorded["latents_init"])[None]
    solver = solvers.unipc(4, shift=3.0, grid="original")
    np.testing.assert_allclose(solver.sigma, recorded["sigmas"][:-1], atol=1e-6)
    assert np.array_equal(solver.timestep, recorded["timesteps"])
    settings = loop.Settings(Dense(), transformer.geometry(start.shape), 2, False)
    prepared, state = loop.start_static(transformer, start, context, settings=settings)
    for index in range(4):
        row = jax.tree.map(lambda leaf, i=index: jnp.asarray(leaf[i]), solver)
        state, _ = loop.static_step(
            transformer, prepared, state, row, *map(jnp.int32, (10, index, 4)), jnp.float32(5.0),
            jax.random.key(0), settings=settings, mode=Dense().static_mode(10),
        )  # fmt: skip
        expected = recorded["latents_traj"][index + 1]
        np.testing.assert_allclose(state.latents[0], expected, atol=WITHIN, err_msg=f"{index}")
    video = jax.jit(VAE.decode)(image, state.latents)
    np.testing.assert_allclose(video, recorded["video"], atol=WITHIN)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["reference", "fast"])
def test_half_precision_keeps_the_ladder(fully_optimised, precision):
    model = load_transformer(
        WAN / "transformer_original.safetensors",
        config=SIZES,
        dtype=jnp.bfloat16,
        precision=precision,
    )
    keys = jax.random.split(jax.random.key(0))
    latents = jax.random.normal(keys[0], (1, 3, 6, 10, 16))
    context = jax.random.normal(keys[1], (2, 16, 32))

    def run(driver, levels, method):
        solver, schedule = solvers.unipc(len(levels)), Schedule(levels)
        return loop.denoise(
            model, latents, context, solver=solver, guidance=5.0, schedule=schedule,
            method=method, driver=driver,
        ).latents  # fmt: skip

    dense = run("static", (10,), Dense())
    assert np.array_equal(run("static", (10,), Astraea()), dense)
    if precision == "reference":  # rows and cache of float32, products of bfloat16
        static, dynamic = (run(driver, (10, 4), Astraea()) for driver in ("static", "dynamic"))
        scale = float(jnp.abs(static).max())
        np.testing.assert_allclose(static, dynamic, atol=0.01 * scale)


# --- Folders.


def original_folder(folder, monkeypatch):
    """The recorded model as a folder in the original layout."""
    monkeypatch.setattr(vae_weights, "WAN_VAE", IMAGE)
    monkeypatch.setattr(t5, "UMT5_XXL", TEXT | {"vocab_size": 97})
    (folder / "config.json").write_text(json.dumps(SIZES | {"_class_name": "WanModel"}))
    weights = folder / "diffusion_pytorch_model.safetensors"
    shutil.copy(WAN / "transformer_original.safetensors", weights)
    shutil.copy(WAN / "umt5_original.safetensors", folder / t5.ORIGINAL_FILES[0])
    shutil.copy(WAN / "vae_original.safetensors", folder / vae_weights.ORIGINAL_FILES[0])
    shutil.copytree(tiny.FOLDER / "tokenizer", folder / "google/umt5-xxl")
    return folder


def test_an_original_folder(tmp_path, monkeypatch):
    folder = original_folder(tmp_path, monkeypatch)
    pipeline = Pipeline.from_pretrained(folder, staged=True)
    assert pipeline.grid == "original" and pipeline.shift == 5.0
    assert pipeline.defaults == (81, 480, 832, 50, 5.0)
    assert pipeline.size(None, None, None) == (81, 480, 832)
    for load, name in (
        (load_transformer, "transformer"), (t5.load_text_encoder, "umt5"), (load_vae, "vae"),
    ):  # fmt: skip
        config = {"transformer": SIZES, "umt5": TEXT, "vae": IMAGE}[name]
        alone = load(WAN / f"{name}_diffusers.safetensors", config=config)
        jax.tree.map(np.testing.assert_array_equal, load(folder), alone)
    (folder / vae_weights.ORIGINAL_FILES[0]).unlink()
    with pytest.raises(ValueError, match=r"to describe AutoencoderKLWan .* got 'WanModel'"):
        Pipeline.from_pretrained(folder)


@pytest.mark.slow
def test_converted(tmp_path):
    target = tmp_path / "converted"
    convert.convert_model("tiny", target, dtype="float32")
    options = {"frames": 5, "height": 32, "width": 32, "steps": 1, "seed": 3}
    plain = Pipeline.from_pretrained("tiny")
    again = Pipeline.from_pretrained(target)
    assert (again.defaults, again.shift, again.grid) == (plain.defaults, plain.shift, plain.grid)
    made = [each.denoise(each.plan(PROMPT, **options)) for each in (again, plain)]
    assert np.array_equal(made[0][0].latents, made[1][0].latents)
    narrow = load_transformer(target, dtype=jnp.bfloat16)
    assert narrow.blocks.ffn_in.kernel.dtype == jnp.bfloat16
    assert narrow.time_1.kernel.dtype == jnp.float32
    with pytest.raises(ValueError, match="does not exist yet"):
        convert.convert_model("tiny", target, dtype="float32")
    with pytest.raises(ValueError, match="is no folder that can be written to"):
        convert.convert_model("tiny", tmp_path / "none/x", dtype="float32")
    (tmp_path / "x.safetensors").touch()
    with pytest.raises(ValueError, match="merge a LoRA when converting"):
        load_transformer(target, lora=[lora.Lora(tmp_path / "x.safetensors")])
    config = json.loads((target / "transformer/config.json").read_text())
    with pytest.raises(ValueError, match=r"ffn_in.bias: expected \[8, 64\], got \[8, 768\]"):
        load_transformer(target, config=config | {"ffn_dim": 64})
    for path in (target / "vae/orbax").glob("**/*"):
        if path.is_file() and path.stat().st_size > 10_000:
            path.write_bytes(b"")
    with pytest.raises(ValueError, match="is not a readable checkpoint"):
        load_vae(target)


def test_nothing_is_left_of_a_conversion_that_failed(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(convert.converted, "save", fail)
    with pytest.raises(Refusal, match=r"can't write .*x \(disk full\)"):
        convert.convert_model("tiny", tmp_path / "x", dtype="float32")
    assert list(tmp_path.iterdir()) == []


# --- Pickles.


class Fake:
    """As much of a torch tensor as is read."""

    def __init__(self, values):
        self.values, self.shape = values, values.shape
        narrow = values.dtype == ml_dtypes.bfloat16
        self.dtype = "torch.bfloat16" if narrow else f"torch.{values.dtype}"

    def view(self, dtype):
        assert dtype == "bits"
        return Fake(self.values.view(np.uint16))

    def numpy(self):
        assert self.values.dtype != ml_dtypes.bfloat16
        return self.values


def test_a_pickle_is_read_by_torch_alone(tmp_path, monkeypatch):
    values = load_file(WAN / "umt5_original.safetensors")
    narrow = {key: value.astype(ml_dtypes.bfloat16) for key, value in values.items()}
    path, calls = tmp_path / "model.pth", []
    path.write_bytes(b"a pickle")

    def load(file, **options):
        calls.append(options)
        if len(calls) > 1:
            raise RuntimeError("Unsupported global: os.system\nmore")
        return {key: Fake(value) for key, value in narrow.items()}

    with monkeypatch.context() as without:
        without.setitem(sys.modules, "torch", None)
        with pytest.raises(ValueError, match=r"model\.pth is a PyTorch pickle.*extra `pth`"):
            t5.load_text_encoder(path, config=TEXT)
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(load=load, uint16="bits"))
    loaded = t5.load_text_encoder(path, config=TEXT)
    assert calls == [{"map_location": "cpu", "weights_only": True, "mmap": True}]
    expected = narrow["token_embedding.weight"].astype(np.float32)
    assert np.array_equal(loaded.embedding[...], expected)
    with pytest.raises(ValueError, match=r"no file of weights alone \(Unsupported global: os"):
        t5.load_text_encoder(path, config=TEXT)


# --- LoRA.

SPELLINGS = {
    "diffusion_model.{o}.lora_A.weight": ("diffusion_model.{o}.lora_B.weight", None),
    "transformer.{d}.lora_A.weight": ("transformer.{d}.lora_B.weight", None),
    "base_model.model.{d}.lora_A.default.weight": (
        "base_model.model.{d}.lora_B.default.weight", None,
    ),
    "{d}.lora_down.weight": ("{d}.lora_up.weight", "{d}.alpha"),
    "lora_unet_{ko}.lora_down.weight": ("lora_unet_{ko}.lora_up.weight", "lora_unet_{ko}.alpha"),
    "lora_unet_{kd}.lora_down.weight": ("lora_unet_{kd}.lora_up.weight", "lora_unet_{kd}.alpha"),
    # VideoX-Fun; kohya with the dots left; OneTrainer; LyCORIS' plain one.
    "lora_unet__{ko}.lora_down.weight": ("lora_unet__{ko}.lora_up.weight", "lora_unet__{ko}.alpha"),
    "lora_unet_{o}.lora_down.weight": ("lora_unet_{o}.lora_up.weight", "lora_unet_{o}.alpha"),
    "lora_transformer_{kd}.lora_down.weight": (
        "lora_transformer_{kd}.lora_up.weight", "lora_transformer_{kd}.alpha",
    ),
    "lycoris_{ko}.lora_down.weight": ("lycoris_{ko}.lora_up.weight", "lycoris_{ko}.alpha"),
    # DiffSynth-Studio; PEFT with an adapter's name; no prefix at all.
    "pipe.dit.{o}.lora_A.default.weight": ("pipe.dit.{o}.lora_B.default.weight", None),
    "base_model.model.{o}.lora_A.my_style.weight": (
        "base_model.model.{o}.lora_B.my_style.weight", None,
    ),
    "{o}.lora_A.weight": ("{o}.lora_B.weight", None),
}  # fmt: skip
CHANGED = {
    "blocks.1.self_attn.q": "blocks.1.attn1.to_q",
    "blocks.0.cross_attn.o": "blocks.0.attn2.to_out.0",
    "blocks.0.ffn.0": "blocks.0.ffn.net.0.proj",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "patch_embedding": "patch_embedding",
}


@pytest.mark.parametrize("down", SPELLINGS)
def test_lora(tmp_path, down):
    up, alpha = SPELLINGS[down]
    weights = load_file(WAN / "transformer_original.safetensors")
    weights = {key: value.astype(np.float32) for key, value in weights.items()}
    random, tensors = np.random.default_rng(0), {}
    for original, diffusers in CHANGED.items():
        names = {"o": original, "d": diffusers}
        names |= {"ko": original.replace(".", "_"), "kd": diffusers.replace(".", "_")}
        out, *rest = weights[f"{original}.weight"].shape
        pair = random.normal(size=(2, *rest)), random.normal(size=(out, 2, *[1] * (len(rest) - 1)))
        for name, values in zip((down, up), pair, strict=True):
            tensors[name.format(**names)] = values.astype(np.float32)
        if alpha:
            tensors[alpha.format(**names)] = np.float32(1.0)[None]
        change = np.einsum("r...,or->o...", pair[0], pair[1].reshape(out, 2))
        weights[f"{original}.weight"] += (0.5 * (0.5 if alpha else 1.0) * change).astype(np.float32)
    save_file(tensors, tmp_path / "lora.safetensors")
    save_file(weights, tmp_path / "merged.safetensors")
    expected = load_transformer(tmp_path / "merged.safetensors", config=SIZES)
    got = load_transformer(
        WAN / "transformer_diffusers.safetensors",
        config=SIZES,
        lora=[lora.Lora(tmp_path / "lora.safetensors", 0.5)],
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, expected)


def test_lora_of_whole_differences_twice(tmp_path):
    weights = load_file(WAN / "transformer_original.safetensors")
    bias, norm = (weights[k].astype("f4") for k in ("blocks.1.ffn.2.bias", "blocks.0.norm3.weight"))
    changes = {
        "diffusion_model.blocks.1.ffn.2.diff_b": bias,
        "diffusion_model.blocks.0.norm3.diff": norm,
    }
    save_file(changes, tmp_path / "lora.safetensors")
    file = tmp_path / "lora.safetensors"
    got = load_transformer(
        WAN / "transformer_original.safetensors",
        config=SIZES,
        lora=[lora.Lora(file), lora.Lora(file, -0.5)],
    )
    np.testing.assert_allclose(got.blocks.ffn_out.bias[...][1], 1.5 * bias, rtol=1e-6)
    np.testing.assert_allclose(got.blocks.norm2.scale[...][0], 1.5 * norm, rtol=1e-6)


def test_lora_that_does_not_fit(tmp_path):
    tensors = {
        "diffusion_model.blocks.0.self_attn.q.lora_A.weight": np.zeros((2, 48), "f4"),
        "diffusion_model.blocks.7.self_attn.q.lora_A.weight": np.zeros((2, 48), "f4"),
        "diffusion_model.blocks.7.self_attn.q.lora_B.weight": np.zeros((48, 2), "f4"),
        "diffusion_model.blocks.0.self_attn.k_img.diff": np.zeros((48, 48), "f4"),
        "diffusion_model.blocks.0.ffn.0.lora_A.weight": np.zeros((2, 50), "f4"),
        "diffusion_model.blocks.0.ffn.0.lora_B.weight": np.zeros((128, 2), "f4"),
        "diffusion_model.blocks.0.ffn.2.lora_A.weight": np.zeros((2, 128), "f4"),
        "diffusion_model.blocks.0.ffn.2.lora_B.weight": np.zeros((48, 3), "f4"),
        "what": np.zeros(1, "f4"),
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError) as error:
        load_transformer(
            WAN / "transformer_original.safetensors",
            config=SIZES,
            lora=[lora.Lora(tmp_path / "lora.safetensors")],
        )
    text = str(error.value)
    assert "6 problems" in text
    assert "what: expected a name ending in lora_A" in text
    assert "blocks.0.self_attn.q.weight: expected lora_A and lora_B" in text
    assert "blocks.0.self_attn.k_img.weight: no such weight" in text
    assert "blocks.0.ffn.2.weight: expected down [rank, in] and up [out, rank]" in text
    assert "layers 0..1 only" in text and "expected [48, 128]" in text
    with pytest.raises(ValueError, match=r"existing \.safetensors file; got 'x.bin'"):
        load_transformer(
            WAN / "transformer_original.safetensors", config=SIZES, lora=[lora.Lora("x.bin")]
        )


# --- Stages, embeddings, random weights.


@pytest.mark.slow
def test_a_staged_pipeline_holds_nothing(tmp_path):
    options = {"frames": 5, "height": 32, "width": 32, "steps": 2}
    pipeline = Pipeline.from_pretrained("tiny", staged=True, text_cache=tmp_path / "text")
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(pipeline.transformer))
    seen = []
    first = pipeline(PROMPT, progress=lambda *report: seen.append(report), **options)
    plain = Pipeline.from_pretrained("tiny")(PROMPT, **options)
    assert np.array_equal(first.latents, plain.latents) and first.seconds["load"].run > 0
    stages = list(dict.fromkeys(stage for stage, _, _ in seen))
    assert stages == ["text", "load", "denoise", "decode"]
    # The second time no text encoder is needed, in a batch with other texts or not.
    assert len(list((tmp_path / "text").iterdir())) == 2
    without = dict(pipeline.loaders)
    del without["text_encoder"]
    cached = Pipeline(**{**vars(pipeline), "loaders": without})
    assert np.array_equal(cached.encode_text([PROMPT]), first_rows(pipeline))
    with pytest.raises(ValueError, match="expected T5Encoder with weights, or with a loader"):
        cached.encode_text(["another text"])


def first_rows(pipeline):
    return Pipeline.from_pretrained("tiny").encode_text([PROMPT, "a yellow star"])[
        jnp.array([0, 2])
    ]


def test_a_kept_embedding_that_is_broken_is_made_again(tmp_path):
    pipeline = Pipeline.from_pretrained("tiny", text_cache=tmp_path)
    expected = pipeline.encode_text([PROMPT], None)
    (path,) = tmp_path.iterdir()
    path.write_bytes(b"half")
    assert np.array_equal(pipeline.encode_text([PROMPT], None), expected)
    assert embeddings.read(path, expected.shape[1:]) is not None
    assert embeddings.read(path, (1, 1)) is None
    other = Pipeline(**{**vars(pipeline), "text_name": "other weights"})
    other.encode_text([PROMPT], None)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.slow
def test_random_weights(monkeypatch):
    small = TransformerConfig(2, 12, 16, 16, 32, 16, 48, 2)
    monkeypatch.setitem(parts.CONFIGS, "small", small)
    pipeline = Pipeline.random("small", dtype=jnp.bfloat16, staged=True)
    assert pipeline.size(None, None, None) == (81, 480, 832)
    context = pipeline.encode_text([PROMPT])
    assert context.shape == (2, 512, 32)
    model = pipeline.loaders["transformer"].load()
    again = Pipeline.random("small", dtype=jnp.bfloat16, staged=True).loaders["transformer"].load()
    assert jax.tree.all(jax.tree.map(np.array_equal, model, again))
    velocity = jax.jit(Transformer.__call__)(
        model, jnp.ones((2, 1, 4, 4, 16)), jnp.ones(2), context
    )
    assert 0.05 < float(jnp.std(velocity)) < 20
    assert pipeline.loaders["vae"].template.config.encoder_width == 96
    full = Pipeline.random("1.3B", dtype=jnp.bfloat16, staged=True)
    assert full.transformer.config == T2V_1_3B
    assert full.workload(81, 480, 832).num_tokens == 32_760
    with pytest.raises(ValueError, match=r"size must be '1\.3B' or '14B' or 'small'; got '2B'"):
        Pipeline.random("2B")


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
