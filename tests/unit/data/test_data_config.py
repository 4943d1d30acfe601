from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from fqgan_dist.data.config import DataConfig


def make_config(**changes: Any) -> DataConfig:
    values = {"source": "images", "views": {"policy": "center", "image_size": 8}}
    return DataConfig.model_validate(values | changes)


def test_damaged_images_are_replaced_up_to_a_limit_by_default() -> None:
    assert make_config().damage_limit == 5
    assert make_config(max_damaged_in_a_row=2).damage_limit == 2


def test_with_fail_the_first_damaged_image_is_the_limit() -> None:
    assert make_config(on_damage="fail").damage_limit == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"on_damage": "fail", "max_damaged_in_a_row": 3},
            "3 has no effect with on_damage: 'fail'",
        ),
        ({"max_damaged_in_a_row": 1}, "greater than or equal to 2"),
        ({"on_damage": "skip"}, "'replace' or 'fail'"),
        ({"cache": {"folder": "s3://bucket/cache"}}, "expected a path on a local disk"),
        ({"cache": {"max_gb": 3}}, "Extra inputs"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make_config(**changes)
