"""Packets as messages: what a header tells is what was sent, and members lie where kernels want them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recoup.errors import RecoupError
from recoup.pipeline.packets import (
    ALIGNMENT,
    DTYPES,
    MEMBERS,
    announced,
    header,
    kinds_of,
    length,
    members,
    refuse_others,
)

SHAPES = st.lists(st.integers(0, 5), max_size=4).map(torch.Size)
KINDS = st.lists(st.tuples(st.sampled_from(DTYPES), SHAPES), max_size=MEMBERS)


@given(KINDS)
def test_a_header_tells_what_a_message_holds(kinds):
    assert announced(header(kinds)) == kinds
    message = torch.zeros(length(kinds), dtype=torch.uint8)
    packet = members(message, kinds)
    assert kinds_of(packet) == kinds
    assert all(x.storage_offset() * x.element_size() % ALIGNMENT == 0 for x in packet)
    for x in packet:
        assert not x.any()  # nothing of another member
        x.fill_(1)
    assert sum(x.numel() * x.element_size() for x in packet) <= length(kinds)


def test_what_cannot_be_told_is_refused():
    with pytest.raises(RecoupError, match="up to 16 tensors of up to 8 dimensions"):
        header([(torch.float32, torch.Size([1]))] * 17)
    with pytest.raises(RecoupError, match="complex64"):
        header([(torch.complex64, torch.Size([1]))])
    one, two = ([(torch.float32, torch.Size([n]))] for n in (1, 2))
    refuse_others(one, list(one), 3)
    with pytest.raises(RecoupError, match=r"rank 3 would send torch.float32 \[2\], unlike the packets before"):
        refuse_others(two, one, 3)
