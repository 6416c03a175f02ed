"""One matching step in every way that is compared; as a script, one way in a process of its own.

python steps.py WAY OBSERVATION THREADS -> JSON with its seconds, peak memory and page faults
"""

import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from vmapped import vmapped_update
from yardstick import dense_loss

from attack_modules.gradient_matching.objectives import SquaredL2
from attack_modules.simulation.feature_map import for_speed
from attack_modules.simulation.half_way import model_half_way
from attack_modules.simulation.local_training import SimulatedPeers
from attack_modules.threat_model.knowledge import Knowledge
from attack_modules.threat_model.observed import ObservedRound
from fl_lightning.allocation import keep_freed_memory
from fl_lightning.observation import Observation
from fl_lightning.truth import Truth

LATENT_DOWNSCALE = 4
Step = Callable[[], Tensor]
"""Computes the gradient of the latent, which it returns."""


def step_of(way: str, seen: ObservedRound, images: int | None = None, local_epochs: int | None = None) -> Step:
    """A step of some way, on other numbers of images or local epochs if they are given.

    Args:
        way: `yardstick`, `merged`, `bf16`, `chunks`, `loop`, `vmap`, `head` or `head-bf16`.
        seen: the observed round.
        images: N, of classes 0 to N - 1 modulo the classes; None for the assumed ones.
        local_epochs: None for the assumed number.
    """
    observation = seen.observation
    labels = torch.tensor(seen.assumptions.labels)
    if images is not None:
        labels = torch.arange(images) % observation.num_classes
    if local_epochs is not None:
        seen = replace(seen, assumptions=replace(seen.assumptions, local_epochs=local_epochs))
    channels, height, width = observation.image_shape
    generator = torch.Generator().manual_seed(0)
    shape = (len(labels), channels, height // LATENT_DOWNSCALE, width // LATENT_DOWNSCALE)
    latent = (0.5 + 0.05 * torch.randn(shape, generator=generator)).requires_grad_()
    target, objective = seen.peers_update(), SquaredL2()
    cpu, merged = torch.device("cpu"), way in ("merged", "bf16", "chunks")
    peers = frozen = None
    if way.startswith("head"):
        frozen = for_speed(model_half_way([observation], [target], seen.assumptions.local_steps), cpu)
        target = {name: update for name, update in target.items() if name.startswith("head.")}
    model = observation.build_model().to(memory_format=torch.channels_last) if way == "vmap" else None
    if way != "yardstick":
        peers = SimulatedPeers(seen, merged, cpu, chunk_size=16 if way == "chunks" else None, frozen=frozen)

    def loss() -> Tensor:
        pixels = F.interpolate(latent, scale_factor=LATENT_DOWNSCALE, mode="bicubic")
        if way == "yardstick":
            return dense_loss(seen, pixels, labels, target)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        if way == "vmap":
            clients = len(seen.assumptions.client_sizes)
            return objective(vmapped_update(peers, model, pixels, labels, clients), target)
        return objective(peers.mean_update(pixels, labels), target)

    def step() -> Tensor:
        latent.grad = None
        with torch.autocast("cpu", torch.bfloat16) if way.endswith("bf16") else nullcontext():
            loss().backward(inputs=[latent])
        return latent.grad

    return step


def recorded_round(stem: Path) -> ObservedRound:
    """An observed round of a federation's record, whose attacker is told everything but the images."""
    truth = Truth.load(stem.parents[1] / "truth" / stem.name)
    return ObservedRound(Observation.load(stem), Knowledge().assumptions(truth))


def clock() -> float:
    """Seconds of the wall, or with BENCH_CPU=1, for a busy machine, those that this process computed."""
    return time.process_time() if os.environ.get("BENCH_CPU") else time.perf_counter()


def seconds(step: Callable[[], object]) -> float:
    """Time of one call."""
    began = clock()
    step()
    return clock() - began


def bf16_pays() -> bool:
    """Whether this machine has bf16 arithmetic; without it, a step in bf16 takes twenty times as long."""
    x, weight = torch.rand(16, 32, 64, 64), torch.rand(64, 32, 5, 5)
    taken = []
    for dtype in (torch.float32, torch.bfloat16):
        operands = x.to(dtype), weight.to(dtype)
        F.conv2d(*operands)
        taken.append(seconds(lambda operands=operands: F.conv2d(*operands)))
    return taken[1] < 2 * taken[0]


def peak_mib() -> int:
    """Of this process. `ru_maxrss` would not do: it starts with the parent's."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) >> 10


if __name__ == "__main__":
    way, stem, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    torch.set_float32_matmul_precision("high")
    if not way.endswith("-default"):  # glibc's own way with large blocks
        keep_freed_memory()
    step = step_of(way.removesuffix("-default"), recorded_round(Path(stem)))
    idle = peak_mib()
    step()
    before = resource.getrusage(resource.RUSAGE_SELF)
    taken = seconds(step)
    after = resource.getrusage(resource.RUSAGE_SELF)
    print(
        json.dumps(
            {
                "seconds": taken,
                "system": after.ru_stime - before.ru_stime,
                "faults": after.ru_minflt - before.ru_minflt,
                "peak": peak_mib(),
                "idle": idle,
            }
        )
    )
