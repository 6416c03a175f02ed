"""The global model half way through the peers' training."""

from collections.abc import Sequence

import torch

from attack_modules.threat_model.assumptions import half_way
from attack_modules.threat_model.trial import without_dropout
from fl_lightning.client import Tensors
from fl_lightning.models import ImageClassifier
from fl_lightning.observation import Observation


@torch.no_grad()
def model_half_way(observations: Sequence[Observation], updates: Sequence[Tensors], steps: int) -> ImageClassifier:
    """The global model after `half_way(steps)` of the peers' update; of several rounds, the mean of these models.

    Args:
        observations: the rounds.
        updates: the peers' update of each round, parameters before minus after by name.
        steps: local steps that each peer takes in a round.

    Returns:
        A model whose parameters do not require gradients, and whose dropouts do nothing.
    """
    model, elapsed = observations[0].build_model(), half_way(steps)
    for name, tensor in model.named_parameters():
        halves = [o.before[name] - elapsed * u[name] for o, u in zip(observations, updates, strict=True)]
        tensor.copy_(sum(halves) / len(halves))
    return without_dropout(model).requires_grad_(False)
