"""How much memory feature inversion takes, as a forecast from shapes."""

import math

from torch import nn

from attack_modules.analytic.row_space import CHUNK, LEADING, WIDE
from attack_modules.feature_inversion.controls import ERRORS
from attack_modules.threat_model.observed import RoundsSummary
from fl_lightning.client import trained_parameters
from fl_lightning.models.activations import activation_bytes

DOUBLE, SINGLE = 8, 4
"""Bytes of a number."""
COPIES = 8
"""Of images: themselves, their gradient, Adam's two moments, the best, the start, those shown and the originals."""
TARGETS = 4
"""Of the features: leaked, sought, those of the simulated training, and its drift."""


def peak_bytes(rounds: RoundsSummary, images: int, chunk: int) -> int:
    """Bytes that the attack holds at most: while it makes the update, reads it, inverts features, and judges.

    Args:
        rounds: the observed rounds, or those that are to be simulated.
        images: in all, the attacker's included.
        chunk: of them that pass through the model at once.
    """
    model, count = rounds.model, len(rounds.assumptions)
    whole = sum(tensor.nbytes for tensor in model.state_dict().values())
    trained = sum(tensor.nbytes for tensor in trained_parameters(model).values())
    layers = [layer for layer in model.head if isinstance(layer, nn.Linear)]
    head, width = sum(layer.weight.nbytes for layer in layers), layers[0].in_features
    updating = count * (2 * whole + 2 * trained) + max(layer.weight.nbytes for layer in layers)
    copied = layers if count > 1 else [layer for layer in layers if layer.bias is not None]  # a bias is one more column
    joined = 2 * count * sum(layer.weight.nbytes for layer in copied)  # of the update and of the weight
    wide = [layer.in_features for layer in layers[:-1] if min(layer.weight.shape) > WIDE]
    sketches = 3 * LEADING * max(wide, default=0) * DOUBLE
    reading = count * (trained + head) + joined + 3 * CHUNK * DOUBLE + sketches + images * width * (DOUBLE + SINGLE)
    pixels, passes = math.prod(rounds.image_shape), max(min(chunk, images), len(ERRORS))
    kept = images * SINGLE * (COPIES * pixels + TARGETS * width)
    passing = 2 * passes * activation_bytes(model, rounds.image_shape)  # and their gradients
    ending = count * whole + kept + passing
    return max(updating, reading, ending)
