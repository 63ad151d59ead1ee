"""What wrapping does besides sharding."""

from __future__ import annotations

import torch
from torch import nn

from dcft_dist.engines.prepared import WrapOptions
from dcft_dist.engines.wrap import prepare

from ..ranks import run_ranks


def small_convolution() -> None:
    """Two voxels along each axis; memory that is given back holds what shows at once if it is read."""
    torch.manual_seed(0)
    net = nn.Conv3d(96, 96, 3, padding=1, bias=False)
    image, slope = (torch.randn(1, 96, 2, 2, 2).bfloat16() for _ in range(2))
    exact = net.weight.detach().bfloat16().double().requires_grad_()
    nn.functional.conv3d(image.double(), exact, padding=1).backward(slope.double())
    prepared = prepare(net, WrapOptions("single", torch.device("cpu"), [], bf16=True), lambda w: torch.optim.SGD([w[0][1]]))
    for value in (torch.nan, 1e30, 3.0):
        rubbish = [torch.full((n,), value) for n in (10**3, 10**5, 10**6)]
        del rubbish
        net.weight.grad = None
        with prepared.computing():
            net(image).backward(slope)
        assert float((net.weight.grad - exact.grad).abs().max()) < 0.01 * float(exact.grad.abs().max())


def test_gradients_of_3d_convolutions_in_bfloat16() -> None:
    """oneDNN's are not what they should be: other numbers in each run, and now and then a NaN."""
    run_ranks(1, small_convolution)
