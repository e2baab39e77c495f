"""The accumulator of the shared MAC against the port model: every register after every slot, no difference."""

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import recoup as rc
from recoup.errors import RecoupError
from recoup.kernels import llvm
from recoup.nbsmt import lanes, ops, reference, saturate
from recoup.nbsmt.config import NBSMT
from recoup.nbsmt.emit_saturating import Form, saturating_module, scaled
from recoup.nbsmt.saturate import Saturating
from recoup.nbsmt.weights import quantize_weight, weight_operand
from recoup.nbsmt.wing import eight_bit, runs, title
from recoup.network.convolution import POINTWISE, Geometry
from recoup.network.emulated import emulated_layers, running
from tests.nbsmt import port
from tests.nbsmt.strategies import configs, operands, port_of
from tests.nbsmt.test_operand import ARM, LEVELS, runs_here
from tests.networks import images

overflows = st.sampled_from(["saturate", "wrap"])
registers = st.builds(rc.Int, st.sampled_from([8, 12, 14, 16, 17, 18, 24, 32]), overflow=overflows)
limited = st.builds(lambda config, accumulator: config.replace(accumulator=accumulator), configs, registers)


def fields(config, signed):
    own = config.accumulator
    kind = config.threads, config.policy, config.rounding, config.pairing, port_of(config, signed)
    return (*kind, None, "saturate") if own is None else (*kind, own.bits, own.overflow)


@settings(max_examples=60, deadline=None)
@given(limited, st.integers(0, 2**32 - 1), st.integers(0, 3), st.integers(1, 30), st.integers(1, 19), st.booleans())
def test_matmul_equals_the_port_model(config, seed, rows, size, columns, signed):
    x, w = operands(seed, rows, size, columns, 0.3, signed)
    expected, _ = port.matmul(x.tolist(), w.tolist(), *fields(config, signed))
    assert reference.matmul(x, w, config).tolist() == expected
    found = rc.nbsmt.matmul(x, w, config)
    assert found.dtype == torch.int32
    assert found.tolist() == expected


def sequences(code, weight, geometry):
    """im2col whose K runs in the order of slots: channels, within them taps. [M, C, L], [C, L, O]."""
    columns = F.unfold(code.double(), geometry.kernel, geometry.dilation, geometry.padding, geometry.stride)
    x_MCL = columns.unflatten(1, (code.shape[1], -1)).permute(0, 3, 1, 2).flatten(0, 1).long()
    return x_MCL, weight.flatten(2).permute(1, 2, 0).long()


def convolved(code, weight, config, geometry, signed):
    """By the port model: slot channel after slot channel, tap after tap; the threads' channels meet in a slot."""
    x_MCL, w_CLO = sequences(code, weight, geometry)
    table = port.thread_indices(code.shape[1], config.threads, config.pairing)
    *_, policy_port, bits, overflow = fields(config, signed)
    out = torch.zeros(len(x_MCL), weight.shape[0], dtype=torch.long)
    for m, x_CL in enumerate(x_MCL.tolist()):
        for o, w_CL in enumerate(w_CLO.permute(2, 0, 1).tolist()):
            total = 0
            for channels in table:
                for tap in range(w_CLO.shape[1]):
                    pairs = [(x_CL[c][tap], w_CL[c][tap]) if c is not None else (0, 0) for c in channels]
                    products = port.slot(pairs, config.policy, config.rounding, policy_port)
                    total = port.added(total, sum(products), bits, overflow)
            out[m, o] = total
    return out


@settings(max_examples=25, deadline=None)
@given(
    config=limited,
    seed=st.integers(0, 2**31),
    channels=st.integers(1, 6),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    groups=st.sampled_from([1, 1, 2, 9]),
    each=st.sampled_from([1, 2, 5]),
    signed=st.booleans(),
    ordered=st.booleans(),
)
def test_convolutions_equal_the_port_model(
    config, seed, channels, kernel, stride, padding, dilation, groups, each, signed, ordered
):
    """The operator, which quantises, orders and scales: every geometry; with an order slots are those of the order."""
    geometry = Geometry(kernel, stride, padding, dilation, groups)
    assume(min(geometry.outputs((3, 4))) >= 1)
    config = config if groups == 1 else config.replace(threads=1)
    code, weight = operands(
        seed, channels * groups * 12, 1, each * groups * channels * kernel[0] * kernel[1], 0.2, signed
    )
    code, weight = code.view(1, -1, 3, 4), weight.view(each * groups, channels, *kernel)
    weight.flatten(1)[:, 0] = -128  # the largest: the float weights quantise to just these codes, with scale 1
    real = weight.float().where(weight > -128, torch.tensor(-127.5))
    order = torch.randperm(channels, generator=torch.Generator().manual_seed(seed)) if ordered and groups == 1 else None
    single = Geometry(kernel, stride, padding, dilation, 1)
    sums = []
    for g in range(groups):
        part, own = code[:, g * channels : (g + 1) * channels], weight[each * g : each * g + each]
        if order is not None:
            part, own = part[:, order], own[:, order]
        sums.append(convolved(part, own, config, single, signed))
    expected = torch.cat(sums, 1).float().view(*geometry.outputs((3, 4)), -1).permute(2, 0, 1)[None]
    arguments = (config.code, stride, padding, dilation, groups, "layer", 128 if signed else 0)
    found = ops.convolution(code.float() * 0.5, real, order, 0.5, *arguments)
    assert torch.equal(found, expected * 0.5)


def test_beyond_24_bits_registers_are_rounded_once():
    x, w = torch.full((1, 700), 255, dtype=torch.uint8), torch.full((700, 1), 127, dtype=torch.int8)
    x[0, 0] = 254
    for overflow, bits in (("wrap", 25), ("saturate", 25), ("wrap", 32), ("saturate", 24)):
        config = NBSMT(1, accumulator=rc.Int(bits, overflow=overflow))
        (expected,), _ = port.matmul(x.tolist(), w.tolist(), *fields(config, False))
        assert rc.nbsmt.matmul(x, w, config).tolist() == [expected]
        real, arguments = w.t().float() + 0.5, (config.code, [1, 1], [0, 0], [1, 1], 1, "layer")
        y = ops.convolution(x.float()[:, :, None, None], real, None, 1.0, *arguments)
        assert y.item() == torch.tensor(float(expected[0])).item()


# Threads, policy, register, groups, output channels of a group: bytes of one quad and of several, words that saturate
# by themselves and that do not, lanes of one group, of several, and of a group each.
FORMS = [
    (2, "S+aW", 16, 1, 18),
    (4, "S+A", 18, 1, 35),
    (2, "A", 18, 1, 18),
    (2, "W", 16, 1, 3),
    (1, "S+A", 18, 9, 2),
    (1, "S+A", 16, 7, 5),
    (1, "S+A", 18, 17, 1),
    (1, "S+A", 17, 2, 17),
]


def dealt(code, config, weight, zero):
    """The kernel of a weight, and the operand's bytes [N, H, W, J]."""
    operand = weight_operand(weight, config, zero)
    rows = code.movedim(1, 3)
    a_PJ = reference.activation_operand(rows.flatten(0, 2), operand.activations, config)
    kernel = Saturating(operand.weight_OGJkk, config, len(operand.activations))
    return kernel, (a_PJ.to(torch.int16) + zero).to(torch.uint8).view(*rows.shape[:3], -1)


def large(inputs, outputs, channels, zero):
    """Codes [1, inputs, 5, 6] and weights [outputs, channels, 3, 2] of large products, the last tap's negative: sums
    saturate and come back."""
    code, weight = operands(6, inputs * 30, 1, outputs * channels * 6, 0.2, zero > 0)
    code, weight = code.view(1, inputs, 5, 6), weight.view(outputs, channels, 3, 2)
    random = torch.Generator().manual_seed(7)
    big = torch.randint(100, 128, weight.shape, generator=random).mul(torch.tensor([[1, 1], [1, 1], [1, -1]]))
    weight = torch.where(torch.rand(weight.shape, generator=random) < 0.1, weight, big.to(torch.int8))
    high = torch.randint(225 - zero, 256 - zero, code.shape, generator=random).to(code.dtype)
    return torch.where(torch.rand(code.shape, generator=random) < 0.1, code, high), weight


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_on_every_instruction_set(form, monkeypatch):
    monkeypatch.setattr(lanes, "MANY", 1)
    threads, policy, bits, groups, each = form
    config = NBSMT(threads, policy, accumulator=rc.Int(bits), pairing="adjacent" if bits == 16 else "halves")
    geometry, channels = Geometry((3, 2), (2, 1), (1, 1), (1, 2), groups), 9 if groups == 1 else 3
    for zero in (0, 128):
        code, weight = large(groups * channels, groups * each, channels, zero)
        single = Geometry((3, 2), (2, 1), (1, 1), (1, 2), 1)
        parts = [
            convolved(code[:, channels * g :][:, :channels], weight[each * g :][:each], config, single, zero > 0)
            for g in range(groups)
        ]
        exact = convolved(code[:, :channels], weight[:each], config.replace(accumulator=None), single, zero > 0)
        assert not torch.equal(parts[0], exact)
        expected = torch.cat(parts, 1).view(*geometry.outputs((5, 6)), groups * each).permute(2, 0, 1)
        kernel, a_NHWJ = dealt(code, config, weight, zero)
        assert torch.equal(kernel(a_NHWJ, geometry, zero)[0], expected.int())
        assert torch.equal(kernel(a_NHWJ, geometry, zero, floats=True)[0], expected.float())
        for level in filter(runs_here, LEVELS):
            found = kernel(a_NHWJ, geometry, zero, target=llvm.Target.named(level))
            assert torch.equal(found[0], expected.int()), (level, zero)


VNNI = llvm.Target("cascadelake", "", llvm.Target.named("skylake-avx512").features | {"avx512vnni"})


@pytest.mark.parametrize("sharing", ["all", "few", "none"])
def test_code_for_other_processors(sharing):
    """One instruction multiplies and adds pairs or quads, where there is one; it cannot be run here."""

    def lines(target, **fields):
        blocks = 2 if sharing == "all" else 1
        settings = {"words": True, "ends": "none", "many": False, "corrected": False, "floats": False, **fields}
        form = Form(sharing=sharing, pixels=4, blocks=blocks, **settings)
        return llvm.assembly(saturating_module(form, target), target).splitlines(), 4 * blocks

    assert any("mla" in line for line in lines(ARM)[0])
    for level, register in (("haswell", "ymm"), ("skylake-avx512", "zmm")):
        assert any("vpmaddwd" in line and register in line for line in lines(llvm.Target.named(level))[0])
    if llvm.Target.named("x86-64").machine != "x86_64":
        return
    # As often as the tile has registers: the loop is not unrolled, for all vector registers are in use.
    kinds: list[tuple[dict, str]] = [({"ends": "both"}, "vpdpwssds"), ({}, "vpdpwssd"), ({"words": False}, "vpdpbusd")]
    for fields, name in [*kinds, ({"ends": "upper"}, "vpdpwssds"), ({"ends": "upper", "words": False}, "vpdpbusds")]:
        if fields.get("words", True) or sharing == "all":
            found, tile = lines(VNNI, **fields)
            assert sum(line.split()[:1] == [name] for line in found) == tile


def test_registers_that_saturate_by_themselves():
    """From 17 bits on, or 16 of signed values, powers of two lift a register's ends to those of 32 bits, and products
    fit words."""
    for zero, largest, least in ((0, 255, 17), (128, 128, 16)):
        for bits in range(8, 33):
            found = scaled(bits, 2, zero, VNNI)
            assert (found is None) == (bits < least)
            if found is not None:
                assert sum(found) == 32 - bits
                assert max(largest << found[0], 128 << found[1]) <= 2**15
    assert scaled(18, 4, 0, VNNI) is None
    assert scaled(18, 2, 0, llvm.Target.named("skylake-avx512")) is None


@pytest.mark.parametrize("config", [NBSMT(1), NBSMT(2, "A"), NBSMT(2), NBSMT(4, pairing="adjacent")], ids=str)
def test_pieces_change_nothing(config, monkeypatch):
    """One slot of weights and one image at a time, or all: registers are kept between pieces."""
    config = config.replace(accumulator=rc.Int(18))
    code, weight = operands(8, 3 * 24 * 20, 1, 37 * 24 * 9, 0.2)
    code, weight, geometry = (
        code.view(3, 24, 4, 5),
        weight.view(37, 24, 3, 3),
        Geometry((3, 3), (1, 1), (1, 1), (1, 1), 1),
    )
    kernel, a_NHWJ = dealt(code, config, weight, 0)
    whole = kernel(a_NHWJ, geometry)
    assert not torch.equal(whole, dealt(code, config.replace(accumulator=rc.Int(24)), weight, 0)[0](a_NHWJ, geometry))
    for name, value in (("SEGMENT", 1), ("CHUNK", 1), ("FEW", 10**6)):
        monkeypatch.setattr(saturate, name, value)
        kernel, a_NHWJ = dealt(code, config, weight, 0)
        assert torch.equal(kernel(a_NHWJ, geometry), whole)


def test_nothing_to_add_and_nothing_to_add_it_for():
    config = NBSMT(2, accumulator=rc.Int(8))
    for rows, size, columns in ((3, 0, 4), (0, 5, 4), (3, 5, 0)):
        weight = torch.ones(columns, 2 * size, 1, 1, dtype=torch.int8)
        found = Saturating(weight, config, 1)(torch.ones(rows, 1, 1, 2 * size, dtype=torch.uint8), POINTWISE)
        assert found.shape == (rows, columns, 1, 1)
        assert not found.any()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_thread_count_changes_nothing(threads):
    config = NBSMT(2, accumulator=rc.Int(16))
    x, w = operands(3, 301, 64, 20)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = rc.nbsmt.matmul(x, w, config)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, reference.matmul(x, w, config))


@pytest.mark.parametrize("bad", [rc.Int(7), rc.Int(33), rc.Int(16, False), 16, "Int(16)", rc.Float.lba(4, 7, bias=10)])
def test_other_accumulators_are_refused(bad):
    with pytest.raises(RecoupError, match=r"must be None or a signed Int of 8 to 32 bits, such as Int\(18\)"):
        NBSMT(accumulator=bad)


def test_what_has_no_such_accumulator_says_so():
    config = NBSMT(accumulator=rc.Int(18))
    with pytest.raises(RecoupError, match="registers of accumulator_bits that wrap"):
        rc.silicon.build(config)


def test_a_config_with_an_accumulator():
    config = NBSMT(accumulator=rc.Int(18))
    assert "accumulator" not in repr(NBSMT())
    assert rc.Policy({"a": config}) == rc.Policy({"a": NBSMT(2, accumulator=rc.Int(18))})
    assert rc.Policy({"a": config}) != rc.Policy({"a": NBSMT(2)})
    assert config.eight_bit == NBSMT(1)
    assert config.single.accumulator == rc.Int(18)
    assert eight_bit(config) == eight_bit(NBSMT(1, accumulator=rc.Int(18))) == NBSMT(1)
    assert title(config) == "2 threads, S+A, accumulator of 18 bits that saturates"
    assert runs(config, config.replace(threads=1))
    assert not runs(config, NBSMT(1))
    assert not runs(NBSMT(), config)


def three_layers(accumulator=None):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1), nn.Flatten(), nn.Linear(216, 5)]
    model = nn.Sequential(*layers)
    rc.calibrate_(model, [images(24)])
    return rc.emulate_(model, NBSMT(accumulator=accumulator))


def test_networks_with_an_accumulator(tmp_path):
    """Baseline has none; a wide one changes nothing; a narrow one is profiled, corrected, saved."""
    x = images(12)
    exact, wide, narrow = three_layers(), three_layers(rc.Int(30)), three_layers(rc.Int(15))
    assert torch.equal(wide(x), exact(x))
    assert not torch.equal(narrow(x), exact(x))
    with running(narrow, "baseline"), running(exact, "baseline"):
        assert torch.equal(narrow(x), exact(x))
    assert {row.overflowed for row in rc.nbsmt.profile(wide, [x])} == {0.0}
    (row,) = rc.nbsmt.profile(narrow, [x])
    assert 0.01 < row.overflowed < 0.99
    rc.correct_bias_(narrow, [x])
    layer, means = emulated_layers(narrow)["2"], []
    assert layer.bias_correction.abs().amax() > 1e-4  # beyond the tolerance below
    for mode in ("emulate", "baseline"):
        layer.mode = mode
        means.append(layer(torch.relu(narrow[0](x)).detach()).mean((0, 2, 3)))
    torch.testing.assert_close(*means, rtol=0, atol=1e-5)  # each output is float32
    layer.mode = "emulate"
    rc.save(narrow, tmp_path / "chip")
    assert torch.equal(rc.load(tmp_path / "chip", rc.restore_(three_layers()))(x), narrow(x))


@pytest.mark.parametrize("overflow", ["saturate", "wrap"])
def test_grouped_layers_have_the_accumulator_too(overflow):
    torch.manual_seed(0)
    layer: Any = nn.Conv2d(6, 6, 3, groups=3, bias=False)
    x = torch.rand(1, 6, 5, 5)
    rc.calibrate_(layer, [x], {"": True})
    config = NBSMT(accumulator=rc.Int(14, overflow=overflow))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rc.RecoupWarning)
        rc.emulate_(layer, config)
    code = reference.quantize_activation(x, layer.activation_scale, 0)
    weight, scale_O = quantize_weight(layer.weight)
    one = Geometry((3, 3), (1, 1), (0, 0), (1, 1), 1)
    exact, sums = (
        torch.cat([
            convolved(code[:, g : g + 2], weight[g : g + 2], part, one, False) for g in (0, 2, 4)
        ], 1) for part in (NBSMT(1), config.single)
    )  # fmt: skip
    assert not torch.equal(exact, sums)
    expected = sums.float().view(3, 3, 6).permute(2, 0, 1)[None]
    assert torch.equal(layer(x), expected * (scale_O * layer.activation_scale).view(1, -1, 1, 1))


def test_sums_beyond_32_bits_are_taken_where_the_register_says_what_becomes_of_them():
    size = 70_000
    x, w = torch.full((1, size), 255, dtype=torch.uint8), torch.full((size, 1), 127, dtype=torch.int8)
    exact = 255 * 127 * size
    for bits, overflow, expected in (
        (18, "wrap", (exact + 2**17) % 2**18 - 2**17),
        (32, "wrap", (exact + 2**31) % 2**32 - 2**31),
        (31, "saturate", 2**30 - 1),
    ):
        config = NBSMT(1, accumulator=rc.Int(bits, overflow=overflow))
        assert rc.nbsmt.matmul(x, w, config).tolist() == [[expected]]
        arguments = (config.code, [1, 1], [0, 0], [1, 1], 1, "layer")
        y = ops.convolution(x.float()[:, :, None, None], w.t().float() + 0.5, None, 1.0, *arguments)
        assert y.item() == torch.tensor(float(expected)).item()
    for register in (None, rc.Int(32)):
        with pytest.raises(RecoupError, match="beyond the array's 32-bit accumulator"):
            rc.nbsmt.matmul(x, w, NBSMT(1, accumulator=register))


def test_groups_have_one_product_a_slot():
    kernel = Saturating(torch.ones(4, 2, 1, 1, dtype=torch.int8), NBSMT(2, accumulator=rc.Int(16)), 1)
    with pytest.raises(RecoupError, match=r"a convolution of 2 groups, .* with 2 products a slot"):
        kernel(torch.ones(1, 1, 1, 4, dtype=torch.uint8), Geometry((1, 1), (1, 1), (0, 0), (1, 1), 2))


def test_weights_are_laid_out_once():
    kernel = Saturating(torch.ones(6, 2, 3, 3, dtype=torch.int8), NBSMT(2, accumulator=rc.Int(16)), 1)
    assert kernel.layout(1, 0, llvm.host()) is kernel.layout(1, 0, llvm.host())
    assert kernel.layout(1, 128, llvm.host()) is not kernel.layout(1, 0, llvm.host())


def test_the_order_counts_at_one_thread_where_a_register_saturates():
    """127 * 200 saturates 15 bits at once: what is subtracted before that is forgotten."""
    layer = rc.nbsmt.NBSMTLinear(4, 1, bias=False, config=NBSMT(1, accumulator=rc.Int(15)))
    weight, x = torch.tensor([[127.0, 127.0, -127.5, 127.0]]), torch.tensor([[200.0, 200.0, 200.0, 1.0]])
    layer.weight.data, layer.activation_scale, layer.order = weight, 1.0, torch.tensor([2, 0, 1, 3])
    expected, _ = port.matmul([[200, 200, 200, 1]], [[-128], [127], [127], [127]], *fields(layer.config, False))
    assert expected == [[16383]]
    assert layer(x).tolist() == expected
    (row,) = rc.nbsmt.profile(layer, [x])
    assert row.overflowed == 1
    assert row.error == pytest.approx((16383 - 25327) ** 2 / 25327**2)
    rc.correct_bias_(layer, [x])
    assert layer(x).tolist() == [[25327.0]]
    layer.bias_correction, layer.order = None, None
    assert layer(x).tolist() == [[-9090.0]]
