"""The drop-in layers: kinds, padding, fine-tuning, compilation, autocast, memory formats, data-parallel training."""

import copy
import json
import warnings

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import recoup as rc
from recoup.nbsmt import NBSMTConv1d, NBSMTConv2d, NBSMTLinear
from recoup.network.emulated import emulated_layers, running
from tests.networks import images, small_net

FOUR = rc.NBSMT(threads=4)


def converted(layer: nn.Module, x: torch.Tensor, config=FOUR) -> nn.Module:
    rc.calibrate_(layer, [x], {"": True})
    return rc.emulate_(layer, config)


def network(config=FOUR):
    model = small_net()
    rc.calibrate_(model, [images(64)])
    return rc.emulate_(model, config)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(6, 5, 3, padding=1, bias=True), (2, 6, 7, 7)),
        (nn.Conv2d(6, 5, (3, 2), stride=(2, 1), dilation=(1, 2)), (2, 6, 9, 7)),
        (nn.Conv2d(6, 5, 4, padding="same"), (2, 6, 7, 7)),
        (nn.Conv2d(6, 5, 3, padding="valid"), (2, 6, 7, 7)),
        (nn.Conv2d(6, 5, 3, padding=1, padding_mode="reflect"), (2, 6, 7, 7)),
        (nn.Conv2d(6, 5, 3, padding=2, padding_mode="circular"), (2, 6, 7, 7)),
        (nn.Conv2d(6, 6, 3, groups=3), (2, 6, 7, 7)),
        (nn.Conv1d(6, 5, 3, padding=1), (2, 6, 11)),
        (nn.Conv1d(6, 5, 4, padding="same", stride=1, dilation=2), (2, 6, 11)),
        (nn.Linear(13, 5), (4, 13)),
        (nn.Linear(13, 5, bias=False), (2, 3, 4, 13)),
    ],
    ids=lambda v: repr(v) if isinstance(v, nn.Module) else "",
)
@pytest.mark.parametrize("zero", [0, 128])
def test_eight_bit_layers_compute_the_quantised_layer(layer, shape, zero):
    torch.manual_seed(0)
    layer, x = copy.deepcopy(layer), torch.rand(shape) - (0.4 if zero else 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch says that 'same' with an even kernel copies
        expected = copy.deepcopy(layer).double()
        converted(layer, x, rc.NBSMT(threads=1))
        assert layer.activation_zero == zero
        code = torch.round(x / torch.tensor(layer.activation_scale)).clamp(-zero, 255 - zero)
        weight = expected.weight.float()
        scale = 2 * weight.abs().flatten(1).amax(1) / 255
        scale = scale.view(-1, *[1] * (weight.dim() - 1))
        with torch.no_grad():
            expected.weight.copy_(torch.round(weight / scale).clamp(-128, 127).double() * scale.double())
            y = expected(code.double() * layer.activation_scale)
    # The layer rounds to float32 when it scales the exact sum and when it adds the bias; float64 does not.
    torch.testing.assert_close(layer(x).double(), y, rtol=1e-6, atol=1e-6)


def signed_network(config=FOUR):
    """Every second inner layer has negative inputs."""
    torch.manual_seed(0)
    layers = [part for _ in range(2) for part in (nn.Conv2d(6, 6, 3, padding=1), nn.GELU(), nn.Conv2d(6, 6, 1))]
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), *layers, nn.Flatten(), nn.Linear(216, 5)).eval()
    rc.calibrate_(model, [images(64)])
    return rc.emulate_(model, config)


def test_layers_of_both_kinds_in_one_network(tmp_path):
    """Their zeros travel: state dicts, deep copies, files; what has no zero is unsigned, as before there were any."""
    model, x = signed_network(), images(4)
    expected = model(x)
    assert [layer.activation_zero for layer in emulated_layers(model).values()] == [0, 128, 128, 128]
    assert ["signed activations" in repr(layer) for layer in emulated_layers(model).values()] == [False, *[True] * 3]
    other = signed_network(rc.NBSMT(2))
    for layer in emulated_layers(other).values():
        layer.activation_zero, layer.activation_scale = 0, 1.0
    state = model.state_dict()
    assert torch.equal(copy.deepcopy(model)(x), expected)
    rc.save(model, tmp_path / "chip")
    assert torch.equal(rc.load(tmp_path / "chip", signed_float())(x), expected)
    other.load_state_dict(state)
    assert [layer.activation_zero for layer in emulated_layers(other).values()] == [0, 128, 128, 128]
    del state._metadata["4"]["recoup"]["activation_zero"]
    other.load_state_dict(state)
    assert other[4].activation_zero == 0
    with pytest.raises(rc.RecoupError, match=r"layer '4' .*holds negative values .*activations=.auto"):
        other(x)
    state._metadata["4"]["recoup"]["activation_zero"] = 127
    with pytest.raises(RuntimeError, match=r"4\.activation_zero is 127; it is 0"):
        other.load_state_dict(state)
    rc.restore_(other)
    other[4].activation_zero = 64
    with pytest.raises(rc.RecoupError, match=r"layer '4' .*activation zero 64; it must be 0 or 128"):
        rc.emulate_(other, FOUR)


@pytest.mark.parametrize("zero", [128.0, torch.tensor(128), torch.tensor([128.0])])
def test_zeros_of_any_type_are_whole_numbers_inside(zero):
    """As a state_dict or a file of another hand brings them."""
    model, x = signed_network(), images(4)
    expected, state = model(x), model.state_dict()
    state._metadata["4"]["recoup"]["activation_zero"] = zero
    model.load_state_dict(state)
    assert torch.equal(model(x), expected)
    rc.restore_(model)
    model[4].activation_zero = zero
    rc.emulate_(model, FOUR)
    assert type(model[4].activation_zero) is int
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize(("zero", "said"), [(128.0, None), ("128", "'128'; it must be 0 or 128"), (64, "64; it must")])
def test_zeros_of_a_file_are_checked_though_the_layer_is_float(tmp_path, zero, said):
    model = rc.restore_(signed_network())
    rc.save(model, tmp_path / "chip")
    with safe_open(tmp_path / "chip", "pt") as file:
        header = json.loads(file.metadata()["recoup"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- no dict
    header["zeros"]["4"] = zero
    save_file(tensors, tmp_path / "chip", {"recoup": json.dumps(header)})
    if said is None:
        assert type(rc.load(tmp_path / "chip", signed_float())[4].activation_zero) is int
    else:
        with pytest.raises(rc.RecoupError, match=f"layer '4' has the activation zero {said}"):
            rc.load(tmp_path / "chip", signed_float())


def signed_float():
    torch.manual_seed(1)
    return rc.restore_(signed_network())


def test_files_without_signed_codes_are_of_the_first_format(tmp_path):
    """Older versions read them; a file with signed codes they refuse rather than clip."""
    for model, number in ((network(), 1), (signed_network(), 2)):
        rc.save(model, tmp_path / "chip")
        with safe_open(tmp_path / "chip", "pt") as file:
            header = json.loads(file.metadata()["recoup"])
        assert header["format"] == number
        assert ("zeros" in header) == (number == 2)


def means_of(model, x):
    """By layer, on the inputs that emulation gives it: mean outputs as corrected and at 8 bit, largest correction."""
    found, inputs = {}, {}
    layers = emulated_layers(model)
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.setdefault(name, args[0]))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        model(x)
        for hook in hooks:
            hook.remove()
        for name, layer in layers.items():
            both = []
            for mode in ("emulate", "baseline"):
                with running(layer, mode):
                    y = layer(inputs[name])
                both.append(y.mean((0, 2, 3)) if y.dim() == 4 else y.mean(0))
            found[name] = (*both, float(layer.bias_correction.abs().amax()))
    return found


def test_every_verb_takes_signed_layers():
    """Reordered, corrected, profiled, slowed down: emulation stays the sum that the order and the codes say."""
    model, data = signed_network(), [images(16)]
    before = {row.name: row for row in rc.nbsmt.profile(model, data)}
    rc.nbsmt.reorder_(model, data)
    after = {row.name: row for row in rc.nbsmt.profile(model, data)}
    changed = [name for name, row in after.items() if row.error != before[name].error]
    assert changed
    assert all(after[name].error < before[name].error for name in changed[:1])
    rc.correct_bias_(model, data)
    means = means_of(model, data[0])
    for own, exact, correction in means.values():
        torch.testing.assert_close(own, exact, rtol=0, atol=1e-5)  # each output is float32
        assert correction > 1e-4
    labelled = [(images(16), torch.arange(16) % 5)]
    assert isinstance(rc.nbsmt.plan_throttling(model, labelled, 10.0).threads, dict)
    rc.undo_(model)
    assert all(layer.bias_correction is None for layer in emulated_layers(model).values())


@pytest.mark.slow
def test_fine_tuning_goes_straight_through_signed_codes():
    model = signed_network(rc.NBSMT(2)).train()
    x, y = images(16), torch.randint(5, (16,), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), 0.2, momentum=0.9)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0]


def test_unbatched_inputs():
    x = torch.rand(6, 7, 7)
    layer = converted(nn.Conv2d(6, 5, 3), x[None])
    assert torch.equal(layer(x), layer(x[None])[0])
    x = torch.rand(6, 11)
    layer = converted(nn.Conv1d(6, 5, 3), x[None])
    assert torch.equal(layer(x), layer(x[None])[0])


@pytest.mark.parametrize("kind", [NBSMTConv1d, NBSMTConv2d])
def test_a_layer_of_ones_own_needs_calibration(kind):
    layer = kind(4, 6, 3, padding=1, config=FOUR)
    assert list(layer.state_dict()) == ["weight", "bias"]
    x = torch.rand(2, 4, *[9] * (1 if kind is NBSMTConv1d else 2))
    with pytest.raises(rc.RecoupError, match=r"activation scale.*calibrate_"):
        layer(x)
    rc.calibrate_(layer, [x], {"": True})
    assert layer(x).shape[:2] == (2, 6)
    linear = NBSMTLinear(4, 3)
    rc.calibrate_(linear, [torch.rand(5, 4)], {"": True})
    assert linear(torch.rand(5, 4)).shape == (5, 3)


def test_modes():
    model, x = network(), images(4)
    eight = copy.deepcopy(model)
    rc.restore_(eight)
    plain = eight(x)
    rc.emulate_(eight, rc.NBSMT(threads=1))
    with running(model, "baseline"):
        assert torch.equal(model(x), eight(x))
    with running(model, "float"):
        assert torch.equal(model(x), plain)
    assert all(layer.mode == "emulate" for layer in emulated_layers(model).values())


def test_memory_format_is_that_of_the_input():
    model = network()
    x = images(4)
    expected = model(x)
    seen = []
    model.block1.conv1.register_forward_hook(lambda _, __, y: seen.append(y.is_contiguous()))
    model(x)
    model(x.contiguous(memory_format=torch.channels_last))
    assert seen == [True, False]
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last)), expected)


def test_fine_tuning_under_nbsmt_lowers_the_loss():
    model = network().train()
    model.block1.dropout.p = model.block2.dropout.p = 0.0
    x, y = images(64), torch.randint(10, (64,), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.slow
def test_compiles_as_one_graph():
    model, x = network(), images(4)
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), expected)
    compiled(x).sum().backward()
    assert model.block1.conv1.weight.grad is not None


def test_autocast_leaves_the_emulation_in_float32():
    model, x = network(), images(4)
    layer = model.block1.conv2
    a = torch.rand(2, 12, 4, 4)
    expected = layer(a)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(a.bfloat16().float()), layer(a.bfloat16()))
        assert layer(a).dtype == torch.float32
        model(x)
    assert torch.equal(layer(a), expected)


def test_half_precision_models_are_refused_by_name():
    model = network().half()
    with pytest.raises(rc.RecoupError, match=r"'block1.conv1'.*float32"):
        model.block1.conv1(torch.rand(1, 8, 4, 4).half())


def test_distributed_data_parallel_trains(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(network().train())
        model(images(8)).sum().backward()
        assert model.module.block1.conv1.weight.grad is not None
        rc.recalibrate_(model, [images(16)])
    finally:
        dist.destroy_process_group()


def test_negative_inputs_name_the_layer_at_run_time():
    model = network()
    model.block1.relu = nn.Identity()
    with pytest.raises(rc.RecoupError, match=r"layer 'block1.conv2' \(12, 12, .*negative"):
        model(images(4))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_results_may_be_changed_in_place(bias, memory, training):
    """As a float layer's; the gradients are those of the network that changes nothing in place."""
    torch.manual_seed(0)
    x = torch.rand(2, 6, 7, 7).contiguous(memory_format=memory)
    layer = converted(nn.Conv2d(6, 6, 3, padding=1, bias=bias), x).train(training)
    found = []
    for inplace in (True, False):
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        y = torch.relu_(layer(leaf).add_(leaf)) if inplace else torch.relu(layer(leaf) + leaf)
        y.square().sum().backward()
        found.append([y, leaf.grad, *(p.grad for p in layer.parameters())])
    assert all(map(torch.equal, *found))
