"""The absolute scale of leaked features, where clipping, an untold momentum or a wrong learning rate changed it."""

import math

import torch
from torch import Tensor

from attack_modules.analytic.results import Leakage
from attack_modules.feature_inversion.decoder import FeatureDecoder
from fl_lightning.models import ImageClassifier

MOST_IMAGES = 8
"""Number of images whose scale is looked at."""
LARGEST = 100.0
"""The search goes from 1 / LARGEST to LARGEST."""
TRIALS = 15
"""Scales that are tried, evenly spaced in their logarithm; then as many again around the best."""
PLAUSIBLE = (0.8, 1.25)
"""Scales that are taken for 1 after a single local step. Measured: 0.87 to 1.08 where nothing changes the scale."""
PLAUSIBLE_DRIFTING = (0.6, 1.6)
"""The same after several steps, during which features change by themselves. Measured: up to 1.33 at rate 0.05."""
CLEAR = 0.8
"""Error at the best scale over that at scale 1, below which the latter is given up. Measured: 0.94 to 1 for the exact
features of ResNet9, whose decoder is coarse; with LeNet5, 0.7 at most where features are off by a factor of 2."""
READABLE = 0.1
"""Uncertainty up to which features show their scale, which more than half of the images must."""


def found_scale(leakage: Leakage, model: ImageClassifier, decoder: FeatureDecoder | None, steps: int) -> float:
    """Factor by which leaked features are too small; 1 where it is plausible that they are not, or nothing tells.

    Args:
        leakage: of N images.
        model: whose features they are.
        decoder: of this model; None if its features are no map.
        steps: local steps.
    """
    readable = leakage.uncertainty < READABLE
    if 2 * readable.sum() <= len(readable):
        return 1.0
    if leakage.ones is not None:
        scale = 1 / leakage.ones[readable].median().item()
    elif decoder is not None and leakage.seen is None:
        scale = feature_scale(leakage.features[readable], model, decoder)
    else:
        return 1.0
    low, high = PLAUSIBLE if steps == 1 else PLAUSIBLE_DRIFTING
    return 1.0 if low <= scale <= high or scale <= 0 else scale


@torch.no_grad()
def feature_scale(features: Tensor, model: ImageClassifier, decoder: FeatureDecoder) -> float:
    """Factor by which features are too small, common to all images.

    The features of an image are not those of another one times a factor, because the model saturates and has biases.
    So the right scale is that at which an image has these features: the error of the linearly decoded image is least.
    Where the error hardly depends on the scale, nothing tells, and the result is 1.

    Args:
        features: (N, D) as they leaked.
        model: whose features they are.
        decoder: of this model.
    """
    features = features[:MOST_IMAGES].to(model.mean)
    constant = decoder.affine(torch.zeros_like(features[:1]))
    slope = decoder.affine(features) - constant

    def error(scale: float) -> float:
        scaled = features * scale
        shown = model.embed((constant + scale * slope).clamp_(0, 1))
        return ((shown - scaled).norm(dim=1) / scaled.norm(dim=1)).median().item()

    centre, width = 0.0, math.log(LARGEST)
    for _ in range(2):
        trials = [math.exp(centre + width * (2 * i / (TRIALS - 1) - 1)) for i in range(TRIALS)]
        centre, width = math.log(min(trials, key=error)), 2 * width / (TRIALS - 1)
    scale = math.exp(centre)
    return scale if error(scale) < CLEAR * error(1.0) else 1.0
