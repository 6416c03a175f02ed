"""How the features of images drift while peers train, and the update of the head's first layer that this gives."""

from dataclasses import dataclass, replace
from functools import reduce
from operator import add

import torch
from torch import Tensor

from attack_modules.simulation.local_training import SimulatedPeers
from attack_modules.simulation.low_rank import LowRank
from fl_lightning.models import FIRST_LAYER
from fl_lightning.observation import Observation


@dataclass(frozen=True)
class SimulatedRound:
    """One round of the peers' training as simulated on N images; H outputs and D inputs of the head's first layer.

    Attributes:
        features: (N, D) mean over the local steps of each image's features.
        errors: (N, H) of each image, so that `update` is nearly `errors.T @ features`, and just that in one step.
        update: (H, D) weighted mean over the peers of the first layer's weight before minus after, in factors.
    """

    features: Tensor
    errors: Tensor
    update: LowRank


def full_batches(observation: Observation, device: torch.device) -> SimulatedPeers:
    """Training of one peer in as many steps as it is believed to take, each on all of its images.

    Raises:
        SimulationError: the model draws random numbers.
    """
    beliefs = replace(observation.beliefs, batch_size=None, local_epochs=observation.beliefs.local_steps)
    return SimulatedPeers(replace(observation, beliefs=beliefs), merged=True, device=device)


@torch.no_grad()
def simulate_peers(
    training: SimulatedPeers, images: Tensor, labels: Tensor, peers: Tensor, num_images: int
) -> SimulatedRound:
    """Every peer's SGD on its own images.

    Args:
        training: of one peer, see `full_batches`.
        images: (N, C, H, W) in [0, 1], as well as they are known.
        labels: (N,) long.
        peers: (N,) long; each number is one peer, which trains on its images alone.
        num_images: of all peers, of which these may be a part.
    """
    members = [torch.where(peers == peer)[0] for peer in peers.unique()]
    updates = [len(own) / num_images * training.mean_update(images[own], labels[own])[FIRST_LAYER] for own in members]
    order = torch.cat(members).argsort()
    features = torch.cat([torch.stack(update.right).mean(0) for update in updates])
    errors = torch.cat([torch.stack(update.left).sum(0) for update in updates])
    return SimulatedRound(features[order], errors[order], reduce(add, updates))
