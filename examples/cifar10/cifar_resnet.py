"""The ResNets for CIFAR of He et al. (2016), section 4.2: `ood-fast … --model cifar_resnet:resnet20` beside this file.

Names of the weights are those of github.com/akamaster/pytorch_resnet_cifar10, so that its checkpoints load too.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3×3 convolutions; a shortcut to more channels takes every second pixel and adds zeros."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.stride, self.n_zeros = stride, (n_out - n_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        x = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + F.pad(x, (0, 0, 0, 0, self.n_zeros, self.n_zeros)))


class CifarResNet(nn.Module):
    """Images (n, 3, 32, 32) -> logits (n, c); 64 features enter the head `linear`."""

    def __init__(self, depth: int, n_classes: int = 10) -> None:
        super().__init__()
        n_blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(n_blocks, 16, 16, stride=1)
        self.layer2 = self._stage(n_blocks, 16, 32, stride=2)
        self.layer3 = self._stage(n_blocks, 32, 64, stride=2)
        self.linear = nn.Linear(64, n_classes)

    @staticmethod
    def _stage(n_blocks: int, n_in: int, n_out: int, stride: int) -> nn.Sequential:
        blocks = [Block(n_in, n_out, stride)]
        return nn.Sequential(*blocks, *(Block(n_out, n_out, stride=1) for _ in range(n_blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def resnet20(n_classes: int = 10) -> nn.Module:
    return CifarResNet(20, n_classes)


def resnet32(n_classes: int = 10) -> nn.Module:
    return CifarResNet(32, n_classes)


def resnet44(n_classes: int = 10) -> nn.Module:
    return CifarResNet(44, n_classes)


def resnet56(n_classes: int = 10) -> nn.Module:
    return CifarResNet(56, n_classes)
