"""Compiles every shipped tiling for GPUs that are not there: registers, spills, shared memory.

    pip install --no-deps --target PLUGIN jax-cuda13-plugin==$JAX jax-cuda13-pjrt==$JAX
    pip install --target CUDA nvidia-cuda-nvcc
    PYTHONPATH=PLUGIN python notebooks/studies/compile_report.py CUDA/nvidia/cu13

The plugin must be of the version of JAX. The whole compilation runs, from Pallas to machine code; a
script in the place of ptxas keeps what it says. The table is in the kernels' docstrings.
"""

import functools
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from astraea_jax import report
from astraea_jax.kernels import tilings
from astraea_jax.kernels.dispatch import kernel_module

TARGETS = {"9.0": "NVIDIA H200", "8.0": "NVIDIA A100-SXM4-80GB"}
SHARED = {"9.0": (233472, 232448), "8.0": (167936, 166912)}  # of a processor, of a program
PROCESSORS = {"9.0": 132, "8.0": 108}
WIDTHS = (64, 72, 96, 128)
COLUMNS = {
    "implementation": "implementation",
    "target": "sm",
    "width": "C",
    "keys": "keys",
    "tiling": "tiling",
    "splits": "splits",
    "registers": "registers",
    "spills": "spilled bytes",
    "shared": "shared memory",
}


class Job(NamedTuple):
    """One thing to compile."""

    implementation: str
    target: str
    width: int
    queries: int
    keys: int
    splits: int


def jobs() -> Iterator[Job]:
    """Every shipped tiling at each head width, keys cut in parts or not."""
    for target in TARGETS:
        for width in WIDTHS:
            if target == "9.0":
                # Rows in whole tiles of 8, which some tilings ask for, and not.
                for keys in (1590, 1592) if width == 128 else (1590,):
                    yield Job("mosaic", target, width, 1000, keys, 1)
                    yield Job("mosaic", target, width, 104, keys, 3)
            for length in (15, 30, 1590):
                yield Job("triton", target, width, length, length, 1)


def topology(target: str):
    """A device that is not there, for the compiler."""
    major, minor = target.split(".")
    processor, program = SHARED[target]
    text = f"""
    gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
      shared_memory_per_core: {processor} threads_per_core_limit: 2048
      core_count: {PROCESSORS[target]} fpus_per_core: 128 block_dim_limit_x: 2147483647
      block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 4800000000000
      l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 141000000000
      shared_memory_per_block_optin: {program}
      cuda_compute_capability {{ major: {major} minor: {minor} }}
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
    }}
    platform_name: "CUDA"
    dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
    device_description_str: "{TARGETS[target]}"
    """
    return topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=text, topology="1x1x1"
    )


def compile_job(job: Job, folder: pathlib.Path) -> dict[str, Any]:
    """Compiles one kernel; a row of the table."""
    mesh = jax.sharding.Mesh(topology(job.target).devices, ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())
    module = kernel_module(job.implementation)
    tiling = tilings.find(job.implementation, job.target, job.width, job.queries, job.keys)
    attend = functools.partial(
        module.attend,
        count=None,
        scale=job.width**-0.5,
        tiling=module.Tiling(**tiling),
        splits=job.splits,
    )
    arguments = [
        jax.ShapeDtypeStruct((2, length, 2, job.width), jnp.bfloat16, sharding=sharding)
        for length in (job.queries, job.keys, job.keys)
    ]
    for path in folder.iterdir():
        if path.is_file():
            path.unlink()
    with jax.set_mesh(mesh):
        traced = jax.jit(attend).trace(*arguments)
        traced.lower(lowering_platforms=("cuda",)).compile()
    row = job._asdict() | {"tiling": " ".join(f"{key} {value}" for key, value in tiling.items())}
    return row | said(folder)


def said(folder: pathlib.Path) -> dict[str, int | None]:
    """Registers, spills and shared memory of the attention, from what the compilers have left."""
    text = "\n".join(
        path.read_text(errors="replace") for path in folder.iterdir() if path.suffix == ".ptxas"
    )
    found = re.search(
        r"for (?:anonymous_mosaic_gpu_kernel|query_sparse_attention)\n"
        r".*?(\d+) bytes spill stores, (\d+) bytes spill loads\n.*?Used (\d+) registers",
        text,
    )
    if found is None:
        return {"registers": None, "spills": None, "shared": None}
    stores, loads, registers = map(int, found.groups())
    rest = "\n".join(
        path.read_text(errors="replace")
        for path in folder.iterdir()
        if path.name.endswith((".resources.txt", ".thunk_sequence.txt"))
    )
    shared = re.search(r"smem_scratch_bytes=(\d+)", rest) or re.search(
        r"query_sparse_attention .*shared_memory: (\d+)", rest
    )
    bytes_ = None if shared is None else int(shared.group(1))
    return {"registers": registers, "spills": stores + loads, "shared": bytes_}


def main(cuda: pathlib.Path) -> int:
    """Starts this file anew with the compilers' output kept, since they read it from the start."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        (folder / "cuda/bin").mkdir(parents=True)
        (folder / "said").mkdir()
        (folder / "cuda/nvvm").symlink_to((cuda / "nvvm").resolve())
        wrapper = folder / "cuda/bin/ptxas"
        real = (cuda / "bin/ptxas").resolve()
        wrapper.write_text(f'#!/bin/sh\nexec {real} -v "$@" 2>> {folder}/said/xla.ptxas\n')
        wrapper.chmod(0o755)
        flags = (
            f"--xla_gpu_cuda_data_dir={folder}/cuda",
            "--xla_gpu_enable_libnvptxcompiler=false",
            f"--xla_dump_to={folder}/said",
        )
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": " ".join(flags),
            "MOSAIC_GPU_DUMP_TO": f"{folder}/said",
            "MOSAIC_GPU_DUMP_PTXAS": "1",
        }
        command = [sys.executable, __file__, "--in", str(folder)]
        return subprocess.run(command, env=environment).returncode


def compile_jobs(folder: pathlib.Path) -> int:
    """Compiles all, prints the table; 1 if a tiling spills or can't be compiled."""
    rows, bad = [], 0
    for job in jobs():
        try:
            rows.append(compile_job(job, folder / "said"))
            bad += rows[-1]["spills"] != 0
        except Exception as error:
            bad += 1
            rows.append(job._asdict() | {"tiling": str(error).splitlines()[0][:80]})
    print(report.markdown(rows, COLUMNS))
    return int(bad > 0)


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "--in":
        sys.exit(compile_jobs(pathlib.Path(sys.argv[2])))
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(pathlib.Path(sys.argv[1])))
