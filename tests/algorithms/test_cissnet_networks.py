"""CiSS-Net's networks: the part that is kept gives the numbers of the plain form, and maps are encoded as described."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from raysseg.algorithms.cissnet.networks import BaseNet, BiasNet, ContextNet, PyramidEncoder, SplitConv2d


def bias_net(dropout: float = 0.0) -> BiasNet:
    torch.manual_seed(0)
    net = BiasNet(6, PyramidEncoder(4, 8, 4), 16, 3, 4, dropout)
    assert not net.last.weight.any(), "S-Net begins as the Base Net"
    nn.init.normal_(net.last.weight)
    return net


def test_a_split_convolution_is_the_plain_one_of_the_stacked_maps() -> None:
    torch.manual_seed(0)
    split = SplitConv2d(5, 3, 7).double()
    torch.manual_seed(0)
    plain = nn.Conv2d(8, 7, 3, padding=1, bias=False).double()
    fixed, varying = torch.randn(2, 5, 6, 9).double(), torch.randn(3, 2, 3, 6, 9).double()
    found = split(split.prepare(fixed), varying.flatten(0, 1))
    expected = torch.cat([plain(torch.cat([fixed, step], 1)) for step in varying])
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(split.convolution.weight.grad, plain.weight.grad)


def test_all_steps_at_once_are_the_steps_one_by_one() -> None:
    net = bias_net().double()
    features = torch.randn(2, 6, 7, 9).double()
    contexts = torch.randint(0, 4, (3, 2, 7, 9))
    prepared = net.prepare(features)
    at_once = net(prepared, contexts.flatten(0, 1)).unflatten(0, (3, 2))
    for step in range(3):
        torch.testing.assert_close(at_once[step], net(net.prepare(features), contexts[step]))
    assert at_once.shape == (3, 2, 3, 7, 9)


def test_what_an_encoder_makes_of_a_map_by_hand() -> None:
    torch.manual_seed(0)
    encoder = PyramidEncoder(3, 4, 2, bins=(1, 2)).double()
    maps = torch.randint(0, 4, (2, 6, 8))
    found = encoder(maps)
    assert found.shape == (2, encoder.channels, 6, 8) == (2, 3 + 2 * 4, 6, 8)
    hot = np.stack([(maps.numpy() == k) for k in range(3)], 1).astype(float)
    np.testing.assert_array_equal(found[:, :3].detach(), hot)
    assert (hot.sum(1) == (maps.numpy() < 3)).all(), "a value beyond the classes is 0 everywhere"
    for branch, cells, first in zip(encoder.branches, (1, 2), (3, 7), strict=True):
        means = hot.reshape(2, 3, cells, 6 // cells, cells, 8 // cells).mean((3, 5))
        pooled = branch(torch.tensor(means))
        expected = F.interpolate(pooled, size=(6, 8), mode="bilinear", align_corners=False)
        torch.testing.assert_close(found[:, first : first + 4], expected)


def test_heads_have_their_shapes_and_values_no_bias() -> None:
    net = ContextNet(6, PyramidEncoder(4, 8, 4), 16, 4)
    logits, values = net(net.prepare(torch.randn(2, 6, 5, 7)), torch.randint(0, 4, (4, 5, 7)))
    assert (logits.shape, values.shape) == ((4, 2, 5, 7), (4, 5, 7))
    assert net.policy.bias is not None
    assert net.value.bias is None
    assert BaseNet(6, 16, 3, 4, 0.1)(torch.randn(2, 6, 5, 7)).shape == (2, 3, 5, 7)


def test_dropout_works_in_training_alone() -> None:
    net = bias_net(dropout=0.5)
    prepared, contexts = net.prepare(torch.randn(1, 6, 5, 7)), torch.randint(0, 4, (1, 5, 7))
    assert not torch.equal(net(prepared, contexts), net(prepared, contexts))
    net.eval()
    assert torch.equal(net(prepared, contexts), net(prepared, contexts))


def test_at_the_papers_sizes_for_ade20k_the_networks_have_the_papers_sizes() -> None:
    with torch.device("meta"):
        net = ContextNet(4096, PyramidEncoder(151, 256, 16), 512, 16)
    first = net.trunk.first.convolution.weight
    assert tuple(first.shape) == (512, 4096 + 151 + 4 * 256, 3, 3)
    assert (
        sum(isinstance(part, nn.GroupNorm) and part.num_channels // part.num_groups == 16 for part in net.modules())
        == 8
    )


@pytest.mark.parametrize("steps", [1, 3])
def test_gradients_reach_features_of_every_step(steps: int) -> None:
    net = bias_net().double()
    features, contexts = torch.randn(2, 6, 5, 7).double(), torch.randint(0, 4, (steps, 2, 5, 7))

    def gradient(of_steps: torch.Tensor) -> torch.Tensor:
        leaf = features.clone().requires_grad_()
        net(net.prepare(leaf), of_steps.flatten(0, 1)).square().sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    alone = [gradient(contexts[step : step + 1]) for step in range(steps)]
    assert all(one.abs().sum() > 0 for one in alone)
    torch.testing.assert_close(gradient(contexts), torch.stack(alone).sum(0))
    assert all(parameter.grad is not None for parameter in net.parameters())
