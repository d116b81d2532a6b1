"""The Wan 2.1 1.3B transformer of Diffusers on a GPU, timed as a peer: ms of a step with guidance.

    python notebooks/studies/peers/diffusers_wan.py --frames 81 33 --output peer.json

A script by itself: it needs torch and diffusers, which astraea_jax does not, and nothing of
astraea_jax. Random weights in bfloat16, `torch.compile`, both guidance branches as one batch and as
two calls, scaled-dot-product attention by whichever of PyTorch's back ends is fastest.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import diffusers
import torch
from diffusers import WanTransformer3DModel
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def build() -> WanTransformer3DModel:
    """The model with random weights; the class's defaults are the 14B's."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=30)
    return model.to(torch.bfloat16).eval()


def seconds(run, rounds: int) -> list[float]:
    """Seconds of each round, after a warm one, by events on the device."""
    run()
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return times


def fastest_backend(tokens: int) -> str:
    """Which attention is fastest at the size of one branch."""
    query = torch.randn(1, 12, tokens, 128, device="cuda", dtype=torch.bfloat16)
    attend, best = torch.nn.functional.scaled_dot_product_attention, {}
    for name, backend in BACKENDS.items():
        with sdpa_kernel(backend):
            best[name] = statistics.median(seconds(lambda: attend(query, query, query), 5))
    print("attention alone, ms:", {name: round(1e3 * value, 2) for name, value in best.items()})
    return min(best, key=best.__getitem__)


@torch.no_grad()
def measure(model, frames: int, rounds: int) -> Iterator[dict]:
    """Milliseconds of a step with guidance, eager and compiled, as one batch and as two calls."""
    shape = (16, (frames - 1) // 4 + 1, 60, 104)
    latents = torch.randn(2, *shape, device="cuda", dtype=torch.bfloat16)
    text = torch.randn(2, 512, 4096, device="cuda", dtype=torch.bfloat16)
    timestep = torch.full((2,), 500, device="cuda")
    backend = fastest_backend(shape[1] * 30 * 52)
    for compiled in (False, True):
        torch._dynamo.reset()
        forward = torch.compile(model, dynamic=False) if compiled else model

        def call(first: int, last: int, forward=forward):
            part = slice(first, last)
            return forward(latents[part], timestep[part], text[part], return_dict=False)[0]

        runs = {"one batch": lambda: call(0, 2), "two calls": lambda: (call(0, 1), call(1, 2))}
        for name, run in runs.items():
            began = time.perf_counter()
            with sdpa_kernel(BACKENDS[backend]):
                run()
                torch.cuda.synchronize()
                first = time.perf_counter() - began
                times = seconds(run, rounds)
            yield {
                "frames": frames,
                "compiled": compiled,
                "branches": name,
                "attention": backend,
                "milliseconds": 1e3 * statistics.median(times),
                "first": first,
                "peak": torch.cuda.max_memory_allocated(),
            }


def main() -> None:
    """Times each size and writes all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, nargs="+", default=[81, 33])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    model = build()
    content = {
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "devices": [torch.cuda.get_device_name()],
        },
        "rows": [],
    }
    for frames in arguments.frames:
        for row in measure(model, frames, arguments.rounds):
            print(row, flush=True)
            content["rows"].append(row)
            # Written after each row: a run that is cut short has still said something.
            arguments.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
