"""What the page of a run shows of the errors of kNN and of blank views, on any number of processes."""

import base64
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

from ssl_lightning import KNNProbe, Pictures, SimCLR, ViewSpec
from ssl_lightning.callbacks.blank_views import count_blank_views
from ssl_lightning.callbacks.features import PlainFeatures
from ssl_lightning.callbacks.knn_errors import KNNErrors
from ssl_lightning.distributed import world_size
from ssl_lightning.drawing import are_blank
from ssl_lightning.evaluation import knn_predict
from ssl_lightning.evaluation.knn import Votes
from tests.processes import run_processes
from tests.small import digits, small, trainer


def test_the_errors_are_those_that_the_accuracy_counts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data, module = digits(image_size=16), small(SimCLR)
    callbacks = [KNNProbe(), Pictures(num_compared=10)]
    running = trainer(tmp_path, limit_train_batches=2, callbacks=callbacks, logger=CSVLogger(tmp_path, "", ""))
    running.fit(module, data)
    kept = json.loads((tmp_path / "errors.json").read_text())
    accuracy = float(running.callback_metrics["val/knn_top1"])
    assert (kept["epoch"], kept["total"]) == (1, 360)
    assert kept["wrong"] == round(360 * (1 - accuracy)) == 360 - np.trace(kept["counts"])
    module.eval()
    with torch.no_grad():
        features, labels = zip(
            *[
                (module(batch.images), batch.labels)
                for loader in (data.train_labelled_dataloader(), data.val_dataloader())
                for batch in [data.on_after_batch_transfer(raw, 0) for raw in loader]
            ],
            strict=True,
        )
    features, labels = torch.cat(features), torch.cat(labels)
    bank, queries = features[:-360], features[-360:]
    predicted = knn_predict(bank, labels[:-360], queries, 10)
    table = torch.zeros(10, 10, dtype=torch.long)
    table.index_put_((labels[-360:], predicted), torch.tensor(1), accumulate=True)
    assert kept["counts"] == table.tolist()
    error = kept["errors"][0]
    index = int(kept["names"][0].split()[-1])
    assert (error["label"], error["predicted"]) == (str(int(labels[index - 360])), str(int(predicted[index])))
    similarities = torch.nn.functional.cosine_similarity(queries[index : index + 1], bank)
    shown = [int(kept["names"][place].split()[-1]) for place in error["nearest"]]
    torch.testing.assert_close(similarities[shown], similarities.topk(5).values)
    sheet = Image.open(io.BytesIO(base64.b64decode(kept["tiles"].partition(",")[2])))
    tile = np.asarray(sheet.crop((0, 0, 32, 32)).convert("L")).astype(int)
    assert data.val_images is not None
    image = torch.nn.functional.interpolate(data.val_images.read(index)[None].float(), (32, 32), mode="bilinear")[0, 0]
    assert np.corrcoef(tile.ravel(), image.numpy().ravel())[0, 1] > 0.95


def _errors(rank: int, folder: Path) -> Any:
    """The errors of 3,000 images of 40 classes, and the blank views of a batch of 40."""
    random = torch.Generator().manual_seed(0)
    labels, predicted = torch.randint(-1, 40, (3000,), generator=random), torch.randint(40, (3000,), generator=random)
    predicted[:900] = labels[:900].clamp(min=0)
    labels[1000:1100], predicted[1000:1100] = 7, 33
    share, nearest = torch.rand(3000, generator=random), torch.randint(50, (3000, 5), generator=random)
    mine = torch.arange(rank, 3000, world_size())
    votes = Votes(predicted[mine], share[mine], nearest[mine])
    bank = PlainFeatures(torch.zeros(50, 1), torch.zeros(50), torch.arange(50) + 100)
    errors = KNNErrors.of(votes, PlainFeatures(torch.zeros(len(mine), 1), labels[mine], mine), bank, 1)
    assert errors is not None
    views = [torch.rand(40, 3, 16, 16, generator=random), torch.rand(40, 3, 8, 8, generator=random)]
    views[0][3], views[1][[3, 38]], views[1][20, 0] = 0.5, torch.tensor([1.0, 0.0, 0.3]).view(3, 1, 1), 0.7
    rows = torch.arange(rank, 40, world_size())
    specs = [ViewSpec(size=size, mean=(0.0,) * 3, std=(1.0,) * 3) for size in (16, 8)]
    running: Any = SimpleNamespace(
        datamodule=SimpleNamespace(view_specs=specs),
        is_global_zero=rank == 0,
        current_epoch=0,
        loggers=[SimpleNamespace(log_dir=str(folder))],
    )
    share_of_blank = count_blank_views(running, [view[rows] for view in views], rows)
    return [part.tolist() if isinstance(part, torch.Tensor) else part for part in errors], share_of_blank


@pytest.mark.parametrize("processes", [1, 2])
def test_errors_and_blank_views_are_bounded_and_the_same_on_any_number_of_processes(
    processes: int, tmp_path: Path
) -> None:
    folder = tmp_path / "shown"
    found = [_errors(0, folder)] if processes == 1 else run_processes(_errors, 2, folder)
    (epoch, total, wrong, classes, counts, indices, labels, predicted, share, nearest), blank = found[0]
    assert all(part == found[0] for part in found)
    if processes == 2:
        assert found[0] == _errors(0, tmp_path / "one")
        assert (folder / "blank.json").read_text() == (tmp_path / "one" / "blank.json").read_text()
    assert epoch == 1
    assert total < 3000
    assert {7, 33} <= {*classes}
    assert len(classes) == 12
    assert counts[classes.index(7)][classes.index(33)] >= 100
    assert len(indices) == 200
    assert share == sorted(share, reverse=True)
    assert all(true != wrong for true, wrong in zip(labels, predicted, strict=True))
    assert wrong > 2000
    shown = {*zip(labels, predicted, strict=True)}
    confused = {(a, b) for a, row in zip(classes, counts, strict=True) for b, n in zip(classes, row, strict=True) if n}
    assert {(a, b) for a, b in confused if a != b} <= shown  # each cell of the table leads to an image
    assert {*map(len, nearest)} == {5}
    assert blank == 3 / 80
    kept = json.loads((folder / "blank.json").read_text())
    assert [(view["name"], view["view"]) for view in kept["views"]] == [("image 3", 1), ("image 3", 2), ("image 38", 2)]


def test_a_view_of_a_single_color_is_blank() -> None:
    views = torch.tensor([0.2, 0.5, 0.9]).view(1, 3, 1, 1).expand(3, 3, 8, 8).clone()
    views[1, 2, :4] += 0.1  # half of a channel is brighter
    views[2] += 0.01 * torch.rand(8, 8)
    assert are_blank(views, (1.0, 1.0, 1.0)).tolist() == [True, False, True]
    assert are_blank(views[:, :1], (0.5,)).tolist() == [True] * 3
