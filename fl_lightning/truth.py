"""The ground truth of a round: the peers' images, and how they trained. Attacks never see it."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fl_lightning.client import LocalTraining
from fl_lightning.defenses import ServerDefense, defenses_of, describe_defenses
from fl_lightning.server_optimizers import FedAvg, ServerOptimizer
from fl_lightning.storage import load_record, save_record

VERSION = 1


@dataclass(frozen=True)
class Truth:
    """The ground truth of one round, for evaluation, and for what an experiment's attacker is explicitly told.

    Attributes:
        pixels: (M, C, H, W) uint8, the peers' images, ordered by peer.
        labels: (M,) long.
        clients: (M,) long, the peer that holds each image.
        training: the peers' local training, with their defences.
        server_lr: the server's learning rate.
        server: its optimiser.
        class_names: names of the classes.
        imagenet_labels: whether labels are the standard ImageNet class index.
        sources: where each image came from, a path or a name; empty in records of earlier versions.
        persons: whom each image shows, empty strings where the data does not tell; empty in records of earlier
            versions.
        server_defenses: of the server.
    """

    pixels: Tensor
    labels: Tensor
    clients: Tensor
    training: LocalTraining
    server_lr: float
    class_names: list[str]
    imagenet_labels: bool
    sources: list[str] = field(default_factory=list)
    persons: list[str] = field(default_factory=list)
    server: ServerOptimizer = field(default_factory=FedAvg)
    server_defenses: list[ServerDefense] = field(default_factory=list)

    @property
    def images(self) -> Tensor:
        """(M, C, H, W) float32 in [0, 1]."""
        return self.pixels / 255

    @property
    def client_sizes(self) -> list[int]:
        """Images of each peer that took part, in the order of `labels`."""
        return self.clients.unique_consecutive(return_counts=True)[1].tolist()

    @classmethod
    def union(cls, rounds: Sequence["Truth"]) -> "Truth":
        """All peers' images of several rounds of one federation; a peer holds the same images in every round."""
        clients = torch.cat([truth.clients for truth in rounds]).unique().tolist()
        first = [next(truth for truth in rounds if client in truth.clients) for client in clients]
        pairs = [(truth, truth.clients == client) for truth, client in zip(first, clients, strict=True)]
        names = ("pixels", "labels", "clients")
        joined = {name: torch.cat([getattr(truth, name)[own] for truth, own in pairs]) for name in names}
        sources = [name for truth, own in pairs for name in chosen(truth.sources, own)]
        persons = [name for truth, own in pairs for name in chosen(truth.persons, own)]
        return replace(rounds[-1], **joined, sources=sources, persons=persons)

    def save(self, stem: Path) -> None:
        """Save as `stem.safetensors` and `stem.json`."""
        tensors = {"pixels": self.pixels, "labels": self.labels, "clients": self.clients}
        facts: dict[str, Any] = {
            "version": VERSION,
            "training": self.training.describe(),
            "server_lr": self.server_lr,
            "server": self.server.describe(),
            "class_names": self.class_names,
            "imagenet_labels": self.imagenet_labels,
            "sources": self.sources,
            "persons": self.persons,
            "server_defenses": describe_defenses(self.server_defenses),
        }
        save_record(stem, tensors, facts)

    @classmethod
    def load(cls, stem: Path) -> "Truth":
        """Load what `save` saved.

        Raises:
            StorageError: a file is missing, cut short, changed, or of another version.
        """
        tensors, facts = load_record(stem, VERSION)
        return cls(
            **tensors,
            training=LocalTraining.restored(facts["training"]),
            server_lr=facts["server_lr"],
            class_names=facts["class_names"],
            imagenet_labels=facts["imagenet_labels"],
            sources=facts.get("sources", []),
            persons=facts.get("persons", []),
            server=ServerOptimizer.restored(facts["server"]) if "server" in facts else FedAvg(),
            server_defenses=defenses_of(facts.get("server_defenses", [])),
        )


def chosen(names: list[str], mask: Tensor) -> list[str]:
    """The names of the images where `mask` (M,) is true; none in records of earlier versions, which have no names."""
    return [names[index] for index in mask.nonzero().flatten().tolist() if names]
