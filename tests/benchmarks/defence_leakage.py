"""What defences leave to be seen: the closed form under each of them, as rows of a table.

    python tests/benchmarks/defence_leakage.py FOLDER notebooks/defence_leakage.csv --seeds 0 1 2

takes images as FOLDER/<class>/*.jpg, or CIFAR-10 as a `.tar.gz` of JPEG files: LeNet5 as initialised, 4 peers with 4
images each and the attacker, one local epoch at rate 0.003 (Adam: 0.0003), one round, images of 64x64 pixels (CIFAR-10:
32x32) unless options say otherwise; nothing told but the rates, and with `--knowledge known` the defence. A run of more
than `--seconds` is given up, as where hundreds of images are counted.
"""

import signal
import tempfile
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch
from defence_settings import settings
from defence_table import arguments, fill

from attack_modules import FeatureInversion
from attack_modules.evaluation.assignment import match
from attack_modules.panels import draw_panel
from attack_modules.threat_model.knowledge import Knowledge
from attack_modules.threat_model.observed import ObservedRounds
from fl_lightning.allocation import keep_freed_memory
from fl_lightning.client import LocalTraining
from fl_lightning.data import CIFAR10, IID, ImageFolder
from fl_lightning.errors import AuditError
from fl_lightning.federation import Federation
from fl_lightning.truth import Truth

GOOD = 20.0
"""PSNR in dB from which an image shows what the original shows."""
SETTINGS = settings(norm=0.0075)
COLUMNS = (
    "defence",
    "seed",
    "knowledge",
    "steps",
    "originals",
    "found",
    "good",
    "labels_right",
    "psnr",
    "lowest",
    "certain",
    "likely",
    "unreliable",
    "not_read",
    "certain_but_not_good",
    "reasons",
)


def row_of(name: str, seed: int, given: Namespace) -> dict[str, object]:
    """Attack one federation."""
    setting, seconds = SETTINGS[name], given.seconds
    told = Knowledge("inferred", "inferred", "inferred", "inferred", defenses=given.knowledge)
    archive = given.root.name.endswith(".tar.gz")
    size = given.size or (32 if archive else 64)
    data = (CIFAR10 if archive else ImageFolder)(
        root=given.root,
        num_clients=given.peers + 1,
        images_per_client=given.images,
        image_size=size,
        partition=IID(),
        seed=seed,
    )
    training = LocalTraining(
        lr=given.rate or (0.0003 if setting.optimizer == "Adam" else 0.003),
        local_epochs=given.epochs,
        optimizer=setting.optimizer,
        label_smoothing=setting.label_smoothing,
        defenses=setting.client,
    )
    federation = Federation(
        client=training,
        rounds=given.rounds,
        observed_rounds=list(range(given.rounds)),
        server_defenses=setting.server,
        seed=seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        rounds = ObservedRounds(told, federation, data, Path(folder))
        rounds.prepare_data()
        rounds.setup()
        truth = Truth.load(rounds.record.truth(0))
        seen = [one.observation for one in rounds.rounds]
    row = {"knowledge": given.knowledge, "steps": given.steps, "originals": len(truth.labels), "found": 0, "good": 0}
    signal.alarm(seconds)
    try:
        result = FeatureInversion().reconstruct(seen, rounds.rounds[0].assumptions, given.steps)
    except AuditError as error:
        return row | {"reasons": f"refused: {error}"}
    except TimeoutError:
        return row | {"reasons": f"given up after {seconds} s"}
    finally:
        signal.alarm(0)
    order = match(result.images, truth.images)
    found = order >= 0
    if given.pictures:
        rows = {"original": truth.images[found], "found": result.images[order[found]]}
        draw_panel(rows).save(given.pictures / f"{name.replace(' ', '_')}_{seed}.png")
    errors = (result.images[order[found]] - truth.images[found]).square().mean((1, 2, 3))
    psnr, levels = -10 * errors.log10(), [result.verdict.levels[index] for index in order[found].tolist()]
    classes = max(int(result.labels.max()), int(truth.labels.max())) + 1
    counts = [labels.bincount(minlength=classes) for labels in (result.labels, truth.labels)]
    wrong = [level.value == "certain" and value < GOOD for level, value in zip(levels, psnr.tolist(), strict=True)]
    return row | {
        "found": int(found.sum()),
        "good": int((psnr >= GOOD).sum()),
        "labels_right": int(torch.minimum(*counts).sum()),
        "psnr": f"{psnr.mean().item():.1f}",
        "lowest": f"{psnr.min().item():.1f}",
        **{
            level: sum(one.value.replace(" ", "_") == level for one in levels)
            for level in ("certain", "likely", "unreliable", "not_read")
        },
        "certain_but_not_good": sum(wrong),
        "reasons": "; ".join(result.verdict.reasons),
    }


def give_up(*_: object) -> None:
    raise TimeoutError


if __name__ == "__main__":
    keep_freed_memory()
    signal.signal(signal.SIGALRM, give_up)
    parser = arguments(__doc__.splitlines()[0], SETTINGS)
    parser.add_argument("--knowledge", choices=["known", "unknown"], default="unknown")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--peers", type=int, default=4)
    parser.add_argument("--images", type=int, default=4, help="of each peer")
    parser.add_argument("--size", type=int, help="pixels of an image's edge")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rate", type=float, help="of the peers' optimiser")
    parser.add_argument("--rounds", type=int, default=1, help="of the same images, all observed")
    parser.add_argument("--pictures", type=Path, help="a folder that exists, for a panel of each row")
    given = parser.parse_args()
    fill(given, COLUMNS, partial(row_of, given=given))
