"""A shift of the exponents is a scaled weight, bit for bit; the chosen one is the largest that holds every sum."""

import copy
import pickle
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import recoup as rc
from recoup.formats import Float, Int
from recoup.lba import LBA, reference
from recoup.models.attention import AttentionProducts
from recoup.network.emulated import emulated_layers
from tests.lba import exact
from tests.lba.strategies import as_floats, fits, float32, operands, others, truncating
from tests.lba.test_cpu import everywhere, two
from tests.networks import batches_of, images, small_net


@settings(max_examples=60)
@given(st.data(), st.integers(-9, 9))
def test_a_shifted_unit_is_a_unit_with_scaled_weights(data, shift):
    """Against fractions, which scale the weight and the result as the definition says."""
    config = data.draw(truncating() | others())
    a, b = data.draw(operands(config, most=9))
    power = Fraction(2) ** shift
    columns = [[Fraction(w) * power for w in column] for column in as_floats(b.t().contiguous())]
    assume(fits(a, b, config.shifted(shift)))
    rows = [[exact.dot(row, column, config)[0] / power for column in columns] for row in as_floats(a)]
    expected = torch.tensor([[float32(value) for value in row] for row in rows])
    assert torch.equal(reference.matmul(a, b, config.shifted(shift)), expected)
    assert torch.equal(everywhere(a, b, config.shifted(shift), levels=two(data)), expected)


@given(st.data(), st.integers(-9, 9))
def test_shifts_are_taken_back_exactly(data, shift):
    config = data.draw(truncating() | others())
    assert config.shifted(shift).shifted(-shift) == config
    low, high = config.shift_range
    _ = config.shifted(low), config.shifted(high)
    for beyond in (low - 1, high + 1):
        with pytest.raises(rc.RecoupError, match="shift"):
            config.shifted(beyond)


def test_a_format_with_a_largest_value_of_its_own_moves_whole():
    unit = LBA(None, Float.parse("e4m3fn")).shifted(3)
    assert isinstance(unit.accumulator, Float)
    assert unit.accumulator.largest_value == 448 / 8


LAYERS = [
    (lambda: nn.Linear(20, 5), (7, 20)),
    (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (3, 4, 11)),
    (lambda: nn.Conv2d(4, 6, (3, 2), padding=(2, 1), groups=2), (2, 4, 8, 9)),
]
UNITS = [LBA.m7e4(), LBA.biased(4, 3, operands=rc.lba.FP8), LBA.int12(operands=Int(4)), LBA.biased(5, 4, chunk=None)]


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
@pytest.mark.parametrize("unit", UNITS, ids=str)
@pytest.mark.parametrize("scale", [0.03, 60.0])
def test_the_chosen_shift_is_the_largest_that_holds_every_partial_sum(layer, shape, unit, scale):
    torch.manual_seed(0)
    model = rc.emulate_(nn.Sequential(layer()), unit)
    x = torch.randn(shape) * scale
    assert rc.lba.choose_exponents_(model, [x]) is model
    chosen: Any = model[0]
    held = [holds(chosen, x, unit, chosen.shift + more) for more in (0, 1)]
    whole = isinstance(unit.operands, Int)
    assert held[0]
    assert not held[1] or (whole and chosen.shift == 0)


def holds(layer, x, unit, shift):
    """Whether products and partial sums, one scalar at a time in fractions, keep within a shifted range."""
    x, w, _ = layer._operands(x)
    if isinstance(layer, nn.Linear):
        pairs = [(row, channel) for row in x for channel in w]
    else:
        image, geometry = layer.in_2d(x)
        columns, outputs = geometry.columns(image), w.shape[0] // geometry.groups
        pairs = [(p, w[o].flatten()) for o in range(w.shape[0]) for p in columns[o // outputs].t()]
    power, scale = Fraction(2) ** shift, Fraction(unit.scale)
    bound = Fraction(unit.accumulator.largest_value) * scale / 2
    for terms, channel in pairs:
        total = Fraction(0)
        products = [Fraction(a) * Fraction(b) * power for a, b in zip(terms.tolist(), channel.tolist(), strict=True)]
        if unit.product is not None and any(abs(p) >= Fraction(unit.product.largest_value) for p in products):
            return False
        for start in range(0, len(products), unit.chunk or len(products)):
            s = Fraction(0)
            for p in products[start : start + (unit.chunk or len(products))]:
                s += p
                if abs(s) >= bound:
                    return False
            total += s
            if abs(total) >= bound:
                return False
    return True


def grown(factor=255.0):
    """A small network whose inputs are 0 to 255 in size, the same function in float."""
    model = small_net()
    with torch.no_grad():
        model.block1.bn1.running_mean.mul_(factor)
        model.block1.bn1.running_var.mul_(factor**2)
    model.stem.weight.data.mul_(factor)
    model.stem.bias.data.mul_(factor)
    return model


SAID = r"layers: .*stem \d+(\.\d+)? %.*; rc\.lba\.choose_exponents_\(model, batches\) moves"


def test_saturation_is_said_with_layer_share_and_remedy_and_goes():
    labels, model = torch.zeros(8, dtype=torch.long), rc.emulate_(grown(), LBA.m7e4())
    data = [(images(8), labels)]
    with pytest.warns(rc.RecoupWarning, match="evaluate: sums end at the largest value.*" + SAID):
        rc.evaluate(model, data)
    with pytest.warns(rc.RecoupWarning, match="lba.profile: sums end.*" + SAID):
        rc.lba.profile(model, data, outputs=256)
    with pytest.warns(rc.RecoupWarning, match="repair_: sums end.*" + SAID) as told:
        rc.repair_(model, data)
    assert len(told) == 1
    with pytest.warns(rc.RecoupWarning, match=r"calibrate_ \(in float\): sums end.*" + SAID):
        rc.calibrate_(rc.emulate_(grown(), LBA.m7e4(), {"classifier": None}), data, {"classifier": True})
    with pytest.warns(rc.RecoupWarning, match="choose_exponents_: undid gain .* and statistics"):
        rc.lba.choose_exponents_(model, data)
    stem: Any = model.stem
    assert stem.shift < -3
    rc.evaluate(model, data)  # no warning
    rc.lba.profile(model, data, outputs=64)
    rc.repair_(model, data)
    assert "exponents (choose_exponents_, 8 images)" in rc.describe(model).to_dict()["stem"]["repairs"]
    assert f", shift {model.stem.shift}" in repr(model.stem)


def test_counting_is_exact():
    layer = nn.Linear(1, 1, bias=False)
    nn.init.ones_(layer.weight)
    model = rc.emulate_(nn.Sequential(layer), LBA(None, Float.lba(3, 2, bias=2), chunk=None))
    data = torch.cat([torch.full((3, 1), 56.0), torch.full((2, 1), -90.0), torch.full((95, 1), 48.0)])
    with pytest.warns(rc.RecoupWarning, match=r"in 1 layers: 0 (4|5)(\.\d+)? %;"):
        rc.lba.profile(model, [data], outputs=20000)  # drawn: 5 % to its noise
    with pytest.warns(rc.RecoupWarning, match=r"in 1 layers: 0\.0 5 %;"):
        rc.evaluate(nn.Sequential(model, nn.Softmax(0)), [(data, torch.zeros(100, dtype=torch.long))])


def test_undone_saved_loaded_copied_and_compiled(tmp_path):
    x = images(4)
    model = rc.emulate_(grown(), LBA.m7e4()).eval()
    before = model(x)
    rc.lba.choose_exponents_(model, [x])
    after = model(x)
    shifts = {name: layer.shift for name, layer in model.named_modules() if getattr(layer, "shift", None) is not None}
    assert not torch.equal(after, before)
    rc.save(model, tmp_path / "chip")
    loaded = rc.load(tmp_path / "chip", small_net(seed=3)).eval()
    assert {name: loaded.get_submodule(name).shift for name in shifts} == shifts
    plain = rc.emulate_(small_net(seed=3), LBA.m7e4()).eval()
    plain.load_state_dict(model.state_dict())
    for other in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), plain):
        assert torch.equal(other(x), after)
    assert torch.equal(rc.undo_(loaded, "structure")(x), before)
    rc.lba.choose_exponents_(model, [x])  # again: from what was there before the first
    assert torch.equal(model(x), after)
    assert torch.equal(rc.undo_(model, "structure")(x), before)
    assert not hasattr(rc.restore_(model).stem, "shift")


def test_gradients_and_training_go_through_the_shift():
    """The derivative is that of the exact product, whatever the shift; the indicators are those of the scaled one."""
    layer = rc.lba.LBALinear(6, 3, bias=False, config=LBA.biased(4, 3, gradient="recursive_of"))
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    layer.shift = 2
    layer(x).sum().backward()
    assert x.grad is not None
    got, x.grad = x.grad.clone(), None
    (rc.lba.matmul(x, layer.weight.t() * 4, layer.config) / 4).sum().backward()
    assert torch.equal(got, x.grad)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_whole():
    layer = rc.emulate_(nn.Sequential(nn.Linear(6, 3)), LBA.m7e4())
    x = torch.randn(5, 6) * 100
    rc.lba.choose_exponents_(layer, [x])
    chosen: Any = layer[0]
    assert chosen.shift
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), layer(x))
    chosen.shift -= 1
    assert torch.equal(compiled(x), layer(x))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.products = AttentionProducts()

    def forward(self, x):
        return self.products(x, x, 3 * x, True)


def test_attention_has_a_shift_a_product_rows_and_entries(tmp_path):
    torch.manual_seed(0)
    model, x = rc.emulate_(Attention(), LBA.m7e4()), torch.randn(2, 2, 5, 8) * 30
    before = model(x)
    with pytest.warns(rc.RecoupWarning, match=r"in 1 layers: products \(q k\^T\) \d+"):
        rows = rc.lba.profile(model, [x], outputs=200)
    assert [(row.name, row.kind, row.terms) for row in rows] == [
        ("products (q k^T)", "AttentionProducts", 8),
        ("products (p v)", "AttentionProducts", 5),
    ]
    rc.lba.choose_exponents_(model, [x])
    terms = (x / 8**0.5).double().unsqueeze(-2) * x.double().unsqueeze(-3)  # eight: one chunk
    sums, product, unit = terms.cumsum(-1).abs().max(), terms.abs().max(), LBA()
    assert isinstance(unit.product, Float)
    ends = (sums / unit.accumulator.largest_value * 2, product / unit.product.largest_value)
    products: Any = model.products
    assert [all(end * 2.0 ** (products.score_shift + more) < 1 for end in ends) for more in (0, 1)] == [
        True,
        False,
    ]
    assert products.value_shift < 0
    rc.lba.profile(model, [x], outputs=200)  # no warning
    assert rc.describe(model).to_dict()["products"]["repairs"] == ["exponents (choose_exponents_, 2 images)"]
    rc.save(model, tmp_path / "chip")
    assert torch.equal(rc.load(tmp_path / "chip", Attention())(x), model(x))
    assert torch.equal(rc.undo_(model, "structure")(x), before)


def test_what_cannot_be_chosen():
    with pytest.raises(rc.RecoupError, match="choose_exponents_: the model has no layer on a narrow accumulator"):
        rc.lba.choose_exponents_(small_net(), batches_of(1, 2))
    model = rc.emulate_(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), LBA.int12("wrap", operands=Int(4)))
    rc.lba.choose_exponents_(model, [torch.rand(4, 3)])
    assert model[0].shift is None
    rc.restore_(model)
    rc.emulate_(model, LBA.m7e4())
    rc.lba.choose_exponents_(model, [torch.zeros(4, 3)])
    assert model[0].shift is None
    state = model.state_dict()
    state._metadata["0"]["recoup"]["shift"] = 999
    with pytest.raises(RuntimeError, match="shift is 999"):
        model.load_state_dict(state)


def test_repairs_do_not_decide_the_shifts():
    torch.manual_seed(0)
    data = [(images(16) * 30, torch.zeros(16, dtype=torch.long))]
    alone = rc.lba.choose_exponents_(rc.emulate_(small_net(), LBA.biased(3, 4)), data)
    repaired = rc.recalibrate_(rc.emulate_(small_net(), LBA.biased(3, 4)), data)
    with pytest.warns(rc.RecoupWarning, match="choose_exponents_: undid statistics"):
        rc.lba.choose_exponents_(repaired, data)

    def shifts(model):
        return {name: layer.shift for name, layer in emulated_layers(model).items()}

    assert shifts(repaired) == shifts(alone)
    assert len(set(shifts(alone).values())) > 1


def test_where_nothing_multiplies_repairs_stay():
    model = rc.recalibrate_(rc.emulate_(small_net(), LBA.m7e4()), [images(8)])
    before = model.state_dict()
    kept = {name: value.clone() for name, value in before.items()}
    with pytest.raises(rc.RecoupError), pytest.warns(rc.RecoupWarning, match="undid statistics"):
        rc.lba.choose_exponents_(model, [torch.zeros(0, 3, 8, 8)])
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
