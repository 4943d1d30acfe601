from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pytest
from pydantic import Field, ValidationError, model_validator

from fqgan_dist.config import Config, dump_config, load_config, parse_config
from fqgan_dist.errors import ConfigError
from fqgan_dist.stages.config import RunConfig

TINY = Path(__file__).parents[1] / "support" / "tiny.yaml"


class Circle(Config):
    kind: Literal["circle"] = "circle"
    radius: float = Field(gt=0)


class Square(Config):
    kind: Literal["square"] = "square"
    side: float = Field(gt=0)

    @model_validator(mode="after")
    def _check(self) -> Square:
        if self.side == 13:
            raise ValueError("side: 13 is unlucky; take 12")
        return self


Shape = Annotated[Circle | Square, Field(discriminator="kind")]


class Window(Config):
    """A group that may also be given by name."""

    width: int

    @model_validator(mode="after")
    def _check(self) -> Window:
        return self


class House(Config):
    address: str
    num_rooms: int = 3
    height: float = 2.5
    door: Shape | None = None
    shapes: tuple[Shape, ...] = ()
    window: str | Window = "plain"
    by_name: dict[str, Window] = Field(default_factory=dict)
    range: tuple[int, float] = (1, 2.0)


def write(folder: Path, text: str, name: str = "house.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def problems(values: dict[str, object]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(values, House, source="house.yaml")
    first, *lines = str(caught.value).splitlines()
    assert first == f"house.yaml: {len(lines)} problem(s)"
    return [line.strip() for line in lines]


def test_a_config_is_immutable() -> None:
    house = House(address="here")
    with pytest.raises(ValidationError, match="frozen"):
        house.num_rooms = 4


def test_field_docstrings_become_descriptions() -> None:
    assert RunConfig.model_fields["name"].description == "Shown in the report."


def test_every_setting_of_a_run_says_what_it_is() -> None:
    models = _reachable(RunConfig)
    assert len(models) > 20
    silent = [
        f"{model.__name__}.{name}"
        for model in models
        for name, field in model.model_fields.items()
        # A group of settings is described by its class.
        if not field.description and not _reachable(field.annotation)
    ]
    assert silent == []


def _reachable(annotation: Any) -> set[type[Config]]:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        fields = annotation.model_fields.values()
        return {annotation}.union(*(_reachable(field.annotation) for field in fields))
    return set().union(*(_reachable(inner) for inner in get_args(annotation)))


class Roof(Config):
    width: int
    height: int

    def find_problems(self) -> Iterator[str]:
        if self.width > 9:
            yield f"width: {self.width} is too wide"
        if self.height > 9:
            yield f"height: {self.height} is too high"


class Street(Config):
    roofs: tuple[Roof, ...] = ()
    length: int

    def find_problems(self) -> list[str]:
        return ["length: 0 houses"] if self.length == 0 else []


def test_each_problem_that_a_group_finds_is_a_line_and_is_counted() -> None:
    wide, fine = {"width": 10, "height": 11}, {"width": 1, "height": 1}
    with pytest.raises(ConfigError) as caught:
        parse_config({"roofs": [wide, fine, wide], "length": "x"}, Street, source="street.yaml")
    assert str(caught.value).splitlines() == [
        "street.yaml: 5 problem(s)",
        "  roofs.0: width: 10 is too wide",
        "  roofs.0: height: 11 is too high",
        "  roofs.2: width: 10 is too wide",
        "  roofs.2: height: 11 is too high",
        "  length: 'x': Input should be a valid integer, unable to parse string as an integer",
    ]
    with pytest.raises(ConfigError, match=r"1 problem\(s\)\n  length: 0 houses$"):
        parse_config({"length": 0}, Street, source="street.yaml")


def test_problems_are_found_in_a_group_that_is_built_by_code() -> None:
    with pytest.raises(ValidationError, match="10 is too wide; height: 11 is too high"):
        Roof(width=10, height=11)


def test_all_problems_are_reported_at_once() -> None:
    assert problems({"num_rooms": "many", "height": float("nan"), "xyz": 1}) == [
        "address: required, but not given",
        "num_rooms: 'many': Input should be a valid integer, unable to parse string as an integer",
        "height: nan: Input should be a finite number",
        "xyz: unknown setting; known: "
        "address, by_name, door, height, num_rooms, range, shapes, window",
    ]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"adress": 1}, "adress: unknown setting; did you mean 'address'?"),
        (
            {"door": {"kind": "circle", "radios": 1}},
            "door.radios: unknown setting; did you mean 'radius'?",
        ),
        (
            {"shapes": [{"kind": "circle", "radius": 1}, {"kind": "square", "sode": 1}]},
            "shapes.1.sode: unknown setting; did you mean 'side'?",
        ),
        (
            {"door": {"kind": "square", "side": 1, "radius": 1}},
            "door.radius: unknown setting; known: kind, side",  # not the other member's settings
        ),
        ({"window": {"widht": 1}}, "window.widht: unknown setting; did you mean 'width'?"),
        (
            {"by_name": {"kitchen": {"width": 1, "widht": 1}}},
            "by_name.kitchen.widht: unknown setting; did you mean 'width'?",
        ),
    ],
)
def test_unknown_settings_name_the_nearest_known_one(
    values: dict[str, object], expected: str
) -> None:
    assert expected in problems(values)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"door": {"kind": "circle", "radius": 0}},
            "door.radius: 0: Input should be greater than 0",
        ),
        (
            {"shapes": [{"kind": "square", "side": 0}]},
            "shapes.0.side: 0: Input should be greater than 0",
        ),
        ({"shapes": [{"kind": "square"}]}, "shapes.0.side: required, but not given"),
        ({"shapes": [{"kind": "square", "side": 13}]}, "shapes.0: side: 13 is unlucky; take 12"),
        ({"door": {"kind": "star"}}, "expected tags: 'circle', 'square'"),
        ({"door": {"kind": "star"}}, "door: {'kind': 'star'}: "),
        ({"window": {"width": "wide"}}, "window.width: 'wide': Input should be a valid integer"),
        ({"range": [1, "x"]}, "range.1: 'x': Input should be a valid number"),
        (
            {"by_name": {"kitchen": {}}},
            "by_name.kitchen.width: required, but not given",
        ),
    ],
)
def test_locations_are_what_users_write(values: dict[str, object], expected: str) -> None:
    (line,) = problems({"address": "here"} | values)
    assert expected in line


def test_locations_in_a_real_run_leave_out_the_tags_of_unions() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(
            TINY,
            [
                "autoregressive.model.factor_head.num_layers=0",
                "teachers.networks.0.weights.sourc=hub",
                "teachers.networks.1.architecture.widht=16",
            ],
            RunConfig,
        )
    _, *lines = str(caught.value).splitlines()
    assert [line.strip() for line in lines] == [
        "teachers.networks.0.weights.sourc: unknown setting; did you mean 'source'?",
        "teachers.networks.1.architecture.widht: unknown setting; did you mean 'width'?",
        "autoregressive.model.factor_head.num_layers: 0: "
        "Input should be greater than or equal to 1",
    ]


def test_a_tag_that_is_also_a_setting_is_left_out_once() -> None:
    # `autoregressive` is a section of a run and the tag of a factor head.
    with pytest.raises(ConfigError, match=r"\n  autoregressive\.model\.factor_head\.x: unknown"):
        load_config(TINY, ["autoregressive.model.factor_head.x=1"], RunConfig)


def test_numbers_in_yaml_1_1_form_are_numbers(tmp_path: Path) -> None:
    path = write(tmp_path, "address: here\nheight: 1e-4\n")  # a string to PyYAML
    assert load_config(path, ["range=[2, 1e3]"], House) == House(
        address="here", height=1e-4, range=(2, 1000.0)
    )


def test_a_file_lists_its_differences_from_a_base(tmp_path: Path) -> None:
    write(tmp_path, "address: here\nheight: 3\ndoor: {kind: square, side: 2}\n", "base.yaml")
    path = write(tmp_path, "base: base.yaml\nnum_rooms: 7\ndoor: {side: 4}\n")
    assert load_config(path, [], House) == House(
        address="here", height=3, num_rooms=7, door=Square(side=4)
    )


def test_lists_of_a_base_are_replaced_whole(tmp_path: Path) -> None:
    write(tmp_path, "address: here\nrange: [3, 4]\nby_name: {a: {width: 1}}\n", "base.yaml")
    path = write(tmp_path, "base: base.yaml\nrange: [5, 6]\nby_name: {b: {width: 2}}\n")
    house = load_config(path, [], House)
    assert house.range == (5, 6.0)
    assert house.by_name == {"a": Window(width=1), "b": Window(width=2)}


def test_a_base_of_a_base_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "base: other.yaml\n", "base.yaml")
    path = write(tmp_path, "base: base.yaml\n")
    with pytest.raises(ConfigError, match="names a base itself; one level is allowed"):
        load_config(path, [], House)


def test_overrides_reach_groups_lists_and_values_that_are_not_there(tmp_path: Path) -> None:
    path = write(tmp_path, "address: here\nshapes: [{kind: circle, radius: 1}]\n")
    overrides = [
        "shapes.0.radius=2",
        "door.kind=square",
        "door.side=1e-2",
        "range=[1, 2]",
        "range.0=5",
        "address=a=b",
    ]
    assert load_config(path, overrides, House) == House(
        address="a=b", shapes=(Circle(radius=2),), door=Square(side=0.01), range=(5, 2.0)
    )


def test_the_last_override_of_a_setting_counts(tmp_path: Path) -> None:
    path = write(tmp_path, "address: here\n")
    assert load_config(path, ["num_rooms=1", "num_rooms=2"], House).num_rooms == 2


def test_an_override_changes_one_use_of_a_yaml_alias(tmp_path: Path) -> None:
    path = write(tmp_path, "address: x\nby_name: {a: &w {width: 1}, b: *w}\n")
    house = load_config(path, ["by_name.a.width=2"], House)
    assert house.by_name == {"a": Window(width=2), "b": Window(width=1)}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("num_rooms", r"override 'num_rooms': expected key\.sub=value"),
        ("=3", r"override '=3': expected key\.sub=value"),
        ("num_rooms.x=3", "num_rooms is 3, a single value, not a group of settings"),
        ("range.0.x=3", r"range\.0 is 1, a single value, not a group of settings"),
        ("range.2=3", r"range\.2: expected a list index below 2, got '2'"),
        ("range.-1=3", r"range\.-1: expected a list index below 2, got '-1'"),
        ("range.\u00b2=3", r"range\.\u00b2: expected a list index below 2"),
        (f"range.{'9' * 5000}=3", r"override: range\.9{3000}"),
        ("range.x.y=3", r"range\.x: expected a list index below 2, got 'x'"),
        ("height=[1", r"override 'height': '\[1' is not a YAML value"),
    ],
)
def test_wrong_overrides_are_explained(tmp_path: Path, override: str, message: str) -> None:
    path = write(tmp_path, "address: here\nnum_rooms: 3\nrange: [1, 2]\n")
    with pytest.raises(ConfigError, match=message):
        load_config(path, [override], House)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("address: [", "cannot be read as YAML"),
        ("- a\n- b\n", "expected a mapping of settings, found list"),
        ("", "expected a mapping of settings, found NoneType"),
        ("address: a\nheight: 1\naddress: b\n", "address is given twice"),
        ("address: a\ndoor: {kind: circle, kind: square}\n", "kind is given twice"),
        ("address: !!python/object:os.system x\n", "cannot be read as YAML"),
    ],
)
def test_what_is_no_config_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path, [], House)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such config file"):
        load_config(tmp_path / "nowhere.yaml", [], House)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "house.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        load_config(path, [], House)


def test_a_dumped_config_loads_back_equal(tmp_path: Path) -> None:
    house = House(
        address="Größe: 3",
        door=Circle(radius=1e-9),
        shapes=(Square(side=2),),
        window=Window(width=1),
        by_name={"a": Window(width=3)},
    )
    assert load_config(write(tmp_path, dump_config(house)), [], House) == house


def test_the_dumped_config_of_a_run_loads_back_equal(tmp_path: Path) -> None:
    config = load_config(TINY, ["storage.root=a/b"], RunConfig)
    assert load_config(write(tmp_path, dump_config(config)), [], RunConfig) == config
