import torch

from fl_lightning.client import LocalTraining
from fl_lightning.truth import Truth


def truth(clients: list[int], labels: list[int]) -> Truth:
    pixels = torch.tensor(labels, dtype=torch.uint8).view(-1, 1, 1, 1)
    return Truth(pixels, torch.tensor(labels), torch.tensor(clients), LocalTraining(), 1.0, ["a"], False)


def test_union_holds_every_image_once_client_by_client() -> None:
    found = Truth.union([truth([1, 1, 3], [7, 8, 9]), truth([0, 3], [5, 9]), truth([0, 1, 1], [5, 7, 8])])
    assert found.clients.tolist() == [0, 1, 1, 3]
    assert found.labels.tolist() == found.pixels.flatten().tolist() == [5, 7, 8, 9]
    assert found.client_sizes == [1, 2, 1]
