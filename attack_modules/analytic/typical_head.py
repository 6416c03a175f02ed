"""What the head computes for typical images: the attacker's estimate where the update alone does not tell."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attack_modules.threat_model.trial import without_dropout
from fl_lightning.models import ImageClassifier, ImageShape
from fl_lightning.models.freezing import batch_statistics, keeping_statistics

PROBES = 64
"""Number of noise images."""
CHUNK = 16
"""Of them that pass through the model at once, unless its BatchNorm makes one batch of them."""


@dataclass(frozen=True)
class TypicalHead:
    """Means over images that have a photograph's spectrum (LLG, Wainakh et al. 2022, who use random inputs).

    Attributes:
        probabilities: (C,) mean predicted probabilities, float64.
        inputs: mean sum of the last layer's inputs.
        features: (D,) mean features; None where they are not known.
    """

    probabilities: Tensor
    inputs: float
    features: Tensor | None = None

    @classmethod
    @torch.no_grad()
    def of(cls, model: ImageClassifier, image_shape: ImageShape) -> "TypicalHead":
        """Of a global model before the round."""
        without_dropout(model)
        probes = pink_noise(PROBES, image_shape)
        with keeping_statistics(model):
            at_once = PROBES if batch_statistics(model) else CHUNK
            features = torch.cat([model.embed(chunk) for chunk in probes.split(at_once)])
        inputs = nn.Sequential(*list(model.head)[:-1])(features)
        probabilities = model.head[-1](inputs).softmax(1).mean(0)
        return cls(probabilities.double(), inputs.sum(1).mean().item(), features.mean(0))


def pink_noise(count: int, image_shape: ImageShape, seed: int = 0) -> Tensor:
    """(count, C, H, W) images in [0, 1] with the 1/f amplitude spectrum of photographs (Field 1987)."""
    _, height, width = image_shape
    generator = torch.Generator().manual_seed(seed)
    frequency = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)[None, :])
    frequency[0, 0] = 1.0  # an infinite one would make NaN before PyTorch 2.7
    spectrum = torch.fft.fft2(torch.randn(count, *image_shape, generator=generator)) / frequency
    spectrum[..., 0, 0] = 0.0
    noise = torch.fft.ifft2(spectrum).real
    return (0.45 + 0.25 * noise / noise.std((1, 2, 3), keepdim=True)).clamp(0, 1)
