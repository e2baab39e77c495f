"""Specs, limits and seeds; the folder of real data; what importing costs; the examples in the docstrings."""

import doctest
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import recoup.data
from recoup.errors import RecoupError

from .conftest import pixels


@pytest.mark.parametrize("spec", ["imagenet", "", "cifar100:/x", "Digits", ":x", "/some/folder"])
def test_unknown_specs_list_the_legal_ones(spec: str) -> None:
    with pytest.raises(RecoupError, match=r"unknown; legal are digits, cifar10:DIR, mnist:DIR, fashion-mnist:DIR, im"):
        recoup.data.load(spec)


@pytest.mark.parametrize("spec", ["cifar10", "cifar10:", "mnist", "imagefolder:", "hf", "hf:,label=x"])
def test_specs_without_a_place(spec: str) -> None:
    with pytest.raises(RecoupError, match="what follows the colon is missing"):
        recoup.data.load(spec)


def test_digits_take_nothing() -> None:
    with pytest.raises(RecoupError, match="digits comes with scikit-learn"):
        recoup.data.load("digits:/x")


def test_limit_and_seed() -> None:
    whole = recoup.data.load("digits")
    first, drawn = recoup.data.load("digits", limit=20), recoup.data.load("digits", limit=20, seed=3)
    assert torch.equal(pixels(first), pixels(whole)[:20])
    assert torch.equal(pixels(drawn), pixels(whole.subset(20, seed=3)))
    assert len(recoup.data.load("digits", limit=596)) == 596


@pytest.mark.parametrize("limit", [0, -3, 597, 1.0, True])
def test_limits_out_of_range(limit: Any) -> None:
    with pytest.raises(RecoupError, match=f"digits, test: limit of {limit!r} images: .* from 1 to 596"):
        recoup.data.load("digits", limit=limit)


def test_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECOUP_DATA", "/elsewhere")
    assert recoup.data.root() == Path("/elsewhere")
    monkeypatch.delenv("RECOUP_DATA")
    assert recoup.data.root() == Path(__file__).resolve().parents[2].parent / "shared" / "data"


def test_importing_is_light() -> None:
    heavy = "datasets", "pyarrow", "PIL", "sklearn", "pandas", "safetensors", "torchvision"
    code = f"import sys, recoup.data, recoup.models; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["augmentation", "dataset", "loading"])
def test_docstring_examples(name: str) -> None:
    failed, attempted = doctest.testmod(importlib.import_module(f"recoup.data.{name}"))
    assert attempted
    assert not failed
