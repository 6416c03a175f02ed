"""Looking at an attack: scores, panels, and the files of a run directory. The only code here that opens the truth."""

import csv
import importlib.metadata
import io
import os
import platform
import resource
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from attack_modules.attack import Attack, Reconstruction
from attack_modules.metrics import Lpips, Recogniser, Scorecard, score
from attack_modules.panels import draw_panel, save_png
from fl_lightning.errors import AuditError
from fl_lightning.storage import atomic_path, write_json, write_text
from fl_lightning.truth import Truth


class RunDirectoryError(AuditError):
    """The run directory belongs to another run."""


class Evaluation(Callback):
    """Scores an attack against the truth, and leaves pictures and numbers in the run directory.

    During the run, panels and mean scores go to TensorBoard; at its end `results.json`, `per_image.csv`, `panel.png`
    and `images/NNN.png` are written. Does nothing for modules that are not attacks.
    """

    def __init__(self) -> None:
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
        scorecard = truth and score(outputs.images.cpu(), truth.images, outputs.labels.cpu(), truth.labels)
        if scorecard:
            means = {name: value for name, value in scorecard.summary().items() if name in ("psnr_mean", "ssim_mean")}
            pl_module.log_dict(means, prog_bar=True, batch_size=1, rank_zero_only=True)
        if isinstance(trainer.logger, TensorBoardLogger):
            panel = pil_to_tensor(_panel(outputs.images.cpu(), truth, scorecard))
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
        directory = Path(trainer.log_dir)
        images, labels = reconstruction.images.cpu(), reconstruction.labels.cpu()
        truth = self._truth(trainer)
        scorecard = None
        if truth:
            recogniser = Recogniser() if truth.imagenet_labels else None
            scorecard = score(images, truth.images, labels, truth.labels, recogniser, Lpips.if_available())
            write_text(directory / "per_image.csv", _table(scorecard, truth, labels))
        with atomic_path(directory / "panel.png") as temporary:
            _panel(images, truth, scorecard).save(temporary, format="png")
        for index, image in enumerate(images):
            save_png(image, directory / "images" / f"{index:03d}.png")
        results = self._results(trainer, attack, scorecard)
        write_json(directory / "results.json", results)
        if isinstance(trainer.logger, TensorBoardLogger) and scorecard:
            trainer.logger.log_metrics({f"final/{k}": v for k, v in scorecard.summary().items()}, trainer.global_step)
        shown = ("psnr_mean", "psnr_min", "ssim_mean", "label_accuracy", "recognised_top1", "recognised_top5")
        numbers = ", ".join(f"{k} {results['scores'][k]:.3f}" for k in shown if k in results["scores"])
        print(f"\n{numbers or 'No truth, so no scores.'}\nPictures and numbers: {directory}", flush=True)

    def _results(self, trainer: Trainer, attack: Attack, scorecard: Scorecard | None) -> dict[str, Any]:
        observations = attack.observations
        packages = ("torch", "lightning", "torchvision", "torchmetrics")
        return {
            "attack": type(attack).__name__,
            "scores": scorecard.summary() if scorecard else {},
            "steps": trainer.global_step,
            "seconds": round(self.seconds, 3),
            "peak_memory_mb": _peak_memory_mb(attack.device),
            "knowledge": observations[-1].sources,
            "believed": {
                name: value
                for name, value in vars(observations[-1].beliefs).items()
                if name not in ("labels", "client_sizes")
            },
            "observed_rounds": [observation.round for observation in observations],
            "observation": str(trainer.datamodule.record.directory),
            "postprocess": "none",
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


def _panel(images: Tensor, truth: Truth | None, scorecard: Scorecard | None) -> Image.Image:
    if truth is None or scorecard is None:
        return draw_panel({"reconstruction": images})
    missing = scorecard.assignment < 0
    matched = images[scorecard.assignment.clamp_min(0)]
    matched[missing] = torch.nan
    captions = [f"{psnr:.1f} dB" for psnr in scorecard.per_image["psnr"]]
    return draw_panel({"original": truth.images, "reconstruction": matched}, captions)


def _table(scorecard: Scorecard, truth: Truth, labels: Tensor) -> str:
    """One row an original, in the peers' order."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["original", "client", "label", "class", "reconstruction", "inferred_label", *scorecard.per_image])
    for i, j in enumerate(scorecard.assignment.tolist()):
        label = int(truth.labels[i])
        inferred = int(labels[j]) if j >= 0 else ""
        scores = [f"{float(column[i]):.6g}" for column in scorecard.per_image.values()]
        writer.writerow([i, int(truth.clients[i]), label, truth.class_names[label], j, inferred, *scores])
    return text.getvalue()


def _peak_memory_mb(device: torch.device) -> int:
    """Peak memory of this process, or of the GPU if the attack ran on one, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    unit = 1 if platform.system() == "Darwin" else 1024  # ru_maxrss counts bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit >> 20


def _cpu() -> str:
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
