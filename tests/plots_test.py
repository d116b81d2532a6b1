"""Pictures: what is drawn is text, and the user's backend stays."""

import sys

import matplotlib
import numpy as np
import pytest

from astraea_jax.search import plots
from astraea_ports.training.losses import draw_losses

NAMES = [
    r"$\frac{1}{$",
    "$",
    "a $5 toy and a $6 toy_{",
    "_hidden",
    "two\nlines",
    "x" * 10_000,
    "赤い円",
]


@pytest.mark.parametrize("suffix", plots.SUFFIXES)
def test_names_are_drawn_as_they_stand(tmp_path, recwarn, suffix):
    errors = {name: [0.0, 0.1, float("inf"), float("nan")] for name in NAMES}
    plots.sensitivity(tmp_path / f"a{suffix}", errors)
    marked = dict.fromkeys(NAMES, (0.5, 0.1))
    plots.pareto(
        tmp_path / f"b{suffix}", [(0.5, 0.1), (0.4, float("inf"))], marked, cost="$\\frac$"
    )
    assert all((tmp_path / f"{name}{suffix}").stat().st_size > 1000 for name in "ab")
    assert not len(recwarn)


def test_every_name_has_its_place_in_the_legend(tmp_path):
    plots.sensitivity(tmp_path / "a.svg", {"_hidden": [0.0, 0.1], "seen": [0.0, 0.1]})
    drawn = (tmp_path / "a.svg").read_text()
    assert "_hidden" in drawn and "seen" in drawn


def test_a_notebooks_backend_stays(tmp_path, monkeypatch):
    def changed(*_, **__):
        raise AssertionError("the backend is the user's")

    monkeypatch.setattr(matplotlib, "use", changed)
    draw_losses(tmp_path / "loss.png", np.array([1.0, 0.5, np.nan]))
    assert (tmp_path / "loss.png").stat().st_size > 1000


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
