"""Tables, JSON, units, the environment, and progress in and out of a terminal."""

import io
import json
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

from astraea_jax import report

ROWS = [
    {"what": "dense", "psnr": math.inf, "seconds": 12.34567, "kept": True},
    {"what": "half [50 %]", "psnr": 31.41592, "seconds": None, "extra": 1},
]
COLUMNS = {"what": "run", "psnr": "PSNR (dB)", "seconds": "seconds", "kept": "kept"}


def test_markdown():
    assert report.markdown(ROWS, COLUMNS) == (
        "| run | PSNR (dB) | seconds | kept |\n"
        "| :-- | --: | --: | --: |\n"
        "| dense | inf | 12.35 | yes |\n"
        "| half [50 %] | 31.42 | - | - |"
    )


def test_table_shows_the_same_cells():
    console = rich.console.Console(file=io.StringIO(), width=80)
    console.print(report.table(ROWS, COLUMNS))
    text = console.file.getvalue()
    # Brackets are no markup of rich here.
    for cell in ("PSNR (dB)", "dense", "inf", "12.35", "half [50 %]", "31.42"):
        assert cell in text


@pytest.mark.parametrize("make", [report.table, report.markdown])
def test_no_columns(make):
    with pytest.raises(ValueError, match="at least one key"):
        make(ROWS, {})


def test_write_json(tmp_path):
    content = {
        "array": np.arange(3),
        "scalar": jnp.float32(0.5),
        "infinite": np.array([math.inf, math.nan]),
        "path": pathlib.Path("a/b"),
        3: (None, True, "text"),
    }
    report.write_json(tmp_path / "out.json", content)
    assert json.loads((tmp_path / "out.json").read_text()) == {
        "array": [0, 1, 2],
        "scalar": 0.5,
        "infinite": ["inf", "nan"],
        "path": "a/b",
        "3": [None, True, "text"],
    }


def test_write_json_leaves_nothing_of_what_it_can_not_write(tmp_path):
    with pytest.raises(ValueError, match="got a object: convert it"):
        report.write_json(tmp_path / "out.json", {"a": [object()]})
    assert list(tmp_path.iterdir()) == []


def test_environment_can_be_written_and_names_this_jax(tmp_path):
    environment = report.environment()
    assert environment["jax"] == jax.__version__
    assert environment["backend"] == jax.default_backend()
    assert environment["cores"] >= 1 and len(environment["devices"]) == jax.device_count()
    report.write_json(tmp_path / "out.json", environment)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (22.3 * 2**20, "22.3 MiB"),
        (2**30 - 1, "1.00 GiB"),
        (141 * 2**30, "141 GiB"),
    ],
)
def test_human_bytes(count, text):
    assert report.human_bytes(count) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(7.29e15, "7.29 PFLOP"), (19.87e15, "19.9 PFLOP"), (5e9, "5.00 GFLOP"), (12, "12 FLOP")],
)
def test_human_flops(count, text):
    assert report.human_flops(count) == text


def run_stages(console):
    with report.Progress(console) as progress:
        with progress.stage("encode"):
            pass
        with progress.stage("denoise", 4) as stage:

            @jax.jit
            def loop(total):
                def step(index, total):
                    jax.debug.callback(stage.advance, index)
                    return total + index

                return jax.lax.fori_loop(0, 4, step, total)

            assert loop(jnp.int32(0)) == 6
            jax.effects_barrier()
            done = [(task.description, task.completed) for task in progress._bars.tasks]
        stage.advance(0)
    return done


def test_progress_without_a_terminal_is_a_line_a_stage():
    console = rich.console.Console(file=io.StringIO(), width=80)
    run_stages(console)
    first, second = console.file.getvalue().splitlines()
    assert first.startswith("encode: 0.") and first.endswith(" s")
    assert second.startswith("denoise: 4 steps, ")


def test_progress_counts_the_callbacks_of_a_jitted_loop():
    console = rich.console.Console(file=io.StringIO(), width=80, force_terminal=True)
    assert run_stages(console) == [("encode", 1), ("denoise", 4)]
    assert "4/4" in console.file.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_the_name_of_a_stage_is_no_markup(terminal):
    console = rich.console.Console(file=io.StringIO(), width=200, force_terminal=terminal)
    with report.Progress(console) as progress, progress.stage("write clip [final] [/b].mp4"):
        pass
    assert "write clip [final] [/b].mp4" in console.file.getvalue()


def test_a_line_for_a_program_is_not_broken(capsys):
    name = "folder [/b]/" * 30
    report.show(report.table([{"path": name}], {"path": "[/b]"}))
    assert name in capsys.readouterr().out
    console = rich.console.Console(file=io.StringIO(), width=20)
    with report.Progress(console) as progress, progress.stage(name):
        pass
    assert len(console.file.getvalue().splitlines()) == 1


def test_a_stderr_that_is_full_costs_no_work():
    class Full(io.StringIO):
        def write(self, _):
            raise OSError("No space left on device")

    console = rich.console.Console(file=Full())
    with report.Progress(console) as progress, progress.stage("denoise"):
        done = True
    assert done


def test_a_stage_that_fails_says_nothing_of_having_ended():
    console = rich.console.Console(file=io.StringIO(), width=80)
    with (
        pytest.raises(KeyboardInterrupt),
        report.Progress(console) as progress,
        progress.stage("denoise", 30),
    ):
        raise KeyboardInterrupt
    assert console.file.getvalue() == ""


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
