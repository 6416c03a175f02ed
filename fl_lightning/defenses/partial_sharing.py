"""Layers that clients keep for themselves."""

from dataclasses import dataclass, field

import torch

from fl_lightning.defenses.defense import ClientDefense, Occasion
from fl_lightning.errors import SettingError
from fl_lightning.models import ImageClassifier
from fl_lightning.models.freezing import fits
from fl_lightning.state_files import Tensors


@dataclass(frozen=True)
class PartialSharing(ClientDefense):
    """Some parameters are never sent: each client trains its own (FedPer, FedBN), and the global model's stay as begun.

    The accuracy of the global model alone is then no measure of the clients' models. List it before what changes the
    update, or the client's own layers are changed as well. Whether BatchNorm's statistics stay with the clients too is
    said by `federation.share_buffers`.

    Args:
        private: names or patterns of layers and parameters that are not sent, such as `head` or `*bn*`, as of
            `federation.trainable`.

    Raises:
        SettingError: there is no pattern; or, when training starts, they fit none or all of the trained parameters.
    """

    private: list[str] = field(default_factory=lambda: ["head.*"])

    def __post_init__(self) -> None:
        if not self.private:
            raise SettingError("PartialSharing needs at least one pattern of names in `private`, such as `head.*`.")

    def _is_private(self, name: str) -> bool:
        return any(fits(name, pattern) for pattern in self.private)

    def start(self, model: ImageClassifier, occasion: Occasion) -> None:
        names = list(occasion.before)
        if all(map(self._is_private, names)) or not any(map(self._is_private, names)):
            shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
            raise SettingError(
                f"The patterns {str(self.private)[:80]} of PartialSharing fit "
                f"{'all' if self._is_private(names[0]) else 'none'} of the parameters that are trained, which are "
                f"{shown[:150]}. Name some of them."
            )
        parameters = dict(model.named_parameters())  # `get_parameter` does not know the names of a wrapped module
        with torch.no_grad():
            for name, tensor in occasion.memory.items():
                parameters[name].copy_(tensor)

    def on_update(self, update: Tensors, occasion: Occasion) -> Tensors:
        private = [name for name in update if self._is_private(name)]
        occasion.memory.update({name: occasion.before[name] - update[name] for name in private})
        return update | {name: torch.zeros_like(update[name]) for name in private}
