"""Seconds spent compiling, kept apart from seconds spent running."""

import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.core
import jax.monitoring
from jax.extend.core import get_opaque_trace_state

GPU_OPTIONS: dict[str, bool | int | float | str] = {"xla_gpu_enable_triton_gemm": False}
"""How programs are compiled, beside XLA's own choices; other platforms pass it over.

cuBLASLt adds biases and applies the tanh GELU as it writes a product; Triton's products leave both
to a pass of their own over the largest arrays of a step, and take longer to be tuned.
"""

_COMPILING = "/jax/core/compile/"
"""Where JAX reports seconds of tracing, of lowering and of compiling: none is part of another."""


class _Compiled(threading.local):
    """Seconds of compilation of each thread: it happens in the thread that asks for it."""

    seconds = 0.0


_compiled = _Compiled()


def _count(event: str, duration_secs: float, **_: Any) -> None:
    if event.startswith(_COMPILING):
        _compiled.seconds += duration_secs


jax.monitoring.register_event_duration_secs_listener(_count)


def compile_seconds() -> float:
    """Seconds that this thread has spent tracing and compiling."""
    return _compiled.seconds


class Stopwatch:
    """Seconds of a stage, compilation apart.

    Attributes:
      run: seconds without compilation.
      compile: seconds of compilation, in the thread of the stage.
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
    """`jax.jit` compiled with `GPU_OPTIONS`, a part of other programs where it is called in one.

    Args:
      static: keyword arguments that are compiled in; hashable.
      donate: arguments whose memory the result may take.
    """
    return lambda function: TimedJit(function, tuple(static), tuple(donate))


class TimedJit:
    """A jitted function; see `timed_jit`.

    Which program a call runs is left to `jax.jit`: whatever of JAX's context decides it (precision,
    x64, mesh, `disable_jit`, `debug_nans`, ...) does so here too.

    Attributes:
      jitted: the function as a part of other programs.
      num_executables: for how many kinds of arguments and settings it was traced by itself.
    """

    def __init__(self, function: Callable, static: tuple[str, ...], donate: tuple[str, ...]):
        functools.update_wrapper(self, function)
        self.jitted = jax.jit(function, static_argnames=static, donate_argnames=donate)
        self.num_executables = 0
        self._function, self._static, self._donate = function, static, donate
        self._outermost: dict[tuple, Any] = {}

    def __call__(self, *args, **kwargs):
        """Runs the function, compiling it first for arguments or settings of a new kind."""
        if tracing():
            return self.jitted(*args, **kwargs)  # inside another jit it becomes a part of it
        return self._program()(*args, **kwargs)

    def executable(self, *args, **kwargs) -> jax.stages.Compiled:
        """The program that a call with these arguments runs, compiled now if need be."""
        return self.lower(*args, **kwargs).compile()

    def lower(self, *args, **kwargs) -> jax.stages.Lowered:
        """The function lowered for these arguments, as `jax.jit` does it, to be compiled."""
        return self._program().lower(*args, **kwargs)

    def _program(self):
        """The function as an outermost program: only such a one may say how it is compiled."""
        # Whoever looks for a NaN runs the function again, on arguments that must be there still.
        looking = jax.config.jax_debug_nans or jax.config.jax_debug_infs
        # What else changes the compiled program, without `jax.jit` compiling anew for it.
        flags = (
            looking,
            jax.config.read("jax_disable_most_optimizations"),
            jax.config.jax_compiler_enable_remat_pass,
        )
        program = self._outermost.get(flags)
        if program is None:
            program = jax.jit(
                self._apart(),
                static_argnames=self._static,
                donate_argnames=() if looking else self._donate,
                compiler_options=GPU_OPTIONS,
            )
            program = self._outermost.setdefault(flags, program)
        return program

    def _apart(self) -> Callable:
        """The function anew: JAX knows a program by the function that was traced."""

        @functools.wraps(self._function)
        def apart(*args, **kwargs):
            result = self._function(*args, **kwargs)
            self.num_executables += 1
            return result

        return apart


def tracing() -> bool:
    """Whether what is called now becomes a part of another program, or of its derivative."""
    return get_opaque_trace_state() != _EAGER


with jax.core.eval_context():
    _EAGER = get_opaque_trace_state()
