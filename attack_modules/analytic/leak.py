"""The closed form: labels, counts, features and peers of all images from the update of a classifier's linear head.

The head is `features f (D) -> W1 (H x D) -> ReLU -> W2 (C x H) -> softmax cross entropy`, or `W2` alone; of more layers
each is read like the first of two, with what the layer above shows (`linear_stack`). N images are spread over an
unknown number of peers. Each peer takes `steps` full-batch SGD steps of rate `lr`, and the server averages the peers
weighted by their numbers of images. The head's *update* (before minus after) times `N / (lr * steps)` is the sum over
the images of the time-mean gradient, `G1 = Delta^T F` and `G2 = (P - Y)^T H`. Both are solved for the rows:

1. The rank of `G1` is N; the row sums of `G2` give the label counts (`counting`).
   With label smoothing or class weights, `P - Y` is what `fl_lightning.loss.logit_errors` says.
2. `G2` gives hidden activations `H`, probabilities `P`, and so the back-propagated errors `E = (P - Y) W2`
   (`one_layer`).
3. `Delta = gates * E`. A *gate* is the share of the steps in which a hidden unit was active for an image; with one
   step, it is a bit of the ReLU activation pattern. Every row of `Delta` lies in the column space of `G1`; this linear
   constraint determines the gates that `H` leaves uncertain (`gates`; with one step, `binary_gates`).
4. `F = lstsq(Delta^T, G1)`; rows (hidden units) that contradict the others weigh less.
5. Beyond first order, the head's own training is simulated from `F` (`head_training`), so gates become functions of
   time. Images of one peer move each other's activations, so the difference between the activations that `G2` shows and
   `W1 f` tells which images were trained together, that is, how the aggregate divides into peers.

No image is needed anywhere. Everything is float64 and in coordinates of the row space of `G1` (D may be 1e5, H 500), or
of its leading part where H and D are large (`row_space`).
A bias is one more feature that is always 1. Features come out as their mean over the local steps; seen from the model
half way (`threat_model.assumptions.half_way`) they are the images' features to second order.

Extends "Federated Learning Nodes Can Reconstruct Peers' Image Data" (arXiv 2410.04661).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from attack_modules.analytic.counting import counts_to_try, read_counts
from attack_modules.analytic.linear_stack import UpperLayer, read_stack
from attack_modules.analytic.one_layer import read_single
from attack_modules.analytic.results import Diagnosis, ImageCount, Leakage, Reading, TrainingKnowledge
from attack_modules.analytic.row_space import Layer, RowSpace, joined, linear_layers
from attack_modules.analytic.shared_classes import read_shared
from attack_modules.analytic.uncertainty import feature_uncertainty
from attack_modules.attack import AttackError

CLEAR = 10.0
"""Standard deviations of a feature's error from which it was surely not dropped. Measured with AlexNet: two of 80,000
dropped ones are at 5, 0.1 % of those that were kept below 8.6."""


def leak(
    updates: Mapping[str, Tensor], weights: Mapping[str, Tensor], training: TrainingKnowledge, iterations: int = 5
) -> Leakage:
    """Read labels and features out of the head's part of an aggregated update: `leak_rounds` of one round."""
    return leak_rounds([updates], [weights], training, iterations)


def leak_rounds(
    updates: Sequence[Mapping[str, Tensor]],
    weights: Sequence[Mapping[str, Tensor]],
    training: TrainingKnowledge,
    iterations: int = 5,
) -> Leakage:
    """Read labels and features out of the head's part of the aggregated updates of one or several rounds.

    Several rounds in which the same peers trained on the same images are more equations for the same features, because
    the gates change from round to round; so there may be more images than hidden units.

    Args:
        updates: of each round, name -> aggregated update (before minus after) of each head parameter, in the order of
            the layers; `X.weight` (out, in) and, if there is one, `X.bias` (out,) belong to one layer.
        weights: of each round, name -> the same parameters before it.
        training: how the peers trained, and what is known of their images.
        iterations: rounds of features -> simulated training -> gates -> features.

    Raises:
        AttackError: there are several rounds of one linear layer, the number of images cannot be read, the rounds do
            not hold the same images, or the head has more than two layers and images share classes or are as many as a
            layer's units.
    """
    layers, before = [linear_layers(update) for update in updates], [linear_layers(weight) for weight in weights]
    depth, wide = len(layers[0]), [layer[0].shape[1] for layer in before[0]]
    if depth == 1 and len(layers) > 1:
        raise AttackError(
            f"The closed form reads heads of one linear layer in a single round, but {len(layers)} were observed. Name "
            "one round in `federation.observed_rounds`, or attack by gradient matching instead."
        )
    space = RowSpace.of(_stacked([layer[0] for layer in layers]), _stacked([layer[0] for layer in before]))
    last, weight = [joined(layer[-1]).double() for layer in layers], [joined(layer[-1]).double() for layer in before]
    first = space if len(layers) == 1 else space.part(len(layers[0][0][0]))
    count, labels = read_counts(first, last, wide[-1], training)
    num_images = count.num_images
    scale = num_images / (training.lr * training.steps)
    targets = training.loss.targets(labels, len(last[0]), last[0], training.sizes)
    distinct = len(labels.unique()) == num_images
    if len(layers) > 1 and not distinct:
        raise AttackError(
            f"{len(layers)} rounds were observed and images share classes, which is read from one round alone. "
            "Name one in `federation.observed_rounds`."
        )
    if depth > 2 and not (distinct and num_images < len(last[0])):
        raise AttackError(
            f"A head of {depth} linear layers is read where every image has a class of its own and a class has none, "
            f"but {num_images} images of {len(labels.unique())} of {len(last[0])} classes are told or counted in its "
            "update. Where there are fewer (drift and defences count as images), give `knowledge.num_images`; else "
            "attack by `--model GradientInversion`."
        )
    if depth > 2 and (narrow := min(len(layers) * wide[1], *wide[2:])) <= num_images:
        raise AttackError(
            f"A head of {depth} linear layers is read where each hidden layer has more units than there are images, "
            f"but there are {num_images} images and a layer of {narrow} units. Attack by `--model GradientInversion`."
        )
    try:
        if depth == 1:
            found = read_single(space, targets, training, scale)
        elif distinct and (num_images < len(last[0]) or len(layers) > 1):
            upper = [
                [UpperLayer(joined(u), joined(w)) for u, w in zip(update[1:], start[1:], strict=True)]
                for update, start in zip(layers, before, strict=True)
            ]
            found = read_stack(space, upper, targets, training, scale, iterations)
        else:  # also with one image of each class: the rows of P - Y then sum to 0, so G2 hides a direction of H
            count, labels, found = _read_shared(space, first, last[0], weight[0], count, training, iterations)
            num_images = count.num_images
            scale = num_images / (training.lr * training.steps)
    except torch.linalg.LinAlgError as error:
        raise AttackError(
            "The head's update gives equations that cannot be solved: the training, as it is assumed, diverges. Check "
            "`knowledge` (rates, local epochs, momentum, weight decay, number of images), or observe another round."
        ) from error
    width, singular = wide[0], space.singular
    at, below = (singular[i].item() if i < len(singular) else space.floor for i in (num_images - 1, num_images))
    vectors = space.vectors(found.coordinates).float()
    uncertainty = found.uncertainty
    if uncertainty is None:
        uncertainty = feature_uncertainty(space.rows * scale, found.errors, found.coordinates, space.rest * scale**2)
    uncertainty = uncertainty.float()
    features, seen = vectors[:, :width], None
    if training.dropout and training.dropout[0]:
        noise = uncertainty * features.square().mean(1).sqrt()
        seen = features.abs() > CLEAR * noise[:, None]
        features = torch.where(seen, (1 - training.dropout[0]) * features, 0.0)
    return Leakage(
        labels=labels,
        features=features,
        peers=found.peers,
        diagnosis=Diagnosis(
            **vars(count),
            disentangled=len(labels),
            gap=at / below,
            residual=found.residual,
            conditioning=torch.linalg.cond(found.errors).item(),
            drift=found.drift,
            outside=found.outside,
            checked=depth == 1 or len(singular) > num_images,
        ),
        uncertainty=uncertainty,
        ones=vectors[:, width] if vectors.shape[1] > width else None,
        seen=seen,
    )


def _stacked(layers: Sequence[Layer]) -> Tensor:
    """The matrices of one layer in several rounds, round under round."""
    return joined(layers[0]) if len(layers) == 1 else torch.cat([joined(layer) for layer in layers])


def _read_shared(
    space: RowSpace,
    first: RowSpace,
    last: Tensor,
    weight: Tensor,
    count: ImageCount,
    training: TrainingKnowledge,
    iterations: int,
) -> tuple[ImageCount, Tensor, Reading]:
    """`read_shared` with the number of images of which fewest are missing, and that explains the update best."""
    trials: list[tuple[ImageCount, Tensor, Reading]] = []
    refusals: list[AttackError] = []
    for number in counts_to_try(first.singular, count, training):
        scale, tried = number / (training.lr * training.steps), replace(count, num_images=number)
        if count.shown == count.num_images:
            tried = replace(tried, shown=number)
        try:
            trials.append((tried, *read_shared(space, last, weight, number, training, scale, iterations)))
        except AttackError as error:
            refusals.append(error)
    if not trials:
        raise refusals[0]
    return min(trials, key=lambda trial: (trial[0].num_images - len(trial[1]), trial[2].residual))
