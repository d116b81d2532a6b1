"""Times every tiling of the attention kernels that run here, and remembers the fastest."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from astraea_jax.bench.attention_runs import compile_all, inputs, sampled_errors, time_runs
from astraea_jax.bench.shapes import Shape, rows
from astraea_jax.kernels import dispatch, machine, tilings

SHOWN = 8  # tilings that are printed for each shape, the fastest
MOST_WRONG = 1e-4  # of a log-sum-exp of some tens, by a tiling that is remembered


def tune_shape(
    shape: Shape, shares: Iterable[float], rounds: int, names: Iterable[str]
) -> list[dict[str, Any]]:
    """Times every tiling of the kernels that run here; the fastest go to the user's table."""
    here = machine.gpu()
    found = []
    for name, share in itertools.product(names, shares):
        if here is None or dispatch.refusal(name, here, shape.width, jnp.bfloat16) is not None:
            continue
        used = rows(shape, share)
        timed = _timed(dispatch.kernel_module(name), shape, used, rounds)
        for tiling, seconds, errors in timed[:SHOWN]:
            rate = shape.flops(used) / seconds / 1e12
            print(
                f"{name} {shape} K={used} {tiling}: {1e3 * seconds:.3f} ms, {rate:.0f} TFLOP/s, "
                f"off by {errors['out']:.2g}, {errors['lse']:.2g}",
                flush=True,
            )
        right = [tiling for tiling, _, errors in timed if errors["lse"] <= MOST_WRONG]
        if right:
            row = dict(implementation=name, capability=here.version, width=shape.width)
            row |= dict(queries=_bucket(used), keys=_bucket(shape.tokens))
            found.append(row | {"tiling": dataclasses.asdict(right[0])})
    if found:
        print(f"remembered in {tilings.remember(found)}")
    return found


def _timed(
    kernel: Any, shape: Shape, used: int, rounds: int
) -> list[tuple[Any, float, dict[str, float]]]:
    """Tilings that fit, the fastest first, with the seconds of a call and its errors."""
    arguments = inputs(shape.batch, used, *shape[1:])

    def maker(tiling):
        attend = functools.partial(kernel.attend, count=None, scale=shape.width**-0.5)
        jitted = jax.jit(functools.partial(attend, tiling=tiling))
        return lambda: jitted.lower(*arguments).compile()

    candidates = kernel.candidates(shape.width, used, shape.tokens)
    programs = compile_all({tiling: maker(tiling) for tiling in candidates})
    runs = {
        tiling: functools.partial(program, *arguments)
        for tiling, program in programs.items()
        if not isinstance(program, Exception)
    }
    seconds, _ = time_runs(runs, rounds)
    return [
        (tiling, seconds[tiling], sampled_errors(runs[tiling](), *arguments))
        for tiling in sorted(seconds, key=seconds.__getitem__)
    ]


def _bucket(length: int) -> int:
    """The next power of two."""
    return 1 << (length - 1).bit_length()
