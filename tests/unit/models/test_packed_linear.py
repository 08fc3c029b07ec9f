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
