"""Base training module with an exponential moving average (EMA) of the weights."""

import math
from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from fl_lightning.seeds import seed_of


class AveragedModule(LightningModule):
    """Trains with Adam at a constant learning rate, an EMA of the weights and an optional final cooldown.

    Training can be stopped at any time. A stopped run that is resumed for a cooldown reaches the same quality as a run
    planned for that length (Hägele et al. 2024, arXiv 2405.18392). The EMA network is validated, and exported after
    every epoch with its `save(path)` method.

    Args:
        network: the network to train.
        lr: learning rate of Adam.
        warmup: steps over which the learning rate rises from zero.
        decay: EMA decay per step; early in training, the smaller (1 + steps) / (10 + steps) applies.
        export: file for the EMA weights; null for `exported` in the run directory.
        exported: file name in the run directory.
        seed: seed of all random draws.
        cooldown: final steps over which the learning rate falls to zero.
    """

    def __init__(
        self,
        network: nn.Module,
        lr: float,
        warmup: int,
        decay: float,
        export: Path | None,
        exported: str,
        seed: int,
        cooldown: int = 0,
    ) -> None:
        super().__init__()
        self.cooldown = cooldown
        self.lr = lr
        self.warmup = warmup
        self.export = export
        self.exported = exported
        self.seed = seed

        def average(averages: list[Tensor], weights: list[Tensor], steps: Tensor | int) -> None:
            torch._foreach_lerp_(averages, weights, 1 - min(decay, float((1 + steps) / (10 + steps))))

        self.network = network
        self.average = AveragedModel(network, multi_avg_fn=average).requires_grad_(False)

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.Adam(self.network.parameters(), lr=self.lr)  # fused Adam refuses clipping in bf16-mixed
        end = self.trainer.estimated_stepping_batches if self.cooldown else math.inf

        def factor(step: int) -> float:
            return max(0.0, min(1.0, (step + 1) / (self.warmup + 1), (end - step) / (self.cooldown + 1)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def step_generator(self) -> torch.Generator:
        """Return a generator seeded by seed, rank and step, so that a resumed run equals an uninterrupted one."""
        return torch.Generator().manual_seed(seed_of(self.seed, self.global_rank, self.global_step))

    def on_train_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
        self.average.update_parameters(self.network)

    def on_train_epoch_end(self) -> None:
        directory = self.trainer.log_dir  # a collective call
        if self.trainer.is_global_zero and (self.export or directory):
            self.average.module.save(self.export or Path(directory) / self.exported)
