"""The command ``evaluate``: what frozen or fine-tuned features are worth, by published protocols."""

import json
from collections.abc import Sequence
from pathlib import Path

from ssl_lightning.commands.evaluate.images import Evaluation
from ssl_lightning.commands.evaluate.masks import DepthEvaluation, SegmentationEvaluation
from ssl_lightning.errors import UserError
from ssl_lightning.runs import data_of_run

__all__ = ["PROTOCOLS", "DepthEvaluation", "Evaluation", "SegmentationEvaluation", "run"]

PROTOCOLS = ("knn", "linear", "lowshot", "finetune", "retrieval", "robustness", "clusters", "quality")
"""The protocols on images."""
_ON_MASKS = ("segmentation_knn", "segmentation_linear")
_MISSING = {
    **dict.fromkeys(
        _ON_MASKS, "images with masks. For example: --data VOCSegmentationData --data.root VOCdevkit/VOC2012"
    ),
    "depth": "images with depth maps. For example: --data DepthData --data.root nyu --data.depth_scale 0.001",
}


def run(words: Sequence[str]) -> None:
    """Run the command.

    Args:
        words: The command line after ``evaluate``.
    """
    # Only here, as it takes half a second: `import ssl_lightning` imports this file for Evaluation.
    from ssl_lightning.arguments import run_method

    words = _with_data_of_the_run([*words])
    kinds = {**dict.fromkeys(PROTOCOLS, Evaluation), **dict.fromkeys(_ON_MASKS, SegmentationEvaluation)}
    kinds["depth"] = DepthEvaluation
    results = run_method(kinds, "ssl-lightning evaluate", "Evaluate a backbone.", words)
    if results is not None:  # on the first process
        print(results)


def _with_data_of_the_run(words: list[str]) -> list[str]:
    """Add the data of the run that wrote the checkpoint, unless ``--data`` is given; its views only if they count."""
    options = [word.partition("=")[0] for word in words]
    if "--data" in options or "--config" in options or "--checkpoint" not in options:
        return words
    if (missing := _MISSING.get(words[0])) is not None:  # which the run has none of
        raise UserError(f"missing: --data, {missing}")
    place = options.index("--checkpoint")
    checkpoint = Path(words[place].partition("=")[2] or "".join(words[place + 1 : place + 2]))
    data = data_of_run(checkpoint, views=words[0] == "quality")
    return words if data is None else [words[0], "--data", json.dumps(data), *words[1:]]
