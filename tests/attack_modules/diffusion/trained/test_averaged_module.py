from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from attack_modules.diffusion.trained.averaged_module import AveragedModule


def training(seed: int) -> AveragedModule:
    return AveragedModule(torch.nn.Linear(2, 1), 1e-3, 0, 0.9, None, "linear.safetensors", seed)


def test_every_seed_draws_other_numbers_and_the_same_again() -> None:
    """Numbers in the upper bits of a seed would be lost on the CPU, without a word."""
    draws = [torch.rand(4, generator=training(seed).step_generator()) for seed in (0, 1, 1)]
    assert not torch.equal(draws[0], draws[1])
    torch.testing.assert_close(draws[1], draws[2], rtol=0, atol=0)


class Saved(torch.nn.Linear):
    def save(self, path: Path) -> None:
        assert path.name == "linear.safetensors"


class Watched(AveragedModule):
    """Remembers the rate of every step."""

    def __init__(self, cooldown: int) -> None:
        super().__init__(Saved(2, 1), 1.0, 1, 0.9, None, "linear.safetensors", 0, cooldown)
        self.rates: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.rates.append(self.optimizers().param_groups[0]["lr"])
        return self.network(batch).square().mean()


@pytest.mark.parametrize(
    ("cooldown", "rates"),
    [(0, [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]), (2, [0.5, 1.0, 1.0, 1.0, 2 / 3, 1 / 3])],
)
def test_the_rate_rises_stays_and_cools_down(cooldown: int, rates: list[float]) -> None:
    training = Watched(cooldown)
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(training, DataLoader(torch.ones(3, 2)))
    assert training.rates == pytest.approx(rates)
