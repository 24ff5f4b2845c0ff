"""The label server against hand-worked answers, on SQLite and on a PostgreSQL that these tests start themselves."""

import contextlib
import http.client
import json
import os
import pwd
import random
import re
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid
from functools import partial
from pathlib import Path

import cv2
import hypothesis
import hypothesis.stateful as stateful
import hypothesis.strategies as st
import numpy as np
import pytest
import schemathesis
import sqlalchemy as sa
from fastapi.testclient import TestClient

import label_server
from benchmarks.label_server_kills import Server, storm
from label_world import CLIP, RUN, TOKENS, World, listening, new_id, text, webp


@pytest.fixture(scope="session")
def postgres_cluster():
    """URL, start and stop of a cluster in a directory of its own, reached through a socket: it can't meet another."""
    folders = [Path(p) for p in [shutil.which("initdb")] if p] + sorted(
        Path("/usr/lib/postgresql").glob("*/bin/initdb")
    )
    if not folders:
        pytest.skip("no initdb here: PostgreSQL is not installed")
    programs = folders[-1].resolve().parent
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    folder = Path(tempfile.mkdtemp(prefix="pg", dir=memory))
    user, prefix = pwd.getpwuid(os.getuid()).pw_name, []
    if os.getuid() == 0:  # initdb refuses root
        user, prefix = "postgres", ["runuser", "-u", "postgres", "--"]
        shutil.chown(folder, user)
        folder.chmod(0o755)
    data = folder / "data"
    quiet = {"check": True, "stdout": subprocess.DEVNULL, "cwd": folder}
    subprocess.run([*prefix, programs / "initdb", "-D", data, "-A", "trust", "--no-sync"], **quiet)
    options = f"-k {folder} -c listen_addresses= -c fsync=off"
    pg_ctl = [*prefix, programs / "pg_ctl", "-D", data, "-w"]
    start = partial(subprocess.run, [*pg_ctl, "-o", options, "-l", folder / "log", "start"], **quiet)
    stop = partial(subprocess.run, [*pg_ctl, "-m", "immediate", "stop"], **quiet)
    start()
    yield f"postgresql+psycopg://{user}@/{{}}?host={folder}", start, stop
    stop()
    shutil.rmtree(folder)


@pytest.fixture
def postgres(postgres_cluster):
    return postgres_cluster[0]


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request, tmp_path):
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/labels.sqlite"
    return new_postgres_database(request.getfixturevalue("postgres"))


def new_postgres_database(postgres: str) -> str:
    name = f"labels_{new_id()}"
    engine = sa.create_engine(postgres.format("postgres"), isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with engine.connect() as conn:
        conn.exec_driver_sql(f"CREATE DATABASE {name}")
    return postgres.format(name)


@pytest.fixture
def world(database_url):
    world = World(database_url)
    yield world
    world.close()


@pytest.fixture
def make_world(database_url):
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(contextlib.closing(World(database_url, **options)))


# What a trainer puts --------------------------------------------------------------------------------------------------
def test_webp_size():
    assert label_server.webp_size(webp(3, 300, 200)) == (300, 200)  # lossless
    assert label_server.webp_size(webp(3, 301, 7, quality=80)) == (301, 7)  # lossy
    frames = cv2.Animation()
    frames.frames, frames.durations = [np.full((40, 50, 3), i, np.uint8) for i in (0, 255)], np.array([9, 9])
    assert label_server.webp_size(cv2.imencodeanimation(".webp", frames)[1].tobytes()) == (50, 40)  # VP8X
    for bad in (b"", webp(3)[:40], b"RIFF" + bytes(60), cv2.imencode(".png", np.zeros((9, 9)))[1].tobytes()):
        with pytest.raises(ValueError):
            label_server.webp_size(bad)


def test_run_is_registered_once(world):
    run = new_id()
    assert world.call("PUT", f"/api/runs/{run}", RUN, "trainer") == {"known": []}
    query = world.query(run)
    assert world.call("PUT", f"/api/runs/{run}", RUN, "trainer") == {"known": [query]}
    world.call("PUT", f"/api/runs/{run}", RUN | {"labels": 200, "name": "second"}, "trainer")
    assert world.call("GET", "/api/progress?labeller=Ann")["runs"][0]["labels"] == 200
    for other in ({"env_id": "Ant-v5"}, {"script": "a2c"}, {"clip": CLIP | {"fps": 30.0}}):
        world.call("PUT", f"/api/runs/{run}", RUN | other, "trainer", 409)
    for bad in ({"labels": -1}, {"max_open": 0}, {"clip": CLIP | {"frames": 0}}, {"name": "a\0b"}, {"env_id": ""}):
        world.call("PUT", f"/api/runs/{new_id()}", RUN | bad, "trainer", 422)
    world.call("PUT", "/api/runs/not-an-id", RUN, "trainer", 422)


def test_query_is_stored_once_or_refused(world):
    run, other = world.run(), world.run()
    query = world.query(run)
    body = {"run": run, "clips": [text(webp(10)), text(webp(20))], "sums": [1.0, None]}
    assert world.call("PUT", f"/api/queries/{query}", body, "trainer") == {"open": 1}
    assert world.call("PUT", f"/api/queries/{new_id()}", body, "trainer") == {"open": 2}
    for change in ({"run": other}, {"clips": [text(webp(10)), text(webp(21))]}, {"clips": body["clips"][::-1]}):
        world.call("PUT", f"/api/queries/{query}", body | change, "trainer", 409)
    fine = body["clips"][0]
    cut, tall = text(webp(10)[:-9]), text(webp(10, 24, 18))
    png = text(cv2.imencode(".png", np.zeros((12, 24)))[1].tobytes())
    for clip, reason in {"%%": "base64", "é": "base64", "": "WebP", cut: "cut off", png: "WebP", tall: "24x18"}.items():
        reply = world.call("PUT", f"/api/queries/{new_id()}", body | {"clips": [fine, clip]}, "trainer", 422)
        assert reason in reply["detail"]
        assert "clips[1]" in reply["detail"]
    for bad in ({"clips": [fine]}, {"sums": [1.0]}, {"sums": ["x", 1.0]}):
        world.call("PUT", f"/api/queries/{new_id()}", body | bad, "trainer", 422)
    world.call("PUT", f"/api/queries/{new_id()}", body | {"run": new_id()}, "trainer", 404)
    huge = body | {"clips": ["A" * label_server.QUERY_BYTES, ""]}
    world.call("PUT", f"/api/queries/{new_id()}", huge, "trainer", 413)
    assert world.call("GET", "/api/progress?labeller=Ann")["runs"][0]["open"] == 2


def test_nan_is_not_a_sum(world):
    run = world.run()
    body = json.dumps({"run": run, "clips": [text(webp(1)), text(webp(2))], "sums": [float("nan"), 1.0]})
    headers = {"authorization": f"Bearer {TOKENS['trainer']}", "content-type": "application/json"}
    assert world.client.put(f"/api/queries/{new_id()}", content=body, headers=headers).status_code == 422


def test_oldest_queries_that_nobody_holds_are_withdrawn(world):
    run = world.run(max_open=2)
    oldest = world.query(run)
    held = world.claim()
    assert held["query"] == oldest
    second, third = world.query(run), world.query(run)
    assert world.call("GET", "/api/progress?labeller=Ann")["runs"][0]["open"] == 2  # oldest is held, so second goes
    assert world.claim("Bob")["query"] == third
    assert world.claim("Cyd") is None
    world.now += label_server.LEASE + 1
    fourth = world.query(run)  # nobody holds the oldest any more
    assert {world.claim("Bob")["query"], world.claim("Cyd")["query"]} == {third, fourth}
    assert world.claim("Dee") is None
    assert world.answer(held, "left") | {"id": 0} == {"late": True, "counted": True, "id": 0}
    world.now += label_server.GRACE
    assert [event["query"] for event in world.events(run)] == [oldest]
    assert second not in [event["query"] for event in world.events(run)]


# Sides ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("swapped", [False, True])
def test_sides(world, monkeypatch, swapped):
    """The served sprites are decoded: whatever is on the left, the trainer hears which of its clips was meant."""
    monkeypatch.setattr(label_server.random, "random", lambda: 0.25 if swapped else 0.75)
    run, expected = world.run(), {}
    for said in ("left", "right", "equal", "cant-tell"):
        query = world.query(run, greys=(50, 200), sums=(1.0, 2.0))
        pair = world.claim()
        assert (pair["query"], pair["run"], pair["task"], pair["clip"]) == (query, run, "Hopper-v5", CLIP)
        greys = []
        for side in ("left", "right"):
            reply = world.client.get(pair[side], headers={"authorization": f"Bearer {TOKENS['labeller']}"})
            assert reply.headers["content-type"] == "image/webp"
            assert reply.headers["cache-control"] == "private, max-age=31536000, immutable"
            sheet = cv2.imdecode(np.frombuffer(reply.content, np.uint8), cv2.IMREAD_COLOR)
            assert sheet.shape == (12, 24, 3)
            greys.append(int(sheet[0, 0, 0]))
        assert greys == ([200, 50] if swapped else [50, 200])
        assert pair["sums"] == ([2.0, 1.0] if swapped else [1.0, 2.0])
        world.answer(pair, said)
        expected[query] = {"left": ("first", "second")[swapped], "right": ("second", "first")[swapped]}.get(said, said)
    world.now += label_server.GRACE
    assert {event["query"]: event["answer"] for event in world.events(run)} == expected


def test_sides_are_drawn_evenly(make_world):
    world = make_world()
    random.seed(5)
    run, lefts = world.run(), 0
    for _ in range(64):
        world.query(run, sums=(1.0, 2.0))
        pair = world.claim()
        lefts += pair["sums"][0] == 1.0
        world.answer(pair)
    assert 20 <= lefts <= 44  # 3 sigma


def test_labellers_do_not_learn_run_or_sums(world):
    world.query(world.run(name="secret"), sums=(1.0, 2.0))
    pair = world.claim(role="labeller")
    assert set(pair) == {"serving", "left", "right", "clip", "task", "instructions", "lease"}
    assert pair["lease"] == 90
    assert pair["instructions"] == "Hopper-v5"


# Who gets what --------------------------------------------------------------------------------------------------------
def test_newest_first_and_nobody_gets_a_pair_of_another(world):
    run = world.run()
    queries = [world.query(run) for _ in range(6)]
    order = [world.claim(name)["query"] for name in ("Ann", "Bob", "Ann", "Ann", "Bob", "Cyd")]
    assert order == queries[::-1]
    assert world.claim("Ann") is None


def test_claims_by_run_and_of_finished_runs(world):
    old, new = world.run(), world.run()
    first, second = world.query(old), world.query(new)
    assert world.claim(run=old)["query"] == first
    world.status(new, finished=True)
    assert world.claim() is None
    world.status(new, finished=False)
    assert world.claim()["query"] == second


def test_a_run_whose_trainer_is_gone_is_served_no_longer_until_it_is_back(make_world):
    """Killed and never resumed, a run stays unfinished for ever."""
    world = make_world()
    gone, waiting, told = world.run(), world.run(), world.run(labels=7)
    queries = {world.query(run): run for run in (told, waiting, gone)}
    world.now += label_server.SILENCE - 600
    world.events(waiting)
    world.status(told)

    def offered():
        world.now += label_server.LEASE + 1
        pairs = [world.claim() for _ in range(3)]
        return {queries[pair["query"]] for pair in pairs if pair}

    def listed():
        return {entry["run"] for entry in world.call("GET", "/api/progress?labeller=Ann")["runs"]}

    assert listed() == offered() == {gone, waiting, told}
    world.now += 1200
    assert listed() == offered() == {waiting, told}
    world.close()
    world.open()  # now only what is stored is known
    assert listed() == offered() == {told}
    world.events(waiting)
    assert listed() == {waiting, told}
    for revive in (
        lambda: world.events(gone),
        lambda: world.query(gone),
        lambda: world.status(gone),
        lambda: world.call("PUT", f"/api/runs/{gone}", RUN, "trainer"),
    ):
        assert gone not in listed()
        revive()
        assert gone in listed()
        world.now += label_server.SILENCE + 1
    world.status(gone, finished=True)
    world.now += label_server.SILENCE + 1
    assert listed() == {gone}  # the page thanks
    assert not offered()


def test_a_lease_ends_by_itself_and_a_late_answer_trains_if_nobody_else_answered(world):
    run = world.run()
    query = world.query(run)
    first = world.claim("Ann")
    world.now += label_server.LEASE - 1
    assert world.claim("Bob") is None
    world.call("POST", f"/api/servings/{first['serving']}/extend", {}, "labeller", 204)
    world.now += label_server.LEASE - 1
    assert world.claim("Bob") is None
    world.now += 2
    assert world.claim("Ann")["serving"] == first["serving"]  # the same serving: a page that has it shows it once
    world.now += label_server.LEASE + 1
    second = world.claim("Bob")
    assert second["query"] == query
    world.call("POST", f"/api/servings/{first['serving']}/extend", {}, "labeller", 409)
    assert world.claim("Ann") is None
    reply = world.answer(first, "equal", "Ann")
    assert (reply["late"], reply["counted"]) == (True, True)
    reply = world.answer(second, "cant-tell", "Bob")
    assert (reply["late"], reply["counted"]) == (False, False)
    world.now += label_server.GRACE
    assert [(e["query"], e["answer"]) for e in world.events(run)] == [(query, "equal")]


def test_a_late_answer_to_an_answered_query_is_stored_and_does_not_train(world):
    run = world.run()
    query = world.query(run)
    first = world.claim("Ann")
    world.now += label_server.LEASE + 1
    world.answer(world.claim("Bob"), "equal", "Bob")
    reply = world.answer(first, "left", "Ann")
    assert (reply["late"], reply["counted"]) == (True, False)
    world.now += label_server.GRACE
    assert [(e["query"], e["answer"]) for e in world.events(run)] == [(query, "equal")]
    assert len(world.journal()) == 2
    world.retract(reply["id"])  # changes nothing for the trainer
    assert len(world.events(run)) == 1
    assert world.claim("Ann") is None


def test_answers_are_stored_once(world):
    world.query(world.run())
    pair = world.claim()
    reply = world.answer(pair, "left")
    assert world.answer(pair, "left", id=reply["id"]) == reply
    world.answer(pair, "left", expect=409)
    world.answer(pair, "left", labeller="Bob", expect=409)
    world.answer({"serving": new_id()}, expect=404)
    other = {"serving": (world.query(world.run()), world.claim())[1]["serving"]}
    world.answer(other, id=reply["id"], expect=409)
    for bad in ({"answer": "up"}, {"seconds": -1.0}, {"labeller": " "}, {"labeller": "x" * 41}, {"id": "A" * 32}):
        body = {"id": new_id(), "serving": pair["serving"], "labeller": "Ann", "answer": "left", "seconds": 1.0}
        world.call("POST", "/api/answers", body | bad, "labeller", 422)
    assert len(world.journal()) == 1
    world.call("POST", f"/api/servings/{new_id()}/extend", {}, "labeller", 404)
    world.call("POST", f"/api/servings/{pair['serving']}/extend", {}, "labeller", 409)
    world.call("GET", f"/api/sprites/{new_id()}", None, "labeller", 404)
    world.call("GET", f"/api/runs/{new_id()}/events", None, "trainer", 404)
    world.call("GET", "/api/runs/x/events?wait=31", None, "trainer", 422)
    world.call("GET", f"/api/runs/{new_id()}/events?after=-1", None, "trainer", 422)


# What the trainer gets back -------------------------------------------------------------------------------------------
def test_an_answer_is_withheld_until_the_next_or_five_seconds(world):
    run = world.run()
    queries = [world.query(run) for _ in range(3)]
    world.answer(world.claim("Ann"), "equal", "Ann")
    world.now += 1
    world.answer(world.claim("Bob"), "equal", "Bob")
    assert world.events(run) == []
    # Both may still reach the trainer, which would otherwise ask for more than its budget
    assert world.call("GET", f"/api/runs/{run}/events?after=0", None, "trainer")["open"] == 3
    world.answer(world.claim("Bob"), "cant-tell", "Bob")  # releases Bob's first, not Ann's
    assert [e["query"] for e in world.events(run)] == [queries[1]]
    world.now += 4
    assert [e["query"] for e in world.events(run)] == [queries[1], queries[2]]
    world.now += 1
    events = world.events(run)
    assert [(e["query"], e["kind"], e["answer"]) for e in events][2] == (queries[0], "answer", "cant-tell")
    assert [e["seq"] for e in events] == sorted({e["seq"] for e in events})
    assert world.events(run, events[0]["seq"]) == events[1:]
    reply = world.call("GET", f"/api/runs/{run}/events?after={events[2]['seq']}", None, "trainer")
    assert reply == {"events": [], "open": 0, "seq": events[2]["seq"]}


def test_an_early_undo_never_reaches_the_trainer(world):
    run = world.run()
    query = world.query(run)
    pair = world.claim()
    answer = world.answer(pair, "equal")["id"]
    world.now += label_server.LEASE + 1  # no trainer has asked, so nothing is out yet
    again = world.retract(answer)["pair"]
    assert {k: again[k] for k in ("serving", "left", "right")} == {k: pair[k] for k in ("serving", "left", "right")}
    assert world.claim("Bob") is None  # leased anew
    assert world.events(run) == []
    world.answer(pair, "cant-tell")
    world.now += label_server.GRACE
    assert [(e["query"], e["kind"], e["answer"]) for e in world.events(run)] == [(query, "answer", "cant-tell")]


def test_a_late_undo_is_a_retract_and_the_query_is_open_again(world):
    run = world.run()
    query = world.query(run)
    pair = world.claim()
    answer = world.answer(pair, "equal")["id"]
    world.now += label_server.GRACE
    assert len(world.events(run)) == 1
    undo = new_id()
    first = world.retract(answer, id=undo)
    assert world.retract(answer, id=undo) == first
    assert world.retract(answer) == first  # another id, but there is nothing left to retract
    assert [(e["kind"], e["answer"]) for e in world.events(run)] == [("answer", "equal"), ("retract", "equal")]
    assert world.call("GET", "/api/progress?labeller=Ann")["runs"][0]["open"] == 1
    world.retract(answer, "Bob", expect=409)
    world.retract(new_id(), expect=404)
    world.retract(undo, expect=404)  # a retract can't be retracted
    world.now += label_server.LEASE + 1
    assert world.answer(world.claim("Bob"), "equal", "Bob")["counted"]
    world.now += label_server.GRACE
    events = world.events(run)
    assert [e["kind"] for e in events] == ["answer", "retract", "answer"]
    assert {e["query"] for e in events} == {query}
    other = world.answer((world.query(run), world.claim())[1])["id"]
    world.retract(other, id=undo, expect=409)


def test_postgresql_may_go_away_and_come_back(postgres_cluster):
    url, start, stop = postgres_cluster
    world = World(new_postgres_database(url))
    run = world.run()
    world.query(run)
    pair, answer = world.claim(), new_id()
    stop()
    try:
        for _ in range(2):  # connections that were open, and new ones
            assert "try again" in world.answer(pair, id=answer, expect=503)["detail"]
            assert "try again" in world.query(run, expect=503)["detail"]
            assert "try again" in world.call("GET", f"/api/runs/{run}/events", role="trainer", expect=503)["detail"]
    finally:
        start()
    for _ in range(2):  # the page and the trainer send it again until it is acknowledged
        world.answer(pair, id=answer)
    world.now += label_server.GRACE
    assert [event["answer"] for event in world.events(run)] == ["equal"]
    world.query(run)
    assert world.claim()
    world.close()


def test_postgresql_hands_out_no_number_that_is_seen_late(postgres):
    """Two interleaved transactions: the first to take a number must be the first that readers see."""
    url = new_postgres_database(postgres)
    first, second = World(url), World(url)  # two processes would be the same: nothing is shared but the database
    run = first.run()
    queries = [first.query(run), first.query(run)]
    first.answer(first.claim("Ann"), "equal", "Ann")
    second.answer(second.claim("Bob"), "equal", "Bob")
    first.now = second.now = first.now + label_server.GRACE
    done = []
    with first.store.begin() as conn:  # has taken its number, and has not committed
        conn.execute(label_server.stream.insert().values(run=run, query=queries[1], kind="answer", answer="equal"))
        reader = threading.Thread(target=lambda: done.append(second.events(run)))
        reader.start()
        reader.join(0.5)
        assert not done, "a second writer overtook the first"
    reader.join(5)
    (events,) = done
    assert len(events) == 3
    assert [e["seq"] for e in events] == sorted(e["seq"] for e in events)
    assert events[0]["query"] == queries[1]
    assert first.events(run, events[0]["seq"]) == events[1:]
    first.close(), second.close()


def test_long_polls_end_when_there_is_news(database_url):
    """The trainer waits for an answer, the person for a pair, both through real sockets."""
    world = World(database_url)
    run, took = world.run(), {}

    def ask(url, role, method, path, body=None):
        headers = {"authorization": f"Bearer {TOKENS[role]}", "content-type": "application/json"}
        request = urllib.request.Request(
            url + path, json.dumps(body).encode() if body else None, headers, method=method
        )
        started = time.monotonic()
        with urllib.request.urlopen(request, timeout=20) as reply:
            took[path] = (json.loads(reply.read()), time.monotonic() - started)

    with listening(world) as url:
        claim = (url, "labeller", "POST", "/api/claim", {"labeller": "Bob", "wait": 15})
        events = (url, "trainer", "GET", f"/api/runs/{run}/events?wait=15")
        threads = [threading.Thread(target=ask, args=arguments) for arguments in (claim, events)]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        assert not took
        query = world.query(run)
        threads[0].join()
        pair, seconds = took["/api/claim"]
        assert seconds < 2
        world.query(run)
        world.answer(pair["pair"], "equal", "Bob")
        world.answer(world.claim("Bob"), "equal", "Bob")  # the next answer releases the first
        threads[1].join()
        reply, seconds = took[events[3]]
        assert [e["query"] for e in reply["events"]] == [query]
        assert seconds < 4
        nothing = (url, "labeller", "POST", "/api/claim", {"labeller": "Bob", "wait": 0.5})
        ask(*nothing)
        assert took["/api/claim"][0]["pair"] is None
        assert 0.5 <= took["/api/claim"][1] < 2
    world.close()


def test_a_page_that_was_closed_while_it_waited_takes_no_pair(database_url):
    with contextlib.closing(World(database_url)) as world, listening(world) as url:
        run = world.run()
        page = http.client.HTTPConnection(url.removeprefix("http://"))
        headers = {"authorization": f"Bearer {TOKENS['labeller']}", "content-type": "application/json"}
        page.request("POST", "/api/claim", json.dumps({"labeller": "Ann", "wait": 15}), headers)
        time.sleep(0.5)
        page.close()
        time.sleep(0.5)
        query = world.query(run)
        time.sleep(1.5)  # whoever still waits looks once a second
        assert world.claim("Bob")["query"] == query


# Repeats and overlap --------------------------------------------------------------------------------------------------
def test_repeats_come_twenty_answers_later_with_sides_swapped_and_do_not_train(make_world):
    world = make_world(repeat=1.0)
    run = world.run()
    first = world.query(run, sums=(1.0, 2.0))
    before = world.claim()
    world.answer(before, "left")
    for _ in range(label_server.REPEAT_GAP - 1):
        query = world.query(run)
        pair = world.claim()
        assert pair["query"] == query
        world.answer(pair)
    last = world.query(run)
    assert world.claim("Bob")["query"] == last  # another person is never asked for a repetition
    query = world.query(run)
    pair = world.claim()
    assert pair["query"] == query  # only 20 answers, so 19 since the first
    world.answer(pair)
    again = world.claim()
    assert again["query"] == first
    assert again["serving"] != before["serving"]
    assert (again["left"], again["right"]) == (before["right"], before["left"])
    assert not world.answer(again, "right")["counted"]
    world.now += label_server.GRACE
    events = world.events(run)
    assert len(events) == len({e["query"] for e in events}) == 21
    assert world.call("GET", "/api/stats", role="admin")["all"]["consistent"]["k"] == 1
    assert world.claim()["query"] != first


def test_overlap_goes_to_one_other_person_and_does_not_train(make_world):
    world = make_world(overlap=1.0)
    run = world.run()
    query = world.query(run)
    assert world.answer(world.claim("Ann"), "equal", "Ann")["counted"]
    assert world.claim("Ann") is None
    pair = world.claim("Bob")
    assert pair["query"] == query
    assert world.claim("Cyd") is None
    reply = world.answer(pair, "left", "Bob")
    assert (reply["late"], reply["counted"]) == (False, False)
    assert world.claim("Cyd") is None
    world.now += label_server.GRACE
    assert [(e["query"], e["answer"]) for e in world.events(run)] == [(query, "equal")]
    world.retract(reply["id"], "Bob")
    world.now += label_server.LEASE + 1
    assert world.claim("Cyd")["query"] == query  # that opinion is wanted again
    assert world.claim("Ann") is None


def test_shares_of_repeats_and_overlap(make_world):
    world = make_world(repeat=0.3, overlap=0.1)
    random.seed(3)
    run = world.run()
    for _ in range(150):
        world.query(run)
    with world.store.begin() as conn:
        rows = conn.execute(sa.select(label_server.query.c.repeat_due, label_server.query.c.overlap_due)).all()
    repeats, overlaps = np.mean(rows, axis=0)
    assert abs(repeats - 0.3) < 3 * (0.3 * 0.7 / 150) ** 0.5
    assert abs(overlaps - 0.1) < 3 * (0.1 * 0.9 / 150) ** 0.5


# Numbers --------------------------------------------------------------------------------------------------------------
def test_binomial_interval_and_kappa():
    assert label_server.binomial_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # Wilson, by hand
    assert label_server.binomial_interval(0, 5) == pytest.approx((0.0, 0.4345), abs=1e-4)
    assert label_server.binomial_interval(0, 0) is None
    table = {("first", "first"): 20, ("first", "second"): 5, ("second", "first"): 10, ("second", "second"): 15}
    pairs = [pair for pair, n in table.items() for _ in range(n)]
    assert label_server.cohen_kappa(pairs) == pytest.approx(0.4)  # (0.7 - 0.5) / (1 - 0.5)
    three = [("first", "first"), ("second", "equal"), ("equal", "equal"), ("first", "second")]
    assert label_server.cohen_kappa(three) == pytest.approx(3 / 11)  # agreed 1/2, by chance 5/16
    assert label_server.cohen_kappa([("equal", "equal")]) is None  # chance alone agrees always
    assert label_server.cohen_kappa([]) is None


def test_progress(world):
    noon = time.mktime((2026, 3, 1, 12, 0, 0, 0, 0, -1))
    world.now = noon - 50_000
    run = world.run(labels=7)
    queries = [world.query(run) for _ in range(5)]
    world.answer(world.claim(), "left")  # yesterday's
    world.now = noon
    for seconds, answer in ((0, "equal"), (10, "cant-tell"), (20, "left")):
        world.now = noon + seconds
        last = world.answer(world.claim(), answer)["id"]
    world.now = noon + 30
    world.retract(last)
    world.status(run, labels_due=3, waiting=True)
    reply = world.call("GET", "/api/progress?labeller=Ann")
    assert reply["runs"] == [
        {"run": run, "task": "Hopper-v5", "labels": 7, "labels_used": 2, "labels_due": 3, "open": 2}
        | {"waiting": True, "finished": False}
    ]
    assert (reply["answered"], reply["today"]) == (3, 2)
    assert reply["per_minute"] == pytest.approx(4.0)  # two more in the half minute since the first
    assert world.call("GET", "/api/progress?labeller=Bob")["answered"] == 0
    assert len(queries) == 5


def test_statistics_by_hand(make_world, monkeypatch):
    """Ann answers four pairs, never swapped; Bob gives a second opinion on the two of them that want one."""
    world = make_world()
    monkeypatch.setattr(label_server.random, "random", lambda: 0.75)
    run = world.run()
    world.status(run, accuracy_heldout=0.6, global_step=10)
    said = [("left", (1.0, 0.0)), ("right", (1.0, 0.0)), ("equal", (2.0, 2.0)), ("cant-tell", (0.0, 1.0))]
    for i, (answer, sums) in enumerate(said):
        world.args.overlap_frac = float(i < 2)
        world.query(run, sums=sums)
        world.now += 10
        world.answer(world.claim(), answer, seconds=float(i))
    world.now += 100
    for answer in ("right", "equal"):  # newest first: Ann said right, then left
        world.now += 5
        world.answer(world.claim("Bob"), answer, "Bob")
    stats = world.call("GET", "/api/stats", role="admin")
    ann, bob = stats["labellers"]
    assert (ann["labeller"], ann["answers"], ann["per_minute"], ann["seconds"]) == ("Ann", 4, pytest.approx(6.0), 1.5)
    assert [ann[name]["k"] for name in ("equal", "cant_tell", "left", "true", "agree")] == [1, 1, 1, 1, 1]
    assert [ann[name]["n"] for name in ("equal", "cant_tell", "left", "true", "agree")] == [4, 4, 2, 2, 2]
    assert ann["left"]["interval"] == pytest.approx([0.0945, 0.9055], abs=1e-4)
    # Ann: second, first. Bob: second, equal. Agreed 1/2; by chance 1/4 (second with second).
    assert ann["kappa"] == bob["kappa"] == pytest.approx(1 / 3)
    assert (bob["answers"], bob["left"]["k"], bob["left"]["n"]) == (2, 0, 1)
    assert bob["per_minute"] == pytest.approx(12.0)
    (of_run,) = stats["runs"]
    assert (of_run["counted"], of_run["open"], of_run["late"]) == (3, 0, 0)
    assert [n for _, n in of_run["labels_over_time"]] == [1, 2, 3]
    assert of_run["accuracy_over_time"] == [[1e6, 0.6]]
    assert of_run["status"]["global_step"] == 10
    assert stats["all"]["answers"] == 6
    assert [len(label_server.thin(list(range(n)))) for n in (0, 1, 500, 501, 1234)] == [0, 1, 500, 251, 412]
    assert label_server.thin(list(range(1234)))[-1] == 1233


def test_export_has_a_line_per_event(world):
    run = world.run()
    query = world.query(run, sums=(1.0, 2.0))
    world.retract(world.answer(world.claim(), "left")["id"])
    lines = world.journal()
    assert [(e["kind"], e["labeller"], e["query"], e["run"]) for e in lines] == [
        ("answer", "Ann", query, run),
        ("retract", "Ann", query, run),
    ]
    assert lines[1]["retracts"] == lines[0]["id"]
    assert (lines[0]["sum_first"], lines[0]["sum_second"]) == (1.0, 2.0)


# Security -------------------------------------------------------------------------------------------------------------
PATHS = {
    ("PUT", "/api/runs/{id}"): "trainer",
    ("PUT", "/api/queries/{id}"): "trainer",
    ("GET", "/api/runs/{id}/events"): "trainer",
    ("POST", "/api/runs/{id}/status"): "trainer",
    ("POST", "/api/claim"): "labeller",
    ("GET", "/api/sprites/{id}"): "labeller",
    ("GET", "/api/instructions"): "labeller",
    ("POST", "/api/servings/{id}/extend"): "labeller",
    ("POST", "/api/answers"): "labeller",
    ("POST", "/api/answers/{id}/retract"): "labeller",
    ("GET", "/api/progress"): "labeller",
    ("GET", "/api/stats"): "admin",
    ("GET", "/export.jsonl"): "admin",
}


@pytest.fixture
def lone():
    """A server in memory."""
    with contextlib.closing(World("sqlite://")) as world:
        yield world


def test_every_path_needs_its_role(lone):
    known = {
        (method.upper(), re.sub(r"\{\w+\}", "{id}", path))
        for path, methods in lone.app.openapi()["paths"].items()
        for method in methods
    }
    assert known == set(PATHS) | {("GET", "/"), ("GET", "/stats")}
    for (method, path), role in PATHS.items():
        path = path.format(id=new_id())
        assert lone.client.request(method, path, content=b"{").status_code == 401
        assert lone.client.request(method, path, headers={"authorization": "Bearer wrong"}).status_code == 401
        basic = f"Basic {TOKENS[role]}"
        assert lone.client.request(method, path, headers={"authorization": basic}).status_code == 401
        for token in TOKENS:
            headers = {"authorization": f"Bearer {TOKENS[token]}"}
            status = lone.client.request(method, path, headers=headers).status_code
            assert (status == 403) == (token not in (role, "admin")), (path, token, status)
    assert lone.client.get("/nowhere").status_code == 401


def test_tokens_are_compared_as_hashes_in_constant_time(lone, monkeypatch):
    seen = []
    monkeypatch.setattr(label_server.hmac, "compare_digest", lambda a, b: seen.append((a, b)) or a == b)
    lone.call("GET", "/api/stats", role="admin")
    assert seen
    assert all(len(digest) == 32 for pair in seen for digest in pair)


def test_the_link_sets_a_strict_cookie_without_a_redirect(lone):
    reply = lone.client.get("/", params={"token": TOKENS["labeller"]}, follow_redirects=False)
    assert reply.status_code == 200
    cookie = reply.headers["set-cookie"]
    assert {"HttpOnly", "Path=/", "SameSite=strict"} < set(cookie.split("; "))
    assert "Secure" not in cookie
    assert TOKENS["labeller"] not in reply.text
    assert lone.client.get("/").status_code == 200  # by the cookie
    assert lone.client.get("/stats").status_code == 403
    lone.client.cookies.clear()
    for path, status in (("/", 401), ("/?token=wrong", 401), ("/stats", 401), ("/?token=é", 401)):
        reply = lone.client.get(path)
        assert (reply.status_code, "set-cookie" in reply.headers) == (status, False)
    assert lone.client.get("/", params={"token": TOKENS["trainer"]}).status_code == 403
    assert lone.client.get("/stats", params={"token": TOKENS["admin"]}).status_code == 200


def test_the_cookie_is_secure_behind_https():
    world = World("sqlite://", public_url="https://labels.example.org")
    client = TestClient(world.app, base_url="https://labels.example.org")
    assert "Secure" in client.get("/", params={"token": TOKENS["labeller"]}).headers["set-cookie"]


def test_another_site_can_not_act_with_the_cookie(lone):
    lone.client.get("/", params={"token": TOKENS["labeller"]})
    body = {"labeller": "Ann"}
    own, other = "http://127.0.0.1:8765", "http://evil.example"
    for headers, status in (
        ({"sec-fetch-site": "same-origin"}, 200),
        ({"sec-fetch-site": "none"}, 200),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"sec-fetch-site": "cross-site", "origin": own}, 403),
        ({"origin": own}, 200),
        ({"origin": other}, 403),
        ({"origin": "null"}, 403),
        ({}, 403),
    ):
        assert lone.client.post("/api/claim", json=body, headers=headers).status_code == status, headers
    headers = {"sec-fetch-site": "same-origin", "content-type": "text/plain"}
    assert lone.client.post("/api/claim", content=json.dumps(body), headers=headers).status_code == 422
    basic = {"authorization": "Basic eDp5"}  # of a proxy: the browser adds it to every request
    assert lone.client.post("/api/claim", json=body, headers=basic | {"origin": own}).status_code == 200
    assert lone.client.post("/api/claim", json=body, headers=basic | {"origin": other}).status_code == 403
    bearer = {"authorization": f"Bearer {TOKENS['labeller']}", "sec-fetch-site": "cross-site"}
    assert lone.client.post("/api/claim", json=body, headers=bearer).status_code == 200


def test_on_loopback_only_local_names_are_answered(lone):
    for host in ("127.0.0.1:8765", "localhost", "localhost:1", "[::1]:8765"):
        assert lone.client.get("/", headers={"host": host}).status_code == 401
    for host in ("evil.example", "127.0.0.1.evil.example:8765", "", "localhost:8765:1"):
        assert lone.client.get("/", headers={"host": host}).status_code == 400, host
    with contextlib.closing(World("sqlite://", host="0.0.0.0")) as world:
        assert world.client.get("/", headers={"host": "labels.example.org"}).status_code == 401
    with contextlib.closing(World("sqlite://", public_url="https://Labels.Example.org:8443/")) as world:
        for host in ("labels.example.org:8443", "Labels.Example.org", "LOCALHOST"):
            assert world.client.get("/", headers={"host": host}).status_code == 401
        assert world.client.get("/", headers={"host": "example.org"}).status_code == 400


def test_headers(lone):
    first, second = (lone.client.get("/", params={"token": TOKENS["labeller"]}) for _ in range(2))
    nonces = []
    for reply in (first, second):
        policy = reply.headers["content-security-policy"]
        (nonce,) = set(re.findall(r"'nonce-([\w-]+)'", policy))
        assert reply.text.count(f'nonce="{nonce}"') == 2  # style and script
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        nonces.append(nonce)
    assert nonces[0] != nonces[1]
    assert not re.search(r"\son\w+=|javascript:|https?://(?!www\.w3\.org/2000/svg)", first.text)
    for reply in (first, lone.client.get("/api/stats"), lone.client.get("/nowhere", headers={"host": "evil.example"})):
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["referrer-policy"] == "no-referrer"
        assert reply.headers["cache-control"] == "no-store"
    assert lone.client.get("/api/stats").headers["content-security-policy"] == "default-src 'none'"


def test_bodies_are_limited(lone):
    body = {"labeller": "x" * label_server.OTHER_BYTES}
    lone.call("POST", "/api/claim", body, "labeller", 413)
    parts = (b"x" * 10_000 for _ in range(10))  # chunked: no length is announced
    headers = {"authorization": f"Bearer {TOKENS['labeller']}", "content-type": "application/json"}
    assert lone.client.post("/api/claim", content=parts, headers=headers).status_code == 413
    assert lone.client.post("/api/claim", content=b"[" * 50_000, headers=headers).status_code in (400, 422)


def test_ids_can_not_be_guessed(lone):
    run = lone.run()
    ids = []
    for _ in range(10):
        lone.query(run)
        pair = lone.claim()
        ids += [pair["serving"], pair["left"].rpartition("/")[2], pair["right"].rpartition("/")[2]]
    assert len(set(ids)) == 30
    assert all(uuid.UUID(i).version == 4 for i in ids)  # 122 random bits of the operating system


def test_no_path_leads_to_the_file_system(lone, tmp_path):
    for name in ("../label_server.py", "..%2f..%2fetc%2fpasswd", "%2e%2e/label_server.tokens", "/etc/passwd"):
        for folder in ("/api/sprites/", "/", "/static/"):
            reply = lone.client.get(folder + name, headers={"authorization": f"Bearer {TOKENS['admin']}"})
            assert reply.status_code in (404, 422)
            assert "root:" not in reply.text


def test_names_and_instructions_reach_the_page_as_data_only(tmp_path):
    attack = "</script><img src=x onerror=alert(1)>"
    path = tmp_path / "told.txt"
    path.write_text(attack)
    with contextlib.closing(World("sqlite://", instructions=path)) as world:
        page = world.client.get("/", params={"token": TOKENS["admin"]}).text
        assert attack not in page
        told = world.client.get("/api/instructions")
        assert told.headers["content-type"] == "application/json"
        assert told.json()["tasks"] == {"general": attack}
        run = world.run(name=attack, env_id=attack)
        world.query(run)
        world.answer(world.claim(attack), labeller=attack)
        stats = world.client.get("/api/stats")
        assert stats.headers["content-type"] == "application/json"
        assert stats.json()["labellers"][0]["labeller"] == attack
    for script in (label_server.LABEL_SCRIPT, label_server.STATS_SCRIPT):
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", script)


def test_odd_text_is_refused_in_one_sentence(lone):
    headers = {"authorization": f"Bearer {TOKENS['labeller']}", "content-type": "application/json"}
    for body in (b'{"labeller": "\\ud800"}', b'{"labeller": "a\\u0000b"}', b"\xff", b"{", b"[]", b'{"labeller": 3}'):
        reply = lone.client.post("/api/claim", content=body, headers=headers)
        assert reply.status_code in (400, 422), body
        assert isinstance(reply.json()["detail"], str)


# Robustness -----------------------------------------------------------------------------------------------------------
BOUNDED = hypothesis.settings(deadline=None, suppress_health_check=list(hypothesis.HealthCheck), database=None)


class Machine(stateful.RuleBasedStateMachine):
    """Any order of claims, answers, double posts, undos, pauses and restarts, beside a model of a few lines.

    One rule draws what to do: Hypothesis leaves most of several rules out of most examples, and then little happens.
    """

    deeds = ["put"] * 3 + ["claim"] * 3 + ["answer"] * 5 + ["undo"] * 2 + ["train"] * 2 + ["wait"] * 2 + ["reopen"]
    make_url = None

    def __init__(self):
        super().__init__()
        self.world = World(type(self).make_url())
        self.run = self.world.run()
        self.queries, self.servings, self.acknowledged = [], {}, []
        self.standing, self.stream, self.seq = {}, {}, 0

    @stateful.rule(data=st.data(), deed=st.sampled_from(deeds))
    def do(self, data, deed):
        getattr(self, deed)(lambda options: data.draw(st.sampled_from(options)))

    def pick(self, draw, answered):
        known = [serving for serving, of in self.servings.items() if bool(of["answer"]) == answered]
        return draw(known) if known else None

    def put(self, draw):
        self.queries.append(self.world.query(self.run))
        self.claim(draw)

    def claim(self, draw):
        name = draw(["Ann", "Bob", "Cyd"])
        pair = self.world.claim(name)
        done = {of["query"] for of in self.servings.values() if of["name"] == name and of["answer"]}
        held = {of["query"] for of in self.servings.values() if not of["answer"] and of["until"] > self.world.now}
        offered = [q for q in self.queries if q not in done | held | self.standing.keys()]
        assert (pair and pair["query"]) == (offered[-1] if offered else None)
        if pair:
            until = self.world.now + label_server.LEASE
            self.servings[pair["serving"]] = {"query": pair["query"], "name": name, "until": until, "answer": None}

    def answer(self, draw):
        if serving := self.pick(draw, False):
            of, said = self.servings[serving], draw(["left", "right", "equal", "cant-tell"])
            reply = self.world.answer({"serving": serving}, said, of["name"])
            late, counted = of["until"] < self.world.now, of["query"] not in self.standing
            assert (reply["late"], reply["counted"]) == (late, counted)
            assert self.world.answer({"serving": serving}, said, of["name"], id=reply["id"]) == reply
            self.world.answer({"serving": serving}, "left", of["name"], expect=409)
            of["answer"] = reply["id"]
            self.acknowledged.append(reply["id"])
            if counted:
                self.standing[of["query"]] = reply["id"]

    def undo(self, draw):
        if serving := self.pick(draw, True):
            of, id = self.servings[serving], new_id()
            for _ in range(2):
                self.world.retract(of["answer"], of["name"], id=id)
            self.acknowledged.append(id)
            if self.standing.get(of["query"]) == of["answer"]:
                del self.standing[of["query"]]
            of["answer"], of["until"] = None, self.world.now + label_server.LEASE

    def wait(self, draw):
        self.world.now += draw([1, label_server.GRACE, label_server.LEASE + 1])

    def reopen(self, _):
        self.world.close()
        self.world.open()

    def train(self, _):
        for event in self.world.events(self.run, self.seq):
            assert event["seq"] > self.seq
            self.seq = event["seq"]
            assert (event["query"] in self.stream) == (event["kind"] == "retract")
            if event["kind"] == "retract":
                assert self.stream.pop(event["query"]) == event["answer"]
            else:
                self.stream[event["query"]] = event["answer"]

    def teardown(self):
        self.world.now += label_server.GRACE
        self.train(None)
        lines = self.world.journal()
        journal = {line["id"]: line for line in lines}
        assert [line["id"] for line in lines] == self.acknowledged  # each once, in order
        assert self.stream == {query: journal[id]["answer"] for query, id in self.standing.items()}
        self.world.close()


def test_any_order_of_requests(request, database_url, tmp_path):
    def make_url():
        if database_url.startswith("sqlite"):
            return f"sqlite:///{tmp_path}/{new_id()}.sqlite"
        return new_postgres_database(request.getfixturevalue("postgres"))

    Machine.make_url = staticmethod(make_url)
    examples = 12 if database_url.startswith("sqlite") else 5
    phases = [hypothesis.Phase.generate]  # shrinking a failure would take minutes
    settings = hypothesis.settings(BOUNDED, max_examples=examples, stateful_step_count=25, phases=phases)
    stateful.run_state_machine_as_test(Machine, settings=settings)


idle = label_server.make_app(label_server.Store("sqlite://"), TOKENS, label_server.Args(), stopping=lambda: True)
schema = schemathesis.openapi.from_asgi("/openapi.json", idle, headers={"host": "127.0.0.1"})


@schema.parametrize()
@hypothesis.settings(BOUNDED, max_examples=12)
def test_no_request_makes_the_server_fail(case):
    for role in ("admin", "labeller"):
        headers = {"authorization": f"Bearer {TOKENS[role]}", "host": "127.0.0.1"}
        assert case.call(headers=headers).status_code < 500


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_sigkill_loses_and_doubles_no_answer(request, tmp_path, database):
    url = new_postgres_database(request.getfixturevalue("postgres")) if database == "postgresql" else None
    server = Server(tmp_path, url, "--repeat-frac", "0", "--overlap-frac", "0")
    try:
        result = storm(server, 3, random.Random(0), pause=(0.2, 0.8))
    finally:
        server.kill()
    assert result.pop("acknowledged") > 5  # on a machine that does other things too
    assert result == {"kills": 3} | dict.fromkeys(result.keys() - {"kills"}, 0)


# The command line -----------------------------------------------------------------------------------------------------
def fails(capsys, *flags):
    """The one sentence with which the program ends, having written nothing."""
    with pytest.raises(SystemExit) as ended:
        label_server.main([*flags])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("label_server: ")
    assert message.count("\n") == 1
    return message


def test_bad_input_ends_in_one_sentence(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "outside [0, 1]" in fails(capsys, "--repeat-frac", "1.5")
    assert "outside [0, 1]" in fails(capsys, "--overlap-frac", "nan")
    assert "--port" in fails(capsys, "--port", "70000")
    assert "--public-url" in fails(capsys, "--public-url", "labels.example.org")
    assert "can't be read" in fails(capsys, "--instructions", "nowhere.txt")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    assert "can't be read" in fails(capsys, "--instructions", "bytes.txt")
    (tmp_path / "empty.txt").write_text("\n")
    assert "is empty" in fails(capsys, "--instructions", "empty.txt")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "another --port" in fails(capsys, "--port", str(taken.getsockname()[1]))
    assert "directory" in fails(capsys, "--port", "0", "--database-url", "sqlite:///nowhere/x.sqlite")
    for memory in ("sqlite://", "sqlite:///:memory:"):
        assert "is no file" in fails(capsys, "--port", "0", "--database-url", memory)
    assert "not a database URL" in fails(capsys, "--port", "0", "--database-url", "x.sqlite")
    assert "neither SQLite's nor PostgreSQL's" in fails(capsys, "--port", "0", "--database-url", "mysql://x")
    away = "postgresql+psycopg://ann:secret@127.0.0.1:1/x"
    message = fails(capsys, "--port", "0", "--database-url", away)
    assert "can't be opened" in message
    assert "secret" not in message
    (tmp_path / "other.sqlite").write_text("not a database at all, but long enough to be looked at" * 20)
    assert "can't be opened" in fails(capsys, "--port", "0", "--database-url", "sqlite:///other.sqlite")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bytes.txt", "empty.txt", "other.sqlite"]
    (tmp_path / "label_server.tokens").write_text('{"trainer": 3')
    assert "remove the file" in fails(capsys, "--port", "0")


def test_a_database_of_another_version_is_refused_and_kept(capsys, database_url, tmp_path):
    world = World(database_url)
    world.query(world.run())
    with world.store.begin() as conn:
        conn.execute(label_server.schema_version.update().values(version=99))
    world.close()
    assert "schema version 99" in fails(capsys, "--port", "0", "--database-url", database_url)
    engine = sa.create_engine(database_url)
    with engine.begin() as conn:
        assert conn.scalar(sa.select(sa.func.count()).select_from(label_server.query)) == 1
        conn.execute(label_server.schema_version.delete())
    engine.dispose()
    assert "is not a label server's" in fails(capsys, "--port", "0", "--database-url", database_url)


def test_what_a_start_prints_and_leaves(tmp_path):
    server = Server(tmp_path, None)
    try:
        tokens = server.tokens
        assert set(tokens) == {"url", "trainer", "labeller", "admin"}
        assert tokens["url"] == server.url
        label, train, stats, kept = (line.strip() for line in server.links)
        assert label.endswith(f"{server.url}/?token={tokens['labeller']}")
        assert train.endswith(f"python ppo_mujoco_rlhf.py --human --labels 700 --label-server {server.url}")
        assert stats.endswith(f"{server.url}/stats?token={tokens['admin']}")
        assert sqlite3.sqlite_version in kept
        connection, times = http.client.HTTPConnection(server.url.removeprefix("http://")), []
        for _ in range(20):  # with Nagle's algorithm each takes 40 ms: headers and body are two packets
            started = time.perf_counter()
            connection.request("GET", "/api/instructions", headers={"authorization": f"Bearer {tokens['labeller']}"})
            assert connection.getresponse().read()
            times.append(time.perf_counter() - started)
        connection.close()
        assert np.median(times) < 0.03
        assert stat.S_IMODE((tmp_path / "label_server.tokens").stat().st_mode) == 0o600
        second = subprocess.run(
            [sys.executable, label_server.__file__, "--port", "0"], cwd=tmp_path, capture_output=True
        )
        assert (second.returncode, second.stdout) == (2, b"")
        assert b"another process has it open" in second.stderr
        assert json.loads((tmp_path / "label_server.tokens").read_text()) == tokens
        os.kill(server.process.pid, signal.SIGTERM)
        assert server.process.wait(10) in (0, -signal.SIGTERM)
        server.process.stdout.close()
        server.start()
        assert server.tokens == tokens  # links stay valid
    finally:
        server.kill()


def test_a_trainer_elsewhere_is_given_its_token(tmp_path):
    server = Server(tmp_path, None, "--public-url", "https://labels.example.org/")
    server.kill()
    trainer = server.tokens["trainer"]
    assert server.links[1].endswith(f"--label-server 'https://labels.example.org/?token={trainer}'\n")
    assert f" https://labels.example.org/?token={server.tokens['labeller']}\n" in server.links[0]
    assert server.tokens["url"] == "https://labels.example.org"


def test_a_trainer_started_here_finds_its_token(capsys, tmp_path, monkeypatch):
    """The line that is printed holds the token, unless a trainer that is started in this directory reads the file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(label_server.uvicorn.Server, "run", lambda *_, **__: None)
    (tmp_path / "data").mkdir()
    for url in ("sqlite:///here.sqlite", f"sqlite:///{tmp_path}/absolute.sqlite", "sqlite:///data/there.sqlite"):
        label_server.main(["--port", "0", "--database-url", url])
        line = capsys.readouterr().out.splitlines()[1]
        folder = tmp_path / "data" if "there" in url else tmp_path
        token = json.loads((folder / "label_server.tokens").read_text())["trainer"]
        assert line.endswith(f"/?token={token}'") == ("there" in url)
        assert (token in line) == ("there" in url)


def test_importing_has_no_side_effect(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(Path(label_server.__file__).parent)!r}); import label_server"
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, check=True)
    assert not list(tmp_path.iterdir())
