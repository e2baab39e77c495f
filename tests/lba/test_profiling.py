"""The sampled sums are the layer's own, and the shares are what counting says."""

import pytest
import torch
from torch import nn

import recoup as rc
from recoup import lba
from recoup.errors import RecoupError
from recoup.formats import Float
from recoup.lba import LBA, reference
from recoup.lba.profiling import sample, sampled
from tests.networks import batches_of, small_net

LAYERS = [
    (nn.Linear(20, 5), (3, 4, 20)),
    (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (3, 4, 11)),
    (nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(1, 2), groups=2), (2, 4, 8, 9)),
    (nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"), (4, 7, 7)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_sampled_sums_are_the_layers_outputs(layer, shape):
    layer.bias = None
    model = rc.emulate_(nn.Sequential(layer), LBA.biased(4, 3))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = model(x)
    last = y.dim() - 1 if isinstance(layer, nn.Linear) else y.dim() - layer.weight.dim() + 1
    flat = y.movedim(last, 0).reshape(layer.weight.shape[0], -1).flatten()
    x_SK, w_SK, index = sample(model[0], x, 100, seed=1)
    sums = torch.zeros(100, dtype=torch.float64)
    for step, _ in sampled(x_SK, w_SK, model[0].config):
        sums = step.after if step.outer else sums
    assert torch.equal(sums.float() + 0.0, flat[index])


def test_shares_of_a_layer_that_can_be_counted_by_hand():
    # Products 4, 0.25, 0.125 and 60 of the unit below: 0.125 underflows, 60 saturates at 7.5; 4 + 0.25 swamps.
    unit = LBA(Float.lba(3, 3, bias=2), Float.lba(3, 2, bias=2), chunk=None)
    assert unit.product is not None
    assert (unit.product.smallest_normal, unit.product.largest_value) == (0.25, 60.0)
    layer = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[4.0, 0.25, 0.125, 60.0]]))
    model = rc.emulate_(nn.Sequential(layer), unit)
    with pytest.warns(rc.RecoupWarning, match="in 1 layers: 0 100 %"):
        (row,) = lba.profile(model, [torch.ones(1, 4)], outputs=10)
    assert (row.name, row.kind, row.terms, row.chunk, row.bits, row.outputs) == ("0", "Linear", 4, 4, 6, 10)
    assert row.underflowed == 1 / 4
    assert row.swamped == 1 / 3  # 0.25, of the products that were not zero
    assert row.saturated == 1 / 4
    assert row.overflowed == 2 / 5  # 4 + 60 beyond 56, and so the outer sum
    # a fit of one output in float64: quotients and a root, each rounded
    assert row.slope == pytest.approx(56 / 64.375, rel=1e-12)
    assert row.residual == pytest.approx(0, abs=1e-12)


def test_layers_that_no_input_of_the_batchs_range_saturates():
    model = rc.emulate_(nn.Sequential(nn.Linear(30, 4), nn.ReLU(), nn.Linear(4, 2)), LBA())
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([2.0, -2.0]).repeat(15))  # their sums stay small, half of them would not
        model[2].weight.fill_(0.01)
    wide, narrow = (lba.profile(model, [torch.full((3, 30), value)], outputs=8) for value in (3.0, 1.0))
    assert [row.cannot_saturate for row in wide] == [False, True]
    assert [row.cannot_saturate for row in narrow] == [True, True]


def test_every_layer_in_the_order_of_its_run():
    model = rc.emulate_(small_net(), LBA.m7e4())
    rows = lba.profile(model, batches_of(1, 4), outputs=64)
    assert [row.name for row in rows][:3] == ["stem", "block1.conv1", "block1.conv2"]
    assert rows == lba.profile(model, batches_of(1, 4), outputs=64)
    assert all(0.9 < row.slope <= 1.01 and row.residual < 0.1 for row in rows)
    assert rows[0].to_dict()["name"] == "stem"


@pytest.mark.parametrize("config", [LBA(), LBA.fp32(), LBA.int16("wrap", chunk=2)], ids=repr)
def test_steps_stay_on_their_device(config):
    """On a device without values, so that it runs where there is no GPU."""
    x = torch.zeros(5, 4, device="meta")
    for steps in (reference.steps(x, x.t(), config), reference.steps(x[:0], x.t(), config)):
        for step in steps:
            assert {v.device.type for v in (step.before, step.after, step.added, step.overflow)} == {"meta"}
    assert reference.matmul(x, x.t(), config).device.type == "meta"


def test_bad_input():
    with pytest.raises(RecoupError, match=r"lba.profile\(outputs=0\): outputs must be an integer from 1"):
        lba.profile(rc.emulate_(small_net(), LBA()), batches_of(1, 2), outputs=0)
    with pytest.raises(RecoupError, match=r"lba.profile\(outputs='x'\)"):
        lba.profile(rc.emulate_(small_net(), LBA()), batches_of(1, 2), outputs="x")  # type: ignore[arg-type]
    with pytest.raises(RecoupError, match="no layer on a narrow accumulator"):
        lba.profile(small_net(), batches_of(1, 2))


def test_a_weight_that_is_no_number_has_no_bound_and_is_measured_all_the_same():
    layer = nn.Linear(4, 2, bias=False)
    layer.weight.data[0, 0] = float("nan")
    model = rc.emulate_(nn.Sequential(layer), LBA(nonfinite="propagate"))
    (row,) = lba.profile(model, [torch.ones(3, 4)])
    assert row.cannot_saturate is None
