"""The command line: what it makes, and one clear line for every mistake."""

import errno
import io
import json
import os
import pathlib
import pwd
import signal
import subprocess
import sys
import threading
import types
from typing import get_args

import jax
import numpy as np
import pytest
from command_line import refused

import astraea_ports
from astraea_jax import attention, cli, files, report, solvers, video
from astraea_jax import denoise as loop
from astraea_jax.checks import Refusal
from astraea_jax.cli import bench, compiled, ending, info, keeping, making, options
from astraea_jax.cli.options import ModelChoice, Sampling, read_lora
from astraea_jax.cli.request import Request, plan
from astraea_jax.methods import METHODS, Astraea, Dense, StepLevel
from astraea_jax.schedule import Schedule
from astraea_ports import checkpoints, tiny
from astraea_ports.pipeline import parts

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")

PROMPT = "a red circle moving left over a blue background"
SMALL = ["--frames", "5", "--height", "32", "--width", "32", "--steps", "4"]
SMALL += ["--no-compilation-cache"]


@pytest.fixture
def loads(monkeypatch):
    """What is loaded of a model, in turn."""
    seen, load = [], checkpoints.Checkpoint.load
    monkeypatch.setattr(
        checkpoints.Checkpoint,
        "load",
        lambda self: seen.append(type(self.template).__name__) or load(self),
    )
    return seen


def test_compare_writes_a_video_and_prints_what_was_saved(capsys, monkeypatch, loads):
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setattr(parts, "LARGE", 0)
    arguments = [PROMPT, "--budget", "0.5", "--compare", "--show-selection", *SMALL]
    arguments += ["--model", str(tiny.FOLDER), "--grid", "original", "--shift", "5"]
    assert cli.main(["generate", *arguments]) == 0
    printed = capsys.readouterr()
    for words in ("tokens computed", "50.0 %", "speed-up", "PSNR", "SSIM", "cache", "out.mp4"):
        assert words in printed.out
    frames = video.read_video("out.mp4")
    assert frames.shape[0] == 5
    # Four panels of 256 pixels a side, under their titles.
    assert frames.shape[1] > 256 and frames.shape[2] >= 4 * 256
    assert np.abs(np.diff(frames.astype(int), axis=2)).max() > 50
    # A large model is loaded part by part, each once for both runs.
    assert loads == ["T5Encoder", "Transformer", "VAE"]
    stages = ("text: ", "load: ", "denoise, dense: 4 steps", "denoise, step-level", "decode: ")
    for stage in stages:
        assert stage in printed.err
    assert len(os.listdir("cache/astraea_jax/text")) == 2
    assert sorted(os.listdir()) == ["cache", "out.mp4"]


@pytest.mark.parametrize(
    ("error", "kind"), [(Refusal("NaN"), Refusal), (RuntimeError("out of memory"), RuntimeError)]
)
def test_latents_are_kept_where_decoding_fails(monkeypatch, tmp_path, error, kind):
    monkeypatch.setattr(keeping.tempfile, "tempdir", str(tmp_path))

    class Pipeline:
        def finish(self, made, progress):
            raise error

    made = [types.SimpleNamespace(latents=np.full((1, 2, 4, 4, 16), each)) for each in (1.0, 2.0)]
    monkeypatch.setattr(ModelChoice, "open", lambda self: Pipeline())
    monkeypatch.setattr(making, "_denoise", lambda *_: made)
    with pytest.raises(kind) as caught:
        making.run(request(), report.Progress())
    (kept,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    said = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
    assert str(error) in said and f"the latents are kept as {kept}" in said
    assert np.load(kept)[:, 0, 0, 0, 0].tolist() == [1.0, 2.0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "tokens"), [("pab-2-6", "100.0 %"), ("teacache-0.08", "87.5 %")]
)
def test_a_method_of_its_own_rule_books_what_it_did(capsys, method, tokens):
    small = [each if each != "4" else "8" for each in SMALL]
    assert cli.main(["generate", PROMPT, "--method", method, "--compare", *small]) == 0
    printed = capsys.readouterr().out
    (operations,) = [line.split() for line in printed.splitlines() if "operations" in line]
    dense, fast = float(operations[-4]), float(operations[-2])
    assert tokens in printed and 0.3 * dense < fast < 0.95 * dense


@pytest.mark.slow
def test_schedule_file_and_gif(capsys):
    Schedule((10, 0, 0, 10)).save("chosen.json", note="by hand")
    arguments = [PROMPT, "--schedule", "chosen.json", "-o", "clip.gif", *SMALL]
    assert cli.main(["generate", *arguments]) == 0
    assert os.path.getsize("clip.gif") > 100
    assert "tokens computed" in capsys.readouterr().out


def test_the_command_to_convert(capsys):
    assert cli.main(["convert", str(tiny.FOLDER), "-o", "made", "--dtype", "float32"]) == 0
    assert "written: made" in capsys.readouterr().out
    assert "does not exist yet" in refused(capsys, "convert", "tiny", "-o", "made")


def request(**changes):
    asked = dict.fromkeys(Request.__dataclass_fields__)
    asked |= {"prompt": PROMPT, "model": ModelChoice(), "solver": "unipc", "sampling": Sampling()}
    asked |= {"seed": 0, "size": (None, None, None), "compare": False, "show_selection": False}
    asked |= {"output": pathlib.Path("out.mp4")}
    return Request(**{**asked, **changes})


def test_lora_files_with_and_without_a_strength():
    assert read_lora("a.safetensors") == ("a.safetensors", 1.0)
    assert read_lora("b:/a.safetensors:0.8") == ("b:/a.safetensors", 0.8)
    assert read_lora("b:/a.safetensors") == ("b:/a.safetensors", 1.0)


def test_plan_takes_what_measured_best():
    method, levels = plan(request(budget=0.5), 30)
    assert method == StepLevel(corrects=True) and levels.budget == 0.5
    assert levels.levels[:6] == (10,) * 6 and set(levels.levels) == {0, 10}
    method, levels = plan(request(budget=0.5, method=Astraea()), 30)
    assert levels.levels[:6] == (10,) * 6 and 0 < min(levels.levels) < 10
    assert plan(request(), 7) == (Dense(), Schedule.dense(7))
    assert plan(request(schedule=Schedule((10, 5))), 7)[0] == Astraea()
    assert plan(request(schedule=Schedule((10, 0))), 7)[0] == StepLevel(corrects=True)
    with pytest.raises(ValueError, match="leave --budget or --method out"):
        request(budget=0.5, method=Dense()).check()
    with pytest.raises(ValueError, match=r"2 levels.*got 7 steps"):
        request(schedule=Schedule((10, 5)), sampling=Sampling(steps=7)).check()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", ""], "prompt must say something"),
        (["generate", PROMPT, "--budget", "0"], "budget must be a number at least 0.0001"),
        (["generate", PROMPT, "--budget", "1.5"], "budget must be a number at least 0.0001"),
        (["generate", PROMPT, "--budget", "half"], "half"),
        (["generate", PROMPT, "--steps", "0"], "steps must be an integer in 1..10000"),
        (["generate", PROMPT, "--frames", "32"], "the nearest is 33"),
        (["generate", PROMPT, "--height", "100"], "multiple of 16"),
        (["generate", PROMPT, "-o", "nowhere/out.mp4"], "nowhere is none"),
        (["generate", PROMPT, "-o", "out.txt"], ".mp4"),
        (["generate", PROMPT, "--model", "."], "model_index.json"),
        (["generate", PROMPT, "--model", "no such model"], "no such model"),
        (["generate", PROMPT, "--schedule", "none.json"], "expected a schedule file"),
        (["generate", PROMPT, "--method", "fast"], "fast"),
        (["generate", PROMPT, "--seed", "-1"], "seed must be"),
        (["generate", PROMPT, "--seed", str(2**64)], "seed must be an integer in 0..2^32-1"),
        (["generate", PROMPT, "--steps", "1000000000"], "steps must be an integer in 1..10000"),
        (["generate", PROMPT, "--guidance", "1e300"], "guidance must be a number at least 0"),
        (["generate", PROMPT, "--guidance", "nan"], "guidance must be a number at least 0"),
        (
            ["generate", PROMPT, "--shift", "1e308"],
            "shift must be a number at least 0.001",
        ),
        (["generate", PROMPT, "--budget", "[/b]"], "[/b]"),
        (["generate", PROMPT, "--shape", "round"], "--shape"),
        (["generate"], "What the video shows"),
        (["bench"], "one of attention, denoise"),
        (["bench", "attention", "--shapes", "moon"], "expected shapes of"),
        (["bench", "denoise", "--levels", "11"], "a level must be an integer in 1..10"),
        (["bench", "denoise", "--model", "wan"], "a hub id `owner/name`, got 'wan'"),
        (["bench", "denoise", "--random", "3B"], "--random"),
        (["bench", "denoise", "--random", "1.3B", "--model", "x"], "it takes no --model"),
        (["generate", PROMPT, "--random", "14B", "--revision", "x"], "it takes no --model"),
        (["generate", PROMPT, "--checkpoint", "x"], "--checkpoint"),
        (["paint"], "paint"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, arguments, words):
    assert words in refused(capsys, *arguments)
    assert os.listdir() == []


def test_a_prompt_of_nothing_is_not_printed_whole(capsys):
    line = refused(capsys, "generate", " " * 100_000)
    assert "must say something" in line and len(line) < 300


def test_schedule_of_the_wrong_kind(capsys):
    with open("wrong.json", "w") as file:
        json.dump({"format": "astraea-schedule-1", "steps": 3, "levels": [10, 12, 0]}, file)
    line = refused(capsys, "generate", PROMPT, "--schedule", "wrong.json")
    assert "0..10" in line and "levels [1] must be" in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(capsys, tmp_path):
    tmp_path.chmod(0o500)
    assert "can't write" in refused(capsys, "generate", PROMPT)


def test_truncated_weights(capsys, tmp_path):
    folder = tmp_path / "model"
    for source in tiny.FOLDER.rglob("*"):
        if source.is_file() and source.suffix in (".json", ".safetensors"):
            target = folder / source.relative_to(tiny.FOLDER)
            target.parent.mkdir(parents=True, exist_ok=True)
            content = source.read_bytes()
            cut = "transformer/" in source.as_posix() and source.suffix == ".safetensors"
            target.write_bytes(content[: len(content) // 2] if cut else content)
    line = refused(capsys, "generate", PROMPT, "--model", str(folder))
    assert "diffusion_pytorch_model.safetensors" in line
    assert os.listdir() == ["model"]


def test_interrupted_run_leaves_nothing(capsys, monkeypatch):
    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(video, "_write_mp4", interrupt)
    assert cli.main(["generate", PROMPT, *SMALL]) == 128 + signal.SIGINT
    assert "stopped" in capsys.readouterr().err
    assert os.listdir() == []


def test_unknown_words_are_named(capsys):
    assert cli.main(["generate", "a red zebra moving left", *SMALL]) == 0
    error = capsys.readouterr().err
    assert "warning" in error and "zebra" in error and "red" not in error.split("zebra")[0]


def test_info_says_what_runs(capsys):
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    for words in ("jax", "devices", "xla", "runs", *METHODS):
        assert words in printed


def test_the_options_name_what_there_is():
    # Written out, because a command's help imports none of these.
    assert get_args(options.MethodName) == tuple(METHODS)
    assert set(get_args(options.SearchMethod)) <= set(METHODS)
    assert set(get_args(options.SolverName)) == set(solvers.SOLVERS)
    assert set(get_args(options.SearchSolver)) <= set(solvers.SOLVERS)
    assert get_args(options.GridName) == get_args(solvers.Grid)
    assert get_args(options.Precision) == get_args(checkpoints.Precision)
    assert get_args(options.Size) == astraea_ports.SIZES
    assert get_args(options.Implementation) == get_args(attention.Implementation)
    assert get_args(bench.Driver) == get_args(loop.Driver)


HELP = ["", *cli.COMMANDS, *(f"bench {name}" for name in cli.BENCHES)]


@pytest.mark.parametrize("command", HELP)
def test_help_imports_no_jax(command):
    program = (
        "import sys; from astraea_jax import cli; code = cli.main(sys.argv[1:]);"
        "heavy = {'jax', 'jaxlib', 'flax', 'astraea_ports.wan', 'rich.progress'} & {*sys.modules};"
        "sys.exit(str(heavy) if code or heavy else 0)"
    )
    words = [sys.executable, "-c", program, *command.split(), "--help"]
    run = subprocess.run(words, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "usage: astraea" in run.stdout


def test_a_command_that_there_is_not_is_told_those_that_there_are(capsys):
    assert cli.main(["generat", "a red circle"]) == 2
    assert "expected astraea and one of generate, convert" in capsys.readouterr().err
    assert cli.main(["bench"]) == 2
    assert "one of attention, denoise" in capsys.readouterr().err


def test_compiled_programs_are_kept_in_a_folder_of_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert compiled.folder() == tmp_path / "cache" / "astraea_jax" / "compiled"


@pytest.fixture
def no_cache_of_compiled_programs():
    """Whatever a test does with JAX's cache ends with it."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.usefixtures("no_cache_of_compiled_programs")
def test_a_users_own_compilation_cache_stays():
    jax.config.update("jax_compilation_cache_dir", "mine")
    compiled.keep()
    assert jax.config.jax_compilation_cache_dir == "mine"


@pytest.mark.usefixtures("no_cache_of_compiled_programs")
def test_no_home_is_done_without_and_said(capsys, monkeypatch):
    def no_account(_):
        raise KeyError("uid")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", no_account)
    assert compiled.folder() is None and files.cache_folder("text") is None
    assert cli.main(["info"]) == 0
    assert "no home folder" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="no home folder"):
        compiled.keep()
    assert jax.config.jax_compilation_cache_dir is None


def test_a_cache_that_cannot_be_written_is_said_once(capsys):
    said = set()
    for name in ("jit_a", "jit_b"):
        text = "Error writing persistent compilation cache entry for "
        text += f"'{name}': PermissionError: [Errno 13] Permission denied: '/cache/{name}'"
        ending.show_warning(said, text)
    (line,) = capsys.readouterr().err.splitlines()
    assert "compiled programs can't be kept: PermissionError" in line


def runs(monkeypatch, action):
    """Puts a command in place of `info`."""
    monkeypatch.setattr(info, "command", lambda: action())
    return cli.main(["info"])


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_cleans_up_as_ctrl_c_does(capsys, monkeypatch, name):
    number, cleaned = getattr(signal, name), []

    def action():
        try:
            os.kill(os.getpid(), number)
            threading.Event().wait(10)
        finally:
            cleaned.append(True)

    before = signal.getsignal(number)
    assert runs(monkeypatch, action) == 128 + number
    assert cleaned and "stopped" in capsys.readouterr().err
    assert signal.getsignal(number) == before


def test_main_of_another_thread_sets_no_handlers(monkeypatch):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(runs(monkeypatch, lambda: None)))
    thread.start()
    thread.join()
    assert codes == [0]


def test_only_a_refusal_and_the_system_lose_their_traceback(capsys, monkeypatch):
    def fail(error):
        def action():
            raise error

        return action

    assert runs(monkeypatch, fail(Refusal("first line\n  second line"))) == 2
    assert capsys.readouterr().err == "astraea: first line\n  second line\n"
    full = OSError(errno.ENOSPC, "No space left on device", "a [/b].mp4")
    assert runs(monkeypatch, fail(full)) == 2
    assert capsys.readouterr().err == "astraea: a [/b].mp4: No space left on device\n"
    assert runs(monkeypatch, fail(Refusal("x" * 100_000))) == 2
    assert len(capsys.readouterr().err) < 3000
    with pytest.raises(ValueError, match="of a library"):
        runs(monkeypatch, fail(ValueError("of a library")))
    monkeypatch.setenv(cli.TRACEBACK, "1")
    with pytest.raises(Refusal):
        runs(monkeypatch, fail(Refusal("told in full")))


class FullStream(io.StringIO):
    """What can't be written to."""

    def write(self, _):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_stdout_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", FullStream())
    assert cli.main(["info"]) == 2
    said = capsys.readouterr().err
    assert said == "astraea: can't print a table (No space left on device)\n"


def test_lora_files_do_not_take_the_prompt(monkeypatch):
    seen = []
    monkeypatch.setattr(
        making, "run", lambda request, _: seen.append(request) or [{"name": "dense"}]
    )
    arguments = ["generate", "--lora", "a.safetensors", "--lora", "b.safetensors:0.5", PROMPT]
    assert cli.main([*arguments, "--no-compilation-cache"]) == 0
    assert seen[0].prompt == PROMPT
    assert seen[0].model.lora == ("a.safetensors", "b.safetensors:0.5")


def test_a_path_is_printed_as_it_is(capsys, monkeypatch):
    monkeypatch.setattr(making, "run", lambda *_: [{"name": "dense", "tokens": "[/b]"}])
    name = f"{'long ' * 30}[final] [/b].mp4"
    assert cli.main(["generate", PROMPT, "-o", name, "--no-compilation-cache"]) == 0
    assert f"written: {name}\n" in capsys.readouterr().out


@pytest.mark.parametrize("encodes", [True, False])
def test_what_can_not_be_written_is_kept_elsewhere(monkeypatch, tmp_path, encodes):
    monkeypatch.setattr(keeping.tempfile, "tempdir", str(tmp_path))
    if not encodes:

        def fail(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(video, "_write_mp4", fail)
    latents = np.ones((2, 1, 4, 4, 16), np.float32)
    picture = np.zeros((2, 32, 32, 3), np.uint8)
    said = keeping.video_or_latents(".mp4", picture, [latents])
    (kept,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert str(kept) in said
    if encodes:
        assert video.read_video(kept).shape == picture.shape
    else:
        assert np.array_equal(np.load(kept), latents)


@pytest.mark.slow
def test_bench_denoise_small(capsys):
    small = ["--frames", "5", "--height", "32", "--width", "32", "--rounds", "2", "--levels", "5"]
    assert cli.main(["bench", "denoise", *small, "--output", "times.json"]) == 0
    rows = json.loads(pathlib.Path("times.json").read_text())["rows"]
    kinds = {(row["driver"], row.get("method"), row.get("level")) for row in rows}
    assert ("static", "astraea", 5) in kinds and ("dynamic", "dense", 10) in kinds
    assert all(row["milliseconds"] > 0 for row in rows if row["driver"] != "dynamic")
    assert "of the bound" in capsys.readouterr().out


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
