"""The command `astraea`: make videos, find schedules, convert, train, measure.

Mistakes of the user, and what the machine refuses (a full disk, a closed pipe), end in a message on
stderr and exit code 2; Ctrl-C and the signals that end a program in 128 and the signal's number,
with nothing half-written left. Anything else is a fault and shows its traceback.
"""

import contextlib
import functools
import io
import os
import pathlib
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Literal, get_args

import jax
import tyro
from tyro.conf import Positional, arg

from astraea_jax import attention, checks, report, solvers
from astraea_jax.bench import attention as bench_attention
from astraea_jax.bench import denoise as bench_denoise
from astraea_jax.bench import exactness, options
from astraea_jax.bench import training as bench_training
from astraea_jax.bench.models import TINY, Chosen
from astraea_jax.checks import Refusal
from astraea_jax.cli import compiled, convert, ending, score, search, sensitivity, train
from astraea_jax.cli.generate import run
from astraea_jax.cli.request import Request
from astraea_jax.methods import METHODS
from astraea_jax.schedule import Schedule
from astraea_jax.search.recipe import Recipe, is_recipe

MethodName = Literal[
    "dense",
    "astraea",
    "astraea-corrected",
    "astraea-published",
    "fixed-token",
    "step-level",
    "step-level-corrected",
    "step-level-residual",
    "pab-2-6",
    "teacache-0.08",
]


def generate(
    prompt: Positional[str],
    /,
    *,
    budget: float | None = None,
    compare: bool = False,
    model: Chosen = TINY,
    method: MethodName | None = None,
    schedule: pathlib.Path | None = None,
    solver: Literal["unipc", "dpm++", "euler"] = "unipc",
    grid: solvers.Grid | None = None,
    shift: float | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    negative_prompt: str = "",
    seed: int = 0,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    output: Annotated[pathlib.Path, arg(aliases=["-o"])] = pathlib.Path("out.mp4"),
    show_selection: bool = False,
    compilation_cache: bool = True,
) -> None:
    """Makes a video from a text.

    Args:
      prompt: What the video shows.
      budget: Mean share of the tokens to compute, above 0 and at most 1. All when left out.
      compare: Also make the dense video, and show both and their difference side by side.
      model: Which model.
      method: How steps are computed; left out, what measured best for the budget or schedule.
      schedule: A schedule file, instead of a budget.
      solver: Solver of the flow.
      grid: Whose noise levels; left out, those of the checkpoint's layout.
      shift: Flow shift; the model's own when left out.
      steps: Denoising steps; the model's default when left out.
      guidance: Scale of classifier-free guidance; the model's default when left out.
      negative_prompt: What the video should not show.
      seed: Of the noise.
      frames: Frames of the video, 4k + 1.
      height: Pixels.
      width: Pixels.
      output: An .mp4 or .gif file.
      show_selection: Add a panel that lights up the tokens that were computed.
      compilation_cache: Keep compiled programs for the next run.
    """
    if not prompt.strip():  # a pipeline says so too, once it is open
        raise Refusal(
            f"a prompt must say something; got {checks.shown(prompt)}: describe the video to make"
        )
    options.check_size(frames, height, width)
    if compilation_cache:
        compiled.keep()
    request = Request(
        prompt=prompt,
        model=model,
        budget=budget,
        schedule=None if schedule is None else read_schedule(schedule),
        method=None if method is None else METHODS[method],
        solver=solver,
        grid=grid,
        shift=shift,
        steps=steps,
        guidance=guidance,
        negative_prompt=negative_prompt,
        seed=seed,
        size=(frames, height, width),
        compare=compare,
        show_selection=show_selection,
        output=output,
    )
    with report.Progress() as progress:
        rows = run(request, progress)
    # A column for each run: it fits the narrowest terminal, and reads as a comparison.
    lines = [
        {"what": heading} | {str(index): row.get(name) for index, row in enumerate(rows)}
        for name, heading in HEADINGS.items()
        if any(name in row for row in rows)
    ]
    columns = {"what": ""} | {str(index): row["name"] for index, row in enumerate(rows)}
    report.show(report.table(lines, columns))
    print(f"written: {output}")


def read_schedule(path: pathlib.Path) -> Schedule | Recipe:
    """A schedule file's levels, with what they were searched for where it says so.

    Raises:
      Refusal: no such file or schedule, or it was searched for what is not known here.
    """
    if not is_recipe(path):
        return Schedule.load(path)
    recipe = Recipe.load(path)
    for name, known in (
        ("method", METHODS), ("solver", solvers.SOLVERS), ("grid", get_args(solvers.Grid)),
    ):  # fmt: skip
        checks.one_of(f"{path}: {name}", getattr(recipe, name), tuple(known))
    return recipe


HEADINGS = {
    "steps": "steps",
    "tokens": "tokens computed",
    "flops": "operations",
    "seconds": "seconds, denoising",
    "speedup": "speed-up, denoising",
    "decode": "seconds, decoding",
    "compile": "seconds, compiling",
    "cache": "cache",
    "psnr": "PSNR to dense, dB",
    "ssim": "SSIM to dense",
}


def info() -> None:
    """Says what runs on this machine, and why the rest does not."""
    rows = [{"what": name, "value": value} for name, value in report.environment().items()]
    rows += [
        {"what": f"attention: {name}", "value": state}
        for name, state in attention.implementations().items()
    ]
    rows.append({"what": "methods", "value": ", ".join(METHODS)})
    folder = jax.config.jax_compilation_cache_dir or compiled.folder() or compiled.NO_HOME
    rows.append({"what": "compiled programs", "value": str(folder)})
    report.show(report.table(rows, {"what": "", "value": ""}))


def bench() -> None:
    """Times this machine: `attention`, `denoise` (a step), `training`.

    `exactness` says how exact this device is.
    """
    raise Refusal(f"say what to measure: astraea bench {' | '.join(BENCHES)}")


COMMANDS = {
    "generate": generate,
    "convert": convert.command,
    "search": search.command,
    "sensitivity": sensitivity.command,
    "train-tiny": train.train_tiny,
    "score-tiny": score.score_tiny,
    "info": info,
    "bench": bench,
}
BENCHES = {
    "attention": bench_attention.command,
    "denoise": bench_denoise.command,
    "exactness": exactness.command,
    "training": bench_training.command,
}


TRACEBACK = "ASTRAEA_TRACEBACK"
"""A variable that shows where a mistake was noticed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    warnings.showwarning = functools.partial(ending.show_warning, set())
    ending.print_in_escapes()
    try:
        with ending.by_exception():
            if arguments[:1] == ["bench"] and len(arguments) > 1:
                _call(BENCHES, "astraea bench", arguments[1:])
            else:
                _call(COMMANDS, "astraea", arguments or ["--help"])
            ending.flush()
    except (Refusal, OSError) as error:
        if os.environ.get(TRACEBACK):
            raise
        if isinstance(error, Refusal):
            return ending.say(str(error))
        return ending.of_the_system(error)
    except KeyboardInterrupt as stop:
        number = stop.args[0] if isinstance(stop, ending.Ended) else signal.SIGINT
        return ending.say("stopped; nothing half-written is left", 128 + number)
    return 0


def _call(commands: Mapping[str, Callable], program: str, arguments: Sequence[str]) -> None:
    """Parses a command line with tyro, then runs its command."""
    errors = io.StringIO()
    # Parsing only binds the arguments, so that stderr is the command's own again when it runs.
    binders = {name: _binder(command) for name, command in commands.items()}
    try:
        with contextlib.redirect_stderr(errors):
            bound = tyro.extras.subcommand_cli_from_dict(binders, prog=program, args=arguments)
    except SystemExit as stop:
        if stop.code in (0, None):
            return
        raise Refusal(_one_line(errors.getvalue())) from None
    bound()


def _binder(command: Callable) -> Callable:
    @functools.wraps(command)
    def bind(*args, **kwargs):
        return functools.partial(command, *args, **kwargs)

    return bind


def _one_line(panel: str) -> str:
    """What tyro's panel of an error says, without its title, its frame and its hints."""
    said = []
    for line in panel.splitlines()[1:]:
        text = line.strip("│╭╮╰╯|+ ")
        ruled = not text.strip("─-")
        if text.startswith("Got errors") or (said and ruled):
            break
        if text and not ruled:
            said.append(text)
    return " ".join(said) or panel.strip()
