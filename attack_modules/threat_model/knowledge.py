"""Settings of the threat model: what the attacker is told, what it guesses, and what it must infer."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from attack_modules.threat_model.assumptions import Assumptions, split_evenly
from fl_lightning.defenses import ClientDefense
from fl_lightning.errors import AuditError, non_negative, positive
from fl_lightning.loss import CrossEntropy
from fl_lightning.server_optimizers import FedAvg, ServerOptimizer
from fl_lightning.truth import Truth

Told = Literal["known"]
Inferred = Literal["inferred"]
Unknown = Literal["unknown"]

BELOW_ONE = ("momentum", "label_smoothing")
OPTIONAL = (*BELOW_ONE, "weight_decay", "class_weights", "server", "optimizer", "defenses")
"""Settings that FedAvg with plain SGD does without: 0, null, none, or FedAvg where nobody tells them."""


class KnowledgeError(AuditError, ValueError):
    """The configured knowledge contradicts itself or cannot be had."""


@dataclass(frozen=True)
class Knowledge:
    """What the attacker knows of its peers: `known` is told the truth, a number is its guess, `inferred` is neither.

    Args:
        labels: whether it is told every image's label, ordered by peer.
        label_counts: whether it is told how many images of each class there are (implied by known labels).
        num_images: how many images the peers hold together (implied by known labels or label counts).
        num_clients: how many peers took part, and how many images each of them holds.
        client_lr: the peers' learning rate. A guess is used in the simulation as well as in the scaling.
        server_lr: the server's learning rate.
        server: the server's optimiser, which is undone; of one with a memory, the earlier rounds must be observed too.
            `known` is FedAvg for rounds of another system.
        local_epochs: the peers' local epochs.
        batch_size: the peers' mini-batch size; null guesses full batches.
        momentum: of the peers' SGD. `known` is 0 for rounds of another system, as for weight_decay.
        weight_decay: of the peers' SGD.
        label_smoothing: of the peers' cross entropy, likewise.
        class_weights: of the peers' cross entropy, one number for each class; null guesses none.
        optimizer: of the peers. Of Adam, `FeatureInversion` reads a single local step; all else takes it for SGD.
        defenses: whether it is told the defences of the peers and of the server with their settings; or a guess of the
            peers'.
    """

    labels: Told | Inferred = "known"
    label_counts: Told | Inferred = "known"
    num_images: Told | Inferred | int = "known"
    num_clients: Told | Inferred | int = "known"
    client_lr: Told | float = "known"
    server_lr: Told | float = "known"
    server: Told | ServerOptimizer = "known"
    local_epochs: Told | int = "known"
    batch_size: Told | int | None = "known"
    momentum: Told | float = "known"
    weight_decay: Told | float = "known"
    label_smoothing: Told | float = "known"
    class_weights: Told | list[float] | None = "known"
    optimizer: Told | Literal["SGD", "Adam"] = "known"
    defenses: Told | Unknown | list[ClientDefense] = "known"

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, int | float):
                continue
            if name in OPTIONAL and not (non_negative(value) and (name not in BELOW_ONE or value < 1)):
                raise KnowledgeError(
                    f"`knowledge.{name}` is guessed as {value}, but it is at least 0"
                    f"{' and below 1' if name in BELOW_ONE else ''}."
                )
            if name not in OPTIONAL and not positive(value):
                raise KnowledgeError(f"`knowledge.{name}` is guessed as {value}, but a guess must be positive.")
        if isinstance(self.class_weights, list):
            CrossEntropy(0.0, tuple(self.class_weights))  # which refuses other numbers
        if isinstance(self.num_images, int) and "known" in (self.labels, self.label_counts, self.num_clients):
            raise KnowledgeError(
                f"`knowledge.num_images` is guessed as {self.num_images}, but known labels, label counts or clients "
                "tell it. Set `knowledge.labels`, `.label_counts` and `.num_clients` to `inferred`, or drop the guess."
            )

    @property
    def sources(self) -> dict[str, str]:
        """`known`, `guessed` or `inferred` for each item: the flags that go with every result."""
        flags = {k: v if v in ("known", "inferred", "unknown") else "guessed" for k, v in asdict(self).items()}
        if self.labels == "known":
            flags["label_counts"] = "known"
        if "known" in (flags["label_counts"], flags["num_clients"]):  # known sizes of clients tell their sum
            flags["num_images"] = "known"
        return flags

    def assumptions(self, truth: Truth | None) -> Assumptions:
        """What the attacker acts on.

        Args:
            truth: of the observed round; None where it is unknown (rounds observed in another system).

        Raises:
            KnowledgeError: something is `known` but there is no truth to tell it.
        """
        sources = self.sources
        if truth is None:
            sources |= {name: "guessed" for name in OPTIONAL if sources[name] == "known"}
        told = [name for name, source in sources.items() if source == "known"]
        if truth is None and told:
            raise KnowledgeError(
                f"`knowledge` says that {', '.join(told)} {'is' if len(told) == 1 else 'are'} known, but no truth "
                "lies beside this Observation. Give the attacker's guesses instead, or `inferred`."
            )

        def value(name: str, true: Any) -> Any:
            own = getattr(self, name)
            return {"known": true, "inferred": None}.get(own, own) if isinstance(own, str) else own

        training = truth.training if truth else None
        labels = truth.labels.tolist() if truth else []
        sizes = truth.client_sizes if truth else []
        num_images = len(labels) if sources["num_images"] == "known" else value("num_images", None)
        num_clients = value("num_clients", len(sizes))
        return Assumptions(
            client_lr=value("client_lr", training and training.lr),
            server_lr=value("server_lr", truth and truth.server_lr),
            server=value("server", truth.server if truth else FedAvg()),
            local_epochs=value("local_epochs", training and training.local_epochs),
            batch_size=value("batch_size", training and training.batch_size),
            momentum=value("momentum", training.momentum if training else 0.0),
            weight_decay=value("weight_decay", training.weight_decay if training else 0.0),
            label_smoothing=value("label_smoothing", training.label_smoothing if training else 0.0),
            class_weights=value("class_weights", training and training.class_weights),
            optimizer=value("optimizer", training.optimizer if training else "SGD"),
            defenses=tuple(self._defenses(training.defenses if training else [])),
            server_defenses=tuple(truth.server_defenses if truth and self.defenses == "known" else ()),
            num_clients=num_clients,
            num_images=num_images,
            labels=labels if self.labels == "known" else sorted(labels) if self.label_counts == "known" else None,
            client_sizes=sizes if self.num_clients == "known" else split_evenly(num_images, num_clients),
            sources=sources,
        )

    def _defenses(self, true: list[ClientDefense]) -> list[ClientDefense]:
        """The clients' defences that the attacker acts on."""
        return true if self.defenses == "known" else [] if self.defenses == "unknown" else self.defenses
