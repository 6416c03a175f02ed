"""Released files: fetched once, resumed where a connection broke, and used only if they are what was released.

torchvision's datasets (`fl_lightning.data.downloadable`) are fetched by torchvision, which knows their addresses and
hashes itself.
"""

import fcntl
import http.client
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from fl_lightning.errors import AuditError
from fl_lightning.storage import sha256_of

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
"""Where weights lie, those that this project ships and those that it downloads."""

BLOCK = 1 << 20
"""Bytes read at a time."""
TIMEOUT = 30
"""Seconds without a byte, after which a connection counts as broken."""


class DownloadError(AuditError):
    """A released file is not at hand and could not be fetched, or is not what was released."""


@dataclass(frozen=True)
class ReleasedFile:
    """A file as somebody published it.

    Attributes:
        url: where it is published; the last part of the path is its name.
        sha256: hash of its content, in hexadecimal.
    """

    url: str
    sha256: str

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    def at(self, path: Path, download: bool) -> Path:
        """The file on disk, fetched first if it is not there and may be fetched.

        What arrives is kept in `<path>.part` until it is whole, so that the next call goes on where this one stopped; a
        second process waits for the first.

        Args:
            path: where it lies, or will.
            download: whether to fetch it if it is not there.

        Returns:
            `path`, whose content has the right hash.

        Raises:
            DownloadError: it is not there and may not or cannot be fetched, or its content is another.
        """
        by_hand = f"Download {self.url} by hand and put it at '{path}'"
        if not path.exists():
            if not download:
                raise DownloadError(f"There is no file '{path}'. Set `download: true` to fetch it. Or: {by_hand}.")
            try:
                self._fetch(path)
            except (OSError, http.client.HTTPException) as error:
                raise DownloadError(
                    f"{self.url} could not be fetched: {error or type(error).__name__}. Run the same command again to "
                    f"go on with what has arrived. Without a connection: {by_hand[0].lower()}{by_hand[1:]}."
                ) from error
        found = sha256_of(path)
        if found != self.sha256:
            raise DownloadError(
                f"'{path}' is not the released file: its SHA-256 is {found}, but {self.sha256} is published. Delete "
                f"it to have it fetched anew. Or: {by_hand}."
            )
        return path

    def _fetch(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        with part.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed
            if path.exists():  # another process was faster
                return
            try:
                self._receive(file)
            except urllib.error.HTTPError as error:
                if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                    raise
                # All of it had arrived; the hash tells whether it is right.
            if (found := sha256_of(part)) != self.sha256:
                file.truncate(0)
                raise DownloadError(
                    f"{self.url} is not the released file: its SHA-256 is {found}, but {self.sha256} is published. "
                    "It was deleted. Try again; if that happens twice, the file was changed at its source."
                )
            os.replace(part, path)

    def _receive(self, file: IO[bytes]) -> None:
        """Append what is missing at the end of `file`."""
        have = file.seek(0, os.SEEK_END)
        request = urllib.request.Request(self.url, headers={"Range": f"bytes={have}-"} if have else {})
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response, _progress() as progress:
            if response.status != http.HTTPStatus.PARTIAL_CONTENT:
                have = 0  # this server sends everything, whatever is asked
                file.truncate(0)
            length = response.headers.get("Content-Length")
            total = have + int(length) if length else None
            task = progress.add_task(self.name, total=total, completed=have)
            while block := response.read(BLOCK):
                file.write(block)
                progress.advance(task, len(block))
            file.flush()
            if total is not None and file.tell() < total:
                raise ConnectionError(f"the connection broke after {file.tell():,} of {total:,} bytes")


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    )
