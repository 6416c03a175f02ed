"""The head's part of an observed round, in the form that the closed form takes."""

from collections.abc import Mapping

import torch
from torch import Tensor

from attack_modules.analytic.adam_step import AdamStep
from attack_modules.analytic.bucket_norms import BucketNorms
from attack_modules.analytic.counting import read_counts
from attack_modules.analytic.defended_head import DefendedReading
from attack_modules.analytic.mixed_images import MixedImages
from attack_modules.analytic.noisy_gates import NoisyGates
from attack_modules.analytic.pruned_update import PrunedUpdate
from attack_modules.analytic.results import TrainingKnowledge
from attack_modules.analytic.row_space import RowSpace, augmented
from attack_modules.analytic.signed_update import SignedUpdate
from attack_modules.analytic.typical_head import TypicalHead
from attack_modules.threat_model.observed import ObservedRound
from attack_modules.threat_model.trial import Trial
from fl_lightning.client import Tensors
from fl_lightning.defenses import Dropout
from fl_lightning.models import ImageClassifier

READINGS: tuple[type[DefendedReading], ...] = (PrunedUpdate, BucketNorms, NoisyGates, MixedImages, SignedUpdate)
"""Readings of defended updates; the first that the known defences ask for is taken."""


def head_parameters(state: Mapping[str, Tensor], model: ImageClassifier) -> Tensors:
    """The parameters of the head in the order of its layers; a saved Observation has them in alphabetical order."""
    return {name: state[name] for name in model.head_parameters}


def training_knowledge(seen: ObservedRound, model: ImageClassifier) -> TrainingKnowledge:
    """What is assumed of a round's training, with what the model's head typically computes if labels are unknown."""
    known = seen.assumptions
    labels = None if known.labels is None else torch.tensor(known.labels)
    defenses = [*known.defenses, *known.server_defenses]
    kinds = READINGS if known.optimizer == "SGD" else () if known.weight_decay else (AdamStep,)
    reading = next((made for kind in kinds if (made := kind.against(defenses))), None)
    typical = TypicalHead.of(model, seen.observation.image_shape) if labels is None or reading else None
    ordered = labels is not None and known.sources.get("labels") == "known"
    return TrainingKnowledge(
        known.mean_rate,
        known.local_steps,
        known.num_images,
        labels,
        known.local_epochs,
        typical,
        known.loss,
        known.client_sizes if ordered else None,
        reading,
        dropout_of_one_step(seen, model),
    )


def dropout_of_one_step(seen: ObservedRound, model: ImageClassifier) -> tuple[float, ...]:
    """Rate at which the inputs of each of the head's linear layers are dropped in a single local step.

    It is the model's own dropout, and that which the peers are known to add. Empty without, and of several steps, which
    drop other units each.
    """
    rates, known = Trial.of(model).dropout, seen.assumptions
    if rates is None or known.local_steps > 1:
        return ()
    for defense in known.defenses:
        if isinstance(defense, Dropout):
            rates = tuple(1 - (1 - a) * (1 - b) for a, b in zip(rates, defense.rates(len(rates)), strict=True))
    return rates if any(rates) else ()


def labels_in(seen: ObservedRound, update: Tensors, model: ImageClassifier) -> Tensor:
    """(N,) labels of the images in an update: as told, or ascending as the head's update shows them.

    Args:
        seen: the observed round.
        update: the peers' mean update by parameter name.
        model: the global model before the round.

    Raises:
        AttackError: the number of images is neither known nor visible in a rank.
    """
    if seen.assumptions.labels is not None:  # of any head
        return torch.tensor(seen.assumptions.labels)
    layers = augmented(head_parameters(seen.without_weight_decay(update), model))
    before = augmented(head_parameters(seen.observation.before, model))
    space, training = RowSpace.of(layers[0], before[0]), training_knowledge(seen, model)
    return read_counts(space, [layers[-1].double()], model.head[-1].in_features, training)[1]
