"""Errors at the first layer of a head of linear layers, given the features, and the labels that these errors show.

Of an image of class c, the errors at the first layer's outputs are `softmax(z) - e_c`, passed back through the layers
and their ReLUs. With the features of all images, the observed errors follow from the first layer's updates of all
rounds, so the class is the one whose errors point the same way; local steps change their size more than direction.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def hidden_errors(features: Tensor, layers: Sequence[Tensor], smoothing: float = 0.0) -> Tensor:
    """(C, N, H) float64 errors at the first layer's outputs, of each image as if it were of each class.

    Args:
        features: (N, D).
        layers: (out, in + 1) weights of each, whose last column is the bias'.
        smoothing: of the labels.
    """
    outputs, active = features.double(), []
    for layer in layers:
        outputs = (outputs if layer is layers[0] else outputs.relu()) @ layer[:, :-1].double().T + layer[:, -1].double()
        active.append(outputs > 0)
    classes = len(layers[-1])
    targets = torch.eye(classes).to(outputs) * (1 - smoothing) + smoothing / classes
    back = outputs.softmax(1) - targets[:, None]
    for layer, open_ in zip(reversed(layers[1:]), reversed(active[:-1]), strict=True):
        back = back @ layer[:, :-1].double() * open_
    return back


def hidden_labels(features: Tensor, gradients: Tensor, weights: Sequence[Sequence[Tensor]]) -> Tensor:
    """(N,) long.

    Args:
        features: (N, D).
        gradients: (R, H, D + 1) of the first layer, whose last column is the bias'.
        weights: of each round, (out, in + 1) of each layer before it.
    """
    inputs = torch.cat([features, torch.ones(len(features), 1)], 1).double()
    observed = (gradients.double() @ torch.linalg.pinv(inputs)).transpose(1, 2)  # (R, N, H)
    fit, size = torch.zeros(2, len(weights[0][-1]), len(features), dtype=torch.float64)
    for layers, errors in zip(weights, observed, strict=True):
        back = hidden_errors(features, layers)
        fit += (back * errors).sum(2)
        size += back.square().sum(2)
    return (fit / size.sqrt().clamp_min(torch.finfo(size.dtype).tiny)).argmax(0)
