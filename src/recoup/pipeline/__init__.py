"""Pipelined Backpropagation: asynchronous, fine-grained, batch size one."""

from recoup.pipeline.mitigation import Mitigation
from recoup.pipeline.scaling import scale_hyperparameters
from recoup.pipeline.schedule import activations, constant_delays, delays, gantt, utilisation
from recoup.pipeline.simulator import Simulator
from recoup.pipeline.stages import automatic

__all__ = [
    "Mitigation",
    "Simulator",
    "activations",
    "automatic",
    "constant_delays",
    "delays",
    "gantt",
    "scale_hyperparameters",
    "utilisation",
]
