"""What runs on a GPU, how fast, and whether it agrees with the CPU: `make gpu` prints a Markdown table.

It needs no data but the photographs of scikit-image and scikit-learn, and goes on past a failing row. With
`--device cpu --tiny` every row runs in seconds, which a test does. `--rows SUBSTRING` chooses rows by name.
"""

import argparse
import contextlib
import logging
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from attack_modules import FeatureInversion, GradientInversion, Refinement
from attack_modules.analytic.results import Diagnosis, Leakage, TrainingKnowledge
from attack_modules.attack import Attack, Reconstruction
from attack_modules.evaluation.assignment import match
from attack_modules.feature_inversion.rounds import RoundsReader
from attack_modules.priors import ChromaTotalVariation
from attack_modules.threat_model.knowledge import Knowledge
from attack_modules.threat_model.observed import ObservedRounds
from fl_lightning.allocation import keep_freed_memory
from fl_lightning.client import LocalTraining, Tensors
from fl_lightning.data import Catalogue, FederatedData, Photographs
from fl_lightning.federation import Federation
from fl_lightning.truth import Truth

GOAL = 36.0
"""PSNR in dB to which feature inversion is timed."""
LOOKS = 5
"""Steps between looks at the images, whether they reached it."""


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
    crowds: tuple[tuple[int, int], ...] = ((256, 128), (64, 128), (1024, 128), (64, 224), (256, 224))
    """Images and their size, where the features are given."""
    chunks: tuple[int, ...] = (16, 64)
    """Images that pass through the model at once, of the first crowd, beside the default."""
    product: int = 8192
    transformer: dict[str, int] = field(default_factory=dict)
    """Sizes of MDTv2 where not as released."""
    unet_widths: tuple[int, ...] = (256, 256, 512, 512, 1024, 1024)
    unet_size: int = 256


TINY = Sizes(
    images=8,
    image_size=32,
    agreeing=4,
    agreeing_size=16,
    steps=4,
    matching_steps=3,
    prior_channels=(8,),
    prior_batch=2,
    prior_steps=2,
    crowds=((8, 32),),
    chunks=(8,),
    product=64,
    transformer={"width": 32, "depth": 4, "heads": 2, "decoder_depth": 2, "latent_size": 4},
    unet_widths=(64,) * 6,
    unet_size=32,
)


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


def random_crops(count: int, size: int) -> Tensor:
    """(count, 3, size, size) crops of the photographs, at random places."""
    read, places = Photographs(image_size=2 * size).catalogue().read, torch.Generator().manual_seed(0)
    whole = [read(index) for index in range(16)]
    corners = torch.randint(0, size + 1, (count, 2), generator=places).tolist()
    crops = [whole[i % 16][:, y : y + size, x : x + size] for i, (y, x) in enumerate(corners)]
    return torch.stack(crops).float() / 255


class GivenFeatures(RoundsReader):
    """Features of given images instead of those that leaked: more images than the closed form reads in minutes.

    Args:
        images: (N, 3, H, W).
    """

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def requirements(self) -> list:
        return []

    def read(
        self,
        updates: Sequence[Tensors],
        weights: Sequence[Tensors],
        training: Sequence[TrainingKnowledge],
        numbers: Sequence[int],
    ) -> tuple[Leakage, Tensor]:
        count = len(self.images)
        with torch.no_grad():
            features = torch.cat([self.embed(chunk) for chunk in self.images.split(64)])
        exact = Diagnosis(
            num_images=count, disentangled=count, gap=1e9, residual=0.0, conditioning=1.0, drift=0.0, outside=0.0
        )
        every = torch.arange(count)
        leakage = Leakage(every, features, torch.zeros_like(every), exact, torch.zeros(count))
        return leakage, torch.ones(1, count, dtype=torch.bool)

    embed: Callable[[Tensor], Tensor]
    """Images (n, 3, H, W) -> their features (n, D) under the model half way; the attack's, given when it is set up."""


class InversionAlone(FeatureInversion):
    """Feature inversion of given images' features.

    Args:
        images: (N, 3, H, W).
        settings: of `FeatureInversion`.
    """

    def __init__(self, images: Tensor, **settings: Any) -> None:
        super().__init__(rounds=GivenFeatures(images), **settings)

    def prepare(self) -> None:
        before = self.observed_rounds[0].observation.build_model()  # of a single local step, the model half way
        self.rounds.embed = before.embed
        super().prepare()


class Watch(Callback):
    """Time and operations of a step, and when the images first reached the goal: this reads the truth, to measure."""

    def __init__(self, truth: Tensor | None, ordered: bool = False) -> None:
        self.truth, self.ordered = truth, ordered
        self.taken: list[float] = []
        self.flops = 0
        self.reached: float | None = None
        self.began = time.perf_counter()
        self._last = 0.0
        self._counter = FlopCounterMode(display=False)

    def on_train_batch_start(self, trainer: Trainer, module: Attack, batch: Any, index: int) -> None:
        _synchronise(trainer.strategy.root_device)
        self._last = time.perf_counter()
        if index == 1:  # counting takes time: the median of the steps does not see one
            self._counter.__enter__()

    def on_train_batch_end(self, trainer: Trainer, module: Attack, outputs: Any, batch: Any, index: int) -> None:
        _synchronise(trainer.strategy.root_device)
        if index == 1:
            self._counter.__exit__(None, None, None)
            self.flops = self._counter.get_total_flops()
        now = time.perf_counter()
        self.taken.append(now - self._last)
        if self.truth is not None and self.reached is None and index % LOOKS == 0:
            if psnr(module.reconstruction().images, self.truth, self.ordered) >= GOAL:
                self.reached = now - self.began
            self.began += time.perf_counter() - now  # looking is not the attack's time


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _trainer(steps: int, precision: str, device: str, watch: Watch, **options: Any) -> Trainer:
    """A Trainer on one device that is watched, and leaves nothing on disk."""
    return Trainer(
        max_steps=steps,
        precision=precision,
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        logger=False,
        callbacks=[watch],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def mebibytes(memory: int) -> str:
    """Peak memory of the GPU; nothing where it was not measured."""
    return f"{memory} MiB" if memory else ""


def psnr(images: Tensor, originals: Tensor, ordered: bool = False) -> float:
    """Mean PSNR in dB; after matching, unless the images are in the order of the originals."""
    originals = originals.to(images.device)
    found = images if ordered else images[match(images, originals).to(images.device)]
    return float(-10 * (found - originals).square().mean((1, 2, 3)).log10().mean())


@dataclass
class Run:
    """One attack: its images on the CPU, PSNR in dB, median seconds and operations a step, peak MiB, time to `GOAL`."""

    reconstruction: Reconstruction
    images: Tensor
    psnr: float
    step: float
    flops: int
    memory: int
    reached: float | None


class Bench:
    """Runs attacks on crops of photographs, and collects rows.

    Args:
        device: `cuda` or `cpu`.
        sizes: of the rows.
        folder: for the federations' records.
        wanted: part of the names of the rows that are to run.
    """

    def __init__(self, device: str, sizes: Sizes, folder: Path, wanted: str = "") -> None:
        self.device, self.sizes, self.folder, self.wanted = device, sizes, folder, wanted
        self.rows: list[tuple[str, ...]] = []
        self.failed = 0
        self.peak: dict[str, float] = {}
        self.on_cpu: dict[str, Run] = {}

    def attacked(
        self,
        attack: Attack,
        images: int,
        size: int,
        steps: int,
        device: str,
        precision: str,
        goal: bool = False,
        given: Tensor | None = None,
        **trainer: Any,
    ) -> Run:
        """Run an attack on a federation of four peers, which is simulated on the CPU, once.

        Args:
            attack: to run.
            images: of all peers.
            size: of an image.
            steps: of the optimisation.
            device: `cuda` or `cpu`.
            precision: of the Trainer.
            goal: whether to take the time to `GOAL`.
            given: (N, 3, size, size) images whose features the attack is given, instead of those of the peers.
            trainer: further options of the Trainer.
        """
        data = PhotographCrops(num_clients=5, images_per_client=images // 4, attacker_images=0, image_size=size)
        federation = Federation(client=LocalTraining(lr=0.003, local_epochs=3 if given is None else 1))
        rounds = ObservedRounds(Knowledge(), federation, data, self.folder / f"{images}_{size}_{given is None}")
        rounds.prepare_data()
        truth = Truth.load(rounds.record.truth(0)).images if given is None else given
        attack.configure_callbacks = list  # no checkpoints
        watch = Watch(truth if goal else None, ordered=given is not None)
        self.reset_memory()
        _trainer(steps, precision, device, watch, limit_val_batches=0, **trainer).fit(attack, datamodule=rounds)
        memory, found = self.memory(), attack.reconstruction()
        seen = found.images.detach().float().cpu()
        step = statistics.median(watch.taken)
        return Run(found, seen, psnr(seen, truth, given is not None), step, watch.flops, memory, watch.reached)

    def reset_memory(self) -> None:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def memory(self) -> int:
        """Peak MiB of the GPU since the last reset; 0 on a CPU."""
        return torch.cuda.max_memory_allocated() >> 20 if self.device == "cuda" else 0

    def row(self, name: str, measure: Callable[[], tuple[str, ...]]) -> None:
        """Add the row that `measure` gives, or the error that it raised."""
        if self.wanted not in name:
            return
        try:
            with contextlib.redirect_stdout(sys.stderr):  # what federations print is no part of the table
                self.rows.append((name, *measure()))
        except Exception as error:  # the next row may run
            self.failed += 1
            self.rows.append((name, f"failed: {type(error).__name__}", "", "", str(error).split("\n")[0][:200]))
        print(f"| {' | '.join(self.rows[-1])} |", flush=True)

    def share(self, flops: float, seconds: float, precision: str) -> str:
        """How much of the rate of a large matrix product was reached."""
        kind = "32-true" if precision == "32-true" else "bf16-mixed"
        return f"{flops / seconds / self.peak[kind]:.0%} of the product's rate" if flops and kind in self.peak else ""

    def product(self, precision: str) -> tuple[str, ...]:
        """A large matrix product: the rate to which the others compare."""
        size, dtype = self.sizes.product, torch.float32 if precision == "32-true" else torch.bfloat16
        left, right = (torch.randn(size, size, device=self.device, dtype=dtype) for _ in range(2))
        taken = self.timed(lambda: left @ right, 10)
        self.peak[precision] = 2 * size**3 / taken
        return f"{taken * 1000:.2f} ms", "", "", f"{self.peak[precision] / 1e12:.1f} TFLOP/s"

    def timed(self, call: Callable[[], object], times: int) -> float:
        """Median seconds of a call, after two to warm up."""
        taken = []
        for _ in range(times + 2):
            _synchronise(torch.device(self.device))
            began = time.perf_counter()
            call()
            _synchronise(torch.device(self.device))
            taken.append(time.perf_counter() - began)
        return statistics.median(taken[2:])

    def agreement(self, title: str, steps: int, precision: str, **trainer: Any) -> tuple[str, ...]:
        """The device's images against the CPU's in float32."""
        sizes = self.sizes.agreeing, self.sizes.agreeing_size, steps
        if title not in self.on_cpu:
            self.on_cpu[title] = self.attacked(ATTACKS[title](), *sizes, "cpu", "32-true")
        expected = self.on_cpu[title]
        found = self.attacked(ATTACKS[title](), *sizes, self.device, precision, **trainer)
        difference = (found.images - expected.images).square().mean().sqrt()
        remark = f"rms difference to the CPU's images {difference:.1e}; CPU {expected.psnr:.2f} dB"
        return f"{found.step * 1000:.1f} ms a step", mebibytes(found.memory), f"{found.psnr:.2f} dB", remark

    def speed(self, title: str, steps: int, precision: str, goal: bool = False) -> tuple[str, ...]:
        """The full size, on the device alone."""
        sizes = self.sizes.images, self.sizes.image_size, steps
        found = self.attacked(ATTACKS[title](), *sizes, self.device, precision, goal=goal)
        return self.described(found, precision, goal)

    def crowd(self, images: int, size: int, precision: str, **settings: Any) -> tuple[str, ...]:
        """Feature inversion alone, of as many images as a GPU has room for."""
        given = random_crops(images, size)
        attack = InversionAlone(given, **settings)
        found = self.attacked(attack, 8, size, self.sizes.steps, self.device, precision, goal=True, given=given)
        time_, memory, quality, remark = self.described(found, precision, goal=True)
        return time_, memory, quality, f"{remark}; {images / found.step:.0f} images a second"

    def described(self, found: Run, precision: str, goal: bool) -> tuple[str, ...]:
        reached = f"{GOAL:g} dB " + (f"in {found.reached:.1f} s" if found.reached else "not reached")
        remarks = [reached] * goal + [self.share(found.flops, found.step, precision)]
        remark = ", ".join(filter(None, remarks))
        return f"{found.step * 1000:.1f} ms a step", mebibytes(found.memory), f"{found.psnr:.2f} dB", remark

    def prior_step(self, precision: str, compiled: bool = False) -> tuple[str, ...]:
        """Training steps of the diffusion prior on noise: their time does not depend on the images."""
        from attack_modules.diffusion.trained.photo_prior import DiffusionPrior

        batch, steps = self.sizes.prior_batch, self.sizes.prior_steps
        crops = torch.rand(batch * steps, 3, 48, 48, generator=torch.Generator().manual_seed(0))
        module, watch = DiffusionPrior(list(self.sizes.prior_channels), layers=2), Watch(None)
        module.configure_callbacks = list
        if compiled:
            module.network.compile()
        self.reset_memory()
        loader = torch.utils.data.DataLoader(crops, batch_size=batch)
        _trainer(steps, precision, self.device, watch, default_root_dir=self.folder).fit(module, loader)
        step = statistics.median(watch.taken)
        remarks = f"{batch / step:.0f} crops of 48x48 a second", self.share(watch.flops, step, precision)
        return f"{step * 1000:.1f} ms a step", mebibytes(self.memory()), "", ", ".join(filter(None, remarks))

    def prediction(
        self, network: Callable[[], nn.Module], inputs: Callable[[], tuple], precision: str
    ) -> tuple[str, ...]:
        """One pass of a released network at random weights."""
        with torch.device(self.device):
            module, given = network().eval().requires_grad_(False), inputs()
        self.reset_memory()
        half = torch.autocast(self.device, torch.bfloat16, enabled=precision != "32-true")
        with torch.no_grad(), half:
            with FlopCounterMode(display=False) as counter:
                module(*given)
            taken = self.timed(lambda: module(*given), 5)
        remark = f"batch of {len(given[0])}, {self.share(counter.get_total_flops(), taken, precision)}"
        return f"{taken * 1000:.1f} ms", mebibytes(self.memory()), "", remark

    def transformer(self, precision: str) -> tuple[str, ...]:
        from attack_modules.diffusion.released.mdt import MDTv2

        side = self.sizes.transformer.get("latent_size", 32)

        def inputs() -> tuple[Tensor, ...]:
            return torch.randn(8, 4, side, side), torch.arange(8.0), torch.arange(8)

        return self.prediction(lambda: MDTv2(**self.sizes.transformer), inputs, precision)

    def unet(self, precision: str) -> tuple[str, ...]:
        from attack_modules.diffusion.released.openai import unet

        size = self.sizes.unet_size
        return self.prediction(
            lambda: unet(self.sizes.unet_widths), lambda: (torch.randn(4, 3, size, size), torch.arange(4.0)), precision
        )

    def two_processes(self) -> tuple[str, ...]:
        """Two processes that share one device, as two machines of one device each would."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": "0"}
        command = [sys.executable, __file__, "--device", self.device, "--folder", str(self.folder), "--rows", RANKS]
        command += ["--tiny"] * (self.sizes == TINY)
        began = [
            subprocess.Popen(command, env={**environment, "NODE_RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
            for rank in range(2)
        ]
        printed = [process.communicate()[0] for process in began]
        if any(process.returncode for process in began):
            raise RuntimeError(f"a process ended with {[process.returncode for process in began]}: {printed[0][-150:]}")
        row = next(line for line in printed[0].split("\n") if line.startswith(f"| {RANKS}"))
        return tuple(part.strip() for part in row.strip("| ").split(" | ")[1:])

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


RANKS = "feature inversion, refined, two processes on one device"


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


def run(bench: Bench) -> Bench:
    """All rows."""
    sizes, cuda = bench.sizes, bench.device == "cuda"
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"\n{name}, torch {torch.__version__}\n\n| what | time | peak memory | PSNR | remark |\n|---|---|---|---|---|"
    )
    both = ("32-true", "bf16-mixed")
    small = f"{sizes.agreeing} images at {sizes.agreeing_size} px"
    for precision in both:
        bench.row(f"matrix product, {sizes.product}, {precision}", lambda p=precision: bench.product(p))

    def agreeing(precision: str) -> None:
        for title in ATTACKS:
            steps = sizes.steps if "feature" in title else sizes.matching_steps
            bench.row(f"{title}, {small}, {precision}", lambda t=title, s=steps, p=precision: bench.agreement(t, s, p))

    for precision in both:
        agreeing(precision)
    if "NODE_RANK" in os.environ:  # one of two processes, see `two_processes`
        joined = {"num_nodes": 2, "strategy": DDPStrategy(process_group_backend="gloo")}
        bench.row(RANKS, lambda: bench.agreement("feature inversion, refined", sizes.steps, "32-true", **joined))
        return bench
    for precision in both:
        for title in ATTACKS:
            feature = "feature" in title
            steps = sizes.steps if feature else sizes.matching_steps
            bench.row(
                f"{title}, {sizes.images} images at {sizes.image_size} px, {precision}",
                lambda t=title, s=steps, p=precision, f=feature: bench.speed(t, s, p, goal=f),
            )
    for images, size in sizes.crowds:
        for precision in both:
            bench.row(
                f"inversion of given features, {images} images at {size} px, {precision}",
                lambda i=images, s=size, p=precision: bench.crowd(i, s, p),
            )
    images, size = sizes.crowds[0]
    for chunk in sizes.chunks:
        bench.row(
            f"inversion of given features, {images} images at {size} px, in chunks of {chunk}, 32-true",
            lambda c=chunk: bench.crowd(images, size, "32-true", chunk_size=c),
        )
    for precision in both:
        bench.row(f"prior, training step, {precision}", lambda p=precision: bench.prior_step(p))
        bench.row(f"MDTv2-XL/2, a pass, {precision}", lambda p=precision: bench.transformer(p))
        bench.row(f"256 px UNet, a pass, {precision}", lambda p=precision: bench.unet(p))
    bench.row(f"{RANKS}, {small}, 32-true", bench.two_processes)
    if cuda:
        agreeing("16-mixed")
        bench.row("prior, training step, bf16-mixed, compiled", lambda: bench.prior_step("bf16-mixed", compiled=True))
    bench.row("direct enhancement", bench.enhancement)
    return bench


def main(arguments: list[str] | None = None) -> Bench:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="seconds instead of minutes, for a test")
    parser.add_argument("--rows", default="", help="run only rows whose name has this part")
    parser.add_argument("--folder", type=Path, help="for the federations' records; a temporary one if not given")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("There is no CUDA device. Run `make gpu DEVICE=cpu` to try the script without one.")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        sizes = TINY if options.tiny else Sizes()
        return run(Bench(options.device, sizes, options.folder or Path(folder), options.rows))


if __name__ == "__main__":
    sys.exit(1 if main().failed else 0)
