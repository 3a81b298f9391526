"""Embeddings in files: all images once, whatever happens in between."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from PIL import Image
from torch import Tensor

from ssl_lightning import (
    DINO,
    ArrayData,
    EmbeddingWriter,
    FakeData,
    HuggingFaceData,
    ImageFolderData,
    MoCoV3,
    SimCLR,
    SSLModule,
    UserError,
    read_embeddings,
)
from ssl_lightning.callbacks.embedding_writer import Embeddings
from ssl_lightning.checkpoints import open_backbone
from ssl_lightning.cli import main
from tests.processes import run_processes
from tests.small import BACKBONE, VIT, needs_fsdp2, small, trainer


def same(found: Embeddings, expected: Embeddings) -> None:
    np.testing.assert_allclose(found.embeddings, expected.embeddings, atol=1e-6, rtol=0)
    for column, other in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_array_equal(column, other)


FORMATS = pytest.mark.parametrize("format", ["npz", "parquet"])


def folder_data(photos: Path, **kwargs: Any) -> ImageFolderData:
    """36 photos to train on and 4 to validate on."""
    return ImageFolderData(root=str(photos), **{"image_size": 32, "batch_size": 3, "num_workers": 0, **kwargs})


def model() -> Any:
    torch.manual_seed(0)
    return small(SimCLR)


class Seen(SimCLR):
    """Counts the images whose embeddings it computes."""

    seen = 0

    def forward(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return super().forward(images)


def computed(data: Any, folder: Path, **kwargs: Any) -> int:
    """How many embeddings a prediction into a folder computes."""
    torch.manual_seed(0)
    module = small(Seen)
    writer = EmbeddingWriter(str(folder), **{"images_per_file": 8, **kwargs})
    trainer(folder.parent, callbacks=[writer]).predict(module, datamodule=data)
    return module.seen


@FORMATS
def test_embeddings_labels_and_paths_are_those_of_the_data(photos: Path, format: Any, tmp_path: Path) -> None:  # noqa: A002
    module, data = model(), folder_data(photos)
    writer = EmbeddingWriter(str(tmp_path / "e"), format, images_per_file=8)
    assert trainer(tmp_path, callbacks=[writer]).predict(module, datamodule=data) is None
    found = read_embeddings(tmp_path / "e")
    predicted = trainer(tmp_path).predict(module, datamodule=folder_data(photos))
    assert predicted is not None
    expected = torch.cat([batch for loader in predicted for batch in loader])  # type: ignore[misc]
    assert found.embeddings.dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(found.embeddings), expected, atol=1e-6, rtol=0)
    assert list(found.sets) == ["train"] * 36 + ["val"] * 4
    images = [(source, index) for source in (data.train_images, data.val_images) for index in range(len(source or []))]
    assert list(found.paths) == [source.name(index) for source, index in images]  # type: ignore[union-attr]
    assert all(Path(path).is_file() for path in found.paths)
    assert list(found.labels) == [source.labels[index] for source, index in images]  # type: ignore[union-attr,index]
    assert list(found.indices) == [index for _, index in images]
    files = list((tmp_path / "e").glob(f"*.{format}"))
    assert len(files) == 5 + 1  # of eight images at most


def test_a_parquet_file_has_one_list_of_float32_for_each_image(photos: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    computed(folder_data(photos), tmp_path / "e", format="parquet", images_per_file=100)
    schema = parquet.read_schema(tmp_path / "e" / "train-000000000.parquet")
    assert schema.field("embeddings").type == pa.list_(pa.float32())
    assert schema.names == ["embeddings", "labels", "paths", "sets", "indices"]


@FORMATS
def test_images_that_are_done_are_not_computed_again(photos: Path, format: Any, tmp_path: Path) -> None:  # noqa: A002
    folder = tmp_path / "e"
    assert computed(folder_data(photos), folder, format=format) == 40
    whole = read_embeddings(folder)
    assert computed(folder_data(photos), folder, format=format) == 0
    sorted(folder.glob(f"train-*.{format}"))[2].unlink()
    (folder / f"train-000000000.{format}.part").touch()
    assert computed(folder_data(photos), folder, format=format) == 8
    same(read_embeddings(folder), whole)
    assert not list(folder.glob("*.part"))
    data = folder_data(photos)  # other predictions of the same data leave nothing out
    writer = EmbeddingWriter(str(folder), format)
    trainer(tmp_path, callbacks=[writer]).predict(model(), datamodule=data)
    assert sum(map(len, trainer(tmp_path).predict(model(), datamodule=data) or [])) == 12 + 2


def test_the_folder_belongs_to_weights_images_and_their_preparation(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "e"
    computed(folder_data(photos), folder)
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    refused = pytest.raises(
        UserError, match=r"e holds embeddings of other (\w| )+: .*; choose another --embedding_writer"
    )
    running = trainer(tmp_path, callbacks=[EmbeddingWriter(str(folder))])
    with refused as error:
        running.predict(small(SimCLR), datamodule=folder_data(photos))
    assert "of other weights: weights" in str(error.value)
    for other, what in (
        (folder_data(photos, image_size=48), "image_transform"),
        (folder_data(photos, labels="none"), "images"),
        (folder_data(photos, val_fraction=0.2), "images and data"),
        (FakeData(image_size=32), "images and data"),
    ):
        with refused as error:
            computed(other, folder)
        assert f"of other {what}" in str(error.value)
    with refused:
        computed(folder_data(photos), folder, format="parquet")
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}.keys() == before.keys()
    (folder / "embeddings.json").unlink()
    with pytest.raises(UserError, match=r"has files, but no embeddings.json"):
        computed(folder_data(photos), folder)
    with pytest.raises(UserError, match="holds no embeddings"):
        read_embeddings(folder)


def test_arrays_of_the_same_length_are_told_apart(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, 3, 32, 32), np.uint8)
    assert computed(ArrayData(images), tmp_path / "e") == 20
    with pytest.raises(UserError, match="of other data"):
        computed(ArrayData(images[::-1].copy()), tmp_path / "e")


def test_small_images_held_in_memory_keep_their_paths(tmp_path: Path) -> None:
    for number in range(6):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), (number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
    (tmp_path / "images" / "3.png").write_bytes(b"")
    data = ImageFolderData(root=str(tmp_path / "images"), labels="none", max_unreadable=0.5)
    with pytest.warns(UserWarning, match="unreadable"):
        assert computed(data, tmp_path / "e") == 5
    paths = read_embeddings(tmp_path / "e").paths
    assert [Path(path).name for path in paths] == ["0.png", "1.png", "2.png", "4.png", "5.png"]


def test_unreadable_images_are_left_out(broken_photos: Path, tmp_path: Path) -> None:
    data = folder_data(broken_photos, labels="none", max_unreadable=0.5)
    with pytest.warns(UserWarning, match="unreadable"):
        assert computed(data, tmp_path / "e") == 37
    found = read_embeddings(tmp_path / "e")
    assert len(found.embeddings) == 37
    assert not {"03.jpg", "07.jpg"} & {Path(path).name for path in found.paths if "flower" in path}


@pytest.mark.parametrize("method", [SimCLR, DINO, MoCoV3])
def test_the_folder_knows_the_weights_by_the_hash_of_their_checkpoint(method: type[SSLModule], tmp_path: Path) -> None:
    module, data = small(method, VIT), FakeData(batch_size=8)
    running = trainer(tmp_path, limit_train_batches=1)
    running.fit(module, data)
    running.save_checkpoint(tmp_path / "x.ckpt")
    fresh = small(method, VIT)
    writer = EmbeddingWriter(str(tmp_path / "e"))
    trainer(tmp_path, callbacks=[writer]).predict(
        fresh, datamodule=FakeData(batch_size=8), ckpt_path=tmp_path / "x.ckpt"
    )
    belongs = json.loads((tmp_path / "e" / "embeddings.json").read_text())
    assert belongs["weights"] == open_backbone(str(tmp_path / "x.ckpt")).hash
    torch.testing.assert_close(
        torch.from_numpy(read_embeddings(tmp_path / "e").embeddings[:8]),
        module.eval()(next(iter(trained_images(data)))),
        atol=1e-5,
        rtol=1e-5,
    )


def trained_images(data: FakeData) -> Any:
    """Batches of plain images, prepared as the embeddings' were."""
    for batch in data.predict_dataloader()[0]:
        yield data.on_after_batch_transfer(batch, 0).images


def test_what_has_no_order_or_no_names_is_refused(photos: Path, tmp_path: Path) -> None:
    writer = EmbeddingWriter(str(tmp_path / "e"))
    stream = HuggingFaceData("imagefolder", data_dir=str(photos), streaming=True, num_images=40)
    with pytest.raises(UserError, match="a stream come in no fixed order"):
        trainer(tmp_path, callbacks=[writer]).predict(model(), datamodule=stream)
    loader = torch.utils.data.DataLoader([torch.rand(3, 32, 32)])  # type: ignore[arg-type]
    with pytest.raises(UserError, match="give predict a data module of this package"):
        trainer(tmp_path, callbacks=[writer]).predict(model(), loader)
    with pytest.raises(UserError, match="needs a folder"):
        trainer(tmp_path, callbacks=[EmbeddingWriter()]).predict(model(), datamodule=folder_data(photos))
    with pytest.raises(UserError, match="no format 'csv'"):
        EmbeddingWriter("e", format="csv")  # type: ignore[arg-type]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*file/e/embeddings.json"):
        computed(folder_data(photos), tmp_path / "file" / "e")


# Several processes


def _computed(rank: int, photos: Path, folders: list[Path]) -> list[int]:
    seen = []
    for folder, strategy in zip(folders, ("ddp", "fsdp2"), strict=True):
        torch.manual_seed(0)
        module = small(Seen)
        writer = EmbeddingWriter(str(folder), images_per_file=8)
        options: dict[str, Any] = {"strategy": strategy, "devices": 2, "plugins": [LightningEnvironment()]}
        trainer(folder.parent, callbacks=[writer], **options).predict(module, datamodule=folder_data(photos))
        seen.append(int(module.seen))
    return seen


@needs_fsdp2
def test_two_processes_share_the_work_and_go_on_where_one_began(photos: Path, tmp_path: Path) -> None:
    one, two, begun = tmp_path / "one", tmp_path / "two", tmp_path / "begun"
    for folder in (one, begun):
        assert computed(folder_data(photos), folder) == 40
    for file in sorted(begun.glob("train-*.npz"))[1:4]:
        file.unlink()
    assert run_processes(_computed, 2, photos, [two, begun]) == [[20, 12], [20, 12]]
    same(read_embeddings(begun), read_embeddings(one))
    same(read_embeddings(two), read_embeddings(one))
    for file in sorted(two.glob("train-*.npz"))[:2]:
        file.unlink()
    assert computed(folder_data(photos), two) == 16
    same(read_embeddings(two), read_embeddings(one))


# A kill, on the command line

SLOW = """
import time
from ssl_lightning import SimCLR

class Slow(SimCLR):
    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        time.sleep(0.1)
        print("computed", len(batch.images), flush=True)
        return super().predict_step(batch, batch_idx, dataloader_idx)
"""


def words(photos: Path, *more: str) -> list[str]:
    net = ["--model.backbone", "resnet10_cifar", "--model.backbone_kwargs", json.dumps(BACKBONE["backbone_kwargs"])]
    data = ["--data", "ImageFolderData", "--data.root", str(photos), "--data.image_size", "32"]
    return [*net, *data, "--data.num_workers", "0", "--data.batch_size", "2", "--trainer.accelerator", "cpu", *more]


@pytest.mark.slow
def test_a_run_goes_on_after_a_kill(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    more = words(photos, "--embedding_writer.format", "parquet", "--embedding_writer.images_per_file", "4")
    command = [sys.executable, "-m", "ssl_lightning", "predict", "--model", "slow.Slow", *more]
    command += ["--embedding_writer.output", "e"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
    while len(list((tmp_path / "e").glob("*.parquet"))) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    done = len(read_embeddings(tmp_path / "e").indices)
    assert 12 <= done < 40
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert f"{done} of 40 are already there" in again.stderr
    assert sum(int(line.split()[1]) for line in again.stdout.splitlines() if line.startswith("computed")) == 40 - done
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ssl-lightning"])
    main(["predict", "--model", "SimCLR", *more, "--embedding_writer.output", "whole"])
    same(read_embeddings("e"), read_embeddings("whole"))


def test_predict_writes_nothing_and_fit_takes_no_notice_unless_told(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ssl-lightning"])
    monkeypatch.setattr(EmbeddingWriter, "setup", None)  # would be called
    main(["predict", "--model", "SimCLR", *words(photos)])
    folder = ["--embedding_writer.output", "e", "--trainer.fast_dev_run", "true"]
    main(["fit", "--model", "SimCLR", *words(photos, *folder)])
    assert not (tmp_path / "e").exists()
