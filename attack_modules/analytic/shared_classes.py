"""Heads of two linear layers where images share classes, or there is one of each class."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from attack_modules.analytic.gate_separation import separate
from attack_modules.analytic.gates import GateRegression, regress_features
from attack_modules.analytic.head_training import Trajectory, co_members, gates_of_trajectory, group_peers, simulate
from attack_modules.analytic.results import Reading, TrainingKnowledge
from attack_modules.analytic.row_space import RowSpace
from attack_modules.attack import AttackError
from fl_lightning.loss import logit_errors

MOST_OF_UNITS = 0.6
"""Images that share classes, as a share of the hidden units that are active for any, up to which they are separated."""

LEAST_SIZE = 0.1
"""Norm of features, in units of the images' median, below which they are of no image. Measured: 0.02 or less where
another image has taken over its features, 0.6 or more for images."""


def read_shared(
    space: RowSpace,
    last: Tensor,
    weight: Tensor,
    num_images: int,
    training: TrainingKnowledge,
    scale: float,
    iterations: int,
) -> tuple[Tensor, Reading]:
    """Labels (N,) and features under a head of two linear layers where images share classes.

    The last layer then shows only the sum of each class's activations. So the first layer alone disentangles the images
    (`separate`); the gates follow from the features by simulated training, and the sums tell the peers. Of the
    iterations, that counts which explains the updates of both layers best (least product of their relative misfits);
    images that it leaves without features are not returned.

    Args:
        space: of the first layer's update.
        last: (C, H) update of the last layer, (C, H + 1) with a bias.
        weight: of the last layer before the round, of the same shape.
        num_images: N.
        training: how the peers trained, and what is known of their images.
        scale: N / (lr * steps).
        iterations: rounds of features -> simulated training -> gates -> features; at least one is made.

    Raises:
        AttackError: no image could be disentangled.
    """
    hidden, steps, rows = len(space.rows), training.steps, space.rows * scale
    active = int((rows != 0).any(1).sum())
    if num_images > MOST_OF_UNITS * active:
        raise AttackError(
            f"{num_images} images were counted, which share classes and are nearly as many as the {active} hidden "
            "units that show them, so they cannot be told apart. If there are fewer, the update is altered or the "
            "training not as assumed: give `knowledge.num_images`, or attack by gradient matching (configs/paper.yaml)."
        )
    middle = (weight - last * training.half_way)[:, :hidden]
    classes = len(last)
    one_of_each = training.loss.targets(torch.arange(classes), classes, last)
    class_errors = logit_errors(torch.full_like(one_of_each, 1 / classes), one_of_each) @ middle
    if training.labels is None:
        sums = last[:, :hidden].sum(1)  # lower with each image of the class
        quota = num_images / len(last) * (1 - sums / (2 * sums.max()))
    else:
        quota = training.labels.bincount(minlength=len(last))
    first = space.weight - space.rows * training.half_way
    separation = separate(rows, first, class_errors, num_images, quota, exact=training.labels is not None)
    if not len(separation.labels):
        raise AttackError(
            f"The {num_images} images in this aggregate share classes, and none could be disentangled: no activation "
            "pattern agrees with the first layer's update. The model may be too well trained, the learning rate or the "
            "number of local steps too high, or the number of images wrong. Give it as `knowledge.num_images`, or "
            "attack by gradient matching instead."
        )
    order = separation.labels.argsort(stable=True)
    if training.labels is not None and len(order) == len(training.labels):
        order = order[training.labels.argsort(stable=True).argsort()]
    labels, gates = separation.labels[order], separation.gates[order]
    targets = training.loss.targets(labels, classes, last)

    def simulated(features: Tensor, influence: Tensor) -> Trajectory:
        gram, start = features @ features.T, features @ space.weight.T
        return simulate(gram, start, [weight], targets, influence, training.lr, steps)[0]

    regression = GateRegression(rows, num_images, space.rest.sum().item() * scale**2)
    features = torch.linalg.lstsq((gates * class_errors[labels]).T, rows, driver="gelsd").solution
    influence = torch.full((len(labels), len(labels)), 1 / num_images, dtype=rows.dtype)
    path = simulated(features, influence)
    best = None
    for _ in range(max(iterations, 1)):
        gram = features @ features.T
        if steps > 1:
            # the probabilities of one class's images differ too little to separate their activations
            missing = last[:, :hidden] * scale - path.residuals.T @ path.activations
            shown = path.activations + torch.linalg.pinv(path.residuals.T, rtol=0.1) @ missing
            seen = (path.preactivations > 0).all(0).to(rows)
            mixing = path.residuals @ path.residuals.T
            drift = path.preactivations[0] - shown
            influence = co_members(drift, seen, gram, path.past, training.lr, influence, mixing=mixing)
            path = simulated(features, influence)
        errors = path.errors.mean(0)
        noise = regression.noise * torch.linalg.pinv(gram, hermitian=True).diagonal()
        belief = regression.best(partial(gates_of_trajectory, path, None), errors, noise)
        gated = belief.mean * errors
        features = regress_features(rows, gated, belief.variance * errors**2, regression.noise)
        path = simulated(features, influence)
        residual = space.residual(gated, features, scale)
        sums = path.residuals.T @ path.activations
        mismatch = ((sums - last[:, :hidden] * scale).norm() / sums.norm()).item()
        # of look-alikes, one can grow at the expense of another: the residual falls, and the mismatch tells
        if best is None or residual * mismatch < best.residual * best.drift:
            peers = group_peers(influence) if steps > 1 else torch.zeros_like(labels)
            best = Reading(features, gated, peers, residual, mismatch, separation.outside.max().item())
    size = best.coordinates.norm(dim=1)
    shown = size > LEAST_SIZE * size.median()
    return labels[shown], replace(
        best, coordinates=best.coordinates[shown], errors=best.errors[shown], peers=best.peers[shown]
    )
