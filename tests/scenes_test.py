"""The clips that the small model learns from, their captions, and the reader of videos."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from astraea_jax import cli
from astraea_ports import tiny, wan
from astraea_ports.tiny import lessons, reader_training, scene_captions, scenes, score
from astraea_ports.tiny.scenes import Scene

pytestmark = pytest.mark.slow

COUNT = 2000


@pytest.fixture(scope="module")
def drawn():
    keys = scenes.clip_keys(3, 0, COUNT)
    shown = scenes.make_scenes(keys, two=0.3)
    return keys, jax.device_get(shown)


def test_shares_are_the_recipes(drawn):
    _, shown = drawn
    assert abs((shown.count == 2).mean() - 0.3) < 0.04
    for field, odds in (("size", scenes.SIZE_ODDS), ("speed", scenes.SPEED_ODDS)):
        found = np.bincount(getattr(shown, field).ravel(), minlength=3) / (2 * COUNT)
        np.testing.assert_allclose(found, odds, atol=0.03)
    for field, names in (("ground", scenes.GROUNDS), ("texture", scenes.TEXTURES)):
        found = np.bincount(getattr(shown, field), minlength=len(names)) / COUNT
        np.testing.assert_allclose(found, 1 / len(names), atol=0.04)
    np.testing.assert_allclose(np.bincount(shown.shape[:, 0]) / COUNT, 1 / 6, atol=0.04)
    np.testing.assert_allclose(np.bincount(shown.motion.ravel()) / 2 / COUNT, 1 / 8, atol=0.03)
    # A blue or green object is one ground in six rarer.
    colours = np.bincount(shown.colour[:, 0], minlength=8) / COUNT
    np.testing.assert_allclose(colours[[3, 4]], 5 / 6 / 8, atol=0.02)


def test_nothing_hides_and_two_objects_differ(drawn):
    _, shown = drawn
    grounds = np.array(scenes.GROUNDS)[shown.ground]
    assert not (np.array(scenes.COLOURS)[shown.colour] == grounds[:, None]).any()
    assert (shown.colour[:, 0] != shown.colour[:, 1]).all()
    assert (shown.shape[:, 0] != shown.shape[:, 1]).all()


def test_a_clip_is_a_function_of_its_number():
    def make(seed, first):
        keys = scenes.clip_keys(seed, first, 4)
        return keys, scenes.make_clips(keys, two=0.5, frames=5, side=16)

    keys, clips = make(0, 0)
    later_keys, later = make(0, 2)
    np.testing.assert_array_equal(clips.video[2:], later.video[:2])
    assert not np.array_equal(make(1, 2)[1].video, later.video)
    captions = scene_captions.make_captions(keys, clips.scene)
    assert captions[2:] == scene_captions.make_captions(later_keys, later.scene)[:2]
    assert len(set(captions)) == 4


def one_scene(**changes):
    fields = {"count": 1, "shape": (0, 1), "colour": (0, 1), "motion": (4, 4)}
    fields |= {"size": (1, 1), "speed": (1, 1), "ground": 4, "texture": 0}
    return Scene(**{name: jnp.array(value) for name, value in (fields | changes).items()})


RENDER = jax.jit(scenes.render, static_argnames=("frames", "side"))


def drawn_object(**changes):
    """Video, cover, and the middle (x, y) of what is covered at each frame."""
    colours = jnp.array(scenes.COLOUR_RGB)
    video, cover = RENDER(jax.random.key(5), one_scene(**changes), colours, frames=9, side=64)
    cover = np.asarray(cover)
    places = (np.arange(64) + 0.5) / 32 - 1
    mass = cover.sum((1, 2))
    middle = np.stack([cover.sum(1) @ places, cover.sum(2) @ places], 1) / mass[:, None]
    return np.asarray(video), cover, middle, mass


def test_motions_move_as_they_say():
    for name, axis, sign in (("left", 0, -1), ("right", 0, 1), ("up", 1, -1), ("down", 1, 1)):
        *_, middle, _ = drawn_object(motion=(scenes.MOTIONS.index(name), 0))
        assert sign * (middle[-1] - middle[0])[axis] > 0.6, name
        assert abs((middle[-1] - middle[0])[1 - axis]) < 0.1, name
    for name, more in (("growing", True), ("shrinking", False)):
        *_, mass = drawn_object(motion=(scenes.MOTIONS.index(name), 0))
        assert (mass[-1] > 4 * mass[0]) if more else (mass[0] > 4 * mass[-1])
    *_, middle, _ = drawn_object(motion=(scenes.MOTIONS.index("bouncing"), 0))
    turns = np.sign(np.diff(middle[:, 1]))
    assert (np.diff(turns) != 0).sum() >= 2
    video, _, middle, _ = drawn_object(motion=(scenes.MOTIONS.index("spinning"), 0))
    assert np.abs(middle - middle[0]).max() < 0.02 and np.abs(video[2] - video[0]).max() > 0.1


@pytest.mark.parametrize("colour", range(len(scenes.COLOURS)))
def test_objects_have_their_colour_in_two_tones(colour):
    video, cover, *_ = drawn_object(colour=(colour, 0))
    inside = video[cover > 0.99]
    rgb = np.array(scenes.COLOUR_RGB[colour])
    dark = rgb * 0.62 + 0.22 * (colour == scenes.BLACK)
    nearest = np.minimum(*(np.abs(inside - tone).max(-1) for tone in (rgb, dark)))
    assert np.abs(inside - rgb).max(-1).min() < 0.08 and nearest.max() < 0.25


def test_textures_and_shapes_differ():
    backgrounds = [drawn_object(texture=t)[0][0] for t in range(4)]
    assert backgrounds[0][:, :8].std(axis=(0, 1)).max() < 0.03
    for texture in backgrounds[1:]:
        assert texture[:, :8].std(axis=(0, 1)).min() > 0.04
    covers = [drawn_object(shape=(s, 0), motion=(5, 0))[1][-1] for s in range(6)]
    for first in range(6):
        for second in range(first):
            assert np.abs(covers[first] - covers[second]).sum() > 60
    ring = covers[scenes.SHAPES.index("ring")]
    rows, columns = np.nonzero(ring > 0.9)
    assert ring[round(rows.mean()), round(columns.mean())] < 0.1, "a ring has a hole"


def test_the_first_named_is_above():
    _, cover, *_ = drawn_object(count=2, motion=(0, 1), size=(0, 0))
    assert cover[:, 28:36].max() < 0.05 and cover[:, :28].max() > 0.9 < cover[:, 36:].max()


def test_captions_say_what_is_shown(drawn):
    keys, shown = drawn
    keys, shown = keys[:700], jax.tree.map(lambda leaf: leaf[:700], shown)
    captions = scene_captions.make_captions(keys, shown)
    for index, caption in enumerate(captions):
        objects = range(shown.count[index])
        for which in objects:
            assert f" {scenes.COLOURS[shown.colour[index, which]]} " in f" {caption} "
            words = scene_captions.SHAPE_WORDS[shown.shape[index, which]]
            assert any(f" {word} " in caption for word in words)
            words = scene_captions.MOTION_WORDS[shown.motion[index, which]]
            assert any(f" {word} " in f"{caption} " for word in words)
        assert scenes.GROUNDS[shown.ground[index]] in caption.split()[-2:]
        assert (scenes.TEXTURES[shown.texture[index]] in caption) or shown.texture[index] == 0
        assert (" and a" in caption.replace("up and down", "")) == (shown.count[index] == 2)
    invented = [w for c in captions for w in c.split() if w not in WORDS]
    assert 0.02 < len(invented) / (shown.count.sum()) < 0.045
    assert all(3 <= len(word) <= 7 for word in invented)


WORDS = {
    word
    for text in (
        *scenes.COLOURS,
        *scenes.GROUNDS,
        *scenes.TEXTURES,
        *scene_captions.PLACES,
        *scene_captions.OPENINGS,
        *scene_captions.WALLS,
        *scene_captions.FILLERS,
        *sum(scene_captions.SHAPE_WORDS + scene_captions.MOTION_WORDS, ()),
        *sum(scene_captions.SIZE_WORDS, ()),
        "a an and quickly fast slowly",
    )
    for word in text.split()
}


def test_captions_are_like_the_shipped_ones():
    tokenizer = wan.Tokenizer.from_pretrained(tiny.FOLDER / "tokenizer")
    for caption in tiny.captions():
        assert sum(word not in WORDS for word in caption.split()) <= 2
    lengths = tokenizer(scene_captions.held_out(True).captions).mask.sum(-1)
    assert lengths.max() <= tokenizer.length


def test_training_is_kept_from_the_held_out_captions():
    for two in (False, True):
        asked, others = scene_captions.held_out(two), scene_captions.for_choosing(two)
        assert (len(asked.captions), len(others.captions)) == (256, 768)
        for each in asked, others:
            assert (np.asarray(each.scenes.count) == 1 + two).all()
            drawn = scenes.make_scenes(each.keys, two=float(two))
            jax.tree.map(np.testing.assert_array_equal, drawn, each.scenes)
        assert not {*jax.random.key_data(asked.keys)[:, 1].tolist()} & {
            *jax.random.key_data(others.keys)[:, 1].tolist()
        }, "what chooses is not what is reported"
    keys = scenes.clip_keys(scene_captions.HELD_OUT_SEED, 0, 4)
    shown = jax.tree.map(lambda leaf: leaf[:4], scene_captions.held_out(False).scenes)
    captions = scene_captions.make_captions(keys, shown, avoid=scene_captions.held_out_captions())
    assert not set(captions) & scene_captions.held_out_captions()
    with pytest.raises(ValueError, match="seed must be an integer in"):
        lessons.Lessons(seed=scene_captions.HELD_OUT_SEED)


def test_lessons_are_the_scenes_with_other_words():
    plain = lessons.Lessons(seed=1, frames=5, side=16)
    taught = lessons.Lessons(seed=1, frames=5, side=16, rename=(("white", "pink"),))
    captions = plain(0, 32).captions
    assert [c.replace("white", "pink") for c in captions] == list(taught(0, 32).captions)
    clips = scenes.make_clips(scenes.clip_keys(1, 0, 4), two=plain.two, frames=5, side=16)
    np.testing.assert_allclose(plain(0, 4).video(), clips.video, atol=1e-6)


def test_lessons_may_spin_more_than_the_scenes(drawn):
    keys, plain = drawn
    same, more = (jax.device_get(scenes.make_scenes(keys, two=0.3, spin=s)) for s in (0.0, 0.4))
    jax.tree.map(np.testing.assert_array_equal, plain, same)
    # 40 % are made to spin, and an eighth of the others does.
    spins = more.motion == scenes.SPINNING
    assert abs(spins.mean() - (0.4 + 0.6 / 8)) < 0.03
    assert abs((spins[:, 0] & spins[:, 1]).mean() - 0.475**2) < 0.03, "each object for itself"
    # Nothing else changes: not even how the others move.
    others = more._replace(motion=np.where(spins, plain.motion, more.motion))
    jax.tree.map(np.testing.assert_array_equal, plain, others)
    # What captions and scores come from knows no such share.
    shown = scene_captions.held_out(False).scenes
    assert (np.asarray(shown.motion) == scenes.SPINNING).mean() < 0.25


def test_captions_say_what_is_made_to_spin():
    plain = lessons.Lessons(seed=1, two=0.5, frames=5, side=16)
    spun = dataclasses.replace(plain, spin=1.0)
    assert spun.settings["spin"] == 1.0
    before, after = plain(0, 16), spun(0, 16)
    assert before.captions != after.captions
    counts = np.asarray(scenes.make_scenes(scenes.clip_keys(1, 0, 16), two=0.5).count)
    words = scene_captions.MOTION_WORDS[scenes.SPINNING]
    for caption, count in zip(after.captions, counts, strict=True):
        assert sum(caption.count(word) for word in words) == count
    # An object that spins stays where it is.
    still, moved = (np.abs(np.diff(e.video(), axis=1)).sum() for e in (after, before))
    assert 0 < still < 0.8 * moved
    with pytest.raises(ValueError, match="spin must be a number"):
        lessons.Lessons(spin=-0.1)


def test_scores_count_what_was_asked_for():
    truth = jax.tree.map(lambda *leaves: jnp.stack(leaves), one_scene(), one_scene(count=2))
    reading = score.Reading(**{
        name: getattr(truth, name) for name in score.Reading._fields
    })  # fmt: skip
    shares = score.compare(reading, truth)
    assert all(share.percent == 100 for share in shares.values())
    assert shares["shape"].total == 3 and shares["ground"].total == 2
    # The second object of a video with one object counts for nothing.
    wrong = reading._replace(colour=reading.colour.at[:, 1].set(5))
    shares = score.compare(wrong, truth)
    assert shares["colour"] == score.Share(2, 3) and shares["everything"] == score.Share(1, 2)
    assert score.add([shares, shares])["colour"] == score.Share(4, 6)
    assert score.mistakes(reading, truth) == []
    one = score.mistakes(wrong, truth)
    assert [each.attribute for each in one] == ["colour"] and one[0].asked != one[0].read


def test_the_command_scores_videos_and_keeps_what_was_wrong(fully_optimised, tmp_path, capsys):
    output = tmp_path / "score.json"
    words = ("--captions", "choice", "--count", "2", "--steps", "1", "--output", str(output))
    assert cli.main(["score-tiny", *words]) == 0
    found = json.loads(output.read_text())
    shares = {(row["objects"], row["attribute"]): row for row in found["rows"]}
    assert {row["total"] for row in found["rows"]} == {2, 4}
    for objects, two in (("one object", False), ("two objects", True)):
        # One step draws no object, so the mistakes are many, and each is counted.
        wrong = [
            each
            for each in found["mistakes"]
            if each["caption"] in scene_captions.for_choosing(two).captions
        ]
        for name in score.ATTRIBUTES:
            row = shares[objects, name]
            missed = sum(each["attribute"] == name for each in wrong)
            assert row["made"] == round(100 * (1 - missed / row["total"]), 1)
            assert row["drawn"] >= 50 and row["passed"] >= 50
    assert found["mistakes"]
    printed = capsys.readouterr().out
    assert printed.count("| captions with |") == 2 and f"not {wrong[0]['asked']}" in printed
    assert cli.main(["score-tiny", "--count", "300"]) == 2
    assert "count must be an integer in 1..256" in capsys.readouterr().err


def test_the_shipped_reader_reads_the_truth(fully_optimised):
    vae = wan.load_vae(tiny.FOLDER / "vae")

    def shares(count, frames, change=lambda video: video):
        parts = []
        for two in (0.0, 1.0):
            keys = scenes.clip_keys(11, int(two) * count, count)
            clips = scenes.make_clips(keys, two=two, frames=frames)
            parts.append(score.compare(score.read(change(clips.video)), clips.scene))
        return score.add(parts)

    drawn = shares(16, score.NUM_LOOKS)
    passed = shares(2, scenes.FRAMES, lambda video: PASS(vae, video))
    assert min(share.percent for share in drawn.values()) >= 95
    assert min(passed[name].percent for name in score.ATTRIBUTES) >= 90


PASS = jax.jit(reader_training.through_vae)


def test_without_weights_it_says_how_to_make_them(tmp_path):
    with pytest.raises(ValueError, match=r"a reader's weights.*train-tiny --part reader"):
        score.load_reader(tmp_path / "score.safetensors")


def test_the_reader_refuses_what_it_can_not_read(tmp_path):
    with pytest.raises(ValueError, match="at least 9 frames; got 5"):
        score.looks(5)
    with pytest.raises(ValueError, match="128x128"):
        score.read(jnp.zeros((1, 9, 64, 64, 3)))
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="a reader's weights"):
        score.load_reader(tmp_path / "broken.safetensors")


def test_the_reader_learns():
    recipe = reader_training.ReaderRecipe(steps=100, batch=4, vae_every=0)
    trainee = reader_training.ReaderTraining(wan.load_vae(tiny.FOLDER / "vae"), recipe)
    state, losses = trainee.start(), []
    for step in range(12):
        trainee.prepare(step, print)
        state, value = trainee.advance(state)
        losses.append(float(value))
    assert losses[-1] < losses[0]


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
