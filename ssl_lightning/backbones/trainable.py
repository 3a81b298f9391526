"""Which parameters of a backbone are trained."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

from ssl_lightning.backbones.low_rank import add_low_rank
from ssl_lightning.backbones.tokens import blocks_in
from ssl_lightning.errors import UserError

Projection = Literal["q", "k", "v", "proj"]


@dataclass(frozen=True)
class LoRA:
    """Low-rank updates of the attention (Hu et al. 2021), with some blocks trained whole (ExPLoRA, Khanna et al. 2024).

    Args:
        rank: Rank of the updates.
        alpha: Updates are scaled by alpha / rank; None is a scale of 1.
        projections: Projections of the attention that get updates: of queries, keys, values, and the output (proj).
        whole_blocks: Number of last blocks that are trained whole, with the norm after them, and get no updates.
    """

    rank: int = 16
    alpha: float | None = None
    projections: tuple[Projection, ...] = ("q", "v")
    whole_blocks: int = 1


@dataclass(frozen=True)
class Trainable:
    """Parts of the backbone that are trained; everything else in it is frozen.

    Args:
        last_blocks: Number of last blocks, with the norm after them.
        norms: Whether the weights and biases of all norms.
        lora: Low-rank updates of the other blocks' attention.
    """

    last_blocks: int | None = None
    norms: bool = False
    lora: LoRA | None = None


Choice = Literal["all", "norms", "lora"] | Trainable
"""What ``trainable`` of a method may be: ``norms`` and ``lora`` stand for a ``Trainable`` with its defaults."""


def chosen(given: Any) -> Trainable | None:
    """What is trained, or None if it is all.

    Args:
        given: A ``Choice``, or a ``Trainable`` as the dicts that a checkpoint or a notebook holds.

    Raises:
        UserError: There is no such choice.
    """
    if isinstance(given, dict):
        lora = given.get("lora")
        try:
            if isinstance(lora, dict):
                lora = LoRA(**{**lora, "projections": tuple(lora.get("projections", LoRA.projections))})
            given = Trainable(**{**given, "lora": lora})
        except TypeError as error:
            wrong = str(error).partition("() ")[2]
            raise UserError(f"--model.trainable {wrong}; it takes last_blocks, norms and lora.") from error
    if given == "all" or isinstance(given, Trainable):
        return None if given == "all" else given
    if given in ("norms", "lora"):
        return Trainable(norms=True) if given == "norms" else Trainable(lora=LoRA())
    raise UserError(f"--model.trainable={given} must be all, norms, lora, or give last_blocks, norms or lora.")


def restrict(backbone: nn.Module, trainable: Trainable, patch_embed: bool = False) -> None:
    """Freeze all of a backbone but what is to be trained, and add its low-rank updates.

    Args:
        backbone: Changed in place.
        trainable: What is trained. What does not learn at all, e.g. fixed positions, stays frozen.
        patch_embed: Whether the first layer is trained, too.

    Raises:
        UserError: The backbone has no such parts, or nothing would be trained.
    """
    blocks = blocks_in(backbone)
    lora = trainable.lora
    option = "--model.trainable.last_blocks"
    if lora is not None:
        if trainable.last_blocks is not None:
            raise UserError(f"with LoRA, set --model.trainable.lora.whole_blocks instead of {option}.")
        option = "--model.trainable.lora.whole_blocks" if blocks else "--model.trainable.lora"
    whole = trainable.last_blocks if lora is None else lora.whole_blocks
    parts = [] if whole is None else last_parts(backbone, whole, option)
    if trainable.norms:
        within = (part for part in backbone.modules() if part is not backbone)  # whose class may be called NormFreeNet
        parts += [part for part in within if "Norm" in type(part).__name__]
    learning = {id(p) for part in parts for p in part.parameters()}
    first = of_first_layer(backbone) if patch_embed else set()
    for name, p in backbone.named_parameters():
        p.requires_grad_(p.requires_grad and (id(p) in learning or name in first))
    if lora is not None:
        for block in blocks[: len(blocks) - lora.whole_blocks]:
            _add(block, lora)
    if not any(p.requires_grad for p in backbone.parameters()):
        raise UserError("--model.trainable leaves nothing of the backbone to train; set it to all, or choose more.")


def last_parts(backbone: nn.Module, count: int, option: str) -> list[nn.Module]:
    """The last blocks of a backbone, and the norm after them.

    Args:
        backbone: Any.
        count: Number of blocks; with 0 there is no norm either.
        option: The option that asks for them, for messages.

    Raises:
        UserError: The backbone has fewer blocks.
    """
    blocks = blocks_in(backbone)
    if not blocks:
        raise UserError(
            f"{option}: the backbone has no blocks; set --model.backbone to a ViT of timm, or leave the option out."
        )
    if not 0 <= count <= len(blocks):
        raise UserError(f"{option} {count}: the backbone has {len(blocks)} blocks.")
    norms = [part for name, part in backbone.named_children() if name in ("norm", "fc_norm", "attn_pool")]
    return [*blocks[len(blocks) - count :], *(norms if count else [])]


def of_first_layer(backbone: nn.Module) -> set[str]:
    """Names of the parameters that see the channels of the images: a ViT's patch projection, or the first convolution.

    Args:
        backbone: Any.
    """
    convolution = next((name for name, part in backbone.named_modules() if isinstance(part, nn.Conv2d)), None)
    names = [name for name, _ in backbone.named_parameters()]
    return {name for name in names if name.startswith("patch_embed.") or name.rpartition(".")[0] == convolution}


def _add(block: nn.Module, lora: LoRA) -> None:
    """Add the updates to the attention of a block."""
    attention: Any = getattr(block, "attn", None)
    if lora.rank < 1 or not lora.projections or not {*lora.projections} <= {*get_args(Projection)}:
        raise UserError(
            "--model.trainable.lora needs a rank of 1 or more, and one or more projections of "
            f"{', '.join(get_args(Projection))}."
        )
    fused = getattr(attention, "qkv", None)
    layers: dict[str, tuple[Any, list[str]]] = {}
    for projection in lora.projections:
        if projection == "proj":
            layers["proj"] = (getattr(attention, "proj", None), ["all"])
        elif fused is not None:
            layers.setdefault("qkv", (fused, []))[1].append(projection)
        else:
            layers[projection] = (getattr(attention, f"{projection}_proj", None), ["all"])
    for layer, rows in layers.values():
        if type(layer) is not nn.Linear:
            raise UserError(
                "--model.trainable.lora adapts the attention of timm's ViTs, which the backbone does not have; set "
                "--model.backbone to such a ViT, or --model.trainable to norms or last_blocks."
            )
        add_low_rank(layer, rows, lora.rank, lora.rank if lora.alpha is None else lora.alpha)
    if getattr(attention, "qkv_bias_separate", None) is False:  # timm would read the weight and bypass the layer
        attention.qkv_bias_separate = True
