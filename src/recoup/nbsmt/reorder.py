"""Which channels share a multiplier: a permutation per layer that makes collisions cheap, free at run time.

Legend: C input channels, P input positions, p positions in the channel order, S slots, T threads, K kernel taps times
output channels.
"""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from recoup.errors import RecoupError, RecoupWarning
from recoup.nbsmt import reference
from recoup.nbsmt.config import NBSMT
from recoup.nbsmt.observe import Layer, Seen, attentions, hooked, in_mode, nbsmt_layers, nbsmt_units
from recoup.nbsmt.ports import UNSIGNED, WEIGHT, activation_port
from recoup.nbsmt.tally import CELLS
from recoup.network import ledger
from recoup.network.batches import call, prepared, reread
from recoup.network.modes import evaluating

M = TypeVar("M", bound=nn.Module)

BLOCK = 1024
"""Channels that are ordered together: a matrix of their pairs takes 8 MiB. Wider layers are ordered block by block."""

ROUNDS = 200
"""Rounds of swaps at most; a few dozen reach a local minimum."""


@torch.no_grad()
def reorder_(model: M, batches: Iterable[Any], *, progress: bool = False) -> M:
    """Choose, per layer, which input channels meet in a slot, so that wide operands meet zeros and each other rarely.

    Permuting the columns of X and the rows of W alike leaves X W as it is; only which products collide changes. A first
    pass measures, for every pair of channels c and d, the loss expected where they share a slot,

        D[c, d] = sum over taps and output channels of E[(loss of c)^2 + (loss of d)^2]

    which splits into sums over activations and sums over weights. The order then minimises the sum of D over all pairs
    that share a slot, by swaps, down to a local minimum. A second pass measures the error of every layer (see
    `recoup.nbsmt.profile`) with the old and the new order and keeps the better one. With four threads D adds the
    losses beside one and beside more active partners, which stands in for an expectation over four channels [our
    definition].

    Args:
        model: a model after `emulate_`. Repairs belong to an order: those that were made before are taken back, and a
            warning says so.
        batches: calibration data, 10^2 images or more, read twice (the batches of a generator are kept in memory).
        progress: whether to show a progress bar.

    Returns:
        The same model, with ``order`` (int64 [C]) on the layers that gain. After an error or an interrupt all orders
        are as before.

    Warns:
        RecoupWarning: attentions, which keep their order: no weights of theirs are known ahead.

    Raises:
        RecoupError: no NB-SMT layer; none in which the order matters (one thread, or a policy without ``S``, under
            which every pair collides whatever it meets); a layer that is bias-corrected; no or bad batches.
    """
    layers = _orderable(model)
    _say_skipped(attentions(nbsmt_units(model, "reorder_")))
    batches = reread(batches, "reorder_")
    with ledger.whole(model):
        ledger.begin_structure(model, "reorder_")
        for layer in layers.values():
            ledger.take_back(layer, "order")
        before = {name: {"order": layer.order} for name, layer in layers.items()}
        orders = _better_orders(model, layers, batches, progress)
        for name, order in orders.items():
            layers[name].order = order
        ledger.record(model, {n: layers[n] for n in orders}, "structure", "reorder_", before, slot="order")
    return model


def _better_orders(
    model: nn.Module, layers: dict[str, Layer], batches: Iterable[Any], progress: bool
) -> dict[str, Tensor]:
    """The orders found for the layers whose error is smaller with them."""
    affinity: dict[str, _Affinity] = {}
    errors: dict[str, Tensor] = {}
    orders: dict[str, Tensor] = {}

    def measure(name: str, seen: Seen, output: Tensor) -> None:  # noqa: ARG001
        affinity.setdefault(name, _Affinity.of(seen)).add(seen.codes())

    def compare(name: str, seen: Seen, output: Tensor) -> None:  # noqa: ARG001
        config = seen.layer.active_config
        y8 = seen.product(config.eight_bit, None).double()
        both = [seen.product(config, order).double() for order in (seen.layer.order, orders[name])]
        errors[name] = errors.get(name, torch.zeros(2, dtype=torch.float64)) + torch.stack(
            [(y - y8).square().sum().cpu() for y in both]
        )

    with evaluating(model), in_mode(layers, "emulate"):
        with hooked(layers, measure, "reorder_"):
            for inputs, _ in prepared(model, batches, "reorder_ (measure)", progress):
                call(model, inputs)
        orders |= {name: found.order() for name, found in affinity.items()}
        with hooked(layers, compare, "reorder_"):
            for inputs, _ in prepared(model, batches, "reorder_ (compare)", progress):
                call(model, inputs)
    return {name: orders[name] for name, (old, new) in errors.items() if new < old}


def _orderable(model: nn.Module) -> dict[str, Layer]:
    """The layers whose result depends on the order, by name."""
    layers = {
        name: layer
        for name, layer in nbsmt_layers(model, "reorder_").items()
        if layer.config.threads > 1 and layer.config.zero_test and layer.caveat() is None
    }
    if not layers:
        raise RecoupError(
            "reorder_: the order matters in no layer: it needs 2 or 4 threads and a policy with S (zero operands)"
        )
    return layers


def _say_skipped(unordered: Mapping[str, Any]) -> None:
    """Warn of attentions, whose operands are both new in every call."""
    if unordered:
        warnings.warn(
            f"reorder_: {len(unordered)} attentions keep their order, as both operands of their products are "
            f"activations and no weights are known ahead: {', '.join(unordered)}",
            RecoupWarning,
            stacklevel=3,
        )


def slot_of_position(channels: int, config: NBSMT, device: torch.device) -> Tensor:
    """The slot of every position in the channel order, int64 [C]."""
    index = torch.arange(channels, device=device)[None]
    slots = -(-channels // config.threads)
    return index[0] % slots if config.pairing == "halves" else index[0] // config.threads


def squared_losses(x: Tensor, w: Tensor, config: NBSMT, zero: int = UNSIGNED) -> list[tuple[Tensor, Tensor]]:
    """A thread's squared loss (x w - g(x, w))^2 in a collision, as a sum of (function of x) times (function of w).

    With two threads the loss beside one active partner; with four that plus the loss beside two or more.
    """
    x, w = x.double(), w.double()
    r, q = reference.reduce_activation(x, config, zero), reference.reduce_weight(w, config)
    d, e = x - r, w - q
    wide_x, wide_w = activation_port(config, zero).wide(x), WEIGHT.wide(w)
    one = {"S": (d, w), "S+A": (d, w), "S+Aw": (d, w * wide_w), "S+W": (x, e), "S+aW": (x * wide_x, e)}[config.policy]
    terms = [(one[0].square(), one[1].square())]
    if config.threads == 4:  # x w - r q = d w + r e
        terms += [(d.square(), w.square()), (2 * d * r, w * e), (r.square(), e.square())]
    return terms


@dataclass(slots=True)
class _Affinity:
    """What the expected loss of the pairs of channels of one layer is made of, block by block of slots.

    Attributes:
        config, zero: of the layer and of its activation codes.
        slot_p: the slot of each position.
        start_p: the present order.
        blocks: the positions of each block.
        weight: int8 weight codes [K, C].
        sums: per block float64 [terms, C, C], the activation side summed over input positions so far.
    """

    config: NBSMT
    zero: int
    slot_p: Tensor
    start_p: Tensor
    blocks: list[Tensor]
    weight: Tensor
    sums: list[Tensor]

    @classmethod
    def of(cls, seen: Seen) -> "_Affinity":
        config = seen.layer.active_config
        weight_KC = seen.weight_codes()[0].movedim(1, -1).flatten(0, -2)
        channels, device = weight_KC.shape[1], weight_KC.device
        slot_p = slot_of_position(channels, config, device)
        start_p = torch.arange(channels, device=device) if seen.layer.order is None else seen.layer.order
        block_p = slot_p // max(1, BLOCK // config.threads)
        blocks = [(block_p == number).nonzero()[:, 0] for number in range(int(block_p.max()) + 1)]
        terms = len(squared_losses(weight_KC[:0], weight_KC[:0], config, seen.zero))
        sums = [torch.zeros(terms, len(b), len(b), dtype=torch.float64, device=device) for b in blocks]
        return cls(config, seen.zero, slot_p, start_p, blocks, weight_KC, sums)

    def add(self, code_NCHW: Tensor) -> None:
        """Count another batch."""
        code_PC = code_NCHW.movedim(1, -1).flatten(0, -2)
        for block_p, sums in zip(self.blocks, self.sums, strict=True):
            for x_PC in code_PC.split(max(1, CELLS // len(self.slot_p))):
                x_PB = x_PC[:, self.start_p[block_p]]
                for term, (u_PB, _) in enumerate(squared_losses(x_PB, x_PB, self.config, self.zero)):
                    sums[term] += u_PB.T @ (x_PB != 0).double()

    def order(self) -> Tensor:
        """The order found, int64 [C]."""
        order_p = self.start_p.clone()
        for block_p, sums in zip(self.blocks, self.sums, strict=True):
            w_KB = self.weight[:, order_p[block_p]]
            terms = squared_losses(w_KB, w_KB, self.config, self.zero)
            loss = torch.zeros_like(sums[0])
            for activations, (_, v_KB) in zip(sums, terms, strict=True):
                loss += activations * (v_KB.T @ (w_KB != 0).double())
            order_p[block_p] = order_p[block_p][arrange(loss + loss.T, self.slot_p[block_p])]
        return order_p


def arrange(pairs_CC: Tensor, slot_p: Tensor) -> Tensor:
    """A permutation that puts channels with a small expected loss into the same slot.

    From the given order and from one that spreads the heaviest channels over the slots, swaps of two channels descend
    to a local minimum; the better of the two is returned.

    Args:
        pairs_CC: the expected loss of two channels in a slot; symmetric, the diagonal does not matter.
        slot_p: the slot of each position.

    Returns:
        int64 [C]: the channel at each position.
    """
    pairs_CC = pairs_CC.clone().fill_diagonal_(0)
    slot_p = slot_p.unique(return_inverse=True)[1]
    by_slot = slot_p.argsort(stable=True)
    rank = torch.arange(len(slot_p), device=slot_p.device)
    first = torch.searchsorted(slot_p[by_slot], slot_p[by_slot])
    spread = torch.empty_like(by_slot)  # heaviest channels first, to the first place of every slot, then the second ...
    spread[by_slot[(rank - first).argsort(stable=True)]] = pairs_CC.sum(1).argsort(descending=True, stable=True)
    found = [_descend(pairs_CC, slot_p, start) for start in (rank, spread)]
    return min(found, key=lambda order: _cost(pairs_CC[order][:, order], slot_p))


def _cost(pairs_pp: Tensor, slot_p: Tensor) -> float:
    return float(pairs_pp[slot_p[:, None] == slot_p].sum())


def _descend(pairs_CC: Tensor, slot_p: Tensor, order: Tensor) -> Tensor:
    """Swap until no swap of two channels helps; per round all the best ones that touch different slots."""
    order, slots = order.clone(), int(slot_p.max()) + 1
    same = slot_p[:, None] == slot_p
    index = torch.arange(len(slot_p), device=slot_p.device)
    for _ in range(ROUNDS):
        pairs_pp = pairs_CC[order][:, order]
        with_slot_pS = torch.zeros(len(order), slots, dtype=pairs_pp.dtype, device=order.device)
        with_slot_pS.index_add_(1, slot_p, pairs_pp)
        now_p = with_slot_pS[index, slot_p]
        moved_pp = with_slot_pS[:, slot_p]
        gain_pp = now_p[:, None] + now_p - moved_pp - moved_pp.T + 2 * pairs_pp
        best, partner = gain_pp.masked_fill(same, 0).max(1)
        least = 1e-12 * float(now_p.abs().sum())  # a gain below rounding could be swapped to and fro for ever
        touched: set[int] = set()
        for i in best.argsort(descending=True, stable=True).tolist():
            j = int(partner[i])
            here = {int(slot_p[i]), int(slot_p[j])}
            if float(best[i]) <= least:
                break
            if not here & touched:
                touched |= here
                order[[i, j]] = order[[j, i]]
        if not touched:
            break
    return order
