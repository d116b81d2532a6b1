"""The registry of the ports: what a model's folder says it is -> the port that opens it."""

import json
import subprocess
import sys
import types

import pytest

import astraea_ports
from astraea_jax.checks import Refusal
from astraea_ports import PORTS, Port, checkpoints, tiny
from astraea_ports.checkpoints.lora import Lora
from astraea_ports.pipeline import Pipeline


def write(folder, name, **content):
    (folder / name).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("model_index.json", {"_class_name": "WanPipeline"}),
        # Of the family, so that its own port can say which of it does not run here.
        ("model_index.json", {"_class_name": "WanImageToVideoPipeline"}),
        ("config.json", {"_class_name": "WanModel", "dim": 1536}),
        ("config.json", {"model_type": "i2v", "dim": 5120}),
    ],
)
def test_a_folder_is_of_the_port_that_its_files_name(tmp_path, name, says):
    assert astraea_ports.port_of(write(tmp_path, name, **says)) == "wan"


def test_two_experts_have_no_file_for_the_whole(tmp_path):
    (tmp_path / "high_noise_model").mkdir()
    assert astraea_ports.port_of(tmp_path) == "wan"


@pytest.mark.parametrize(
    ("says", "words"),
    [
        ({"_class_name": "CogVideoXPipeline"}, "is Wan.*; it says 'CogVideoXPipeline': point to"),
        ({"_class_name": ["WanPipeline"]}, "it says \"\\['WanPipeline'\\]\""),
        ({}, "it has neither with one"),
    ],
)
def test_what_no_port_knows_is_refused_by_what_it_says(tmp_path, says, words):
    write(tmp_path, "model_index.json", **says)
    with pytest.raises(Refusal, match=words):
        astraea_ports.port_of(tmp_path)
    with pytest.raises(Refusal, match=words):
        Pipeline.from_pretrained(tmp_path)


def test_another_port_needs_no_more_than_a_line(tmp_path, monkeypatch):
    opened = []

    def open_parts(model, **options):
        opened.append((model.path, options))
        raise Refusal("opened by its own port")

    monkeypatch.setitem(sys.modules, "other_port", types.SimpleNamespace(open_parts=open_parts))
    other = Port("other_port", classes=("Other",), sizes=("1B",))
    monkeypatch.setattr(astraea_ports, "PORTS", {**PORTS, "other": other})
    write(tmp_path, "model_index.json", _class_name="OtherPipeline")
    with pytest.raises(Refusal, match="opened by its own port"):
        Pipeline.from_pretrained(tmp_path, precision="fast")
    ((path, options),) = opened
    assert path == tmp_path and options["precision"] == "fast"
    assert astraea_ports.port_of(tiny.FOLDER) == "wan"


@pytest.mark.parametrize(
    ("options", "words"),
    [({"lora": [Lora("none.safetensors")]}, "LoRA"), ({"dtype": "int8"}, "dtype")],
)
def test_what_no_model_is_opened_with_is_refused_before_one_is_fetched(monkeypatch, options, words):
    def fetch(*_, **__):
        raise AssertionError("a model was looked for")

    monkeypatch.setattr(checkpoints, "find_model", fetch)
    with pytest.raises(Refusal, match=words):
        Pipeline.from_pretrained("owner/name", **options)


def test_a_size_that_no_port_has_is_refused():
    with pytest.raises(Refusal, match=r"size must be '1\.3B' or '14B'; got '2B'"):
        Pipeline.random("2B")


def test_importing_the_registry_imports_no_jax():
    program = "import sys, astraea_ports; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
