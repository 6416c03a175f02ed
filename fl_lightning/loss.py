"""What clients minimise: the cross entropy, with label smoothing and class weights."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fl_lightning.errors import SettingError, positive


@dataclass(frozen=True)
class CrossEntropy:
    """`torch.nn.CrossEntropyLoss`: label smoothing e (Szegedy et al. 2016) and a weight `w_c` for each class.

    The loss of an image of class y with probabilities p is `-sum_c t_c log p_c`, `t = (1 - e) w_y 1_y + e w / C`, and
    that of a batch their sum over the sum of `w_y`, or over their number where labels are shares (mixup). So the
    gradient at an image's logits is `(sum t) p - t`.

    Args:
        label_smoothing: e in [0, 1).
        class_weights: positive; None for 1.

    Raises:
        SettingError: a value is out of range.
    """

    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        weighted = self.class_weights is None or (len(self.class_weights) > 0 and positive(*self.class_weights))
        if not (math.isfinite(self.label_smoothing) and 0 <= self.label_smoothing < 1 and weighted):
            raise SettingError(
                f"`label_smoothing` is {self.label_smoothing} and `class_weights` {str(self.class_weights)[:80]}, but "
                "the first must be at least 0 and below 1, the second positive numbers, one for each class, or null."
            )

    def __call__(self, logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        """The loss of (N, C) logits; labels are (N,) long, or (N, C) shares."""
        weights = self.weights(logits)
        return F.cross_entropy(logits, labels, weights, reduction=reduction, label_smoothing=self.label_smoothing)

    def weights(self, like: Tensor) -> Tensor | None:
        """(C,) class weights in the type of a tensor; None for 1."""
        return None if self.class_weights is None else like.new_tensor(self.class_weights)

    def total(self, labels: Tensor) -> float:
        """What the sum of the losses of a batch with labels (N,) is divided by."""
        if self.class_weights is None:
            return len(labels)
        return torch.tensor(self.class_weights)[labels.cpu()].sum().item()

    def targets(self, labels: Tensor, num_classes: int, like: Tensor, sizes: list[int] | None = None) -> Tensor:
        """(N, C) the vectors t of labels (N,), divided by the mean weight of the images that train together.

        Args:
            labels: long.
            num_classes: C.
            like: of the type of the result.
            sizes: of the groups of images that train together, in their order; None for all.
        """
        weights = torch.ones(num_classes).to(like) if self.class_weights is None else self.weights(like)
        own = weights[labels]
        mean = torch.cat([part.mean().expand(len(part)) for part in own.split(sizes or len(own))])
        smooth = self.label_smoothing
        hard = F.one_hot(labels, num_classes).to(like) * (1 - smooth) * (own / mean)[:, None]
        return hard + smooth / num_classes * weights / mean[:, None]


def logit_errors(probabilities: Tensor, targets: Tensor) -> Tensor:
    """(N, C) gradient of each image's loss at its logits, for the vectors t (N, C) of `CrossEntropy`."""
    return targets.sum(1, keepdim=True) * probabilities - targets
