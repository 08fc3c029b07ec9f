"""Every layout of a weight gives the product of the weight as it is."""

import pytest
import torch

from trimtab.models import packed_linear
from trimtab.models.packed_linear import Layout, PackedLinear


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_layout_changes_no_product(layout, with_bias, monkeypatch):
    monkeypatch.setattr(packed_linear, "layout_for", lambda dtype, device: layout)
    torch.manual_seed(0)
    weights = [torch.randn(24, 16), torch.randn(8, 16)]
    first_bias = torch.randn(24) if with_bias else torch.zeros(24)
    biases = [first_bias if with_bias else None, None]
    x = torch.randn(5, 16)
    expected = x.double() @ torch.cat(weights).double().T + torch.cat([first_bias, torch.zeros(8)])
    torch.testing.assert_close(PackedLinear(weights, biases)(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_in_blocks_a_row_has_the_same_bits_in_any_company():
    torch.manual_seed(0)
    linear = PackedLinear([torch.randn(24, 16)], [None], block=4)
    x = torch.randn(12, 16)
    together = linear(x)
    assert linear.rows_for(5) == 8 and linear.rows_for(8) == 8
    for start in range(0, 12, 4):
        assert torch.equal(linear(x[start : start + 4]), together[start : start + 4])
