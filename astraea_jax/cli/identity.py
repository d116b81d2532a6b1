"""What a search is: all that changes a score.

A journal holds errors of single prompts, so its header is what changes those. What is made of
them, and which schedules are given up, is the search's own: its name stands in the folder of its
states and at what it gave up.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

import astraea_jax
from astraea_jax import files
from astraea_jax.cli.options import read_lora
from astraea_jax.cli.subject import Opened, Subject
from astraea_jax.methods import METHODS
from astraea_jax.model import fingerprint
from astraea_jax.search.evolution import SearchConfig
from astraea_jax.search.space import Space

_BESIDE = "adapter_config.json"
"""May say how strongly the file beside it is meant."""


def lora_names(lora: Sequence[str]) -> list[str]:
    """Each file of changes as "name:strength digest": which they are, wherever they lie."""
    names = []
    for file, strength in map(read_lora, lora):
        path, content = pathlib.Path(file), hashlib.sha256()
        for each in (path, path.with_name(_BESIDE)):
            if each == path or each.is_file():
                with files.check_input(each).open("rb") as opened:
                    content.update(hashlib.file_digest(opened, "sha256").digest())
        names.append(f"{path.name}:{strength:g} {content.hexdigest()[:16]}")
    return names


def dtype_of(module: Any) -> str:
    """The dtypes of a module's leaves, the most frequent first."""
    found = [str(leaf.dtype) for leaf in jax.tree.leaves(module)]
    return ", ".join(sorted(set(found), key=lambda each: (-found.count(each), each)))


def of_weights(subject: Subject, *, precision: str, lora: Sequence[str]) -> dict[str, Any]:
    """Which numbers the transformer computes with."""
    transformer = subject.pipeline.transformer
    return {
        "model": fingerprint(transformer),
        "dtype": dtype_of(transformer),
        "precision": precision,
        "lora": list(lora),
    }


def header(
    subject: Subject, opened: Opened, *, precision: str, lora: Sequence[str], fitness: str,
    dense_start: int,
) -> dict[str, Any]:  # fmt: skip
    """What the error of a schedule on a prompt depends on."""
    return {
        **of_weights(subject, precision=precision, lora=lora),
        "method": repr(METHODS[subject.method]),
        "solver": opened.asked.solver,
        "steps": opened.solver.steps,
        "shift": opened.shift,
        "grid": opened.grid,
        "table": digest(subject.solver),
        "size": list(subject.size),
        "prompts": list(subject.prompts),
        "guidance": subject.guidance,
        "negative_prompt": opened.asked.sampling.negative_prompt,
        "text": opened.pipeline.text_name,
        "fitness": fitness,
        "decoder": digest(subject.pipeline.vae) if fitness == "pixels" else "",
        "dense_start": dense_start,
        "products": str(jax.config.jax_default_matmul_precision),  # pyright: ignore
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "version": astraea_jax.__version__,
    }


def digest(tables: Any) -> str:
    """A hash of all numbers of some arrays, whatever their sums."""
    content = hashlib.sha256()
    for leaf in jax.tree.leaves(tables):
        array = np.asarray(leaf)
        content.update(f"{array.shape} {array.dtype}".encode())
        content.update(array.tobytes())
    return content.hexdigest()[:16]


def name(
    header: dict[str, Any], space: Space, config: SearchConfig, *, reduce: str,
    patience: float | None, batch: int, **others,
) -> str:  # fmt: skip
    """Of a search in its journal and of its states: it takes up no other's.

    The number of generations is no part of it: more of them go on from the last.
    """
    drawn = {"config": dataclasses.asdict(dataclasses.replace(config, generations=0))}
    drawn |= {"space": dataclasses.asdict(space), "reduce": reduce, "patience": patience, **others}
    if patience is not None:  # who is given up depends on who was scored before
        drawn["batch"] = batch
    text = json.dumps([header, drawn], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
