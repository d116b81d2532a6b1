"""`astraea convert`: the copy is the same model, and is there whole or not at all."""

import json
import os
import pwd
import re
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from safetensors.numpy import save_file

import astraea_ports
from astraea_jax import cli, files, metrics
from astraea_jax.checks import Refusal
from astraea_jax.model import fingerprint
from astraea_jax.search.recipe import recipes_in
from astraea_ports import tiny
from astraea_ports.checkpoints import lora
from astraea_ports.pipeline import convert, parts
from astraea_ports.wan.pipeline import Pipeline
from astraea_ports.wan.transformer_weights import load_transformer


@pytest.fixture
def empty_weights(monkeypatch):
    """Conversions write no weights, which takes most of their time."""
    monkeypatch.setattr(convert.converted, "save", lambda module, folder: None)


# --- What a copy carries.


def test_a_copy_carries_all_that_the_folder_says(tmp_path):
    target = tmp_path / "copy"
    convert.convert_model("tiny", target)
    for name in ("captions.json", "model_index.json", "scheduler/scheduler_config.json"):
        assert (target / name).read_bytes() == (tiny.FOLDER / name).read_bytes()
    assert recipes_in(target / "schedules") == recipes_in(tiny.FOLDER / "schedules") != []
    settings = json.loads((tiny.FOLDER / "astraea.json").read_text())
    assert json.loads((target / "astraea.json").read_text()) == settings | {"grid": "diffusers"}
    # By which the schedules are known to be of this model.
    copy = Pipeline.from_pretrained(target)
    assert fingerprint(copy.transformer) == fingerprint(load_transformer(tiny.FOLDER))
    assert copy.dtype == "float32" and not copy.loaders


@pytest.mark.slow
def test_a_copy_makes_the_same_video_at_half_the_tokens(
    fully_optimised, tmp_path, monkeypatch, capsys
):
    """By the schedule that was searched for the model, not one that is spread evenly."""
    convert.convert_model("tiny", tmp_path / "copy", dtype="float32")
    compared, psnr = [], metrics.psnr
    monkeypatch.setattr(metrics, "psnr", lambda *videos: compared.append(videos) or psnr(*videos))
    said = []
    for model in ("tiny", str(tmp_path / "copy")):
        command = ["generate", "a red circle moving left over a blue background"]
        command += ["--model", model, "--budget", "0.5", "--compare"]
        assert cli.main([*command, "--output", str(tmp_path / "out.mp4")]) == 0
        rows = re.findall(r"^ *(?:tokens computed|PSNR).*", capsys.readouterr().out, re.M)
        assert len(rows) == 2
        said.append(rows)
    assert said[0] == said[1]
    for one, other in zip(*compared, strict=True):  # dense, and at half
        np.testing.assert_array_equal(one, other)
    assert 58 < psnr(*compared[1]) < 59  # 50.3 dB where the schedules are left behind


def test_with_a_lora_the_schedules_are_of_another_model(tmp_path, empty_weights):
    changes = {
        "diffusion_model.blocks.0.self_attn.q.lora_A.weight": np.zeros((1, 256), np.float32),
        "diffusion_model.blocks.0.self_attn.q.lora_B.weight": np.zeros((256, 1), np.float32),
    }
    save_file(changes, tmp_path / "changes.safetensors")
    with pytest.warns(UserWarning, match="searched for the model without the LoRA"):
        convert.convert_model(
            "tiny", tmp_path / "copy", lora=[lora.Lora(tmp_path / "changes.safetensors")]
        )
    assert not (tmp_path / "copy/schedules").exists()
    assert (tmp_path / "copy/captions.json").is_file()


# --- Dtype and staging.


@pytest.mark.parametrize(
    ("stored", "large", "runs"),
    [
        ("float32", False, "float32"),
        ("float32", True, "bfloat16"),
        ("bfloat16", False, "bfloat16"),
        ("bfloat16", True, "bfloat16"),
        ("float16", False, "float32"),
        ("float16", True, "bfloat16"),
    ],
)
def test_the_dtype_of_a_folder_that_says_none(stored, large, runs):
    assert parts.own_dtype(stored, large) == runs


def test_a_folder_is_opened_by_one_rule(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(tiny.FOLDER, folder)
    said = json.loads((folder / "astraea.json").read_text())
    (folder / "astraea.json").write_text(json.dumps(said | {"dtype": "bfloat16"}))
    assert parts.main_dtype(astraea_ports.open_parts(folder).transformer.template) == "bfloat16"
    said.pop("dtype")
    (folder / "astraea.json").write_text(json.dumps(said))
    opened = astraea_ports.open_parts(folder)  # its weights are bfloat16
    assert parts.main_dtype(opened.transformer.template) == "bfloat16" and not opened.large
    again = astraea_ports.open_parts(folder, dtype="float32")
    assert parts.main_dtype(again.transformer.template) == "float32"
    monkeypatch.setattr(parts, "LARGE", 1000)
    assert Pipeline.from_pretrained(tiny.FOLDER).loaders


# --- A user without a home.


@pytest.mark.parametrize(
    "call",
    [
        lambda: convert.convert_model("~/model", "copy"),
        lambda: convert.convert_model("~nobody-of-that-name/model", "copy"),
        lambda: convert.convert_model("tiny", "~/copy/of/it"),
        lambda: load_transformer("~/model.safetensors"),
        lambda: load_transformer(tiny.FOLDER, lora=[lora.Lora("~/x.safetensors")]),
        lambda: Pipeline.from_pretrained("~/model"),
    ],
)
def test_without_a_home_a_path_is_taken_as_it_is_written(call, tmp_path, monkeypatch):
    def no_account(*_):
        raise KeyError("no such account")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", no_account)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refusal, match="~"):
        call()
    assert os.listdir() == []


# --- Targets, and what is left of a conversion that stops.


def test_a_target_that_can_not_be_made_is_refused_before_the_model(tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("the model was opened")

    monkeypatch.setattr(astraea_ports, "open_parts", never)
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    for name, words in (
        ("x" * 300, "File name too long"),
        ("a\0b", "null"),
        ("dangling", "does not exist yet"),
        ("loop", "does not exist yet"),
        ("file", "does not exist yet"),
        ("file/x", "choose another name"),
        ("none/x", "is no folder that can be written to"),
    ):
        with pytest.raises(Refusal, match=words):
            convert.convert_model("tiny", tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["dangling", "file", "loop"]


def test_a_long_name_is_as_good_as_any(tmp_path, empty_weights):
    convert.convert_model("tiny", tmp_path / ("x" * 255))
    assert os.listdir(tmp_path) == ["x" * 255]


def test_a_disk_without_room_is_refused_before_the_weights(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(Refusal, match="make room or choose another folder"):
        convert.convert_model("tiny", tmp_path / "copy")
    assert os.listdir(tmp_path) == []


def test_nothing_is_left_where_a_thread_still_writes(tmp_path, monkeypatch):
    def interrupted(module, folder):
        def write():
            for index in range(30):
                folder.mkdir(parents=True, exist_ok=True)
                (folder / str(index)).touch()
                time.sleep(0.01)

        threading.Thread(target=write).start()
        time.sleep(0.05)
        raise KeyboardInterrupt

    monkeypatch.setattr(convert.converted, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert.convert_model("tiny", tmp_path / "copy")
    time.sleep(0.5)
    assert os.listdir(tmp_path) == []


def test_what_a_killed_conversion_left_is_removed(tmp_path, empty_weights, monkeypatch):
    target, rename = tmp_path / "copy", os.replace
    monkeypatch.setattr(convert, "_remove", lambda folder: None)
    monkeypatch.setattr(convert.os, "replace", lambda *_: None)
    convert.convert_model("tiny", target)  # as if killed before the end
    (left,) = os.listdir(tmp_path)
    (tmp_path / left / "stale").touch()
    monkeypatch.undo()
    monkeypatch.setattr(convert.converted, "save", lambda module, folder: None)
    assert os.replace is rename
    lock = tmp_path / left.replace("partial", "lock")
    with files.held(lock), pytest.raises(Refusal, match="in use by another run"):
        convert.convert_model("tiny", target)
    convert.convert_model("tiny", target)
    assert not (target / "stale").exists()
    assert sorted(os.listdir(tmp_path)) == ["copy"]


TERMINATED = """
import os, signal, sys
from astraea_jax import cli
from astraea_ports.checkpoints import converted
save = converted.save
def stopped(module, folder):
    save(module, folder)
    os.kill(os.getpid(), signal.SIGTERM)
converted.save = stopped
sys.exit(cli.main(["convert", "tiny", "-o", sys.argv[1]]))
"""


@pytest.mark.slow
def test_sigterm_leaves_nothing(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-c", TERMINATED, tmp_path / "copy"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 143 and "Traceback" not in ended.stderr
    assert os.listdir(tmp_path) == []


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
