"""Prompts to videos with any model of the ports: a call's plan, its stages, its parts."""

from astraea_ports.pipeline.parts import Defaults as Defaults
from astraea_ports.pipeline.parts import Parts as Parts
from astraea_ports.pipeline.pipeline import Pipeline as Pipeline
from astraea_ports.pipeline.plan import Options as Options
from astraea_ports.pipeline.plan import Plan as Plan
from astraea_ports.pipeline.stages import Made as Made
from astraea_ports.pipeline.stages import Progress as Progress
from astraea_ports.pipeline.stages import Result as Result
from astraea_ports.pipeline.stages import Stage as Stage
