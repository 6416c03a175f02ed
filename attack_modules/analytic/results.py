"""What the closed form takes as given, and what it returns."""

from dataclasses import dataclass, field

from torch import Tensor

from attack_modules.analytic.defended_head import DefendedReading, Rereadable
from attack_modules.analytic.typical_head import TypicalHead
from attack_modules.threat_model.assumptions import half_way
from fl_lightning.loss import CrossEntropy


@dataclass(frozen=True)
class TrainingKnowledge:
    """What is known of the peers' training and images when the head's update is read.

    Attributes:
        lr: learning rate of the peers' SGD; with momentum, the mean factor of a step's gradient in the update.
        steps: full-batch steps that each peer takes.
        num_images: N, or None to count the images.
        labels: (N,) long in any order, or None to infer them.
        epochs: steps in which each image takes part, or None for all.
        typical: what the last layer computes for typical images; it makes label counts right where few classes are
            without images. None where the model is not at hand.
        loss: what the peers minimise.
        sizes: images of each peer where `labels` are in their order, or None. Class weights are relative to a peer's.
        reading: how a defended update is read; None where no defence is known that asks for another reading.
        dropout: rate at which the inputs of each of the head's linear layers are dropped in training; empty for none.
    """

    lr: float
    steps: int
    num_images: int | None = None
    labels: Tensor | None = None
    epochs: int | None = None
    typical: TypicalHead | None = None
    loss: CrossEntropy = field(default_factory=CrossEntropy)
    sizes: list[int] | None = None
    reading: DefendedReading | None = None
    dropout: tuple[float, ...] = ()

    def dropout_behind(self, layer: int) -> float:
        """Rate at which the outputs of a layer (0 for the first) are dropped."""
        return self.dropout[layer + 1] if self.dropout else 0.0

    @property
    def half_way(self) -> float:
        """Fraction of the update after which the model is half way through the training."""
        return half_way(self.steps)


@dataclass(frozen=True, kw_only=True)
class ImageCount:
    """How many images an aggregate holds, and what its first layer's update tells of that.

    Attributes:
        num_images: N, as told or as found.
        held: number of classes that surely have images; there are at least so many images.
        counted: whether N was told or the singular values fall there. If not, it is a lower bound.
        views: whether there are as many directions as local epochs times held classes, as if the images of every epoch
            were different ones: augmentation. N then counts the views.
        noise: standard deviation of independent noise in an entry of the update; None if there is none to be seen.
        compressed: whether entries of the update were pruned or quantised.
        shown: number of images that the update shows by itself, also where N was told; at least the held classes.
    """

    num_images: int
    held: int = 0
    counted: bool = True
    views: bool = False
    noise: float | None = None
    compressed: bool = False
    shown: int = 0


@dataclass(frozen=True, kw_only=True)
class Diagnosis(ImageCount):
    """How far to trust what was read, from quantities that the attacker has.

    Attributes:
        disentangled: images whose features were separated from the others'. If fewer than N, the missing images are
            mixed into the features of some found ones.
        gap: singular value N of the first layer's update over singular value N + 1. Near 1, N is a guess.
        residual: relative Frobenius norm of the first layer's update that `Delta^T F` leaves unexplained.
        conditioning: condition number of `Delta`, by which errors in the gates are amplified.
        drift: rms difference between the activations that the last layer shows and those simulated, over their mean; 0
            for one layer. Large where lr, steps or the kind of local training are not as assumed.
        outside: largest `Separation.outside` of the images that were found by their gates: near 0 is certain, 1 is
            chance. 0 where the last layer disentangles the images.
        separated: whether images that share a class were told apart under a head of one layer, which one round mixes.
        checked: whether more units than images were active; else any features explain the update, and `residual` is 0.
    """

    disentangled: int
    gap: float
    residual: float
    conditioning: float
    drift: float
    outside: float
    separated: bool = False
    checked: bool = True


@dataclass(frozen=True)
class Leakage:
    """The images of one aggregate, as the head saw them.

    Attributes:
        labels: (N,) long; here and below fewer rows if not all images were disentangled.
        features: (N, D) mean over the local steps of each image's features.
        peers: (N,) long; images with the same number were trained by one peer. All 0 where nothing tells (one step).
        diagnosis: of the whole.
        uncertainty: (N,) expected relative error of the features, as far as the hidden units disagree on them, see
            `feature_uncertainty`.
        ones: (N,) the input of a bias, which is 1, as it was read; None without a bias. The features are off by the
            same factor.
        noisy: whether a known defence leaves noise on the features, of the size of `uncertainty`.
        defended: what was read under a known defence, and can be read again; None without.
        mixing: (N, N) share of the image of each label, by columns, in the image that each row of `features` is of;
            None if images were not mixed.
        seen: (N, D) bool, features that dropout left to be seen and that are not 0; the others are 0 in `features`.
            None without dropout in front of the head.
        weights: (N, D) of the features' squared errors, see `DefendedFeatures`; None if all count alike.
    """

    labels: Tensor
    features: Tensor
    peers: Tensor
    diagnosis: Diagnosis
    uncertainty: Tensor
    ones: Tensor | None = None
    noisy: bool = False
    defended: Rereadable | None = None
    mixing: Tensor | None = None
    seen: Tensor | None = None
    weights: Tensor | None = None


@dataclass(frozen=True)
class Reading:
    """What the solver for one kind of head found.

    Attributes:
        coordinates: (N, r) of the features, in the row space of the first layer's update.
        errors: (N, out) back-propagated errors at the first layer's outputs, gates included.
        peers: (N,) long.
        residual: see `Diagnosis`, as the next two.
        drift: of the activations.
        outside: of the gates.
        uncertainty: (N,) expected relative error of the features, where the solver knows it better than the units'
            disagreement tells (`feature_uncertainty`).
    """

    coordinates: Tensor
    errors: Tensor
    peers: Tensor
    residual: float
    drift: float
    outside: float = 0.0
    uncertainty: Tensor | None = None
