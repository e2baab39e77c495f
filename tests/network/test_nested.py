"""Encoders of torch that drop what a mask hides run on hardware as they do in float."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import recoup as rc

X = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
HIDDEN = torch.arange(5) >= torch.tensor([3, 5, 1])[:, None]
BATCH = {"src": X, "src_key_padding_mask": HIDDEN}

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


def encoder(**options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, nn.LayerNorm(16)).eval()


def shared(net):
    rc.calibrate_(net, [BATCH], layers={"re:.*linear.*": True})
    return rc.emulate_(net, None, layers={"re:.*linear.*": rc.NBSMT(threads=2)})


HARDWARE = {
    "nbsmt": shared,
    "lba": lambda net: rc.emulate_(net, None, layers={"re:.*linear.*": rc.LBA.m7e4()}),
    "one layer": lambda net: rc.emulate_(net, None, layers={"layers.1.linear2": rc.LBA.m7e4()}),
    "a layer unseen": lambda net: rc.emulate_(net.layers[1], rc.LBA.m7e4(), layers={"re:self_attn.*": None}) and net,
    "tensor core": lambda net: rc.emulate_(net, None, layers={"re:.*linear.*": rc.TensorCore.hopper_fp8()}),
    "lightnorm": lambda net: rc.emulate_(net, rc.LightNorm()),
}


def hooks(net):
    return [module for module in net.modules() if module._forward_hooks or module._forward_pre_hooks]


def by_hand(net):
    """Zeros in hidden places before and after every layer, which sees the mask."""
    net.use_nested_tensor, y = False, X
    for layer in net.layers:
        y = layer(
            y.masked_fill(HIDDEN[..., None], 0.0),
            src_key_padding_mask=torch.zeros(3, 5).masked_fill(HIDDEN, -torch.inf),
        )
    return net.norm(y.masked_fill(HIDDEN[..., None], 0.0))


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("hardware", HARDWARE)
def test_padded_sequences_run_as_with_zeros_in_hidden_places(hardware, around):
    net, plain, bare = HARDWARE[hardware](encoder()), HARDWARE[hardware](encoder()), encoder()
    partly = hardware in ("one layer", "a layer unseen")  # the other one runs on the fused path, which rounds otherwise
    same = (lambda a, b: torch.allclose(a, b, atol=1e-5)) if partly else torch.equal
    others = copy.deepcopy(net), pickle.loads(pickle.dumps(net))
    with around():
        expected = by_hand(plain)
        for other in (net, *others):
            assert same(other(**BATCH), expected)
        assert torch.allclose(by_hand(encoder()), bare(**BATCH), atol=1e-5)  # in float: the same places, fused
        rc.restore_(net)
        assert torch.equal(net(**BATCH), bare(**BATCH))
    assert not hooks(net)


@pytest.mark.parametrize("hardware", ["lba", "lightnorm"])
def test_it_serves_sequences_of_one_length_and_training(hardware):
    net = HARDWARE[hardware](encoder(norm_first=False))
    twin = copy.deepcopy(net)
    twin.use_nested_tensor = False
    none = torch.zeros_like(HIDDEN)
    with torch.no_grad():
        assert torch.equal(net(X, src_key_padding_mask=none), twin(X, src_key_padding_mask=none))
    assert torch.equal(net.train()(**BATCH), twin.train()(**BATCH))


class ByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = encoder()

    def forward(self, **_):
        return by_hand(self.net)


def test_calibration_and_costs_of_a_float_encoder_take_padded_batches():
    net, other = encoder(), ByHand()
    for one in (net, other):
        rc.calibrate_(one, [BATCH], layers={"re:.*linear.*": True})
    for left, right in zip(net.layers, other.net.layers, strict=True):
        assert left.linear1.activation_scale is not None
        assert left.linear1.activation_scale == right.linear1.activation_scale
        assert left.linear2.activation_scale == right.linear2.activation_scale
    assert [row.M for row in rc.nbsmt.cycles(net, BATCH).layers] == [15] * 4
    assert not hooks(net)


def test_a_conversion_that_is_refused_leaves_no_hook():
    net = encoder().half()
    with pytest.raises(rc.RecoupError, match="float32"):
        rc.emulate_(net, rc.LBA.m7e4())
    assert not hooks(net)


def test_threads_have_masks_of_their_own_and_a_call_that_failed_leaves_none():
    net, other = shared(encoder()), HIDDEN.flip(0)
    with torch.no_grad():
        expected = [net(X, src_key_padding_mask=mask) for mask in (HIDDEN, other)]
        meet = threading.Barrier(2)
        hook = net.layers[0].linear1.register_forward_pre_hook(lambda *_: (meet.wait(30), None)[1])

        def run(mask):
            with torch.no_grad():
                return net(X, src_key_padding_mask=mask)

        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(run, (HIDDEN, other)))
        hook.remove()
        assert all(map(torch.equal, found, expected))
        hook = net.layers[1].linear1.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(HIDDEN)
        hook.remove()
        whole = net.layers[1](X)
        assert not whole.is_nested
        assert torch.equal(run(other), expected[1])


@pytest.mark.parametrize("names", [["linear1"], ["linear2"], ["norm1"], ["linear1", "norm2", "linear2"]])
def test_layers_that_are_converted_and_restored_one_by_one(names):
    """What each needs of the encoder comes and goes with it, wherever it was seen from."""
    net, twin, bare = encoder(), encoder(), encoder()
    for name in names:
        layer, config = net.layers[0].get_submodule(name), rc.LightNorm() if "norm" in name else rc.LBA.m7e4()
        rc.emulate_(layer, config)
        rc.emulate_(twin, None, layers={f"layers.0.{name}": config})
    with torch.no_grad():
        found = net(**BATCH)
        assert torch.allclose(found, twin(**BATCH), atol=1e-5)  # fused attention rounds otherwise
        assert not torch.equal(found, bare(**BATCH))
        assert not found[HIDDEN].any()
        for one in (net, twin, copy.deepcopy(net), pickle.loads(pickle.dumps(twin))):
            for name in names:
                assert one(**BATCH).shape == X.shape
                rc.restore_(one.layers[0].get_submodule(name))
            assert not hooks(one)
            assert torch.equal(one(**BATCH), bare(**BATCH))


def test_a_call_within_a_call_has_a_mask_of_its_own():
    net, other = shared(encoder()), HIDDEN.flip(0)
    with torch.no_grad():
        expected = [net(X, src_key_padding_mask=mask) for mask in (HIDDEN, other)]
        found = []

        def again(*_):
            hook.remove()
            found.append(net(X, src_key_padding_mask=other))

        hook = net.layers[0].linear1.register_forward_pre_hook(again)
        found.insert(0, net(**BATCH))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("kept", [True, False])
def test_a_layer_is_copied_without_its_encoder(kept):
    net = rc.emulate_(encoder(), None, layers={"re:.*linear.*": rc.LBA.m7e4()})
    net.layers[0].register_forward_hook(lambda *_: None)  # which no pickle takes: it is not the layer's
    layer = net.layers[0].linear1
    given = net if kept else None
    del net
    other = copy.deepcopy(copy.deepcopy(layer))
    if given is None:
        other = pickle.loads(pickle.dumps(layer))
    assert torch.equal(other(X), layer(X))
    assert not rc.restore_(other)._forward_pre_hooks
    if given is not None:
        assert torch.equal(given(**BATCH), copy.deepcopy(given)(**BATCH))


def test_a_layer_that_was_taken_out_leaves_no_hooks_behind():
    net = encoder()
    layer = net.layers[0]
    rc.emulate_(net, None, layers={"layers.0.linear1": rc.LBA.m7e4()})
    taken, layer.linear1 = layer.linear1, nn.Linear(16, 32)
    rc.restore_(net)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert not layer._forward_hooks_with_kwargs
    rc.restore_(taken)


def test_a_layer_that_two_encoders_share_is_taken_in_both():
    net = encoder()
    net.layers[1].linear1 = net.layers[0].linear1
    with torch.no_grad():
        rc.emulate_(net, None, layers={"layers.0.linear1": rc.LBA.m7e4()})
        assert ((net(**BATCH) == net.norm.bias).all(-1) == HIDDEN).all()
    rc.restore_(net)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
