"""Checkpoints of a run over processes: what is refused, that a broken save leaves the one before, and other ranks."""

import json

import pytest
import torch
import torch.nn.functional as F

from recoup.errors import RecoupError
from recoup.pipeline import Mitigation
from recoup.pipeline.keeper import MANIFEST, Keeper
from recoup.pipeline.runtime import run_local
from recoup.pipeline.transport import LocalTransport
from tests.pipeline.test_runtime import network, plan, rate, samples

RANKS = 2


def keepers(folder, barrier=lambda _: None, ranks=RANKS, **changes):
    """One for every rank, and the workers; the ranks take turns, so that the barrier has nothing to do."""
    data = samples()
    links, made = LocalTransport.chain(ranks), plan(network(), changes.pop("mitigation", "sc"), **changes)
    workers = [made.worker(rank, ranks, links[rank], data, torch.device("cpu")) for rank in range(ranks)]
    kept = [Keeper(folder, worker, made.identity(data), barrier, wait=0.1) for worker in workers]
    return kept, workers


def ticked(workers, count):
    """So many ticks; one more than 2 (R - 1) ticks behind a sample, all ranks have updated for it."""
    for t in range(count):
        for worker in workers:
            worker.tick(t, 40)


def saved(folder, every=8, ranks=RANKS):
    """A run that is stopped when it has kept one checkpoint."""
    made, workers = keepers(folder, ranks=ranks)
    for keeper in made:
        assert keeper.resume() == 0
        keeper.watch(every, 40)
    ticked(workers, every + 2 * (ranks - 1))
    for keeper in made:
        keeper.close()
    return workers


@pytest.mark.parametrize("ranks", [2, 1, 3])
def test_a_checkpoint_is_taken_up(ranks, tmp_path):
    saved(tmp_path)
    names = {f"rank{rank}{end}" for rank in range(2) for end in ("-8.pt", "-8.pt.sha256", ".lock")}
    assert {path.name for path in tmp_path.iterdir()} == {MANIFEST, *names}
    made, after = keepers(tmp_path, ranks=ranks)
    assert [keeper.resume() for keeper in made] == [8] * ranks
    for keeper in made:
        keeper.watch(12, 40)
    ticked(after, 32 + 2 * (ranks - 1))
    whole = network()
    losses = run_local(plan(whole, "sc"), samples(), 2).losses
    assert after[-1].losses == losses
    for worker in after:
        worker.finish()
        assert all(torch.equal(p, whole.get_parameter(name)) for name, p in worker.part.named_parameters())
    for keeper in made:
        keeper.close()
    kept = {path.name for path in tmp_path.glob("rank*-*")}
    assert kept == {f"rank{rank}-36.pt{end}" for rank in range(ranks) for end in ("", ".sha256")}


def test_an_empty_folder_is_a_start(tmp_path):
    made, _ = keepers(tmp_path / "new")
    assert [keeper.resume() for keeper in made] == [0, 0]


def constant(k):
    return rate(0)


def other_loss(out, y):
    return F.cross_entropy(out, y)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"lr": 0.1}, "learning rates"),
        ({"lr": constant}, "learning rates"),
        ({"loss": other_loss}, "loss"),
        ({"momentum": 0.5}, "momentum"),
        ({"weight_decay": 0.0}, "weight_decay"),
        ({"mitigation": "lwpv"}, "mitigation"),
        ({"delays": [9, 6, 4, 2, 0]}, "delays"),
    ],
)
def test_another_configuration_is_refused(changes, name, tmp_path):
    saved(tmp_path)
    made, workers = keepers(tmp_path, **changes)
    for keeper in made:
        with pytest.raises(RecoupError, match=f"holds another run's checkpoint: its {name} is"):
            keeper.resume()
    assert all(worker.core.steps == 0 for worker in workers)


def test_a_mitigation_is_the_same_by_name_and_by_value(tmp_path):
    saved(tmp_path)
    made, _ = keepers(tmp_path, mitigation=Mitigation(compensation=1.0))
    assert made[0].resume() == 8


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        (MANIFEST, b'{"samples": 8, "ru', "is no manifest of a run .JSONDecodeError"),
        (MANIFEST, b"[]", "is no manifest of a run .TypeError"),
        (MANIFEST, b'{"samples": 8}', "is no manifest of a run .KeyError: 'files'"),
        (MANIFEST, b'{"tick": 8, "files": {}, "run": {}}', "is of a recoup before 0.2.0"),
        ("rank1-8.pt", None, "rank1-8.pt cannot be read .FileNotFoundError"),
        ("rank1-8.pt", b"", "rank1-8.pt is not the file that was written: its SHA-256 is e3b0c442"),
        ("rank1-8.pt", 2000, "rank1-8.pt is not the file that was written"),
        ("rank1-8.pt", -1, "rank1-8.pt is not the file that was written"),
    ],
)
def test_damaged_files_are_named(name, content, told, tmp_path):
    saved(tmp_path)
    path = tmp_path / name
    if content is None:
        path.unlink()
    else:
        whole = path.read_bytes()
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]  # one bit
        path.write_bytes(content if isinstance(content, bytes) else flipped if content < 0 else whole[:content])
    made, _ = keepers(tmp_path)
    with pytest.raises(RecoupError, match=told):
        made[1].resume()


def test_a_save_that_is_cut_off_leaves_the_one_before(tmp_path):
    """The others have kept theirs; rank 0 does not see one of them."""
    saved(tmp_path)
    made, workers = keepers(tmp_path)
    for keeper, worker in zip(made, workers, strict=True):
        keeper.resume()
        worker.updated = lambda _: None
    made[1].watch(12, 40)
    ticked(workers, 6)
    assert (tmp_path / "rank1-12.pt").exists()
    (tmp_path / "rank1-12.pt.sha256").unlink()
    with pytest.raises(RecoupError, match=r"rank1-12.pt.sha256 was written and is not seen here after 0.1 s"):
        made[0].save(12)
    assert json.loads((tmp_path / MANIFEST).read_text())["samples"] == 8
    for keeper in made:
        keeper.close()
    again, _ = keepers(tmp_path)
    assert [keeper.resume() for keeper in again] == [8, 8]


def test_checkpoints_are_at_whole_updates(tmp_path):
    made, workers = keepers(tmp_path, update_size=3)
    for keeper in made:
        keeper.watch(4, 40)
    ticked(workers, 40)
    assert json.loads((tmp_path / MANIFEST).read_text())["samples"] == 36


def another_activation():
    model = network()
    model.get_submodule("0").register_module("1", torch.nn.ReLU())
    return model


def other_weights():
    model = network()
    with torch.no_grad():
        model.get_submodule("3").bias.add_(1e-3)
    return model


@pytest.mark.parametrize(
    ("model", "data", "name"),
    [
        (another_activation, samples(), r"modules\.0\.1 is \"torch.nn.modules.activation.Tanh\(\)\", this one's"),
        (other_weights, samples(), "weights at the start is"),
        (network, samples()[::-1], "order of the samples is"),
        (network, [*samples()[:20], *samples()[21:], samples()[20]], "order of the samples is"),
    ],
)
def test_another_model_and_another_order_are_refused(model, data, name, tmp_path):
    saved(tmp_path)
    links, made = LocalTransport.chain(RANKS), plan(model(), "sc")
    worker = made.worker(0, RANKS, links[0], data, torch.device("cpu"))
    keeper = Keeper(tmp_path, worker, made.identity(data), lambda _: None)
    with pytest.raises(RecoupError, match=f"holds another run's checkpoint: its {name}"):
        keeper.resume()


def test_samples_that_are_drawn_anew_have_no_order():
    class Drawn:
        def __len__(self):
            return 5

        def __getitem__(self, index):
            return torch.randn(1, 6), torch.tensor([index % 4])

    made = plan(network(), "sc")
    before = torch.get_rng_state()
    assert made.identity(Drawn())["order of the samples"] == "drawn anew"
    assert torch.equal(torch.get_rng_state(), before)


def test_two_runs_in_one_folder(tmp_path):
    first, _ = keepers(tmp_path)
    with pytest.raises(RecoupError, match=r"is in use by another run \(process \d+, which holds rank0\.lock\)"):
        keepers(tmp_path)
    for keeper in first:
        keeper.close()
    keepers(tmp_path)
