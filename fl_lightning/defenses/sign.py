"""Signs of an update with one size for each tensor."""

from dataclasses import dataclass

from torch import Tensor

from fl_lightning.defenses.defense import Occasion, UpdateDefense
from fl_lightning.errors import SettingError, positive
from fl_lightning.state_files import Tensors


@dataclass(frozen=True)
class Sign(UpdateDefense):
    """One bit an entry: its sign, times the tensor's mean size (Bernstein et al. 2018; Karimireddy et al. 2019).

    Args:
        scale: size of all entries, the same for all clients; null for the mean size of each client's tensor.
    """

    scale: float | None = None

    def __post_init__(self) -> None:
        if self.scale is not None and not positive(self.scale):
            raise SettingError(f"Sign needs scale > 0 or null, but got {self.scale}.")

    def on_update(self, update: Tensors, occasion: Occasion) -> Tensors:
        return {name: tensor.sign() * self._size(tensor) for name, tensor in update.items()}

    def _size(self, tensor: Tensor) -> Tensor | float:
        return tensor.abs().mean() if self.scale is None else self.scale
