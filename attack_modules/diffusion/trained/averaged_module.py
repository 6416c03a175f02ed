"""Training that can be stopped at any time."""

import math
from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from fl_lightning.seeds import seed_of


class AveragedModule(LightningModule):
    """Adam at a constant rate, with an exponential moving average of the weights; at the end the rate may cool down.

    So training can be stopped at any time, and one that is resumed for a cooldown ends as well as if it had been meant
    to end there (Hägele et al. 2024, arXiv 2405.18392). The average is what is validated, and exported after every
    epoch by its own `save(path)`.

    Args:
        network: what is trained.
        lr: learning rate of Adam.
        warmup: steps in which the rate rises from zero.
        decay: of the moving average a step; the average is shorter at first, (1 + steps) / (10 + steps).
        export: where the averaged weights go; null for `exported` in the run directory.
        exported: that file's name.
        seed: of all that is drawn.
        cooldown: steps before the last in which the rate falls to zero.
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
        optimizer = torch.optim.Adam(self.network.parameters(), lr=self.lr)  # fused, it refuses clipping in bf16-mixed
        end = self.trainer.estimated_stepping_batches if self.cooldown else math.inf

        def factor(step: int) -> float:
            return max(0.0, min(1.0, (step + 1) / (self.warmup + 1), (end - step) / (self.cooldown + 1)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def step_generator(self) -> torch.Generator:
        """The step's own: a resumed run draws what the uninterrupted one does."""
        return torch.Generator().manual_seed(seed_of(self.seed, self.global_rank, self.global_step))

    def on_train_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
        self.average.update_parameters(self.network)

    def on_train_epoch_end(self) -> None:
        if self.trainer.is_global_zero and (self.export or self.trainer.log_dir):
            self.average.module.save(self.export or Path(self.trainer.log_dir) / self.exported)
