"""The model, and what a client does with it: plain PyTorch."""

import torch
from skimage import data
from sklearn.datasets import load_sample_image
from torch import Tensor, nn
from torch.nn import functional as F


class Net(nn.Module):
    """Two convolutions and two linear layers, for 16 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 5, padding=2)
        self.conv2 = nn.Conv2d(32, 64, 5, padding=2)
        self.fc1 = nn.Linear(64 * 16 * 16, 256)
        self.fc2 = nn.Linear(256, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        return self.fc2(F.relu(self.fc1(x.view(x.size(0), -1))))


def own_images(client: int) -> tuple[Tensor, Tensor]:
    """Two photographs of 64 pixels for each of four clients, and their labels."""
    photographs = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), load_sample_image("china.jpg")]
    photographs += [load_sample_image("flower.jpg"), data.retina(), data.immunohistochemistry()]
    labels = torch.tensor([3, 7, 1, 9, 0, 12, 5, 14])
    own = slice(2 * client, 2 * client + 2)
    return torch.stack([_square(photograph) for photograph in photographs[own]]), labels[own]


def _square(photograph: object) -> Tensor:
    image = torch.tensor(photograph).permute(2, 0, 1).float() / 255
    side = min(image.shape[1:])
    top, left = (image.shape[1] - side) // 2, (image.shape[2] - side) // 2
    return F.interpolate(image[None, :, top : top + side, left : left + side], (64, 64), mode="area")[0]


def train(net: Net, images: Tensor, labels: Tensor, lr: float, epochs: int) -> None:
    """SGD on full batches."""
    optimiser = torch.optim.SGD(net.parameters(), lr)
    for _ in range(epochs):
        optimiser.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimiser.step()
