"""Pictures that go into a model: bundled samples, files, data URIs. Torch-free.

A spec holds a sample's name or the picture itself as a data URI, so that a worker on another machine needs nothing
but the database.
"""

import base64
import importlib.util
import io
import re
import warnings
from functools import lru_cache
from pathlib import Path

from PIL import Image

MAX_PICTURE_BYTES = 1_000_000
MAX_PIXELS = 16_000_000
"""a picture that unpacks to more is refused before it is unpacked"""
FORMATS = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}

SAMPLES_FOLDER = Path(__file__).parent / "samples"
OWN = {f"digit-{digit}": f"digit-{digit}.png" for digit in range(10)} | {"astronaut": "astronaut.jpg"}
SCIKIT_IMAGE = {
    "camera": "camera.png",
    "chelsea": "chelsea.png",
    "coffee": "coffee.png",
    "coins": "coins.png",
    "motorcycle": "motorcycle_left.png",
    "page": "page.png",
    "rocket": "rocket.jpg",
}
"""samples that ship in scikit-image, read from its folder where it is installed"""

_URI = re.compile(r"data:image/[a-z]+;base64,(?P<data>[A-Za-z0-9+/]*={0,2})")


class PictureError(ValueError):
    """A picture that cannot be used; the text is the rule that it breaks."""


def picture_samples() -> dict[str, Path]:
    """Return the samples on this machine, name to file."""
    samples = {name: SAMPLES_FOLDER / file for name, file in OWN.items()}
    found = importlib.util.find_spec("skimage")
    if found is not None and found.origin is not None:
        folder = Path(found.origin).parent / "data"
        samples |= {name: folder / file for name, file in SCIKIT_IMAGE.items() if (folder / file).is_file()}
    return samples


def open_picture(source: str) -> Image.Image:
    """Return the picture that a spec names, unpacked, in its own mode.

    Args:
        source: a sample's name or a data URI of a PNG, JPEG or WebP.

    Raises:
        PictureError: it is neither, or it is damaged or too large.
    """
    if source.startswith("data:"):
        return _unpacked(_bytes_of(source))
    sample = picture_samples().get(source)
    if sample is None:
        raise PictureError("must be a sample's name or a data URI of a PNG, JPEG or WebP")
    return _unpacked(sample.read_bytes())


def pack_picture(data: bytes) -> str:
    """Return the bytes of a picture file as a data URI.

    Raises:
        PictureError: they are no picture that ``open_picture`` reads.
    """
    if len(data) > MAX_PICTURE_BYTES:
        raise PictureError(f"must be at most {MAX_PICTURE_BYTES:,} bytes, got {len(data):,}")
    kind = FORMATS[_unpacked(data).format or "PNG"]
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _bytes_of(uri: str) -> bytes:
    match = _URI.fullmatch(uri)
    if match is None or len(match["data"]) % 4:
        raise PictureError("must be a data URI like data:image/png;base64,...")
    data = base64.b64decode(match["data"])
    if len(data) > MAX_PICTURE_BYTES:
        raise PictureError(f"must be at most {MAX_PICTURE_BYTES:,} bytes, got {len(data):,}")
    return data


@lru_cache(maxsize=2)
def _unpacked(data: bytes) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # Pillow only warns of a picture that would fill the memory
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(data), formats=tuple(FORMATS))
        width, height = picture.size
        if width * height > MAX_PIXELS:
            raise PictureError(f"must be at most {MAX_PIXELS:,} pixels, got {width} x {height}")
        picture.load()
    except PictureError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PictureError(f"must be at most {MAX_PIXELS:,} pixels: {error}") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise PictureError(f"must be a PNG, JPEG or WebP: {_first_line(error)}") from None
    return picture


def _first_line(error: Exception) -> str:
    # Pillow's text names the memory address of the buffer that it was given
    return (
        re.sub(r" <_io\.BytesIO[^>]*>", " it", str(error).strip().splitlines()[0])
        if str(error)
        else "damaged"
    )
