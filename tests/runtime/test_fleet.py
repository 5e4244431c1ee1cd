"""Which models stay and which go: the policy alone, without processes or clocks."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from myllm.errors import UnavailableError
from myllm.requests import LoadOptions
from myllm.runtime.fleet import CRASH_WINDOW, Fleet, Member, Room, State

PLENTY = 10**12


def member(name: str = "model", estimate: int = 100, **state: object) -> Member:
    """A loaded model at rest."""
    known = {"options": LoadOptions(), "keep_alive": 60.0, "used": 0.0, **state}
    rest = {"busy": False, "state": State.READY}
    return Member(name=name, path=Path(f"/{name}"), estimate=estimate, **{**rest, **known})  # type: ignore[arg-type]


def newcomer(estimate: int = 100, name: str = "newcomer") -> Member:
    return member(name, estimate, busy=True, state=State.ASKED)


def names(room: Room) -> tuple[list[str], list[str]]:
    return [each.name for each in room.evict], [each.name for each in room.wait]


# ── finding ─────────────────────────────────────────────────────────────────────────────────


def test_a_request_gets_the_model_whatever_it_does_not_ask_for() -> None:
    loaded = member(options=LoadOptions(context=512, threads=2))
    fleet = Fleet(members=[loaded])
    assert fleet.find(loaded.path, LoadOptions()) is loaded
    assert fleet.find(loaded.path, LoadOptions(context=512)) is loaded
    assert fleet.find(loaded.path, LoadOptions(context=1024)) is None
    assert fleet.find(loaded.path, LoadOptions(parallel=4)) is None
    assert fleet.find(Path("/another"), LoadOptions()) is None


def test_of_several_the_one_used_last_is_found() -> None:
    old, new = member(used=1, options=LoadOptions(context=512)), member(used=2)
    assert Fleet(members=[old, new]).find(new.path, LoadOptions()) is new


def test_one_that_is_leaving_is_not_found() -> None:
    assert Fleet(members=[member(leaving="unload")]).find(Path("/model"), LoadOptions()) is None


# ── room ────────────────────────────────────────────────────────────────────────────────────


def test_where_there_is_room_nobody_goes() -> None:
    assert Fleet(1000, 3, [member()]).room(newcomer(), PLENTY) == Room()
    assert Fleet(members=[member()]).room(newcomer(), 100) == Room()


@pytest.mark.parametrize(
    ("limits", "available"), [((200, None), PLENTY), ((None, 2), PLENTY), ((None, None), 0)]
)
def test_the_least_recently_used_goes(limits: tuple[int | None, int | None], available: int) -> None:
    fleet = Fleet(*limits, [member("new", used=2), member("old", used=1)])
    assert names(fleet.room(newcomer(), available)) == (["old"], [])


def test_no_more_go_than_must() -> None:
    fleet = Fleet(400, None, [member(name, used=n) for n, name in enumerate("abcd")])
    assert names(fleet.room(newcomer(200), PLENTY)) == (["a", "b"], [])


def test_those_without_work_go_before_those_with() -> None:
    fleet = Fleet(200, None, [member("busy", used=1, busy=True), member("idle", used=2)])
    assert names(fleet.room(newcomer(), PLENTY)) == (["idle"], [])


def test_one_with_work_is_waited_for_where_nobody_else_can_go() -> None:
    fleet = Fleet(200, None, [member("pinned", pinned=True), member("busy", busy=True)])
    assert names(fleet.room(newcomer(), PLENTY)) == ([], ["busy"])


def test_one_that_loads_is_waited_for_last() -> None:
    loading = member("loading", busy=True, state=State.LOADING)
    fleet = Fleet(200, None, [loading, member("busy", used=9, busy=True)])
    assert names(fleet.room(newcomer(), PLENTY)) == ([], ["busy"])
    assert names(Fleet(150, None, [loading]).room(newcomer(), PLENTY)) == ([], ["loading"])


def test_one_that_has_no_place_yet_is_not_counted() -> None:
    fleet = Fleet(100, 1, [newcomer(name="behind")])
    assert fleet.room(newcomer(), 100) == Room()


def test_what_loads_has_the_machines_memory_promised() -> None:
    fleet = Fleet(members=[member(busy=True, state=State.LOADING, pinned=True)])
    assert fleet.room(newcomer(), 200) == Room()
    with pytest.raises(UnavailableError, match="newcomer"):
        fleet.room(newcomer(), 199)


def test_pinned_ones_stay_and_are_named_in_the_refusal() -> None:
    fleet = Fleet(150, None, [member("mine", pinned=True)])
    with pytest.raises(UnavailableError, match=r"mine must stay; give a smaller --context"):
        fleet.room(newcomer(), PLENTY)
    with pytest.raises(UnavailableError, match=r"max_loaded is 1, and mine must stay"):
        Fleet(None, 1, [member("mine", pinned=True)]).room(newcomer(), PLENTY)


def test_a_pinned_one_that_is_to_be_unloaded_goes() -> None:
    fleet = Fleet(150, None, [member("mine", pinned=True, busy=True, leaving="unload")])
    assert names(fleet.room(newcomer(), PLENTY)) == ([], ["mine"])


def test_what_never_fits_is_refused_and_nobody_goes() -> None:
    fleet = Fleet(150, None, [member()])
    with pytest.raises(UnavailableError, match=r"models\.max_memory"):
        fleet.room(newcomer(151), PLENTY)


members = st.builds(
    member,
    st.text("abc", min_size=1, max_size=3),
    st.integers(0, 300),
    used=st.integers(0, 9).map(float),
    pinned=st.booleans(),
    busy=st.booleans(),
)


@given(
    loaded=st.lists(members, max_size=6),
    size=st.integers(0, 400),
    max_memory=st.none() | st.integers(0, 1000),
    max_loaded=st.none() | st.integers(1, 6),
    free=st.integers(0, 1000),
)
def test_room_is_enough_and_never_more_than_needed(
    loaded: list[Member], size: int, max_memory: int | None, max_loaded: int | None, free: int
) -> None:
    fleet = Fleet(max_memory, max_loaded, loaded)

    def fits(left: list[Member]) -> bool:
        gone = sum(each.estimate for each in loaded if each not in left)
        total = sum(each.estimate for each in left)
        return (
            size <= free + gone
            and (max_memory is None or total + size <= max_memory)
            and (max_loaded is None or len(left) + 1 <= max_loaded)
        )

    pinned = [each for each in loaded if each.pinned]
    try:
        room = fleet.room(newcomer(size), free)
    except UnavailableError:
        assert not fits(pinned)
        return
    going = (*room.evict, *room.wait)
    left = [each for each in loaded if each not in going]
    assert fits(left)
    assert not any(each.pinned for each in going)
    assert not any(each.busy for each in room.evict)
    assert all(each.busy for each in room.wait)
    if going:
        assert not fits([*left, going[-1]]), "the last of them had to go, too"
    for gone in room.evict:
        assert all(gone.used <= each.used for each in left if not each.pinned and not each.busy)


# ── time ────────────────────────────────────────────────────────────────────────────────────


def test_a_model_goes_when_its_keep_alive_is_over_and_not_before() -> None:
    fleet = Fleet(members=[member(used=100.0, keep_alive=60.0)])
    assert fleet.next_expiry() == 160
    assert fleet.expired(159.9) == []
    assert fleet.expired(160) == fleet.members


@pytest.mark.parametrize("state", [{"busy": True}, {"pinned": True}, {"keep_alive": None}])
def test_a_model_stays_while_it_works_or_is_to_stay(state: dict[str, object]) -> None:
    fleet = Fleet(members=[member(**state)])
    assert fleet.next_expiry() is None
    assert fleet.expired(1e9) == []


@pytest.mark.parametrize("state", [{}, {"pinned": True}, {"keep_alive": None}])
def test_one_that_is_leaving_goes_as_soon_as_it_has_no_work(state: dict[str, object]) -> None:
    leaving = member(leaving="unload", used=5.0, busy=True, **state)
    fleet = Fleet(members=[leaving])
    assert fleet.expired(5) == []
    leaving.busy = False
    assert fleet.expired(5) == [leaving]


@given(st.lists(members, max_size=6), st.integers(0, 100))
def test_whatever_expires_has_been_told_as_the_next(loaded: list[Member], now: int) -> None:
    fleet = Fleet(members=loaded)
    when = fleet.next_expiry()
    assert bool(fleet.expired(now)) == (when is not None and when <= now)


# ── crashes ─────────────────────────────────────────────────────────────────────────────────


def refused(fleet: Fleet, now: float) -> bool:
    try:
        fleet.check_crashes("model", Path("/model"), now)
    except UnavailableError as error:
        return "died 3 times" in str(error)
    return False


def test_three_crashes_within_a_minute_and_the_model_is_refused_for_one() -> None:
    fleet = Fleet()
    for when in (0.0, 20.0):
        fleet.crashed(Path("/model"), when)
        assert not refused(fleet, when)
    fleet.crashed(Path("/model"), 59.0)
    assert refused(fleet, 59.0)
    assert refused(fleet, 59.0 + CRASH_WINDOW - 0.1)
    assert not refused(fleet, 59.0 + CRASH_WINDOW)
    fleet.check_crashes("other", Path("/other"), 59.0)


def test_crashes_far_apart_are_borne() -> None:
    fleet = Fleet()
    for when in range(0, 1000, 31):
        fleet.crashed(Path("/model"), float(when))
        assert not refused(fleet, float(when))


def test_after_its_time_out_a_model_is_tried_again() -> None:
    fleet = Fleet()
    for when in (0.0, 1.0, 2.0):
        fleet.crashed(Path("/model"), when)
    assert not refused(fleet, 62.0)
    fleet.crashed(Path("/model"), 62.5)
    assert not refused(fleet, 62.5), "the older ones were more than a minute ago"


@given(st.lists(st.floats(0, 300), max_size=12))
def test_refused_exactly_where_the_last_three_were_near_each_other_and_now(moments: list[float]) -> None:
    fleet = Fleet()
    moments.sort()
    for moment in moments:
        fleet.crashed(Path("/model"), moment)
    last = moments[-3:]
    near = len(last) == 3 and last[-1] - last[0] <= CRASH_WINDOW
    assert refused(fleet, last[-1] if last else 0.0) == near
