"""Gaussian noise on an update."""

from dataclasses import dataclass

from fl_lightning.defenses.clipping import clipped
from fl_lightning.defenses.defense import Occasion, UpdateDefense, rms_of
from fl_lightning.errors import SettingError, positive
from fl_lightning.state_files import Tensors


@dataclass(frozen=True)
class GaussianNoise(UpdateDefense):
    """Independent Gaussian noise on every entry of an update; for an account of privacy see DPFedAvg and LocalDP.

    Args:
        std: standard deviation of the noise.
        rho: in place of `std`, the standard deviation in units of the update's root mean square over all layers.
        clip: largest norm of the update, to which it is scaled down before the noise; null for none.
    """

    std: float | None = None
    rho: float | None = None
    clip: float | None = None

    def __post_init__(self) -> None:
        sizes = [size for size in (self.std, self.rho) if size is not None]
        if len(sizes) != 1 or not positive(*sizes) or (self.clip is not None and not positive(self.clip)):
            raise SettingError(
                f"GaussianNoise needs either std > 0 or rho > 0, and clip > 0 or null, but got std={self.std}, "
                f"rho={self.rho}, clip={self.clip}."
            )

    def on_update(self, update: Tensors, occasion: Occasion) -> Tensors:
        if self.clip is not None:
            update = clipped(update, self.clip)
        std = self.std if self.rho is None else self.rho * rms_of(update)
        return {name: tensor + std * occasion.normal_like(tensor) for name, tensor in update.items()}
