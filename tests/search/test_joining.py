"""Fine-tuned networks join a front: their numbers are those of the network itself, their costs those of the policy."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import recoup as rc
from recoup.cli.main import app
from recoup.errors import RecoupError
from recoup.models import digits_net
from recoup.search import Shard, Space, front, join, refine, score, verify
from recoup.search.bench import laid_out
from recoup.search.fronts import Measured
from recoup.search.results import SearchResults
from recoup.study.machine import cpu_threads
from tests.networks import batches_of
from tests.search.cases import OPTIONS, labelled
from tests.search.test_running import recipe  # noqa: F401 -- a fixture

NARROW = [rc.LBA.biased(7, 4), rc.LBA.biased(4, 4)]
SPACE = Space({"re:block2.*": OPTIONS, "classifier": NARROW}, same=[["block2.conv1", "block2.conv2"]])


def fine_tuned(model, policy, batches, steps=2):
    """A copy after a few steps with the hardware in place, in float again."""
    tuned = copy.deepcopy(model)
    rc.calibrate_(tuned, batches)
    rc.emulate_(tuned, policy)
    tuned.train()
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(tuned.parameters(), lr=0.05)
    for x, y in batches[:steps]:
        nn.functional.cross_entropy(tuned(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    rc.restore_(tuned.eval())
    for module in tuned.modules():  # as weights on disk have none
        for name in ("activation_scale", "activation_zero"):
            module.__dict__.pop(name, None)
    return tuned


@pytest.fixture(scope="module")
def searched():
    model, batches = labelled()
    found = front(score(model, batches, SPACE, probes=2), ("bits", "cycles"), points=2)
    return model, batches, labelled(seed=5)[1], found, fine_tuned(model, found.points[0].policy, batches)


def numbers(point):
    found = point.measured
    return (found.damage, found.low, found.high, found.reached, found.lost, found.lost_low, found.lost_high)


def test_its_numbers_are_those_of_the_network_and_its_costs_those_of_the_policy(searched):
    model, batches, test, found, tuned = searched
    untuned = found.points[0]
    before = copy.deepcopy(tuned.state_dict())
    joined = verify(join(found, tuned, untuned.policy), model, test, seeds=1)
    (point,) = joined.tuned
    assert (point.kind, point.policy.name) == ("tuned", f"{untuned.policy.name}, tuned")
    assert point.costs == untuned.costs
    assert point.options == untuned.options
    assert dict(point.policy) == dict(untuned.policy)
    assert all(torch.equal(value, before[name]) for name, value in tuned.state_dict().items())
    direct, shown = copy.deepcopy(tuned), laid_out(model, test)
    with cpu_threads(1):
        rc.calibrate_(direct, laid_out(model, batches))
        rc.emulate_(direct, untuned.policy)
        kl = rc.evaluate(direct, shown, metric="kl", reference=model)
        top1 = rc.evaluate(direct, shown, metric="top1")
        floating = rc.evaluate(model, shown, metric="top1")
    assert point.measured is not None
    assert (point.measured.damage, point.measured.reached) == (kl.value, top1.value)
    assert point.measured.lost == pytest.approx(floating.value - top1.value)
    assert point.measured.low < point.measured.damage < point.measured.high
    alone = verify(found, model, test, seeds=1)
    assert [numbers(p) for p in joined.points[:-1]] == [numbers(p) for p in alone.points]
    assert numbers(point) != numbers(alone.points[0])


def test_it_is_measured_once_however_the_work_is_divided(searched, tmp_path):
    model, _, test, found, tuned = searched
    joined = join(join(found, tuned, found.points[0].policy), tuned, found.points[-1].policy)
    told = {"seeds": 2, "out": tmp_path}
    alone = verify(found, model, test, **told)
    whole = verify(joined, model, test, **told)
    assert (whole.made, whole.total - alone.total) == (4, 4)  # two points, two draws; the others are there
    again = verify(joined, model, test, **told)
    assert again.made == 0
    assert len(list((tmp_path / "records").iterdir())) == again.total
    other = fine_tuned(model, found.points[0].policy, labelled(seed=9)[1])  # other weights under the same policy
    assert verify(join(found, other, found.points[0].policy), model, test, **told).made == 2
    shards = tmp_path / "shards"
    with pytest.raises(RecoupError, match="are not made yet"):
        verify(joined, model, test, seeds=2, out=shards, shard=Shard(1, 2))
    verify(joined, model, test, seeds=2, out=shards, shard=Shard(0, 2))
    divided = verify(joined, model, test, **{**told, "out": shards})
    assert divided.made == 0
    assert [numbers(point) for point in divided.points] == [numbers(point) for point in whole.points]


@pytest.mark.slow
def test_workers_give_the_same_bits(searched):
    model, _, test, found, tuned = searched
    joined = join(join(found, tuned, found.points[0].policy), tuned, found.points[-1].policy)
    one, two = (verify(joined, model, test, seeds=1, workers=workers) for workers in (1, 2))
    assert [numbers(point) for point in two.points] == [numbers(point) for point in one.points]


@pytest.mark.parametrize(
    "chip",
    [
        {"block1.conv1": rc.NBSMT(2), "re:block2.conv.*": rc.NBSMT(2), "classifier": NARROW[1]},  # a layer outside
        {"re:block2.*": rc.NBSMT(2), "classifier": rc.LBA.biased(3, 3)},  # a config that no option is
        {"block2.conv1": rc.NBSMT(2), "re:block2.*": rc.NBSMT(1)},  # layers apart that decide together
    ],
)
def test_a_policy_outside_the_space_costs_what_it_costs_everywhere(searched, chip):
    model, _, test, found, tuned = searched
    joined = join(found, tuned, rc.Policy(chip, name="chip"))
    (point,) = joined.tuned
    priced = rc.cost(tuned, rc.Policy(chip), (3, 8, 8))
    assert point.costs["cycles"] == priced.cycles
    assert point.costs["bits"] == pytest.approx(priced.bits, rel=1e-12)
    assert point.options == ()
    emulated = rc.emulate_(rc.calibrate_(copy.deepcopy(tuned), batches_of(1, 8)), rc.Policy(chip))
    assert {name: config for name, config in point.policy.items() if config} == dict(rc.Policy.of(emulated))
    measured = verify(joined, model, test, seeds=1)
    assert measured.tuned[0].measured is not None


def test_equal_points_and_equal_draws_need_no_folder(searched):
    model, batches, test, found, tuned = searched
    policy = found.points[0].policy
    joined = join(join(found, tuned, policy), copy.deepcopy(tuned), policy)
    one, two = verify(joined, model, test, seeds=2).tuned
    assert numbers(one) == numbers(two)
    alike = verify(join(found, tuned, policy), model, test, seeds=2, calibration=lambda _: batches)
    assert len(set(alike.tuned[0].measured.values)) == 1


def test_what_becomes_of_the_network_afterwards_changes_nothing(searched):
    model, _, test, found, tuned = searched
    policy, net = found.points[0].policy, copy.deepcopy(tuned)
    joined = join(found, net, policy)
    net.load_state_dict(model.state_dict())
    both = verify(join(joined, net, policy), model, test, seeds=1)
    first, second = both.tuned
    assert numbers(first) == numbers(verify(join(found, tuned, policy), model, test, seeds=1).tuned[0])
    assert numbers(first) != numbers(second)


def test_scales_of_its_own_stay(searched):
    model, batches, test, found, tuned = searched
    policy, own = rc.Policy({"re:block2.*": rc.NBSMT(2)}), copy.deepcopy(tuned)
    assert len(set(verify(join(found, own, policy), model, test, seeds=2).tuned[0].measured.values)) == 2
    rc.calibrate_(own, batches)
    assert len(set(verify(join(found, own, policy), model, test, seeds=2).tuned[0].measured.values)) == 1


def test_a_point_that_was_not_measured_does_not_stand(searched):
    _, _, _, found, tuned = searched
    assert not join(found, tuned, found.points[0].policy).standing[-1]


def test_hardware_outside_the_space_is_told(searched):
    _, _, _, found, tuned = searched
    joined = join(found, tuned, rc.Policy({"block1.conv1": rc.NBSMT(2)}, name="chip"))
    assert joined.notes[-1] == "chip, tuned: hardware runs block1.conv1 too, outside the space."
    assert join(found, tuned, found.points[0].policy).notes == found.notes


def test_limits_concern_it_too(searched):
    _, _, _, found, tuned = searched
    limited = front(found.scores, "bits", limits={"bits": found.points[0].costs["bits"] / found.first["bits"] + 1e-9})
    wide = join(limited, tuned, {"classifier": NARROW[0]}).tuned[0]
    assert wide.costs["bits"] > limited.limits["bits"]
    assert not wide.allowed
    assert join(limited, tuned, found.points[0].policy).tuned[0].allowed


def as_measured(point, top1):
    about = {"damage": 0.1, "low": 0.0, "high": 0.2, "values": (0.1,), "count": 9, "quality": "top1", "reached": top1}
    return replace(point, measured=Measured(**about))


def test_it_is_judged_by_what_it_loses(searched):
    """Not by its distance from float; at equal cost within the budget the point that was not tuned is chosen."""
    _, _, _, found, tuned = searched
    cheapest = min(found.front, key=lambda point: point.costs["bits"])
    joined = join(found, tuned, cheapest.policy)

    def seen(untuned, fine_tuned):
        others = [as_measured(p, untuned if p.costs == cheapest.costs else 95.0) for p in found.points]
        points = (*others, as_measured(joined.tuned[0], fine_tuned))
        return replace(joined, points=points, floating=as_measured(cheapest, 96.0).measured)

    better, worse = seen(90.0, 95.5), seen(90.0, 89.0)
    assert better.standing[-1]
    assert not worse.standing[-1]
    assert better.standing[:-1] == worse.standing[:-1]
    assert better.within(0.6).kind == "tuned"
    assert better.within(8).kind != "tuned"
    assert better.within(8).costs == cheapest.costs
    assert better.front == worse.front
    assert better.policies == worse.policies


def test_names_are_told_apart(searched):
    _, _, _, found, tuned = searched
    policy = found.points[0].policy
    joined = join(join(join(found, tuned, policy), tuned, policy), tuned, dict(policy))
    assert [p.policy.name for p in joined.tuned] == ["point 00, tuned", "point 00, tuned 2", "a policy, tuned"]


def test_bad_input(searched):
    model, batches, _, found, tuned = searched
    policy = found.points[0].policy
    with pytest.raises(RecoupError, match="not built as the one that was scored"):
        join(found, digits_net(), policy)
    with pytest.raises(RecoupError, match="search: join: the layer map's key 'fc9' matches no layer"):
        join(found, tuned, {"fc9": NARROW[0]})
    with pytest.raises(RecoupError, match="restore_ it first"):
        join(found, rc.emulate_(copy.deepcopy(tuned), rc.Policy({"classifier": NARROW[0]})), policy)
    with pytest.raises(RecoupError, match="front must be a Front"):
        join(found.points[0], tuned, policy)
    with pytest.raises(RecoupError, match="model must be a torch"):
        join(found, "weights.safetensors", policy)
    with pytest.raises(RecoupError, match="policy must be a Mapping, such as a Policy; got None"):
        join(found, tuned, None)
    for repair, told in (("nonsense", "'nonsense' is no repair of this hardware"), (3, "names of repairs")):
        with pytest.raises(RecoupError, match=told):
            join(found, tuned, policy, repair=repair)
    joined = join(found, tuned, policy)
    with pytest.raises(RecoupError, match="start='point 00, tuned' is fine-tuned"):
        refine(joined, model, batches, start=joined.tuned[0])


def test_an_area_of_layers_outside_the_space_is_refused(searched):
    pytest.importorskip("amaranth")
    model, batches, _, _, tuned = searched
    scores = score(model, batches, Space({"block2.conv1": [rc.NBSMT(1), rc.NBSMT(2)]}), probes=0)
    found = front(scores, "area", points=2)
    with pytest.raises(RecoupError, match=r"on layer 'block2.conv2', which is outside the space: .* counts its area"):
        join(found, tuned, {"re:block2.conv.*": rc.NBSMT(2)})
    assert join(found, tuned, {"block2.conv1": rc.NBSMT(2)}).tuned[0].costs == found.uniform[1].costs
    with pytest.raises(RecoupError, match=r"leaves layer 'block2.conv1' in float, .* has no area"):
        join(found, tuned, {"classifier": None})


def command(*arguments):
    result = CliRunner().invoke(app, [*map(str, arguments)])
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


@pytest.mark.slow
def test_weights_of_recoup_train_join_on_the_command_line(recipe, tmp_path):  # noqa: F811
    small = ("--set", "points=2", "--set", "probes=0", "--set", "calibration.seeds=[0]")
    assert command("search", "run", recipe, *small)[0] == 0
    chip = tmp_path / "found" / "policy-00.yaml"
    trained = ("--limit", 64, "--test-limit", 8, "--epochs", 1, "--underflow-epochs", 0, "--batch-size", 32)
    given = ("--model", "recoup.models:digits_net", "--data", "digits", "--policy", chip, "--out", "tuned")
    code, _, err = command("train", *given, *trained)
    assert code == 0, err
    options = (*small, "--tuned", f"{chip}=tuned/weights.safetensors")
    code, out, err = command("search", "run", recipe, *options, "--json")
    assert code == 0, err
    assert err.count("measured: ") == 1
    found = SearchResults.model_validate(json.loads(out))
    (point,) = found.tuned
    assert (point.name, point.weights) == ("point 00, tuned", "tuned/weights.safetensors")
    assert point.costs == found.points[0].costs
    assert None not in (point.damage, point.low, point.reached, point.lost_low)
    code, out, err = command("search", "run", recipe, *options)
    assert "measured: " not in err
    assert "point 00, tuned" in out
    assert "Fine-tuned, with weights of their own: point 00, tuned (tuned/weights.safetensors)" in " ".join(out.split())
    assert "fine-tuned, measured" in (tmp_path / "found" / "report.html").read_text()
    other = tmp_path / "found" / "policy-01.yaml"
    _, out, _ = command("search", "run", recipe, *small, "--tuned", f"{other}=tuned/weights.safetensors", "--json")
    assert any("was trained with" in note for note in json.loads(out)["notes"])


def test_bad_points_are_refused_before_anything_is_measured(recipe, tmp_path):  # noqa: F811
    rc.Policy({"classifier": NARROW[1]}, name="chip").save(tmp_path / "chip.yaml")
    rc.Policy({"fc9": NARROW[1]}).save(tmp_path / "other.yaml")
    state = digits_net().state_dict()
    save_file(state, tmp_path / "good.safetensors")
    save_file({**state, "classifier.bias": torch.zeros(3)}, tmp_path / "shape.safetensors")
    save_file({name: value for name, value in state.items() if name != "classifier.bias"}, tmp_path / "key.safetensors")

    def told(text):
        code, _, err = command("search", "run", recipe, "--tuned", text)
        assert code == 2
        assert "measured: " not in err
        assert not (tmp_path / "found").exists()
        return err

    assert "must be POLICY.yaml=WEIGHTS" in told("chip.yaml")
    assert "tuned: chip: missing.safetensors: no such file" in told("chip.yaml=missing.safetensors")
    assert "missing.yaml: cannot be read" in told("missing.yaml=good.safetensors")
    assert "shape: classifier.bias is [3] in the file and [10] in the model" in told("chip.yaml=shape.safetensors")
    assert "missing: classifier.bias" in told("chip.yaml=key.safetensors")
    assert "'fc9' matches no layer" in told("other.yaml=good.safetensors")
    (tmp_path / "lr=0.1").mkdir()
    (tmp_path / "chip.yaml").rename(tmp_path / "lr=0.1" / "chip.yaml")
    assert "tuned: chip: a=b.safetensors: no such file" in told("lr=0.1/chip.yaml=a=b.safetensors")
