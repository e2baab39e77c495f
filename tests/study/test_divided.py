"""A study divided over processes and machines: the same bits, nothing twice, nothing lost, and what is refused."""

import json
import multiprocessing
import os
import signal
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml

import recoup as rc
from recoup.errors import RecoupError
from recoup.models import chargpt
from recoup.storage.lock import Lock
from recoup.study import Recipe, run
from recoup.study import lab as lab_module
from recoup.study.bench import Bench, Task, measured
from recoup.study.lab import Lab
from recoup.study.machine import cpu_threads
from recoup.study.runner import plan
from recoup.study.store import LOCK, Store
from recoup.tasks.shards import IncompleteError, Shard
from tests.fresh import Fresh, recoup
from tests.study.examples import small_recipe
from tests.ten_lines import MODULE

TIMES = {"date", "seconds"}
A = rc.Policy({"re:features.(3|7)": "nbsmt-4t", "classifier": "LBA.biased(5, 4)"}, name="chip A")
B = rc.Policy({"re:features.(3|7|10)": "nbsmt-2t", "re:.*": None}, name="chip B")
MIXED = {
    "configs": ["nbsmt-4t", "LBA.biased(4, 4)", "lightnorm-fp10"],
    "layers": {"features.7": "LBA.biased(5, 4)"},
    "policy": [A, B],
}
LAYERED = {"layers": {"features.7": "nbsmt-2t"}, "states": ["float statistics", "recalibrated at 8 bit"]}
KINDS = {"plain": {}, "mixed": MIXED, "layered": LAYERED}
SLOW_SHARDS = pytest.param("mixed", (1, 0), marks=pytest.mark.slow)
dask = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of dask's own libraries
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def timeless(value):
    """Plain values without the fields of wall-clock time, and without the recipe's own folder."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in TIMES | {"out"}}
    return [timeless(one) for one in value] if isinstance(value, list) else value


def told(folder):
    return timeless(json.loads((folder / "results.json").read_text()))


def asked(folder, kind="plain"):
    return small_recipe(folder, cpu_threads=None, **KINDS[kind])


def kept(folder):
    """What the files of measurements hold, every key once."""
    found = {}
    for path in folder.glob("measurements*.json"):
        values = json.loads(path.read_text())["measurements"]
        assert not values.keys() & found.keys()
        found |= values
    return timeless(found)


class Whole(dict):
    """Of every kind the folder of a study that ran in this process, made when it is asked for."""

    def __init__(self, factory):
        self.factory = factory

    def __missing__(self, kind):
        self[kind] = self.factory.mktemp(kind)
        run(asked(self[kind], kind), workers=1, progress=False)
        return self[kind]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return Whole(tmp_path_factory)


@pytest.fixture
def made(monkeypatch):
    """The measurements that this process makes, by key."""
    found, make = [], Bench.make

    def counted(self, task):
        found.append(task.key)
        return make(self, task)

    monkeypatch.setattr(Bench, "make", counted)
    return found


@pytest.mark.parametrize("kind", ["plain", pytest.param("mixed", marks=pytest.mark.slow), "layered"])
def test_a_measurement_depends_on_no_other(whole, tmp_path, kind):
    """Notes included: each in a lab of its own that was not even checked, the last first."""
    lab = Lab(asked(tmp_path, kind))
    lab.check()
    tasks, _ = plan(lab.recipe, lab.has_norms, lab.hardware, lab.has_work)
    expected = kept(whole[kind])
    assert len(tasks) == len(expected)
    with cpu_threads(1):
        fresh = Lab(lab.recipe)
        for number, task in enumerate(reversed(tasks)):
            if number % 3 == 0:
                fresh = Lab(lab.recipe)
            assert timeless(json.loads(json.dumps(measured(fresh, task)))) == expected[task.key], task.label


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_workers(whole, tmp_path, kind, capsys):
    run(asked(tmp_path, kind), workers=2)
    assert told(tmp_path) == told(whole[kind])
    assert kept(tmp_path) == kept(whole[kind])
    lines = [line for line in capsys.readouterr().err.splitlines() if " measured: " in line]
    assert len(lines) == len(kept(tmp_path))


def test_threads_of_an_executor_take_turns(whole, tmp_path):
    with ThreadPoolExecutor(3) as executor:
        run(asked(tmp_path), executor=executor, progress=False)
    assert told(tmp_path) == told(whole["plain"])


@pytest.mark.parametrize(
    ("kind", "order"), [("plain", (2, 0, 1)), pytest.param("mixed", (1, 0), marks=pytest.mark.slow)]
)
def test_shards_in_any_order(whole, tmp_path, made, kind, order):
    for index in order[:-1]:
        with pytest.raises(IncompleteError, match=r"are not made yet, the first of them .*without a shard"):
            run(asked(tmp_path, kind), shard=Shard(index, len(order)), progress=False)
        assert not (tmp_path / "results.json").exists()
    run(asked(tmp_path, kind), shard=Shard(order[-1], len(order)), progress=False)
    assert told(tmp_path) == told(whole[kind])
    assert sorted(made) == sorted(kept(whole[kind]))
    run(asked(tmp_path, kind), workers=1, progress=False)
    assert len(made) == len(kept(tmp_path))
    assert told(tmp_path) == told(whole[kind])
    assert sum(row["lost"] + row["won"] for row in told(tmp_path)["flips"]) > 0  # answers came along


def test_shards_of_folders_that_were_apart(whole, tmp_path, made):
    (tmp_path / "all").mkdir()
    for index in (1, 0):
        folder = tmp_path / str(index)
        with pytest.raises(IncompleteError):
            run(asked(folder), shard=Shard(index, 2), progress=False)
        name = f"measurements-{index}-of-2.json"
        (folder / name).rename(tmp_path / "all" / name)
    run(asked(tmp_path / "all"), workers=1, progress=False)
    assert sorted(made) == sorted(kept(tmp_path / "all"))
    assert told(tmp_path / "all") == told(whole["plain"])


def test_a_killed_shard_goes_on(whole, tmp_path, made, monkeypatch):
    put = Store.put

    def killed(self, *entry):
        put(self, *entry)
        if len(made) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Store, "put", killed)
    with pytest.raises(KeyboardInterrupt) as interrupt:
        run(asked(tmp_path), shard=Shard(0, 2), progress=False)
    assert interrupt.value.__notes__ == [
        f"2 of 8 measurements are kept in {tmp_path / 'measurements-0-of-2.json'}; the same command goes on from there"
    ]
    monkeypatch.setattr(Store, "put", put)
    run(asked(tmp_path), workers=1, progress=False)
    assert sorted(made) == sorted(kept(tmp_path))
    assert told(tmp_path) == told(whole["plain"])


def test_a_baseline_that_is_taken_up_has_its_own_seeds_scales(tmp_path):
    """With a layer map what the baseline is must be tried, with the first seed's scales: before the second seed's."""
    lab = Lab(asked(tmp_path, "layered"))
    lab.check()
    tasks, _ = plan(lab.recipe, lab.has_norms, lab.hardware, lab.has_work)
    task = next(
        one for one in tasks if one.config == "8-bit" and one.state == "recalibrated at 8 bit" and one.seed == 5
    )

    def scales(lab, seed, state):
        network = lab.repaired(task.hardware.config, state, seed)
        return [module.activation_scale for module in network.modules() if hasattr(module, "activation_scale")]

    found = scales(lab, 5, task.state)
    assert found == scales(Lab(lab.recipe), 5, "float statistics")
    assert found != scales(Lab(lab.recipe), 3, "float statistics")


@pytest.mark.slow
def test_a_worker_killed_in_the_middle(whole, tmp_path, monkeypatch):
    put, victims = Store.put, []

    def stricken(self, *entry):
        put(self, *entry)
        if len(self) == 3:
            victims.append(multiprocessing.active_children()[0].pid)
            os.kill(victims[0], signal.SIGKILL)

    monkeypatch.setattr(Store, "put", stricken)
    with pytest.raises(RecoupError, match="study: a worker was lost"):
        run(asked(tmp_path), workers=2, progress=False)
    monkeypatch.setattr(Store, "put", put)
    assert victims
    before = (tmp_path / "measurements.json").read_text()
    assert len(json.loads(before)["measurements"]) >= 3
    run(asked(tmp_path), workers=2, progress=False)
    after = json.loads((tmp_path / "measurements.json").read_text())["measurements"]
    assert all(after[key] == value for key, value in json.loads(before)["measurements"].items())  # seconds too
    assert told(tmp_path) == told(whole["plain"])


def _cluster(distributed):
    return distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50
    )


def _marked(test):
    for mark in dask:
        test = mark(test)
    return test


@_marked
def test_a_cluster_and_a_worker_of_it_killed(whole, tmp_path, monkeypatch):
    distributed = pytest.importorskip("dask.distributed", reason="the extra recoup[cluster] is not installed")
    from recoup.tasks.cluster import cluster

    put, written, killed = Store.put, [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with _cluster(distributed) as local, distributed.Client(local) as client:

            def stricken(self, *entry):
                put(self, *entry)
                written.append(entry[0])
                if len(written) == 3:
                    killed.append(next(iter(client.run(os.getpid).values())))
                    os.kill(killed[0], signal.SIGKILL)

            monkeypatch.setattr(Store, "put", stricken)
            monkeypatch.chdir(tmp_path)  # the workers are elsewhere
            with cluster(client.scheduler.address) as executor:
                run(asked(tmp_path / "out", "mixed"), executor=executor, progress=False)
    assert killed
    assert sorted(written) == sorted(kept(whole["mixed"]))
    assert told(tmp_path / "out") == told(whole["mixed"])


@pytest.mark.slow
def test_texts_and_a_strangers_wing_in_workers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = chargpt(characters=3, layers=1, width=8, heads=2, context=6)
    config = {"chars": list("abc"), "layers": 1, "d": 8, "heads": 2, "ctx": 6}
    torch.save({"state_dict": model.state_dict(), "config": config}, "gpt.pt")
    Path("text.txt").write_text("abcacb" * 60)
    Path("stranger.py").write_text(MODULE)
    Path("narrow.yaml").write_text(yaml.safe_dump({"layers": {"re:blocks.*fc.": "LBA.biased(3, 3)"}}))
    given = ["--model", "chargpt", "--weights", "gpt.pt", "--data", "text:text.txt", "--wing", "stranger"]
    given += ["--config", "Trunc(bits=3)", "--config", "nbsmt-2t", "--policy", "narrow.yaml", "--seeds", "0,1"]
    given += ["--calibration-images", "8", "--profile-images", "4"]
    for workers in ("1", "2"):
        done = Fresh(recoup, "evaluate", *given, "--workers", workers, "--out", workers, cwd=tmp_path).wait()
        assert done.returncode == 0, done.stderr
    assert told(Path("1")) == told(Path("2"))


def test_a_worker_with_other_data_or_network_refuses(tmp_path):
    recipe = asked(tmp_path)
    bench = Bench(Lab(recipe), 1, divided=True)
    sent = Bench.__new__(Bench)
    sent.__dict__ |= bench.__getstate__() | {"expected": {**bench.expected, "samples": "of another set"}}
    task = Task("float", "float statistics", None, None)
    with pytest.raises(RecoupError, match=r"study: samples is 'of another set', but '\w+' at a worker: every machine"):
        sent.make(task)
    sent.expected = bench.expected
    assert sent.make(task)["count"] == 40
    sent.folder = str(tmp_path / "nowhere")
    with pytest.raises(RecoupError, match=r"a worker cannot enter .*nowhere"):
        sent.make(task)


def test_measurements_on_other_numbers_of_threads_are_told(tmp_path):
    """They count, for that is what `cpu_threads` is about, but float layers' last digits depend on it."""
    once = {"calibration": {"images": 32, "batch_size": 16, "seeds": [3]}, "states": ["float statistics"]}
    run(small_recipe(tmp_path, cpu_threads=2, **once), progress=False)
    found = run(
        small_recipe(tmp_path, cpu_threads=2, **{**once, "states": ["float statistics", "paired"]}), progress=False
    )
    assert not [note for note in found.notes if "threads of torch" in note]
    more = {**once, "states": ["float statistics", "paired", "bias correction"]}
    found = run(small_recipe(tmp_path, cpu_threads=1, **more), progress=False)
    assert [note for note in found.notes if "were made on 1 and 2 threads of torch" in note]


def test_a_workers_images_lie_as_here(tmp_path, monkeypatch):
    """Float layers' last bits may differ by the layout."""
    laid, place = [], lab_module.laid_out
    monkeypatch.setattr(lab_module, "laid_out", lambda *given: laid.append(place(*given)) or laid[-1])
    here = Lab(asked(tmp_path))
    here.check()
    tasks, _ = plan(here.recipe, here.has_norms, here.hardware, here.has_work)
    task = next(task for task in tasks if task.hardware is not None and task.state == "float statistics")
    for lab in (here, Lab(here.recipe)):
        measured(lab, task)
        assert laid.pop().channels_last


def test_two_studies_in_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("recoup.study.store.WAIT", 0.1)
    run(asked(tmp_path), workers=1, progress=False)
    before = (tmp_path / "results.json").read_text()
    with (
        Lock(tmp_path / LOCK, "another"),
        pytest.raises(RecoupError, match=rf"study: {tmp_path} is in use by another run \(process \d+, which holds"),
    ):
        run(asked(tmp_path), progress=False)
    assert (tmp_path / "results.json").read_text() == before
    with Lock(tmp_path / LOCK, "a shard", shared=True):
        own = Lock(tmp_path / "measurements-0-of-2.lock", "a shard")
        with own, pytest.raises(RecoupError, match="measurements-0-of"):
            run(asked(tmp_path), shard=Shard(0, 2), progress=False)
        run(asked(tmp_path), shard=Shard(1, 2), progress=False)
        with pytest.raises(RecoupError, match=r"in use by another run"):
            run(asked(tmp_path), progress=False)


def test_a_shard_of_another_version_or_study(tmp_path):
    with pytest.raises(IncompleteError):
        run(asked(tmp_path), shard=Shard(0, 2), progress=False)
    path = tmp_path / "measurements-0-of-2.json"
    right = path.read_text()
    content = json.loads(right)
    content["identity"]["recoup"] = "0.0.1"
    path.write_text(json.dumps(content))
    with pytest.raises(RecoupError, match=r"measurements of another study \(recoup was '0\.0\.1', is"):
        run(asked(tmp_path), shard=Shard(1, 2), progress=False)
    path.write_text(right[:-40])
    with pytest.raises(RecoupError, match=r"measurements-0-of-2\.json: not a file of finished measurements"):
        run(asked(tmp_path), progress=False)
    assert run(asked(tmp_path), overwrite=True, progress=False).accuracy
    assert not path.exists()


def test_measurements_of_another_processor(whole, tmp_path, monkeypatch, made, capsys):
    capability = torch.backends.cpu.get_cpu_capability
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "RVV")
    with pytest.raises(IncompleteError):
        run(asked(tmp_path), shard=Shard(0, 3), progress=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", capability)
    elsewhere = list(made)
    made.clear()
    run(asked(tmp_path), workers=1, any_cpu=True, progress=False)
    assert not set(elsewhere) & set(made)
    made.clear()
    run(asked(tmp_path), workers=1)
    assert made == elsewhere
    said = capsys.readouterr().err
    assert f"{len(elsewhere)} measurements of a processor with other float kernels are made again" in said
    assert told(tmp_path) == told(whole["plain"])


@pytest.mark.parametrize("workers", [0, -1, True, 1.5])
def test_workers_that_are_no_number(tmp_path, workers):
    with pytest.raises(RecoupError, match=r"study\.run\(workers="):
        run(Recipe.build(asked(tmp_path).model_dump()), workers=workers)
