"""Pipelined Backpropagation: asynchronous, fine-grained, batch size one."""

from recoup.pipeline import analysis, norms
from recoup.pipeline.batched import Batched, Run
from recoup.pipeline.delayed import Delayed, DelayedSGD
from recoup.pipeline.mitigation import Mitigation
from recoup.pipeline.optimizers import SGDM, AdamW, NAdamW, Nesterov
from recoup.pipeline.scaling import scale_hyperparameters, scheduled
from recoup.pipeline.schedule import activations, constant_delays, delays, gantt, utilisation, weight_versions
from recoup.pipeline.simulator import Simulator
from recoup.pipeline.stages import automatic
from recoup.pipeline.timing import stage_times
from recoup.pipeline.traced import Chain, chain
from recoup.pipeline.wallclock import Times, balance

__all__ = [
    "SGDM",
    "AdamW",
    "Batched",
    "Chain",
    "Delayed",
    "DelayedSGD",
    "Mitigation",
    "NAdamW",
    "Nesterov",
    "Run",
    "Simulator",
    "Times",
    "activations",
    "analysis",
    "automatic",
    "balance",
    "chain",
    "constant_delays",
    "delays",
    "gantt",
    "norms",
    "scale_hyperparameters",
    "scheduled",
    "stage_times",
    "utilisation",
    "weight_versions",
]
