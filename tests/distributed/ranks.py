"""Functions run by several processes of one gloo group."""

import multiprocessing
import os
import queue
import socket
import time
import traceback

import torch
import torch.distributed as dist

from nio_hf.errors import NIOError

# The server imports once what the processes, which it forks, then have at once. It has computed nothing, so autograd
# works in them.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "nio_hf", "nio_hf.trainer", "tests.core.cases"])


class RankFailedError(AssertionError):
    """What a process ended with."""


def run_ranks(size, function, *args, seconds=60.0):
    """The values that `function(*args)` returns on each of `size` ranks, from rank 0 on.

    An error of ours that it raises is returned in its place, anything else as a `RankFailedError` with the traceback. A
    `RankFailedError` is raised where not all ranks have ended in time.
    """
    results, port = _CONTEXT.Queue(), free_port()
    processes = [
        _CONTEXT.Process(target=_enter, args=(rank, size, port, results, function, args)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    found = {}
    deadline = time.monotonic() + seconds
    try:
        while len(found) < size:
            try:
                rank, value = results.get(timeout=max(deadline - time.monotonic(), 0.01))
            except queue.Empty:
                missing = sorted(set(range(size)) - set(found))
                raise RankFailedError(f"ranks {missing} have not ended after {seconds} s; others: {found}") from None
            found[rank] = value
    finally:
        for process in processes:
            process.join(1)
            process.kill()
    return [found[rank] for rank in range(size)]


def free_port():
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _enter(rank, size, port, results, function, args):
    torch.set_num_threads(1)
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in environment.items()})
    dist.init_process_group("gloo", rank=rank, world_size=size)
    try:
        value = function(*args)
    except NIOError as error:
        value = error
    except BaseException:
        # Not every exception can be sent.
        value = RankFailedError(traceback.format_exc())
    results.put((rank, value))
    results.close()
    results.join_thread()
    dist.destroy_process_group()
