"""NB-SMT's hardware against integers written from the spec: product units, processing elements, arrays."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("amaranth")

import recoup as rc
from recoup.errors import RecoupError
from recoup.gates.module import signed
from recoup.nbsmt import product_unit, reference, systolic
from recoup.nbsmt.config import POLICIES
from recoup.nbsmt.element import Options, element_feed, sum_bits
from recoup.nbsmt.weights import quantize_weight
from recoup.network.systolic import Array, layer_cycles
from recoup.silicon import build, vectors
from recoup.silicon.words import packed
from tests.nbsmt import port
from tests.tiers import slow_but

SHARED = [(t, policy, "nearest") for t in (2, 4) for policy in POLICIES]
ROUNDED = [(2, "S+aW", "half_up"), (2, "S+Aw", "zero"), (4, "S+A", "half_up"), (4, "S+aW", "zero")]


QUICK = [(1, "S+A", "nearest"), (2, "S+aW", "nearest"), (2, "S+Aw", "nearest"), (4, "A", "nearest"), ROUNDED[0]]


@pytest.mark.parametrize(("threads", "policy", "rounding"), slow_but(QUICK, [(1, "S+A", "nearest"), *SHARED, *ROUNDED]))
def test_products_of_a_slot(threads, policy, rounding):
    module = build(rc.NBSMT(threads=threads, policy=policy, rounding=rounding), unit="products")
    inputs = vectors.structured(module, 1024, np.random.default_rng(threads))
    got = signed(module.simulate(inputs)["y"][0], sum_bits(threads))
    x = inputs["x"][0].reshape(-1, threads).tolist()
    w = signed(inputs["w"][0], 8).reshape(-1, threads).tolist()
    for a, b, y in zip(x, w, got.tolist(), strict=True):
        assert y == sum(port.slot(list(zip(a, b, strict=True)), policy, rounding)), (a, b)


@pytest.mark.parametrize(
    ("threads", "options"),
    [
        (1, {}),
        (2, {}),
        (2, {"registers": "decode", "accumulator_bits": 20}),
        (2, {"registers": "none", "drain": False}),
        pytest.param(4, {}, marks=pytest.mark.slow),
    ],
)
def test_elements_equal_the_emulation_and_their_vectors_show_broken_gates(threads, options):
    found = build(rc.NBSMT(threads=threads), **options).verify(1 << 14)
    assert found, found.missed
    assert found.coverage >= 0.995


def test_an_element_sums_a_stream():
    """Sums of 5, 3 and 4 slots, by plain integers; each leaves through the drain register when the next begins."""
    config = rc.NBSMT(threads=2, policy="S+aW")
    module = build(config)
    rng = np.random.default_rng(7)
    first = np.isin(np.arange(20), (0, 5, 8, 12))
    inputs = {
        "x": rng.integers(0, 256, (20, 64, 2)).astype(np.uint64),
        "w": rng.integers(0, 256, (20, 64, 2)).astype(np.uint64),
        "first": np.repeat(first[:, None], 64, 1).astype(np.uint64),
        "shift": np.zeros((20, 64), np.uint64),
        "drain": np.zeros((20, 64), np.uint64),
    }
    got = signed(module.simulate(inputs)["drain_next"], 32)
    x, w = inputs["x"].tolist(), signed(inputs["w"], 8).tolist()
    for begin, end in ((0, 5), (5, 8), (8, 12)):
        for lane in range(64):
            pairs = [list(zip(x[s][lane], w[s][lane], strict=True)) for s in range(begin, end)]
            total = sum(sum(port.slot(pair, "S+aW", "nearest")) for pair in pairs)
            assert got[end + module.latency + 1, lane] == total


@pytest.mark.parametrize(
    ("threads", "shape", "size", "options"),
    [
        (1, (2, 3), (5, 3, 7), {}),  # 3 slots a tile, 2 rows: tiles follow at once
        pytest.param(
            2, (3, 2), (8, 3, 2), {"registers": "none"}, marks=pytest.mark.slow
        ),  # 2 slots, 3 rows: tiles wait for the drain
        pytest.param(4, (3, 2), (6, 12, 4), {}, marks=pytest.mark.slow),  # as many slots as rows
    ],
)
def test_an_array_multiplies_matrices_in_the_cycles_of_the_formula(threads, shape, size, options):
    (rows, cols), (M, K, N) = shape, size
    config = rc.NBSMT(threads=threads)
    module = build(config, array=shape, **options)
    rng = np.random.default_rng(M)
    x = rng.integers(0, 256, (M, K)) * (rng.random((M, K)) < 0.7)
    w = rng.integers(-128, 128, (K, N)) * (rng.random((K, N)) < 0.8)
    slots = -(-K // threads)
    tiles = [(i, j) for i in range(0, M, rows) for j in range(0, N, cols)]
    schedule = systolic.Schedule(rows, cols, slots, len(tiles), module.latency)
    steps = schedule.steps
    given = {"x": np.zeros((steps, 1, rows, threads), np.uint64), "w": np.zeros((steps, 1, cols, threads), np.uint64)}
    for t, (i, j) in enumerate(tiles):
        for s, owned in enumerate(port.thread_indices(K, threads, "halves")):
            for thread, k in enumerate(owned):
                if k is None:
                    continue
                for r in range(min(rows, M - i)):
                    given["x"][t * schedule.interval + s, 0, r, thread] = x[i + r, k]
                for c in range(min(cols, N - j)):
                    given["w"][t * schedule.interval + s, 0, c, thread] = w[k, j + c] % 256
    inputs = {name: values.reshape(steps, 1, -1) for name, values in given.items()}
    inputs["first"] = schedule.first()[:, None].astype(np.uint64)
    inputs["shift"] = (schedule.shift() @ (1 << np.arange(rows)))[:, None].astype(np.uint64)
    got = signed(module.simulate(inputs)["y"], 32)
    found = np.zeros((M, N), np.int64)
    last = 0
    for t, (i, j) in enumerate(tiles):
        for r in range(min(rows, M - i)):
            for c in range(min(cols, N - j)):
                found[i + r, j + c] = got[schedule.shown(t, r, c), 0, c]
        last = max(last, *(schedule.shown(t, r, c) for r in range(rows) for c in range(cols)))
    want, _ = port.matmul(x.tolist(), w.tolist(), threads, config.policy, config.rounding, "halves")
    assert found.tolist() == want
    emulated = rc.nbsmt.matmul(torch.tensor(x, dtype=torch.uint8), torch.tensor(w, dtype=torch.int8), config)
    assert found.tolist() == emulated.tolist()
    assert last == systolic.cycles(M, K, N, module, threads=threads)
    assert last == layer_cycles(M, K, N, threads, Array(rows, cols)) + module.latency


@pytest.mark.parametrize("shape", [(1, 3), (2, 8), (16, 16)])
def test_every_result_of_an_array_is_looked_at(shape):
    """Three tiles' results, each in its own step: columns never show all of theirs at once where there are many. The
    last of a column stays until the run ends."""
    rows, cols = shape
    module = build(rc.NBSMT(threads=1), array=shape)
    shown = module.expected(vectors.structured(module, 1, np.random.default_rng(0)))["y"]
    assert shown.mask.sum() == 3 * rows * cols + cols * (cols + 1) // 2
    assert len(shown.at) == len(set(shown.at))


def test_the_vectors_of_an_array_show_its_broken_gates():
    """Sums that stand in the accumulators reach their upper bits, and the bottom row is seen to hold its result."""
    found = build(rc.NBSMT(threads=1), array=(2, 1)).verify(8192)
    assert found, found.missed
    assert found.faults > 3000


def test_an_array_goes_on_with_the_sums_that_stand_in_it():
    module = build(rc.NBSMT(threads=2), array=(2, 3))
    inputs = dict(vectors.structured(module, 64, np.random.default_rng(0)))
    for name in "xw":
        inputs[name] = np.zeros_like(inputs[name])
    stood = {(r, c): inputs[f"pe_{r}_{c}.accumulator"][0] for r in range(2) for c in range(3)}
    got, schedule = module.simulate(inputs)["y"], systolic.Schedule(2, 3, 2, 3, module.latency)
    for (r, c), values in stood.items():
        assert (got[schedule.shown(0, r, c), :, c] == values).all()
        assert not got[schedule.shown(1, r, c), :, c].any()  # the next tile begins anew


def test_an_array_whose_last_column_is_wrong_is_caught():
    def crossed(m, port):
        from amaranth.hdl import Signal

        y = Signal(len(port.y))
        module.elaborate(m, SimpleNamespace(**{**vars(port), "y": y}))
        m.d.comb += port.y.eq(y ^ (1 << 64))

    module = build(rc.NBSMT(threads=1), array=(1, 3))
    assert module.verify(4096, coverage=False)
    found = module.replace(elaborate=crossed).verify(4096, coverage=False)
    assert found.mismatches > 0
    assert [value is None for value in found.counterexample.got] == [False, True, False]  # columns take turns


def test_a_layer_feeds_arrays_of_more_than_64_rows():
    module = build(rc.NBSMT(threads=2), array=(66, 2))
    x, w = np.full((3, 2, 5), 9, np.uint8), np.full((2, 5, 4), -1, np.int8)
    assert module.feed is not None
    fed = module.feed((x, w), 64, np.random.default_rng(0))
    assert fed["shift"].dtype == object
    assert max(fed["shift"][:, 0]).bit_length() == 66
    assert packed(module, fed).shape == (len(fed["x"]), sum(port.width for port in module.inputs), 1)


@pytest.mark.parametrize("array", [None, (2, 3)])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, _: (x,), r"1 array\(s\) of operands; legal are x uint8 \[positions, 2, slots\]"),
        (lambda x, w: (x[0], w), r"x has shape \[2, 5\]"),
        (lambda x, w: (x[:0], w), r"x has shape \[0, 2, 5\]"),
        (lambda x, w: (x[:, :, :4], w), r"x has shape \[3, 2, 4\] and w \[2, 5, 4\]"),
        (lambda x, w: (x[:, :1], w), r"x has shape \[3, 1, 5\] and w \[2, 5, 4\]"),
        (lambda x, w: (x / 2, w), "x is float64, no integers"),
        (lambda x, w: (x, w > 0), "w is bool, no integers"),
        (lambda x, w: (x.astype(np.int16) - 10, w), "x holds -1 to -1, beyond 0 to 255"),
        (lambda x, w: (x, w.astype(np.int16) * 200), "w holds -200 to -200, beyond -128 to 127"),
    ],
)
def test_operands_that_no_layer_has_are_refused(array, change, message):
    module = build(rc.NBSMT(threads=2), array=array)
    x, w = np.full((3, 2, 5), 9, np.uint8), np.full((2, 5, 4), -1, np.int8)
    assert module.feed is not None
    same = module.feed((x.astype(np.int64), w.astype(np.int16)), 64, np.random.default_rng(0))  # wide types are fine
    fed = module.feed((x, w), 64, np.random.default_rng(0))
    assert all(np.array_equal(same[name], fed[name]) for name in fed)
    with pytest.raises(RecoupError, match="energy of NB-SMT: " + message):
        module.feed(change(x, w), 64, np.random.default_rng(0))


def test_a_wrong_tie_a_rounding_without_collision_and_a_shift_off_by_one_are_caught(monkeypatch):
    rounded = product_unit.Gates.rounded

    def floored(self, v, port, collision=None):
        return v[4:]

    def alone_too(self, v, port, collision=None):
        return rounded(self, v, port)

    def shifted(self, operands):
        value = operands[0] * operands[1]
        for shift in operands[2:]:
            value = self.hdl.Mux(shift, value << 3, value)
        return value

    for name, broken in (("rounded", floored), ("rounded", alone_too), ("product", shifted)):
        with monkeypatch.context() as patch:
            patch.setattr(product_unit.Gates, name, broken)
            found = build(rc.NBSMT(threads=2)).verify(4096)
            assert not found.ok
            assert found.counterexample.expected != found.counterexample.got


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"registers": "many"}, "must be one of none, product, decode"),
        ({"unit": "mac"}, "unit='mac'"),
        ({"accumulator_bits": 12}, "an integer from 18 to 64"),
        ({"drain": 1}, "must be True or False"),
        ({"array": 16}, "rows and columns"),
        ({"array": (0, 4)}, "array rows"),
        ({"array": (128, 128)}, "16384 processing elements; at most 4096"),
        ({"array": (2, 2), "drain": False}, "leave through drain registers"),
        ({"operands": 3}, "no such option; legal are"),
    ],
)
def test_what_no_hardware_can_have(options, message):
    with pytest.raises(RecoupError, match=message):
        build(rc.NBSMT(), **options)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [5, 4])
@pytest.mark.parametrize(("threads", "policy", "rounding"), [(1, "S+A", "nearest"), *SHARED, *ROUNDED])
def test_products_of_a_slot_with_signed_activations(threads, policy, rounding, bits):
    config = rc.NBSMT(threads=threads, policy=policy, rounding=rounding, port=bits)
    module = build(config, unit="products", activations="signed")
    inputs = vectors.structured(module, 1024, np.random.default_rng(threads))
    got = signed(module.simulate(inputs)["y"][0], sum_bits(threads))
    x, w = (signed(inputs[name][0], 8).reshape(-1, threads).tolist() for name in ("x", "w"))
    for a, b, y in zip(x, w, got.tolist(), strict=True):
        assert y == sum(port.slot(list(zip(a, b, strict=True)), policy, rounding, bits)), (a, b)


@pytest.mark.slow
@pytest.mark.parametrize(("threads", "bits"), [(1, 5), (2, 5), (4, 5), (2, 4)])
def test_elements_with_signed_activations_equal_the_emulation(threads, bits):
    module = build(rc.NBSMT(threads=threads, policy="S+aW", port=bits), activations="signed")
    found = module.verify(1 << 14)
    assert found, found.missed
    assert "signed" in module.title
    assert found.coverage >= 0.99


@pytest.mark.slow
def test_an_array_with_signed_activations_equals_the_emulation():
    assert build(rc.NBSMT(threads=2), array=(2, 2), activations="signed").verify(1 << 10)


def test_signed_activations_of_a_layer():
    """What is captured multiplies to the layer's sums; units of unsigned activations refuse it."""
    torch.manual_seed(0)
    layer: Any = torch.nn.Conv2d(5, 4, 3, padding=1, bias=False)
    x = torch.randn(2, 5, 4, 4)
    rc.calibrate_(layer, [x], {"": True})
    rc.emulate_(layer, rc.NBSMT(1))
    codes, weight = rc.silicon.capture(layer, x)[""]
    assert codes.dtype == np.int8
    sums = torch.from_numpy(codes.astype(np.int64)[:, 0] @ weight.astype(np.int64)[0])
    _, scale_O = quantize_weight(layer.weight)
    expected = sums.float().view(2, 4, 4, 4).permute(0, 3, 1, 2) * (scale_O * layer.activation_scale).view(1, -1, 1, 1)
    assert torch.equal(layer(x), expected)
    with pytest.raises(RecoupError, match=r'x holds -.* beyond 0 to 255.*activations="signed"'):
        element_feed((codes, weight), 4, np.random.default_rng(0), 1, Options())
    large = (np.full((1, 1, 1), 200, np.uint8), np.ones((1, 1, 1), np.int8))
    with pytest.raises(RecoupError, match=r'x holds 200 to 200.*activations="unsigned"\), and capture\(..., layers='):
        element_feed(large, 4, np.random.default_rng(0), 1, Options(zero=128))
    fed = element_feed((codes, weight), 4, np.random.default_rng(0), 1, Options(zero=128))["x"]
    assert fed.max() > 127
    with pytest.raises(RecoupError, match="must be 'unsigned' or 'signed'"):
        build(rc.NBSMT(2), activations="both")


@pytest.mark.parametrize("config", [rc.NBSMT(2), rc.NBSMT(4, pairing="halves"), rc.NBSMT(1)], ids=repr)
def test_what_is_captured_has_the_layers_own_order_of_channels(config):
    torch.manual_seed(1)
    layer: Any = torch.nn.Conv2d(6, 4, 3, padding=1, bias=False)
    x = torch.randn(2, 6, 4, 4).relu()
    rc.calibrate_(layer, [x], {"": True})
    rc.emulate_(layer, config)
    plain = rc.silicon.capture(layer, x)[""]
    layer.order = torch.tensor([5, 0, 3, 1, 4, 2])
    codes, weight = rc.silicon.capture(layer, x)[""]
    assert np.array_equal(codes, plain[0]) == (config.threads == 1)  # which channels share decides nothing there
    one_slot = config.replace(pairing="halves")  # then threads lie one after the other
    x_MK, w_KN = (torch.from_numpy(v).flatten(first, first + 1) for v, first in ((codes, 1), (weight, 0)))
    sums = reference.matmul(x_MK, w_KN, one_slot)
    _, scale_O = quantize_weight(layer.weight)
    expected = sums.float().view(2, 4, 4, 4).permute(0, 3, 1, 2) * (scale_O * layer.activation_scale).view(1, -1, 1, 1)
    assert torch.equal(layer(x), expected)
