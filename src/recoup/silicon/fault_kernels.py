"""Numba kernels of stuck-at faults: every net without fault once, then of each fault only what it makes different.

A difference is followed gate by gate in the order of evaluation, and through registers into the next step; where none
is left, and the fault's own net has the value it is stuck at anyway, a step costs nothing. Net 0 is constant zero, net
1 constant one; 64 lanes a word.
"""

import numpy as np
from numba import njit

from recoup.silicon.kernels import ONES, block, evaluate, set_bits

_WORD = 64


@njit(nogil=True, cache=True)
def traced(program, input_nets, inputs, states, loaded, initial, good):
    """Zero delay: fill ``good`` [steps, nets, words] with what every net is worth without fault."""
    steps, _, words = inputs.shape
    for s in range(steps):
        values = good[s]
        for w in range(words):
            values[0, w], values[1, w] = np.uint64(0), ONES
        for r in range(len(states)):
            for w in range(words):
                values[states[r], w] = good[s - 1, loaded[r], w] if s else initial[r, w]
        for i in range(len(input_nets)):
            for w in range(words):
                values[input_nets[i], w] = inputs[s, i, w]
        block(program, values, words)


@njit(nogil=True, cache=True)
def undetected(program, first_reader, readers, first_load, loads, states, good, watched, sites, stuck, missed):
    """Which faults no watched net shows: ``missed`` [faults] becomes False where one does.

    Args:
        program: rows (operation, target, a, b, c), each after those that it reads.
        first_reader, readers: the rows that read net n are readers[first_reader[n] : first_reader[n + 1]].
        first_load, loads: likewise the registers that are loaded with it.
        states: the nets of the registers' states.
        good: `traced`.
        watched: [steps, nets], at which of them a tester looks.
        sites, stuck: the faults: nets, and the word that each is stuck at.
    """
    steps, nets, words = good.shape
    bad = np.zeros((nets, words), np.uint64)
    stamp = np.zeros(nets, np.int64)
    touched = np.empty(nets, np.int64)
    due = np.zeros(len(program) // _WORD + 1, np.uint64)
    carried = np.empty(len(states), np.int64)
    carry = np.empty((len(states), words), np.uint64)
    now = 0
    for f in range(len(sites)):
        if not missed[f]:
            continue
        site, level, count = sites[f], stuck[f], 0
        for s in range(steps):
            now += 1
            values, seen = good[s], False
            for w in range(words):
                seen |= values[site, w] != level
            if not seen and not count:
                continue
            seen, changed = False, 0
            for i in range(-1, count):
                net = site if i < 0 else states[carried[i]]
                if i >= 0 and net == site:
                    continue
                differs = False
                for w in range(words):
                    bad[net, w] = level if i < 0 else carry[i, w]
                    differs |= bad[net, w] != values[net, w]
                if differs:
                    stamp[net], touched[changed], changed = now, net, changed + 1
                    seen |= watched[s, net]
                    _await(due, first_reader, readers, net)
            if not seen:
                seen, changed = _follow(
                    program, first_reader, readers, values, watched[s], site, bad, stamp, now, due, touched, changed
                )
            if seen:
                missed[f] = False
                due[:] = np.uint64(0)
                break
            count = 0
            for i in range(changed):
                net = touched[i]
                for k in range(first_load[net], first_load[net + 1]):
                    carried[count] = loads[k]
                    for w in range(words):
                        carry[count, w] = bad[net, w]
                    count += 1


@njit(nogil=True, inline="always")
def _await(due, first_reader, readers, net):
    """A net's readers are to be evaluated again."""
    for k in range(first_reader[net], first_reader[net + 1]):
        row = readers[k]
        due[row // _WORD] |= np.uint64(1) << np.uint64(row % _WORD)


@njit(nogil=True, cache=True)
def _follow(program, first_reader, readers, values, watched, site, bad, stamp, now, due, touched, changed):
    """Evaluate what is due, in order, until nothing is or a watched net differs; whether one did, and the count of
    touched nets."""
    words = bad.shape[1]
    for place in range(len(due)):
        while due[place]:
            low = due[place] & (~due[place] + np.uint64(1))
            due[place] ^= low
            row = place * _WORD + set_bits(low - np.uint64(1))
            code, out, a, b = program[row, 0], program[row, 1], program[row, 2], program[row, 3]
            if out == site:
                continue
            differs = False
            for w in range(words):
                x = bad[a, w] if stamp[a] == now else values[a, w]
                y = bad[b, w] if stamp[b] == now else values[b, w]
                z = evaluate(code, x, y)
                bad[out, w] = z
                differs |= z != values[out, w]
            if differs:
                stamp[out], touched[changed], changed = now, out, changed + 1
                if watched[out]:
                    return True, changed
                _await(due, first_reader, readers, out)
    return False, changed
