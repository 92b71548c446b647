"""Images per second through the pipeline of training, against plain Pillow, with one worker.

python -m benchmarks.image_pipeline ../shared/data

The folder holds imagenette224/train.parquet: JPEG photos of 224 x 224 pixels. They are read as they are, and enlarged
to 500 x 375, a common size in ImageNet, where decoding is most of the work.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, default_collate
from transformers import AutoConfig

from nio_hf.hub.run_folder import versions
from nio_hf.recipe.settings import AugmentationSettings
from nio_hf.trainer.sampling import EpochSampler, SeededDataset
from nio_hf.vision.augmentation import BatchAugmentation
from nio_hf.vision.processors import TrainingTransform, make_image_processor, pixel_format, random_part
from nio_hf.vision.samples import ImageSamples, collate_images

RESULT = Path(__file__).parent / "results" / "image-pipeline.json"
SIDE = 224
BATCH_SIZE = 64
IMAGES = 1280
ROUNDS = 7
SIZES = {"224x224": None, "500x375": (500, 375)}
BICUBIC = Image.Resampling.BICUBIC
SCALE, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)


class Plain(Dataset[Any]):
    """What a loop over files with Pillow and nothing else would do."""

    def __init__(self, files: list[bytes], read: Callable[[Image.Image], Image.Image]) -> None:
        self._files = files
        self._read = read

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self._read(Image.open(io.BytesIO(self._files[index])).convert("RGB"))
        return {"pixel_values": torch.from_numpy(np.array(image)).permute(2, 0, 1), "labels": index % 10}


def decoded(image: Image.Image) -> Image.Image:
    """Decode, and hand over a corner, so that no resizing and little copying is counted."""
    return image.crop((0, 0, 8, 8))


def resized(image: Image.Image) -> Image.Image:
    """Decode and resize the whole image."""
    return image.resize((SIDE, SIDE), BICUBIC)


def cropped(image: Image.Image) -> Image.Image:
    """Decode, resize a random part, flip: the same work as the pipeline's, written by hand."""
    image = image.resize((SIDE, SIDE), BICUBIC, box=random_part(*image.size, SCALE, ASPECT))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else image


PLAIN = {"decode": decoded, "decode and resize": resized, "decode, crop, resize and flip": cropped}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = datasets.Dataset.from_parquet(str(arguments.data / "imagenette224" / "train.parquet"))
    stored = rows.select(range(IMAGES)).cast_column("image", datasets.Image(decode=False))
    result: dict[str, Any] = {"images": IMAGES, "rounds": ROUNDS, "workers": 1, "batch size": BATCH_SIZE, "sizes": {}}
    for name, size in SIZES.items():
        result["sizes"][name] = measure([encoded(row["image"]["bytes"], size) for row in stored])
    result["versions"] = versions() | {"pillow": Image.__version__}
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(RESULT.read_text(encoding="utf-8"))


def encoded(file: bytes, size: tuple[int, int] | None) -> bytes:
    """The file, or its image at another size as JPEG of quality 90."""
    if size is None:
        return file
    buffer = io.BytesIO()
    Image.open(io.BytesIO(file)).convert("RGB").resize(size, BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def measure(files: list[bytes]) -> dict[str, Any]:
    """Images per second of each way, in rounds in which all take turns, and what the pipeline has of the others."""
    ways: dict[str, Callable[[], float]] = {
        name: lambda read=read: seconds(plain(files, read)) for name, read in PLAIN.items()
    }
    ways["pipeline"] = lambda: seconds(*pipeline(files))
    rounds = [{name: len(files) / way() for name, way in ways.items()} for _ in range(ROUNDS + 1)][1:]
    return {
        "bytes per image": round(statistics.mean(map(len, files))),
        "images per second": {name: round(statistics.median(r[name] for r in rounds), 1) for name in ways},
        "pipeline / plain Pillow": {
            name: round(statistics.median(r["pipeline"] / r[name] for r in rounds), 3) for name in PLAIN
        },
    }


def seconds(loader: DataLoader[Any], consume: Callable[[Any], Any] = lambda batch: batch) -> float:
    """Seconds of one pass, from the first batch on: starting the worker is not counted."""
    batches = iter(loader)
    consume(next(batches))
    started = time.perf_counter()
    count = 1
    for batch in batches:
        consume(batch)
        count += 1
    return (time.perf_counter() - started) * count / (count - 1)


def plain(files: list[bytes], read: Callable[[Image.Image], Image.Image]) -> DataLoader[Any]:
    """A loader over plain Pillow."""
    return DataLoader(Plain(files, read), BATCH_SIZE, num_workers=1, collate_fn=default_collate)


def pipeline(files: list[bytes]) -> tuple[DataLoader[Any], Callable[[Any], Any]]:
    """The loader of training, and what is done to its batches on the device: scaled and normalised."""
    config = AutoConfig.for_model("swin", image_size=SIDE)
    processor = make_image_processor(config, interpolation="bicubic", crop_ratio=0.875)
    columns = {"image": [{"bytes": file, "path": None} for file in files], "label": [i % 10 for i in range(len(files))]}
    features = datasets.Features(image=datasets.Image(decode=False), label=datasets.ClassLabel(10))
    rows = datasets.Dataset.from_dict(columns, features=features)
    settings = AugmentationSettings(
        random_crop="resized", crop_scale=[*SCALE], crop_aspect=[*ASPECT], horizontal_flip=0.5
    )
    samples = SeededDataset(ImageSamples(rows, TrainingTransform(processor, settings), part="train"), seed=0)
    sampler = EpochSampler(len(files), seed=0)
    loader = DataLoader(samples, BATCH_SIZE, sampler=sampler, num_workers=1, collate_fn=collate_images)
    return loader, BatchAugmentation(pixel_format(processor), settings, 10)


if __name__ == "__main__":
    main()
