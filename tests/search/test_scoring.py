"""Scores: what they are, and that they are the same to the bit however the work was divided."""

import json
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import recoup as rc
from recoup.errors import RecoupError
from recoup.search import Shard, Space, front, score, verify
from recoup.search import bench as bench_module
from recoup.search.scoring import plan
from recoup.tasks.shards import IncompleteError
from tests.networks import batches_of, small_net
from tests.search.cases import OPTIONS, labelled, space


def numbers(scores):
    return scores.raw, scores.damages, [(probe.label, probe.measured) for probe in scores.probes]


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """Scores of the small space, and the folder they are kept in."""
    folder = tmp_path_factory.mktemp("scores")
    model, batches = labelled()
    lines = []
    return score(model, batches, space(), probes=3, out=folder, progress=lines.append), folder, lines


def test_a_score_is_the_kl_of_one_group_alone_after_repair(scored):
    scores, _, lines = scored
    model, batches = labelled()
    assert scores.made == len(lines) == 1 + 3 * 3 + 1 + 3
    assert lines[-1].startswith("14 of 14 measured: probe ")
    batches = [(x.contiguous(memory_format=torch.channels_last), y) for x, y in batches]  # last bits of float layers
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for number, group in enumerate(scores.groups[:2]):
        for option, config in enumerate(group.options):
            rc.calibrate_(model, batches, {"re:block2.(conv|short).*": True, "re:.*": None})
            rc.emulate_(model, None, {group.name: config})
            rc.repair_(model, batches)
            assert rc.evaluate(model, batches, "kl").value == scores.damages[number][option]
            rc.restore_(model)
    assert scores.damages[-1][0] == 0.0
    assert scores.base == 0.0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_users_model_is_not_touched():
    model, batches = labelled()
    model.train()
    score(model, batches, Space({"classifier": [None, rc.LBA.biased(4, 4)]}), probes=0)
    assert model.training
    assert not any("activation_scale" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("way", [pytest.param("two workers", marks=pytest.mark.slow), "threads", "shards", "killed"])
def test_the_same_bits_however_the_work_is_divided(scored, tmp_path, way, monkeypatch):
    scores, _, _ = scored
    model, batches = labelled()
    asked = {"probes": 3, "out": tmp_path}
    torch.set_num_threads(2)
    try:
        if way == "two workers":
            found = score(model, batches, space(), workers=2, **asked)
        elif way == "threads":
            with ThreadPoolExecutor(3) as executor:
                found = score(model, batches, space(), executor=executor, **asked)
        elif way == "shards":
            order = [Shard(index, 3) for index in range(3)]
            random.Random(1).shuffle(order)
            for shard in order[:-1]:
                with pytest.raises(IncompleteError, match="of 14 measurements are not made yet"):
                    score(model, batches, space(), shard=shard, **asked)
            found = score(model, batches, space(), shard=order[-1], **asked)
        else:
            found = killed_and_taken_up(model, batches, asked, monkeypatch)
    finally:
        torch.set_num_threads(1)
    assert numbers(found) == numbers(scores)


def killed_and_taken_up(model, batches, asked, monkeypatch):
    """Interrupted in the sixth measurement; a record is then torn."""
    original, calls = bench_module.Bench._measured, []

    def stop(self):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(bench_module.Bench, "_measured", stop)
    with pytest.raises(KeyboardInterrupt) as interrupted:
        score(model, batches, space(), **asked)
    assert interrupted.value.__notes__[0].startswith("5 of 14 measurements are kept in")
    records = sorted((asked["out"] / "records").iterdir())
    records[0].write_text(records[0].read_text()[:40])
    found = score(model, batches, space(), **asked)
    assert found.made == 10
    return found


def test_a_finished_folder_measures_nothing_and_a_wider_space_only_what_is_new(scored):
    scores, folder, _ = scored
    model, batches = labelled()
    again = score(model, batches, space(), probes=3, out=folder)
    assert (again.made, numbers(again)) == (0, numbers(scores))
    rows = (folder / "scores.csv").read_text().splitlines()
    assert len(rows) == 1 + 3 * 3 + 2
    assert rows[0] == "group,layers,option,kl,damage,seconds"
    assert json.loads((folder / "scores.json").read_text())["damages"] == [list(row) for row in scores.damages]


def test_records_of_another_processor_are_made_again(scored, monkeypatch):
    _, folder, _ = scored
    model, batches = labelled()
    some = Space({"classifier": [None, rc.LBA.biased(4, 4)]})
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "RVV")
    kept = {path: path.read_text() for path in (folder / "records").iterdir()}
    asked = {"probes": 0, "calibration": batches, "out": folder}
    try:
        with pytest.raises(RecoupError, match="scales was"):
            score(model, batches, some, **asked)
        assert score(model, batches, space(), probes=3, out=folder, any_cpu=True).made == 0
        assert score(model, batches, space(), probes=0, out=folder).made == 11
    finally:
        for path, text in kept.items():
            path.write_text(text)


def test_a_reference_network_and_other_metrics():
    model, batches = labelled()
    two = Space({"block2.conv1": OPTIONS, "block2.conv2": OPTIONS})
    found = score(model, batches, two, metric="mse", reference=True, probes=0, repair="none")
    batches = [(x.contiguous(memory_format=torch.channels_last), y) for x, y in batches]
    rc.calibrate_(model, batches, {"re:block2.conv.": True, "re:.*": None})

    def measured(**layers):
        rc.emulate_(model, None, {f"block2.{name}": config for name, config in layers.items()})
        value = rc.evaluate(model, batches, "mse").value
        rc.restore_(model)
        return value

    base = measured(conv1=OPTIONS[0], conv2=OPTIONS[0])
    assert found.base == base
    assert found.reference == (0, 0)
    for number, (name, other) in enumerate((("conv1", "conv2"), ("conv2", "conv1"))):
        row = [base, *(measured(**{name: config, other: OPTIONS[0]}) for config in OPTIONS[1:])]
        assert found.raw[number] == tuple(row)
        assert found.damages[number] == tuple(max(value - base, 0.0) for value in row)
    top1 = score(model, batches, two, metric="top1", probes=0)
    assert top1.base == 100.0
    assert all(
        damage == 100.0 - raw
        for d, r in zip(top1.damages, top1.raw, strict=True)
        for damage, raw in zip(d, r, strict=True)
    )


def mean_output(model, batches):
    return float(torch.cat([model(x) for x, _ in batches]).mean())


def nan_on_hardware(model, batches):
    x = next(iter(batches))[0]
    return float("nan") if type(model.block2.conv1).__name__ == "NBSMTConv2d" else float(model(x).mean())


def test_measures_of_one_s_own():
    model, batches = labelled()
    one = Space({"block2.conv1": OPTIONS[:2]})
    found = score(model, batches, one, metric=mean_output, rises=False, probes=0)
    assert found.metric == "mean_output"
    laid_out = [(x.contiguous(memory_format=torch.channels_last), y) for x, y in batches]
    assert found.base == rc.evaluate(model, laid_out, mean_output).value
    with pytest.raises(
        RecoupError, match=r"policy block2.conv1 on 1 thread, S\+A: evaluate: metric nan_on_hardware gives NaN"
    ):
        score(model, batches, one, metric=nan_on_hardware, rises=True, probes=0)
    with pytest.raises(RecoupError, match="say rises=True"):
        score(model, batches, one, metric=mean_output)
    with pytest.raises(RecoupError, match="cannot be sent to another process"):
        score(model, batches, one, metric=lambda *_: 1.0, rises=True, workers=2)


def regression():
    """A network with one output a sample, without a dimension for it, and its batches for scores and test."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1), nn.Flatten(0)).eval()
    x = torch.randn(96, 8)
    batches = [(part, part.sum(1).sin()) for part in x.split(24)]
    return model, batches[:2], batches[2:]


def mse(model, batches):
    """Of the targets: called as recoup's own, which is of the float network's outputs."""
    with torch.no_grad():
        return float(torch.cat([(model(x) - y).square() for x, y in batches]).mean())


def test_a_measure_of_one_s_own_that_is_called_as_one_of_recoup_s():
    model, batches, test = regression()
    one = Space({"0": [rc.LBA(), rc.LBA.biased(3, 4)]})
    found = score(model, batches, one, metric=mse, rises=False, probes=0)
    assert found.metric == "mse()"
    assert found.base == mse(model, batches)
    with pytest.raises(RecoupError, match="is a function: pass it"):
        verify(front(found, "bits", points=2), model, test, seeds=1)
    told = verify(front(found, "bits", points=2), model, test, seeds=1, metric=mse)
    emulated = rc.emulate_(model, told.points[0].policy)
    rc.repair_(emulated, batches)
    narrow = mse(emulated, test)
    rc.restore_(model)
    assert told.points[0].measured.damage == pytest.approx(narrow - mse(model, test))


def test_squared_differences_of_outputs_of_one_dimension():
    model, batches, test = regression()
    one = Space({"0": [rc.LBA(), rc.LBA.biased(3, 4)]})
    found = verify(front(score(model, batches, one, metric="mse", probes=0), "bits", points=2), model, test, seeds=1)
    narrow, wide = found.front[0].measured.damage, found.front[-1].measured.damage
    assert narrow > wide > 0
    with pytest.raises(RecoupError, match=r"outputs \[N, ..., V\]; got \[24\]"):
        score(model, batches, one, probes=0)


def test_another_search_s_folder_is_refused(scored):
    _, folder, _ = scored
    model, batches = labelled()
    for told, arguments, options in (
        ("weights was", (small_net(1), batches), {}),
        ("data was", (model, batches[:1]), {"calibration": batches}),
        ("calibration was", (model, batches), {"calibration": batches_of(1, 24)}),
        ("repair was 'default', is 'none'", (model, batches), {"repair": "none"}),
        (r"metrics was \['kl'\], is \['mse'\]", (model, batches), {"metric": "mse"}),
    ):
        with pytest.raises(RecoupError, match=f"holds a search of another kind .*{told}"):
            score(*arguments, space(), out=folder, **options)


def test_two_searches_in_one_folder(tmp_path, monkeypatch):
    """The first has measured something and written no scores yet; one that measured nothing is in nobody's way."""
    model, batches = labelled()
    one = Space({"classifier": [None, rc.LBA.biased(4, 4)]})
    original = bench_module.Bench._measured
    monkeypatch.setattr(bench_module.Bench, "_measured", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        score(small_net(1), batches, one, probes=0, out=tmp_path)
    monkeypatch.setattr(bench_module.Bench, "_measured", original)
    with pytest.raises(IncompleteError):
        score(model, batches, one, probes=0, out=tmp_path, shard=Shard(0, 2))
    assert not (tmp_path / "scores.json").exists()
    with pytest.raises(RecoupError, match=r"holds a search of another kind .weights was"):
        score(small_net(1), batches, one, probes=0, out=tmp_path)
    assert score(model, batches, one, probes=0, out=tmp_path).made == 1
    (tmp_path / "scores.json").unlink()
    (tmp_path / "identity.json").write_text("{")
    with pytest.raises(RecoupError, match=r"identity\.json: no scores of a search"):
        score(model, batches, one, probes=0, out=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"probes": -1}, "probes must be an integer from 0"),
        ({"workers": 0}, "workers must be an integer from 1"),
        ({"executor": "x"}, "executor must have submit"),
        ({"shard": "0/2"}, "shard must be a Shard"),
    ],
)
def test_how_work_is_divided_is_checked_first(arguments, told):
    model, batches = labelled()
    with pytest.raises(RecoupError, match=told):
        score(model, batches, Space({"classifier": [None]}), **arguments)


def test_probes_are_uniform_policies_then_mixes_the_same_every_time():
    model, _ = labelled()
    probes = plan(model, space(), probes=6).probes
    assert [label for label, _, _ in probes[:3]] == ["1 thread, S+A", "2 threads, S+A", "4 threads, A, rounding zero"]
    assert probes == plan(model, space(), probes=6).probes
    assert len({options for _, options, _ in probes}) == 6
    small = plan(model, Space({"classifier": [None, rc.LBA.biased(4, 4)]}), probes=6)
    assert [options for _, options, _ in small.probes] == [(1,)]


class ViewNet(nn.Module):
    """A network that flattens by ``view``, as the beginners' tutorial does."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4 * 6 * 6, 10)

    def forward(self, x):
        x = torch.relu(self.conv(x))
        return self.fc(x.view(x.size(0), 4 * 6 * 6))


def test_a_network_that_views_behind_a_convolution():
    torch.manual_seed(0)
    model, batches = ViewNet().eval(), [(x, x.mean((1, 2, 3)).gt(0).long()) for x in batches_of(2, 8)]
    options = {"conv": [None, rc.LBA.biased(4, 4), rc.NBSMT(2)], "fc": [None, rc.LBA.biased(3, 3)]}
    batches = [(x.abs(), y) for x, y in batches]
    found = score(model, batches, Space(options), probes=2)
    rc.emulate_(model, None, {"conv": rc.LBA.biased(4, 4)})
    rc.repair_(model, batches)
    assert found.raw[0][1] == rc.evaluate(model, batches, "kl").value
    rc.restore_(model)
    test = [(x.flip(0) + 0.5, y) for x, y in batches]
    assert verify(front(found, "bits", points=2), model, test, seeds=2, calibration=batches).total > 0


class Reading(nn.Module):
    """A network that reads memory, which runs on any layout and computes something else."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        n, c, h, w = x.shape
        return self.conv(x.as_strided((n, c, h, w), (c * h * w, h * w, w, 1))).mean((2, 3))


def test_a_network_that_reads_memory_keeps_its_layout():
    torch.manual_seed(0)
    batches = [(torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64))]
    bench = bench_module.Bench(Reading(), batches, ["top1"], batches)
    ((x, _),) = bench.batches
    assert x.is_contiguous()
    assert not x.is_contiguous(memory_format=torch.channels_last)
