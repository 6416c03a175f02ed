"""The closed form where the attacker knows the peers' defence: counts, labels, and a reading made for the defence."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from attack_modules.analytic.counting import read_counts
from attack_modules.analytic.defended_head import (
    DefendedLayer,
    DefendedReading,
    Expected,
    HeadRound,
    LastLayer,
    UnreadableDefense,
)
from attack_modules.analytic.leak import leak_rounds
from attack_modules.analytic.one_layer import head_inputs
from attack_modules.analytic.results import Diagnosis, Leakage, TrainingKnowledge
from attack_modules.analytic.row_space import RowSpace, augmented
from attack_modules.attack import AttackError
from fl_lightning.errors import counted
from fl_lightning.loss import logit_errors

TYPICAL = 0.5
"""Share of typical features that is expected of images."""

MOST_AMPLIFIED = 100.0
"""Factor by which unmixing may amplify errors."""


def leak_known(
    updates: Sequence[Mapping[str, Tensor]], weights: Sequence[Mapping[str, Tensor]], training: TrainingKnowledge
) -> Leakage:
    """`leak_rounds`, or `leak_defended` where a defence or optimiser is known that asks for it and can be read.

    Raises:
        UnreadableDefense: neither reads the update. What stops the plain attack then says nothing, as a count of
            hundreds of images.
        AttackError: there is no such defence, and the update cannot be read.
    """
    if training.reading:
        try:
            return leak_defended(updates, weights, training, training.reading)
        except UnreadableDefense as error:
            rank_zero_warn(f"{error} The attack goes on as if the peers trained by SGD without a defence.")
            try:
                return leak_rounds(updates, weights, training)
            except AttackError as plain:
                raise UnreadableDefense(
                    f"{error} As if the peers trained by SGD without a defence, the update cannot be read either. "
                    "Attack a round that can be, or check `knowledge.optimizer` and `knowledge.defenses`."
                ) from plain
    return leak_rounds(updates, weights, training)


def leak_defended(
    updates: Sequence[Mapping[str, Tensor]],
    weights: Sequence[Mapping[str, Tensor]],
    training: TrainingKnowledge,
    reading: DefendedReading,
) -> Leakage:
    """Read labels and features out of the head's part of defended updates; arguments as of `leak.leak_rounds`.

    The last layer is read from the rows of the held classes alone: they are far larger than all others, so that pruning
    keeps and rounding resolves them. Images are counted and classes found in the mean of all rounds.

    Raises:
        UnreadableDefense: the head is not two linear layers, images share classes or there is one of each class,
            equations cannot be solved, the reading leaves too much unexplained, or says itself why.
    """
    layers, before = [augmented(update) for update in updates], [augmented(weight) for weight in weights]
    if len(layers[0]) != 2:
        raise UnreadableDefense(
            f"A known defence or optimiser is read from heads of two linear layers, but this one has {len(layers[0])} "
            f"({', '.join(updates[0])})."
        )
    if reading.single_step and len(updates) * training.steps > 1:
        raise UnreadableDefense(
            f"{type(reading).__name__} reads the peers' updates from a single local step of one round, but "
            f"{counted(len(updates), 'round')} of {counted(training.steps, 'step')} came."
        )
    first, last = (torch.stack([layer[i] for layer in layers]).mean(0) for i in (0, 1))
    hidden = next(reversed([tensor.shape[1] for tensor in weights[0].values() if tensor.ndim == 2]))
    space = RowSpace.of(first, before[0][0])
    count, labels = read_counts(space, [last.double()], hidden, training)
    if not reading.shows_rank and training.num_images is None and training.labels is None:
        _, labels = read_counts(space, [last.double()], hidden, replace(training, num_images=count.held))
        count = replace(count, num_images=count.held, counted=False, shown=count.held)
    if len(labels.unique()) < len(labels) or len(labels) == len(last):
        raise UnreadableDefense(
            f"{len(labels)} images are of {len(labels.unique())} of {len(last)} classes, but a known defence or "
            "optimiser is read only where every image has a class of its own, and a class has none."
        )
    scale = len(labels) / (training.lr * training.steps)
    targets = training.loss.targets(labels, len(last), last.double(), training.sizes)
    known = training.typical
    probabilities = torch.full_like(targets[0], 1 / targets.shape[1]) if known is None else known.probabilities
    shown = LastLayer(last.double() * scale, before[0][1].double(), labels, targets, probabilities, scale)
    if (mixing := _mixing(reading, space, shown, training)) is not None:
        shown = replace(shown, targets=mixing @ targets)
    width = next(tensor.shape[1] for tensor in weights[0].values() if tensor.ndim == 2)
    typical = torch.zeros(width) if known is None or known.features is None else TYPICAL * known.features
    try:
        rounds = [
            head_round(update, weight, shown, hidden, training.half_way)
            for update, weight in zip(layers, before, strict=True)
        ]
        layer = DefendedLayer(reading, rounds)
        found = layer.solve(Expected(typical.expand(len(labels), -1), torch.ones(len(labels))))
        conditioning = torch.linalg.cond(found.gated).item()
    except torch.linalg.LinAlgError as error:
        raise UnreadableDefense(
            f"The head's update gives {type(reading).__name__} equations that cannot be solved. Check `knowledge` "
            "(rates, local epochs, number of images)."
        ) from error
    if found.residual > reading.most_unexplained:
        raise UnreadableDefense(
            f"{type(reading).__name__} leaves {found.residual:.0%} of the head's update unexplained, as where the "
            "local training changes the model much."
        )
    singular, n = space.singular, len(labels)
    return Leakage(
        labels=labels,
        features=found.features[:, :width].float(),
        peers=found.peers,
        diagnosis=Diagnosis(
            **{**vars(count), "noise": found.noise and found.noise / scale},
            disentangled=n,
            gap=(singular[n - 1] / singular[n]).item() if n < len(singular) else 1.0,
            residual=found.residual,
            conditioning=conditioning,
            drift=0.0,
            outside=0.0,
            checked=len(singular) > n,
        ),
        uncertainty=found.uncertainty.float(),
        ones=found.features[:, width].float() if found.features.shape[1] > width else None,
        noisy=reading.noisy,
        defended=layer,
        mixing=None if mixing is None else mixing.float(),
        weights=None if found.weights is None else found.weights[:, :width].float(),
    )


def _mixing(reading: DefendedReading, space: RowSpace, last: LastLayer, training: TrainingKnowledge) -> Tensor | None:
    """`DefendedReading.mixing` of the first layer's update in its row space, where it can be undone."""
    directions = torch.linalg.svd(space.rows, full_matrices=False).U[:, : len(last.labels)]
    mixing = reading.mixing(directions, last)
    if mixing is None:
        return None
    if training.loss.class_weights is not None:
        raise UnreadableDefense("Images are mixed, which is not read where the loss weighs classes.")
    if (amplified := torch.linalg.cond(mixing).item()) > MOST_AMPLIFIED:
        raise UnreadableDefense(
            f"Images are mixed nearly half and half, so that unmixing them would amplify errors {amplified:.0f} times."
        )
    return mixing


def head_round(
    update: Sequence[Tensor], weight: Sequence[Tensor], last: LastLayer, hidden: int, half_way: float
) -> HeadRound:
    """One round, with activations and errors from the rows of the held classes.

    Args:
        update: of both layers, (H, D) and (C, H), a bias as one more column.
        weight: the same before the round.
        last: the last layer, whose labels are distinct.
        hidden: H.
        half_way: share of the update after which the model is half way through the local steps.
    """
    labels, targets, scale = last.labels, last.targets, last.scale
    gradient, middle = update[1].double() * scale, weight[1].double() - update[1].double() * half_way
    inputs, probabilities = head_inputs(gradient, middle, targets, classes=labels)
    errors = (logit_errors(probabilities, targets) @ middle)[:, :hidden]
    own = replace(last, gradient=gradient, weight=weight[1].double())
    return HeadRound(update[0] * scale, weight[0] - update[0] * half_way, inputs[:, :hidden], errors, own)
