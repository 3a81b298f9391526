"""Run a function in real processes that train together (gloo); the processes are started once per session."""

import os
import time
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

import torch
import torch.distributed as dist

from ssl_lightning.distributed import free_port

FORKSERVER = get_context("forkserver")
"""Starts processes quickly, from one that has imported everything."""
FORKSERVER.set_forkserver_preload(["tests.small"])
_processes: list[Any] = []
"""A pool of one process for each rank, so that a rank stays where it is."""


def run_processes(function: Callable[..., Any], count: int, *arguments: Any) -> list[Any]:
    """``[function(rank, *arguments) for rank in range(count)]``, each in its own process of one group."""
    while len(_processes) < count:
        _processes.append(FORKSERVER.Pool(1))
    port, folder = free_port(), os.getcwd()
    calls = [
        process.apply_async(_run, (rank, count, port, folder, function, arguments))
        for rank, process in enumerate(_processes[:count])
    ]
    try:
        return [call.get(timeout=300) for call in calls]
    except BaseException:
        stop_processes()  # some may wait for the one that failed
        raise


def stop_processes() -> None:
    """End what ``run_processes`` has started; its next call starts new ones."""
    while _processes:
        _processes.pop().terminate()


def _run(
    rank: int, count: int, port: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> Any:
    torch.set_num_threads(1)
    os.chdir(folder)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ["LOCAL_RANK"] = str(rank)  # so that Lightning starts no processes of its own
    dist.init_process_group("gloo", rank=rank, world_size=count)
    try:
        return function(rank, *arguments)
    finally:
        time.sleep(0.05)  # torch 2.6 would wait forever for a thread that still needs the interpreter
        dist.destroy_process_group()
