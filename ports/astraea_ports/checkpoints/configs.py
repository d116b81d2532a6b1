"""A model's config, checked by field: what those of every part have in common."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from astraea_jax import checks
from astraea_jax.checks import Rule

WIDEST = 1 << 16
"""Channels of a token or of all heads together: five times the widest transformer in use."""

LAYERS = 200
"""Blocks: twice those of the deepest transformer in use."""

PARAMETERS = 200_000_000_000
"""Numbers of one part: more than any machine holds that runs it."""

LONGEST_TEXT = 4096
"""Tokens of a prompt: the encoder's attention takes the square of them."""

EPSILON = checks.Number(1e-12, 1e-2)
"""What a norm adds to a mean square. Far below, float32 has it as nothing and divides by zero;
above, it is no small part of a token."""

OFF = checks.OneOf((None,))
"""A field of what no part here has; null says so."""


def read(
    values: Any,
    rules: Mapping[str, Rule],
    *,
    name: str,
    required: Collection[str] = (),
    others: bool = False,
    advice: str = "mend the file or fetch it again",
) -> dict[str, Any]:
    """A config's fields, each as its rule says.

    Fields that say nothing are left out: private ones (`_diffusers_version`) that have no rule, and
    those that are not known here and null.

    Args:
      values: what the file holds.
      rules: of the fields that are known.
      name: of the file, for the message.
      required: fields that must be there.
      others: whether fields that are not known may say something; else they are refused, since the
        model may not be what this port makes of it without them.
      advice: what the message proposes.

    Raises:
      Refusal: all that is wrong with it, in one message.
    """
    if isinstance(values, Mapping):
        values = {
            key: value
            for key, value in values.items()
            if key in rules or not (value is None or str(key).startswith("_"))
        }
    return checks.fields(values, rules, name=name, required=required, others=others, advice=advice)


def too_many(parameters: int) -> Sequence[str]:
    """The problem with a part of so many numbers, if it is one; see `checks.refuse`."""
    if parameters <= PARAMETERS:
        return ()
    return (f"its sizes make {parameters:.1e} parameters; at most {PARAMETERS:.0e} are held",)
