"""The closed-form mean loss against both convolutions, and what the correction does to a network."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import recoup as rc
from recoup.errors import RecoupError
from recoup.nbsmt import reference
from recoup.nbsmt.bias import correct_bias_, mean_loss
from recoup.nbsmt.config import NBSMT
from recoup.nbsmt.observe import hooked, nbsmt_layers, see
from recoup.nbsmt.weights import weight_operand
from recoup.network.emulated import running
from tests.nbsmt.strategies import configs
from tests.networks import CONVOLUTIONS, images, small_net

HARSH = NBSMT(threads=4, rounding="zero")
"""Truncation shifts means the most."""


def network(config=HARSH, calibration=None):
    model = small_net()
    rc.calibrate_(model, [images(24)] if calibration is None else calibration)
    return rc.emulate_(model, config)


def emulated(layer, x, config):
    with torch.no_grad():
        layer.weight[torch.rand_like(layer.weight) < 0.3] = 0
    rc.calibrate_(layer, [x], {"": True})
    return rc.emulate_(layer, config)


LAYERS = [
    (lambda: nn.Conv2d(7, 5, 3, padding=1), (3, 7, 6, 5)),
    (lambda: nn.Conv2d(8, 5, (3, 2), stride=(2, 1), dilation=(1, 2), padding=(2, 0)), (3, 8, 7, 6)),
    (lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"), (2, 6, 5, 5)),
    (lambda: nn.Conv1d(6, 5, 4, padding="same"), (3, 6, 9)),
    (lambda: nn.Linear(13, 6), (2, 5, 13)),
]


@settings(max_examples=60, deadline=None)
@given(configs, st.sampled_from(LAYERS), st.booleans(), st.integers(0, 2**32 - 1), st.booleans())
def test_mean_loss_equals_the_mean_of_two_convolutions(config, case, reordered, seed, signed):
    torch.manual_seed(seed)
    make, shape = case
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch says that 'same' with an even kernel copies
        x = torch.rand(shape) * 2 - 0.5
        x = torch.where(x.abs() < 0.2, 0, x) if signed else x.relu()
        layer = emulated(make(), x, config)
        if reordered:
            layer.order = torch.randperm(shape[-1] if isinstance(layer, nn.Linear) else shape[1])
        seen = see(layer, x)
        code, (weight, scale) = seen.codes(), seen.weight_codes()
        if reordered:
            code, weight = code[:, layer.order], weight[:, layer.order]
        assert code.dtype == (torch.int8 if signed else torch.uint8)
        operand = weight_operand(weight, config, seen.zero)
        nbsmt = reference.activation_operand(code, operand.activations, config)
        g = seen.geometry
        y, y8 = (
            F.conv2d(a.double(), b.double(), None, g.stride, g.padding, g.dilation)
            for a, b in ((nbsmt, operand.weight_OGJkk), (code, weight))
        )
        loss = (y8 - y).sum((0, 2, 3)) / (y.numel() // y.shape[1])
        assert torch.equal(mean_loss(seen), loss * (scale * seen.scale).double())


def means(model, x, mode):
    """Mean output per channel of every layer, each in ``mode`` on the inputs that the corrected model gives it."""
    found = {}

    def hook(name, seen, output):
        if mode == "baseline":
            with running(seen.layer, "baseline"):
                g = seen.geometry
                config = seen.layer.active_config
                assert (config.threads, g.groups) == (1, 1)
                output = seen.product(config, None)
                if seen.layer.bias is not None:
                    output = output + seen.layer.bias.view(1, -1, 1, 1)
        found[name] = output.double().mean((0, 2, 3))

    with torch.no_grad(), hooked(nbsmt_layers(model, "test"), hook, "test"):
        model(x)
    return found


def test_corrected_layers_have_the_means_of_eight_bit_ones():
    model, x = network(), images(24)
    off = {
        name: float((mean - means(model, x, "baseline")[name]).abs().max())
        for name, mean in means(model, x, "").items()
    }
    correct_bias_(model, [x])
    for name, mean in means(model, x, "").items():
        expected = means(model, x, "baseline")[name]
        # Outputs of about 1 are float32: each is rounded at the scaling and at two additions, by up to 2^-24 of it.
        assert float((mean - expected).abs().max()) < 1e-6
        assert off[name] > 1e-3


def test_kept_images_are_the_default_and_one_batch_equals_what_was_stored():
    model, other = network(), network()
    correct_bias_(model)
    correct_bias_(other, [(images(24), torch.zeros(24))])
    for name in CONVOLUTIONS:
        correction = model.get_submodule(name).bias_correction
        assert correction.dtype == torch.float32
        assert torch.equal(correction, other.get_submodule(name).bias_correction)


def test_several_batches_are_weighted_by_their_positions():
    x = images(24)
    model, other = network(), network()
    correct_bias_(model, [x[:5], x[5:]])
    correct_bias_(other, [x])
    first, whole = model.block1.conv1.bias_correction, other.block1.conv1.bias_correction
    # The same exact integer sums; their quotients are rounded in another order, in float64, then to float32.
    torch.testing.assert_close(first, whole, rtol=2e-7, atol=0)
    assert not torch.equal(model.block2.conv2.bias_correction, other.block2.conv2.bias_correction)


def test_a_correction_is_replaced_and_belongs_to_emulate_mode():
    model, x = network(), images(24)
    with running(model, "baseline"):
        baseline = model(x)
    correct_bias_(model)
    once = model.block1.conv2.bias_correction.clone()
    correct_bias_(model)
    assert torch.equal(model.block1.conv2.bias_correction, once)
    with running(model, "baseline"):
        assert torch.equal(model(x), baseline)
    assert not any("correction" in key for key in model.state_dict())


def test_it_brings_the_network_closer_to_eight_bit():
    model, x = network(NBSMT(threads=4), [images(256)]), images(64, seed=5)
    with torch.no_grad():
        before = model(x)
        correct_bias_(model)
        after = model(x)
        with running(model, "baseline"):
            exact = model(x)
    assert float((after - exact).square().mean()) < 0.6 * float((before - exact).square().mean())


def test_layers_with_one_thread_stay_uncorrected():
    model = small_net()
    rc.calibrate_(model, [images(24)])
    rc.emulate_(model, HARSH, {"block1.conv2": NBSMT(threads=1)})
    correct_bias_(model)
    assert model.block1.conv2.bias_correction is None
    assert model.block2.conv1.bias_correction is not None


@pytest.mark.parametrize("error", [KeyboardInterrupt, RecoupError])
def test_an_interrupt_leaves_everything_as_it_was(error):
    model = network()
    correct_bias_(model)
    model.train()
    before = {name: layer.bias_correction for name, layer in nbsmt_layers(model, "test").items()}

    def batches():
        yield images(4)
        raise error

    with pytest.raises(error):
        correct_bias_(model, batches())
    for name, layer in nbsmt_layers(model, "test").items():
        assert layer.bias_correction is before[name]
        assert not layer._forward_hooks
    assert all(module.training for module in model.modules())


def test_bad_requests_are_refused():
    with pytest.raises(RecoupError, match="correct_bias_: the model has no NB-SMT layer"):
        correct_bias_(small_net(), [images(2)])
    with pytest.raises(RecoupError, match="there was no batch"):
        correct_bias_(network(), [])
    model = network()
    del model.__dict__["_recoup_images"]
    with pytest.raises(RecoupError, match="holds no calibration images"):
        correct_bias_(model)


def test_rows_count_alike_by_an_independent_sum():
    """Two batches: sum of loss over a position's mean square, over the sum of one over it; positions of zeros have no
    say, and one huge token, whose loss is as huge, hardly any."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 6))
    x = torch.randn(20, 16).relu()
    x[0] *= 50
    x[1] = 0
    rc.calibrate_(model, [x], {"0": True})
    rc.emulate_(model, NBSMT(4, "A", "zero"))
    correct_bias_(model, [x[:7], x[7:]], weigh="rows")
    (layer,) = nbsmt_layers(model, "test").values()
    found = layer.bias_correction
    layer.bias_correction = None
    with torch.no_grad():
        lossy = layer(x).double() - layer.bias.double()
        with running(model, "baseline"):
            exact = layer(x).double() - layer.bias.double()
    square = exact.square().mean(1)
    floors = [0.1 * part[part > 0].sort().values[(int((part > 0).sum()) - 1) // 2] for part in (square[:7], square[7:])]
    floor = torch.stack([floors[0]] * 7 + [floors[1]] * 13)
    weight = torch.where(square > 0, 1 / torch.maximum(square, floor), 0.0)[:, None]
    assert torch.allclose(found.double(), (weight * (exact - lossy)).sum(0) / weight.sum(), rtol=1e-3, atol=1e-5)
    correct_bias_(model, [x])
    assert layer.bias_correction.norm() > 1.5 * found.norm()
    with pytest.raises(RecoupError, match=r"weigh='row'\): weigh must be one of 'outputs', 'rows'"):
        correct_bias_(model, [x], weigh="row")
