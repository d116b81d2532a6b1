"""The whole study of one GPU, part by part, each in a process of its own.

Every part is a command that stands by itself; its result goes into one file beside the command,
the machine and the commit. A part that fails, or for which no time is left, is written down as such
and the next one starts; parts that are run again replace what the file holds of them.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import start
from astraea_jax import checks, files, report
from astraea_jax.bench import options

WAN = "bench denoise --random 1.3B --no-stages --frames"
HERE = pathlib.Path(__file__).resolve().parent
PEER = HERE / "peers" / "diffusers_wan.py"
FIXTURE_TESTS = ("tests/wan_test.py", "tests/vae_test.py", "tests/t5_test.py")
FIXTURES = (
    "intermediates or velocity or velocities or selected_rows or half_precision or test_text "
    "or latents_after or test_video or first_block or all_rows or shipped or test_decode "
    "or test_encode"
)


LEAST = 10.0
"""Seconds below which no part is started."""


class Part(NamedTuple):
    """One part of the study.

    Attributes:
      about: what it says.
      limit: seconds that it may take.
      command: words after `astraea`; with a leading "python", after the interpreter.
      writes: whether it takes `--output FILE.json`.
    """

    about: str
    limit: float
    command: Sequence[str]
    writes: bool = True


STUDY = {
    "exactness": Part("the rungs of exactness on the small model", 400, ["bench", "exactness"]),
    "fixtures": Part(
        "tensors recorded from upstream's code, float32 and bfloat16",
        240,
        ["python", "-m", "pytest", "-n0", "-q", "--no-header", "-k", FIXTURES, *FIXTURE_TESTS],
        writes=False,
    ),
    "static-81": Part(
        "81 frames, a program for each level, with profiles",
        300,
        f"{WAN} 81 --drivers static --levels 10 7 5 4 --rounds 12 --seconds 50 --profile".split(),
    ),
    "static-65": Part(
        "65 frames, a program for each level",
        200,
        f"{WAN} 65 --drivers static --levels 10 7 5 4 --rounds 12 --seconds 30".split(),
    ),
    "static-33": Part(
        "33 frames, a program for each level",
        150,
        f"{WAN} 33 --drivers static --levels 10 7 5 4 --rounds 12 --seconds 20".split(),
    ),
    "dynamic-81": Part(
        "81 frames, one program for all levels",
        240,
        f"{WAN} 81 --drivers dynamic --levels 10 5 --rounds 4 --seconds 40".split(),
    ),
    "reference-81": Part(
        "81 frames, the residual stream in float32",
        200,
        f"{WAN} 81 --precision reference --drivers static --levels 10 5 --rounds 6 --seconds 20"
        " --profile".split(),
    ),
    "peer": Part("the same transformer in Diffusers, torch.compile", 300, ["python", str(PEER)]),
    "batches": Part(
        "the small model, one to 32 videos at once", 200, ["python", str(HERE / "batches.py")]
    ),
    "generate-33": Part(
        "prompt to video at 33 frames, half of the tokens, every stage",
        150,
        "generate circle --random 1.3B --precision fast --frames 33 --height 480 --width 832"
        f" --budget 0.5 --method astraea -o {tempfile.gettempdir()}/astraea_study.gif".split(),
        writes=False,
    ),
}


def command(
    *,
    output: pathlib.Path,
    parts: tuple[str, ...] = tuple(STUDY),
    minutes: float = 60,
    commit: str = "unknown",
) -> None:
    """Runs the study of a GPU, or some parts of it, and keeps all results in one file.

    Args:
      output: A .json file; what other parts left in it stays.
      parts: Which, in order.
      minutes: No part goes on beyond these.
      commit: Of this tree, to be written down.
    """
    options.check_each("parts", parts, STUDY)
    checks.number("minutes", minutes, 0, 60 * 24 * 14)
    path = files.check_output(output, (".json",))
    content = _read(path) if os.path.exists(path) else {"parts": {}}
    content["environment"] = _environment()
    ends = time.monotonic() + 60 * minutes
    for name in parts:
        found = run(STUDY[name], min(STUDY[name].limit, ends - time.monotonic()))
        content["parts"][name] = {"about": STUDY[name].about, "commit": commit} | found
        report.write_json(path, content)
        print(f"{name}: {found['outcome']} after {found['seconds']:.0f} s", flush=True)


def _read(path: pathlib.Path) -> dict[str, Any]:
    """What earlier parts left in the file."""
    content = files.read_json(path, what="study of a GPU")
    rules = {"parts": checks.ByName(checks.ByName(checks.Anything()))}
    advice = "choose another --output"
    checks.fields(content, rules, name=str(path), required=("parts",), others=True, advice=advice)
    return content


def _environment() -> dict:
    """The machine, asked in a process of its own: this one must hold nothing on the GPU."""
    code = "import json; from astraea_jax import report; print(json.dumps(report.environment()))"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return json.loads(asked.stdout.splitlines()[-1]) if asked.returncode == 0 else {}


def run(part: Part, seconds: float) -> dict:
    """Runs one part for at most so many seconds; what came of it."""
    python = part.command[0] == "python"
    words = part.command[1:] if python else ["-m", "astraea_jax.cli", *part.command]
    with tempfile.TemporaryDirectory() as folder:
        result = pathlib.Path(folder) / "result.json"
        words = [sys.executable, *words, *(["--output", str(result)] if part.writes else [])]
        shown = " ".join(part.command if python else ["astraea", *part.command])
        shown = shown.replace(f"{HERE.parents[1]}/", "")  # the same on every machine
        if seconds < LEAST:
            return {"command": shown, "outcome": "not run, no time left", "seconds": 0.0}
        began = time.monotonic()
        try:
            done = subprocess.run(
                words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds
            )
            said, outcome = done.stdout, "done" if done.returncode == 0 else "failed"
        except subprocess.TimeoutExpired as late:
            said, outcome = (late.stdout or b"").decode(errors="replace"), "stopped, out of time"
        print(said, flush=True)
        read = json.loads(result.read_text()) if os.path.isfile(result) else None
        return {
            "command": shown,
            "outcome": outcome,
            "seconds": time.monotonic() - began,
            "result": read,
            "said": said.splitlines()[-40:] if read is None else [],
        }


if __name__ == "__main__":
    start.run(command)
