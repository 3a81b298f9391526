"""Run a function in several real processes that train together (gloo)."""

import os
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

import torch
import torch.distributed as dist

from ssl_lightning.distributed import free_port

FORKSERVER = get_context("forkserver")
"""Starts processes quickly, from one that has imported everything."""
FORKSERVER.set_forkserver_preload(["tests.test_contract"])


def run_processes(function: Callable[..., Any], count: int, *arguments: Any) -> list[Any]:
    """``[function(rank, *arguments) for rank in range(count)]``, each in its own process of one group."""
    port = free_port()
    with FORKSERVER.Pool(count) as pool:
        calls = [pool.apply_async(_run, (rank, count, port, function, arguments)) for rank in range(count)]
        return [call.get(timeout=300) for call in calls]


def _run(rank: int, count: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ["LOCAL_RANK"] = str(rank)  # so that Lightning starts no processes of its own
    dist.init_process_group("gloo", rank=rank, world_size=count)
    try:
        return function(rank, *arguments)
    finally:
        dist.destroy_process_group()
