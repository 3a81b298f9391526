"""Evaluation on images with or without labels, by published protocols."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from ssl_lightning.commands.evaluate.without_labels import WithoutLabels, as_list
from ssl_lightning.data.base import SSLDataModule
from ssl_lightning.errors import UserError
from ssl_lightning.evaluation.corruptions import CORRUPTIONS
from ssl_lightning.evaluation.features import Corruption, Features, LabelledFeatures, extract, labels_of
from ssl_lightning.evaluation.finetune import FINETUNE_PROTOCOLS, FineTune
from ssl_lightning.evaluation.knn import knn_grid, knn_predict
from ssl_lightning.evaluation.linear import LINEAR_PROTOCOLS, LinearClassifier, best_head
from ssl_lightning.evaluation.lowshot import low_shot
from ssl_lightning.evaluation.results import Results, interval
from ssl_lightning.evaluation.retrieval import retrieval
from ssl_lightning.evaluation.supervised import labelled_share, named_protocol
from ssl_lightning.loggers import AppendingCSVLogger
from ssl_lightning.runs import new_evaluation


class Evaluation(WithoutLabels):
    """What to evaluate: a backbone, on images; ``clusters`` and ``quality`` need no labels.

    Each protocol prints nothing, writes ``results.json`` and returns its ``Results``; processes other than the first
    get None. Images are prepared as in the training of the backbone, unless ``data`` says otherwise.

    Args:
        checkpoint: A checkpoint file, a folder of weights or ``hf-hub:NAME``; or the name of a timm or torchvision
            model, to use its pretrained weights; or the baseline ``untrained`` (random weights) or ``pixels``.
        data: Training and validation images, with labels for most protocols. The command line defaults to the data of
            the checkpoint's run.
        backbone: Name of the timm or torchvision model; only for ``untrained`` and for checkpoints that do not name it.
        backbone_kwargs: Arguments that build the backbone, e.g. ``{img_size: 96}``.
        branch: Which network of the checkpoint to read, by a part of its name, e.g. student; None follows the paper.
        max_samples: Number of training images to use, evenly spread over the training set; None uses all.
        seed: Seed for initial weights, the order of images and other random choices.
        output: Folder in which ``PROTOCOL/results.json`` is written; None is ``evaluations`` in the checkpoint's run.
        trainer: Arguments of Lightning's Trainer, e.g. ``{devices: 2, precision: bf16-mixed}``; one device by default.
    """

    def __init__(
        self,
        checkpoint: str,
        data: SSLDataModule,
        backbone: str | None = None,
        backbone_kwargs: dict[str, Any] | None = None,
        branch: str | None = None,
        max_samples: int | None = None,
        seed: int = 0,
        output: str | None = None,
        trainer: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(checkpoint, backbone, backbone_kwargs, branch, seed, output, trainer)
        self.data, self.max_samples = data, max_samples

    def knn(self, k: int | list[int] | None = None, temperature: float | list[float] | None = None) -> Results | None:
        """Weighted k-nearest-neighbor accuracy for each k and temperature; reports k = 20 if it is tried.

        Wu et al. 2018, Instance Discrimination, section 3.4; the online probe computes the same number.

        Args:
            k: Number of neighbors, or a list to try; None tries 10, 20, 100 and 200, if there are that many images.
            temperature: Divides the cosine similarities; a number or a list to try. None is 0.07.

        Raises:
            UserError: A k is larger than the number of training images, or smaller than 1.
        """
        if (features := self._features()) is None:
            return None
        size = len(features.train.labels)
        ks = _neighbors(k, size, [number for number in (10, 20, 100, 200) if number <= size] or [size])
        _check_positive(temperature=temperature)
        temperatures = as_list(temperature) or [0.07]
        (bank, labels), (queries, truth) = map(self._on_device, (features.train, features.test))
        grid = knn_grid(bank, labels, queries, features.num_classes, ks, temperatures)
        accuracies = {setting: _accuracy(predicted, truth) for setting, predicted in grid.items()}
        rows = [{"k": k, "temperature": t, "top-1, %": 100 * accuracy} for (k, t), accuracy in accuracies.items()]
        chosen = (20 if 20 in ks else ks[0], temperatures[0])
        parameters = {"k": ks, "temperature": temperatures, "reported": {"k": chosen[0], "temperature": chosen[1]}}
        return self._results("knn", parameters, features, accuracies[chosen], rows)

    def linear(
        self,
        protocol: str = "sweep",
        lrs: float | list[float] | None = None,
        epochs: int | None = None,
        batch_size: int | None = None,
        augment: bool = False,
    ) -> Results | None:
        """Linear classifier on frozen features, by a paper's protocol; reports the accuracy after the last epoch.

        Where a protocol tries several learning rates or inputs, a tenth of the training images is held out to choose
        among them, and the chosen classifier is trained on all. The protocol of DINOv2 chooses on the test images, as
        published. With ``augment``, only that protocol may try several.

        Args:
            protocol: ``sweep`` (five learning rates, BatchNorm without affine parameters), or whose protocol: moco_v2,
                moco_v3, moco_v3_vit, simclr, byol, swav, dino_vit_small, dino_vit_base, dinov2, mae, simsiam,
                barlow_twins, vicreg, lightly.
            lrs: Base learning rate, or a list to try; None takes the protocol's.
            epochs: Number of epochs; None takes the protocol's.
            batch_size: Images per step; None takes the protocol's, or with ``augment`` the batch size of ``data``.
            augment: Whether to train on augmented images, as the papers do; costs hundreds of times more than
                training on features that are extracted once.

        Raises:
            UserError: The protocol is unknown, needs another backbone, or tries several settings with ``augment``.
        """
        _check_positive(lrs=lrs, epochs=epochs, batch_size=batch_size)
        chosen = named_protocol(LINEAR_PROTOCOLS, protocol)
        given: dict[str, Any] = {"lrs": tuple(as_list(lrs)), "epochs": epochs, "batch_size": batch_size}
        chosen = replace(chosen, **{key: value for key, value in given.items() if value})
        parameters: dict[str, Any] = {"protocol": protocol, "augment": augment, **asdict(chosen)}
        if augment:
            if len(chosen.choices) > 1 and not chosen.best_on_test:
                raise UserError(
                    f"--augment trains one classifier, and {protocol} tries {len(chosen.choices)}; give --lrs one "
                    "number, or choose another --protocol, e.g. simclr."
                )
            return self._trained("linear", LinearClassifier, chosen, parameters, batch_size=batch_size)
        if (features := self._features(chosen.last_blocks, chosen.patch_mean)) is None:
            return None
        parameters["batch_size"] = min(chosen.batch_size, len(features.train.labels))
        top1, rows = best_head(*features, chosen, self.seed, self._device)
        return self._results("linear", parameters, features, top1, rows)

    def lowshot(self, shots: int | list[int] | None = None, draws: int = 5) -> Results | None:
        """Logistic regression on features of a few images per class: mean and standard deviation over random draws.

        Reports the mean for the largest number of images per class, with the confidence interval of that mean.

        Args:
            shots: Images per class, a number or a list; None tries 1, 5 and 10 if there are that many.
            draws: Number of random draws of the images, at least 2.

        Raises:
            UserError: A class has fewer images.
        """
        if draws < 2:
            raise UserError(f"--draws {draws}: a standard deviation needs at least 2.")
        _check_positive(shots=shots)
        if (features := self._features()) is None:
            return None
        from scipy import stats  # only here: help texts should not wait for it

        fewest = int(features.train.labels.bincount().min())
        train, (queries, truth) = features.train, (features.test.features.flatten(1), features.test.labels)
        bank, labels = train.features.flatten(1), train.labels
        seeds = [self.seed + draw for draw in range(draws)]
        rows, shots = [], sorted(as_list(shots) or [number for number in (1, 5, 10) if number <= fewest])
        mean = deviation = 0.0
        for few in shots:
            accuracies = [_accuracy(low_shot(bank, labels, queries, few, seed), truth) for seed in seeds]
            mean, deviation = float(torch.tensor(accuracies).mean()), float(torch.tensor(accuracies).std())
            rows.append({"per class": few, "top-1, %": 100 * mean, "deviation": 100 * deviation})
        half = float(stats.t.ppf(0.975, draws - 1)) * deviation / draws**0.5
        parameters = {"shots": shots, "draws": draws, "reported": {"shots": shots[-1]}}
        return self._results("lowshot", parameters, features, mean, rows, (mean - half, mean + half), seeds)

    def finetune(
        self,
        protocol: str = "swav_10percent",
        fraction: float = 1.0,
        epochs: int | None = None,
        lr: float | None = None,
        head_lr: float | None = None,
    ) -> Results | None:
        """Fine-tune the whole network on all labels or a share of them; reports the accuracy after the last epoch.

        Args:
            protocol: Whose protocol: mae_vit_base, mae_vit_large, mae_vit_huge; for a share of the labels
                simclr_1percent, simclr_10percent, swav_1percent, swav_10percent, barlow_twins_1percent,
                vicreg_1percent, vicreg_10percent. Learning rates are for 256 images and scale with data.batch_size.
            fraction: Share of each class's images to train on, from 0 to 1, drawn by ``seed``.
            epochs: Number of epochs; None takes the protocol's.
            lr: Base learning rate; None takes the protocol's.
            head_lr: Base learning rate of the classifier; None takes the protocol's.

        Raises:
            UserError: The protocol is unknown, or needs another backbone.
        """
        if not 0 < fraction <= 1:
            raise UserError(f"--fraction {fraction} is not a share of the labels; give a number above 0, up to 1.")
        _check_positive(epochs=epochs)
        chosen = named_protocol(FINETUNE_PROTOCOLS, protocol)
        optim = chosen.optim if lr is None else replace(chosen.optim, base_lr=lr)
        chosen = replace(chosen, optim=optim, epochs=epochs or chosen.epochs, head_lr=head_lr or chosen.head_lr)
        parameters = {"protocol": protocol, "fraction": fraction, **asdict(chosen)}
        return self._trained("finetune", FineTune, chosen, parameters, fraction)

    def retrieval(self, k: int | list[int] | None = None) -> Results | None:
        """Rank the training images by similarity to each test image: mean average precision and recall at k.

        Args:
            k: Number of nearest images, or a list; None is 1, 5 and 10.

        Raises:
            UserError: A k is larger than the number of training images, or smaller than 1.
        """
        if (features := self._features()) is None:
            return None
        ks = sorted(_neighbors(k, len(features.train.labels), [1, 5, 10]))
        measures = retrieval(*self._on_device(features.train), *self._on_device(features.test), ks)
        rows = [{"measure": name, "%": 100 * value} for name, value in measures.items()]
        return self._results("retrieval", {"k": ks}, features, measures[f"recall@{ks[0]}"], rows)

    def robustness(self, k: int = 20, temperature: float = 0.07) -> Results | None:
        """KNN accuracy on noisy, blurred, darker, brighter and rotated test images, and how far their features move.

        The training images are clean. Reports the mean accuracy over all changes.

        Args:
            k: Number of neighbors.
            temperature: Divides the cosine similarities.
        """
        features = self._features()
        changed = {name: self._features(corruption=corruption) for name, corruption in CORRUPTIONS.items()}
        if features is None:
            return None
        _neighbors(k, len(features.train.labels), [])
        _check_positive(temperature=temperature)
        (bank, labels), (clean, truth) = map(self._on_device, (features.train, features.test))
        rows, accuracies = [], []
        for name, features_of_change in [("none", features), *changed.items()]:
            assert features_of_change is not None
            queries, _ = self._on_device(features_of_change.test)
            predicted = knn_predict(bank, labels, queries, features.num_classes, k, temperature)
            accuracies.append(_accuracy(predicted, truth))
            similarity = float(torch.cosine_similarity(queries, clean).mean())
            rows.append({"change": name, "top-1, %": 100 * accuracies[-1], "similarity to clean": similarity})
        mean = sum(accuracies[1:]) / len(accuracies[1:])
        return self._results("robustness", {"k": k, "temperature": temperature}, features, mean, rows)

    # Shared by the protocols

    def _features(
        self, last_blocks: int = 1, patch_mean: bool = False, corruption: Corruption | None = None
    ) -> Features | None:
        trainer = self._trainer()
        return extract(self.pretrained, self.data, trainer, self.max_samples, last_blocks, patch_mean, corruption)

    def _on_device(self, labelled: LabelledFeatures) -> tuple[Tensor, Tensor]:
        """Features ``(N, P * D)`` and their labels."""
        return labelled.features.flatten(1).to(self._device), labelled.labels.to(self._device)

    def _trained(
        self,
        protocol: str,
        classifier: type[LinearClassifier] | type[FineTune],
        chosen: Any,
        parameters: dict[str, Any],
        fraction: float = 1.0,
        batch_size: int | None = None,
    ) -> Results | None:
        """Train on labeled images; the curves are written next to the results."""
        L.seed_everything(self.seed, verbose=False)
        module = classifier(self.checkpoint, self.backbone, self.backbone_kwargs, chosen, self.branch)
        data, epochs = labelled_share(self.data, fraction, self.seed), chosen.epochs
        folder = new_evaluation(self.checkpoint, protocol, self.output)
        trainer = self._trainer(
            max_epochs=epochs,
            logger=AppendingCSVLogger(folder.parent, folder.name, ""),
            log_every_n_steps=10,
            num_sanity_val_steps=0,
            check_val_every_n_epoch=next(n for n in range(max(1, epochs // 10), 0, -1) if epochs % n == 0),
        )
        data.batch_size = data.batch_size if batch_size is None else max(2, batch_size // trainer.world_size)
        trainer.fit(module, datamodule=data)
        if not trainer.is_global_zero:
            return None
        rows: list[dict[str, Any]] = [{"top-1, %": 100 * accuracy} for accuracy in module.accuracies]
        if isinstance(module, LinearClassifier) and len(rows) > 1:
            rows = [{**label, **row} for label, row in zip(module.protocol.labels, rows, strict=True)]
        parameters = {**parameters, "batch_size": data.batch_size * trainer.world_size}
        best = max(module.accuracies)
        return self._results(protocol, parameters, labels_of(data), best, rows, data=data, folder=folder)

    def _results(
        self,
        protocol: str,
        parameters: dict[str, Any],
        features: Features,
        top1: float,
        rows: list[dict[str, Any]],
        bounds: tuple[float, float] | None = None,
        seeds: list[int] | None = None,
        data: SSLDataModule | None = None,
        folder: Path | None = None,
    ) -> Results:
        data = data or self.data
        bounds = bounds or interval(top1, len(features.test.labels))
        return self._written(
            protocol,
            {**parameters, "max_samples": self.max_samples},
            self._facts(data, len(features.train.labels), len(features.test.labels), features.num_classes),
            rows,
            accuracy={"top1": top1, "interval": bounds},
            seeds=seeds,
            folder=folder,
        )


def _neighbors(k: Any, size: int, default: list[int]) -> list[int]:
    ks = as_list(k) or default
    if not all(1 <= number <= size for number in ks):
        raise UserError(f"--k {ks} must lie between 1 and {size}, the number of labeled training images.")
    return ks


def _check_positive(**options: Any) -> None:
    """Raise a UserError if an option, or a number of its list, is not above 0."""
    for name, value in options.items():
        if not all(number > 0 for number in as_list(value)):
            raise UserError(f"--{name} {value}: give numbers above 0.")


def _accuracy(predicted: Tensor, truth: Tensor) -> float:
    return float((predicted == truth).cpu().double().mean())
