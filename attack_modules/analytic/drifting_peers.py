"""Who trained together under a frozen backbone: images move each other's predictions during full-batch local steps.

With the features of all N images known, the training of the head is a closed system. The logits of an image before step
s of a round are `W x_n - lr sum_m M_nm (x_n . x_m) sum_(s' < s) (p_m - y_m)`, where the coupling `M_nm` is `1 / n_k` of
two images of one peer of n_k images, and 0 of images of different ones. The sums of all steps' errors are observed. So
couplings are found first as any numbers that are not negative and add up to 1 in each row, image by image, by Gauss and
Newton's method on simulated trajectories. Their trace is the number of peers. Images are then grouped by their
couplings, and moved from peer to peer as long as the exact simulation explains the errors better.

Time is `30 T R C N^3` flops for the couplings, and `T R C K N^3` for each sweep of the moves, of K peers.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.optimize import nnls
from torch import Tensor

ITERATIONS = 24
"""Of the couplings, each half a step of Gauss and Newton's. Measured: 4 peers of 4 images are apart after 12."""
ROW_SUM = 3.0
"""Weight of a row's sum, in units of the root mean square column of its Jacobian."""
SWEEPS = 10
"""Most of the moves of images."""
EXPLAINED = 0.1
"""Largest residual at which peers count as found. Measured: up to 0.015 where they are right, 0.22 and more where peers
train in mini-batches or with momentum, of which the simulation knows nothing."""


@dataclass(frozen=True)
class HeadSteps:
    """Full-batch local steps of a linear head on images of known features.

    Attributes:
        logits: (R, C, N) of the images before each round.
        gram: (N, N) inner products of the features, with the 1 of a bias.
        targets: (C, N) of the loss.
        presence: (R, N) bool: whether an image's peer took part.
        rate: of a step.
        steps: of each round.
    """

    logits: Tensor
    gram: Tensor
    targets: Tensor
    presence: Tensor
    rate: float
    steps: int

    def simulate(self, coupling: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(R, C, N) errors summed over the steps; (T, R, C, N) the sums before each step, and probabilities in it.

        Args:
            coupling: (N, N).
        """
        total = torch.zeros_like(self.logits)
        before, probabilities = [], []
        moved = self.rate * self.gram * coupling
        for _ in range(self.steps):
            before.append(total)
            probabilities.append((self.logits - total @ moved).softmax(1))
            total = total + (probabilities[-1] - self.targets) * self.presence[:, None]
        return total, torch.stack(before), torch.stack(probabilities)

    def unexplained(self, coupling: Tensor, errors: Tensor) -> Tensor:
        """(N,) squared differences of the simulated from the observed errors (R, C, N)."""
        return (self.simulate(coupling)[0] - errors).square().sum((0, 1))


@dataclass(frozen=True)
class DriftingPeers:
    """Who trained together.

    Attributes:
        peers: (N,) long, from 0.
        residual: norm of what the peers' simulated training leaves of the errors, over what images leave that do not
            move each other, nor themselves.
    """

    peers: Tensor
    residual: float

    @property
    def explained(self) -> bool:
        """Whether the peers are told apart for sure."""
        return self.residual <= EXPLAINED


def couplings(training: HeadSteps, errors: Tensor) -> Tensor:
    """(N, N) symmetric couplings that explain the errors (R, C, N) of all steps, to be found without groups."""
    size = len(training.gram)
    coupling = torch.full((size, size), 1 / size).to(errors)
    for _ in range(ITERATIONS):
        total, before, probabilities = training.simulate(coupling)
        new = torch.zeros_like(coupling)
        for image in range(size):
            change = torch.zeros_like(total)  # of the errors, by each of the couplings
            for so_far, soft in zip(before, probabilities[..., image : image + 1], strict=True):
                own = coupling[image, image] * training.gram[image, image] * change
                moved = -training.rate * soft * (training.gram[image] * so_far + own)
                change = change + (moved - soft * moved.sum(1, keepdim=True)) * training.presence[:, image, None, None]
            jacobian = change.flatten(0, 1)
            wanted = (errors - total)[:, :, image].flatten() + jacobian @ coupling[image]
            weight = ROW_SUM * jacobian.norm() / size**0.5
            system = torch.cat([jacobian, weight * torch.ones(1, size).to(jacobian)])
            right = torch.cat([wanted, weight[None]])
            new[image] = torch.from_numpy(nnls(system.numpy(), right.numpy(), maxiter=100 * size)[0])
        coupling = (coupling + (new + new.T) / 2) / 2
    return coupling


def drifting_peers(training: HeadSteps, errors: Tensor) -> DriftingPeers:
    """Group the images by peer, without being told how many peers there are, or how many images each has.

    Args:
        training: of more than one step.
        errors: (R, C, N) observed: the sum over the steps of each image's predictions less its target.
    """
    size = len(training.gram)
    coupling = couplings(training, errors)
    apart = (coupling.max() - coupling).numpy()
    tree = linkage(apart[np.triu_indices(size, 1)], "average")
    still = training.unexplained(torch.zeros_like(coupling), errors).sum()
    number = round(coupling.trace().item())
    best, least = torch.zeros(size, dtype=torch.long), torch.tensor(torch.inf)
    for count in range(max(number - 1, 1), min(number + 1, size) + 1):
        peers = torch.from_numpy(fcluster(tree, count, "maxclust")).long() - 1
        peers, left = moved_images(training, errors, peers)
        if left < least:
            best, least = peers, left
    return DriftingPeers(best.unique(return_inverse=True)[1], (least / still).sqrt().item())


def moved_images(training: HeadSteps, errors: Tensor, peers: Tensor) -> tuple[Tensor, Tensor]:
    """Move one image after the other to the peer with which all errors are explained best.

    Args:
        training: of the peers.
        errors: (R, C, N) observed.
        peers: (N,) long, where to begin.

    Returns:
        The new peers, and the squared norm of what they leave unexplained.
    """
    peers, count = peers.clone(), int(peers.max()) + 1
    rows = training.unexplained(coupling_of(peers), errors)
    for _ in range(SWEEPS):
        before = rows.sum()
        for image in rows.argsort(descending=True).tolist():
            for other in range(count):
                tried = peers.clone()
                tried[image] = other
                left = training.unexplained(coupling_of(tried), errors)
                if left.sum() < rows.sum():
                    peers, rows = tried, left
        if rows.sum() >= before:
            break
    return peers, rows.sum()


def coupling_of(peers: Tensor) -> Tensor:
    """(N, N): the inverse of a peer's number of images, for two of its images; peers (N,)."""
    same = (peers[:, None] == peers).double()
    return same / same.sum(1, keepdim=True)
