"""`astraea bench attention` on small shapes: wrong kernels caught, failures survived."""

import dataclasses
import json
import math
import sys
import types

import jax
import pytest
import studies

from astraea_jax import attention, report
from astraea_jax.bench import attention as bench
from astraea_jax.bench import attention_runs, attention_tuning
from astraea_jax.bench.shapes import SHAPES, Shape, rows
from astraea_jax.cli import bench as cli_bench
from astraea_jax.kernels import dispatch, machine, tilings

pytestmark = pytest.mark.slow

SMALL = Shape(2, 20, 2, 8)
GPU = machine.Gpu((9, 0), 132, "NVIDIA H200")


@dataclasses.dataclass(frozen=True)
class Tiling:
    block: int


def fake_kernels(monkeypatch, *, spoil=lambda out, lse: (out, lse)):
    """Stands in for the modules of kernels/: the reference in float32, results spoilt at will."""

    def attend(q, k, v, count=None, indices=None, *, scale, tiling=None):
        if tiling == Tiling(3):
            raise ValueError("it does not fit")
        out, lse = attention._xla(q, k, v, count, indices, scale)
        return (out, lse + 1) if tiling == Tiling(4) else spoil(out, lse)

    module = types.SimpleNamespace(
        attend=attend,
        refusal=lambda *_: None,
        candidates=lambda *_: [Tiling(block) for block in (1, 2, 3, 4)],
    )
    monkeypatch.setattr(dispatch, "kernel_module", lambda name: module)
    for user in (dispatch, machine):
        monkeypatch.setattr(user, "gpu", lambda: GPU)


def verdicts(names):
    return {row["verdict"] for row in bench.check_all(names)}


def test_a_right_kernel_passes_and_wrong_ones_are_caught(monkeypatch):
    case = (2, 9, 13, 2, 8, (9, 4))
    monkeypatch.setattr(bench, "_cases", lambda name: [("float32", case)] * (name == "xla"))
    assert verdicts(["xla"]) == {"right"}
    monkeypatch.setattr(bench, "_cases", lambda name: [("bfloat16", case)])
    fake_kernels(monkeypatch)
    assert verdicts(["triton"]) == {"right"}
    fake_kernels(monkeypatch, spoil=lambda out, lse: (out * 1.01, lse))
    assert verdicts(["triton"]) == {"wrong"}
    fake_kernels(monkeypatch, spoil=lambda out, lse: (out, lse.astype(out.dtype)))
    assert verdicts(["triton"]) == {"wrong"}
    fake_kernels(monkeypatch, spoil=lambda out, lse: (out + (out == 0), lse))
    assert verdicts(["triton"]) == {"right, rows past"}

    def fail(out, lse):
        raise ValueError("no such instruction\nand more")

    fake_kernels(monkeypatch, spoil=fail)
    assert verdicts(["triton"]) == {"ValueError: no such instruction"}
    # The others are checked all the same.
    assert verdicts(["triton", "xla"]) == {"ValueError: no such instruction", "right"}


def test_rows_of_a_shape(monkeypatch):
    monkeypatch.setattr(attention_runs, "SECONDS_A_RUN", 1e-4)
    fake_kernels(monkeypatch)
    timed = bench.time_shape("small", SMALL, (0.1, 1.0), ["xla", "mosaic"], 2)
    assert [(row["queries"], row["implementation"]) for row in timed] == [
        (20, "xla"),
        (20, "mosaic"),
        (2, "xla"),
        (2, "mosaic"),
    ]
    full, *_, part = timed
    assert full["share"] == full["ratio"] == 1.0 and full["without_lse"] > 0
    assert part["share"] == 0.1 and part["without_lse"] is None
    seconds = full["milliseconds"] / 1e3
    assert full["teraflops"] == pytest.approx(4 * 2 * 2 * 20 * 20 * 8 / seconds / 1e12)
    assert part["lse"] < 1e-5 and part["out"] < 1e-2


def test_tuning_remembers_the_fastest_that_fits_and_is_right(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fake_kernels(monkeypatch)
    seconds = {Tiling(1): 2e-3, Tiling(2): 1e-3, Tiling(4): 1e-4}

    def time_runs(runs, rounds):
        assert set(runs) == set(seconds)  # the one that does not fit is left out
        return seconds, {}

    monkeypatch.setattr(attention_tuning, "time_runs", time_runs)
    attention_tuning.tune_shape(SMALL, (1.0,), 1, ["mosaic"])
    assert "1.000 ms" in capsys.readouterr().out
    (row,) = json.loads(tilings.user_table().read_text())
    assert row["tiling"] == {"block": 2} and row["queries"] == 32


def test_the_command_writes_every_number(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "CHECKED", ((1, 2, 3, 1, 8, (2,)),))
    monkeypatch.setattr(bench, "SHAPES", {"large": SHAPES["wan-33"], "small": SMALL})
    path = tmp_path / "all.json"
    cli_bench.attention(shares=(0.5,), rounds=1, output=path)  # without a GPU, the smallest shape
    printed = capsys.readouterr().out
    assert "mosaic: needs an NVIDIA GPU" in printed and "checks: 3 of 3 right" in printed
    content = json.loads(path.read_text())
    assert [row["queries"] for row in content["timings"]] == [20, 10]
    assert content["environment"]["jax"] == jax.__version__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(shapes=("moon",)), "shapes of wan-33.*; got 'moon'"),
        (dict(shares=(0.0,)), "each of shares must be a number at least 1e-06 and at most 1"),
        (dict(shares=(math.nan,)), "each of shares .* got nan"),
        (dict(rounds=0), "rounds must be an integer in 1..10000"),
        (dict(rounds=10**9), "rounds must be an integer in 1..10000"),
        (dict(implementations=("moon",)), "implementations of .*; got 'moon'"),
    ],
)
def test_bad_input_is_refused(arguments, message, as_a_user):
    with pytest.raises(ValueError, match=message):
        cli_bench.attention(**arguments)


def test_operations_and_bytes():
    shape = SHAPES["wan-33"]
    assert shape.flops(shape.tokens) == pytest.approx(1.21e12, rel=1e-2)
    assert shape.bytes(0) == 2 * 2 * 14_040 * 12 * 128
    assert shape.floor(14_040) == shape.flops(14_040) / 790e12
    temporal = SHAPES["opensora-temporal-15"]
    assert temporal.floor(15) == temporal.bytes(15) / 4.3e12
    assert rows(shape, 0.1) == 1404 and rows(Shape(1, 3, 1, 8), 0.1) == 1


def test_the_compile_report_reads_what_compilers_say(tmp_path):
    compile_report = studies.study("compile_report")
    (tmp_path / "xla.ptxas").write_text(
        "ptxas info    : Compiling entry function 'query_sparse_attention' for 'sm_80'\n"
        "ptxas info    : Function properties for query_sparse_attention\n"
        "    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 1 barriers\n"
    )
    (tmp_path / "module.thunk_sequence.txt").write_text(
        "001: kCustomKernel query_sparse_attention grid: [4, 2, 2]  shared_memory: 32768 bytes\n"
    )
    assert compile_report.said(tmp_path) == {"registers": 255, "spills": 20, "shared": 32768}
    jobs = list(compile_report.jobs())
    assert {job.target for job in jobs} == {"9.0", "8.0"} and len(jobs) == len(set(jobs))
    assert report.markdown([jobs[0]._asdict()], compile_report.COLUMNS)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
