"""Every public function with every argument wrong in turn: a RecoupError, and nothing raw from inside."""

import inspect
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import recoup as rc
from recoup import RecoupError, lba
from recoup.fields import number
from recoup.study.measures import measure_of
from recoup.wings import Card
from tests import wrong_arguments, wrong_pipelines
from tests.wrong_arguments import BATCHES, WRONG, A, B, Call, emulated, network

ROOT = Path(rc.__file__).parent
CALLS = wrong_arguments.CALLS | wrong_pipelines.CALLS
PACKAGES = (*wrong_arguments.PACKAGES, *wrong_pipelines.PACKAGES)


@pytest.mark.filterwarnings("ignore::recoup.RecoupWarning")
@pytest.mark.parametrize("name", CALLS)
def test_every_wrong_argument_is_refused_by_recoup(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    call = CALLS[name]
    if call.refused:
        with pytest.raises(RecoupError):
            call.run(**call.good())
    elif not call.costly:
        call.run(**call.good())
    good, faults = call.good(), []
    for argument in good:
        legal = call.legal.get(argument, ())
        for what, value in WRONG.items():
            if call.costly and what in legal:
                continue
            fault = _fault(call, good, argument, what, value)
            faults += [f"{argument}, {what}: {fault}"] if fault else []
            good = call.good() if fault is None or "accepted" in fault else good
    assert not faults, "\n".join(faults)


def _fault(call: Call, good: dict[str, Any], argument: str, what: str, value: Any) -> str | None:
    """The fault in how a value was taken: "" where it was refused as it should be, None where it is right."""
    try:
        call.run(**{**good, argument: value})
    except RecoupError:
        return ""
    except Exception as error:
        if isinstance(error, (RuntimeError, TypeError, ValueError)) and argument in call.torchs:
            return ""
        return f"{type(error).__name__} {error} {_place(error)}"
    return None if what in call.legal.get(argument, ()) else "accepted"


def _place(error: Exception) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(ROOT)]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def _public() -> dict[str, Any]:
    """Everything callable that the packages name as theirs, with at least one argument."""
    found: dict[str, Any] = {}
    for package in PACKAGES:
        for name in package.__all__:
            value = getattr(package, name)
            if callable(value) and not (isinstance(value, type) and issubclass(value, (Exception, Warning))):
                found.setdefault(f"{package.__name__}.{name}", value)
    return found


TRIED = {id(call.of or call.run) for call in CALLS.values()}
REST = {name: value for name, value in _public().items() if id(value) not in TRIED}


@pytest.mark.filterwarnings("ignore::recoup.RecoupWarning")
@pytest.mark.parametrize("name", REST)
def test_what_is_not_in_the_table_raises_nothing_raw_either(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever becomes public is called with all that it needs wrong at once; its own line in the table is better."""
    monkeypatch.chdir(tmp_path)
    parameters = inspect.signature(REST[name]).parameters.values()
    needed = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    faults = []
    for what, value in WRONG.items() if needed else ():
        try:
            REST[name](*[value] * len(needed))
        except (RecoupError, TypeError):
            continue
        except Exception as error:
            if isinstance(error, RuntimeError) and isinstance(REST[name], type) and issubclass(REST[name], nn.Module):
                continue  # a drop-in's constructor says what torch's says
            faults.append(f"{what}: {type(error).__name__} {error} {_place(error)}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    "call",
    [
        lambda: rc.LBA(operands=rc.Int(1)),
        lambda: rc.LBA(operands=rc.Int(8, signed=False)),
        lambda: lba.quantize_operand(torch.tensor([1e-44, -1e-44]), rc.Int(8)),
        lambda: lba.quantize_operand(A, rc.Int(1)),
        lambda: rc.LightNorm2d(4, eps=-1),
        lambda: rc.LightNorm1d(4, momentum=float("nan")),
        lambda: rc.NBSMT().replace(thread=2),
        lambda: rc.LBA.from_dict({"chunks": 2}),
        lambda: rc.Int.from_dict(None),  # type: ignore[arg-type]
        lambda: rc.Float.from_dict({}),
        lambda: number("f", "x", float("nan"), (0.0, 1.0)),
    ],
)
def test_what_would_give_silently_wrong_results_is_refused(call: Callable[[], Any]) -> None:
    with pytest.raises(RecoupError):
        call()


def test_an_operand_so_small_that_its_scale_loses_digits_is_nan_where_values_cannot_be_seen() -> None:
    mapped = torch.vmap(lambda x: lba.quantize_operand(x, rc.Int(8))[1])
    scale = mapped(torch.tensor([[1e-44, -1e-44], [127.0, 1.0]]))
    assert isinstance(scale, Tensor)
    assert scale.isnan().tolist() == [True, False]
    assert scale[1].item() == 1.0


def scaled() -> Any:
    model = nn.Sequential(nn.Linear(3, 2))
    return rc.emulate_(rc.calibrate_(model, [A.abs()], {"0": True}), rc.NBSMT(threads=2))


OPERATORS = {
    "lba": lba.LBALinear(3, 2),
    "lba.matmul": lambda a: lba.matmul(a, B, rc.LBA()),
    "nbsmt": scaled(),
    "quantize": lambda a: rc.quantize(a, rc.Int(8)),
    "lightnorm": rc.LightNorm1d(3).eval(),
}


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, in its jvp
@pytest.mark.parametrize("name", OPERATORS)
def test_tangents_that_an_operator_would_drop_are_refused(name: str) -> None:
    x = A.abs()
    with forward_ad.dual_level():
        OPERATORS[name](x)  # without a tangent it runs
        with pytest.raises(RecoupError, match=r"torch\.autograd\.grad"):
            OPERATORS[name](forward_ad.make_dual(x, torch.ones_like(x)))


def test_second_derivatives_that_would_be_zeros_are_refused() -> None:
    x = A.abs().requires_grad_()
    (first,) = torch.autograd.grad(scaled()(x).square().sum(), x, create_graph=True)
    with pytest.raises(RecoupError, match="create_graph"):
        first.sum().backward()


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, in its jvp
@pytest.mark.parametrize("layer", [lba.LBALinear(3, 2), lambda a: lba.matmul(a, B, rc.LBA())])
def test_functional_gradients_are_refused_with_the_way_that_works(layer: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(RecoupError, match=r"torch\.autograd\.grad"):
        torch.func.grad(lambda a: layer(a).sum())(A)
    with pytest.raises(RecoupError, match=r"torch\.autograd\.grad"):  # its tangents would be zeros
        torch.func.jvp(layer, (A,), (A,))


@pytest.mark.parametrize("verb", [rc.recalibrate_, rc.repair_])
def test_norms_built_under_inference_mode_are_refused_before_anything_changes(verb: Callable[..., Any]) -> None:
    with torch.inference_mode():
        model = network()
    rc.emulate_(model, rc.LBA())
    with pytest.raises(RecoupError, match="inference_mode"):
        verb(model, BATCHES)
    assert [model[i].momentum for i in (1, 4)] == [0.1, 0.1]
    assert not any(model[i].training is False for i in (1, 4))


@pytest.mark.parametrize("method", ["paired", "average", "ema"])
def test_a_norm_without_eps_is_named(method: Any) -> None:
    model = network()
    model[4].eps = 0.0
    rc.emulate_(model, rc.LBA())
    with pytest.raises(RecoupError, match=r"batch norm '4' has eps=0\.0"):
        rc.recalibrate_(model, BATCHES, method)


def test_where_warnings_are_errors_a_model_is_emulated_whole_or_not_at_all() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.LSTM(2, 2))
    classes = [type(module) for module in model.modules()]
    with pytest.warns(rc.RecoupWarning):
        rc.restore_(rc.emulate_(model, rc.LBA()))
    with pytest.raises(rc.RecoupWarning):  # the tests' warnings are errors
        rc.emulate_(model, rc.LBA())
    assert [type(module) for module in model.modules()] == classes
    assert not any("config" in vars(module) for module in model.modules())


def test_where_warnings_are_errors_repairs_stay_with_the_hardware_they_were_fitted_for() -> None:
    model = lba.correct_gain_(emulated(rc.LBA()), BATCHES)
    gains = [model[i].gain.clone() for i in (0, 3)]
    with pytest.raises(rc.RecoupWarning, match="undid gain"):
        lba.choose_chunks_(model)
    assert all(map(torch.equal, gains, [model[i].gain for i in (0, 3)]))
    assert model[0].config == rc.LBA()
    assert "gain" in str(rc.describe(model))


class Passed(nn.Module):
    """Reads its layers' weights and calls none of them."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.inner = emulated(config)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.inner[7].weight.t()


@pytest.mark.parametrize(
    ("verb", "config"),
    [(lba.correct_gain_, rc.LBA()), (rc.correct_bias_, rc.NBSMT(threads=2)), (rc.recalibrate_, rc.LBA())],
)
def test_repairs_of_what_never_runs_are_refused(verb: Callable[..., Any], config: Any) -> None:
    with pytest.raises(RecoupError, match=r"none of the model's \d+ (emulated layers|batch norms) ran"):
        verb(Passed(config), BATCHES)


def test_a_scale_that_is_none_is_refused_where_it_comes_in() -> None:
    model = scaled()
    state = model.state_dict()
    state._metadata["0"]["recoup"]["activation_scale"] = float("nan")
    with pytest.raises(RuntimeError, match=r"0\.activation_scale is nan"):  # torch's, of its own load_state_dict
        model.load_state_dict(state)
    rc.restore_(model)[0].activation_scale = -1.0
    with pytest.raises(RecoupError, match="activation scale -1"):
        rc.emulate_(model, rc.NBSMT(threads=2))


def test_cards_of_values_without_a_hash_and_measures_that_are_no_module_are_refused() -> None:
    class Loose:
        __hash__ = None  # type: ignore[assignment] -- as a dataclass that is not frozen

    with pytest.raises(RecoupError, match="frozen=True"):
        Card(config=Loose, layers={nn.Linear: lba.LBALinear})
    for path in ("no.such.module", "math"):
        with pytest.raises(RecoupError, match=f"measure '{path}'"):
            measure_of(Card(config=rc.LBA, layers={nn.Linear: lba.LBALinear}, measure=path))


@pytest.mark.parametrize("config", [rc.NBSMT(), rc.LBA(), rc.TensorCore.hopper_fp8()])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_networks_in_other_precisions_are_told_to_convert(config, dtype):
    model = nn.Sequential(nn.Linear(4, 4)).to(dtype)
    rc.calibrate_(model, [torch.rand(2, 4, dtype=dtype)], layers={"0": True})
    with pytest.raises(
        rc.RecoupError, match=rf"layer '0' .*float32 weights; got {dtype}: convert .* \.float\(\) first"
    ):
        rc.emulate_(model, config)
    assert type(model[0]) is nn.Linear
