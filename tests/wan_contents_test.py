"""What a Wan model's JSON files may say: real ones open, all else is refused by the field."""

import dataclasses
import json
import math
import os
import shutil
import sys

import numpy as np
import pytest
from helpers import FIXTURES

from astraea_jax.checks import Refusal
from astraea_ports import checkpoints, tiny
from astraea_ports.checkpoints import folders
from astraea_ports.pipeline import plan
from astraea_ports.text import t5
from astraea_ports.text.tokenizer import Tokenizer, stated_length
from astraea_ports.wan import contents, vae_weights
from astraea_ports.wan.config import CONFIGS, TransformerConfig
from astraea_ports.wan.pipeline import Pipeline
from astraea_ports.wan.transformer_weights import load_transformer
from astraea_ports.wan.vae import VAEConfig
from astraea_ports.wan.vae_weights import load_vae

REAL = json.loads((FIXTURES / "wan/configs.json").read_text())
"""The JSON files of models on the hub, by model and path: those that run here, and the others."""

DIFFUSERS = REAL["runs"]["Wan2.1-T2V-1.3B-Diffusers"]
ORIGINAL = REAL["runs"]["Wan2.1-T2V-1.3B"]
SETTINGS = {"frames": 81, "height": 480, "width": 832, "steps": 50, "guidance": 5.0}


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    return folder


def changed(files, name, **changes):
    return files | {name: files[name] | changes}


# --- Real models.


@pytest.mark.parametrize("name", REAL["runs"])
def test_real_files_of_the_models_that_run_here_open(tmp_path, name):
    found = contents.read(write(tmp_path, REAL["runs"][name]))
    original = "config.json" in REAL["runs"][name]
    assert found.grid == ("original" if original else "diffusers")
    assert found.shift == (5.0 if original else 3.0)
    assert found.text_length == 512 and found.defaults == (81, 480, 832, 50, 5.0)
    size = "14B" if "14B" in name else "1.3B"
    files = REAL["runs"][name]
    config = files["config.json" if original else "transformer/config.json"]
    assert TransformerConfig.from_dict(config) == CONFIGS[size]
    if not original:
        wan = VAEConfig.from_dict(vae_weights.WAN_VAE)
        assert VAEConfig.from_dict(files["vae/config.json"]) == wan
        encoder = t5.T5Config.from_dict(t5.UMT5_XXL)
        assert t5.T5Config.from_dict(files["text_encoder/config.json"]) == encoder


def test_the_shipped_model_opens():
    found = contents.read(tiny.FOLDER)
    assert found.text_length is None and found.shift == 3.0
    assert found.defaults == (33, 128, 128, 30, 5.0)


OTHERS = {
    "Wan2.2-T2V-A14B-Diffusers": ("A14B", ["boundary_ratio", "transformer_2"]),
    "Wan2.2-I2V-A14B-Diffusers": ("A14B", ["_class_name", "boundary_ratio", "transformer_2"]),
    "Wan2.2-TI2V-5B-Diffusers": ("TI2V-5B", ["expand_timesteps"]),
    "Wan2.1-I2V-14B-480P-Diffusers": ("I2V", ["_class_name", "image_encoder", "image_processor"]),
    "Wan2.1-FLF2V-14B-720P-Diffusers": ("I2V", ["_class_name", "image_encoder"]),
    "Wan2.1-VACE-1.3B-Diffusers": ("VACE", ["_class_name", "transformer"]),
    "Wan2.1-I2V-14B-480P": ("I2V", ["model_type"]),
    "Wan2.1-FLF2V-14B-720P": ("FLF2V", ["model_type"]),
    "Wan2.1-VACE-1.3B": ("VACE", ["model_type", "vace_layers", "vace_in_dim", "_class_name"]),
    "Wan2.2-TI2V-5B": ("TI2V-5B", ["model_type"]),
    "Wan2.2-T2V-A14B": ("A14B", ["high_noise_model", "low_noise_model"]),
}


@pytest.mark.parametrize("name", REAL["refused"])
def test_other_models_of_the_family_are_refused_by_name(tmp_path, name):
    folder = write(tmp_path, REAL["refused"][name])
    kind, names = OTHERS[name]
    # No weights are there, and none are asked for: not an extra to read them with either.
    with pytest.raises(Refusal) as refused:
        Pipeline.from_pretrained(folder)
    said = str(refused.value)
    assert "looks like Wan" in said and kind in said.splitlines()[0]
    assert "what runs here is Wan 2.1 text-to-video" in said
    assert all(field in said for field in names)


@pytest.mark.parametrize(
    "name", ["Wan2.2-T2V-A14B-Diffusers", "Wan2.2-TI2V-5B-Diffusers", "Wan2.1-VACE-1.3B-Diffusers"]
)
def test_nor_is_their_transformer_loaded_alone(tmp_path, name):
    with pytest.raises(Refusal, match=r"model_index|WanVACETransformer3DModel"):
        load_transformer(write(tmp_path, REAL["refused"][name]))


FAMILY_FIELDS = {
    "transformer/config.json": [
        {"image_dim": 1280}, {"added_kv_proj_dim": 5120}, {"pos_embed_seq_len": 514},
        {"vace_layers": [0, 2]}, {"vace_in_channels": 96}, {"in_channels": 36},
        {"_class_name": "WanVACETransformer3DModel"}, {"quantization_config": {"bits": 4}},
        {"in_channels": 48, "out_channels": 48}, {"qk_norm": None}, {"cross_attn_norm": False},
        {"invented": 1}, {"model_type": "i2v"},
    ],
    "model_index.json": [
        {"_class_name": "WanImageToVideoPipeline"}, {"_class_name": "WanVACEPipeline"},
        {"_class_name": "FluxPipeline"}, {"boundary_ratio": 0.875}, {"expand_timesteps": True},
        {"transformer_2": ["diffusers", "WanTransformer3DModel"]},
        {"image_encoder": ["transformers", "CLIPVisionModel"]}, {"transformer": [None, None]},
        {"image_processor": ["transformers", "CLIPImageProcessor"]},
        {"vae": ["diffusers", "AutoencoderKL"]}, {"safety_checker": ["x", "y"]},
        {"scheduler": ["diffusers", "DDIMScheduler"]},
        {"text_encoder": ["transformers", "CLIPTextModel"]},
    ],
    "scheduler/scheduler_config.json": [
        {"prediction_type": "epsilon"}, {"prediction_type": "v_prediction"},
        {"use_flow_sigmas": False}, {"use_karras_sigmas": True}, {"use_dynamic_shifting": True},
        {"num_train_timesteps": 100}, {"thresholding": True}, {"solver_order": 3},
        {"shift": 5.0}, {"shift_terminal": 0.1}, {"final_sigmas_type": "sigma_min"},
        {"_class_name": "DDIMScheduler"}, {"invented": 1},
    ],
    "vae/config.json": [
        {"is_residual": True}, {"patch_size": 2}, {"attn_scales": [1.0]}, {"in_channels": 12},
        {"scale_factor_spatial": 16}, {"scale_factor_temporal": 8}, {"z_dim": 48},
        {"_class_name": "AutoencoderKLWanVACE"}, {"invented": 1},
    ],
    "text_encoder/config.json": [
        {"model_type": "bert"}, {"feed_forward_proj": "relu"}, {"dense_act_fn": "gelu"},
        {"is_gated_act": False}, {"is_decoder": True}, {"quantization_config": {"bits": 8}},
        {"d_model": 2048},
    ],
    "tokenizer/tokenizer_config.json": [{"padding_side": "left"}, {"truncation_side": "left"}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "changes"),
    [(name, changes) for name, listed in FAMILY_FIELDS.items() for changes in listed],
)
def test_what_the_port_does_not_do_is_refused_by_the_fields_name(tmp_path, name, changes):
    folder = write(tmp_path, changed(DIFFUSERS, name, **changes))
    with pytest.raises(Refusal) as refused:
        contents.read(folder)
    assert next(iter(changes)) in str(refused.value)


def test_what_says_nothing_is_let_through(tmp_path):
    files = DIFFUSERS
    for name in ("transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json"):
        files = changed(files, name, _name_or_path="x/y", invented=None)
    files = changed(files, "model_index.json", safety_checker=[None, None], _made_by="me")
    assert contents.read(write(tmp_path, files)) == contents.read(write(tmp_path, DIFFUSERS))


def test_parts_of_different_models_are_refused(tmp_path):
    files = changed(DIFFUSERS, "text_encoder/config.json", d_model=2048)
    files = changed(files, "transformer/config.json", in_channels=8, out_channels=8)
    with pytest.raises(Refusal) as refused:
        contents.read(write(tmp_path, files))
    assert "z_dim (16); got 8" in str(refused.value)
    assert "d_model (2048); got 4096" in str(refused.value)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny.FOLDER, folder)
    path = folder / "tokenizer/tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"] += [
        content["added_tokens"][0] | {"id": index, "content": f"<new {index}>"}
        for index in range(346, 513)
    ]
    path.write_text(json.dumps(content))
    with pytest.raises(Refusal, match=r"vocab_size must be at least .* 513 tokens; got 512"):
        Pipeline.from_pretrained(folder, staged=True).encode_text(["a red circle"])


def test_the_originals_config_says_the_texts_length(tmp_path):
    files = changed(ORIGINAL, "config.json", text_len=256)
    assert contents.read(write(tmp_path, files)).text_length == 256


# --- Fields, by rule.

WRONG = [
    "wrong", "4", True, False, -1, 0, None, math.nan, 1e-60, 1e9, 10**9, 10**30, 2.5, [], [[]],
    {"a": {"b": 1}}, [10**30] * 3, [True] * 3, [1e-60] * 16, [math.nan] * 16,
]  # fmt: skip
"""What a field may hold by mistake."""

WORD, NOTHING = ["wrong", "4"], [None]
NUMBERS = [0, 1e-60]

HARMLESS = {
    "scheduler/scheduler_config.json": {
        # A flow's noise levels do not depend on them.
        "beta_start": NUMBERS,
        "beta_end": NUMBERS,
        "beta_schedule": WORD,
        "rescale_betas_zero_snr": [True],
        "timestep_spacing": WORD,
        "dynamic_thresholding_ratio": NUMBERS,
        "sample_max_value": [0, 1e-60, 2.5],
        # Off, in another word.
        "use_beta_sigmas": NOTHING,
        "use_exponential_sigmas": NOTHING,
        "use_karras_sigmas": NOTHING,
        # Another shift, which counts.
        "flow_shift": [2.5],
    },
    "transformer/config.json": {},
    # Another VAE, whose weights are others; and what is of training alone.
    "vae/config.json": {
        "dropout": NUMBERS,
        "latents_mean": [[1e-60] * 16],
        "temperal_downsample": [[True] * 3],
    },
    # Of the decoder, of training, of other programs.
    "text_encoder/config.json": {
        "architectures": [None, []],
        "classifier_dropout": NUMBERS,
        "dropout_rate": NUMBERS,
        "initializer_factor": [0, 1e-60, 2.5],
        "num_decoder_layers": [0, None],
        "pad_token_id": [-1, 0, None],
        "eos_token_id": [-1, 0, None],
        "decoder_start_token_id": [-1, 0, None],
        "is_encoder_decoder": [False],
        "scalable_attention": [False],
        "output_past": [False],
        "use_cache": [False],
        "tie_word_embeddings": [True],
        "tokenizer_class": [*WORD, None],
        "torch_dtype": [*WORD, None],
        "transformers_version": [*WORD, None],
    },
    "tokenizer/tokenizer_config.json": {
        "model_max_length": [None, 1e9, 10**9, 10**30],  # no limit, and so 512
        # Held against tokenizer.json when that is read.
        "pad_token": [*WORD, None],
        "eos_token": [*WORD, None],
        "unk_token": [*WORD, None],
        "bos_token": [*WORD, None],
        # What tokenizer.json holds.
        "added_tokens_decoder": [{"a": {"b": 1}}],
        "additional_special_tokens": [None, []],
        "extra_ids": [0],
        "sp_model_kwargs": [None, {"a": {"b": 1}}],
        "legacy": [False, None],
        "clean_up_tokenization_spaces": [False, None],
        "spaces_between_special_tokens": [True, None],
        "tokenizer_class": [*WORD, None],
    },
    "model_index.json": {},
    # Other defaults, which count.
    "astraea.json": {"guidance": [0, 1e-60, 2.5]},
}
"""Of each file, the fields that may hold some of these, since they do no harm."""

UNKNOWN = {"extra_special_tokens"}
"""Fields that are not known here, and let through."""


def same(value, other):
    """Equal by type too."""
    return type(value) is type(other) and value == other


@pytest.mark.parametrize("name", HARMLESS)
def test_every_field_of_every_file_by_rule(tmp_path, monkeypatch, name):
    held = DIFFUSERS | {"astraea.json": SETTINGS | {"grid": "original"}}
    write(tmp_path, held)

    def read_config(folder, name="config.json", **_):
        return held[(folder / name).relative_to(tmp_path).as_posix()]

    monkeypatch.setattr(checkpoints, "read_config", read_config)
    alone = {
        "transformer/config.json": TransformerConfig.from_dict,
        "vae/config.json": VAEConfig.from_dict,
        "text_encoder/config.json": t5.T5Config.from_dict,
        "tokenizer/tokenizer_config.json": lambda _: stated_length(tmp_path / "tokenizer"),
    }
    read = alone.get(name, lambda _: contents.read(tmp_path))
    content, accepted = held[name], {}
    private = {field for field in content if field.startswith("_")} - {"_class_name"}
    for field in content.keys() - private - UNKNOWN:
        for value in WRONG:
            if same(value, content[field]):
                continue
            held[name] = content | {field: value}
            try:
                read(held[name])
            except Refusal as refused:
                assert field in str(refused), (field, value, str(refused))
            else:
                accepted.setdefault(field, []).append(value)
    allowed = HARMLESS[name]
    extra = {
        field: kept
        for field, values in accepted.items()
        if (kept := [v for v in values if not any(same(v, w) for w in allowed.get(field, []))])
    }
    assert extra == {}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("transformer/config.json", {"num_layers": 10**9}, r"num_layers must be .* 1\.\.200"),
        ("transformer/config.json", {"attention_head_dim": 65}, "attention_head_dim .* even"),
        ("transformer/config.json", {"freq_dim": 255}, "freq_dim must be even"),
        (
            "transformer/config.json",
            {"num_layers": 200, "num_attention_heads": 64, "attention_head_dim": 1024},
            r"its sizes make .*e\+12 parameters; at most 2e\+11",
        ),
        (
            "transformer/config.json",
            {"num_attention_heads": 1024, "attention_head_dim": 1024},
            "num_attention_heads x attention_head_dim must be at most 65536",
        ),
        ("vae/config.json", {"latents_std": [1e-60] * 16}, r"latents_std \[0\] must be .* 0\.001"),
        ("vae/config.json", {"latents_mean": [0.0]}, r"latents_mean must have 16 values \(z_dim\)"),
        ("vae/config.json", {"temperal_downsample": [True]}, "temperal_downsample must have 3"),
        ("vae/config.json", {"num_res_blocks": True}, "num_res_blocks must be an integer"),
        ("vae/config.json", {"base_dim": 8192, "dim_mult": [1, 2, 4, 64]}, "its sizes make"),
        ("vae/config.json", {"base_dim": 1}, "a stage of the decoder has one channel"),
        ("text_encoder/config.json", {"num_heads": 1024, "d_kv": 4096}, "num_heads x d_kv must"),
        ("text_encoder/config.json", {"d_ff": 200_000, "num_layers": 200}, "its sizes make"),
        ("text_encoder/config.json", {"layer_norm_epsilon": 1e-60}, "layer_norm_epsilon must"),
        (
            "text_encoder/config.json",
            {"relative_attention_max_distance": 8},
            "relative_attention_max_distance must be above a quarter",
        ),
        ("astraea.json", {"height": 490}, "astraea.json: height must be a multiple of 16 pixels"),
        ("astraea.json", {"frames": 80}, "frames must be a multiple of 4 plus 1"),
        ("astraea.json", {"frames": 65_533, "height": 4096}, "tokens; at most 1048576"),
        ("astraea.json", {"steps": "4"}, r"steps must be an integer in 1\.\.1000; got '4'"),
        ("astraea.json", {"invented": 1}, "'invented' is not known here"),
    ],
)
def test_sizes_are_checked_together_before_anything_is_made(tmp_path, name, changes, message):
    files = DIFFUSERS | {"astraea.json": SETTINGS}
    with pytest.raises(Refusal, match=message):
        contents.read(write(tmp_path, changed(files, name, **changes)))


def test_all_that_is_wrong_with_a_file_is_said_at_once(tmp_path):
    files = changed(DIFFUSERS, "vae/config.json", base_dim="96", z_dim=-1, is_residual=True)
    with pytest.raises(Refusal) as refused:
        contents.read(write(tmp_path, files))
    lines = str(refused.value).splitlines()
    assert "vae/config.json: 3 fields are wrong; this looks like Wan 2.2 TI2V-5B" in lines[0]
    assert sorted(line.split()[0] for line in lines[1:]) == ["base_dim", "is_residual", "z_dim"]


@pytest.mark.parametrize("name", [*DIFFUSERS, "astraea.json"])
@pytest.mark.parametrize("content", ["[]", "3", "null", "{", "", "[" * 100_000, '{"a": NaN}'])
def test_files_that_hold_no_object_are_refused(tmp_path, name, content):
    write(tmp_path, DIFFUSERS | {"astraea.json": SETTINGS})
    (tmp_path / name).write_text(content)
    with pytest.raises(Refusal, match=name):
        contents.read(tmp_path)


# --- What is no file.

SPECIAL = {
    "fifo": os.mkfifo,
    "folder": os.mkdir,
    "device": lambda path: os.symlink("/dev/zero", path),
    "dangling link": lambda path: os.symlink("nowhere", path),
    "looping link": lambda path: os.symlink(path, path),
}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", [*DIFFUSERS, "astraea.json"])
def test_what_is_no_regular_file_is_refused(tmp_path, name, kind):
    write(tmp_path, DIFFUSERS)
    (tmp_path / name).unlink(missing_ok=True)
    SPECIAL[kind](tmp_path / name)
    with pytest.raises(Refusal, match=name):
        contents.read(tmp_path)


@pytest.mark.parametrize("kind", SPECIAL)
def test_a_tokenizer_that_is_no_regular_file_is_refused(tmp_path, kind):
    folder = tmp_path / "tokenizer"
    shutil.copytree(tiny.FOLDER / "tokenizer", folder)
    (folder / "tokenizer.json").unlink()
    SPECIAL[kind](folder / "tokenizer.json")
    with pytest.raises(Refusal, match=r"tokenizer\.json"):
        Tokenizer.from_pretrained(folder)


def test_a_tokenizer_of_absurd_size_is_refused(tmp_path):
    folder = tmp_path / "tokenizer"
    shutil.copytree(tiny.FOLDER / "tokenizer", folder)
    with (folder / "tokenizer.json").open("r+b") as file:
        file.truncate(1 << 40)  # sparse: no byte is written
    with pytest.raises(Refusal, match="a tokenizer of at most"):
        Tokenizer.from_pretrained(folder)


def test_a_tokenizer_that_makes_its_library_panic_is_refused(tmp_path):
    folder = tmp_path / "tokenizer"
    shutil.copytree(tiny.FOLDER / "tokenizer", folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["post_processor"]["special_tokens"] = {}
    path.write_text(json.dumps(content))
    with pytest.raises(Refusal, match=r"tokenizer\.json is no tokenizer"):
        Tokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ({"a": "x\0y.safetensors"}, "must be a file's name"),
        ({"a": "x" * 300}, "must be text of 1 to 255 letters"),
        ({"a": ""}, "must be text of 1 to 255 letters"),
        ({"a": None}, "must be text"),
        ({str(i): f"{i}.safetensors" for i in range(10_001)}, "names 10001 files; at most 10000"),
        ([], "must be an object"),
    ],
)
def test_an_index_of_shards_by_rule(tmp_path, shards, message):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": -1}, "weight_map": shards}))
    with pytest.raises(Refusal, match=message):
        folders.checkpoint_files(tmp_path)


# --- Configs as they are passed.


def test_a_config_may_be_one_of_ours(as_a_user):
    small = FIXTURES / "wan/transformer_diffusers.safetensors"
    config = TransformerConfig(3, 16, 16, 16, 32, 64, 128, 2)
    model = load_transformer(small, config=config)
    assert model.config == config
    with pytest.raises(Refusal, match="does not fit this model"):
        load_transformer(small, config=CONFIGS["1.3B"])
    vae = VAEConfig.from_dict(vae_weights.WAN_VAE | {"base_dim": 4, "dim_mult": [1, 2, 2, 2]})
    assert load_vae(FIXTURES / "wan/vae_diffusers.safetensors", config=vae).config == vae
    text = t5.T5Config(97, 32, 8, 64, 2, 4)
    weights = FIXTURES / "wan/umt5_diffusers.safetensors"
    assert t5.load_text_encoder(weights, config=text).config == text
    for kind in (TransformerConfig, VAEConfig, t5.T5Config):
        for wrong in (None, 3, "config.json", [1]):
            with pytest.raises(Refusal, match="to be an object of fields"):
                kind.from_dict(wrong)
    with pytest.raises(Refusal, match="num_layers must be"):
        load_transformer(small, config=dataclasses.replace(config, num_layers=10**9))


def test_a_file_of_weights_has_the_config_beside_it(tmp_path):
    config = {"_class_name": "WanTransformer3DModel", "num_attention_heads": 3, "in_channels": 16}
    config |= {"attention_head_dim": 16, "out_channels": 16, "text_dim": 32, "freq_dim": 64}
    config |= {"ffn_dim": 128, "num_layers": 2}
    weights = tmp_path / "model.safetensors"
    shutil.copy(FIXTURES / "wan/transformer_diffusers.safetensors", weights)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_transformer(weights).config.ffn_dim == 128
    # One of another kind is not taken for it.
    with pytest.raises(Refusal, match="to describe AutoencoderKLWan"):
        load_vae(weights)


# --- Sizes of a video.


@pytest.mark.parametrize("value", [True, None, "480", 480.5, math.nan, math.inf, [], -16])
@pytest.mark.parametrize("which", range(3))
def test_sizes_of_a_video_are_integers(as_a_user, value, which):
    size: list = [81, 480, 832]
    size[which] = value
    with pytest.raises(Refusal, match=f"^{('frames', 'height', 'width')[which]} must be a"):
        plan.check_size(tuple(size), VAEConfig.from_dict(vae_weights.WAN_VAE), (1, 2, 2))


def test_sizes_of_a_video_have_a_ceiling(as_a_user):
    image = VAEConfig.from_dict(vae_weights.WAN_VAE)
    got = plan.check_size((np.int64(81), np.int32(720), 1280), image, (1, 2, 2))
    assert got == (81, 720, 1280) and all(type(value) is int for value in got)
    with pytest.raises(Refusal, match=r"letters\) tokens; at most 1048576"):
        plan.check_size((81, 16 * 10**400, 832), image, (1, 2, 2))
    with pytest.raises(Refusal, match=r"81 frames of 16384 x 16384 pixels are 22020096 tokens"):
        plan.check_size((81, 16384, 16384), image, (1, 2, 2))


def test_frames_are_whole_tokens():
    image = VAEConfig.from_dict(vae_weights.WAN_VAE)
    pairs = (2, 2, 2)
    assert plan.check_size((77, 480, 832), image, pairs) == (77, 480, 832)
    with pytest.raises(Refusal, match=r"frames must be a multiple of 8 plus 5; got 81: .* 77|85"):
        plan.check_size((81, 480, 832), image, pairs)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
