"""Self-supervised vision pretraining: faithful methods as PyTorch Lightning modules.

The notebooks, with their output: [quickstart](notebooks/01_quickstart.html),
[your own method](notebooks/02_your_own_method.html),
[monitoring and evaluation](notebooks/03_monitoring_and_evaluation.html),
[methods side by side](notebooks/04_methods_side_by_side.html),
[start from a foundation model](notebooks/05_start_from_a_foundation_model.html).
"""

import os

# Large pages for large CPU tensors, which torch looks up when it allocates the first: DINO's views are augmented 1.1 to
# 1.2 times as fast. The modules below import torch.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

from ssl_lightning.callbacks.checkpoint import BestCheckpoint, LastCheckpoint
from ssl_lightning.callbacks.embedding_writer import EmbeddingWriter, read_embeddings
from ssl_lightning.callbacks.forgetting_alarm import ForgettingAlarm
from ssl_lightning.callbacks.health_monitor import HealthMonitor
from ssl_lightning.callbacks.knn_probe import KNNProbe
from ssl_lightning.callbacks.linear_probe import LinearProbe
from ssl_lightning.callbacks.loss_floor_alarm import LossFloorAlarm
from ssl_lightning.callbacks.pictures import Pictures
from ssl_lightning.callbacks.progress import ProgressBar, Throughput
from ssl_lightning.callbacks.run_record import RunRecord
from ssl_lightning.callbacks.segmentation_probe import SegmentationProbe
from ssl_lightning.callbacks.view_grid import ViewGrid
from ssl_lightning.commands.evaluate import DepthEvaluation, Evaluation, SegmentationEvaluation
from ssl_lightning.data.arrays import ArrayData
from ssl_lightning.data.base import SSLDataModule
from ssl_lightning.data.dense import COCODetectionData, VOCDetectionData, VOCSegmentationData
from ssl_lightning.data.depth import DepthData
from ssl_lightning.data.digits import DigitsData
from ssl_lightning.data.fake import FakeData
from ssl_lightning.data.folder import ImageFolderData
from ssl_lightning.data.huggingface import HuggingFaceData
from ssl_lightning.data.images import DatasetImages, ImageArray, ImageFiles, Images
from ssl_lightning.data.shards import ShardsData
from ssl_lightning.data.stream import ImageStream
from ssl_lightning.data.torchvision import CIFAR10Data, CIFAR100Data, STL10Data, TorchvisionData
from ssl_lightning.data.views import ViewSpec
from ssl_lightning.errors import UserError
from ssl_lightning.evaluation.detection import ObjectDetector
from ssl_lightning.evaluation.finetune import FineTune
from ssl_lightning.evaluation.linear import LinearClassifier
from ssl_lightning.evaluation.segmentation import SemanticSegmenter
from ssl_lightning.lars import LARC, LARS
from ssl_lightning.messages import drop_noise
from ssl_lightning.methods.barlow_twins import BarlowTwins
from ssl_lightning.methods.base import SSLModule
from ssl_lightning.methods.beit import BEiT
from ssl_lightning.methods.byol import BYOL
from ssl_lightning.methods.capi import CAPI
from ssl_lightning.methods.deepcluster_v2 import DeepClusterV2
from ssl_lightning.methods.dino import DINO
from ssl_lightning.methods.dinov2 import DINOv2
from ssl_lightning.methods.distillation import Distillation
from ssl_lightning.methods.gram_anchoring import GramAnchoring
from ssl_lightning.methods.ibot import IBOT
from ssl_lightning.methods.ijepa import IJEPA
from ssl_lightning.methods.image_tokenizer import ImageTokenizer
from ssl_lightning.methods.jigsaw import Jigsaw
from ssl_lightning.methods.lejepa import LeJEPA
from ssl_lightning.methods.mae import MAE
from ssl_lightning.methods.moco_v2 import MoCoV2
from ssl_lightning.methods.moco_v3 import MoCoV3
from ssl_lightning.methods.nnclr import NNCLR
from ssl_lightning.methods.npid import NPID
from ssl_lightning.methods.resa import ReSA
from ssl_lightning.methods.rotnet import RotNet
from ssl_lightning.methods.simclr import SimCLR
from ssl_lightning.methods.simdino import SimDINO
from ssl_lightning.methods.simdinov2 import SimDINOv2
from ssl_lightning.methods.simmim import SimMIM
from ssl_lightning.methods.simsiam import SimSiam
from ssl_lightning.methods.swav import SwAV
from ssl_lightning.methods.vicreg import VICReg
from ssl_lightning.methods.visreg import VISReg
from ssl_lightning.optim import Optim
from ssl_lightning.strategies import FSDP2Strategy

__version__ = "0.1.0"

drop_noise()

__all__ = [
    "BYOL",
    "CAPI",
    "DINO",
    "IBOT",
    "IJEPA",
    "LARC",
    "LARS",
    "MAE",
    "NNCLR",
    "NPID",
    "ArrayData",
    "BEiT",
    "BarlowTwins",
    "BestCheckpoint",
    "CIFAR10Data",
    "CIFAR100Data",
    "COCODetectionData",
    "DINOv2",
    "DatasetImages",
    "DeepClusterV2",
    "DepthData",
    "DepthEvaluation",
    "DigitsData",
    "Distillation",
    "EmbeddingWriter",
    "Evaluation",
    "FSDP2Strategy",
    "FakeData",
    "FineTune",
    "ForgettingAlarm",
    "GramAnchoring",
    "HealthMonitor",
    "HuggingFaceData",
    "ImageArray",
    "ImageFiles",
    "ImageFolderData",
    "ImageStream",
    "ImageTokenizer",
    "Images",
    "Jigsaw",
    "KNNProbe",
    "LastCheckpoint",
    "LeJEPA",
    "LinearClassifier",
    "LinearProbe",
    "LossFloorAlarm",
    "MoCoV2",
    "MoCoV3",
    "ObjectDetector",
    "Optim",
    "Pictures",
    "ProgressBar",
    "ReSA",
    "RotNet",
    "RunRecord",
    "SSLDataModule",
    "SSLModule",
    "STL10Data",
    "SegmentationEvaluation",
    "SegmentationProbe",
    "SemanticSegmenter",
    "ShardsData",
    "SimCLR",
    "SimDINO",
    "SimDINOv2",
    "SimMIM",
    "SimSiam",
    "SwAV",
    "Throughput",
    "TorchvisionData",
    "UserError",
    "VICReg",
    "VISReg",
    "VOCDetectionData",
    "VOCSegmentationData",
    "ViewGrid",
    "ViewSpec",
    "read_embeddings",
]
