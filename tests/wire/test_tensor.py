"""Views of tensors as bytes: no copy, every supported dtype, no other."""

from __future__ import annotations

import pytest
import torch

from smolrun.errors import ProtocolError
from smolrun.wire.tensor import ITEM_SIZES, as_array, as_bytes, dtype_code, dtype_of, payload_of


@pytest.mark.parametrize("code", range(len(ITEM_SIZES)))
def test_every_dtype_shares_its_storage(code: int) -> None:
    dtype = dtype_of(code)
    assert dtype_code(dtype) == code
    tensor = torch.zeros(3, 2).to(dtype)
    view = as_bytes(tensor)
    assert len(view) == 6 * ITEM_SIZES[code]
    view[:] = b"\x01" * len(view)
    assert bool((tensor != 0).all())
    assert payload_of(tensor).shape == (3, 2)


def test_unsupported_tensors_are_refused() -> None:
    with pytest.raises(ProtocolError, match="complex64 does not travel"):
        payload_of(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ProtocolError, match="contiguous"):
        as_bytes(torch.zeros(4, 4).t()[1:])
    assert len(as_bytes(torch.zeros(0))) == 0


def test_numpy_is_used_only_where_it_is_fast() -> None:
    assert as_array(torch.zeros(2, dtype=torch.bfloat16)) is None
    array = as_array(torch.zeros(2, 2))
    assert array is not None and array.shape == (4,)
