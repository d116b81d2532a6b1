"""Where the time goes: the kernels that a run starts on a GPU, what kind they are, and the gaps."""

import collections
import gzip
import json
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax

KINDS = {
    "attention": r"mosaic|sparse_attention|sdpa|fmha|flash",
    "products": r"gemm|nvjet|cutlass|xmma|cublas|matmul|splitk|ampere_|sm90_|sm80_",
    "scatter, gather, sort": r"scatter|gather|sort|radix|segmented|merge",
    "copies": r"memcpy|memset|copy|slice|transpose|pad_fusion",
}
"""Kinds of kernels by what their names hold, the first that fits; the rest is elementwise."""

COLUMNS = {"kind": "kind", "milliseconds": "ms a run", "share": "of the span, %"}


class Profile(NamedTuple):
    """What one run did on the device, mean of several.

    Attributes:
      kernels: name, milliseconds and launches of each kernel, the longest first.
      span: milliseconds from the first kernel's start to the last one's end.
      busy: milliseconds in which at least one kernel ran.
      launches: kernels started.
    """

    kernels: list[dict]
    span: float
    busy: float
    launches: float

    def kinds(self) -> list[dict]:
        """Milliseconds by kind of kernel, and those in which nothing ran."""
        total: collections.Counter[str] = collections.Counter()
        for kernel in self.kernels:
            total[kind_of(kernel["name"])] += kernel["milliseconds"]
        rows = [*total.most_common(), ("nothing runs", self.span - self.busy)]
        return [
            {"kind": kind, "milliseconds": spent, "share": 100 * spent / max(self.span, 1e-9)}
            for kind, spent in rows
        ]


def kind_of(name: str) -> str:
    """What a kernel does, by its name."""
    for kind, pattern in KINDS.items():
        if re.search(pattern, name, re.IGNORECASE):
            return kind
    return "elementwise and norms"


def record(run: Callable[[], None], times: int = 3) -> Profile:
    """Profiles `run`, which blocks until it is done; without a GPU there are no kernels to see."""
    if jax.default_backend() != "gpu":
        return summarise([], times)
    run()
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = options.host_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(times):
                run()
        traces = pathlib.Path(folder).rglob("*.trace.json.gz")
        events = [
            event
            for path in traces
            for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        ]
    return summarise(list(on_device(events)), times)


def on_device(events: list[dict]) -> Iterator[dict]:
    """The events of a trace that are kernels or copies on a GPU's streams."""
    streams = {
        (event["pid"], event["tid"])
        for event in events
        if event.get("name") == "thread_name" and event["args"]["name"].startswith("Stream")
    }
    for event in events:
        if event.get("ph") == "X" and (event["pid"], event["tid"]) in streams:
            yield event


def summarise(events: list[dict], times: int) -> Profile:
    """The profile of `times` runs from a trace's events (their times are in microseconds)."""
    spent: collections.Counter[str] = collections.Counter()
    launches: collections.Counter[str] = collections.Counter()
    busy, reached = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: event["ts"]):
        spent[event["name"]] += event["dur"]
        launches[event["name"]] += 1
        end = event["ts"] + event["dur"]
        busy += max(0.0, end - max(event["ts"], reached))
        reached = max(reached, end)
    span = reached - min((event["ts"] for event in events), default=reached)
    kernels = [
        {
            "name": name[:80],
            "milliseconds": total / 1e3 / times,
            "launches": launches[name] / times,
        }
        for name, total in spent.most_common()
    ]
    scale = 1e3 * times
    return Profile(kernels, span / scale if events else 0.0, busy / scale, len(events) / times)
