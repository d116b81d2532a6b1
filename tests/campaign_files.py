"""Bad content of files: how it is drawn, and of schedules, prompts, journals and runs."""

import dataclasses
import json
import pathlib
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from campaign import BROKEN, OTHER, UNREAD, Trial, field_values

from astraea_jax import cli, video
from astraea_jax.schedule import Schedule
from astraea_jax.search import journal as journals
from astraea_jax.search.recipe import Recipe, recipes_in
from astraea_ports import tiny
from astraea_ports.training import folder as training_folder

SILENT = {"_diffusers_version", "tokenizer_class", "clean_up_tokenization_spaces", "backend"}
"""Fields of configs that say nothing of what is computed."""

_ABSENT = (None,)
_TOKENS = (None, -1, 0)

NONE_REQUIRED = ("tokenizer/tokenizer_config.json",)
"""Files that may lack every field that is read, and have any other."""

RIGHT = {
    "expand_timesteps": _ABSENT,
    "transformer_2": _ABSENT,
    **dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"), _ABSENT),
    # Of the decoder, which is not there, and of other programs.
    "architectures": (None, []),
    "transformers_version": (None, "nonsense"),
    "dtype": _ABSENT,
    "num_decoder_layers": (None, 0),
    **dict.fromkeys(("pad_token_id", "eos_token_id", "decoder_start_token_id"), _TOKENS),
    # Those of T5 and of no limit, as transformers writes it.
    **dict.fromkeys(("pad_token", "eos_token", "unk_token"), _ABSENT),
    "model_max_length": (None, 10**9, 10**30),
}
"""Other values of a field that are right."""


NO_OTHERS: Mapping[str, tuple] = types.MappingProxyType({})


def is_right(field: str, value: Any, right: Mapping[str, tuple]) -> bool:
    """Whether a value that the rule draws is no wrong one of this field."""
    known = (*RIGHT.get(field, ()), *right.get(field, ()))
    return field in SILENT or any(type(value) is type(v) and value == v for v in known)


def changed(path: pathlib.Path, instead: bytes | pathlib.Path, read: Callable) -> Callable:
    """Calls `read` with a file replaced meanwhile: by other content, or by a link."""

    def call():
        content = path.read_bytes() if path.exists() else None
        path.unlink(missing_ok=True)
        try:
            if isinstance(instead, pathlib.Path):
                path.symlink_to(instead)
            else:
                path.write_bytes(instead)
            return read()
        finally:
            path.unlink()
            if content is not None:
                path.write_bytes(content)

    return call


def json_trials(
    path: pathlib.Path, read: Callable, *, name: str = "", right: Mapping[str, tuple] = NO_OTHERS
) -> Iterator[Trial]:
    """Every field of a file of JSON with values of wrong types and ranges; then broken ones."""
    name, text = name or path.name, path.read_text()
    content = json.loads(text)
    for field, known in content.items():
        for value in field_values(known):
            if is_right(field, value, right):
                continue
            wrong = json.dumps(content | {field: value}).encode()
            yield Trial(f"{name}: {field} = {str(value)[:40]!r}", changed(path, wrong, read))
    for broken in (*BROKEN, text[: len(text) // 2]):
        if broken == OTHER and name in NONE_REQUIRED:
            continue
        yield Trial(f"{name}: {broken[:20]!r}", changed(path, broken.encode(), read))


def place_trials(
    path: pathlib.Path, special: dict[str, pathlib.Path], read: Callable, *, name: str = ""
) -> Iterator[Trial]:
    """A file replaced by what is none, or is another."""
    for kind in UNREAD:
        yield Trial(f"{name or path.name}: {kind}", changed(path, special[kind], read))


TEXTS = {
    **dict.fromkeys(("model", "version"), ("nonsense",)),
    **dict.fromkeys(("dtype", "precision"), ("nonsense", "")),
    "negative_prompt": ("nonsense", "", "x" * 2000),
    "lora": ([],),
}
"""Of a schedule file, what may be any text."""

NAMES = dict.fromkeys(("method", "solver", "grid"), ("nonsense",))
"""Of a schedule file, what the command knows; a file may hold another's."""


def schedule_trials(folder: pathlib.Path, special: dict[str, pathlib.Path]) -> Iterator[Trial]:
    """Every field of a schedule file, which the command reads and the library."""
    source = sorted((tiny.FOLDER / "schedules").glob("*.json"))[0]
    path = folder / "a.json"
    path.write_bytes(source.read_bytes())
    words = ["generate", "a red circle", f"--schedule={path}", "--output=made.mp4"]
    for read, right in (
        (lambda: Recipe.load(path), TEXTS | NAMES),
        (lambda: cli.main(words), TEXTS),
    ):
        yield from json_trials(path, read, right=right)
        yield from place_trials(path, special, read)
    # Levels alone say nothing else; what stands beside them is not read.
    content = json.loads(path.read_text())
    wrongs = [
        json.dumps(content | {field: value}).encode()
        for field in ("format", "steps", "levels")
        for value in field_values(content[field])
    ]
    for wrong in (*wrongs, *(broken.encode() for broken in BROKEN)):
        for read in (lambda: Schedule.load(path), lambda: recipes_in(folder)):
            yield Trial(f"a schedule: {wrong[:60]}", changed(path, wrong, read))


def text_trials(
    folder: pathlib.Path, model: pathlib.Path, special: dict[str, pathlib.Path]
) -> Iterator[Trial]:
    """Prompts and captions."""
    prompts = folder / "prompts.txt"
    prompts.write_text("a red circle\n")
    for command in ("search", "sensitivity"):
        words = [command, *(["--budget", "0.5"] if command == "search" else [])]
        read = lambda words=words: cli.main([*words, f"--prompts={prompts}"])  # noqa: E731
        kinds = {kind: path for kind, path in special.items() if kind != "deep"}
        for trial in place_trials(prompts, {**kinds, "deep": special["empty"]}, read):
            yield dataclasses.replace(trial, name=f"{command}, {trial.name}")
        for wrong in (b"\n \n", b"\xff\xfe\x00", b"a" * 100_000):
            yield Trial(f"{command} --prompts: {wrong[:9]!r}", changed(prompts, wrong, read))
    captions = model / "captions.json"
    read = lambda: cli.main(["search", "--budget", "0.5", f"--model={model}"])  # noqa: E731
    wrong_lists = ("{}", '[""]', "[3]", "[null]", '[["a"]]', '{"a": "b"}', "[[[[]]]]", '["a"]')
    for wrong in (*BROKEN, *wrong_lists):
        yield Trial(f"captions: {wrong[:20]!r}", changed(captions, wrong.encode(), read))
    yield from place_trials(captions, special, read)


HEADER = {"model": "m", "steps": 4}
EVALUATION = {
    "levels": [10, 0, 0, 10], "errors": [1.0, 2.0], "seconds": 1.0, "stopped": False, "search": "s",
}  # fmt: skip


def journal_trials(folder: pathlib.Path, special: dict[str, pathlib.Path]) -> Iterator[Trial]:
    """Every field of a line of a search's journal, and what is none."""
    path = folder / journals.JOURNAL

    def read():
        with journals.open_journal(folder, HEADER, steps=4, prompts=2):
            pass

    lines = [json.dumps({"header": HEADER}), json.dumps(EVALUATION)]
    path.write_text("\n".join(lines) + "\n")
    read()
    path.unlink()
    wrongs = []
    for field, right in EVALUATION.items():
        values = field_values(right)
        if field == "search":
            values = [value for value in values if value not in ("", "nonsense")]
        wrongs += [[lines[0], json.dumps(EVALUATION | {field: value})] for value in values]
        wrongs.append([lines[0], json.dumps({k: v for k, v in EVALUATION.items() if k != field})])
    for field, right in HEADER.items():
        wrongs += [
            [json.dumps({"header": HEADER | {field: value}})] for value in field_values(right)
        ]
    wrongs += [[lines[0], broken] for broken in BROKEN if broken]
    wrongs += [[broken] for broken in BROKEN if broken]
    for wrong in wrongs:
        content = ("\n".join(wrong) + "\n").encode()
        yield Trial(f"journal: {wrong[-1][:60]}", changed(path, content, read))
    kinds = {kind: special[kind] for kind in ("fifo", "device", "folder", "binary", "loop")}
    for kind, place in kinds.items():
        yield Trial(f"journal: {kind}", changed(path, place, read))


RUN = {"part": "transformer", "recipe": {"steps": 4}}


def run_trials(folder: pathlib.Path, special: dict[str, pathlib.Path]) -> Iterator[Trial]:
    """The run.json of a training."""
    path = folder / "run.json"
    path.write_text(json.dumps(RUN))
    read = lambda: training_folder.saved_steps(folder, "transformer")  # noqa: E731
    yield from json_trials(path, read, right={"part": ("nonsense",)})
    for value in field_values(RUN["recipe"]["steps"]):
        if value == 10**9:
            continue
        wrong = json.dumps(RUN | {"recipe": {"steps": value}}).encode()
        yield Trial(f"run.json: steps = {value!r:.40}", changed(path, wrong, read))
    yield from (trial for trial in place_trials(path, special, read) if "missing" not in trial.name)


def video_trials(folder: pathlib.Path, special: dict[str, pathlib.Path]) -> Iterator[Trial]:
    """What is no video."""
    path = folder / "a.mp4"
    path.touch()
    yield from place_trials(path, special, lambda: video.read_video(path))
