"""The CUDA kernels: under Triton's interpreter everywhere, and on a GPU where there is one.

The interpreter must be chosen before Triton is imported, so `TestInterpreter` (CPU tensors) runs in a process of its
own, and so does test_gpu_code.py (machine code for GPUs that are not here). `TestCuda` runs the interpreter's tests on
a GPU and compares the layers of whole networks with the CPU.

Shape suffixes: N images, O output channels, C input channels, L taps, K columns.
"""

import os
import re
from itertools import product

import pytest
import torch
import torch.nn.functional as F

import recoup as rc
from recoup.errors import RecoupError
from recoup.formats import Int
from recoup.models import mobilenet_v1, resnet18, resnet20
from recoup.nbsmt import gpu, reference
from recoup.nbsmt.config import NBSMT, PAIRINGS, POLICIES, ROUNDINGS
from recoup.nbsmt.faults import NOT_FINITE
from recoup.nbsmt.gpu_plan import Plan
from recoup.nbsmt.groups import groups
from recoup.nbsmt.ops import convolution
from recoup.nbsmt.weights import quantize_weight, weight_operand
from recoup.network.convolution import POINTWISE, Geometry, as_2d
from recoup.network.emulated import emulated_layers
from tests.nbsmt.strategies import operands

INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"

CONFIGS = [NBSMT(1), NBSMT(1, pairing="adjacent")]
CONFIGS += [NBSMT(2, p, r, PAIRINGS[i % 2]) for i, (p, r) in enumerate(product(POLICIES, ROUNDINGS))]
CONFIGS += [NBSMT(4, p, ROUNDINGS[i % 3], q) for i, (p, q) in enumerate(product(POLICIES, PAIRINGS))]

SIGNED = [NBSMT(1), NBSMT(2, "A", "half_up", port=4)]
SIGNED += [NBSMT(2, p, ROUNDINGS[i % 3], PAIRINGS[i % 2], port=(5, 4)[i // 2 % 2]) for i, p in enumerate(POLICIES)]
SIGNED += [NBSMT(4, p, ROUNDINGS[i % 3], PAIRINGS[i % 2], port=(4, 5)[i // 2 % 2]) for i, p in enumerate(POLICIES)]

# Input, weight, geometry; ragged and aligned channels, tails of every block.
SHAPES = {
    "3x3": ((2, 5, 4, 3), (3, 5, 3, 3), Geometry((3, 3), (1, 1), (1, 1), (1, 1), 1)),
    "stride, padding, dilation": ((2, 6, 7, 8), (2, 6, 3, 2), Geometry((3, 2), (2, 3), (1, 2), (2, 3), 1)),
    "1x1, stride 2": ((3, 16, 5, 6), (3, 16, 1, 1), Geometry((1, 1), (2, 2), (0, 0), (1, 1), 1)),
    "padding beyond the image": ((1, 3, 1, 2), (1, 3, 3, 3), Geometry((3, 3), (1, 1), (3, 3), (1, 1), 1)),
    "1-d": ((2, 4, 1, 9), (2, 4, 3), Geometry((1, 3), (1, 2), (0, 2), (1, 1), 1)),
    "linear, several steps of columns": ((70, 150, 1, 1), (2, 150), POINTWISE),
    "one channel": ((1, 1, 3, 3), (1, 1, 2, 2), Geometry((2, 2), (1, 1), (0, 0), (1, 1), 1)),
}
GROUPED = {
    "depthwise": ((2, 6, 5, 4), (6, 1, 3, 3), Geometry((3, 3), (1, 2), (1, 1), (1, 1), 6)),
    "three groups": ((1, 6, 3, 3), (9, 2, 2, 2), Geometry((2, 2), (1, 1), (0, 1), (1, 2), 3)),
}


def sample(seed, x_shape, weight_shape, zeros=0.3, scale=0.5, signed=False):
    """Codes and weights rich in the values that decide something, as floats that quantise to just them."""
    count = torch.Size(x_shape).numel()
    codes, weights = (
        operands(seed, count, 1, 1, zeros, signed)[0],
        operands(seed, 1, torch.Size(weight_shape).numel(), 1, zeros)[1],
    )
    weight = weights.float().view(weight_shape)
    weight.flatten(1)[:, -1] = -127.5  # the largest magnitude: a scale of 1
    return codes.float().view(x_shape) * scale, weight


def plain(weight):
    return Geometry.of(weight, (1, 1), (0, 0), (1, 1), 1)


def followed(x_LMC, w_LCO, config):
    """The registers of pixels x [L, M, C] and weights [L, C, O] after every slot and, in a slot, every tap."""
    total = torch.zeros(x_LMC.shape[1], w_LCO.shape[2], dtype=torch.int64)
    for taps in zip(*(reference.slots(x, w, config) for x, w in zip(x_LMC, w_LCO, strict=True)), strict=True):
        for *_, products in taps:
            total = reference.register(total + products.sum(0), config.accumulator)
    return total


def expected(x, weight, order, scale, config, geometry, zero=0):
    """The slot-by-slot reference: sums as float32 [N, O, h, w], and the weights' scales."""
    code, (weight_code, scale_O) = reference.quantize_activation(x, scale, zero), quantize_weight(weight)
    if order is not None:
        code, weight_code = code[:, order], weight_code[:, order]
    weight_code = as_2d(weight_code)
    plan = Plan.of(tuple(x.shape), tuple(weight_code.shape), config, geometry)
    inputs, each = weight_code.shape[1], weight.shape[0] // geometry.groups
    sums = []
    for g in range(geometry.groups):
        part = code[:, g * inputs : (g + 1) * inputs].double()
        columns = F.unfold(part, weight_code.shape[2:], geometry.dilation, geometry.padding, geometry.stride)
        x_LMC = columns.view(len(x), inputs, plan.taps, -1).permute(2, 0, 3, 1).reshape(plan.taps, -1, inputs)
        w_LCO = weight_code[g * each : (g + 1) * each].flatten(2).permute(2, 1, 0)
        sums.append(followed(x_LMC.to(code.dtype), w_LCO, config))
    total = torch.cat(sums, 1).view(len(x), *plan.out, -1)  # type: ignore[arg-type]
    return total.permute(0, 3, 1, 2).float(), scale_O


# The interpreter's NumPy warns where a GPU does not: quotients may overflow before they are clipped.
@pytest.mark.filterwarnings("ignore:.* encountered in divide:RuntimeWarning")
class Kernels:
    """What holds on every device: the kernels against the reference, without any difference."""

    device: str

    def accumulate(self, x, weight, order=None, scale=0.5, config=NBSMT(), geometry=None, zero=0):  # noqa: B008
        order, geometry = None if order is None else order.to(self.device), geometry or plain(weight)
        sums, scale_O = gpu.accumulate(
            x.to(self.device), weight.to(self.device), order, scale, config, geometry, "layer", zero
        )
        return sums.cpu(), scale_O.cpu()

    def check(self, x, weight, order=None, scale=0.5, config=NBSMT(), geometry=None, zero=0):  # noqa: B008
        geometry = geometry or plain(weight)
        sums, scale_O = self.accumulate(x, weight, order, scale, config, geometry, zero)
        expected_sums, expected_scale = expected(x, weight, order, scale, config, geometry, zero)
        assert torch.equal(scale_O, expected_scale)
        assert torch.equal(sums, expected_sums)

    @pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.threads}-{c.policy}-{c.rounding}-{c.pairing}")
    def test_sums_equal_the_reference(self, config):
        self.check(*sample(1, (64, 39, 1, 1), (1, 39)), config=config)

    @pytest.mark.parametrize("config", SIGNED, ids=repr)
    def test_sums_of_signed_codes_equal_the_reference(self, config):
        self.check(*sample(1, (32, 21, 1, 1), (2, 21), signed=True), config=config, zero=128)

    @pytest.mark.parametrize("shape", [*SHAPES, *GROUPED])
    def test_shapes_of_signed_codes(self, shape):
        """What pads an image, or a slot, is the value 0 and not the byte 0."""
        x_shape, weight_shape, geometry = (SHAPES | GROUPED)[shape]
        x, weight = sample(2, x_shape, weight_shape, signed=True)
        config = NBSMT(1) if geometry.groups > 1 else NBSMT(2, "S+aW", pairing="adjacent", port=4)
        self.check(x, weight, geometry=geometry, config=config, zero=128)
        if geometry.groups == 1:
            order = torch.randperm(x_shape[1], generator=torch.Generator().manual_seed(0))
            self.check(x, weight, order, geometry=geometry, zero=128)

    def test_signed_codes_round_half_to_even_and_clip_at_both_ends(self):
        from recoup.nbsmt.gpu_operands import activation_operands

        for scale in (0.0123, 1 / 3, 1e-30, 3e30):
            step = torch.tensor(scale, dtype=torch.float32)
            ties = (torch.arange(-132, 132) + 0.5) * step
            x = torch.cat([ties, ties.nextafter(ties * 2), ties.nextafter(ties * 0), torch.tensor([-0.0, -3e38, 3e38])])
            x = x.view(-1, 1, 1, 1)
            plan = Plan.of(tuple(x.shape), (1, 1, 1, 1), NBSMT(1), POINTWISE, 128)
            faults = torch.zeros(1, dtype=torch.int32, device=self.device)
            operand = activation_operands(plan, x.to(self.device), None, scale, faults).cpu()
            assert torch.equal(operand[:, 0, 0, 0], reference.quantize_activation(x, scale, 128).flatten())
            assert not faults.any()
        x[5] = torch.nan
        activation_operands(plan, x.to(self.device), None, scale, faults)
        assert faults.item() == NOT_FINITE

    @pytest.mark.parametrize("shape", SHAPES)
    def test_shapes(self, shape):
        x_shape, weight_shape, geometry = SHAPES[shape]
        x, weight = sample(2, x_shape, weight_shape)
        order = torch.randperm(x_shape[1], generator=torch.Generator().manual_seed(0))
        self.check(x, weight, geometry=geometry)
        self.check(x, weight, order, geometry=geometry, config=NBSMT(2, "S+W", pairing="adjacent"))
        self.check(x.contiguous(memory_format=torch.channels_last), weight, geometry=geometry, config=NBSMT(1))

    @pytest.mark.parametrize("shape", GROUPED)
    def test_grouped_convolutions(self, shape):
        x_shape, weight_shape, geometry = GROUPED[shape]
        self.check(*sample(3, x_shape, weight_shape), config=NBSMT(1), geometry=geometry)

    @pytest.mark.parametrize("shape", [*SHAPES, *GROUPED])
    @pytest.mark.parametrize("overflow", ["saturate", "wrap"])
    def test_registers_equal_the_reference(self, shape, overflow):
        """Wide and narrow ones, of signed and unsigned codes."""
        x_shape, weight_shape, geometry = (SHAPES | GROUPED)[shape]
        configs = [NBSMT(1), NBSMT(2, "S+aW", "half_up", port=4), NBSMT(4, "S+Aw", "zero", "adjacent")]
        for seed, config in enumerate(configs[: 1 if geometry.groups > 1 else 3]):
            order = torch.randperm(x_shape[1], generator=torch.Generator().manual_seed(0)) if seed == 2 else None
            for zero, bits in ((0, 12), (128, 15), (0, 17)):
                unit = config.replace(accumulator=Int(bits, overflow=overflow))
                x, weight = sample(seed, x_shape, weight_shape, signed=zero > 0)
                self.check(x, weight, order, geometry=geometry, config=unit, zero=zero)

    @pytest.mark.parametrize("overflow", ["saturate", "wrap"])
    @pytest.mark.parametrize("bits", [8, 24, 30, 31, 32])
    def test_registers_of_every_width(self, bits, overflow):
        unit = NBSMT(1, accumulator=Int(bits, overflow=overflow))
        x, weight = torch.full((2, 700, 1, 1), 127.5), torch.full((2, 700), 127.5)
        x[1, :9], weight[1, 350:] = 0.5, -113.0
        self.check(x, weight, config=unit)

    @pytest.mark.parametrize("bits", [29, 30, 31, 32])
    def test_wide_registers_are_followed_too(self, bits):
        """No layer above has sums that long, so its plan has no such register. Of 31 bits on the kernel adds in 64; the
        interpreter, which takes milliseconds a slot, does not reach their ends."""
        from recoup.nbsmt.gpu_convolution import saturated_products

        ends = (1 << (bits - 1)) // (255 * 127) + 9 if self.device == "cuda" else 9
        generator = torch.Generator().manual_seed(bits)
        a_MJ = torch.randint(0, 256, (3, ends + 20), generator=generator)
        b_NJ = torch.randint(-128, 128, (2, ends + 20), generator=generator)
        a_MJ[:2, :ends], b_NJ[0, :ends], b_NJ[1, :ends] = 255, 127, -128
        own = Int(bits, overflow="saturate")
        given = a_MJ.int().to(self.device), b_NJ.to(torch.int8).to(self.device), 0, NBSMT(1, accumulator=own)
        low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
        total = torch.zeros(3, 2, dtype=torch.int64)
        for a_M, b_N in zip(a_MJ.T, b_NJ.T, strict=True):
            total = (total + a_M[:, None] * b_N).clamp(low, high)
        assert torch.equal(saturated_products(*given, a_MJ.shape[1], torch.int32).cpu().long(), total)
        assert torch.equal(saturated_products(*given, a_MJ.shape[1]).cpu(), total.float())

    @pytest.mark.parametrize("config", [NBSMT(1), NBSMT(2, "S+aW", port=4), NBSMT(4, pairing="adjacent")], ids=repr)
    @pytest.mark.parametrize("signed", [False, True])
    def test_saturated_products_equal_the_reference(self, config, signed):
        from recoup.nbsmt.gpu_convolution import saturated_products

        x, w = operands(3, 5, 11, 3, 0.3, signed)
        operand = weight_operand(w.t(), config, 128 * signed)
        a_MJ = reference.activation_operand(x, operand.activations, config)
        slots = a_MJ.shape[1] // (len(operand.activations) * config.threads)
        for bits in (9, 14):
            unit = config.replace(accumulator=Int(bits))
            given = a_MJ.int().to(self.device), operand.weight_OGJkk.to(self.device), 128 * signed
            found = saturated_products(*given, unit, slots, torch.int32)
            assert torch.equal(found.cpu(), reference.matmul(x, w, unit))

    def test_any_strides(self):
        x, weight = sample(4, (4, 10, 6, 8), (2, 5, 3, 3))
        views = [x[::2, ::2, 1:, ::2], x[:, :1].expand(-1, 5, -1, -1), x[:, :5].transpose(2, 3)]
        for view in views:
            self.check(view, weight)
        self.check(views[0], weight.contiguous(memory_format=torch.channels_last))
        self.check(views[0], weight.transpose(2, 3))

    def test_channels_past_one_block(self):
        self.check(*sample(5, (33, 300, 1, 1), (2, 300)), config=NBSMT(1))

    def test_activation_codes_round_half_to_even_after_a_true_division(self):
        from recoup.nbsmt.gpu_operands import activation_operands

        generator = torch.Generator().manual_seed(6)
        for scale in (0.0123, 1 / 3, 1e-30, 3e30, 2.0**-126):
            step = torch.tensor(scale, dtype=torch.float32)
            ties = (torch.arange(0, 258) + 0.5) * step
            tops = torch.tensor([0.0, -0.0, 1e-45, 1e-38, 3e38]), torch.rand(500, generator=generator) * 260 * step
            x = torch.cat([ties, ties.nextafter(ties * 2), ties.nextafter(ties * 0), *tops]).view(-1, 1, 1, 1)
            plan = Plan.of(tuple(x.shape), (1, 1, 1, 1), NBSMT(1), POINTWISE)
            faults = torch.zeros(1, dtype=torch.int32, device=self.device)
            operand = activation_operands(plan, x.to(self.device), None, scale, faults).cpu()
            codes = reference.quantize_activation(x, scale).flatten()
            assert torch.equal(operand[:, 0, 0, 0].int() + 128, codes.int())
            assert not faults.any()

    def test_weight_codes_and_scales_come_from_true_divisions(self):
        from recoup.nbsmt.gpu_operands import weight_operands

        generator = torch.Generator().manual_seed(7)
        rows = [torch.randn(200, generator=generator) * 10.0**e for e in (-44, -38, -3, 0, 2, 37)]
        ties = (torch.arange(200) - 100 + 0.5) * 0.037
        ties[-1] = 127.5 * 0.037
        weight = torch.stack([*rows, ties, -ties.abs(), torch.zeros(200)]).view(-1, 200, 1, 1)
        code, scale_O = quantize_weight(weight)
        plan = Plan.of((1, 200, 1, 1), tuple(weight.shape), NBSMT(1), POINTWISE)
        faults = torch.zeros(1, dtype=torch.int32, device=self.device)
        operand_OLK, offset_O, scale = (v.cpu() for v in weight_operands(plan, weight.to(self.device), None, faults))
        assert torch.equal(scale, scale_O)
        assert torch.equal(operand_OLK[:, 0, :200], code[:, :, 0, 0])
        assert not operand_OLK[:, 0, 200:].any()
        assert torch.equal(offset_O, 128 * code.int().flatten(1).sum(1, dtype=torch.int32))

    def test_operands_of_every_group_lie_in_their_columns(self):
        from recoup.nbsmt.gpu_operands import activation_operands, weight_operands

        config = NBSMT(4, "S+aW", pairing="adjacent")
        x, weight = sample(8, (2, 6, 2, 3), (2, 6, 3, 3), zeros=0)
        plan = Plan.of(tuple(x.shape), tuple(weight.shape), config, Geometry((3, 3), (1, 1), (1, 2), (1, 1), 1))
        faults = torch.zeros(1, dtype=torch.int32, device=self.device)
        found = activation_operands(plan, x.to(self.device), None, 0.5, faults).cpu().int() + 128
        code = F.pad(reference.quantize_activation(x, 0.5), (2, 2, 1, 1))
        want = reference.activation_operand(code, tuple(g.activation for g in groups(config)), config)
        want = want.view(2, len(groups(config)), 2, 4, 4, 7).permute(0, 4, 5, 1, 3, 2)  # [N, H, W, G, T, S]
        assert torch.equal(found.view(*want.shape[:-1], 4), F.pad(want, (0, 2)).int())

        operand_OLK = weight_operands(plan, weight.to(self.device), None, faults)[0].cpu()
        used = operand_OLK.view(2 * 9, len(groups(config)), 4, 4).any(0).any(0)  # [T, V]
        assert used.tolist() == [[True, True, False, False]] * 2 + [[True, False, False, False]] * 2

    def test_sums_are_rounded_once_beyond_24_bits(self):
        x, weight = torch.full((2, 700, 1, 1), 127.5), torch.full((2, 700), 127.5)
        x[0, 0], x[1, :9], weight[1, ::7] = 127.0, 0.5, 113.0
        self.check(x, weight, config=NBSMT(1))
        assert self.accumulate(x, weight, config=NBSMT(1))[0][0, 0] == 22669372.0  # 127 * (255 * 700 - 1) = 22669373

    def test_every_block_gives_the_same_bits(self):
        from recoup.nbsmt import gpu_convolution, gpu_operands

        x_shape, weight_shape, geometry = (2, 20, 5, 5), (20, 20, 3, 3), Geometry((3, 3), (1, 1), (1, 1), (1, 1), 1)
        x, weight = sample(9, x_shape, weight_shape)
        plan, want = (
            Plan.of(x_shape, weight_shape, NBSMT(), geometry),
            expected(x, weight, None, 0.5, NBSMT(), geometry)[0],
        )
        faults = torch.zeros(1, dtype=torch.int32, device=self.device)
        weight_OLK, offset_O, _ = gpu_operands.weight_operands(plan, weight.to(self.device), None, faults)
        operand_PK = gpu_operands.activation_operands(plan, x.to(self.device), None, 0.5, faults)
        for block in ((64, 16, 32, 4, 3), (128, 64, 64, 4, 2), (32, 128, 128, 8, 4)):
            out = torch.full((2, *plan.out, 20), torch.nan, device=self.device)
            gpu_convolution.convolve(plan, operand_PK, weight_OLK, offset_O, out, block=gpu_convolution.Tile(*block))
            assert torch.equal(out.permute(0, 3, 1, 2).cpu(), want)

    def test_a_large_batch_goes_through_in_parts(self, monkeypatch):
        monkeypatch.setattr("recoup.nbsmt.gpu_plan.WORKSPACE", 2 * 4 * 4 * 32)
        x, weight = sample(10, (5, 8, 4, 4), (2, 8, 2, 2))
        assert len(list(Plan.of(tuple(x.shape), tuple(weight.shape), NBSMT(), plain(weight)).parts())) == 3
        self.check(x, weight)
        x[1, 2, 3, 3] = -1
        with pytest.raises(RecoupError, match="negative values"):
            self.accumulate(x, weight)

    @pytest.mark.parametrize("value", [-1.0, -1e-45, torch.nan, torch.inf, -torch.inf])
    def test_faults_raise_what_the_cpu_raises(self, value):
        x, weight = sample(11, (1, 3, 4, 4), (1, 3, 1, 1))
        arguments = (NBSMT().code, [2, 2], [0, 0], [1, 1], 1, "layer 'a'")
        for target in (x, weight) if abs(value) != 1 and not -1 < value < 0 else (x,):
            before = target[0, 1, -1, -1].clone()  # a pixel that the stride leaves out: the CPU looks at it too
            target[0, 1, -1, -1] = value
            with pytest.raises(RecoupError) as wanted:
                convolution(x, weight, None, 0.5, *arguments)
            with pytest.raises(RecoupError, match=re.escape(str(wanted.value))):
                gpu.accumulate(
                    *(x.to(self.device), weight.to(self.device), None, 0.5, NBSMT()),
                    *(Geometry((1, 1), (2, 2), (0, 0), (1, 1), 1), "layer 'a'"),
                )
            target[0, 1, -1, -1] = before


class TestInterpreter(Kernels):
    __test__ = INTERPRETER
    device = "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here: interpreter and compiler only")
class TestCuda(Kernels):
    __test__ = not INTERPRETER
    device = "cuda"

    @pytest.mark.parametrize(("network", "size"), [(resnet20, 32), (resnet18, 64), (mobilenet_v1, 32)])
    @pytest.mark.parametrize("threads", [1, 2, 4])
    @pytest.mark.filterwarnings("ignore::recoup.RecoupWarning")  # layers in groups run one thread
    def test_layers_of_networks_equal_the_cpu(self, network, size, threads):
        torch.manual_seed(threads)
        model, x = network().eval(), torch.rand(3, 3, size, size)
        rc.calibrate_(model, [x])
        rc.emulate_(model, NBSMT(threads))
        if threads == 2:
            for layer in emulated_layers(model).values():
                layer.activation_zero = 128  # half of the codes' range is idle then; the bits are what is compared
        layers, seen = emulated_layers(model), {}
        handles = [
            layer.register_forward_hook(lambda m, given, found: seen.update({m: (given[0].cpu(), found.cpu())}))
            for layer in layers.values()
        ]
        with torch.inference_mode():
            model.to(self.device)(x.to(self.device))
            for handle in handles:
                handle.remove()
            model.cpu()
            assert len(seen) == len(layers)
            for layer, (given, found) in seen.items():
                assert torch.equal(layer(given), found), layer.title

    def test_weights_written_through_data_count(self):
        x, weight = (v.to(self.device) for v in sample(12, (1, 8, 3, 3), (2, 8, 1, 1)))
        arguments = (None, 0.5, NBSMT().code, [1, 1], [0, 0], [1, 1], 1, "layer")
        before = convolution(x, weight, *arguments)
        weight.data.neg_()
        assert not torch.equal(convolution(x, weight, *arguments), before)
        assert torch.equal(convolution(x, weight, *arguments).cpu(), convolution(x.cpu(), weight.cpu(), *arguments))

    @pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
    def test_a_cuda_graph_is_refused(self):
        x, weight = (v.to(self.device) for v in sample(13, (1, 8, 3, 3), (2, 8, 1, 1)))
        self.accumulate(x, weight)
        with pytest.raises(RecoupError, match="CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            gpu.accumulate(x, weight, None, 0.5, NBSMT(), plain(weight), "layer")
