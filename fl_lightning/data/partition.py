"""Who holds which images: clients that are alike, and clients that are not."""

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from fl_lightning.errors import SettingError


class Partition(ABC):
    """Deals images to clients by their labels; nobody gets an image that somebody else has."""

    def __call__(
        self, labels: Tensor, sizes: list[int] | None, num_clients: int, generator: torch.Generator
    ) -> list[Tensor]:
        """Each client's images as indices into `labels`, long (its number of images,).

        Args:
            labels: class index of every image there is, long (M,).
            sizes: how many images each client gets, met exactly; None: all images are divided.
            num_clients: how many clients there are.
            generator: the only source of chance.

        Raises:
            ValueError: there are too few images, or a client would be left without.
        """
        if sizes is None and len(labels) < num_clients:
            raise SettingError(
                f"There are {len(labels)} images for {num_clients} clients, so some would have none. "
                "Lower `data.num_clients` or give more images."
            )
        if sizes is not None and sum(sizes) > len(labels):
            raise SettingError(
                f"There are {len(labels)} images, but {num_clients} clients ask for {sum(sizes)} "
                f"({', '.join(map(str, sizes))}). Lower `data.images_per_client` or `data.num_clients`, set "
                "`data.images_per_client` to null to divide what there is, or give more images."
            )
        return self.divide(labels, sizes, num_clients, generator)

    @abstractmethod
    def divide(
        self, labels: Tensor, sizes: list[int] | None, num_clients: int, generator: torch.Generator
    ) -> list[Tensor]:
        """As `__call__`, which has checked that there are enough images."""


class InOrder(Partition):
    """The first client gets the first images, and so on; without sizes, equally many each."""

    def divide(
        self, labels: Tensor, sizes: list[int] | None, num_clients: int, generator: torch.Generator
    ) -> list[Tensor]:
        return cut(torch.arange(len(labels)), sizes, num_clients)


class IID(Partition):
    """Each client draws from all images alike; without sizes, equally many each."""

    def divide(
        self, labels: Tensor, sizes: list[int] | None, num_clients: int, generator: torch.Generator
    ) -> list[Tensor]:
        return cut(torch.randperm(len(labels), generator=generator), sizes, num_clients)


class Dirichlet(Partition):
    """Each client has its own mixture of classes, q ~ Dir(alpha p), p being the mixture of the whole dataset.

    Hsu et al. 2019, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification"
    (arXiv 1909.06335, section 3); as there, without sizes, equally many images each. Clients take turns by chance,
    image by image, so that a class that runs out is missed by all alike.

    Args:
        alpha: concentration, > 0; small values give each client few classes, large ones approach `IID`.
    """

    def __init__(self, alpha: float) -> None:
        if alpha <= 0:
            raise SettingError(f"`data.partition.alpha` is {alpha}, but a Dirichlet concentration is positive.")
        self.alpha = alpha

    def divide(
        self, labels: Tensor, sizes: list[int] | None, num_clients: int, generator: torch.Generator
    ) -> list[Tensor]:
        sizes = sizes or even_sizes(len(labels), num_clients)
        classes, left = labels.unique(return_counts=True)
        # torch's own Dirichlet takes no generator.
        chance = np.random.default_rng(torch.randint(2**62, (), generator=generator).item())
        mixtures = torch.from_numpy(chance.dirichlet(self.alpha * left.numpy() / len(labels), num_clients))
        piles = [shuffled((labels == label).nonzero().flatten(), generator).tolist() for label in classes]

        turns = torch.arange(num_clients).repeat_interleave(torch.tensor(sizes))
        shares: list[list[int]] = [[] for _ in range(num_clients)]
        for client in shuffled(turns, generator).tolist():
            weights = mixtures[client] * (left > 0)
            if not weights.any():  # all classes of its mixture have run out
                weights = left.double()
            choice = torch.multinomial(weights, 1, generator=generator).item()
            shares[client].append(piles[choice].pop())
            left[choice] -= 1
        return [torch.tensor(share, dtype=torch.long) for share in shares]


class ByClass(Partition):
    """Each client holds a few classes, dealt like cards: a class is shared only when the pack has gone round.

    Without sizes, the holders of a class share all its images equally, and classes that nobody holds are left out.
    With sizes, a client takes equally many images of each of its classes.

    Args:
        classes_per_client: number of classes of one client, >= 1.
    """

    def __init__(self, classes_per_client: int) -> None:
        if classes_per_client < 1:
            raise SettingError(
                f"`data.partition.classes_per_client` is {classes_per_client}, but a client needs at least one class."
            )
        self.classes_per_client = classes_per_client

    def divide(
        self, labels: Tensor, sizes: list[int] | None, num_clients: int, generator: torch.Generator
    ) -> list[Tensor]:
        classes = labels.unique()
        if self.classes_per_client > len(classes):
            raise SettingError(
                f"`data.partition.classes_per_client` is {self.classes_per_client}, but the images have only "
                f"{len(classes)} classes. Lower it."
            )
        pack = shuffled(classes, generator)
        cards = torch.arange(num_clients * self.classes_per_client) % len(pack)
        hands = pack[cards].view(num_clients, self.classes_per_client)

        shares: list[list[Tensor]] = [[] for _ in range(num_clients)]
        for label in hands.unique().tolist():
            pile = shuffled((labels == label).nonzero().flatten(), generator)
            holders = (hands == label).nonzero().tolist()  # (client, place in its hand)
            if sizes is None:
                wanted = even_sizes(len(pile), len(holders))
            else:
                wanted = [even_sizes(sizes[client], self.classes_per_client)[place] for client, place in holders]
            if sum(wanted) > len(pile):
                raise SettingError(
                    f"Class {label} has {len(pile)} images, but its {len(holders)} holders ask for {sum(wanted)}. "
                    "Raise `data.partition.classes_per_client`, or lower `data.images_per_client` or set it to null."
                )
            for (client, _), piece in zip(holders, cut(pile, wanted, len(wanted)), strict=True):
                shares[client].append(piece)
        if sizes is None and (empty := [client for client, share in enumerate(shares) if not sum(map(len, share))]):
            raise SettingError(
                f"Client {empty[0]} would have no images: its classes have fewer images than holders. "
                "Raise `data.partition.classes_per_client` or lower `data.num_clients`."
            )
        return [torch.cat(share) for share in shares]


def even_sizes(total: int, parts: int) -> list[int]:
    """`total` in `parts` numbers that differ by at most one, the larger ones first."""
    return [total // parts + (part < total % parts) for part in range(parts)]


def cut(indices: Tensor, sizes: list[int] | None, num_clients: int) -> list[Tensor]:
    """Consecutive pieces of these sizes, or of even sizes if None; what is left over is nobody's."""
    sizes = sizes or even_sizes(len(indices), num_clients)
    return list(indices[: sum(sizes)].split(sizes))


def shuffled(values: Tensor, generator: torch.Generator) -> Tensor:
    return values[torch.randperm(len(values), generator=generator)]
