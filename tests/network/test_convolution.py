"""Geometry against torch's own convolutions, on whole numbers, so that equality is exact."""

import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from recoup.errors import RecoupError
from recoup.network.convolution import POINTWISE, Geometry, Padded, as_2d, memory_format

small, wide = st.tuples(st.integers(1, 3), st.integers(1, 3)), st.tuples(st.integers(0, 3), st.integers(0, 3))
geometries = st.builds(Geometry, small, small, wide, small, st.sampled_from([1, 2]))


class Conv1d(Padded, nn.Conv1d):  # type: ignore[misc]
    pass


class Conv2d(Padded, nn.Conv2d):  # type: ignore[misc]
    pass


def whole(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(seed)).double()


def case(geometry: Geometry, size: tuple[int, int], seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [2, C, H, W] and weight of four outputs, and their convolution by torch."""
    assume(all(n + 2 * p > d * (k - 1) for n, p, d, k in zip(size, *_reach(geometry), strict=True)))
    x, w = whole(seed, 2, 2 * geometry.groups, *size), whole(seed + 1, 4, 2, *geometry.kernel)
    return x, w, F.conv2d(x, w, None, *geometry.arguments)


def _reach(geometry: Geometry) -> tuple[tuple[int, int], ...]:
    return geometry.padding, geometry.dilation, geometry.kernel


@settings(max_examples=100, deadline=None)
@given(geometries, st.tuples(st.integers(1, 7), st.integers(1, 7)), st.integers(0, 1000))
def test_a_convolution_is_a_product_over_columns(geometry, size, seed):
    x, w, y = case(geometry, size, seed)
    assert geometry.size(x) == geometry.outputs(size) == tuple(y.shape[2:])
    assert geometry.empty(x, 4).shape == y.shape
    geometry.check(x, "layer")
    G = geometry.groups
    product = w.view(G, 4 // G, -1) @ geometry.columns(x)  # [G, O / G, N P]
    assert torch.equal(product.view(4, 2, *y.shape[2:]).transpose(0, 1), y)


@settings(max_examples=100, deadline=None)
@given(geometries, st.tuples(st.integers(1, 7), st.integers(1, 7)), st.integers(0, 1000))
def test_image_and_adjoint_give_the_inputs_gradient(geometry, size, seed):
    x, w, y = case(geometry, size, seed)
    grad, G = whole(seed + 2, *y.shape), geometry.groups
    wanted = torch.nn.grad.conv2d_input(x.shape, w, grad, *geometry.arguments)
    grad_GOP = grad.transpose(0, 1).reshape(G, 4 // G, -1)
    assert torch.equal(geometry.image(w.view(G, 4 // G, -1).mT @ grad_GOP, x.shape), wanted)
    spread, mirrored, adjoint = geometry.adjoint(grad, w, x.shape)
    assert torch.equal(F.conv2d(spread, mirrored, None, *adjoint.arguments), wanted)


def test_weights_of_every_layer():
    x = whole(0, 2, 6, 1, 5)
    for shape, kernel in (((3, 6), (1, 1)), ((3, 6, 2), (1, 2)), ((3, 6, 1, 4), (1, 4))):
        weight = whole(1, *shape)
        assert Geometry.of(weight, (1, 1), (0, 0), (1, 1), 1).kernel == kernel
        assert as_2d(weight).shape == (3, 6, *kernel)
        assert torch.equal(as_2d(weight).flatten(), weight.flatten())
    assert torch.equal(
        F.conv2d(x, as_2d(weight[..., 0]), None, *POINTWISE.arguments)[0, :, 0].t(),
        x[0, :, 0].t() @ weight[:, :, 0, 0].t(),
    )


def test_a_kernel_larger_than_its_input_is_refused():
    told = "layer 'a': kernel [3, 1] with dilation [2, 1] is larger than the padded input [1, 4, 2, 9], padding [1, 0]"
    with pytest.raises(RecoupError, match=f"^{re.escape(told)}$"):
        Geometry((3, 1), (1, 1), (1, 0), (2, 1), 1).check(torch.zeros(1, 4, 2, 9), "layer 'a'")


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 1, 4, 5), (2, 3, 1, 1), (0, 3, 4, 5)])
def test_the_memory_format_is_torchs(shape):
    for x in (torch.zeros(shape), torch.zeros(shape).contiguous(memory_format=torch.channels_last)):
        y = F.conv2d(x, torch.zeros(6, shape[1], 1, 1))
        assert y.is_contiguous(memory_format=memory_format(x))
        assert POINTWISE.empty(x, 6).stride() == torch.empty_like(y).contiguous(memory_format=memory_format(x)).stride()


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [0, 2, "same", "valid"])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("kind", [Conv1d, Conv2d])
def test_padded_layers_in_two_dimensions(kind, batched, padding, mode):
    dims = 1 if kind is Conv1d else 2
    layer = kind(4, 6, 3, padding=padding, dilation=2, groups=2, bias=False, padding_mode=mode).double()
    layer.weight.data = whole(3, *layer.weight.shape)
    x = whole(4, *([2] if batched else []), 4, *[7, 8][:dims])
    x_NCHW, geometry = layer.in_2d(x)
    y_NOhw = F.conv2d(x_NCHW, as_2d(layer.weight), None, *geometry.arguments)
    assert geometry.outputs(x_NCHW.shape[2:]) == y_NOhw.shape[2:]
    assert torch.equal(layer.from_2d(y_NOhw, x), layer(x))


class Counted(Conv2d):
    """Counts how often its weight is looked up."""

    looked_up = 0

    def __getattr__(self, name: str):
        if name == "weight":
            type(self).looked_up += 1
        return super().__getattr__(name)


def test_a_call_looks_its_weight_up_once():
    layer = Counted(2, 4, 3)
    Counted.looked_up = 0
    layer.in_2d(torch.zeros(1, 2, 5, 5))
    assert Counted.looked_up == 1  # half a microsecond each, in every call of a small layer


@pytest.mark.parametrize(("value", "refused"), [((2, 1), False), (2, False), ((True, 1), True), ((1, 0), True)])
def test_what_is_set_after_a_call_holds_for_the_next(value, refused):
    layer, x = Conv2d(1, 1, 2, bias=False), whole(0, 1, 1, 7, 7).float()
    assert layer.in_2d(x)[1].stride == (1, 1)
    layer.stride = value
    if refused:
        with pytest.raises(RecoupError, match=re.escape(f"stride={value!r}: it must be a whole number from 1 on")):
            layer.in_2d(x)
        return
    padded, geometry = layer.in_2d(x)
    assert torch.equal(F.conv2d(padded, layer.weight, None, *geometry.arguments), layer(x))
