"""What processes that train together agree on."""

from __future__ import annotations

import pytest

from gemma_tune.errors import EngineError
from gemma_tune.machine.world import ALONE, World, world_of
from tests.engines.worlds import run_in_each

COMPLETE = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "head", "MASTER_PORT": "29500"}


def test_the_place_of_a_process() -> None:
    assert world_of(COMPLETE) == World(rank=3, size=4, local_rank=1)
    assert not world_of(COMPLETE).is_main and ALONE.is_main


@pytest.mark.parametrize("environment", [{}, {"WORLD_SIZE": "4", "MASTER_ADDR": "head"}, {"RANK": "0"}])
def test_variables_of_other_programs_make_no_world(environment: dict[str, str]) -> None:
    assert world_of(environment) == ALONE


def test_half_a_world_is_told() -> None:
    with pytest.raises(EngineError, match=r"has a RANK, but MASTER_PORT is not set"):
        world_of({name: value for name, value in COMPLETE.items() if name != "MASTER_PORT"})
    with pytest.raises(EngineError, match=r"is not a number: .*'x'"):
        world_of({**COMPLETE, "WORLD_SIZE": "x"})


def test_a_process_alone_needs_nobody() -> None:
    assert ALONE.broadcast(lambda: 7) == 7 and ALONE.main_first(lambda: 8) == 8
    assert ALONE.all_gather("a") == ["a"] and ALONE.all_reduce(1, 2) == (1, 2)
    assert ALONE.gather_shards(ALONE.shard([1, 2, 3])) == [1, 2, 3]


def test_three_processes_agree() -> None:
    outputs = run_in_each(
        """
print("from main", world.broadcast(lambda: f"said by {world.rank}"))
print("gather", world.all_gather(world.rank * 10))
print("sum", world.all_reduce(world.rank, 0.1))
print("joined", world.gather_shards([item * 2 for item in world.shard(range(7))]))
import time
began = time.monotonic()
ends = world.all_gather(world.main_first(lambda: (time.sleep(0.3 if world.is_main else 0), time.monotonic())[1]))
print("in turn", ends[0] <= min(ends[1:]))
""",
        size=3,
    )
    expected = [
        "from main said by 0",
        "gather [0, 10, 20]",
        f"sum (3.0, {0.1 + 0.1 + 0.1})",
        "joined [0, 2, 4, 6, 8, 10, 12]",
        "in turn True",
    ]
    assert [output.splitlines() for output in outputs] == [expected] * 3


def test_a_mistake_that_process_0_meets_is_raised_in_all() -> None:
    outputs = run_in_each(
        """
def fail():
    raise RunError("no room", hint="make some")
for ask in (world.broadcast, world.main_first):
    try:
        ask(fail)
    except RunError as error:
        print(error.message, error.hint)
"""
    )
    assert outputs == ["no room make some\n" * 2] * 2


def test_a_process_that_has_gone_is_told_in_a_sentence() -> None:
    left, gone = run_in_each(
        """
if world.rank == 1:
    os._exit(7)
try:
    with explain_lost_processes():
        world.all_gather(1)
except ProcessLost as error:
    print(error.message)
    os._exit(0)
"""
    )
    assert left.startswith("the connection to another process of this training broke") and gone == ""
