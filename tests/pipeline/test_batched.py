"""Many runs at once: each as its own simulator, whatever the others are; one that diverges; going on; refusals."""

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from recoup.errors import RecoupError
from recoup.pipeline import Batched, Mitigation, Run, Simulator, norms
from recoup.pipeline.mitigation import NAMES
from tests.pipeline.networks import by_child, multilayer, weights

# A batched product sums in another order: some units in the last place a step, on numbers of about 1, which 30 stable
# steps do not multiply by more than a few hundred. 1e-12 is four thousand of float64's units.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}
S = 5


def schedule(k):
    return 0.05 / (1 + k / 9)


def warm(k):
    return min(0.02, 0.001 * k)


def runs_of(hows, delays=(8, 6, 4, 2, 0), **options):
    return [Run(delays, how, 0.03, **options) for how in hows]


OPTIONS = [
    Mitigation(compensation=0.5),
    Mitigation(compensation=1.0, stash=True),
    Mitigation(prediction="weight", horizon=2.0),
    Mitigation(prediction="spectrain", horizon=0.5, compensation=0.3),
    Mitigation(shrink=0.9),
    Mitigation(annealing=12),
    Mitigation(compensation=1.0, prediction="velocity", horizon=0.5, shrink=0.97, annealing=9),
]
CASES = {
    **{name: runs_of([name] * 3, weight_decay=1e-2) for name in NAMES},
    "every name": runs_of(NAMES),
    "joined names": runs_of(["coasting+stash", "past+sc", "lwpv+stash", "coasting", "past"]),
    "every option": runs_of(OPTIONS),
    "delays": [Run(d, "sc", 0.03) for d in ([0] * S, [8, 6, 4, 2, 0], [4, 3, 2, 1, 0], [0, 5, 1, 0, 9], [3] * S)],
    "delays with spectrain": [Run(d, "spectrain", 0.02) for d in ([0] * S, [8, 6, 4, 2, 0])],
    "rates": [Run([2] * S, "lwpv", lr) for lr in (0.01, schedule, warm, 0.0)],
    "one schedule": [Run([2] * S, "lwpv+sc", schedule)] * 2,
    "numbers": [Run([3] * S, "lwpw+sc", 0.02, m, wd) for m, wd in ((0.9, 0.0), (0.5, 0.1), (0.0, 0.01), (1.0, 0.0))],
    "no momentum": [Run([3] * S, how, 0.02, 0.0, 0.01) for how in ("sc", "lwpv", "none")],
    "all at once": [
        Run([8, 6, 4, 2, 0], "stash", schedule, 0.9, 1e-2),
        Run([0, 5, 1, 0, 7], "spectrain", 0.02, 0.8),
        Run([0] * S, "none", 0.05, 0.0, 0.1),
        Run([3] * S, OPTIONS[-1], schedule, 0.7, 1e-3),
        Run([4, 3, 2, 1, 0], "lwpw", 0.01),
    ],
    "one run": [Run([8, 6, 4, 2, 0], "lwpv+sc", schedule, 0.9, 1e-2)],
}


def samples(R, count=30, shape=(1, 7), classes=3, seed=5):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randn(R, *shape, generator=generator, dtype=torch.float64)
        yield x, torch.randint(classes, (R, shape[0]), generator=generator)


def made(runs, make=lambda seed: multilayer(S, seed=seed), stages=None, loss=F.cross_entropy):
    """The batched runs, and a simulator for each with a network of its own."""
    nets = [make(seed) for seed in range(len(runs))]
    stages = stages or by_child(nets[0])
    alone = [
        Simulator(copy.deepcopy(net), stages, r.delays, r.lr, r.momentum, r.weight_decay, r.mitigation, loss)
        for net, r in zip(nets, runs, strict=True)
    ]
    return Batched(nets, stages, runs, loss), alone


def compare(batched, alone, data):
    for x, y in data:
        losses = batched.step(x, y)
        expected = [simulator.step(a, b) for simulator, a, b in zip(alone, x, y, strict=True)]
        torch.testing.assert_close(losses, torch.tensor(expected, dtype=losses.dtype), **CLOSE)
    for run, simulator in enumerate(alone):
        found = batched.weights(run)
        expected = {name: p.detach() for name, p in simulator.model.named_parameters() if p.requires_grad}
        assert set(found) == set(expected)
        for name, values in expected.items():
            torch.testing.assert_close(found[name], values, **CLOSE)


@pytest.mark.parametrize("name", list(CASES))
def test_every_run_is_as_its_own_simulator(name):
    compare(*made(CASES[name]), samples(len(CASES[name])))


def test_batches():
    compare(*made(CASES["all at once"]), samples(5, 20, (4, 7)))


def convolutional(seed):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(norms.StandardizedConv2d(4, 6, 2, groups=2), norms.FilterResponseNorm2d(6, 1e-2)),
        nn.Sequential(nn.Flatten(), nn.Linear(24, 3)),
    ).double()


def test_convolutions_and_norms():
    runs = [Run([4, 2, 0], how, 0.02, 0.9, 1e-3) for how in ("none", "stash", "lwpv+sc", "spectrain")]
    compare(*made(runs, convolutional), samples(4, 15, (1, 1, 8, 8)))


def test_stages_of_several_modules_and_another_loss():
    runs = [Run([3, 0], how, 0.02) for how in ("sc", "lwpw")]

    def loss(output, y):
        return F.nll_loss(F.log_softmax(output, 1), y) + output.square().mean()

    compare(*made(runs, stages=[["0", "3"], ["1", "2", "4"]], loss=loss), samples(2, 15))


def test_the_models_are_not_changed_and_get_the_weights_on_request():
    nets = [multilayer(S, seed=seed) for seed in range(2)]
    before = [weights(net) for net in nets]
    batched = Batched(nets, by_child(nets[0]), runs_of(["sc", "stash"]))
    for x, y in samples(2, 5):
        batched.step(x, y)
    for net, kept in zip(nets, before, strict=True):
        assert all(torch.equal(p, kept[name]) and p.grad is None for name, p in net.named_parameters())
    assert batched.load(1, nets[1]) is nets[1]
    assert all(torch.equal(p, batched.weights(1)[name]) for name, p in nets[1].named_parameters())
    assert not torch.equal(nets[1].get_parameter("0.0.weight"), before[1]["0.0.weight"])
    batched.weights(0)["0.0.weight"].zero_()
    assert batched.weights(0)["0.0.weight"].any()  # they are copies


def test_runs_do_not_touch_each_other():
    runs = CASES["all at once"]
    (one, _), (other, _) = made(runs), made(runs)
    for x, y in samples(5, 12):
        losses = one.step(x, y)
        x[2], y[2] = 7.0, 0  # other data for one run
        changed = other.step(x, y)
        assert (losses == changed).tolist() == [True, True, False, True, True]
    for run in (0, 1, 3, 4):
        assert all(torch.equal(w, other.weights(run)[name]) for name, w in one.weights(run).items())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["every name", "all at once"])
def test_a_run_that_diverges_keeps_its_weights_and_the_others_go_on(name, bad):
    runs = CASES[name]
    R, broken = len(runs), 1
    (whole, _), (hurt, _) = made(runs), made(runs)
    kept = {}
    for k, (x, y) in enumerate(samples(R, 20)):
        expected = whole.step(x, y)
        if k == 7:
            kept = hurt.weights(broken)
            x[broken] = bad
        losses = hurt.step(x, y)
        others = [run for run in range(R) if run != broken or k < 7]
        assert torch.equal(losses[others], expected[others])
        assert bool(torch.isnan(losses[broken])) == (k >= 7)
    assert hurt.diverged == {broken: 7}
    assert whole.diverged == {}
    for run in range(R):
        same = kept if run == broken else whole.weights(run)
        assert all(torch.equal(w, same[name]) for name, w in hurt.weights(run).items())


def test_all_runs_may_diverge():
    batched, _ = made(runs_of(["sc", "lwpv"]))
    for x, y in samples(2, 3):
        assert batched.step(x * math.nan, y).isnan().all()
    assert batched.diverged == {0: 0, 1: 0}
    assert all(w.isfinite().all() for run in (0, 1) for w in batched.weights(run).values())


@pytest.mark.parametrize("stop", [0, 3, 11])
@pytest.mark.parametrize("name", ["all at once", "every option", "lwpw", "one run"])
def test_goes_on_from_its_state_bit_for_bit(name, stop):
    runs = CASES[name]
    data = list(samples(len(runs), 20))
    if stop == 11:
        data[5][0][0] = math.nan  # one has diverged before
    (whole, _), (broken, _) = made(runs), made(runs)
    expected = [whole.step(x, y) for x, y in data]
    for x, y in data[:stop]:
        broken.step(x, y)
    file = io.BytesIO()
    torch.save(broken.state_dict(), file)
    resumed = Batched([multilayer(S, seed=99) for _ in runs], by_child(multilayer(S)), runs)
    for x, y in data[-2:]:
        resumed.step(x, y)  # what it did before must not matter
    file.seek(0)
    resumed.load_state_dict(torch.load(file))
    for k in range(stop, 20):
        torch.testing.assert_close(resumed.step(*data[k]), expected[k], rtol=0, atol=0, equal_nan=True)
    assert (resumed.steps, resumed.diverged) == (20, whole.diverged)
    for run in range(len(runs)):
        assert all(torch.equal(w, whole.weights(run)[name]) for name, w in resumed.weights(run).items())


def test_a_state_is_a_copy():
    batched, _ = made(CASES["all at once"])
    state = batched.state_dict()
    kept = copy.deepcopy(state)
    batched.load_state_dict(state)
    for x, y in samples(5, 3):
        batched.step(x, y)
    assert state["diverged"] == kept["diverged"]
    for name, block in state["blocks"].items():
        assert all(torch.equal(value, kept["blocks"][name][key]) for key, value in block.items())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (runs_of(["sc", "lwpv"]), "mitigations is"),
        (runs_of(["sc", "sc"], (3,) * S), "delays is"),
        (runs_of(["sc", "sc"], momentum=0.5), "momentum is"),
        (runs_of(["sc", "sc"], weight_decay=0.5), "weight_decay is"),
        (runs_of(["sc"]), "is of other runs"),
    ],
)
def test_the_state_of_other_runs_is_refused(other, message):
    mine, theirs = made(runs_of(["sc", "sc"]))[0], made(other)[0]
    before = mine.state_dict()
    with pytest.raises(RecoupError, match=message):
        mine.load_state_dict(theirs.state_dict())
    assert mine.steps == before["steps"]
    assert all(
        torch.equal(mine.weights(0)[n], block["w"][0].view_as(mine.weights(0)[n]))
        for n, block in before["blocks"].items()
    )


class Doubled(nn.Linear):
    """Its weights are computed anew in every pass."""

    def forward(self, input):  # noqa: A002
        return F.linear(input, self.weight * 2, self.bias)


class Twice(nn.Module):
    def forward(self, w):
        return w * 2


def parametrized(inputs, outputs):
    return parametrize.register_parametrization(nn.Linear(inputs, outputs), "weight", Twice())


@pytest.mark.parametrize("make", [Doubled, parametrized])
def test_derived_weights_are_refused_with_a_delay_and_no_stash_only(make):
    def step(*runs):
        nets = [nn.Sequential(nn.Linear(7, 7), make(7, 3)).double() for _ in runs]
        return Batched(nets, [["0"], ["1"]], runs).step(*next(samples(len(runs))))

    with pytest.raises(RecoupError, match=r"weights derived from its parameters|is parametrized"):
        step(Run([2, 1], "stash"), Run([2, 1]))
    assert step(Run([2, 1], "stash"), Run([0, 0])).isfinite().all()


def nets(*last):
    return [nn.Sequential(nn.Linear(7, 7), nn.Linear(7, n)).double() for n in last]


def test_a_loss_that_is_no_number_a_run_is_refused_and_changes_nothing():
    batched = Batched(nets(3, 3), [["0"], ["1"]], [Run([1, 0])] * 2, lambda output, _: output)
    before = batched.state_dict()
    with pytest.raises(RecoupError, match=r"the losses are \[2, 1, 3\]; they must be \[2\]"):
        batched.step(*next(samples(2)))
    assert batched.steps == 0
    assert all(torch.equal(block.w, before["blocks"][name]["w"]) for name, block in batched._blocks.items())


class Shifted(nn.Module):
    """A buffer and a frozen layer before what is trained."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.register_buffer("shift", torch.randn(7))
        self.frozen, self.body, self.head = nn.Linear(7, 7), nn.Linear(7, 7), nn.Linear(7, 3)
        self.frozen.requires_grad_(False)
        self.double()

    def forward(self, x):
        return self.head(torch.tanh(self.body(self.frozen(x + self.shift))))


def test_frozen_parameters_and_buffers_are_each_runs_own():
    runs = [Run([4, 2, 0], how, 0.02, 0.9, 1e-2) for how in ("sc", "lwpw", "stash")]
    compare(*made(runs, Shifted, [["frozen"], ["body"], ["head"]]), samples(3, 15))


class Skips(nn.Sequential):
    def forward(self, input):  # noqa: A002
        return self[1](input)


def test_parameters_without_a_gradient_only_decay():
    runs = [Run([2, 0], how, 0.02, 0.9, 0.1) for how in ("sc", "none")]
    compare(*made(runs, lambda _: Skips(*nets(3)[0]), [["0"], ["1"]]), samples(2, 10))


def test_models_that_differ_in_what_is_frozen_or_there_are_refused():
    frozen, longer = nets(3)[0], nets(3)[0].append(nn.Linear(1, 1))
    frozen[1].bias.requires_grad_(False)
    for second, message in (
        (frozen, r"1\.bias is frozen in one of the first model and model 1"),
        (longer, r"do not have the same parameters: 2\.bias, 2\.weight"),
    ):
        with pytest.raises(RecoupError, match=message):
            Batched([nets(3)[0], second], [["0"], ["1"]], [Run([1, 0])] * 2)
    with pytest.raises(RecoupError, match="no parameters that require a gradient"):
        Batched([nets(3)[0].requires_grad_(False)], [["0"], ["1"]], [Run([1, 0])])


def test_what_moves_its_buffers_is_refused():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), norms.OnlineNorm2d(2))
    with pytest.raises(RecoupError, match="1 is an online norm in training: use group norm"):
        Batched([net], [["0"], ["1"]], [Run([1, 0])])
