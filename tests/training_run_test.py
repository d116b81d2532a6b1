"""Training's own work, without a network's: rates, runs in folders, and all that is refused."""

import dataclasses
import inspect
import itertools
import json
import math
import os
import pathlib
import shutil
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import refused
from flax import nnx
from helpers import SMALL
from safetensors.numpy import load_file, save_file

from astraea_jax import cli
from astraea_jax.cli import score as score_command
from astraea_jax.cli import train
from astraea_ports import pipeline
from astraea_ports.text import t5
from astraea_ports.tiny import score
from astraea_ports.tiny import training as tiny_training
from astraea_ports.tiny.scene_captions import HELD_OUT
from astraea_ports.training import run as runs
from astraea_ports.training.clips import finite
from astraea_ports.training.folder import Checkpoints, check_settings, owned
from astraea_ports.training.recipe import Recipe, rate_factor
from astraea_ports.wan import vae_weights
from astraea_ports.wan.training.forward import Layout
from astraea_ports.wan.training.networks import Networks
from astraea_ports.wan.training.step import Batch, loss
from astraea_ports.wan.transformer import Transformer


def quiet(_):
    pass


def test_rates_rise_hold_and_fall():
    fractions = jnp.array([0.0, 0.01, 0.02, 0.2, 0.3, 0.65, 1.0])
    np.testing.assert_allclose(
        jax.vmap(rate_factor)(fractions),
        [0.01, 0.5, 1, 1, 1, 0.505, 0.01],
        atol=0.01,
    )


def test_own_clips_are_an_endless_stream():
    videos = np.random.default_rng(0).uniform(size=(3, 5, 16, 16, 3)).astype(np.float32)
    examples = finite(videos, ["a", "b", "c"])(2, 3)
    assert list(examples.captions) == ["c", "a", "b"]
    np.testing.assert_array_equal(examples.video(), videos[[2, 0, 1]])
    with pytest.raises(ValueError, match="a caption for each clip"):
        finite(videos, ["a"])


@dataclasses.dataclass(frozen=True)
class CountingRecipe:
    steps: int


class Counting:
    """A trainee of a few numbers, for what has nothing to do with models."""

    batch = 2
    period = 1
    renewing = 0.0

    def __init__(self, steps=5, fail_at=None, **settings):
        self.recipe, self.fail_at = CountingRecipe(steps), fail_at
        self.settings = {"part": "counting", **settings}

    @property
    def steps(self):
        return self.recipe.steps

    def start(self):
        return {"total": jnp.zeros(3), "step": jnp.int32(0)}

    def prepare(self, step, say):
        pass

    def upkeep(self):
        return self.renewing

    def advance(self, state):
        step = state["step"] + 1
        value = jnp.float32(math.nan if step == self.fail_at else 1 / step)
        return {"total": state["total"] + step, "step": step}, value

    def export(self, state, folder):
        folder.mkdir(exist_ok=True)
        (folder / "total.txt").write_text(str(float(state["total"][0])))

    def sheet(self, state):
        return None


def test_a_sitting_ends_with_a_checkpoint(tmp_path, monkeypatch):
    ticks = itertools.count()  # a hundredth of a second each time that someone looks
    clock = types.SimpleNamespace(monotonic=lambda: next(ticks) / 100)
    monkeypatch.setattr(runs, "time", clock)
    outcome = runs.run(Counting(steps=10**6), tmp_path, sitting=0.005, say=quiet)
    assert 5 < outcome.step < 100
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.latest() == outcome.step
    checkpoints.close()


def test_minutes_become_steps(tmp_path):
    trainee, said = Counting(steps=1), []
    runs.set_minutes(trainee, 0.01, said.append)
    assert trainee.steps > 10 and f"{trainee.steps} steps in 0.01 min" in said[0]
    trainee.renewing = 0.2  # seconds a step beside it: a minute holds fewer than 300
    runs.set_minutes(trainee, 1, said.append)
    assert 100 < trainee.steps <= 300


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_state(tmp_path):
    trainee = Counting(fail_at=4)
    with pytest.raises(ValueError, match=r"loss at step 3 is not a number.*step 3 is kept"):
        runs.run(trainee, tmp_path, checkpoint_every=1e-6, say=quiet)
    # The one before the loss went wrong: no state after it was written.
    assert runs.run(Counting(), tmp_path, say=quiet).step == 5
    assert (tmp_path / "model" / "total.txt").read_text() == "15.0"


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    runs.run(Counting(steps=5), tmp_path, sitting=1e-9, say=quiet)
    runs.run(Counting(steps=5), tmp_path, say=quiet)
    full = shutil.disk_usage(tmp_path)._replace(free=1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: full)
        checkpoints = Checkpoints(tmp_path / "checkpoints")
        with pytest.raises(ValueError, match=r"No space left.*that of step 5 is kept: make room"):
            checkpoints.save(6, Counting().start())
        checkpoints.close()
    assert runs.run(Counting(steps=5), tmp_path, say=quiet).step == 5


def test_a_folder_in_use_is_refused(tmp_path):
    with (
        owned(tmp_path),
        pytest.raises(ValueError, match="in use by another run"),
        owned(tmp_path),
    ):
        pass
    with owned(tmp_path):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="choose another folder"), \
            owned(tmp_path / "file"):  # fmt: skip
        pass


def test_a_run_of_another_kind_is_refused(tmp_path):
    runs.run(Counting(width=3), tmp_path, say=quiet)
    with pytest.raises(ValueError, match=r"another kind \(width: expected 3, got 4\)"):
        runs.run(Counting(width=4), tmp_path, say=quiet)


def test_a_checkpoint_of_other_arrays_is_refused(tmp_path):
    runs.run(Counting(), tmp_path, say=quiet)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    with pytest.raises(ValueError, match="does not fit this run or is broken"):
        checkpoints.restore({"total": jnp.zeros(4), "step": jnp.int32(0)})
    checkpoints.close()


TRAIN = ["train-tiny", "--steps", "3"]
HUGE = "1000000000"


def test_what_the_commands_say_is_what_they_do():
    options = {*inspect.signature(train.train_tiny).parameters}
    fields = {field.name for field in dataclasses.fields(tiny_training.Order)}
    of_the_run = {"from_", "minutes", "sitting", "output", "steps", "checkpoint_every"}
    assert options == fields - {"model"} | of_the_run
    assert inspect.signature(score_command.score_tiny).parameters["count"].default == HELD_OUT


def no_memory(*_, **__):
    raise MemoryError


@pytest.fixture
def no_weights(monkeypatch):
    """Reading any weight within a test is a fault."""
    monkeypatch.setattr(pipeline.Pipeline, "from_pretrained", no_memory)
    monkeypatch.setattr(vae_weights, "load_vae", no_memory)
    monkeypatch.setattr(tiny_training, "load_vae", no_memory)


@pytest.mark.usefixtures("in_an_empty_folder", "no_weights")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--minutes", "0"], "minutes must be above 0"),
        (["--minutes", "nan"], "minutes must be above 0"),
        (["--minutes", "1e9"], "two weeks"),
        (["--sitting", "-1"], "sitting must be above 0"),
        (["--sitting", "nan"], "sitting must be above 0"),
        (["--checkpoint-every", "nan"], "checkpoint_every must be above 0"),
        (["--checkpoint-every", "0"], "checkpoint_every must be above 0"),
        (["--from", "nowhere"], "no such folder"),
        (["--from", "/dev/zero"], "(a file)"),
        (["--from", "a" * 300], "the folder of a model"),
        (["--steps", HUGE], "steps must be an integer in 1..100000000"),
        (["--steps", "0"], "steps must be"),
        (["--batch", "0"], "batch must be"),
        (["--batch", HUGE], "batch must be"),
        (["--pool", "0"], "pool must be"),
        (["--pool", HUGE], "pool must be"),
        (["--pool", "6"], "multiple of 4"),
        (["--refresh-every", "-1"], "refresh_every must be"),
        (["--refresh-every", str(10**30)], "refresh_every must be"),
        (["--seed", "-1"], "seed must be"),
        (["--seed", str(2**64)], "seed must be"),
        (["--sheet", "-1"], "sheet must be an integer in 0..64"),
        (["--sheet", HUGE], "sheet must be"),
        (["--two", "2"], "two must be a number"),
        (["--two", "nan"], "two must be a number"),
        (["--spin", "1.5"], "spin must be a number"),
        (["--wrong-text", "2"], "wrong_text must be a number"),
        (["--even-times", "nan"], "time_even must be a number"),
        (["--text-rate", "1e308"], "text_rate must be a number"),
        (["--rate", "0"], "rate must be a number above 0"),
        (["--rate", "inf"], "rate must be a number above 0"),
        (["--span", "1", "0"], "span must rise"),
        (["--span", "nan", "1"], "span [0] must be a number"),
        (["--part", "vae", "--batch", "0"], "batch must be"),
        (["--part", "vae", "--seed", str(2**31)], "seed must be"),
        (["--part", "reader", "--steps", HUGE], "steps must be"),
        (["--part", "reader", "--from", "nothing"], "--from says whose VAE"),
        (["--part", "vae", "--two", "nan"], "--two: of --part transformer alone"),
        (["--part", "vae", "--refresh-every", "-1"], "--refresh-every: of --part transformer"),
        (["--part", "reader", "--span", "1", "0"], "--span: of --part transformer alone"),
        (["--part", "reader", "--spin", "1", "--pool", "8"], "--spin, --pool: of --part"),
        (["--output", "/dev/null"], "can't write to folder /dev/null"),
        (["--output", "/dev/null/run"], "can't write to folder"),
        (["--output", "a" * 300], "choose another"),
    ],
)
def test_the_command_refuses_in_one_line_and_leaves_nothing(arguments, words, capsys):
    command = TRAIN if not {"--minutes", "--steps"} & {*arguments} else TRAIN[:1]
    assert words in refused(capsys, *command, *arguments)
    assert os.listdir() == []


OF_A_RUN = {"part": "transformer", "recipe": {"steps": 3, "batch": 1}}


def deep(levels, inner="1"):
    return '{"a":' * levels + inner + "}" * levels


@pytest.mark.usefixtures("in_an_empty_folder", "no_weights")
@pytest.mark.parametrize("asked", [["--steps", "3"], []], ids=["steps", "minutes"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "not valid JSON"),
        ("[1]", "an object of fields"),
        ("null", "an object of fields"),
        ("[" * 100_000, "nested too deep"),
        ({"x": [[[[[[[[[[]]]]]]]]]]}, "nested too deep"),
        (f'{{"part": "transformer", "recipe": {{"steps": 3, "x": {deep(900)}}}}}', "too deep"),
        (f'{{"part": "transformer", "recipe": {{"steps": 3}}, "x": {deep(900)}}}', "too deep"),
        ('{"recipe": {"steps": 3}}', "part is missing"),
        ({"part": 3}, "part must be text"),
        ({"part": ""}, "part must be text"),
        ({"part": ["transformer"]}, "part must be text"),
        ({"part": "vae"}, "part: expected 'vae', got 'transformer'"),
        ('{"part": "transformer"}', "an object of fields; got None"),
        ({"recipe": [1]}, "recipe must be an object"),
        ({"recipe": "fast"}, "recipe must be an object"),
        ({"recipe": {}}, "steps is missing"),
        *(
            (f'{{"part": "transformer", "recipe": {{"steps": {steps}}}}}', words)
            for words, values in (
                ("NaN is no JSON", ["NaN"]),
                ("Infinity is no JSON", ["-Infinity"]),
                ("not valid JSON", ["9" * 5000]),
                (
                    "steps must be an integer in 1..100000000",
                    ["-1", "0", "1e9", HUGE, "3.0", "true", "null", '"3"', "[3]", "{}", "1e400"],
                ),
            )
            for steps in values
        ),
    ],
)
def test_a_runs_settings_are_checked_by_field(content, words, asked, capsys):
    os.mkdir("run")
    text = content if isinstance(content, str) else json.dumps(OF_A_RUN | content)
    pathlib.Path("run/run.json").write_text(text)
    assert words in refused(capsys, "train-tiny", *asked)
    assert os.listdir("run") == ["run.json"]
    assert pathlib.Path("run/run.json").read_text() == text


@pytest.mark.usefixtures("in_an_empty_folder", "no_weights")
def test_a_runs_settings_are_a_regular_file(capsys):
    os.makedirs("run/run.json")
    assert "is a folder" in refused(capsys, *TRAIN)
    os.rmdir("run/run.json")
    os.mkfifo("run/run.json")
    assert "no regular file" in refused(capsys, *TRAIN)
    assert os.listdir("run") == ["run.json"]


@pytest.mark.parametrize(
    "wrong",
    [True, 1.5, "1", None, [1], {"a": 1}, {}, 2, -1, 10**9, float("inf"), "x" * 10**6],
    ids=lambda value: repr(value)[:20],
)
def test_every_setting_is_held_against_what_is_asked_for(tmp_path, wrong):
    trainee = Counting(width=1, sizes=[1, 2], within={"height": 1})
    settings = {**trainee.settings, "recipe": {"steps": 5, "batch": 1}}
    check_settings(tmp_path, settings)
    check_settings(tmp_path, settings)  # the same is taken up
    for place in ("width", "within.height", "sizes", "recipe.batch", "recipe", "more\nlines"):
        first, _, second = place.partition(".")
        other = {**settings, first: {**settings[first], second: wrong} if second else wrong}
        (tmp_path / "run.json").write_text(json.dumps(other).replace("Infinity", "1e999"))
        with pytest.raises(ValueError) as found:
            check_settings(tmp_path, settings)
        assert first.split("\n")[0] in str(found.value) and "another folder" in str(found.value)
        assert len(str(found.value)) < 1000 and "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        (field.name, wrong)
        for field in dataclasses.fields(Recipe)
        for wrong in (math.nan, -1, True, "1", None, [1], {}, 10**9, 10**30, math.inf)
        if (field.name, wrong) != ("seed", 10**9)
    ],
)
def test_a_recipe_is_checked_by_field(as_a_user, name, wrong):
    with pytest.raises(ValueError, match=f"{name} must|{name} .0. must"):
        Recipe(**{"steps": 3, name: wrong})


READER = load_file(score.WEIGHTS)


def changed(name, value):
    return {**READER, name: value}


@pytest.mark.usefixtures("in_an_empty_folder", "no_weights")
@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (changed("near", READER["near"].astype(np.int8)), "I8"),
        (changed("out_bias", READER["out_bias"].astype(bool)), "BOOL"),
        (changed("near", np.full_like(READER["near"], np.nan)), "near"),
        (changed("out_bias", np.full_like(READER["out_bias"], np.inf)), "out_bias"),
        (changed("all", READER["all"][:-1]), "all"),
        (changed("all", READER["all"].reshape(-1)), "all"),
        (changed("more", np.zeros(3, np.float32)), "more"),
        ({k: v for k, v in READER.items() if k != "late"}, "late"),
        ({}, "near"),
    ],
)
def test_the_readers_weights_are_checked_as_all_weights_are(tensors, words, capsys):
    save_file(tensors, "reader.safetensors")
    command = ["score-tiny", "--reader", "reader.safetensors", "--output", "o.json"]
    assert cli.main(command) == 2
    said = capsys.readouterr().err
    assert said.startswith("astraea: expected a reader's weights") and words in said
    assert os.listdir() == ["reader.safetensors"]


@pytest.mark.usefixtures("in_an_empty_folder", "no_weights")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--count", HUGE], "count must be"),
        (["--count", "0"], "count must be"),
        (["--batch", HUGE], "batch must be"),
        (["--steps", HUGE], "steps must be"),
        (["--guidance", "nan"], "guidance must be"),
        (["--reader", "none.safetensors"], "a reader's weights"),
        (["--reader", "/dev/zero"], "no regular file"),
        (["--reader", "."], "is a folder"),
        (["--output", "o.txt"], ".json"),
        (["--output", "nowhere/o.json"], "nowhere is none"),
    ],
)
def test_scores_are_refused_before_a_model_is_loaded(arguments, words, capsys):
    assert words in refused(capsys, "score-tiny", *arguments)
    assert os.listdir() == []


def test_a_steps_loss_and_gradients_are_finite_float32(as_a_user):
    sizes = dict(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    config, rng = dataclasses.replace(SMALL, num_layers=1), np.random.default_rng(0)

    def draw(like):  # by NumPy: JAX would compile something for every shape
        return jnp.asarray(rng.normal(0, 0.2, like.shape).astype(np.float32))

    def made():
        encoder = t5.T5Encoder(t5.T5Config(**sizes), nnx.Rngs(1))
        return Networks(Transformer(config, nnx.Rngs(0)), encoder)

    networks = jax.tree.map(draw, jax.eval_shape(made))
    clean, noise = rng.normal(size=(2, 1, 2, 4, 4, 4)).astype(np.float32)
    ids = np.array([[3, 7, 2, 0]], np.int32)
    batch = Batch(clean, noise, np.array([0.6], np.float32), ids, np.sign(ids))
    batch = jax.tree.map(jnp.asarray, batch)

    def step(dtype):
        recipe = Recipe(steps=1, batch=1, dtype=dtype)
        layout = Layout(recompute=False, unroll=True)
        return jax.value_and_grad(lambda nets: loss(nets, batch, recipe, layout))

    # Compiling is all of this test.
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    value, gradients = jax.device_get(jax.jit(step("float32"), compiler_options=quick)(networks))
    assert 0.1 < value < 10
    for found in ((value, gradients), jax.eval_shape(step("bfloat16"), networks)):
        assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float32")}
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(leaf).all(), path
    for network in gradients:
        assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(network)) > 1e-6


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
