"""Videos survive their files; a file is there whole or not at all; pictures show what they say."""

import math
import os
import pathlib
import resource
import struct
import sys
import time
from fractions import Fraction

import av
import jax.numpy as jnp
import numpy as np
import pytest
from av.error import EncoderNotFoundError, InvalidDataError
from av.video.reformatter import Colorspace
from PIL import Image

from astraea_jax import files, metrics, video
from astraea_jax.checks import Refusal


@pytest.fixture
def clip():
    """A square that moves over a gradient: uint8 [9, 32, 48, 3]."""
    rows, columns = np.mgrid[0:32, 0:48]
    frames = np.broadcast_to(np.stack([4 * rows, 4 * columns, 90 + 0 * rows], -1), (9, 32, 48, 3))
    frames = frames.astype(np.uint8)
    for index, frame in enumerate(frames):
        frame[8:20, 4 * index : 4 * index + 12] = 230
    return frames


def test_mp4_round_trip(tmp_path, clip):
    path = tmp_path / "out.mp4"
    video.write_video(path, clip, fps=16)
    back = video.read_video(path)
    assert back.shape == clip.shape and back.dtype == np.uint8
    assert metrics.psnr(clip, back) > 30
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 16
    assert os.listdir(tmp_path) == ["out.mp4"]


def one_colour(colour, rows, columns):
    return np.broadcast_to(np.array(colour, np.uint8), (2, rows, columns, 3))


@pytest.mark.parametrize(("rows", "columns", "tag"), [(64, 64, 6), (480, 832, 6), (720, 1280, 1)])
def test_colours_are_tagged_and_come_back(tmp_path, rows, columns, tag):
    for colour in ((0, 255, 0), (255, 0, 0), (0, 0, 255), (200, 30, 90)):
        video.write_video(tmp_path / "out.mp4", one_colour(colour, rows, columns))
        with av.open(str(tmp_path / "out.mp4")) as container:
            codec = container.streams.video[0].codec_context
            said = (codec.colorspace, codec.color_primaries, codec.color_trc, codec.color_range)
            assert said == (tag, tag, tag, 1)
            frame = next(container.decode(video=0))
        # As a player does that heeds the tags, with BT.709's matrix or BT.601's.
        matrix = Colorspace.ITU709 if frame.colorspace == 1 else Colorspace.ITU601
        seen = frame.reformat(
            format="rgb24", src_colorspace=matrix, dst_colorspace=Colorspace.ITU601
        ).to_ndarray()
        assert np.abs(seen.astype(int) - colour).max() <= 2
        back = video.read_video(tmp_path / "out.mp4")
        assert np.abs(back.astype(int) - colour).max() <= 2


@pytest.mark.parametrize(("rows", "matrix"), [(64, Colorspace.ITU601), (720, Colorspace.ITU709)])
def test_untagged_colours_are_read_as_players_guess_them(tmp_path, rows, matrix):
    with av.open(str(tmp_path / "out.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=16, options={"crf": "5"})
        stream.height, stream.width, stream.pix_fmt = rows, 64, "yuv420p"
        green = av.VideoFrame.from_ndarray(one_colour((0, 255, 0), rows, 64)[0], format="rgb24")
        container.mux(stream.encode(green.reformat(format="yuv420p", dst_colorspace=matrix)))
        container.mux(stream.encode(None))
    assert np.abs(video.read_video(tmp_path / "out.mp4").astype(int) - [0, 255, 0]).max() <= 2


def atoms(content):
    """The kinds of an mp4's top atoms, in their order."""
    place = 0
    while place < len(content):
        size, kind = struct.unpack(">I4s", content[place : place + 8])
        yield kind.decode()
        place += size


def test_the_index_of_an_mp4_lies_before_its_frames(tmp_path, clip):
    video.write_video(tmp_path / "out.mp4", clip)
    kinds = list(atoms((tmp_path / "out.mp4").read_bytes()))
    assert kinds.index("moov") < kinds.index("mdat")


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    ("fps", "rate"),
    [
        (24, 24),
        (np.int64(25), 25),
        (16.0, 16),
        (np.float32(12.5), Fraction(25, 2)),
        (Fraction(24000, 1001), Fraction(24000, 1001)),
        (23.976, Fraction(24000, 1001)),
        (23.98, Fraction(24000, 1001)),
        (29.97, Fraction(30000, 1001)),
        (59.94, Fraction(60000, 1001)),
        (23.9, Fraction(239, 10)),
        (0.5, Fraction(1, 2)),
    ],
)
def test_frame_rates_are_exact(tmp_path, clip, fps, rate):
    video.write_video(tmp_path / "out.mp4", clip, fps=fps)
    with av.open(str(tmp_path / "out.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == rate
        assert [frame.pts * stream.time_base * rate for frame in container.decode(stream)] == list(
            range(9)
        )


def test_mp4_of_odd_size_gets_the_last_row_and_column_twice(tmp_path, clip):
    video.write_video(tmp_path / "out.mp4", clip[:, :31, :47])
    assert video.read_video(tmp_path / "out.mp4").shape == clip.shape


def test_gif_round_trip(tmp_path, clip):
    video.write_video(tmp_path / "out.GIF", clip.astype(np.float32) / 255, fps=10)
    back = video.read_video(tmp_path / "out.GIF")
    assert back.shape == clip.shape
    assert metrics.psnr(clip, back) > 30
    with Image.open(tmp_path / "out.GIF") as image:
        assert (image.info["duration"], image.info["loop"]) == (100, 0)


def test_arrays_of_jax_are_videos_too(tmp_path, clip):
    video.write_video(tmp_path / "out.mp4", jnp.asarray(clip) / 255)
    assert video.read_video(tmp_path / "out.mp4").shape == clip.shape


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_half_written_remains(tmp_path, clip, monkeypatch, suffix, error):
    path = tmp_path / f"out{suffix}"
    path.write_bytes(b"what was there before")

    def interrupt(*_, **__):
        assert len(os.listdir(tmp_path)) == 2, "the partial file lies beside its destination"
        raise error

    monkeypatch.setattr("os.replace", interrupt)
    with pytest.raises(error):
        video.write_video(path, clip)
    assert os.listdir(tmp_path) == [path.name]
    assert path.read_bytes() == b"what was there before"


def test_an_interrupt_while_encoding_leaves_nothing(tmp_path, clip, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(av.VideoFrame, "from_ndarray", interrupt, raising=True)
    with pytest.raises(KeyboardInterrupt):
        video.write_video(tmp_path / "out.mp4", clip)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_a_disk_that_fills_up_while_encoding(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (30, 128, 128, 3), dtype=np.uint8)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, hard))
    try:
        with pytest.raises(Refusal, match=rf"can't write .*out\{suffix} \(File too large"):
            video.write_video(tmp_path / f"out{suffix}", noise)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [InvalidDataError, EncoderNotFoundError])
def test_what_the_encoder_says_is_a_refusal(tmp_path, clip, monkeypatch, error):
    def fail(*_, **__):
        raise error(1, "the encoder's words")

    monkeypatch.setattr(av, "open", fail)
    with pytest.raises(Refusal, match=r"can't write .*out\.mp4 \(the encoder's words\)"):
        video.write_video(tmp_path / "out.mp4", clip)
    assert os.listdir(tmp_path) == []


def test_check_output_says_what_to_do(tmp_path):
    assert video.check_output(tmp_path / "new.mp4") == tmp_path / "new.mp4"
    assert os.listdir(tmp_path) == []
    with pytest.raises(ValueError, match=r"expected an existing folder .*none is none: make it"):
        video.check_output(tmp_path / "none/out.mp4")
    with pytest.raises(ValueError, match=r"ends in \.mp4 or \.gif; got 'out\.avi'"):
        video.check_output(tmp_path / "out.avi")
    with pytest.raises(ValueError, match="is a folder: add a file name"):
        video.check_output(tmp_path)


def test_check_output_tries_to_write(tmp_path, monkeypatch):
    # Permissions do not bind the superuser, so the refusal is planted.
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "open", refuse)
    with pytest.raises(ValueError, match=r"can't write to folder .*Permission denied"):
        video.check_output(tmp_path / "out.mp4")


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind the superuser")
def test_check_output_of_a_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="can't write to folder"):
        video.check_output(tmp_path / "out.mp4")


def test_read_video_of_what_is_none(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    os.mkfifo(tmp_path / "fifo.mp4")
    for name in ("text.mp4", "absent.mp4", "fifo.mp4"):
        with pytest.raises(ValueError, match=f"expected a video file at .*{name}"):
            video.read_video(tmp_path / name)


def test_replacing_keeps_the_suffix_and_needs_no_write(tmp_path):
    with (
        pytest.raises(Refusal, match="No such file"),
        files.replacing(tmp_path / "a.png") as partial,
    ):
        assert partial.suffix == ".png" and partial.parent == tmp_path


def test_write_image(tmp_path, clip):
    video.write_image(tmp_path / "a.png", clip[0])
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), clip[0])
    video.write_image(tmp_path / "a.jpg", clip[0] / np.float32(255))
    assert sorted(os.listdir(tmp_path)) == ["a.jpg", "a.png"]
    with pytest.raises(ValueError, match=r"\.png or \.jpg or \.jpeg"):
        video.write_image(tmp_path / "a.tiff", clip[0])


def test_enlarge_by_a_whole_factor(clip):
    assert video.enlarge(clip, 32) is not None and video.enlarge(clip, 32).shape == clip.shape
    large = video.enlarge(clip, 100)
    assert large.shape == (9, 128, 192, 3)
    np.testing.assert_array_equal(large[:, 1::4, 3::4], clip)


def test_difference_states_its_gain(clip):
    other = clip.copy()
    other[:, 0, 0] -= clip[:, 0, 0] % 2
    np.testing.assert_array_equal(video.difference(clip, clip)[0], 0)
    amplified, gain = video.difference(clip, np.where(clip > 200, clip - 3, clip).astype(np.uint8))
    assert gain == 50
    assert amplified.max() == 150
    assert video.difference(clip, 255 - clip)[1] == 1
    assert video.difference(clip, clip, gain=7.5)[1] == 7.5


def test_light_up_dims_only_what_was_not_computed(clip):
    mask = np.zeros(clip.shape[:3], bool)
    mask[:, :, 24:] = True
    lit = video.light_up(clip, mask)
    np.testing.assert_array_equal(lit[:, :, 24:], clip[:, :, 24:])
    np.testing.assert_array_equal(lit[:, :, :24], np.rint(clip[:, :, :24] / 4))


def test_side_by_side_keeps_every_pixel_under_its_title(clip):
    row = video.side_by_side([clip, 255 - clip], ["dense", "half the tokens"])
    assert row.shape[:1] == (9,) and row.shape[2] == 48 + 4 + 48
    np.testing.assert_array_equal(row[:, -32:, :48], clip)
    np.testing.assert_array_equal(row[:, -32:, -48:], 255 - clip)
    bar = row[:, :-32]
    assert bar[:, :, :48].min() < 64 and bar[:, :, -48:].min() < 64
    assert not np.array_equal(bar[:, :, :48], bar[:, :, -48:])


def test_titles_never_overflow_their_bar(clip):
    for title in ("", "word", "a prompt that is far too long for its panel, " * 4, "x" * 200):
        row = video.side_by_side([clip], [title])
        assert row.shape == video.side_by_side([clip], [""]).shape


@pytest.mark.parametrize(
    "title",
    [
        *("红色的圆圈" * 30, "مرحبا بالعالم " * 9, "\U0001f469\u200d" * 50, "e" + "\u0301" * 900),
        *("a\0b\ud800c", "\t\n\r\x1b[31m", r"$\frac{1}{$", "x" * 100_000, "word " * 30_000),
    ],
)
def test_any_text_is_a_title(clip, title):
    start = time.process_time()
    for columns in (1, 8, 48):
        row = video.side_by_side([clip[..., :columns, :]], [title])
        assert row.shape[2] == columns
    assert time.process_time() - start < 1


def test_film_strip_has_the_first_and_the_last_frame(clip):
    strip = video.film_strip(clip, 3)
    assert strip.shape == (32, 3 * 48, 3)
    np.testing.assert_array_equal(strip, np.concatenate([clip[0], clip[4], clip[8]], axis=1))


def test_contact_sheet_fills_rows(clip):
    sheet = video.contact_sheet(
        [clip, 255 - clip, clip], ["one", "two", "three"], columns=2, frames_per_video=5
    )
    height = (sheet.shape[0] - 4) // 2
    assert sheet.shape[1] == 2 * 5 * 48 + 4
    np.testing.assert_array_equal(sheet[height - 32 : height, :240], video.film_strip(clip, 5))
    np.testing.assert_array_equal(sheet[height + 4 :, 244:], 255)


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda clip: video.enlarge(clip[0]), r"expected a video \[F, H, W, 3\]"),
        (lambda clip: video.enlarge(clip[:0]), r"got an array of shape \(0, 32, 48, 3\)"),
        (lambda clip: video.difference(clip, clip[1:]), "expected videos of one shape"),
        (lambda clip: video.light_up(clip, np.ones((9, 4, 6))), r"mask of shape \(9, 32, 48\)"),
        (lambda clip: video.side_by_side([], []), "got no video"),
        (lambda clip: video.side_by_side([clip], []), "expected 1 titles, one a video; got 0"),
        (
            lambda clip: video.film_strip(clip, 10),
            r"count must be an integer in 1\.\.9 \(the frames\); got",
        ),
        (
            lambda clip: video.contact_sheet([clip], ["a"], columns=0),
            "columns must be an integer in 1\\.\\..*",
        ),
        (lambda clip: video.contact_sheet([clip], [], columns=1), "expected 1 captions"),
        (lambda clip: video.write_video("a.mp4", clip, fps=0), r"in 0\.01\.\.1000; got 0"),
        (lambda clip: video.write_video("a.mp4", clip, fps=-1), r"in 0\.01\.\.1000; got -1"),
        (lambda clip: video.write_video("a.mp4", clip, fps=math.nan), "fps must be .* got nan"),
        (lambda clip: video.write_video("a.gif", clip, fps=math.inf), "fps must be .* got inf"),
        (lambda clip: video.write_video("a.mp4", clip, fps=1e-300), "fps must be .* got 1e-300"),
        (lambda clip: video.write_video("a.mp4", clip, fps=10**400), "fps must be a number"),
        (lambda clip: video.write_video("a.mp4", clip, fps=Fraction(10**9)), "fps must be a"),
        (lambda clip: video.write_video("a.mp4", clip, fps=True), "fps must be .* got True"),
        (lambda clip: video.write_video("a.mp4", clip, fps="16"), "fps must be .* got '16'"),
        (
            lambda clip: video.write_video("a.mp4", np.zeros((1, 2, 16386, 3), np.uint8)),
            "at most 16384 pixels a side; got 2x16386",
        ),
        (lambda clip: video.side_by_side([clip], [None]), "expected a title as text; got None"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, clip, call, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        call(clip)
    assert os.listdir(tmp_path) == []


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
