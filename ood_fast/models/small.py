"""A classifier for images as small as scikit-learn's digits, and for trying things out."""

from __future__ import annotations

from torch import Tensor, nn

SMALL_CNN_CHANNELS = (32, 64, 64)


class SmallCNN(nn.Module):
    """Three 3×3 convolutions with BatchNorm, 64 features by global average pooling, and the head `fc`. For 8×8 grey
    images.

    Input (n, in_channels, 8, 8) or larger, output: logits (n, n_classes).
    """

    def __init__(self, n_classes: int, head: type[nn.Linear] = nn.Linear, in_channels: int = 1) -> None:
        super().__init__()
        first, second, n_features = SMALL_CNN_CHANNELS
        self.backbone = nn.Sequential(
            *_block(in_channels, first, stride=1),
            *_block(first, second, stride=2),
            *_block(second, n_features, stride=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.fc = head(n_features, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, channels, height, width) -> logits (n, c)."""
        logits: Tensor = self.fc(self.backbone(x))
        return logits


def _block(n_in: int, n_out: int, stride: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(n_in, n_out, kernel_size=3, stride=stride, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(n_out), nn.ReLU(inplace=True)
