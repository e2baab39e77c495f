"""Pipelined Backpropagation: asynchronous, fine-grained, batch size one."""

from recoup.pipeline import analysis, norms
from recoup.pipeline.batched import Batched, Run
from recoup.pipeline.delayed import DelayedSGD
from recoup.pipeline.mitigation import Mitigation
from recoup.pipeline.scaling import scale_hyperparameters
from recoup.pipeline.schedule import activations, constant_delays, delays, gantt, utilisation, weight_versions
from recoup.pipeline.simulator import Simulator
from recoup.pipeline.stages import automatic

__all__ = [
    "Batched",
    "DelayedSGD",
    "Mitigation",
    "Run",
    "Simulator",
    "activations",
    "analysis",
    "automatic",
    "constant_delays",
    "delays",
    "gantt",
    "norms",
    "scale_hyperparameters",
    "utilisation",
    "weight_versions",
]
