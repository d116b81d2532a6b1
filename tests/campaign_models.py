"""Bad content of every file of a model: configs, weights, shards, what changes or reads them."""

import json
import pathlib
from collections.abc import Callable, Iterator

import numpy as np
from campaign import BROKEN, Trial
from campaign_files import changed, json_trials, place_trials
from safetensors import numpy as safetensors

from astraea_ports import tiny, wan
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
