"""ResNets: torchvision's names, lightly's numbers, and transformers' names."""

from ssl_lightning.checkpoints.layouts.layout import Layout

TORCHVISION = Layout(
    "torchvision's ResNet",
    first=r"conv1\.weight",
    sign=r"layer1\.0\.",
    renamed={r"\.shortcut\.": ".downsample."},  # lightly's ResNetGenerator
)

SEQUENTIAL = Layout(
    "the children of a torchvision ResNet by number",
    first=r"0\.weight",
    sign=r"4\.0\.conv1\.",
    renamed={
        r"^0\.": "conv1.",
        r"^1\.": "bn1.",
        r"^([4-7])\.": lambda match: f"layer{int(match[1]) - 3}.",
    },
)

SEQUENTIAL_GENERATOR = Layout(
    "the children of lightly's ResNetGenerator by number",
    first=r"0\.weight",
    sign=r"2\.0\.conv1\.",
    renamed={
        r"^0\.": "conv1.",
        r"^1\.": "bn1.",
        r"^([2-5])\.": lambda match: f"layer{int(match[1]) - 1}.",
        r"\.shortcut\.": ".downsample.",
    },
    refused="it was trained without the ReLU after bn1, which is no child of the network",
)


TRANSFORMERS = Layout(
    "transformers' ResNet",
    first=r"embedder\.embedder\.convolution\.weight",
    sign=r"encoder\.stages\.0\.",
    renamed={
        r"^embedder\.embedder\.convolution\.": "conv1.",
        r"^embedder\.embedder\.normalization\.": "bn1.",
        r"^encoder\.stages\.(\d+)\.layers\.": lambda match: f"layer{int(match[1]) + 1}.",
        r"\.layer\.(\d+)\.convolution\.": lambda match: f".conv{int(match[1]) + 1}.",
        r"\.layer\.(\d+)\.normalization\.": lambda match: f".bn{int(match[1]) + 1}.",
        r"\.shortcut\.convolution\.": ".downsample.0.",
        r"\.shortcut\.normalization\.": ".downsample.1.",
    },
)

LAYOUTS = (TORCHVISION, SEQUENTIAL, SEQUENTIAL_GENERATOR, TRANSFORMERS)
