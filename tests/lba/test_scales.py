"""Operands as chips have them: unsigned activations, calibrated scales; a model in numpy and Python's integers."""

import copy
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import recoup as rc
from recoup.errors import RecoupError
from recoup.formats import Float, Int
from recoup.grammar import parse_config
from recoup.lba import FP8, LBA, LBAConv2d, LBALinear, bound, quantize_operand
from recoup.lba.wing import CARD, title
from recoup.models.attention import AttentionProducts
from recoup.search.bench import needing_scales
from recoup.study.hardware import needs_scales
from tests.lba import exact

U8, S8 = Int(8, signed=False), Int(8)
CHIP = LBA.int16(operands=(U8, S8), weight_scale="channel", activation_scale="calibrated")
SIGNED = CHIP.replace(operands=S8)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 4))


def rows(size=5, seed=0):
    return torch.randn(size, 12, generator=torch.Generator().manual_seed(seed))


def on_chip(model=None):
    return rc.emulate_(model or mlp(), CHIP, layers={"0": SIGNED})


def codes(x, scale, low, high):
    """float32 / float32, to the nearest even, within the codes."""
    return np.clip(np.rint(x / np.float32(scale)), low, high)


def layer_by_hand(x, layer, seen, config):
    """One Linear in numpy and Python's integers: ``seen`` are the inputs of calibration."""
    steps = 127 if min(float(s.min()) for s in seen) < 0 else 255
    peaks = np.concatenate([np.abs(s).max(1) for s in seen]).astype(np.float64)
    step = float(np.float32(peaks.sum() / len(peaks) / steps))
    form, weights = config.pair
    scale = np.float32(step * steps / form.largest_value)
    weight = layer.weight.detach().numpy()
    w_scale = (np.abs(weight).max(1) / np.float32(weights.largest_value)).astype(np.float32)
    a = codes(x, scale, -form.largest_value if form.signed else 0, form.largest_value)
    b = codes(weight, w_scale[:, None], -weights.largest_value, weights.largest_value)
    sums = [
        [register([int(p) * int(q) for p, q in zip(row, column, strict=True)], config) for column in b] for row in a
    ]
    return np.array(sums, np.float32) * (scale * w_scale) + layer.bias.detach().numpy()


def register(products, config):
    """An integer accumulator, product by product."""
    total, half = 0, 1 << (config.accumulator.bits - 1)
    for product in products:
        total += product
        if config.accumulator.overflow == "wrap":
            total = (total + half) % (2 * half) - half
        total = max(-half, min(half - 1, total))
    return total


@pytest.mark.parametrize("overflow", ["saturate", "wrap"])
@pytest.mark.parametrize(
    "pair", [(U8, S8), (Int(4, signed=False), Int(4)), (Int(8, signed=False), Int(2)), (S8, Int(4))]
)
def test_a_network_equals_its_model_in_integers(pair, overflow):
    unit = LBA.int16(overflow, operands=pair, weight_scale="channel", activation_scale="calibrated")
    first = unit.replace(operands=S8)
    model, seen = mlp(), [rows(5, 0), rows(3, 1)]
    hidden = [model[1](model[0](batch)).detach().numpy() for batch in seen]
    rc.emulate_(model, unit, layers={"0": first})
    rc.calibrate_(model, seen)
    x = rows(7, 2) * 2  # beyond what calibration saw
    between = layer_by_hand(x.numpy(), model[0], [s.numpy() for s in seen], first)
    assert np.array_equal(model[0](x).detach().numpy(), between)
    expected = layer_by_hand(np.maximum(between, 0), model[2], hidden, unit)
    assert np.array_equal(model(x).detach().numpy(), expected)
    assert torch.equal(torch.cat([model(row) for row in x.split(1)]), model(x))  # whatever the batch mates are


@settings(max_examples=60)
@given(
    st.integers(1, 8), st.integers(2, 8), st.integers(10, 24), st.sampled_from([None, 3]), st.booleans(),
    st.integers(0, 2**31),
)  # fmt: skip
def test_unsigned_times_signed_equals_the_fractions(a_bits, w_bits, bits, chunk, wrap, seed):
    """Each call's own scale, on the kernels, against `tests.lba.exact`."""
    pair = Int(a_bits, signed=False), Int(w_bits)
    config = LBA(None, Int(max(bits, a_bits + w_bits), overflow="wrap" if wrap else "saturate"), chunk, operands=pair)
    layer = LBALinear(9, 3, bias=False, config=config)
    random = torch.Generator().manual_seed(seed)
    layer.weight.data = torch.randn(3, 9, generator=random)
    x = torch.randn(4, 9, generator=random).relu()
    a, b, scale = layer._operands(x)
    assert float(a.min()) >= 0
    assert float(a.max()) == pair[0].largest_value
    assert scale is not None
    sums = [[float(exact.dot(row, column, config)[0]) for column in b.tolist()] for row in a.tolist()]
    assert torch.equal(layer(x), torch.tensor(sums) * scale)


def test_convolutions_have_unsigned_activations_too():
    torch.manual_seed(0)
    layer = LBAConv2d(
        3, 4, 3, padding=1, stride=2, bias=False, config=CHIP.replace(accumulator=Int(24), activation_scale="call")
    )
    x = torch.rand(2, 3, 6, 5)
    a, b, scale = layer._operands(x)
    expected = torch.nn.functional.conv2d(a.double(), b.double(), None, 2, 1).float()  # which 24 bits hold
    assert scale is not None
    assert torch.equal(layer(x), expected * scale.view(-1, 1, 1))


def test_unsigned_codes_are_finer_than_signed_ones():
    x = torch.rand(1000)
    x[0] = 1
    errors = []
    for form in (S8, U8):
        found, scale = quantize_operand(x, form)
        assert scale is not None
        errors.append(float((found * scale - x).abs().max()))
    assert errors[1] == pytest.approx(errors[0] / 2, rel=0.1)


@pytest.mark.parametrize("form", [FP8, S8, Int(3), U8])
def test_a_largest_magnitude_that_is_known_beforehand(form):
    """The tensor's own gives the same bits; beyond another one everything saturates, symmetrically."""
    x = torch.randn(300, generator=torch.Generator().manual_seed(1))
    x = x.abs() if isinstance(form, Int) and not form.signed else x
    own = quantize_operand(x, form)
    given = quantize_operand(x, form, largest=float(x.abs().max()))
    assert torch.equal(own[0], given[0])
    assert own[1] == given[1]
    huge = torch.tensor([3e38, -3e38, 0.0])
    y, scale = quantize_operand(huge, form, largest=1e-3)
    top = form.largest_value if isinstance(form, Int) else form.largest_value / 2.0 ** (4 + 10 - 0)
    low = 0.0 if isinstance(form, Int) and not form.signed else -1.0
    assert y.tolist() == [top, low * top, 0.0]
    assert (scale is None) == isinstance(form, Float)


def test_gradients_pass_straight_through_what_saturates():
    x = torch.tensor([5.0, -5.0, 0.2], requires_grad=True)
    y, scale = quantize_operand(x, S8, largest=1.0)
    assert scale is not None
    (y * scale).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(3))  # divided and multiplied by the scale


def test_fp8_with_a_calibrated_bias_does_not_depend_on_batch_mates():
    unit = LBA.m7e4(operands=FP8)
    seen, x = [rows(6)], rows(8, 4)
    x[3] *= 50
    alone = {}
    for scale in ("call", "calibrated"):
        model = rc.emulate_(mlp(), unit.replace(activation_scale=scale))
        if scale == "calibrated":
            rc.calibrate_(model, seen)
        alone[scale] = torch.equal(torch.cat([model(row) for row in x.split(1)]), model(x))
    assert alone == {"call": False, "calibrated": True}


def test_repr_dictionaries_and_codes_hold_both_formats():
    for unit in (CHIP, LBA.m7e4(operands=(FP8, S8)), LBA(operands=(U8, FP8), backward=LBA(operands=(S8, FP8)))):
        assert eval(repr(unit), {"LBA": LBA, "Int": Int, "Float": Float}) == unit  # noqa: S307
        assert parse_config(repr(unit)) == LBA.from_dict(unit.to_dict()) == LBA.from_code(unit.code) == unit
        assert copy.copy(unit) == unit
    assert LBA(operands=(S8, S8)) == LBA(operands=S8)
    assert "activation_scale" not in LBA().to_dict()
    assert LBA(operands=S8).pair == (S8, S8)
    assert LBA().pair == (None, None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"operands": U8}, r"activations alone may be unsigned, as in operands=\(Int\(8, signed=False\), Int\(8\)\)"),
        ({"operands": (S8, U8)}, "activations alone may be unsigned"),
        ({"operands": (U8, Int(1))}, "at least 2 bits"),
        ({"operands": (S8, None)}, "a pair of them"),
        ({"operands": (S8, S8, S8)}, "a pair of them"),
        ({"activation_scale": "calibrated"}, "give operands"),
        ({"operands": S8, "activation_scale": "max"}, "must be one of 'call', 'calibrated'"),
    ],
)
def test_what_a_config_refuses(fields, message):
    with pytest.raises(RecoupError, match=message):
        LBA(**fields)


def test_what_is_not_calibrated_says_which_layer_and_what_to_do():
    model = on_chip()
    with pytest.raises(RecoupError, match=r"layer '0' .* has no activation scale, .*calibrate_\(model, batches\)"):
        model(rows())
    with pytest.raises(RecoupError, match=r"layer '0' .* has no activation scale"):
        rc.lba.choose_exponents_(model, [rows()])
    with pytest.raises(RecoupError, match="has no activation scale"):
        bound(model[0], (0, 1))


def test_negative_inputs_of_unsigned_operands():
    model = rc.emulate_(mlp(), CHIP)
    for words in ({}, {"activations": "signed"}, {"negative": "float"}):
        with pytest.raises(RecoupError, match=r"'0' \[5, 12\] down to -\d.*restore_ the model and emulate_") as error:
            rc.calibrate_(model, [rows()], **words)
        assert error.value.layers == ("0",)
        assert model[2].activation_scale is None
    layer = LBALinear(12, 3, config=CHIP.replace(activation_scale="call"))
    with pytest.raises(RecoupError, match=r"LBALinear.*: x \[5, 12\] is negative, down to -.* has no sign"):
        layer(rows())
    with pytest.raises(RecoupError, match="the range must begin at 0"):
        bound(layer, (-1, 1))


def test_scales_of_signed_codes_are_no_scales_of_unsigned_ones():
    model = rc.emulate_(mlp(), SIGNED)
    rc.calibrate_(model, [rows()])
    kept = model.state_dict()
    other = rc.emulate_(mlp(), CHIP)
    with pytest.raises(RuntimeError, match=r"0\.activation_zero is 128, of signed codes"):
        other.load_state_dict(kept)
    rc.restore_(model)
    rc.emulate_(model, CHIP)
    with pytest.raises(RecoupError, match=r"layer '0' .* was calibrated with negative inputs"):
        model(rows())


def test_scales_travel_and_gains_go_with_old_ones(tmp_path):
    model = rc.calibrate_(on_chip(), [rows()])
    expected, again, saved = model(rows(3, 5)), on_chip(), tmp_path / "model"
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(rows(3, 5)), expected)
    rc.save(model, saved)
    loaded = rc.load(saved, mlp())
    assert torch.equal(loaded(rows(3, 5)), expected)
    rc.lba.correct_gain_(model, [rows(40)])
    assert model[2].gain is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the gain went
        rc.calibrate_(model, [rows(6, 9)])
    assert model[2].gain is None
    rc.restore_(model)
    assert torch.equal(model(rows()), mlp()(rows()))


def test_scales_of_before_emulation_hold_where_layers_were_named():
    before = rc.calibrate_(mlp(), [rows()], {"0": True, "2": True})
    after = rc.calibrate_(on_chip(), [rows()])
    assert torch.equal(on_chip(before)(rows()), after(rows()))


def test_units_that_calibrate_are_known_to_studies_and_searches():
    assert CARD.works_on_scales(CHIP)
    assert not CARD.works_on_scales(CHIP.replace(activation_scale="call"))
    assert needs_scales(CHIP)
    assert needing_scales({"a": [None, CHIP], "b": [LBA()]}) == ["a"]
    assert title(CHIP) == "int16, saturates, no chunks, W int8, A uint8, W per channel, A calibrated"
    assert CARD.runs(CHIP, CHIP.replace(activation_scale="call", weight_scale="tensor"))
    assert not CARD.runs(CHIP, SIGNED)


def test_compiled_whole():
    model = rc.calibrate_(on_chip(), [rows()])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(rows(3, 5)), model(rows(3, 5)))


def test_attention_has_signs():
    holder = nn.Sequential(AttentionProducts())
    with pytest.raises(RecoupError, match=r"layer '0': queries have signs.*operands=Int\(bits=8, signed=True"):
        rc.emulate_(holder, CHIP)
    assert type(holder[0]) is AttentionProducts
    with pytest.raises(RecoupError, match="queries have signs"):
        rc.lba.attention(*(torch.randn(1, 2, 3, 4) for _ in range(3)), CHIP)
    rc.emulate_(holder, SIGNED.replace(operands=(S8, Int(4)), accumulator=Int(20)))  # each call's own scale
    q = torch.randn(1, 2, 3, 4)
    assert holder[0](q, q, q).isfinite().all()


def test_bounds_of_unsigned_and_calibrated_codes():
    layer = LBALinear(2, 1, bias=False, config=LBA.int16(operands=(U8, S8)))
    layer.weight.data = torch.tensor([[127.0, -127.0]])
    assert bound(layer, (0.0, 3.0)).largest == 255 * 127
    assert bound(layer, (0.0, 3.0)).cannot_saturate
    calibrated = LBALinear(2, 1, bias=False, config=LBA.int16(operands=(U8, S8), activation_scale="calibrated"))
    calibrated.weight.data = layer.weight.data
    calibrated.activation_scale, calibrated.activation_zero = 0.5, 0
    assert bound(calibrated, (-7.0, 3.0)).largest == 6 * 127  # below zero saturates
    assert bound(calibrated, (0.0, 1e9)).largest == 255 * 127
