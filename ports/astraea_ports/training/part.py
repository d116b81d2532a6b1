"""What the trainings of a model's parts share: devices, where they start, what they leave."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from astraea_jax import report
from astraea_jax.checks import Refusal
from astraea_ports import checkpoints
from astraea_ports.checkpoints import Entry, export


class PartTraining:
    """The common half of a `training.run.Trainee` for parts of a model in the Diffusers layout."""

    period = 1

    def __init__(
        self,
        model: str | pathlib.Path,
        recipe: Any,
        batch: int,
        *,
        revision: str | None = None,
    ):
        """Finds the model's folder, and the devices that share a batch.

        Args:
          model: folder to start from, "tiny", or a hub id.
          recipe: a frozen dataclass with a field `steps`.
          batch: clips a step.
          revision: of a hub id: a branch, a tag or a commit.

        Raises:
          Refusal: no such model, or a batch that the devices can't share.
        """
        devices = jax.devices()
        if batch % len(devices):
            raise Refusal(
                f"the batch must be a multiple of {len(devices)}, the devices that share it; got "
                f"{batch}"
            )
        self.recipe, self.batch = recipe, batch
        self.mesh = Mesh(np.array(devices), ("batch",))
        self.copied = NamedSharding(self.mesh, PartitionSpec())
        self.folder = checkpoints.model_folder(model, revision=revision)
        self.about: dict[str, Any] = {}

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.recipe.steps

    @property
    def settings(self) -> Mapping[str, Any]:
        """All that decides the result."""
        return {**self.about, "recipe": dataclasses.asdict(self.recipe)}

    def upkeep(self) -> float:
        """Seconds a step that renewing the data takes: none, where each step draws its own."""
        return 0.0

    def check_source(self, parts: Mapping[str, tuple[Any, Sequence[Entry]]]) -> None:
        """Refuses a model whose parts could be read but not written as they are.

        Hours of training would otherwise end in that.
        """
        for name, (module, table) in parts.items():
            export.match_source(module, self.folder / name, table)

    def on_one(self, tree: Any) -> Any:
        """Arrays on the first device alone."""
        return jax.device_put(tree, self.mesh.devices.flat[0])

    def leave(
        self, folder: pathlib.Path, step: int, parts: Mapping[str, tuple[Any, Sequence[Entry]]]
    ) -> None:
        """Writes a model: trained parts in bfloat16, the others as they were, and how far it came.

        Schedules are not taken along: they were searched for other weights.
        """
        for name, (module, table) in parts.items():
            weights = jax.device_get(module)
            export.save_parameters(weights, self.folder / name, folder / name, table)
        export.copy_model(self.folder, folder, but=tuple(parts), without=("schedules",))
        report.write_json(folder / "training.json", {"step": step, **self.settings})


def fingerprint(networks: Any) -> str:
    """A short name of weights: other weights have another."""
    total = sum(float(jnp.sum(jnp.abs(x.astype(jnp.float32)))) for x in jax.tree.leaves(networks))
    return f"{total:.6e}"
