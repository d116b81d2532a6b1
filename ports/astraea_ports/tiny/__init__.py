"""The small trained Wan 2.1 that ships: an ordinary Diffusers folder, 22 MB.

33 frames of 128 x 128 of coloured shapes that move over a background. Nothing in the library asks
whether a model is this one.
"""

from pathlib import Path

from astraea_jax import checks, files

FOLDER = Path(__file__).parent
"""The Diffusers folder."""


def captions() -> tuple[str, ...]:
    """Fixed captions of the kind that the model was trained on, one for each seed 0, 1, ...

    Drawn from the training distribution's grammar by seed, in order, none left out.

    Raises:
      Refusal: the file that holds them is broken.
    """
    path = FOLDER / "captions.json"
    content = files.read_json(path, what="list of captions")
    problem = checks.ListOf(checks.Text(), 1, 10_000).problem(content)
    checks.refuse(str(path), [] if problem is None else [problem], "install the package again")
    return tuple(content)
