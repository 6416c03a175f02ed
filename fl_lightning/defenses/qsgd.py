"""QSGD, quantisation of an update in units of its norm."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fl_lightning.defenses.defense import Occasion, UpdateDefense
from fl_lightning.errors import SettingError
from fl_lightning.state_files import Tensors


@dataclass(frozen=True)
class QSGD(UpdateDefense):
    """Entries are rounded at random to multiples of `|bucket| / levels`, so that their mean is right.

    Alistarh et al. 2017, "QSGD: Communication-efficient SGD via gradient quantization and encoding".

    Args:
        levels: s, above 0 of an entry's size.
        bucket: consecutive entries of a tensor that share a norm.
    """

    levels: int = 16
    bucket: int = 512

    def __post_init__(self) -> None:
        if self.levels < 1 or self.bucket < 1:
            raise SettingError(f"QSGD needs levels >= 1 and bucket >= 1, but got {self.levels} and {self.bucket}.")

    def on_update(self, update: Tensors, occasion: Occasion) -> Tensors:
        return {name: self._rounded(tensor, occasion) for name, tensor in update.items()}

    def _rounded(self, tensor: Tensor, occasion: Occasion) -> Tensor:
        entries = tensor.flatten()
        padded = torch.nn.functional.pad(entries, (0, -len(entries) % self.bucket)).view(-1, self.bucket)
        step = padded.norm(dim=1, keepdim=True) / self.levels
        steps = padded.abs() / step.clamp_min(torch.finfo(step.dtype).tiny)
        rounded = (steps + occasion.uniform_like(steps)).floor() * step * padded.sign()
        return rounded.flatten()[: len(entries)].view_as(tensor)
