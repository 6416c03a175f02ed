"""How the features of images drift while peers train, and the update of the head's first layer that this gives."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fl_lightning.client import Tensors
from fl_lightning.knowledge import Beliefs
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


@dataclass(frozen=True)
class SimulatedTraining:
    """One round of the peers' training as simulated on N images; H outputs and D inputs of the head's first layer.

    Attributes:
        features: (N, D) mean over the local steps of each image's features.
        errors: (N, H) of each image, so that `update` is nearly `errors.T @ features`, and just that in one step.
        update: (H, D) weighted mean over the peers of the first layer's weight before minus after.
    """

    features: Tensor
    errors: Tensor
    update: Tensor


def simulate_peers(
    model: ImageClassifier, images: Tensor, labels: Tensor, peers: Tensor, beliefs: Beliefs, num_images: int
) -> SimulatedTraining:
    """Every peer's SGD on its own images, in full batches.

    Args:
        model: the global model before the round; left as it is.
        images: (N, C, H, W) in [0, 1], as well as they are known.
        labels: (N,) long.
        peers: (N,) long; each number is one peer, which trains on its images alone.
        beliefs: of the peers' training.
        num_images: of all peers, of which these may be a part.
    """
    steps = beliefs.local_steps
    update = torch.zeros_like(model.head[0].weight)
    features, errors = [], []
    members = [torch.where(peers == peer)[0] for peer in peers.unique()]
    for own in members:
        share = len(own) / num_images
        local = copy.deepcopy(model).requires_grad_(True)
        optimizer = torch.optim.SGD(
            local.parameters(), beliefs.client_lr, momentum=beliefs.momentum, weight_decay=beliefs.weight_decay
        )
        seen, blamed = torch.zeros(()), torch.zeros(())
        for _ in range(steps):
            with torch.enable_grad():
                inputs = local.embed(images[own])
                outputs = local.head[0](inputs)
                outputs.retain_grad()
                loss = F.cross_entropy(local.head[1:](outputs), labels[own])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen, blamed = seen + inputs.detach() / steps, blamed + outputs.grad
        features.append(seen)
        errors.append(share * beliefs.mean_rate * blamed)
        update += share * (model.head[0].weight - local.head[0].weight).detach()
    order = torch.cat(members).argsort()
    return SimulatedTraining(torch.cat(features)[order], torch.cat(errors)[order], update)
