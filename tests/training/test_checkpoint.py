"""A training run on disk: every tensor that decides the next step comes back, bit for bit."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from recoup import LBA, NBSMT, calibrate_, correct_bias_, emulate_
from recoup.errors import RecoupError
from recoup.lba import correct_gain_
from recoup.network.emulated import emulated_layers
from recoup.training import checkpoint

IDENTITY = {"settings": {"lr": 0.1}, "layers": {"0": "a"}, "weights": "x"}


def network():
    """Two wings in one network, each with what a repair fitted to its layers."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))
    batches = [(torch.rand(16, 8), torch.zeros(16, dtype=torch.int64))]
    calibrate_(model, batches, {"2": True, "re:.*": None})
    emulate_(model, None, {"0": LBA.biased(4, 4), "2": NBSMT(2)})
    correct_gain_(model, batches)
    return correct_bias_(model, batches)


def stepped(model, optimizer):
    """One step whose gradients are random: the random state decides it as well."""
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return model


def optimizer_of(model, kind=torch.optim.AdamW):
    return kind(model.parameters(), lr=0.1)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_the_next_step_is_the_same(tmp_path, kind):
    model = network()
    optimizer = optimizer_of(model, kind)
    stepped(model, optimizer)
    file = checkpoint.state_file(tmp_path, IDENTITY)
    file.write((checkpoint.tensors(model, optimizer), {"step": 1, "rows": [{"loss": 0.1}]}))
    extras = {name: layer.extra_tensors() for name, layer in emulated_layers(model).items()}
    stepped(model, optimizer)

    again = network()
    for layer in emulated_layers(again).values():  # whatever it holds goes
        layer.take_extras({})
    restarted = optimizer_of(again, kind)
    kept, progress = file.read()
    assert progress == {"step": 1, "rows": [{"loss": 0.1}]}
    checkpoint.restore(kept, again, restarted)
    assert set(extras["0"]) == {"gain"}
    assert "bias_correction" in extras["2"]
    for name, layer in emulated_layers(again).items():
        found = layer.extra_tensors()
        assert found.keys() == extras[name].keys()
        assert all(torch.equal(found[extra], extras[name][extra]) for extra in found)
    stepped(again, restarted)
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), model.parameters(), strict=True))


def test_an_extra_that_was_not_there_is_not_there_afterwards(tmp_path):
    model = network()
    emulated_layers(model)["0"].gain = None
    file = checkpoint.state_file(tmp_path, IDENTITY)
    file.write((checkpoint.tensors(model, optimizer_of(model)), {}))
    again = network()
    checkpoint.restore(file.read()[0], again, optimizer_of(again))
    assert emulated_layers(again)["0"].gain is None
    assert emulated_layers(again)["2"].activation_scale == emulated_layers(model)["2"].activation_scale


def test_gains_lie_where_they_always_did(tmp_path):
    model = network()
    checkpoint.state_file(tmp_path, IDENTITY).write((checkpoint.tensors(model, optimizer_of(model)), {}))
    kept = load_file(tmp_path / checkpoint.FILE)
    assert torch.equal(kept["gain.0"], emulated_layers(model)["0"].gain)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"settings": {"lr": 0.2}}, "is another run: lr was 0.1 and is 0.2; choose another folder, or delete it"),
        ({"layers": {"0": "b"}}, "the config of layer '0' was 'a' and is 'b'; choose"),
        ({"weights": "y"}, "weights was 'x' and is 'y'; give the model as it was at the start, choose another folder"),
    ],
)
def test_another_run_is_told(tmp_path, change, told):
    model = network()
    checkpoint.state_file(tmp_path, IDENTITY).write((checkpoint.tensors(model, optimizer_of(model)), {}))
    with pytest.raises(RecoupError, match=told):
        checkpoint.state_file(tmp_path, {**IDENTITY, **change}).read()


def test_foreign_and_cut_off_files(tmp_path):
    path = tmp_path / checkpoint.FILE
    file = checkpoint.state_file(tmp_path, IDENTITY)
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(RecoupError, match="no training checkpoint of this recoup"):
        file.read()
    save_file({"a": torch.zeros(2)}, path, {"schema": checkpoint.SCHEMA, "progress": "{}"})
    with pytest.raises(RecoupError, match=r"cut off or foreign \('identity'\)"):
        file.read()
    model = network()
    file.write((checkpoint.tensors(model, optimizer_of(model)), {}))
    whole = path.read_bytes()
    for length in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(RecoupError, match="cut off or foreign"):
            file.read()
