import torch

from attack_modules.feature_drift import mean_features
from fl_lightning.client import ClientTask, LocalTraining, local_update, parameters
from fl_lightning.data import ImageSet
from fl_lightning.models import LeNet5


def test_every_peer_moves_its_own_images_alone() -> None:
    torch.manual_seed(0)
    model = LeNet5(5, (3, 16, 16))
    pixels = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8)
    labels, peers = torch.tensor([4, 0, 2]), torch.tensor([1, 0, 1])
    expected = model.embed(pixels / 255).detach()
    for peer in (0, 1):
        own = peers == peer
        task = ClientTask(model, ImageSet(pixels[own], labels[own]), seed=0)
        update = local_update(task, LocalTraining(lr=0.1, local_epochs=1)).update
        after = LeNet5(5, (3, 16, 16))
        after.load_state_dict({name: value - update[name] for name, value in parameters(model).items()}, strict=False)
        expected[own] = (expected[own] + after.embed(pixels[own] / 255).detach()) / 2
    found = mean_features(model, pixels / 255, labels, peers, lr=0.1, steps=2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - model.embed(pixels / 255)).abs().max() > 1e-3
