"""A federation that begins from given weights and trains a part of them; attacks see what was frozen."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from attack_modules import FeatureInversion, GradientInversion
from attack_modules.simulation.local_training import SimulatedPeers
from attack_modules.threat_model.knowledge import Knowledge
from attack_modules.threat_model.observed import ObservedRound
from attack_modules.threat_model.requirements import RequirementError
from fl_lightning.client import LocalTraining
from fl_lightning.data import FederatedData
from fl_lightning.errors import AuditError, SettingError
from fl_lightning.federation import Federation
from fl_lightning.models import ImageClassifier, LeNet5
from fl_lightning.models.freezing import freeze, frozen_names

Observe = Callable[..., ObservedRound]
STEEP = LocalTraining(lr=0.02, local_epochs=2)
HEAD = ["head.0.weight", "head.2.weight"]


def test_names_patterns_and_what_the_model_excludes() -> None:
    model = LeNet5(10, (3, 16, 16))
    assert frozen_names(model, "all") == set()
    assert set(model.state_dict()) - frozen_names(model, "head") == set(HEAD)
    assert set(model.state_dict()) - frozen_names(model, ["head.2", "*.bias"]) == {
        "head.2.weight", "features.0.bias", "features.3.bias",
    }  # fmt: skip
    model.features.requires_grad_(False)
    assert set(model.state_dict()) - frozen_names(model, "all") == set(HEAD)
    for wrong, named in ((["features.0"], "features.0"), (["head", "fc"], "fc"), ([], "this")):
        with pytest.raises(SettingError, match=f"but {named} names no parameter that could be trained") as error:
            frozen_names(model, wrong)
        assert len(str(error.value)) <= 400


def test_only_the_head_changes_and_is_simulated(observe: Observe, relative_error: Callable) -> None:
    seen = observe(Federation(client=STEEP, rounds=2, trainable="head"))
    assert seen.observation.unchanged == set(LeNet5(10, (3, 16, 16)).state_dict()) - set(HEAD)
    assert set(seen.observation.own_update) == set(HEAD)
    peers = SimulatedPeers(seen, merged=False, device=torch.device("cpu"))
    assert set(peers.parameters) == set(HEAD)
    assert not any(parameter.requires_grad for parameter in peers.model.features.parameters())
    attack = GradientInversion(latent_downscale=1)
    assert attack.reconstruct(seen.observation, seen.assumptions, steps=1).misfit.isfinite()
    whole = observe(Federation(client=STEEP, rounds=2))
    assert relative_error(whole.peers_update(), seen.peers_update()) > 0.01


def test_the_closed_form_reads_a_head_trained_alone(observe: Observe) -> None:
    seen = observe(Federation(client=STEEP, trainable="head"), Knowledge(labels="inferred"))
    result = FeatureInversion().reconstruct(seen.observation, seen.assumptions, steps=20)
    assert len(result.images) == 4
    assert result.misfit.max() < 0.2
    with pytest.raises(RequirementError, match=r"leaves head.0.weight as it was.*GradientInversion") as error:
        frozen = observe(Federation(client=STEEP, trainable=["features", "head.2"]))
        FeatureInversion().reconstruct(frozen.observation, frozen.assumptions, steps=1)
    assert len(str(error.value)) <= 400


@pytest.mark.parametrize("affine", [True, False])
def test_frozen_batch_norm_uses_its_running_statistics(affine: bool) -> None:
    class Net(ImageClassifier):
        def __init__(self) -> None:
            super().__init__((0.0,), (1.0,))
            self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=affine), nn.Flatten())
            self.head = nn.Sequential(nn.Linear(4 * 14 * 14, 10))

    for trainable, training in ((["features.0", "head"], affine is False), ("head", False), ("all", True)):
        model = Net()
        freeze(model, frozen_names(model, trainable))
        assert model.features[1].training is training, trainable


def test_frozen_batch_norm_stays_so_over_rounds_and_is_no_obstacle(
    observe: Observe, batch_norm_classifier: type[ImageClassifier]
) -> None:
    seen = observe(Federation(batch_norm_classifier, STEEP, rounds=2, trainable="head"))
    assert {"features.1.running_mean", "features.1.num_batches_tracked"} <= seen.observation.unchanged
    assert not seen.observation.build_model().features[1].training
    attack = GradientInversion(latent_downscale=1, chunk_size=2)
    assert attack.reconstruct(seen.observation, seen.assumptions, steps=1).misfit.isfinite()
    verdict = FeatureInversion().reconstruct(seen.observation, seen.assumptions, steps=5).verdict
    assert not any("statistics of the peers' batches" in reason for reason in verdict.reasons)


def test_any_federation_begins_from_given_weights(
    observe: Observe, tmp_path: Path, noise_images: type[FederatedData]
) -> None:
    torch.manual_seed(5)
    state = LeNet5(10, (3, 16, 16)).state_dict()
    np.savez(tmp_path / "weights.npz", *[tensor.numpy() for tensor in state.values()])
    federation = partial(Federation, initial_weights=tmp_path / "weights.npz")
    seen = observe(federation())
    assert all(torch.equal(tensor, state[name]) for name, tensor in seen.observation.before.items())
    data = noise_images(num_clients=2, images_per_client=1, image_size=16)
    before = federation().settings(data)
    np.savez(tmp_path / "weights.npz", *[tensor.numpy() + 1 for tensor in state.values()])
    assert federation().settings(data)["initial_weights"] != before["initial_weights"]
    with pytest.raises(AuditError, match=r"of `federation.initial_weights` '.*weights.npz' has the shape") as error:
        observe(federation(), num_classes=11)
    assert len(str(error.value)) <= 400
    with pytest.raises(AuditError, match="There is no file"):
        Federation(initial_weights=tmp_path / "none.pt").settings(data)
