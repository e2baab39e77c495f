"""The network under measurement: every number starts from the float checkpoint, on one thread."""

import inspect
import math
import re
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from recoup.calibrate import calibrate_
from recoup.emulate import emulate_, restore_
from recoup.errors import RecoupError, RecoupWarning
from recoup.evaluation import Function, evaluate, measure
from recoup.network.batches import call, check_batches, device_of, prepared, split
from recoup.network.copies import copied
from recoup.network.meters import METERS
from recoup.network.modes import evaluating
from recoup.network.replay import Outputs, replaying
from recoup.network.scales import is_calibrated
from recoup.repair import repair_
from recoup.storage.digest import of_batches, of_state, of_text
from recoup.study.layouts import outputs_agree
from recoup.study.machine import cpu_threads
from recoup.tasks.bench import ALONE, Value, Workbench
from recoup.version import __version__
from recoup.wings import wing_of

Assignment = Mapping[str, Any]
"""Layer -> config; others are in float."""
ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # of a function, in its repr


def _codes(layer: nn.Module) -> Any:
    """A layer's activation scale, with the zero of its codes where it has one; an attention's scales; None where it is
    not calibrated."""
    if (scales := getattr(layer, "operand_scales", None)) is not None:
        return tuple(scales)
    scale, zero = getattr(layer, "activation_scale", None), getattr(layer, "activation_zero", None)
    return (scale, zero) if zero else scale


@dataclass
class Bench(Workbench):
    """A network with what it is measured on, which a worker holds and measures many policies with.

    Args:
        model: in float; a copy is taken, so that the user's stays as it is.
        batches: what metrics are measured on; they are passed over once and kept in memory.
        metrics: names of `recoup.network.meters.METERS`, or one callable.
        calibration: what scales and repairs are computed from.
        repair: a plan of `recoup.repair_`.
        scaled: layers that need an activation scale; where one has none, all are calibrated.
        outputs: of layers, kept from one measurement to the next; several benches may share them.
        reference: the float network that relative metrics compare with; None: ``model``.
    """

    purpose: ClassVar[str] = "search"

    model: nn.Module
    batches: Iterable[Any]
    metrics: Sequence[str | Function]
    calibration: Iterable[Any]
    repair: str | Sequence[str] = "default"
    scaled: Sequence[str] = ()
    outputs: Outputs = field(default_factory=Outputs, repr=False)
    reference: nn.Module | None = None
    _floating: list[Tensor] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.model = copied(self.model, "search").eval()
        same = self.calibration is self.batches
        self.batches = laid_out(self.model, kept(self.batches))
        self.calibration = self.batches if same else laid_out(self.model, kept(self.calibration))
        modules = dict(self.model.named_modules())
        if not all(is_calibrated(modules[name]) for name in self.scaled):
            with ALONE, cpu_threads(1):
                calibrate_(self.model, self.calibration, {**dict.fromkeys(self.scaled, True), "re:.*": None})
        self._digest = of_batches(self.batches)
        self._weights = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "outputs": Outputs(self.outputs.most), "_floating": None}

    def identity(self) -> dict[str, Any]:
        """What decides every number but the policy."""
        modules = dict(self.model.named_modules())
        scales = {name: _codes(modules[name]) for name in self.scaled}
        other = {} if self.reference is None else {"reference": of_state(self.reference)}
        return {
            "weights": of_state(self.model),
            "network": built(self.model),
            "scales": of_text(repr(scales)) if scales else None,
            "data": self._digest,
            "calibration": of_batches(self.calibration),
            "layout": _layouts(self.batches),
            "repair": self.repair if isinstance(self.repair, str) else list(self.repair),
            "metrics": [metric if isinstance(metric, str) else _function(metric) for metric in self.metrics],
            "recoup": __version__,
            "torch": torch.__version__,
            **other,
        }

    def make(self, task: Any) -> Value:
        """The numbers of a `recoup.search.records.Task`."""
        return self.measured(task.hardware, task.label)

    def measured(self, assignment: Assignment, label: str) -> Value:
        """A policy's numbers (metric -> value, count, interval, of nats and top1 each sample's; seconds; notes):
        hardware on, repaired, measured, hardware off.

        Raises:
            RecoupError: whatever a step refuses, headed by the policy's ``label``.
        """
        hardware = {name: config for name, config in assignment.items() if config is not None}
        started = time.process_time()
        with ALONE, cpu_threads(1), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                if hardware:
                    emulate_(self.model, None, hardware)
                    self.outputs.begin()
                    with replaying(self.model, self.outputs):
                        repair_(self.model, self.calibration, self.repair)
                value: Value = self._measured()
            except RecoupError as error:
                raise RecoupError(f"policy {label}: {error}") from error
            finally:
                self._reset()
        value["seconds"] = round(time.process_time() - started, 3)
        value["notes"] = _notes(caught)
        return value

    def _measured(self) -> Value:
        named = [metric for metric in self.metrics if isinstance(metric, str)]
        meters = [METERS[name]("search") for name in named]
        if meters:
            relative = any(meter.relative for meter in meters)
            refer = self._refer() if relative else None
            with replaying(self.model, self.outputs, keep=False):
                measure(self.model, self.batches, meters, refer=refer)
        found = {name: meter.result() for name, meter in zip(named, meters, strict=True)}
        for metric in self.metrics:
            if not isinstance(metric, str):
                found[metric_name(metric)] = evaluate(self.model, self.batches, metric)
        for name, one in found.items():
            if not math.isfinite(one.value):
                raise RecoupError(f"metric {name} is {one.value}")
        told: Value = {
            name: {"value": one.value, "count": one.count, "interval": one.interval and list(one.interval)}
            for name, one in found.items()
        }
        for name, meter in zip(named, meters, strict=True):
            told[name] |= meter.kept()  # what another network differs by is known sample by sample
            if "answers" in told[name]:
                told[name]["answers"]["samples"] = self._digest  # known once, and a network may change its inputs
        return told

    def _refer(self) -> Callable[[Any], Tensor]:
        """The float network's outputs, batch after batch; kept from the first pass on."""
        if self._floating is None:
            self._floating = self._in_float()
        outputs = iter(self._floating)
        return lambda _: next(outputs)

    def _in_float(self) -> list[Tensor]:
        bare = copied(self.model if self.reference is None else self.reference, "search")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RecoupWarning)
            restore_(bare)
        if self.reference is None:
            bare.load_state_dict(self._weights)
        with evaluating(bare), torch.no_grad(), replaying(bare, self.outputs, lasting=True):
            return [call(bare, inputs) for inputs, _ in prepared(bare, self.batches, "search")]

    def _reset(self) -> None:
        restore_(self.model)
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items():
                if not torch.equal(tensor, self._weights[name]):  # a repair of a wing may change weights
                    tensor.copy_(self._weights[name])


def needing_scales(layers: Mapping[str, Iterable[Any]]) -> list[str]:
    """The layers of which some option works on activation scales."""
    return [
        name
        for name, options in layers.items()
        if any(option is not None and wing_of(option, "search").works_on_scales(option) for option in options)
    ]


def metric_name(metric: str | Function) -> str:
    """What tables call a metric; a function that is called as a meter is gets brackets, since names say which it is."""
    if isinstance(metric, str):
        return metric
    name: str = getattr(metric, "__name__", type(metric).__name__)
    return f"{name}()" if name in METERS else name


def kept(batches: Iterable[Any]) -> "Kept":
    """Batches in memory, so that every measurement sees the same: a loader that shuffles gives others at each pass, and
    one that decodes or augments does it anew."""
    if isinstance(batches, Kept):
        return batches
    check_batches(batches, "search")
    return Kept(batches)


class Kept(list[Any]):
    """Batches that lie in memory already."""


def laid_out(model: nn.Module, batches: "Kept") -> "Kept":
    """Images channels last, in which float layers are faster; as they are for a network that cannot take them so, such
    as one with a ``view`` behind a convolution, which two samples of every shape show."""
    moved, tried = Kept(map(_laid_out, batches)), set()
    for batch in moved:
        inputs = split(batch)[0]
        parts = list(inputs.values()) if isinstance(inputs, Mapping) else [inputs]
        if not any(isinstance(part, Tensor) and part.dim() == 4 for part in parts):
            continue
        shapes = repr([part.shape[1:] for part in parts if isinstance(part, Tensor)])
        if shapes not in tried and not _takes(model, inputs):
            return batches
        tried.add(shapes)
    return moved


def _takes(model: nn.Module, inputs: Any) -> bool:
    def few(value: Any, layout: torch.memory_format) -> Any:
        if not isinstance(value, Tensor) or not value.dim():
            return value
        value = value[:2].to(device)
        return value.contiguous(memory_format=layout) if value.dim() == 4 else value

    def run(layout: torch.memory_format) -> Any:
        if isinstance(inputs, Mapping):
            return call(model, {name: few(value, layout) for name, value in inputs.items()})
        return call(model, few(inputs, layout))

    device = device_of(model)
    try:
        with ALONE, cpu_threads(1), evaluating(model), torch.no_grad():
            return outputs_agree(run(torch.contiguous_format), run(torch.channels_last))
    except Exception:  # one of another reason comes again when the network is measured
        return False


def _laid_out(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return batch.contiguous(memory_format=torch.channels_last) if batch.dim() == 4 else batch
    if isinstance(batch, tuple | list):
        return type(batch)(map(_laid_out, batch)) if type(batch) in (tuple, list) else batch
    return {name: _laid_out(value) for name, value in batch.items()} if type(batch) is dict else batch


def _layouts(batches: Iterable[Any]) -> list[str]:
    """How inputs lie in memory, on which the last bits of float layers depend, and which their digest does not show."""
    found: dict[str, None] = {}
    for batch in batches:
        inputs = split(batch)[0]
        for part in inputs.values() if isinstance(inputs, Mapping) else [inputs]:
            if isinstance(part, Tensor):
                last = part.dim() == 4 and part.is_contiguous(memory_format=torch.channels_last)
                plain = "in order" if part.is_contiguous() else f"strides {list(part.stride())}"
                found["channels last" if last else plain] = None
    return list(found)


def _notes(caught: list[warnings.WarningMessage]) -> list[str]:
    """recoup's own warnings; others are passed on."""
    for warning in caught:
        if not issubclass(warning.category, RecoupWarning):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return list(dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, RecoupWarning)))


def built(model: nn.Module) -> str:
    """A digest of what computes: the modules, and the source of those that are not torch's own."""
    kinds = {type(module) for module in model.modules() if not type(module).__module__.startswith("torch.")}
    return of_text(ADDRESS.sub("", repr(model)) + "".join(sorted(_source(kind) for kind in kinds)))


def _function(metric: Function) -> str:
    return f"{metric_name(metric)} {of_text(_source(metric))}"


def _source(thing: Any) -> str:
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):  # made at a prompt, or a callable object
        return getattr(thing, "__qualname__", type(thing).__qualname__)
