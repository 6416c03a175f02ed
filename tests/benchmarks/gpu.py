"""What runs on a GPU, how fast, and whether it agrees with the CPU: `make gpu` prints a Markdown table.

It needs no data but the photographs of scikit-image and scikit-learn, and goes on past a failing row. With
`--device cpu --tiny` every row runs in seconds, which a test does.
"""

import argparse
import contextlib
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from attack_modules import FeatureInversion, GradientInversion, Refinement
from attack_modules.attack import Attack, Reconstruction
from attack_modules.evaluation.assignment import match
from attack_modules.priors import ChromaTotalVariation
from attack_modules.threat_model.knowledge import Knowledge
from attack_modules.threat_model.observed import ObservedRounds
from fl_lightning.allocation import keep_freed_memory
from fl_lightning.client import LocalTraining
from fl_lightning.data import Catalogue, FederatedData, Photographs
from fl_lightning.federation import Federation
from fl_lightning.truth import Truth

GOAL = 36.0
"""PSNR in dB to which feature inversion is timed."""


@dataclass(frozen=True)
class Sizes:
    """How large the rows are."""

    images: int = 64
    image_size: int = 128
    agreeing: int = 16
    agreeing_size: int = 64
    steps: int = 120
    matching_steps: int = 20
    prior_channels: tuple[int, ...] = (64, 128, 152)
    prior_batch: int = 64
    prior_steps: int = 20


TINY = Sizes(8, 32, 4, 16, 4, 3, (8,), 2, 2)


class PhotographCrops(FederatedData):
    """Four crops of each photograph, each a class of its own: 64 images without a download."""

    def catalogue(self) -> Catalogue:
        photographs = Photographs(image_size=2 * self.image_size).catalogue()

        def read(index: int) -> Tensor:
            whole, size = photographs.read(index % 16), self.image_size
            top, left = divmod(index // 16, 2)
            return whole[:, top * size : (top + 1) * size, left * size : (left + 1) * size].contiguous()

        names = [f"{photographs.class_names[index % 16]}_{index // 16}" for index in range(64)]
        return Catalogue(torch.arange(64), names, read)


class Watch(Callback):
    """Time of every step, and when the images first reached the goal. It reads the truth: this is a measurement."""

    def __init__(self, truth: Tensor | None) -> None:
        self.truth = truth
        self.taken: list[float] = []
        self.reached: float | None = None
        self.began = time.perf_counter()
        self._last = 0.0

    def on_train_batch_start(self, trainer: Trainer, *rest: Any) -> None:
        _synchronise(trainer.strategy.root_device)
        self._last = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, module: Attack, *rest: Any) -> None:
        _synchronise(trainer.strategy.root_device)
        now = time.perf_counter()
        self.taken.append(now - self._last)
        if self.truth is not None and self.reached is None:
            if psnr(module.reconstruction().images.cpu(), self.truth) >= GOAL:
                self.reached = now - self.began
            self.began += time.perf_counter() - now  # looking is not the attack's time


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def mebibytes(memory: int) -> str:
    """Peak memory of the GPU; nothing where it was not measured."""
    return f"{memory} MiB" if memory else ""


def psnr(images: Tensor, originals: Tensor) -> float:
    """Mean PSNR in dB after matching."""
    error = (images[match(images, originals)] - originals).square().mean((1, 2, 3))
    return float(-10 * error.log10().mean())


@dataclass
class Run:
    """One attack: its images on the CPU, PSNR in dB, median seconds a step, peak MiB, seconds to `GOAL`."""

    reconstruction: Reconstruction
    images: Tensor
    psnr: float
    step: float
    memory: int
    reached: float | None
    attack: Attack


class Bench:
    """Runs attacks on crops of photographs, and collects rows.

    Args:
        device: `cuda` or `cpu`.
        sizes: of the rows.
        folder: for the federations' records.
    """

    def __init__(self, device: str, sizes: Sizes, folder: Path) -> None:
        self.device, self.sizes, self.folder = device, sizes, folder
        self.rows: list[tuple[str, ...]] = []
        self.failed = 0

    def attacked(
        self, attack: Attack, images: int, size: int, steps: int, device: str, precision: str, goal: bool = False
    ) -> Run:
        """Run an attack on a federation of four peers, which is simulated on the CPU, once."""
        data = PhotographCrops(num_clients=5, images_per_client=images // 4, attacker_images=0, image_size=size)
        federation = Federation(client=LocalTraining(lr=0.003, local_epochs=3))
        rounds = ObservedRounds(Knowledge(), federation, data, self.folder / f"{images}_{size}")
        rounds.prepare_data()
        truth = Truth.load(rounds.record.truth(0)).images
        attack.configure_callbacks = list  # no checkpoints
        watch = Watch(truth if goal else None)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        Trainer(
            max_steps=steps,
            precision=precision,
            accelerator="gpu" if device == "cuda" else "cpu",
            devices=1,
            logger=False,
            callbacks=[watch],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        ).fit(attack, datamodule=rounds)
        found = attack.reconstruction()
        memory = torch.cuda.max_memory_allocated() >> 20 if device == "cuda" else 0
        images = found.images.detach().float().cpu()
        return Run(found, images, psnr(images, truth), statistics.median(watch.taken), memory, watch.reached, attack)

    def row(self, name: str, measure: Callable[[], tuple[str, ...]]) -> None:
        """Add the row that `measure` gives, or the error that it raised."""
        try:
            with contextlib.redirect_stdout(sys.stderr):  # what federations print is no part of the table
                self.rows.append((name, *measure()))
        except Exception as error:  # the next row may run
            self.failed += 1
            self.rows.append((name, f"failed: {type(error).__name__}", "", "", str(error).split("\n")[0][:200]))
        print(f"| {' | '.join(self.rows[-1])} |", flush=True)

    def agreement(self, make: Callable[[], Attack], steps: int, precision: str) -> tuple[str, ...]:
        """The device's images against the CPU's in float32."""
        sizes = self.sizes.agreeing, self.sizes.agreeing_size, steps
        expected = self.attacked(make(), *sizes, "cpu", "32-true")
        found = self.attacked(make(), *sizes, self.device, precision)
        difference = (found.images - expected.images).square().mean().sqrt()
        remark = f"rms difference to the CPU's images {difference:.1e}; CPU {expected.psnr:.2f} dB"
        return f"{found.step * 1000:.1f} ms a step", mebibytes(found.memory), f"{found.psnr:.2f} dB", remark

    def speed(self, make: Callable[[], Attack], steps: int, precision: str, goal: bool = False) -> tuple[str, ...]:
        """The full size, on the device alone."""
        found = self.attacked(
            make(), self.sizes.images, self.sizes.image_size, steps, self.device, precision, goal=goal
        )
        remark = "" if not goal else f"{GOAL:g} dB " + (f"in {found.reached:.1f} s" if found.reached else "not reached")
        return f"{found.step * 1000:.1f} ms a step", mebibytes(found.memory), f"{found.psnr:.2f} dB", remark

    def prior_step(self, precision: str) -> tuple[str, ...]:
        """Training steps of the diffusion prior on noise: their time does not depend on the images."""
        from attack_modules.diffusion.trained.photo_prior import DiffusionPrior

        batch, steps = self.sizes.prior_batch, self.sizes.prior_steps
        crops = torch.rand(batch * steps, 3, 48, 48, generator=torch.Generator().manual_seed(0))
        module, watch = DiffusionPrior(list(self.sizes.prior_channels), layers=2), Watch(None)
        module.configure_callbacks = list
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        Trainer(
            max_steps=steps,
            precision=precision,
            accelerator="gpu" if self.device == "cuda" else "cpu",
            devices=1,
            logger=False,
            callbacks=[watch],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=self.folder,
        ).fit(module, torch.utils.data.DataLoader(crops, batch_size=batch))
        step = statistics.median(watch.taken)
        memory = torch.cuda.max_memory_allocated() >> 20 if self.device == "cuda" else 0
        return f"{step * 1000:.1f} ms a step", mebibytes(memory), "", f"{batch / step:.0f} crops of 48x48 a second"

    def enhancement(self) -> tuple[str, ...]:
        """Direct enhancement of gradient matching's images, on the device against the CPU."""
        from attack_modules.enhance.direct.enhancer import DirectEnhancement

        found = self.attacked(
            matching_head(), self.sizes.agreeing, self.sizes.agreeing_size, self.sizes.matching_steps, "cpu", "32-true"
        )
        taken, images = {}, {}
        for device in ("cpu", self.device):
            moved = found.reconstruction._replace(
                images=found.images.to(device), labels=found.reconstruction.labels.to(device)
            )
            enhancer = DirectEnhancement()
            began = time.perf_counter()
            images[device] = enhancer.enhance(moved, seed=0).cpu()
            taken[device] = time.perf_counter() - began
        difference = (images[self.device] - images["cpu"]).square().mean().sqrt()
        remark = f"rms difference to the CPU's images {difference:.1e}; CPU {taken['cpu']:.1f} s"
        return f"{taken[self.device]:.2f} s", "", "", remark


def matching_head() -> GradientInversion:
    return GradientInversion(
        latent_downscale=4, merged=False, simulate="head", priors=[ChromaTotalVariation(1.0)], anneal=(1.0, 0.03)
    )


def matching_all() -> GradientInversion:
    return GradientInversion(latent_downscale=4, merged=False, priors=[ChromaTotalVariation(1.0)], anneal=(1.0, 0.03))


def refined() -> FeatureInversion:
    return FeatureInversion(refinement=Refinement(3))


ATTACKS: dict[str, Callable[[], Attack]] = {
    "feature inversion": FeatureInversion,
    "feature inversion, refined": refined,
    "gradient matching, head": matching_head,
    "gradient matching, all layers": matching_all,
}


def run(device: str, sizes: Sizes, folder: Path) -> Bench:
    """All rows."""
    bench = Bench(device, sizes, folder)
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"\n{name}, torch {torch.__version__}\n\n| what | time | peak memory | PSNR | remark |\n|---|---|---|---|---|"
    )
    for precision in ("32-true", "bf16-mixed"):
        for title, make in ATTACKS.items():
            steps = sizes.steps if "feature" in title else sizes.matching_steps
            shape = f"{sizes.agreeing} images at {sizes.agreeing_size} px"
            bench.row(f"{title}, {shape}, {precision}", lambda m=make, s=steps, p=precision: bench.agreement(m, s, p))
        bench.row(f"prior, training step, {precision}", lambda p=precision: bench.prior_step(p))
    bench.row("direct enhancement", bench.enhancement)
    for precision in ("32-true", "bf16-mixed"):
        for title, make in ATTACKS.items():
            feature = "feature" in title
            steps = sizes.steps if feature else sizes.matching_steps
            shape = f"{sizes.images} images at {sizes.image_size} px"
            bench.row(
                f"{title}, {shape}, {precision}",
                lambda m=make, s=steps, p=precision, f=feature: bench.speed(m, s, p, goal=f),
            )
    return bench


def main(arguments: list[str] | None = None) -> Bench:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="seconds instead of minutes, for a test")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("There is no CUDA device. Run `make gpu DEVICE=cpu` to try the script without one.")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    keep_freed_memory()
    torch.set_float32_matmul_precision("high")
    with tempfile.TemporaryDirectory() as folder:
        return run(options.device, TINY if options.tiny else Sizes(), Path(folder))


if __name__ == "__main__":
    sys.exit(1 if main().failed else 0)
