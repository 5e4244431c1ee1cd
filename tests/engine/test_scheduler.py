"""Plans, checked against an independent model of llama.cpp's unified cache; no llama.cpp, no clock."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from myllm.engine.device import Device
from myllm.engine.kv_cache import Remove
from myllm.engine.kv_layout import Crowd, Layout, Pool, Streams
from myllm.engine.scheduler import MIN_SHARED, Plan, Scheduler
from myllm.engine.sequence import Chunk, Sequence, in_turn

DEVICE = Device(2**30, max_rows=63, start_rows=16, step_tokens=512, mixed_tokens=63, embed_tokens=128)
ANSWER = 1000
"""Generated tokens are numbered from here, so that they never look like prompts."""


@dataclass
class Memory:
    """What llama.cpp would hold: cells of (position, token, slots), changed as it would be told."""

    n_cells: int = 0
    cells: list[tuple[int, int, set[int]]] = field(default_factory=list)

    def apply(self, plan: Plan) -> None:
        for operation in plan.operations:
            if isinstance(operation, Remove):
                for position, _, slots in self.cells:
                    if position >= operation.start:
                        slots.discard(operation.slot)
            else:
                for position, _, slots in self.cells:
                    if operation.source in slots and position < operation.length:
                        slots.add(operation.target)
            self.cells = [cell for cell in self.cells if cell[2]]

    def decode(self, chunk: Chunk) -> None:
        slot = chunk.sequence.slot
        assert slot is not None
        held = sorted((position, token) for position, token, slots in self.cells if slot.id in slots)
        assert held == list(enumerate(chunk.sequence.tokens[: chunk.start])), "the slot holds what precedes"
        for position in range(chunk.start, chunk.end):
            self.cells.append((position, chunk.sequence.tokens[position], {slot.id}))
        assert len(self.cells) <= self.n_cells, "the plan fits the cache"


@dataclass
class Simulation:
    """Runs plans on `Memory`; a step takes 0.1 s and a millisecond a token, an answer is counted up."""

    scheduler: Scheduler
    memory: Memory = field(default_factory=Memory)
    finished: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    plans: list[Plan] = field(default_factory=list)

    def step(self) -> Plan:
        plan = self.scheduler.plan()
        self.plans.append(plan)
        if plan.layout:
            self.memory = Memory()
        self.memory.apply(plan)
        if plan.grow_to:
            assert plan.grow_to > self.memory.n_cells
            self.scheduler.grown(plan.grow_to)
            self.memory = Memory(plan.grow_to)
            for sequence in self.scheduler.active:
                cached = list(enumerate(sequence.tokens[: sequence.n_cached]))
                self.memory.cells += [(p, t, {sequence.slot.id}) for p, t in cached]  # type: ignore[union-attr]
            return plan
        for chunk in plan.chunks:
            self.memory.decode(chunk)
        self.prompt_tokens += plan.prompt_tokens
        for chunk in plan.chunks:
            if chunk.sample:
                self.sample(chunk.sequence)
        self.scheduler.observe(plan, 0.1 + 0.001 * plan.prompt_tokens)
        return plan

    def sample(self, sequence: Sequence) -> None:
        sequence.tokens.append(ANSWER + len(sequence.tokens))
        if len(sequence.tokens) >= sequence.limit:
            self.scheduler.remove(sequence)
            self.finished.append(sequence.id)

    def run_until(self, finished: int) -> None:
        while finished not in self.finished:
            self.step()

    def run(self, most: int = 5000) -> None:
        for _ in range(most):
            if not (self.scheduler.active or self.scheduler.waiting):
                return
            self.step()
        raise AssertionError("the scheduler makes no progress")


def pool(max_cells: int, max_rows: int) -> Pool:
    return Pool(max_cells, max_rows, 128, DEVICE)


def simulation(max_cells: int = 4096, max_rows: int = 63, layout: Layout | None = None) -> Simulation:
    return Simulation(Scheduler(layout or pool(max_cells, max_rows), DEVICE))


def sequence(order: int, prompt: list[int], answer: int = 5, priority: int = 0, client: int = 0) -> Sequence:
    return Sequence(order, list(prompt), len(prompt) + answer, priority, order, client)


Request = tuple[int, int, int, int, int, int, int]
requests = st.lists(
    st.tuples(
        st.integers(0, 2),  # which shared beginning
        st.integers(0, 120),  # how much of it
        st.integers(1, 60),  # tokens of its own
        st.integers(1, 60),  # length of the answer
        st.integers(0, 1),  # priority
        st.integers(0, 30),  # steps until the next request comes
        st.integers(0, 3),  # client
    ),
    min_size=1,
    max_size=25,
)


@settings(deadline=None, max_examples=60)
@given(requests, st.sampled_from([256, 600, 4096]), st.sampled_from([1, 3, 63]))
def test_everybody_is_served_within_the_cells_whatever_comes(
    load: list[Request], max_cells: int, max_rows: int
) -> None:
    serve(simulation(max_cells, max_rows), load, max_cells)


@settings(deadline=None, max_examples=60)
@given(requests, st.data(), st.booleans())
def test_everybody_is_served_though_some_are_paused_now_and_then(
    load: list[Request], data: st.DataObject, isolated: bool
) -> None:
    run = simulation(600, 3, Streams(4, 512) if isolated else None)
    sequences = []
    for order, (family, shared, own, answer, priority, pause, client) in enumerate(load):
        prompt = [family * 10] * shared + [100 + order] * own
        sequences.append(sequence(order, prompt, answer, priority, client))
        run.scheduler.submit(sequences[-1])
        for _ in range(pause):
            run.step()
            s = data.draw(st.sampled_from(sequences))
            change = data.draw(st.sampled_from([run.scheduler.pause, run.scheduler.resume]))
            if s.id not in run.finished:
                change(s)
    for s in sequences:
        run.scheduler.resume(s)
    run.run()
    assert sorted(run.finished) == list(range(len(load)))


@settings(deadline=None, max_examples=30)
@given(requests)
def test_everybody_is_served_in_streams_too(load: list[Request]) -> None:
    run = simulation(layout=Streams(4, 512))
    serve(run, load, 4 * 512)
    assert all(not plan.operations or isinstance(plan.operations[0], Remove) for plan in run.plans)


def serve(run: Simulation, load: list[Request], max_cells: int) -> None:
    """Submits the load with its pauses; all of it is served and the cache stays in its bounds."""
    for order, (family, shared, own, answer, priority, pause, client) in enumerate(load):
        prompt = [family * 10] * shared + [100 + order] * own
        run.scheduler.submit(sequence(order, prompt, answer, priority, client))
        for _ in range(pause):
            run.step()
    run.run()
    assert sorted(run.finished) == list(range(len(load)))
    assert run.memory.n_cells <= max_cells


def test_a_burst_with_one_prefix_prefills_it_once() -> None:
    run = simulation()
    prefix = list(range(500))
    for order in range(10):
        run.scheduler.submit(sequence(order, [*prefix, 900 + order, order]))
    run.run()
    assert run.prompt_tokens <= 502 + 9 * 2


def test_a_follower_goes_its_own_way_when_its_leader_is_cancelled() -> None:
    run = simulation()
    leader = sequence(0, [*range(1500), 7])
    run.scheduler.submit(leader)
    run.scheduler.submit(sequence(1, [*range(1500), 8]))
    run.step()
    run.step()
    assert [s.id for s in run.scheduler.active] == [0]
    run.scheduler.remove(leader)
    run.run()
    assert run.finished == [1]


def test_a_prefix_too_short_to_wait_for_is_prefilled_side_by_side() -> None:
    run = simulation()
    for order in range(2):
        run.scheduler.submit(sequence(order, [*range(MIN_SHARED - 1), *[50 + order] * 2000]))
    while not run.scheduler.active:
        run.step()
    run.step()
    assert len(run.scheduler.active) == 2


def test_a_finished_sequence_is_reused_by_the_next_with_the_same_beginning() -> None:
    run = simulation()
    run.scheduler.submit(sequence(0, list(range(300))))
    run.run()
    before = run.prompt_tokens
    run.scheduler.submit(sequence(1, [*range(300), 5, 6, 7]))
    run.run()
    assert run.prompt_tokens - before <= 4


def test_when_cells_run_out_the_youngest_of_the_least_urgent_waits_and_nobody_fails() -> None:
    run = simulation(max_cells=1200)
    urgent = sequence(1, [1] * 50, 600)
    patient = sequence(0, [0] * 50, 600, priority=5)
    for s in (patient, urgent):
        run.scheduler.submit(s)
    run.run()
    assert run.finished == [1, 0]
    admissions = [s for plan in run.plans for s, _ in plan.admitted]
    assert admissions.count(patient) > 1
    assert admissions.count(urgent) == 1


def test_an_interactive_request_takes_the_row_of_a_batch_request() -> None:
    run = simulation(max_rows=2)
    for order in range(2):
        run.scheduler.submit(sequence(order, [order] * 4, 200, priority=5))
    for _ in range(5):
        run.step()
    run.scheduler.submit(sequence(9, [9] * 4, 3))
    for _ in range(6):
        run.step()
    assert run.finished == [9]


def test_one_client_s_request_does_not_wait_behind_another_s_sixty() -> None:
    run = simulation(max_rows=4)
    for order in range(60):
        run.scheduler.submit(sequence(order, [order] * 4, 10 + order, client=1))
    for _ in range(5):
        run.step()
    run.scheduler.submit(sequence(99, [99] * 4, 3, client=2))
    admitted: list[int] = []
    while not admitted:
        admitted = [s.id for s, _ in run.step().admitted]
    assert admitted[0] == 99


@settings(deadline=None, max_examples=60)
@given(requests, st.sampled_from([1, 3, 63]))
def test_who_is_admitted_has_the_fewest_running_of_those_as_urgent(
    load: list[Request], max_rows: int
) -> None:
    """Where nothing is shared, so that nobody waits for a prefix, and the cells are enough."""
    run = simulation(max_rows=max_rows)
    for order, (*_, answer, priority, pause, client) in enumerate(load):
        run.scheduler.submit(sequence(order, [100 + order] * 20, answer, priority, client))
        for _ in range(pause):
            running, waiting = list(run.scheduler.active), list(run.scheduler.waiting)
            for admitted, _ in run.step().admitted:
                running = [s for s in running if s.slot or s in run.finished]
                shares = Counter(s.client for s in running)
                as_urgent = [s for s in waiting if s.priority == admitted.priority]
                assert shares[admitted.client] == min(shares[s.client] for s in as_urgent)
                waiting.remove(admitted)
                running.append(admitted)
    run.run()


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 3)), max_size=40), st.lists(st.integers(0, 3)))
def test_turns_keep_a_client_s_order_and_share_evenly(
    asked: list[tuple[int, int]], running: list[int]
) -> None:
    waiting = [sequence(order, [1], 5, *request) for order, request in enumerate(asked)]
    waiting.sort(key=lambda s: s.urgency)
    turns = in_turn(waiting, [sequence(100, [1], client=client) for client in running])
    assert sorted(turns, key=id) == sorted(waiting, key=id)
    assert [s.priority for s in turns] == sorted(s.priority for s in turns)
    shares = Counter(running)
    for index, s in enumerate(turns):
        rest = [other for other in turns[index:] if other.priority == s.priority]
        assert (shares[s.client], s.order) == min((shares[o.client], o.order) for o in rest)
        shares[s.client] += 1


def test_the_client_with_most_running_yields_first_when_cells_run_out() -> None:
    run = simulation(max_cells=2000)
    for order in range(4):
        run.scheduler.submit(sequence(order, [order] * 50, 700, client=1))
    run.scheduler.submit(sequence(9, [9] * 50, 700, client=2))
    run.run()
    admissions = [s.id for plan in run.plans for s, _ in plan.admitted]
    assert len(admissions) > 5
    assert admissions.count(9) == 1


@pytest.mark.parametrize("layout", [pool(4096, 8), Streams(4, 512)], ids=["pool", "streams"])
def test_a_paused_sequence_has_no_row_and_goes_on_without_prefill(layout: Layout) -> None:
    run = simulation(layout=layout)
    s, other = sequence(0, [1] * 50, 40), sequence(1, [2] * 50, 60)
    for each in (s, other):
        run.scheduler.submit(each)
    while other.n_missing > 1 or len(other.tokens) < 60:
        run.step()
    run.scheduler.pause(s)
    for _ in range(10):
        assert [chunk.sequence for chunk in run.step().chunks] == [other]
    run.scheduler.resume(s)
    run.run()
    assert run.finished == [0, 1]
    assert run.prompt_tokens == 100


def test_a_paused_sequence_gives_its_cells_to_who_needs_them_and_starts_again() -> None:
    run = simulation(max_cells=600)
    s = sequence(0, [1] * 200, 40)
    run.scheduler.submit(s)
    while len(s.tokens) < 210:
        run.step()
    run.scheduler.pause(s)
    run.scheduler.submit(sequence(1, [2] * 450, 20))
    while not run.finished:
        run.step()
    prompt_tokens = run.prompt_tokens
    run.scheduler.resume(s)
    run.run()
    assert run.finished == [1, 0]
    assert run.prompt_tokens - prompt_tokens >= 200


def test_a_newcomer_shares_a_paused_sequence_s_beginning_and_leaves_it_the_rest() -> None:
    run = simulation()
    run.scheduler.submit(sequence(2, [9] * 2000))  # the pool grows
    run.run()
    s = sequence(0, [*range(300), *[1] * 300], 40)
    run.scheduler.submit(s)
    while s.n_missing > 1:
        run.step()
    run.scheduler.pause(s)
    before = run.prompt_tokens
    run.scheduler.submit(sequence(1, [*range(300), *[2] * 50], 5))
    run.run_until(1)
    run.scheduler.resume(s)
    run.run()
    assert run.prompt_tokens - before <= 51


def test_with_all_paused_there_is_nothing_to_do() -> None:
    run = simulation()
    sequences = [sequence(order, [order] * 20, 40) for order in range(3)]
    for s in sequences:
        run.scheduler.submit(s)
    for _ in range(3):
        run.step()
    for s in sequences:
        run.scheduler.pause(s)
    plan = run.step()
    assert (plan.chunks, plan.operations, plan.grow_to) == ([], [], None)
    run.scheduler.remove(sequences[0])
    for s in sequences[1:]:
        run.scheduler.resume(s)
    run.run()
    assert sorted(run.finished) == [1, 2]


def test_running_rows_get_a_token_in_every_step_while_a_long_prompt_arrives() -> None:
    run = simulation(max_cells=8192)
    for order in range(16):
        run.scheduler.submit(sequence(order, [order] * 10, 300))
    while any(s.n_missing > 1 for s in run.scheduler.active) or len(run.scheduler.active) < 16:
        run.step()
    run.scheduler.submit(sequence(99, list(range(2000)), 1))
    while 99 not in run.finished:
        plan = run.step()
        assert plan.grow_to or plan.rows == 16
        assert plan.prompt_tokens <= 63 - 16


def test_short_prompts_pass_a_long_one_but_not_for_ever() -> None:
    run = simulation(max_cells=8192)
    run.scheduler.submit(sequence(0, [1] * 3000, 1))
    run.step()
    run.step()
    for order in range(1, 60):
        run.scheduler.submit(sequence(order, [2 + order] * 60, 1))
        run.step()
    assert 1 in run.finished
    run.run()
    assert run.finished.index(0) < len(run.finished) - 1


def test_a_crowd_of_short_batch_requests_gets_streams_and_the_pool_returns_for_a_long_one() -> None:
    run = simulation(max_cells=16384)
    for order in range(40):
        run.scheduler.submit(sequence(order, [order] * 20, 30, priority=1))
    run.step()
    assert isinstance(run.scheduler.layout, Crowd)
    run.scheduler.submit(sequence(99, [99] * 2000, 5, priority=1))
    run.run()
    assert isinstance(run.scheduler.layout, Pool)
    assert sorted(run.finished) == [*range(40), 99]


def test_a_crowd_takes_its_prompts_in_at_once_and_then_decodes_in_full_steps() -> None:
    run = simulation(max_cells=16384)
    for order in range(64):
        run.scheduler.submit(sequence(order, [order] * 20, 30, priority=1))
    steps = [run.step() for _ in range(6)]
    assert (steps[-1].rows, steps[-1].prompt_tokens) == (64, 0)


def crowd() -> tuple[Simulation, list[Sequence]]:
    """A crowd in all of its rows, and more of it waiting."""
    run = simulation(max_cells=16384)
    members = [sequence(order, [order] * 40, 40, priority=1) for order in range(80)]
    for member in members:
        run.scheduler.submit(member)
    while len(run.scheduler.active) < 64 or any(s.n_missing > 1 for s in run.scheduler.active):
        run.step()
    assert isinstance(run.scheduler.layout, Crowd)
    return run, members


@pytest.mark.parametrize(("prompt", "answer", "layout"), [(30, 50, Crowd), (30, 400, Pool), (1000, 5, Pool)])
def test_an_interactive_request_does_not_wait_for_a_crowd_to_drain(
    prompt: int, answer: int, layout: type[Layout]
) -> None:
    run, members = crowd()
    newcomer = sequence(999, [999] * prompt, answer)
    run.scheduler.submit(newcomer)
    finished = len(run.finished)
    plan = run.step()
    assert newcomer in [s for s, _ in plan.admitted]
    assert isinstance(run.scheduler.layout, layout)
    while len(newcomer.tokens) < prompt + 2:
        run.step()
    assert len(run.finished) == finished
    run.run()
    for member in members:  # nothing is lost, and nothing said again
        assert member.tokens == [member.id] * 40 + [ANSWER + position for position in range(40, 80)]


def test_a_paused_request_at_a_terminal_does_not_disturb_a_crowd_until_it_is_resumed() -> None:
    run, _ = crowd()
    reader = sequence(999, [999] * 30, 2000)
    run.scheduler.submit(reader)
    run.scheduler.pause(reader)
    for _ in range(5):
        run.step()
    assert isinstance(run.scheduler.layout, Crowd)
    run.scheduler.resume(reader)
    run.step()
    assert reader in run.scheduler.active


@pytest.mark.parametrize("n_interactive", [0, 1])
def test_a_crowd_s_prompts_come_in_small_steps_beside_an_interactive_request(n_interactive: int) -> None:
    run, _ = crowd()
    for order in range(n_interactive):
        run.scheduler.submit(sequence(900 + order, [900 + order] * 10, 200))
    run.step()
    for order in range(200, 240):
        run.scheduler.submit(sequence(order, [order] * 120, 20, priority=1))
    most = max(run.step().prompt_tokens for _ in range(60))
    assert most > 300 if n_interactive == 0 else most <= 200


@pytest.mark.parametrize(
    ("prompt", "answer", "priority"),
    [([7] * 20, 30, 0), ([7] * 300, 30, 1), ([7] * 20, 1000, 1), (list(range(100)), 30, 1)],
    ids=["interactive", "long prompts", "long answers", "one prefix"],
)
def test_other_loads_stay_in_the_pool(prompt: list[int], answer: int, priority: int) -> None:
    run = simulation(max_cells=16384)
    for order in range(40):
        run.scheduler.submit(sequence(order, [*prompt, order], answer, priority))
    run.step()
    assert isinstance(run.scheduler.layout, Pool)


def test_running_work_is_not_thrown_away_for_a_crowd() -> None:
    run = simulation(max_cells=16384)
    run.scheduler.submit(sequence(0, [0] * 2000, 50, priority=1))
    while run.scheduler.active[:1] == [] or run.scheduler.active[0].n_missing > 1:
        run.step()
    for order in range(1, 50):
        run.scheduler.submit(sequence(order, [order] * 20, 30, priority=1))
    run.step()
    assert isinstance(run.scheduler.layout, Pool)


def test_a_paused_conversation_is_not_thrown_away_for_a_crowd() -> None:
    run = simulation(max_cells=16384)
    reader = sequence(0, [0] * 2000, 50)
    run.scheduler.submit(reader)
    while not run.scheduler.active or reader.n_missing > 1:
        run.step()
    run.scheduler.pause(reader)
    for order in range(1, 50):
        run.scheduler.submit(sequence(order, [order] * 20, 30, priority=1))
    run.step()
    assert isinstance(run.scheduler.layout, Pool)


def test_a_crowd_has_no_more_rows_than_were_asked_for() -> None:
    run = simulation(max_cells=16384, max_rows=20)
    for order in range(40):
        run.scheduler.submit(sequence(order, [order] * 20, 30, priority=1))
    assert max(run.step().rows for _ in range(10)) == 20
    assert isinstance(run.scheduler.layout, Crowd)


@pytest.mark.parametrize("max_rows", [4, 63], ids=["rows", "cells"])
def test_an_interactive_request_takes_what_it_needs_of_a_batch_at_the_next_step(max_rows: int) -> None:
    run = simulation(max_cells=2048, max_rows=max_rows)
    for order in range(20):
        run.scheduler.submit(sequence(order, [order] * 300, 400, priority=1))
    while len(run.scheduler.active) < 2 or any(s.n_missing > 1 for s in run.scheduler.active):
        run.step()
    urgent = sequence(99, [99] * 500, 600)
    run.scheduler.submit(urgent)
    while urgent not in run.scheduler.active:
        assert run.step().grow_to or urgent in run.scheduler.active
    run.run_until(99)
    run.run()
    assert sorted(run.finished) == [*range(20), 99]


def test_while_the_pool_can_grow_an_interactive_request_takes_no_cells_of_a_batch() -> None:
    run = simulation()
    batch = [sequence(order, [order] * 100, 200, priority=1) for order in range(4)]
    for s in batch:
        run.scheduler.submit(s)
    run.scheduler.row_limit.limit = 4
    while len(run.scheduler.active) < 4 or any(s.n_missing > 1 for s in run.scheduler.active):
        run.step()
    urgent = sequence(9, [9] * 800, 20)
    run.scheduler.submit(urgent)
    run.step()
    assert set(run.scheduler.active) == {*batch, urgent}


def test_a_restarted_sequence_is_decoded_again_from_its_first_token() -> None:
    run = simulation()
    s = sequence(0, list(range(50)), 20)
    run.scheduler.submit(s)
    for _ in range(6):
        run.step()
    run.scheduler.restart(s)
    plan = run.step()
    assert plan.chunks[0].start == 0
    run.run()
    assert run.finished == [0]


@pytest.mark.parametrize("rows", [8, 16])
def test_idle_cells_are_few_while_many_rows_run(rows: int) -> None:
    run = simulation(max_cells=16384)
    for order in range(200):
        run.scheduler.submit(sequence(order, [order] * 40, 40))
    while len(run.finished) < 150:
        finished = len(run.finished)
        run.step()
        idle = [len(slot.tokens) for slot in run.scheduler.cache.slots if not slot.busy]
        running = sum(s.n_cached for s in run.scheduler.active)
        if len(run.finished) == finished and len(run.scheduler.active) >= rows:
            assert sum(idle) <= running / 4 + max(idle, default=0)
