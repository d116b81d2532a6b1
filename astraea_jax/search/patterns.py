"""Hand-made schedules of whole steps: what a search has to beat, and where it starts."""

from astraea_jax import checks
from astraea_jax.schedule import Schedule, check_steps


def step_patterns(steps: int, computed: int) -> dict[str, Schedule]:
    """Schedules of exactly `computed` dense steps, by what they are called.

    A dense start of every length that fits, the rest evenly spread: "early" computes the first
    step of each gap, "late" the last one. The names say the start: "5 dense, then early".

    Args:
      steps: denoising steps.
      computed: steps at level 10, 1..steps.
    """
    check_steps(steps)
    checks.whole("computed", computed, 1, steps, unit="(the steps)")
    patterns: dict[str, Schedule] = {}
    for start in range(computed, 0, -1):
        for name, early in ((", then early", True), (", then late", False)):
            schedule = Schedule.skipping(steps, computed / steps, dense_steps=start, early=early)
            if schedule not in patterns.values():
                patterns[f"{start} dense{name if start < computed else ''}"] = schedule
    return patterns
