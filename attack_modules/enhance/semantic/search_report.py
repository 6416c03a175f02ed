"""What a search for one image leaves behind: scores by step, the image, a panel."""

import csv
import io
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.nn import functional as F
from torchvision.transforms.functional import pil_to_tensor

from attack_modules.panels import draw_panel, save_png
from fl_lightning.storage import atomic_path, write_json, write_text


class SearchReport(Callback):
    """Writes `semantic.png`, `panel.png`, `steps.csv` and `results.json` of a `SemanticEnhancer` to the run directory.

    The scores by step are kept over a resumed run.
    """

    def __init__(self) -> None:
        self.rows: list[list[float]] = []

    def state_dict(self) -> dict[str, list[list[float]]]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, list[list[float]]]) -> None:
        self.rows = state_dict["rows"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            target, name = pl_module.found.target, pl_module.model.classes[pl_module.class_label].name
            size = pl_module.model.image_size
            colours = "" if target.shape[1] == 3 else " It is grey, so that all colours are the model's."
            print(
                f"Semantic enhancement: an image of class {pl_module.class_label} ({name}), {size}x{size} pixels, that "
                f"agrees with the reconstruction at {target.shape[-1]}x{target.shape[-1]} pixels.{colours}\n"
                f"{pl_module.noise_size:,} unknown numbers, Adam at rate {pl_module.lr:g}, {pl_module.timesteps} "
                f"timesteps a sample; detail that the reconstruction does not show is invented.",
                flush=True,
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: dict, batch: object, batch_idx: int
    ) -> None:
        found = outputs["found"]
        self.rows.append([float(found.pixel_loss[0]), float(found.score[0])])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        directory, search = Path(trainer.log_dir or trainer.default_root_dir), pl_module.found
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(["step", "pixel_loss", "score"])
        writer.writerows([step, f"{loss:.6g}", f"{score:.6g}"] for step, (loss, score) in enumerate(self.rows))
        write_text(directory / "steps.csv", text.getvalue())
        best = search.best.cpu()
        save_png(best[0], directory / "semantic.png")
        target = F.interpolate(search.target.cpu(), best.shape[-2:], mode="nearest")
        panel = draw_panel({"reconstruction": target, "semantic": best})
        with atomic_path(directory / "panel.png") as temporary:
            panel.save(temporary, format="png")
        if isinstance(trainer.logger, TensorBoardLogger):
            trainer.logger.experiment.add_image("panel", pil_to_tensor(panel), trainer.global_step)
        results = {
            "class_label": pl_module.class_label,
            "class": pl_module.model.classes[pl_module.class_label].name,
            "steps": len(self.rows),
            "best_step": int(search.best_step[0]),
            "pixel_loss_first": self.rows[0][0],
            "pixel_loss_best": float((search.seen(search.best) - search.target).square().mean()),
            "noise_variance": float(search.tolerance[0]),
            "seed": pl_module.seed,
            "versions": {"torch": torch.__version__},
        }
        write_json(directory / "results.json", results)
        print(
            f"\npixel loss {results['pixel_loss_first']:.5f} -> {results['pixel_loss_best']:.5f} at step "
            f"{results['best_step']} of {results['steps']}\nPictures and numbers: {directory}",
            flush=True,
        )
