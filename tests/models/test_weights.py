"""Weights files: what fits is copied exactly; what does not is refused, and leaves the model as it was."""

import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import recoup
from recoup.errors import RecoupError
from recoup.models import digits_net, load_weights_

Weights = dict[str, Tensor]


def filled(seed: int = 1) -> nn.Module:
    """A network whose every parameter and buffer differs from a fresh one."""
    model = digits_net()
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        value.copy_(torch.full((), 7) if name.endswith("tracked") else torch.rand(value.shape, generator=generator))
    return model


def same(model: nn.Module, weights: Weights) -> bool:
    own = model.state_dict()
    return own.keys() == weights.keys() and all(torch.equal(own[name], weights[name]) for name in own)


def prefixed(prefix: str) -> Callable[[Weights], Any]:
    return lambda weights: {prefix + name: tensor for name, tensor in weights.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        dict,
        lambda weights: {"state_dict": weights, "epoch": 3},
        lambda weights: {"model": weights, "optimizer": {"state": {}}},
        lambda weights: {"model_state_dict": weights},
        lambda weights: {"net": weights, "acc": 0.9},
        lambda weights: {"model": {"state_dict": weights}},
        prefixed("module."),
        prefixed("_orig_mod."),
        prefixed("model."),
        prefixed("module._orig_mod."),
        prefixed("_orig_mod.module."),
        lambda weights: {"state_dict": prefixed("module.")(weights)},
        lambda weights: {
            name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in weights.items()
        },
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_layouts(tmp_path: Path, wrap: Callable[[Weights], Any], zipped: bool) -> None:
    weights = filled().state_dict()
    torch.save(wrap(weights), tmp_path / "w.th", _use_new_zipfile_serialization=zipped)
    model = digits_net()
    assert load_weights_(model, tmp_path / "w.th") is model
    assert same(model, weights)


@pytest.mark.parametrize(
    ("first", "second"),
    [("state_dict", "state_dict_ema"), ("model", "model_ema"), ("model", "ema"), ("state_dict", "model")],
)
def test_of_several_state_dicts_the_one_that_is_named(tmp_path: Path, first: str, second: str) -> None:
    one, other = filled(1).state_dict(), filled(2).state_dict()
    path = tmp_path / "last.pth.tar"
    torch.save({"epoch": 3, second: other, first: one, "optimizer": {"state": {}}}, path)
    model = digits_net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RecoupError) as refused:
        load_weights_(model, path)
    assert f"several state dicts that differ, under {first}, {second}: say which: {path}#{first} or " in str(
        refused.value
    )
    assert ("timm's validate.py takes with --use-ema" in str(refused.value)) == ("ema" in second)
    assert same(model, before)
    assert same(load_weights_(model, f"{path}#{second}"), other)
    assert same(load_weights_(model, Path(f"{path}#{first}")), one)
    with pytest.raises(RecoupError, match=f"no weights under 'optimizer_'; it holds them under {second}, {first}$"):
        load_weights_(model, f"{path}#optimizer_")
    torch.save({first: one, second: dict(one)}, path)
    assert same(load_weights_(model, path), one)


def test_state_dicts_are_the_same_if_their_bits_are(tmp_path: Path) -> None:
    """Two with the same NaN are one; two zeros of other signs are not."""
    weights = filled().state_dict()
    name = next(name for name, tensor in weights.items() if tensor.dim())
    for value, other, alike in ((torch.nan, torch.nan, True), (0.0, -0.0, False)):
        both = [{n: tensor.clone() for n, tensor in weights.items()} for _ in range(2)]
        for state, number in zip(both, (value, other), strict=True):
            state[name].flatten()[0] = number
        torch.save({"model": both[0], "model_ema": both[1]}, tmp_path / "w.pt")
        if alike:
            model = load_weights_(digits_net(), tmp_path / "w.pt")
            assert model.state_dict()[name].isnan().any()
        else:
            with pytest.raises(RecoupError, match="several state dicts that differ"):
                load_weights_(digits_net(), tmp_path / "w.pt")


@pytest.mark.parametrize("path", ["folder#x/a.pt", "none.pt#model", "folder#model"])
def test_what_is_not_there_is_named_as_it_was_asked_for(tmp_path: Path, path: str) -> None:
    (tmp_path / "folder").mkdir()
    file, _, key = path.partition("#")
    told = f"{tmp_path / path}: no such file, nor a file {tmp_path / file} to take {key!r} from"
    with pytest.raises(RecoupError, match=re.escape(told)):
        load_weights_(digits_net(), tmp_path / path)


def test_what_is_called_like_a_nest_and_holds_no_weights(tmp_path: Path) -> None:
    weights = filled().state_dict()
    torch.save({"state_dict": {"depth": 3}, "model": weights, "ema": {"decay": 0.9}}, tmp_path / "w.pt")
    assert same(load_weights_(digits_net(), tmp_path / "w.pt"), weights)
    scalars = {"decay": torch.tensor(0.99), "num_updates": torch.tensor([3])}
    torch.save({"ema": scalars, "model": weights}, tmp_path / "w.pt")
    assert same(load_weights_(digits_net(), tmp_path / "w.pt"), weights)
    torch.save({"state_dict_ema": weights}, tmp_path / "w.pt")
    assert same(load_weights_(digits_net(), tmp_path / "w.pt"), weights)
    torch.save(weights, tmp_path / "a#b")
    assert same(load_weights_(digits_net(), tmp_path / "a#b"), weights)
    with pytest.raises(RecoupError, match="no weights under 'ema'; it holds them under no key: leave #KEY out"):
        load_weights_(digits_net(), f"{tmp_path / 'a#b'}#ema")


def test_torchs_averaged_model(tmp_path: Path) -> None:
    model = filled()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    torch.save({"model": filled(2).state_dict(), "model_ema": averaged.state_dict()}, tmp_path / "w.pt")
    assert same(load_weights_(digits_net(), f"{tmp_path / 'w.pt'}#model_ema"), model.state_dict())


def test_safetensors(tmp_path: Path) -> None:
    weights = filled().state_dict()
    save_file(prefixed("module.")(weights), tmp_path / "w.safetensors")
    assert same(load_weights_(digits_net(), str(tmp_path / "w.safetensors")), weights)


def test_a_prefix_of_the_models_own_stays(tmp_path: Path) -> None:
    torch.save({"module.weight": torch.ones(2, 2), "module.bias": torch.ones(2)}, tmp_path / "w.pt")
    model = nn.ModuleDict({"module": nn.Linear(2, 2)})
    load_weights_(model, tmp_path / "w.pt")
    assert torch.equal(model["module"].bias, torch.ones(2))  # type: ignore[arg-type]


def test_old_files_without_num_batches_tracked(tmp_path: Path) -> None:
    weights = {name: value for name, value in filled().state_dict().items() if not name.endswith("tracked")}
    torch.save(weights, tmp_path / "old.pt")
    model = filled(seed=2)
    load_weights_(model, tmp_path / "old.pt")
    own = model.state_dict()
    assert all(torch.equal(own[name], weights[name]) for name in weights)
    assert int(own["features.1.num_batches_tracked"]) == 7


def without(*names: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: tensor for name, tensor in weights.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("classifier.bias"), "does not fit DigitsNet: missing: classifier.bias$"),
        (lambda weights: weights | {"extra": torch.ones(1)}, "unexpected: extra$"),
        (lambda weights: weights | {"classifier.weight": torch.ones(100, 64)},
         r"shape: classifier.weight is \[100, 64\] in the file and \[10, 64\] in the model$"),
        (lambda weights: weights | {"classifier.bias": torch.ones(10, dtype=torch.int8)},
         "type: classifier.bias is torch.int8 in the file and torch.float32 in the model"),
        (lambda weights: weights | {"classifier.bias": torch.ones(10, dtype=torch.complex64)}, "type: classifier.bias"),
        (lambda weights: {"other.more." + name: tensor for name, tensor in weights.items()},
         r"missing: features.0.weight, .* and 18 more; unexpected: other.more.features.0.weight, .* and 22 more"),
        (lambda _: {}, "holds an empty dict, no state dict"),
        (lambda _: torch.ones(3), "holds a Tensor, no state dict"),
        (lambda weights: {"weights": weights}, "no plain state dict: weights not tensors; they may lie under"),
        (lambda weights: weights | {"epoch": 3}, "no plain state dict: epoch not tensors"),
    ],
)  # fmt: skip
def test_refuses_and_leaves_the_model(tmp_path: Path, change: Callable[[Weights], Any], message: str) -> None:
    torch.save(change(dict(filled().state_dict())), tmp_path / "w.pt")
    model = digits_net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RecoupError, match=message):
        load_weights_(model, tmp_path / "w.pt")
    assert same(model, before)


def test_a_layer_that_refuses_late_leaves_the_model(tmp_path: Path) -> None:
    class Stubborn(nn.Linear):
        refuses = True

        def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
            super()._load_from_state_dict(*args, **kwargs)
            if self.refuses:
                self.refuses = False
                raise RuntimeError("I would rather not")

    model = nn.Sequential(nn.Linear(2, 2), Stubborn(2, 2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save({name: torch.ones_like(tensor) for name, tensor in before.items()}, tmp_path / "w.pt")
    with pytest.raises(RecoupError, match="does not fit Sequential: I would rather not"):
        load_weights_(model, tmp_path / "w.pt")
    assert same(model, before)


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_code_is_refused_and_never_runs(tmp_path: Path, kind: str) -> None:
    path, proof = tmp_path / "w.pt", tmp_path / "owned"
    content = {"state_dict": {"a": torch.ones(1)}, "trap": Trap(proof)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(RecoupError, match=r"w\.pt refused: .* a weights file may hold tensors only"):
        load_weights_(digits_net(), path)
    assert not proof.exists()
    with warnings.catch_warnings():  # the trap does work on whoever trusts it
        warnings.simplefilter("ignore")
        if kind == "pickle":
            pickle.loads(path.read_bytes())
        else:
            torch.load(path, weights_only=False)
    assert proof.exists()


def test_a_whole_module_is_refused(tmp_path: Path) -> None:
    torch.save(digits_net(), tmp_path / "w.pt")
    with pytest.raises(RecoupError, match=r"refused: reading it would import and run recoup\.models"):
        load_weights_(digits_net(), tmp_path / "w.pt")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_truncated_checkpoints(tmp_path: Path, keep: float, zipped: bool) -> None:
    path = tmp_path / "w.th"
    torch.save(filled().state_dict(), path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(RecoupError, match=r"w\.th "):
        load_weights_(digits_net(), path)


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, 0.99])
def test_truncated_safetensors(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "w.safetensors"
    save_file(filled().state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(RecoupError, match=r"w\.safetensors cannot be read as safetensors; truncated"):
        load_weights_(digits_net(), path)


@pytest.mark.parametrize(
    "content", [b"hello, this is text\n" * 20, bytes(range(256)) * 20, b"\x89PNG\r\n\x1a\n" + bytes(99)]
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".bin"])
def test_foreign_files(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(RecoupError, match=rf"w\{suffix} cannot be read as"):
        load_weights_(digits_net(), path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(RecoupError, match=r"none\.pt: no such file"):
        load_weights_(digits_net(), tmp_path / "none.pt")
    with pytest.raises(RecoupError, match="is a folder; give the weights file itself"):
        load_weights_(digits_net(), tmp_path)


def test_a_converted_checkpoint_keeps_its_activation_scales(tmp_path: Path) -> None:
    def emulated(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = digits_net().eval()
        recoup.calibrate_(model, [torch.rand(16, 1, 8, 8)])
        return recoup.emulate_(model, recoup.NBSMT(threads=4))

    first, second, x = emulated(0), emulated(1), torch.rand(4, 1, 8, 8)
    path = tmp_path / "converted.pt"
    torch.save({"state_dict": nn.DataParallel(first).state_dict()}, path)
    assert not torch.equal(first(x), second(x))
    load_weights_(second, path)
    assert torch.equal(first(x), second(x))
