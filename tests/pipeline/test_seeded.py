"""Random layers draw by seed, sample and stage: as with generators written out by hand, on any number of ranks."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from recoup.errors import RecoupError
from recoup.pipeline import Simulator, delays
from recoup.pipeline.plan import Plan
from recoup.pipeline.runtime import run_local
from recoup.pipeline.seeded import is_random, mix64, random_layers, stream
from tests.pipeline.networks import by_child, vectors


def dropping(seed=0):
    """Dropout in every stage, twice in one of them; without delays nothing else is special."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Sequential(nn.Linear(7, 7), nn.Dropout(0.5)),
        nn.Sequential(nn.Linear(7, 7), nn.Dropout(0.3), nn.Tanh(), nn.Dropout(0.3)),
        nn.Sequential(nn.Linear(7, 7), nn.Tanh()),
        nn.Sequential(nn.AlphaDropout(0.2), nn.Linear(7, 3)),
    ).double()


def test_the_mixing_is_splitmix():
    """Against the published first outputs of splitmix64 from seed 0: the n-th is mix64(0, n steps of the constant)."""
    golden = 0x9E3779B97F4A7C15
    wanted = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [mix64(n, 0) for n in range(3)] == wanted
    assert mix64(1, 5) == mix64(0, golden + 5)
    assert (
        len({stream(seed, sample, stage) for seed in range(3) for sample in range(20) for stage in range(20)}) == 1200
    )


def test_masks_are_those_of_a_generator_a_stage():
    net = dropping()
    masks: dict[str, list] = {}
    hooks = [
        module.register_forward_hook(lambda _, __, out, name=name: masks.setdefault(name, []).append(out.detach() == 0))
        for name, module in net.named_modules()
        if type(module) is nn.Dropout
    ]
    simulator = Simulator(net, by_child(net), delays(4), 0.01, seed=3)
    torch.manual_seed(8)
    before = torch.get_rng_state()
    for k, (x, y) in enumerate(vectors(4)):
        masks.clear()
        simulator.step(x, y)
        for stage, layers in ((0, {"0.1": 0.5}), (1, {"1.1": 0.3, "1.3": 0.3})):
            with torch.random.fork_rng():
                torch.manual_seed(stream(3, k, stage))
                zero = torch.zeros(1, 7, dtype=torch.bool)
                for name, p in layers.items():
                    zero |= F.dropout(torch.ones(1, 7, dtype=torch.float64), p) == 0  # what was dropped stays so
                    assert torch.equal(masks[name][-1], zero)
    assert torch.equal(torch.get_rng_state(), before)
    for hook in hooks:
        hook.remove()
    assert all("forward" not in module.__dict__ for module in net.modules())


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_draw_what_the_simulator_draws(ranks):
    one, other, samples = dropping(), dropping(), vectors(15)
    how = {"stages": by_child(one), "delays": delays(4), "lr": 0.05, "mitigation": "lwpv+sc", "seed": 5}
    torch.manual_seed(ranks)  # of no account
    losses = run_local(Plan(one, **how), samples, ranks).losses
    simulator = Simulator(other, **how)
    assert losses == [simulator.step(x, y) for x, y in samples]
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def test_a_random_layer_that_no_stage_names_on_a_rank_of_its_own():
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(7, 7), nn.Dropout(0.5), nn.Linear(7, 3)).double()

    one, other, samples = build(), build(), vectors(10)
    how = {"stages": [["0"], ["2"]], "delays": delays(2), "lr": 0.05}
    losses = run_local(Plan(one, cut=[1, 2], **how), samples, 2).losses
    simulator = Simulator(other, **how)
    assert losses == [simulator.step(x, y) for x, y in samples]


def test_evaluation_draws_nothing_and_other_seeds_draw_others():
    losses = []
    for seed, training in ((0, True), (1, True), (0, False), (1, False)):
        net = dropping().train(training)
        simulator = Simulator(net, by_child(net), delays(4), 0.01, seed=seed)
        losses.append([simulator.step(x, y) for x, y in vectors(3)])
    assert losses[0] != losses[1]
    assert losses[2] == losses[3]


class Own(nn.Module):
    """Somebody's layer: it may draw."""

    def forward(self, x):
        return x + torch.rand_like(x)


def test_what_counts_as_random():
    assert [is_random(m) for m in (nn.Dropout(), nn.RReLU(), nn.LSTM(2, 2, 2, dropout=0.1), Own())] == [True] * 4
    assert [is_random(m) for m in (nn.Dropout(0.0), nn.Linear(2, 2), nn.LSTM(2, 2), nn.Sequential(Own()))] == [
        False
    ] * 4
    net = dropping()
    assert random_layers(net, by_child(net), 2) == {"0.1": 2, "1.1": 3, "1.3": 3, "3.0": 5}


def test_one_random_layer_in_two_stages_is_refused():
    drop = nn.Dropout()
    net = nn.Sequential(nn.Linear(7, 7), drop, nn.Linear(7, 3), drop)
    with pytest.raises(RecoupError, match=r"'1' \(stage 0\) and '3' \(stage 1\) are one random layer"):
        Simulator(net, [["0", "1"], ["2"]], [2, 0], 0.1)
