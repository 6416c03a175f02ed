"""How fast and how lean: `make bench` prints the table. Ratios are of one run; everything here runs on the CPU."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from pytest_benchmark.fixture import BenchmarkFixture
from setting import PEERS, Setting, Table
from steps import bf16_pays, clock, seconds, step_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from attack_modules import ChromaTotalVariation, FeatureInversion, GradientInversion
from attack_modules.attack import Attack
from attack_modules.evaluation.assignment import match
from fl_lightning.truth import Truth

pytestmark = pytest.mark.benchmark(timer=clock)
HERE = Path(__file__).parent
ROOT = HERE.parent.parent
QUALITY, GOOD, BETTER = 20.5, 30.0, 36.0
INVERSION_STEPS = 120
"""As in `configs/leakage.yaml`."""
MEASURED: dict[str, float] = {}
"""Seconds by name, and the PSNR of matching: what later rows refer to."""
NAMES = {
    "merged": "step, one merged client",
    "bf16": "the same in bf16-mixed",
    "loop": "step, client by client, a loop",
    "vmap": "the same by torch.func.vmap",
    "chunks": "one merged client, chunks of 16 images",
    "head": "the head alone, convolutions frozen half way",
    "head-bf16": "the same in bf16-mixed",
}


def interleaved(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, after one call to warm up, taken in turns."""
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(rounds + 1):
        for name, candidate in candidates.items():
            once = seconds(candidate)
            if round_:
                taken[name].append(once)
    return {name: median(times) for name, times in taken.items()}


def measurable(names: dict[str, str]) -> dict[str, str]:
    """Those of the ways that this machine can measure within reason."""
    return {way: name for way, name in names.items() if not way.endswith("bf16") or bf16_pays()}


def test_step(benchmark: BenchmarkFixture, setting: Setting, table: Table) -> None:
    """All ways take turns; pytest-benchmark keeps the statistics of one merged client."""
    seen = setting.rounds.rounds[0]
    names = measurable(NAMES)
    ways = {way: step_of(way, seen) for way in ("yardstick", *names)}
    exact = ways["yardstick"]()
    wrong = {way: float((ways[way]() - exact).norm() / exact.norm()) for way in ("merged", "bf16") if way in names}
    taken: dict[str, list[float]] = {way: [] for way in ways if way != "merged"}

    def others() -> None:
        for way, times in taken.items():
            times.append(seconds(ways[way]))

    benchmark.pedantic(ways["merged"], setup=others, rounds=setting.repetitions)
    MEASURED.update({way: median(times) for way, times in taken.items()}, merged=benchmark.stats.stats.median)
    yardstick = MEASURED["yardstick"]
    table.add("yardstick: the dense step, one evaluation", f"{yardstick:.2f} s", "1.0", "memory kept, as ours")
    table.add("a step of the reference, two evaluations", f"{2 * yardstick:.2f} s", "0.5", "computed: twice the former")
    for way, name in names.items():
        remark = f"gradient {wrong[way]:.1e} from the yardstick's" if way in wrong else ""
        table.add(name, f"{MEASURED[way]:.2f} s", f"{yardstick / MEASURED[way]:.1f} x", remark)


def test_memory(setting: Setting, table: Table) -> None:
    stem = setting.record.observation(0)

    def alone(way: str) -> dict[str, float]:
        threads = str(torch.get_num_threads())
        command = [sys.executable, str(HERE / "steps.py"), way, str(stem), threads]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    names = {"yardstick-default": "yardstick as a plain program", "yardstick": "yardstick, memory kept"}
    names |= measurable({way: NAMES[way] for way in ("merged", "bf16", "chunks", "head")})
    found = {way: alone(way) for way in names}
    plain = found["yardstick-default"]
    for way, usage in found.items():
        remark = f"{usage['seconds']:.2f} s, of them {usage['system']:.2f} s system, {usage['faults']:.0f} page faults"
        if usage is not plain:
            remark += f"; {plain['seconds'] / usage['seconds']:.1f} x as fast as the plain program"
        net = (usage["peak"] - usage["idle"]) / (plain["peak"] - plain["idle"])
        value = f"{usage['peak']:.0f} MiB ({usage['idle']:.0f} before the first step)"
        ratio = f"{usage['peak'] / plain['peak']:.2f} (of what a step adds {net:.2f})"
        table.add(f"peak memory: {names[way]}", value, ratio, remark)


class Flops(TorchDispatchMode):
    """Counts by torch's formulas. `FlopCounterMode` itself refuses modules that are differentiated within a step."""

    def __init__(self) -> None:
        super().__init__()
        self.total = self.convolutions = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        outputs = operation(*args, **(kwargs or {}))
        if formula := flop_registry.get(operation.overloadpacket):
            count = formula(*args, **(kwargs or {}), out_val=outputs)
            self.total += count
            self.convolutions += count if "convolution" in str(operation) else 0
        return outputs


def test_throughput(setting: Setting, table: Table) -> None:
    """Convolutions in the step against the same convolutions alone, forward and backward."""
    seen = setting.rounds.rounds[0]
    step = step_of("merged", seen)
    alone = convolutions_alone(seen.observation.build_model(), setting)
    with Flops() as counter:
        step()
    convolutions, total = counter.convolutions, counter.total
    with Flops() as counter:
        alone()
    flops_alone = counter.total
    taken = interleaved({"step": step, "alone": alone}, setting.repetitions)
    peak = flops_alone / taken["alone"]
    table.add("convolutions alone, forward and backward", f"{peak / 1e9:.0f} GFLOP/s", "", "float32")
    table.add(
        "convolutions of the step at that rate",
        f"{convolutions / peak:.2f} s",
        f"{convolutions / peak / taken['step']:.0%} of the step",
        f"{convolutions / 1e9:.0f} of {total / 1e9:.0f} GFLOP are convolutions; in all "
        f"{total / taken['step'] / 1e9:.0f} GFLOP/s, {total / taken['step'] / peak:.0%} of the rate",
    )


def convolutions_alone(model: nn.Module, setting: Setting) -> Callable[[], None]:
    """Forward and backward passes of all convolutions of a model, each by itself."""
    shapes, cases = [], []
    layers = [module for module in model.features.modules() if isinstance(module, nn.Conv2d)]
    for layer in layers:
        layer.register_forward_hook(lambda layer, inputs, outputs: shapes.append(inputs[0].shape[1:]))
    model(torch.rand(1, *setting.rounds.rounds[0].observation.image_shape))
    for layer, shape in zip(layers, shapes[:], strict=True):
        x = torch.rand(setting.images, *shape).contiguous(memory_format=torch.channels_last).requires_grad_()
        layer.to(memory_format=torch.channels_last)
        cases.append((layer, x, torch.rand_like(layer(x))))

    def run() -> None:
        for layer, x, slope in cases:
            torch.autograd.grad(layer(x), [x, *layer.parameters()], slope)

    return run


@pytest.mark.parametrize("kind", ["images", "local_epochs"])
def test_scaling(setting: Setting, table: Table, kind: str) -> None:
    """Images in chunks, so that 512 of them fit into memory."""
    seen = setting.rounds.rounds[0]
    sizes = {"images": (16, 64, 256, 512), "local_epochs": (1, 3, 10)}[kind]
    names = {"images": "images, chunks of 16", "local_epochs": "local steps"}
    for size in sizes:
        step = step_of("chunks" if kind == "images" else "merged", seen, **{kind: size})
        taken = interleaved({"step": step}, 1)["step"]
        table.add(f"{size} {names[kind]}", f"{taken:.2f} s", f"{taken / size * 1000:.0f} ms each")


def test_processes(setting: Setting, table: Table, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """One process on one core against two on two, client by client through the command line, taken in turns."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        table.add("two processes", "not measured", "", "this run may use one core only")
        pytest.skip("Two processes need two cores.")
    root = Path(request.config.getoption("--data-root")).resolve()  # the command runs in a folder of its own
    recorded = ["--observation", str(setting.record.directory), "--data.root", str(root),
                "--data.partition", "InOrder", "--data.image_size", str(setting.size),
                "--data.images_per_client", str(setting.images // PEERS)]  # fmt: skip
    taken: dict[int, list[float]] = {1: [], 2: []}
    for round_ in range(setting.repetitions):
        for processes, times in taken.items():
            steps = 12
            command = [sys.executable, str(ROOT / "cli.py"), "fit", "--config", str(ROOT / "configs/paper.yaml"),
                       *recorded, "--model.simulate", "all", "--model.detail", "false",
                       "--trainer.max_steps", str(steps), "--trainer.limit_val_batches", "0",
                       "--trainer.logger.init_args.name", f"{processes}_{round_}", "--model.checkpoint_every", "1000",
                       "--trainer.accelerator", "cpu", "--trainer.devices", str(processes),
                       *(["--trainer.strategy", "ddp"] if processes > 1 else [])]  # fmt: skip
            subprocess.run(
                ["taskset", "-c", ",".join(map(str, cores[:processes])), *command],
                env=environment() | {"OMP_NUM_THREADS": "1"}, cwd=tmp_path, check=True, capture_output=True,
            )  # fmt: skip
            results = json.loads((tmp_path / f"runs/{processes}_{round_}/version_0/results.json").read_text())
            times.append(results["seconds"] / steps)
    one, two = (median(taken[processes]) for processes in (1, 2))
    table.add("one process on one core, client by client", f"{one:.2f} s a step", "1.0", "through the command line")
    table.add("two processes on two cores", f"{two:.2f} s a step", f"{one / two:.2f} x", "`--trainer.strategy ddp`")


class Moment(NamedTuple):
    """Of an attack."""

    steps: int
    seconds: float
    psnr: float


class Watch(Callback):
    """Notes the quality of an attack's images after each step. It reads the truth: this is a measurement."""

    def __init__(self, truth: Truth) -> None:
        self.truth = truth.images
        self.began = clock()
        self.moments: list[Moment] = []

    @property
    def best(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.psnr)

    def first(self, psnr: float) -> Moment | None:
        """When the images first were as good as that."""
        return next((moment for moment in self.moments if moment.psnr >= psnr), None)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        paused = clock()
        images = pl_module.reconstruction().images
        error = (images[match(images, self.truth)] - self.truth).square().mean((1, 2, 3))
        self.moments.append(Moment(trainer.global_step, paused - self.began, float(-10 * error.log10().mean())))
        self.began += clock() - paused


def attacked(
    attack: Attack, steps: int, setting: Setting, monkeypatch: pytest.MonkeyPatch, precision: str = "32-true"
) -> tuple[Watch, float]:
    """Run an attack to its end; the seconds include the closed form and leave out the watching."""
    monkeypatch.setattr(Attack, "configure_callbacks", lambda self: [])
    watch = Watch(Truth.load(setting.record.truth(0)))
    Trainer(
        max_steps=steps,
        accelerator="cpu",
        precision=precision,
        logger=False,
        callbacks=[watch],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    ).fit(attack, datamodule=setting.rounds)
    return watch, clock() - watch.began


def test_time_to_quality(setting: Setting, table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    if "yardstick" not in MEASURED:
        pytest.skip("The yardstick's time comes from test_step: run it too.")
    matching = GradientInversion(
        lr=0.1, latent_downscale=4, merged=False, priors=[ChromaTotalVariation(1.0)], anneal=(1.0, 0.01)
    )
    matched, _ = attacked(matching, setting.attack_steps, setting, monkeypatch)
    best, first = matched.best, matched.first(QUALITY)
    MEASURED["matching"], MEASURED["matching's PSNR"] = best.seconds, best.psnr
    if first:
        yardstick = MEASURED["quality"] = first.steps * MEASURED["yardstick"]
        remark = f"extrapolated: the {first.steps} steps that ours takes, at the time of a dense evaluation"
        table.add(f"yardstick to {QUALITY} dB", f"{yardstick:.0f} s", "1.0", remark)
        ratio = f"{yardstick / first.seconds:.1f} x"
        table.add(f"gradient matching to {QUALITY} dB", f"{first.seconds:.0f} s", ratio, f"{first.steps} steps")
    else:
        table.add(f"gradient matching to {QUALITY} dB", "not reached")
    remark = f"{best.psnr:.2f} dB after {best.steps} steps"
    table.add("gradient matching to its own best", f"{best.seconds:.0f} s", "", remark)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_inversion(
    benchmark: BenchmarkFixture, setting: Setting, table: Table, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """Closed form and inversion, against the yardstick; and against gradient matching, where that ran before."""
    if "yardstick" not in MEASURED:
        pytest.skip("The yardstick's time comes from test_step: run it too.")
    if precision != "32-true" and not bf16_pays():
        pytest.skip("This processor does not compute in bf16.")
    hundred = setting.attack_steps * MEASURED["yardstick"]
    arguments = FeatureInversion(), INVERSION_STEPS, setting, monkeypatch, precision
    leaked, whole = benchmark.pedantic(attacked, arguments, rounds=1)
    benchmark.extra_info.update(yardstick=MEASURED["yardstick"], psnr=leaked.best.psnr)
    share = f"{whole / hundred:.2f} of {setting.attack_steps} yardstick evaluations"
    name = f"closed form and {INVERSION_STEPS} inversion steps, {precision}"
    table.add(name, f"{whole:.0f} s", share, f"{leaked.best.psnr:.2f} dB")
    for psnr in sorted({QUALITY, GOOD, BETTER, MEASURED.get("matching's PSNR", QUALITY)}):
        if not (first := leaked.first(psnr)):
            table.add(f"closed form to {psnr:.1f} dB, {precision}", "not reached")
            continue
        ratios = [f"{first.seconds / hundred:.3f} of {setting.attack_steps} yardstick evaluations"]
        if psnr == QUALITY and "quality" in MEASURED:
            ratios.append(f"{MEASURED['quality'] / first.seconds:.1f} x the yardstick")
        if "matching" in MEASURED:
            ratios.append(f"{first.seconds / MEASURED['matching']:.2f} of matching's time to its own best")
        remark = f"{first.psnr:.2f} dB after {first.steps} of {INVERSION_STEPS} steps"
        table.add(f"closed form to {psnr:.1f} dB, {precision}", f"{first.seconds:.0f} s", "; ".join(ratios), remark)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
