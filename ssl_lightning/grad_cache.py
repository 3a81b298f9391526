"""Batches larger than memory: the backbone takes them in chunks, the loss spans the whole batch (GradCache)."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssl_lightning.errors import UserError


def checked_chunk_size(chunk_size: int | None) -> int | None:
    """The chunk size, if it is valid.

    Args:
        chunk_size: Most images per backbone pass; None is the whole batch.

    Raises:
        UserError: It is less than 2.
    """
    if chunk_size is not None and chunk_size < 2:
        raise UserError(
            f"BatchNorm needs chunks of at least 2 images, not {chunk_size}; set --model.chunk_size to 2 or "
            "more, or to null for the whole batch in one pass."
        )
    return chunk_size


def encode_in_chunks(backbone: nn.Module, views: Sequence[Tensor], chunk_size: int | None) -> Tensor:
    """Features ``(V * B, embed_dim)`` of views, view by view, holding the activations of only one chunk in memory.

    Each chunk is computed twice: once for its features, and again when their gradient is known. The gradient is exact:
    random numbers and autocast are the same both times, BatchNorm moves its running statistics once, and a
    parameter gets one gradient, as DDP expects. BatchNorm in train mode takes its statistics per chunk. Source: Gao
    et al. 2021, Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, section 3, by torch's
    checkpoints.

    Args:
        backbone: Maps images to features.
        views: ``(B, 3, S, S)`` each, all of one size.
        chunk_size: Most images per pass; a pass takes images of only one view. None takes all views in one pass.
    """
    if chunk_size is None:
        return backbone(views[0] if len(views) == 1 else torch.cat(list(views)))

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _unmoved_buffers(backbone)

    features = []
    for view in views:
        chunks = view.tensor_split(-(-len(view) // chunk_size))  # sizes differ by at most one image
        features += [checkpoint(backbone, chunk, use_reentrant=False, context_fn=contexts) for chunk in chunks]
    return torch.cat(features)


@contextmanager
def _unmoved_buffers(module: nn.Module) -> Iterator[None]:
    """Undo what happens to the buffers: running statistics moved when the chunk was first computed."""
    before = [buffer.clone() for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, value in zip(module.buffers(), before, strict=True):
            buffer.data.copy_(value)  # not an operation to autograd, which may have saved the buffer
