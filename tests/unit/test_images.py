"""Reading a user's picture: the right pixels of every format that is taken, a reason for every file that is not."""

import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from diffusers.utils import load_image
from PIL import Image

from wan_dist.loading.images import ImageError, read_image

HEIGHT, WIDTH = 20, 30
_ORIENTATION = 0x0112
RGB = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
SIXTEEN = np.arange(HEIGHT * WIDTH, dtype=np.uint16).reshape(HEIGHT, WIDTH) * 100  # to 59900, most of it above 255


def read(path: Path) -> np.ndarray:
    """`read_image`, with every warning an error; its picture is RGB and says nothing else."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = read_image(path)
        assert picture.mode == "RGB" and picture.info == {} and not picture.getexif()
    return np.asarray(picture)


def reason(path: Path) -> str:
    """Why `path` cannot be read."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError) as caught:
            read_image(path)
    return str(caught.value)


def picture(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(RGB).convert(mode)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[_ORIENTATION] = orientation
    return exif


# file name -> mode of the picture, options of saving it
EIGHT_BITS = {
    "plain.png": ("RGB", {}),
    "plain.jpg": ("RGB", {"quality": 90}),
    "progressive.jpg": ("RGB", {"progressive": True}),
    "gray.jpg": ("L", {}),
    "cmyk.jpg": ("CMYK", {}),
    "with alpha.png": ("RGBA", {}),
    "gray with alpha.png": ("LA", {}),
    "one bit.png": ("1", {}),
    "one bit.tiff": ("1", {}),
    "palette.png": ("P", {}),
    "one transparent colour.png": ("P", {"transparency": 3}),
    "every colour transparent.png": ("P", {"transparency": bytes(range(256))}),
    "palette.gif": ("P", {"transparency": 3}),
    "plain.webp": ("RGB", {}),
    "plain.bmp": ("RGB", {}),
    "plain.ppm": ("RGB", {}),
    "gray.tiff": ("L", {}),
    "compressed.tiff": ("RGB", {"compression": "tiff_lzw"}),
    "grüße 猫.png": ("RGB", {}),
}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")  # of diffusers; `read` lets none pass
@pytest.mark.parametrize("name", EIGHT_BITS)
def test_pictures_of_8_bits_are_read_as_diffusers_reads_them(tmp_path, name):
    mode, options = EIGHT_BITS[name]
    picture(mode).save(tmp_path / name, **options)
    pixels = read(tmp_path / name)
    assert pixels.shape == (HEIGHT, WIDTH, 3)
    assert np.array_equal(pixels, np.asarray(load_image(str(tmp_path / name))))


def test_a_lossless_picture_is_what_was_saved(tmp_path):
    picture().save(tmp_path / "it.png")
    assert np.array_equal(read(tmp_path / "it.png"), RGB)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_a_picture_is_turned_upright_as_diffusers_turns_it(tmp_path, suffix, orientation):
    path = tmp_path / f"it.{suffix}"
    picture().save(path, exif=turned(orientation))
    pixels = read(path)
    assert pixels.shape == ((WIDTH, HEIGHT, 3) if orientation > 4 else (HEIGHT, WIDTH, 3))
    assert np.array_equal(pixels, np.asarray(load_image(str(path))))


UPRIGHT = {
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.T,
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].T,
    8: lambda x: np.rot90(x),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("suffix", ["png", "tiff"])
@pytest.mark.parametrize("samples", [8, 16])
def test_a_gray_picture_is_turned_once(tmp_path, samples, suffix, orientation):
    """Pillow itself turns a TIFF while it loads it, and garbles one that it maps into memory."""
    gray = SIXTEEN if samples == 16 else RGB[..., 0]
    path = tmp_path / f"it.{suffix}"
    Image.fromarray(gray).save(path, exif=turned(orientation))
    eight = np.round(UPRIGHT[orientation](gray) / 257) if samples == 16 else UPRIGHT[orientation](gray)
    assert np.array_equal(read(path), np.repeat(eight[..., None], 3, axis=2))


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *, depth: int = 8, colours: int = 2, rows: bytes = b"", more: bytes = b"") -> bytes:
    """A PNG of these rows (each behind its filter byte), by hand. more: chunks before the pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + more + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def rows_of(samples: np.ndarray) -> bytes:
    return b"".join(b"\0" + row.astype(samples.dtype.newbyteorder(">")).tobytes() for row in samples)


def netpbm(kind: str, most: int, samples: np.ndarray) -> bytes:
    return f"{kind} {WIDTH} {HEIGHT} {most}\n".encode() + samples.astype(">u2").tobytes()


def test_16_bits_of_gray_are_scaled_and_not_clipped(tmp_path):
    for suffix in ("png", "tiff", "jp2"):
        Image.fromarray(SIXTEEN).save(tmp_path / f"it.{suffix}")
    (tmp_path / "big-endian.tiff").write_bytes(big_endian_tiff(SIXTEEN))
    (tmp_path / "it.pgm").write_bytes(netpbm("P5", 65535, SIXTEEN))
    (tmp_path / "by hand.png").write_bytes(png(WIDTH, HEIGHT, depth=16, colours=0, rows=rows_of(SIXTEEN)))
    files = sorted(tmp_path.iterdir())
    assert len(files) == 6
    for path in files:
        pixels = read(path).astype(int)
        assert np.abs(pixels - SIXTEEN[..., None] / 257).max() <= 0.5, path.name


def big_endian_tiff(samples: np.ndarray) -> bytes:
    tags = [(256, WIDTH), (257, HEIGHT), (258, 16), (259, 1), (262, 1), (273, 8), (277, 1), (278, HEIGHT)]
    tags.append((279, 2 * WIDTH * HEIGHT))
    pixels = samples.astype(">u2").tobytes()
    entries = b"".join(struct.pack(">HHII", tag, 4, 1, value) for tag, value in tags)
    directory = struct.pack(">H", len(tags)) + entries + struct.pack(">I", 0)
    return b"MM\0*" + struct.pack(">I", 8 + len(pixels)) + pixels + directory


def test_16_bits_of_colour_are_scaled_and_not_clipped(tmp_path):
    wide = RGB.astype(np.uint16) * 257
    (tmp_path / "it.png").write_bytes(png(WIDTH, HEIGHT, depth=16, rows=rows_of(wide.reshape(HEIGHT, -1))))
    (tmp_path / "it.ppm").write_bytes(netpbm("P6", 65535, wide))
    for path in tmp_path.iterdir():
        assert np.abs(read(path).astype(int) - RGB).max() <= 1, path.name


def test_a_pgm_of_another_range_is_scaled_by_it(tmp_path):
    (tmp_path / "it.pgm").write_bytes(netpbm("P5", 1000, SIXTEEN % 1001))
    assert np.abs(read(tmp_path / "it.pgm").astype(int) - (SIXTEEN % 1001)[..., None] / 1000 * 255).max() <= 1


@pytest.mark.parametrize("samples", [RGB[..., 0].astype(np.float32), SIXTEEN.astype(np.int32)], ids=["float", "int"])
def test_32_bits_are_refused(tmp_path, samples):
    Image.fromarray(samples).save(tmp_path / "it.tiff")
    assert "32 bits" in reason(tmp_path / "it.tiff")


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animations_and_pages_are_refused(tmp_path, kind):
    other = Image.fromarray(255 - RGB)
    picture().save(tmp_path / "it", kind, save_all=True, append_images=[other, picture()])
    assert "holds 3 frames" in reason(tmp_path / "it")


def test_of_a_picture_with_several_views_the_first_is_read(tmp_path):
    first, second = (Image.new("RGB", (WIDTH, HEIGHT), colour) for colour in ("red", "blue"))
    first.save(tmp_path / "it.jpg", "MPO", save_all=True, append_images=[second])
    with Image.open(tmp_path / "it.jpg") as image:
        assert (image.format, image.n_frames) == ("MPO", 2)
    assert np.abs(read(tmp_path / "it.jpg").astype(int) - [255, 0, 0]).max() < 10


DAMAGED_EXIF = {
    "garbage": b"garbage!!",
    "cut short": b"II*\0",
    "pointing nowhere": b"II*\0\xff\xff\xff\xff",
    "of the wrong type": b"II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x02\0\0\0a\0\0\0\0\0\0\0",
    "empty": b"",
}


@pytest.mark.parametrize("damage", DAMAGED_EXIF)
@pytest.mark.parametrize("suffix", ["png", "16.png", "jpg"])
def test_damaged_exif_data_are_judged_here_and_never_met_again(tmp_path, suffix, damage):
    """Whether they are refused or passed over; what is read can be used."""
    exif, path = DAMAGED_EXIF[damage], tmp_path / f"it.{suffix}"
    if suffix == "jpg":
        picture().save(path)
        segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 8) + b"Exif\0\0" + exif
        path.write_bytes(path.read_bytes()[:2] + segment + path.read_bytes()[2:])
    elif suffix == "png":
        path.write_bytes(png(WIDTH, HEIGHT, rows=rows_of(RGB.reshape(HEIGHT, -1)), more=chunk(b"eXIf", exif)))
    else:
        rows = rows_of(SIXTEEN)
        path.write_bytes(png(WIDTH, HEIGHT, depth=16, colours=0, rows=rows, more=chunk(b"eXIf", exif)))
    try:
        assert read(path).shape == (HEIGHT, WIDTH, 3)
    except ImageError as error:
        assert "may be damaged" in str(error)


WHOLE = png(WIDTH, HEIGHT, rows=rows_of(RGB.reshape(HEIGHT, -1)))
NOT_PICTURES = {
    "empty": (b"", "is empty"),
    "text": (b"hello\nworld\n", "not a picture"),
    "zeros": (bytes(4096), "not a picture"),
    "a PNG's first bytes": (WHOLE[:8], "not a picture"),
    "half a PNG": (WHOLE[: len(WHOLE) // 2], "may be damaged"),
    "a PNG without its end of pixels": (WHOLE[:-40], "may be damaged"),
    "a header whose checksum is wrong": (WHOLE[:29] + bytes([WHOLE[29] ^ 255]) + WHOLE[30:], "not a picture"),
    "pixels whose checksum is wrong": (WHOLE[:-13] + bytes([WHOLE[-13] ^ 255]) + WHOLE[-12:], None),
    "a broken byte": (WHOLE[:200] + bytes([WHOLE[200] ^ 255]) + WHOLE[201:], "may be damaged"),
    "no pixels": (png(0, 0), "not a picture"),
    "60000 x 60000": (png(60000, 60000), "too large"),
    "12000 x 9000": (png(12000, 9000), "12000 x 9000 is more than"),  # where Pillow only warns
    "101 x 1": (png(101, 1, rows=rows_of(np.zeros((1, 303), np.uint8))), "101 x 1 pixels: one side"),
    "1 x 30000": (png(1, 30000, rows=rows_of(np.zeros((30000, 3), np.uint8))), "1 x 30000 pixels: one side"),
}


@pytest.mark.parametrize("name", NOT_PICTURES)
def test_files_that_are_no_usable_picture(tmp_path, name):
    content, why = NOT_PICTURES[name]
    (tmp_path / "it.png").write_bytes(content)
    if why is not None:
        assert why in reason(tmp_path / "it.png")
        return
    try:
        assert np.array_equal(read(tmp_path / "it.png"), RGB)
    except ImageError as error:
        assert "may be damaged" in str(error)


def test_as_elongated_as_may_be(tmp_path):
    (tmp_path / "it.png").write_bytes(png(100, 1, rows=rows_of(np.zeros((1, 300), np.uint8))))
    assert read(tmp_path / "it.png").shape == (1, 100, 3)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_a_jpeg_that_is_cut_short(tmp_path, kept, progressive):
    picture().save(tmp_path / "it.jpg", progressive=progressive)
    content = (tmp_path / "it.jpg").read_bytes()
    (tmp_path / "it.jpg").write_bytes(content[: int(len(content) * kept)])
    assert "truncated" in reason(tmp_path / "it.jpg").lower()


def test_paths_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("x")
    words = {
        tmp_path: "is not a file",
        tmp_path / "pipe": "is not a file",  # and nothing waits for its other end
        Path("/dev/zero"): "is not a file",
        tmp_path / "absent.png": "is not there",
        tmp_path / "loop": "is not there",
        tmp_path / "file" / "below": "is not there",
        Path("a\0b.png"): "is not there",
        Path("https://host/it.png"): "is not there",
        tmp_path / ("n" * 300): "File name too long",
    }
    for path, why in words.items():
        assert why in reason(path), path


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path):
    picture().save(tmp_path / "it.png")
    (tmp_path / "it.png").chmod(0)
    assert reason(tmp_path / "it.png") == "cannot be read (Permission denied)"


def test_a_link_to_a_picture_is_read(tmp_path):
    picture().save(tmp_path / "it.png")
    (tmp_path / "link").symlink_to(tmp_path / "it.png")
    assert np.array_equal(read(tmp_path / "link"), RGB)
