"""Training: the step against the plain model, runs that stop and go on, and what they leave."""

import collections
import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from small_wan import write_small_wan

from astraea_jax import cli
from astraea_ports import tiny, wan
from astraea_ports.checkpoints import export
from astraea_ports.text import t5
from astraea_ports.tiny import lessons, scenes
from astraea_ports.tiny import training as tiny_training
from astraea_ports.training.folder import owned, saved_settings
from astraea_ports.training.pool import LatentPool, Latents, source_block
from astraea_ports.training.recipe import Recipe
from astraea_ports.training.run import run
from astraea_ports.wan import transformer_weights, vae_weights
from astraea_ports.wan.training import vae_step
from astraea_ports.wan.training.forward import Layout, velocity
from astraea_ports.wan.training.step import EmptyText, draw_batch, draw_times
from astraea_ports.wan.training.transformer import PoolPlan, Sheet, TransformerTraining
from astraea_ports.wan.training.vae import VAETraining

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("kept_programs")]

ROOT = pathlib.Path(__file__).resolve().parents[1]
PLAN = PoolPlan(size=4, block=2, refresh_every=2)
LESSONS = lessons.Lessons(two=0.5, frames=5, side=32)
RECIPE = Recipe(steps=6, batch=2, dtype="float32")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_small_wan(tmp_path_factory.mktemp("small"))


def make_training(model, recipe=RECIPE, **changes):
    return TransformerTraining(model, LESSONS, recipe, plan=PLAN, **changes)


def quiet(_):
    pass


class Listening(TransformerTraining):
    """A training that notes what each of its calls compiles."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.compiled = []

    def prepare(self, step, say):
        with compilations() as self.prepared:
            super().prepare(step, say)

    def advance(self, state):
        with compilations() as compiled:
            made = super().advance(state)
        self.compiled.append((len(self.prepared), len(compiled)))
        return made


@contextlib.contextmanager
def compilations():
    """What JAX compiles meanwhile."""
    compiled = []

    def listen(event, duration_secs, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="module")
def uninterrupted_run(model, tmp_path_factory):
    """The folder of a run that went through without a stop, and what it compiled."""
    folder = tmp_path_factory.mktemp("whole")
    sheet = Sheet(tiny.captions()[:2], steps=2)
    # Nothing has compiled its step before: tests that take the same step ask for this run first.
    trainee = Listening(model, LESSONS, RECIPE, plan=PLAN, sheet=sheet)
    outcome = run(trainee, folder, say=quiet)
    assert outcome.step == outcome.steps == 6
    return folder, trainee.compiled


@pytest.fixture(scope="module")
def uninterrupted(uninterrupted_run):
    return uninterrupted_run[0]


@pytest.mark.core
@pytest.mark.parametrize("layout", [Layout(), Layout(recompute=False), Layout(unroll=True)])
def test_the_training_forward_is_the_plain_model(model, layout):
    transformer = wan.load_transformer(model / "transformer")
    keys = jax.random.split(jax.random.key(0), 2)
    latents = jax.random.normal(keys[0], (2, 3, 4, 4, 16))
    context = jax.random.normal(keys[1], (2, 8, 32))
    time = jnp.array([937.0, 14.0])
    plain = jax.jit(type(transformer).__call__)(transformer, latents, time, context)
    ours = jax.jit(velocity, static_argnums=4)(transformer, latents, time, context, layout)
    np.testing.assert_allclose(ours, plain, atol=2e-5)


@pytest.mark.parametrize("layout", [Layout(), Layout(recompute=False, unroll=True)])
def test_the_training_gradients_are_the_plain_models(model, layout):
    transformer = wan.load_transformer(model / "transformer")
    keys = jax.random.split(jax.random.key(0), 4)
    # No weight at its start's zero or one, or half of the backward pass would go unseen.
    leaves, tree = jax.tree.flatten(transformer)
    draws = jax.random.split(keys[3], len(leaves))
    leaves = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, draws, strict=True)]
    transformer = jax.tree.unflatten(tree, leaves)
    latents, target = jax.random.normal(keys[0], (2, 2, 3, 4, 4, 16))
    context = jax.random.normal(keys[1], (2, 8, 32))
    time = jnp.array([937.0, 14.0])

    def gradients(forward):
        def loss(transformer, latents, context):
            return jnp.square(forward(transformer, latents, time, context) - target).mean()

        return jax.jit(jax.grad(loss, (0, 1, 2)))(transformer, latents, context)

    plain = gradients(type(transformer).__call__)
    ours = gradients(functools.partial(velocity, layout=layout))

    def check(path, expected, found):
        size = float(jnp.abs(expected).max())
        assert size > 0, path
        np.testing.assert_allclose(found, expected, atol=2e-5 * size, err_msg=str(path))

    jax.tree_util.tree_map_with_path(check, plain, ours)


def test_times_are_the_two_distributions_shifted():
    recipe = dataclasses.replace(RECIPE, batch=20000, time_even=0.0)
    logits = jax.scipy.special.logit(draw_times(jax.random.key(0), recipe))
    assert abs(float(logits.mean()) - math.log(3)) < 0.03
    assert abs(float(logits.std()) - 1.1) < 0.03
    recipe = dataclasses.replace(recipe, time_even=1.0)
    time = draw_times(jax.random.key(0), recipe)
    even = time / (3 - 2 * time)
    assert abs(float(even.mean()) - 0.5) < 0.01 and even.min() >= 0 and even.max() <= 1
    # What the even part is for: a solver of 30 steps spends five of them beyond 0.95.
    assert abs(float((time > 0.95).mean()) - 0.137) < 0.01


def test_some_clips_get_no_caption_and_some_another_clips():
    count = 2048  # each clip and its caption are its number
    numbers = jnp.arange(count)
    pool = Latents(
        jnp.asarray(numbers, jnp.float16)[:, None, None, None, None],
        numbers[:, None],
        jnp.ones((count, 1), jnp.int32),
    )
    empty = EmptyText(jnp.array([-1]), jnp.array([0]))
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("batch",))
    plain = dataclasses.replace(RECIPE, batch=4096, text_dropout=0.2)
    noisy = dataclasses.replace(plain, wrong_text=0.25)
    before, after = (
        jax.device_get(draw_batch(jax.random.key(1), pool, empty, recipe, mesh))
        for recipe in (plain, noisy)
    )
    for batch, wrong in ((before, 0.0), (after, 0.25)):
        told, clip = batch.ids[:, 0], batch.clean.reshape(-1).astype(int)
        assert abs((told == -1).mean() - 0.2) < 0.02
        assert ((told == -1) == (batch.mask[:, 0] == 0)).all()
        assert abs((told != clip)[told >= 0].mean() - wrong) <= 0.08 * wrong
    # The words alone differ: not the clips, their noise or their times, nor who gets none.
    for name in ("clean", "noise", "time", "mask"):
        np.testing.assert_array_equal(getattr(before, name), getattr(after, name))
    with pytest.raises(ValueError, match="wrong_text must be a number"):
        dataclasses.replace(RECIPE, wrong_text=1.5)


def test_a_run_lowers_the_loss_and_leaves_a_model(uninterrupted, model):
    found = {path.name for path in uninterrupted.iterdir()}
    assert {"run.json", "checkpoints", "losses.npy", "loss.png", "sheet.png", "model"} <= found
    losses = np.load(uninterrupted / "losses.npy")
    assert len(losses) == 6 and np.isfinite(losses).all()
    before, after = (wan.Pipeline.from_pretrained(f) for f in (model, uninterrupted / "model"))
    change = jax.tree.map(
        lambda a, b: float(jnp.abs(a - b).max()), before.transformer, after.transformer
    )
    assert min(jax.tree.leaves(change)) > 0, "a weight that was not trained"
    # The text's padding row and the words that no caption holds never move.
    assert float(jnp.abs(before.text_encoder.blocks.q - after.text_encoder.blocks.q).max()) > 0
    assert after.vae.config == before.vae.config
    assert json.loads((uninterrupted / "model" / "training.json").read_text())["step"] == 6


def test_killed_and_taken_up_again_it_goes_on_as_if_nothing_had_happened(
    uninterrupted, model, kept_programs, tmp_path
):
    script = f"""
        import os, pathlib, signal
        import training_test as t
        from astraea_ports.training.folder import owned
        from astraea_ports.training.run import run

        def say(line):
            if line.startswith("checkpoint of step 3"):
                os.kill(os.getpid(), signal.SIGKILL)

        folder = pathlib.Path({str(tmp_path / "run")!r})
        with owned(folder):
            trainee = t.make_training(pathlib.Path({str(model)!r}))
            run(trainee, folder, say=say, checkpoint_every=1e-6)
        """
    died = run_script(script, JAX_COMPILATION_CACHE_DIR=str(kept_programs))
    assert died.returncode == -signal.SIGKILL
    # As a kill in the middle of a write leaves it.
    (tmp_path / "run" / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir()
    said = []
    with owned(tmp_path / "run"):
        outcome = run(make_training(model), tmp_path / "run", say=said.append)
    assert said[0] == "taken up at step 3 of 6" and outcome.step == 6
    whole, taken_up = (np.load(f / "losses.npy") for f in (uninterrupted, tmp_path / "run"))
    np.testing.assert_array_equal(taken_up, whole)
    name = "model/transformer/diffusion_pytorch_model.safetensors"
    for key, tensor in load_file(uninterrupted / name).items():
        np.testing.assert_array_equal(tensor, load_file(tmp_path / "run" / name)[key])


def test_the_step_is_compiled_before_the_pool_is_full(uninterrupted_run):
    _, compiled = uninterrupted_run
    before, at_first = compiled[0]
    assert before and not at_first, "another step than the one compiled ahead"


def first_losses(trainee, count):
    """The losses of a run's first steps."""
    trainee.prepare(0, quiet)
    state, losses = trainee.start(), []
    for _ in range(count):
        state, value = trainee.advance(state)
        losses.append(float(value))
    return losses


def what_travels(program):
    """How often a compiled program sends arrays from device to device, by what is done."""
    kinds = r" (all-gather|all-reduce|all-to-all|collective-permute)(?:-start)?\("
    return dict(collections.Counter(re.findall(kinds, program.as_text())))


def test_devices_share_the_batch_and_the_encoding(uninterrupted, model):
    script = f"""
        import json
        import pathlib
        import jax
        import training_test as t
        from astraea_ports.wan.training.step import train_step

        assert jax.device_count() == 2
        model = pathlib.Path({str(model)!r})
        trainee = t.make_training(model)
        losses = t.first_losses(trainee, 2)
        arrays, static = trainee._arguments()
        step = train_step.lower(trainee.start(), *arrays, **static)
        pool = trainee.pool
        video = pool._drawn(pool._make(0)[0])
        programs = step, pool._encode.lower(pool._vae, video)
        print(json.dumps([losses, *(t.what_travels(each.compile()) for each in programs)]))
        """
    flags = "--xla_force_host_platform_device_count=2"
    printed = run_script(script, XLA_FLAGS=flags, check=True).stdout
    losses, step, encoding = json.loads(printed)
    # The second loss has been through gradients and optimisers.
    np.testing.assert_allclose(losses, np.load(uninterrupted / "losses.npy")[:2], rtol=1e-4)
    # Each device goes through its own clips: gradients meet, and what is encoded is handed around.
    assert set(step) == {"all-reduce"}
    assert encoding == {"all-gather": 1}


def run_script(script, check=False, **environment):
    where = os.pathsep.join(str(ROOT / part) for part in (".", "ports", "tests"))
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={
            **os.environ,
            "PYTHONPATH": where,
            **environment,
        },
        check=check,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_the_command_trains_and_goes_on(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tiny_training, "Lessons", lambda **_: LESSONS)
    arguments = [
        "train-tiny",
        "--from",
        str(model),
        "--steps",
        "2",
        "--output",
        str(tmp_path / "r"),
    ]
    arguments += ["--pool", "4", "--batch", "2", "--sheet", "0", "--wrong-text", "0.5"]
    assert cli.main([*arguments, "--sitting", "1e-6"]) == 0
    settings = saved_settings(tmp_path / "r")
    assert settings is not None and settings["recipe"]["wrong_text"] == 0.5
    assert "the same command goes on" in capsys.readouterr().out
    assert cli.main(arguments) == 0
    assert "step 2 of 2" in capsys.readouterr().out
    assert cli.main([*arguments, "--batch", "1"]) == 2
    assert "expected" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("part", "load", "table"),
    [
        ("transformer", wan.load_transformer, transformer_weights.TABLE),
        ("text_encoder", wan.load_text_encoder, t5.TABLE),
        ("vae", wan.load_vae, vae_weights.TABLE),
    ],
)
def test_what_is_exported_is_what_was_loaded(part, load, table, tmp_path):
    source = tiny.FOLDER / part
    export.save_parameters(load(source), source, tmp_path, table)
    (written,) = tmp_path.iterdir()
    found, expected = load_file(written), load_file(source / written.name)
    assert found.keys() == expected.keys()
    for key in expected:
        np.testing.assert_array_equal(found[key].view(np.uint16), expected[key].view(np.uint16))


def test_the_pool_is_a_function_of_the_step(model):
    for refreshed in range(12):
        blocks = list(range(3))
        for number in range(refreshed):
            blocks[number % 3] = 3 + number
        assert [source_block(b, refreshed, 3) for b in range(3)] == blocks
    pipeline = wan.Pipeline.from_pretrained(model)

    def pool():
        return LatentPool(
            pipeline.vae, pipeline.tokenizer, LESSONS, size=4, block=2, refresh_every=2
        )

    through, at_once = pool(), pool()
    for step in range(5):
        through.bring_to(step)
    at_once.bring_to(4)
    for one, other in zip(through.arrays, at_once.arrays, strict=True):
        np.testing.assert_array_equal(one, other)
    # Normalised latents of the clips themselves.
    examples = LESSONS(4, 2)
    latents = jax.jit(type(pipeline.vae).encode)(pipeline.vae, 2 * examples.video() - 1)
    np.testing.assert_allclose(at_once.arrays.latents[:2], latents, atol=5e-3)
    # Timing a refresh leaves the pool, and what follows, as they were.
    assert at_once.refresh_seconds() > 0
    for pools in (through, at_once):
        for step in (5, 6):
            pools.bring_to(step)
    for one, other in zip(through.arrays, at_once.arrays, strict=True):
        np.testing.assert_array_equal(one, other)


def draw_small(key, count):
    clips = scenes.make_clips(jax.random.split(key, count), frames=5, side=32)
    return vae_step.Drawn(clips.video, clips.cover)


def test_the_vae_learns_and_writes_its_statistics(model, tmp_path):
    recipe = vae_step.VAERecipe(steps=4, clips=2, crops=1, dtype="float32")
    trainee = VAETraining(model, draw_small, recipe, from_nothing=True)
    run(trainee, tmp_path, say=quiet)
    losses = np.load(tmp_path / "losses.npy")
    assert len(losses) == 4 and losses[-1] < losses[0]
    trained = wan.load_vae(tmp_path / "model" / "vae")
    drawn = draw_small(jax.random.key(recipe.seed + 1), 8)
    latents = jax.jit(type(trained).encode)(trained, 2 * drawn.video - 1)
    np.testing.assert_allclose(latents.mean((0, 1, 2, 3)), 0, atol=0.05)
    np.testing.assert_allclose(latents.std((0, 1, 2, 3)), 1, atol=0.05)


def test_devices_share_the_vaes_clips(model):
    script = f"""
        import functools
        import json
        import jax
        import training_test as t
        from astraea_ports.training.recipe import loss_and_gradients
        from astraea_ports.wan.training import vae_step
        from astraea_ports.wan.training.vae import VAETraining

        assert jax.device_count() == 2
        recipe = vae_step.VAERecipe(steps=1, clips=2, crops=1, dtype="float32")
        trainee = VAETraining({str(model)!r}, t.draw_small, recipe)
        vae = trainee.start().vae
        drawn = jax.eval_shape(lambda: t.draw_small(jax.random.key(0), 2))
        shape = vae_step.latents_shape(vae, drawn)
        noise = jax.ShapeDtypeStruct(shape, "float32")
        share = functools.partial(vae_step.loss, recipe=recipe)
        gradients = functools.partial(loss_and_gradients, share, mesh=trainee.mesh)
        program = jax.jit(gradients).lower(vae, (noise, drawn)).compile()
        print(json.dumps(t.what_travels(program)))
        """
    flags = "--xla_force_host_platform_device_count=2"
    printed = run_script(script, XLA_FLAGS=flags, check=True).stdout
    assert set(json.loads(printed)) == {"all-reduce"}


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
