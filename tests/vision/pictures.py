"""Images, and the files of data sets, made by the tests."""

import io
import tarfile

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

BROKEN = b"no image at all"


def photo(seed, height=6, width=5):
    """An RGB image of noise, another one for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image, file_format="PNG", **options):
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def stored(content, path=None):
    """An image as `datasets.Image` stores it."""
    return {"bytes": content, "path": path}


def as_bytes(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def pixels_of(image):
    return np.asarray(image).tobytes()


def as_they_are(images):
    """A transform that changes nothing."""
    return [as_bytes(image) for image in images]


def write_folder(root, classes=("cat", "dog"), images=8, first_seed=0):
    """PNG images in a folder per class, all different."""
    seed = first_seed
    for name in classes:
        (root / name).mkdir(parents=True)
        for index in range(images):
            photo(seed).save(root / name / f"{index}.png")
            seed += 1
    return root


def write_parquet(file, labels, feature=None, *, images=None, label_column="label", first_seed=0):
    """A parquet file as `datasets` writes it: images, and labels of a feature (int64 where none is given)."""
    if images is None:
        images = [stored(encoded(photo(first_seed + index)), f"{index}.png") for index in range(len(labels))]
    features = datasets.Features(
        {"image": datasets.Image(), label_column: datasets.Value("int64") if feature is None else feature}
    )
    columns = {"image": list(images), label_column: list(labels)}
    made = datasets.Dataset.from_dict(columns, features=features)
    if len(made):
        made.to_parquet(str(file))
    else:
        # Which some releases cannot.
        pq.write_table(made.data.table, file)
    return str(file)


def write_foreign_parquet(file, labels, images):
    """A parquet file of somebody who does not know `datasets`: no feature types, images as bytes and path."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array(list(images), kind), "label": list(labels)}), file)
    return str(file)


def write_tar(file, samples):
    """A webdataset shard: {"jpg": ..., "cls": ...} of each sample."""
    with tarfile.open(file, "w") as archive:
        for number, sample in enumerate(samples):
            for extension, content in sample.items():
                member = tarfile.TarInfo(f"{number:03d}.{extension}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return str(file)
