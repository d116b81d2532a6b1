"""Bad arguments of what loads a model, and of its calls."""

import functools
import pathlib
from collections.abc import Iterator

import numpy as np
from campaign import (
    ARRAY,
    FLAG,
    LIST,
    NAME,
    NUMBER,
    UNREAD,
    WHOLE,
    WORD,
    Trial,
    dataclass_trials,
    trials,
)
from campaign_functions import by_name

from astraea_jax.methods import Astraea
from astraea_jax.schedule import Schedule
from astraea_ports import tiny, wan
from astraea_ports.text import t5
from astraea_ports.tiny import score
from astraea_ports.wan import vae_weights

NO_MODEL = (*NAME, "", "a/b/c", "missing", tiny.FOLDER / "model_index.json")
DTYPES = (3, "float99", "int8", "complex64", "nonsense", object, [1], {"a": 1})
LORAS = (3, "a.safetensors", None, (3,), ("a.safetensors",), [("a.safetensors", 1.0)], object())
STRENGTHS = (np.nan, np.inf, 1e30, "4", None, [1])


def port_trials(special: dict[str, pathlib.Path]) -> Iterator[Trial]:
    """What loads a model or its parts."""
    loads = {
        "Pipeline": functools.partial(wan.Pipeline.from_pretrained, staged=True),
        "load_transformer": wan.load_transformer,
        "load_vae": wan.load_vae,
        "load_text_encoder": wan.load_text_encoder,
    }
    places = tuple(special[place] for place in UNREAD)
    for name, load in loads.items():
        wrong = {"source": (*NO_MODEL, *places), "dtype": DTYPES}
        yield from by_name(name, load, {"source": tiny.FOLDER}, wrong)
    configs = (3, "text", [1], {}, {"a": 1}, object)
    for name in ("load_transformer", "load_vae", "load_text_encoder"):
        yield from trials(
            f"{name}, config", lambda v, f=loads[name]: f(tiny.FOLDER, config=v), configs
        )
    for name in ("Pipeline", "load_transformer"):
        wrong = {"lora": LORAS, "precision": WORD}
        yield from by_name(name, loads[name], {"source": tiny.FOLDER}, wrong)
    with_lora = lambda v: wan.load_transformer(tiny.FOLDER, lora=[v])  # noqa: E731
    lora = special["empty"].with_suffix(".safetensors")
    lora.touch()
    yield from trials("Lora, strength", lambda v: with_lora(wan.Lora(lora, v)), STRENGTHS)
    yield from trials("Lora, file", lambda v: with_lora(wan.Lora(v)), (*NAME, lora, *places))
    tokenizer = {"folder": tiny.FOLDER / "tokenizer"}
    wrong = {"folder": (*NAME, "", "missing", *places), "length": (*WHOLE, 0, 1)}
    make = wan.Tokenizer.from_pretrained
    yield from by_name("Tokenizer", make, tokenizer, wrong, {"length": (None,)})
    tokenizer = make(tiny.FOLDER / "tokenizer")
    yield from trials("a tokenizer's call", tokenizer, (3, [3], [None], [["a"]], None, [b"x"]))
    transformer, vae = wan.load_transformer(tiny.FOLDER), wan.load_vae(tiny.FOLDER)
    shapes = (*LIST, (1, 2, 4, 4, 3), (1, 0, 4, 4, 16), (1, 2, 3, 4, 16))
    yield from trials("geometry", transformer.geometry, shapes)
    for name, call in (("decode", vae.decode), ("encode", vae.encode)):
        yield from trials(f"VAE.{name}", call, (*ARRAY, np.zeros((1, 2, 4, 4, 5), np.float32)))
    videos = (*ARRAY, np.zeros((1, 5, 128, 128, 3), np.float32))
    yield from trials("score.read", lambda v: score.read(v, score.reader()), videos)
    random = {"size": WORD, "dtype": (*DTYPES, None), "precision": WORD, "seed": WHOLE}
    yield from by_name("Pipeline.random", wan.Pipeline.random, {"staged": True}, random)
    yield from dataclass_trials(wan.CONFIGS["1.3B"])
    yield from dataclass_trials(wan.VAEConfig.from_dict(vae_weights.WAN_VAE))
    yield from dataclass_trials(t5.T5Config(97, 32, 8, 64, 2, 4))


def call_trials() -> Iterator[Trial]:
    """A pipeline's call and its parts."""
    pipeline = wan.Pipeline.from_pretrained(staged=True)
    texts = (3, "", " ", [], [""], [3], {"a": 1}, [["a"]], None, b"bytes", object)
    wrong = {
        "prompts": texts,
        **dict.fromkeys(("frames", "height", "width", "steps"), (*WHOLE, 0)),
        "guidance": (*NUMBER, -1e9),
        "negative_prompt": (3, ["a"], {"a": 1}, b"bytes", object),
        "seed": (*WHOLE, [1, 2], "text"),
        "latents": ARRAY,
        "method": (*WORD, Astraea),
        "schedule": (*LIST, (10, 0), Schedule((10, 0, 10))),
        "solver": WORD,
        "shift": (*NUMBER, 0, -1),
        "grid": WORD,
        "driver": WORD,
        "progress": (3, "text", [1]),
        "trace": FLAG,
    }
    optional = ("frames", "height", "width", "steps", "guidance", "latents", "method", "schedule")
    but = dict.fromkeys((*optional, "shift", "grid", "progress"), (None,)) | {"seed": ([1],)}
    right = {"prompts": "a red circle", "steps": 4}
    yield from by_name("Pipeline", pipeline, right, wrong, but)
    # An empty text is what guidance starts from.
    yield from trials("encode_text", pipeline.encode_text, texts, ([""],))
    yield from trials("decode", pipeline.decode, ARRAY)
    names = ("frames", "height", "width")
    sizes = dict.fromkeys(names, (*WHOLE, 0))
    right, but = dict.fromkeys(names, None), dict.fromkeys(names, (None,))
    yield from by_name("Pipeline.size", pipeline.size, right, sizes, but)
    right = dict(zip(names, (81, 128, 128), strict=True))
    yield from by_name("Pipeline.workload", pipeline.workload, right, sizes)
