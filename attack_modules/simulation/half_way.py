"""The model half way through the peers' training."""

from collections.abc import Sequence

import torch

from fl_lightning.client import Tensors
from fl_lightning.models import ImageClassifier
from fl_lightning.observation import Observation


@torch.no_grad()
def model_half_way(observations: Sequence[Observation], updates: Sequence[Tensors], steps: int) -> ImageClassifier:
    """The global model half way through the peers' training; of several rounds, the mean of these. It is not trained.

    Before step s of T the peers' mean model has gone (s - 1)/T of the way, on average (T - 1)/2T.

    Args:
        observations: the rounds.
        updates: of the peers in each, parameters before minus after by name.
        steps: that each peer takes in a round.
    """
    model, elapsed = observations[0].build_model(), (steps - 1) / (2 * steps)
    for name, tensor in model.named_parameters():
        halves = [o.before[name] - elapsed * u[name] for o, u in zip(observations, updates, strict=True)]
        tensor.copy_(sum(halves) / len(halves))
    return model.requires_grad_(False)
