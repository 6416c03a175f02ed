"""Download of published files, with resumption of interrupted transfers and verification by SHA-256.

torchvision's datasets (`fl_lightning.data.downloadable`) are downloaded by torchvision, which has its own list of
addresses and hashes.
"""

import http.client
import os
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from fl_lightning.errors import AuditError
from fl_lightning.storage import locked, sha256_of

_IN_CHECKOUT = Path(__file__).parents[1] / "checkpoints"
CHECKPOINTS = _IN_CHECKOUT if _IN_CHECKOUT.is_dir() else Path(sys.prefix) / "share" / "curious-client" / "checkpoints"
"""Folder of model weights, both those shipped with this project and those it downloads."""

BLOCK = 1 << 20
"""Number of bytes read at a time."""
TIMEOUT = 30
"""Seconds without data after which a connection is considered broken."""


class DownloadError(AuditError):
    """A published file is missing and could not be downloaded, or its content is not the published one."""


@dataclass(frozen=True)
class ReleasedFile:
    """A published file, identified by its address and hash.

    Attributes:
        url: address of the file; the last component of its path is the file name.
        sha256: SHA-256 of the content, in hexadecimal.
    """

    url: str
    sha256: str

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    def at(self, path: Path, download: bool) -> Path:
        """Verify the file at `path`, after downloading it if it is missing and `download` is set.

        Data is received in `<path>.part` until the file is complete, so that a later call resumes an interrupted
        download. Concurrent processes wait for the first one.

        Args:
            path: location of the file, existing or to be created.
            download: whether to download the file if it is missing.

        Returns:
            `path`, after its hash was verified.

        Raises:
            DownloadError: the file is missing and may not or cannot be downloaded, or its hash is wrong.
        """
        by_hand = f"download {self.url} by hand and save it as '{path}'"
        if not path.exists():
            if not download:
                raise DownloadError(f"There is no file '{path}'. Set `download: true` to fetch it, or {by_hand}.")
            try:
                self._fetch(path)
            except (OSError, http.client.HTTPException) as error:
                raise DownloadError(
                    f"{self.url} could not be downloaded: {error or type(error).__name__}. Run the same command again "
                    f"to resume the download, or {by_hand}."
                ) from error
        found = sha256_of(path)
        if found != self.sha256:
            raise DownloadError(
                f"'{path}' is not the published file: its SHA-256 is {found}, expected {self.sha256}. Delete it to "
                f"have it downloaded again, or {by_hand}."
            )
        return path

    def _fetch(self, path: Path) -> None:
        part = path.with_name(f"{path.name}.part")
        with locked(path.with_name(f"{path.name}.lock"), f"Another process downloads '{path}': waiting for it."):
            if path.exists():  # that process completed the download
                return
            try:
                with part.open("ab") as file:
                    self._receive(file)
                if (found := sha256_of(part)) != self.sha256:
                    part.unlink()
                    raise DownloadError(
                        f"The download of {self.url} has SHA-256 {found}, expected {self.sha256}. It was deleted. "
                        "Run the same command again; if the error recurs, the file at this address was changed."
                    )
                os.replace(part, path)
            finally:
                if part.exists() and not part.stat().st_size:  # nothing that could be resumed
                    part.unlink()

    def _receive(self, file: IO[bytes]) -> None:
        """Append the missing bytes to `file`, or rewrite it if the server cannot resume."""
        have = file.seek(0, os.SEEK_END)
        request = urllib.request.Request(self.url, headers={"Range": f"bytes={have}-"} if have else {})
        try:
            answer = urllib.request.urlopen(request, timeout=TIMEOUT)
        except urllib.error.HTTPError as error:
            if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise
            return  # no bytes are left to request: the file is complete, or its hash will tell
        with answer as response, _progress() as progress:
            if response.status != http.HTTPStatus.PARTIAL_CONTENT:
                have = 0  # the server ignores Range requests and sends the whole file
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
