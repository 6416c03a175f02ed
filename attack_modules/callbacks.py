"""Looking at an attack: scores, panels, and the files of a run directory. The only code here that opens the truth.

An enhancement is run here too, after the attack, and seen beside what it was made of.
"""

import csv
import importlib.metadata
import io
import os
import platform
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from attack_modules.attack import Attack, Reconstruction
from attack_modules.enhance.enhancer import Enhancer
from attack_modules.metrics import RECOGNITION, Lpips, Recogniser, Scorecard, score
from attack_modules.panels import draw_panel, save_png
from fl_lightning.errors import AuditError
from fl_lightning.storage import atomic_path, write_json, write_text
from fl_lightning.truth import Truth

OF_ORIGINALS = RECOGNITION[2:]
"""Columns that no enhancement changes."""


class RunDirectoryError(AuditError):
    """The run directory belongs to another run."""


@dataclass(frozen=True)
class Outcome:
    """Images that a run ends with, and what is known of them; all on the CPU."""

    images: Tensor
    """(N, C, H, W) in [0, 1]."""
    labels: Tensor
    """(N,) long."""
    scorecard: Scorecard | None
    """None without a truth."""
    misfit: Tensor | None = None
    """(N,) or (): see `Attack.misfit`."""

    def numbers(self) -> dict[str, float]:
        """What is printed, as far as it is known."""
        shown = ("psnr_mean", "psnr_min", "ssim_mean", "label_accuracy", "recognised_top1", "recognised_top5")
        scores = self.scorecard.summary() if self.scorecard else {}
        numbers = {name: scores[name] for name in shown if name in scores}
        return numbers | ({} if self.misfit is None else {"misfit": self.misfit.mean().item()})


class Evaluation(Callback):
    """Scores an attack against the truth, and leaves pictures and numbers in the run directory.

    During the run, panels and mean scores go to TensorBoard; at its end `results.json`, `per_image.csv`, `panel.png`
    and `images/NNN.png` are written. Does nothing for modules that are not attacks.

    Args:
        enhancer: what is made of the reconstructed images at the end, beside them: `enhanced/NNN.png`, a row of the
            panel, scores and misfit of their own.
    """

    def __init__(self, enhancer: Enhancer | None = None) -> None:
        self.enhancer = enhancer
        self.seconds = 0.0  # of attack, over all resumed parts
        self._started = 0.0
        self._lock: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if isinstance(pl_module, Attack) and trainer.is_global_zero and stage != "predict":
            self._lock = claim(Path(trainer.log_dir))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._lock:
            self._lock.unlink(missing_ok=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "")

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds + (time.perf_counter() - self._started if self._started else 0.0)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds = state_dict["seconds"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(pl_module, Attack) and trainer.is_global_zero:
            print(pl_module.introduction(), flush=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.perf_counter()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not isinstance(outputs, Reconstruction) or trainer.sanity_checking or not trainer.is_global_zero:
            return
        began = time.perf_counter()
        truth = self._truth(trainer)
        images, labels = outputs.images.cpu(), outputs.labels.cpu()
        outcome = Outcome(images, labels, truth and score(images, truth.images, labels, truth.labels))
        means = {name: value for name, value in outcome.numbers().items() if name in ("psnr_mean", "ssim_mean")}
        pl_module.log_dict(means, prog_bar=True, batch_size=1, rank_zero_only=True)
        if isinstance(trainer.logger, TensorBoardLogger):
            panel = pil_to_tensor(_panel(truth, outcome, None))
            trainer.logger.experiment.add_image("panel", panel, trainer.global_step)
        self._started += time.perf_counter() - began  # evaluation is not the attack's time

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds = self.state_dict()["seconds"]
        self._started = 0.0
        if isinstance(pl_module, Attack) and trainer.is_global_zero:
            self._report(trainer, pl_module, pl_module.reconstruction())

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if isinstance(outputs, Reconstruction) and trainer.is_global_zero:
            self._report(trainer, pl_module, outputs)

    def _truth(self, trainer: Trainer) -> Truth | None:
        record = trainer.datamodule.record
        stem = record.truth(record.observed_rounds[-1])
        return Truth.load(stem) if stem.with_suffix(".json").exists() else None

    def _report(self, trainer: Trainer, attack: Attack, reconstruction: Reconstruction) -> None:
        directory, memory = Path(trainer.log_dir), _peak_memory_mb(attack.device)
        truth = self._truth(trainer)
        recogniser = Recogniser() if truth and truth.imagenet_labels else None
        lpips = Lpips.if_available() if truth else None
        images, labels = reconstruction.images.cpu(), reconstruction.labels.cpu()
        scorecard = truth and score(images, truth.images, labels, truth.labels, recogniser, lpips)
        raw = Outcome(images, labels, scorecard, attack.misfit(*reconstruction[:2]).cpu())
        enhanced, seconds = None, 0.0
        if self.enhancer:
            began = time.perf_counter()
            images = self.enhancer.enhance(reconstruction, trainer.datamodule.federation.seed).cpu()
            seconds = time.perf_counter() - began
            if scorecard:  # an enhanced image is still of the original that its reconstruction was matched to
                settled = scorecard.assignment
                scorecard = score(images, truth.images, None, truth.labels, recogniser, lpips, settled)
            enhanced = Outcome(images, labels, scorecard, attack.misfit(images, reconstruction.labels).cpu())

        if truth:
            write_text(directory / "per_image.csv", _table(truth, raw, enhanced))
        with atomic_path(directory / "panel.png") as temporary:
            _panel(truth, raw, enhanced).save(temporary, format="png")
        _save_images(directory / "images", raw)
        results = self._results(trainer, attack, raw, memory)
        print(f"\n{_line(raw) or 'No truth, so no scores.'}")
        _log(trainer, "final", raw)
        if enhanced:
            _save_images(directory / "enhanced", enhanced)
            results["enhanced"] = _results_of(enhanced) | {"seconds": round(seconds, 3)}
            print(f"Enhanced by {type(self.enhancer).__name__} in {seconds:.1f} s: {_line(enhanced)}")
            _log(trainer, "enhanced", enhanced)
        write_json(directory / "results.json", results)
        print(f"Pictures and numbers: {directory}", flush=True)

    def _results(self, trainer: Trainer, attack: Attack, raw: Outcome, memory: int) -> dict[str, Any]:
        observations = attack.observations
        packages = ("torch", "lightning", "torchvision", "torchmetrics")
        return {
            "attack": type(attack).__name__,
            **_results_of(raw),
            "steps": trainer.global_step,
            "seconds": round(self.seconds, 3),
            "peak_memory_mb": memory,
            "knowledge": observations[-1].sources,
            "believed": {
                name: value
                for name, value in vars(observations[-1].beliefs).items()
                if name not in ("labels", "client_sizes")
            },
            "observed_rounds": [observation.round for observation in observations],
            "observation": str(trainer.datamodule.record.directory),
            "postprocess": type(self.enhancer).__name__ if self.enhancer else "none",
            "seed": trainer.datamodule.federation.seed,
            "precision": str(trainer.precision),
            "device": torch.cuda.get_device_name(attack.device) if attack.device.type == "cuda" else _cpu(),
            "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in packages}},
        }


def claim(directory: Path) -> Path:
    """Make a directory this run's own until the returned lock file is deleted.

    Raises:
        RunDirectoryError: a run is writing there, or has left its results.
    """
    if (directory / "results.json").exists():
        raise RunDirectoryError(
            f"'{directory}' holds the results of a finished run. Leave `trainer.logger.version` out to get a new "
            "directory, or delete this one."
        )
    directory.mkdir(parents=True, exist_ok=True)
    lock = directory / "run.lock"
    try:
        with lock.open("x") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        owner = lock.read_text()
        if owner.isdecimal() and Path(f"/proc/{owner}").exists() and int(owner) != os.getpid():
            raise RunDirectoryError(
                f"Process {owner} is writing to '{directory}'. Wait for it, or leave `trainer.logger.version` out to "
                "get a new directory."
            ) from None
        lock.write_text(str(os.getpid()))  # left behind by a run that was killed
    return lock


def _results_of(outcome: Outcome) -> dict[str, Any]:
    scores = outcome.scorecard.summary() if outcome.scorecard else {}
    return {"scores": scores, "misfit": outcome.misfit.mean().item()}


def _line(outcome: Outcome) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in outcome.numbers().items())


def _log(trainer: Trainer, prefix: str, outcome: Outcome) -> None:
    if isinstance(trainer.logger, TensorBoardLogger) and outcome.scorecard:
        scores = {f"{prefix}/{name}": value for name, value in outcome.scorecard.summary().items()}
        trainer.logger.log_metrics(scores, trainer.global_step)


def _save_images(directory: Path, outcome: Outcome) -> None:
    for index, image in enumerate(outcome.images):
        save_png(image, directory / f"{index:03d}.png")


def _panel(truth: Truth | None, raw: Outcome, enhanced: Outcome | None) -> Image.Image:
    outcomes = {"reconstruction": raw} | ({"enhanced": enhanced} if enhanced else {})
    if truth is None:
        return draw_panel({name: outcome.images for name, outcome in outcomes.items()})
    rows, captions = {"original": truth.images}, []
    for name, outcome in outcomes.items():
        rows[name] = outcome.images[outcome.scorecard.assignment.clamp_min(0)]
        rows[name][outcome.scorecard.assignment < 0] = torch.nan
        captions.append([f"{psnr:.1f}" for psnr in outcome.scorecard.per_image["psnr"]])
    return draw_panel(rows, [f"{' / '.join(psnrs)} dB" for psnrs in zip(*captions, strict=True)])


def _table(truth: Truth, raw: Outcome, enhanced: Outcome | None) -> str:
    """One row an original, in the peers' order."""
    assignment = raw.scorecard.assignment
    columns = {**raw.scorecard.per_image, "misfit": _misfit_column(raw, assignment)}
    if enhanced:
        again = {name: column for name, column in enhanced.scorecard.per_image.items() if name not in OF_ORIGINALS}
        columns |= {f"enhanced_{name}": column for name, column in again.items()}
        columns["enhanced_misfit"] = _misfit_column(enhanced, assignment)
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["original", "client", "label", "class", "reconstruction", "inferred_label", *columns])
    for i, j in enumerate(assignment.tolist()):
        label = int(truth.labels[i])
        inferred = int(raw.labels[j]) if j >= 0 else ""
        scores = [f"{float(column[i]):.6g}" for column in columns.values()]
        writer.writerow([i, int(truth.clients[i]), label, truth.class_names[label], j, inferred, *scores])
    return text.getvalue()


def _misfit_column(outcome: Outcome, assignment: Tensor) -> Tensor:
    """(M,) misfit of each original's reconstruction, NaN if it has none; the same for all if it is one of them all."""
    column = outcome.misfit.expand(len(outcome.images))[assignment.clamp_min(0)].clone()
    column[assignment < 0] = torch.nan
    return column


def _peak_memory_mb(device: torch.device) -> int:
    """Peak memory of this process, or of the GPU if the attack ran on one, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    unit = 1 if platform.system() == "Darwin" else 1024  # ru_maxrss counts bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit >> 20


def _cpu() -> str:
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
