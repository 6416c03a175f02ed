"""`read_image` against pixels worked out by hand, and `ImageSet`'s batches."""

import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fl_lightning.data import ImageSet, UnreadableImage, read_image
from fl_lightning.data.images import read_size


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    shape = (height, width) if channels == 1 else (height, width, channels)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def saved(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def test_image_of_the_right_size_passes_unchanged(tmp_path: Path) -> None:
    pixels = noise(16, 16)
    result = read_image(saved(Image.fromarray(pixels), tmp_path / "x.png"), 16, channels=3)
    assert result.dtype == torch.uint8
    assert torch.equal(result, torch.from_numpy(pixels).permute(2, 0, 1))


def test_centre_is_cropped_without_resampling_when_one_side_fits(tmp_path: Path) -> None:
    pixels = noise(16, 21)
    result = read_image(saved(Image.fromarray(pixels), tmp_path / "x.png"), 16, channels=3)
    assert torch.equal(result, torch.from_numpy(pixels[:, 2:18]).permute(2, 0, 1))


@pytest.mark.parametrize("size", [8, 64])
def test_other_sizes_are_resized(tmp_path: Path, size: int) -> None:
    result = read_image(saved(Image.new("RGB", (30, 17), (10, 200, 90)), tmp_path / "x.png"), size, channels=3)
    assert result.shape == (3, size, size)
    assert torch.equal(result, torch.tensor([10, 200, 90], dtype=torch.uint8).view(3, 1, 1).expand(3, size, size))


def test_shrinking_is_antialiased(tmp_path: Path) -> None:
    stripes = np.tile(np.array([0, 255], dtype=np.uint8), (64, 32))
    result = read_image(saved(Image.fromarray(stripes), tmp_path / "x.png"), 8, channels=1)
    assert (result[..., 1:-1].float() - 127.5).abs().max() < 6


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    pixels = noise(16, 16)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    result = read_image(saved(Image.fromarray(pixels), tmp_path / "x.png", exif=exif), 16, channels=3)
    assert torch.equal(result, torch.from_numpy(np.rot90(pixels, -1).copy()).permute(2, 0, 1))


def test_alpha_is_composited_on_white(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8, 4), dtype=np.uint8)
    pixels[..., 0] = 100
    pixels[:, 4:, 3] = 255
    pixels[0, 0, 3] = 51  # a fifth
    result = read_image(saved(Image.fromarray(pixels), tmp_path / "x.png"), 8, channels=3)
    assert result[:, 4, 0].tolist() == [255, 255, 255]
    assert result[:, 4, 5].tolist() == [100, 0, 0]
    assert result[:, 0, 0].tolist() == [224, 204, 204]


def test_grey_with_alpha(tmp_path: Path) -> None:
    image = Image.merge("LA", [Image.new("L", (8, 8), 60), Image.new("L", (8, 8), 0)])
    assert (read_image(saved(image, tmp_path / "x.png"), 8, channels=1) == 255).all()


@pytest.mark.parametrize(("transparency", "expected"), [(None, [1, 2, 3]), (7, [255, 255, 255])])
def test_palette(tmp_path: Path, transparency: int | None, expected: list[int]) -> None:
    image = Image.new("P", (8, 8), 7)
    image.putpalette([0] * 21 + [1, 2, 3])
    options = {} if transparency is None else {"transparency": transparency}
    result = read_image(saved(image, tmp_path / "x.png", **options), 8, channels=3)
    assert result[:, 3, 3].tolist() == expected


def test_grey_becomes_colour_and_colour_grey(tmp_path: Path) -> None:
    grey = noise(8, 8, channels=1)
    result = read_image(saved(Image.fromarray(grey), tmp_path / "grey.png"), 8, channels=3)
    assert torch.equal(result, torch.from_numpy(grey).expand(3, 8, 8))
    colour = saved(Image.new("RGB", (8, 8), (100, 150, 200)), tmp_path / "colour.png")
    assert read_image(colour, 8, channels=1).unique().tolist() == [round(0.299 * 100 + 0.587 * 150 + 0.114 * 200)]


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_are_scaled_to_8(tmp_path: Path, suffix: str, channels: int) -> None:
    levels = np.tile(np.arange(8, dtype=np.uint16) * 9000, (8, 1))
    result = read_image(saved(Image.fromarray(levels), tmp_path / f"x.{suffix}"), 8, channels)
    assert result.shape == (channels, 8, 8)
    assert result[0, 0].tolist() == [round(level * 9000 / 65535 * 255) for level in range(8)]


def test_mode_i_is_taken_for_16_bits(tmp_path: Path) -> None:
    image = Image.fromarray(np.full((8, 8), 65535, dtype=np.int32))
    assert (read_image(saved(image, tmp_path / "x.tif"), 8, channels=1) == 255).all()


@pytest.mark.parametrize("pixels", [np.full((8, 8), 70000, dtype=np.int32), np.ones((8, 8), dtype=np.float32)])
def test_pixels_of_unknown_range_are_refused(tmp_path: Path, pixels: np.ndarray) -> None:
    with pytest.raises(UnreadableImage, match="value range is unknown; save it with 8 or 16 bits"):
        read_image(saved(Image.fromarray(pixels), tmp_path / "x.tif"), 8, channels=3)


def test_truncated_file_is_refused_by_name(tmp_path: Path) -> None:
    path = saved(Image.fromarray(noise(64, 64)), tmp_path / "cut.jpg")
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(UnreadableImage, match=r"cut\.jpg' cannot be read .* Replace it with an intact JPEG"):
        read_image(path, 8, channels=3)


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "note.jpg").write_text("no image")
    with pytest.raises(UnreadableImage, match=r"note\.jpg' cannot be read"):
        read_image(tmp_path / "note.jpg", 8, channels=3)
    with pytest.raises(UnreadableImage, match=r"missing\.jpg' cannot be read"):
        read_image(tmp_path / "missing.jpg", 8, channels=3)
    with pytest.raises(UnreadableImage, match=r"The image 'tar:a/b\.jpg' cannot be read"):
        read_image(BytesIO(b"no image"), 8, channels=3, name="tar:a/b.jpg")


def test_a_missing_or_empty_file_is_told_from_a_damaged_one(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(UnreadableImage, match=r"empty\.jpg' cannot be read \(it is empty, or no image"):
        read_image(tmp_path / "empty.jpg", 8, channels=3)
    with pytest.raises(UnreadableImage, match=r"\(No such file or directory\)\. Correct the path"):
        read_image(tmp_path / "missing.jpg", 8, channels=3)


def test_too_many_pixels_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(Image.new("RGB", (16, 16)), tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)  # Pillow warns from there on, and refuses twice as many
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(path, 8, channels=3).shape == (3, 8, 8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for read in (lambda: read_image(path, 8, channels=3), lambda: read_size(path)):
        with pytest.raises(UnreadableImage, match=r"too many pixels, .*\. Make it smaller"):
            read()


@pytest.fixture
def ten() -> ImageSet:
    """Image i is filled with i and has label 10 i."""
    numbers = torch.arange(10)
    return ImageSet(numbers.to(torch.uint8).view(10, 1, 1, 1).expand(10, 3, 2, 2).contiguous(), 10 * numbers)


@pytest.mark.parametrize("index", [[1, 4], torch.tensor([1, 4]), slice(1, 5, 3)])
def test_an_index_of_any_kind_gives_a_batch(ten: ImageSet, index: list[int] | torch.Tensor | slice) -> None:
    images, labels = ten[index]
    assert images.dtype == torch.float32
    assert torch.equal(images[:, 0, 0, 0], torch.tensor([1, 4]) / 255)
    assert labels.tolist() == [10, 40]


def test_a_number_gives_one_image(ten: ImageSet) -> None:
    image, label = ten[3]
    assert image.shape == (3, 2, 2)
    assert label == 30
    assert ten.images.shape == (10, 3, 2, 2)


def test_batches(ten: ImageSet) -> None:
    assert [labels.tolist() for _, labels in ten.dataloader(4)] == [[0, 10, 20, 30], [40, 50, 60, 70], [80, 90]]
    [(images, labels)] = ten.dataloader()
    assert torch.equal(images, ten.images)
    assert torch.equal(labels, ten.labels)


def test_shuffled_batches_follow_their_generator_only(ten: ImageSet) -> None:
    def epochs(seed: int) -> list[list[int]]:
        loader = ten.dataloader(10, shuffle=True, generator=torch.Generator().manual_seed(seed))
        return [labels.tolist() for _ in range(2) for _, labels in loader]

    state = torch.get_rng_state()
    first, second = epochs(0)
    assert sorted(first) == sorted(second) == ten.labels.tolist()
    assert first != second
    assert epochs(0) == [first, second] != epochs(1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("shuffle", [False, True])
def test_no_images_make_no_batches(ten: ImageSet, shuffle: bool) -> None:
    empty = ImageSet(ten.pixels[:0], ten.labels[:0])
    assert list(empty.dataloader(shuffle=shuffle)) == []
    assert empty.images.shape == (0, 3, 2, 2)


def test_labels_must_match_images(ten: ImageSet) -> None:
    with pytest.raises(ValueError, match="10 images came with 9 labels"):
        ImageSet(ten.pixels, ten.labels[1:])
