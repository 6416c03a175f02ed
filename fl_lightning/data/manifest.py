"""CSV files that list images, their labels and optionally their clients."""

import codecs
import csv
import hashlib
import io
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unicodedata import normalize

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from fl_lightning.data.catalogue import Catalogue, label_indices
from fl_lightning.data.images import PathLike, UnreadableImage, read_image, readable_name
from fl_lightning.errors import AuditError, MissingFile, SettingError, in_short
from fl_lightning.models.classifier import ImageShape

ATTACKER = "attacker"
OTHER_NAMES = {
    "path": {"file", "filename", "filepath", "image", "imagepath"},
    "label": {"class", "classname", "category", "target"},
    "client": set(),
    "person": {"patient", "patientid", "subject"},
}
"""Columns of a manifest -> what else they may be called, in lower case, without spaces, underscores and hyphens."""
DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab"}
INDEX = re.compile(r"-?\d{1,18}")
NUMBER = re.compile(r"[+-]?(\d+[.,]?\d*|[.,]\d+)(e[+-]?\d+)?", re.IGNORECASE)


@dataclass
class Manifest:
    """The validated rows of a CSV file `path,label[,client][,person]`; the image files exist but have not been read.

    Relative paths are relative to the CSV's folder. Labels are all class indices, from 0, or all class names, which
    are indexed in sorted order. Clients are victims, numbered from 0, or `attacker`, which becomes the last client and
    may have no rows.
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
    persons: list[str]
    """Whom each image shows; empty strings where the file does not tell."""

    def catalogue(self, image_shape: ImageShape) -> Catalogue:
        channels, image_size, _ = image_shape

        def read(row: int) -> Tensor:
            try:
                return read_image(self.paths[row], image_size, channels)
            except UnreadableImage as error:
                raise UnreadableImage(f"{self.csv}, line {self.lines[row]}: {error}") from error

        return Catalogue(
            labels=self.labels,
            class_names=self.class_names,
            read=read,
            source=lambda row: readable_name(self.paths[row]),
            person=self.persons.__getitem__,
        )


def read_manifest(csv_path: PathLike, num_classes: int | None = None) -> Manifest:
    """Read and validate a manifest without opening the images.

    Args:
        csv_path: a text file in UTF-8, or in UTF-16 with a byte order mark. Its first line names the columns, in any
            order and case, separated by commas, semicolons or tabs: `path` (or `file`, `filename`, `filepath`,
            `image`, `image path`), `label` (or `class`, `class name`, `category`, `target`), optionally `client`,
            and `person` (or `patient`, `patient id`, `subject`); a column of the first name precedes those of the
            others. Further columns are ignored with a warning.
        num_classes: upper bound that all class indices must be below; None: no bound.

    Raises:
        MissingFile: the CSV file, or an image that it lists, does not exist.
        SettingError: the content is invalid; the message names the line.
    """
    path = Path(csv_path)
    content, text = _read_text(path)
    table = _Table.parse(path, text)
    labels, class_names = _labels(table, num_classes)
    shares = _shares(table) if "client" in table.columns else None
    persons = table.columns.get("person", [""] * len(table.lines))
    digest = hashlib.sha256(content).hexdigest()
    return Manifest(path, digest, table.lines, _files(table), labels, class_names, shares, persons)


def _read_text(path: Path) -> tuple[bytes, str]:
    """Read a text file: its bytes and its decoded text."""
    if os.path.isdir(path):
        raise MissingFile(
            f"'{path}' is a folder, but `data.csv` is a CSV file with columns path,label. For a folder with one folder "
            "per class use `--data ImageFolder --data.root FOLDER`."
        )
    if not os.path.isfile(path):
        raise MissingFile(f"There is no file '{path}'. Set `data.csv` to a CSV file with columns path,label.")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SettingError(f"'{path}' cannot be read ({error.strerror}). Check its permissions.") from error
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if wide else "utf-8-sig")  # spreadsheet programs often write a byte order mark
        if "\0" in text:
            raise ValueError("it contains null characters")
    except ValueError as error:
        raise SettingError(
            f"'{path}' is not text in UTF-8 or UTF-16 ({in_short(error)}). `data.csv` is a CSV file with "
            "columns path,label that lists images. Save it as CSV in UTF-8."
        ) from error
    if not text.strip():
        raise SettingError(f"'{path}' is empty. List one image per line, below a first line path,label.")
    return content, text


@dataclass
class _Table:
    """The rows of a CSV file that are not blank."""

    csv: Path
    lines: list[int]
    """Line number of each row in the file, from 1."""
    columns: dict[str, list[str]]
    """The values of `path`, `label` and, if there are any, `client` and `person`, without surrounding white space."""

    @classmethod
    def parse(cls, path: Path, text: str) -> "_Table":
        for delimiter in DELIMITERS:
            rows = _rows(path, text, delimiter)
            header_line, header = next(rows, (1, []))
            places = _places(header)
            if places["path"] and places["label"]:
                break
        else:
            first = next(iter(text.strip().splitlines()), "")
            raise SettingError(
                f"{path}, line 1: the columns are '{_excerpt(first)}', but a manifest has path,label or "
                "path,label,client. Write these names in the first line, separated by commas, semicolons or tabs."
            )
        for name, found in places.items():
            if len(found) > 1:
                raise SettingError(
                    f"{path}, line {header_line}: each of the columns {_listed(header[place] for place in found)} can "
                    f"be the {name}. Name the right one {name} and the others differently."
                )
        used = {name: found[0] for name, found in places.items() if found}
        ignored = [name for place, name in enumerate(header) if name and place not in used.values()]
        if ignored:
            taken = _listed(header[place] for place in used.values())
            rank_zero_warn(f"{path}: the columns used are {taken}; ignored: {_listed(ignored)}.")

        table = cls(path, [], {name: [] for name in used})
        for line, values in rows:
            if any(values[len(header) :]):
                raise SettingError(
                    f"{path}, line {line}: there are more values than the {len(header)} columns. Enclose values that "
                    f"contain a {DELIMITERS[delimiter]} in double quotes."
                )
            table.lines.append(line)
            for name, place in used.items():
                table.columns[name].append(values[place] if place < len(values) else "")
        if not table.lines:
            raise SettingError(f"{path} has no rows. List one image per line, below a first line path,label.")
        return table

    def error(self, row: int, sentence: str, kind: type[AuditError] = SettingError) -> AuditError:
        """An error of `kind` that names the row's line."""
        return kind(f"{self.csv}, line {self.lines[row]}: {sentence}")


def _rows(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The rows of a CSV file that are not blank, each with the number of its first line, from 1."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    line = 1
    try:
        for row in reader:
            values = [value.strip() for value in row]
            if any(values):
                yield line, values
            line = reader.line_num + 1
    except csv.Error as error:
        raise SettingError(f"{path}, line {line}: {error}. Close every double quote that is opened.") from error


def _places(header: list[str]) -> dict[str, list[int]]:
    """For each column of a manifest where it may be in `header`: under its own name, or else under another."""
    keys = [re.sub(r"[\s_-]", "", name).lower() for name in header]
    return {
        name: [place for place, key in enumerate(keys) if key == name]
        or [place for place, key in enumerate(keys) if key in others]
        for name, others in OTHER_NAMES.items()
    }


def _files(table: _Table) -> list[Path]:
    """The image files of all rows, which exist and differ."""
    names_in = cache(_names_in)
    paths: list[Path] = []
    first_row: dict[tuple[int, int | str], int] = {}  # by device and inode, which all spellings of a path share
    for row, name in enumerate(table.columns["path"]):
        if not name:
            raise table.error(row, "there is no path. Give the path of an image, or remove the line.")
        path = _locate(table.csv.parent, name, names_in)
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("it is a folder, or a device")
        except (OSError, ValueError) as error:
            broken = isinstance(error, FileNotFoundError) and os.path.islink(path)
            reason = "a link to a file that does not exist" if broken else getattr(error, "strerror", None) or error
            raise table.error(
                row,
                f"there is no image '{_excerpt(path, 160)}' ({reason}). Correct the path; relative paths are relative "
                "to the CSV's folder.",
                MissingFile,
            ) from error
        inode = status.st_ino or os.path.realpath(path)  # some network drives have no inodes
        earlier = first_row.setdefault((status.st_dev, inode), row)
        if earlier != row:
            raise table.error(
                row,
                f"'{_excerpt(name)}' is the same file as '{_excerpt(table.columns['path'][earlier])}' in line "
                f"{table.lines[earlier]}, so one image would count as two. Remove a line, or list a copy of the file "
                "to have both.",
            )
        paths.append(path)
    return paths


def _locate(folder: Path, name: str, names_in: Callable[[Path], dict[str, str]]) -> Path:
    """Find a file by its path in a manifest; where there is none, return the path as it is written.

    Accented letters match whether they are composed (NFC) or decomposed (NFD, as macOS writes them), and backslashes
    separate folders as on Windows.
    """
    written = folder / name
    if os.path.lexists(written) or (name.isascii() and "\\" not in name):
        return written
    found = folder
    for part in Path(name.replace("\\", "/")).parts:
        if not os.path.lexists(found / part):
            part = names_in(found).get(normalize("NFC", part))
            if part is None:
                return written
        found /= part
    return found


def _names_in(folder: Path) -> dict[str, str]:
    """Names of the entries of a folder, by their composed form (NFC); empty if it cannot be listed."""
    try:
        return {normalize("NFC", name): name for name in os.listdir(folder)}
    except OSError:
        return {}


def _labels(table: _Table, num_classes: int | None) -> tuple[Tensor, list[str]]:
    """Convert the label column to class indices and class names."""
    values = [normalize("NFC", value) for value in table.columns["label"]]
    kinds = {True: "a class index", False: "a class name"}
    indices = bool(INDEX.fullmatch(values[0]))
    for row, value in enumerate(values):
        if not value:
            raise table.error(
                row,
                f"'{_excerpt(table.columns['path'][row])}' has no label. Give a class index or name, and close every "
                "double quote.",
            )
        index = bool(INDEX.fullmatch(value))
        if not index and NUMBER.fullmatch(value):
            raise table.error(
                row,
                f"the label {_excerpt(value)} is a number, but no class index. Labels are whole numbers from 0, "
                "or names.",
            )
        if index != indices:
            raise table.error(
                row,
                f"the label '{_excerpt(value)}' is {kinds[index]}, but the first label, '{_excerpt(values[0])}' in "
                f"line {table.lines[0]}, is {kinds[indices]}. Write all labels as class indices, from 0, or all as "
                "names, such as 'class 7'.",
            )
    class_names = sorted(set(values))
    labels = [int(value) for value in values] if indices else label_indices(values, class_names).tolist()
    highest, present = max(labels), len(set(labels))
    for row, label in enumerate(labels):
        if label < 0:
            raise table.error(row, f"the label is {label}, but class indices begin at 0. Number the classes from 0.")
        if num_classes is not None and label >= num_classes:
            raise table.error(
                row,
                f"the label {_excerpt(values[row])} is class {label}, but classes are numbered from 0 to "
                f"{num_classes - 1}. Correct the label, or raise `data.num_classes` to at least {highest + 1}.",
            )
    if num_classes is None and highest > max(1000, 10 * present):
        raise table.error(
            labels.index(highest),
            f"the label {highest} would make {highest + 1} classes, but the images have only {present} different "
            f"labels. Correct the label, or set `data.num_classes` to {highest + 1} if there are so many classes.",
        )
    return torch.tensor(labels), [str(index) for index in range(highest + 1)] if indices else class_names


def _shares(table: _Table) -> list[Tensor]:
    """Convert the column `client` to the row indices of each client, the attacker's last."""
    clients: list[int] = []
    for row, value in enumerate(table.columns["client"]):
        if value.lower() != ATTACKER and not re.fullmatch(r"\d{1,18}", value):
            raise table.error(
                row,
                f"the client is '{_excerpt(value)}', but must be a victim's number, from 0, or '{ATTACKER}'. Correct "
                "it, or remove the column to have `data.partition` assign the images.",
            )
        clients.append(-1 if value.lower() == ATTACKER else int(value))
    highest, named = max(clients), set(clients)
    for victim in range(max(highest, 0) + 1):
        if victim not in named:
            raise table.error(
                clients.index(highest),
                f"client {victim} has no images, although "
                f"{'only the attacker is' if highest < 0 else f'client {highest} is'} named. "
                "Number the victims consecutively from 0.",
            )
    owner = torch.tensor(clients)
    return [(owner == client).nonzero().flatten() for client in (*range(highest + 1), -1)]


def _excerpt(value: object, length: int = 60) -> str:
    """A value in one line of a message, without its middle if it is long."""
    text = str(value).replace("\n", "\\n").replace("\r", "\\r")
    return text if len(text) <= length else f"{text[: length // 2]}...{text[-length // 2 :]}"


def _listed(names: Iterable[str]) -> str:
    """Names in quotes, separated by commas, the first few of many."""
    return _excerpt(", ".join(f"'{name}'" for name in names), 120)
