"""A user's own module: its training is simulated under its own names, and its rounds are attacked from Python."""

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attack_modules import FeatureInversion, GradientInversion
from attack_modules.attack import Level
from attack_modules.simulation.local_training import SimulatedPeers
from attack_modules.threat_model.assumptions import Assumptions
from attack_modules.threat_model.observed import ObservedRound
from fl_lightning.client import LocalTraining
from fl_lightning.errors import AuditError
from fl_lightning.federation import Federation
from fl_lightning.models import WrappedClassifier
from fl_lightning.observation import Observation
from fl_lightning.storage import StorageError, save_checkpoint

SHAPE = (3, 16, 16)
SIZES = [2, 1]
LABELS = [3, 0, 7]


class Net(nn.Module):
    """Functional ReLUs, `view`, biases, and an order of layers that is not that of the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(48, 10)
        self.convolution = nn.Conv2d(3, 16, 5, padding=2)
        self.first = nn.Linear(16 * 8 * 8, 48)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.max_pool2d(self.convolution(x), 2))
        return self.last(F.relu(self.first(x.view(x.size(0), -1))))


def trained(net: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    net = copy.deepcopy(net)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.01)
    for _ in range(2):
        optimiser.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimiser.step()
    return net.state_dict()


@pytest.fixture
def images() -> Tensor:
    small = torch.rand(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    return F.interpolate(small, SHAPE[1:], mode="bilinear")


@pytest.fixture
def round_(images: Tensor) -> Observation:
    """Two peers with two images and one, and the observing client with one."""
    torch.manual_seed(0)
    net, labels = Net(), torch.tensor([*LABELS, 5])
    states = [trained(net, images[part], labels[part]) for part in (slice(0, 2), slice(2, 3), slice(3, 4))]
    after = {name: 0.5 * states[0][name] + 0.25 * states[1][name] + 0.25 * states[2][name] for name in states[0]}
    return Observation.from_models(net, after, model=net, image_shape=SHAPE, own=states[2], own_weight=0.25)


def test_the_peers_training_is_simulated_under_the_modules_own_names(images: Tensor, round_: Observation) -> None:
    assumed = Assumptions(
        0.01, 2, num_images=3, num_clients=2, labels=LABELS, client_sizes=SIZES, sources={"labels": "known"}
    )
    peers = SimulatedPeers(ObservedRound(round_, assumed), merged=False, device=torch.device("cpu"))
    assert peers.linear_weights == {"first.weight", "last.weight"}
    simulated = peers.mean_update(images[:3], torch.tensor(LABELS))
    for name, observed in round_.peers_update(1.0).items():
        found = simulated[name] if isinstance(simulated[name], Tensor) else simulated[name].dense()
        torch.testing.assert_close(found, observed, rtol=1e-3, atol=1e-6)


def test_images_labels_peers_and_verdict_from_python(images: Tensor, round_: Observation, tmp_path: Path) -> None:
    attack = FeatureInversion()
    result = attack.reconstruct(round_, Assumptions(client_lr=0.01, local_epochs=2), steps=60)
    order = result.labels.argsort(stable=True)
    assert result.labels[order].tolist() == sorted(LABELS)
    originals = images[torch.tensor(LABELS).argsort()]
    psnr = -10 * (result.images[order] - originals).square().mean((1, 2, 3)).log10()
    assert psnr.min() > 25
    assert not hasattr(attack, "images")
    result.save(tmp_path)
    assert len(list((tmp_path / "images").glob("*.png"))) == 3
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["labels"] == result.labels.tolist()
    assert saved["levels"] == [Level(level).value for level in result.verdict.levels]


@pytest.mark.parametrize("settings", [{}, {"simulate": "head"}, {"chunk_size": 2}])
def test_gradient_matching_runs_on_an_own_module(round_: Observation, settings: dict[str, Any]) -> None:
    assumed, attack = Assumptions(client_lr=0.01, local_epochs=2), GradientInversion(**settings)
    first, later = (attack.reconstruct(round_, assumed, steps=steps).misfit for steps in (1, 40))
    assert later < 0.5 * first


def test_what_does_not_fit_is_a_sentence(round_: Observation, tmp_path: Path) -> None:
    net, other = Net(), {**Net().state_dict(), "first.bias": torch.zeros(47)}
    wrong = [
        ({"image_shape": None}, "does not tell the shape"),
        ({"own": net}, "Give both"),
        ({"own_weight": 0.5}, "Give both"),
        ({"after": other}, r"'first.bias' of `after` has the shape \(47,\)"),
        ({"after": list(net.state_dict().values())[1:]}, "5 nameless tensors, but the model has 6"),
        ({"after": {"x": torch.zeros(1)}}, "it lacks convolution.bias"),
    ]
    for change, words in wrong:
        given = {"before": net, "after": net, "model": net, "image_shape": SHAPE, **change}
        with pytest.raises(AuditError, match=words) as error:
            Observation.from_models(**given)
        assert len(str(error.value)) <= 400
    with pytest.raises(StorageError, match="given as an object"):
        round_.save(tmp_path / "round_0000")


def test_a_federation_trains_an_own_module_from_given_weights(
    observe: Callable[..., ObservedRound], tmp_path: Path
) -> None:
    torch.manual_seed(5)
    state = Net().state_dict()
    save_checkpoint(tmp_path / "weights.pt", state)
    model = partial(WrappedClassifier, module=Net, weights=tmp_path / "weights.pt")
    seen = observe(Federation(model, LocalTraining(local_epochs=2)))
    assert all(torch.equal(tensor, state[name]) for name, tensor in seen.observation.before.items())
    assert seen.observation.model["init_args"]["weights"] == str(tmp_path / "weights.pt")
    assert seen.peers_update().keys() == state.keys()
    result = FeatureInversion().reconstruct(seen.observation, seen.assumptions, steps=20)
    assert result.misfit.max() < 0.5
