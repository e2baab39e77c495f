"""The drop-ins: torch's constructors, state_dict and shapes; gradients; errors that name layer and shape; compilers."""

import copy
import pickle

import pytest
import torch
from torch import nn

import recoup as rc
from recoup.errors import RecoupError
from recoup.lightnorm import LightLayerNorm, LightNorm, LightRMSNorm
from recoup.lightnorm.rows import passes

RANGE = LightNorm.range(chunks=2)
LAYERS = [(LightLayerNorm, nn.LayerNorm), (LightRMSNorm, nn.RMSNorm)]


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 + 1


def filled(layer, seed=1):
    """A layer with parameters that are not all alike."""
    with torch.no_grad():
        for value in layer.parameters():
            value.copy_(drawn(*value.shape, seed=seed))
    return layer


def expected(layer, x):
    """y of the passes on samples of flat features."""
    D = layer.features
    beta = torch.zeros(D) if layer.shift is None else layer.shift.flatten()
    gamma = torch.ones(D) if layer.weight is None else layer.weight.flatten()
    eps = torch.finfo(x.dtype).eps if layer.eps is None else layer.eps
    rows = x.detach().reshape(-1, D).contiguous()
    return passes.forward(rows, gamma, beta, layer.gain, layer.kind, layer.config, eps)[0].view(x.shape)


@pytest.mark.parametrize(("layer", "plain"), LAYERS)
@pytest.mark.parametrize("shape", [20, (20,), (3, 8), [2, 3, 4]])
def test_layers_are_torch_s(layer, plain, shape):
    float_layer, unit = filled(plain(shape)), layer(shape)
    assert unit.float_class is plain
    assert isinstance(unit, plain)
    assert list(unit.state_dict()) == list(float_layer.state_dict())
    unit.load_state_dict(float_layer.state_dict())
    axes = float_layer.normalized_shape
    x = drawn(2, 3, *axes)
    y = unit(x)
    assert y.shape == x.shape
    assert torch.equal(y, expected(unit, x))
    assert torch.equal(unit.eval()(x), y)  # no running statistics
    assert torch.equal(unit(x[0, 0]), y[0, 0])  # one sample alone, and no batch axes at all
    unit.mode = "float"
    assert torch.equal(unit(x), float_layer(x))


def test_options():
    for layer in (LightLayerNorm(16, elementwise_affine=False), LightRMSNorm(16, elementwise_affine=False)):
        assert not list(layer.parameters())
        assert torch.equal(layer(drawn(3, 16)), expected(layer, drawn(3, 16)))
    without = filled(LightLayerNorm(16, bias=False, dtype=torch.float64))
    assert list(without.state_dict()) == ["weight"]
    assert without(drawn(3, 16, dtype=torch.float64)).dtype == torch.float64
    tiny = LightRMSNorm(16, config=LightNorm.range())  # eps None: that of the dtype, of half that of float32
    x = torch.full((1, 16), 1e-6)
    A = rc.lightnorm.scale.magnitude_constant(2)
    for dtype, eps in ((torch.float32, 2.0**-23), (torch.bfloat16, 2.0**-23), (torch.float64, 2.0**-52)):
        given = x.to(dtype)
        value = given.double()[0, 0]
        torch.testing.assert_close(tiny.to(dtype)(given).double()[0, 0], value / (A * value + eps), rtol=4e-3, atol=0)


@pytest.mark.parametrize(("layer", "plain"), LAYERS)
def test_strides_halves_and_places(layer, plain):
    unit, x = filled(layer(16)), drawn(4, 16, 5)
    turned = x.transpose(1, 2)
    y = unit(turned)
    assert torch.equal(y, unit(turned.contiguous()))
    assert y.stride() == torch.empty_like(turned).stride()
    for dtype in (torch.float16, torch.bfloat16):
        half = turned.to(dtype)
        assert torch.equal(unit(half), unit(half.float()).to(dtype))
        assert unit.to(dtype)(half).dtype == dtype
        unit.float()
    model = nn.Sequential(unit, nn.ReLU(inplace=True))
    model(x.transpose(1, 2).requires_grad_()).sum().backward()
    empty = torch.zeros(0, 16, requires_grad=True)
    unit.zero_grad()
    unit(empty).sum().backward()
    assert not unit.weight.grad.any()
    assert empty.grad.shape == (0, 16)


@pytest.mark.parametrize(("layer", "gained"), [(LightLayerNorm, True), (LightRMSNorm, False)])
def test_derivatives_against_central_differences(layer, gained):
    unit = layer((2, 3), config=RANGE, dtype=torch.float64)
    unit.gain = torch.rand(6) + 0.5 if gained else None
    names = [name for name, _ in unit.named_parameters()]
    leaves = [
        drawn(3, 2, 3, dtype=torch.float64),
        *(drawn(2, 3, seed=i, dtype=torch.float64) for i in range(len(names))),
    ]

    def run(x, *vectors):
        return torch.func.functional_call(unit, dict(zip(names, vectors, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, [leaf.requires_grad_() for leaf in leaves])


def test_gradients_are_the_backward_passes():
    unit, x = filled(LightLayerNorm((4, 6))), drawn(3, 4, 6).requires_grad_()
    grad = drawn(3, 4, 6, seed=2) * 0.01
    unit(x).backward(grad)
    gamma, beta = unit.weight.detach().flatten(), unit.bias.detach().flatten()
    _, xhat, r, ends = passes.forward(x.detach().view(3, 24), gamma, beta, None, "layer", unit.config, unit.eps)
    dx, dgamma, dbeta = passes.backward(grad.view(3, 24), xhat, r, ends, gamma, None, "layer", unit.config)
    assert torch.equal(x.grad, dx.view(3, 4, 6))
    assert torch.equal(unit.weight.grad, dgamma.view(4, 6))
    assert torch.equal(unit.bias.grad, dbeta.view(4, 6))


@pytest.mark.slow  # seconds of torch's own checks
def test_operators():
    x, vectors = drawn(2, 16).requires_grad_(), [torch.ones(16).requires_grad_(), torch.zeros(16).requires_grad_()]
    for gain in (None, torch.rand(16)):
        arguments = (x, *vectors, gain, "layer", LightNorm().code, 1e-5, "layer")
        torch.library.opcheck(torch.ops.recoup.lightnorm_rows.default, arguments)


def test_compilers_and_second_derivatives():
    x = drawn(2, 16).requires_grad_()
    unit = filled(LightRMSNorm(16))
    compiled = torch.compile(copy.deepcopy(unit), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), unit(x))
    (slope,) = torch.autograd.grad(unit(x).square().sum(), x, create_graph=True)
    with pytest.raises(RecoupError, match=r"layer ''.*no second derivatives"):
        torch.autograd.grad(slope.sum(), x)


def test_copies():
    unit = filled(LightLayerNorm(16, config=LightNorm(block=8)))
    unit.gain = torch.full((16,), 1.25)
    x = drawn(3, 16)
    for other in (copy.deepcopy(unit), pickle.loads(pickle.dumps(unit))):
        assert torch.equal(other(x), unit(x))
    other = LightLayerNorm(16, config=LightNorm(block=8))
    other.load_state_dict(unit.state_dict())  # the gain travels beside the keys
    assert torch.equal(other(x), unit(x))
    assert "LightNorm(block=8), gain" in repr(unit)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LightLayerNorm(15), "layer ''.*15 features; 8 chunks need at least 16: use LightNorm.chunks=7"),
        (lambda: LightRMSNorm((3, 5)), "layer ''.*15 features; 8 chunks need at least 16"),
        (lambda: LightRMSNorm(1, config=RANGE), "1 features; 2 chunks need at least 4: leave it in float with"),
        (
            lambda: LightRMSNorm(4, config=LightNorm()),
            "need at least 16: use LightNorm.chunks=2., or leave it in float",
        ),
        (lambda: LightRMSNorm(16, config=LightNorm(scale="paper")), r"layer ''.*scale='paper'.*use scale='gaussian'"),
        (lambda: LightLayerNorm(16, config=rc.LBA()), "LightLayerNorm.config=.*must be a LightNorm"),
        (
            lambda: LightLayerNorm(16, eps=-1.0),
            r"layer '' \(\(16,\).*LayerNorm\(eps=-1.0\): eps must be a number from 0",
        ),
        (
            lambda: LightLayerNorm(16, eps=None),
            r"layer '' \(\(16,\).*LayerNorm\(eps=None\): eps must be a number from 0",
        ),
        (lambda: LightRMSNorm(16, eps=2), r"layer '' \(\(16,\).*RMSNorm\(eps=2\): eps must be a number from 0"),
        (lambda: LightRMSNorm(16, eps=torch.tensor(1e-5)), r"layer '' \(\(16,\).*its eps is a tensor \[\].*set eps ="),
        (lambda: LightLayerNorm(16)(drawn(3, 17)), r"layer ''.*the input \[3, 17\] must end with \[16\]"),
        (lambda: LightLayerNorm((2, 8))(drawn(16)), r"layer ''.*the input \[16\] must end with \[2, 8\]"),
        (
            lambda: LightLayerNorm(16)(torch.ones(3, 16, dtype=torch.int64)),
            r"floating point; got torch.int64 \[3, 16\]",
        ),
        *(
            (
                lambda given=given, own=own: LightLayerNorm(16, dtype=own)(drawn(3, 16, dtype=given)),
                rf"layer ''.*the input is {given} \[3, 16\], the parameters are {own}: a layer norm takes float64",
            )
            for given, own in (
                (torch.float64, torch.float32),
                (torch.float32, torch.float64),
                (torch.float64, torch.float16),
                (torch.bfloat16, torch.float64),
            )
        ),
        (lambda: LightLayerNorm(16)(drawn(3, 16).to_sparse()), "sparse"),
        (
            lambda: LightLayerNorm(16, config=LightNorm(nonfinite="error"))(torch.full((1, 16), torch.inf)),
            r"layer ''.*\[1, 16\].*the input holds 16 NaN or infinite values",
        ),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(RecoupError, match=message):
        make()


def test_operators_look_at_their_vectors():
    """Kernels would read behind a vector's end."""
    x, code = drawn(2, 16), LightNorm().code
    operator = torch.ops.recoup.lightnorm_rows
    with pytest.raises(RecoupError, match=r"layer: \[2, 16\] does not split .*\[16\], \[15\]"):
        operator(x, torch.ones(16), torch.ones(15), None, "layer", code, 1e-5, "layer")
    with pytest.raises(RecoupError, match=r"\[16\], \[16\], \[2\]"):
        operator(x, torch.ones(16), torch.ones(16), torch.ones(2), "rms", code, 1e-5, "layer")


def test_a_sample_with_nan_or_infinity_is_nan_and_its_neighbours_are_not():
    unit, x = filled(LightLayerNorm(16)), drawn(3, 16)
    clean = unit(x)
    x[1, 3] = torch.inf
    y = unit(x.requires_grad_())
    assert y[1].isnan().all()
    assert torch.equal(y[::2], clean[::2])
    y[::2].sum().backward()
    assert x.grad is not None
    assert x.grad[1].isnan().all()
    assert not x.grad[::2].isnan().any()


def test_the_input_by_any_name():
    """torch's layer norm calls it input, its RMS norm x."""
    x = drawn(3, 16)
    for unit, name in ((LightLayerNorm(16), "input"), (LightRMSNorm(16), "x")):
        for mode in ("emulate", "float"):
            unit.mode = mode
            assert torch.equal(unit(**{name: x}), unit(x))
        unit.mode = "emulate"
        with pytest.raises(RecoupError, match="takes the input alone; got 2 arguments"):
            unit(x, x)
