"""Bad content of every file that is read: configs, weights, schedules, journals, studies, ..."""

import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from campaign import BROKEN, OTHER, UNREAD, Trial, field_values
from safetensors import numpy as safetensors

from astraea_jax import cli, video
from astraea_jax.schedule import Schedule
from astraea_jax.search import study
from astraea_jax.search.recipe import Recipe, recipes_in
from astraea_ports import tiny, training_folder, wan
from astraea_ports.tiny import score

CONFIGS = (
    "model_index.json",
    "astraea.json",
    "scheduler/scheduler_config.json",
    "transformer/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "tokenizer/tokenizer_config.json",
)

WEIGHTS = {
    "transformer/diffusion_pytorch_model.safetensors": wan.load_transformer,
    "vae/diffusion_pytorch_model.safetensors": wan.load_vae,
    "text_encoder/model.safetensors": wan.load_text_encoder,
}

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


def is_right(field: str, value: Any) -> bool:
    """Whether a value that the rule draws is no wrong one of this field."""
    known = RIGHT.get(field, ())
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


def json_trials(path: pathlib.Path, read: Callable, *, name: str = "") -> Iterator[Trial]:
    """Every field of a file of JSON with values of wrong types and ranges; then broken ones."""
    name, text = name or path.name, path.read_text()
    content = json.loads(text)
    for field, right in content.items():
        for value in field_values(right):
            if is_right(field, value):
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


def weight_trials(path: pathlib.Path, read: Callable, *, flips: int = 15) -> Iterator[Trial]:
    """Weights cut short, headers with a bit turned or another length, numbers that are none."""
    rng = np.random.default_rng(0)
    content, name = path.read_bytes(), f"{path.parent.name}/{path.name}"
    start = 8 + int.from_bytes(content[:8], "little")
    for cut in (0, 7, 8, 100, start - 8, start, len(content) // 2, len(content) - 1):
        yield Trial(f"{name}: {cut} bytes", changed(path, content[:cut], read))
    yield Trial(f"{name}: bytes too many", changed(path, content + bytes(64), read))
    for size in (0, 1, 2**31, 2**63, 2**64 - 1):
        wrong = size.to_bytes(8, "little") + content[8:]
        yield Trial(f"{name}: a header of {size}", changed(path, wrong, read))
    # What stands before the first tensor is a remark.
    remark = content.index(b"}", 8) + 1 if b"__metadata__" in content[:64] else 8
    spaces = len(content[:start]) - len(content[:start].rstrip())
    for place in rng.integers(remark, start - spaces, flips):
        flipped = bytearray(content)
        flipped[place] ^= 0x10  # printable stays printable, and another letter
        yield Trial(f"{name}: bit of byte {place}", changed(path, bytes(flipped), read))
    for place in rng.integers(start // 4 + 1, len(content) // 4, 3):
        spoiled = bytearray(content)
        spoiled[4 * place : 4 * place + 4] = b"\xff\xff\xff\x7f"  # NaN, in whichever dtype
        yield Trial(f"{name}: NaN at byte {4 * place}", changed(path, bytes(spoiled), read))


def opened(folder: pathlib.Path) -> None:
    """Opens a model; its headers are read, its weights are not."""
    wan.Pipeline.from_pretrained(folder, staged=True)


def config_trials(model: pathlib.Path) -> Iterator[Trial]:
    """The JSON files of a model."""
    for name in CONFIGS:
        yield from json_trials(model / name, lambda: opened(model), name=name)


def model_trials(model: pathlib.Path, special: dict[str, pathlib.Path]) -> Iterator[Trial]:
    """Every file of a model replaced by what is none."""
    for name in (*CONFIGS, "tokenizer/tokenizer.json"):
        yield from place_trials(model / name, special, lambda: opened(model), name=name)
    for name, load in WEIGHTS.items():
        part = (model / name).parent
        yield from place_trials(
            model / name, special, lambda load=load, part=part: load(part), name=name
        )
    text = (model / "tokenizer/tokenizer.json").read_text()
    for broken in (*BROKEN, text[: len(text) // 2]):
        path = model / "tokenizer/tokenizer.json"
        call = changed(path, broken.encode(), lambda: opened(model))
        yield Trial(f"tokenizer.json: {broken[:20]!r}", call)


def all_weight_trials(model: pathlib.Path) -> Iterator[Trial]:
    """The weights of each part, and those that change them or read videos."""
    for name, load in WEIGHTS.items():
        part = (model / name).parent
        yield from weight_trials(model / name, lambda load=load, part=part: load(part))
    lora = model.parent / "lora.safetensors"
    _write_lora(lora)
    with_lora = lambda: wan.load_transformer(model / "transformer", lora=[wan.Lora(lora)])  # noqa: E731
    yield from weight_trials(lora, with_lora)
    reader = model.parent / "score.safetensors"
    reader.write_bytes(score.WEIGHTS.read_bytes())
    yield from weight_trials(reader, lambda: score.load_reader(reader), flips=5)


def _write_lora(path: pathlib.Path) -> None:
    transformer = safetensors.load_file(tiny.FOLDER / next(iter(WEIGHTS)))
    key = "blocks.0.attn1.to_q.weight"
    rows, columns = transformer[key].shape
    name = f"transformer.{key.removesuffix('.weight')}"
    down, up = np.ones((4, columns), np.float32), np.ones((rows, 4), np.float32)
    safetensors.save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, path)


def shard_trials(model: pathlib.Path, special: dict[str, pathlib.Path]) -> Iterator[Trial]:
    """An index of shards instead of a file of weights, and its shards."""
    folder = model.parent / "sharded"
    folder.mkdir()
    (folder / "config.json").write_bytes((model / "transformer/config.json").read_bytes())
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": "a.safetensors"}}))
    read = lambda: wan.load_transformer(folder)  # noqa: E731
    yield from json_trials(index, read)
    yield from place_trials(index, special, read)
    yield from place_trials(folder / "a.safetensors", special, read)
    for name in ("../a.safetensors", "/etc/passwd", "", "a\0b", "a\nb", 3, None, "x" * 300):
        wrong = json.dumps({"weight_map": {"a": name}}).encode()
        yield Trial(f"a shard {str(name)[:20]!r}", changed(index, wrong, read))


FREE = {"model", "version", "dtype", "precision", "negative_prompt", "lora"}
"""Texts of a schedule file that may be any."""


def schedule_trials(folder: pathlib.Path, special: dict[str, pathlib.Path]) -> Iterator[Trial]:
    """Every field of a schedule file, which the command reads and the library."""
    source = sorted((tiny.FOLDER / "schedules").glob("*.json"))[0]
    path = folder / "a.json"
    path.write_bytes(source.read_bytes())
    words = ["generate", "a red circle", f"--schedule={path}", "--output=made.mp4"]
    for read in (lambda: Recipe.load(path), lambda: cli.main(words)):
        yield from (trial for trial in json_trials(path, read) if not _is_free(trial.name, read))
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


def _is_free(name: str, read: Callable) -> bool:
    """Whether a trial's value is a text that this reader takes as it is."""
    field, _, value = name.partition(": ")[2].partition(" = ")
    named = field in ("method", "solver", "grid")  # the command knows them, a file need not
    free = field in FREE or (named and read.__code__.co_freevars == ("path",))
    return (
        free
        and value.startswith("'")
        and value not in ("''", "'0'", "'True'", "'None'")
        and ("[" not in value and "{" not in value and "xxx" not in value)
    )


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
            yield _named(trial, f"{command}, ")
        for wrong in (b"\n \n", b"\xff\xfe\x00", b"a" * 100_000):
            yield Trial(f"{command} --prompts: {wrong[:9]!r}", changed(prompts, wrong, read))
    captions = model / "captions.json"
    read = lambda: cli.main(["search", "--budget", "0.5", f"--model={model}"])  # noqa: E731
    wrong_lists = ("{}", '[""]', "[3]", "[null]", '[["a"]]', '{"a": "b"}', "[[[[]]]]", '["a"]')
    for wrong in (*BROKEN, *wrong_lists):
        yield Trial(f"captions: {wrong[:20]!r}", changed(captions, wrong.encode(), read))
    yield from place_trials(captions, special, read)


def _named(trial: Trial, before: str) -> Trial:
    """The trial with a longer name."""
    return Trial(before + trial.name, trial.call)


HEADER = {"model": "m", "steps": 4}
EVALUATION = {
    "levels": [10, 0, 0, 10], "errors": [1.0, 2.0], "seconds": 1.0, "stopped": False, "search": "s",
}  # fmt: skip


def journal_trials(folder: pathlib.Path, special: dict[str, pathlib.Path]) -> Iterator[Trial]:
    """Every field of a line of a search's journal, and what is none."""
    path = folder / study.JOURNAL

    def read():
        with study.open_journal(folder, HEADER, steps=4, prompts=2):
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
    read = lambda: training_folder.saved_steps(folder)  # noqa: E731
    yield from (trial for trial in json_trials(path, read) if "'nonsense'" not in trial.name)
    for value in field_values(RUN["recipe"]["steps"]):
        if value == 10**9:
            continue
        wrong = json.dumps(RUN | {"recipe": {"steps": value}}).encode()
        yield Trial(f"run.json: steps = {value!r:.40}", changed(path, wrong, read))
    yield from (trial for trial in place_trials(path, special, read) if "missing" not in trial.name)


STUDIES = pathlib.Path(cli.__file__).parents[1] / "bench"


def study_trials(folder: pathlib.Path, special: dict[str, pathlib.Path]) -> Iterator[Trial]:
    """Results of the studies, which benches read again."""
    for kind in ("quality", "search"):
        path = folder / f"{kind}.json"
        content = json.loads((STUDIES / f"{kind}.json").read_text())
        row = content["rows"][0]
        wrongs = [
            (field, value, {"rows": [row | {field: value}]})
            for field, right in row.items()
            for value in field_values(right)
        ]
        wrongs += [
            (field, value, {field: value})
            for field in ("model", "rows")
            for value in field_values(content[field])
            if value != []
        ]
        content["rows"] = [row]
        path.write_text(json.dumps(content))
        words = ["bench", "collect", os.fspath(path), f"--study={kind}", "--output=made.json"]
        read = lambda words=words: cli.main(words)  # noqa: E731
        for field, value, change in wrongs:
            if value == "nonsense" or (field, value) in FREE_OF_STUDIES:
                continue  # a name is free
            wrong = json.dumps(content | change).encode()
            yield Trial(f"{kind}: {field} = {value!r:.40}", changed(path, wrong, read))
        for broken in BROKEN:
            yield Trial(f"{kind}: {broken[:20]!r}", changed(path, broken.encode(), read))
        yield from place_trials(path, special, read)
    path = folder / "gpu.json"
    read = lambda: cli.main(["bench", "gpu", f"--output={path}"])  # noqa: E731
    for wrong in (*BROKEN, '{"parts": 3}', '{"parts": [1]}', '{"parts": {"a": 3}}'):
        yield Trial(f"gpu: {wrong[:20]!r}", changed(path, wrong.encode(), read))


FREE_OF_STUDIES = (
    *(("evaluations", 0), ("run", 0)),
    *((field, None) for field in ("reuse", "scope", "branches", "velocity", "rank", "overlap")),
    ("budget", None),
)


def video_trials(folder: pathlib.Path, special: dict[str, pathlib.Path]) -> Iterator[Trial]:
    """What is no video."""
    path = folder / "a.mp4"
    path.touch()
    yield from place_trials(path, special, lambda: video.read_video(path))
