"""The study of qualities: rows, what they are measured against, and going on after a stop."""

import json
import sys

import pytest
import studies

from astraea_jax.checks import Refusal

quality = studies.study("quality")

SMALL = dict(prompts=2, steps=4, budgets=(0.5,), solver=("euler",), only="step-level velocity")


@pytest.mark.slow
def test_a_stopped_run_goes_on_from_its_file(tmp_path, monkeypatch):
    whole, part, rest = (tmp_path / f"{name}.json" for name in ("whole", "part", "rest"))
    made, compute = {}, quality.Study.videos

    def videos(study, variant, solver):
        asked.append(variant.pattern)
        if variant.pattern not in made:
            made[variant.pattern] = compute(study, variant, solver)
        return made[variant.pattern]

    monkeypatch.setattr(quality.Study, "videos", videos)
    asked: list[str] = []
    quality.command(**SMALL, output=whole)
    assert asked == ["dense", "uniform", "first fifth dense"]
    results = json.loads(whole.read_text())
    assert len({quality.name_of(row) for row in results["rows"]}) == len(results["rows"]) == 2
    for row in results["rows"]:
        assert row["cost"] == 0.5 and len(row["psnr_each"]) == 2
        assert 10 < row["psnr_worst"] <= row["psnr"] and 0 < row["ssim"] < 1
    # As if it had been stopped after the first row: the second is measured, and comes out the same.
    part.write_text(json.dumps({**results, "rows": results["rows"][:1]}))
    go_on = dict(SMALL, known=part)
    asked.clear()
    quality.command(**go_on, output=rest)
    assert asked == ["dense", "first fifth dense"]
    assert json.loads(rest.read_text())["rows"] == results["rows"][1:]
    with pytest.raises(Refusal, match="are one file"):
        quality.command(**go_on, output=part)
    with pytest.raises(Refusal, match="expected rows of"):
        quality.command(**dict(go_on, steps=6), output=rest)
    part.write_text("no JSON")
    with pytest.raises(Refusal, match="a file of quality"):
        quality.command(**go_on, output=rest)
    assert json.loads(rest.read_text())["rows"] == results["rows"][1:]
    with pytest.raises(Refusal, match="holds all of them"):
        quality.command(**SMALL, known=whole, output=rest)


def test_a_row_read_back_has_the_name_of_the_one_measured():
    row = {"method": "dense", "solver": "euler", "pattern": "fewer steps", "cost": 19 / 27}
    rounded = {**row, "cost": float(f"{row['cost']:.8g}"), "psnr": 30.0}
    assert quality.name_of(rounded) == quality.name_of(row)
    assert quality.name_of({**row, "cost": 0.5}) != quality.name_of(row)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
