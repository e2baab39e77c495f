"""The reference against the independent port model, and the groups against the reference: no difference allowed."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recoup.nbsmt import reference
from recoup.nbsmt.config import NBSMT, PAIRINGS, POLICIES, PORTS, ROUNDINGS, THREADS
from recoup.nbsmt.groups import groups
from recoup.nbsmt.weights import weight_operand
from tests.nbsmt import port
from tests.nbsmt.strategies import configs, operands, port_of


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("policy", POLICIES)
def test_reductions_of_every_code_equal_the_port_model(policy, rounding):
    config = NBSMT(policy=policy, rounding=rounding)
    x, w = torch.arange(256), torch.arange(-128, 128)
    assert reference.reduce_activation(x, config).tolist() == [
        port.narrow_activation(v, policy, rounding) for v in range(256)
    ]
    assert reference.reduce_weight(w, config).tolist() == [
        port.narrow_weight(v, policy, rounding) for v in range(-128, 128)
    ]
    for bits in PORTS:
        assert reference.reduce_activation(w, config.replace(port=bits), 128).tolist() == [
            port.narrow_activation(v, policy, rounding, bits) for v in range(-128, 128)
        ]


def test_a_signed_code_on_four_bits_is_cut_as_a_weight():
    v = torch.arange(-128, 128)
    for policy, rounding in itertools.product(POLICIES, ROUNDINGS):
        config = NBSMT(policy=policy, rounding=rounding, port=4)
        assert torch.equal(reference.reduce_activation(v, config, 128), reference.reduce_weight(v, config))


@settings(max_examples=120, deadline=None)
@given(
    configs,
    st.integers(0, 2**32 - 1),
    st.integers(1, 4),
    st.integers(1, 23),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.3, 0.8]),
    st.booleans(),
)
def test_reference_equals_the_port_model(config, seed, rows, size, columns, zeros, signed):
    x, w = operands(seed, rows, size, columns, zeros, signed)
    expected, counts = port.matmul(
        x.tolist(), w.tolist(), config.threads, config.policy, config.rounding, config.pairing, port_of(config, signed)
    )
    assert reference.matmul(x, w, config).tolist() == expected
    found = reference.statistics(x, w, config)
    busy = counts.pop("busy")
    assert found == {**counts, "utilization": busy / counts["slots"]}


@pytest.mark.parametrize(
    "config",
    [NBSMT(*fields) for fields in itertools.product(THREADS, POLICIES, ROUNDINGS, PAIRINGS)],
    ids=lambda c: f"{c.threads}-{c.policy}-{c.rounding}-{c.pairing}",
)
def test_groups_equal_the_reference(config):
    for seed, (size, zeros) in enumerate([(1, 0.0), (13, 0.0), (24, 0.4), (9, 0.9)]):
        for signed, bits in ((False, 5), (True, PORTS[seed % 2])):
            x, w = operands(seed, 6, size, 7, zeros, signed)
            own = config.replace(port=bits)
            operand = weight_operand(w.t(), own, 128 if signed else 0)
            a_MJ = reference.activation_operand(x, operand.activations, own)
            product = a_MJ.long() @ operand.weight_OGJkk.t().long()
            assert torch.equal(product, reference.matmul(x, w, own).long())
            assert int(product.abs().max()) <= operand.bound


def test_two_threads_take_two_groups_and_four_take_twelve():
    counts = {(t, p): len(groups(NBSMT(t, p))) for t in THREADS for p in POLICIES}  # type: ignore[arg-type]
    assert max(n for (t, _), n in counts.items() if t == 2) == 2
    assert {p: n for (t, p), n in counts.items() if t == 4} == {
        "S": 12, "S+A": 12, "S+W": 12, "S+aW": 12, "S+Aw": 16, "A": 1, "W": 1, "Aw": 1, "aW": 1,
    }  # fmt: skip


def test_a_layer_without_zero_weights_needs_few_groups():
    _, w = operands(0, 1, 16, 8, zeros=0.0)
    w[w == 0] = 1
    assert len(weight_operand(w.t(), NBSMT(threads=2)).activations) == 1
    assert len(weight_operand(w.t(), NBSMT(threads=4)).activations) == 2


def test_a_layer_of_zeros_keeps_one_group():
    operand = weight_operand(torch.zeros(3, 8, dtype=torch.int8), NBSMT(threads=4))
    assert len(operand.activations) == 1
    assert operand.bound == 0
