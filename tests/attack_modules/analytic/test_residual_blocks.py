import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from attack_modules.analytic.residual_blocks import BlockMaps, errors_before, maps_before, reads

SIZES = [2, 1]


def block_of(channels: int, planes: int, stride: int) -> BasicBlock:
    """A block with other weights and biases of BatchNorm than those it begins with."""
    torch.manual_seed(0)
    down = nn.Sequential(nn.Conv2d(channels, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))
    block = BasicBlock(channels, planes, stride, down if stride > 1 else None)
    for layer in block.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.3)
    return block


def step_of(block: BasicBlock, maps: Tensor) -> tuple[BlockMaps, BlockMaps, dict[str, Tensor], dict[str, Tensor]]:
    """What is behind and in front of a block, its gradients, and the mean variances of what BatchNorm got."""
    variances: dict[str, Tensor] = {}
    share = 0.0

    def note(name: str) -> object:
        def add(_: nn.Module, inputs: tuple[Tensor]) -> None:
            variances[name] = variances.get(name, 0.0) + share * inputs[0].transpose(0, 1).flatten(1).var(1).detach()

        return add

    for name, layer in block.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_pre_hook(note(name))
    outputs = []
    maps = maps.requires_grad_()
    for part in maps.split(SIZES):
        share = len(part) / len(maps)
        outputs.append(block(part))
    behind = torch.cat(outputs)
    errors = torch.randn_like(behind)
    parameters = dict(block.named_parameters())
    before, *gradients = torch.autograd.grad((behind * errors).sum(), [maps, *parameters.values()])
    gradients = dict(zip(parameters, gradients, strict=True))
    return BlockMaps(behind.detach(), errors, 0.0), BlockMaps(maps.detach(), before, 0.0), gradients, variances


@pytest.mark.parametrize("stride", [1, 2])
def test_maps_and_errors_in_front_of_a_block(stride: int) -> None:
    """Of two peers, of whom one holds two images."""
    block = block_of(16, 16 * stride, stride)
    size = 2 + 2 * stride
    behind, before, gradients, variances = step_of(block, torch.rand(3, 16, size, size).sub(0.3).relu())
    assert reads(block, behind.maps)
    assert not reads(block, behind.maps.repeat(10, 1, 1, 1))
    assert not reads(nn.Identity(), behind.maps)
    found = maps_before(block, behind, gradients, variances, SIZES, before.maps.shape[1:])
    assert found.residual < 0.03
    centres = torch.zeros(size, size)
    centres[::stride, ::stride] = stride > 1  # a constant of each peer is not seen there
    off = (found.maps - before.maps).flatten(2)
    if stride > 1:
        unseen = (centres / centres.norm()).flatten()
        off = off - (off @ unseen)[..., None] * unseen
    assert off.norm() < 0.05 * before.maps.norm()
    assert (found.errors - before.errors).norm() < 0.05 * before.errors.norm()


def test_a_gradient_of_other_maps_is_not_explained() -> None:
    block = block_of(16, 16, 1)
    behind, before, gradients, variances = step_of(block, torch.rand(3, 16, 4, 4).sub(0.3).relu())
    gradients["conv2.weight"] = torch.randn_like(gradients["conv2.weight"])
    found = maps_before(block, behind, gradients, variances, SIZES, before.maps.shape[1:])
    assert found.residual > 0.3


def test_errors_in_front_of_a_convolution_follow_from_its_gradient() -> None:
    torch.manual_seed(0)
    layer, maps = nn.Conv2d(8, 12, 3, 2, padding=1), torch.rand(2, 8, 8, 8, requires_grad=True)
    outputs = layer(maps)
    before, gradient = torch.autograd.grad((outputs * torch.randn_like(outputs)).sum(), [maps, layer.weight])
    torch.testing.assert_close(errors_before(layer, maps.detach(), gradient), before, rtol=1e-3, atol=1e-4)
