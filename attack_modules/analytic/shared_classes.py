"""Heads of two linear layers where images share classes, or there is one of each class."""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from attack_modules.analytic.drifting_peers import coupling_of
from attack_modules.analytic.gate_separation import separate
from attack_modules.analytic.gates import GateRegression, regress_features
from attack_modules.analytic.head_training import Trajectory, co_members, gates_of_trajectory, group_peers, simulate
from attack_modules.analytic.peers_by_errors import ShownErrors, TrainedTogether, trained_together
from attack_modules.analytic.results import Reading, TrainingKnowledge
from attack_modules.analytic.row_space import RowSpace
from attack_modules.analytic.sparse_features import sparsest_features, zeros_of
from attack_modules.attack import AttackError
from fl_lightning.loss import logit_errors

MOST_OF_UNITS = 0.6
"""Images that share classes, as a share of the hidden units that are active for any, up to which they are separated."""

LEAST_SIZE = 0.1
"""Norm of features, in units of the images' median, below which they are of no image. Measured: 0.02 or less where
another image has taken over its features, 0.6 or more for images."""

LEAST_FIT = 0.8
"""Cosine of the errors that a sparse vector shows with a class's, gated, from which it is an image's features.
Measured: 0.88 or more for radiographs at three local steps, 0.33 and 0.65 for a vector too many."""

MOST_MISSING = 0.5
"""Share of the images that zeros do not tell apart over several steps, beyond which gates are tried as well."""

COMMON_DRIFT = 1
"""Directions of drift beyond the images' that may stand above some of theirs: features of images that are alike drift
alike."""


@dataclass(frozen=True)
class _Start:
    """A first estimate from which the reading is improved; n images.

    Attributes:
        labels: (n,) long.
        features: (n, r) coordinates.
        gates: (n, H) from which they are.
        outside: see `Reading`.
        together: who trained together, where the directions of the features tell; else None.
    """

    labels: Tensor
    features: Tensor
    gates: Tensor
    outside: float
    together: TrainedTogether | None


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

    The last layer then shows only the sum of each class's activations. So the first layer alone disentangles the
    images: of one step by their gates (`separate`), and where these do not tell all images apart by the zeros of their
    features (`sparsest_features`). Of several steps, in which gates change, by zeros: peers and the sizes of features
    then follow from the errors that each image shows (`trained_together`), which is all that is read. Only where zeros
    tell few images apart, gates are tried as well; from these, simulated training and features follow in turn, and the
    sums tell the peers. Of the iterations, that counts which explains the updates of both layers best (least product of
    their relative misfits), and so of two readings; of one step, that with more zeros.
    Images left without features are not returned.

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
    active = int(space.rows.any(1).sum())
    if num_images > MOST_OF_UNITS * active:
        raise AttackError(
            f"{num_images} images were counted, which share classes and are nearly as many as the {active} hidden "
            "units that show them, so they cannot be told apart. If there are fewer, the update is altered or the "
            "training not as assumed: give `knowledge.num_images`, or attack by gradient matching (configs/paper.yaml)."
        )
    head = _SharedHead(space, last, weight, num_images, training, scale)
    searches, enough = [head.by_gates, head.by_zeros], float(num_images)
    if training.steps > 1:
        searches, enough = searches[::-1], (1 - MOST_MISSING) * num_images
    starts = [searches[0]()]
    if len(starts[0].labels) < enough:
        starts.append(searches[1]())
    starts = [start for start in starts if len(start.labels)]
    if not starts:
        raise AttackError(
            f"The {num_images} images in this aggregate share classes, and none could be disentangled: no activation "
            "pattern agrees with the first layer's update. The model may be too well trained, the learning rate or the "
            "number of local steps too high, or the number of images wrong. Give it as `knowledge.num_images`, or "
            "attack by gradient matching instead."
        )
    readings = []
    for start in starts:
        try:
            readings.append((start.labels, head.improved(start, iterations)))
        except torch.linalg.LinAlgError:  # simulated training can diverge from a wrong start
            if start is starts[-1] and not readings:
                raise
    if training.steps > 1:  # few images by their zeros against those by gates
        readings.sort(key=lambda found: -found[1].residual * found[1].drift)
    else:
        readings.sort(key=lambda found: zeros_of(space, found[1].coordinates).sum().item())
    labels, best = readings[-1]
    order = labels.argsort(stable=True)
    if training.labels is not None and len(order) == len(training.labels):
        order = order[training.labels.argsort(stable=True).argsort()]
    size = best.coordinates.norm(dim=1)
    order = order[(size > LEAST_SIZE * size.median())[order]]
    return labels[order], replace(
        best,
        coordinates=best.coordinates[order],
        errors=best.errors[order],
        peers=best.peers[order],
        uncertainty=None if best.uncertainty is None else best.uncertainty[order],
    )


class _SharedHead:
    """The updates of both layers, see `read_shared`."""

    def __init__(
        self, space: RowSpace, last: Tensor, weight: Tensor, num_images: int, training: TrainingKnowledge, scale: float
    ) -> None:
        self.space, self.last, self.weight = space, last, weight
        self.num_images, self.training, self.scale = num_images, training, scale
        self.rows, self.hidden = space.rows * scale, len(space.rows)
        one_of_each = training.loss.targets(torch.arange(len(last)), len(last), last)
        middle = (weight - last * training.half_way)[:, : self.hidden]
        #: (C, H) back-propagated error of an image of each class, without gates
        self.class_errors = logit_errors(torch.full_like(one_of_each, 1 / len(last)), one_of_each) @ middle
        #: (H, r) the first layer half way through the training
        self.first = space.weight - space.rows * training.half_way

    def by_gates(self) -> _Start:
        """The images that `separate` finds."""
        told = self.training.labels
        if told is None:
            sums = self.last[:, : self.hidden].sum(1)  # lower with each image of the class
            quota = self.num_images / len(self.last) * (1 - sums / (2 * sums.max()))
        else:
            quota = told.bincount(minlength=len(self.last))
        found = separate(self.rows, self.first, self.class_errors, self.num_images, quota, exact=told is not None)
        gated = found.gates * self.class_errors[found.labels]
        features = torch.linalg.lstsq(gated.T, self.rows, driver="gelsd").solution
        outside = found.outside.max().item() if len(found.labels) else 0.0
        return _Start(found.labels, features, found.gates, outside, None)

    def by_zeros(self) -> _Start:
        """The images whose features are sparse; a class's error, times the gates of its features, fits best."""
        steps = self.training.steps
        directions = sparsest_features(self.space, self.num_images, COMMON_DRIFT if steps > 1 else 0)
        gates = (directions @ self.first.T > 0).to(self.rows)
        if not len(directions):
            return _Start(torch.zeros(0, dtype=torch.long), directions, gates, 0.0, None)
        shown = torch.linalg.lstsq(directions.T, self.rows.T, driver="gelsd").solution  # (n, H) errors, gates included
        fit = torch.stack([F.cosine_similarity(shown, gates * error, dim=1) for error in self.class_errors], 1)
        cosine, labels = fit.max(1)
        certain = cosine > LEAST_FIT
        directions, gates, labels = directions[certain], gates[certain], labels[certain]
        outside = (1 - cosine[certain].square()).clamp_min(0).sqrt().amax().item() if certain.any() else 0.0
        sizes, together = self.sizes(directions, gates * self.class_errors[labels]), None
        if steps > 1 and certain.any():
            together = self.together(directions, labels, sizes)
            sizes = together.sizes
        return _Start(labels, sizes[:, None] * directions, gates, outside, together)

    def together(self, directions: Tensor, labels: Tensor, sizes: Tensor) -> TrainedTogether:
        """Peers and sizes of the features of known directions (n, r) and labels (n,); sizes (n,) to begin with."""
        shown = torch.linalg.lstsq(directions.T, self.rows.T, driver="gelsd").solution
        training, gram, start = self.training, directions @ directions.T, directions @ self.space.weight.T
        targets = training.loss.targets(labels, len(self.last), self.last)
        images = ShownErrors(shown, gram, start, self.weight, targets, training.lr, training.steps)
        return trained_together(images, sizes)

    def sizes(self, directions: Tensor, gated: Tensor, iterations: int = 8) -> Tensor:
        """(n,) sizes of features of known directions (n, r) from their gated errors (n, H), by robust least squares."""
        weight, inner = torch.ones_like(self.rows[:, 0]), directions @ directions.T
        for _ in range(iterations):
            weighted = gated * weight
            found = torch.linalg.solve((weighted @ gated.T) * inner, ((weighted @ self.rows) * directions).sum(1))
            left = (self.rows - gated.T @ (found[:, None] * directions)).square().sum(1)
            weight = 1 / (left + 0.1 * left[left > 0].median())
        return found.clamp_min(0.1 * found.median())

    def improved(self, start: _Start, iterations: int) -> Reading:
        """Simulated training and features in turn."""
        training, rows, hidden, labels = self.training, self.rows, self.hidden, start.labels
        steps, space = training.steps, self.space
        targets = training.loss.targets(labels, len(self.last), self.last)
        summed = self.last[:, :hidden] * self.scale

        def simulated(features: Tensor, influence: Tensor) -> Trajectory:
            gram, before = features @ features.T, features @ space.weight.T
            return simulate(gram, before, [self.weight], targets, influence, training.lr, steps)[0]

        def peers_of(path: Trajectory, features: Tensor, influence: Tensor) -> Tensor:
            # the probabilities of one class's images differ too little to separate their activations
            missing = summed - path.residuals.T @ path.activations
            shown = path.activations + torch.linalg.pinv(path.residuals.T, rtol=0.1) @ missing
            seen = (path.preactivations > 0).all(0).to(rows)
            mixing, drift = path.residuals @ path.residuals.T, path.preactivations[0] - shown
            gram = features @ features.T
            return co_members(drift, seen, gram, path.past, training.lr, influence, mixing=mixing)

        regression = GateRegression(rows, self.num_images, space.rest.sum().item() * self.scale**2)
        features = start.features
        influence = torch.full((len(labels), len(labels)), 1 / self.num_images, dtype=rows.dtype)
        path = simulated(features, influence)
        if start.together:  # what is known of zeros and peers is more exact than any gates
            path = simulated(features, coupling_of(start.together.peers))
            gated = (path.errors * (path.preactivations > 0)).mean(0)
            found = self.reading(features, gated, start.together.peers, path, start.outside)
            return replace(found, uncertainty=start.together.uncertainty)
        best = None
        for _ in range(max(iterations, 1)):
            if steps > 1:
                influence = peers_of(path, features, influence)
                path = simulated(features, influence)
            errors = path.errors.mean(0)
            noise = regression.noise * torch.linalg.pinv(features @ features.T, hermitian=True).diagonal()
            belief = regression.best(partial(gates_of_trajectory, path, None), errors, noise)
            gated = belief.mean * errors
            features = regress_features(rows, gated, belief.variance * errors**2, regression.noise)
            path = simulated(features, influence)
            peers = group_peers(influence) if steps > 1 else torch.zeros_like(labels)
            found = self.reading(features, gated, peers, path, start.outside)
            # of look-alikes, one can grow at the expense of another: the residual falls, and the mismatch tells
            if best is None or found.residual * found.drift < best.residual * best.drift:
                best = found
        return best

    def reading(self, features: Tensor, gated: Tensor, peers: Tensor, path: Trajectory, outside: float) -> Reading:
        """Features (n, r) with what their gated errors (n, H) and simulated training leave of both updates."""
        summed = self.last[:, : self.hidden] * self.scale
        sums = path.residuals.T @ path.activations
        residual = self.space.residual(gated, features, self.scale)
        return Reading(features, gated, peers, residual, ((sums - summed).norm() / sums.norm()).item(), outside)
