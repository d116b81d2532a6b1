"""A transformer and its text encoder as something that `training.run` trains."""

import concurrent.futures
import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from astraea_jax import metrics, video
from astraea_jax.checks import ListOf, Text
from astraea_jax.schedule import check_steps
from astraea_ports.checkpoints import Entry
from astraea_ports.text import t5
from astraea_ports.training.clips import Source
from astraea_ports.training.part import PartTraining, fingerprint
from astraea_ports.training.pool import LatentPool, check_plan
from astraea_ports.training.recipe import Recipe, check_fields
from astraea_ports.wan import transformer_weights
from astraea_ports.wan.pipeline import Pipeline
from astraea_ports.wan.training.forward import Layout, kept_bytes
from astraea_ports.wan.training.networks import Networks
from astraea_ports.wan.training.step import (
    EmptyText,
    State,
    first_state,
    num_tokens,
    step_flops,
    train_step,
)
from astraea_ports.wan.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class PoolPlan:
    """How many clips lie ready on the device.

    Attributes:
      size: clips.
      block: clips that are encoded at once.
      refresh_every: steps from one replaced block to the next; 0 for never.
    """

    size: int = 32768
    block: int = 32
    refresh_every: int = 4

    def __post_init__(self):
        """Refuses what no pool can be."""
        check_plan(self.size, self.block, self.refresh_every)


@dataclasses.dataclass(frozen=True)
class Sheet:
    """What to draw at a checkpoint.

    Attributes:
      prompts: a video each; none for no picture.
      steps: of the solver.
    """

    prompts: tuple[str, ...] = ()
    steps: int = 15

    def __post_init__(self):
        """Refuses what can't be drawn."""
        check_fields(self, {"prompts": ListOf(Text(100_000), 0, 1000)})
        check_steps(self.steps)


class TransformerTraining(PartTraining):
    """A `training.run.Trainee`; any Wan in the Diffusers layout."""

    def __init__(
        self,
        model: str | pathlib.Path,
        source: Source,
        recipe: Recipe,
        *,
        plan: PoolPlan = PoolPlan(),
        sheet: Sheet = Sheet(),
        layout: Layout | None = None,
        from_nothing: bool = False,
        data: Mapping[str, Any] | None = None,
        revision: str | None = None,
    ):
        """Loads the model.

        Args:
          model: folder to start from, "tiny", or a hub id.
          source: of the clips, of the model's frame size.
          recipe: how to train.
          plan: of the pool of latents.
          sheet: what to draw at a checkpoint.
          layout: of the compiled step; None is what suits the device and the clips.
          from_nothing: take the model's sizes, but random weights.
          data: what to write of the source into run.json.
          revision: of a hub id: a branch, a tag or a commit.

        Raises:
          Refusal: no such model, or a batch that the devices can't share.
        """
        super().__init__(model, recipe, recipe.batch, revision=revision)
        self.layout = layout
        self._worker = concurrent.futures.ThreadPoolExecutor(1)
        self._compiled: concurrent.futures.Future | None = None
        self._from_nothing, self._sheet = from_nothing, sheet
        self.pipeline = Pipeline.from_pretrained(self.folder, dtype="float32", staged=False)
        self.check_source(self._written(self.pipeline))
        empty = self.pipeline.tokenizer([""])
        self._empty = EmptyText(jnp.asarray(empty.ids[0]), jnp.asarray(empty.mask[0]))
        self.pool = LatentPool(
            jax.tree.map(lambda x: x.astype(recipe.dtype), self.pipeline.vae),
            self.pipeline.tokenizer,
            source,
            size=plan.size,
            block=plan.block,
            refresh_every=plan.refresh_every,
            mesh=self.mesh,
        )
        self.about = {
            "part": "transformer",
            "transformer": dataclasses.asdict(self.pipeline.transformer.config),
            "text_encoder": dataclasses.asdict(self.pipeline.text_encoder.config),
            "start": "nothing" if from_nothing else fingerprint(self._networks()),
            "pool": dataclasses.asdict(plan),
            "data": dict(data or {}),
        }

    def _networks(self) -> Networks:
        """The weights that the run starts from."""
        transformer, encoder = self.pipeline.transformer, self.pipeline.text_encoder
        if self._from_nothing:
            rngs = nnx.Rngs(self.recipe.seed)
            transformer = Transformer(transformer.config, rngs)
            encoder = t5.T5Encoder(encoder.config, rngs)
        return Networks(transformer, encoder)

    def start(self) -> State:
        """The first state, a copy on every device."""
        return jax.device_put(first_state(self._networks(), self.recipe), self.copied)

    def prepare(self, step: int, say: Callable[[str], None]) -> None:
        """Fills the pool, or replaces a block of it; before the first, the step is compiled."""
        if self._compiled is None:
            self.pool.allocate()
            self._compiled = self._worker.submit(self._compile)
        compiled = self._compiled

        def report(done: int, total: int) -> None:
            # The first block compiles too: both at once. But the step's kernels are chosen by
            # their times, so nothing else may run by then.
            compiled.result()
            if done == total or done * 8 // total > (done - self.pool.block) * 8 // total:
                say(f"clips encoded: {done} of {total}")

        self.pool.bring_to(step, report)

    def upkeep(self) -> float:
        """Seconds a step that replacing the pool's blocks takes."""
        every = self.pool.refresh_every
        return self.pool.refresh_seconds() / every if every else 0.0

    def _compile(self) -> None:
        """Compiles the step that `advance` takes; JAX keeps it."""
        state = jax.eval_shape(lambda: first_state(self._networks(), self.recipe))
        state = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.copied), state
        )
        arrays, static = self._arguments()
        train_step.lower(state, *arrays, **static).compile()

    def advance(self, state: State) -> tuple[State, jax.Array]:
        """One step."""
        arrays, static = self._arguments()
        return train_step(state, *arrays, **static)

    def _arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What a step takes beside the state: arrays, and what is compiled in."""
        if self.layout is None:
            config = self.pipeline.transformer.config
            tokens = num_tokens(config, self.pool.arrays.latents.shape[1:])
            kept = kept_bytes(config, tokens * self.batch // self.mesh.size)
            self.layout = Layout.for_device(self.recipe.dtype, kept)
        # Its length is no part of the program.
        recipe = dataclasses.replace(self.recipe, steps=1)
        arrays = (self.pool.arrays, self._empty, jnp.int32(self.recipe.steps))
        return arrays, {"recipe": recipe, "layout": self.layout, "mesh": self.mesh}

    def flops(self) -> float:
        """Operations of a step's products."""
        networks = Networks(self.pipeline.transformer, self.pipeline.text_encoder)
        shape = self.pool.arrays.latents.shape[1:]
        return step_flops(networks, self.recipe, shape, self.pipeline.tokenizer.length)

    def export(self, state: State, folder: pathlib.Path) -> None:
        """The average weights in bfloat16, the rest of the model as it was, and how far it came."""
        self.leave(folder, int(state.step), self._written(state.average))

    def _written(self, parts: Any) -> Mapping[str, tuple[Any, Sequence[Entry]]]:
        """What is trained, from what holds it by name, and the tables that it is written by."""
        tables = {"transformer": transformer_weights.TABLE, "text_encoder": t5.TABLE}
        return {name: (getattr(parts, name), table) for name, table in tables.items()}

    def sheet(self, state: State) -> np.ndarray | None:
        """Videos of the sheet's prompts with the average weights, seeds 0, 1, ..."""
        if not self._sheet.prompts:
            return None
        # On one device, and in the dtype of training.
        average = self.on_one(jax.tree.map(lambda x: x.astype(self.recipe.dtype), state.average))
        pipeline = dataclasses.replace(self.pipeline, **average._asdict())
        videos = sample(pipeline, self._sheet.prompts, self._sheet.steps)
        return video.contact_sheet(videos, self._sheet.prompts, columns=2)


def sample(pipeline: Pipeline, prompts: Sequence[str], steps: int) -> list[np.ndarray]:
    """A video of each prompt, uint8; the seed is its place."""
    results = [pipeline(text, seed=seed, steps=steps) for seed, text in enumerate(prompts)]
    return [metrics.to_uint8(np.asarray(result.video[0])) for result in results]
