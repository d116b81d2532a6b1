"""Where a GPU's time goes, from a trace; what a compiled program copies."""

import sys

import jax
import jax.numpy as jnp
import pytest

from astraea_jax.bench import profile as profiles
from astraea_jax.bench import programs


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


def test_copies_of_a_cache_are_read_off_a_compiled_program():
    leaf = jax.ShapeDtypeStruct((3, 4), jnp.bfloat16)
    text = """
      %a = bf16[3,4]{1,0} copy(%x)
      %b = (bf16[3,4]{1,0}, u32[]) copy-start(%x)
      %c = f32[3,4]{1,0} copy(%x)
      %d = bf16[3,4]{1,0} add(%x, %copy)
    """
    assert programs.count_copies(text, leaf) == 2


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
