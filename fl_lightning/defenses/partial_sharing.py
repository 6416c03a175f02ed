"""Layers that clients keep for themselves."""

from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch

from fl_lightning.defenses.defense import ClientDefense, Occasion
from fl_lightning.errors import SettingError
from fl_lightning.models import ImageClassifier
from fl_lightning.state_files import Tensors


@dataclass(frozen=True)
class PartialSharing(ClientDefense):
    """Some parameters are never sent: each client trains its own (FedPer, FedBN), and the global model's stay as begun.

    The accuracy of the global model alone is then no measure of the clients' models. List it before what changes the
    update, or the client's own layers are changed as well.

    Args:
        private: patterns of the names of parameters that are not sent, such as `head.*` or `*bn*`.
    """

    private: list[str] = field(default_factory=lambda: ["head.*"])

    def __post_init__(self) -> None:
        if not self.private:
            raise SettingError("PartialSharing needs at least one pattern of names in `private`, such as `head.*`.")

    def _is_private(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.private)

    def start(self, model: ImageClassifier, occasion: Occasion) -> None:
        names = list(occasion.before)
        if all(map(self._is_private, names)) or not any(map(self._is_private, names)):
            raise SettingError(
                f"The patterns {self.private} of PartialSharing fit {'all' if self._is_private(names[0]) else 'none'} "
                f"of the model's parameters, which are {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}. "
                "Name some of them."
            )
        with torch.no_grad():
            for name, tensor in occasion.memory.items():
                model.get_parameter(name).copy_(tensor)

    def on_update(self, update: Tensors, occasion: Occasion) -> Tensors:
        private = [name for name in update if self._is_private(name)]
        occasion.memory.update({name: occasion.before[name] - update[name] for name in private})
        return update | {name: torch.zeros_like(update[name]) for name in private}
