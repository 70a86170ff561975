"""A stage as a real process with real sockets, killed or frozen in the middle of an answer: the
other ranks end with its name. The engine then continues over others. And stages end in order when
nothing is lost."""

from __future__ import annotations

import os
import queue
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from smolrun.errors import PeerLost, SmolrunError
from smolrun.mesh.mesh import Mesh
from smolrun.serving.batch import BatchResult
from smolrun.serving.engine import Engine
from smolrun.serving.messages import Cancel, Ready, Submit
from smolrun.serving.pipeline import PipelineHead, run_stage
from smolrun.serving.scheduler import Scheduler
from smolrun.serving.stage_runner import StageTimes
from smolrun.testing import run_ranks
from tests.mesh.test_processes import has_established_link
from tests.ports import free_ports
from tests.serving.fake_stage import VOCAB, FakeStage
from tests.serving.stage_process import join
from tests.serving.test_engine import CAPACITY, SLOTS, Client, request, stats_of
from tests.waiting import SOON_S

ROOT = Path(__file__).parents[2]


class Pipeline:
    """Ranks 0 and 1 as threads of this process, each with sockets of its own; rank 2 as a
    process."""

    def __init__(self, silence_s: float) -> None:
        self.ports, self._secret = free_ports(3), secrets.token_hex(32)
        self._silence_s = silence_s
        listed = ",".join(map(str, self.ports))
        arguments = ["2", self._secret, str(silence_s), listed]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.serving.stage_process", *arguments],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        self.scheduler = Scheduler(slots=SLOTS, capacity=CAPACITY, vocab_size=VOCAB, stages=3)
        self.client = Client(
            Engine(self.scheduler, lambda m: self.client.messages.put(m), max_message_bytes=10_000),
            stages=3,
        )
        self.middle: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def run(self) -> None:
        """The engine, on this thread."""
        threading.Thread(target=self._run_middle, name="rank-1", daemon=True).start()
        mesh = self._join(0)
        try:
            engine = self.client.engine
            engine.run(PipelineHead(mesh, [0, 1, 2], *self._stage(0), engine.on_result))
        finally:
            self.client.messages.put(None, timeout=SOON_S)
            mesh.close()

    def _run_middle(self) -> None:
        mesh = self._join(1)
        try:
            run_stage(mesh, [0, 1, 2], *self._stage(1))
            self.middle.put(None)
        except SmolrunError as error:
            self.middle.put(error)
        mesh.close()

    def _join(self, rank: int) -> Mesh:
        return join(rank, self._secret, self._silence_s, self.ports)

    @staticmethod
    def _stage(rank: int) -> tuple[FakeStage, StageTimes]:
        stage = FakeStage(rank, 3, slots=SLOTS, capacity=CAPACITY)
        return stage, StageTimes(stats_of(rank))


@pytest.fixture
def pipeline(request: pytest.FixtureRequest) -> Iterator[Pipeline]:
    pipeline = Pipeline(request.param)
    yield pipeline
    pipeline.process.kill()
    pipeline.process.communicate()


@pytest.mark.parametrize(
    ("signal_name", "pipeline"), [("SIGKILL", 50.0), ("SIGSTOP", 1.5)], indirect=["pipeline"]
)
def test_a_stage_lost_in_the_middle_of_an_answer_is_named(
    signal_name: str, pipeline: Pipeline
) -> None:
    if not hasattr(signal, signal_name):
        pytest.skip(f"this system has no {signal_name}")
    client, evidence = pipeline.client, []

    def lose_a_stage() -> None:
        assert isinstance(client.take(), Ready)
        client.engine.submit(request("answer", 5, 50))
        while len(client.tokens["answer", 0]) < 3:
            client.take()
        evidence.append(has_established_link(pipeline.process.pid, pipeline.ports))
        os.kill(pipeline.process.pid, getattr(signal, signal_name))
        while client.take() is not None:
            pass

    thread = threading.Thread(target=lose_a_stage, daemon=True)
    thread.start()
    with pytest.raises(PeerLost, match="lost rank 2"):
        pipeline.run()
    thread.join(SOON_S)
    assert evidence == [True]
    assert 3 <= len(client.tokens["answer", 0]) < 50
    assert "lost rank 2" in str(pipeline.middle.get(timeout=SOON_S))


@pytest.mark.parametrize("pipeline", [50.0], indirect=True)
def test_stages_end_in_order_when_rank_0_stops(pipeline: Pipeline) -> None:
    pipeline.client.messages = queue.Queue()
    pipeline.client.engine.submit(request("answer", 5, 50))  # before a token has flowed
    pipeline.client.engine.stop()
    pipeline.run()
    while pipeline.client.take() is not None:
        pass
    assert pipeline.client.finished["answer", 0].reason == "cancelled"
    assert pipeline.middle.get(timeout=SOON_S) is None
    assert pipeline.process.communicate(timeout=SOON_S)[0].strip() == "ended"
    assert pipeline.process.returncode == 0


def read_over_a_loss(client: Client, answers: list[Submit]) -> None:
    """Report a loss in the middle of the answers, and wait for their ends."""
    assert isinstance(client.take(), Ready)
    for one in answers:
        client.engine.submit(one)
    while not all(len(client.tokens[one.request, 0]) > 4 for one in answers):
        client.take()
    client.engine.on_result(PeerLost(2, 0, "silent"))
    while not isinstance(client.take(), Ready):
        pass
    client.wait(*answers)


def test_an_engine_goes_on_over_other_stages_where_its_own_are_lost() -> None:
    """Twice: in the middle of answers, and before a token has flowed again."""
    size = {"slots": SLOTS, "capacity": CAPACITY}
    answers = [request("greedy", 20, 30), request("choices", 9, 20, choices=2)]

    def schedule() -> Scheduler:
        return Scheduler(**size, vocab_size=VOCAB, chunk_tokens=8)

    client = Client(None, 1)  # type: ignore[arg-type]
    engine = client.engine = Engine(schedule(), client.messages.put, max_message_bytes=10_000)

    def lose() -> None:
        read_over_a_loss(client, answers)
        engine.stop()
        while client.take() is not None:
            pass

    def work(mesh: Mesh) -> list[int]:
        def run() -> int:
            runner = FakeStage(0, 1, **size)
            head = PipelineHead(mesh, [0], runner, StageTimes(stats_of(0)), engine.on_result)
            try:
                engine.run(head)
            except PeerLost:
                return -1
            return max(len(batch.token_ids) for batch in runner.batches)

        ends = [run()]
        engine.on_result(BatchResult(99))  # of the lost stages, and late
        engine.recover(schedule())
        engine.on_result(PeerLost(1, 1, "while it warms up"))
        engine.submit(Cancel("nobody"))  # comes while no stage is there
        ends.append(run())
        engine.recover(schedule())
        ends.append(run())
        client.messages.put(None, timeout=SOON_S)
        return ends

    thread = threading.Thread(target=lose, daemon=True)
    thread.start()
    ((*lost, most),) = run_ranks(1, work)
    thread.join(SOON_S)
    assert lost == [-1, -1]
    assert most > 1, "what was generated is computed again in chunks, as a prompt is"
    client.check(*answers)
    assert client.stats is not None and client.stats.prompt_tokens == 20 + 9
