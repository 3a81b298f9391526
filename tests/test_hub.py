"""Backbones to and from the Hugging Face hub: a stand-in on this machine, and folders of transformers."""

import base64
import hashlib
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from torch import nn

from ssl_lightning import UserError
from ssl_lightning.backbones import create_backbone
from ssl_lightning.checkpoints import export, load_backbone, open_backbone
from tests.small import slow_unless

COMMIT = "0123456789" * 4
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's interface that an upload and a download need."""

    files: dict[str, bytes] = {}  # noqa: RUF012 # of all repositories

    def log_message(self, *args: Any) -> None:
        """Print nothing."""

    def answer(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        address = f"http://{self.headers['Host']}"
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.answer(json.dumps({"url": f"{address}/{name}", "name": name}).encode())
        elif "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            self.answer(json.dumps({"files": [{**file, "shouldIgnore": False} for file in files]}).encode())
        elif "/commit/" in self.path:
            repository = self.path.split("/api/models/")[1].split("/commit/")[0]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.files[f"{repository}/{line['value']['path']}"] = content
            self.answer(
                json.dumps({"commitUrl": f"{address}/{repository}/commit/{COMMIT}", "commitOid": COMMIT}).encode()
            )
        else:
            self.answer(b'{"errors": [], "warnings": []}')  # of the model card

    def do_GET(self) -> None:
        repository, _, file = self.path[1:].partition("/resolve/main/")
        repository, _, file = (repository, "", file) if file else self.path[1:].partition(f"/resolve/{COMMIT}/")
        content = self.files.get(f"{repository}/{file}")
        if self.path.startswith("/api/models/"):  # what older versions of the library ask before an upload
            self.answer(json.dumps({"id": "me/vit", "sha": COMMIT, "siblings": []}).encode())
        elif content is None:
            known = any(name.startswith(f"{repository}/") for name in self.files)
            self.answer(b"", 404, X_Error_Code="EntryNotFound" if known else "RepoNotFound", X_Repo_Commit=COMMIT)
        else:
            self.answer(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET  # noqa: N815


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """The files of an empty hub."""
    Hub.files = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    values = {
        "ENDPOINT": address,
        "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
    }
    for module in (huggingface_hub.constants, huggingface_hub.file_download, huggingface_hub.hf_api):
        for name, value in values.items():  # versions of the library import them here or there
            monkeypatch.setattr(module, name, value, raising=False)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", address)
    monkeypatch.setenv("HF_TOKEN", "hf_made_up")
    yield Hub.files
    server.shutdown()


def saved(folder: Path, name: str, kwargs: dict[str, Any]) -> tuple[Path, nn.Module]:
    """A file of random weights, and the backbone that it is of."""
    torch.manual_seed(0)
    model = create_backbone(name, **kwargs).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=parameter[0].numel() ** -0.5 / 4)
    torch.save(model.state_dict(), folder / "weights.pth")
    return folder / "weights.pth", model


def test_what_is_pushed_is_loaded_here_and_by_timm(hub: dict[str, bytes], tmp_path: Path) -> None:
    path, model = saved(tmp_path, "vit_small_patch16_224", VIT)
    address = export(path, push="me/vit", backbone="vit_small_patch16_224", backbone_kwargs=VIT)
    assert str(address).endswith("/me/vit")
    assert {name.removeprefix("me/vit/") for name in hub} >= {"config.json", "model.safetensors", "README.md"}
    assert b"library_name: timm" in hub["me/vit/README.md"]
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(load_backbone("hf-hub:me/vit")(images), model(images))
    theirs = timm.create_model("hf-hub:me/vit", pretrained=True, cache_dir=tmp_path / "cache").eval()
    torch.testing.assert_close(theirs(images), model(images))
    assert open_backbone("hf-hub:me/vit").name == "vit_small_patch16_224"
    with pytest.raises(UserError, match="hf-hub:me/other cannot be read"):
        load_backbone("hf-hub:me/other")
    with pytest.raises(UserError, match="give either --output, where to write, or --push"):
        export(path, push="me/vit", output=tmp_path / "x", backbone="vit_small_patch16_224", backbone_kwargs=VIT)


RESNET = {"layers": [1, 2, 1, 1], "channels": [4, 8, 8, 8]}
DINOV3 = {**VIT, "patch_size": 16, "img_size": 64, "global_pool": "token"}
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("vit_small_patch16_224", VIT),
    ("vit_small_patch16_224", {**VIT, "class_token": False, "global_pool": "avg", "fc_norm": False}),
    ("vit_small_patch14_reg4_dinov2", VIT),
    ("vit_giant_patch14_dinov2", {**VIT, "mlp_ratio": 4 * 4 / 3}),
    ("vit_small_patch16_dinov3_qkvb", DINOV3),
    ("vit_small_plus_patch16_dinov3_qkvb", DINOV3),
    ("resnet50", RESNET),
    ("torchvision/resnet18", {}),
]


@pytest.mark.parametrize(
    ("name", "kwargs"), slow_unless(lambda name, _: "dinov3" in name and "plus" not in name, KINDS)
)
def test_transformers_gives_the_same_features(
    name: str, kwargs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    path, model = saved(tmp_path, name, kwargs)
    folder = Path(export(path, "transformers", tmp_path / "folder", backbone=name, backbone_kwargs=kwargs))
    names = {file.name for file in folder.iterdir()}
    assert names == {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"}
    images = torch.rand(2, 3, 64 if "dinov3" in name else 32, 64 if "dinov3" in name else 32)
    torch.testing.assert_close(load_backbone(folder)(images), model(images), atol=1e-4, rtol=1e-4)
    code = (
        (folder / "README.md")
        .read_text()
        .split("```")[1]
        .removeprefix("python\n")
        .replace('"folder"', repr(str(folder)))
    )
    values: dict[str, Any] = {}
    exec(code, values)
    torch.testing.assert_close(values["features"], model(values["images"]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [("convnext_tiny", {"depths": [1, 1, 1, 1], "dims": [4, 8, 8, 8]}), ("whitened_vit", {"channels": [8, 8, 12]})],
)
def test_what_transformers_lacks_is_refused(name: str, kwargs: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    path, _ = saved(tmp_path, name, kwargs)
    with pytest.raises(UserError, match=f"transformers has no network that is {name}"):
        export(path, "transformers", tmp_path / "folder", backbone=name, backbone_kwargs=kwargs)
    assert not (tmp_path / "folder").exists()
