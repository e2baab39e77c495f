"""Forward and backward passes as CUDA graphs: at batch one a GPU waits for hundreds of launches, a graph is one.

A graph repeats launches on fixed memory and runs no Python. So all that differs from step to step goes through memory
that stays: the inputs are copied into buffers, weights lie where they always lie, and what depends on Python numbers
(the ring, learning rates, the update, the check of the loss) stays outside.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from recoup.errors import RecoupError

Pass = Callable[[], Tensor]
Capture = Callable[[Pass], tuple[Callable[[], None], Tensor]]
WARM_UP = 3


def cuda_capture(run: Pass) -> tuple[Callable[[], None], Tensor]:
    """Capture a pass after a warm-up on a side stream, as torch's notes on CUDA graphs prescribe.

    Returns:
        What replays it, and the tensor in which every replay leaves the pass's result.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph.replay, result


@dataclass(slots=True)
class _Graph:
    inputs: list[Tensor]
    replay: Callable[[], None]
    result: Tensor


class Graphs:
    """One graph for every shape, dtype and structure of the inputs, and for every choice of modules in training.

    Args:
        model: whose modes are watched.
        capture: how a pass is captured; tests give another.
    """

    def __init__(self, model: nn.Module, capture: Capture = cuda_capture) -> None:
        self._modules, self._capture = list(model.modules()), capture
        self._made: dict[Hashable, _Graph] = {}

    def run(self, x: Any, y: Any, make: Callable[[Any, Any], Pass], undo: Callable[[], None]) -> Tensor:
        """The result of a pass over x and y.

        Args:
            x, y: tensors, or tuples, lists and dicts of them.
            make: from buffers for x and y to the pass over them.
            undo: takes back what warming up and capturing left behind.

        Raises:
            RecoupError: inputs that hold anything but tensors, a pass that cannot be captured.
        """
        leaves, structure = tree_flatten((x, y))
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                raise RecoupError(
                    f"pipeline.Simulator(cuda_graph=True): the inputs hold a {type(leaf).__name__}, which a graph "
                    "would keep from the first step; they must be tensors, or tuples, lists and dicts of tensors"
                )
        kinds = tuple((leaf.shape, leaf.dtype, leaf.device) for leaf in leaves)
        key = (structure, kinds, tuple(module.training for module in self._modules))
        found = self._made.get(key)
        if found is None:
            found = self._made[key] = self._new(leaves, structure, make, undo)
        with torch.no_grad():
            for kept, leaf in zip(found.inputs, leaves, strict=True):
                kept.copy_(leaf)
        found.replay()
        return found.result

    def _new(self, leaves: list[Tensor], structure: Any, make: Any, undo: Callable[[], None]) -> _Graph:
        kept = [leaf.detach().clone() for leaf in leaves]
        run = make(*tree_unflatten(kept, structure))
        devices = {leaf.device for leaf in leaves if leaf.device.type == "cuda"}
        try:
            with torch.random.fork_rng(devices):
                replay, result = self._capture(run)
        except RecoupError:
            raise
        except RuntimeError as error:
            raise RecoupError(
                "pipeline.Simulator(cuda_graph=True): this model's step cannot be captured as a CUDA graph; use "
                f"cuda_graph=False ({str(error).splitlines()[0][:200]})"
            ) from error
        undo()
        return _Graph(kept, replay, result)
