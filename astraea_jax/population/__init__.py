"""Many schedules denoised in one program, at the sum of their costs."""

from astraea_jax.population.lanes import Plan as Plan
from astraea_jax.population.scorer import Scorer as Scorer
