"""CSV files that list images, their labels and optionally their clients."""

import csv
import hashlib
import io
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fl_lightning.data.catalogue import Catalogue, label_indices
from fl_lightning.data.images import PathLike, UnreadableImage, read_image
from fl_lightning.errors import MissingFile, SettingError
from fl_lightning.models.classifier import ImageShape

ATTACKER = "attacker"


@dataclass
class Manifest:
    """The validated rows of a CSV file `path,label[,client]`; the image files exist but have not been read.

    Relative paths are relative to the CSV's folder. Labels are class indices if all of them are integers, otherwise
    class names, which are indexed in sorted order. Clients are victims, numbered from 0, or `attacker`, which becomes
    the last client and may have no rows.
    """

    csv: Path
    sha256: str
    """SHA-256 of the CSV file."""
    lines: list[int]
    """Line number of each row in the file, from 1."""
    paths: list[Path]
    labels: Tensor
    """Class indices, long (M,)."""
    class_names: list[str]
    shares: list[Tensor] | None
    """Row indices of each client, the attacker's last; None without a column `client`."""

    def catalogue(self, image_shape: ImageShape) -> Catalogue:
        channels, image_size, _ = image_shape

        def read(row: int) -> Tensor:
            try:
                return read_image(self.paths[row], image_size, channels)
            except UnreadableImage as error:
                raise UnreadableImage(f"{self.csv}, line {self.lines[row]}: {error}") from error

        return Catalogue(self.labels, self.class_names, read, lambda row: str(self.paths[row]))


def read_manifest(csv_path: PathLike, num_classes: int | None = None) -> Manifest:
    """Read and validate a manifest without opening the images.

    Args:
        csv_path: the CSV file in UTF-8, with the column names in its first line.
        num_classes: upper bound that all class indices must be below; None: no bound.

    Raises:
        MissingFile: the CSV file, or an image that it lists, does not exist.
        SettingError: the content is invalid; the message names the line.
    """
    path = Path(csv_path)
    if not path.is_file():
        raise MissingFile(f"There is no file '{path}'. Set `data.csv` to a CSV file with columns path,label.")
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")  # spreadsheet programs often write a byte order mark
    except UnicodeDecodeError as error:
        raise SettingError(f"{path} is not UTF-8 text ({error}). Save it as CSV in UTF-8.") from error

    table = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
    columns = [name.strip() for name in table.fieldnames or []]
    if sorted(columns) not in (["label", "path"], ["client", "label", "path"]):
        raise SettingError(
            f"{path}, line 1: the columns are '{','.join(columns)}', but a manifest has path,label or "
            "path,label,client. Write these names in the first line."
        )
    table.fieldnames = columns
    rows: list[dict[str, str]] = []
    lines: list[int] = []
    for row in table:
        if None in row:
            raise SettingError(
                f"{path}, line {table.line_num}: there are more values than the {len(columns)} columns. "
                "Enclose values that contain a comma in double quotes."
            )
        rows.append({name: (value or "").strip() for name, value in row.items()})
        lines.append(table.line_num)
    if not rows:
        raise SettingError(f"{path} has no rows. List one image per line, below a first line path,label.")

    paths = [path.parent / row["path"] for row in rows]
    for row, image, line in zip(rows, paths, lines, strict=True):
        if not row["label"]:
            raise SettingError(f"{path}, line {line}: '{row['path']}' has no label. Give a class index or name.")
        if not image.is_file():
            raise MissingFile(
                f"{path}, line {line}: there is no image '{image}'. Correct the path; relative paths are relative to "
                "the CSV's folder."
            )
    labels, class_names = _labels([row["label"] for row in rows])
    for row, label, line in zip(rows, labels.tolist(), lines, strict=True):
        if label < 0 or (num_classes is not None and label >= num_classes):
            highest = "" if num_classes is None else f" to {num_classes - 1}"
            raise SettingError(
                f"{path}, line {line}: the label {row['label']} is class {label}, but classes are numbered from 0"
                f"{highest}. Correct the label or raise `data.num_classes`."
            )
    shares = _shares(path, [row["client"] for row in rows], lines) if "client" in columns else None
    return Manifest(path, hashlib.sha256(content).hexdigest(), lines, paths, labels, class_names, shares)


def _labels(values: list[str]) -> tuple[Tensor, list[str]]:
    """Convert the label column to class indices and class names."""
    if all(re.fullmatch(r"-?\d+", value) for value in values):
        labels = torch.tensor([int(value) for value in values])
        return labels, [str(index) for index in range(int(labels.max()) + 1)]
    class_names = sorted(set(values))
    return label_indices(values, class_names), class_names


def _shares(path: Path, values: list[str], lines: list[int]) -> list[Tensor]:
    """Convert the column `client` to the row indices of each client, the attacker's last."""
    for value, line in zip(values, lines, strict=True):
        if value != ATTACKER and not re.fullmatch(r"\d+", value):
            raise SettingError(
                f"{path}, line {line}: the client is '{value}', but must be a victim's number, from 0, or "
                f"'{ATTACKER}'. Correct it, or remove the column to have `data.partition` assign the images."
            )
    clients = [-1 if value == ATTACKER else int(value) for value in values]
    for victim in range(max(*clients, 0) + 1):
        if victim not in clients:
            raise SettingError(
                f"{path}, line {lines[clients.index(max(clients))]}: client {victim} has no images, although "
                f"{'only the attacker is' if max(clients) < 0 else f'client {max(clients)} is'} named. "
                "Number the victims consecutively from 0."
            )
    owner = torch.tensor(clients)
    return [(owner == client).nonzero().flatten() for client in (*range(max(clients) + 1), -1)]
