"""Arrays over tensors' memory: the same elements, and a storage that may still be resized."""

import numpy as np
import pytest
import torch

from recoup.errors import RecoupError
from recoup.kernels.arrays import DTYPES, array


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (2, 3, 4)], ids=str)
def test_the_elements_are_the_tensors(dtype, shape):
    x = torch.arange(24).to(dtype)[: max(1, int(np.prod(shape)))].clone().resize_(shape)
    found = array(x)
    assert found.dtype == x.numpy().dtype
    assert found.shape == shape
    assert np.array_equal(found, x.numpy())


def test_strides_and_writing():
    x = torch.arange(12.0).view(3, 4).t()
    found = array(x[1:, ::2])
    found[0, 0] = 7
    assert x[1, 0] == 7
    assert np.array_equal(found, x[1:, ::2].numpy())


def test_a_storage_stays_resizable_and_a_gradient_is_no_obstacle():
    x = torch.ones(4, requires_grad=True)
    assert array(x).sum() == 4
    assert x.untyped_storage().resizable()
    x.untyped_storage().resize_(0)


def test_the_array_keeps_the_tensor():
    found = array(torch.arange(1000.0))
    torch.zeros(1000)
    assert found[999] == 999


@pytest.mark.parametrize("x", [torch.ones(2, dtype=torch.bfloat16), torch.ones(2, device="meta")], ids=str)
def test_what_numpy_cannot_hold_is_refused(x):
    with pytest.raises(RecoupError, match="on the CPU of a dtype that NumPy has"):
        array(x)
