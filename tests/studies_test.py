"""The studies: how a script is run, parts of a GPU's study, a search that goes on and ships."""

import json
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import studies

from astraea_jax.checks import Refusal
from astraea_jax.cli import BENCHES, COMMANDS
from astraea_jax.search import journal as journals
from astraea_jax.search.recipe import recipes_in
from astraea_ports.pipeline import Defaults

gpu = studies.study("gpu")
quality = studies.study("quality")
search = studies.study("search")
search_study = studies.study("search_study")

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")

ROOT = studies.FOLDER.parents[1]
SCRIPTS = [
    "batches",
    "collect",
    "compile",
    "gpu",
    "quality",
    "scoring",
    "search",
    "sheet",
    "tables",
]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_scripts_command_reads_the_command_line(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        studies.study("start").run(studies.study(name).command)
    assert end.value.code == 0 and "usage:" in capsys.readouterr().out


def test_a_script_ends_a_mistake_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sheet.py", "--output", "sheet.mp4"])
    with pytest.raises(SystemExit) as end:
        studies.study("start").run(studies.study("sheet").command)
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and ".png" in line


@pytest.mark.slow
def test_a_script_runs_from_the_root_of_a_clone():
    words = [sys.executable, "notebooks/studies/search.py", "--minutes", "0"]
    said = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert said.returncode == 0 and "best of" in said.stdout, said.stderr


def test_every_part_of_the_study_of_a_gpu_is_there():
    for part in gpu.STUDY.values():
        first, second, *_ = part.command
        if first == "python":
            assert second == "-m" or pathlib.Path(second).is_file()
        else:
            assert second in BENCHES if first == "bench" else first in COMMANDS
    assert gpu.PEER.is_file() and all((ROOT / test).is_file() for test in gpu.FIXTURE_TESTS)


@pytest.mark.slow
def test_parts_are_kept_whatever_becomes_of_them(tmp_path, monkeypatch):
    code = "import sys; print('said'); open(sys.argv[2], 'w').write('[1]'); sys.exit({})"
    study = {
        "good": gpu.Part("a", 60, ["python", "-c", code.format(0)]),
        "bad": gpu.Part("b", 60, ["python", "-c", "print('why'); raise SystemExit(3)"], False),
        "endless": gpu.Part("c", 0.5, ["python", "-c", "import time; time.sleep(60)"], False),
    }
    monkeypatch.setattr(gpu, "STUDY", study)
    monkeypatch.setattr(gpu, "LEAST", 0.1)
    output = tmp_path / "gpu.json"
    gpu.command(output=output, parts=("good", "bad", "endless"), commit="c0ffee")
    parts = json.loads(output.read_text())["parts"]
    assert parts["good"]["outcome"] == "done" and parts["good"]["result"] == [1]
    assert parts["bad"]["outcome"] == "failed" and parts["bad"]["said"] == ["why"]
    assert parts["endless"]["outcome"] == "stopped, out of time"
    assert {part["commit"] for part in parts.values()} == {"c0ffee"}
    gpu.command(output=output, parts=("bad",), minutes=0)
    parts = json.loads(output.read_text())["parts"]
    assert parts["bad"]["outcome"] == "not run, no time left" and set(parts) == set(study)


def test_what_was_measured_is_there():
    content = json.loads((studies.FOLDER / "gpu.json").read_text())
    for name in ("static-81", "dynamic-81", "reference-81"):
        result = content["parts"][name]["result"]
        (device,) = result["environment"]["devices"]  # parts are of several machines
        assert device.startswith("NVIDIA H")
        assert all(row["copies"] == 0 for row in result["rows"])


def test_kernels_are_read_off_a_compiled_program():
    custom_calls = studies.study("compile").custom_calls
    text = '%e = f32[1] custom-call(%x), custom_call_target="mosaic_gpu_v2"'
    assert custom_calls(text) == "mosaic_gpu_v2 x 1" and custom_calls("") == "none"


@pytest.mark.slow
def test_a_search_judges_what_it_finds_goes_on_and_ships(capsys):
    small = dict(frames=5, height=32, width=32, steps=6, budgets=(0.5,), solver=("euler",), rows=4)
    small |= dict(search_prompts=1, seeds=2, look=1, heldout_prompts=2, pool=1)
    small |= dict(population=4, generations=1, swaps=2)
    small |= dict(reuses=("step-level",), parts=("by-hand", "step-level"))

    def searched(folder, **more):
        search.command(output=pathlib.Path(folder), **small, **more)
        return json.loads(pathlib.Path(folder, "results.json").read_text())["rows"]

    found = searched("out_study", ship=pathlib.Path("schedules"))
    printed = capsys.readouterr().out
    by_hand = [row for row in found if row["what"].startswith("hand-made")]
    (best,) = [row for row in found if row["what"] == "step-level EA"]
    assert by_hand and best["validation"] > 0 and len(best["psnr_each"]) == 2
    assert sum(best["levels"]) == 30 and "best of " in printed
    (recipe,) = recipes_in("schedules")
    assert recipe.schedule.levels == tuple(best["levels"]) and recipe.quality["prompts"] == 2
    journal = pathlib.Path("out_study", journals.JOURNAL).read_text()
    assert searched("out_study") == found
    assert pathlib.Path("out_study", journals.JOURNAL).read_text() == journal
    # A study of its own that begins at what this one found is no worse where both search.
    rows = searched("out_other", starts=pathlib.Path("out_study/results.json"))
    (other,) = [row for row in rows if row["what"] == "step-level EA"]
    assert float(other["fitness"]) <= float(best["fitness"])
    evaluated = pathlib.Path("out_other", journals.JOURNAL).read_text()
    assert json.dumps(best["levels"], separators=(",", ":")) in evaluated.replace(" ", "")
    with pytest.raises(Refusal, match="no file"):
        searched("out_other", starts=pathlib.Path("nowhere.json"))


def search_study_of(pipeline, prompts):
    study = object.__new__(search_study.Study)
    study.pipeline = pipeline
    return study


@pytest.mark.parametrize("of", [quality.Study.of, search_study_of])
def test_studies_decode_as_the_pipeline_does(of):
    seen = []

    class Pipeline:
        defaults, shift = Defaults(5, 32, 32, 50, 5.0), 3.0

        def latents_shape(self, *size):
            return (2, 4, 4, 16)

        def encode_text(self, texts):
            return jnp.zeros((2, 1, 1))

        def decode(self, latents):
            seen.append(latents.shape)
            return np.zeros((1, 5, 32, 32, 3), np.float32)

    videos = of(Pipeline(), ["a", "b"]).decode(jnp.zeros((2, 2, 4, 4, 16)))
    assert seen == [(1, 2, 4, 4, 16)] * 2 and videos[0].dtype == np.uint8


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
