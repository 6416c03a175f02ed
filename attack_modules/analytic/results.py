"""What goes into the closed form and what comes out of it."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TrainingKnowledge:
    """What the attacker holds true of its peers' training.

    Attributes:
        lr: rate of the peers' SGD; with momentum, the mean factor of a step's gradient in the update.
        steps: full-batch steps that each peer takes.
        num_images: N, or None to take the rank of the first layer's update.
        labels: (N,) long in any order, or None to infer them.
        epochs: steps in which each image takes part, or None for all.
    """

    lr: float
    steps: int
    num_images: int | None = None
    labels: Tensor | None = None
    epochs: int | None = None


@dataclass(frozen=True)
class Diagnosis:
    """How far to trust a leakage, from quantities that the attacker has.

    Attributes:
        num_images: N, given or found.
        separated: images that could be told apart. If fewer than N, the others mix into the features of some.
        gap: singular value N of the first layer's update over singular value N + 1. Near 1, N is a guess.
        residual: relative Frobenius norm of what `Delta^T F` leaves unexplained of the first layer's update.
        conditioning: condition number of `Delta`, by which errors in the gates are amplified.
        drift: rms mismatch between activations seen by the last layer and simulated, over their mean; 0 for one layer.
            Large where lr, steps or the kind of local training are not as believed.
        outside: of the images that were told apart by their gates, the largest `Separation.outside`: near 0 is sure,
            1 is chance. 0 where the last layer tells them apart.
    """

    num_images: int
    separated: int
    gap: float
    residual: float
    conditioning: float
    drift: float
    outside: float


@dataclass(frozen=True)
class Leakage:
    """The images of one aggregate, as the head saw them.

    Attributes:
        labels: (N,) long; fewer rows, here and below, if not all images could be told apart.
        features: (N, D) mean over the local steps of each image's features.
        peers: (N,) long; images with one number were trained by one peer. All 0 where nothing tells (one step).
        diagnosis: of the whole.
    """

    labels: Tensor
    features: Tensor
    peers: Tensor
    diagnosis: Diagnosis


@dataclass(frozen=True)
class Reading:
    """What one solver found: `coordinates` (N, r) of the features, `errors` (N, out), `peers` (N,), residuals."""

    coordinates: Tensor
    errors: Tensor
    peers: Tensor
    residual: float
    drift: float
    outside: float = 0.0
