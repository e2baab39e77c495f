"""The ranks' states at any sample are enough to go on from, on any ranks, whatever the modules keep; and what a rank
refuses."""

import functools
import io

import pytest
import torch
from torch import nn

from recoup.errors import RecoupError
from recoup.pipeline import AdamW, Simulator, chain, delays
from recoup.pipeline.norms import OnlineNorm2d
from recoup.pipeline.plan import Plan
from recoup.pipeline.runtime import run_local, ticks
from recoup.pipeline.transport import LocalTransport
from tests.pipeline.networks import images, rates

COUNT, RANKS = 14, 3
STAGES = [["0"], ["1"], ["2"], ["3"]]


def network(seed=0, dropout=0.3):
    """Statistics that move in the forward, others that move in the backward, frozen ones, and dropout."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3), OnlineNorm2d(4, 0.9, 0.9), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(dropout)),
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4).eval(), nn.ReLU()),
        nn.Sequential(nn.Flatten(), nn.Linear(4, 3)),
    )


def samples():
    return images(COUNT, shape=(2, 1, 7, 7))


def plan(model, **changes):
    return Plan(
        **{"model": model, "stages": STAGES, "delays": delays(4), "lr": rates, "mitigation": "lwpw+sc", **changes}
    )


def workers(model, ranks=RANKS, **changes):
    links, made = LocalTransport.chain(ranks), plan(model, **changes)
    return [made.worker(rank, ranks, links[rank], samples(), torch.device("cpu")) for rank in range(ranks)]


def trained(running):
    """To the end."""
    for t in range(ticks(COUNT - running[0].begun, len(running))):
        for worker in running:
            worker.tick(t, COUNT)
    for worker in running:
        worker.finish()


def states(ranks=RANKS, **changes):
    """Sample -> the states of all ranks, as their bytes; and what the run ends with."""
    model, found = network(), {}
    running = workers(model, ranks, **changes)

    def keep(rank, k):
        if k % running[rank].core.update_size == 0:
            torch.save(running[rank].state(), found.setdefault(k, {}).setdefault(rank, io.BytesIO()))

    for rank, worker in enumerate(running):
        worker.updated = functools.partial(keep, rank)
    torch.manual_seed(9)
    trained(running)
    return found, running[-1].losses, everything(model)


def everything(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_statistics_are_those_of_the_simulator(ranks):
    model, other = network(dropout=0.0), network(dropout=0.0)
    losses = run_local(plan(model), samples(), ranks).losses
    simulator = Simulator(other, STAGES, delays(4), rates, mitigation="lwpw+sc")
    assert losses == [simulator.step(x, y) for x, y in samples()]
    assert same(everything(model), everything(other))


@pytest.mark.parametrize(
    ("changes", "ranks"),
    [
        ({}, 3),
        ({"mitigation": "lwpv+stash"}, 1),
        ({"update_size": 2, "optimizer": AdamW(), "mitigation": "coasting"}, 4),
    ],
)
def test_a_run_goes_on_from_any_sample_over_any_ranks(changes, ranks):
    """With dropout, statistics of both passes, frozen parameters; weights and losses to the bit."""
    found, losses, expected = states(ranks, **changes)
    whole = network()
    torch.manual_seed(9)
    assert losses == run_local(plan(whole, **changes), samples(), 2).losses
    assert same(everything(whole), expected)
    for k in (1, 2, 6, 7, COUNT - 1, COUNT):
        if k not in found:
            continue
        assert sorted(found[k]) == list(range(ranks))
        for others in (1, 2, 3, 4):
            fresh = network(seed=3)
            resumed = workers(fresh, others, **changes)
            torch.manual_seed(1)
            for worker in resumed:
                for file in found[k].values():
                    file.seek(0)
                kept = (torch.load(found[k][rank], weights_only=True) for rank in range(ranks))
                worker.load([worker.needed(state) for state in kept])
                assert worker.begun == k
            trained(resumed)
            assert resumed[-1].losses == losses
            assert same(everything(fresh), expected)


class Both(nn.Module):
    """A buffer that both passes move."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        x = x * 1
        x.register_hook(self.move)
        return x

    def move(self, gradient):
        self.seen += 1
        return gradient


def test_a_buffer_that_both_passes_move_is_refused():
    model = network()
    model.get_submodule("1").append(Both())
    running = workers(model, mitigation="stash")
    for worker in running:
        worker.updated = lambda _: None
    with pytest.raises(RecoupError, match=r"1\.4\.seen is moved in the forward and in the backward pass"):
        trained(running)


class PreNorm(nn.Module):
    """Whose parameters' order within a stage differs with the cut; with one buffer in two modules, and one unset."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(6) for _ in range(4))
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        mask = torch.full((6,), 0.5)
        for layer in (self.layers[0], self.layers[3]):
            layer.register_buffer("mask", mask)
        self.layers[2].register_buffer("unset", torch.tensor(torch.nan))

    def forward(self, x):
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = torch.tanh(layer(norm(x)))
        return x


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_traced_network_goes_on_over_any_ranks(ranks):
    def made(seed, ranks):
        torch.manual_seed(seed)
        model = PreNorm()
        cut = chain(model).stages
        data = [
            (torch.randn(1, 6, generator=torch.Generator().manual_seed(k)), torch.tensor([k % 6])) for k in range(COUNT)
        ]
        planned = plan(model, stages=cut, delays=delays(len(cut)), mitigation="sc", loss=noisy)
        links = LocalTransport.chain(ranks)
        return model, [planned.worker(r, ranks, links[r], data, torch.device("cpu")) for r in range(ranks)]

    def noisy(out, y):
        return nn.functional.cross_entropy(out + 0.1 * torch.rand(6), y)

    found = {}
    model, running = made(0, ranks)
    for rank, worker in enumerate(running):
        worker.updated = lambda k, rank=rank, of=worker: found.setdefault(rank, of.state()) if k == 5 else None
    torch.manual_seed(9)
    trained(running)
    if ranks == 3:  # the loss's numbers are the last rank's
        found[0]["random"] = found[1]["random"] = {"cpu": torch.Generator().manual_seed(1).get_state()}
    for others in (1, 2, 3, 4):
        fresh, resumed = made(3, others)
        for worker in resumed:  # the last one's random state stays
            worker.load([worker.needed(found[rank]) for rank in range(ranks)])
        trained(resumed)
        assert resumed[-1].losses == running[-1].losses
        assert all(torch.equal(p, model.get_parameter(name)) for name, p in fresh.named_parameters())


def test_states_that_lack_something_are_refused():
    found, _, _ = states()
    kept = [torch.load(io.BytesIO(found[6][rank].getvalue()), weights_only=True) for rank in range(RANKS)]
    worker = workers(network(), 1)[0]
    before = everything(worker.part)
    with pytest.raises(RecoupError, match=r"the checkpoint has no parameter 3\.1\.weight"):
        worker.load(kept[:2])
    lost = kept[0]["buffers"].pop("0.1.mean")
    with pytest.raises(RecoupError, match=r"0\.1\.mean is a buffer of the checkpoint or of the model alone"):
        worker.load(kept)
    kept[0]["buffers"] |= {"0.1.mean": lost, "0.1.other": lost}
    with pytest.raises(RecoupError, match=r"0\.1\.other is a buffer of the checkpoint or of the model alone"):
        worker.load(kept)
    del kept[0]["buffers"]["0.1.other"]
    kept[0]["parameters"]["0.0.bias"]["velocity"] = torch.zeros(5)
    with pytest.raises(RecoupError, match=r"the checkpoint has no velocity \[4\] of 0\.0\.bias"):
        worker.load(kept)
    assert same(everything(worker.part), before)


class Late(nn.Module):
    """A buffer that is made in the third pass."""

    def __init__(self):
        super().__init__()
        self.register_buffer("late", None)
        self.count = 0

    def forward(self, x):
        self.count += 1
        if self.count == 3:
            self.late = torch.ones(())
        return x * 1


def test_a_buffer_that_appears_is_refused():
    model = network()
    model.get_submodule("1").append(Late())
    running = workers(model, mitigation="stash")
    for worker in running:
        worker.updated = lambda _: None
    with pytest.raises(RecoupError, match=r"the buffer 1\.4\.late appeared or went in a pass"):
        trained(running)


def test_what_the_neighbours_still_send():
    running = workers(network())
    for t in range(ticks(COUNT, RANKS)):
        for rank, worker in enumerate(running):
            forwards, backwards = max(0, min(COUNT, t - rank)), max(0, min(COUNT, t - 2 * (RANKS - 1) + rank))
            wanted = (COUNT - forwards if rank else 0, COUNT - backwards if rank < RANKS - 1 else 0)
            assert worker.expected(COUNT) == wanted
        for worker in running:
            worker.tick(t, COUNT)
    assert [worker.expected(COUNT) for worker in running] == [(0, 0)] * RANKS


class Breaks(nn.Module):
    """Breaks forward, or backward, passes from the third on."""

    def __init__(self, backward):
        super().__init__()
        self.count, self.backward = 0, backward

    def forward(self, x):
        self.count += 1
        if self.count >= 3 and self.backward:
            x = x * 1
            x.register_hook(lambda g: g * torch.inf)
            return x
        return x * torch.nan if self.count >= 3 else x


@pytest.mark.parametrize(
    ("place", "backward", "ranks", "told"),
    [
        (3, False, 2, r"step 2 \(rank 1, the last stage\) is nan: the output of module 3\.2 \(stage 3\)"),
        (0, False, 2, r"what came from rank 0 is not finite, so the fault is before stage 2"),
        (0, False, 1, r"is nan: the output of module 0\.3 \(stage 0\) is not finite"),
        (2, True, 2, r"the gradient of step 2 \(rank 1\) is not finite, first in stage 2"),
    ],
)
def test_what_is_not_finite_is_named(place, backward, ranks, told):
    model = network()
    model.get_submodule(str(place)).append(Breaks(backward))
    delayed = plan(model, mitigation="stash")  # no check of saved weights, which would be the first pass
    with pytest.raises(RecoupError, match=told):
        run_local(delayed, samples(), ranks)
    assert all(value.isfinite().all() for value in model.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_a_part_that_gives_no_tensor():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(2), nn.LSTM(25, 3), nn.Linear(3, 3))
    made = plan(model, stages=[["0"], ["2"], ["3"]], delays=[4, 2, 0], mitigation="stash", cut=[3, 1])
    with pytest.raises(RecoupError, match="rank 0's part of the model gives a tuple"):
        run_local(made, samples(), 2)


def test_losses_that_are_none():
    with pytest.raises(RecoupError, match=r"the loss is torch.float32 \[2\]; it must be"):
        run_local(plan(network(), loss=lambda out, _: out.sum(1)), samples(), 2)


def test_a_state_is_not_changed_by_what_follows():
    running, kept = workers(network()), {}

    def keep(rank, k):
        if k == 5:
            state = running[rank].state()
            file = io.BytesIO()
            torch.save(state, file)
            kept[rank] = state, file.getvalue()

    for rank, worker in enumerate(running):
        worker.updated = functools.partial(keep, rank)
    trained(running)
    for state, content in kept.values():
        file = io.BytesIO()
        torch.save(state, file)
        assert file.getvalue() == content
