"""How a model is taken apart for processes: an nn.Sequential between its children, any other between its stages."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

from torch import nn

from recoup.errors import RecoupError
from recoup.pipeline.traced import Chain


class Joint(NamedTuple):
    """A place where a model can be cut: before this unit, which begins with this stage."""

    unit: int
    stage: int


class Cutting(Protocol):
    """Units in a row, of which every rank gets consecutive ones.

    Attributes:
        count: how many there are.
        what: their name, for messages.
    """

    count: int
    what: str

    def even(self, ranks: int) -> list[range]:
        """The units of every rank, as even as possible."""
        ...

    def stages(self, pieces: Sequence[range], rank: int) -> list[int]:
        """The stages of a rank."""
        ...

    def part(self, pieces: Sequence[range], rank: int) -> nn.Module:
        """The modules of a rank as one."""
        ...

    def shown(self, pieces: Sequence[range], rank: int) -> str:
        """What a rank has, for messages."""
        ...

    def joints(self) -> list[Joint]:
        """Where it can be cut so that every part has something to train; also its beginning and its end."""
        ...


class Children:
    """An nn.Sequential, whose children each map one tensor to one tensor; see `Cutting`."""

    what = "children"

    def __init__(self, model: nn.Sequential, stages: Sequence[Sequence[str]]) -> None:
        # a module that occurs twice is there twice
        self._children = [(name, child) for name, child in model._modules.items() if child is not None]
        self._stages, self.count = stages, len(self._children)

    def even(self, ranks: int) -> list[range]:
        """See `Cutting`."""
        return pieces(self.count, ranks)

    def stages(self, pieces: Sequence[range], rank: int) -> list[int]:
        """See `Cutting`."""
        return local_stages([name for name, _ in self._children], self._stages, pieces, rank)

    def part(self, pieces: Sequence[range], rank: int) -> nn.Module:
        """See `Cutting`."""
        made = nn.Sequential()
        for index in pieces[rank]:
            made.add_module(*self._children[index])
        return made

    def shown(self, pieces: Sequence[range], rank: int) -> str:
        """See `Cutting`."""
        return f"children {', '.join(self._children[index][0] for index in pieces[rank])}"

    def joints(self) -> list[Joint]:
        """See `Cutting`: before a child that a stage begins with, if no stage has modules on both sides."""
        at = {name: index for index, (name, _) in enumerate(self._children)}
        spans = [[at[name.split(".")[0]] for name in stage if name.split(".")[0] in at] for stage in self._stages]
        found = [
            Joint(min(span), index)
            for index, span in enumerate(spans)
            if span
            and all(max(other) < min(span) for other in spans[:index] if other)
            and all(min(other) >= min(span) for other in spans[index:] if other)
        ]
        trained = [any(p.requires_grad for p in child.parameters()) for _, child in self._children]
        return joints(found, lambda a, b: any(trained[a.unit : b.unit]), Joint(self.count, len(self._stages)))


class Links:
    """Any model that `Chain` can follow, between its stages; see `Cutting`."""

    what = "stages"

    def __init__(self, model: nn.Module, stages: Sequence[Sequence[str]]) -> None:
        self._chain, self.count = Chain(model, stages), len(stages)

    def even(self, ranks: int) -> list[range]:
        """As even as possible, with something to train in every rank: behind the last layer there may be no cut."""
        last = max((index for index, names in enumerate(self._chain.stages) if names), default=0)
        found = pieces(max(last + 1, ranks), ranks)
        return [*found[:-1], range(found[-1].start, self.count)]

    def stages(self, pieces: Sequence[range], rank: int) -> list[int]:
        """See `Cutting`."""
        return list(pieces[rank])

    def part(self, pieces: Sequence[range], rank: int) -> nn.Module:
        """See `Cutting`."""
        return self._chain.part(pieces[rank].start, pieces[rank].stop)

    def shown(self, pieces: Sequence[range], rank: int) -> str:
        """See `Cutting`."""
        return f"stages {pieces[rank].start} to {pieces[rank].stop - 1}"

    def joints(self) -> list[Joint]:
        """See `Cutting`: before any stage."""
        modules = [[self._chain.model.get_submodule(name) for name in names] for names in self._chain.stages]
        trained = [any(p.requires_grad for each in own for p in each.parameters()) for own in modules]
        every = [Joint(index, index) for index in range(self.count)]
        return joints(every, lambda a, b: any(trained[a.stage : b.stage]), Joint(self.count, self.count))


def joints(places: Sequence[Joint], trains: Callable[[Joint, Joint], bool], end: Joint) -> list[Joint]:
    """Of places in a row those between which there is something to train, from the beginning on, and the end."""
    found = [Joint(0, 0)]
    for place, following in pairwise([*places, end]):
        if place.unit and trains(found[-1], place) and trains(place, following):
            found.append(place)
    return [*found, end]


def pieces(children: int, ranks: int) -> list[range]:
    """Consecutive children for every rank, as even as possible, the larger ones first."""
    short, longer = divmod(children, ranks)
    bounds = [0]
    for rank in range(ranks):
        bounds.append(bounds[-1] + short + (rank < longer))
    return [range(a, b) for a, b in pairwise(bounds)]


def local_stages(
    names: Sequence[str], stages: Sequence[Sequence[str]], pieces_: Sequence[range], rank: int
) -> list[int]:
    """The indices of the stages whose modules lie in a rank; stages without modules belong to the rank before them.

    Args:
        names: of the model's children.
        stages: of the whole pipeline.
        pieces_: the children of every rank.
        rank: which one.

    Raises:
        RecoupError: a stage with modules in two ranks, or a rank without a stage.
    """
    owner = {names[i]: r for r, piece in enumerate(pieces_) for i in piece}
    found: list[int] = []
    at = 0
    for index, stage in enumerate(stages):
        ranks = {owner[name.split(".")[0]] for name in stage if name.split(".")[0] in owner}
        if len(ranks) > 1:
            raise RecoupError(
                f"pipeline: stage {index} ({', '.join(stage)}) has modules in ranks {sorted(ranks)}; cut the model "
                "between stages"
            )
        at = ranks.pop() if ranks else at
        if at == rank:
            found.append(index)
    if not found:
        raise RecoupError(
            f"pipeline: {len(stages)} stages leave rank {rank} of {len(pieces_)} without one: use fewer ranks"
        )
    return found
