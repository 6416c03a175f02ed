"""What an attack requires of the rounds that it is given, checked before any work starts."""

from abc import ABC, abstractmethod
from collections.abc import Iterable

from torch import nn

from attack_modules.threat_model.observed import RoundsSummary
from attack_modules.threat_model.trial import Trial, no_second_derivative
from fl_lightning.errors import AuditError, counted
from fl_lightning.models.freezing import batch_statistics


class RequirementError(AuditError):
    """The observed rounds lack something that an attack requires; the message names it and says what to do."""


class Requirement(ABC):
    """A property of the observed rounds without which an attack, or a part of one, cannot run."""

    name: str
    """In an error: "X requires <name>"."""

    @abstractmethod
    def violation(self, rounds: RoundsSummary) -> str | None:
        """What the rounds have instead and what to do, in sentences; None if they meet the requirement."""


def check(requirements: Iterable[Requirement], rounds: RoundsSummary, user: str) -> None:
    """Raise the first violation.

    Args:
        requirements: to be met by `rounds`.
        rounds: the observed rounds, or those that are to be simulated.
        user: the name of what requires them.

    Raises:
        RequirementError: one is not met.
    """
    for requirement in requirements:
        if violation := requirement.violation(rounds):
            raise RequirementError(f"{user} requires {requirement.name}, but {violation}")


class FittingClassWeights(Requirement):
    """Class weights, where any are assumed, for as many classes as the model has."""

    name = "one class weight for each class"

    def violation(self, rounds: RoundsSummary) -> str | None:
        classes = rounds.model.hparams["num_classes"]
        for assumptions in rounds.assumptions:
            if assumptions.class_weights is not None and len(assumptions.class_weights) != classes:
                return (
                    f"`knowledge.class_weights` has {len(assumptions.class_weights)} numbers for {classes} classes. "
                    "Give one for each, or null."
                )
        return None


class SingleRound(Requirement):
    """Exactly one observed round.

    Args:
        setting: that requires it, where the attack reads several rounds without it; null for the attack itself.
    """

    def __init__(self, setting: str | None = None) -> None:
        self.setting = setting
        self.name = f"a single observed round for `{setting}`" if setting else "a single observed round"

    def violation(self, rounds: RoundsSummary) -> str | None:
        without = f"set `{self.setting}: null`" if self.setting else None
        if (clients := len(set(rounds.clients))) > 1:
            return (
                f"the server sees {clients} clients, each by itself. Show it their mean, by "
                f"`federation.seat.secure_aggregation: true`, or {without or 'attack by FeatureInversion'}."
            )
        if len(rounds.assumptions) > 1:
            instead = f", or {without}, by which all are read" if without else ""
            return f"{len(rounds.assumptions)} were observed. Name one in `federation.observed_rounds`{instead}."
        return None


class SameClients(Requirement):
    """The same clients in all observed rounds, not one after the other as a server sees them."""

    name = "updates of the same clients"

    def violation(self, rounds: RoundsSummary) -> str | None:
        if len(set(rounds.clients)) > 1:
            return (
                f"the server sees {len(set(rounds.clients))} clients, each by itself. Set `model.rounds: "
                "ChangingParticipants` (configs/server_seat.yaml), which reads them one by one, or "
                "`federation.seat.secure_aggregation: true`, which shows their mean."
            )
        return None


class SeparableModel(Requirement):
    """A model that is its head applied to its features, with all parameters in these two; tried on random images."""

    name = "a model that is a head applied to features"

    def violation(self, rounds: RoundsSummary) -> str | None:
        if fault := Trial.of(rounds.model).split:
            return (
                f"{type(rounds.model).__name__} {fault}. Build it as `ImageClassifier` describes: `features`, then "
                "`head`, and nothing beside them."
            )
        return None


class TwiceDifferentiable(Requirement):
    """A model whose parameters' gradient can be differentiated with respect to the images, tried on random ones."""

    name = "a model with second derivatives"

    def violation(self, rounds: RoundsSummary) -> str | None:
        if fault := no_second_derivative(rounds.model):
            return (
                f"{type(rounds.model).__name__} has none ({fault}). Attack it by `--model FeatureInversion`, or set "
                "`model.simulate: head`."
            )
        return None


class LinearHead(Requirement):
    """A head of linear layers with a ReLU between each two, tried on random inputs."""

    name = "a head of linear layers"

    def violation(self, rounds: RoundsSummary) -> str | None:
        if fault := SeparableModel().violation(rounds):
            return fault
        if fault := Trial.of(rounds.model).head:
            return (
                f"{type(rounds.model).__name__} {fault}, and the closed form reads linear layers with a ReLU between. "
                "Attack this model by gradient matching (`--model GradientInversion`) instead."
            )
        return None


class TrainedHead(Requirement):
    """A head of which the peers trained every layer."""

    name = "a head that the peers train"

    def violation(self, rounds: RoundsSummary) -> str | None:
        trained = {name for name, parameter in rounds.model.named_parameters() if parameter.requires_grad}
        frozen = [name for name in rounds.model.head_parameters if name not in trained]
        if trained and frozen:  # two equal models are refused for what they are
            return (
                f"the round leaves {', '.join(frozen[:3])} as it was: it is frozen, or its inputs are 0. Attack by "
                "gradient matching (`--model GradientInversion`), which needs no update of the head."
            )
        return None


class LabelsOrLinearHead(Requirement):
    """The images' labels, or a head of linear layers and ReLUs, whose update shows them."""

    name = "told labels, or a head of linear layers and ReLUs that shows them"

    def violation(self, rounds: RoundsSummary) -> str | None:
        fault = Trial.of(rounds.model).head
        if fault and any(assumptions.labels is None for assumptions in rounds.assumptions):
            return (
                f"labels are unknown, and {type(rounds.model).__name__} {fault}. Tell the attacker the labels or their "
                "counts (`knowledge.labels: known`), or use another model."
            )
        return None


class TwoLayersForSeveralRounds(Requirement):
    """Where several rounds are read as one: a head of two linear layers or more."""

    name = "a head of two linear layers or more where several rounds are read together"

    def violation(self, rounds: RoundsSummary) -> str | None:
        count = sum(isinstance(layer, nn.Linear) for layer in rounds.model.head)
        if len(rounds.assumptions) > 1 and count == 1:
            return (
                f"{type(rounds.model).__name__} has one layer and {len(rounds.assumptions)} rounds were observed. "
                "Name one in `federation.observed_rounds`."
            )
        return None


class FullBatches(Requirement):
    """Local steps that use all images of a peer."""

    name = "peers that train on full batches"

    def violation(self, rounds: RoundsSummary) -> str | None:
        for assumptions in rounds.assumptions:
            if not assumptions.in_full_batches:
                return (
                    f"they train in batches of {assumptions.batch_size}, and which images share a batch is unknown. "
                    "Set `model.refinement: null`, or where a batch holds all images of a peer, "
                    "`knowledge.batch_size: null`."
                )
        return None


class KnownClientSizes(Requirement):
    """The number of images of each peer, told or guessed; at least one peer for each process.

    Args:
        processes: number of processes among which the peers are divided.
    """

    name = "the number of peers and of their images"

    def __init__(self, processes: int = 1) -> None:
        self.processes = processes

    def violation(self, rounds: RoundsSummary) -> str | None:
        for assumptions in rounds.assumptions:
            if assumptions.client_sizes is None:
                return (
                    "the attacker knows neither. Give `knowledge.num_clients` and `knowledge.num_images`, or set "
                    "`model.merged: true`."
                )
            if len(assumptions.client_sizes) < self.processes:
                return (
                    f"{counted(len(assumptions.client_sizes), 'peer')} cannot be divided among "
                    f"{self.processes} processes. Set `model.merged: true`, whose batches are divided instead, or "
                    "lower `trainer.devices`."
                )
        return None


class KnownLabelsByPeer(Requirement):
    """The label of every image, told peer by peer, where the peers are simulated one by one."""

    name = "the labels of each peer's images"

    def violation(self, rounds: RoundsSummary) -> str | None:
        for assumptions in rounds.assumptions:
            several = assumptions.num_clients is None or assumptions.num_clients > 1
            if several and assumptions.sources.get("labels") != "known":
                return (
                    "only their counts are known, so images would be dealt to the wrong peers. Set `model.merged: "
                    "true`, or `knowledge.labels: known`."
                )
        return None


class NoRandomLayers(Requirement):
    """A model that computes the same outputs every time it trains on the same images, tried on random images."""

    name = "a model without random layers"

    def violation(self, rounds: RoundsSummary) -> str | None:
        if random := Trial.of(rounds.model).random:
            return (
                f"{type(rounds.model).__name__} is random while it trains: {random}. Which units a peer dropped is "
                "unknown, so its training cannot be simulated. Train the federation without (torchvision's models: "
                "`federation.model.dropout: 0`)."
            )
        return None


class ReadableDropout(Requirement):
    """No random layers but dropouts of the inputs of the head's linear layers, and these of a single local step."""

    name = "a model without random layers, or with dropout in its head and a single local step"

    def violation(self, rounds: RoundsSummary) -> str | None:
        trial = Trial.of(rounds.model)
        if not trial.random:
            return None
        name = type(rounds.model).__name__
        if trial.dropout is None:
            return (
                f"{name} draws random numbers elsewhere while it trains: {trial.random}. Train the federation without "
                "them."
            )
        if len(rounds.assumptions) > 1 or rounds.assumptions[0].local_steps > 1:
            return (
                f"{name} drops other units at each of {len(rounds.assumptions)} x {rounds.assumptions[0].local_steps} "
                "steps. Observe one round of one step, or train the federation without (torchvision's models: "
                "`federation.model.dropout: 0`)."
            )
        return None


class NoBatchNorm(Requirement):
    """A model whose batches can be divided: batch statistics are of all images of a batch, unless they are frozen."""

    name = "a model without trained BatchNorm where a batch is divided into chunks or among processes"

    def violation(self, rounds: RoundsSummary) -> str | None:
        if batch_statistics(rounds.model):
            return (
                f"{type(rounds.model).__name__} has it. Leave `model.chunk_size` out, and on several devices set "
                "`model.merged: false`."
            )
        return None


class OtherImages(Requirement):
    """Peers whose images are not those from which the attack learns its statistics of photographs.

    Args:
        dataset: the name of the class of that dataset.
    """

    name = "peers who hold other images than the public ones that it learns from"

    def __init__(self, dataset: str) -> None:
        self.dataset = dataset

    def violation(self, rounds: RoundsSummary) -> str | None:
        if rounds.dataset == self.dataset:
            return f"these are of `{self.dataset}`. Attack other images, or set `model.detail: false`."
        return None


class ImageSize(Requirement):
    """Images whose height and width are multiples of a number, in RGB if a network was made for that.

    Args:
        multiple: of which height and width must be multiples.
        rgb: whether images must have three channels.
        reason: which setting asks for it.
    """

    def __init__(self, multiple: int, rgb: bool, reason: str) -> None:
        self.multiple = multiple
        self.rgb = rgb
        self.reason = reason
        self.name = f"{'RGB ' if rgb else ''}images with sides that are multiples of {multiple} pixels"

    def violation(self, rounds: RoundsSummary) -> str | None:
        channels, height, width = rounds.image_shape
        if (self.rgb and channels != 3) or height % self.multiple or width % self.multiple:
            return f"they are {channels} x {height} x {width}. Change `data.image_size` or {self.reason}."
        return None
