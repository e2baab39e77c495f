"""How a model is taken apart for processes: an nn.Sequential between its children, any other between its stages."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

from torch import nn

from recoup.errors import RecoupError
from recoup.pipeline.traced import Chain


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
