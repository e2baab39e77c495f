"""Random layers of a pipeline: what they draw depends on the seed, the sample and the stage, not on who runs when.

Workers of a pipeline draw independently of each other, and a simulator and any number of processes must draw the same.
So every stage has a stream of its own for every sample: at the first random layer of a stage the default generator is
seeded with

    (mix64(seed, sample) + stage * 0x9E3779B1) mod 2^32,   mix64(a, b) = splitmix64(a * 0x9E3779B97F4A7C15 + b)

at the next ones it goes on where it was, and behind each of them it is what it was before. The CPU's generator takes 32
bits of a seed. Layers without chance, and stages without random layers, never touch it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from recoup.errors import RecoupError

GOLDEN, STEP = 0x9E3779B97F4A7C15, 0x9E3779B1
_64, _32 = (1 << 64) - 1, (1 << 32) - 1
OWN = ("torch", "recoup")  # packages whose modules are known


def mix64(a: int, b: int) -> int:
    """splitmix64 of a * 0x9E3779B97F4A7C15 + b, modulo 2^64.

    >>> hex(mix64(0, 0)), hex(mix64(1, 2))
    ('0xe220a8397b1dcdaf', '0xbfc846100bfc1e42')
    """
    z = (a * GOLDEN + b + GOLDEN) & _64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _64
    return z ^ (z >> 31)


def stream(seed: int, sample: int, stage: int) -> int:
    """The seed of a stage's stream for a sample."""
    return (mix64(seed, sample) + stage * STEP) & _32


def is_random(module: nn.Module) -> bool:
    """Whether a module itself may draw numbers in training: not by its children, and as far as its class tells.

    A class from elsewhere that has no children with a forward of its own may do anything, so it counts.
    """
    kinds = (nn.modules.dropout._DropoutNd, nn.RReLU, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)
    if isinstance(module, kinds):
        return getattr(module, "p", 1) != 0
    if isinstance(module, nn.MultiheadAttention | nn.RNNBase):
        return module.dropout > 0
    if "stochastic" in repr(getattr(module, "config", "")):
        return True
    known = type(module).__module__.partition(".")[0] in OWN
    return not known and not any(True for _ in module.children())


def random_layers(model: nn.Module, stages: Sequence[Sequence[str]], first: int = 0) -> dict[str, int]:
    """The stage of every random layer, by name; one that no stage names belongs to the stage of what is before it.

    Raises:
        RecoupError: one random layer in two stages.
    """
    owner = {name: first + index for index, names in enumerate(stages) for name in names}
    found: dict[str, int] = {}
    seen: dict[int, tuple[str, int]] = {}
    at = first
    for name, module in model.named_modules(remove_duplicate=False):
        parts = name.split(".")
        prefixes = [".".join(parts[:i]) for i in range(len(parts) + 1)]
        at = next((owner[prefix] for prefix in prefixes if prefix in owner), at)
        if not is_random(module):
            continue
        other, before = seen.setdefault(id(module), (name, at))
        if before != at:
            raise RecoupError(
                f"pipeline: {other!r} (stage {before}) and {name!r} (stage {at}) are one random layer, and stages draw "
                "independently: make two"
            )
        found.setdefault(other, at)
    return found


class Streams:
    """Every stage's stream, put in place around the random layers of a model.

    Args:
        model: whose layers they are.
        layers: the stage of each, by name.
        seed: of the run.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, int], seed: int) -> None:
        modules = dict(model.named_modules())
        self._layers = [(modules[name], stage) for name, stage in layers.items()]
        self.seed = seed

    @contextmanager
    def of(self, sample: int) -> Iterator[None]:
        """Within it, layers draw what they draw for a sample."""
        if not self._layers or not any(module.training for module, _ in self._layers):
            yield
            return
        states: dict[int, Tensor] = {}
        changed: list[tuple[dict[str, Any], Any]] = []
        try:
            for module, stage in self._layers:
                if module.training:
                    changed.append((module.__dict__, module.__dict__.get("forward")))
                    module.__dict__["forward"] = self._drawing(module.forward, sample, stage, states)
            yield
        finally:
            for own, before in reversed(changed):
                own.pop("forward", None)
                if before is not None:
                    own["forward"] = before

    def _drawing(
        self, forward: Callable[..., Any], sample: int, stage: int, states: dict[int, Tensor]
    ) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            device = next((a.device for a in arguments if isinstance(a, Tensor)), torch.device("cpu"))
            generator = _generator(device)
            before = generator.get_state()
            try:
                if stage in states:
                    generator.set_state(states[stage])
                else:
                    generator.manual_seed(stream(self.seed, sample, stage))
                return forward(*arguments, **options)
            finally:
                states[stage] = generator.get_state()
                generator.set_state(before)

        return run


def _generator(device: torch.device) -> torch.Generator:
    """The one that a device's operations draw from by default."""
    if device.type != "cuda":
        return torch.default_generator
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.default_generators[index]
