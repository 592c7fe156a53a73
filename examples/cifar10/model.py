"""The tutorial's picture classifier: two convolutions and three linear layers, in the manner of LeNet-5.

Shapes: B pictures, 3 colours, 32 x 32 pixels, 10 classes. Pictures come in as bytes and are normalised here, on
the device and in the model's own dtype, so that the data loader moves a quarter of the data and the same code
runs in fp32, bf16 and fp16. About 62 thousand parameters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 10


class Net(nn.Module):
    """Logits (B, 10) from pictures (B, 3, 32, 32) of dtype uint8. LeCun et al. 1998, with ReLU and max pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, kernel_size=5)
        self.conv2 = nn.Conv2d(6, 16, kernel_size=5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, CLASSES)

    def forward(self, pictures_b3hw: Tensor) -> Tensor:
        x = pictures_b3hw.to(self.conv1.weight.dtype) / 127.5 - 1.0
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = torch.flatten(x, 1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)
