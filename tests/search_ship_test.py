"""What of a search study ships."""

import sys

import pytest
import studies

from astraea_jax.search.recipe import recipes_in
from astraea_ports import tiny

chosen = studies.study("search_ship").chosen
read_rows = studies.study("search_study").read_rows

JUDGED = {"solver": "euler", "budget": 0.5, "psnr": 40.0, "ssim": 0.99}
WHOLE = {"what": "step-level EA", "method": "step-level", "levels": [10, 10, 0, 0]}
BEST = {**JUDGED, **WHOLE, "fitness": 0.2, "validation": 0.3}
OF_ALL = {**BEST, "what": "EA", "method": "astraea-corrected", "levels": [10, 0, 10, 0]}


def test_the_least_error_on_validation_prompts_ships():
    worse = {**BEST, "fitness": 0.1, "validation": 0.4, "psnr": 50.0}
    by_hand = {**JUDGED, **WHOLE, "what": "hand-made: 2 dense, then early", "psnr": 60.0}
    unseen = {**BEST, "fitness": 0.01}
    del unseen["validation"]
    unjudged = {**BEST, "validation": 0.01}
    del unjudged["psnr"]
    for rows in ([worse, BEST, by_hand, unseen, unjudged], [unjudged, unseen, by_hand, BEST]):
        assert chosen(rows) == {("euler", 0.5): BEST}
    assert chosen([by_hand, unseen]) == {("euler", 0.5): unseen}
    other = {**BEST, "solver": "unipc"}
    assert chosen([other, BEST]) == {("euler", 0.5): BEST, ("unipc", 0.5): other}


def test_whole_steps_that_a_search_of_all_levels_ends_at_ship_as_whole_steps():
    better = {**OF_ALL, "validation": 0.2}
    assert chosen([BEST, better]) == {("euler", 0.5): {**better, "method": "step-level-corrected"}}
    assert chosen([BEST, {**better, "levels": [10, 5, 5, 0]}]) == {("euler", 0.5): BEST}
    assert chosen([BEST, {**better, "method": "astraea"}]) == {("euler", 0.5): BEST}


def test_of_another_models_schedules_the_best_on_held_out_prompts_ships():
    rows = [{**JUDGED, **WHOLE, "what": f"transfer: {psnr}", "psnr": psnr} for psnr in (41.0, 42.0)]
    assert chosen(rows) == {("euler", 0.5): rows[1]}


def test_what_the_small_wan_carries_is_what_its_study_chose():
    found = chosen(read_rows(studies.FOLDER / "search.json"))
    carried = {
        (each.solver, each.schedule.budget): (each.method, [*each.schedule.levels])
        for each in recipes_in(tiny.FOLDER / "schedules")
    }
    assert carried == {key: (row["method"], row["levels"]) for key, row in found.items()}


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
