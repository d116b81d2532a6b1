"""What a run says: tables, JSON, the machine it ran on, and progress."""

import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import jax
import rich.box
import rich.console
import rich.progress
import rich.table
import rich.text

from astraea_jax import files
from astraea_jax.checks import Refusal

Row = Mapping[str, Any]

_UNBROKEN = 100_000
"""Columns of what is read by programs: no line is broken."""


def table(rows: Sequence[Row], columns: Mapping[str, str]) -> rich.table.Table:
    """A table for the terminal.

    Args:
      rows: values by key; one that a row lacks, or None, is shown as "-".
      columns: key -> heading, in order; other keys are left out.

    Raises:
      Refusal: no column.
    """
    result = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for index, heading in enumerate(_headings(columns)):
        result.add_column(rich.text.Text(heading), justify="right" if index else "left")
    for row in rows:
        result.add_row(*(rich.text.Text(_cell(row.get(key))) for key in columns))
    return result


class _Console(rich.console.Console):
    """rich's, without its way to end the program where stdout is closed."""

    def on_broken_pipe(self) -> None:
        """Called while the error is handled."""
        raise


def show(content: rich.table.Table) -> None:
    """Prints a table on stdout: to a terminal as wide as it is, else with no line broken.

    Raises:
      Refusal: stdout is closed or full.
    """
    console = _Console()
    if not console.is_terminal:
        console = _Console(width=_UNBROKEN)
    try:
        console.print(content)
    except OSError as error:
        raise Refusal(f"can't print a table ({files.reason(error)})") from error


def markdown(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """The same table as Markdown, without a final line break.

    Raises:
      Refusal: no column.
    """
    lines = [
        _headings(columns),
        [":--" if index == 0 else "--:" for index in range(len(columns))],
        *([_cell(row.get(key)) for key in columns] for row in rows),
    ]
    return "\n".join("| " + " | ".join(line).replace("\n", " ") + " |" for line in lines)


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Writes JSON; the file is there whole or not at all.

    Arrays and scalars of NumPy and JAX are written as lists and numbers, paths as strings,
    infinities and NaN as the strings "inf", "-inf", "nan" (JSON has no such numbers).

    Raises:
      Refusal: a path that can't be written, or a value that JSON has no form for.
    """
    path = files.check_output(path, (".json",))
    text = json.dumps(_plain(content), indent=1, allow_nan=False)
    with files.replacing(path) as partial:
        partial.write_text(text + "\n")


def environment() -> dict[str, Any]:
    """Versions, processor and devices: what a number needs beside it."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
        "backend": jax.default_backend(),
        "devices": [device.device_kind for device in jax.devices()],
    }


def human_bytes(count: float) -> str:
    """Bytes in binary units, as "21.3 MiB"."""
    return _scaled(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def human_flops(count: float) -> str:
    """Floating-point operations in decimal units, as "3.85 PFLOP"."""
    return _scaled(
        count, 1000, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP", "ZFLOP")
    )


class Progress(contextlib.AbstractContextManager):
    """Bars on stderr, one a stage; where stderr is no terminal, one line when a stage ends.

    Within `with Progress() as progress:` open stages one after another or nested.
    """

    def __init__(self, console: rich.console.Console | None = None):
        """Writes to `console`; None means stderr."""
        self._console = console or rich.console.Console(stderr=True)
        self._bars = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}", markup=False),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeElapsedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )

    def __enter__(self) -> Self:
        """Shows the bars."""
        self._bars.start()
        return self

    def __exit__(self, *_) -> None:
        """Takes the cursor back; what is complete stays on screen."""
        self._bars.stop()

    @contextlib.contextmanager
    def stage(self, name: str, steps: int = 1) -> Iterator["Stage"]:
        """A stage of `steps` steps; a stage of one step needs no `advance`."""
        task = self._bars.add_task(name, total=steps)
        start = time.perf_counter()
        stage = Stage(self._bars, task)
        try:
            yield stage
        finally:
            stage.close()
        self._bars.update(task, completed=steps)
        if self._bars.disable:
            unit = f"{steps} steps, " if steps > 1 else ""
            seconds = time.perf_counter() - start
            # No markup, no line broken; and a stderr that is closed or full costs no work.
            with contextlib.suppress(OSError):
                print(f"{name}: {unit}{seconds:.1f} s", file=self._console.file, flush=True)


class Stage:
    """One bar."""

    def __init__(self, bars: rich.progress.Progress, task: rich.progress.TaskID):
        """A bar among `bars`; made by `Progress.stage`."""
        self._bars = bars
        self._task = task
        self._open = True
        self._lock = threading.Lock()

    def advance(self, *_) -> None:
        """One step further, whatever the arguments: made to be called by `jax.debug.callback`.

        Callbacks come from other threads, in any order, and late: one that comes after the stage
        has ended does nothing.
        """
        with self._lock:
            if self._open:
                self._bars.advance(self._task)

    def close(self) -> None:
        """Ignores what comes from now on."""
        with self._lock:
            self._open = False


def _headings(columns: Mapping[str, str]) -> list[str]:
    if not columns:
        raise Refusal("columns must map at least one key to its heading; got none")
    return list(columns.values())


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    """The value in types that JSON knows."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    match value:
        case float() if value != value or value in (float("inf"), float("-inf")):
            return str(value)
        case None | bool() | int() | float() | str():
            return value
        case os.PathLike():
            return os.fspath(value)
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
    raise Refusal(
        f"expected numbers, strings, lists and dicts; got a {type(value).__name__}: convert it"
    )


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _scaled(count: float, base: int, units: Sequence[str]) -> str:
    power = 0
    # Rounds before it compares, so that 1023.99 KiB becomes 1 MiB and not 1.02e+03 KiB.
    while power < len(units) - 1 and abs(round(count / base**power, 1)) >= base:
        power += 1
    scaled = count / base**power
    digits = 0 if power == 0 else max(0, 2 - len(str(int(abs(scaled)))) + 1)
    return f"{scaled:.{digits}f} {units[power]}"
