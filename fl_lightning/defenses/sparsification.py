"""What top-k and random sparsification share."""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fl_lightning.defenses.defense import Occasion, UpdateDefense
from fl_lightning.errors import SettingError
from fl_lightning.state_files import Tensors


@dataclass(frozen=True)
class Sparsification(UpdateDefense):
    """Only a share of an update's entries is sent.

    Args:
        keep: share of the entries that is sent, in (0, 1].
        per_layer: whether the share is taken of each parameter tensor, or of all of them together.
        error_feedback: whether what was not sent is added to the client's next update (Stich et al. 2018).
    """

    keep: float = 0.1
    per_layer: bool = True
    error_feedback: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise SettingError(f"{type(self).__name__} needs keep in (0, 1], but got {self.keep}.")

    @abstractmethod
    def ranks(self, entries: Tensor, occasion: Occasion) -> Tensor:
        """(n,) numbers for entries (n,): the largest are sent."""

    def on_update(self, update: Tensors, occasion: Occasion) -> Tensors:
        whole = {name: tensor + occasion.memory.get(name, 0.0) for name, tensor in update.items()}
        if self.per_layer:
            sent = {name: self._sent(tensor.flatten(), occasion).view_as(tensor) for name, tensor in whole.items()}
        else:
            entries = self._sent(torch.cat([tensor.flatten() for tensor in whole.values()]), occasion)
            parts = entries.split([tensor.numel() for tensor in whole.values()])
            sent = {name: part.view_as(whole[name]) for name, part in zip(whole, parts, strict=True)}
        if self.error_feedback:
            occasion.memory.update({name: tensor - sent[name] for name, tensor in whole.items()})
        return sent

    def _sent(self, entries: Tensor, occasion: Occasion) -> Tensor:
        """The entries (n,), those that are not sent as 0."""
        count = max(1, int(self.keep * len(entries)))
        kept = self.ranks(entries, occasion).topk(count, sorted=False).indices
        return torch.zeros_like(entries).scatter(0, kept, entries[kept])
