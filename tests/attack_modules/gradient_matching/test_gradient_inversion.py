import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from attack_modules import Cosine, FeatureInversion, GradientInversion, SquaredL2, TotalVariation
from attack_modules.gradient_matching.upsampling import upsampled
from attack_modules.threat_model.knowledge import Knowledge
from attack_modules.threat_model.observed import ObservedRound, RoundsSummary
from attack_modules.threat_model.requirements import RequirementError
from fl_lightning.client import LocalTraining
from fl_lightning.data import ImageSet
from fl_lightning.errors import SettingError
from fl_lightning.federation import Federation
from fl_lightning.models import ClassifierFactory, ImageClassifier, ImageShape

Observe = Callable[..., ObservedRound]
Run = Callable[..., GradientInversion]
ROOT = Path(__file__).parents[3]


def test_one_image_of_a_linear_model_is_recovered_to_40_db(
    observe: Observe, attack: Run, linear_classifier: ClassifierFactory, noise_images: type
) -> None:
    """Closed form: the gradient of a linear layer with bias is the image times the bias's gradient."""
    federation = Federation(model=linear_classifier, client=LocalTraining(lr=0.1, local_epochs=1))
    seen = observe(federation, num_clients=2, images_per_client=[1, 1])
    reconstruction = attack(GradientInversion(lr=0.1, latent_downscale=1), seen, steps=300).reconstruction()
    assert reconstruction.latent is None
    found = reconstruction.images[0]
    data = noise_images(num_clients=2, images_per_client=1, image_size=16)
    data.setup()
    truth: ImageSet = data.clients[0]
    update = seen.peers_update()
    label = int(truth.labels[0])
    closed = (update["head.0.weight"][label] / update["head.0.bias"][label]).view(3, 16, 16)
    for image in (closed, found):
        error = (image - truth.images[0]).square().mean()
        assert -10 * error.log10() > 40


@pytest.mark.parametrize("objective", [SquaredL2(), Cosine()])
def test_loss_falls_and_the_best_iterate_is_kept(observe: Observe, attack: Run, objective: SquaredL2 | Cosine) -> None:
    seen = observe(Federation(client=LocalTraining(lr=0.01)))
    module = GradientInversion(latent_downscale=2, objective=objective, priors=[TotalVariation(0.01)], restarts=2)
    attack(module, seen, steps=1)
    first = module.best_loss.min()
    module = GradientInversion(latent_downscale=2, objective=objective, priors=[TotalVariation(0.01)], restarts=2)
    attack(module, seen, steps=25)
    assert module.best_loss.min() < 0.7 * first
    images, labels, latent_downscale, latent = module.reconstruction()[:4]
    assert images.shape == (4, 3, 16, 16)
    assert labels.tolist() == [0, 1, 2, 3]
    assert latent_downscale == 2
    torch.testing.assert_close(upsampled(latent, 2).clamp(0, 1), images)
    assert torch.equal(module.reconstruction().part(torch.tensor([3, 1])).latent, latent[[3, 1]])
    assert images.min() >= 0
    assert images.max() <= 1
    best = int(module.best_loss.argmin())
    objective, prior = module.loss(module.get_buffer(f"best_{best}"))
    torch.testing.assert_close(objective + prior, module.best_loss[best])


def test_signs_move_all_pixels_alike(observe: Observe, attack: Run) -> None:
    seen = observe(Federation(client=LocalTraining(lr=0.01)))
    module = GradientInversion(latent_downscale=1, lr=0.01, signed=True)
    attack(module, seen, steps=1)
    moved = (module.starts[0] - module._start(0, (3, 16, 16))).abs()
    assert moved.median().item() == pytest.approx(0.01, rel=1e-3)
    assert moved.std() < 1e-4
    assert set(module.starts[0].grad.unique().tolist()) == {-1.0, 1.0}  # Adam's first step is alike without them, too


def test_divergence_returns_to_the_best_and_says_so(observe: Observe, attack: Run) -> None:
    seen = observe(Federation(client=LocalTraining(lr=0.01)))
    module = GradientInversion(latent_downscale=1, lr=30.0, divergence_factor=1.01)
    with pytest.warns(UserWarning, match=r"Start 0 diverged at step \d+.*is reset to its best images"):
        attack(module, seen, steps=12)
    assert torch.isfinite(module.best_loss).all()
    assert torch.isfinite(module.reconstruction().images).all()


def test_client_by_client_and_bf16_run(observe: Observe, attack: Run) -> None:
    seen = observe(Federation(client=LocalTraining(lr=0.01)), num_clients=3, images_per_client=[1, 3, 2])
    module = attack(GradientInversion(merged=False), seen, steps=3, precision="bf16-mixed")
    assert torch.isfinite(module.best_loss).all()
    assert module.peers.client_sizes == [1, 3]
    assert "2 clients" in module.introduction()


def test_own_update_stays_in_when_asked(observe: Observe, attack: Run, relative_error: Callable) -> None:
    seen = observe(Federation())
    module = attack(GradientInversion(subtract_own=False), seen, steps=1)
    assert relative_error(module.target, seen.aggregated_update()) == 0


def test_labels_are_inferred_when_not_known(observe: Observe, attack: Run) -> None:
    blind = Knowledge(labels="inferred", label_counts="inferred")
    seen = observe(Federation(client=LocalTraining(local_epochs=1)), blind, num_classes=50)
    assert attack(GradientInversion(), seen, steps=1).labels.tolist() == [0, 1, 2, 3]


def test_the_head_alone_with_detail_as_noise_runs(observe: Observe, attack: Run) -> None:
    seen = observe(Federation(client=LocalTraining(lr=0.01)))
    settings = {"latent_downscale": 2, "simulate": "head", "detail": True}
    first = attack(GradientInversion(**settings), seen, steps=1).best_loss
    module = attack(GradientInversion(**settings), seen, steps=25)
    assert module.best_loss < 0.7 * first
    assert set(module.target) == {"head.0.weight", "head.2.weight"}
    misfit = module.misfit(*module.reconstruction()[:2])
    whole = attack(GradientInversion(latent_downscale=2), seen, steps=1)
    torch.testing.assert_close(misfit, whole.misfit(*module.reconstruction()[:2]))  # whatever the attack looked at


def test_unfit_settings_are_refused(observe: Observe, attack: Run) -> None:
    seen = observe(Federation())
    with pytest.raises(RequirementError, match=r"multiples of 3 pixels.*3 x 16 x 16.*`model.latent_downscale`"):
        attack(GradientInversion(latent_downscale=3), seen, steps=1)
    with pytest.raises(RequirementError, match="GradientInversion requires a single observed round, but 2 were"):
        attack(GradientInversion(), seen, seen, steps=1)
    with pytest.raises(ValueError, match="lr > 0"):
        GradientInversion(lr=0.0)
    with pytest.raises(ValueError, match=r"latent_downscale` is 1, which leaves out nothing"):
        GradientInversion(latent_downscale=1, detail=True)
    with pytest.raises(ValueError, match="names 'fc'"):
        attack(GradientInversion(objective=SquaredL2({"fc": 2.0})), seen, steps=1)


CLI = [sys.executable, "-W", "ignore", str(ROOT / "cli.py"), "fit", "--config", str(ROOT / "configs/inversion.yaml")]
SMALL = ["--data.image_size", "16", "--trainer.max_steps", "30", "--trainer.val_check_interval", "15",
         "--model.checkpoint_every", "1", "--model.restarts", "2", "--trainer.accelerator", "cpu"]  # fmt: skip


@pytest.mark.slow
def test_killed_and_resumed_ends_with_bitwise_the_same_images(tmp_path: Path) -> None:
    """Issue: kill -9 at any step, `--ckpt_path`, bitwise the same images."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([*CLI, *SMALL], cwd=tmp_path, env=environment, check=True, timeout=600, capture_output=True)
    checkpoint = tmp_path / "runs/inversion/version_1/checkpoints/last.ckpt"
    process = subprocess.Popen([*CLI, *SMALL], cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    while process.poll() is None and not checkpoint.exists():
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    step = torch.load(checkpoint, weights_only=True)["global_step"]
    assert 0 < step < 30
    resumed = [*CLI, *SMALL, "--ckpt_path", str(checkpoint)]
    subprocess.run(resumed, cwd=tmp_path, env=environment, check=True, timeout=600, capture_output=True)
    ends = [
        torch.load(tmp_path / f"runs/inversion/version_{version}/checkpoints/last.ckpt", weights_only=True)
        for version in (0, 2)
    ]
    assert ends[0]["global_step"] == ends[1]["global_step"] == 30
    whole, killed = (end["state_dict"] for end in ends)
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


class SigmoidHead(ImageClassifier):
    """Not linear layers and ReLUs: the closed form does not apply, and the update does not show the labels."""

    def __init__(self, num_classes: int, image_shape: ImageShape) -> None:
        super().__init__((0.5,), (0.25,))
        self.save_hyperparameters()
        self.features = nn.Flatten()
        self.head = nn.Sequential(nn.Linear(math.prod(image_shape), 16), nn.Sigmoid(), nn.Linear(16, num_classes))


def test_a_head_that_the_closed_form_cannot_read_is_matched(observe: Observe, attack: Run) -> None:
    federation = Federation(model=SigmoidHead, client=LocalTraining(lr=0.1))
    told = observe(federation)
    with pytest.raises(RequirementError, match=r"SigmoidHead has a Sigmoid in its head \(head\.1\)"):
        FeatureInversion().check(RoundsSummary.of([told]))
    first, last = (attack(GradientInversion(latent_downscale=1), told, steps=steps).best_loss for steps in (1, 20))
    assert last < 0.7 * first
    blind = observe(federation, Knowledge(labels="inferred", label_counts="inferred"))
    with pytest.raises(RequirementError, match=r"told labels, or a head .* labels are unknown, and SigmoidHead has a"):
        GradientInversion().check(RoundsSummary.of([blind]))


def test_half_precision_is_refused() -> None:
    attack = GradientInversion()
    attack.trainer = SimpleNamespace(precision="16-mixed")
    with pytest.raises(SettingError, match=r"16-mixed.* Choose bf16-mixed"):
        attack.setup("fit")
