"""The mean of trained models."""

import json
import shutil
import sys

import ml_dtypes
import numpy as np
import pytest
from command_line import refused
from safetensors.numpy import load_file, save_file

from astraea_jax import cli
from astraea_ports import averaging, tiny, wan

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


@pytest.fixture
def other(tmp_path):
    """The small Wan with every weight of its transformer and its text encoder larger by one."""
    folder = tmp_path / "other"
    shutil.copytree(tiny.FOLDER, folder)
    for name in (WEIGHTS, TEXT):
        tensors = load_file(folder / name)
        larger = {key: (x.astype(np.float32) + 1).astype(x.dtype) for key, x in tensors.items()}
        save_file(larger, folder / name, metadata={"format": "pt"})
    return folder


def test_the_mean_of_two_models(other, tmp_path, capsys):
    words = ["average", "tiny", str(other), "--shares", "1", "3", "-o", "made"]
    assert cli.main(words) == 0 and "written: made" in capsys.readouterr().out
    for name in (WEIGHTS, TEXT):
        first, second, mean = (load_file(x / name) for x in (tiny.FOLDER, other, tmp_path / "made"))
        assert mean.keys() == first.keys()
        for key, value in mean.items():
            a, b = (x[key].astype(np.float32) for x in (first, second))
            expected = (a / 4 + b * 3 / 4).astype(ml_dtypes.bfloat16)
            np.testing.assert_array_equal(value.view(np.uint16), expected.view(np.uint16))
    # The rest is the first's, but its schedules were searched for other weights.
    vae = "vae/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "made" / vae).read_bytes() == (tiny.FOLDER / vae).read_bytes()
    assert not (tmp_path / "made" / "schedules").exists()
    runs = json.loads((tmp_path / "made" / "training.json").read_text())["mean of"]
    assert [run["share"] for run in runs] == [0.25, 0.75]
    assert runs[0]["training"] == json.loads((tiny.FOLDER / "training.json").read_text())
    wan.Pipeline.from_pretrained(tmp_path / "made")


def test_a_mean_of_one_model_with_itself_is_that_model(tmp_path):
    averaging.average_models([tiny.FOLDER, tiny.FOLDER], tmp_path / "made")
    for name in (WEIGHTS, TEXT):
        first, mean = (load_file(folder / name) for folder in (tiny.FOLDER, tmp_path / "made"))
        for key, value in mean.items():
            np.testing.assert_array_equal(value.view(np.uint16), first[key].view(np.uint16))


def test_what_has_no_mean(other, tmp_path, capsys):
    assert "at least two models" in refused(capsys, "average", "tiny", "-o", "made")
    two = ("average", "tiny", str(other), "-o")
    assert "a share for each of 2" in refused(capsys, *two, "made", "--shares", "1")
    assert "positive sum" in refused(capsys, *two, "made", "--shares", "1", "-1")
    assert "no such folder" in refused(capsys, "average", "tiny", "nowhere", "-o", "made")
    assert "holds something already" in refused(capsys, *two, str(other))
    tensors = load_file(other / WEIGHTS)
    name = next(key for key in tensors if tensors[key].ndim == 2)
    save_file(tensors | {name: tensors[name][:1]}, other / WEIGHTS, metadata={"format": "pt"})
    said = refused(capsys, *two, "made")
    assert name in said and "not of the kind" in said
    assert not (tmp_path / "made").exists()


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
