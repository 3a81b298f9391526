"""Loader: a DataLoader of whole batches that continues where an interrupted run stopped."""

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from ssl_lightning.errors import UserError, of_the_machine


class Loader:
    """A DataLoader whose data set makes whole batches, and which starts a resumed run at the right batch.

    It is not a ``torch.utils.data.DataLoader`` itself, so that Lightning does not change the order of the data.

    Args:
        dataset: Maps a key of ``sampler`` to a batch.
        sampler: The keys of this process, in order.
        num_workers: Number of worker processes.
        persistent: Whether the workers live longer than an epoch.
        position: Returns the epoch and the batch to start at. None leaves both to the sampler.

    Attributes:
        waited: Seconds spent waiting for batches.
        mark: Called with ``other`` when a batch is requested, and with ``loader`` when it has arrived.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        sampler: Any,
        num_workers: int,
        persistent: bool = False,
        position: Callable[[], tuple[int, int] | None] = lambda: None,
    ) -> None:
        self.sampler, self.batch_sampler = sampler, None  # where Lightning looks for set_epoch
        self.dataset, self.position = dataset, position
        self.num_workers, self.waited = num_workers, 0.0
        self.mark: Callable[[str], None] = _ignore_phase
        self._loader = DataLoader(
            dataset,
            sampler=None if isinstance(dataset, IterableDataset) else sampler,
            batch_size=None,
            num_workers=num_workers,
            collate_fn=_shared,
            persistent_workers=persistent and num_workers > 0,
            worker_init_fn=_leave_signals_to_the_trainer,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # its own: iterating must not advance the global generator
        )

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        # A generator: nothing starts before the first batch is requested. Lightning creates iterators it never uses,
        # and creates them before it has restored the epoch.
        if (position := self.position()) is not None:
            self.sampler.epoch, self.sampler.start = position
        drop = 0
        # worker 0 comes first: go back to its last turn, and drop the remaining batches
        if isinstance(self.dataset, IterableDataset):
            drop = self.sampler.start % max(1, self._loader.num_workers)
            self.sampler.start -= drop
        try:
            yield from self._timed(itertools.islice(self._loader, drop, None))
        except UserError as error:  # from a worker it comes with a traceback
            raise UserError(str(error).rsplit(f"{UserError.__name__}: ")[-1].strip()) from None
        except (OSError, RuntimeError) as error:
            if (cause := of_the_machine(error)) is None:
                raise
            raise cause from error

    def _timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        while True:
            self.mark("other")
            start = time.perf_counter()
            batch = next(batches, self)
            self.waited += time.perf_counter() - start
            if batch is self:
                return
            self.mark("loader")
            yield batch

    def state_dict(self) -> dict[str, int]:
        """What determines the order of the data. Lightning keeps the position in it."""
        order = self.sampler
        return {"images": order.size, "global_batch": order.batch_size * order.world_size, "seed": order.seed}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Warn if a resumed run sees the data in another order."""
        if changed := {key: value for key, value in self.state_dict().items() if state_dict.get(key, value) != value}:
            rank_zero_warn(
                f"the order of the data differs from the order in the resumed run: {changed}, was {state_dict}"
            )


def _ignore_phase(phase: str) -> None:
    """The ``mark`` of a loader that nobody times."""


def _shared(batch: Any) -> Any:
    """The batch, in shared memory if a worker made it.

    torch shares it later, in a thread whose errors it only prints: if the memory is full, training would wait forever.
    """
    if get_worker_info() is not None:
        for tensor in tree_leaves(batch):
            if isinstance(tensor, Tensor):
                tensor.share_memory_()
    return batch


def _leave_signals_to_the_trainer(_worker: int) -> None:
    """Ignore the signals by which schedulers stop a job: workers must live until the current step is saved.

    Schedulers signal all processes of a job. A SIGTERM from the process that a worker loads for still ends the worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):  # not on Windows
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_the_trainer, daemon=True).start()


def _end_with_the_trainer() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
