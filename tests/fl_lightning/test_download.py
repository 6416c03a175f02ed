"""Downloads from a server on this machine: whole, resumed, broken, foreign."""

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fl_lightning.download import DownloadError, ReleasedFile

CONTENT = bytes(range(256)) * 8192  # 2 MiB
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves CONTENT; `cut` bytes of a response are left out, `ranges` says whether it can resume."""

    cut = 0
    ranges = True
    asked: list[str | None]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers["Range"]
        self.server.asked.append(wanted)
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and self.server.ranges else 0
        if start >= len(CONTENT):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        self.wfile.write(CONTENT[start : len(CONTENT) - self.server.cut])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    server.asked = []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def released(server: Server) -> ReleasedFile:
    return ReleasedFile(f"http://127.0.0.1:{server.server_port}/some/weights.pt", SHA256)


def test_a_file_is_fetched_once(server: Server, released: ReleasedFile, tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / released.name
    assert released.at(path, download=True).read_bytes() == CONTENT
    assert released.at(path, download=True) == released.at(path, download=False) == path
    assert server.asked == [None]
    assert [file.name for file in path.parent.iterdir()] == ["weights.pt"]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_goes_on(server: Server, released: ReleasedFile, tmp_path: Path, ranges: bool) -> None:
    path, server.cut = tmp_path / released.name, 1_000_000
    with pytest.raises(DownloadError, match=r"broke after 1,097,152 of 2,097,152 bytes. Run the same command again"):
        released.at(path, download=True)
    assert not path.exists()
    server.cut, server.ranges = 0, ranges
    assert released.at(path, download=True).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=1097152-"]


def test_a_whole_part_only_needs_its_name(released: ReleasedFile, tmp_path: Path) -> None:
    (tmp_path / "weights.pt.part").write_bytes(CONTENT)
    assert released.at(tmp_path / "weights.pt", download=True).read_bytes() == CONTENT


def test_a_part_of_another_file_is_thrown_away(server: Server, released: ReleasedFile, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    (tmp_path / "weights.pt.part").write_bytes(b"something else")
    with pytest.raises(DownloadError, match=f"expected {SHA256}. It was deleted"):
        released.at(path, download=True)
    assert not path.exists()
    assert released.at(path, download=True).read_bytes() == CONTENT


def test_a_foreign_file_is_refused(released: ReleasedFile, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(b"not the released weights")
    with pytest.raises(DownloadError, match="is not the published file"):
        released.at(path, download=False)
    assert path.exists()


def test_offline_it_says_where_to_put_the_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    released = ReleasedFile("http://127.0.0.1:9/weights.pt", SHA256)  # nobody listens at port 9
    by_hand = rf"download http://127.0.0.1:9/weights.pt by hand and save it as '{path}'"
    with pytest.raises(DownloadError, match=rf"could not be downloaded: .*Connection refused.*{by_hand}"):
        released.at(path, download=True)
    assert not list(tmp_path.iterdir())  # nothing that could be resumed
    with pytest.raises(DownloadError, match=rf"Set `download: true` to fetch it, or {by_hand}"):
        released.at(path, download=False)
