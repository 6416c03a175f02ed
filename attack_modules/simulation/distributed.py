"""Dividing the work of one attack among processes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.nn import functional as F

from attack_modules.simulation.low_rank import LowRank
from fl_lightning.errors import AuditError, SettingError


class Ranks:
    """The processes that share an attack, connected by Lightning's strategy; with one process, nothing is exchanged.

    Every process holds all images, optimizer state and results, so a checkpoint does not depend on the number of
    processes; only the work is divided. Each process back-propagates its part of the common loss: `reduce_update` sums
    the parts of an update and sends gradients back to the process of each part, `reduce` sums the images' gradients.

    Args:
        trainer: whose strategy connects the processes; None for one process alone.

    Raises:
        SettingError: a strategy that shards parameters or devices otherwise.
    """

    def __init__(self, trainer: Trainer | None = None) -> None:
        self.count = trainer.world_size if trainer else 1
        self.rank = trainer.global_rank if trainer else 0
        self.strategy = trainer.strategy if trainer else None
        self.room: int | None = None  # rows for which the GPU's memory sufficed, where it did not for more
        if trainer and not isinstance(self.strategy, DDPStrategy | SingleDeviceStrategy):
            raise SettingError(
                f"An attack runs in one process or in several that each hold all images, but `trainer.strategy` is "
                f"{type(self.strategy).__name__}. Use `auto` or `ddp`."
            )

    def shard(self, count: int) -> Tensor:
        """(n,) this process's shard of the indices 0 to `count` - 1; shard sizes differ by at most one."""
        return torch.arange(count).tensor_split(self.count)[self.rank]

    def reduce(self, tensor: Tensor) -> Tensor:
        """The sum of all processes' tensors, without a gradient; `tensor` may be overwritten."""
        return tensor if self.count == 1 else self.strategy.reduce(tensor.contiguous(), reduce_op="sum")

    @torch.no_grad()
    def gather(
        self, whole: Tensor, function: Callable[[Tensor], Tensor], chunk_size: int, divisible: bool = True
    ) -> None:
        """Fill (N, ...) `whole` with `function` of chunks (n,) of row indices; each process computes its shard.

        Where a GPU's memory does not suffice for a chunk, this and all later ones are halved, if they are `divisible`,
        that is, if no row depends on the others of its chunk. `function` may be called twice with a row.
        """
        filled, left = torch.zeros_like(whole), self.shard(len(whole)).to(whole.device)
        while len(left):
            chunk = left[: min(chunk_size, self.room or chunk_size) if divisible else chunk_size]
            try:
                filled[chunk] = function(chunk).to(filled)
            except torch.OutOfMemoryError:
                if len(chunk) == 1 or not divisible:
                    raise
                self.room = len(chunk) // 2
            else:
                left = left[len(chunk) :]
        whole.copy_(self.reduce(filled))

    def reduce_update(self, update: dict[str, Tensor | LowRank]) -> dict[str, Tensor | LowRank]:
        """The sum of all processes' updates, differentiable; low-rank factors stay factors.

        One vector is exchanged in the forward pass and one in the backward pass, so collective calls cannot be issued
        in different orders. Factors with fewer rows are padded with zeros.
        """
        if self.count == 1:
            return update
        joined = {name: u.joined() for name, u in update.items() if isinstance(u, LowRank)}
        factors = {name: (u.left[0], u.right[0]) for name, u in joined.items()}
        device = next(iter(update.values())).device
        own = torch.tensor([[len(factors[n][0]), update[n].scale] for n in factors], dtype=torch.float64, device=device)
        facts = self.strategy.all_gather(own.view(-1, 2))  # (ranks, factored layers, 2)
        rows, scales = facts[..., 0].amax(0).long().tolist(), facts[..., 1].sum(0).tolist()
        parts = [update[name] for name in update if name not in factors]
        for pair, count in zip(factors.values(), rows, strict=True):
            parts += [F.pad(factor, (0, 0, 0, count - len(factor))) for factor in pair]
        sent = torch.cat([part.flatten() for part in parts])
        received = self.strategy.all_gather(sent, sync_grads=True).split([part.numel() for part in parts], dim=1)
        shaped = iter([r.view(self.count, *part.shape) for r, part in zip(received, parts, strict=True)])
        dense = {name: next(shaped).sum(0) for name in update if name not in factors}
        low_rank = {
            name: LowRank(update[name].base, scale, (next(shaped).flatten(0, 1),), (next(shaped).flatten(0, 1),))
            for name, scale in zip(factors, scales, strict=True)
        }
        return {name: low_rank[name] if name in low_rank else dense[name] for name in update}

    @contextmanager
    def fail_together(self) -> Iterator[None]:
        """Raise an AuditError of one process in all of them; otherwise the others would wait for it.

        Raises:
            AuditError: the one that this process raised, or else the first of another process.
        """
        error = None
        try:
            yield
        except AuditError as own:
            error = own
        met = [self.strategy.broadcast(error, src) for src in range(self.count)] if self.count > 1 else [error]
        for other in (error, *met):
            if other is not None:
                raise other
