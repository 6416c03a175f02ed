"""One image of a peer from a vision transformer's update."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models import VisionTransformer

from attack_modules import GradientInversion, PatchInversion
from attack_modules.attack import Level
from attack_modules.threat_model.knowledge import Knowledge
from attack_modules.threat_model.observed import GivenRounds, ObservedRound
from attack_modules.threat_model.requirements import RequirementError
from cli import main
from fl_lightning.client import LocalTraining
from fl_lightning.federation import Federation
from fl_lightning.models import WrappedClassifier

ROOT = Path(__file__).parents[3]
Observe = Callable[..., ObservedRound]
VIT = {"image_size": 16, "patch_size": 4, "num_layers": 1, "num_heads": 2, "hidden_dim": 48, "mlp_dim": 48}
TOLD_NOTHING = Knowledge(labels="inferred", label_counts="inferred", num_images="inferred", num_clients="inferred")


def federation(lr: float = 0.1, rounds: int = 2, epochs: int = 2) -> Federation:
    model = partial(WrappedClassifier, module=VisionTransformer, arguments={**VIT, "num_classes": 10})
    client = LocalTraining(lr=lr, local_epochs=epochs)
    return Federation(model=model, client=client, rounds=rounds, observed_rounds=[rounds - 1])


def originals(noise_images: type, counts: list[int]) -> tuple[Tensor, Tensor]:
    """Images and labels of all clients but the last."""
    data = noise_images(num_clients=len(counts), images_per_client=counts, image_size=16)
    data.setup()
    peers = data.clients[:-1]
    return torch.cat([client.images for client in peers]), torch.cat([client.labels for client in peers])


def psnr(found: Tensor, image: Tensor) -> float:
    return -10 * F.mse_loss(found, image).log10().item()


def test_a_peers_image_is_certain_and_its_label_is_read(observe: Observe, attack: Callable, noise_images: type) -> None:
    counts = [1, 3]
    images, labels = originals(noise_images, counts)
    seen = observe(federation(), TOLD_NOTHING, num_clients=2, images_per_client=counts)
    module = attack(PatchInversion(), seen, steps=3)
    found = module.reconstruction()
    assert psnr(found.images[0], images[0]) > 35
    assert torch.equal(found.labels, labels)
    misfit = module.misfit(found.images, found.labels)
    verdict = module.verdict(misfit)
    assert verdict.levels == [Level.CERTAIN]
    assert verdict.expected_psnr[0] > 30
    assert "rows 1 and on of encoder.pos_embedding" in module.introduction()
    result = PatchInversion().reconstruct(seen.observation, seen.assumptions, steps=3)
    torch.testing.assert_close(result.images, found.images)


def test_several_images_are_no_more_than_unreliable_and_refused_if_told(
    observe: Observe, attack: Callable, noise_images: type
) -> None:
    seen = observe(federation(), TOLD_NOTHING, num_clients=3, images_per_client=[1, 1, 1])
    module = attack(PatchInversion(), seen, steps=3)
    verdict = module.verdict(module.misfit(*module.reconstruction()[:2]))
    assert verdict.level in (Level.UNRELIABLE, Level.NOT_READ)
    assert "not that of one image" in verdict.reasons[0]
    told = observe(federation(), num_clients=3, images_per_client=[1, 1, 1])
    with pytest.raises(RequirementError, match="requires one image in each update, but there are 2"):
        attack(PatchInversion(), told, steps=1)


def test_an_update_below_the_models_rounding_is_not_read(observe: Observe, attack: Callable) -> None:
    seen = observe(federation(lr=0.003, rounds=1, epochs=3), num_clients=2, images_per_client=[1, 1])
    module = attack(PatchInversion(), seen, steps=2)
    verdict = module.verdict(module.misfit(*module.reconstruction()[:2]))
    assert verdict.level is Level.NOT_READ
    assert "smaller than the rounding" in verdict.reasons[0]


def test_a_server_reads_one_image_of_each_client(observe: Observe, attack: Callable, noise_images: type) -> None:
    seen = [observe(federation(), num_clients=2, images_per_client=[1, 1]) for _ in range(2)]
    single = [ObservedRound(view.observation, view.assumptions, (), client) for client, view in enumerate(seen)]
    module = attack(PatchInversion(), *single, steps=2)
    found = module.reconstruction()
    assert found.images.shape == (2, 3, 16, 16)
    assert found.peers.tolist() == [0, 1]
    assert len(module.verdict(module.misfit(*found[:2])).levels) == 2
    together = attack(PatchInversion(), *seen, steps=2)  # rounds of one client, which show one image
    assert len(together.reconstruction().images) == 1
    assert len(together.readings[0].updates) == 2


def test_the_only_step_of_a_head_that_begins_at_0_is_refused(observe: Observe) -> None:
    seen = observe(federation(rounds=1, epochs=1), num_clients=2, images_per_client=[1, 1])
    with pytest.raises(RequirementError, match=r"leaves conv_proj\.weight as it was.*Observe a later round"):
        PatchInversion().check(GivenRounds([seen]).summary())


def test_gradient_matching_differentiates_attention_twice(observe: Observe, attack: Callable) -> None:
    """Fused attention, which clients use, has no second derivative on a CPU."""
    seen = observe(federation(), num_clients=2, images_per_client=[2, 1])
    module = attack(GradientInversion(latent_downscale=1), seen, steps=2)
    assert module.best_loss.isfinite().all()
    assert module.verdict(module.misfit(*module.reconstruction()[:2])).level is not Level.CERTAIN


def test_the_configuration_runs_and_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", str(ROOT / "configs/patches.yaml"), "--data.images_per_client", "[1,1]"])
    results = json.loads(next(tmp_path.rglob("results.json")).read_text())
    assert results["scores"]["psnr_min"] > 40
    assert results["verdict"]["level"] == "certain"
