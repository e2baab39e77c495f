"""What the array's cycles leave out is listed, with multiply-accumulates counted by hand or by running loops."""

import json
import math
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops.while_loop import while_loop
from torch.nn.attention.flex_attention import flex_attention

import recoup as rc
from recoup.models.attention import AttentionProducts
from recoup.nbsmt import cycles
from recoup.network.emulated import running
from tests.networks import images, small_net


class Network(nn.Module):
    """A module between two linear layers that see rows of 8."""

    def __init__(self, inner: nn.Module, call=None) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(8, 8), inner, nn.Linear(8, 2)
        self.call = call or (lambda module, x: module(x))

    def forward(self, x: Tensor) -> Tensor:
        y = self.call(self.inner, self.first(x))
        return self.last(y[0] if isinstance(y, tuple) else y)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Borrowed(nn.Module):
    """Uses the weight of a layer that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.head.weight)


def as_image(module, x):
    return module(x.transpose(1, 2)).transpose(1, 2)


def packed(module, x):
    y, _ = module(nn.utils.rnn.pack_padded_sequence(x, torch.tensor([3, 5]), True, enforce_sorted=False))
    return nn.utils.rnn.pad_packed_sequence(y, batch_first=True)[0]


B, L, E = 2, 5, 8
CASES = [
    (nn.LSTM(8, 8, batch_first=True), None, B * L * 4 * 8 * (8 + 8)),
    (nn.GRU(8, 4, 2, bidirectional=True, batch_first=True), None, B * L * 2 * 2 * 3 * 4 * (8 + 4)),
    (nn.LSTM(8, 16, proj_size=8, batch_first=True), None, B * L * (4 * 16 * (8 + 8) + 16 * 8)),
    (nn.RNN(8, 8, batch_first=True), packed, 8 * 8 * (8 + 8)),
    (nn.LSTMCell(8, 8), lambda m, x: torch.stack([m(x[:, t])[0] for t in range(L)], 1), B * L * 4 * 8 * 16),
    (nn.Bilinear(8, 8, 8), lambda m, x: m(x, x), B * L * 8 * 8 * 8),
    (nn.ConvTranspose1d(8, 8, 3, padding=1), as_image, B * L * 8 * 8 * 3),
    (nn.ConvTranspose1d(8, 8, 3, padding=1, groups=4), as_image, B * L * 8 * 2 * 3),
    (nn.Conv3d(8, 8, (1, 1, 3), padding=(0, 0, 1)), lambda m, x: m(x.mT[:, :, None, None])[:, :, 0, 0].mT, B * L * 192),
    (nn.MultiheadAttention(8, 2, batch_first=True), lambda m, x: m(x, x, x), B * (4 * L * E * E + 2 * L * L * E)),
    (
        nn.MultiheadAttention(8, 2, kdim=3, vdim=4),
        lambda m, x: m(x.transpose(0, 1), torch.ones(6, B, 3), value=torch.ones(6, B, 4))[0].transpose(0, 1),
        B * (2 * L * E * E + 6 * E * (3 + 4) + 2 * L * 6 * E),
    ),
    (AttentionProducts(), lambda m, x: m(x, x, x), B * 2 * L * L * E),
    (Own(), None, None),
]


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize(("inner", "call", "macs"), CASES, ids=[type(case[0]).__name__ for case in CASES])
def test_what_multiplies_beside_the_array_is_listed(inner, call, macs):
    cost = cycles(Network(inner, call), torch.rand(B, L, 8))
    assert [layer.name for layer in cost.layers] == ["first", "last"]
    (row,) = cost.uncounted
    calls = L if isinstance(inner, nn.LSTMCell) else 1
    assert (row.name, row.calls, row.macs) == ("inner", calls, macs)
    assert row.kind == f"{type(inner).__module__}.{type(inner).__name__}"
    assert cost.uncounted_macs == macs
    assert json.loads(json.dumps(cost.to_dict()))["uncounted"] == [row.to_dict()]


def test_a_transposed_convolution_by_running_loops():
    layer, x = nn.ConvTranspose2d(4, 6, (2, 3), stride=2, groups=2, bias=False), torch.rand(2, 4, 3, 5)
    cost = cycles(nn.Sequential(nn.Conv2d(4, 4, 1), layer), x)
    products = 0
    for _ in range(2 * 3 * 5):  # images and pixels
        for channel in range(4):
            products += layer.weight[channel].numel()
    assert cost.uncounted_macs == products


def test_an_lstm_before_a_linear_layer():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.fc = nn.LSTM(12, 32, 2, batch_first=True), nn.Linear(32, 17)

        def forward(self, x):
            return self.fc(self.rnn(x)[0][:, -1])

    cost = cycles(Net(), (20, 12))
    assert cost.macs == 32 * 17
    assert cost.uncounted_macs == 20 * 4 * 32 * (12 + 32 + 32 + 32)


def test_weights_used_by_a_functional_call_are_listed_where_they_are_used():
    cost = cycles(Network(Borrowed()), torch.rand(B, L, 8))
    assert [(row.name, row.calls, row.macs) for row in cost.uncounted] == [("inner", 1, B * L * 8 * 8)]


class Buffered(nn.Module):
    """As layers of quantised checkpoints are: no parameter."""

    def __init__(self):
        super().__init__()
        self.register_buffer("kernel", torch.randn(8, 8))

    def forward(self, x):
        return F.linear(x, self.kernel)


class Packed(nn.Module):
    """Eight codes of four bits in a word, as GPTQ packs them."""

    def __init__(self):
        super().__init__()
        self.qweight: Tensor
        self.scales: Tensor
        self.register_buffer("qweight", torch.randint(0, 2**31 - 1, (8, 2), dtype=torch.int32))
        self.register_buffer("scales", torch.full((1, 8), 0.1))

    def forward(self, x):
        codes = (self.qweight[..., None] >> torch.arange(0, 16, 4)) & 15
        return torch.einsum("bli,io->blo", x, (codes.flatten(1) - 8) * self.scales)


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = torch.randn(8, 8)

    def forward(self, x):
        return torch.matmul(x, self.matrix)


class Dynamic(nn.Module):
    """A layer of torch's own quantisation."""

    def __init__(self):
        super().__init__()
        self.inner = torch.ao.nn.quantized.dynamic.Linear(8, 8)

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize(("kind", "name"), [(Buffered, "inner"), (Packed, "inner"), (Bare, "inner")])
def test_weights_that_are_no_parameters_multiply_too(kind, name):
    model = Network(kind())
    with pytest.warns(
        rc.RecoupWarning, match=rf"1 layers left in float, and may multiply .*: {name} \(.*\.{kind.__name__}"
    ):
        rc.emulate_(model, rc.LBA())
    assert [(row.name, row.calls, row.macs) for row in cycles(model, torch.rand(B, L, 8)).uncounted] == [
        (name, 1, None)
    ]


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_what_torch_packed_multiplies_too():
    model = Network(Dynamic())
    with pytest.warns(rc.RecoupWarning, match=r"may multiply .*: inner\.inner\._packed_params \("):
        rc.emulate_(model, rc.LBA())
    assert [row.name for row in cycles(model, torch.rand(B, L, 8)).uncounted] == ["inner.inner"]


class Data(nn.Module):
    """Buffers and parameters that are no weights."""

    def __init__(self):
        super().__init__()
        for name in (
            "attn_mask",
            "bias",
            "cos_cached",
            "pos_embed",
            "anchor_grid",
            "relative_position_index",
            "k_cache",
            "pe",
            "positional_encoding",
            "queue",
            "prior_boxes",
            "feature_mean",
        ):
            self.register_buffer(name, torch.rand(8, 8))
        for name in ("pe", "pes", "abs_pe", "posenc", "pos_encoding", "encodings", "positions", "pos_emb", "rotary_pe"):
            self.register_buffer(f"fixed_{name}", torch.rand(8, 8))
            self.register_parameter(f"learned_{name}", nn.Parameter(torch.rand(8, 8)))
        self.pe_too = self.encoding = self.posemb = nn.Parameter(torch.rand(8, 8))
        self.register_buffer("mean", torch.rand(1, 8))
        self.register_buffer("places", torch.zeros(8, 8, dtype=torch.int64))
        self.register_buffer("seen", torch.zeros(8, 8, dtype=torch.bool))
        self.register_buffer("nothing", None)

    def forward(self, x):
        return x + self.mean


@pytest.mark.filterwarnings("error")
def test_masks_indices_and_tables_do_not_multiply():
    model = rc.emulate_(Network(Data()), rc.LBA())
    assert cycles(model, torch.rand(B, L, 8)).uncounted == ()


FUNCTIONAL = [
    (lambda x: x @ x.mT @ x, B * 2 * L * L * 8),
    (lambda x: torch.einsum("bij,bkj->bik", x, x), B * L * L * 8),
    (lambda x: F.linear(x, torch.ones(3, 8)), B * L * 8 * 3),
    (lambda x: F.conv1d(x.mT, torch.ones(6, 4, 3), groups=2), B * (L - 2) * 6 * 4 * 3),
    (lambda x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None]), None),  # torch does not count it
]


class Calls(nn.Module):
    def __init__(self, does):
        super().__init__()
        self.does = does

    def forward(self, x):
        self.does(x)
        return x


@pytest.mark.parametrize(("does", "macs"), FUNCTIONAL)
@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_products_of_functional_calls_are_listed_with_their_module(does, macs, around):
    model = Network(Calls(does), lambda inner, x: inner(inner(x)))
    with around():
        (row,) = cycles(model, torch.rand(B, L, 8)).uncounted
    assert (row.name, row.calls, row.macs) == ("inner", 2, macs and 2 * macs)


W = torch.eye(8)
FUNCTIONS = {
    "branch": (lambda x: torch.cond(x.sum() > 1e9, lambda x: x @ W, lambda x: x @ W @ W, (x,)), 2 * B * L * 64),
    "loop": (
        lambda x: while_loop(lambda i, _: i < 3, lambda i, x: (i + 1, x @ W), (torch.tensor(0), x)),
        3 * B * L * 64,
    ),
    "attention": (lambda x: flex_attention(x[:, None], x[:, None], x[:, None]), B * 2 * L * L * 8),
}


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("does", FUNCTIONS)
@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_products_of_operators_of_functions_are_listed(does, around):
    """Of a branch the one that ran, of a loop every round."""
    call, macs = FUNCTIONS[does]
    with around():
        (row,) = cycles(Network(Calls(call)), torch.rand(B, L, 8)).uncounted
    assert (row.name, row.calls, row.macs) == ("inner", 1, macs)


def test_layers_in_a_branch_that_did_not_run_are_listed():
    class Either(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return torch.cond(x.sum() > 1e9, self.one, self.other, (x,))

    found = cycles(Network(Either()), torch.rand(B, L, 8))
    assert [row.name for row in found.uncounted] == ["inner.one"]
    assert [row.name for row in found.layers] == ["first", "inner.other", "last"]


def test_a_process_that_has_compiled_nothing_yet_counts_them_too():
    lines = [
        "import torch, recoup as rc",
        "from tests.network.test_uncounted import FUNCTIONS, Calls, Network",
        "call, macs = FUNCTIONS['attention']",
        "(row,) = rc.nbsmt.cycles(Network(Calls(call)), torch.rand(2, 5, 8)).uncounted",
        "assert row.macs == macs",
    ]
    ran = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_products_of_an_emulated_layer_in_float_are_its_own():
    model = rc.emulate_(Network(nn.Identity()), rc.LBA())
    with running(model, "baseline"):
        assert cycles(model, torch.rand(B, L, 8)).uncounted == ()


def test_emulated_layers_that_never_run_are_said():
    with pytest.warns(rc.RecoupWarning, match=r"products in their own forward.*: inner \(Borrowed\)"):
        model = rc.emulate_(Network(Borrowed()), rc.LBA())
    with pytest.warns(rc.RecoupWarning, match="cycles: 1 of 3 emulated layers never ran: inner.head"):
        cycles(model, torch.rand(B, L, 8))


def test_a_network_of_layers_alone_has_nothing_uncounted():
    cost = cycles(small_net(), images(2))
    assert cost.uncounted == ()
    assert cost.uncounted_macs == 0
    assert math.isclose(cost.speedup, 1.0)


@pytest.mark.parametrize("hardware", [rc.LBA.m7e4(), rc.TensorCore.hopper_bf16()])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_of_transformers_runs_as_often_on_hardware_as_in_float(hardware, implementation):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        attn_implementation=implementation,
    )
    model = transformers.ViTForImageClassification(config).eval()
    in_float = rc.cost(model, None, (3, 8, 8)).uncounted
    rc.emulate_(model, hardware)
    found = rc.cost(model, None, (3, 8, 8)).uncounted
    assert [(row.name, row.kind, row.calls) for row in found] == [(row.name, row.kind, row.calls) for row in in_float]
    assert [row.calls for row in found] == [1, 1]
    with running(model, "float"):
        assert rc.cost(model, None, (3, 8, 8)).uncounted == in_float


def test_scripted_modules_take_no_hooks_and_their_products_are_those_of_who_calls_them():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripting is deprecated
        scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 8)))
    found = rc.cost(nn.Sequential(nn.Linear(4, 4), scripted), None, (4,)).uncounted
    assert [(one.name, one.calls, one.macs) for one in found] == [("", 1, 32)]


def test_torch_counts_no_products_that_are_counted_already(monkeypatch):
    """Its formulas take as long as all else of a survey of small layers."""
    from torch.utils.flop_counter import flop_registry

    asked = []
    plain = flop_registry[torch.ops.aten.addmm]
    monkeypatch.setitem(flop_registry, torch.ops.aten.addmm, lambda *a, **k: asked.append(a) or plain(*a, **k))
    rc.cost(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), None, (4,))
    assert not asked

    class Beside(nn.Linear):
        def forward(self, input):  # noqa: A002 -- as torch names it
            return super().forward(input) + torch.addmm(input, input, input)

    class Around(nn.Module):
        def forward(self, x):
            return torch.addmm(x, x, x)

    assert [one.macs for one in rc.cost(nn.Sequential(Beside(4, 4), Around()), None, torch.ones(4, 4)).uncounted] == [
        64
    ]
    assert len(asked) == 1
