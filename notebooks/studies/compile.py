"""A full-size step compiled for a GPU that need not be there.

It needs JAX's CUDA plugin and ptxas on the path, no device: XLA compiles for a description of one.
Set JAX_PLATFORMS=cpu and XLA_FLAGS=--xla_gpu_cuda_data_dir=<folder with bin/ptxas>.
"""

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

import start
from astraea_jax import checks, report, solvers
from astraea_jax import denoise as loop
from astraea_jax.bench import options
from astraea_jax.bench.programs import count_copies
from astraea_jax.checks import Refusal
from astraea_jax.cli.options import Dtype, Precision, Size, check_size
from astraea_jax.methods import METHODS
from astraea_jax.timing import GPU_OPTIONS
from astraea_ports.wan import parts, vae_weights
from astraea_ports.wan.vae import VAEConfig

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132
  fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 141000000000
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200"
"""
"""What XLA needs to know of the GPU."""

COLUMNS = {
    "level": "level",
    "compile": "compile s",
    "arguments": "arguments",
    "temporaries": "temporaries",
    "cache": "cache",
    "bound": "cache / (L B N H 2 B)",
    "copies": "copies of the cache",
    "donated": "donated",
    "calls": "custom calls",
}


def command(
    *,
    size: Size = "1.3B",
    frames: int = 81,
    height: int = 480,
    width: int = 832,
    method: str = "astraea",
    levels: tuple[int, ...] = (10, 5),
    dtype: Dtype = "bfloat16",
    precision: Precision = "fast",
) -> None:
    """Compiles a step for a GPU that need not be there, and says what the program holds.

    Args:
      size: Of Wan.
      frames: Frames of the video, 4k + 1.
      height: Pixels.
      width: Pixels.
      method: "dense", or one that keeps a cache.
      levels: Tenths of the tokens, 1..10.
      dtype: Of the weights.
      precision: "reference" or "fast".
    """
    checks.one_of("size", size, get_args(Size))
    options.check_levels(method, levels)
    checks.one_of("dtype", dtype, get_args(Dtype))
    checks.one_of("precision", precision, get_args(Precision))
    check_size(frames, height, width)
    image = VAEConfig.from_dict(vae_weights.WAN_VAE)
    if (frames - 1) % 4 or height % 16 or width % 16:
        raise Refusal(
            "expected frames of 4k + 1, height and width of whole 16 pixels; got "
            f"{frames}, {height} and {width}"
        )
    made = parts.random_parts(size, dtype=jnp.dtype(dtype), precision=precision, seed=0)
    transformer = made.transformer.template
    factor = image.spatial_factor
    shape = (1, (frames - 1) // 4 + 1, height // factor, width // factor, 16)
    geometry = transformer.geometry(shape)
    settings = loop.Settings(METHODS[method], geometry, 2, trace=False)
    rows = []
    with _described_gpu() as place:
        inputs = _inputs(transformer, shape, settings)
        for level in levels:
            rows.append(_compile(place(inputs), settings, level))
    print(f"{geometry.num_tokens} tokens, {geometry.num_blocks} blocks, {dtype}, {precision}")
    print(report.markdown(rows, COLUMNS))


@contextlib.contextmanager
def _described_gpu() -> Iterator[Callable[[Any], Any]]:
    """Gives a function that places a pytree of shapes on the described GPU."""
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name="", target_config=H200, topology="1x1x1"
        )
    except Exception as error:  # the plugin is missing, or another version's
        raise Refusal(
            f"can't describe a GPU ({str(error).splitlines()[0]}): install JAX's CUDA plugin"
        ) from error
    mesh = topologies.make_mesh(topology, (1,), ("gpu",))
    sharding = NamedSharding(mesh, PartitionSpec())

    def place(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    with jax.set_mesh(mesh):
        yield lambda tree: jax.tree.map(place, tree)


def _inputs(transformer, shape, settings) -> tuple[Any, ...]:
    """Shapes of what a static step takes: the model, prepared text, state and numbers."""
    config = transformer.config
    latents = jax.ShapeDtypeStruct(shape, jnp.float32)
    context = jax.ShapeDtypeStruct((2, parts.TEXT_LENGTH, config.text_dim), jnp.bfloat16)
    prepared, state = jax.eval_shape(
        lambda *arguments: loop.start_static.jitted(*arguments, settings=settings),
        transformer, latents, context,
    )  # fmt: skip
    row = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((), leaf.dtype), solvers.unipc(1))
    row = row._replace(
        correct=jax.ShapeDtypeStruct((5,), jnp.float32),
        predict=jax.ShapeDtypeStruct((3,), jnp.float32),
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    level, index, steps = [jax.ShapeDtypeStruct((), jnp.int32)] * 3
    guidance = jax.ShapeDtypeStruct((), jnp.float32)
    return transformer, prepared, state, row, level, index, steps, guidance, key


def _compile(inputs, settings, level: int) -> dict[str, Any]:
    """Compiles one step; a table row."""
    state = inputs[2]
    began = time.perf_counter()
    lowered = loop.static_step.jitted.trace(
        *inputs, settings=settings, mode=settings.method.static_mode(level)
    ).lower(lowering_platforms=("cuda",))
    program = lowered.compile(GPU_OPTIONS)
    seconds = time.perf_counter() - began
    memory: Any = program.memory_analysis()
    text = program.as_text() or ""
    leaves = jax.tree.leaves(state.method)
    cache = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    geometry = settings.geometry
    expected = geometry.num_blocks * 2 * geometry.num_tokens * geometry.width * 2
    return {
        "level": level,
        "compile": seconds,
        "arguments": report.human_bytes(memory.argument_size_in_bytes),
        "temporaries": report.human_bytes(memory.temp_size_in_bytes),
        "cache": report.human_bytes(cache),
        "bound": cache / expected,
        "copies": sum(count_copies(text, leaf) for leaf in leaves if leaf.size > expected // 8),
        "donated": f"{100 * memory.alias_size_in_bytes / max(_bytes(state), 1):.1f} %",
        "calls": custom_calls(text),
    }


def custom_calls(text: str) -> str:
    """The kernels that a program calls by name, and how often each is written in it."""
    names = re.findall(r'custom_call_target="([^"]+)"', text)
    return ", ".join(f"{name} x {names.count(name)}" for name in sorted(set(names))) or "none"


def _bytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


if __name__ == "__main__":
    start.run(command)
