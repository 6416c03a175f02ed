from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from attack_modules import FeatureInversion, Refinement
from attack_modules.attack import Attack
from attack_modules.feature_inversion.refinement import solve_robustly
from attack_modules.threat_model.knowledge import Knowledge
from attack_modules.threat_model.observed import ObservedRound
from attack_modules.threat_model.requirements import RequirementError
from fl_lightning.client import LocalTraining
from fl_lightning.federation import Federation

ROOT = Path(__file__).parents[3]
Observe = Callable[..., ObservedRound]
Run = Callable[..., Attack]
DATA = {"num_clients": 3, "images_per_client": 2, "num_classes": 50}
BLIND = Knowledge(labels="inferred", label_counts="inferred", num_images="inferred", num_clients="inferred")


def refined_inversion(resimulations: int = 8, **settings: object) -> FeatureInversion:
    return FeatureInversion(refinement=Refinement(resimulations), **settings)


@pytest.fixture
def seen(observe: Observe) -> ObservedRound:
    """A local training that changes the model much."""
    return observe(Federation(client=LocalTraining(lr=0.05, local_epochs=3)), BLIND, **DATA)


@pytest.fixture
def originals(noise_images: type) -> Tensor:
    data = noise_images(**DATA, image_size=16)
    data.setup()
    return torch.cat([peer.images for peer in data.clients[:2]])


def targets_at(module: FeatureInversion, images: Tensor) -> Tensor:
    """The features that the attack would seek if its best images so far were these."""
    module.best.copy_(images)
    module._simulate_drift()
    return module.features.clone()


def in_order_of(module: FeatureInversion, originals: Tensor) -> Tensor:
    """The originals in the order in which they leaked."""
    return originals[torch.cdist(module.leakage.features, module.model.embed(originals)).argmin(1)]


def error(found: Tensor, truth: Tensor) -> Tensor:
    return (found - truth).norm(dim=1) / truth.norm(dim=1)


def test_it_rests_at_the_originals_where_the_leakage_does_not(
    seen: ObservedRound, attack: Run, originals: Tensor
) -> None:
    plain, refined = (attack(kind(lr=0.1), seen, steps=1) for kind in (FeatureInversion, refined_inversion))
    images = in_order_of(refined, originals)
    truth = refined.model.embed(images)
    assert error(targets_at(refined, images), truth).max() < 1e-4
    assert error(targets_at(plain, images), truth).max() > 5e-3


def test_the_plain_attack_says_where_refinement_pays(observe: Observe, attack: Run) -> None:
    drifting = observe(Federation(client=LocalTraining(lr=0.1, local_epochs=3)), BLIND, **DATA)
    plain, refined = (attack(kind(), drifting, steps=1) for kind in (FeatureInversion, refined_inversion))
    assert plain.leakage.diagnosis.drift > 0.03
    assert "configs/refined.yaml would" in plain.introduction()
    assert "would" not in refined.introduction()
    plain.labels.fill_(0)  # images that all share a class are not refined
    assert "would" not in plain.introduction()


def test_peers_that_train_in_batches_are_refused(observe: Observe, attack: Run) -> None:
    batches = LocalTraining(lr=0.05, local_epochs=3, batch_size=1)
    told = replace(BLIND, num_clients="known", num_images="known", labels="known")
    seen = observe(Federation(client=batches), told, **DATA)
    with pytest.raises(RequirementError, match=r"on full batches, but they train in batches of 1.*refinement: null"):
        attack(refined_inversion(), seen, steps=1)
    plain = attack(FeatureInversion(), seen, steps=1)
    assert plain.leakage.diagnosis.drift > 0.03
    assert "would" not in plain.introduction()


def test_it_comes_nearer_from_images_that_are_not_right_yet(
    seen: ObservedRound, attack: Run, originals: Tensor
) -> None:
    refined = attack(refined_inversion(lr=0.1), seen, steps=1)
    images = in_order_of(refined, originals)
    truth = refined.model.embed(images)
    torch.manual_seed(0)
    near = (images + 0.05 * torch.randn_like(images)).clamp(0, 1)
    assert error(targets_at(refined, near), truth).max() < error(refined.model.embed(near), truth).min() / 1.5


def test_it_goes_back_where_the_images_depart_from_the_update(
    seen: ObservedRound, attack: Run, originals: Tensor
) -> None:
    refined = attack(refined_inversion(lr=0.1), seen, steps=1)
    images = in_order_of(refined, originals)
    torch.manual_seed(0)
    near, far = ((images + width * torch.randn_like(images)).clamp(0, 1) for width in (0.05, 0.3))
    targets_at(refined, near)  # the images that the leaked features gave
    assert not torch.equal(refined.refinement.target_features, refined.leakage.features)
    with pytest.warns(UserWarning, match="Refinement stops at step 1"):
        targets_at(refined, far)
    assert torch.equal(refined.refinement.target_features, refined.leakage.features)
    targets_at(refined, near)
    assert torch.equal(refined.refinement.target_features, refined.leakage.features)  # for good


def test_images_that_share_their_class_are_left_as_they_leaked(seen: ObservedRound, attack: Run) -> None:
    refined = attack(refined_inversion(lr=0.1), seen, steps=1)
    refined.labels[0] = refined.labels[1]
    refined.refinement.start(refined.leakage.features, refined.labels)
    targets_at(refined, refined.best.clone())
    changed = error(refined.refinement.target_features, refined.leakage.features) > 0
    assert changed.tolist() == refined.refinement.unique_class.tolist() == [False, False, True, True]
    assert "2 images, alone in their class" in refined.introduction()


@pytest.mark.parametrize("classifier", ["linear_classifier", "batch_norm_classifier"])
def test_heads_of_one_layer(observe: Observe, attack: Run, classifier: str, request: pytest.FixtureRequest) -> None:
    federation = Federation(model=request.getfixturevalue(classifier), client=LocalTraining(lr=0.01, local_epochs=3))
    module = attack(refined_inversion(lr=0.1), observe(federation, BLIND, **DATA), steps=8)
    assert module.reconstruction().images.isfinite().all()
    assert error(module.features, module.leakage.features).max() < 0.3


def test_misjudged_units_do_not_spoil_the_features() -> None:
    torch.manual_seed(0)
    features, errors = torch.randn(4, 30), torch.randn(4, 100)
    update = errors.T @ features
    update[:5] += 20
    torch.testing.assert_close(solve_robustly(errors, update).float(), features, atol=0.05, rtol=0)
    assert (torch.linalg.pinv(errors.T) @ update - features).abs().max() > 0.2


def test_one_step_leaves_nothing_to_refine(observe: Observe, attack: Run) -> None:
    seen = observe(Federation(client=LocalTraining(local_epochs=1)), BLIND, **DATA)
    plain, refined = (attack(kind(lr=0.1), seen, steps=8) for kind in (FeatureInversion, refined_inversion))
    assert torch.equal(plain.images, refined.images)


def test_configuration_names_it(observe: Observe, attack: Run, seen: ObservedRound) -> None:
    settings = yaml.safe_load((ROOT / "configs/refined.yaml").read_text())["model"]
    assert settings["init_args"]["refinement"]["class_path"] == "Refinement"
    module = attack(refined_inversion(**settings["init_args"]["refinement"]["init_args"]), seen, steps=4)
    assert module.resimulations == 8
    assert "matched to the update of all local steps 8 times" in module.introduction()
