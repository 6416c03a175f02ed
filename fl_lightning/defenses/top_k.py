"""Top-k sparsification."""

from dataclasses import dataclass

from torch import Tensor

from fl_lightning.defenses.defense import Occasion
from fl_lightning.defenses.sparsification import Sparsification


@dataclass(frozen=True)
class TopK(Sparsification):
    """Only the largest entries of an update are sent (Aji and Heafield 2017), also called gradient pruning.

    Args:
        keep: share of the entries that is sent, in (0, 1].
        per_layer: whether the share is taken of each parameter tensor, or of all of them together.
        error_feedback: whether what was not sent is added to the client's next update (Stich et al. 2018).
    """

    def ranks(self, entries: Tensor, occasion: Occasion) -> Tensor:
        return entries.abs()
