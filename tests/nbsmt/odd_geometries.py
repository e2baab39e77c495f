"""Convolutions of odd geometries, in a process of its own: where an 8-bit kernel reads outside its operand, it ends.

Run by test_trust.py, or with more examples by ``python -m tests.nbsmt.odd_geometries EXAMPLES``. It prints how many of
the drawn geometries the 8-bit kernel was trusted with.
"""

import sys
import warnings

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import recoup as rc
from recoup.nbsmt import cpu, ops, reference
from recoup.nbsmt.ops import convolution
from recoup.nbsmt.trust import packed
from recoup.nbsmt.weights import quantize_weight

pairs = st.tuples(st.integers(1, 4), st.integers(1, 4))
geometries = st.fixed_dictionaries(
    {
        "groups": st.sampled_from([1, 1, 2, 3, 8]),
        "inputs": st.sampled_from([1, 1, 2, 4, 5, 16]),
        "outputs": st.sampled_from([1, 2, 3, 8]),
        "kernel": st.tuples(st.sampled_from([1, 1, 2, 3]), st.sampled_from([1, 2, 3, 5])),
        "stride": pairs,
        "padding": st.tuples(*[st.sampled_from([0, 0, 0, 1, 1, 2, 4])] * 2),
        "dilation": st.tuples(st.integers(1, 3), st.integers(1, 3)),
        "size": st.tuples(st.sampled_from([1, 1, 2, 4, 10]), st.sampled_from([1, 1, 2, 3, 12])),
        "images": st.integers(1, 3),
    }
)
trusted: list[bool] = []


def fits(g: dict) -> bool:
    """Whether there is any output."""
    reach = [d * (k - 1) + 1 for d, k in zip(g["dilation"], g["kernel"], strict=True)]
    return all(n + 2 * p >= r for n, p, r in zip(g["size"], g["padding"], reach, strict=True))


def exact(x: torch.Tensor, w: torch.Tensor, g: dict) -> torch.Tensor:
    """The convolution in float64, through im2col."""
    columns = F.unfold(x.double(), w.shape[2:], g["dilation"], g["padding"], g["stride"])
    columns = columns.unflatten(1, (g["groups"], -1))
    rows = w.double().flatten(1).unflatten(0, (g["groups"], -1))
    h = (x.shape[2] + 2 * g["padding"][0] - g["dilation"][0] * (w.shape[2] - 1) - 1) // g["stride"][0] + 1
    return torch.einsum("gok,ngkp->ngop", rows, columns).flatten(1, 2).unflatten(2, (h, -1))


@given(geometries.filter(fits), st.integers(0, 2**31))
def kernels(g: dict, seed: int) -> None:
    """The packed convolution, where there is one, and the float32 one; weights that saturate no CPU's 8-bit sums."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (g["images"], g["groups"] * g["inputs"], *g["size"]), generator=random)
    w = torch.randint(-64, 65, (g["groups"] * g["outputs"], g["inputs"], *g["kernel"]), generator=random)
    expected = exact(x, w, g)
    x = x.to(torch.uint8).contiguous(memory_format=torch.channels_last)
    w = w.to(torch.int8)
    geometry = g["stride"], g["padding"], g["dilation"], g["groups"]
    assert torch.equal(cpu.exact_convolution(x, w, *geometry, 2**23).double(), expected)
    found = packed(w, *geometry, tuple(x.shape), "drawn")
    trusted.append(found is not None)
    if found is not None:
        assert torch.equal(found(x).double(), expected)


@given(geometries.filter(fits), st.integers(0, 2**31), st.sampled_from([1, 2, 4]))
def operators(g: dict, seed: int, threads: int) -> None:
    """The operator on every backend there is, against the reference slot by slot."""
    random = torch.Generator().manual_seed(seed)
    config = rc.NBSMT(threads=threads if g["groups"] == 1 else 1)
    x = torch.randn(g["images"], g["groups"] * g["inputs"], *g["size"], generator=random).relu()
    w = torch.randn(g["groups"] * g["outputs"], g["inputs"], *g["kernel"], generator=random)
    codes, (code, scale_O) = torch.round(x / torch.tensor(0.01)).clamp(0, 255), quantize_weight(w)
    if config.threads == 1:
        sums = exact(codes, code, g)
    else:
        columns = F.unfold(codes, g["kernel"], g["dilation"], g["padding"], g["stride"])
        taps = columns.unflatten(1, (g["inputs"], -1)).permute(2, 0, 3, 1).flatten(1, 2).to(torch.uint8)
        sums = sum(reference.matmul(t, code.flatten(2)[:, :, k].t(), config).double() for k, t in enumerate(taps))
        h = exact(x[:1], w, g).shape[2]
        sums = sums.unflatten(0, (g["images"], -1)).transpose(1, 2).unflatten(2, (h, -1))
    expected = sums.float() * (scale_O * 0.01).view(1, -1, 1, 1)
    geometry = [list(g[name]) for name in ("stride", "padding", "dilation")]
    for name in ["float32"] + ["int8"] * (cpu.probe().name == "int8"):
        with ops.backend(name):
            y = convolution(x, w, None, 0.01, config.code, *geometry, g["groups"], "drawn")
        assert torch.equal(y, expected), name


def draw(examples: int) -> None:
    """Check so many geometries each way."""
    torch.set_num_threads(1)
    warnings.simplefilter("error", rc.RecoupWarning)
    bounds = settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    for check in (kernels, operators):
        bounds(check)()
    sys.stdout.write(f"{sum(trusted)} trusted of {len(trusted)}\n")


if __name__ == "__main__":
    draw(int(sys.argv[1]))
