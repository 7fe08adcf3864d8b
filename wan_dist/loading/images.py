"""Reading a user's picture, completely and once, or saying why it cannot be used. Imports no torch.

The formats are Pillow's. What is caught here would otherwise end a run in its middle, or pass and mean something else:
a file that is cut short, an animation, a picture too large to be meant, 16-bit samples that a plain conversion to
8 bits would clip to white.
"""

import warnings
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

_MOST_PIXELS = 89_478_485  # Pillow's own limit, where it starts to warn of decompression bombs (1 GB as 3 floats)
_MOST_ELONGATED = 100  # times as long as wide: resizing the short side to a fixed size makes more pixels of such
_SAMPLES_16 = ("I;16", "I;16L", "I;16B", "I;16N")
_FULL_RANGE_I = ("PNG", "PPM")  # formats whose 32-bit mode holds 16-bit samples in full range
_ANIMATED = ("GIF", "PNG", "WEBP", "AVIF", "TIFF")  # formats with more frames than one are ambiguous; MPO's are views


class ImageError(ValueError):
    """A picture that cannot be used; the message says why and what to do."""


def read_image(path: Path) -> Image.Image:
    """The picture in `path`, RGB, 8 bits a sample, all pixels read, turned upright as its EXIF data say; these and
    other metadata are heeded here and left out.

    Raises ImageError.
    """
    try:
        if not path.is_file():
            raise ImageError("is not there" if not path.exists() else "is not a file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures, which are refused here, and of odd metadata
            # A stream, not the path: of a file that it maps, Pillow 13 garbles the pixels where EXIF data turn a TIFF.
            with path.open("rb") as stream, Image.open(stream) as image:
                _check(image)
                upright = ImageOps.exif_transpose(image)  # which reads all pixels
                picture = _eight_bits(upright, full_range=image.format in _FULL_RANGE_I)
                picture.info.clear()
                return picture
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        why = "is empty" if path.stat().st_size == 0 else "is not a picture in a format that Pillow reads"
        raise ImageError(why) from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"is too large: more than {_MOST_PIXELS} pixels; make it smaller") from error
    except Exception as error:  # Pillow's plugins raise all kinds over damaged data
        if isinstance(error, OSError) and error.strerror is not None:  # the system's, not Pillow's
            raise ImageError(f"cannot be read ({error.strerror})") from error
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ImageError(f"cannot be read ({first}); it may be damaged") from error


def _check(image: Image.Image) -> None:
    """Refuse what need not be decoded to be refused."""
    if image.format == "EPS":
        raise ImageError("is a program that draws (EPS), which is not run; save it as PNG")
    width, height = image.size
    if width * height > _MOST_PIXELS:
        why = f"is too large: {width} x {height} is more than {_MOST_PIXELS} pixels"
        raise ImageError(f"{why}; make it smaller")
    if max(width, height) > _MOST_ELONGATED * min(width, height):
        why = f"is {width} x {height} pixels: one side is more than {_MOST_ELONGATED} times the other"
        raise ImageError(f"{why}; crop it")
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format in _ANIMATED:
        raise ImageError(f"holds {frames} frames; save the one that is meant as a picture of its own")


def _eight_bits(image: Image.Image, *, full_range: bool) -> Image.Image:
    """RGB; 16-bit samples are scaled, where Pillow's own conversion would clip them at 255. full_range: samples of 32
    bits are such, too."""
    if image.mode in _SAMPLES_16 or (image.mode == "I" and full_range):
        import numpy as np

        samples = np.asarray(image).astype(np.float64) / 257  # 65535 -> 255
        return Image.fromarray(samples.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageError(
            f"has samples of 32 bits (mode {image.mode}), whose range it does not say; save it with 8 bits"
        )
    return image.convert("RGB")
