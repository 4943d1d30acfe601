"""What becomes of a source's image in a dataset: its own bytes, or a smaller JPEG of it."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image
from pydantic import Field

from fqgan_dist.config import Config
from fqgan_dist.data.config import USUAL_VIEW_SHORT_SIDE, ViewConfig
from fqgan_dist.data.decoding import DEFAULT_MAX_PIXELS, decode_image
from fqgan_dist.data.index import SourceProblem, parse_policy
from fqgan_dist.data.views import apply_view, find_fault_of_shape
from fqgan_dist.errors import DataError
from fqgan_dist.terminal import printable

# Extension by content, not by name: ImageNet has a PNG that is named .JPEG.
_EXTENSIONS = {b"\xff\xd8\xff": "jpg", b"\x89PNG\r\n\x1a\n": "png", b"RIFF": "webp"}
_MAX_JPEG_SIDE = 65_500
"""What libjpeg writes; a PNG may be longer."""


class ImagePolicy(Config):
    """How a dataset's images are made from the source's.

    Without `short_side` and `crop` every image keeps its bytes.
    """

    short_side: int | None = Field(default=None, ge=16)
    """Resize images to this short side and store them as JPEG. Advice: 320 for training at 256, as
    the random crop enlarges the short side to at most 1.25 x 256 = 320: nothing that training would
    see is lost but for one JPEG generation, and reading is several times faster."""
    crop: int | None = Field(default=None, ge=16)
    """Store the centre crop of this many pixels squared as JPEG, resized and cut as ADM does (the
    reference of FID scores). Fixed for good: no random crops are left to take."""
    jpeg_quality: int = Field(default=95, ge=50, le=100)
    """Quality of images that are resized or cropped; 90 to 95 for training."""
    view_short_side: int = Field(default=USUAL_VIEW_SHORT_SIDE, ge=1)
    """Short side that the views in use resize images to at most: an image so long and thin that
    this would take more pixels than may be decoded is left out. `fqgan run` raises it by itself
    where its views are larger."""
    only_if_bigger: bool = True
    """Images with a shorter side than asked for keep their bytes; false: they are enlarged. Images
    that have the very size already keep their bytes either way."""

    def find_problems(self) -> Iterator[str]:
        """Find settings that exclude each other or have no effect."""
        if self.short_side is not None and self.crop is not None:
            yield (
                f"crop: {self.crop} and short_side: {self.short_side} exclude each other; leave "
                "one out"
            )
        for name in ("jpeg_quality", "only_if_bigger"):
            if not self.is_lossy and name in self.model_fields_set:
                yield f"{name}: has no effect without short_side or crop; leave it out"

    @property
    def is_lossy(self) -> bool:
        """Whether images may be re-encoded."""
        return self.short_side is not None or self.crop is not None

    def describe_images(self) -> dict[str, Any]:
        """Give what the index tells about the images."""
        views = describe_view_short_side(self.view_short_side)
        if not self.is_lossy:
            return {"kind": "original"} | views
        size = {"short_side": self.short_side} if self.crop is None else {"crop": self.crop}
        return {
            "kind": next(iter(size)),
            **size,
            "jpeg_quality": self.jpeg_quality,
            "only_if_bigger": self.only_if_bigger,
            **views,
        }

    @classmethod
    def parse_description(cls, values: dict[str, Any]) -> ImagePolicy:
        """Restore the policy from what an index tells; of foreign shards, the original bytes.

        Raises:
            DataError: it is none.
        """
        names = {"view_short_side"}
        if values.get("kind") in ("short_side", "crop"):
            names |= {"short_side", "crop", "jpeg_quality", "only_if_bigger"}
        return parse_policy(values, names, ImagePolicy)


def describe_view_short_side(short_side: int) -> dict[str, int]:
    """Give what an index tells about the views that its images were checked for."""
    # The usual one is not written, so that datasets keep the ids that they had without it.
    return {} if short_side == USUAL_VIEW_SHORT_SIDE else {"view_short_side": short_side}


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """An image as a dataset holds it."""

    data: bytes
    """The file's bytes."""
    extension: str
    """Of its format: `jpg`, `png` or `webp`."""
    width: int
    """Pixels per row, after the EXIF orientation."""
    height: int
    """Rows, after the EXIF orientation."""


def make_image(data: bytes, name: str, policy: ImagePolicy) -> EncodedImage | SourceProblem:
    """Check an image and bring it into the form that a policy asks for.

    Args:
        data: the source's file.
        name: its name in the source.
        policy: what to make of it.

    Returns:
        The image, or what is wrong with it.
    """
    try:
        # Decoded whole, also to keep its bytes: a truncated image shows only so.
        image = decode_image(data, name=name)
        made = _resize(image, name, policy)
        if fault := find_fault_of_shape(made.width, made.height, policy.view_short_side):
            raise DataError(fault)
    except DataError as error:
        return SourceProblem(name=name, reason=_describe(error), action="skipped")
    if made is image:
        return EncodedImage(data, _find_extension(data), image.width, image.height)
    file = io.BytesIO()
    # No chroma subsampling: it would be the visible part of the loss at this quality.
    made.save(file, "JPEG", quality=policy.jpeg_quality, subsampling=0)
    return EncodedImage(file.getvalue(), "jpg", made.width, made.height)


def _resize(image: Image.Image, name: str, policy: ImagePolicy) -> Image.Image:
    """Give the image in the policy's size; the very same object where it stays as it is."""
    side = policy.short_side or policy.crop
    has_size = image.size == (policy.crop, policy.crop) or min(image.size) == policy.short_side
    if side is None or has_size or (policy.only_if_bigger and min(image.size) < side):
        return image
    if policy.crop is not None:
        view = ViewConfig(policy="center", image_size=policy.crop)
        return Image.fromarray(apply_view(image, view, seed=0, key=name, view=0)[0])
    scale = side / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    if max(size) > _MAX_JPEG_SIDE or size[0] * size[1] > DEFAULT_MAX_PIXELS:
        raise DataError(
            f"{name}: would become {size[0]}x{size[1]} pixels; a JPEG side may have no more than "
            f"{_MAX_JPEG_SIDE}, an image no more than {DEFAULT_MAX_PIXELS} pixels"
        )
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


def _describe(error: DataError) -> str:
    """Say why an image cannot be used, in the same words in every run: datasets hold them."""
    reason = f"cannot be decoded: {error.__cause__}" if error.__cause__ else str(error)
    # Pillow's message for unknown data prints the stream object, with its address.
    return printable(re.sub(r"<[^<>]* at 0x[0-9a-fA-F]+>", "data", reason))


def _find_extension(data: bytes) -> str:
    return next(extension for start, extension in _EXTENSIONS.items() if data.startswith(start))
