"""A model's trainable parameters as one vector, stage by stage, and their gradients as another."""

from collections.abc import Sequence
from operator import is_

import torch
from torch import Tensor, nn

from recoup.errors import RecoupError

# Every parameter begins where an allocation of its own could: elsewhere MKL's and oneDNN's products round otherwise.
ALIGNMENT = 64
WRITTEN = "written to"  # the change that `FlatParameters.accept` undoes


class FlatParameters:
    """The layout: the parameters become views of one vector, which is overwritten in place through an alias.

    Args:
        model: its trainable parameters move into the vector, with their values.
        stages: the names of every stage's parameters; see `stages.resolve`.

    Attributes:
        live: what the model computes with.
        gradient: where backward passes add up, after `attach`.
        sizes, parts: elements of every stage, and its part of ``live``.
        shapes: of the trainable parameters of every stage, by name.
        frozen: parameters without gradient, by name.

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
        self._align = ALIGNMENT // trained[0].element_size()
        self.shapes = [{name: list(named[name].shape) for name in stage} for stage in names]
        self.frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        self.sizes = [sum(self._room(named[name]) for name in stage) for stage in names]
        self.live = trained[0].new_zeros(sum(self.sizes), requires_grad=False)
        self.gradient = torch.zeros_like(self.live)
        self.parts = list(self.live.split(self.sizes))
        self._pairs: list[tuple[nn.Parameter, Tensor]] = []
        at = 0
        for parameter in trained:
            end = at + parameter.numel()
            self.live[at:end].copy_(parameter.detach().reshape(-1))
            parameter.data = self.live[at:end].view(parameter.shape)  # no graph is alive yet
            self._pairs.append((parameter, self.gradient[at:end].view(parameter.shape)))
            at += self._room(parameter)
        self._watch(model, named)

    def _room(self, parameter: Tensor) -> int:
        return -(-parameter.numel() // self._align) * self._align

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trained ones, in the order of the vector."""
        return [parameter for parameter, _ in self._pairs]

    def attach(self) -> None:
        """Let gradients add up in the vector."""
        for parameter, gradient in self._pairs:
            if parameter.grad is not gradient:
                parameter.grad = gradient

    def _watch(self, model: nn.Module, named: dict[str, nn.Parameter]) -> None:
        """Remember what `changed` compares with."""
        modules = dict(model.named_modules(remove_duplicate=False))
        places = [name.rpartition(".") for name in named]
        self._homes = [modules[module]._parameters for module, _, _ in places]
        self._keys = [key for *_, key in places]
        self._named = named
        self._all, self._trained, self._still = list(named.values()), self.parameters, list(self.frozen.values())
        self._marks = self._look()

    def _look(self) -> list[tuple[int, int, bool]]:
        """What differs when someone else writes to a parameter (our alias does not count), moves or freezes it."""
        return [(p._version, p.data_ptr(), p.requires_grad) for p in self._trained]

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
        found = self._trained[index]
        name = next(name for name, parameter in self._named.items() if parameter is found)
        if not found.requires_grad:
            return f"{name} was frozen"
        return f"{name} was {WRITTEN if now[index][1] == self._marks[index][1] else 'moved'}"

    def accept(self) -> None:
        """Take what others wrote as undone: the whole vector was written since. What was moved or frozen stays so."""
        now = self._look()
        if [mark[1:] for mark in now] == [mark[1:] for mark in self._marks]:
            self._marks = now
