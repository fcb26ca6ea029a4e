"""The processes that train together, one a card, and what they have to agree on.

`torchrun` and `gemma-tune train --nproc` tell a process its place through the same environment variables. Only process
0 writes, and what it reads from a run it sends to the others, so that they need no disk in common.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from gemma_tune.errors import EngineError, GemmaTuneError, ProcessLost

Value = TypeVar("Value")


@dataclass(frozen=True)
class World:
    """This process, number `rank` from 0 of `size` in all machines, `local_rank` in its own, as its card.

    `broadcast`, `all_gather`, `all_reduce`, `main_first` and `gather_shards` are collective: all processes call them,
    in the same order. With one process they return at once."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def shards(self, data_parallel: str) -> bool:
        """Return whether the model is sharded over the processes."""
        return self.size > 1 and data_parallel == "fsdp"

    def broadcast(self, compute: Callable[[], Value]) -> Value:
        """Compute in process 0 and send the value to all; a GemmaTuneError of it is raised in all."""
        if self.size == 1:
            return compute()
        from torch import distributed

        box: list[Any] = [None, None]
        if self.is_main:
            try:
                box[0] = compute()
            except GemmaTuneError as error:
                box[1] = error
        distributed.broadcast_object_list(box, src=0)
        if box[1] is not None:
            raise box[1]
        value: Value = box[0]
        return value

    def all_gather(self, value: Value) -> list[Value]:
        """Return the values of all processes in the order of their ranks."""
        if self.size == 1:
            return [value]
        from torch import distributed

        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def all_reduce(self, *values: float) -> tuple[float, ...]:
        """Return the sums over all processes, in float64."""
        if self.size == 1:
            return values
        import torch

        total = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(total)
        return tuple(total.tolist())

    def main_first(self, compute: Callable[[], Value]) -> Value:
        """Compute in each process, in process 0 first: the others then find on the disk what it left there."""
        box: list[Value] = []
        self.broadcast(lambda: box.append(compute()))
        return box[0] if self.is_main else compute()

    def shard(self, items: Sequence[Value]) -> Sequence[Value]:
        """Return every `size`-th item, from the rank of this process on."""
        return items[self.rank :: self.size]

    def gather_shards(self, mine: Sequence[Value]) -> list[Value]:
        """Return the items of all processes in the order that they had before `shard`."""
        shares = self.all_gather(mine)
        return [shares[index % self.size][index // self.size] for index in range(sum(map(len, shares)))]


ALONE = World()


def world_of(environment: Mapping[str, str]) -> World:
    """Read this process's place from the variables that torchrun sets.

    Raises:
        EngineError: only some of them are there, or one is not a number.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    given = [name for name in names if name in environment]
    if "RANK" not in given or "LOCAL_RANK" not in given:  # schedulers set WORLD_SIZE and MASTER_ADDR for other programs
        return ALONE
    missing = [name for name in names if name not in given]
    if missing:
        raise EngineError(
            f"this process has a RANK, but {missing[0]} is not set",
            hint="start several processes with gemma-tune train --nproc N, or with torchrun",
        )
    try:
        rank, size, local_rank, _ = (int(environment[name]) for name in names if name != "MASTER_ADDR")
    except ValueError as error:
        raise EngineError(f"RANK, WORLD_SIZE, LOCAL_RANK or MASTER_PORT is not a number: {error}") from None
    return World(rank, size, local_rank)


@contextlib.contextmanager
def process_group(world: World) -> Iterator[None]:
    """Connect this process with the others, and give it its card.

    Objects and counts travel between the processors (gloo), gradients between the cards (nccl).

    Raises:
        EngineError: this machine has fewer cards than processes.
    """
    if world.size == 1:
        yield
        return
    import torch

    on_cuda = torch.cuda.is_available()
    if on_cuda:
        if world.local_rank >= torch.cuda.device_count():
            raise EngineError(
                f"process {world.rank} is number {world.local_rank} of its machine, which has "
                f"{torch.cuda.device_count()} cards",
                hint="start one process a card",
            )
        torch.cuda.set_device(world.local_rank)
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo")
    try:
        with explain_lost_processes():
            yield
    finally:
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def explain_lost_processes() -> Iterator[None]:
    """Raise ProcessLost where a connection between the processes breaks within the block."""
    try:
        yield
    except RuntimeError as error:
        from torch.distributed import DistError

        if isinstance(error, DistError) or "gloo" in str(error):
            raise ProcessLost(
                "the connection to another process of this training broke: it was killed, ran out of memory, or its "
                "machine has gone",
                hint="continue with --resume: the last checkpoint is whole",
            ) from error
        raise
