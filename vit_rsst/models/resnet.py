"""ResNet-20 for 32 px images (He et al. 2016, section 4.2): three stages of 16, 32 and 64 channels, 0.27 M parameters.

The shortcut between stages has no parameters (option A): every second pixel, zero-padded channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3 × 3 convolutions with batch norm around a shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))

    def shortcut(self, x: Tensor) -> Tensor:
        missing = self.bn2.num_features - x.shape[1]
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, missing // 2, missing - missing // 2))


class CifarResNet(nn.Module):
    """6n + 2 layers; n = 3 is ResNet-20.

    Args:
        num_classes: outputs of the classifier.
        in_chans: image channels.
        depth: 6n + 2.
        width: channels of the first stage; the others have two and four times as many.

    Raises:
        ValueError: `depth` is not 6n + 2.
    """

    def __init__(self, num_classes: int = 10, in_chans: int = 3, depth: int = 20, width: int = 16):
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth {depth} is not 6n + 2, such as 20, 32, 44 or 56")
        self.num_classes = num_classes
        self.pretrained_cfg = {"first_conv": "conv1", "classifier": "fc"}
        self.conv1 = nn.Conv2d(in_chans, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        channels = [width] * blocks + [2 * width] * blocks + [4 * width] * blocks
        sources = [width, *channels[:-1]]
        self.blocks = nn.Sequential(
            *(BasicBlock(a, b, 1 if a == b else 2) for a, b in zip(sources, channels, strict=True))
        )
        self.fc = nn.Linear(channels[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def group_matcher(self, coarse: bool = False) -> dict:
        """timm's interface: assigns parameters to the stem and to blocks."""
        return {"stem": r"^conv1|^bn1", "blocks": [(r"^blocks\.(\d+)", None)]}

    def forward_features(self, x: Tensor) -> Tensor:
        """(batch, 3, size, size) → (batch, channels, size / 4, size / 4)."""
        return self.blocks(F.relu(self.bn1(self.conv1(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.mean(self.forward_features(x), (2, 3)))
