"""Seconds spent compiling, kept apart from seconds spent running."""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.core

GPU_OPTIONS: dict[str, bool | int | float | str] = {"xla_gpu_enable_triton_gemm": False}
"""How programs are compiled, beside XLA's own choices; other platforms pass it over.

cuBLASLt adds biases and applies the tanh GELU as it writes a product; Triton's products leave both
to a pass of their own over the largest arrays of a step, and take longer to be tuned.
"""

_seconds = 0.0


def compile_seconds() -> float:
    """Seconds that this process has spent tracing and compiling `timed_jit` functions."""
    return _seconds


class Stopwatch:
    """Seconds of a stage, compilation apart.

    Attributes:
      run: seconds without compilation.
      compile: seconds of compilation.
    """

    run: float = 0.0
    compile: float = 0.0


@contextmanager
def stopwatch() -> Iterator[Stopwatch]:
    """Times what happens inside; the caller blocks until its arrays are ready."""
    watch, began, compiled = Stopwatch(), time.perf_counter(), compile_seconds()
    try:
        yield watch
    finally:
        watch.compile = compile_seconds() - compiled
        watch.run = time.perf_counter() - began - watch.compile


def timed_jit(
    *, static: Sequence[str] = (), donate: Sequence[str] = ()
) -> Callable[[Callable], "TimedJit"]:
    """`jax.jit` that compiles ahead of its first run, so that the two can be timed apart.

    Args:
      static: keyword arguments that are compiled in; hashable.
      donate: arguments whose memory the result may take.
    """
    return lambda function: TimedJit(function, tuple(static), tuple(donate))


class TimedJit:
    """A jitted function with its own table of executables; see `timed_jit`."""

    def __init__(self, function: Callable, static: tuple[str, ...], donate: tuple[str, ...]):
        functools.update_wrapper(self, function)
        names: dict[str, Any] = {"static_argnames": static, "donate_argnames": donate}
        self.jitted = jax.jit(function, **names)
        # Only the outermost program may say how it is compiled.
        self._outermost = jax.jit(function, **names, compiler_options=GPU_OPTIONS)
        self.static = static
        self._executables: dict[Any, Any] = {}

    def __call__(self, *args, **kwargs):
        """Runs the function, compiling it first for arguments of a new kind."""
        leaves = jax.tree.leaves((args, self._dynamic(kwargs)))
        if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            return self.jitted(*args, **kwargs)  # inside another jit it becomes a part of it
        return self.executable(*args, **kwargs)(*args, **self._dynamic(kwargs))

    def executable(self, *args, **kwargs) -> jax.stages.Compiled:
        """The program that a call with these arguments runs, compiled now if need be."""
        leaves, tree = jax.tree.flatten((args, self._dynamic(kwargs)))
        fixed = tuple((name, kwargs[name]) for name in self.static if name in kwargs)
        key = (fixed, tree, tuple(map(_kind, leaves)))
        if key not in self._executables:
            self._executables[key] = self._compile(args, kwargs)
        return self._executables[key]

    def lower(self, *args, **kwargs) -> jax.stages.Lowered:
        """The function lowered for these arguments, as `jax.jit` does it, to be compiled."""
        return self._outermost.lower(*args, **kwargs)

    @property
    def num_executables(self) -> int:
        """How many kinds of arguments it was compiled for."""
        return len(self._executables)

    def _dynamic(self, kwargs: dict) -> dict:
        return {name: value for name, value in kwargs.items() if name not in self.static}

    def _compile(self, args, kwargs):
        global _seconds
        began = time.perf_counter()
        try:
            return self.lower(*args, **kwargs).compile()
        finally:
            _seconds += time.perf_counter() - began


def _kind(leaf) -> tuple:
    """What an executable depends on of an argument's leaf."""
    aval = jax.typeof(leaf)
    return (aval, leaf.sharding if isinstance(leaf, jax.Array) else None)
