"""Finding a schedule: by evolution, or from sensitivities. The fitness is an argument."""

from astraea_jax.search.evolution import SearchConfig as SearchConfig
from astraea_jax.search.evolution import SearchState as SearchState
from astraea_jax.search.scoring import Evaluator as Evaluator
from astraea_jax.search.space import Space as Space
