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

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from attack_modules.analytic.binary_gates import binary_gates
from attack_modules.analytic.gate_separation import separate
from attack_modules.analytic.gates import GateRegression, Gates, gates_of_activations, regress_features
from attack_modules.analytic.head_training import (
    Trajectory,
    co_members,
    gates_of_trajectory,
    group_peers,
    side_by_side,
    simulate,
)
from attack_modules.attack import AttackError


@dataclass(frozen=True)
class PeerTraining:
    """What the attacker holds true of its peers' training.

    Attributes:
        lr: rate of the peers' SGD; with momentum, the mean factor of a step's gradient in the update.
        steps: full-batch steps that each peer takes.
        num_images: N, or None to take the rank of the first layer's update.
        labels: (N,) long in any order, or None to infer them.
        epochs: steps in which each image takes part, or None for all.
    """

    lr: float
    steps: int
    num_images: int | None = None
    labels: Tensor | None = None
    epochs: int | None = None


@dataclass(frozen=True)
class Diagnosis:
    """How far to trust a leakage, from quantities that the attacker has.

    Attributes:
        num_images: N, given or found.
        separated: images that could be told apart. If fewer than N, the others mix into the features of some.
        gap: singular value N of the first layer's update over singular value N + 1. Near 1, N is a guess.
        residual: relative Frobenius norm of what `Delta^T F` leaves unexplained of the first layer's update.
        conditioning: condition number of `Delta`, by which errors in the gates are amplified.
        drift: rms mismatch between activations seen by the last layer and simulated, over their mean; 0 for one layer.
            Large where lr, steps or the kind of local training are not as believed.
        outside: of the images that were told apart by their gates, the largest `Separation.outside`: near 0 is sure,
            1 is chance. 0 where the last layer tells them apart.
    """

    num_images: int
    separated: int
    gap: float
    residual: float
    conditioning: float
    drift: float
    outside: float


@dataclass(frozen=True)
class Leakage:
    """The images of one aggregate, as the head saw them.

    Attributes:
        labels: (N,) long; fewer rows, here and below, if not all images could be told apart.
        features: (N, D) mean over the local steps of each image's features.
        peers: (N,) long; images with one number were trained by one peer. All 0 where nothing tells (one step).
        diagnosis: of the whole.
    """

    labels: Tensor
    features: Tensor
    peers: Tensor
    diagnosis: Diagnosis


def leak(
    updates: Mapping[str, Tensor], weights: Mapping[str, Tensor], beliefs: PeerTraining, iterations: int = 5
) -> Leakage:
    """Read labels and features out of the head's part of an aggregated update: `leak_rounds` of one round."""
    return leak_rounds([updates], [weights], beliefs, iterations)


def leak_rounds(
    updates: Sequence[Mapping[str, Tensor]],
    weights: Sequence[Mapping[str, Tensor]],
    beliefs: PeerTraining,
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


def common_labels(last: Sequence[Tensor], num_images: int) -> Tensor:
    """(N,) labels that every round's last layer (C, H) shows.

    Raises:
        AttackError: they differ.
    """
    labels = [infer_labels(layer, num_images) for layer in last]
    for number, others in enumerate(labels[1:], 2):
        if not torch.equal(labels[0], others):
            differing = int(
                (labels[0].bincount(minlength=len(last[0])) != others.bincount(minlength=len(last[0]))).sum()
            )
            raise AttackError(
                f"The observed rounds do not hold the same images: number {number} shows other counts than the first "
                f"in {differing} classes. Several rounds are read together only if the same peers train in each; name "
                "one in `federation.observed_rounds`, or use `AttributedInversion` (configs/attribution.yaml)."
            )
    return labels[0]


def augmented(parameters: Mapping[str, Tensor]) -> list[Tensor]:
    """One (out, in) matrix a layer, (out, in + 1) with a bias: it is the weight of a feature that is always 1."""
    layers: list[Tensor] = []
    for parameter in parameters.values():
        if parameter.ndim == 2:
            layers.append(parameter)
        else:
            layers[-1] = torch.cat([layers[-1], parameter[:, None]], 1)
    return layers


@dataclass(frozen=True)
class RowSpace:
    """A layer's update, and its weights, in coordinates of the update's r dimensions.

    Attributes:
        update: (out, D) float64.
        mixing: (r, out), so that the rows of `mixing @ update` are an orthonormal basis.
        rows: (out, r) the update in that basis.
        weight: (out, r) the layer's weight before the round, in that basis.
        floor: smallest singular value that the weights' precision can show.
    """

    update: Tensor
    mixing: Tensor
    rows: Tensor
    weight: Tensor
    floor: float

    @classmethod
    def of(cls, update: Tensor, weight: Tensor) -> "RowSpace":
        update, precision = update.double(), torch.finfo(weight.dtype).eps
        rows, mixing = row_coordinates(update, precision)
        return cls(update, mixing, rows, weight.double() @ update.T @ mixing.T, precision * rows.norm().item())

    def vectors(self, coordinates: Tensor) -> Tensor:
        """(N, r) coordinates -> (N, D) vectors."""
        return coordinates @ self.mixing @ self.update

    def part(self, count: int) -> "RowSpace":
        """The first `count` rows alone."""
        return replace(self, rows=self.rows[:count], weight=self.weight[:count])

    @property
    def singular(self) -> Tensor:
        """Singular values of the update, one for each unit that ever was active, none under the floor."""
        return torch.linalg.svdvals(self.rows[(self.rows != 0).any(1)]).clamp_min(self.floor)


def row_coordinates(update: Tensor, precision: float | None = None) -> tuple[Tensor, Tensor]:
    """An update in coordinates of its own row space: `rows` (out, r), and `mixing` (r, out).

    `update = rows @ basis` with the orthonormal `basis = mixing @ update`, which would be as large as the update and
    is never formed. The basis is that of the singular vectors: only there each has a scale of its own, and those of
    noise do not blur the others.

    Args:
        update: (out, D) float64.
        precision: relative size of singular values that are nothing, float64's own unless given; their rows of
            `mixing` are 0.
    """
    rows = torch.linalg.qr(update.T, mode="r").R.T
    left, singular, right = torch.linalg.svd(rows, full_matrices=False)
    least = (torch.finfo(update.dtype).eps if precision is None else precision) * singular.norm()
    scale = torch.where(singular > least, 1 / singular, 0.0)
    return rows @ right.T, (left * scale).T  # rows of units that never were active stay exactly 0


def count_images(singular: Tensor, held: int, epochs: int) -> int:
    """Number of images: where the singular values (r,) of the first layer's update fall most steeply.

    Every class that somebody holds has an image, and the steepest fall is sought from there: the largest singular
    value, that of the images' mean, is far above all others. Where features drift much during the local steps, each
    image adds one direction an epoch: the steepest fall, down to the rounding of the weights, is at `epochs` times
    their number. That it is so shows where the images themselves end: just one is there for each class that is held,
    or one of the few other falls that stand out (the steepest twentieth before it).

    Args:
        singular: falling, positive.
        held: number of classes that somebody holds, as far as the last layer tells.
        epochs: steps in which each image takes part.
    """
    least = max(held, 1)
    if least >= len(singular):  # more images than units that were ever active: only their classes count them
        return least
    falls = singular[least - 1 : -1] / singular[least:]
    rank = least + int(falls.argmax())
    fewer = rank // epochs
    rounding = singular[rank] < 2 * singular[rank:].median()  # whose singular values are much alike
    if rounding and rank == fewer * epochs and least <= fewer < rank:
        before = falls[: rank - least]
        if fewer == held or before[fewer - least] >= before.quantile(0.95):
            return fewer
    return rank


def infer_labels(gradient: Tensor, num_images: int) -> Tensor:
    """(N,) labels in ascending order from the last layer's summed gradient (C, H).

    A class's deficit counts its images in units of a mean activation.
    """
    deficit, held = class_deficits(gradient)
    counts = held.long()
    quota = deficit * held * num_images / (deficit * held).sum()
    while counts.sum() < num_images:  # Sainte-Lague: the next image goes to the class with the largest quotient
        counts[(quota / (2 * counts + 1)).argmax()] += 1
    while counts.sum() > num_images:
        held_once = torch.where(counts > 0, quota, math.inf)
        counts[held_once.argmin()] -= 1
    return torch.arange(len(counts)).repeat_interleave(counts)


def class_deficits(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """How far each class's row sum of the last layer's gradient (C, H) lies below that of classes that nobody holds.

    Activations are not negative, so a row sums to `sum_m p_mc |h_m| - sum_{y_n = c} |h_n|`: classes that nobody holds
    give the positive part. They scatter as far below their median as above it. Without such classes there is no such
    yardstick, but a sum that is clearly negative is that of a class that somebody holds in any case.

    Returns:
        Deficits (C,), and whether somebody holds the class (C,).
    """
    sums = gradient.sum(1)
    empty = sums[sums > 0].median()
    deficit = (empty - sums).clamp_min(0)
    return deficit, (deficit > 2 * (sums.max() - empty)) | (sums < 0.01 * sums.min())


def head_inputs(gradient: Tensor, weight: Tensor, targets: Tensor, iterations: int = 30) -> tuple[Tensor, Tensor]:
    """Inputs (N, H) and probabilities (N, C) of a softmax layer from its summed gradient `(P - Y)^T inputs`.

    Args:
        gradient: (C, H), in any basis of the input space.
        weight: (C, H) in the same basis, half way through the local steps.
        targets: (N, C) one-hot. Images of one class come out as their common mean.
        iterations: at most, of the fixed point between inputs and probabilities.
    """
    probabilities = torch.full_like(targets, 1 / targets.shape[1])
    for _ in range(iterations):
        inputs = torch.linalg.lstsq((probabilities - targets).T, gradient, driver="gelsd").solution
        previous, probabilities = probabilities, (inputs @ weight.T).softmax(1)
        if (probabilities - previous).abs().max() < torch.finfo(gradient.dtype).eps:
            break
    return inputs, probabilities


@dataclass(frozen=True)
class Reading:
    """What one solver found: `coordinates` (N, r) of the features, `errors` (N, out), `peers` (N,), residuals."""

    coordinates: Tensor
    errors: Tensor
    peers: Tensor
    residual: float
    drift: float
    outside: float = 0.0


def read_single(space: RowSpace, targets: Tensor, beliefs: PeerTraining, scale: float) -> Reading:
    """Features of a head of one linear layer: they are its inputs."""
    rows = space.rows * scale
    middle = space.weight - space.rows * (beliefs.steps - 1) / (2 * beliefs.steps)
    features, probabilities = head_inputs(rows, middle, targets)
    errors = probabilities - targets
    residual = ((rows - errors.T @ features).norm() / rows.norm()).item()
    return Reading(features, errors, torch.zeros(len(targets), dtype=torch.long), residual, 0.0)


def read_stack(
    space: RowSpace,
    last: Sequence[Tensor],
    weight: Sequence[Tensor],
    targets: Tensor,
    beliefs: PeerTraining,
    scale: float,
    iterations: int,
) -> Reading:
    """Features of a head of two linear layers with a ReLU between.

    The hidden units of all rounds stand side by side, as if they were units of one wide layer.

    Args:
        space: of the first layer's updates, round under round.
        last: of each round, (C, H) update of the last layer, (C, H + 1) with a bias.
        weight: of each round, the last layer before it, of the same shape.
        targets: (N, C) one-hot.
        beliefs: how the peers trained.
        scale: N / (lr * steps).
        iterations: rounds of features -> simulated trajectory -> gates -> features.
    """
    steps, rows = beliefs.steps, space.rows * scale
    hidden = len(rows) // len(last)
    activations, errors = [], []
    for gradient, before in zip(last, weight, strict=True):
        middle = before - gradient * (steps - 1) / (2 * steps)
        inputs, probabilities = head_inputs(gradient * scale, middle, targets)
        activations.append(inputs[:, :hidden])
        errors.append(((probabilities - targets) @ middle)[:, :hidden])
    activations, errors = torch.cat(activations, 1), torch.cat(errors, 1)

    regression = GateRegression(rows, len(targets))
    noise = (errors.square().sum() / rows.square().sum() * regression.noise * len(targets)).expand(len(targets))
    prior = partial(gates_of_activations, activations)
    for _ in range(2 if steps > 1 else 0):
        gates = regression.best(prior, errors, noise)
        features = regress_features(rows, gates.mean * errors, gates.variance * errors**2, regression.noise)
        noise = regression.noise * torch.linalg.pinv(features @ features.T, hermitian=True).diagonal()
    if steps == 1:
        open_, features = binary_gates(rows, space.weight, errors, activations, space.update.shape[1])
        gates = Gates(open_, torch.zeros_like(open_))
    influence = torch.full((len(targets), len(targets)), 1 / len(targets), dtype=rows.dtype)
    peers = torch.zeros(len(targets), dtype=torch.long)
    bias = weight[0].shape[1] > hidden

    def train(features: Tensor, influence: Tensor) -> Trajectory:
        gram, starts = features @ features.T, (features @ space.weight.T).split(hidden, 1)
        return side_by_side(
            [
                simulate(gram, start, before, targets, influence, beliefs.lr, steps, bias)
                for start, before in zip(starts, weight, strict=True)
            ]
        )

    def reading(path: Trajectory) -> Reading:
        gated = gates.mean * errors
        throughout = (path.preactivations > 0).all(0)
        mismatch = (path.activations - activations)[throughout].square().mean().sqrt() / activations[throughout].mean()
        residual = ((rows - gated.T @ features).norm() / rows.norm()).item()
        return Reading(features, gated, peers, residual, mismatch.item())

    path = train(features, influence)
    readings = [reading(path)]
    for _ in range(iterations if steps > 1 else 0):
        seen = (path.preactivations > 0).all(0).to(rows)
        drift = path.preactivations[0] - activations
        influence = co_members(drift, seen, features @ features.T, path.past, beliefs.lr, influence)
        peers = group_peers(influence)
        together = (peers[:, None] == peers).to(rows)
        influence = together / together.sum(1, keepdim=True)
        if len(readings) == 1:  # it was read as if all had trained together; its drift shows who did
            readings[0] = replace(readings[0], peers=peers)
        path = train(features, influence)
        residuals = path.residuals.split(targets.shape[1], 1)
        activations = torch.cat(
            [
                torch.linalg.lstsq(residual.T, gradient * scale, driver="gelsd").solution[:, :hidden]
                for residual, gradient in zip(residuals, last, strict=True)
            ],
            1,
        )
        errors = path.errors.mean(0)
        gates = regression.best(partial(gates_of_trajectory, path, activations), errors, noise)
        features = regress_features(rows, gates.mean * errors, gates.variance * errors**2, regression.noise)
        noise = regression.noise * torch.linalg.pinv(features @ features.T, hermitian=True).diagonal()
        path = train(features, influence)
        readings.append(reading(path))
        if (features - readings[-2].coordinates).norm() < torch.finfo(torch.float32).eps * features.norm():
            break
    return min(readings, key=lambda found: found.drift)  # a simulation from poor features leads away


def read_shared(
    space: RowSpace, last: Tensor, weight: Tensor, num_images: int, beliefs: PeerTraining, scale: float, iterations: int
) -> tuple[Tensor, Reading]:
    """Labels (N,) and features of a head of two linear layers where images share classes, as they must if few.

    The last layer then shows only sums of activations. So the first layer alone tells the images apart (`separate`),
    the gates follow from the features by simulated training, and the sums tell who trained together.

    Args:
        space: of the first layer's update.
        last: (C, H) update of the last layer, (C, H + 1) with a bias.
        weight: of the last layer before the round, of the same shape.
        num_images: N.
        beliefs: how the peers trained.
        scale: N / (lr * steps).
        iterations: rounds of features -> simulated trajectory -> gates -> features.

    Raises:
        AttackError: not one image can be told apart.
    """
    hidden, steps, rows = len(space.rows), beliefs.steps, space.rows * scale
    half_way = (steps - 1) / (2 * steps)
    middle = (weight - last * half_way)[:, :hidden]
    class_errors = middle.mean(0) - middle  # of a model that knows nothing yet
    if beliefs.labels is None:
        sums = last[:, :hidden].sum(1)  # falls with each image that a class has
        quota = num_images / len(last) * (1 - sums / (2 * sums.max()))
    else:
        quota = beliefs.labels.bincount(minlength=len(last))
    first = space.weight - space.rows * half_way
    separation = separate(rows, first, class_errors, num_images, quota, exact=beliefs.labels is not None)
    if not len(separation.labels):
        raise AttackError(
            f"Images of the {num_images} in this aggregate share classes, and none of them can be told apart: no gates "
            "agree with the first layer's update. The model may be too well trained, the learning rate or the number "
            "of local steps too high, or the number of images wrong: at high rates it may come out as itself times the "
            "local epochs. Give it as `knowledge.num_images`, or attack by gradient matching instead."
        )
    order = separation.labels.argsort(stable=True)
    if beliefs.labels is not None and len(order) == len(beliefs.labels):
        order = order[beliefs.labels.argsort(stable=True).argsort()]
    labels, gates = separation.labels[order], separation.gates[order]
    targets = F.one_hot(labels, len(last)).to(last)

    def train(features: Tensor, influence: Tensor) -> Trajectory:
        gram, start = features @ features.T, features @ space.weight.T
        return simulate(gram, start, weight, targets, influence, beliefs.lr, steps, weight.shape[1] > hidden)

    regression = GateRegression(rows, num_images)
    features = torch.linalg.lstsq((gates * class_errors[labels]).T, rows, driver="gelsd").solution
    influence = torch.full((len(labels), len(labels)), 1 / num_images, dtype=rows.dtype)
    path = train(features, influence)
    for _ in range(iterations):
        gram = features @ features.T
        if steps > 1:
            # differences between the probabilities of one class's images are too small to tell them apart
            missing = last[:, :hidden] * scale - path.residuals.T @ path.activations
            shown = path.activations + torch.linalg.pinv(path.residuals.T, rtol=0.1) @ missing
            seen = (path.preactivations > 0).all(0).to(rows)
            mixing = path.residuals @ path.residuals.T
            drift = path.preactivations[0] - shown
            influence = co_members(drift, seen, gram, path.past, beliefs.lr, influence, mixing=mixing)
            path = train(features, influence)
        errors = path.errors.mean(0)
        noise = regression.noise * torch.linalg.pinv(gram, hermitian=True).diagonal()
        belief = regression.best(partial(gates_of_trajectory, path, None), errors, noise)
        gated = belief.mean * errors
        features = regress_features(rows, gated, belief.variance * errors**2, regression.noise)
        path = train(features, influence)
    peers = group_peers(influence) if steps > 1 else torch.zeros_like(labels)
    residual = ((rows - gated.T @ features).norm() / rows.norm()).item()
    sums = path.residuals.T @ path.activations
    drift = ((sums - last[:, :hidden] * scale).norm() / sums.norm()).item()
    return labels, Reading(features, gated, peers, residual, drift, separation.outside.max().item())
