"""A video alone against the same video in a batch, in bfloat16: what differs, and where it begins.

    uv run python notebooks/studies/batch_flip.py          # the small Wan, a minute on a GPU
    uv run python notebooks/studies/batch_flip.py --large  # the 1.3B with random weights
    uv run python notebooks/studies/batch_flip.py --steps 4 --size 5,64,64 --methods "scope step"

For each method: the largest difference of the latents after all steps (a share of their largest
number) and its root mean square; the tokens that one run computed at a step and the other did not,
at the first sparse step, before any earlier choice could feed it, in the mean and at most; and the
PSNR of the decoded video against the one made alone. "dense" is what the products themselves differ
by; so is "random", whose selection is the same in both runs.
"""

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from astraea_jax import metrics, solvers
from astraea_jax.denoise import denoise
from astraea_jax.methods import Astraea, Dense
from astraea_jax.schedule import Schedule
from astraea_jax.selection import SelectionConfig
from astraea_ports import wan

BATCH = 4
METHODS = {
    "dense": Dense(),
    "random": Astraea(SelectionConfig(rank="random")),
    "scope step": Astraea(),
    "scope block": Astraea(SelectionConfig(scope="block")),
}
"""Of "random" a row draws by its place in the batch: video 0, which is compared, draws alike."""


def measure(pipeline, size, steps, names, driver, with_video):
    """Prints a row for each method: a video alone against the first of a batch."""
    shape = pipeline.latents_shape(*size)
    keys = [jax.random.fold_in(jax.random.key(0), index) for index in range(BATCH)]
    noise = jnp.stack([jax.random.normal(key, shape) for key in keys])
    context = pipeline.encode_text([f"a red circle number {index}" for index in range(BATCH)])
    guidance = pipeline.defaults.guidance
    rows = jnp.array([0, len(context) // 2]) if guidance > 1 else jnp.array([0])
    decode = jax.jit(lambda vae, latents: (vae.decode(latents) + 1) / 2)
    dense_steps = max(1, steps // 5)
    # One sparse level, so that little is compiled: of 10 steps 52 %.
    half = Schedule((10,) * dense_steps + (4,) * (steps - dense_steps))
    for name in names:
        began = time.perf_counter()
        levels = Schedule.dense(steps) if name == "dense" else half

        def run(latents, context, method=METHODS[name], levels=levels):
            return denoise(
                pipeline.transformer,
                latents,
                context,
                solver=solvers.unipc(steps, shift=pipeline.shift),
                schedule=levels,
                method=method,
                guidance=guidance if guidance > 1 else None,
                driver=driver,
                trace=True,
            )

        together, alone = run(noise, context), run(noise[:1], context[rows])
        again = run(noise[:1], context[rows])
        a, b = np.asarray(alone.latents[0]), np.asarray(together.latents[0])
        apart = np.abs(a - b).max() / np.abs(a).max()
        same = np.array_equal(a, np.asarray(again.latents[0]))
        branches = len(rows)
        traces: tuple[Any, Any] = alone.trace, together.trace
        one, many = (np.asarray(each.computed) for each in traces)  # [T, branches, N]
        many = many.reshape(steps, branches, BATCH, -1)[:, :, 0]
        flips = np.abs(one - many).sum(axis=(1, 2)) / 2  # one in, one out: a flip
        sparse = [i for i, level in enumerate(levels.levels) if 0 < level < 10]
        first = flips[sparse[0]] if sparse else 0
        mean = flips[sparse].mean() if sparse else 0
        psnr = float("nan")
        if with_video:
            pictures = [
                metrics.to_uint8(np.asarray(decode(pipeline.vae, jnp.asarray(x)[None])[0]))
                for x in (a, b)
            ]
            error = np.square(pictures[0].astype(float) - pictures[1]).mean()
            psnr = 99.0 if error == 0 else 10 * np.log10(255**2 / error)
        tokens = one.shape[-1] * branches
        rms = np.sqrt(np.square(a - b).mean()) / np.sqrt(np.square(a).mean())
        print(
            f"| {name:18} | {apart:9.2e} | {rms:9.2e} | {first:8.1f} | {mean:8.1f} |"
            f" {flips.max():8.1f} | {tokens:7d} | {psnr:6.1f} | {same!s:5} |"
            f" {time.perf_counter() - began:5.1f} |",
            flush=True,
        )


def main():
    """Says what is run, and runs it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--size", default="", help="frames,height,width")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--driver", default="static")
    parser.add_argument("--large", action="store_true", help="1.3B, random weights")
    parser.add_argument("--methods", default="")
    options = parser.parse_args()
    dtype = jnp.dtype(options.dtype)
    print(
        f"{jax.devices()[0].device_kind}, JAX {jax.__version__}, {dtype}, {options.driver} driver,"
        f" {options.steps} steps, about 50 %, video 0 alone against video 0 of {BATCH}"
    )
    size = tuple(int(n) for n in options.size.split(",")) if options.size else None
    if options.large:
        name, size = "1.3B, random weights", size or (17, 256, 256)
        pipeline = wan.Pipeline.random("1.3B", dtype=dtype)
    else:
        name, size = "the small Wan", size or (None,) * 3
        pipeline = wan.Pipeline.from_pretrained("tiny", dtype=dtype)
    size = pipeline.size(*size)
    print(f"\n{name}, {size[0]} frames of {size[1]} x {size[2]}")
    print(
        "| method             | max/scale | rms/rms   | first    | mean     | most     |"
        " tokens  | PSNR   | again | s     |"
    )
    print("| --- " * 10 + "|")
    names = [each for each in METHODS if options.methods in each]
    measure(pipeline, size, options.steps, names, options.driver, not options.large)


if __name__ == "__main__":
    main()
