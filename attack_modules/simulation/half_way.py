"""The global model half way through the peers' training."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from attack_modules.threat_model.assumptions import half_way
from attack_modules.threat_model.trial import without_dropout
from fl_lightning.client import Tensors
from fl_lightning.models import ImageClassifier
from fl_lightning.observation import Observation, build_on_meta


@torch.no_grad()
def model_half_way(observations: Sequence[Observation], updates: Sequence[Tensors], steps: int) -> ImageClassifier:
    """The feature extractor after `half_way(steps)` of the peers' update; of several rounds, the mean of these.

    Args:
        observations: the rounds.
        updates: the peers' update of each round, parameters before minus after by name.
        steps: local steps that each peer takes in a round.

    Returns:
        A model whose parameters do not require gradients, and whose dropouts do nothing. Its head, of 100 MB and more,
        is not needed for features: it is the first round's, whose tensors it shares.
    """
    first, elapsed = observations[0], half_way(steps)
    head = set(build_on_meta(first.model).head_parameters)
    state = {name: tensor if name in head else tensor.clone() for name, tensor in first.before.items()}
    model = replace(first, before=state).build_model(shared=True)
    for name, tensor in model.named_parameters():
        if name not in head:
            halves = [o.before[name] - elapsed * u[name] for o, u in zip(observations, updates, strict=True)]
            tensor.copy_(sum(halves) / len(halves))
    return without_dropout(model).requires_grad_(False)
