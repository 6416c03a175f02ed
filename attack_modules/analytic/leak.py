"""Closed-form leakage: what the linear head of a classifier tells about every image in an aggregated update.

The head is `features f (D) -> W1 (H x D) -> ReLU -> W2 (C x H) -> softmax cross entropy`, or `W2` alone. N images are
spread over an unknown number of peers; each peer takes `steps` full-batch SGD steps of rate `lr`, and the server
averages the peers by number of images. The head's *update* (before minus after) times `N / (lr * steps)` is the sum
over the images of the time-mean gradient, `G1 = Delta^T F` and `G2 = (P - Y)^T H`. This module solves both for the
rows:

1. The rank of `G1` is N; the row sums of `G2` tell the labels.
2. `G2` gives hidden activations `H`, probabilities `P`, and so the back-propagated errors `E = (P - Y) W2`.
3. `Delta = gates * E`, a gate being the share of the steps in which a unit was active. Every row of `Delta` lies in the
   column space of `G1`: that linear constraint settles the gates that `H` leaves uncertain (`GateRegression`; with one
   step, where a gate is open or shut, `binary_gates`).
4. `F = lstsq(Delta^T, G1)`; rows (hidden units) that contradict the others count less.
5. Beyond first order, the head's own training is simulated from `F`: gates become functions of time. Images of one peer
   move each other's activations, so the difference between the activations that `G2` shows and `W1 f` tells who trained
   together (`co_members`), and with it the partition of the aggregate into peers.

Nothing here knows the images. Everything is float64 and works in the row space of `G1` (D may be 1e5, H is 500).
A bias is one more feature that is always 1. Features come out as their mean over the local steps; seen from the
model half way (`before - (steps - 1) / (2 * steps) * update`) they are the images' features to second order.

Extends "Federated Learning Nodes Can Reconstruct Peers' Image Data" (arXiv 2410.04661).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from attack_modules.analytic.counting import class_deficits, common_labels, count_images
from attack_modules.analytic.one_layer import read_single
from attack_modules.analytic.results import Diagnosis, Leakage, TrainingKnowledge
from attack_modules.analytic.row_space import RowSpace, augmented
from attack_modules.analytic.shared_classes import read_shared
from attack_modules.analytic.two_layers import read_stack
from attack_modules.attack import AttackError


def leak(
    updates: Mapping[str, Tensor], weights: Mapping[str, Tensor], beliefs: TrainingKnowledge, iterations: int = 5
) -> Leakage:
    """Read labels and features out of the head's part of an aggregated update: `leak_rounds` of one round."""
    return leak_rounds([updates], [weights], beliefs, iterations)


def leak_rounds(
    updates: Sequence[Mapping[str, Tensor]],
    weights: Sequence[Mapping[str, Tensor]],
    beliefs: TrainingKnowledge,
    iterations: int = 5,
) -> Leakage:
    """Read labels and features out of the head's part of one or several rounds' aggregated updates.

    Several rounds in which the same peers trained on the same images are more equations for the same features, because
    the gates of hidden units change from round to round; so there may be more images than hidden units.

    Args:
        updates: of each round, name -> aggregated update (before minus after) of each head parameter, in the order of
            the layers; `X.weight` (out, in) and, if there is one, `X.bias` (out,) belong to one layer.
        weights: of each round, name -> the same parameters before it.
        beliefs: how the peers trained.
        iterations: rounds of features -> simulated trajectory -> gates -> features.

    Raises:
        AttackError: the head is not one or two linear layers, or rounds do not hold the same classes.
    """
    layers, before = [augmented(update) for update in updates], [augmented(weight) for weight in weights]
    if len(layers[0]) not in (1, 2):
        raise AttackError(
            f"The head has {len(layers[0])} linear layers ({', '.join(updates[0])}), but leakage reads heads of one or "
            "two. Attack this model by gradient matching instead."
        )
    if len(layers[0]) == 1 and len(layers) > 1:
        raise AttackError(
            f"{len(layers)} rounds were observed, but a head of one linear layer is read from one round alone. "
            "Name one in `federation.observed_rounds`."
        )
    space = RowSpace.of(torch.cat([layer[0] for layer in layers]), torch.cat([layer[0] for layer in before]))
    given = None if beliefs.labels is None else len(beliefs.labels)
    last, weight = [layer[-1].double() for layer in layers], [layer[-1].double() for layer in before]
    held = int(class_deficits(last[0])[1].sum())
    singular = space.singular if len(layers) == 1 else space.part(len(layers[0][0])).singular
    num_images = beliefs.num_images or given or count_images(singular, held, beliefs.epochs or beliefs.steps)
    scale = num_images / (beliefs.lr * beliefs.steps)
    labels = beliefs.labels if beliefs.labels is not None else common_labels(last, num_images)
    targets = F.one_hot(labels, len(last[0])).to(last[0])
    if len(layers[0]) == 1:
        found = read_single(space, targets, beliefs, scale)
    elif len(labels.unique()) == num_images:
        found = read_stack(space, last, weight, targets, beliefs, scale, iterations)
    elif len(layers) == 1:
        labels, found = read_shared(space, last[0], weight[0], num_images, beliefs, scale, iterations)
    else:
        raise AttackError(
            f"{len(layers)} rounds were observed and images share classes, which is read from one round alone. "
            "Name one in `federation.observed_rounds`."
        )
    width = next(weight.shape[1] for weight in weights[0].values() if weight.ndim == 2)
    singular = space.singular
    at, below = (singular[i].item() if i < len(singular) else space.floor for i in (num_images - 1, num_images))
    return Leakage(
        labels=labels,
        features=space.vectors(found.coordinates)[:, :width].float(),
        peers=found.peers,
        diagnosis=Diagnosis(
            num_images=num_images,
            separated=len(labels),
            gap=at / below,
            residual=found.residual,
            conditioning=torch.linalg.cond(found.errors).item(),
            drift=found.drift,
            outside=found.outside,
        ),
    )
