"""What others bring: repairs that edit weights, subclasses, edited weights elsewhere, extra state, checkpoints."""

import copy
import pickle
import warnings
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

import recoup as rc
from recoup.network import ledger
from recoup.network.applied import applied
from recoup.network.emulated import emulated_layers
from recoup.network.entries import entries
from tests.fresh import Fresh
from tests.networks import images, small_net
from tests.test_ledger import BATCHES, HARSH, SETTINGS, STEPS, equal, extras, network, state, take
from tests.tiers import slow_but


@dataclass(frozen=True)
class Coarse:
    """A stranger's hardware."""

    bits: int = 4


class Mine(nn.Linear):
    """A subclass of the user's, which the stranger's one layer stands in for as well."""


class CoarseLinear(rc.wings.Emulated, Mine):
    def forward(self, input):  # noqa: A002
        step = 2.0**-self.config.bits
        weight = torch.trunc(self.weight / step) * step if self.mode == "emulate" else self.weight
        return nn.functional.linear(input, weight, self.bias)


def halve(model, batches):
    """Edits biases of the hardware's layers, a float layer's weight, and a batch norm's statistics."""
    for layer in emulated_layers(model).values():
        if layer.bias is not None:
            layer.bias.data.mul_(0.5)
    model.stem.weight.data.mul_(1.25)
    model.block2.bn2.running_mean.add_(0.125)


def fail(model, batches):
    halve(model, batches)
    raise KeyboardInterrupt


HALVE = rc.wings.Repair("half bias", "bias", "Biases are halved.", "halving", halve, short="halve")
FAIL = rc.wings.Repair("broken", "statistics", "It fails.", "failing", fail)


@pytest.fixture(scope="module", autouse=True)
def _registered():
    layers = {nn.Linear: CoarseLinear, Mine: CoarseLinear}
    rc.wings.register(
        rc.wings.Card(
            config=Coarse, layers=layers, repairs=(HALVE, FAIL), default=("half bias",), plan=("half bias",),
            plan_without_norms=("half bias",),
        )
    )  # fmt: skip
    yield
    rc.wings.forget(Coarse)


def strange():
    return rc.emulate_(small_net(), HARSH, {"classifier": Coarse(), "stem": None})


def test_a_repair_that_edits_weights_is_recorded_seen_and_undone():
    before, model = state(strange()), rc.repair_(strange(), BATCHES)
    told = rc.describe(model).to_dict()
    assert told["classifier"]["repairs"] == ["bias (half bias)"]
    assert told["stem"]["repairs"] == ["bias (half bias)"]
    assert told["block1.conv1"]["repairs"] == ["gain (correct_gain_, 13 images)"]
    assert torch.equal(model.classifier.bias, 0.5 * before["classifier.bias"])
    assert torch.equal(model.stem.weight, 1.25 * before["stem.weight"])
    once = state(model)
    assert equal(state(rc.repair_(model, BATCHES)), once)  # afresh, not on top
    rc.evaluate(model, [(images(4), torch.zeros(4, dtype=torch.long))])  # the gain is not stale for an edit in order
    assert equal(state(rc.undo_(copy.deepcopy(model))), before)
    assert equal(state(rc.restore_(pickle.loads(pickle.dumps(model)))), state(small_net()))
    bare = rc.undo_(model, "bias")
    assert equal(state(bare), before)
    assert extras(bare)  # the gain of the earlier stage stays


def test_a_repair_that_fails_leaves_everything():
    model = rc.repair_(strange(), BATCHES)
    before, kept, said = state(model), extras(model), str(rc.describe(model))
    for do in (lambda: applied(model, FAIL, BATCHES), lambda: rc.repair_(model, BATCHES, "broken")):
        with pytest.raises(KeyboardInterrupt):
            do()
        assert equal(state(model), before)
        assert equal(extras(model), kept)
        assert str(rc.describe(model)) == said


def test_a_repair_is_refused_under_what_a_later_stage_wrote():
    model = rc.repair_(strange(), BATCHES)
    before = state(model)
    with pytest.raises(rc.RecoupError, match="half bias: batch norm statistics were repaired"):
        applied(model, HALVE, BATCHES)
    rc.undo_(model, "statistics")
    early = rc.wings.Repair("early", "gain", "It comes too late.", "early", halve)
    with pytest.raises(rc.RecoupError, match="early: half bias edited the network"):
        applied(model, early, BATCHES)
    assert equal(state(applied(model, HALVE, BATCHES) or rc.repair_(model, BATCHES)), before)


def test_weights_that_were_trained_after_such_a_repair_stay_and_it_is_said():
    model = rc.repair_(strange(), BATCHES)
    with torch.no_grad():
        model.classifier.bias.add_(1)
    now = state(model)
    other = copy.deepcopy(model)
    with pytest.warns(rc.RecoupWarning, match=r"so the statistics of .* and what repairs did to the weights of"):
        rc.restore_(model)
    assert equal(state(model), now)
    rc.restore_(other, statistics="undo")
    assert torch.equal(other.classifier.bias, now["classifier.bias"])
    assert torch.equal(other.stem.weight, small_net().stem.weight)


def test_saved_it_is_the_float_checkpoint_and_loads_as_it_was(tmp_path):
    model = rc.repair_(strange(), BATCHES).eval()
    rc.save(model, tmp_path / "chip.safetensors")
    plain = rc.models.load_weights_(small_net(seed=3), tmp_path / "chip.safetensors")
    assert equal(state(plain), state(small_net()))
    loaded = rc.load(tmp_path / "chip.safetensors", small_net(seed=5)).eval()
    assert torch.equal(loaded(images(4)), model(images(4)))
    assert str(rc.describe(loaded)) == str(rc.describe(model))
    assert equal(state(rc.restore_(loaded)), state(small_net()))


def test_every_layer_gets_its_own_class_back(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), Mine(4, 4), nn.Linear(4, 2))
    rc.emulate_(model, Coarse())
    assert [type(layer) for layer in model] == [CoarseLinear] * 3
    rc.save(model, tmp_path / "chip")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        assert [type(layer) for layer in rc.restore_(other)] == [nn.Linear, Mine, nn.Linear]
        assert all("float_class" not in vars(layer) for layer in other)
    loaded = rc.load(tmp_path / "chip", model)
    assert [type(layer) for layer in rc.restore_(loaded)] == [nn.Linear, Mine, nn.Linear]


STALE = r"statistics fitted for other hardware or weights in 1 layers: block1.conv1; run rc\.repair_"


def test_statistics_are_stale_when_any_layer_that_was_there_changed():
    batch = [(images(4), torch.zeros(4, dtype=torch.long))]
    model = rc.recalibrate_(network("lba"), BATCHES)
    rc.evaluate(model, batch)
    with torch.no_grad():
        model.block1.conv1.weight.mul_(1.5)
    for verb in (lambda: rc.evaluate(model, batch), lambda: rc.lba.profile(model, batch, outputs=4)):
        with pytest.warns(rc.RecoupWarning, match=STALE):
            verb()
    assert "stale: fitted for other hardware or weights" in str(rc.describe(model))
    with pytest.warns(rc.RecoupWarning, match="changed since they were repaired"):
        rc.restore_(model)
    for change in ({"config": HARSH.replace(chunk=2)}, {"gain": torch.ones(12)}, {"shift": 1}):
        other = rc.recalibrate_(network("lba"), BATCHES)
        for name, value in change.items():
            setattr(other.block1.conv1, name, value)
        with pytest.warns(rc.RecoupWarning, match=STALE):
            rc.evaluate(other, batch)
    assert rc.describe(rc.recalibrate_(network("lba"), BATCHES).block1).lines  # a sub-module alone: nothing is stale


def test_a_stale_network_is_stale_after_loading(tmp_path):
    model = rc.recalibrate_(network("lba"), BATCHES)
    rc.save(model, tmp_path / "fresh")
    rc.save(rc.load(tmp_path / "fresh", small_net(seed=2)), tmp_path / "again")  # no warning
    with torch.no_grad():
        model.block1.conv1.weight.mul_(1.5)
    with pytest.warns(rc.RecoupWarning, match="save: " + STALE):
        rc.save(model, tmp_path / "stale")
    loaded = rc.load(tmp_path / "stale", small_net(seed=2))
    with pytest.warns(rc.RecoupWarning, match="save: " + STALE):
        rc.save(loaded, tmp_path / "again")


def test_a_checkpoint_of_some_weights_is_noticed_as_it_is_loaded():
    model = rc.recalibrate_(network("lba"), BATCHES)
    part = {"block1.conv1.weight": torch.randn(12, 8, 3, 3)}
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.warns(rc.RecoupWarning, match="load_state_dict: " + STALE):
            other.load_state_dict(part, strict=False)
    rc.repair_(model, BATCHES)
    model.load_state_dict(model.state_dict())  # the same: no warning
    model.load_state_dict(rc.repair_(network("lba"), BATCHES).state_dict())  # another's gains, with its weights
    rc.evaluate(model, [(images(4), torch.zeros(4, dtype=torch.long))])
    with pytest.warns(rc.RecoupWarning):
        rc.restore_(model)
    assert not any(module._load_state_dict_post_hooks for module in model.modules())


def test_training_under_repaired_statistics_is_said_once_when_it_ends():
    model = rc.repair_(network("lba"), BATCHES).train()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eval()
    for layer in emulated_layers(model).values():
        layer.weight.data.mul_(1.01)
    with pytest.warns(rc.RecoupWarning, match=r"train\(False\): statistics of 4 batch norms .* other weights") as told:
        model.eval()
    assert len(told) == 1
    trained = rc.repair_(network("lba"), BATCHES).train()
    trained(images(8))  # the norms move on: what they hold is training's
    for layer in emulated_layers(trained).values():
        layer.weight.data.mul_(1.01)
    trained.eval()
    rc.evaluate(trained, [(images(4), torch.zeros(4, dtype=torch.long))])
    assert "written over since" in str(rc.describe(trained))


class Keeps(nn.Linear):
    """Keeps plain values beside its tensors, as modules of others do."""

    extra: object = None

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


@pytest.mark.parametrize("extra", [{"amax": [1.5, 2], "name": "x"}, None, 3, torch.arange(3), "text"], ids=str)
def test_extra_state_is_saved_and_loaded(tmp_path, extra):
    def made():
        return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Keeps(4, 2))

    model = rc.emulate_(made(), HARSH, {"2": None})
    model[2].extra = extra
    rc.save(model, tmp_path / "chip")
    loaded = rc.load(tmp_path / "chip", made())
    assert torch.equal(loaded[2].extra, extra) if isinstance(extra, torch.Tensor) else loaded[2].extra == extra
    x = torch.rand(3, 4)
    assert torch.equal(loaded(x), model(x))


def test_extra_state_that_only_code_could_bring_back_is_refused(tmp_path):
    model = nn.Sequential(Keeps(4, 2))
    model[0].extra = (1, 2)
    with pytest.raises(rc.RecoupError, match=r"save: 0\._extra_state: get_extra_state of a module gives a tuple"):
        rc.save(model, tmp_path / "chip")
    assert list(tmp_path.iterdir()) == []


def test_a_plan_that_fails_leaves_a_fresh_network_as_it_was():
    """Its first step has edited weights that no step before it had."""

    def halve(model, _):
        with torch.no_grad():
            model[0].weight.mul_(0.5)
            model[2].bias.mul_(0.5)

    def broken(*_):
        raise RuntimeError("no luck")

    def again(repair, name, stage, apply):
        return replace(repair, name=name, short=name, stage=stage, apply=apply)

    model = rc.emulate_(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), HARSH, {"0": None})
    before = state(model)
    steps = again(HALVE, "half", "gain", halve), again(HALVE, "broken", "bias", broken)

    def plan():
        with ledger.whole(model):
            for step in steps:
                applied(model, step, [torch.rand(3, 4)])

    combined = rc.wings.Repair.combined("both", "half, then broken", "both", steps)
    for do in (plan, lambda: applied(model, combined, [torch.rand(3, 4)])):
        with pytest.raises(RuntimeError, match="no luck"):
            do()
        assert equal(state(model), before)
        assert not any(entries(module) for module in model.modules())


def test_a_structure_step_that_fails_leaves_the_repairs():
    def broken(*_):
        raise RuntimeError("no luck")

    model = rc.recalibrate_(network("mix"), BATCHES)
    before = state(model)
    step = replace(HALVE, name="broken", short="broken", stage="structure", apply=broken)
    with pytest.raises(RuntimeError, match="no luck"), pytest.warns(rc.RecoupWarning, match="broken: undid statistics"):
        applied(model, step, BATCHES)
    assert equal(state(model), before)


ALL = {
    **STEPS,
    "exponents": lambda model: rc.lba.choose_exponents_(model, BATCHES),
    "stranger": lambda model: applied(model, HALVE, BATCHES) or model,
    "undo gain": lambda model: rc.undo_(model, "gain"),
}


@pytest.mark.parametrize("kind", slow_but(["mix"], ["strange", "mix"]))
@given(steps=st.lists(st.sampled_from(sorted(ALL)), max_size=7))
@example(steps=["average", "chunks", "stranger"])
@example(steps=["repair", "undo", "stranger"])
@SETTINGS
def test_any_sequence_then_restore_is_identity(kind, steps):
    def fresh():
        return strange() if kind == "strange" else network("mix")

    before = state(fresh())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.test_ledger.STEPS", ALL)
        model = rc.restore_(take(fresh(), steps))
    assert equal(state(model), before)
    assert not emulated_layers(model)
    assert str(rc.describe(model)).startswith("a float network")


FITS = ["gain", "layer gain", "paired", "average", "stranger", "repair"]


@given(structure=st.sampled_from([[], ["exponents"], ["chunks", "exponents"]]), steps=st.lists(st.sampled_from(FITS)))
@SETTINGS
def test_repair_afterwards_is_repair_alone(structure, steps):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.test_ledger.STEPS", ALL)
        alone = rc.repair_(take(strange(), structure), BATCHES)
        after = rc.repair_(take(strange(), [*structure, *steps[:4]]), BATCHES)
    assert equal(state(after), state(alone))
    assert equal(extras(after), extras(alone))


@pytest.mark.slow
def test_in_another_process_under_another_name(tmp_path):
    model = network("mix")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rc.RecoupWarning)
        rc.repair_(rc.lba.choose_exponents_(model, BATCHES), BATCHES).eval()
    rc.save(model, tmp_path / "chip")
    torch.save(model(images(4)).detach(), tmp_path / "expected.pt")
    done = Fresh(load_again, str(tmp_path)).wait()
    assert done.returncode == 0, done.stderr


def load_again(folder):
    """In a process that knows nothing of the one that saved."""
    warnings.simplefilter("ignore")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        model = rc.load(f"{folder}/chip", nn.Sequential(small_net(seed=5))).eval()
        assert torch.equal(model(images(4)), torch.load(f"{folder}/expected.pt", weights_only=True))
        assert "exponents (choose_exponents_, 13 images)" in str(rc.describe(model))
