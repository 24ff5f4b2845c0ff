"""The label server against hand-worked answers, beside a trainer that only writes files."""

import contextlib
import csv
import http.client
import json
import math
import os
import random
import re
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import tempfile
import time
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
from label_world import CLIP, TOKENS, Trainer, World, new_id

SETTLED = label_server.GRACE + 1


@pytest.fixture
def world(tmp_path):
    with contextlib.closing(World(tmp_path / "runs")) as world:
        yield world


@pytest.fixture
def make_world(tmp_path):
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(contextlib.closing(World(tmp_path / "runs", **options)))


# What a trainer writes ------------------------------------------------------------------------------------------------
def test_a_pair_is_shown_when_all_its_files_are_there(world, capsys):
    run = world.run()
    number = world.ask(run)
    whole, npz = run.path(number, ".1.webp").read_bytes(), run.path(number, ".npz").read_bytes()
    for name, content, message in (
        (".1.webp", None, None),
        (".1.webp", whole[:-9], "not a whole WebP"),
        (".1.webp", b"", "not a whole WebP"),
        (".0.webp", cv2.imencode(".png", np.zeros((9, 9)))[1].tobytes(), "not a whole WebP"),
        (".npz", npz[:50], "can't be read"),
        (".npz", b"", "can't be read"),
    ):
        other = world.run()
        good = {end: run.path(number, end).read_bytes() for end in (".0.webp", ".1.webp", ".npz")}
        for end, data in good.items():
            other.path(0, end).write_bytes(data)
        if content is None:
            other.path(0, name).unlink()
        else:
            other.path(0, name).write_bytes(content)
        world.look()
        world.look()
        assert world.claim("Bob", other.folder.name) is None
        told = capsys.readouterr().err
        assert told.count("\n") == bool(message)  # once, and nothing where a file is only on its way
        assert (message or "") in told
        other.path(0, name).write_bytes(good[name])  # a folder that is copied while it grows
        world.look()
        assert world.claim("Bob", other.folder.name)


def test_pairs_without_pictures_and_runs_without_people_are_passed_over(world):
    oracle = Trainer(world.folder / "oracle")
    info = json.loads((oracle.folder / "args.json").read_text())
    oracle.write("args.json", info | {"args": info["args"] | {"human": False}})
    oracle.ask()
    run = world.run()
    with open(run.path(0, ".npz"), "wb") as file:  # a loaded label
        np.savez_compressed(file, sums=[0.0, 1.0])
    (run.folder / "preferences" / "answers.jsonl").write_text('{"pair": 0, "mu": 1.0, "loaded": true}\n')
    (run.folder / "preferences" / "notes.npz").write_bytes(b"foreign")
    run.asked = 1
    assert world.ask(run) == 1
    assert world.claim()["pair"] == 1
    assert world.claim() is None
    assert oracle.folder.name not in world.store.runs
    assert world.call("GET", "/api/stats", role="admin")["labellers"] == []
    assert world.told()["runs"][run.folder.name]["used"] == 0


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"args": {"human": true}}', "KeyError 'clip'"),
        ('{"args": {"human": true}, "clip": {"frames": 0}}', "ValidationError"),
        ('{"args": {"human": true}, "clip": CLIP}', "KeyError 'env_id'"),
    ],
)
def test_a_damaged_run_is_told_once_and_passed_over(world, capsys, text, message):
    folder = world.folder / "broken"
    folder.mkdir()
    (folder / "args.json").write_text(text.replace("CLIP", json.dumps(CLIP)))
    number = world.ask(world.run())
    world.look()
    told = capsys.readouterr().err
    assert "args.json is damaged, or of the first version" in told
    assert message in told
    assert told.count("\n") == 1
    assert world.claim()["pair"] == number


def test_whatever_is_wrong_with_one_folder_the_others_go_on(world, capsys, monkeypatch):
    (world.folder / "lost+found").mkdir()
    in_fact = Path.exists

    def exists(path):
        if "lost+found" in path.parts:
            raise PermissionError(13, "Permission denied", str(path))
        return in_fact(path)

    monkeypatch.setattr(Path, "exists", exists)  # root may read everything
    endless = world.folder / "endless"
    endless.mkdir()
    run = {"args": {"human": True, "env_id": "Hopper-v5", "labels": math.inf}, "clip": CLIP}
    (endless / "args.json").write_text(json.dumps(run))
    torn = world.run("a torn one")
    (torn.folder / "preferences" / "pending.jsonl").write_text('{"id": "x"}\n')
    number = world.ask(world.run())
    world.look()
    told = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1].rsplit("/", 1)[1] for line in told] == ["a torn one", "endless", "lost+found"]
    assert world.claim()["pair"] == number


# Sides ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("swapped", [False, True])
def test_sides(world, monkeypatch, swapped):
    """The served pictures are decoded: whatever is on the left, the trainer hears which of its clips was meant."""
    monkeypatch.setattr(label_server.random, "random", lambda: 0.25 if swapped else 0.75)
    run, expected = world.run(), {}
    for said in ("left", "right", "equal", "cant-tell"):
        number = world.ask(run, greys=(50, 200), sums=(1.0, 2.0))
        pair = world.claim()
        assert (pair["pair"], pair["run"], pair["task"], pair["clip"]) == (number, run.folder.name, "Hopper-v5", CLIP)
        greys = []
        for side in ("left", "right"):
            reply = world.client.get(f"/{pair[side]}", headers={"authorization": f"Bearer {TOKENS['labeller']}"})
            assert reply.headers["content-type"] == "image/webp"
            assert reply.headers["cache-control"] == "private, max-age=31536000, immutable"
            sheet = cv2.imdecode(np.frombuffer(reply.content, np.uint8), cv2.IMREAD_COLOR)
            assert sheet.shape == (12, 24, 3)
            greys.append(int(sheet[0, 0, 0]))
        assert greys == ([200, 50] if swapped else [50, 200])
        assert pair["sums"] == ([2.0, 1.0] if swapped else [1.0, 2.0])
        world.answer(pair, said)
        first, second = (0.0, 1.0) if swapped else (1.0, 0.0)
        expected[number] = {"left": first, "right": second, "equal": 0.5, "cant-tell": None}[said]
    world.look(SETTLED)
    assert run.answers() == expected


def test_sides_are_drawn_evenly(world):
    random.seed(5)
    run, lefts = world.run(), 0
    for _ in range(64):
        world.ask(run, sums=(1.0, 2.0))
        pair = world.claim()
        lefts += pair["sums"][0] == 1.0
        world.answer(pair)
    assert 20 <= lefts <= 44  # 3 sigma


def test_labellers_do_not_learn_the_sums(world):
    world.ask(world.run(), sums=(1.0, 2.0))
    pair = world.claim(role="labeller")
    assert set(pair) == {"serving", "left", "right", "clip", "task", "run", "instructions"}
    assert pair["instructions"].startswith("Which hopper gets further to the right?\n")


# Who gets what --------------------------------------------------------------------------------------------------------
def test_newest_first_and_nobody_gets_a_pair_of_another(world):
    run = world.run()
    numbers = [world.ask(run) for _ in range(6)]
    order = [world.claim(name)["pair"] for name in ("Ann", "Bob", "Ann", "Ann", "Bob", "Cyd")]
    assert order == numbers[::-1]
    assert world.claim("Ann") is None


def test_a_link_for_one_run(world):
    old, new = world.run(), world.run()
    for run in (old, new):
        world.ask(run)
    assert world.claim(run=old.folder.name)["run"] == old.folder.name
    assert world.claim(run=old.folder.name) is None
    assert world.claim(run="../elsewhere") is None
    assert world.claim()["run"] == new.folder.name


def test_one_name_holds_so_many_pairs_only(world):
    run = world.run()
    for _ in range(label_server.MOST_HELD + 1):
        world.ask(run)
    assert all(world.claim("Ann") for _ in range(label_server.MOST_HELD))
    assert world.claim("Ann") is None
    assert world.claim("Bob")


def test_pairs_beyond_the_one_on_screen_are_for_who_has_enough(world):
    run = world.run()
    for _ in range(3):
        world.ask(run)
    first = world.claim()
    assert world.claim(held=[first["serving"]]) is None  # two are free, and somebody may come
    world.ask(run)
    assert world.claim(held=[first["serving"]])


def test_a_lease_ends_by_itself_and_a_late_answer_trains_if_nobody_else_answered(world):
    run = world.run()
    number = world.ask(run)
    first = world.claim("Ann")
    world.now += label_server.LEASE - 1
    assert world.claim("Bob") is None
    assert world.claim("Ann", held=[first["serving"]], want=False) is None
    assert world.claimed["gone"] == []
    world.now += label_server.LEASE - 1
    assert world.claim("Bob") is None
    world.now += 2
    assert world.claim("Ann")["serving"] == first["serving"]  # the same serving: a page that has it shows it once
    world.now += label_server.LEASE + 1
    second = world.claim("Bob")
    assert second["pair"] == number
    assert world.claim("Ann", held=[first["serving"]]) is None
    assert world.claimed["gone"] == [first["serving"]]
    reply = world.answer(first, "equal", "Ann")
    assert (reply["late"], reply["counted"]) == (True, True)
    reply = world.answer(second, "cant-tell", "Bob")
    assert (reply["late"], reply["counted"]) == (False, False)
    world.look(SETTLED)
    assert run.answers() == {number: 0.5}


def test_a_late_answer_to_an_answered_pair_is_stored_and_does_not_train(world):
    run = world.run()
    number = world.ask(run)
    first = world.claim("Ann")
    world.now += label_server.LEASE + 1
    world.answer(world.claim("Bob"), "equal", "Bob")
    reply = world.answer(first, "left", "Ann")
    assert (reply["late"], reply["counted"]) == (True, False)
    world.undo(reply["id"])  # changes nothing for the trainer
    world.look(SETTLED)
    assert run.answers() == {number: 0.5}
    assert len(world.journal()) == 3
    assert world.claim("Ann") is None


def test_a_closed_page_lets_go_of_its_pairs_at_once(world):
    run = world.run()
    world.ask(run)
    pair = world.claim("Ann")
    world.call("POST", "/api/claim", {"labeller": "Bob", "left": [pair["serving"]], "want": False})
    assert world.claim("Bob") is None  # it is not his
    world.call("POST", "/api/claim", {"labeller": "Ann", "left": [pair["serving"]], "want": False})
    assert world.claim("Ann")["serving"] == pair["serving"]  # her page was only loaded again
    world.call("POST", "/api/claim", {"labeller": "Ann", "left": [pair["serving"]], "want": False})
    assert world.told("Ann", [pair["serving"]])["gone"] == []  # or came back into sight
    assert world.claim("Bob") is None
    world.call("POST", "/api/claim", {"labeller": "Ann", "left": [pair["serving"]], "want": False})
    assert world.claim("Bob")
    assert world.told("Ann", [pair["serving"]])["gone"] == [pair["serving"]]


def test_answers_are_stored_once(world):
    run = world.run()
    world.ask(run)
    pair = world.claim()
    reply = world.answer(pair, "left")
    assert world.answer(pair, "left", id=reply["id"]) == reply
    world.answer(pair, "left", expect=409)
    world.answer(pair, "left", labeller="Bob", expect=409)
    world.answer({"serving": new_id()}, expect=404)
    world.ask(run)
    other = world.claim()
    world.answer(other, id=reply["id"], expect=409)
    for bad in ({"answer": "up"}, {"seconds": -1.0}, {"labeller": " "}, {"labeller": "x" * 41}, {"id": "A" * 32}):
        body = {"id": new_id(), "serving": pair["serving"], "labeller": "Ann", "answer": "left", "seconds": 1.0}
        world.call("POST", "/api/answers", body | bad, "labeller", 422)
    assert len(world.journal()) == 1
    world.look(SETTLED)
    assert len(run.lines()) == 1
    assert world.claim(held=[new_id(), pair["serving"]], want=False) is None
    assert len(world.claimed["gone"]) == 2
    world.call("GET", f"/api/clips/{new_id()}/0/0", None, "labeller", 410)
    world.call("GET", f"/api/clips/{run.folder.name}/99/0", None, "labeller", 410)
    world.call("GET", f"/api/clips/{run.folder.name}/0/2", None, "labeller", 422)


def test_an_answer_to_a_pair_that_is_gone_is_told(world):
    run = world.run()
    world.ask(run)
    pair = world.claim()
    run.folder.rename(world.folder / "elsewhere.txt")
    (world.folder / "elsewhere.txt" / "args.json").unlink()
    assert "moved or deleted" in world.answer(pair, expect=410)["detail"]
    world.look()
    assert "moved or deleted" in world.answer(pair, expect=410)["detail"]
    world.call("GET", f"/{pair['left']}", expect=410)


def test_a_run_that_comes_back_is_as_it_was(world):
    run = world.run()
    for _ in range(2):
        world.ask(run)
    pair = world.claim()
    answer = world.answer(pair, "equal")["id"]
    run.folder.rename(world.folder.parent / "away")
    world.look()
    world.undo(answer, expect=410)
    assert world.claim() is None
    (world.folder.parent / "away").rename(run.folder)
    world.look(SETTLED)
    assert run.answers() == {pair["pair"]: 0.5}
    assert world.told()["runs"][run.folder.name]["open"] == 1
    assert world.claim("Bob")
    assert world.claim("Bob") is None


def test_a_renamed_run_is_labelled_on(make_world):
    """Its answers' ids are in the log, under the name that it had."""
    world = make_world(repeat=1.0)
    run = world.run("before")
    first = world.ask(run)
    world.answer(world.claim())
    world.look(SETTLED)
    run.stop()
    run.folder.rename(world.folder / "after")
    run.folder = world.folder / "after"
    run.start()
    world.look()
    for _ in range(label_server.REPEAT_GAP):
        number = world.ask(run)
        pair = world.claim()
        assert pair["pair"] == number
        world.answer(pair)
    assert world.claim()["pair"] == first
    world.look(SETTLED)
    assert len(run.lines()) == len(run.answers()) == label_server.REPEAT_GAP + 1


def test_a_run_that_can_not_be_written_at_the_start_keeps_what_is_pending(world, monkeypatch):
    run = world.run()
    number = world.ask(run)
    other = world.ask(run)
    pairs = {pair["pair"]: pair for pair in (world.claim(), world.claim())}
    world.answer(pairs[number], "equal")
    world.close()
    write = os.write
    monkeypatch.setattr(label_server.os, "write", lambda file, data: write(file, data[:-1]))
    world.open()
    world.answer(pairs[other], "equal", expect=503)  # the page sends it again
    monkeypatch.undo()
    world.look()
    assert run.answers() == {number: 0.5}
    assert world.answer(pairs[other], "equal")["counted"]


def test_a_token_may_have_white_space_around_it(world):
    assert world.client.get("/", params={"token": TOKENS["labeller"] + "\n"}).status_code == 200


# Whether a run lives --------------------------------------------------------------------------------------------------
def test_a_run_is_served_while_its_trainer_is_there(world):
    run = world.run()
    world.ask(run)
    pair = world.claim()
    run.stop()
    world.look()
    assert world.claim("Bob") is None
    assert "is not running" in world.claimed["notice"]
    world.claim(held=[pair["serving"]], want=False)
    assert world.claimed["gone"] == [pair["serving"]]  # a page that has it drops it
    run.start()
    world.look(label_server.LEASE)
    assert world.claim("Bob")["pair"] == pair["pair"]  # resumed, it is live again with its open pairs
    run.status(phase="finished")
    world.look(label_server.LEASE + 1)
    assert world.claim() is None
    run.status(phase="training")  # gone on with, for more steps
    world.look()
    assert world.claim()


def test_a_folder_that_another_machine_shares_lives_while_its_status_is_young(world):
    run = world.run()
    run.stop()
    (run.folder / "run.lock").unlink(missing_ok=True)
    world.ask(run)
    assert world.claim() is None
    run.status(time=world.now - 50)
    world.look()
    assert world.claim()
    world.look(11)
    assert world.claim(held=[], want=False) is None and "not running" in world.claimed["notice"]
    run.status(time=0)  # that machine's clock is wrong
    world.look()
    world.look(label_server.YOUNG - 1)
    assert "with others" in (world.claim("Bob"), world.claimed["notice"])[1]
    world.look(2)
    assert "not running" in (world.claim("Bob"), world.claimed["notice"])[1]


def test_what_a_trainer_does_not_tell_is_passed_over(world):
    run = world.run()
    for text in ("", "{", "[]", '{"phase": "dancing"}', '{"phase": "training", "progress": "much"}'):
        (run.folder / "status.json").write_text(text)
        world.look()
        assert world.store.runs[run.folder.name].status == label_server.Status()
    world.ask(run)
    assert world.claim()


# What the trainer gets back -------------------------------------------------------------------------------------------
def test_an_answer_is_withheld_until_two_more_or_fifteen_seconds(world):
    run = world.run()
    numbers = [world.ask(run) for _ in range(4)]
    world.answer(world.claim("Ann"), "equal", "Ann")
    world.now += 1
    world.answer(world.claim("Bob"), "equal", "Bob")
    world.answer(world.claim("Bob"), "cant-tell", "Bob")
    world.look()
    assert run.lines() == []
    world.answer(world.claim("Bob"), "equal", "Bob")  # releases Bob's first, not Ann's
    (line,) = run.lines()
    assert {name: line[name] for name in ("pair", "mu", "who", "seconds", "time")} == {
        "pair": numbers[2], "mu": 0.5, "who": "Bob", "seconds": 2.0, "time": 1e6 + 1,
    }  # fmt: skip
    world.look(13)
    assert len(run.lines()) == 1
    world.look(1)
    assert [line["pair"] for line in run.lines()] == [numbers[2], numbers[3]]
    world.look(1)
    assert run.answers() == {numbers[2]: 0.5, numbers[3]: 0.5, numbers[1]: None, numbers[0]: 0.5}
    assert run.lines("pending.jsonl") == []


def test_what_is_undone_in_time_never_reaches_the_trainer(world):
    run = world.run()
    number = world.ask(run)
    pair = world.claim()
    answer = world.answer(pair, "equal")["id"]
    world.look(label_server.GRACE - 1)
    again = world.undo(answer)
    assert {k: again["pair"][k] for k in ("serving", "left")} == {k: pair[k] for k in ("serving", "left")}
    assert world.undo(answer) == again  # posted twice
    world.undo(answer, "Bob", expect=409)
    world.undo(new_id(), expect=404)
    assert world.claim("Bob") is None  # leased anew
    world.look(label_server.GRACE + 1)
    assert run.lines() == []
    assert world.answer(pair, "equal", id=answer) == {"late": False, "counted": False, "id": answer}  # of before
    undone, answer = answer, world.answer(pair, "cant-tell")["id"]
    assert world.undo(undone) == {"pair": None}  # it has been, and nothing else is
    world.look(SETTLED)
    assert run.answers() == {number: None}
    assert "learned" in world.undo(answer, expect=409)["detail"]
    assert len(run.lines()) == 1


def test_the_first_line_of_a_pair_counts_whoever_wrote_it(world):
    """Two servers, or an editor: a pair that has a line is shown to nobody, and gets no second line."""
    run = world.run()
    first, second = world.ask(run), world.ask(run)
    pairs = {pair["pair"]: pair for pair in (world.claim(), world.claim())}
    world.answer(pairs[first], "equal")
    with open(run.folder / "preferences" / "answers.jsonl", "a") as file:
        file.write(f'nonsense\n{{"pair": {first}, "mu": 1.0}}\n{{"pair": {second}, "mu": 0.0, "who": 3}}\n[]\n')
        file.write('{"pair": [], "mu": []}\n{"pair": 9, "mu": []}\n{"pair": "9", "mu": 1}\n{"pair": 9, "mu": 0.3}\n')
    world.look(SETTLED)
    assert run.folder.joinpath("preferences/answers.jsonl").read_text().count("\n") == 8
    assert world.answer(pairs[second], "equal")["counted"] is False
    world.look(label_server.LEASE)
    assert world.claim("Bob") is None


# What is lost when something is killed: nothing -----------------------------------------------------------------------
def reopen(world, *, without_database=False):
    world.close()
    if without_database:
        for path in world.folder.glob("label_server.sqlite*"):
            path.unlink()
    world.open()


@pytest.mark.parametrize("without_database", [False, True])
def test_a_start_writes_what_was_acknowledged(world, without_database):
    run = world.run()
    numbers = [world.ask(run) for _ in range(4)]
    pairs = [world.claim() for _ in range(4)]
    world.answer(pairs[0], "equal")
    world.answer(pairs[1], "cant-tell")
    undone = world.answer(pairs[2], "equal")["id"]
    world.undo(undone)
    assert [line["pair"] for line in run.lines()] == [pairs[0]["pair"]]
    reopen(world, without_database=without_database)
    assert run.answers() == {numbers[3]: 0.5, numbers[2]: None}
    assert len(run.lines()) == 2
    assert run.lines("pending.jsonl") == []
    reopen(world, without_database=True)
    world.look(label_server.LEASE + 1)
    assert len(run.lines()) == 2
    assert {world.claim("Bob")["pair"] for _ in range(2)} == {numbers[0], numbers[1]}
    assert world.claim("Bob") is None
    assert [event["labeller"] for event in world.journal()] == ["Ann", "Ann"]  # statistics take up too


def test_a_database_that_is_deleted_while_the_server_runs_costs_no_answer(world):
    run = world.run()
    number = world.ask(run)
    pair = world.claim()
    for path in world.folder.glob("label_server.sqlite*"):
        path.unlink()
    world.answer(pair, "equal")
    reopen(world)
    assert run.answers() == {number: 0.5}


def test_lines_that_a_crash_tore_are_ended_and_passed_over(world):
    run = world.run()
    numbers = [world.ask(run) for _ in range(3)]
    world.close()
    folder = run.folder / "preferences"
    line = {"pair": numbers[0], "mu": 1.0, "who": "Ann", "id": new_id()}
    (folder / "answers.jsonl").write_text(json.dumps(line) + '\n{"pair": 1, "mu"')
    whole = {"pair": numbers[2], "mu": 0.5, "who": "Ann", "id": new_id()}
    (folder / "pending.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(whole) + '\n{"pair": 1, "mu": 1.0, "w')
    world.open()
    text = (folder / "answers.jsonl").read_text()
    assert text.splitlines()[1] == '{"pair": 1, "mu"'
    assert text.endswith("}\n")
    assert [json.loads(row)["pair"] for row in text.splitlines()[::2]] == [numbers[0], numbers[2]]
    assert world.claim()["pair"] == numbers[1]
    assert world.claim() is None


def test_a_torn_line_that_is_whole_but_for_its_newline_counts_once(world):
    run = world.run()
    number = world.ask(run)
    world.close()
    line = json.dumps({"pair": number, "mu": 1.0, "who": "Ann", "id": new_id()})
    (run.folder / "preferences" / "answers.jsonl").write_text(line)
    (run.folder / "preferences" / "pending.jsonl").write_text(line + "\n")
    world.open()
    assert (run.folder / "preferences" / "answers.jsonl").read_text() == line + "\n"


def test_an_answer_that_was_stored_and_not_acknowledged_is_stored_once(world, monkeypatch):
    """Killed between pending.jsonl and the database: the page sends it again."""
    run = world.run()
    number = world.ask(run)
    pair, answer = world.claim(), new_id()
    release = label_server.release
    monkeypatch.setattr(label_server, "release", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        world.answer(pair, "equal", id=answer)
    monkeypatch.setattr(label_server, "release", release)
    reopen(world)
    assert run.answers() == {number: 0.5}
    assert world.answer(pair, "equal", id=answer)["counted"]
    assert [event["id"] for event in world.journal()] == [answer]
    assert "learned" in world.undo(answer, expect=409)["detail"]
    world.look(SETTLED)
    assert len(run.lines()) == 1


def test_an_undoing_that_was_stored_and_not_acknowledged_is_done(world, monkeypatch):
    """Killed between pending.jsonl and the log: neither is the answer written, nor the undoing refused."""
    run = world.run()
    world.ask(run)
    pair = world.claim()
    answer = world.answer(pair, "equal")["id"]
    monkeypatch.setattr(world.store, "write", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        world.undo(answer)
    reopen(world)
    assert world.undo(answer)["pair"]["serving"] == pair["serving"]
    world.look(SETTLED)
    assert run.answers() == {}
    assert world.answer(pair, "cant-tell")["counted"]


def test_an_undoing_that_was_not_taken_does_not_outlive_its_label(world, monkeypatch):
    """Its line is in pending.jsonl, but the log was full, so it was refused; then the answer went to the trainer."""
    run = world.run()
    world.ask(run)
    answer = world.answer(world.claim(), "equal")["id"]
    monkeypatch.setattr(world.store, "write", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        world.undo(answer)
    monkeypatch.undo()
    truncate = os.truncate
    monkeypatch.setattr(label_server.os, "truncate", lambda *_: None)  # killed before it is emptied
    world.look(SETTLED)
    monkeypatch.setattr(label_server.os, "truncate", truncate)
    assert run.answers() == {0: 0.5}
    reopen(world)
    world.look(label_server.LEASE + 1)
    assert world.claim("Bob") is None
    assert [event["stands"] for event in world.journal()] == [True]


def test_of_two_pending_answers_the_acknowledged_one_counts(world, monkeypatch):
    """Ann's was stored when the log was full, so she was told that it was not; Bob's was taken."""
    run = world.run()
    world.ask(run)
    pair = world.claim("Ann")
    monkeypatch.setattr(world.store, "write", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        world.answer(pair, "equal", "Ann")
    monkeypatch.undo()
    world.look(label_server.LEASE + 1)
    world.answer(world.claim("Bob"), "cant-tell", "Bob")
    reopen(world)
    assert run.answers() == {0: None}


def test_a_full_disk_is_told_and_nothing_is_lost(world, monkeypatch, capsys):
    run = world.run()
    numbers = [world.ask(run) for _ in range(2)]
    pairs, answer = [world.claim(), world.claim()], new_id()
    world.answer(pairs[0], "equal")
    write = os.write

    def half(file, data):
        return write(file, data[: len(data) // 2])

    monkeypatch.setattr(label_server.os, "write", half)
    for _ in range(2):
        assert "try again" in world.answer(pairs[1], "equal", id=answer, expect=503)["detail"]
    assert "No space left" in capsys.readouterr().err
    world.look(SETTLED)
    assert "No space left" in capsys.readouterr().err
    assert run.answers() == {}
    monkeypatch.undo()
    assert world.answer(pairs[1], "equal", id=answer)["counted"]
    world.look(SETTLED)
    path = run.folder / "preferences" / "answers.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    assert sorted(line["pair"] for line in lines) == numbers


def test_a_log_that_is_full_takes_up_foreign_lines_later(world, monkeypatch):
    run = world.run()
    number = world.ask(run)
    (run.folder / "preferences" / "answers.jsonl").write_text(f'{{"pair": {number}, "mu": 1.0, "who": "Eve"}}\n')
    full = sa.exc.OperationalError("INSERT", {}, Exception("database or disk is full"))
    monkeypatch.setattr(world.store, "write", lambda *_: (_ for _ in ()).throw(full))
    world.look()
    monkeypatch.undo()
    world.look()
    assert world.claim() is None
    assert [event["labeller"] for event in world.journal()] == ["Eve"]


def test_the_wall_clock_may_go_back(tmp_path):
    """Leases and grace run on another clock."""
    with contextlib.closing(World(tmp_path / "runs")) as world:
        world.store.wall = lambda: 0.0
        run = world.run()
        number = world.ask(run)
        world.claim("Ann")
        world.now += label_server.LEASE + 1
        world.answer(world.claim("Bob"), "equal", "Bob")
        world.look(SETTLED)
        assert run.answers() == {number: 0.5}


def test_a_pair_on_screen_stays_its_persons_over_a_restart(world):
    run = world.run()
    number = world.ask(run)
    pair = world.claim("Ann")
    reopen(world)
    assert world.claim("Bob") is None
    assert world.claim("Ann", held=[pair["serving"]], want=False) is None
    assert world.claimed["gone"] == []
    assert world.answer(pair, "equal")["counted"]
    world.look(SETTLED)
    assert run.answers() == {number: 0.5}


def test_a_restart_counts_no_pair_as_held_that_nobody_can_answer_any_more(world):
    """Bob let each of twelve pairs go, and Ann answered it."""
    run = world.run()
    for _ in range(label_server.MOST_HELD):
        world.ask(run)
        pair = world.claim("Bob")
        world.call("POST", "/api/claim", {"labeller": "Bob", "left": [pair["serving"]], "want": False}, expect=200)
        world.answer(world.claim("Ann"), "equal", "Ann")
    number = world.ask(run)
    reopen(world)
    assert world.claim("Bob")["pair"] == number


# Repeats and overlap --------------------------------------------------------------------------------------------------
def test_repeats_come_twenty_answers_later_with_sides_swapped_and_do_not_train(make_world):
    world = make_world(repeat=1.0)
    run = world.run()
    first = world.ask(run, sums=(1.0, 2.0))
    before = world.claim()
    world.answer(before, "left")
    for _ in range(label_server.REPEAT_GAP - 1):
        number = world.ask(run)
        pair = world.claim()
        assert pair["pair"] == number
        world.answer(pair)
    last = world.ask(run)
    assert world.claim("Bob")["pair"] == last  # another person is never asked for a repetition
    number = world.ask(run)
    pair = world.claim()
    assert pair["pair"] == number  # only 20 answers, so 19 since the first
    world.answer(pair)
    again = world.claim()
    assert again["pair"] == first
    assert again["serving"] != before["serving"]
    assert again["sums"] == before["sums"][::-1]
    assert not world.answer(again, "right")["counted"]
    world.look(SETTLED)
    assert len(run.lines()) == len(run.answers()) == 21
    assert world.call("GET", "/api/stats", role="admin")["all"]["same again"]["k"] == 1
    assert world.claim()["pair"] != first


def test_overlap_goes_to_one_other_person_and_does_not_train(make_world):
    world = make_world(overlap=1.0)
    run = world.run()
    number = world.ask(run)
    assert world.answer(world.claim("Ann"), "equal", "Ann")["counted"]
    assert world.claim("Ann") is None
    assert world.claim("Bob") is None  # not while Ann can undo: both would have it on the screen then
    world.look(SETTLED)
    pair = world.claim("Bob")
    assert pair["pair"] == number
    assert world.claim("Cyd") is None
    reply = world.answer(pair, "left", "Bob")
    assert (reply["late"], reply["counted"]) == (False, False)
    assert world.claim("Cyd") is None
    world.undo(reply["id"], "Bob")
    world.look(label_server.LEASE + 1)
    assert world.claim("Cyd")["pair"] == number  # that opinion is wanted again
    assert world.claim("Ann") is None
    assert run.answers() == {number: 0.5}


def test_shares_of_repeats_and_overlap(make_world):
    world = make_world(repeat=0.3, overlap=0.1)
    run = world.run("shares")  # which pairs are due follows from the name
    for _ in range(150):
        run.ask()
    world.look()
    rows = [("repeat" in pair.due, "overlap" in pair.due) for _, pair in world.store.shown]
    repeats, overlaps = np.mean(rows, axis=0)
    assert len(rows) == 150
    assert abs(repeats - 0.3) < 3 * (0.3 * 0.7 / 150) ** 0.5
    assert abs(overlaps - 0.1) < 3 * (0.1 * 0.9 / 150) ** 0.5


# Numbers --------------------------------------------------------------------------------------------------------------
def test_kappa():
    table = {("first", "first"): 20, ("first", "second"): 5, ("second", "first"): 10, ("second", "second"): 15}
    pairs = [pair for pair, n in table.items() for _ in range(n)]
    assert label_server.cohen_kappa(pairs) == pytest.approx(0.4)  # (0.7 - 0.5) / (1 - 0.5)
    three = [("first", "first"), ("second", "equal"), ("equal", "equal"), ("first", "second")]
    assert label_server.cohen_kappa(three) == pytest.approx(3 / 11)  # agreed 1/2, by chance 5/16
    assert label_server.cohen_kappa([("equal", "equal")]) is None  # chance alone agrees always
    assert label_server.cohen_kappa([]) is None


def test_what_a_page_hears_of_a_run(world):
    run = world.run(labels=7)
    for _ in range(5):
        world.ask(run)
    for answer in ("left", "equal", "cant-tell", "left"):
        last = world.answer(world.claim(), answer)["id"]
    world.undo(last)
    world.look()
    counts = {"labels": 7, "used": 2, "yours": 2, "open": 2}
    assert world.told()["runs"] == {run.folder.name: counts}
    assert world.told("Bob")["runs"] == {run.folder.name: counts | {"yours": 0}}
    run.stop()
    world.look()
    assert world.told()["runs"] == {}


def test_every_waiting_text_is_true(world):
    """The trainer's numbers change at an even pace here: what people are told comes true."""

    def told(seconds=0.0, **status):
        world.now += seconds
        if status:
            run.status(time=world.now, **status)
        world.look()
        return world.told("Bob")["notice"]

    assert world.told()["notice"].startswith("No clips yet")
    run = world.run(labels=200)
    assert (
        told() == told(phase="initial") == "The agent makes its first moves. Clips of them come within a minute or so."
    )
    number = world.ask(run)
    pair = world.claim("Ann")
    out = "The only open pair is with others at the moment, or in a window that was closed. "
    assert told() == out + "This page goes on by itself."
    world.answer(pair, "equal")
    assert told(wanted=50) == "All open pairs are answered. The agent goes on with them in about 20 seconds."
    assert told(phase="pretraining", progress=0.0, wanted=None) == "The agent studies all answers so far, 0% done."
    studies = told(30.0, progress=0.2)
    assert studies == "The agent studies all answers so far, 20% done. It is ready in about 2 minutes at the latest."
    assert told(100.0).endswith("It is ready in about 20 seconds at the latest.")
    training = "No clips to compare right now: the agent is training, {}% done. "
    assert told(phase="training", progress=None) == training.format(0) + "This page goes on by itself."  # resumed
    assert told(2.0, labels_due=1) == training.format(0) + "This page goes on by itself."
    assert told(60.0, labels_due=4, step=10) == training.format(1) + "The next clips come in about 4 minutes."
    assert told(200.0) == training.format(1) + "The next clips come in about 60 seconds."  # at 1 + 16, 3 a minute
    second = world.ask(run)
    world.claim("Ann")
    assert told() == out + "The next clips come in about 80 seconds."
    assert told(wanted=3, labels_due=None) == out + "This page goes on by itself."
    run.told["labels"] = 1
    thanks = "All 1 labels that the agent asked for are in. Thank you! "
    assert told(wanted=None, step=20) == thanks + "It trains on with them to the end."
    assert told(10.0, step=60) == thanks + "Its training ends in about 4 minutes."
    run.stop()
    assert told() == "The training program is not running at the moment. This page goes on by itself when it is."
    assert told(phase="finished") == "The run is over: 1 of 1 labels were used, 0 of them yours. Thank you!"
    assert "1 of them yours" in world.told("Ann")["notice"]
    world.look(SETTLED)
    assert run.answers() == {number: 0.5}
    assert world.told()["films"] == [f"api/clips/{run.folder.name}/{number}/0"] * 2
    assert second == number + 1


def test_statistics_by_hand(make_world, monkeypatch):
    """Ann answers four pairs, never swapped; Bob gives a second opinion on the two of them that want one."""
    world = make_world()
    monkeypatch.setattr(label_server.random, "random", lambda: 0.75)
    run = world.run()
    run.status(accuracy_heldout=0.6, step=10, time=1e6)
    said = [("left", (1.0, 0.0)), ("right", (1.0, 0.0)), ("equal", (2.0, 2.0)), ("cant-tell", (0.0, 1.0))]
    for i, (answer, sums) in enumerate(said):
        world.args.overlap_frac = float(i < 2)
        world.ask(run, sums=sums)
        world.now += 10
        world.answer(world.claim(), answer, seconds=float(i))
    world.look(100)
    for answer in ("right", "equal"):  # newest first: Ann said right, then left
        world.now += 5
        world.answer(world.claim("Bob"), answer, "Bob")
    stats = world.call("GET", "/api/stats", role="admin")
    ann, bob = stats["labellers"]
    habits, shares = ann["habits"], ("equal", "can't tell", "chose left", "as true sums", "agree")
    assert (ann["labeller"], habits["answers"], habits["seconds"]) == ("Ann", 4, 1.5)
    assert habits["a minute"] == pytest.approx(6.0)
    assert [habits[name]["k"] for name in shares] == [1, 1, 1, 1, 1]
    assert [habits[name]["n"] for name in shares] == [4, 4, 2, 2, 2]
    assert habits["chose left"]["share"] == 0.5
    # Ann: second, first. Bob: second, equal. Agreed 1/2; by chance 1/4 (second with second).
    assert habits["κ"] is None  # two pairs are too few
    habits = bob["habits"]
    assert (ann["trained"], bob["trained"]) == (3, 0)  # who can't tell has given no label
    assert (habits["answers"], habits["chose left"]["k"], habits["chose left"]["n"]) == (2, 0, 1)
    assert habits["a minute"] == pytest.approx(12.0)
    (of_run,) = stats["runs"]
    assert (of_run["used"], of_run["open"]) == (3, 0)
    assert (of_run["status"]["step"], of_run["status"]["accuracy_heldout"]) == (10, 0.6)
    assert stats["all"]["answers"] == 6
    assert [of["agree"]["n"] for of in (stats["all"], bob["habits"])] == [2, 2]


def test_export_has_a_line_per_event(world):
    run = world.run()
    number = world.ask(run, sums=(1.0, 2.0))
    world.undo(world.answer(world.claim(), "left")["id"])
    lines = world.journal()
    assert [(e["kind"], e["labeller"], e["pair"], e["run"]) for e in lines] == [
        ("answer", "Ann", number, run.folder.name),
        ("undo", "Ann", number, run.folder.name),
    ]
    assert lines[1]["id"] == lines[0]["id"]
    assert [event["stands"] for event in lines] == [False, False]
    assert (lines[0]["sum_first"], lines[0]["sum_second"]) == (1.0, 2.0)


def test_a_barred_person_trains_nothing_from_then_on(world):
    run = world.run()
    first, second, third = (world.ask(run) for _ in range(3))
    pairs = {pair["pair"]: pair for pair in (world.claim() for _ in range(3))}
    world.answer(pairs[first], "equal")
    world.look(SETTLED)
    world.answer(pairs[second], "equal")
    world.mark("Ann", "barred")
    assert world.answer(pairs[third], "equal")["counted"] is False
    world.look(SETTLED)
    reopen(world)
    world.look(label_server.LEASE + 1)
    assert run.answers() == {first: 0.5}
    assert {world.claim("Bob")["pair"] for _ in range(2)} == {second, third}  # they are open to others
    (ann,) = world.call("GET", "/api/stats", role="admin")["labellers"]
    assert (ann["barred"], ann["habits"]["answers"], ann["trained"]) == (True, 3, 1)
    assert [event["barred"] for event in world.journal()] == [True] * 3
    world.look(label_server.LEASE + 1)
    assert world.claim() is None  # what trained nothing is not asked again while she is barred
    world.mark("Ann", "barred", False)
    again = {pair["pair"]: pair for pair in (world.claim() for _ in range(2))}
    assert again.keys() == {second, third}  # or, with nobody else there, the trainer would wait for ever
    assert all(world.answer(pair, "equal")["counted"] for pair in again.values())
    fourth = world.ask(run)
    assert world.answer(world.claim(), "equal")["counted"]
    world.look(SETTLED)
    assert run.answers() == dict.fromkeys((first, second, third, fourth), 0.5)


def test_a_run_is_paused_and_put_away(world):
    run = world.run()
    world.ask(run)
    for mark, shown in (("paused", "The study is paused"), ("archived", "No clips yet")):
        world.mark(run.folder.name, mark)
        reopen(world)
        assert world.claim() is None
        assert world.told()["notice"].startswith(shown)
        (of_run,) = world.call("GET", "/api/stats", role="admin")["runs"]
        assert (of_run["paused"], of_run["archived"]) == (mark == "paused", mark == "archived")
        world.mark(run.folder.name, mark, False)
    world.call("POST", "/api/marks", {"name": run.folder.name, "mark": "deleted", "on": True}, "admin", 422)
    assert world.claim()


def test_who_answers_too_fast_or_at_chance_is_flagged(world):
    """A clip takes 5 / 20 seconds."""
    run = world.run()
    random.seed(1)
    for who, seconds, right in (("careful", 2.0, 1.0), ("hasty", 0.2, 1.0), ("guessing", 2.0, 0.5)):
        for _ in range(24):
            world.ask(run, sums=(1.0, 2.0))
            pair = world.claim(who)
            better = pair["sums"].index(2.0)
            world.answer(
                pair, ("left", "right")[better if random.random() < right else 1 - better], who, seconds=seconds
            )
    stats = world.call("GET", "/api/stats", role="admin")
    warnings = {of["labeller"]: of["warnings"] for of in stats["labellers"]}
    assert warnings == {"careful": [], "hasty": ["faster than a clip"], "guessing": ["as true sums: near chance"]}
    assert {doubt["why"] for doubt in stats["doubts"]} == {"against the true rewards"}
    assert {said[0] for doubt in stats["doubts"] for said in doubt["said"]} == {"guessing"}
    assert all(doubt["sums"] == [1.0, 2.0] for doubt in stats["doubts"])


def test_who_repeats_by_habit_only_is_flagged(make_world):
    """By chance somebody with these habits repeats 0.6^2 + 0.4^2 = 0.52 of the answers."""
    world = make_world()
    said = ("first",) * 12 + ("equal",) * 8
    given = [label_server.Serving("", "", 0, "Ann", "new", False, None, 0.0, said=one) for one in said]
    flag = "same again: near chance"
    for right, flagged in ((14, True), (16, False)):  # 0.52 * 20 + 2 sqrt(20 * 0.52 * 0.48) = 14.9
        stats = {name: {"k": right, "n": 20} for name in ("same again", "agree")} | {"as true sums": {"k": 0, "n": 0}}
        assert (flag in label_server.warn(world.store, stats | {"seconds": None}, given)) == flagged


def test_the_csv_has_the_answers_that_stand(world):
    run = world.run()
    for _ in range(2):
        world.ask(run, sums=(1.0, 2.0))
    pair = world.claim("=1+1")
    world.undo(world.answer(pair, "left", "=1+1")["id"], "=1+1")
    world.answer(world.claim("Bob"), "equal", "Bob")
    rows = list(csv.DictReader(world.call("GET", "/export.csv", role="admin").text.splitlines()))
    assert [[row[name] for name in ("labeller", "answer", "mu", "sum_first")] for row in rows] == [
        ["Bob", "equal", "0.5", "1.0"]
    ]
    world.answer(pair, "equal", "=1+1")
    rows = list(csv.DictReader(world.call("GET", "/export.csv", role="admin").text.splitlines()))
    assert [row["labeller"] for row in rows] == ["Bob", "'=1+1"]  # no formula in a spreadsheet


# Security -------------------------------------------------------------------------------------------------------------
PATHS = {
    ("POST", "/api/claim"): "labeller",
    ("GET", "/api/clips/{id}/1/0"): "labeller",
    ("POST", "/api/answers"): "labeller",
    ("POST", "/api/answers/{id}/undo"): "labeller",
    ("GET", "/api/stats"): "admin",
    ("GET", "/export.csv"): "admin",
    ("POST", "/api/marks"): "admin",
}


def test_every_path_needs_its_role(world):
    known = {
        (
            method.upper(),
            re.sub(r"\{(answer|run)\}", "{id}", path).replace("{pair}/{clip}", "1/0").replace("{form}", "csv"),
        )
        for path, methods in world.app.openapi()["paths"].items()
        for method in methods
    }
    assert known == set(PATHS) | {("GET", "/"), ("GET", "/stats")}
    for (method, path), role in PATHS.items():
        path = path.format(id=new_id())
        assert world.client.request(method, path, content=b"{").status_code == 401
        assert world.client.request(method, path, headers={"authorization": "Bearer wrong"}).status_code == 401
        basic = f"Basic {TOKENS[role]}"
        assert world.client.request(method, path, headers={"authorization": basic}).status_code == 401
        for token in TOKENS:
            headers = {"authorization": f"Bearer {TOKENS[token]}"}
            status = world.client.request(method, path, headers=headers).status_code
            assert (status == 403) == (token not in (role, "admin")), (path, token, status)
    assert world.client.get("/nowhere").status_code == 401


def test_tokens_are_compared_as_hashes_in_constant_time(world, monkeypatch):
    seen = []
    monkeypatch.setattr(label_server.secrets, "compare_digest", lambda a, b: seen.append((a, b)) or a == b)
    world.call("GET", "/api/stats", role="admin")
    assert seen
    assert all(len(digest) == 32 for pair in seen for digest in pair)


def test_the_link_sets_a_strict_cookie_without_a_redirect(world):
    reply = world.client.get("/", params={"token": TOKENS["labeller"]}, follow_redirects=False)
    assert reply.status_code == 200
    cookie = reply.headers["set-cookie"]
    assert {"HttpOnly", "Path=/", "SameSite=strict"} < set(cookie.split("; "))
    assert "Secure" not in cookie
    assert TOKENS["labeller"] not in reply.text
    assert world.client.get("/").status_code == 200  # by the cookie
    assert world.client.get("/stats").status_code == 403
    world.client.cookies.clear()
    for path, status in (("/", 401), ("/?token=wrong", 401), ("/stats", 401), ("/?token=é", 401)):
        reply = world.client.get(path)
        assert (reply.status_code, "set-cookie" in reply.headers) == (status, False)


def test_the_label_link_does_not_end_the_statistics_page_in_the_same_browser(world):
    world.ask(world.run(), sums=(1.0, 2.0))
    for path, role in (("/stats", "admin"), ("/", "labeller")):
        assert world.client.get(path, params={"token": TOKENS[role]}).status_code == 200
    assert world.client.get("/stats").status_code == 200
    assert world.client.get("/api/stats").status_code == 200
    body = {"labeller": "Ann"}
    reply = world.client.post("/api/claim", json=body, headers={"sec-fetch-site": "same-origin"})
    assert "sums" not in reply.json()["pair"]  # nor is the label page in there any wiser


def test_the_cookie_is_secure_behind_https(tmp_path):
    world = World(tmp_path, public_url="https://labels.example.org")
    client = TestClient(world.app, base_url="https://labels.example.org")
    assert "Secure" in client.get("/", params={"token": TOKENS["labeller"]}).headers["set-cookie"]


def test_another_site_can_not_act_with_the_cookie(world):
    world.client.get("/", params={"token": TOKENS["labeller"]})
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
        assert world.client.post("/api/claim", json=body, headers=headers).status_code == status, headers
    headers = {"sec-fetch-site": "same-origin", "content-type": "text/plain"}
    assert world.client.post("/api/claim", content=json.dumps(body), headers=headers).status_code == 422
    basic = {"authorization": "Basic eDp5"}  # of a proxy: the browser adds it to every request
    assert world.client.post("/api/claim", json=body, headers=basic | {"origin": own}).status_code == 200
    assert world.client.post("/api/claim", json=body, headers=basic | {"origin": other}).status_code == 403
    bearer = {"authorization": f"Bearer {TOKENS['labeller']}", "sec-fetch-site": "cross-site"}
    assert world.client.post("/api/claim", json=body, headers=bearer).status_code == 200


def test_on_loopback_only_local_names_are_answered(world, tmp_path):
    for host in ("127.0.0.1:8765", "localhost", "localhost:1", "[::1]:8765"):
        assert world.client.get("/", headers={"host": host}).status_code == 401
    for host in ("evil.example", "127.0.0.1.evil.example:8765", "", "localhost:8765:1"):
        assert world.client.get("/", headers={"host": host}).status_code == 400, host
    with contextlib.closing(World(tmp_path / "open", host="0.0.0.0")) as world:
        assert world.client.get("/", headers={"host": "labels.example.org"}).status_code == 401
    with contextlib.closing(World(tmp_path / "proxied", public_url="https://Labels.Example.org:8443/")) as world:
        for host in ("labels.example.org:8443", "Labels.Example.org", "LOCALHOST"):
            assert world.client.get("/", headers={"host": host}).status_code == 401
        assert world.client.get("/", headers={"host": "example.org"}).status_code == 400
    with contextlib.closing(World(tmp_path / "path", public_url="https://example.org:8443/labels/")) as world:
        assert world.client.get("/", headers={"host": "example.org"}).status_code == 401


def test_headers(world):
    first, second = (world.client.get("/", params={"token": TOKENS["labeller"]}) for _ in range(2))
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
    for reply in (
        first,
        world.client.get("/api/stats"),
        world.client.get("/nowhere", headers={"host": "evil.example"}),
    ):
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["referrer-policy"] == "no-referrer"
        assert reply.headers["cache-control"] == "no-store"
    assert world.client.get("/api/stats").headers["content-security-policy"] == "default-src 'none'"


def test_bodies_are_limited(world):
    body = {"labeller": "x" * label_server.BODY_BYTES}
    world.call("POST", "/api/claim", body, "labeller", 413)
    parts = (b"x" * 10_000 for _ in range(10))  # chunked: no length is announced
    headers = {"authorization": f"Bearer {TOKENS['labeller']}", "content-type": "application/json"}
    assert world.client.post("/api/claim", content=parts, headers=headers).status_code == 413
    assert world.client.post("/api/claim", content=b"[" * 50_000, headers=headers).status_code in (400, 422)


def test_ids_can_not_be_guessed(world):
    run = world.run()
    ids = []
    for _ in range(10):
        world.ask(run)
        ids.append(world.claim()["serving"])
    assert len(set(ids)) == 10
    assert all(re.fullmatch("[0-9a-f]{32}", i) for i in ids)  # 128 random bits of the operating system


def test_no_path_leads_to_the_file_system(world, tmp_path):
    run = world.run()
    for name in ("../label_server.py", "..%2f..%2fetc%2fpasswd", "%2e%2e/label_server.tokens", "/etc/passwd"):
        for folder in (f"/api/clips/{run.folder.name}/", "/", "/static/"):
            reply = world.client.get(folder + name, headers={"authorization": f"Bearer {TOKENS['admin']}"})
            assert reply.status_code in (404, 422)
            assert "root:" not in reply.text


def test_names_and_instructions_reach_the_page_as_data_only(tmp_path):
    attack = "</script><img src=x onerror=alert(1)>"
    path = tmp_path / "told.txt"
    path.write_text(attack)
    with contextlib.closing(World(tmp_path / "runs", instructions=path)) as world:
        page = world.client.get("/", params={"token": TOKENS["admin"]}).text
        assert attack not in page
        world.ask(world.run(env_id=attack, script=attack))
        pair = world.claim(attack)
        assert pair["instructions"].startswith(attack)
        world.answer(pair, labeller=attack)
        stats = world.client.get("/api/stats")
        assert stats.headers["content-type"] == "application/json"
        assert stats.json()["labellers"][0]["labeller"] == attack
    for script in (label_server.LABEL_SCRIPT, label_server.STATS_SCRIPT):
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", script)


def test_odd_text_is_refused_in_one_sentence(world):
    headers = {"authorization": f"Bearer {TOKENS['labeller']}", "content-type": "application/json"}
    for body in (b'{"labeller": "\\ud800"}', b'{"labeller": "a\\u0000b"}', b"\xff", b"{", b"[]", b'{"labeller": 3}'):
        reply = world.client.post("/api/claim", content=body, headers=headers)
        assert reply.status_code in (400, 422), body
        assert isinstance(reply.json()["detail"], str)


# Robustness -----------------------------------------------------------------------------------------------------------
BOUNDED = hypothesis.settings(deadline=None, suppress_health_check=list(hypothesis.HealthCheck), database=None)


class Machine(stateful.RuleBasedStateMachine):
    """Any order of claims, answers, double posts, undos, pauses and restarts, beside a model of a few lines.

    One rule draws what to do: Hypothesis leaves most of several rules out of most examples, and then little happens.
    """

    deeds = ["put"] * 3 + ["claim"] * 3 + ["answer"] * 5 + ["undo"] * 2 + ["let_go", "reopen", "empty"] + ["wait"] * 2
    make_folder = None

    def __init__(self):
        super().__init__()
        self.world = World(type(self).make_folder())
        self.run = self.world.run()
        self.numbers, self.servings = [], {}
        self.standing = {}  # by pair: name, answer, since when

    @stateful.rule(data=st.data(), deed=st.sampled_from(deeds))
    def do(self, data, deed):
        getattr(self, deed)(lambda options: data.draw(st.sampled_from(options)))
        lines = [line["pair"] for line in self.run.lines()]
        assert len(lines) == len(set(lines))
        for pair in lines:
            assert self.run.answers()[pair] == label_server.MU[self.standing[pair]["answer"]]

    def pick(self, draw, answered):
        known = [serving for serving, of in self.servings.items() if bool(of["answer"]) == answered]
        return draw(known) if known else None

    def put(self, draw):
        self.numbers.append(self.world.ask(self.run))
        self.claim(draw)

    def claim(self, draw):
        name = draw(["Ann", "Bob", "Cyd"])
        pair = self.world.claim(name)
        done = {of["pair"] for of in self.servings.values() if of["name"] == name and of["answer"]}
        held = {of["pair"] for of in self.servings.values() if not of["answer"] and of["until"] > self.world.now}
        offered = [n for n in self.numbers if n not in done | held | self.standing.keys()]
        now = [of for of in self.servings.values() if not of["answer"] and of["until"] > self.world.now]
        offered = offered if sum(of["name"] == name for of in now) < label_server.MOST_HELD else []
        assert (pair and pair["pair"]) == (offered[-1] if offered else None)
        if pair:
            until = self.world.now + label_server.LEASE
            swapped = self.world.store.servings[pair["serving"]].swapped
            self.servings[pair["serving"]] = {"pair": pair["pair"], "name": name, "until": until, "answer": None}
            self.servings[pair["serving"]]["swapped"] = swapped

    def answer(self, draw):
        if serving := self.pick(draw, False):
            of, said = self.servings[serving], draw(["left", "right", "equal", "cant-tell"])
            reply = self.world.answer({"serving": serving}, said, of["name"])
            late, counted = of["until"] < self.world.now, of["pair"] not in self.standing
            assert (reply["late"], reply["counted"]) == (late, counted)
            assert self.world.answer({"serving": serving}, said, of["name"], id=reply["id"]) == reply
            self.world.answer({"serving": serving}, "left", of["name"], expect=409)
            of["answer"] = reply["id"]
            if counted:
                first = (said == "left") != of["swapped"]
                clip = {"left": first, "right": first}.get(said)
                answer = said if clip is None else "first" if clip else "second"
                self.standing[of["pair"]] = {"id": reply["id"], "answer": answer, "at": self.world.now}

    def undo(self, draw):
        if serving := self.pick(draw, True):
            of = self.servings[serving]
            stands = self.standing.get(of["pair"], {}).get("id") == of["answer"]
            body = {"labeller": of["name"]}
            headers = {"authorization": f"Bearer {TOKENS['labeller']}"}
            path = f"/api/answers/{of['answer']}/undo"
            status = {self.world.client.post(path, json=body, headers=headers).status_code for _ in range(2)}
            if stands and of["pair"] in self.run.answers():
                assert status == {409}
            elif status == {200}:
                if stands:
                    del self.standing[of["pair"]]
                of["answer"], of["until"] = None, self.world.now + label_server.LEASE
            else:
                assert (status, stands) == ({409}, False)

    def let_go(self, draw):
        if serving := self.pick(draw, False):
            of = self.servings[serving]
            body = {"labeller": of["name"], "left": [serving], "want": False}
            self.world.call("POST", "/api/claim", body)
            of["until"] = min(of["until"], self.world.now)

    def wait(self, draw):
        self.world.look(draw([1, label_server.GRACE, label_server.LEASE + 1]))
        for pair, of in self.standing.items():
            assert (pair in self.run.answers()) or of["at"] > self.world.now - label_server.GRACE

    def reopen(self, _):
        self.world.close()
        self.world.open()
        for of in self.servings.values():
            of["until"] = self.world.now + label_server.LEASE
        assert self.run.answers().keys() == self.standing.keys()

    def empty(self, _):
        """With an empty database the servings are forgotten, and no label."""
        self.world.close()
        for path in self.world.folder.glob("label_server.sqlite*"):
            path.unlink()
        self.world.open()
        assert self.run.answers().keys() == self.standing.keys()
        for of in self.servings.values():
            if of["answer"]:
                self.world.undo(of["answer"], of["name"], expect=409 if self.stands(of) else 404)
        self.servings = {}
        self.done = {}

    def stands(self, of):
        return self.standing.get(of["pair"], {}).get("id") == of["answer"]

    def teardown(self):
        self.world.look(SETTLED)
        expected = {pair: label_server.MU[of["answer"]] for pair, of in self.standing.items()}
        assert self.run.answers() == expected
        self.world.close()


def test_any_order_of_requests(tmp_path):
    Machine.make_folder = staticmethod(lambda: tmp_path / new_id())
    phases = [hypothesis.Phase.generate]  # shrinking a failure would take minutes
    settings = hypothesis.settings(BOUNDED, max_examples=12, stateful_step_count=25, phases=phases)
    stateful.run_state_machine_as_test(Machine, settings=settings)


idle_folder = tempfile.TemporaryDirectory()
idle = World(Path(idle_folder.name))
schema = schemathesis.openapi.from_asgi("/openapi.json", idle.app, headers={"host": "127.0.0.1"})


@schema.parametrize()
@hypothesis.settings(BOUNDED, max_examples=12)
def test_no_request_makes_the_server_fail(case):
    for role in ("admin", "labeller"):
        headers = {"authorization": f"Bearer {TOKENS[role]}", "host": "127.0.0.1"}
        assert case.call(headers=headers).status_code < 500


def test_sigkill_loses_and_doubles_no_answer(tmp_path):
    server = Server(tmp_path, "--repeat-frac", "0", "--overlap-frac", "0")
    try:
        result = storm(server, 2, random.Random(0), pause=(0.2, 0.8))
    finally:
        server.kill()
    assert result.pop("acknowledged") > 5  # on a machine that does other things too
    result.pop("undone")
    assert result == {"kills": 2} | dict.fromkeys(result.keys() - {"kills"}, 0)


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
    for url in ("labels.example.org", "https://ann:secret@example.org", "https://example.org/?token=secret"):
        message = fails(capsys, "--public-url", url)
        assert "--public-url" in message
        assert "secret" not in message
    assert "can't be read" in fails(capsys, "--instructions", "nowhere.txt")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    assert "can't be read" in fails(capsys, "--instructions", "bytes.txt")
    (tmp_path / "empty.txt").write_text("\n")
    assert "is empty" in fails(capsys, "--instructions", "empty.txt")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "another --port" in fails(capsys, "--port", str(taken.getsockname()[1]))
    for folder in ("nowhere/runs", "empty.txt", "/proc"):
        assert "no directory to read and write in" in fails(capsys, "--port", "0", "--runs-dir", folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bytes.txt", "empty.txt"]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "label_server.sqlite").write_text("not a database at all, but long enough" * 20)
    assert "can't be opened" in fails(capsys, "--port", "0")
    (tmp_path / "runs" / "label_server.sqlite").unlink()
    (tmp_path / "runs" / "label_server.tokens").write_text('{"labeller": 3')
    assert "remove the file" in fails(capsys, "--port", "0")


def test_the_tokens_files_error_shows_no_token(capsys, tmp_path):
    (tmp_path / "label_server.tokens").write_text('{"labeller": "secret", "admin": ')
    assert "secret" not in fails(capsys, "--port", "0", "--runs-dir", str(tmp_path))


def test_a_database_of_another_version_is_refused_and_kept(capsys, tmp_path):
    path = tmp_path / "label_server.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE other (x)")
        connection.commit()
    assert "is not a label server's" in fails(capsys, "--port", "0", "--runs-dir", str(tmp_path))
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("other",)]


def test_a_log_of_another_version_is_refused(capsys, tmp_path):
    with contextlib.closing(World(tmp_path)) as world, world.store.engine.begin() as conn:
        conn.execute(label_server.log.insert(), [{"row": {"kind": "person", "who": "Ann", "barred": True}}])
    assert "another version (person); move it away" in fails(capsys, "--port", "0", "--runs-dir", str(tmp_path))


def test_what_a_start_prints_and_leaves(tmp_path):
    server = Server(tmp_path)
    try:
        tokens = server.tokens
        assert set(tokens) == {"labeller", "admin"}
        label, stats, watched = (line.strip() for line in server.links)
        assert label.endswith(f"{server.url}/?token={tokens['labeller']}")
        assert stats.endswith(f"{server.url}/stats?token={tokens['admin']}")
        assert str(tmp_path / "runs") in watched
        command = Path(f"/proc/{server.process.pid}/cmdline")
        assert not command.exists() or not any(tokens[role] in command.read_text() for role in TOKENS)
        connection, times = http.client.HTTPConnection(server.url.removeprefix("http://")), []
        for _ in range(20):  # with Nagle's algorithm each takes 40 ms: headers and body are two packets
            started = time.perf_counter()
            headers = {"authorization": f"Bearer {tokens['labeller']}", "content-type": "application/json"}
            connection.request("POST", "/api/claim", "{}", headers)
            assert connection.getresponse().read()
            times.append(time.perf_counter() - started)
        connection.close()
        assert np.median(times) < 0.03
        for name in ("tokens", "sqlite"):
            assert stat.S_IMODE((tmp_path / "runs" / f"label_server.{name}").stat().st_mode) == 0o600
        again = [sys.executable, label_server.__file__, "--port", "0", "--runs-dir", str(tmp_path / "runs")]
        second = subprocess.run(again, capture_output=True)
        assert (second.returncode, second.stdout) == (2, b"")
        assert b"another label server" in second.stderr
        assert json.loads((tmp_path / "runs" / "label_server.tokens").read_text()) == tokens
        os.kill(server.process.pid, signal.SIGTERM)
        assert server.process.wait(10) in (0, -signal.SIGTERM)
        server.process.stdout.close()
        server.start()
        assert server.tokens == tokens  # links stay valid
    finally:
        server.kill()


def test_what_is_pending_is_written_at_the_end(tmp_path):
    server = Server(tmp_path)
    try:
        run = Trainer(tmp_path / "runs" / "one")
        number = run.ask()
        while not (pair := server.insist("POST", "/api/claim", {"labeller": "Ann"})["pair"]):
            time.sleep(0.05)
        body = {"id": new_id(), "serving": pair["serving"], "labeller": "Ann", "answer": "equal", "seconds": 1}
        server.insist("POST", "/api/answers", body)
        assert run.lines() == []
        server.process.send_signal(signal.SIGINT)
        server.process.wait(10)
        assert run.answers() == {number: 0.5}
    finally:
        server.kill()


def test_a_public_address_is_the_one_that_is_printed(tmp_path):
    server = Server(tmp_path, "--public-url", "https://example.org/labels/")
    server.kill()
    assert f" https://example.org/labels/?token={server.tokens['labeller']}\n" in server.links[0]
    assert f" https://example.org/labels/stats?token={server.tokens['admin']}\n" in server.links[1]


@pytest.mark.parametrize("encoding", ["ascii", "cp437", "latin-1"])
def test_help_survives_any_terminal(tmp_path, encoding):
    command = [sys.executable, label_server.__file__, "--help"]
    result = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": encoding})
    assert (result.returncode, result.stderr) == (0, b"")
    assert b"--runs-dir" in result.stdout


def test_importing_has_no_side_effect(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(Path(label_server.__file__).parent)!r}); import label_server"
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, check=True)
    assert not list(tmp_path.iterdir())
