"""A user's CSV under any dataset, and every way in which it can be wrong."""

import re
import warnings
from pathlib import Path
from unicodedata import normalize

import pytest
from PIL import Image

from fl_lightning.data import IID, MNIST, FederatedData, Photographs, UnreadableImage
from fl_lightning.data.manifest import read_manifest
from fl_lightning.federation import Federation
from fl_lightning.truth import Truth

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
    data = load(folder, "images/a.png,zebra", "images/b.png,3D", num_classes=4)
    assert levels(data) == [[10], [20]]
    assert data.class_names == ["3D", "zebra", "2", "3"]
    assert [client.labels.item() for client in data.clients] == [1, 0]


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ('path, label\r\n"images/a.png", "cat"\r\n\r\nimages/b.png,dog\r\n,\r\n', "utf-8-sig"),
        ("Label;PATH\ncat;images/a.png\ndog;images/b.png", "utf-8"),
        ("\nfile_name\tClass Name\nimages/a.png\tcat\nimages/b.png\tdog\n", "utf-16"),
        ('"Image" , "category"\r"images/a.png" , "cat"\r"images/b.png" , "dog"', "utf-8"),
        ("path,label,,\nimages\\a.png,cat,,\n.\\images\\b.png,dog,,,,", "utf-8"),
    ],
)
def test_files_of_any_program_are_read(folder: Path, text: str, encoding: str) -> None:
    (folder / "manifest.csv").write_bytes(text.encode(encoding))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = Photographs(num_clients=2, image_size=8, csv=folder / "manifest.csv")
    assert levels(data) == [[10], [20]]
    assert data.class_names == ["cat", "dog"]


def test_persons_reach_the_truth_and_not_the_observation(folder: Path) -> None:
    data = load(
        folder,
        "images/a.png,0,p7",
        "images/b.png,1,",
        "images/c.png,1,p7",
        "images/d.png,0,x",
        header="path,label,Patient",
    )
    data.setup()
    assert [client.persons for client in data.clients] == [["p7", ""], ["p7", "x"]]
    truth = Federation().truth(0, data)
    assert truth.persons == ["p7", ""]
    truth.save(folder / "truth")
    assert Truth.load(folder / "truth").persons == ["p7", ""]
    assert Truth.union([truth, truth]).persons == ["p7", ""]


def test_other_columns_are_ignored_with_one_warning(folder: Path) -> None:
    with pytest.warns(UserWarning, match=r"the columns used are 'path', 'class'; ignored: 'Image', 'age'\.") as caught:
        data = load(folder, "x,images/a.png,7,cat", "y,images/b.png,8,dog", header="Image,path,age,class")
    assert len(caught) == 1
    assert levels(data) == [[10], [20]]


@pytest.mark.parametrize(("on_disk", "in_csv"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents_match_in_either_form(folder: Path, on_disk: str, in_csv: str) -> None:
    (folder / normalize(on_disk, "Schülerin")).mkdir()
    Image.new("RGB", (8, 8), (50, 50, 50)).save(folder / normalize(on_disk, "Schülerin/Zoë.png"))
    text = normalize(in_csv, "path,label\nSchülerin/Zoë.png,Bär\n") + normalize(on_disk, "images/b.png,Bär\n")
    (folder / "manifest.csv").write_text(text, encoding="utf-8")
    data = Photographs(num_clients=2, image_size=8, csv=folder / "manifest.csv")
    assert levels(data) == [[50], [20]]
    assert data.class_names == [normalize("NFC", "Bär")]


def test_a_grey_dataset_reads_grey(folder: Path) -> None:
    data = MNIST(root=folder / "nothing", num_clients=1, csv=manifest(folder, "images/a.png,0"))
    assert levels(data) == [[10]]
    assert data.clients[0].pixels.shape == (1, 1, 32, 32)


def test_the_client_column_decides_alone(folder: Path) -> None:
    rows = ["images/a.png,0,Attacker", "images/b.png,1,1", "images/c.png,2,0", "images/d.png,0,1"]
    data = Photographs(
        num_clients=9,
        images_per_client=16,
        image_size=8,
        partition=IID(),
        csv=manifest(folder, *rows, header="path,label,Client"),
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
        ("path|label", ["images/a.png|0"], r"line 1: the columns are 'path\|label'.* commas, semicolons or tabs"),
        ("file,image,label", ["x,y,0"], r"line 1: each of the columns 'file', 'image' can be the path\. Name"),
        ("path,label,path", ["x,0,y"], r"line 1: each of the columns 'path', 'path' can be the path"),
        ("images/a.png,0", [], r"line 1: the columns are 'images/a\.png,0'"),
        ("", [], r"manifest\.csv' is empty\. List one image per line"),
        ("path,label", [], r"has no rows\. List one image per line"),
        ("path,label", ["images/a.png,0", "images/b.png,"], r"line 3: 'images/b\.png' has no label"),
        ("path,label", ["images/a.png,0", "images/b.png"], r"line 3: 'images/b\.png' has no label"),
        ("path,label", [",0"], r"line 2: there is no path"),
        ("path,label", ["images/a.png,cat, tabby"], r"line 2: there are more values .* contain a comma in double"),
        ("path;label", ["images/a.png;0;1"], r"line 2: there are more values .* contain a semicolon in double"),
        ("path,label", ['"images/a.png,0', *["images/b.png,0"] * 90], r"line 2: .* close every double quote"),
        ("path,label", ['"images/a.png,0', *["images/b.png,0"] * 9999], r"line 2: field larger .* Close every double"),
        ("path,label", ['"images/a\nb.png",0', "images/b.png,x"], r"line 4: the label 'x' is a class name"),
        ("path,label", ["images/a.png,0", "images/b.png,-1"], r"line 3: the label is -1, but class indices begin at 0"),
        (
            "path,label",
            ["images/a.png,0", "images/b.png,7"],
            r"line 3: the label 7 is class 7.* to 2\..* least 8",
        ),
        ("path,label", [f"images/a.png,{c}" for c in "abcd"], r"line 5: the label d is class 3.* from 0 to 2\."),
        (
            "path,label",
            [f"images/a.png,{label}" for label in (10, 2, "dog", 1)],
            r"line 4: the label 'dog' is a class name, but the first label, '10' in line 2, is a class index",
        ),
        (
            "path,label",
            ["images/a.png,dog", "images/b.png,2"],
            r"line 3: the label '2' is a class index, but the first label, 'dog' in line 2, is a class name",
        ),
        *[
            ("path,label", [f"images/a.png,{label}"], rf"line 2: the label {label} is a number, but no class index")
            for label in ("2.5", "1e3", "9" * 30)
        ],
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
    with pytest.raises(ValueError, match=sentence) as caught:
        load(folder, *rows, header=header, num_classes=3)
    assert len(str(caught.value)) <= 400


@pytest.mark.parametrize(
    "spelling",
    ["images/a.png", "./images/a.png", "images\\a.png", "link.png", "folder/a.png", "folder/../images/a.png"],
)
def test_an_image_listed_twice_is_refused(folder: Path, spelling: str) -> None:
    (folder / "link.png").symlink_to("images/a.png")
    (folder / "folder").symlink_to("images")
    sentence = f"line 4: '{spelling}' is the same file as 'images/a.png' in line 2, so one image would count as two."
    with pytest.raises(ValueError, match=re.escape(sentence) + ".* list a copy"):
        load(folder, "images/a.png,0", "images/b.png,0", f"{spelling},1")


def test_a_copy_may_be_listed_beside_its_original(folder: Path) -> None:
    (folder / "images" / "b.png").write_bytes((folder / "images" / "a.png").read_bytes())
    assert levels(load(folder, "images/a.png,0", "images/b.png,0")) == [[10], [10]]


@pytest.mark.parametrize(
    ("count", "highest", "num_classes", "fits"),
    [
        (2, 1000, None, True),
        (2, 1001, None, False),
        (2, 4000, 4001, True),
        (101, 1010, None, True),
        (101, 1011, None, False),
    ],
)
def test_a_label_far_beyond_the_others_is_asked_about(
    tmp_path: Path, count: int, highest: int, num_classes: int | None, fits: bool
) -> None:
    labels = [*range(count - 1), highest]
    for label in labels:
        (tmp_path / f"{label}.png").touch()
    path = manifest(tmp_path, *(f"{label}.png,{label}" for label in labels))
    if fits:
        assert len(read_manifest(path, num_classes).class_names) == highest + 1
    else:
        sentence = rf"line {count + 1}: the label {highest} would .* only {count} .* Correct .*`data\.num_classes` to"
        with pytest.raises(ValueError, match=sentence):
            read_manifest(path, num_classes)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("images", "it is a folder"),
        ("gone.png", "a link to a file that does not exist"),
        ("x" * 300 + ".png", "too long"),
        ("images/a.png/b.png", "Not a directory"),
    ],
)
def test_what_is_no_file_is_refused(folder: Path, name: str, sentence: str) -> None:
    (folder / "gone.png").symlink_to("nowhere.png")
    with pytest.raises(FileNotFoundError, match=f"line 2: there is no image .*{sentence}") as caught:
        load(folder, f"{name},0")
    assert len(str(caught.value)) <= 400


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


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("path,label\nimages/a.png,Bär".encode("latin-1"), "is not text in UTF-8 or UTF-16 .*continuation byte"),
        ("path,label\nimages/a.png,0".encode("utf-16-le"), "is not text in UTF-8 or UTF-16 .*null characters"),
        ("path,label\nimages/a.png,Bär".encode("utf-16")[:-1], "is not text in UTF-8 or UTF-16 .*truncated"),
        (b"\x89PNG\r\n\x1a\n\0\0", "is not text in UTF-8 or UTF-16"),
        ("\n  \n".encode("utf-8-sig"), "is empty"),
    ],
)
def test_what_is_no_text_is_refused(folder: Path, content: bytes, sentence: str) -> None:
    (folder / "manifest.csv").write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        Photographs(csv=folder / "manifest.csv")


def test_a_folder_is_no_manifest(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is a folder, but `data\.csv` is a CSV file.* `--data ImageFolder"):
        Photographs(csv=folder)


def test_a_victim_without_images_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="There are 1 images for 2 clients, so some would have none"):
        load(folder, "images/a.png,0").setup()
