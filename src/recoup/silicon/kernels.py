"""Numba kernels over netlists: 64 lanes a word; zero delay, toggles with zero and with inertial delay."""

import numpy as np
from numba import njit

COPY, NOT, AND, OR, XOR, NAND, NOR, XNOR = range(8)
OPERATIONS = {
    "not": NOT,
    "and": AND,
    "or": OR,
    "xor": XOR,
    "not and": NAND,
    "not or": NOR,
    "not xor": XNOR,
}
"""Operators of an expression -> operation; a `not` over another is one operation with it."""
ONES = np.uint64(0xFFFFFFFFFFFFFFFF)
_BLOCK = 32


@njit(nogil=True, inline="always")
def evaluate(code, x, y):
    if code == AND:
        return x & y
    if code == NAND:
        return ~(x & y)
    if code == NOT:
        return ~x
    if code == XOR:
        return x ^ y
    if code == OR:
        return x | y
    if code == NOR:
        return ~(x | y)
    if code == XNOR:
        return ~(x ^ y)
    return x


@njit(nogil=True, cache=True)
def block(program, values, words):
    """All operations on ``words`` words."""
    for i in range(program.shape[0]):
        code, out, a, b = program[i, 0], program[i, 1], program[i, 2], program[i, 3]
        if code == AND:
            for w in range(words):
                values[out, w] = values[a, w] & values[b, w]
        elif code == NAND:
            for w in range(words):
                values[out, w] = ~(values[a, w] & values[b, w])
        elif code == NOT:
            for w in range(words):
                values[out, w] = ~values[a, w]
        elif code == XOR:
            for w in range(words):
                values[out, w] = values[a, w] ^ values[b, w]
        elif code == OR:
            for w in range(words):
                values[out, w] = values[a, w] | values[b, w]
        elif code == NOR:
            for w in range(words):
                values[out, w] = ~(values[a, w] | values[b, w])
        elif code == XNOR:
            for w in range(words):
                values[out, w] = ~(values[a, w] ^ values[b, w])
        else:
            for w in range(words):
                values[out, w] = values[a, w]


@njit(nogil=True, cache=True)
def simulate(program, nets, input_nets, inputs, output_nets, outputs, states, loaded, initial):
    """Zero delay: fill ``outputs`` [steps, output bits, words] from ``inputs`` [steps, input bits, words]."""
    steps, _, total = inputs.shape
    values = np.zeros((nets, _BLOCK), np.uint64)
    values[1, :] = ONES
    held = np.empty((len(states), _BLOCK), np.uint64)
    for start in range(0, total, _BLOCK):
        words = min(_BLOCK, total - start)
        for r in range(len(states)):
            for w in range(words):
                values[states[r], w] = initial[r, start + w]
        for s in range(steps):
            for i in range(len(input_nets)):
                for w in range(words):
                    values[input_nets[i], w] = inputs[s, i, start + w]
            block(program, values, words)
            for o in range(len(output_nets)):
                for w in range(words):
                    outputs[s, o, start + w] = values[output_nets[o], w]
            for r in range(len(states)):
                for w in range(words):
                    held[r, w] = values[loaded[r], w]
            for r in range(len(states)):
                for w in range(words):
                    values[states[r], w] = held[r, w]


@njit(nogil=True, inline="always")
def set_bits(x):
    """How many bits are set."""
    x = x - ((x >> np.uint64(1)) & np.uint64(0x5555555555555555))
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((x * np.uint64(0x0101010101010101)) >> np.uint64(56))


@njit(nogil=True, cache=True)
def zero_delay(program, nets, input_nets, inputs, states, loaded, initial, running, rises, falls, seen):
    """Toggles of every net between settled values, and how often registers are clocked in which state.

    ``running``: [registers, steps], whether the clock runs; ``seen``: [registers, 4], by 2 D + Q, counted where so.
    """
    steps, _, total = inputs.shape
    values = np.zeros((nets, 1), np.uint64)
    before = np.zeros(nets, np.uint64)
    held = np.empty(len(states), np.uint64)
    for word in range(total):
        values[:, 0] = 0
        values[1, 0] = ONES
        for r in range(len(states)):
            values[states[r], 0] = initial[r, word]
        for s in range(steps):
            for i in range(len(input_nets)):
                values[input_nets[i], 0] = inputs[s, i, word]
            block(program, values, 1)
            for n in range(nets):
                if s:
                    rises[n] += set_bits(values[n, 0] & ~before[n])
                    falls[n] += set_bits(before[n] & ~values[n, 0])
                before[n] = values[n, 0]
            _clock(values[:, 0], held, states, loaded, running, seen, s)


@njit(nogil=True, cache=True)
def _clock(values, held, states, loaded, running, seen, s):
    """Count the registers' states before the edge that ends step ``s``, and load them."""
    for r in range(len(states)):
        d, q = values[loaded[r]], values[states[r]]
        if running[r, s]:
            seen[r, 0] += set_bits(~d & ~q)
            seen[r, 1] += set_bits(~d & q)
            seen[r, 2] += set_bits(d & ~q)
            seen[r, 3] += set_bits(d & q)
        held[r] = d
    for r in range(len(states)):
        values[states[r]] = held[r]


@njit(nogil=True, cache=True)
def inertial(
    program, first, targets, delays, low, high, nets, input_nets, inputs, states, loaded, initial, starts, running,
    rises, falls, seen,
):  # fmt: skip
    """Toggles with inertial delay: an output becomes 1 (0) when its function was 1 (0) for the gate's whole delay.

    Args:
        program, first, targets: the gates' operations; gate g is rows first[g] to first[g + 1] and drives targets[g].
            Rows before first[0] copy or invert registers' states; rows behind the last gate serve the registers.
        delays: of gates, ticks, at least 1.
        low, high: [nets] the ticks between which a net can change.
        starts: [rows before first[0]] and registers: ticks after the clock at which states change, by net.
    """
    steps, _, total = inputs.shape
    ticks = np.int64(high.max()) + 2
    wave = np.zeros((nets, ticks), np.uint64)
    settled = np.zeros(nets, np.uint64)
    held = np.empty(len(states), np.uint64)
    function = np.empty(ticks, np.uint64)
    for word in range(total):
        settled[:] = 0
        settled[1] = ONES
        wave[0, :], wave[1, :] = np.uint64(0), ONES
        for r in range(len(states)):
            settled[states[r]] = initial[r, word]
        for s in range(steps):
            counted = s > 0
            for i in range(len(input_nets)):
                _edge(wave, settled, input_nets[i], inputs[s, i, word], 0, counted, rises, falls)
            for r in range(len(states)):
                value = held[r] if s else initial[r, word]
                _edge(wave, settled, states[r], value, starts[states[r]], counted, rises, falls)
            for i in range(first[0]):
                out, value = program[i, 1], settled[program[i, 2]]
                value = ~value if program[i, 0] == NOT else value
                _edge(wave, settled, out, value, starts[out], counted, rises, falls)
            for g in range(len(targets)):
                _gate(program, first[g], first[g + 1], targets[g], delays[g], low, high, wave, settled, function,
                      s == 0, counted, rises, falls)  # fmt: skip
            for i in range(first[len(targets)], program.shape[0]):
                out, a, b = program[i, 1], program[i, 2], program[i, 3]
                settled[out] = evaluate(program[i, 0], settled[a], settled[b])
            for r in range(len(states)):
                d, q = settled[loaded[r]], settled[states[r]]
                if running[r, s]:
                    seen[r, 0] += set_bits(~d & ~q)
                    seen[r, 1] += set_bits(~d & q)
                    seen[r, 2] += set_bits(d & ~q)
                    seen[r, 3] += set_bits(d & q)
                held[r] = d


@njit(nogil=True, inline="always")
def _edge(wave, settled, net, value, tick, counted, rises, falls):
    """A net that changes once, at ``tick``."""
    old = settled[net]
    for t in range(tick):
        wave[net, t] = old
    for t in range(tick, wave.shape[1]):
        wave[net, t] = value
    if counted:
        rises[net] += set_bits(value & ~old)
        falls[net] += set_bits(old & ~value)
    settled[net] = value


@njit(nogil=True, cache=True)
def _gate(program, begin, end, target, delay, low, high, wave, settled, function, fresh, counted, rises, falls):
    """One gate's waveform, from those of its inputs."""
    start, stop = low[target] - delay, high[target] - delay  # the function is constant before and after
    for i in range(begin, end):
        code, out, a, b = program[i, 0], program[i, 1], program[i, 2], program[i, 3]
        for t in range(start, stop + 1):
            value = evaluate(code, wave[a, t], wave[b, t])
            if i == end - 1:
                function[t] = value
            else:
                wave[out, t] = value
    now = function[stop] if fresh else settled[target]
    last = wave.shape[1]
    for t in range(min(start + delay, last)):
        wave[target, t] = now
    # Before `start` the function has its old value, which is what the output shows.
    up = down = np.int64(0)
    for t in range(start + delay, min(stop + delay + 1, last)):
        ones, zeros = ONES, np.uint64(0)
        for k in range(t - delay, t):
            level = function[min(k, stop)] if k >= start else now
            ones &= level
            zeros |= level
        out = ones | (now & zeros)
        if counted:
            up += set_bits(out & ~now)
            down += set_bits(now & ~out)
        now = out
        wave[target, t] = now
    for t in range(stop + delay + 1, last):
        wave[target, t] = function[stop]
    rises[target] += up
    falls[target] += down
    settled[target] = function[stop]
