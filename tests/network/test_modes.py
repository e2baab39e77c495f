"""Passes that rely on hooks see a compiled model as they see the same model before it was compiled."""

import copy

import pytest
import torch
from torch import nn

import recoup as rc
from recoup import lba, nbsmt
from recoup.lightnorm.cost import traffic
from recoup.network.modes import compiled, evaluating
from tests.networks import images, small_net

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on importing its compiler


def fresh(config):
    torch._dynamo.reset()
    model = small_net()
    rc.calibrate_(model, [images(32)])
    return rc.emulate_(model, config)


def whole(model):
    return torch.compile(model, backend="eager")


def in_place(model):
    model.compile(backend="eager")
    return model


def a_block(model):
    model.block1 = torch.compile(model.block1, backend="eager")
    return model


def forward_alone(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


WAYS = [whole, in_place, a_block, forward_alone]


def told(rows):
    return [{**row.to_dict(), "name": row.name.replace("_orig_mod.", "")} for row in rows]


@pytest.mark.parametrize("way", [in_place])
@pytest.mark.parametrize(
    ("config", "verb"),
    [
        (rc.NBSMT(threads=4), lambda m: rc.correct_bias_(m, [images(8)])),
        (rc.NBSMT(threads=4), lambda m: nbsmt.reorder_(m, [images(8)])),
        (rc.NBSMT(threads=4), lambda m: rc.calibrate_(m, [images(8, seed=4)])),
        (rc.NBSMT(threads=4), lambda m: rc.recalibrate_(m, [images(8)])),
        (rc.LBA.biased(4, 4), lambda m: rc.lba.correct_gain_(m, [images(8)])),
        (rc.LBA.biased(4, 4), lambda m: rc.recalibrate_(m, [images(8)], "average")),
    ],
)
def test_a_compiled_model_is_repaired_as_an_uncompiled_one(way, config, verb):
    x = images(4, seed=2)
    with torch.no_grad():
        plain = fresh(config)
        before = plain(x)
        verb(plain)
        expected = plain(x)
        assert not torch.equal(expected, before)
        inner = fresh(config)
        other = way(inner)
        other(x)
        assert compiled(other)
        verb(other)
        assert torch.equal(copy.deepcopy(inner.state_dict())["stem.weight"], plain.state_dict()["stem.weight"])
        torch._dynamo.reset()
        with torch.compiler.set_stance("force_eager"):
            assert torch.equal(inner(x), expected)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_model_is_measured_as_an_uncompiled_one(way):
    for config, measures in [
        (
            rc.NBSMT(threads=4),
            [
                lambda m: nbsmt.profile(m, [images(8)]),
                lambda m: nbsmt.cycles(m, (3, 8, 8)).layers,
                lambda m: traffic(m, images(2), rc.LightNorm()).layers,
            ],
        ),
        (rc.LBA.biased(4, 4), [lambda m: lba.profile(m, [images(8)], outputs=64)]),
    ]:
        plain = fresh(config)
        expected = [told(measure(plain)) for measure in measures]
        assert all(expected)
        with torch.no_grad():
            other = way(fresh(config))
            other(images(4, seed=2))
        assert [told(measure(other)) for measure in measures] == expected


def test_a_compiled_model_runs_compiled_again_afterwards():
    seen = []

    def backend(graph, _):
        seen.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
    other = torch.compile(model, backend=backend)
    with torch.no_grad():
        with evaluating(other):
            other(torch.rand(2, 4))
        assert not seen
        other(torch.rand(2, 4))
        assert len(seen) == 1
        with pytest.raises(ValueError, match="stop"), evaluating(other):
            raise ValueError("stop")
        with evaluating(other, eager=False):
            other(torch.rand(2, 4))
    assert not compiled(nn.Linear(2, 2))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("first", [0, 1])
def test_two_threads_at_once_leave_modes_and_compiler_as_they_were(training, first):
    import torch._dynamo

    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).train(training)
    with torch.compiler.set_stance("default"):
        before = torch._dynamo.eval_frame._stance
        passes = [evaluating(net), evaluating(net)]
        for one in passes:
            one.__enter__()  # a thread's pass begins before the other's ends, whichever that is
        passes[first].__exit__(None, None, None)
        assert not any(module.training for module in net.modules())
        assert torch._dynamo.eval_frame._stance.stance == "force_eager"
        passes[1 - first].__exit__(None, None, None)
        assert all(module.training is training for module in net.modules())
        assert torch._dynamo.eval_frame._stance == before


def test_a_pass_within_a_pass_leaves_the_modes_of_the_one_around():
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    with evaluating(net):
        with evaluating(net, train=lambda module: isinstance(module, nn.Dropout)):
            assert [module.training for module in net.modules()] == [False, False, True]
        assert not any(module.training for module in net.modules())
    assert all(module.training for module in net.modules())
