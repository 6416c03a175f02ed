"""Each dataset reads what it says, from files made here or from ../shared/data where that is present."""

import os
import pickle
import shutil
import sys
import tarfile
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from fl_lightning.data import CIFAR10, IID, MNIST, FashionMNIST, FederatedData, ImageFolder, Photographs, image_folder
from fl_lightning.data.photographs import PHOTOGRAPHS
from fl_lightning.errors import SettingError

SHARED = Path(__file__).parents[4] / "shared" / "data"


def shared(name: str) -> Path:
    if not (SHARED / name).exists():
        pytest.skip(f"{SHARED / name} is absent; it is data of its own, not part of this repository")
    return SHARED / name


def save(path: Path, level: int, size: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (level, level, level)).save(path)


def held(data: FederatedData) -> list[list[int]]:
    """Each client's images by their first pixel."""
    data.setup()
    return [client.pixels[:, 0, 0, 0].tolist() for client in data.clients]


def test_photographs() -> None:
    data = Photographs(image_size=32)
    data.setup()
    assert data.class_names == list(PHOTOGRAPHS)
    assert data.num_classes == len(set(data.class_names)) == 16
    assert torch.cat([client.labels for client in data.clients]).tolist() == list(range(16))
    assert [client.pixels.shape for client in data.clients] == [(4, 3, 32, 32)] + [(3, 3, 32, 32)] * 4
    assert all(client.pixels.flatten(1).float().std(dim=1).min() > 5 for client in data.clients)
    red, _, blue = data.clients[0].images[1].mean(dim=(1, 2))  # a ginger cat
    assert red > blue + 0.1
    assert data.test_set is None
    assert data.val_dataloader() == []


def test_image_folder(tmp_path: Path) -> None:
    for level, name in enumerate(("b/2.PNG", "b/1.jpg", "a/x.tif", "c/y.bmp")):
        save(tmp_path / name, 60 * level)
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "a" / "._x.tif").write_text("hidden")
    (tmp_path / "d").mkdir()
    (tmp_path / "README.md").write_text("not a class")
    (tmp_path / "b" / "folder.png").mkdir()
    data = ImageFolder(tmp_path, num_clients=2, image_size=8)
    sentence = r"skipped: 4 \(README\.md, a/\._x\.tif, a/notes\.txt, \.\.\.\); classes without images: 1 \(d\)\."
    with pytest.warns(UserWarning, match=sentence) as caught:
        assert held(data) == [[120, 60], [0, 180]]
    assert len(caught) == 1
    assert data.class_names == ["a", "b", "c", "d"]
    assert [client.labels.tolist() for client in data.clients] == [[0, 1], [1, 2]]
    assert data.describe()["root"] == str(tmp_path)


def test_grey_and_rgb_of_the_same_files(tmp_path: Path) -> None:
    """Colours become grey by ITU-R 601; grey files are RGB unless `channels` says otherwise; MNIST the reverse."""
    (tmp_path / "a").mkdir()
    Image.new("RGB", (8, 8), (200, 100, 50)).save(tmp_path / "a" / "colour.png")
    Image.new("L", (8, 8), 30).save(tmp_path / "a" / "grey.png")
    (tmp_path / "list.csv").write_text("path,label\na/grey.png,0\na/colour.png,1\n")
    listed = {"csv": tmp_path / "list.csv", "num_clients": 1, "image_size": 8}
    for data in (ImageFolder(tmp_path, num_clients=1, image_size=8, channels=1), Photographs(channels=1, **listed)):
        data.setup()
        assert data.clients[0].pixels.shape == (2, *data.image_shape) == (2, 1, 8, 8)
        assert sorted(data.clients[0].pixels[:, 0, 0, 0].tolist()) == [30, 124]  # 0.299, 0.587 and 0.114
    for data in (Photographs(**listed), MNIST(tmp_path, channels=3, **listed)):
        data.setup()
        assert data.clients[0].pixels[:, :, 0, 0].tolist() == [[30, 30, 30], [200, 100, 50]]
    with pytest.raises(SettingError, match=r"`data\.channels` is 4"):
        CIFAR10(tmp_path, channels=4)


def test_image_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no folder '.*nowhere'\. Set `data\.root`"):
        ImageFolder(tmp_path / "nowhere").setup()
    with pytest.raises(FileNotFoundError, match=r"has no images in class folders\. Arrange them as"):
        ImageFolder(tmp_path).setup()
    save(tmp_path / "flat.png", 0)
    save(tmp_path / "train" / "cat" / "deep.png", 0)
    with pytest.raises(FileNotFoundError, match=r"So far not images in class folders.*: 2 \(flat\.png, train/cat\)"):
        ImageFolder(tmp_path).setup()
    with pytest.raises(FileNotFoundError, match=r"flat\.png' is a file\. Set `data\.root` to a folder"):
        ImageFolder(tmp_path / "flat.png").setup()


def test_image_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(image_folder.os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"cannot be listed \(Permission denied\)\. Check its permissions"):
        ImageFolder(tmp_path).setup()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no file names that are not text")
def test_names_that_are_not_text_can_be_saved(tmp_path: Path) -> None:
    for name in (b"k\xe9", b"k\xe8"):
        save(Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)) / "x.png", name[-1])
    data = ImageFolder(tmp_path, num_clients=2, image_size=8)
    assert held(data) == [[0xE8], [0xE9]]
    assert [client.labels.tolist() for client in data.clients] == [[0], [1]]
    "".join([*data.class_names, *data.clients[0].sources]).encode()


def test_imagenet_sample_differs_by_seed_and_agrees_by_the_same() -> None:
    root = shared("imagenet-sample")

    def images(seed: int) -> torch.Tensor:
        data = ImageFolder(root, images_per_client=16, image_size=16, partition=IID(), seed=seed)
        data.setup()
        assert [len(client) for client in data.clients] == [16] * 5
        assert data.imagenet_labels
        assert data.class_names[0] == "n01440764"
        return torch.cat([client.pixels for client in data.clients])

    first = images(0)
    assert len(first.flatten(1).unique(dim=0)) == 80
    assert torch.equal(first, images(0))
    assert not torch.equal(first, images(1))


@pytest.fixture
def cifar_folder(tmp_path: Path) -> Path:
    for split, offset in (("train", 0), ("test", 100)):
        for level, name in enumerate(("cat/0.png", "cat/1.png", "airplane/0.png")):
            save(tmp_path / "cifar" / split / name, offset + 10 * level, size=32)
    return tmp_path / "cifar"


def pack(folder: Path, prefix: str) -> Path:
    path = folder.parent / "cifar.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, prefix)
    return path


@pytest.mark.parametrize("layout", ["folder", "tar", "tar of the folder"])
def test_cifar10_as_files(cifar_folder: Path, layout: str) -> None:
    root = cifar_folder if layout == "folder" else pack(cifar_folder, "." if layout == "tar" else "cifar")
    data = CIFAR10(root, num_clients=2)
    assert held(data) == [[20, 0], [10]]
    assert data.class_names == ["airplane", "cat"]
    assert data.image_shape == (3, 32, 32)
    assert data.test_set.pixels[:, 0, 0, 0].tolist() == [120, 100, 110]
    assert data.test_set.labels.tolist() == [0, 1, 1]


@pytest.mark.parametrize("content", [b"", b"no archive", None])
def test_cifar10_broken_tar(cifar_folder: Path, content: bytes | None) -> None:
    path = pack(cifar_folder, ".")
    path.write_bytes(path.read_bytes()[:200] if content is None else content)
    with pytest.raises(
        ValueError, match=r"cifar\.tar\.gz' cannot be read as a tar file .* Download it again"
    ) as caught:
        CIFAR10(path).setup()
    assert len(str(caught.value)) <= 400


def test_cifar10_folders_must_agree(cifar_folder: Path) -> None:
    data = CIFAR10(cifar_folder, num_clients=1)
    data.setup()
    shutil.move(cifar_folder / "test" / "airplane", cifar_folder / "test" / "zebra")
    with pytest.raises(ValueError, match=r"have 2 classes \(cat, zebra\), the clients' images 2 \(airplane, cat\)"):
        data.test_set  # noqa: B018
    shutil.rmtree(cifar_folder / "test")
    with pytest.raises(FileNotFoundError, match=r"has a folder 'train', but none 'test'\. Add it, or .*ImageFolder"):
        data.test_set  # noqa: B018


def test_cifar10_foreign_tar(cifar_folder: Path) -> None:
    shutil.rmtree(cifar_folder / "train")
    with pytest.raises(ValueError, match=r"has no images at train/<class>/<name>\.jpg"):
        CIFAR10(pack(cifar_folder, ".")).setup()


def test_cifar10_unreadable_image_in_tar(cifar_folder: Path) -> None:
    (cifar_folder / "train" / "cat" / "0.png").write_text("no image")
    with pytest.raises(ValueError, match=r"cifar\.tar\.gz:train/cat/0\.png' cannot be read"):
        CIFAR10(pack(cifar_folder, "."), num_clients=1).setup()


def test_cifar10_in_torchvisions_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [("data_batch_1", "")])
    monkeypatch.setattr(datasets.CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": None})
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
    names = ["airplane", "automobile", "bird", "cat"]
    for name, content in {
        "data_batch_1": {"data": pixels.reshape(4, -1), "labels": [3, 0, 2, 1]},
        "batches.meta": {"label_names": names},
    }.items():
        (folder / name).write_bytes(pickle.dumps(content))
    data = CIFAR10(tmp_path, num_clients=2)
    data.setup()
    assert torch.equal(torch.cat([client.pixels for client in data.clients]), torch.from_numpy(pixels))
    assert data.clients[0].labels.tolist() == [3, 0]
    assert data.class_names == names


@pytest.mark.parametrize("dataset", [CIFAR10, MNIST, FashionMNIST])
def test_absent_dataset_says_how_to_get_it(dataset: type[CIFAR10 | MNIST], tmp_path: Path) -> None:
    sentence = (
        rf"{dataset.__name__} is not in '.*', or damaged \(.*\)\. Set `data\.download: true` to .* set `data\.root`"
    )
    with pytest.raises(FileNotFoundError, match=sentence):
        dataset(tmp_path).setup()


def test_download_without_network_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(self: datasets.MNIST) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(datasets.MNIST, "download", offline)
    with pytest.raises(FileNotFoundError, match=r"no route to host.*Check the connection, .* set `data\.root`"):
        MNIST(tmp_path, download=True).setup()


def test_cifar10_archive() -> None:
    data = CIFAR10(shared("cifar10-jpg.tar.gz"), images_per_client=2)
    data.setup()
    assert data.class_names == datasets_cifar10_classes()
    assert [len(client) for client in data.clients] == [2] * 5


def datasets_cifar10_classes() -> list[str]:
    return ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def write_idx(folder: Path, prefix: str, images: np.ndarray, labels: np.ndarray) -> None:
    """MNIST's own format: a magic number that tells the number of dimensions, the dimensions, the bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in ((f"{prefix}-images-idx3-ubyte", images), (f"{prefix}-labels-idx1-ubyte", labels)):
        header = np.array([0x0800 + array.ndim, *array.shape], dtype=">i4")
        (folder / name).write_bytes(header.tobytes() + array.tobytes())


@pytest.mark.parametrize("dataset", [MNIST, FashionMNIST])
def test_mnist(dataset: type[MNIST], tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 28, 28), dtype=np.uint8)
    labels = np.array([5, 0, 4, 1, 9, 2], dtype=np.uint8)
    raw = tmp_path / dataset.__name__ / "raw"
    write_idx(raw, "train", images, labels)
    write_idx(raw, "t10k", images[:2], labels[:2])
    data = dataset(tmp_path, num_clients=3)
    data.setup()
    assert data.image_shape == (1, 32, 32)
    assert data.num_classes == 10
    pixels = torch.cat([client.pixels for client in data.clients])
    assert torch.equal(pixels[:, 0, 2:-2, 2:-2], torch.from_numpy(images))
    assert pixels[:, :, :2].max() == pixels[..., -2:].max() == 0
    assert data.clients[1].labels.tolist() == [4, 1]
    assert len(data.test_set) == 2
    assert len(next(iter(data.val_dataloader()))[1]) == 2


@pytest.mark.parametrize(
    ("images", "labels", "cut", "sentence"),
    [
        (3, [0, 1], 0, "3 images have 2 labels"),
        (2, [0, 12], 0, r"of classes \[0, 12\]"),
        (2, [0, 1], 999, "or damaged"),
        (0, [], 0, "damaged"),
    ],
)
def test_damaged_mnist(tmp_path: Path, images: int, labels: list[int], cut: int, sentence: str) -> None:
    raw = tmp_path / "MNIST" / "raw"
    for prefix in ("train", "t10k"):
        write_idx(raw, prefix, np.zeros((images, 28, 28), np.uint8), np.array(labels, np.uint8))
    path = raw / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[: -cut or None])
    with pytest.raises((ValueError, FileNotFoundError), match=f"MNIST .*{sentence}"):
        MNIST(tmp_path).setup()


def test_a_file_is_no_dataset(tmp_path: Path) -> None:
    save(tmp_path / "x.png", 0)
    with pytest.raises(ValueError, match=r"x\.png' is a file\. Set `data\.root` to the folder of MNIST"):
        MNIST(tmp_path / "x.png", download=True).setup()
