"""Training of Wan's parts; `fine_tune` is the front door. Not imported by `astraea_ports.wan`."""

from astraea_ports.training.clips import Examples as Examples
from astraea_ports.training.clips import Source as Source
from astraea_ports.training.recipe import Recipe as Recipe
from astraea_ports.wan.training.fine_tuning import FineTuned as FineTuned
from astraea_ports.wan.training.fine_tuning import fine_tune as fine_tune
from astraea_ports.wan.training.measures import HeldOut as HeldOut
from astraea_ports.wan.training.measures import held_out_loss as held_out_loss
from astraea_ports.wan.training.settings import gentle as gentle
from astraea_ports.wan.training.transformer import PoolPlan as PoolPlan
from astraea_ports.wan.training.transformer import Sheet as Sheet
