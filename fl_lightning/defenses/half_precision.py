"""Updates in 16 bits."""

from dataclasses import dataclass
from typing import Literal

import torch

from fl_lightning.defenses.defense import Occasion, UpdateDefense
from fl_lightning.state_files import Tensors


@dataclass(frozen=True)
class HalfPrecision(UpdateDefense):
    """Entries of an update are rounded to 16-bit numbers.

    Args:
        kind: `fp16` has 10 bits of mantissa, but few below 6e-5, where many entries of an update lie; `bf16` has 7, and
            the range of float32.
    """

    kind: Literal["fp16", "bf16"] = "bf16"

    def on_update(self, update: Tensors, occasion: Occasion) -> Tensors:
        half = torch.float16 if self.kind == "fp16" else torch.bfloat16
        return {name: tensor.to(half).to(tensor.dtype) for name, tensor in update.items()}
