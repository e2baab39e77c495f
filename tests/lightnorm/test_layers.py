"""The drop-ins: torch's constructor, state_dict, modes and errors; conversion; joined batches; compilers."""

import copy
import io
import pickle
import re

import pytest
import torch
import torch.distributed as dist
from torch import nn

import recoup as rc
from recoup.errors import RecoupError, RecoupWarning
from recoup.formats import Float
from recoup.lightnorm import LightNorm, LightNorm1d, LightNorm2d, LightNorm3d, layout, passes, synchronize_
from recoup.network.emulated import running
from recoup.network.norms import is_batch_norm
from tests.fresh import Fresh
from tests.networks import batches_of, images, small_net

RANGE = LightNorm.range()
LAYERS = [
    (LightNorm1d, nn.BatchNorm1d, (40, 6)),
    (LightNorm1d, nn.BatchNorm1d, (4, 6, 30)),
    (LightNorm2d, nn.BatchNorm2d, (3, 6, 5, 7)),
    (LightNorm3d, nn.BatchNorm3d, (2, 6, 3, 4, 5)),
]


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 + 1


@pytest.mark.parametrize(("layer", "batch_norm", "shape"), LAYERS)
def test_layers_are_batch_norms(layer, batch_norm, shape):
    plain, unit = batch_norm(6), layer(6)
    assert unit.float_class is batch_norm
    assert is_batch_norm(unit)
    assert list(unit.state_dict()) == list(plain.state_dict())
    x = drawn(*shape)
    plain.train()(x)
    unit.load_state_dict(plain.state_dict())
    plain.eval()
    exact = layer(6, config=RANGE).eval()
    exact.load_state_dict(plain.state_dict())
    torch.testing.assert_close(exact(x), plain(x), rtol=1e-5, atol=1e-6)
    merged = layout.flattened(x, unit.config)
    expected = passes.forward(merged, unit.weight, unit.bias, unit.config, unit.eps)[0]
    assert torch.equal(unit.train()(x), layout.unflattened(expected, x.shape))
    plain.load_state_dict(unit.state_dict())


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_running_statistics_follow_mean_and_scale(momentum):
    unit = LightNorm2d(6, momentum=momentum, config=RANGE)
    mean, var = torch.zeros(6), torch.ones(6)
    for step in range(3):
        x = drawn(4, 6, 5, 5, seed=step)
        unit(x)
        _, _, mu, s, _, _ = passes.forward(layout.flattened(x, RANGE), unit.weight, unit.bias, RANGE, unit.eps)
        factor = 1 / (step + 1) if momentum is None else momentum
        mean = ((1 - factor) * mean.double() + factor * mu).float()
        var = ((1 - factor) * var.double() + factor * (s - unit.eps) ** 2).float()
    assert torch.equal(unit.running_mean, mean)
    assert torch.equal(unit.running_var, var)
    assert unit.num_batches_tracked == 3


def test_modes_of_tracking_and_affine():
    x = drawn(4, 6, 5, 5)
    free = LightNorm2d(6, affine=False, track_running_stats=False)
    assert free.weight is None
    assert torch.equal(free(x), free.eval()(x))  # batch statistics in both modes, as torch
    assert torch.equal(free(x), LightNorm2d(6)(x))
    frozen = LightNorm2d(6).eval()
    before = frozen.running_mean.clone()
    frozen(x)
    assert torch.equal(frozen.running_mean, before)


def test_memory_formats_and_strides():
    x, unit = drawn(4, 6, 5, 7), LightNorm2d(6)
    y = unit(x)
    last = unit(x.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, y)
    wide = drawn(4, 12, 5, 14)[:, ::2, :, ::2]
    assert torch.equal(unit(wide), unit(wide.contiguous()))
    few, joined = drawn(30, 6, 2, 2), LightNorm2d(6)
    expected = passes.forward(layout.flattened(few, joined.config), *_ones(), joined.config, 1e-5)[0]
    assert torch.equal(joined(few), layout.unflattened(expected, few.shape))


def _ones():
    return torch.ones(6), torch.zeros(6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_computed_in_float32(dtype):
    x, unit = drawn(4, 6, 5, 5).to(dtype), LightNorm2d(6)
    y = unit(x)
    assert y.dtype == dtype
    assert torch.equal(y, unit(x.float()).to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model = nn.Sequential(nn.Conv2d(3, 6, 3), LightNorm2d(6))
        model(drawn(2, 3, 8, 8)).sum().backward()
    assert model[0].weight.grad is not None


def test_gradients_are_the_backward_passes():
    unit, x = LightNorm2d(6), drawn(4, 6, 5, 5).requires_grad_()
    grad = drawn(4, 6, 5, 5, seed=1) * 0.01
    unit(x).backward(grad)
    merged = layout.flattened(x, unit.config)
    _, xhat, _, _, r, indices = passes.forward(merged, unit.weight, unit.bias, unit.config, unit.eps)
    dx, dgamma, dbeta = passes.backward(layout.flattened(grad, unit.config), xhat, r, unit.weight, indices, unit.config)
    assert torch.equal(x.grad, layout.unflattened(dx, x.shape))
    assert torch.equal(unit.weight.grad, dgamma)
    assert torch.equal(unit.bias.grad, dbeta)


@pytest.mark.parametrize("training", [True, False])
def test_derivatives_against_central_differences(training):
    unit = LightNorm2d(3, config=LightNorm.range(chunks=4), dtype=torch.float64).train(training)
    leaves = [drawn(2, 3, 3, 4, dtype=torch.float64), drawn(3, dtype=torch.float64), drawn(3, dtype=torch.float64)]

    def run(x, weight, bias):
        return torch.func.functional_call(unit, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(run, [leaf.requires_grad_() for leaf in leaves])


@pytest.mark.parametrize("training", [True, False])
def test_operators(training):
    x, (gamma, beta) = drawn(2, 6, 5, 5).requires_grad_(), (v.requires_grad_() for v in _ones())
    code = LightNorm().code
    if training:
        torch.library.opcheck(torch.ops.recoup.lightnorm_train.default, (x, gamma, beta, code, 1e-5, "layer"))
    else:
        arguments = (x, gamma, beta, torch.zeros(6), torch.ones(6), code, 1e-5, "layer")
        torch.library.opcheck(torch.ops.recoup.lightnorm_infer.default, arguments)
    unit = LightNorm2d(6).train(training)
    compiled = torch.compile(copy.deepcopy(unit), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), unit(x))


def test_copies_pickles_and_dtypes():
    unit = LightNorm2d(6, config=LightNorm(block=8))
    x = drawn(4, 6, 5, 5)
    for other in (copy.deepcopy(unit), pickle.loads(pickle.dumps(unit))):
        assert torch.equal(other(x), LightNorm2d(6, config=LightNorm(block=8))(x))
    buffer = io.BytesIO()
    torch.save(unit.state_dict(), buffer)
    buffer.seek(0)
    unit.load_state_dict(torch.load(buffer, weights_only=True))
    assert unit.double()(x.double()).dtype == torch.float64
    assert "LightNorm(block=8)" in repr(unit)


def test_conversion_both_ways():
    model, batches = small_net(), batches_of(2, 16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        exact = model(batches[0])
        rc.emulate_(model, RANGE)
        assert isinstance(model.block1.bn1, LightNorm2d)
        torch.testing.assert_close(model(batches[0]), exact)
        rc.recalibrate_(model, batches)  # paired: moments on both sides, nothing to correct
        torch.testing.assert_close(model(batches[0]), exact, rtol=1e-4, atol=1e-5)
        with running(model, "float"):
            torch.testing.assert_close(model(batches[0]), exact, rtol=1e-4, atol=1e-5)
        rc.recalibrate_(model, batches, "average")
        assert not torch.equal(model.block1.bn1.running_var, before["block1.bn1.running_var"])
    rc.restore_(model)
    assert type(model.block1.bn1) is nn.BatchNorm2d
    assert list(model.state_dict()) == list(before)
    model.load_state_dict(before)
    with torch.no_grad():
        assert torch.equal(model(batches[0]), exact)


def test_paired_recalibration_repairs_what_rounding_did():
    model, batches = small_net(), batches_of(4, 32)
    with torch.no_grad():
        exact = [model(x) for x in batches]
        rc.emulate_(model, LightNorm(Float.lba(4, 2, 10), Float.parse("fp10_163")))

        def error():
            return sum(float((model(x) - y).square().sum()) for x, y in zip(batches, exact, strict=True))

        broken = error()
        rc.recalibrate_(model, batches)
        assert error() < 0.8 * broken


def test_a_network_trains_with_it():
    torch.manual_seed(0)
    model, x = small_net(), images(64)
    labels = x.mean((1, 2, 3)).gt(0).long()
    rc.emulate_(model, LightNorm())
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_bad_input():
    unit = LightNorm2d(6)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        unit(torch.zeros(1, 6, 1, 1))
    with pytest.raises(RecoupError, match=r"6 elements; 8 chunks need at least 16.*chunks=3"):
        unit(drawn(1, 6, 2, 3))
    with pytest.raises(ValueError, match="expected 4D input"):
        unit(drawn(3, 6))
    with pytest.raises(RecoupError, match=r"takes floating point; got torch\.int64"):
        unit(torch.ones(4, 6, 5, 5, dtype=torch.int64))
    for given, own in ((torch.float32, torch.float64), (torch.float64, torch.float32), (torch.float16, torch.float64)):
        told = rf"layer '' \(6, .*input is {given} \[4, 6, 5, 5\], the parameters are {own}: a batch norm takes float64"
        with pytest.raises(RecoupError, match=told):
            LightNorm2d(6, dtype=own)(drawn(4, 6, 5, 5).to(given))
    with pytest.raises(
        RecoupError, match=r"layer '' \(6, eps=-1.*BatchNorm2d\(eps=-1\): eps must be a number from 0 to"
    ):
        LightNorm2d(6, eps=-1)
    with pytest.raises(RecoupError, match="config must be a LightNorm"):
        LightNorm2d(6, config=rc.LBA())  # type: ignore[arg-type]
    for options, told in (
        ({"block": 0}, "block must be an integer from 1"),
        ({"chunks": 0}, "chunks must be"),
        ({"scale": "sigma"}, "scale must be one of"),
        ({"forward": rc.Int(8)}, "forward must be a Float or None"),
        ({"backward": Float.ieee(5, 10, rounding="stochastic")}, "round to nearest or toward zero"),
        ({"statistics": Float.parse("float64")}, "mantissa of at most 23"),
    ):
        with pytest.raises(RecoupError, match=told):
            LightNorm(**options)


def test_what_is_not_finite_is_kept_or_named():
    x = drawn(4, 6, 5, 5)
    x[1, 2, 3, 3] = torch.inf
    y = LightNorm2d(6)(x)
    assert y[:, 2].isnan().all()
    clean = [c for c in range(6) if c != 2]
    assert y[:, clean].isfinite().all()
    strict = rc.emulate_(nn.Sequential(nn.BatchNorm2d(6)), LightNorm(nonfinite="error"))
    with pytest.raises(RecoupError, match=r"layer '0' .*, given \[4, 6, 5, 5\]: the input holds 1 NaN or infinite"):
        strict(x)


def test_saturated_statistics_are_counted_and_told_once():
    unit, x = LightNorm2d(6), drawn(4, 6, 5, 5)
    x[:, 1] = 2.0  # a constant channel: 1/s = 1/eps = 1e5
    with pytest.warns(RecoupWarning, match="of 1 channels left the statistics' format"):
        y = unit(x)
    assert torch.equal(y[:, 1], torch.zeros(4, 5, 5))
    unit(x)
    assert unit.saturated == 2


def test_configs_travel():
    for config in (LightNorm(), RANGE, LightNorm.fp10(chunks=4, nonfinite="error"), LightNorm(statistics=None)):
        assert LightNorm.from_dict(config.to_dict()) == config
        assert eval(repr(config), {"LightNorm": LightNorm, "Float": Float}) == config  # noqa: S307
        assert LightNorm.from_code(config.code) == config
        assert hash(config) == hash(config.replace())
    with pytest.raises(RecoupError, match="unknown field 'bits'"):
        LightNorm.from_dict({"bits": 3})
    blocks = LightNorm().forward_blocks
    assert blocks is not None
    assert (blocks.exponent, blocks.significand, blocks.block) == (5, 5, 4)
    blocks = LightNorm().backward_blocks
    assert blocks is not None
    assert (blocks.exponent, blocks.significand) == (6, 4)
    sums = LightNorm().gradient_statistics
    assert sums is not None
    assert (sums.mantissa, sums.min_exponent, sums.max_exponent) == (11, -30, 31)


def joined(folder: str, rank: int) -> None:
    """One of two processes that share a batch."""
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    given = torch.load(f"{folder}/given.pt", weights_only=True)
    found = []
    for config in (LightNorm(), LightNorm(axis="place", block=8), LightNorm.range(chunks=2)):
        unit = nn.Sequential(LightNorm2d(6, config=config))
        unit[0].load_state_dict(given["state"])
        synchronize_(unit)
        x = given["x"].chunk(2)[rank].clone().requires_grad_()
        y = unit(x)
        y.backward(given["grad"].chunk(2)[rank])
        found.append([y.detach(), x.grad, unit[0].running_mean, unit[0].running_var])
    torch.save(found, f"{folder}/found{rank}.pt")
    strict = nn.Sequential(LightNorm2d(6, config=LightNorm(nonfinite="error")))
    synchronize_(strict)
    told = "of another process of the group" if rank else re.escape("given [4, 6, 3, 3]: the input holds")
    with pytest.raises(RecoupError, match=told):  # neither process must wait for the other
        strict(x.detach() if rank else x.detach().log())
    odd = nn.Sequential(LightNorm2d(6, config=LightNorm(chunks=3)))
    synchronize_(odd)
    with pytest.raises(RecoupError, match="must be a multiple of 2"):
        odd(x)
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_equal_one_on_the_joined_batch(tmp_path):
    state = LightNorm2d(6).state_dict()
    state["weight"].copy_(drawn(6))
    x, grad = drawn(8, 6, 3, 3).requires_grad_(), drawn(8, 6, 3, 3, seed=1) * 0.01
    torch.save({"x": x.detach(), "grad": grad, "state": state}, tmp_path / "given.pt")
    for process in [Fresh(joined, str(tmp_path), rank) for rank in range(2)]:
        done = process.wait()
        assert done.returncode == 0, done.stderr[-3000:]
    files = [torch.load(tmp_path / f"found{rank}.pt", weights_only=True) for rank in range(2)]
    configs = LightNorm(), LightNorm(axis="place", block=8), LightNorm.range(chunks=2)
    for config, *found in zip(configs, *files, strict=True):
        unit, x.grad = LightNorm2d(6, config=config), None
        unit.load_state_dict(state)
        y = unit(x)
        y.backward(grad)
        assert torch.equal(torch.cat([f[0] for f in found]), y)
        assert torch.equal(torch.cat([f[1] for f in found]), x.grad)
        for rank in range(2):
            assert torch.equal(found[rank][2], unit.running_mean)
            assert torch.equal(found[rank][3], unit.running_var)


def test_synchronizing_needs_layers_and_processes():
    from recoup.lightnorm import synchronize_

    with pytest.raises(RecoupError, match="no LightNorm layer"):
        synchronize_(nn.Linear(2, 2))
    with pytest.raises(RecoupError, match=r"torch\.distributed is not initialized"):
        synchronize_(nn.Sequential(LightNorm2d(3)))
