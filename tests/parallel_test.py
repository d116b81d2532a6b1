"""Attention over four devices equals attention on one; in a process of its own, which has four."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

PROGRAM = """
import functools
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from attention_oracle import assert_close, by_hand, new_seed, random_inputs
from astraea_jax.kernels import ampere, dispatch
from astraea_jax.parallel import attention_by_heads, attention_by_queries

assert len(jax.devices()) == 4
mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
seed = new_seed()
q, k, v = random_inputs(seed, (2, 24, 32, 4, 16))
count = jnp.array([24, 7], jnp.int32)
expected, expected_lse = by_hand(q, k, v)
used = np.arange(24) < np.asarray(count)[:, None]

def check(attend, specs, lse_spec):
    mapped = jax.shard_map(
        attend, mesh=mesh, in_specs=(*specs, P()), out_specs=(specs[0], lse_spec), check_vma=False
    )
    out, lse = jax.jit(mapped)(q, k, v, count)
    assert out.shape == q.shape and lse.shape == (2, 4, 24)
    out = np.asarray(out)
    assert not out[~used].any()
    assert_close(jnp.asarray(out[used]), expected[used], 1e-6, seed, v)
    lse = np.asarray(lse).swapaxes(1, 2)
    assert (lse[~used] == -np.inf).all()
    assert np.abs(lse - expected_lse.swapaxes(1, 2))[used].max() < 1e-5

def heads(q, k, v, count, **settings):
    return attention_by_heads(q, k, v, count=count, axis_name="x", **settings)

def queries(q, k, v, count, **settings):
    return attention_by_queries(q, k, v, count=count, axis_name="x", **settings)

tokens = P(None, "x")
for settings in ({}, {"implementation": "triton"}):
    if settings:  # the kernel, under the interpreter
        dispatch.refusal = lambda *_: None
        kernel = functools.partial(
            ampere.attend, tiling=ampere.Tiling(16, 16, 1, 1), splits=1, interpret=True
        )
        dispatch._run_kernel = lambda settings, q, k, v, count, indices: kernel(
            q, k, v, count, indices, scale=settings.scale
        )
    check(functools.partial(heads, **settings), (tokens,) * 3, P(None, None, "x"))
    check(functools.partial(queries, **settings), (tokens, P(), P()), P(None, None, "x"))

try:
    odd = [jnp.zeros((1, 8, 6, 8))] * 3
    jax.shard_map(
        lambda q, k, v: attention_by_heads(q, k, v, axis_name="x"),
        mesh=mesh, in_specs=(tokens,) * 3, out_specs=(tokens, P(None, None, "x")), check_vma=False,
    )(*odd)
except ValueError as error:
    assert "heads in multiples of the 4 devices" in str(error) and "got 6" in str(error)
else:
    raise AssertionError("6 heads over 4 devices were not refused")
print("four devices agree")
"""


@pytest.mark.core
def test_four_devices_agree_with_one():
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)]),
    }
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1:] == ["four devices agree"], done.stderr[-3000:]


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
