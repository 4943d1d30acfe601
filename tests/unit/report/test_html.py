from __future__ import annotations

import base64

from markupsafe import Markup

from fqgan_dist.report.html import data_uri, image, join, picture, section


def test_plain_strings_are_escaped_and_pieces_are_not() -> None:
    assert join(["<b>", Markup("<i>")]) == "&lt;b&gt;<i>"


def test_a_data_uri_holds_the_bytes() -> None:
    uri = data_uri(b"\x00\xff", "image/png")
    prefix, _, payload = uri.partition(",")
    assert prefix == "data:image/png;base64"
    assert base64.b64decode(payload) == b"\x00\xff"


def test_an_alternative_text_cannot_leave_its_attribute() -> None:
    text = '"><script>'
    for html in (image(b"", text, width=1, height=1), picture(b"", b"", text)):
        assert "<script>" not in html
        assert 'alt="&#34;&gt;&lt;script&gt;"' in html


def test_a_section_escapes_title_and_lead_but_not_its_body() -> None:
    html = section("a", "<t>", "<l>", Markup("<p>"))
    assert "&lt;t&gt;" in html
    assert "&lt;l&gt;" in html
    assert "<p>" in html
