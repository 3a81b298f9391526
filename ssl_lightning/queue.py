"""Queue of the newest embeddings."""

import torch
from torch import Tensor, nn

from ssl_lightning.errors import UserError


class Queue(nn.Module):
    """The newest embeddings of all processes, first in, first out; the same on every process, saved with the method.

    A ring of rows. Own code because lightly's memory bank is left out of checkpoints and drops rows where it wraps.

    Args:
        rows: ``(K, ...)``, the initial content.

    Attributes:
        rows: ``(K, ...)``.
        written: Rows written so far.
    """

    rows: Tensor

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", rows)
        self.written = 0

    def check(self, global_batch: int) -> None:
        """Check that the queue holds a whole number of global batches.

        Args:
            global_batch: Images per step over all processes.

        Raises:
            UserError: It does not; the message gives a length that does.
        """
        length = len(self.rows)
        if length < global_batch or length % global_batch:
            near = max(global_batch, length // global_batch * global_batch)
            raise UserError(
                f"--model.queue_length={length} is not a multiple of the global batch of {global_batch} images; set it "
                f"to {near}, or change --data.batch_size."
            )

    def push(self, rows: Tensor) -> None:
        """Write the rows of a global batch over the oldest ones.

        Args:
            rows: ``(N, ...)``, the same on every process, not more than the queue holds.
        """
        start = self.written % len(self.rows)
        before_the_end = min(len(rows), len(self.rows) - start)
        self.rows[start : start + before_the_end] = rows[:before_the_end]
        self.rows[: len(rows) - before_the_end] = rows[before_the_end:]
        self.written += len(rows)

    def get_extra_state(self) -> Tensor:
        """Rows written so far; counted on the host, as reading a counter on the device would wait for it."""
        return torch.tensor(self.written)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the number of rows written."""
        self.written = int(state)
