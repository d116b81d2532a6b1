"""Two searches that differ in anything that changes a score share none."""

import dataclasses
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small_model

from astraea_jax import solvers
from astraea_jax.cli import identity
from astraea_jax.cli.options import ModelChoice, Sampling, VideoSize
from astraea_jax.cli.subject import Asked, Opened, Subject
from astraea_jax.cli.target import latency_key
from astraea_jax.methods import METHODS
from astraea_jax.search.evolution import SearchConfig
from astraea_jax.search.space import Space

BASE = {
    "weights": lambda model: model,
    "text": "encoder",
    "vae": 1.0,
    "method": "step-level",
    "solver": "euler",
    "shift": 3.0,
    "grid": "original",
    "steps": 4,
    "size": (5, 32, 32),
    "prompts": ("a red circle", "a blue square"),
    "guidance": 5.0,
    "negative_prompt": "",
    "precision": "reference",
    "lora": (),
    "fitness": "pixels",
    "dense_start": 1,
    "reduce": "log",
    "patience": None,
    "seed": 0,
    "budget": 0.5,
    "batch": 16,
    "sensitivities": False,
    "config": SearchConfig(8, 4, 2),
}


def identified(**changes):
    """The header of a search's journal, its name, and what its step times depend on."""
    it = BASE | changes
    table = solvers.make(it["solver"], it["steps"], shift=it["shift"], grid=it["grid"])
    transformer = it["weights"](small_model())
    parts = {"transformer": transformer, "vae": {"a": np.full(3, it["vae"])}}
    pipeline = types.SimpleNamespace(**parts, text_name=it["text"])
    asked = Asked(
        ModelChoice(), None, 2, it["method"], it["solver"],
        Sampling(it["steps"], negative_prompt=it["negative_prompt"]), VideoSize(*it["size"]),
    )  # fmt: skip
    nothing = jnp.zeros(1)
    subject = Subject(
        pipeline, it["size"], it["prompts"], nothing, nothing, table, it["method"], it["guidance"]
    )
    opened = Opened(
        asked, pipeline, it["prompts"], it["size"], table, it["shift"], it["grid"], it["guidance"]
    )
    weights = {"precision": it["precision"], "lora": it["lora"]}
    header = identity.header(
        subject, opened, **weights, fitness=it["fitness"], dense_start=it["dense_start"]
    )
    space = Space.for_budget(it["steps"], it["budget"], dense_start=it["dense_start"])
    name = identity.name(
        header, space, it["config"], reduce=it["reduce"], patience=it["patience"],
        batch=it["batch"], seed=it["seed"], sensitivities=it["sensitivities"],
    )  # fmt: skip
    return header, name, latency_key(subject, **weights)


def in_bfloat16(model):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"weights": in_bfloat16},
        {"weights": lambda model: jax.tree.map(lambda leaf: 2 * leaf, model)},
        {"text": "another encoder"},
        {"vae": 2.0},
        {"method": "step-level-corrected"},
        {"solver": "unipc"},
        {"shift": 3.5},
        {"grid": "diffusers"},
        {"steps": 6},
        {"size": (9, 32, 32)},
        {"prompts": ("a red circle", "a blue circle")},
        {"guidance": 6.0},
        {"guidance": None},
        {"negative_prompt": "noise"},
        {"precision": "fast"},
        {"lora": ("style:1 0123",)},
        {"fitness": "latents"},
        {"dense_start": 2},
    ],
)
def test_what_changes_an_error_is_another_journal(changes):
    header, name, _ = identified()
    other_header, other_name, _ = identified(**changes)
    assert header != other_header and name != other_name


@pytest.mark.parametrize(
    "changes",
    [
        {"reduce": "mean"},
        {"patience": 2.0},
        {"seed": 1},
        {"budget": 0.75},
        {"sensitivities": True},
        {"config": SearchConfig(9, 4, 2)},
        {"config": SearchConfig(8, 3, 2)},
        {"config": SearchConfig(8, 4, 2, p0=0.2)},
        {"config": SearchConfig(8, 4, 2, replacement="generational")},
    ],
)
def test_what_is_made_of_the_errors_is_another_search_on_one_journal(changes):
    header, name, _ = identified()
    other_header, other_name, _ = identified(**changes)
    assert header == other_header and name != other_name


def test_who_is_given_up_depends_on_the_batches():
    names = {identified(patience=patience, batch=b)[1] for patience in (None, 2.0) for b in (8, 16)}
    assert len(names) == 3
    assert identified(patience=1.5)[1] not in names


def test_more_generations_go_on_with_the_same_search():
    assert identified()[1] == identified(config=SearchConfig(8, 4, 30))[1] == identified()[1]


def test_a_method_is_known_by_all_its_fields(monkeypatch):
    before = identified()[1]
    monkeypatch.setitem(
        METHODS, "step-level", dataclasses.replace(METHODS["step-level"], corrects=True)
    )
    assert identified()[1] != before


def test_solvers_of_one_grid_are_told_apart_by_their_numbers():
    """Every consistent solver's weights have the same sums."""
    tables = [solvers.make(name, 8, grid="original") for name in ("euler", "unipc")]
    sums = [np.asarray(table.predict).sum(axis=1) for table in tables]
    assert np.allclose(*sums, atol=1e-5)
    assert identity.digest(tables[0]) != identity.digest(tables[1])
    assert identity.digest(tables[0]) == identity.digest(jax.tree.map(jnp.asarray, tables[0]))


@pytest.mark.parametrize(
    "changes", [{"guidance": None}, {"weights": in_bfloat16}, {"size": (9, 32, 32)}]
)
def test_step_times_are_those_of_the_same_program(changes):
    assert identified()[2] != identified(**changes)[2]
    assert identified()[2] == identified(solver="unipc", prompts=("a", "b"))[2]


def test_changes_are_known_by_name_strength_and_content(tmp_path):
    file = tmp_path / "style.safetensors"
    names = []
    for content in (b"a", b"b"):
        file.write_bytes(content)
        names += identity.lora_names([str(file), f"{file}:0.5"])
    (tmp_path / "adapter_config.json").write_text("{}")
    names += identity.lora_names([str(file)])
    assert len(set(names)) == 5 and names[1].startswith("style.safetensors:0.5 ")


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
