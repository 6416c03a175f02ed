from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from attack_modules.panels import draw_panel, save_png
from fl_lightning.storage import StorageError


def colours(panel: Image.Image) -> set[tuple[int, ...]]:
    return {colour for _, colour in panel.getcolors(1 << 24)}


def test_pixels_are_enlarged_and_not_stretched() -> None:
    image = torch.tensor([[0.2, 0.4], [0.6, 0.8]]).expand(1, 3, 2, 2)
    panel = pil_to_tensor(draw_panel({"": image}, cell=7))  # a factor of 4
    for level in (51, 102, 153, 204):
        rows, columns = (panel == level).all(0).nonzero(as_tuple=True)
        assert len(rows) == 16
        assert rows.max() - rows.min() == columns.max() - columns.min() == 3


def test_values_outside_the_scale_are_clamped() -> None:
    image = torch.tensor([[[[-3.0, 5.0]], [[0.0, 1.0]], [[0.0, 1.0]]]])
    assert {(0, 0, 0), (255, 255, 255)} <= colours(draw_panel({"": image}, cell=2))


def test_images_are_never_shrunk() -> None:
    image = torch.rand(1, 3, 150, 100)
    panel = pil_to_tensor(draw_panel({"x": image}, cell=96))
    assert panel.shape[1] >= 150
    expected = image[0].mul(255).round().byte()
    windows = panel.unfold(1, 150, 1).unfold(2, 100, 1)  # (3, y, x, 150, 100)
    assert (windows == expected[:, None, None]).all(0).flatten(2).all(2).any()


def test_rows_and_bands() -> None:
    images = torch.full((5, 1, 32, 32), 0.5)
    two = draw_panel({"original": images, "reconstruction": images}, max_columns=5)
    wrapped = draw_panel({"original": images, "reconstruction": images}, max_columns=2)
    assert wrapped.height > 2.9 * two.height
    assert wrapped.width < two.width
    assert (pil_to_tensor(wrapped) == 128).all(0).sum() >= 10 * 96 * 96  # every image of both rows


def test_names_and_captions_are_written() -> None:
    images = torch.full((2, 3, 32, 32), 0.5)
    plain = draw_panel({"original": images})
    captioned = draw_panel({"original": images}, ["21.3 dB", "a caption wider than its image\nand of two lines"])
    assert captioned.height > plain.height and captioned.width > plain.width
    below = captioned.crop((0, plain.height, captioned.width, captioned.height))
    assert len(colours(below)) > 2
    assert colours(plain.crop((0, 0, 20, plain.height))) != {(255, 255, 255)}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_was_not_reconstructed_is_hatched(bad: float) -> None:
    images = torch.zeros(1, 3, 32, 32)
    images[0, 1, 2, 3] = bad
    drawn = colours(draw_panel({"": images}))
    assert (0, 0, 0) not in drawn
    assert {(238, 238, 238), (205, 205, 205)} <= drawn


def test_refuses_what_cannot_be_drawn() -> None:
    images = torch.zeros(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"original \(2, 3, 8, 8\), other \(1, 3, 8, 8\)"):
        draw_panel({"original": images, "other": images[:1]})
    with pytest.raises(ValueError, match="none"):
        draw_panel({})
    with pytest.raises(ValueError, match=r"original \(0, 3, 8, 8\)"):
        draw_panel({"original": images[:0]})
    with pytest.raises(ValueError, match="1 captions came with 2 images"):
        draw_panel({"original": images}, ["one"])


@pytest.mark.parametrize("channels", [1, 3])
def test_png_holds_the_image_to_8_bits(tmp_path: Path, channels: int) -> None:
    image = torch.rand(channels, 9, 7)
    save_png(image, tmp_path / "folder" / "000.png")
    read = pil_to_tensor(Image.open(tmp_path / "folder" / "000.png"))
    assert read.shape == image.shape
    assert (read / 255 - image).abs().max() <= 0.5 / 255 + 1e-6


def test_png_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "000.png"
    save_png(torch.zeros(3, 4, 4), path)
    before = path.read_bytes()

    def fill_the_disk(self: Image.Image, target: Path, format: str) -> None:
        target.write_bytes(b"half a pict")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fill_the_disk)
    with pytest.raises(StorageError, match="No space left"):
        save_png(torch.ones(3, 4, 4), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["000.png"]
