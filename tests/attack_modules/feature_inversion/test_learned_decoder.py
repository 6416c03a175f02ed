from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from attack_modules.feature_inversion.controls import mean_colour_psnr, mean_psnr
from attack_modules.feature_inversion.dead_leaves import dead_leaves
from attack_modules.feature_inversion.learned_decoder import Distinct, Layout, LearnedDecoder, PhotographDecoder, learn
from fl_lightning.errors import MissingFile, SettingError
from fl_lightning.models import ImageClassifier
from fl_lightning.record import describe, differences


class Pooled(ImageClassifier):
    """Its features are the means of 4 x 4 blocks, of which adaptive pooling makes copies, as of AlexNet's."""

    def __init__(self, blocks: int = 4, copies: int = 8) -> None:
        super().__init__((0.5,), (0.25,))
        self.features = nn.Sequential(nn.AdaptiveAvgPool2d(blocks), nn.AdaptiveAvgPool2d(copies), nn.Flatten())
        self.head = nn.Sequential(nn.Linear(3 * copies**2, 5))


def images(count: int, seed: int) -> Tensor:
    return (255 * dead_leaves(count, (3, 16, 16), seed)).round().byte()


def test_copies_are_left_out_and_block_means_come_back() -> None:
    crops, known = images(300, 0), images(20, 1)
    decoder = PhotographDecoder(learn(model := Pooled(), crops, known, 0.0))
    assert decoder.numbers == 3 * 4 * 4
    assert decoder.distinct.rows == decoder.distinct.columns == [0, 2, 4, 6]
    originals = known / 255
    decoded = decoder(model.embed(originals))
    wrong, spread = model.embed(decoded) - model.embed(originals), model.embed(originals).std()
    assert wrong.abs().mean() < 0.2 * spread
    assert mean_psnr(decoded, originals) > mean_colour_psnr(originals) + 1.5
    noisy = PhotographDecoder(learn(model, crops, known, 1.0))  # features that are noise say little of an image
    assert noisy(model.embed(originals)).std(0).mean() < 0.8 * decoded.std(0).mean()


def test_means_of_neighbours_are_no_further_numbers() -> None:
    """VGG11 makes 7 x 7 positions of 2 x 2: three copies, their mean, and three copies."""
    distinct = Distinct.of(Pooled(2, 7), images(5, 0))
    assert distinct.rows == distinct.columns == [0, 3]


def test_blocks_are_regressed_where_a_map_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attack_modules.feature_inversion.learned_decoder.MOST_INPUTS", 30)
    crops, known = images(100, 0), images(10, 1)
    decoder = PhotographDecoder(learn(model := Pooled(), crops, known, 0.0))
    assert decoder.layout == Layout((4, 4), 3, (4, 4))
    assert decoder.numbers == 3 * 4 * 4
    assert mean_psnr(decoder(model.embed(known / 255)), known / 255) > mean_colour_psnr(known / 255) + 2


def test_a_checkpoint_fits_wherever_the_decoders_are_kept() -> None:
    described = [describe(LearnedDecoder([Path("photographs")], cache=Path(kept))) for kept in ("here", "there")]
    assert not differences(*described)


def test_a_decoder_is_learned_once_for_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index, image in enumerate(dead_leaves(12, (3, 24, 32))):
        Image.fromarray((255 * image).byte().permute(1, 2, 0).numpy()).save(tmp_path / f"{index}.png")
    settings = LearnedDecoder([tmp_path], crops=100, cache=tmp_path / "kept")
    first = settings.fitted(model := Pooled(), (3, 16, 16))
    assert first.known.shape == (2, 3, 16, 16)

    def refuse(*_: object) -> None:
        raise AssertionError

    features = model.embed(first.known)
    with monkeypatch.context() as patch:
        patch.setattr("attack_modules.feature_inversion.learned_decoder.learn", refuse)
        torch.testing.assert_close(settings.fitted(model, (3, 16, 16))(features), first(features), rtol=0, atol=0)
        with pytest.raises(AssertionError):
            settings.fitted(Pooled(blocks=2), (3, 8, 8))
    with pytest.raises(SettingError, match="crops >= 100"):
        LearnedDecoder([tmp_path], crops=1)
    (tmp_path / "one").mkdir()
    (tmp_path / "0.png").rename(tmp_path / "one" / "0.png")
    with pytest.raises(SettingError, match="holds only 1,"):
        LearnedDecoder([tmp_path / "one"], cache=tmp_path).fitted(model, (3, 16, 16))
    (needed,) = LearnedDecoder([tmp_path / "nowhere"]).requirements()
    with pytest.raises(MissingFile, match=r"nowhere' with images in it. Set `model\.decoder\.photographs`"):
        needed.violation(None)  # before any round is simulated
