"""save and load: one file is the float checkpoint, the hardware and the repairs; what is loaded evaluates alike."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import recoup as rc
from tests.fresh import Fresh
from tests.networks import images, small_net
from tests.test_ledger import BATCHES, HARSH, equal, extras, network, state, take

STEPS = [[], ["gain", "paired"], ["order", "bias"], ["chunks", "repair"], ["average"]]


@pytest.mark.parametrize("kind", ["lba", "nbsmt", "mix"])
@pytest.mark.parametrize(
    "steps", [[], ["gain", "paired"], ["order", "bias"], ["chunks", "repair"], ["average"]], ids=str
)
def test_loaded_is_saved(tmp_path, kind, steps):
    model = take(network(kind), steps).eval()
    rc.save(model, tmp_path / "chip.safetensors")
    loaded = rc.load(tmp_path / "chip.safetensors", small_net(seed=9)).eval()
    assert torch.equal(loaded(images(4)), model(images(4)))
    assert equal(state(loaded), state(model))
    assert equal(extras(loaded), extras(model))
    assert str(rc.describe(loaded)) == str(rc.describe(model))
    assert equal(state(rc.restore_(loaded)), state(rc.restore_(model)))


def test_the_file_is_the_float_checkpoint(tmp_path):
    model = rc.repair_(network("lba"), BATCHES)
    rc.save(model, tmp_path / "chip.safetensors")
    tensors = load_file(tmp_path / "chip.safetensors")
    plain = {name: value for name, value in tensors.items() if not name.startswith(("recoup.", "recoup/"))}
    assert equal(plain, state(small_net()))
    assert equal(state(rc.models.load_weights_(small_net(seed=3), tmp_path / "chip.safetensors")), state(small_net()))


@pytest.mark.slow
def test_in_another_process_on_one_and_two_threads(tmp_path):
    model = rc.repair_(network("mix"), BATCHES).eval()
    rc.save(model, tmp_path / "chip.safetensors")
    torch.save(model(images(4)).detach(), tmp_path / "expected.pt")
    done = Fresh(evaluate_again, str(tmp_path)).wait()
    assert done.returncode == 0, done.stderr


def evaluate_again(folder):
    """In a process that knows nothing of the one that saved."""
    for threads in (1, 2):
        torch.set_num_threads(threads)
        model = rc.load(f"{folder}/chip.safetensors", small_net(seed=5)).eval()
        assert torch.equal(model(images(4)), torch.load(f"{folder}/expected.pt", weights_only=True))


def test_names_may_differ_by_a_prefix(tmp_path):
    class Wrapped(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.backbone = module

        def forward(self, x):
            return self.backbone(x)

    model = rc.repair_(network("lba"), BATCHES).eval()
    rc.save(model, tmp_path / "plain")
    with pytest.warns(rc.RecoupWarning, match=r"its names fit the model's with 'backbone\.' before them"):
        wrapped = rc.load(tmp_path / "plain", Wrapped(small_net(seed=2))).eval()
    assert torch.equal(wrapped(images(4)), model(images(4)))
    rc.save(wrapped, tmp_path / "wrapped")
    with pytest.warns(rc.RecoupWarning, match=r"without 'backbone\.'"):
        again = rc.load(tmp_path / "wrapped", small_net(seed=2)).eval()
    assert torch.equal(again(images(4)), model(images(4)))
    assert equal(state(rc.restore_(again)), state(small_net()))


def test_refused_files_leave_the_model_as_it_was(tmp_path):
    model, path = rc.repair_(network("lba"), BATCHES), tmp_path / "chip"
    rc.save(model, path)
    fresh = small_net(seed=4)
    before = state(fresh)

    def refused(said, target=fresh, source=path):
        with pytest.raises(rc.RecoupError, match=said):
            rc.load(source, target)
        assert equal(state(fresh), before)
        assert not [m for m in fresh.modules() if isinstance(m, rc.wings.Emulated)]

    refused("of another architecture: it lacks '0.weight'", nn.Sequential(nn.Linear(2, 2)))
    refused("emulated already", network("lba"))
    refused("must be a torch.nn.Module", 3)
    refused("no such file", source=tmp_path / "none")
    (tmp_path / "cut").write_bytes(path.read_bytes()[:-9])
    refused("cannot be read", source=tmp_path / "cut")
    save_file(state(small_net()), tmp_path / "float")
    refused("a plain checkpoint", source=tmp_path / "float")
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["recoup"])
    tensors = load_file(path)

    def changed(**fields):
        save_file(tensors, tmp_path / "changed", {"recoup": json.dumps(header | fields)})
        return tmp_path / "changed"

    refused("format 3", source=changed(format=3))
    refused("no layer 'nowhere'", source=changed(scales={"nowhere": 1.0}))
    refused("config 'Foreign", source=changed(layers={"classifier": "Foreign()"}))


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(rc.RecoupError, match="must be a torch"):
        rc.save(None, tmp_path / "x")
    with pytest.raises(rc.RecoupError, match="cannot be written"):
        rc.save(small_net(), tmp_path / "no" / "x")
    assert list(tmp_path.iterdir()) == []


def test_tied_weights(tmp_path):
    def tied(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4))
        model[2].weight = model[0].weight
        return model.eval()

    model = rc.lba.correct_gain_(rc.emulate_(tied(0), HARSH), [torch.rand(8, 4)])
    rc.save(model, tmp_path / "chip")
    loaded = rc.load(tmp_path / "chip", tied(1))
    assert loaded[2].weight is loaded[0].weight
    x = torch.rand(3, 4)
    assert torch.equal(loaded(x), model(x))


def test_a_model_of_another_dtype_is_refused_and_stays(tmp_path):
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    rc.emulate_(net, rc.LightNorm())
    rc.save(net, tmp_path / "chip.safetensors")
    other = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval().bfloat16()
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(rc.RecoupError, match=r"torch.float32 in the file and torch.bfloat16 in the model.*model.to"):
        rc.load(tmp_path / "chip.safetensors", other)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
