"""Where a model's trainable parameters lie: one vector a stage, every parameter at a place of its own in it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import is_

import torch
from torch import Tensor, nn

from recoup.errors import RecoupError

# Every parameter begins where an allocation of its own could: elsewhere MKL's and oneDNN's products round otherwise.
ALIGNMENT = 64
LARGE = 1 << 14  # elements from which showing a parameter in place costs less than copying it
WRITTEN = "written to"  # the change that `Layout.accept` undoes


@dataclass(frozen=True, slots=True)
class Place:
    """A parameter's place: elements ``start`` to ``start + count`` of its stage's vector.

    ``module`` is the name of the module that it is registered in.
    """

    name: str
    stage: int
    start: int
    count: int
    shape: torch.Size
    module: str

    @property
    def end(self) -> int:
        """The first element behind it."""
        return self.start + self.count


class Layout:
    """The places of all trained parameters, and a watch that nobody else changes them.

    Within a stage the small parameters come first: they are copied as one.

    Args:
        model: its trainable parameters.
        stages: the names of every stage's parameters; see `stages.resolve`.

    Attributes:
        parameters, places: the trained ones, stage by stage, in the order of their places.
        sizes: elements of every stage's vector.
        small: elements of each that belong to parameters below `LARGE`, which come first.
        shapes: of the trained parameters of every stage, by name.
        frozen: parameters without gradient, by name.
        dtype, device: of all of them.

    Raises:
        RecoupError: nothing to train, or parameters of several dtypes or devices.
    """

    def __init__(self, model: nn.Module, stages: Sequence[Sequence[str]]) -> None:
        named = dict(model.named_parameters(remove_duplicate=False))
        names = [[name for name in stage if named[name].requires_grad] for stage in stages]
        trained = [named[name] for stage in names for name in stage]
        if not trained:
            raise RecoupError("pipeline.Simulator: the model has no parameters that require a gradient")
        kinds = {(p.dtype, p.device) for p in trained}
        if len(kinds) > 1:
            raise RecoupError(
                f"pipeline.Simulator: parameters must have one dtype and device; got {sorted(map(str, kinds))}"
            )
        self.dtype, self.device = trained[0].dtype, trained[0].device
        self.shapes = [{name: list(named[name].shape) for name in stage} for stage in names]
        self.frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        self.places: list[Place] = []
        self.sizes, self.small = [], []
        for stage, own in enumerate(names):
            at = small = 0
            for name in sorted(own, key=lambda name: named[name].numel() >= LARGE):
                p = named[name]
                self.places.append(Place(name, stage, at, p.numel(), p.shape, name.rpartition(".")[0]))
                at += room(p)
                small = small if p.numel() >= LARGE else at
            self.sizes.append(at)
            self.small.append(small)
        self.parameters = [named[place.name] for place in self.places]
        self._watch(model, named)

    def _watch(self, model: nn.Module, named: dict[str, nn.Parameter]) -> None:
        """Remember what `changed` compares with."""
        modules = dict(model.named_modules(remove_duplicate=False))
        places = [name.rpartition(".") for name in named]
        self._homes = [modules[module]._parameters for module, _, _ in places]
        self._keys = [key for *_, key in places]
        self._named = named
        self._all, self._still = list(named.values()), list(self.frozen.values())
        self._marks = self._look()

    def settled(self) -> None:
        """Everything is as it should be: what differs later, somebody else did."""
        self._marks = self._look()

    def put(self, index: int, data: Tensor) -> None:
        """Let a parameter be other memory."""
        self.parameters[index].data = data
        version, _, trained = self._marks[index]
        self._marks[index] = version, data.data_ptr(), trained

    def age(self, indices: Sequence[int]) -> None:
        """Let autograd refuse what graphs have saved of parameters so far."""
        torch.autograd.graph.increment_version([self.parameters[index] for index in indices])
        for index in indices:
            version, where, trained = self._marks[index]
            self._marks[index] = version + 1, where, trained

    def undisturbed(self, index: int) -> bool:
        """Whether a parameter is where it was left."""
        return self.parameters[index].data_ptr() == self._marks[index][1]

    def _look(self) -> list[tuple[int, int, bool]]:
        """What differs when someone else writes to a parameter (our alias does not count), moves or freezes it."""
        return [(p._version, p.data_ptr(), p.requires_grad) for p in self.parameters]

    def changed(self) -> str | None:
        """Which parameter was written to, moved, replaced, frozen or unfrozen, and which of it; None: none."""
        present = all(map(is_, map(dict.get, self._homes, self._keys), self._all))
        if present and self._look() == self._marks and not any(p.requires_grad for p in self._still):
            return None
        return self._told()

    def _told(self) -> str:
        for (name, parameter), home, key in zip(self._named.items(), self._homes, self._keys, strict=True):
            if home.get(key) is not parameter:
                return f"{name} was replaced"
        for name, parameter in self.frozen.items():
            if parameter.requires_grad:
                return f"{name} was unfrozen"
        now = self._look()
        index = next(i for i, mark in enumerate(self._marks) if now[i] != mark)
        name, found = self.places[index].name, self.parameters[index]
        if not found.requires_grad:
            return f"{name} was frozen"
        return f"{name} was {WRITTEN if now[index][1] == self._marks[index][1] else 'moved'}"

    def misplaced(self) -> bool:
        """Whether somebody moved or froze a parameter, which taking up a state does not undo."""
        return [mark[1:] for mark in self._look()] != [mark[1:] for mark in self._marks]

    def views(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The parameters' shapes over the stages' vectors, in the order of the places."""
        return [parts[place.stage][place.start : place.end].view(place.shape) for place in self.places]

    def empty(self, sizes: Iterable[int] | None = None) -> list[Tensor]:
        """A vector a stage, not filled, in one allocation."""
        sizes = self.sizes if sizes is None else list(sizes)
        return list(torch.empty(sum(sizes), dtype=self.dtype, device=self.device).split(sizes))


def room(parameter: Tensor) -> int:
    """Elements that a parameter takes of its stage's vector."""
    align = ALIGNMENT // parameter.element_size()
    return -(-parameter.numel() // align) * align
