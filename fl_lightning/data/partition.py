"""IID and non-IID partitions of images among clients."""

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from fl_lightning.errors import SettingError, counted, positive


class Partition(ABC):
    """Assigns images to clients by their labels; the clients' image sets are disjoint."""

    def __call__(
        self, labels: Tensor, sizes: list[int] | None, num_clients: int, generator: torch.Generator
    ) -> list[Tensor]:
        """Compute the partition after checking that there are enough images.

        Args:
            labels: class index of every available image, long (M,).
            sizes: exact number of images of each client; None: all images are distributed.
            num_clients: number of clients.
            generator: source of all random choices.

        Returns:
            For each client the indices of its images in `labels`, long (number of its images,).

        Raises:
            SettingError: there are too few images, or without `sizes` a client would have none.
        """
        if sizes is None:
            refuse_too_few(labels, num_clients, num_clients)
        elif sum(sizes) > len(labels):
            shown = ", ".join(map(str, sizes[:8])) + (", ..." if len(sizes) > 8 else "")
            raise SettingError(
                f"There are {len(labels)} images, but {num_clients} clients need {sum(sizes)} ({shown}). Lower "
                "`data.images_per_client` or `data.num_clients`, set `data.images_per_client` to null to distribute "
                "all images, or provide more images."
            )
        return self.divide(labels, sizes, num_clients, generator)

    @abstractmethod
    def divide(
        self, labels: Tensor, sizes: list[int] | None, num_clients: int, generator: torch.Generator
    ) -> list[Tensor]:
        """Compute the partition as specified by `__call__`, which has checked the number of images."""


class InOrder(Partition):
    """Assigns consecutive images to each client in dataset order; without sizes, equally many to each."""

    def divide(
        self, labels: Tensor, sizes: list[int] | None, num_clients: int, generator: torch.Generator
    ) -> list[Tensor]:
        return cut(torch.arange(len(labels)), sizes, num_clients)


class IID(Partition):
    """Assigns images to clients uniformly at random; without sizes, equally many to each."""

    def divide(
        self, labels: Tensor, sizes: list[int] | None, num_clients: int, generator: torch.Generator
    ) -> list[Tensor]:
        return cut(torch.randperm(len(labels), generator=generator), sizes, num_clients)


class Dirichlet(Partition):
    """Draws each client's class distribution q ~ Dir(alpha p), where p is the class distribution of the dataset.

    Follows Hsu et al. 2019, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
    Classification" (arXiv 1909.06335, section 3); as there, clients have equally many images unless sizes are given.
    Images are assigned one at a time, in random order of the clients, so that the exhaustion of a class affects all
    clients alike.

    Args:
        alpha: concentration, > 0 and at most 1e100; small values give each client few classes, large values approach
            `IID`.
    """

    def __init__(self, alpha: float) -> None:
        if not positive(alpha) or alpha > 1e100:
            raise SettingError(
                f"`data.partition.alpha` is {alpha}, but a Dirichlet concentration must be positive and at most 1e100. "
                "Use `--data.partition IID` for equal mixtures."
            )
        self.alpha = alpha

    def divide(
        self, labels: Tensor, sizes: list[int] | None, num_clients: int, generator: torch.Generator
    ) -> list[Tensor]:
        sizes = sizes or even_sizes(len(labels), num_clients)
        classes, left = labels.unique(return_counts=True)
        # NumPy, because torch.distributions.Dirichlet accepts no generator.
        chance = np.random.default_rng(torch.randint(2**62, (), generator=generator).item())
        mixtures = torch.from_numpy(chance.dirichlet(self.alpha * left.numpy() / len(labels), num_clients))
        piles = [shuffled((labels == label).nonzero().flatten(), generator).tolist() for label in classes]

        turns = torch.arange(num_clients).repeat_interleave(torch.tensor(sizes))
        shares: list[list[int]] = [[] for _ in range(num_clients)]
        for client in shuffled(turns, generator).tolist():
            weights = mixtures[client] * (left > 0)
            if not weights.any():  # all classes with positive probability are exhausted
                weights = left.double()
            choice = torch.multinomial(weights, 1, generator=generator).item()
            shares[client].append(piles[choice].pop())
            left[choice] -= 1
        return [torch.tensor(share, dtype=torch.long) for share in shares]


class ByClass(Partition):
    """Assigns a fixed number of classes to each client, cyclically from a shuffled list of the classes.

    A class is thus held by several clients only after every class is held by one. Without sizes, the images of a class
    are divided equally among its clients, and classes without a client are not used. With sizes, a client gets equally
    many images of each of its classes.

    Args:
        classes_per_client: number of classes per client, from 1 to the number of classes.
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
                f"{len(classes)} classes. Set it to at most this number."
            )
        pack = shuffled(classes, generator)
        cards = torch.arange(num_clients * self.classes_per_client) % len(pack)
        hands = pack[cards].view(num_clients, self.classes_per_client)

        shares: list[list[Tensor]] = [[] for _ in range(num_clients)]
        for label in hands.unique().tolist():
            pile = shuffled((labels == label).nonzero().flatten(), generator)
            holders = (hands == label).nonzero().tolist()  # (client, position among its classes)
            if sizes is None:
                wanted = even_sizes(len(pile), len(holders))
            else:
                wanted = [even_sizes(sizes[client], self.classes_per_client)[place] for client, place in holders]
            if sum(wanted) > len(pile):
                raise SettingError(
                    f"Class {label} has {counted(len(pile), 'image')}, but {counted(len(holders), 'client')} would "
                    f"need {sum(wanted)}. Raise `data.partition.classes_per_client`, or lower "
                    "`data.images_per_client` or set it to null."
                )
            for (client, _), piece in zip(holders, cut(pile, wanted, len(wanted)), strict=True):
                shares[client].append(piece)
        if sizes is None and (empty := [client for client, share in enumerate(shares) if not sum(map(len, share))]):
            raise SettingError(
                f"Client {empty[0]} would have no images, because its classes have fewer images than clients. "
                "Raise `data.partition.classes_per_client` or lower `data.num_clients`."
            )
        return [torch.cat(share) for share in shares]


def refuse_too_few(labels: Tensor, least: int, num_clients: int) -> None:
    """Raise SettingError if there are fewer than `least` images, and thus none for some of the clients."""
    if len(labels) < least:
        raise SettingError(
            f"There are {len(labels)} images for {num_clients} clients, so some would have none. "
            "Lower `data.num_clients` or provide more images."
        )


def even_sizes(total: int, parts: int) -> list[int]:
    """Split `total` into `parts` integers that differ by at most one, the larger ones first."""
    return [total // parts + (part < total % parts) for part in range(parts)]


def cut(indices: Tensor, sizes: list[int] | None, num_clients: int) -> list[Tensor]:
    """Split `indices` into consecutive pieces of `sizes`, None: of even sizes; the remainder is not used."""
    sizes = sizes or even_sizes(len(indices), num_clients)
    return list(indices[: sum(sizes)].split(sizes))


def shuffled(values: Tensor, generator: torch.Generator) -> Tensor:
    return values[torch.randperm(len(values), generator=generator)]
