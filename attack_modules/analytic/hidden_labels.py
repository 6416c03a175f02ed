"""Labels of images of known features under a head of several linear layers, from the first layer's update.

Of an image of class c, the errors at the first layer's outputs are `softmax(z) - e_c`, passed back through the layers
and their ReLUs. With the features of all images, the observed errors follow from the first layer's updates of all
rounds, so the class is the one whose errors point the same way; local steps change their size more than direction.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def hidden_labels(features: Tensor, gradients: Tensor, weights: Sequence[Sequence[Tensor]]) -> Tensor:
    """(N,) long.

    Args:
        features: (N, D).
        gradients: (R, H, D + 1) of the first layer, whose last column is the bias'.
        weights: of each round, (out, in + 1) of each layer before it.
    """
    inputs = torch.cat([features, torch.ones(len(features), 1)], 1).double()
    observed = (gradients.double() @ torch.linalg.pinv(inputs)).transpose(1, 2)  # (R, N, H)
    classes = len(weights[0][-1])
    fit, size = torch.zeros(2, classes, len(features), dtype=torch.float64)
    for layers, errors in zip(weights, observed, strict=True):
        outputs, active = inputs, []
        for layer in layers:
            outputs = outputs @ layer.double().T
            active.append(outputs > 0)
            if layer is not layers[-1]:
                outputs = torch.cat([outputs.relu(), torch.ones(len(outputs), 1)], 1)
        probabilities = outputs.softmax(1)
        for label, target in enumerate(torch.eye(classes).to(outputs)):
            back = probabilities - target
            for layer, open_ in zip(reversed(layers[1:]), reversed(active[:-1]), strict=True):
                back = back @ layer[:, :-1].double() * open_
            fit[label] += (back * errors).sum(1)
            size[label] += back.square().sum(1)
    return (fit / size.sqrt().clamp_min(torch.finfo(size.dtype).tiny)).argmax(0)
