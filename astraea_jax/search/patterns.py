"""Hand-made schedules of whole steps: what a search has to beat, and where it starts."""

import itertools

from astraea_jax.schedule import LEVELS, Schedule, check_steps


def step_patterns(steps: int, computed: int) -> dict[str, Schedule]:
    """Schedules of exactly `computed` dense steps, by what they are called.

    A dense start of every length that fits, the rest evenly spread: "early" computes the first
    step of each gap, "late" the last one. The names say the start: "5 dense, then early".

    Args:
      steps: denoising steps.
      computed: steps at level 10, 1..steps.
    """
    check_steps(steps)
    if not 1 <= computed <= steps:
        raise ValueError(f"computed must be in 1..{steps} (the steps); got {computed}")
    patterns: dict[str, Schedule] = {}
    for start in range(1, computed + 1):
        rest, length = computed - start, steps - start
        early = [start + length * index // rest for index in range(rest)]
        marks = [rest * index // max(length, 1) for index in range(length + 1)]
        late = [start + i for i, (a, b) in enumerate(itertools.pairwise(marks)) if b > a]
        for name, tail in ((", then early", early), (", then late", late)):
            schedule = _of(steps, [*range(start), *tail])
            if schedule not in patterns.values():
                patterns[f"{start} dense{name if rest else ''}"] = schedule
    return patterns


def _of(steps: int, computed) -> Schedule:
    chosen = set(computed)
    return Schedule(tuple(LEVELS if index in chosen else 0 for index in range(steps)))
