"""CIFAR-10 classifier that measures the recognisability of images; no attack or enhancement uses it."""

from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from attack_modules.weights import load_strictly, read_weights
from fl_lightning.download import CHECKPOINTS
from fl_lightning.errors import SettingError, positive
from fl_lightning.storage import atomic_path

SHIPPED = CHECKPOINTS / "cifar10_classifier.safetensors"

BATCH = 256
"""Images classified per batch."""


def convolution(channels: int, out: int) -> nn.Sequential:
    """Create a 3x3 convolution without bias, followed by BatchNorm and ReLU."""
    return nn.Sequential(nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU())


class Residual(nn.Module):
    """Residual block: two convolutions and an identity shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.change = nn.Sequential(convolution(channels, channels), convolution(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.change(x)


class Cifar10Network(nn.Sequential):
    """ResNet with 8 weight layers on 2x2 pixel blocks as channels: (N, 3, 32, 32) in [0, 1] -> (N, 10) logits."""

    def __init__(self) -> None:
        super().__init__(
            nn.PixelUnshuffle(2),
            nn.BatchNorm2d(12, affine=False),
            convolution(12, 32),
            convolution(32, 64),
            nn.MaxPool2d(2),
            Residual(64),
            convolution(64, 128),
            nn.MaxPool2d(2),
            Residual(128),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
            nn.Linear(128, 10),
        )
        self.to(memory_format=torch.channels_last)


class Cifar10Classifier(LightningModule):
    """Trains the classifier on `CIFAR10` with one client, i.e. on the training images alone.

    The optimiser is SGD with Nesterov momentum and a one-cycle learning rate schedule; the augmentations are horizontal
    flips and shifts of up to 3 pixels.

    Args:
        lr: maximum learning rate, reached after a fifth of the steps, > 0.
        smoothing: label smoothing, in [0, 1).
        export: file to which the weights are written after every epoch; null: `cifar10_classifier.safetensors` in the
            run directory.
        seed: seeds the flips and shifts; null for that of `seed_everything`.

    Raises:
        SettingError: `lr` or `smoothing` is out of range.
    """

    def __init__(
        self, lr: float = 0.2, smoothing: float = 0.1, export: Path | None = None, seed: int | None = None
    ) -> None:
        super().__init__()
        if not positive(lr) or not 0 <= smoothing < 1:
            raise SettingError(f"`model` needs lr > 0 and smoothing in [0, 1), but got lr={lr}, smoothing={smoothing}.")
        self.lr = lr
        self.smoothing = smoothing
        self.export = export
        self.network = Cifar10Network()
        self.generator = torch.Generator().manual_seed(seed or 0)

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.SGD(
            self.parameters(), lr=self.lr, momentum=0.9, weight_decay=5e-4, nesterov=True, fused=True
        )
        steps = int(self.trainer.estimated_stepping_batches)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, steps, pct_start=0.2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.network(self._varied(images)), labels, label_smoothing=self.smoothing)
        self.log("loss", loss, prog_bar=True)
        return loss

    def _varied(self, images: Tensor) -> Tensor:
        """Augment a batch by one random shift for all images and a horizontal flip of each with probability 1/2."""
        down, across = torch.randint(-3, 4, (2,), generator=self.generator).tolist()
        size = images.shape[-1]
        images = F.pad(images, (3, 3, 3, 3), mode="reflect")[..., 3 + down :, 3 + across :][..., :size, :size]
        reflected = torch.rand(len(images), generator=self.generator) < 0.5
        return torch.where(reflected[:, None, None, None].to(images.device), images.flip(3), images)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        correct = (self.network(images).argmax(1) == labels).float().mean()
        self.log("accuracy", correct, prog_bar=True, batch_size=len(images))

    test_step = validation_step

    def on_train_epoch_end(self) -> None:
        directory = self.trainer.log_dir  # a collective call
        if self.trainer.is_global_zero and (self.export or directory):
            path = self.export or Path(directory) / "cifar10_classifier.safetensors"
            with atomic_path(path) as temporary:
                save_file({name: tensor.contiguous() for name, tensor in self.network.state_dict().items()}, temporary)


class Cifar10Recogniser:
    """Tests whether the classifier predicts the label of a CIFAR-10 image.

    Args:
        path: file of the classifier's weights.

    Raises:
        MissingFile: the file does not exist.
        StorageError: the file does not contain weights of `Cifar10Network`.
    """

    def __init__(self, path: Path = SHIPPED) -> None:
        with torch.random.fork_rng(devices=[]):  # random initialisation must not advance the run's generator
            self.network = Cifar10Network().eval()
        load_strictly(
            self.network, read_weights(path, "`python cli.py fit --config configs/cifar10_classifier.yaml`"), path
        )

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Compute logits of (N, 1 or 3, H, W) images in [0, 1], resized to 32 x 32 -> (N, 10), on the CPU."""
        images = images.detach().float().cpu().clamp(0, 1).expand(-1, 3, -1, -1)
        if images.shape[-2:] != (32, 32):
            images = F.interpolate(images, (32, 32), mode="bicubic", antialias=True).clamp(0, 1)
        return torch.cat([torch.zeros(0, 10), *(self.network(batch) for batch in images.split(BATCH) if len(batch))])

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Test whether the label is the top-1 prediction, and whether it is among the top 5; see `Recogniser`."""
        hits = self.logits(images).topk(5).indices == labels.cpu()[:, None]
        return hits[:, 0], hits.any(1)
