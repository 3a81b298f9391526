"""Everyone's checkpoints: tiny files as other projects save them, with the features that their own code gave."""

import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from ssl_lightning import UserError
from ssl_lightning.checkpoints import load_backbone
from tests.small import slow_unless

ZOO = Path(os.environ.get("SSL_LIGHTNING_ZOO", Path(__file__).parents[2] / "shared" / "zoo"))
ENTRIES: list[dict[str, Any]] = json.loads((ZOO / "zoo.json").read_text())["entries"] if ZOO.is_dir() else []
QUICK = re.compile(
    r"lightning_hydra|dinov2_vits14_reg4_release|hf_swin|lightly_example_dino|timm_local_dir_prefix|capi"
)

pytestmark = pytest.mark.skipif(not ENTRIES, reason=f"no checkpoints in {ZOO}; set SSL_LIGHTNING_ZOO to their folder")


@pytest.fixture(scope="module")
def features() -> dict[str, Any]:
    return torch.load(ZOO / "features.pt")


@pytest.mark.parametrize("name", slow_unless(QUICK.match, [(entry["name"],) for entry in ENTRIES]))
def test_every_checkpoint_gives_the_features_of_its_source(name: str, features: dict[str, Any]) -> None:
    entry, known = next(entry for entry in ENTRIES if entry["name"] == name), features[name]
    path = entry["call"].format(path=ZOO / entry["file"])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            backbone = load_backbone(path, entry["backbone"], entry["backbone_kwargs"])
    except UserError:
        assert entry["expect"] != "agree"
        return
    assert entry["expect"] != "refuse"
    images = torch.randn(*known["shape"], generator=torch.Generator().manual_seed(known["seed"]))
    with torch.no_grad():
        found = backbone(images)
    known_features = (known["expected"], *known.get("alternatives", {}).values())
    accepted = [value for value in known_features if value.shape == found.shape]
    limits = [1e-4 * max(1.0, float(value.abs().max())) for value in accepted]
    apart = [float((found - value).abs().max()) for value in accepted]
    assert any(difference <= limit for difference, limit in zip(apart, limits, strict=True)), apart
