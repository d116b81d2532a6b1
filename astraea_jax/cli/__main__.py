"""`python -m astraea_jax.cli`."""

import sys

from astraea_jax.cli import main

sys.exit(main())
