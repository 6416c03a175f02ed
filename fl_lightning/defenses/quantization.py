"""Uniform quantisation of an update."""

from dataclasses import dataclass

from torch import Tensor

from fl_lightning.defenses.defense import Occasion, UpdateDefense
from fl_lightning.errors import SettingError, positive
from fl_lightning.state_files import Tensors


@dataclass(frozen=True)
class Quantization(UpdateDefense):
    """Entries are rounded to the `2^bits - 1` multiples of a step from `-range` to `range`: symmetric integers.

    Args:
        bits: of an entry, at least 2.
        stochastic: whether an entry is rounded up or down at random, so that its mean is right, or to the nearest.
        range: size of the largest value, beyond which entries are clipped: a grid that all clients share, as secure
            aggregation needs it. Null for the largest entry of each tensor, so that each client has steps of its own.
    """

    bits: int = 8
    stochastic: bool = False
    range: float | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 24 or (self.range is not None and not positive(self.range)):
            raise SettingError(
                f"Quantization needs bits from 2 to 24 and range > 0 or null, but got bits={self.bits}, "
                f"range={self.range}. For one bit there is Sign."
            )

    def on_update(self, update: Tensors, occasion: Occasion) -> Tensors:
        return {name: self._rounded(tensor, occasion) for name, tensor in update.items()}

    def _rounded(self, tensor: Tensor, occasion: Occasion) -> Tensor:
        largest = tensor.abs().max() if self.range is None else tensor.new_tensor(self.range)
        if largest == 0:
            return tensor
        step = largest / (2 ** (self.bits - 1) - 1)
        steps = tensor.clamp(-largest, largest) / step
        rounded = (steps + occasion.uniform_like(steps)).floor() if self.stochastic else steps.round()
        return rounded.clamp_max(largest / step) * step  # a sum may be rounded up to the next whole number
