"""Inputs are regular files, outputs are there whole or not at all."""

import json
import os
import pathlib
import sys

import pytest

from astraea_jax import files
from astraea_jax.checks import Refusal


@pytest.mark.parametrize(
    "kind", ["missing", "folder", "fifo", "device", "loop", "null byte", "long"]
)
def test_only_regular_files_are_read(tmp_path, kind):
    path = tmp_path / "x.json"
    match kind:
        case "folder":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "loop":
            path.symlink_to(path)
        case "null byte":
            path = pathlib.Path("a\0b.json")
        case "long":
            path = tmp_path / ("x" * 300)
    with pytest.raises(Refusal, match="expected a file of JSON at"):
        files.read_json(path)


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps("x" * 100))
    assert files.read_json(path) == "x" * 100
    with pytest.raises(Refusal, match="at most 50 bytes"):
        files.read_json(path, largest=50)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[NaN]", '{"a": Infinity}', "[-Infinity]", "[" * 100_000, "9" * 5000, "\ud800"],
)
def test_what_is_no_json_is_refused(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(Refusal):
        files.read_json(path)


@pytest.mark.parametrize("name", ["a.mp4", "x" * 251 + ".mp4", "红" * 83 + ".mp4", "A [b].MP4"])
def test_a_name_that_the_system_takes_is_written(tmp_path, name):
    path = tmp_path / name
    assert files.check_output(path, (".mp4",)) == path
    assert list(tmp_path.iterdir()) == []
    with files.replacing(path) as partial:
        assert partial.suffix == path.suffix and partial.parent == tmp_path
        partial.write_bytes(b"whole")
    assert [each.name for each in tmp_path.iterdir()] == [name]


def test_a_name_that_it_does_not_take_is_refused_before(tmp_path):
    with pytest.raises(Refusal, match="name too long"):
        files.check_output(tmp_path / ("x" * 252 + ".mp4"), (".mp4",))


@pytest.mark.parametrize("to", ["nothing.mp4", "out.mp4", "/dev/null"])
def test_a_link_to_no_file_is_refused(tmp_path, to):
    path = tmp_path / "out.mp4"
    path.symlink_to(to)
    with pytest.raises(Refusal):
        files.check_output(path, (".mp4",))
    assert path.is_symlink() and len(list(tmp_path.iterdir())) == 1


def test_a_link_to_a_file_is_followed(tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    (there / "old.mp4").write_bytes(b"old")
    path = tmp_path / "out.mp4"
    path.symlink_to(there / "old.mp4")
    files.check_output(path, (".mp4",))
    with files.replacing(path) as partial:
        partial.write_bytes(b"new")
    assert path.is_symlink() and (there / "old.mp4").read_bytes() == b"new"
    assert [each.name for each in there.iterdir()] == ["old.mp4"]


def test_special_files_are_no_outputs(tmp_path):
    os.mkfifo(tmp_path / "out.mp4")
    with pytest.raises(Refusal, match="no regular file"):
        files.check_output(tmp_path / "out.mp4", (".mp4",))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no full device here")
def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path):
    path = tmp_path / "out.bin"
    path.write_bytes(b"old")
    with (
        pytest.raises(Refusal, match=r"^can't write .*out.bin \(No space left") as refused,
        files.replacing(path),
        open("/dev/full", "wb") as full,
    ):
        full.write(bytes(1 << 16))
    assert len(str(refused.value).splitlines()) == 1
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_links_in_a_circle_are_no_place(tmp_path):
    loop = tmp_path / "loop.json"
    loop.symlink_to(loop)
    for one, other in ((loop, tmp_path / "a.json"), (tmp_path / "a.json", loop)):
        with pytest.raises(Refusal, match="is no path"):
            files.check_apart(one, other)


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize("name", [3, None, b"a.json", ["a.json"], object])
def test_what_is_no_name_is_refused(name):
    for call in (files.check_input, files.check_folder, files.read_json, files.as_path):
        with pytest.raises(Refusal, match="expected the name of a file or folder"):
            call(name)
    with pytest.raises(Refusal, match="expected the name of a file or folder"):
        files.check_output(name, (".json",))


def test_a_file_is_held_by_one(tmp_path):
    path = tmp_path / "deep" / "journal"
    with files.held(path) as file:
        file.write(b"a line\n")
        with pytest.raises(Refusal, match="in use by another run"), files.held(path):
            pass
    with files.held(path) as file:
        file.seek(0)
        assert file.read() == b"a line\n"


def test_only_a_regular_file_is_held(tmp_path):
    os.mkfifo(tmp_path / "journal")
    with pytest.raises(Refusal, match="no regular file"), files.held(tmp_path / "journal"):
        pass


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
