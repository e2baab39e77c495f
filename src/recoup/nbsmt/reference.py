"""NB-SMT, every bit, as the hardware does it: slot by slot, thread by thread. Slow and readable.

Shape suffixes: T threads, M rows (output pixels), K reduction, S = ceil(K/T) slots, N columns (output channels).
"""

import torch
from torch import Tensor

from recoup.formats import Int
from recoup.nbsmt.config import NBSMT, Rounding
from recoup.nbsmt.groups import Activation, ActivationValue
from recoup.nbsmt.ports import UNSIGNED, WEIGHT, Port, activation_port, code_type, zero_of


def cut(v: Tensor, rounding: Rounding, port: Port) -> Tensor:
    """step * clip(round(v / step), low, high): the most significant bits, carry-out saturated. Integers in and out.

    ``nearest`` sends ties to the even multiple, ``half_up`` upwards (for negative v too), ``zero`` truncates |v|.
    """
    if rounding == "nearest":
        rounded = torch.round(v.double() / port.step).to(v.dtype)
    elif rounding == "half_up":
        rounded = torch.div(v + port.step // 2, port.step, rounding_mode="floor")
    else:
        rounded = torch.div(v, port.step, rounding_mode="trunc")
    return port.step * rounded.clamp(port.low, port.high)


def reduce(v: Tensor, config: NBSMT, port: Port) -> Tensor:
    """What a port takes of a value in a collision: narrow ones as they are (not under policy S), others cut."""
    r = cut(v, config.rounding, port)
    return r if config.policy == "S" else torch.where(port.wide(v), r, v)


def reduce_activation(x: Tensor, config: NBSMT, zero: int = UNSIGNED) -> Tensor:
    """r(x): values that fit `activation_port` stay as they are (not under policy S), others keep their rounded MSBs.

    Unsigned: 0..15 fit, r in 0..240. Signed, port 5: -16..15 fit, r in -128..120; port 4: as weights.
    """
    return reduce(x, config, activation_port(config, zero))


def reduce_weight(w: Tensor, config: NBSMT) -> Tensor:
    """q(w): codes -8..7 stay as they are (not under policy S), others keep their rounded 4 MSBs, -128..112."""
    return reduce(w, config, WEIGHT)


def split_threads(v: Tensor, config: NBSMT, dim: int) -> Tensor:
    """Dimension ``dim`` of length K becomes (T, S): zero-padded at its end, then dealt to the threads."""
    dim %= v.dim()
    size, threads = v.shape[dim], config.threads
    slots = -(-size // threads)
    padding = [0] * (2 * (v.dim() - 1 - dim)) + [0, threads * slots - size]
    v = torch.nn.functional.pad(v, padding)
    if config.pairing == "halves":
        return v.unflatten(dim, (threads, slots))
    return v.unflatten(dim, (slots, threads)).transpose(dim, dim + 1)


def contribution(x: Tensor, w: Tensor, others: Tensor, config: NBSMT, zero: int = UNSIGNED) -> Tensor:
    """What a thread with operands x, w adds while ``others`` of its partners are active."""
    r, q = reduce_activation(x, config, zero), reduce_weight(w, config)
    wide_x, wide_w = activation_port(config, zero).wide(x), WEIGHT.wide(w)
    one_partner = {
        "A": r * w,
        "W": x * q,
        "S": r * w,
        "Aw": torch.where(wide_w, r * w, x * w),
        "aW": torch.where(wide_x, x * q, x * w),
    }[config.policy.removeprefix("S+")]
    return torch.where(others == 0, x * w, torch.where(others == 1, one_partner, r * q))


def merge_threads(v: Tensor, config: NBSMT, dim: int) -> Tensor:
    """The inverse of `split_threads`: (T, S) at ``dim`` becomes one dimension in channel order; the padding stays."""
    return (v if config.pairing == "halves" else v.transpose(dim, dim + 1)).flatten(dim, dim + 1)


def quantize_activation(x: Tensor, scale: float, zero: int = UNSIGNED) -> Tensor:
    """clip(round(x / scale), -zero, 255 - zero): uint8 where zero is 0, else int8; ties to even, one float32 division.

    The divisor is a tensor on x's device: by a plain number CUDA would multiply with the reciprocal.
    """
    return torch.round(x / x.new_tensor(scale)).clamp(-zero, 255 - zero).to(code_type(zero))


def activation_operand(code: Tensor, activations: tuple[Activation, ...], config: NBSMT, dim: int = 1) -> Tensor:
    """The activation operands of `recoup.nbsmt.groups`, side by side along ``dim``: uint8 or int8 in, the same out.

    Channels are zero-padded to whole slots, so ``dim`` grows from C to len(activations) * T * ceil(C / T).
    """
    dim %= code.dim()
    x = split_threads(code.to(torch.int16), config, dim)
    values = activation_values(x, config, zero_of(code))
    out = []
    for activation in activations:
        active = torch.zeros_like(x)
        for offset in activation.partners:
            active += (x != 0).roll(-offset, dim)
        none, one, more = (values[name] for name in activation.values)
        chosen = torch.where(active == 0, none, torch.where(active == 1, one, more))
        out.append(merge_threads(chosen, config, dim))
    return torch.cat(out, dim).to(code.dtype)


def activation_values(x: Tensor, config: NBSMT, zero: int) -> dict[ActivationValue, Tensor]:
    """What a group may take of values x."""
    r, wide = reduce_activation(x, config, zero), activation_port(config, zero).wide(x)
    return {"0": torch.zeros_like(x), "x": x, "r": r, "narrow": x.where(~wide, 0), "wide": x.where(wide, 0)}


def slots(x: Tensor, w: Tensor, config: NBSMT):
    """Yield (x, w, active, contribution) per slot, each [T, M, N]-broadcastable int64, in slot order."""
    x_TMS = split_threads(x.long(), config, 1).transpose(0, 1)
    w_TSN = split_threads(w.long(), config, 0)
    for s in range(w_TSN.shape[1]):
        x_TM1, w_T1N = x_TMS[:, :, s, None], w_TSN[:, s, None, :]
        active = (x_TM1 != 0) & (w_T1N != 0)
        counted = active if config.zero_test else torch.ones_like(active)
        others = counted.sum(0) - counted.long()
        yield x_TM1, w_T1N, active, contribution(x_TM1, w_T1N, others, config, zero_of(x))


def matmul(x: Tensor, w: Tensor, config: NBSMT) -> Tensor:
    """X W on the shared multiplier: x uint8 or int8 (signed) [M, K], w int8 [K, N] -> int32 [M, N]."""
    total = torch.zeros(x.shape[0], w.shape[1], dtype=torch.int64)
    for _, _, _, product in slots(x, w, config):
        total = register(total + product.sum(0), config.accumulator)
    return total.to(torch.int32)


def register(total: Tensor, accumulator: Int | None) -> Tensor:
    """What a register holds after a sum, int64: saturated to its ends, or modulo 2^bits; None: the sum."""
    if accumulator is None:
        return total
    half = 1 << (accumulator.bits - 1)
    if accumulator.overflow == "saturate":
        return total.clamp(-half, half - 1)
    return (total + half).remainder(2 * half) - half


def statistics(x: Tensor, w: Tensor, config: NBSMT) -> dict[str, int | float]:
    """Counts over the M*N*S slots; see `recoup.nbsmt.statistics`."""
    count = {"slots": 0, "collisions": 0, "lossy": 0, "active": 0, "busy": 0}
    for x_TM1, w_T1N, active, product in slots(x, w, config):
        sharing = active.sum(0)
        count["slots"] += sharing.numel()
        count["collisions"] += int((sharing >= 2).sum())
        count["lossy"] += int((product != x_TM1 * w_T1N).sum())
        count["active"] += int(active.sum())
        count["busy"] += int((sharing >= 1).sum())
    busy = count.pop("busy")
    return {**count, "utilization": busy / count["slots"] if count["slots"] else 0.0}
