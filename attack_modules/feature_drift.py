"""How the features of images drift while peers train: what leaks is their mean over the local steps."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

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


def mean_features(
    model: ImageClassifier, images: Tensor, labels: Tensor, peers: Tensor, lr: float, steps: int
) -> Tensor:
    """(N, D) mean over the local steps of the features that images have in the training of their own peer.

    Args:
        model: the global model before the round; left as it is.
        images: (N, C, H, W) in [0, 1], as well as they are known.
        labels: (N,) long.
        peers: (N,) long; each number is one peer, which trains on its images alone.
        lr: of the peers' SGD.
        steps: full-batch steps that each peer takes.
    """
    means = []
    members = [torch.where(peers == peer)[0] for peer in peers.unique()]
    for own in members:
        local = copy.deepcopy(model).requires_grad_(True)
        optimizer = torch.optim.SGD(local.parameters(), lr)
        total = torch.zeros(())
        for _ in range(steps):
            with torch.enable_grad():
                features = local.embed(images[own])
                loss = F.cross_entropy(local.head(features), labels[own])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total = total + features.detach()
        means.append(total / steps)
    return torch.cat(means)[torch.cat(members).argsort()]
