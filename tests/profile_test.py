"""Where a GPU's time goes, from a trace; and the study whose parts run one by one."""

import json
import pathlib
import sys

import pytest

from astraea_jax.bench import batches, exactness, gpu
from astraea_jax.bench import profile as profiles
from astraea_jax.cli import BENCHES, COMMANDS, main

HERE = pathlib.Path(__file__).resolve().parents[1]


def trace():
    """Two runs of two kernels on one stream, and one on another that overlaps; all in 1/1000 s."""
    names = [("Stream #1", 1), ("Stream #2", 2), ("python", 3)]
    events: list[dict] = [
        {"name": "thread_name", "pid": 1, "tid": tid, "args": {"name": name}} for name, tid in names
    ]
    for begin in (0, 10_000):
        for name, tid, start, spent in (
            ("nvjet_sm90", 1, 0, 4000), ("loop_add_fusion", 1, 5000, 1000),
            ("MemcpyD2D", 2, 3000, 2000), ("host work", 3, 0, 9000),
        ):  # fmt: skip
            what = {"name": name, "pid": 1, "tid": tid, "ts": begin + start, "dur": spent}
            events.append({"ph": "X"} | what)
    return events


def test_a_profile_counts_kernels_and_gaps():
    profile = profiles.summarise(list(profiles.on_device(trace())), times=2)
    assert [(k["name"], k["milliseconds"], k["launches"]) for k in profile.kernels] == [
        ("nvjet_sm90", 4.0, 1.0), ("MemcpyD2D", 2.0, 1.0), ("loop_add_fusion", 1.0, 1.0),
    ]  # fmt: skip
    # From 0 to 16 ms, busy from 0 to 6 and from 10 to 16; what overlaps counts once.
    assert (profile.span, profile.busy, profile.launches) == (8.0, 6.0, 3.0)
    kinds = {row["kind"]: row["milliseconds"] for row in profile.kinds()}
    assert kinds == {
        "products": 4.0, "copies": 2.0, "elementwise and norms": 1.0, "nothing runs": 2.0,
    }  # fmt: skip


def test_nothing_recorded_is_an_empty_profile():
    profile = profiles.summarise([], times=3)
    assert (profile.kernels, profile.span, profile.busy, profile.launches) == ([], 0, 0, 0)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("anonymous_mosaic_gpu_kernel", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_knob_7", "attention"),
        ("nvjet_sm90_tst_256x144_64x4_1x2_h_bz_coopA_bias_NNT", "products"),
        ("input_scatter_fusion_1", "scatter, gather, sort"),
        ("memcpy128", "copies"),
        ("fusion_66", "elementwise and norms"),
    ],
)
def test_kernels_are_told_by_their_names(name, kind):
    assert profiles.kind_of(name) == kind


def test_every_part_of_the_study_is_a_command():
    for part in gpu.STUDY.values():
        first, second, *_ = part.command
        assert first == "python" or (second in BENCHES if first == "bench" else first in COMMANDS)
    assert gpu.PEER.is_file() and all((HERE / test).is_file() for test in gpu.FIXTURE_TESTS)


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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: exactness.command(methods=("none",)), "expected methods of .*; got 'none'"),
        (lambda: batches.command(method="none"), "method must be 'dense' or"),
        (lambda: batches.command(batches=(0,)), "each of batches must be an integer in 1.."),
        (lambda: gpu.command(output=pathlib.Path("x.json"), parts=("none",)), "got 'none'"),
        (lambda: gpu.command(output=pathlib.Path("x.txt")), "json"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_command_line_knows_the_study(capsys):
    assert main(["bench", "gpu", "--output", "none/x.json"]) == 2
    assert "none" in capsys.readouterr().err


def test_what_was_measured_is_there():
    content = json.loads((HERE / "astraea_jax/bench/gpu.json").read_text())
    for name in ("static-81", "dynamic-81", "reference-81"):
        result = content["parts"][name]["result"]
        (device,) = result["environment"]["devices"]  # parts are of several machines
        assert device.startswith("NVIDIA H")
        assert all(row["copies"] == 0 for row in result["rows"])


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
