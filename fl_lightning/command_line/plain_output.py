"""Output that a user needs, and no more."""

import logging
import sys
import threading
import warnings

QUIET = (
    "The following callbacks returned in `LightningModule.configure_callbacks` will override",
    "Using ModelCheckpoint with manual optimization",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    "The '.*_dataloader' does not have many workers",
    "GPU available but not used",
    "The dirpath has changed",
    "LightningCLI's args parameter is intended",  # an audit reads the settings of its runs
    "You passed `Trainer.accelerator='cpu', precision=",  # which is refused, in a sentence
    "Be aware that when using `ckpt_path`, callbacks used to create the checkpoint",  # another number of steps
    "You're resuming from a checkpoint that ended before the epoch ended",  # the data of an attack only count its steps
)
"""Warnings of Lightning and PyTorch that ask nothing of the user."""


def speak_plainly() -> None:
    """Keep the output to what a user needs: no advertisements, no advice to developers, warnings in one line."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in QUIET:
        warnings.filterwarnings("ignore", message)
    report = threading.excepthook  # TensorBoard's thread that cannot write raises its error in the main thread, too
    threading.excepthook = lambda raised: None if issubclass(raised.exc_type, OSError) else report(raised)
    warnings.showwarning = lambda message, *_, **__: print(f"Warning: {message}", file=sys.stderr, flush=True)
