"""Bad arguments of every public function."""

import functools
import pathlib
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import helpers
import jax
import numpy as np
from campaign import (
    ARRAY,
    FLAG,
    LIST,
    NAME,
    NUMBER,
    UNREAD,
    UNWRITTEN,
    WHOLE,
    WORD,
    Trial,
    dataclass_trials,
    trials,
)

from astraea_jax import denoise, flops, methods, metrics, query_sparse_attention, solvers, video
from astraea_jax.methods import PAB, Astraea, FixedToken, StepLevel, TeaCache
from astraea_jax.population import Scorer
from astraea_jax.schedule import Schedule
from astraea_jax.search import journal as journals
from astraea_jax.search import plots, sensitivity, study
from astraea_jax.search.evolution import SearchConfig
from astraea_jax.search.patterns import step_patterns
from astraea_jax.search.recipe import Recipe
from astraea_jax.search.scoring import Evaluator
from astraea_jax.search.space import Space, check_band
from astraea_jax.selection import SelectionConfig
from astraea_ports import tiny

Arguments = Mapping[Any, Any]


def by_name(
    name: str, function: Callable, right: Arguments, wrong: Arguments, but: Arguments | None = None
) -> Iterator[Trial]:
    """A function with each of its arguments wrong in turn.

    Args:
      name: of the function.
      function: takes all by name.
      right: arguments with which it would run.
      wrong: values that each argument can't have.
      but: of those, what the function takes after all.
    """
    for argument, values in wrong.items():
        call = lambda value, argument=argument: function(**{**right, argument: value})  # noqa: E731
        yield from trials(f"{name}, {argument}", call, values, (but or {}).get(argument, ()))


NONE = {name: (None,) for name in ("schedule", "method", "guidance", "key", "progress")}
STEPS = (*WHOLE, 0, 10**5)


def schedule_trials(folder: pathlib.Path) -> Iterator[Trial]:
    """Schedules and recipes."""
    yield from trials("Schedule", Schedule, LIST)
    yield from trials("Schedule, a level", lambda v: Schedule((10, v)), (*WHOLE, 11))
    yield from trials("Schedule.dense", Schedule.dense, STEPS)
    for make in (Schedule.uniform, Schedule.skipping):
        wrong = {"steps": STEPS, "budget": (*NUMBER, 0, 1.1), "dense_steps": STEPS}
        yield from by_name(
            make.__name__, make, {"steps": 4, "budget": 0.5}, wrong, {"budget": (True,)}
        )
    make = functools.partial(Schedule.for_budget, whole_steps=False)
    wrong = {"steps": STEPS, "budget": (*NUMBER, 0, 1.1)}
    yield from by_name("Schedule.for_budget", make, {"steps": 4, "budget": 0.5}, wrong)
    yield from by_name(
        "realised_budget", Schedule.dense(4).realised_budget, {"num_tokens": 60},
        {"num_tokens": (*WHOLE, 0), "groups": (*LIST, 3, (0,), (-1,), (61,))},
    )  # fmt: skip
    save = Schedule.dense(4).save
    yield from trials("Schedule.save", save, (*NAME, "a.txt", "", "nowhere/a.json"))
    for about in (object(), float("nan"), {1, 2}, b"bytes", 1j):
        yield Trial(f"Schedule.save, about {about!r:.20}", lambda v=about: save("a.json", note=v))
    yield Trial("Schedule.save, levels", lambda: save("a.json", levels=[1]))
    for load in (Schedule.load, Recipe.load):
        yield from trials(load.__qualname__, load, (*NAME, "", "missing.json", folder))
    recipe = Recipe.load(sorted((tiny.FOLDER / "schedules").glob("*.json"))[0])
    names = dict.fromkeys(("method", "solver", "grid", "model", "version"), ("nonsense", "x" * 300))
    texts = dict.fromkeys(("dtype", "precision", "negative_prompt"), ("", "nonsense", "x" * 300))
    objects = {"lora": ((), ("a", "b", "c")), **dict.fromkeys(("quality", "cost"), ({"a": 1},))}
    yield from dataclass_trials(recipe, names | texts | objects)


def solver_trials() -> Iterator[Trial]:
    """Solvers, selections, methods."""
    for name, make in solvers.SOLVERS.items():
        wrong = {"steps": STEPS, "shift": (*NUMBER, 0, -1), "grid": WORD}
        yield from by_name(name, make, {"steps": 4, "shift": 3.0}, wrong)
    yield from trials("solvers.make", lambda v: solvers.make(v, 4), (*WORD, *LIST))
    yield from trials("methods.make", methods.make, (*WORD, *LIST))
    yield from dataclass_trials(SelectionConfig())
    for method in (Astraea(), FixedToken(), StepLevel(), PAB(), TeaCache()):
        yield from dataclass_trials(method)
        yield from trials(f"{method.name}.static_mode", method.static_mode, (*WHOLE, 11))
    sizes = flops.BlockSizes(number=2, ffn_width=48, text_tokens=5, keys=60)
    workload = flops.Workload(60, 24, (sizes,))
    right = {"num_tokens": 60, "width": 24, "kinds": (sizes,)}
    wrong = {"num_tokens": (*WHOLE, 0), "width": (*WHOLE, 0), "kinds": LIST}
    yield from by_name("Workload", flops.Workload, right, wrong)
    for name in ("number", "ffn_width", "text_tokens", "keys", "groups"):
        call = lambda v, n=name: flops.Workload(60, 24, (sizes._replace(**{n: v}),))  # noqa: E731
        yield from trials(f"BlockSizes.{name}", call, (*WHOLE, 0))
    run = functools.partial(flops.run_flops, workload)
    yield from by_name(
        "run_flops", run, {"levels": (10, 5)}, {"levels": LIST, "branches": (*WHOLE, 0, 3)}
    )
    bound = functools.partial(flops.speedup_bound, workload)
    yield from trials("speedup_bound", bound, (*WHOLE, 0, 11))


def video_trials(folder: pathlib.Path, special: dict[str, pathlib.Path]) -> Iterator[Trial]:
    """Metrics and videos."""
    frames = np.zeros((5, 32, 32, 3), np.uint8)
    videos = (*ARRAY, frames[..., :1], frames[0], np.full(frames.shape, np.nan, np.float32))
    others = (*videos, frames[:2], frames[:, :16])
    for metric in (metrics.psnr, metrics.ssim):
        wrong = {"reference": others, "video": others}
        yield from by_name(metric.__name__, metric, {"reference": frames, "video": frames}, wrong)
    not_alike = [v for v in others if getattr(v, "shape", None) != frames.shape]
    yield from trials("mse", lambda v: metrics.mse(frames, v), not_alike)
    yield from trials("to_uint8", metrics.to_uint8, (*map(np.asarray, (1, [True])), *_no_floats()))
    out = folder / "a.mp4"
    places = (*NAME, "a", "a.txt", "", *(special[place] for place in UNWRITTEN))
    rates = (*NUMBER, 0, -1, 1e-9)
    wrong = {"path": places, "video": videos, "fps": rates}
    yield from by_name("write_video", video.write_video, {"path": out, "video": frames}, wrong)
    picture = {"path": places, "image": (*ARRAY, frames, frames[0, ..., :1])}
    right = {"path": folder / "a.png", "image": frames[0]}
    yield from by_name("write_image", video.write_image, right, picture)
    unread = (*NAME, "", *(special[place] for place in UNREAD))
    yield from trials("read_video", video.read_video, unread)
    yield from trials("check_output", video.check_output, places)
    one, two = {"video": frames}, {"reference": frames, "video": frames}
    yield from by_name("enlarge", video.enlarge, one, {"video": videos, "minimum": (*WHOLE, 0)})
    yield from by_name(
        "difference", video.difference, two, {"video": others, "gain": (*NUMBER, 0, -1)},
        {"gain": (None,)},
    )  # fmt: skip
    mask = np.zeros((5, 32, 32), np.float32)
    masks = (*ARRAY, mask[:2], mask * np.nan)
    yield from by_name(
        "light_up", video.light_up, {"mask": mask, **one}, {"video": videos, "mask": masks}
    )
    yield from by_name(
        "film_strip",
        video.film_strip,
        {"count": 2, **one},
        {"video": videos, "count": (*WHOLE, 0, 6)},
    )
    titles = (*LIST, "ab", ("a",), ("a", 3))
    right = {"videos": [frames, frames], "titles": ["a", "b"]}
    panels = (*LIST, "ab", [frames, frames[:2]], [frames, None], [frames])
    yield from by_name(
        "side_by_side", video.side_by_side, right, {"videos": panels, "titles": titles}
    )
    right = {"videos": [frames, frames], "captions": ["a", "b"], "columns": 1}
    wrong = {
        "videos": panels, "captions": titles, "columns": (*WHOLE, 0),
        "frames_per_video": (*WHOLE, 0),
    }  # fmt: skip
    yield from by_name("contact_sheet", video.contact_sheet, right, wrong)


def _no_floats() -> tuple[Any, ...]:
    """Of the wrong arrays, those that hold anything, and no floats."""
    return tuple(v for v in ARRAY if getattr(v, "dtype", None) != np.float32)


def core_trials() -> Iterator[Trial]:
    """Attention, the loop, and the scorer."""
    q = jax.numpy.zeros((1, 6, 2, 8), "float32")
    wrong = {name: (*ARRAY, q[0], q[:, :, :1], q.astype("int32")) for name in ("q", "k", "v")}
    wrong |= {
        "indices": (*ARRAY, np.array([[6]]), np.array([[-1]]), np.array([[0.5]])),
        "count": (*ARRAY, np.array([0.5]), np.array([[1]])),
        "scale": NUMBER,
        "implementation": (*WORD, "triton"),
    }
    but = dict.fromkeys(("indices", "count", "scale", "implementation"), (None,))
    right = {"q": q, "k": q, "v": q}
    yield from by_name("query_sparse_attention", query_sparse_attention, right, wrong, but)
    latents, context = helpers.small_inputs()
    right = {
        "model": helpers.small_model(), "latents": latents, "conditions": context,
        "solver": solvers.euler(4), "guidance": 3.0, "method": Astraea(),
    }  # fmt: skip
    wrong = {
        "model": (*WORD, type(right["model"])),
        "latents": (*ARRAY, latents[0], latents[..., :1], latents[:, :, :3]),
        "conditions": (*ARRAY, context[0], context[..., :1], context[:1]),
        "solver": (*WORD, *LIST, 4),
        "method": (*WORD, Astraea, 3),
        "guidance": (*NUMBER, np.zeros(2)),
        "key": (*ARRAY, 0, np.uint32(0)),
    }
    one_run = {
        "schedule": (*LIST, (10, 0), (0, 0, 0, 0), (10, 0, 0, 11), "text", 10, 0.5),
        "driver": WORD,
        "progress": (3, "text", [1]),
        "trace": FLAG,
    }
    run = denoise.denoise
    yield from by_name("denoise", run, right, wrong | one_run, NONE)
    wrong |= {
        "dense_start": (*WHOLE, 0, 5), "plan": WORD, "lanes": (*WHOLE, 0),
        "batch": (*WHOLE, 0),
    }  # fmt: skip
    but = {**NONE, **dict.fromkeys(("plan", "batch"), (None,)), "method": ()}
    yield from by_name("Scorer", Scorer, right, wrong, but)


def space_trials() -> Iterator[Trial]:
    """Spaces of schedules."""
    space = Space.for_budget(4, 0.5)
    levels = (*LIST, (3, 2, 1), (0, 5), (10,), (0, 11))
    yield from dataclass_trials(space, {"low": (-1,)})
    wrong = {"steps": STEPS, "budget": (*NUMBER, 0, 1.1), "choices": levels, "dense_start": STEPS}
    right = {"steps": 4, "budget": 0.5}
    bands = (*LIST, (2, 1), (0, 1), (-1, 1), (1,), (1, 2, 3))
    yield from by_name("Space.for_budget", Space.for_budget, right, wrong | {"band": bands})
    right = {"steps": 4, "costs": (0.0, 1.0), "limit": 2.0, "choices": (0, 10)}
    wrong = {"steps": STEPS, "costs": levels, "limit": (*NUMBER, 0), "band": (*NUMBER, 0, 2)}
    but = {"costs": ((10,),)}
    yield from by_name("Space.for_costs", Space.for_costs, right, wrong, but)
    yield from trials("check_band", check_band, bands)
    yield from trials("Space.genes", space.genes, (*LIST, Schedule.dense(3), Schedule.dense(4)))


def search_trials(special: dict[str, pathlib.Path]) -> Iterator[Trial]:
    """Searches, and what needs none."""
    space = Space.for_budget(4, 0.5)
    yield from dataclass_trials(SearchConfig())
    yield from by_name(
        "step_patterns",
        step_patterns,
        {"steps": 4, "computed": 2},
        {"steps": STEPS, "computed": STEPS},
    )
    score = lambda rows: np.zeros((len(rows), 1))  # noqa: E731
    fitness = lambda rows: np.zeros(len(rows))  # noqa: E731
    right = {"fitness": fitness, "steps": 4, "levels": (0,)}
    wrong = {"steps": STEPS, "levels": (*LIST, (11,)), "dense_start": STEPS}
    yield from by_name("level_sensitivity", sensitivity.level_sensitivity, right, wrong)
    damages = (*ARRAY, np.full((4, 11), np.nan), np.zeros((3, 11)))
    yield from trials("allocate", lambda v: sensitivity.allocate(space, v), damages)
    right = {"space": space, "fitness": fitness, "first": Schedule((10, 4, 4, 2)), "evaluations": 4}
    wrong = {
        "first": (*LIST, Schedule.dense(4)), "evaluations": (*WHOLE, 0), "seed": WHOLE,
        "batch": (*WHOLE, 0),
    }  # fmt: skip
    yield from by_name("refine", sensitivity.refine, right, wrong)
    wrong = {
        "parts": ((), []), "reduce": WORD, "patience": (*NUMBER, 0.5), "keep": (*WHOLE, 0),
        "batch": (*WHOLE, 0),
    }  # fmt: skip
    right = {"parts": (score, score)}
    yield from by_name("Evaluator", Evaluator, right, wrong, {"patience": (None,)})

    def journal(folder: Any = "made", header: Any = types.MappingProxyType({}), **numbers: Any):
        with journals.open_journal(folder, dict(header) if header == {} else header, **numbers):
            pass

    wrong = {
        "folder": (3, None, b"x", "a\0b"), "header": (3, None, "text", [1], {"a": object()}),
        "steps": (*WHOLE, 0), "prompts": (*WHOLE, 0),
    }  # fmt: skip
    but = dict.fromkeys(("steps", "prompts"), (None,))
    yield from by_name("open_journal", journal, {}, wrong, but)
    right = {
        "space": space, "config": SearchConfig(4, 2, 1), "evaluator": Evaluator((score,)),
        "key": jax.random.key(0),
    }  # fmt: skip
    wrong = {
        "space": WORD, "config": WORD, "states": (3, b"x", special["fifo"], special["loop"]),
        "given": (3, "text", (None,), ("a",), ((10, 0, 0, 10),), object),
    }  # fmt: skip
    yield from by_name("evolve", study.evolve, right, wrong)
    places = (*NAME, "", "a.txt", *(special[place] for place in UNWRITTEN))
    yield from trials("plots.pareto", lambda v: plots.pareto(v, [], {}, cost="tokens"), places)
    yield from trials("plots.sensitivity", lambda v: plots.sensitivity(v, {}), places)
