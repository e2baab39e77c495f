"""A step's gradients: taken as autograd leaves them, or added up in memory that stays, for CUDA graphs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from recoup.pipeline.layout import Layout
from recoup.pipeline.lists import each
from recoup.pipeline.memory import keep_freed

Kept = list[Tensor | None]


class Gradients:
    """What backward passes leave at the parameters between two updates.

    Args:
        layout: of the parameters.
        fixed: let them add up in memory that stays.
    """

    def __init__(self, layout: Layout, fixed: bool = False) -> None:
        self.layout, self._zeros = layout, {}
        if layout.device.type == "cpu":
            keep_freed()  # autograd allocates all of them anew in every step
        self._flat: list[Tensor] | None = None
        self._fixed: list[Tensor] | None = None
        if fixed:
            self._fixed = layout.views(self._parts())
            self.clear()
        self._seen = self._look()

    def begin(self, under_way: bool) -> Kept | None:
        """Make ready for a backward pass; what `put_back` needs where an update is under way."""
        if under_way:
            return [None if p.grad is None else p.grad.clone() for p in self.layout.parameters]
        self.clear()
        return None

    def clear(self) -> None:
        """Forget them."""
        if self._fixed is None:
            for parameter in self.layout.parameters:
                parameter.grad = None
            return
        for parameter, own in zip(self.layout.parameters, self._fixed, strict=True):
            own.zero_()
            parameter.grad = own

    def put_back(self, kept: Kept | None) -> None:
        """What there was at `begin`."""
        self.clear()
        for index, value in enumerate(kept or []):
            if self._fixed is None:
                self.layout.parameters[index].grad = value
            elif value is not None:
                self._fixed[index].copy_(value)

    def note(self) -> None:
        """What differs from now on, somebody else has done."""
        self._seen = self._look()

    def foreign(self) -> bool:
        """Whether somebody else changed them since `note`."""
        return self._look() != self._seen

    def _look(self) -> list[tuple[int, int]]:
        grads = (p.grad for p in self.layout.parameters)
        return [(0, 0) if g is None else (id(g), g._version) for g in grads]

    def each(self) -> list[Tensor]:
        """A contiguous tensor a parameter; zeros where nothing was used."""
        found = [parameter.grad for parameter in self.layout.parameters]
        return [
            g if g is not None and g.layout is torch.strided and g.is_contiguous() else self._dense(index, g)
            for index, g in enumerate(found)
        ]

    def _dense(self, index: int, grad: Tensor | None) -> Tensor:
        if grad is not None:
            return (grad if grad.layout is torch.strided else grad.to_dense()).contiguous()
        if index not in self._zeros:
            self._zeros[index] = torch.zeros_like(self.layout.parameters[index])
        return self._zeros[index]

    @torch.no_grad()
    def parts(self, divisor: int) -> list[Tensor]:
        """The stages' vectors, over a divisor, to be overwritten."""
        parts = self._parts()
        if self._fixed is None:
            each._foreach_copy_(self.layout.views(parts), self.each())
        for part in parts if divisor > 1 else ():
            part.div_(divisor)
        return parts

    def _parts(self) -> list[Tensor]:
        if self._flat is None:
            self._flat = [part.zero_() for part in self.layout.empty()]
        return self._flat

    def broken(self, found: Sequence[Tensor] | None = None) -> list[int]:
        """Stages whose gradient is not finite."""
        found = self.each() if found is None else found
        pairs = zip(self.layout.places, found, strict=True)
        return sorted({place.stage for place, grad in pairs if not grad.isfinite().all()})

    def finite(self) -> bool:
        """Whether all are finite, found by their sums."""
        total = sum(float(grad.sum()) for grad in self.each())
        return total - total == 0 or not self.broken()

    def norms(self, divisor: int) -> list[float]:
        """Euclidean norm of every stage's gradient over a divisor."""
        squares = [0.0] * len(self.layout.sizes)
        for place, grad in zip(self.layout.places, self.each(), strict=True):
            squares[place.stage] += (float(torch.linalg.vector_norm(grad)) / divisor) ** 2
        return [square**0.5 for square in squares]

    def state(self, under_way: bool) -> Tensor:
        """All of them in one vector, zero where nothing is under way."""
        whole = torch.cat([g.reshape(-1) for g in self.each()]).detach()
        return whole if under_way else torch.zeros_like(whole)

    @torch.no_grad()
    def load(self, whole: Tensor, under_way: bool) -> None:
        """The inverse of `state`."""
        self.clear()
        if under_way:
            sizes = [place.count for place in self.layout.places]
            for parameter, value in zip(self.layout.parameters, whole.split(sizes), strict=True):
                if parameter.grad is None:
                    parameter.grad = value.view(parameter.shape).to(parameter, copy=True)
                else:
                    parameter.grad.copy_(value.view(parameter.shape))
        self.note()
