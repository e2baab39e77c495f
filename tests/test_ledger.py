"""The ledger: any order of calls, and the network is what its last repairs say, or float again, bit for bit."""

import copy
import pickle
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import recoup as rc
from recoup.network.emulated import emulated_layers
from tests.networks import images, small_net
from tests.tiers import slow_but

HARSH = rc.LBA.biased(3, 4)
NBSMT = rc.NBSMT(threads=4, policy="A", rounding="zero")
BATCHES = [images(8), images(5)]  # a ragged last batch


def network(kind):
    model = rc.calibrate_(small_net(), BATCHES)
    if kind == "lba":
        return rc.emulate_(model, HARSH)
    if kind == "nbsmt":
        return rc.emulate_(model, NBSMT)
    return rc.emulate_(model, NBSMT, layers={"classifier": HARSH, "re:.*(bn|norm).*": rc.LightNorm()})


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def extras(model):
    return {
        f"{name}.{extra}": value for name, layer in emulated_layers(model).items()
        for extra, value in layer.extra_tensors().items()
    }  # fmt: skip


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


STEPS = {
    "gain": lambda model: rc.lba.correct_gain_(model, BATCHES),
    "layer gain": lambda model: rc.lba.correct_gain_(model, BATCHES, "layer"),
    "chunks": rc.lba.choose_chunks_,
    "bias": lambda model: rc.correct_bias_(model, BATCHES),
    "order": lambda model: rc.reorder_(model, BATCHES),
    "paired": lambda model: rc.recalibrate_(model, BATCHES),
    "average": lambda model: rc.recalibrate_(model, BATCHES, "average"),
    "ema": lambda model: rc.recalibrate_(model, BATCHES, "ema"),
    "undo": rc.undo_,
    "undo statistics": lambda model: rc.undo_(model, "statistics"),
    "undo structure": lambda model: rc.undo_(model, "structure"),
    "repair": lambda model: rc.repair_(model, BATCHES),
    "copy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


def take(model, steps):
    """The steps that are legal for the network, one after the other."""
    for step in steps:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rc.RecoupWarning)
            try:
                model = STEPS[step](model)
            except rc.RecoupError:
                continue
    return model


REPAIRS = ["gain", "layer gain", "bias", "paired", "average", "ema", "repair"]
SETTINGS = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("kind", slow_but(["mix"], ["lba", "nbsmt", "mix"]))
@given(steps=st.lists(st.sampled_from(sorted(STEPS)), max_size=6))
@SETTINGS
def test_any_sequence_then_restore_is_identity(kind, steps):
    before = state(network(kind))
    model = rc.restore_(take(network(kind), steps))
    assert equal(state(model), before)
    assert not emulated_layers(model)
    assert str(rc.describe(model)).startswith("a float network")


@pytest.mark.parametrize("kind", slow_but(["mix"], ["lba", "nbsmt", "mix"]))
@given(
    steps=st.lists(st.sampled_from(["gain", "layer gain", "bias", "paired", "average", "ema", "repair"]), max_size=4)
)
@SETTINGS
def test_repair_afterwards_is_repair_alone(kind, steps):
    alone, after = rc.repair_(network(kind), BATCHES), rc.repair_(take(network(kind), steps), BATCHES)
    assert equal(state(after), state(alone))
    assert equal(extras(after), extras(alone))


@pytest.mark.parametrize("method", ["paired", "average", "ema"])
def test_recalibrated_twice_is_once(method):
    once = rc.recalibrate_(network("lba"), BATCHES, method)
    twice = rc.recalibrate_(rc.recalibrate_(network("lba"), BATCHES, method), BATCHES, method)
    assert equal(state(twice), state(once))
    assert not equal(state(once), state(network("lba")))


def test_another_method_replaces_the_first():
    both = rc.recalibrate_(rc.recalibrate_(network("lba"), BATCHES, "average"), BATCHES)
    assert equal(state(both), state(rc.recalibrate_(network("lba"), BATCHES)))


def test_a_gain_on_repaired_statistics_is_refused_with_the_remedy():
    model = rc.recalibrate_(network("lba"), BATCHES)
    before = state(model)
    with pytest.raises(rc.RecoupError, match=r"correct_gain_: .*\(recalibrate_, 13 images\).*rc\.undo_.*rc\.repair_"):
        rc.lba.correct_gain_(model, BATCHES)
    assert equal(state(model), before)
    rc.lba.correct_gain_(rc.undo_(model, "statistics"), BATCHES)
    model = rc.recalibrate_(network("nbsmt"), BATCHES)
    with pytest.raises(rc.RecoupError, match="correct_bias_: batch norm statistics were repaired"):
        rc.correct_bias_(model, BATCHES)


def test_structure_takes_repairs_back_and_says_so():
    model = rc.repair_(network("lba"), BATCHES)
    said = r"choose_chunks_: undid gain \(\d+ layers\) and statistics \(\d+ norms\), fitted for other hardware"
    with pytest.warns(rc.RecoupWarning, match=said):
        rc.lba.choose_chunks_(model)
    assert extras(model) == {}
    assert equal(state(model), state(network("lba")))


def test_emulating_more_layers_takes_repairs_back():
    model = rc.emulate_(small_net(), None, layers={"classifier": HARSH})
    rc.repair_(model, BATCHES)
    with pytest.warns(rc.RecoupWarning, match="emulate_: undid gain"):
        rc.emulate_(model, None, layers={"block1.conv1": HARSH})


def test_edited_weights_and_configs_make_repairs_stale():
    model = rc.lba.correct_gain_(network("lba"), BATCHES)
    with torch.no_grad():
        model.classifier.weight.mul_(2)
    with pytest.warns(rc.RecoupWarning, match="evaluate: gain fitted for other weights in 1 layers: classifier"):
        rc.evaluate(model, [(images(4), torch.zeros(4, dtype=torch.long))])
    assert "stale: fitted for other weights" in str(rc.describe(model))
    other = rc.lba.correct_gain_(network("lba"), BATCHES)
    rc.lba.set_underflow_(other, on=False)  # a training schedule: repairs stay, and show as stale
    assert "stale: fitted for another config" in str(rc.describe(other))


def test_what_is_trained_with_a_gain_is_not_stale():
    model = rc.lba.correct_gain_(network("lba"), BATCHES).train()
    with torch.no_grad():
        model.classifier.weight.mul_(2)
    model.eval()
    rc.evaluate(model, [(images(4), torch.zeros(4, dtype=torch.long))])  # no warning
    assert "trained with" in str(rc.describe(model))


def test_restoring_after_training_leaves_all_statistics_and_says_so():
    model = rc.repair_(network("lba"), BATCHES)
    with torch.no_grad():
        next(iter(emulated_layers(model).values())).weight.add_(1)
    now = state(model)
    with pytest.warns(rc.RecoupWarning, match=r'restore_: weights or statistics changed.*statistics="undo"'):
        rc.restore_(model)
    assert equal(state(model), now)


def test_a_checkpoint_from_before_a_repair_takes_it_back():
    model = network("lba")
    first = state(model)
    twin = rc.recalibrate_(copy.deepcopy(model), BATCHES, "average")
    rc.recalibrate_(model, BATCHES)
    repaired = state(model)
    model.load_state_dict(first)
    assert "recalibrate_, 13 images), taken back since" in str(rc.describe(model))
    rc.lba.correct_gain_(copy.deepcopy(model), BATCHES)  # not refused: no repaired statistics are under it
    rc.recalibrate_(model, BATCHES, "average")  # no warning: nothing is left of the first
    assert equal(state(model), state(twin))
    rc.recalibrate_(model, BATCHES)
    model.load_state_dict(first)
    model.load_state_dict(repaired)
    assert "since" not in str(rc.describe(model))
    model.load_state_dict(first)
    other = copy.deepcopy(model)
    assert equal(state(rc.restore_(model)), first)  # no warning: what the repair wrote has not stayed
    rc.undo_(other, "statistics")
    next(m for m in other.modules() if isinstance(m, nn.BatchNorm2d)).running_mean.add_(0.01)
    assert "recalibrate_" not in str(rc.describe(other))
    rc.recalibrate_(rc.lba.correct_gain_(other, BATCHES), BATCHES)  # neither refused nor warned


def test_undo_puts_back_the_norms_that_still_hold_what_was_written():
    model = rc.repair_(network("lba"), BATCHES)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    norms[0].running_mean.add_(1)
    kept, float_state = norms[0].running_mean.clone(), small_net()
    rc.restore_(model, statistics="undo")
    originals = [m for m in float_state.modules() if isinstance(m, nn.BatchNorm2d)]
    assert torch.equal(norms[0].running_mean, kept)
    assert all(torch.equal(m.running_mean, o.running_mean) for m, o in zip(norms[1:], originals[1:], strict=True))
    with pytest.raises(rc.RecoupError, match="must be 'auto' or 'undo'"):
        rc.restore_(model, statistics="no")


def test_a_repair_that_fails_changes_nothing():
    model = rc.repair_(network("mix"), BATCHES)
    before, kept, said = state(model), extras(model), str(rc.describe(model))

    def broken():
        yield BATCHES[0]
        raise KeyboardInterrupt

    for verb in (rc.repair_, rc.recalibrate_):
        with pytest.raises(KeyboardInterrupt):
            verb(model, broken())
        assert equal(state(model), before)
        assert equal(extras(model), kept)
        assert str(rc.describe(model)) == said


def test_plans():
    def repaired(plan):
        return extras(rc.repair_(network("lba"), BATCHES, plan)).keys()

    assert repaired("none") == repaired("paired") == set()
    assert repaired("gain") == repaired(["gain", "paired"]) == repaired("gain+paired") == repaired("default") != set()
    with pytest.raises(rc.RecoupError, match="'bias' is no repair of this hardware; it has gain per layer, gain"):
        repaired("bias")
    with pytest.raises(rc.RecoupError, match="plan must be"):
        repaired(3)
    with pytest.raises(rc.RecoupError, match="emulate_ it first"):
        rc.repair_(small_net(), BATCHES)
    with pytest.raises(rc.RecoupError, match="stage must be one of"):
        rc.undo_(small_net(), "all")


def test_descriptions():
    model = rc.repair_(network("mix"), BATCHES)
    told = rc.describe(model).to_dict()
    assert told["classifier"]["hardware"] == repr(HARSH)
    assert told["classifier"]["repairs"] == ["gain (correct_gain_, 13 images)"]
    assert any("statistics (recalibrate_, 13 images)" in line["repairs"] for line in told.values())


def test_nothing_to_repair_is_said():
    model = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False))
    rc.emulate_(model, rc.LightNorm())
    with pytest.warns(rc.RecoupWarning, match="nothing to repair this network with"):
        rc.repair_(model, [torch.rand(2, 3, 4, 4)])


def test_means_weigh_by_values():
    """1,024 + 1 images are 1,025: the last one weighs as one, at the first norm up to rounding."""
    torch.manual_seed(0)
    whole = torch.randn(33, 3, 4, 4) + torch.arange(33.0).view(-1, 1, 1, 1)
    one, ragged = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    rc.recalibrate_(one, [whole], "average")
    rc.recalibrate_(ragged, [whole[:32], whole[32:]], "average")
    torch.testing.assert_close(ragged.running_mean, one.running_mean, rtol=1e-6, atol=0)  # float32 batch statistics
    torch.testing.assert_close(ragged.running_var, one.running_var, rtol=1e-5, atol=0)
