"""A user's CSV under any dataset, and every way in which it can be wrong."""

from pathlib import Path

import pytest
from PIL import Image

from fl_lightning.data import IID, MNIST, FederatedData, Photographs, UnreadableImage

LEVELS = {"a.png": 10, "b.png": 20, "c.png": 30, "d.png": 40}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four images, each of one grey level, by which a test recognises it."""
    (tmp_path / "images").mkdir()
    for name, level in LEVELS.items():
        Image.new("RGB", (8, 8), (level, level, level)).save(tmp_path / "images" / name)
    return tmp_path


def manifest(folder: Path, *rows: str, header: str = "path,label") -> Path:
    path = folder / "manifest.csv"
    path.write_text("\n".join((header, *rows)) + "\n")
    return path


def levels(data: FederatedData) -> list[list[int]]:
    """Each client's images by their grey level, after `setup`."""
    data.setup()
    return [client.pixels[:, 0, 0, 0].tolist() for client in data.clients]


def load(folder: Path, *rows: str, header: str = "path,label", num_classes: int | None = None) -> Photographs:
    return Photographs(num_clients=2, image_size=8, csv=manifest(folder, *rows, header=header), num_classes=num_classes)


def test_rows_keep_their_order_and_paths_start_at_the_csv(folder: Path) -> None:
    absolute = folder / "images" / "a.png"
    data = load(folder, "images/d.png,2", f"{absolute},0", "images/c.png,1", "images/b.png,2")
    assert levels(data) == [[40, 10], [30, 20]]
    assert [client.labels.tolist() for client in data.clients] == [[2, 0], [1, 2]]
    assert data.class_names == ["0", "1", "2"]
    assert data.test_set is None


def test_names_become_sorted_classes(folder: Path) -> None:
    data = load(folder, "images/a.png,zebra", "images/b.png,7", num_classes=4)
    assert levels(data) == [[10], [20]]
    assert data.class_names == ["7", "zebra", "2", "3"]
    assert [client.labels.item() for client in data.clients] == [1, 0]


def test_a_grey_dataset_reads_grey(folder: Path) -> None:
    data = MNIST(root=folder / "nothing", num_clients=1, csv=manifest(folder, "images/a.png,0"))
    assert levels(data) == [[10]]
    assert data.clients[0].pixels.shape == (1, 1, 32, 32)


def test_a_spreadsheets_file_is_read(folder: Path) -> None:
    (folder / "manifest.csv").write_bytes(
        b'\xef\xbb\xbfpath, label\r\n"images/a.png", "cat, tabby"\r\n\r\nimages/b.png,dog\r\n'
    )
    data = Photographs(num_clients=2, image_size=8, csv=folder / "manifest.csv")
    assert levels(data) == [[10], [20]]
    assert data.class_names == ["cat, tabby", "dog"]


def test_the_client_column_decides_alone(folder: Path) -> None:
    rows = ["images/a.png,0,attacker", "images/b.png,1,1", "images/c.png,2,0", "images/d.png,0,1"]
    data = Photographs(
        num_clients=9,
        images_per_client=16,
        image_size=8,
        partition=IID(),
        csv=manifest(folder, *rows, header="path,label,client"),
    )
    assert (data.num_clients, data.attacker) == (3, 2)
    assert levels(data) == [[30], [20, 40], [10]]


def test_an_attacker_without_rows_has_no_data(folder: Path) -> None:
    data = load(folder, "images/a.png,0,0", header="path,label,client")
    assert levels(data) == [[10], []]
    assert data.attacker == 1


def test_without_a_client_column_the_partition_deals(folder: Path) -> None:
    rows = [f"images/{name},0" for name in LEVELS]
    data = Photographs(num_clients=2, images_per_client=[3, 1], image_size=8, csv=manifest(folder, *rows))
    assert levels(data) == [[10, 20, 30], [40]]


def test_the_description_follows_the_text(folder: Path) -> None:
    before = load(folder, "images/a.png,0").describe()
    assert load(folder, "images/a.png,0").describe() == before
    assert load(folder, "images/a.png,1").describe() != before


@pytest.mark.parametrize(
    ("header", "rows", "sentence"),
    [
        ("path", ["images/a.png"], r"line 1: the columns are 'path', but a manifest has path,label"),
        ("path,label,owner", ["images/a.png,0,1"], r"line 1: the columns are 'path,label,owner'"),
        ("images/a.png,0", [], r"line 1: the columns are 'images/a\.png,0'"),
        ("", [], r"line 1: the columns are ''"),
        ("path,label", [], r"has no rows\. List one image per line"),
        ("path,label", ["images/a.png,0", "images/b.png,"], r"line 3: 'images/b\.png' has no label"),
        ("path,label", ["images/a.png,0", "images/b.png"], r"line 3: 'images/b\.png' has no label"),
        ("path,label", ["images/a.png,cat, tabby"], r"line 2: there are more values than the 2 columns"),
        ("path,label", ["images/a.png,0", "images/b.png,-1"], r"line 3: the label -1 is class -1.* from 0 to 2\."),
        ("path,label", ["images/a.png,0", "images/b.png,3"], r"line 3: the label 3 is class 3.* from 0 to 2\."),
        ("path,label", [f"images/a.png,{c}" for c in "abcd"], r"line 5: the label d is class 3.* from 0 to 2\."),
        ("path,label,client", ["images/a.png,0,0", "images/b.png,0,"], r"line 3: the client is '', but must be"),
        ("path,label,client", ["images/a.png,0,victim"], r"line 2: the client is 'victim', but .* or 'attacker'"),
        ("path,label,client", ["images/a.png,0,-1"], r"line 2: the client is '-1', but must be"),
        (
            "path,label,client",
            ["images/a.png,0,0", "images/b.png,0,2"],
            r"line 3: client 1 has no images, although client 2 is named",
        ),
        (
            "path,label,client",
            ["images/a.png,0,attacker"],
            r"line 2: client 0 has no images, although only the attacker is named",
        ),
    ],
)
def test_bad_text_is_refused_with_its_line(folder: Path, header: str, rows: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        load(folder, *rows, header=header, num_classes=3)


def test_missing_files_are_refused_before_any_image_is_read(folder: Path) -> None:
    (folder / "images" / "a.png").write_text("no image")
    with pytest.raises(FileNotFoundError, match=r"line 3: there is no image '.*nobody\.png'"):
        load(folder, "images/a.png,0", "images/nobody.png,0")
    with pytest.raises(FileNotFoundError, match=r"There is no file '.*other\.csv'\. Set `data\.csv`"):
        Photographs(csv=folder / "other.csv")


def test_an_unreadable_image_is_refused_with_its_line(folder: Path) -> None:
    (folder / "images" / "b.png").write_text("no image")
    data = load(folder, "images/a.png,0", "images/b.png,0")
    with pytest.raises(UnreadableImage, match=r"manifest\.csv, line 3: The image '.*b\.png' cannot be read"):
        data.setup()


def test_text_in_another_encoding_is_refused(folder: Path) -> None:
    (folder / "manifest.csv").write_bytes("path,label\nimages/a.png,Bär".encode("latin-1"))
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        Photographs(csv=folder / "manifest.csv")


def test_a_victim_without_images_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="There are 1 images for 2 clients, so some would have none"):
        load(folder, "images/a.png,0").setup()
