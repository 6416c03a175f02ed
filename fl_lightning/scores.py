"""How good a global model is, as its users would measure it."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from fl_lightning.client import buffers
from fl_lightning.data import FederatedData
from fl_lightning.models import ImageClassifier


@torch.no_grad()
def scores_of(model: ImageClassifier, data: FederatedData, statistics_shared: bool) -> dict[str, float]:
    """Loss and accuracy of the global model, on the test set if the data has one, else on the clients' images.

    Args:
        model: is left as it was.
        data: after `setup()`.
        statistics_shared: whether the running statistics of its BatchNorm are its own; else those of each batch are
            used.
    """
    if data.test_set is None:
        split, sets = "train", [images for images in data.clients if len(images)]
    else:
        split, sets = "test", [data.test_set]
    trained = [module for module in model.modules() if module.training]  # frozen BatchNorm is not
    model.eval()
    for module in trained:
        if isinstance(module, _BatchNorm) and not statistics_shared:
            module.training = True
    state = {name: tensor.clone() for name, tensor in buffers(model).items()}
    loss, correct, total = 0.0, 0, 0
    for images, labels in (batch for held in sets for batch in held.dataloader(256)):
        logits: Tensor = model(images)
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        correct += int((logits.argmax(1) == labels).sum())
        total += len(labels)
    model.load_state_dict(state, strict=False)
    for module in trained:
        module.training = True
    return {f"{split}_loss": loss / total, f"{split}_accuracy": correct / total}
