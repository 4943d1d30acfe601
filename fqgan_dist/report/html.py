"""Pieces of HTML; values are escaped by `Markup.format`, images become data URIs."""

from __future__ import annotations

import base64
from collections.abc import Iterable

from markupsafe import Markup

_IMAGE = Markup('<img src="{uri}" alt="{alt}" width="{width}" height="{height}" decoding="async">')
_PICTURE = Markup(
    '<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
    '<img src="{light}" alt="{alt}"></picture>'
)


def join(parts: Iterable[str]) -> Markup:
    """Concatenate pieces; plain strings among them are escaped."""
    return Markup("").join(parts)


def data_uri(data: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode('ascii')}"


def picture(light_svg: bytes, dark_svg: bytes, alt: str) -> Markup:
    light, dark = (data_uri(svg, "image/svg+xml") for svg in (light_svg, dark_svg))
    return _PICTURE.format(light=light, dark=dark, alt=alt)


def image(png: bytes, alt: str, *, width: int, height: int) -> Markup:
    return _IMAGE.format(uri=data_uri(png, "image/png"), alt=alt, width=width, height=height)


def section(anchor: str, title: str, lead: str, body: str) -> Markup:
    return Markup(
        '<section id="{anchor}"><h2>{title}</h2><p class="lead">{lead}</p>{body}</section>'
    ).format(anchor=anchor, title=title, lead=lead, body=body)
