"""Wan 2.1: the transformer against upstream's tensors, and a prompt to a video."""

import dataclasses
import functools
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FIXTURES, LAYOUTS, full_size, slow_but
from safetensors import safe_open
from safetensors.numpy import load_file
from small_wan import write_small_wan

from astraea_jax import denoise as loop
from astraea_jax import model as core
from astraea_jax import solvers
from astraea_jax.methods import Astraea, Dense
from astraea_jax.schedule import Schedule
from astraea_ports import checkpoints, tiny
from astraea_ports.checkpoints.matching import best_table, match_tensors
from astraea_ports.pipeline import plan as plans
from astraea_ports.pipeline import stages
from astraea_ports.wan import transformer_weights
from astraea_ports.wan.config import CONFIGS
from astraea_ports.wan.pipeline import Pipeline
from astraea_ports.wan.transformer import Transformer
from astraea_ports.wan.transformer_weights import load_transformer

WEIGHTS = FIXTURES / "wan/transformer_diffusers.safetensors"
ORIGINAL = FIXTURES / "wan/transformer_original.safetensors"
CONFIG = {
    "num_attention_heads": 3, "attention_head_dim": 16, "in_channels": 16, "out_channels": 16,
    "text_dim": 32, "freq_dim": 64, "ffn_dim": 128, "num_layers": 2,
}  # fmt: skip
OUT, WITHIN = 5e-5, 2e-5  # the recordings' README
PROMPT = "a red circle moving left over a blue background"


# --- The transformer against upstream's recorded tensors.


@pytest.fixture(scope="module")
def recorded():
    tensors = load_file(FIXTURES / "wan/transformer_io.safetensors")
    return {k: np.moveaxis(v, 1, -1) if v.ndim == 5 else v for k, v in tensors.items()}


@pytest.fixture(scope="module")
def transformer():
    return load_transformer(WEIGHTS, config=CONFIG)


@jax.jit
def intermediates(model, latents, timestep, context):
    """Everything upstream recorded, by its name there."""
    geometry = model.geometry(latents.shape)
    prepared = model.prepare(context, geometry)
    time = model.modulation(timestep, prepared)
    text = model.text_2(jax.nn.gelu(model.text_1(context), approximate=True))
    tokens, side = model.embed(latents, prepared)
    got = {
        "temb": time.embedding,
        "timestep_proj": time.projected.reshape(len(timestep), -1),
        "text_ctx": text,
        "tokens_in": tokens,
    }
    for index in range(geometry.num_layers):
        layer = jax.tree.map(lambda leaf, i=index: leaf[i], model.layers(0, prepared))
        (block,) = model.bind(0, layer, prepared, time)
        keys_values, side = block.shared(core.Rows(tokens), side)
        out = core.apply_block(block, core.Rows(tokens), keys_values)
        if index == 0:
            details = {
                "b0_k_rope": keys_values.keys,
                "b0_v": keys_values.values,
                "b0_attn1_out": out.outs["self"],
                "b0_attn2_out": out.outs["cross"],
                "b0_ffn_out": out.outs["mlp"],
            }
            got |= {name: value[:1] for name, value in details.items()}
        tokens = out.rows
        got |= {f"b{index}_lse": out.lse, f"block{index}_out": tokens}
    return got | {"head_out": model.head(tokens, time)}


@pytest.mark.core
def test_intermediates(transformer, recorded):
    inputs = recorded["x"], jnp.asarray(recorded["t"], jnp.float32), recorded["context"]
    got = intermediates(transformer, *inputs)
    # Those that the bound block keeps to itself show in what it makes of them.
    hidden = {"b0_attn1_in", "b0_q_rope", "b0_xattn_in", "b0_ffn_in"}
    assert {f"i.{name}" for name in got} == {k for k in recorded if k[:2] == "i."} - {
        f"i.{name}" for name in hidden
    }
    for name, value in got.items():
        tolerance = OUT if name == "head_out" else WITHIN
        expected = recorded[f"i.{name}"]
        np.testing.assert_allclose(value, expected, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.core
def test_velocity(transformer, recorded):
    timestep = jnp.asarray(recorded["t"], jnp.float32)
    got = jax.jit(Transformer.__call__)(transformer, recorded["x"], timestep, recorded["context"])
    np.testing.assert_allclose(got, recorded["out"], rtol=0, atol=OUT)
    # The tolerance sees what matters: the other sample's time is far outside it.
    other = jax.jit(Transformer.__call__)(
        transformer, recorded["x"], timestep[::-1], recorded["context"]
    )
    assert np.abs(np.asarray(other) - recorded["out"]).max() > 100 * OUT


@pytest.mark.slow
@pytest.mark.core
def test_selected_rows_of_a_block_are_the_rows_upstream_has(transformer, recorded):
    geometry = transformer.geometry(recorded["x"].shape)
    prepared = transformer.prepare(jnp.asarray(recorded["context"]), geometry)
    time = transformer.modulation(jnp.asarray(recorded["t"], jnp.float32), prepared)
    layer = jax.tree.map(lambda leaf: leaf[1], transformer.layers(0, prepared))
    (block,) = transformer.bind(0, layer, prepared, time)
    tokens = jnp.asarray(recorded["i.block0_out"])
    indices = jnp.array([[35, 0, 17, 4], [3, 30, 8, 9]])
    rows = jnp.take_along_axis(tokens, indices[..., None], axis=1)
    shared, _ = block.shared(core.Rows(tokens), ())
    got, lse, *_ = core.apply_block(block, core.Rows(rows, indices), shared)
    expected = np.take_along_axis(recorded["i.block1_out"], np.asarray(indices)[..., None], axis=1)
    np.testing.assert_allclose(got, expected, rtol=0, atol=WITHIN)
    expected = np.take_along_axis(recorded["i.b1_lse"], np.asarray(indices)[:, None], axis=2)
    np.testing.assert_allclose(lse, expected, rtol=0, atol=WITHIN)


@pytest.mark.slow
@pytest.mark.core
def test_half_precision(recorded):
    """Both policies against the float32 recording; the reference is the nearer one."""
    timestep = jnp.asarray(recorded["t"], jnp.float32)
    errors, scale = {}, np.abs(recorded["out"]).max()
    for precision, tokens in (("reference", jnp.float32), ("fast", jnp.bfloat16)):
        model = load_transformer(WEIGHTS, config=CONFIG, dtype=jnp.bfloat16, precision=precision)
        assert model.dtype == tokens and model.blocks.ffn_in.kernel.dtype == jnp.bfloat16
        assert model.time_1.kernel.dtype == model.proj_out.kernel.dtype == jnp.float32
        got = jax.jit(Transformer.__call__)(model, recorded["x"], timestep, recorded["context"])
        assert got.dtype == jnp.float32
        errors[precision] = np.sqrt(np.mean((np.asarray(got) - recorded["out"]) ** 2)) / scale
    assert errors["reference"] < errors["fast"] < 5e-3


def test_the_policy_is_named(as_a_user):
    with pytest.raises(ValueError, match="precision must be reference or fast; got 'half'"):
        load_transformer(WEIGHTS, config=CONFIG, precision="half")


def test_the_original_layout_is_the_same_model(transformer):
    same = load_transformer(ORIGINAL, config=CONFIG)
    jax.tree.map(np.testing.assert_array_equal, same, transformer)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "parameters"), [("1.3B", 1_418_996_800), ("14B", 14_288_491_584)])
def test_full_size_keys(name, parameters, layout):
    config = CONFIGS[name]
    keys = full_size(f"transformer_{name}", layout, config.num_layers)
    template = transformer_weights.transformer_template(
        config, dtype=jnp.bfloat16, precision="reference"
    )
    slots = checkpoints.parameter_shapes(template)
    tensors = [checkpoints.Tensor(k, "BF16", tuple(s), Path("x")) for k, s in keys.items()]
    tables = transformer_weights.TABLE, transformer_weights.ORIGINAL
    matches = match_tensors(tensors, slots, best_table(tensors, tables))
    assert sorted(m.tensor.key for found in matches.values() for m in found) == sorted(keys)
    assert sum(np.prod(slot.shape) for slot in slots.values()) == parameters
    wide = sum(np.prod(slot.shape) for slot in slots.values() if slot.dtype == jnp.float32)
    assert 0.005 < wide / parameters < 0.02
    latents = jax.ShapeDtypeStruct((2, 21, 60, 104, 16), "f4")
    context, timestep = jax.ShapeDtypeStruct((2, 512, 4096), "f4"), jax.ShapeDtypeStruct((2,), "f4")
    velocity = jax.eval_shape(Transformer.__call__, template, latents, timestep, context)
    assert velocity.shape == latents.shape and velocity.dtype == jnp.float32
    assert template.geometry(latents.shape).num_tokens == 32_760


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ffn_dim": None}, r"ffn_dim must be an integer in 1\.\.\d+; got None"),
        ({"image_dim": 1280}, r"image_dim must be None; got 1280; .*image-to-video \(I2V\)"),
        ({"qk_norm": "layer_norm"}, "qk_norm must be 'rms_norm_across_heads'"),
        ({"num_layers": 3}, "blocks"),
        ({"ffn_dim": 64}, r"ffn"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        load_transformer(WEIGHTS, config=CONFIG | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, r"num_heads must divide dim \(48\); got 5"),
        ({"model_type": "i2v"}, "model_type must be 't2v'; got 'i2v'"),
        ({"ffn_dim": 64}, r"ffn"),
    ],
)
def test_an_original_config_that_does_not_fit_is_refused(changes, message):
    config = {"dim": 48, "num_heads": 3, "in_dim": 16, "out_dim": 16, "text_dim": 32}
    config |= {"freq_dim": 64, "ffn_dim": 128, "num_layers": 2}
    with pytest.raises(ValueError, match=message):
        load_transformer(ORIGINAL, config=config | changes)


def test_a_file_needs_a_config():
    with pytest.raises(ValueError, match=r"has no config\.json beside it; pass config="):
        load_transformer(WEIGHTS)


# --- A prompt to a video, against Diffusers' run of the same folder.


class Recording(NamedTuple):
    """A run of Diffusers: its tensors (channels last) and what it was asked."""

    tensors: dict
    prompt: str
    guidance: float
    frames: int
    height: int
    width: int

    @property
    def size(self):
        """As the pipeline's arguments."""
        return {"frames": self.frames, "height": self.height, "width": self.width}


@functools.cache
def recording(name: str) -> Recording:
    path = FIXTURES / f"tiny_wan/{name}.safetensors"
    with safe_open(path, "np") as file:
        about = file.metadata()
    tensors = load_file(path)
    for key in ("noise", "latents", *[k for k in tensors if k.startswith("velocity")]):
        tensors[key] = np.moveaxis(tensors[key], 1, -1)
    sizes = (int(about[key]) for key in ("frames", "height", "width"))
    return Recording(tensors, about["prompt"], float(about["guidance"]), *sizes)


@functools.cache
def pipeline() -> Pipeline:
    return Pipeline.from_pretrained("tiny")


def relative(got, expected) -> float:
    """Largest difference over the largest value."""
    return float(np.abs(np.asarray(got) - expected).max() / np.abs(expected).max())


@pytest.fixture(scope="module", params=slow_but({"square"}, ["square", "wide"]))
def upstream(request):
    return recording(request.param)


@pytest.mark.core
def test_text(upstream):
    texts, tensors = [upstream.prompt, ""], upstream.tensors
    tokens = pipeline().tokenizer(texts)
    assert np.array_equal(tokens.ids, tensors["ids"])
    assert np.array_equal(tokens.mask, tensors["mask"])
    got = pipeline().encode_text([upstream.prompt], "")
    np.testing.assert_allclose(got, tensors["text_embedding"], rtol=0, atol=1e-5)


@pytest.mark.core
def test_velocities(upstream):
    tensors = upstream.tensors
    for when, latents, timestep in (
        ("first", tensors["noise"], tensors["timesteps"][0]),
        ("last", tensors["latents"][-2:-1], tensors["timesteps"][-1]),
    ):
        got = jax.jit(Transformer.__call__)(
            pipeline().transformer,
            jnp.concatenate([latents, latents]),
            jnp.full((2,), timestep),
            jnp.asarray(tensors["text_embedding"]),
        )
        for index, branch in enumerate(("cond", "uncond")):
            expected = tensors[f"velocity_{branch}_{when}"][0]
            assert relative(got[index], expected) <= 1e-4, f"{branch} {when}"


@pytest.mark.core
def test_latents_after_every_step(upstream):
    model, tensors = pipeline().transformer, upstream.tensors
    steps = len(tensors["timesteps"])
    solver = solvers.unipc(steps, shift=pipeline().shift)
    np.testing.assert_allclose(solver.sigma, tensors["sigmas"][:-1], rtol=0, atol=1e-6)
    assert np.array_equal(solver.timestep, tensors["timesteps"])
    settings = loop.Settings(Dense(), model.geometry(tensors["noise"].shape), 2, False)
    prepared, state = loop.start_static(
        model, jnp.asarray(tensors["noise"]), jnp.asarray(tensors["text_embedding"]),
        settings=settings,
    )  # fmt: skip
    for index in range(steps):
        row = jax.tree.map(lambda leaf, i=index: jnp.asarray(leaf[i]), solver)
        state, _ = loop.static_step(
            model, prepared, state, row, *map(jnp.int32, (10, index, steps)),
            jnp.float32(upstream.guidance), jax.random.key(0),
            settings=settings, mode=Dense().static_mode(10),
        )  # fmt: skip
        error = relative(state.latents[0], tensors["latents"][index])
        assert error <= 2e-3, f"step {index + 1}: {error:.2g}"


@pytest.mark.slow
def test_video(upstream):
    tensors, seen = upstream.tensors, []
    result = pipeline()(
        upstream.prompt, **upstream.size, steps=len(tensors["timesteps"]),
        guidance=upstream.guidance, latents=jnp.asarray(tensors["noise"]),
        progress=lambda *report: seen.append(report),
    )  # fmt: skip
    assert relative(result.latents[0], tensors["latents"][-1]) <= 2e-3
    assert result.video.shape == (1, *tensors["video"].shape)
    assert float(result.video.min()) >= 0 and float(result.video.max()) <= 1
    levels = np.round(np.asarray(result.video[0]) * 255).astype(int)
    near = np.abs(levels - tensors["video"].astype(int)) <= 1
    assert near.mean() >= 0.999, f"{near.mean():.5f} within one grey level"
    steps = len(tensors["timesteps"])
    assert result.branches == 2 and result.schedule == Schedule.dense(steps)
    assert [s for s in seen if s[0] == "denoise"] == [
        ("denoise", done, steps) for done in range(steps + 1)
    ]
    assert seen[0] == ("text", 0, 1) and seen[-1] == ("decode", 1, 1)
    assert all(watch.run >= 0 for watch in result.seconds.values())


# --- The pipeline.

SIZE = {"frames": 5, "height": 32, "width": 48}


def noise(videos: int, seed: int = 0):
    shape = pipeline().latents_shape(*SIZE.values())
    return jax.random.normal(jax.random.key(seed), (videos, *shape))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return Pipeline.from_pretrained(write_small_wan(tmp_path_factory.mktemp("small")))


@pytest.mark.slow
@pytest.mark.parametrize("method", [None, Astraea()], ids=["dense", "astraea"])
def test_a_batch_equals_its_videos_alone(small, method):
    prompts = [PROMPT, "a yellow star spinning over a green wall"]
    shape = small.latents_shape(*SIZE.values())
    start, levels = jax.random.normal(jax.random.key(0), (2, *shape)), Schedule((10, 5, 5))
    options = SIZE | {"schedule": levels if method else Schedule.dense(3), "method": method}
    together = small(prompts, latents=start, **options)
    assert together.video.shape == (2, 5, 32, 48, 3)
    for index, prompt in enumerate(prompts):
        alone = small(prompt, latents=start[index][None], **options)
        assert relative(together.latents[index], np.asarray(alone.latents[0])) <= 1e-5
        np.testing.assert_allclose(together.video[index], alone.video[0], rtol=0, atol=1e-4)
    assert relative(together.latents[0], np.asarray(together.latents[1])) > 0.1


def test_a_videos_noise_is_that_of_the_seed_and_its_place():
    shape = pipeline().latents_shape(*SIZE.values())
    keys = [jax.random.fold_in(jax.random.key(7), index) for index in range(2)]
    start = jnp.stack([jax.random.normal(key, shape) for key in keys])
    seeded = pipeline().plan([PROMPT, PROMPT], seed=7, **SIZE)
    assert np.array_equal(seeded.noise, start)
    assert np.array_equal(pipeline().plan([PROMPT] * 2, latents=start, **SIZE).noise, start)
    assert np.array_equal(pipeline().plan(PROMPT, seed=7, **SIZE).noise, start[:1])
    assert relative(start[0], np.asarray(start[1])) > 0.1


def latents(**options):
    """What is denoised from the test's noise."""
    options |= SIZE | {"steps": 1, "latents": noise(1)}
    (made,) = pipeline().denoise(pipeline().plan(PROMPT, **options))
    return np.asarray(made.latents)


@pytest.mark.slow
def test_no_guidance_runs_one_branch():
    plan = pipeline().plan(PROMPT, guidance=1.0, **SIZE)
    assert plan.guidance is None and plan.negative_prompt is None
    plain = latents(guidance=1.0)
    text = pipeline().encode_text([PROMPT], None)
    assert text.shape[0] == 1
    expected = loop.denoise(
        pipeline().transformer, noise(1), text, driver="static",
        solver=solvers.unipc(1, shift=pipeline().shift),
    )  # fmt: skip
    assert relative(plain, np.asarray(expected.latents)) <= 1e-5
    assert relative(plain, latents(guidance=5.0)) > 1e-2


def test_the_negative_prompt_is_read():
    other = latents(guidance=5.0, negative_prompt="a blue square")
    assert relative(latents(guidance=5.0), other) > 1e-3


def test_defaults_are_the_folders():
    assert pipeline().defaults == (33, 128, 128, 30, 5.0) and pipeline().shift == 3.0
    assert pipeline().size(None, None, 96) == (33, 128, 96)
    assert pipeline().latents_shape(33, 128, 96) == (9, 16, 12, 16)
    work = pipeline().workload(33, 128, 96)
    (blocks,) = work.kinds
    assert (work.num_tokens, blocks.keys, work.width) == (9 * 8 * 6, 9 * 8 * 6, 256)
    assert (work.num_blocks, blocks.ffn_width, blocks.text_tokens) == (8, 768, 48)


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        ([], {}, "expected at least one prompt; got none"),
        ("", {}, "a prompt must say something; got ''"),
        ([PROMPT, "  "], {}, "a prompt must say something; got '  '"),
        (PROMPT, {"frames": 32}, r"frames must be a multiple of 4 plus 1; got 32: .* is 33"),
        (PROMPT, {"frames": 0}, r"frames must be a multiple of 4 plus 1; got 0: .* is 1"),
        (PROMPT, {"height": 100}, r"height must be a multiple of 16 pixels; got 100: .* is 96"),
        (PROMPT, {"width": -16}, r"width must be a multiple of 16 pixels; got -16: .* is 16"),
        (PROMPT, {"steps": 0}, r"steps must be an integer in 1\.\.10000; got 0"),
        (PROMPT, {"guidance": float("nan")}, "guidance must be .*; got nan"),
        (PROMPT, {"guidance": float("inf")}, "guidance must be .*; got inf"),
        (PROMPT, {"shift": 0.0}, "shift must be a number at least 0.001 .*; got 0.0"),
        (PROMPT, {"shift": 1e308}, r"shift must be .* at most 1000; got 1e\+308"),
        (PROMPT, {"guidance": 1e300}, r"guidance must be .* at most 1000; got 1e\+300"),
        (PROMPT, {"seed": [1, 2]}, "a seed, or one for each of 1 videos; got 2 seeds"),
        (PROMPT, {"solver": "ddim"}, "solver must be one of unipc, dpm.*, euler; got 'ddim'"),
        (PROMPT, {"seed": -1}, r"seed must be an integer in 0\.\.2\^32-1; got -1"),
        (PROMPT, {"seed": 2**32}, r"seed must be an integer in 0\.\.2\^32-1; got 4294967296"),
        (
            PROMPT, {"steps": 4, "schedule": Schedule((10, 5))},
            "expected a schedule of 4 levels, one a solver step; got 2",
        ),
        (
            PROMPT, {"latents": jnp.zeros((2, 2, 4, 6, 16))},
            r"expected latents of shape \(1, 2, 4, 6, 16\); got \(2, 2, 4, 6, 16\)",
        ),
        (
            PROMPT, {"latents": jnp.zeros((1, 2, 4, 5, 16))},
            r"expected latents of shape \(1, 2, 4, 6, 16\); got \(1, 2, 4, 5, 16\)",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_any_work(monkeypatch, prompts, changes, message):
    def work(*args, **kwargs):
        raise AssertionError("the model ran")

    monkeypatch.setattr(loop, "dynamic_loop", work)
    monkeypatch.setattr(loop, "start_static", work)
    with pytest.raises(ValueError, match=message):
        pipeline()(prompts, **SIZE | {"steps": 2} | changes)


def test_wrong_types_are_refused(as_a_user):
    with pytest.raises(ValueError, match=r"a prompt must say something; got 7"):
        pipeline()([7], **SIZE)
    with pytest.raises(ValueError, match=r"height must be a multiple of 16 pixels; got 32\.0"):
        pipeline()(PROMPT, **SIZE | {"height": 32.0})
    with pytest.raises(ValueError, match=r"seed must be an integer .* got '3'"):
        pipeline()(PROMPT, seed="3", **SIZE)


def test_seeds_of_a_batch_are_those_of_videos_alone():
    assert plans.check_seeds(7, 2) == [(7, 0), (7, 1)]
    assert plans.check_seeds([3, np.int64(4)], 2) == [(3, 0), (4, 0)]
    shape = pipeline().latents_shape(*SIZE.values())
    both = plans.make_noise(2, shape, plans.check_seeds([3, 4], 2), None)
    alone = plans.make_noise(1, shape, plans.check_seeds(4, 1), None)
    assert np.array_equal(both[1], alone[0])


def test_a_negative_prompt_that_does_nothing_is_warned_of():
    # No steps, so that nothing runs after the prompts are checked.
    options = SIZE | {"steps": 0, "guidance": 1.0}
    with pytest.raises(ValueError, match="steps"), pytest.warns(UserWarning, match="no effect"):
        pipeline()(PROMPT, negative_prompt="a blue square", **options)
    with pytest.raises(ValueError, match="steps"), warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline()(PROMPT, negative_prompt=None, **options)


def test_nan_is_said_at_its_stage():
    values = np.ones((2, 3), np.float32)
    stages.check_finite("denoising", values, "the weights")
    values[1, 0] = np.nan
    with pytest.raises(
        ValueError, match=r"denoising gave NaN .* in 1 of 2 videos \(2\): check the"
    ):
        stages.check_finite("denoising", values, "the weights")


def test_long_prompts_are_cut_in_a_warning():
    words = " ".join(f"qz{letter}xv" for letter in "abcdefghijklmnop") + " " + "q" * 100_000
    with pytest.warns(UserWarning, match="and 7 more") as warned:
        plans.check_prompts([words], pipeline().tokenizer)
    assert all(len(str(each.message)) < 500 for each in warned)


def test_unknown_words_are_named_in_a_warning():
    # No steps, so that nothing runs after the prompts are checked.
    with pytest.raises(ValueError, match="steps"), pytest.warns(UserWarning) as warned:
        pipeline()("a red xylophone and a zebra", steps=0, **SIZE)
    assert "does not know: xylophone, zebra;" in str(warned[0].message)
    with pytest.raises(ValueError, match="steps"), warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline()(PROMPT, steps=0, **SIZE)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path, r"model_index\.json"),
        (lambda path: path / "none", "expected the folder of a model or a hub id"),
        (lambda path: tiny.FOLDER / "vae", r"model_index\.json"),
        (lambda path: tiny.FOLDER / "astraea.json", "expected the folder of a model .*a file"),
    ],
)
def test_a_folder_that_is_no_model_is_refused(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        Pipeline.from_pretrained(make(tmp_path))


def test_another_kind_of_pipeline_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ValueError, match=r"_class_name must be 'WanPipeline'; got 'FluxPipeline'"):
        Pipeline.from_pretrained(tmp_path)


def test_a_pipeline_is_a_value():
    assert dataclasses.replace(pipeline(), shift=5.0).shift == 5.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        pipeline().shift = 5.0


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
