"""What a profile counts, against the kernels, the reference and counts by hand; gains."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import recoup as rc
from recoup import tensorcore
from recoup.errors import RecoupError
from recoup.tensorcore import TensorCore, TensorCoreLinear, reference
from recoup.tensorcore.profiling import summed
from tests.networks import images, small_net
from tests.tensorcore.strategies import KINDS, operands, same, units

HOPPER = TensorCore.hopper_fp8()


@given(units(), st.integers(1, 60), st.sampled_from(KINDS), st.integers(0, 2**30))
@settings(max_examples=40)
def test_sums_step_by_step_are_the_units(unit, terms, kind, seed):
    a, b = operands(unit, (5, terms, 1), kind, seed)
    got = summed(a.double().numpy(), b.mT.expand(5, terms).double().numpy(), unit)
    assert same(torch.from_numpy(got.sums).float().view(5, 1), reference.matmul(a, b, unit))


def test_counts_by_hand():
    # Beside 1, 13 bits hold 2^-13; 3 2^-14 loses a bit, 2^-14 all of it; a zero is no product.
    x = np.array([[1.0, 2.0**-7, 1.5 * 2.0**-7, 2.0**-7, 0.0]])
    w = np.array([[1.0, 2.0**-6, 2.0**-6, 2.0**-7, 1.0]])
    found = summed(x, w, HOPPER)
    assert (found.nonzero, found.cut, found.lost) == (4, 2, 1)
    assert found.sums.tolist() == [1 + 2 * 2.0**-13]


def test_a_layer_whose_sums_have_one_sign_shrinks_and_a_gain_undoes_it():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(4096, 8))
    with torch.no_grad():
        layer[0].weight.uniform_(0, 1)
    x = torch.rand(16, 4096)
    rc.emulate_(layer, HOPPER)
    (row,) = tensorcore.profile(layer, [x], outputs=128)
    assert (row.name, row.kind, row.terms, row.outputs) == ("0", "Linear", 4096, 128)
    assert row.slope is not None
    assert row.residual is not None
    assert row.error is not None
    assert 0.90 < row.slope < 0.95  # specs: every output 7 % too small
    assert row.cut > 0.8
    assert row.residual < 0.1 * row.error
    tensorcore.correct_gain_(layer, [x])
    assert layer[0].gain.shape == (8,)
    assert torch.allclose(layer[0].gain, torch.full((8,), 1 / row.slope), rtol=0.01)
    layer[0].mode = "baseline"
    exact = layer(x)
    layer[0].mode = "emulate"
    assert float(((layer(x) - exact).norm() / exact.norm()).detach()) < 0.01
    assert "gain" in repr(layer)
    rc.undo_(layer)
    assert layer[0].gain is None


def test_a_network_has_a_row_a_layer_in_either_order():
    for order in ("ckk", "kkc"):
        model = rc.emulate_(small_net(), HOPPER.replace(order=order))
        rows = tensorcore.profile(model, [images(4)], outputs=64)
        assert [row.name for row in rows] == [name for name, m in model.named_modules() if hasattr(m, "config")]
        assert all(0 <= row.lost <= row.cut <= 1 and row.error is not None and row.error < 0.05 for row in rows)


def test_overflow_is_counted():
    layer = nn.Sequential(nn.Linear(64, 4))
    nn.init.constant_(layer[0].weight, 1.0)
    rc.emulate_(layer, HOPPER.replace(output="float16"))
    (row,) = tensorcore.profile(layer, [torch.ones(3, 64)], outputs=16)
    assert row.overflowed == 1.0
    assert row.error is row.slope is None
    said = pytest.warns(rc.RecoupWarning, match=r"1 layers: 0 100 %; TensorCore\(amax=16\)")
    with said, pytest.raises(RecoupError, match="holds NaN or infinity"):
        rc.evaluate(layer, [(torch.ones(3, 64), torch.zeros(3, dtype=torch.long))])


def test_infinite_outputs_have_no_say_in_a_gain():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(64, 4))
    with torch.no_grad():
        layer[0].weight[1] = 1.0  # type: ignore[index]
    x = torch.randn(256, 64)
    x[7] = 3.0
    rc.emulate_(layer, HOPPER.replace(output="float16", amax=96.0))
    assert int(layer(x).isinf().sum()) == 1
    with pytest.warns(rc.RecoupWarning, match=r"1 outputs of 1 layers were NaN or infinite"):
        tensorcore.correct_gain_(layer, [x])
    gain = layer[0].gain
    assert isinstance(gain, torch.Tensor)
    assert bool(((gain - 1).abs() < 0.01).all())
    layer[0].mode = "float"
    with pytest.raises(RecoupError, match="run in mode 'float'"):
        tensorcore.correct_gain_(layer, [x])


def test_nothing_is_off_where_all_is_zero():
    (row,) = tensorcore.profile(nn.Sequential(TensorCoreLinear(8, 2, config=HOPPER)), [torch.zeros(2, 8)], outputs=4)
    assert (row.slope, row.residual, row.error) == (1.0, 0.0, 0.0)


def test_what_is_refused():
    with pytest.raises(RecoupError, match="no layer on a tensor core"):
        tensorcore.profile(nn.Linear(2, 2), [torch.ones(1, 2)])
    with pytest.raises(RecoupError, match="outputs"):
        tensorcore.profile(TensorCoreLinear(2, 2), [torch.ones(1, 2)], outputs=0)
    with pytest.raises(RecoupError, match="per must be"):
        tensorcore.correct_gain_(nn.Sequential(TensorCoreLinear(2, 2)), [torch.ones(1, 2)], "row")  # type: ignore[arg-type]


def test_a_network_costs_its_operands_and_accumulators():
    model, floating = small_net(), rc.cost(small_net(), None, (3, 8, 8))
    for output, bits in (("e8m13", 22), ("float16", 16)):
        cost = rc.cost(model, {"re:.*": HOPPER.replace(output=output)}, (3, 8, 8))
        for layer, plain in zip(cost.layers, floating.layers, strict=True):
            assert layer.cycles == plain.cycles
            assert layer.traffic <= plain.traffic
            if layer.macs and layer.hardware != "float":
                assert layer.accumulator == bits
                assert layer.traffic < plain.traffic
