"""The search: its space, its genetic operators, and what is found without them."""

import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import studies

from astraea_jax.schedule import Schedule
from astraea_jax.search import evolution, sensitivity, study
from astraea_jax.search import journal as journals
from astraea_jax.search.evolution import SearchConfig
from astraea_jax.search.patterns import step_patterns
from astraea_jax.search.scoring import Evaluation, Evaluator
from astraea_jax.search.space import ALL_LEVELS, WHOLE_STEPS, Space

Searches = studies.study("search_runs").Searches
Options = studies.study("search_study").Options
Study = studies.study("search_study").Study

WEIGHTS = np.random.default_rng(5).uniform(0.2, 3.0, 30)


def separable(levels):
    """Damage of each step on its own: what dynamic programming is exact for."""
    left_out = 1 - np.asarray(levels) / 10
    return (WEIGHTS[: levels.shape[1]] * left_out**2).sum(axis=1)


def two_prompts(levels):
    return np.stack([separable(levels), 2 * separable(levels)], axis=1)


def test_space_of_an_exact_budget_and_of_the_papers_band():
    exact = Space.for_budget(30, 0.3)
    assert (exact.low, exact.high) == (90, 90)
    band = Space.for_budget(30, 0.5, band=(0.9, 1.1))
    assert (band.low, band.high) == (135, 165)
    schedule = Schedule.uniform(30, 0.3)
    assert exact.schedule(exact.genes(schedule)) == schedule


@pytest.mark.slow
def test_space_in_seconds_spends_most_of_the_limit_and_never_more():
    seconds = [0.0, 0.1, 0.09, 0.3]  # noise made a level look cheaper than the one below
    space = Space.for_costs(6, seconds, 1.2, choices=(0, 2, 5, 10))
    state = evolution.start(space, SearchConfig(8, 4), jax.random.key(0))
    genes = evolution.initial_population(space, SearchConfig(8, 4), jax.random.key(0))
    assert state.genes.shape == (4, 6) and space.holds(genes).all()
    total = np.maximum.accumulate(seconds)[genes].sum(axis=1)
    assert (total <= 1.2 * 1.001).all() and (total >= 0.9 * 1.2 * 0.999).all()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Space.for_budget(30, 0.0), "budget must be"),
        (lambda: Space.for_budget(30, 1.5), "budget must be"),
        (lambda: Space.for_budget(30, 0.35, choices=WHOLE_STEPS), r"0\.3333 and 0\.3667"),
        (lambda: Space.for_budget(30, 0.02), r"0\.03333"),
        (lambda: Space.for_budget(30, 0.5, band=(1.1, 0.9)), "band"),
        (lambda: Space.for_budget(30, 0.5, choices=(0, 5)), "choices"),
        (lambda: Space.for_budget(30, 0.5, dense_start=31), "dense_start"),
        (lambda: Space.for_costs(30, [0.0, 1.0], float("nan"), choices=WHOLE_STEPS), "limit"),
        (lambda: SearchConfig(population=1, parents=1), "population of at least 2"),
        (lambda: SearchConfig(p0=0.1, p_final=0.2), "p_final"),
        (lambda: SearchConfig(replacement="none"), "replacement"),
        (lambda: Space.for_budget(5, 0.5).genes(Schedule.dense(5)), "cost in 25..25"),
        (lambda: step_patterns(30, 0), "computed"),
    ],
)
def test_what_cannot_be_is_refused(as_a_user, make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.slow
def test_invariants_over_a_hundred_thousand_children(fully_optimised):
    config = SearchConfig(population=2000, parents=10, p0=0.1, p_final=0.1)
    spaces = [
        Space.for_budget(30, 0.5),
        Space.for_budget(30, 0.5, band=(0.9, 1.1), dense_start=4),
        Space.for_budget(30, 0.4, choices=WHOLE_STEPS),
    ]
    rng = np.random.default_rng(0)
    seen = 0
    for space, rounds in zip(spaces, (24, 14, 12), strict=True):
        top = len(space.choices) - 1
        pools = [np.zeros((10, 30)), np.full((10, 30), top), rng.integers(0, top + 1, (10, 30))]
        state = evolution.start(space, config, jax.random.key(1))
        for index in range(rounds):
            # Parents that no search would hold, so that repair has all of the work.
            pool = pools[index % 3].astype(np.int8)
            state = state._replace(genes=jnp.asarray(pool), fitness=jnp.zeros(10))
            children, state = evolution.next_children(space, config, state)
            assert len(children) == 2000
            assert len(np.unique(children, axis=0)) == len(children)
            assert space.holds(children).all()
            assert (children[:, : space.dense_start] == top).all()
            seen += len(children)
    assert seen == 100_000


@pytest.mark.slow
def test_the_same_key_gives_the_same_search_and_another_another():
    space, config = Space.for_budget(12, 0.5), SearchConfig(12, 4, 4)
    found = [search(space, config, seed) for seed in (0, 0, 1)]
    assert np.array_equal(found[0].genes, found[1].genes)
    assert not np.array_equal(found[0].genes, found[2].genes)


def search(space, config, seed, fitness=separable):
    key = jax.random.key(seed)
    state = evolution.start(space, config, key)
    genes = evolution.initial_population(space, config, key)
    state = evolution.survive(config, state, genes, fitness(space.levels(genes)))
    for _ in range(config.generations):
        genes, state = evolution.next_children(space, config, state)
        state = evolution.survive(config, state, genes, fitness(space.levels(genes)))
    return state


@pytest.mark.slow
@pytest.mark.parametrize("replacement", ["plus", "generational"])
def test_evolution_comes_near_the_optimum_of_a_separable_damage(replacement):
    space = Space.for_budget(20, 0.5)
    config = SearchConfig(50, 10, 30, replacement=replacement)
    state = search(space, config, 0)
    damage = WEIGHTS[:20, None] * (1 - np.arange(11) / 10) ** 2
    optimum = separable(np.array([sensitivity.allocate(space, damage).levels]))[0]
    uniform = separable(np.array([Schedule.uniform(20, 0.5).levels]))[0]
    assert optimum <= state.best_fitness + 1e-6
    assert state.best_fitness < optimum + 0.25 * (uniform - optimum)
    assert int(state.generation) == 30


@pytest.mark.slow
def test_crossover_and_mutation_do_what_they_say():
    keys = jax.random.split(jax.random.key(0), 200)
    first, second = jnp.zeros(20, jnp.int8), jnp.ones(20, jnp.int8)
    uniform = np.asarray(
        jax.vmap(lambda key: evolution.uniform_crossover(key, first, second))(keys)
    )
    assert 0.45 < uniform.mean() < 0.55
    block = np.asarray(jax.vmap(lambda key: evolution.block_crossover(key, first, second))(keys))
    # One run of zeros at most: ones, zeros, ones.
    assert (np.abs(np.diff(block, axis=1)).sum(axis=1) <= 2).all() and 0 < block.mean() < 1
    config = SearchConfig(generations=10, p0=0.4, p_final=0.2)
    assert np.isclose(config.mutation(0), 0.4) and np.isclose(config.mutation(10), 0.2)
    space = Space.for_budget(20, 0.5)
    changed = jax.vmap(lambda key: evolution.mutate(space, key, second, jnp.float32(0.5)))(keys)
    share = (np.asarray(changed) != 1).mean(axis=0)
    assert share[0] == 0 and np.abs(share[1:] - 0.5 * 10 / 11).max() < 0.15


@pytest.mark.slow
def test_the_first_population_holds_what_is_given_and_step_patterns():
    space = Space.for_budget(30, 0.4)
    given = Schedule.for_budget(30, 0.4, whole_steps=True)
    config = SearchConfig(50, 10)
    genes = evolution.initial_population(space, config, jax.random.key(0), (given,))
    assert space.schedule(genes[0]) == given
    whole = np.isin(space.levels(genes), WHOLE_STEPS).all(axis=1)
    assert whole.sum() > 10 and (~whole).sum() > 10
    assert len(np.unique(genes, axis=0)) == len(genes) == 50


def test_patterns_have_the_steps_they_are_asked_for_and_end_with_none_alike():
    patterns = step_patterns(30, 12)
    assert all(schedule.budget == 0.4 for schedule in patterns.values())
    assert len(set(patterns.values())) == len(patterns)
    assert patterns["6 dense, then early"].levels[6:10] == (10, 0, 0, 0)
    assert patterns["6 dense, then late"].levels[6:10] == (0, 0, 0, 10)


def test_a_small_space_is_searched_to_its_end():
    space = Space.for_budget(4, 0.5, choices=WHOLE_STEPS)  # three schedules
    genes = evolution.initial_population(space, SearchConfig(8, 2), jax.random.key(0))
    assert len(genes) == 3
    with pytest.raises(ValueError, match="nothing to search"):
        small = Space.for_budget(4, 1.0)
        evolution.initial_population(small, SearchConfig(8, 2), jax.random.key(0))


def test_allocation_is_the_best_of_all_schedules():
    space = Space.for_budget(5, 0.52, choices=(0, 3, 7, 10))
    rng = np.random.default_rng(1)
    damage = rng.uniform(size=(5, 4))
    rows = np.array(list(itertools.product(range(4), repeat=5)), np.int8)
    rows = rows[space.holds(rows)]
    least = damage[np.arange(5), rows].sum(axis=1).min()
    found = space.genes(sensitivity.allocate(space, damage))
    assert np.isclose(damage[np.arange(5), found].sum(), least)


def test_sensitivities_and_what_lies_between_measured_levels():
    damage = sensitivity.level_sensitivity(separable, 8, (0, 5))
    assert np.allclose(damage[1:, 0], WEIGHTS[1:8]) and np.allclose(damage[0], 0)
    between = sensitivity.interpolated(damage, (0, 5), ALL_LEVELS)
    assert np.allclose(between[1:], WEIGHTS[1:8, None] * (1 - np.arange(11) / 10) ** 2)
    assert np.allclose(sensitivity.step_sensitivity(separable, 8)[1:], WEIGHTS[1:8])


def test_swaps_mend_a_schedule_within_their_evaluations():
    space = Space.for_budget(12, 0.5, choices=WHOLE_STEPS)
    first = Schedule.skipping(12, 0.5)
    best, spent = sensitivity.refine(space, separable, first, 60, batch=16)
    assert best.budget == 0.5 and spent <= 60
    value = separable(np.array([best.levels]))[0]
    assert value < separable(np.array([first.levels]))[0]
    everything, spent = sensitivity.refine(space, separable, first, 10_000)
    damage = np.stack([WEIGHTS[:12], np.zeros(12)], axis=1)
    assert everything == sensitivity.allocate(space, damage) and spent < 10_000


def test_each_schedule_is_scored_once():
    calls, records = [], []

    def score(levels):
        calls.append(len(levels))
        return two_prompts(levels)

    rows = np.array([[10, 0, 10], [10, 5, 5], [10, 0, 10]], np.int8)
    evaluator = Evaluator([score], batch=1, record=records.append)
    fitness = evaluator(rows)
    assert fitness[0] == fitness[2] and calls == [1, 1] and len(records) == 2
    assert np.allclose(fitness, 1.5 * separable(rows))
    assert np.allclose(evaluator(rows), fitness) and calls == [1, 1]
    log = Evaluator([score], reduce="log")
    assert np.allclose(log(rows), np.sqrt(2) * separable(rows))


def test_hopeless_schedules_stop_after_the_first_prompt():
    second = []

    def later(levels):
        second.append(len(levels))
        return two_prompts(levels)[:, 1:]

    parts = [lambda levels: two_prompts(levels)[:, :1], later]
    evaluator = Evaluator(parts, patience=1.2, keep=2, batch=4)
    good = np.array([[10, 5, 5, 5], [10, 6, 5, 4], [10, 5, 6, 4]], np.int8)
    uneven = np.array([[10, *each] for each in itertools.permutations((10, 5, 0))], np.int8)
    worst = uneven[[separable(uneven).argmax()]]
    bad = np.concatenate([worst, [[10, 6, 4, 5]]]).astype(np.int8)
    evaluator(good)
    fitness = evaluator(bad)
    assert np.isinf(fitness[0]) and np.isfinite(fitness[1]) and second == [3, 1]
    stopped = evaluator.known[tuple(bad[0].tolist())]
    assert stopped.stopped and len(stopped.errors) == 1
    # What another search has found ends nothing here.
    others = {tuple(row): evaluator.known[tuple(row)] for row in good.tolist()}
    alone = Evaluator(parts, patience=1.2, keep=2, known=others)
    assert np.isfinite(alone(bad)).all() and second == [3, 1, 2]


class FewSteps(Study):
    """A study of six steps whose errors are those of `two_prompts`, without a model."""

    def __init__(self):
        self.rows, self.chosen = [], [0, 1]
        self.searched = [lambda x: two_prompts(x)[:, :1], lambda x: two_prompts(x)[:, 1:]]
        self.options = Options(
            6, (0.5,), ("euler",), search_prompts=2, pool=48, seeds=1, look=1, heldout_prompts=2,
            population=8, generations=1, swaps=6, patience=1.2, finalists=4, rows=8,
            size=(5, 32, 32),
        )  # fmt: skip

    def check_time(self):
        pass

    def say(self, words):
        pass

    def scorers(self, method, solver, *, validation=False):
        return self.searched


def test_swaps_are_not_ended_by_what_another_search_has_found(tmp_path):
    with journals.open_journal(tmp_path / "study", {"of": "a test"}) as journal:
        searches = Searches(FewSteps(), journal, "step-level", "euler")
        # Cheaper ones, of no error: next to them every schedule is hopeless.
        for place in range(1, 6):
            levels = tuple(10 * (step in (0, place)) for step in range(6))
            searches.evaluator.known[levels] = Evaluation(levels, (1e-9, 1e-9), 0.1)
        found = {row["what"]: row for row in searches.without_search([0.5], (0, 10), (0,))}
    tried = [each for each in searches.evaluator.known.values() if sum(each.levels) == 30]
    assert len(tried) > 3 and sum(not each.stopped for each in tried) >= 2
    assert np.isfinite(found["DP + swaps"]["fitness"])


@pytest.mark.slow
def test_a_dearer_schedule_is_no_rival():
    parts = [lambda levels: two_prompts(levels)[:, :1], lambda levels: two_prompts(levels)[:, 1:]]
    evaluator = Evaluator(parts, patience=1.0, keep=2)
    evaluator(np.array([[10, 10, 9, 9], [10, 10, 10, 9], [10, 10, 10, 8]], np.int8))
    # What was scored at a larger budget is far better, and must not empty a later search.
    space = Space.for_budget(4, 0.5)
    state = study.evolve(space, SearchConfig(6, 2, 1), evaluator, jax.random.key(0))
    assert state.best.budget == 0.5 and np.isfinite(state.fitness)


def test_nan_is_discarded_and_all_nan_stops_with_a_reason():
    def score(levels):
        values = two_prompts(levels)
        values[levels[:, 1] == 0] = np.nan
        return values

    evaluator = Evaluator([score])
    fitness = evaluator(np.array([[10, 0, 10], [10, 10, 0]], np.int8))
    assert np.isinf(fitness[0]) and np.isfinite(fitness[1]) and evaluator.rejected == 1
    with pytest.raises(ValueError, match="NaN or infinite"):
        Evaluator([score])(np.array([[10, 0, 10]], np.int8))


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
