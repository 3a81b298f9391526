"""A small data set in the folders of Pascal VOC and COCO: drawn pictures of colored shapes on textured ground."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("disc", "square")
SPLITS = {"train": 48, "val": 17}


def draw(random: np.random.Generator, size: tuple[int, int]) -> tuple[Image.Image, Image.Image, list[Any]]:
    """A picture, its mask, and the class and box (x0, y0, x1, y1) of each shape."""
    width, height = size
    ground = random.integers(90, 160, size=3)[None, None] + random.normal(0, 25, size=(height, width, 1))
    picture = Image.fromarray(ground.clip(0, 255).astype(np.uint8))
    mask, objects = Image.new("L", size), []
    for _ in range(random.integers(1, 3)):
        label, side = int(random.integers(1, 3)), int(random.integers(24, 41))
        x, y = (int(random.integers(0, limit - side)) for limit in size)
        box = (x, y, x + side - 1, y + side - 1)
        if any(abs(x - other[0]) < 42 and abs(y - other[1]) < 42 for _, other in objects):
            continue
        shade = int(random.integers(0, 60))
        colour = (255 - shade, shade, shade) if label == 1 else (shade, shade, 255 - shade)
        for drawing, fill in ((ImageDraw.Draw(picture), colour), (ImageDraw.Draw(mask), label)):
            (drawing.ellipse if label == 1 else drawing.rectangle)(box, fill=fill)
        objects.append((label, (x, y, x + side, y + side)))
    return picture, mask, objects


def write(root: Path, size: tuple[int, int] = (96, 80)) -> Path:
    """Both layouts with the same pictures: VOC in ``voc``, COCO in ``coco``."""
    random = np.random.Generator(np.random.Philox(key=3))
    voc, coco = root / "voc", root / "coco"
    for folder in ("JPEGImages", "SegmentationClass", "Annotations", "ImageSets/Segmentation", "ImageSets/Main"):
        (voc / folder).mkdir(parents=True)
    (coco / "annotations").mkdir(parents=True)
    for split, count in SPLITS.items():
        (coco / split).mkdir()
        names = [f"{split}_{number:03}" for number in range(count)]
        told: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
        told["categories"] = [{"id": 7 * label, "name": name} for label, name in enumerate(CLASSES, 1)]
        for kind in ("Segmentation", "Main"):
            (voc / "ImageSets" / kind / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
        for number, name in enumerate(names):
            picture, mask, objects = draw(random, size)
            picture.save(voc / "JPEGImages" / f"{name}.jpg", quality=95)
            picture.save(coco / split / f"{name}.jpg", quality=95)
            mask.putpalette([0, 0, 0, 255, 0, 0, 0, 0, 255])
            mask.save(voc / "SegmentationClass" / f"{name}.png")
            (voc / "Annotations" / f"{name}.xml").write_text(annotation(objects))
            told["images"].append({"id": number, "file_name": f"{name}.jpg", "width": size[0], "height": size[1]})
            for label, (x0, y0, x1, y1) in objects:
                one = {"id": len(told["annotations"]), "image_id": number, "category_id": 7 * label}
                told["annotations"].append({**one, "bbox": [x0, y0, x1 - x0, y1 - y0], "iscrowd": 0})
        (coco / "annotations" / f"instances_{split}.json").write_text(json.dumps(told))
    return root


def annotation(objects: list[Any], difficult: int = 0) -> str:
    """An annotation of Pascal VOC, whose pixels are counted from 1."""
    parts = [
        f"<object><name>{CLASSES[label - 1]}</name><difficult>{difficult}</difficult><bndbox><xmin>{x0 + 1}</xmin>"
        f"<ymin>{y0 + 1}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
        for label, (x0, y0, x1, y1) in objects
    ]
    return f"<annotation>{''.join(parts)}</annotation>"
