"""The small trained Wan 2.1 that ships: an ordinary Diffusers folder, 22 MB.

33 frames of 128 x 128 of coloured shapes that move over a background. Nothing in the library asks
whether a model is this one.
"""

import json
from pathlib import Path

FOLDER = Path(__file__).parent
"""The Diffusers folder."""


def captions() -> tuple[str, ...]:
    """Fixed captions of the kind that the model was trained on, one for each seed 0, 1, ...

    Drawn from the training distribution's grammar by seed, in order, none left out.
    """
    return tuple(json.loads((FOLDER / "captions.json").read_text()))
