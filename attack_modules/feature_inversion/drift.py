"""How the features of images drift while the peers train, and the update of the head's first layer that results."""

from dataclasses import dataclass, replace
from functools import reduce
from operator import add

import torch
from torch import Tensor

from attack_modules.simulation.local_training import SimulatedPeers
from attack_modules.simulation.low_rank import LowRank
from attack_modules.threat_model.observed import ObservedRound


@dataclass(frozen=True)
class SimulatedRound:
    """One round of the peers' training as simulated on N images; H outputs and D inputs of the head's first layer.

    Attributes:
        features: (N, D) mean over the local steps of each image's features.
        errors: (N, H) back-propagated errors of each image, summed over the steps, so that `errors.T @ features` is
            nearly `update`, and exactly so for one step.
        update: (H, D) weighted mean over the peers of the first layer's weight before minus after, in factors.
    """

    features: Tensor
    errors: Tensor
    update: LowRank


def full_batches(observed: ObservedRound, device: torch.device) -> SimulatedPeers:
    """The training of one peer in its assumed number of steps, each on all of its images.

    Raises:
        RequirementError: the model has random layers.
    """
    assumptions = replace(observed.assumptions, batch_size=None, local_epochs=observed.assumptions.local_steps)
    return SimulatedPeers(replace(observed, assumptions=assumptions), merged=True, device=device)


@torch.no_grad()
def simulate_peers(
    training: SimulatedPeers, images: Tensor, labels: Tensor, peers: Tensor, num_images: int
) -> SimulatedRound:
    """Every peer's SGD on its own images.

    Args:
        training: of one peer, see `full_batches`.
        images: (N, C, H, W) current estimates in [0, 1].
        labels: (N,) long.
        peers: (N,) long; images with the same number belong to one peer, which trains on them alone.
        num_images: of all peers together; `images` may be a part of them.
    """
    members = [torch.where(peers == peer)[0] for peer in peers.unique()]
    first = training.model.first_layer
    updates = [len(own) / num_images * training.mean_update(images[own], labels[own])[first] for own in members]
    order = torch.cat(members).argsort()
    features = torch.cat([torch.stack(update.right).mean(0) for update in updates])
    errors = torch.cat([torch.stack(update.left).sum(0) for update in updates])
    return SimulatedRound(features[order], errors[order], reduce(add, updates))
