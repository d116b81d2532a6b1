"""The front door of training: what it refuses, at once, and what it leaves."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from astraea_jax.checks import Refusal
from astraea_ports import checkpoints, pipeline, tiny
from astraea_ports.training.clips import about, finite
from astraea_ports.wan import training
from astraea_ports.wan.training import settings

RNG = np.random.default_rng(0)
CLIPS = RNG.uniform(size=(3, 5, 32, 32, 3)).astype(np.float32)
CAPTIONS = ["a red circle", "a blue star", "a green ring"]


@pytest.fixture
def no_weights(monkeypatch):
    """Reading any weight within a test is a fault."""

    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(pipeline.Pipeline, "from_pretrained", load)
    monkeypatch.setattr(checkpoints, "model_folder", load)


def tune(folder, clips=CLIPS, captions=CAPTIONS, model="tiny", **options):
    return training.fine_tune(model, clips, captions, folder=folder, say=lambda _: None, **options)


def stream(captions=("a",), shape=(1, 5, 32, 32, 3), kind=training.Examples):
    return lambda first, count: kind(lambda: np.zeros(shape, np.float32), captions)


@pytest.mark.usefixtures("as_a_user", "no_weights")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"captions": CAPTIONS[:2]}, "got 3 clips and 2 captions"),
        ({"captions": None}, "got 3 clips and 0 captions"),
        ({"captions": "abc"}, "captions must be a list"),
        ({"captions": ["a", "b", 3]}, r"captions \[2\] must be text"),
        ({"clips": CLIPS[:0], "captions": []}, "at least one; got 0 clips"),
        ({"clips": CLIPS[0]}, r"floats \[P,F,height,width,3\] in \[0, 1\]; got float32 \[5, 32"),
        ({"clips": (255 * CLIPS).astype(np.uint8)}, "got uint8 .* divide by 255"),
        ({"clips": 2 * CLIPS - 1}, r"clips must be in \[0, 1\]; got -"),
        ({"clips": np.full_like(CLIPS, np.nan)}, "got nan"),
        ({"clips": "clips"}, "clips must be an array"),
        ({"clips": CLIPS[:, :4]}, "can't do: frames must be a multiple of 4 plus 1; got 4"),
        ({"clips": CLIPS[:, :, :24]}, "can't do: height must be a multiple of 16 pixels; got 24"),
        ({"clips": stream()}, "a stream of clips has its own captions"),
        ({"clips": stream(shape=(1, 5, 32, 40, 3)), "captions": None}, "width must be"),
        ({"clips": stream(captions=()), "captions": None}, "got 1 clips and 0 captions"),
        ({"clips": stream(kind=lambda *_: 3), "captions": None}, "to give an Examples"),
        ({"model": "nowhere"}, "no such folder"),
        ({"steps": 0}, "steps must be an integer in 1"),
        ({"steps": 3, "minutes": 1}, "steps or minutes; got both"),
        ({"minutes": float("nan")}, "minutes must be above 0"),
        ({"sitting": 0}, "sitting must be above 0"),
        ({"checkpoint_every": -1}, "checkpoint_every must be above 0"),
        ({"batch": 0}, "batch must be"),
        ({"rate": 0}, "rate must be a number above 0"),
        ({"seed": -1}, "seed must be"),
        ({"recipe": training.Recipe(steps=3), "steps": 3, "rate": 2}, "says all of steps, rate"),
    ],
)
def test_what_can_not_be_trained_is_refused_at_once(options, words, tmp_path):
    with pytest.raises(Refusal, match=words):
        tune(tmp_path / "run", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_weights")
def test_a_model_that_is_too_large_is_refused_before_it_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "memory_bytes", lambda: 10**8)
    with pytest.raises(Refusal, match=r"training this model takes 1\d\d.* MiB .* a device has 95"):
        tune(tmp_path / "run")


@pytest.mark.usefixtures("no_weights")
def test_the_folder_of_another_run_is_refused_before_a_model_is_loaded(tmp_path):
    recipe = training.gentle(3.0, steps=7)
    of_a_run = {
        "part": "transformer",
        "pool": dataclasses.asdict(settings.plan_for(len(CLIPS))),
        "recipe": dataclasses.asdict(recipe),
        "data": about(CLIPS, CAPTIONS),
    }
    (tmp_path / "run.json").write_text(json.dumps(of_a_run))
    for options, words in (
        ({"clips": CLIPS[:, ::-1]}, "data.sha256: expected"),
        ({"captions": CAPTIONS[::-1]}, "data.sha256: expected"),
        ({"clips": CLIPS[:2], "captions": CAPTIONS[:2]}, "data.clips: expected"),
        ({"steps": 8}, "recipe.steps: expected 7, got 8"),
        ({"batch": 64}, "recipe.batch: expected"),
        ({"plan": training.PoolPlan(size=4, block=2)}, "pool.size: expected 3, got 4"),
    ):
        with pytest.raises(Refusal, match=rf"another kind \(.*{words}"):
            tune(tmp_path, **options)
    # The same, and the length of the run in the folder where none is said: on to the model.
    with pytest.raises(AssertionError, match="a model was loaded"):
        tune(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps(of_a_run | {"part": "vae"}))
    with pytest.raises(Refusal, match="part: expected 'vae', got 'transformer'"):
        tune(tmp_path)


def test_a_pool_holds_every_clip_equally_often():
    for clips in (1, 3, 4, 7, 12, 50):
        plan = settings.plan_for(clips)
        assert plan.size % clips == 0 and plan.size % plan.block == 0
        assert plan.block <= 4 and plan.refresh_every == 0
    assert settings.plan_for(None).refresh_every > 0


def test_other_clips_and_captions_have_other_names():
    names = {
        json.dumps(about(*each))
        for each in (
            (CLIPS, CAPTIONS),
            (CLIPS[::-1], CAPTIONS),
            (CLIPS, CAPTIONS[::-1]),
            (CLIPS, ["a red circlea", " blue star", "a green ring"]),
        )
    }
    assert len(names) == 4
    assert about(CLIPS, CAPTIONS) == about(CLIPS.astype(np.float64), CAPTIONS)


def test_the_port_is_imported_without_its_training():
    code = (
        "import sys; from astraea_ports import wan; "
        "sys.exit(any('training' in name for name in sys.modules if 'astraea' in name))"
    )
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == 0


@pytest.mark.slow
def test_a_fine_tuned_model_knows_its_clips_better(tmp_path):
    said = []
    options = {"steps": 6, "batch": 2, "rate": 2.0, "say": said.append}
    sheet = training.Sheet((CAPTIONS[0],), steps=1)
    first = training.fine_tune(
        "tiny", CLIPS, CAPTIONS, folder=tmp_path, sitting=1e-6, sheet=sheet, **options
    )
    assert len(first.losses) < 6 and not first.done
    tuned = training.fine_tune("tiny", CLIPS, CAPTIONS, folder=tmp_path, **options)
    assert tuned.done and tuned.steps == len(tuned.losses) == 6
    assert f"taken up at step {len(first.losses)} of 6" in said
    assert (tmp_path / "sheet.png").is_file() and (tmp_path / "loss.png").is_file()
    assert (tuned.model / "model_index.json").is_file()
    # On what it was taught it is better; the untrained loss is the shipped model's.
    before, after = tuned.held_out(CLIPS, CAPTIONS)
    assert after < before
    assert before == training.held_out_loss("tiny", CLIPS, CAPTIONS, recipe=tuned.recipe)
    # The clips as a stream are the same clips: the same losses.
    streamed = training.fine_tune(
        str(tiny.FOLDER),
        finite(CLIPS, CAPTIONS),
        folder=tmp_path / "streamed",
        plan=settings.plan_for(len(CLIPS)),
        **options,
    )
    np.testing.assert_allclose(streamed.losses, tuned.losses, rtol=1e-5)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
