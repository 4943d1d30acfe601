"""ImageNet and its like as people have them: each layout is written from the same few images.

layout = LAYOUTS["kaggle"](folder, train, val)
load_config(file, [*layout.settings(folder), ...], RunConfig)
main(["shard", *layout.command(folder, "val"), destination, ...])
"""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from support.source_files import tar_bytes, write_files, write_tar

Images = Sequence[tuple[str, bytes]]
"""Class, a WordNet id, and image."""


@dataclass(frozen=True)
class Layout:
    """Where the images of both splits are, and how that is said; `@/` stands for the folder."""

    source: str
    options: Mapping[str, str] = field(default_factory=dict)
    validation_source: str | None = None
    """None: it is found beside the source."""
    validation_options: Mapping[str, str] = field(default_factory=dict)
    validation_command: str | None = None
    """What `fqgan-data shard` is given where `fqgan run` finds it by itself."""
    classes: str | None = None
    has_classes: bool = True
    """Whether training images have classes."""
    val_has_classes: bool = True

    def settings(self, root: Path | str) -> list[str]:
        """Give the settings of `fqgan run`, for the layout below a folder or in a bucket."""
        found = [f"data.source={self.source}"]
        found += [f"data.source_options.{name}={value}" for name, value in self.options.items()]
        if self.validation_source is not None:
            found.append(f"data.validation_source={self.validation_source}")
        for name, value in self.validation_options.items():
            found.append(f"data.validation_options.{name}={value}")
        found += [f"data.classes={self.classes}"] if self.classes else []
        return [each.replace("@/", f"{root}/") for each in found]

    def command(self, root: Path | str, split: str) -> list[str]:
        """Give the source of `fqgan-data shard`, and its options."""
        source, options = self.source, self.options
        if split == "val" and self.validation_source is not None:
            source, options = self.validation_source, self.validation_options
        elif split == "val":
            source = self.validation_command or source
        given = [f"{name}={value}" for name, value in options.items()]
        given += [f"classes={self.classes}"] if self.classes and split == "train" else []
        return [each.replace("@/", f"{root}/") for each in (source, *given)]


def write_devkit(folder: Path, train: Images, val: Images) -> Layout:
    """Write what image-net.org gives: tars, and a number per line, by the devkit's own ids."""
    _write_tar_of_tars(folder / "ILSVRC2012_img_train.tar", train)
    write_tar(folder / "ILSVRC2012_img_val.tar", _name_val(val))
    ids = {name: number for number, name in enumerate(reversed(_classes(train)), 1)}
    _write_lines(
        folder / "ILSVRC2012_validation_ground_truth.txt", [str(ids[name]) for name, _ in val]
    )
    _write_lines(folder / "ids.txt", [f"{number} {name}" for name, number in ids.items()])
    return Layout(
        "@/ILSVRC2012_img_train.tar",
        validation_source="@/ILSVRC2012_validation_ground_truth.txt",
        validation_options={"root": "@/ILSVRC2012_img_val.tar", "class_map": "@/ids.txt"},
    )


def write_kaggle(folder: Path, train: Images, val: Images) -> Layout:
    """Write Kaggle's tree, whose validation images are flat, and its lists."""
    root = folder / "ILSVRC/Data/CLS-LOC"
    write_files(root / "train", _name_train(train))
    write_files(root / "val", _name_val(val))
    write_files(root / "test", [("ILSVRC2012_test_00000001.JPEG", val[0][1])])
    for split, names in (("train", _name_train(train)), ("val", _name_val(val))):
        images = train if split == "train" else val
        _write_lines(
            folder / f"LOC_{split}_solution.csv",
            ["ImageId,PredictionString"]
            + [
                f"{Path(name).stem},{label} 10 10 40 30 {label} 1 2 3 4 "
                for (name, _), (label, _) in zip(names, images, strict=True)
            ],
        )
    _write_lines(
        folder / "LOC_synset_mapping.txt", [f"{name} a {name}, or b" for name in _classes(train)]
    )
    return Layout(
        "@/ILSVRC/Data/CLS-LOC/train",
        validation_source="@/LOC_val_solution.csv",
        validation_options={"root": "@/ILSVRC/Data/CLS-LOC/val"},
        classes="@/LOC_synset_mapping.txt",
    )


def write_kaggle_lists(folder: Path, train: Images, val: Images) -> Layout:
    """Write Kaggle's tree, to be read by its lists alone."""
    write_kaggle(folder, train, val)
    return Layout(
        "@/LOC_train_solution.csv",
        {"root": "@/ILSVRC/Data/CLS-LOC/train"},
        "@/LOC_val_solution.csv",
        {"root": "@/ILSVRC/Data/CLS-LOC/val"},
    )


def write_caffe(folder: Path, train: Images, val: Images) -> Layout:
    """Write caffe's lists, which number the classes of `synsets.txt` from 0."""
    labels = {name: number for number, name in enumerate(_classes(train))}
    for split, images, files in (
        ("train", train, _name_train(train)),
        ("val", val, _name_val(val)),
    ):
        write_files(folder / split, files)
        lines = [f"{n} {labels[c]}" for (n, _), (c, _) in zip(files, images, strict=True)]
        _write_lines(folder / f"{split}.txt", lines)
    _write_lines(folder / "synsets.txt", list(labels))
    return Layout(
        "@/train.txt",
        {"root": "@/train", "class_map": "@/synsets.txt"},
        "@/val.txt",
        {"root": "@/val", "class_map": "@/synsets.txt"},
    )


def write_tiny_imagenet(folder: Path, train: Images, val: Images) -> Layout:
    """Write tiny-imagenet, unpacked."""
    write_files(folder / "tiny-imagenet-200", _tiny_imagenet(train, val))
    return Layout(
        "@/tiny-imagenet-200/train",
        validation_source="@/tiny-imagenet-200/val/val_annotations.txt",
    )


def write_tiny_imagenet_zip(folder: Path, train: Images, val: Images) -> Layout:
    """Write tiny-imagenet's zip; its list of labels is a member."""
    files = _tiny_imagenet(train, val)
    write_zip(folder / "x.zip", [(f"tiny-imagenet-200/{name}", data) for name, data in files])
    return Layout(
        "@/x.zip",
        {"subfolder": "tiny-imagenet-200/train"},
        "@/x.zip/tiny-imagenet-200/val/val_annotations.txt",
    )


def write_hugging_face(folder: Path, train: Images, val: Images) -> Layout:
    """Write the Hub's parquet files, all splits in one folder; test images have no labels."""
    names = _classes(train)
    splits = (("train", train[::2], 0), ("train", train[1::2], 1), ("validation", val, 0))
    splits += (("test", [("", data) for _, data in val[:2]], 0),)
    for split, images, number in splits:
        count = 2 if split == "train" else 1
        rows = [
            {
                "image": {"bytes": data, "path": f"{split}_{number}_{row}.JPEG"},
                "label": names.index(name) if name else -1,
            }
            for row, (name, data) in enumerate(images)
        ]
        info = {"info": {"features": {"label": {"_type": "ClassLabel", "names": names}}}}
        image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        schema = pa.schema(
            [("image", image), ("label", pa.int64())],
            metadata={b"huggingface": json.dumps(info).encode()},
        )
        path = folder / "data" / f"{split}-{number:05d}-of-{count:05d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return Layout("@/data", validation_command="@/data")


def write_timm(folder: Path, train: Images, val: Images) -> Layout:
    """Write timm's WebDataset: shards of both splits beside each other, and `_info.json`."""
    labels = {name: number for number, name in enumerate(_classes(train))}
    for split, images in (("train", train), ("validation", val)):
        members = []
        for row, (name, data) in enumerate(images):
            key = f"{name}_{row}"
            members += [
                (f"{key}.cls", str(labels[name]).encode()),
                (f"{key}.jpg", data),
                (f"{key}.json", json.dumps({"label": labels[name], "filename": key}).encode()),
            ]
        half = len(members) // 6 * 3
        write_files(
            folder / "wds",
            [
                (f"imagenet1k-{split}-0000.tar", tar_bytes(members[:half])),
                (f"imagenet1k-{split}-0001.tar", tar_bytes(members[half:])),
            ],
        )
    (folder / "wds/_info.json").write_text('{"splits": {}}')
    return Layout("@/wds", validation_command="@/wds")


def write_img2dataset(folder: Path, train: Images, val: Images) -> Layout:
    """Write img2dataset's shards, whose images have captions and no classes."""
    for split, images in (("train", train), ("val", val)):
        members = []
        for row, (_, data) in enumerate(images):
            members += [
                (f"{row:09d}.jpg", data),
                (f"{row:09d}.json", b'{"url": "x"}'),
                (f"{row:09d}.txt", b"a caption"),
            ]
        write_files(
            folder / split, [("00000.tar", tar_bytes(members)), ("00000_stats.json", b"{}")]
        )
        pq.write_table(pa.table({"url": ["x"], "caption": ["a"]}), folder / split / "00000.parquet")
    return Layout(
        "@/train",
        {"class_key": "none"},
        validation_command="@/val",
        has_classes=False,
    )


def write_flat_folder(folder: Path, train: Images, val: Images) -> Layout:
    """Write flat folders with lists beside them."""
    for split, images in (("train", train), ("val", val)):
        write_files(folder / split, _name_flat(images))
        _write_list(folder / f"{split}.csv", images)
    return Layout("@/train.csv", {"root": "@/train"}, "@/val.csv", {"root": "@/val"})


def write_one_list(folder: Path, train: Images, val: Images) -> Layout:
    """Write one flat folder, with a list of both splits."""
    lines = ["path,class,split"]
    for split, images in (("valid", val), ("train", train)):
        files = [(f"{split}{row}.png", data) for row, (_, data) in enumerate(images)]
        write_files(folder / "images", files)
        lines += [f"images/{n},{c},{split}" for (n, _), (c, _) in zip(files, images, strict=True)]
    _write_lines(folder / "all.csv", lines)
    return Layout("@/all.csv", validation_command="@/all.csv")


def write_flat_zstd(folder: Path, train: Images, val: Images) -> Layout:
    """Write flat tars, compressed with Zstandard, with lists beside them."""
    for split, images in (("train", train), ("val", val)):
        with pa.CompressedOutputStream(str(folder / f"{split}.tar.zst"), "zstd") as file:
            file.write(tar_bytes(_name_flat(images)))
        _write_list(folder / f"{split}.csv", images)
    return Layout(
        "@/train.csv", {"root": "@/train.tar.zst"}, "@/val.csv", {"root": "@/val.tar.zst"}
    )


def write_flat_zip(folder: Path, train: Images, val: Images) -> Layout:
    """Write flat zips with lists in them."""
    for split, images in (("train", train), ("val", val)):
        rows = [f"{name},{label}\n" for (name, _), (label, _) in _zip_names(images)]
        listed = ("labels.csv", "".join(["file,label\n", *rows]).encode())
        write_zip(folder / f"{split}.zip", [*_name_flat(images), listed])
    return Layout("@/train.zip/labels.csv", validation_source="@/val.zip/labels.csv")


def write_ffhq(folder: Path, train: Images, val: Images) -> Layout:
    """Write folders of images without classes, as FFHQ has them."""
    for split, images in (("train", train), ("val", val)):
        write_files(folder / split, _name_nested(images))
    return Layout("@/train", {"class_key": "none"}, validation_command="@/val", has_classes=False)


def write_ffhq_tar(folder: Path, train: Images, val: Images) -> Layout:
    """Write such a tar and zip."""
    write_tar(folder / "a.tar", _name_nested(train))
    write_zip(folder / "b.zip", _name_nested(val))
    return Layout(
        "@/a.tar",
        {"class_key": "none"},
        "@/b.zip",
        {"class_key": "none"},
        has_classes=False,
    )


def write_unlabelled_validation(folder: Path, train: Images, val: Images) -> Layout:
    """Write class folders for training, and flat images without labels for rFID."""
    write_files(folder / "train", _name_train(train))
    write_files(folder / "flat", _name_flat(val))
    return Layout(
        "@/train",
        validation_source="@/flat",
        validation_options={"class_key": "none"},
        val_has_classes=False,
    )


LAYOUTS: dict[str, Callable[[Path, Images, Images], Layout]] = {
    "devkit": write_devkit,
    "kaggle": write_kaggle,
    "kaggle lists": write_kaggle_lists,
    "caffe": write_caffe,
    "tiny-imagenet": write_tiny_imagenet,
    "tiny-imagenet zip": write_tiny_imagenet_zip,
    "hugging face": write_hugging_face,
    "timm": write_timm,
    "img2dataset": write_img2dataset,
    "flat folder": write_flat_folder,
    "one list": write_one_list,
    "flat zstd": write_flat_zstd,
    "flat zip": write_flat_zip,
    "ffhq": write_ffhq,
    "ffhq tar and zip": write_ffhq_tar,
    "unlabelled validation": write_unlabelled_validation,
}


def write_zip(path: Path, files: Sequence[tuple[str, bytes]]) -> None:
    """Write a zip."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files:
            archive.writestr(name, data)


def _classes(images: Images) -> list[str]:
    return sorted({name for name, _ in images})


def _name_train(images: Images) -> list[tuple[str, bytes]]:
    return [(f"{name}/{name}_{row}.JPEG", data) for row, (name, data) in enumerate(images)]


def _name_val(images: Images) -> list[tuple[str, bytes]]:
    return [(f"ILSVRC2012_val_{row:08d}.JPEG", data) for row, (_, data) in enumerate(images, 1)]


def _name_flat(images: Images) -> list[tuple[str, bytes]]:
    return [(f"{row:05d}.png", data) for row, (_, data) in enumerate(images)]


def _name_nested(images: Images) -> list[tuple[str, bytes]]:
    return [(f"0000{row % 2}/{name}", data) for row, (name, data) in enumerate(_name_flat(images))]


def _zip_names(images: Images) -> list[tuple[tuple[str, bytes], tuple[str, bytes]]]:
    return list(zip(_name_flat(images), images, strict=True))


def _tiny_imagenet(train: Images, val: Images) -> list[tuple[str, bytes]]:
    files = [
        (f"train/{name}/images/{name}_{row}.JPEG", data) for row, (name, data) in enumerate(train)
    ]
    files += [
        (f"train/{name}/{name}_boxes.txt", b"x_0.JPEG\t0\t0\t1\t1\n") for name in _classes(train)
    ]
    files += [(f"val/images/val_{row}.JPEG", data) for row, (_, data) in enumerate(val)]
    files += [(f"test/images/test_{row}.JPEG", data) for row, (_, data) in enumerate(val)]
    rows = [f"val_{row}.JPEG\t{name}\t0\t32\t44\t62\n" for row, (name, _) in enumerate(val)]
    files.append(("val/val_annotations.txt", "".join(rows).encode()))
    files.append(("wnids.txt", "\n".join(reversed(_classes(train))).encode()))
    return files


def _write_tar_of_tars(path: Path, images: Images) -> None:
    with tarfile.open(path, "w") as tar:
        for label in _classes(images):
            prefix = f"{label}/"
            members = [
                (n.removeprefix(prefix), d) for n, d in _name_train(images) if n.startswith(prefix)
            ]
            data = tar_bytes(members)
            info = tarfile.TarInfo(f"{label}.tar")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def _write_list(path: Path, images: Images) -> None:
    _write_lines(path, ["path,class", *(f"{n},{c}" for (n, _), (c, _) in _zip_names(images))])


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines))
