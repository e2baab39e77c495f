"""A CUDA graph's semantics on the CPU: the operations of a pass, repeated on the same memory without its Python."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recoup.pipeline.gradients import Gradients
from recoup.pipeline.graphs import WARM_UP, Graphs


class _Tape(TorchDispatchMode):
    """Writes down every operation, also those of the backward pass, with the tensors it took and gave."""

    def __init__(self):
        super().__init__()
        self.calls = []  # also keeps all tensors alive: no memory is used twice

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():  # neither a view nor in place
                    old.copy_(new)


def capture(run):
    """As `graphs.cuda_capture`: warm up, record, and give what replays; here recording also executes."""
    for _ in range(WARM_UP):
        run()
    with _Tape() as tape:
        result = run()
    assert tape.calls
    return tape.replay, result


def graphed(simulator, capture):
    """Make a simulator as cuda_graph=True makes one."""
    simulator._graphs = Graphs(simulator.model, capture)
    simulator._gradients = Gradients(simulator._layout, fixed=True)
