"""Decoding one image: whatever the file holds, either its pixels or one sentence that names it."""

import io
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import functional

from vit_rsst.data.decoding import Corrupt, RandomCrop, decode, suffixes

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")

NOISE = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
PICTURE = Image.fromarray(NOISE)


def encoded(picture: Image.Image, kind: str = "PNG", **more: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **more)
    return buffer.getvalue()


def pixels(content: bytes | None, size: int = 16, **more: object) -> np.ndarray:
    return decode({"bytes": content, "path": None}, size, "train/a/1.png", **more)


def refusal(content: bytes | None, **more: object) -> str:
    with pytest.raises(Corrupt) as caught:
        pixels(content, **more)
    text = str(caught.value)
    assert text.startswith("data: train/a/1.png cannot be decoded")
    assert text.count("cannot be decoded") == 1
    assert "\n" not in text
    return text


# -- metadata


def camera(change: object = None) -> bytes:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x011A] = 6, "hello", 72.0
    exif.get_ifd(0x8769)[0x9003] = "2020:01:01"
    return change(exif.tobytes()) if change else exif.tobytes()


BROKEN_EXIF = {
    "cut": lambda e: e[:10],
    "no TIFF header": lambda e: b"Exif\0\0IIU\0\x18\0\0\0",
    "an offset beyond the end": lambda e: e[:10] + b"\xff\xff\xff\xff" + e[14:],
    "an integer stored as a rational": lambda e: e.replace(b"\x01\x1a\x00\x05", b"\x01\x08\x00\x05"),
    "a text stored as a double": lambda e: e.replace(b"\x01\x0e\x00\x02", b"\x01\x0e\x00\x0c"),
    "a rational over zero": lambda e: e.replace(b"\0\0\0\x48\0\0\0\1", b"\0\0\0\x48\0\0\0\0"),
    "nothing": lambda e: b"",
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("change", BROKEN_EXIF.values(), ids=BROKEN_EXIF)
@pytest.mark.parametrize("random_crop", [None, RandomCrop((1.0, 1.0), (1.0, 1.0))])
def test_broken_metadata_are_no_damage(kind, change, random_crop):
    found = pixels(
        encoded(PICTURE, kind, exif=camera(change), **({"lossless": True} if kind == "WEBP" else {})),
        random_crop=random_crop,
    )
    assert found.shape == (3, 16, 16)
    assert found.std() > 10


def test_an_xmp_block_that_is_not_utf_8_is_no_damage():
    content = encoded(PICTURE.crop((0, 0, 24, 24)), "PNG")
    jpeg = encoded(PICTURE, "JPEG", xmp=b'<x:xmpmeta>\xa8 tiff:Orientation="6"</x:xmpmeta>')
    assert pixels(jpeg).shape == pixels(content).shape


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_upright_as_pillow_turns_it(orientation):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(PICTURE.crop((0, 0, 24, 24)), exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert (pixels(content, 24) == np.asarray(upright).transpose(2, 0, 1)).all()


@pytest.mark.parametrize("orientation", [0, 9, 300])
def test_an_orientation_that_does_not_exist_turns_nothing(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(PICTURE.crop((0, 0, 24, 24)), exif=exif)
    assert (pixels(content, 24) == NOISE[:24, :24].transpose(2, 0, 1)).all()


# -- greys of more than 8 bits


@pytest.mark.parametrize(
    "values, expected",
    [
        (np.full((8, 8), 20_000, np.uint16), 78),
        (np.full((8, 8), 65_535, np.uint16), 255),
        (np.full((8, 8), 4_095, np.uint16), 255),
        (np.full((8, 8), 2_048, np.uint16), 128),
        (np.full((8, 8), 200, np.uint16), 200),
        (np.full((8, 8), 200, np.int32), 200),
        (np.full((8, 8), 30_000, np.int32), 117),
        (np.full((8, 8), 2**31 - 1, np.int32), 127),
        (np.full((8, 8), 0.5, np.float32), 128),
        (np.full((8, 8), 1.0, np.float32), 255),
        (np.full((8, 8), 128.0, np.float32), 128),
        (np.zeros((8, 8), np.float32), 0),
    ],
)
@pytest.mark.parametrize("random_crop", [None, RandomCrop((1.0, 1.0), (1.0, 1.0))])
def test_deep_greys_are_scaled_by_what_they_hold(values, expected, random_crop):
    found = pixels(encoded(Image.fromarray(values), "TIFF"), 8, random_crop=random_crop)
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_a_photograph_of_16_bits_is_scaled_as_torchvision_scales_it():
    values = np.linspace(0, 65_535, 64 * 64).reshape(64, 64).astype(np.uint16)
    theirs = functional.convert_image_dtype(functional.pil_to_tensor(Image.fromarray(values)).long().float() / 65_535)
    ours = pixels(encoded(Image.fromarray(values)), 64)[0]
    assert np.abs(ours - 255 * theirs[0].numpy()).max() <= 1


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf"), 1e20])
def test_greys_without_a_plain_scale_are_refused(bad):
    values = np.full((8, 8), 0.5, np.float32)
    values[0, 0] = bad
    assert "greys lie between" in refusal(encoded(Image.fromarray(values), "TIFF"))


# -- sizes


@pytest.mark.parametrize("width, height", [(60_000, 2), (2, 60_000), (80_000, 1)])
def test_a_thin_image_takes_no_memory_for_its_length(width, height):
    content = encoded(Image.new("L", (width, height), 128))
    tracemalloc.start()
    found = pixels(content, 224)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (found == 128).all()
    assert peak < 50 * 2**20


def test_the_middle_of_a_long_image_is_what_it_was_without_the_cut():
    long = Image.fromarray(np.random.default_rng(1).integers(0, 256, (10, 331, 3), dtype=np.uint8))
    width = 20 * 331 // 10
    left = round((width - 16) / 2)
    whole = np.asarray(long.resize((width, 20), Image.Resampling.BICUBIC).crop((left, 2, left + 16, 18)))
    found = pixels(encoded(long), 16, crop_pct=0.8)
    assert np.abs(found.transpose(1, 2, 0).astype(int) - whole).mean() < 12


@pytest.mark.parametrize("side", [11, 100])
def test_too_many_pixels_are_said_with_their_number_and_the_field(side):
    text = refusal(encoded(Image.new("1", (side, side))), max_pixels=100)
    assert "data.max_pixels=100" in text
    assert f"{side}" in text
    assert pixels(encoded(Image.new("1", (side, side))), max_pixels=side * side).shape == (3, 16, 16)


def test_the_limit_can_be_above_that_of_pillow():
    content = encoded(Image.new("1", (14_000, 14_000)))
    assert "data.max_pixels" in refusal(content)
    assert pixels(content, max_pixels=200_000_000).shape == (3, 16, 16)


# -- files that hold no image


@pytest.mark.parametrize(
    "content, reason",
    [
        (None, "the image is missing"),
        (b"", "it is empty"),
        (b"no image", "not an image"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "an HTML page"),
        (encoded(PICTURE)[:200], "truncated"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "not an image"),
    ],
)
def test_what_is_no_image_is_said_with_the_reason(content, reason):
    assert reason in refusal(content)


def test_a_file_that_is_no_image_is_said_with_the_reason(tmp_path):
    for content, reason in ((b"", "it is empty"), (b"<html>", "an HTML page")):
        (tmp_path / "x.jpg").write_bytes(content)
        with pytest.raises(Corrupt, match=reason):
            decode({"bytes": None, "path": str(tmp_path / "x.jpg")}, 16, "train/a/x.jpg")
    with pytest.raises(Corrupt, match="No such file"):
        decode({"bytes": None, "path": str(tmp_path / "gone.jpg")}, 16, "train/a/gone.jpg")


def test_suffixes_are_those_that_can_be_decoded_here():
    assert {
        ".jpg",
        ".jpeg",
        ".png",
        ".webp",
        ".bmp",
        ".gif",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".avif",
        ".jfif",
    } <= suffixes()
    assert not {".pdf", ".eps", ".mpeg", ".h5", ".txt", ".heic"} & suffixes()


# -- fuzz


def originals() -> list[bytes]:
    exif = camera()
    palette = PICTURE.quantize(16)
    return [
        encoded(PICTURE, "JPEG", exif=exif),
        encoded(PICTURE, "JPEG", progressive=True, dpi=(72, 72)),
        encoded(PICTURE.convert("CMYK"), "JPEG"),
        encoded(PICTURE, "PNG", exif=exif),
        encoded(palette, "PNG", transparency=1),
        encoded(Image.fromarray(np.arange(768, dtype=np.uint16).reshape(24, 32) * 80), "PNG"),
        encoded(palette, "GIF"),
        encoded(palette, "GIF", save_all=True, append_images=[palette.rotate(90)]),
        encoded(PICTURE, "TIFF", exif=exif),
        encoded(PICTURE, "TIFF", compression="tiff_lzw"),
        encoded(PICTURE, "TIFF", compression="jpeg"),
        encoded(Image.fromarray(NOISE[..., 0].astype(np.float32) / 255), "TIFF"),
        encoded(PICTURE, "WEBP", exif=exif),
        encoded(PICTURE, "WEBP", lossless=True),
        encoded(PICTURE, "BMP"),
        encoded(PICTURE.resize((32, 32)), "ICO"),
        encoded(PICTURE, "PPM"),
    ]


def mutated(content: bytes, draw: random.Random) -> bytes:
    """A few bytes changed, parts cut out or doubled, or the end missing; more often near the head, where sizes lie."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        place = draw.randrange(min(len(data), draw.choice((64, 512, len(data))))) if data else 0
        what = draw.randrange(6)
        if what == 0:
            data[place : place + 1] = bytes([draw.randrange(256)])
        elif what == 1:
            data[place : place + 4] = draw.choice((b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\x00\x01\x00\x00"))
        elif what == 2:
            del data[place : place + draw.randrange(1, 16)]
        elif what == 3:
            data[place:place] = data[place : place + draw.randrange(1, 64)]
        elif what == 4:
            data[place:place] = draw.randbytes(draw.randrange(1, 8))
        else:
            del data[max(place, 1) :]
    return bytes(data)


def fuzz(number: int, seed: int) -> tuple[int, int]:
    """How many of the mutated files were read, and how many refused; anything else is an exception of the test."""
    draw, files, read = random.Random(seed), originals(), 0
    for _ in range(number):
        content = mutated(draw.choice(files), draw)
        random_crop = draw.choice((None, RandomCrop()))
        try:
            found = pixels(content, 16, max_pixels=2**20, random_crop=random_crop)
        except Corrupt as problem:
            assert "\n" not in str(problem)  # noqa: PT017
            assert "data: train/a/1.png cannot be decoded" in str(problem)  # noqa: PT017
        else:
            assert found.shape == (3, 16, 16)
            assert found.dtype == np.uint8
            read += 1
    return read, number - read


def test_damaged_files_are_pixels_or_a_sentence():
    read, refused = fuzz(400, seed=0)
    assert read > 40
    assert refused > 40


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads its own peak of memory from /proc")
def test_20000_damaged_files_are_pixels_or_a_sentence_in_bounded_memory():
    import resource

    fuzz(200, seed=1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read, refused = fuzz(20_000, seed=2)
    assert min(read, refused) > 2_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 2**10, "KiB"
