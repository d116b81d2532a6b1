"""The command `astraea`: make videos, find schedules, convert, train, measure.

Mistakes of the user, and what the machine refuses (a full disk, a closed pipe), end in a message on
stderr and exit code 2; Ctrl-C and the signals that end a program in 128 and the signal's number,
with nothing half-written left. Anything else is a fault and shows its traceback.

Each command is a module, imported when it is called, and none imports jax before its options are
read: help comes at once.
"""

import contextlib
import functools
import importlib
import io
import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import tyro

from astraea_jax import checks
from astraea_jax.checks import Refusal
from astraea_jax.cli import ending


class Command(NamedTuple):
    """Where a command is, and what a list of commands says of it.

    Attributes:
      module: that holds it.
      says: one line.
      function: its name there.
    """

    module: str
    says: str
    function: str = "command"

    def load(self) -> Callable[..., None]:
        """The command."""
        return getattr(importlib.import_module(self.module), self.function)


_CLI = "astraea_jax.cli"

COMMANDS = {
    "generate": Command(f"{_CLI}.generate", "Makes a video from a text."),
    "convert": Command(f"{_CLI}.convert", "Writes a model's weights anew, quicker to load."),
    "search": Command(f"{_CLI}.search", "Searches a schedule for a budget, a speed-up or seconds."),
    "sensitivity": Command(f"{_CLI}.sensitivity", "Draws how much each step matters."),
    "train-tiny": Command(f"{_CLI}.train", "Trains the small model's parts.", "train_tiny"),
    "score-tiny": Command(f"{_CLI}.score", "Scores videos of the small model.", "score_tiny"),
    "info": Command(f"{_CLI}.info", "Says what runs on this machine, and why the rest does not."),
    "bench": Command(f"{_CLI}.bench", "Times this machine; `astraea bench --help` says what."),
}
BENCHES = {
    "attention": Command(f"{_CLI}.bench", "Attention of some of the rows.", "attention"),
    "denoise": Command(f"{_CLI}.bench", "A denoising step at each level.", "denoise"),
    "exactness": Command(f"{_CLI}.bench", "How exact this device is.", "exactness"),
    "training": Command(f"{_CLI}.bench", "A training step.", "training"),
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
            if arguments[:1] == ["bench"]:
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


def _call(commands: Mapping[str, Command], program: str, arguments: Sequence[str]) -> None:
    """Parses a command line with tyro, then runs its command."""
    errors = io.StringIO()
    bound: Callable[[], None] | None
    name = arguments[0] if arguments else ""
    if name not in commands and not name.startswith("-"):
        known = ", ".join(commands)
        got = checks.shown(name) if name else "nothing"
        raise Refusal(f"expected {program} and one of {known}; got {got}: see {program} --help")
    # Parsing only binds the arguments, so that stderr is the command's own again when it runs.
    try:
        with contextlib.redirect_stderr(errors):
            if name in commands:
                bind = _binder(commands[name].load())
                bound = tyro.cli(bind, prog=f"{program} {name}", args=arguments[1:])
            else:
                stubs = {each: _stub(command) for each, command in commands.items()}
                bound = tyro.extras.subcommand_cli_from_dict(stubs, prog=program, args=arguments)
    except SystemExit as stop:
        if stop.code in (0, None):
            return
        raise Refusal(_one_line(errors.getvalue())) from None
    if bound is not None:  # tyro's stub of a list of commands gives none
        bound()


def _binder(command: Callable) -> Callable:
    @functools.wraps(command)
    def bind(*args, **kwargs):
        return functools.partial(command, *args, **kwargs)

    return bind


def _stub(command: Command) -> Callable[[], None]:
    """A command of no options, for the list of all."""

    def stub() -> None: ...

    stub.__doc__ = command.says
    return stub


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
