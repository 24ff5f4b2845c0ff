"""A web page where people compare two short clips, and the store behind it: human labels for the three trainers.

    python label_server.py                       # prints a link for the people who label, and a line that starts a run
    python label_server.py --instructions backflip.txt
    python label_server.py --host 0.0.0.0 --database-url postgresql+psycopg://labels@localhost/labels

"Deep Reinforcement Learning from Human Preferences", Christiano et al. 2017, arXiv:1706.03741, appendix B. The plot:

    a trainer registers its run and puts queries, each of two clips
    a person claims a serving of the newest query that nobody holds; its sides are drawn at random
    an answer is appended to the journal, and so is its undoing; nothing is ever changed there or taken out
    when the person can hardly undo it any more, the answer is appended to the stream that the trainer reads

People, trainers and this server may be on three machines, and many people and runs can share one server. Answers carry
an id made by the page, so that sending one twice stores it once. All speak JSON over HTTP; /openapi.json lists it.
"""

import asyncio
import base64
import hashlib
import hmac
import json
import math
import os
import random
import re
import secrets
import socket
import sqlite3
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

import anyio.to_thread
import sqlalchemy as sa
import tyro
import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi import Path as UrlPath
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from pydantic import BaseModel, Field, StringConstraints

SCHEMA_VERSION = 1
LEASE = 90.0  # seconds that a pair is kept for one person; the page prolongs it
GRACE = 5.0  # seconds before a trainer sees an answer, unless the same person answers again sooner
SILENCE = 86_400.0  # seconds after which a run whose trainer asks for nothing is taken for abandoned
REPEAT_GAP = 20  # answers between a pair and its repetition
LONGEST_WAIT = 30.0  # seconds that a request may wait for news
WAITING_REQUESTS = 200  # at once; each takes a thread
QUERY_BYTES, OTHER_BYTES = 16 * 2**20, 64 * 2**10  # a body with two clips at most, and any other


def fail(message: str):
    """End on bad input: one sentence on stderr, exit code 2."""
    print(f"label_server: {message}", file=sys.stderr)
    raise SystemExit(2)


# ----------------------------------------------------------------------------------------------------------------------
# Arguments
# ----------------------------------------------------------------------------------------------------------------------
@dataclass
class Args:
    host: str = "127.0.0.1"
    """address to listen on; 0.0.0.0 opens the page to the network"""
    port: int = 8765
    """port to listen on; 0 takes a free one"""
    public_url: str | None = None
    """where people reach the page, if a tunnel or proxy stands before it: https://labels.example.org"""
    database_url: str = "sqlite:///label_server.sqlite"
    """where answers are kept; for a crowd postgresql+psycopg://user@host/name"""
    instructions: Path | None = None
    """text file with your own instructions for every task: the question on the first line, the rest below"""
    repeat_frac: float = 0.05
    """share of pairs shown to the same person again, with sides swapped: self-consistency; does not train"""
    overlap_frac: float = 0.05
    """share of pairs shown to a second person too: agreement; does not train. 0: no pair is shown to two people"""


def is_local(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def check_args(args: Args) -> None:
    for flag, share in (("--repeat-frac", args.repeat_frac), ("--overlap-frac", args.overlap_frac)):
        if not 0 <= share <= 1:
            fail(f"{flag} {share} lies outside [0, 1]")
    if not 0 <= args.port < 2**16:
        fail(f"--port {args.port} lies outside [0, 65535]")
    if args.public_url and not re.fullmatch(r"https?://[\w.:\[\]-]+/?", args.public_url):
        fail(f"--public-url {args.public_url} is not of the form https://host")


# ----------------------------------------------------------------------------------------------------------------------
# What people are told (the gist of appendix B; the first line is the question above the clips)
# ----------------------------------------------------------------------------------------------------------------------
GENERAL = """\
Choose the clip in which better things happen.
Judge only what you can see in the two clips. How the agent got there, its lives or its level do not matter.
If both are about equally good, or equally bad, say so; that is an answer too. "Can't tell" is for pairs in which you \
really don't see what is going on.
You need not be sure. Most pairs take two or three seconds; the clips start again by themselves. A slip can be undone.
"""
GAME = """\
If the agent is already dead in all of a clip, take it for average play. If you see it die, or may be about to, that \
is clearly bad. Playing the game yourself for five minutes beforehand helps.
"""
ROBOT = "The camera follows the robot: its speed shows in the floor that passes by.\n"
INSTRUCTIONS = {
    "general": "Which clip is better?\n",
    "Hopper-v5": f"""Which hopper gets further to the right?
Follow its centre, the joint next to the pointed end. Moving left is worse than standing still. If both get equally \
far, the one whose centre stays higher is better.
{ROBOT}""",
    "Walker2d-v5": f"""Which walker gets further to the right?
Follow its centre, where the three limbs meet. If both get equally far, the one whose centre stays higher is better.
{ROBOT}""",
    "Swimmer-v5": f"""Which swimmer is faster to the right?
Follow the mark in the middle of its body.
{ROBOT}""",
    "HalfCheetah-v5": f"""Which cheetah is faster to the right?
{ROBOT}""",
    "Ant-v5": f"""Which ant stands better?
Standing upright comes first; if neither does, the one whose centre is higher is better. If both stand, the one that \
is faster to the right is better.
{ROBOT}""",
    "Reacher-v5": """In which clip is the green dot closer to the red one?
All of the clip counts: a dot that starts near and drifts away is worse than one that keeps a middle distance.
""",
    "InvertedPendulum-v5": """Which pole points up more?
Many pairs are ties, because both poles have fallen. If you see neither pole, you can't tell; one that you see upright \
is better than one that you don't see.
""",
    "InvertedDoublePendulum-v5": """Which double pole stands up better?
Both poles should point up; after a fall, swinging back up is good, and so is a cart near the middle of its track. A \
pole that is high and then low is worse than one at a medium height throughout.
""",
    "ALE/BeamRider-v5": f"""Who shoots more ships without being hit?
Shooting enemy ships is good. Being shot is very bad.
{GAME}""",
    "ALE/Breakout-v5": f"""Who plays the better ball?
Hitting the ball and breaking blocks is good. Losing the ball is bad.
{GAME}""",
    "ALE/Enduro-v5": """Who overtakes more cars?
Passing other cars is good, being passed is bad. An empty road is fine.
""",
    "ALE/Pong-v5": """Which clip goes better for the green paddle?
The ball past the orange paddle on the left is good. The ball past the green paddle, on the right, is bad.
""",
    "ALE/Qbert-v5": f"""Who changes the colour of more blocks?
Jumping on blocks that are not changed yet is good. Jumping off the edge or into an enemy is bad.
{GAME}""",
    "ALE/Seaquest-v5": f"""Who does better under water?
Shooting fish and submarines is good, and so is picking up divers. Running out of air or being hit is bad.
{GAME}""",
    "ALE/SpaceInvaders-v5": f"""Who shoots more invaders without being hit?
Shooting invaders is good. Being shot is bad.
{GAME}""",
}


def read_instructions(path: Path | None) -> dict[str, str]:
    if path is None:
        return INSTRUCTIONS
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"--instructions {path} can't be read as text ({error})")
    if not text:
        fail(f"--instructions {path} is empty")
    return {"general": text}


# ----------------------------------------------------------------------------------------------------------------------
# The store
# ----------------------------------------------------------------------------------------------------------------------
metadata = sa.MetaData()


def table(name: str, /, *constraints, optional: tuple[str, ...] = (), **columns) -> sa.Table:
    """Its first column is the key; a column is needed unless it is optional; a string is what it refers to."""
    key, made = next(iter(columns)), []
    for column, kind in columns.items():
        kind = sa.ForeignKey(kind) if isinstance(kind, str) else kind
        made.append(sa.Column(column, kind, primary_key=column == key, nullable=column in optional))
    return sa.Table(name, metadata, *made, *constraints)


def one_of(column: str, *values: str) -> sa.CheckConstraint:
    return sa.CheckConstraint(f"{column} in ({', '.join(map(repr, values))})")


Uuid = sa.String(32)
schema_version = table("schema_version", version=sa.Integer)
run = table(
    "run", id=Uuid, name=sa.Text, env_id=sa.Text, script=sa.Text, labels=sa.Integer, max_open=sa.Integer, clip=sa.JSON,
    finished=sa.Boolean, time=sa.Double,
)  # fmt: skip
status = table("status", sa.Index("of_run", "run"), number=sa.Integer, run="run.id", status=sa.JSON, time=sa.Double)
query = table(
    "query", sa.UniqueConstraint("id"), sa.Index("query_state", "run", "sent", "answer"),
    number=sa.Integer, id=Uuid, run="run.id", sum_first=sa.Double, sum_second=sa.Double, repeat_due=sa.Boolean,
    overlap_due=sa.Boolean, withdrawn=sa.Boolean, time=sa.Double,
    answer=Uuid,  # the event that is the first standing answer
    sent=sa.Boolean,  # it is in the trainer's stream
    optional=("sum_first", "sum_second", "answer"),
)  # fmt: skip
sprite = table(
    "sprite", sa.UniqueConstraint("query", "clip"), id=Uuid, query="query.id", clip=sa.Integer, data=sa.LargeBinary
)
serving = table(
    "serving", sa.UniqueConstraint("query", "labeller", "kind"), sa.Index("serving_labeller", "labeller", "answer"),
    one_of("kind", "new", "repeat", "overlap"),
    id=Uuid, query="query.id", labeller=sa.Text, kind=sa.Text, swapped=sa.Boolean, leased_until=sa.Double,
    time=sa.Double,
    answer=Uuid,  # the event that stands
    optional=("answer",),
)  # fmt: skip
event = table(  # the journal: rows are only ever appended
    "event", sa.UniqueConstraint("id"), sa.Index("event_labeller", "labeller", "kind", "number"),
    one_of("kind", "answer", "retract"), one_of("answer", "first", "second", "equal", "cant-tell"),
    number=sa.Integer, id=Uuid, kind=sa.Text, serving="serving.id", labeller=sa.Text, answer=sa.Text, retracts=Uuid,
    late=sa.Boolean, counted=sa.Boolean, seconds=sa.Double, time=sa.Double,
    optional=("retracts", "seconds"),
)  # fmt: skip
stream = table(  # what the trainers read, appended to as well
    "stream", sa.Index("stream_run", "run", "seq"),
    seq=sa.Integer, run="run.id", query="query.id", kind=sa.Text, answer=sa.Text,
)  # fmt: skip
later = event.alias()


class Store:
    """The database. One transaction writes at a time, so what is numbered in it is numbered in the order of commits.

    A reader who asks for all after number n would otherwise miss rows for ever: PostgreSQL hands a number out before
    the commit, and 8 may become visible after 9. An advisory lock is cheap beside the seconds that people take.

    SQLite has a single connection behind a lock, and keeps other processes out: all versions up to 3.51.2 can corrupt a
    database in WAL mode if two connections write and checkpoint at the same instant. FULL, since with NORMAL a commit
    that somebody was told of can vanish with the power.
    """

    def __init__(self, url: str, clock: Callable[[], float] = time.time):
        try:
            self.url = sa.make_url(url)
        except sa.exc.ArgumentError:
            fail(f"--database-url {url} is not a database URL like sqlite:///labels.sqlite")
        self.clock = clock
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        if not self.is_sqlite and self.url.get_backend_name() != "postgresql":
            fail(f"--database-url {url} is neither SQLite's nor PostgreSQL's")
        self.lock = threading.Lock() if self.is_sqlite else nullcontext()
        shown = self.url.render_as_string(hide_password=True)
        if self.is_sqlite and self.url.database and not Path(self.url.database).absolute().parent.is_dir():
            fail(f"--database-url {shown} lies in a directory that does not exist")
        options = {"pool_pre_ping": True, "max_overflow": 20}
        if self.is_sqlite:
            options = {"poolclass": sa.StaticPool, "connect_args": {"check_same_thread": False, "timeout": 1}}
        try:
            self.engine = sa.create_engine(self.url, **options)
            if self.is_sqlite:
                sa.event.listen(self.engine, "connect", prepare_sqlite)
                sa.event.listen(self.engine, "begin", lambda conn: conn.exec_driver_sql("BEGIN IMMEDIATE"))
            with self.begin() as conn:
                found = open_schema(conn)
        except (sa.exc.DBAPIError, sa.exc.NoSuchModuleError, ImportError) as error:
            reason = str(getattr(error, "orig", error)).strip().splitlines()[0]
            if "locked" in reason:
                reason = "another process has it open"
            fail(f"--database-url {shown} can't be opened: {reason}")
        if found:
            self.engine.dispose()
            fail(f"--database-url {shown} {found}; this program writes version {SCHEMA_VERSION}: name another database")

    @contextmanager
    def begin(self, write: bool = True):
        with self.lock, self.engine.begin() as conn:
            if write and not self.is_sqlite:
                conn.exec_driver_sql("SELECT pg_advisory_xact_lock(1706037410)")
            yield conn


def open_schema(conn) -> str | None:
    """Make the tables in an empty database; else say what is wrong with those that are there."""
    known = sa.inspect(conn).get_table_names()
    if not known:
        metadata.create_all(conn)
        conn.execute(schema_version.insert().values(version=SCHEMA_VERSION))
        return None
    version = conn.scalar(sa.select(schema_version.c.version)) if "schema_version" in known else None
    if version == SCHEMA_VERSION:
        return None
    return f"has schema version {version}" if version else "is not a label server's"


def prepare_sqlite(connection: sqlite3.Connection, _):
    connection.isolation_level = None  # so that SQLAlchemy, not sqlite3, says when a transaction begins
    for pragma in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


# ----------------------------------------------------------------------------------------------------------------------
# Queries: what a trainer puts
# ----------------------------------------------------------------------------------------------------------------------
def webp_size(data: bytes) -> tuple[int, int]:
    """Width and height from the header of a WebP file; ValueError if there is none, or the file was cut off."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        raise ValueError("is not a WebP image")
    if len(data) < max(30, 8 + int.from_bytes(data[4:8], "little")):
        raise ValueError("is a WebP image that was cut off")
    chunk, body = data[12:16], data[20:30]
    if chunk == b"VP8 " and body[3:6] == b"\x9d\x01\x2a":
        return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF
    if chunk == b"VP8L" and body[0] == 0x2F:
        bits = int.from_bytes(body[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if chunk == b"VP8X":
        return int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1
    raise ValueError("is a WebP image without a size")


def decode_clip(number: int, text: str, clip: dict) -> bytes:
    """The sprite sheet, if it is one and has the run's shape."""
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        raise HTTPException(422, f"clips[{number}] is not base64") from None
    try:
        found = webp_size(data)
    except ValueError as error:
        raise HTTPException(422, f"clips[{number}] {error}") from None
    expected = clip["columns"] * clip["width"], math.ceil(clip["frames"] / clip["columns"]) * clip["height"]
    if found != expected:
        sizes = f"is {found[0]}x{found[1]}, this run's are {expected[0]}x{expected[1]}"
        raise HTTPException(422, f"clips[{number}] {sizes}")
    return data


def is_held(now: float):
    """Somebody has the query before them: that needs no sweeper to end."""
    of_query = serving.c.query == query.c.id
    return sa.exists().where(of_query, serving.c.answer.is_(None), serving.c.leased_until > now).correlate(query)


def is_open(run_id: str):
    return sa.and_(query.c.run == run_id, ~query.c.sent, query.c.answer.is_(None), ~query.c.withdrawn)


def count_open(conn, run_id: str) -> int:
    return conn.scalar(sa.select(sa.func.count()).select_from(query).where(is_open(run_id)))


def count_awaited(conn, run_id: str) -> int:
    """What a trainer may still hear of: open queries, and answers that are held back for a while. Were those left out,
    it would ask for what it has already been given."""
    awaited = sa.and_(query.c.run == run_id, ~query.c.sent, sa.or_(query.c.answer.is_not(None), ~query.c.withdrawn))
    return conn.scalar(sa.select(sa.func.count()).select_from(query).where(awaited))


def put_run(conn, now: float, run_id: str, body: dict) -> dict:
    known = conn.execute(sa.select(run).where(run.c.id == run_id)).mappings().first()
    for name in ("env_id", "script", "clip") if known else ():
        if known[name] != body[name]:
            raise HTTPException(409, f"this run is registered with another {name}: {known[name]}")
    if known:
        changing = {name: body[name] for name in ("name", "labels", "max_open")}
        conn.execute(run.update().where(run.c.id == run_id).values(**changing))
    else:
        conn.execute(run.insert().values(id=run_id, finished=False, time=now, **body))
    return {"known": conn.scalars(sa.select(query.c.id).where(query.c.run == run_id).order_by(query.c.number)).all()}


def put_query(conn, now: float, query_id: str, body: "QueryBody", args: Args) -> dict:
    of_run = conn.execute(sa.select(run).where(run.c.id == body.run)).mappings().first()
    if not of_run:
        raise HTTPException(404, "no such run: register it first")
    clips = [decode_clip(i, text, of_run["clip"]) for i, text in enumerate(body.clips)]
    known = conn.scalar(sa.select(query.c.run).where(query.c.id == query_id))
    if known:
        stored = conn.scalars(sa.select(sprite.c.data).where(sprite.c.query == query_id).order_by(sprite.c.clip)).all()
        if known != body.run or stored != clips:
            raise HTTPException(409, "this id belongs to another query")
        return {"open": count_awaited(conn, body.run)}
    first, second = body.sums
    shares = {"repeat_due": random.random() < args.repeat_frac, "overlap_due": random.random() < args.overlap_frac}
    values = {"id": query_id, "run": body.run, "sum_first": first, "sum_second": second, "time": now, **shares}
    conn.execute(query.insert().values(**values, withdrawn=False, sent=False))
    sprites = [{"id": uuid.uuid4().hex, "query": query_id, "clip": i, "data": data} for i, data in enumerate(clips)]
    conn.execute(sprite.insert(), sprites)
    opened = count_open(conn, body.run)
    surplus = max(0, opened - of_run["max_open"])
    oldest = sa.select(query.c.id).where(is_open(body.run), ~is_held(now)).order_by(query.c.number).limit(surplus)
    withdrawn = conn.scalars(oldest).all() if surplus else []
    if withdrawn:
        conn.execute(query.update().where(query.c.id.in_(withdrawn)).values(withdrawn=True))
    return {"open": count_awaited(conn, body.run)}


# ----------------------------------------------------------------------------------------------------------------------
# Servings and answers: what a person does
# ----------------------------------------------------------------------------------------------------------------------
def answered_later():
    """Of an alias of the journal: an answer that the same person gave after this event."""
    return sa.and_(later.c.labeller == event.c.labeller, later.c.kind == "answer", later.c.number > event.c.number)


def is_live(now: float, heard: dict[str, float]):
    """Its trainer wants answers: a run that was killed, and never resumed, would else be served for ever.

    That a trainer asks is too frequent to be stored, so after a restart it is known by its status until it asks again.
    """
    asked = [run_id for run_id, time in list(heard.items()) if time > now - SILENCE]
    told = sa.select(status.c.time).where(status.c.run == run.c.id).order_by(status.c.number.desc()).limit(1)
    last_told = sa.func.coalesce(told.scalar_subquery().correlate(run), run.c.time)
    return sa.and_(~run.c.finished, sa.or_(run.c.id.in_(asked), last_told > now - SILENCE))


def choose(conn, now: float, heard: dict[str, float], labeller: str, run_id: str | None):
    """What to show next, and as what: a repetition or second opinion that is due, else the newest open query."""
    live = sa.select(run.c.id).where(is_live(now, heard), run.c.id == run_id if run_id else sa.true())
    candidates = sa.select(query.c.id).where(query.c.run.in_(live), ~is_held(now)).limit(1)
    mine = sa.exists().where(serving.c.query == query.c.id, serving.c.labeller == labeller).correlate(query)
    answered = mine.where(serving.c.answer.is_not(None))
    since = sa.select(sa.func.count()).where(answered_later()).scalar_subquery().correlate(event)
    repeats = candidates.join(event, event.c.id == query.c.answer).order_by(query.c.number)
    repeats = repeats.where(query.c.repeat_due, event.c.labeller == labeller, since >= REPEAT_GAP)
    overlaps = candidates.where(query.c.overlap_due, query.c.answer.is_not(None), ~answered)
    overlaps = overlaps.where(~mine.where(serving.c.kind != "overlap")).order_by(query.c.number.desc())
    fresh = candidates.where(~query.c.sent, query.c.answer.is_(None), ~query.c.withdrawn, ~answered)
    fresh = fresh.order_by(query.c.number.desc())
    for kind, statement in {"repeat": repeats, "overlap": overlaps, "new": fresh}.items():
        chosen = conn.scalar(statement)
        if chosen:
            return kind, chosen
    return None, None


def claim(conn, now: float, heard: dict[str, float], labeller: str, run_id: str | None, is_admin: bool) -> dict | None:
    kind, chosen = choose(conn, now, heard, labeller, run_id)
    if not chosen:
        return None
    of_mine = sa.and_(serving.c.query == chosen, serving.c.labeller == labeller)
    # A pair whose lease ran out comes back as the same serving: a page that still has it shows it once
    known = conn.scalar(sa.select(serving.c.id).where(of_mine, serving.c.kind == kind))
    if known:
        conn.execute(serving.update().where(serving.c.id == known).values(leased_until=now + LEASE))
        return describe(conn, known, is_admin)
    swapped = random.random() < 0.5
    if kind == "repeat":
        swapped = not conn.scalar(sa.select(serving.c.swapped).where(of_mine, serving.c.kind == "new"))
    values = {"id": uuid.uuid4().hex, "query": chosen, "labeller": labeller, "kind": kind, "swapped": swapped}
    conn.execute(serving.insert().values(**values, leased_until=now + LEASE, time=now))
    return describe(conn, values["id"], is_admin)


def describe(conn, serving_id: str, is_admin: bool) -> dict:
    """A serving as the page gets it; who may label does not learn the run or the true sums."""
    joined = sa.join(sa.join(serving, query, serving.c.query == query.c.id), run, query.c.run == run.c.id)
    wanted = sa.select(serving.c.swapped, query, run.c.clip, run.c.env_id).select_from(joined)
    row = conn.execute(wanted.where(serving.c.id == serving_id)).one()
    sides = conn.scalars(sa.select(sprite.c.id).where(sprite.c.query == row.id).order_by(sprite.c.clip)).all()
    sums = [row.sum_first, row.sum_second]
    if row.swapped:
        sides, sums = sides[::-1], sums[::-1]
    left, right = (f"/api/sprites/{side}" for side in sides)
    pair = {"serving": serving_id, "left": left, "right": right, "clip": row.clip, "task": row.env_id}
    pair |= {"instructions": row.env_id if row.env_id in INSTRUCTIONS else "general", "lease": LEASE}
    return pair | ({"query": row.id, "run": row.run, "sums": sums} if is_admin else {})


def find_serving(conn, serving_id: str):
    columns = (*serving.c, query.c.run, query.c.answer.label("standing"), query.c.sent)
    joined = sa.join(serving, query, serving.c.query == query.c.id)
    row = conn.execute(sa.select(*columns).select_from(joined).where(serving.c.id == serving_id)).first()
    if not row:
        raise HTTPException(404, "no such serving")
    return row


def extend(conn, now: float, serving_id: str) -> None:
    found = find_serving(conn, serving_id)
    others = sa.select(serving.c.id).where(serving.c.query == found.query, serving.c.id != serving_id)
    held = conn.scalar(others.where(serving.c.answer.is_(None), serving.c.leased_until > now).limit(1))
    if found.answer or held or (found.kind == "new" and found.standing):
        raise HTTPException(409, "this pair is answered, or somebody else has it now")
    conn.execute(serving.update().where(serving.c.id == serving_id).values(leased_until=now + LEASE))


def record_answer(conn, now: float, body: "AnswerBody") -> dict:
    known = conn.execute(sa.select(event).where(event.c.id == body.id)).first()
    if known:
        if (known.kind, known.serving, known.labeller) != ("answer", body.serving, body.labeller):
            raise HTTPException(409, "this id belongs to another answer")
        return {"late": known.late, "counted": known.counted}
    found = find_serving(conn, body.serving)
    if found.labeller != body.labeller:
        raise HTTPException(409, "this pair was served to somebody else")
    if found.answer:
        raise HTTPException(409, "this pair has been answered; retract that answer first")
    sides = {"left": ("first", "second")[found.swapped], "right": ("second", "first")[found.swapped]}
    late, counted = found.leased_until < now, found.kind == "new" and found.standing is None
    values = {"id": body.id, "kind": "answer", "serving": body.serving, "labeller": body.labeller, "late": late}
    values |= {"answer": sides.get(body.answer, body.answer), "counted": counted, "seconds": body.seconds, "time": now}
    conn.execute(event.insert().values(**values))
    conn.execute(serving.update().where(serving.c.id == body.serving).values(answer=body.id))
    if counted:
        conn.execute(query.update().where(query.c.id == found.query).values(answer=body.id))
    elif found.kind != "new":
        conn.execute(query.update().where(query.c.id == found.query).values({f"{found.kind}_due": False}))
    return {"late": late, "counted": counted}


def record_retract(conn, now: float, answer_id: str, body: "RetractBody", is_admin: bool) -> dict:
    answer = conn.execute(sa.select(event).where(event.c.id == answer_id, event.c.kind == "answer")).first()
    if not answer:
        raise HTTPException(404, "no such answer")
    if answer.labeller != body.labeller:
        raise HTTPException(409, "this answer is somebody else's")
    known = conn.execute(sa.select(event).where(event.c.id == body.id)).first()
    if known and known.retracts != answer_id:
        raise HTTPException(409, "this id belongs to another event")
    found = find_serving(conn, answer.serving)
    if found.answer == answer_id:
        values = {"id": body.id, "kind": "retract", "serving": answer.serving, "labeller": body.labeller, "time": now}
        values |= {"answer": answer.answer, "retracts": answer_id, "late": False, "counted": answer.counted}
        conn.execute(event.insert().values(**values))
        conn.execute(serving.update().where(serving.c.id == found.id).values(answer=None, leased_until=now + LEASE))
        if found.standing == answer_id:
            if found.sent:
                values = {"run": found.run, "query": found.query, "kind": "retract", "answer": answer.answer}
                conn.execute(stream.insert().values(**values))
            conn.execute(query.update().where(query.c.id == found.query).values(answer=None, sent=False))
        elif found.kind != "new":
            conn.execute(query.update().where(query.c.id == found.query).values({f"{found.kind}_due": True}))
    elif found.answer:
        return {"pair": None}
    return {"pair": describe(conn, found.id, is_admin)}


# ----------------------------------------------------------------------------------------------------------------------
# The stream: what a trainer gets back
# ----------------------------------------------------------------------------------------------------------------------
def release(conn, now: float, run_id: str) -> None:
    """Append to the stream what nobody is about to undo. Whether the trainer has an answer is thus a stored fact."""
    ripe = sa.or_(event.c.time <= now - GRACE, sa.exists().where(answered_later()).correlate(event))
    due = sa.select(query.c.id, event.c.answer).join(event, event.c.id == query.c.answer).order_by(event.c.number)
    for row in conn.execute(due.where(query.c.run == run_id, ~query.c.sent, ripe)).all():
        conn.execute(stream.insert().values(run=run_id, query=row.id, kind="answer", answer=row.answer))
        conn.execute(query.update().where(query.c.id == row.id).values(sent=True))


def read_events(conn, now: float, run_id: str, after: int) -> dict:
    if not conn.scalar(sa.select(run.c.id).where(run.c.id == run_id)):
        raise HTTPException(404, "no such run")
    release(conn, now, run_id)
    news = sa.select(stream.c.seq, stream.c.query, stream.c.kind, stream.c.answer).order_by(stream.c.seq).limit(1000)
    rows = conn.execute(news.where(stream.c.run == run_id, stream.c.seq > after))
    events = [dict(row) for row in rows.mappings()]
    return {"events": events, "open": count_awaited(conn, run_id), "seq": events[-1]["seq"] if events else after}


# ----------------------------------------------------------------------------------------------------------------------
# Progress and statistics
# ----------------------------------------------------------------------------------------------------------------------
def latest_status(conn, run_id: str) -> dict:
    newest = sa.select(status.c.status).where(status.c.run == run_id).order_by(status.c.number.desc()).limit(1)
    return conn.scalar(newest) or {}


def count_labels(conn, run_id: str) -> int:
    """Answers that train. The trainer counts the same, some seconds later."""
    training = sa.select(sa.func.count()).select_from(sa.join(query, event, event.c.id == query.c.answer))
    return conn.scalar(training.where(query.c.run == run_id, event.c.answer != "cant-tell"))


def progress(conn, now: float, heard: dict[str, float], labeller: str) -> dict:
    runs = []
    wanted = sa.select(run).where(sa.or_(run.c.finished, is_live(now, heard)))
    for row in conn.execute(wanted.order_by(run.c.time)).all():
        told = latest_status(conn, row.id)
        entry = {"run": row.id, "task": row.env_id, "labels": row.labels, "labels_used": count_labels(conn, row.id)}
        entry |= {"labels_due": told.get("labels_due", 0), "open": count_open(conn, row.id)}
        runs.append(entry | {"waiting": told.get("waiting", False), "finished": row.finished})
    mine = sa.select(sa.func.count()).select_from(sa.join(serving, event, serving.c.answer == event.c.id))
    mine = mine.where(serving.c.labeller == labeller)
    midnight = datetime.fromtimestamp(now).replace(hour=0, minute=0, second=0, microsecond=0).timestamp()
    recent = sa.select(event.c.time).where(event.c.labeller == labeller, event.c.kind == "answer")
    recent = conn.scalars(recent.where(event.c.time > now - 300).order_by(event.c.time)).all()
    minutes = (now - recent[0]) / 60 if recent else 0
    return {
        "runs": runs,
        "answered": conn.scalar(mine),
        "today": conn.scalar(mine.where(event.c.time >= midnight)),
        "per_minute": (len(recent) - 1) / minutes if len(recent) > 1 and minutes > 0 else 0.0,
    }


def binomial_interval(k: int, n: int) -> tuple[float, float] | None:
    """Wilson's 95 % interval, which stays inside [0, 1] and is right for few answers too."""
    if not n:
        return None
    z, p = 1.959964, k / n
    middle, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - spread) / (1 + z * z / n), (middle + spread) / (1 + z * z / n)


def cohen_kappa(pairs: list[tuple[str, str]]) -> float | None:
    """Agreement of two raters beyond what their own habits would give by chance: 1 is perfect, 0 chance."""
    if not pairs:
        return None
    agreed = sum(a == b for a, b in pairs) / len(pairs)
    ours, theirs = zip(*pairs, strict=True)
    chance = sum(ours.count(c) * theirs.count(c) for c in set(ours)) / len(pairs) ** 2
    return (agreed - chance) / (1 - chance) if chance < 1 else None


def share(k: int, n: int) -> dict:
    return {"k": k, "n": n, "share": k / n if n else None, "interval": binomial_interval(k, n)}


def summarise(answers: list, repeats: list[tuple[str, str]], opinions: list[tuple[str, str]]) -> dict:
    """Of one person, one run, or all: habits, consistency, agreement with others and with the true sums."""
    n, decisive = len(answers), [a for a in answers if a.answer in ("first", "second")]
    gaps = [b.time - a.time for a, b in pairwise(answers) if b.time - a.time < 60]  # longer ones are breaks
    judged = [a for a in decisive if None not in (a.sum_first, a.sum_second) and a.sum_first != a.sum_second]
    seconds = [a.seconds for a in answers if a.seconds is not None]
    return {
        "answers": n,
        "per_minute": 60 * len(gaps) / sum(gaps) if sum(gaps) else None,
        "seconds": median(seconds) if seconds else None,
        "equal": share(sum(a.answer == "equal" for a in answers), n),
        "cant_tell": share(sum(a.answer == "cant-tell" for a in answers), n),
        "left": share(sum((a.answer == "second") == a.swapped for a in decisive), len(decisive)),
        "consistent": share(sum(a == b for a, b in repeats), len(repeats)),
        "agree": share(sum(a == b for a, b in opinions), len(opinions)),
        "kappa": cohen_kappa(opinions),
        "true": share(sum((a.answer == "first") == (a.sum_first > a.sum_second) for a in judged), len(judged)),
    }


def thin(points: list) -> list:
    """At most 500 points of a curve, the last one always."""
    step = math.ceil(len(points) / 500) or 1
    return points[::-1][::step][::-1]


def read_journal(conn) -> tuple[list, list, list]:
    columns = (event.c.time, event.c.labeller, event.c.answer, event.c.counted, event.c.late, event.c.seconds)
    columns += (serving.c.kind, serving.c.swapped, serving.c.query, query.c.run, query.c.sum_first, query.c.sum_second)
    joined = sa.join(sa.join(event, serving, serving.c.answer == event.c.id), query, query.c.id == serving.c.query)
    answers = conn.execute(sa.select(*columns).select_from(joined).order_by(event.c.number)).all()
    runs = conn.execute(sa.select(run).order_by(run.c.time)).mappings().all()
    runs = [{**row, "open": count_open(conn, row["id"]), "status": latest_status(conn, row["id"])} for row in runs]
    return answers, runs, conn.execute(sa.select(status).order_by(status.c.number)).all()


def statistics(answers: list, runs: list[dict], history: list) -> dict:
    first_said, others_said = {}, {}  # by query and person; by query
    repeats, opinions = [], []  # (run, people, answers)
    for a in answers:
        if a.kind == "repeat":
            before = first_said.get((a.query, a.labeller))
            repeats += [(a.run, [a.labeller], (before, a.answer))] if before else []
            continue
        first_said[a.query, a.labeller] = a.answer
        for labeller, answer in others_said.setdefault(a.query, []):
            if "cant-tell" not in (answer, a.answer):
                opinions.append((a.run, [labeller, a.labeller], (answer, a.answer)))
        others_said[a.query].append((a.labeller, a.answer))

    def of_labeller(name):
        turned = [pair[::-1] if people[1] == name else pair for _, people, pair in opinions if name in people]
        mine = [a for a in answers if a.labeller == name]
        return {"labeller": name} | summarise(mine, [p for _, who, p in repeats if name in who], turned)

    def of_run(row):
        mine = [a for a in answers if a.run == row["id"]]
        labels = [a.time for a in mine if a.counted and a.answer != "cant-tell"]
        told = [h for h in history if h.run == row["id"] and h.status["accuracy_heldout"] is not None]
        rates = [[pair for of, _, pair in source if of == row["id"]] for source in (repeats, opinions)]
        return {
            **{name: row[name] for name in ("id", "name", "env_id", "script", "labels", "finished", "open", "status")},
            "counted": len(labels),
            "late": sum(a.late for a in mine),
            "labels_over_time": thin([[t, i + 1] for i, t in enumerate(labels)]),
            "accuracy_over_time": thin([[h.time, h.status["accuracy_heldout"]] for h in told]),
        } | summarise(mine, *rates)

    people = sorted({a.labeller for a in answers})
    everything = summarise(answers, [p for *_, p in repeats], [p for *_, p in opinions])
    return {"all": everything, "labellers": [of_labeller(p) for p in people], "runs": [of_run(row) for row in runs]}


def export(conn) -> list[dict]:
    columns = (event, serving.c.query, serving.c.kind.label("serving_kind"), serving.c.swapped, query.c.run)
    columns += (query.c.sum_first, query.c.sum_second)
    joined = sa.join(sa.join(event, serving, serving.c.id == event.c.serving), query, query.c.id == serving.c.query)
    rows = conn.execute(sa.select(*columns).select_from(joined).order_by(event.c.number)).mappings()
    return [dict(row) for row in rows]


# ----------------------------------------------------------------------------------------------------------------------
# Requests: who may send what
# ----------------------------------------------------------------------------------------------------------------------
Id = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
PRINTABLE = r"^[^\x00-\x1f\x7f]+$"
Line = Annotated[str, StringConstraints(max_length=200, pattern=PRINTABLE)]
Name = Annotated[str, StringConstraints(max_length=40, pattern=PRINTABLE, strip_whitespace=True)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, le=LONGEST_WAIT)]


class ClipBody(BaseModel):
    frames: Annotated[int, Field(ge=1, le=10_000)]
    width: Annotated[int, Field(ge=1, le=4096)]
    height: Annotated[int, Field(ge=1, le=4096)]
    columns: Annotated[int, Field(ge=1, le=10_000)]
    fps: Annotated[float, Field(gt=0, le=1000)]
    pixelated: bool


class RunBody(BaseModel):
    name: Line
    env_id: Line
    script: Line
    labels: Count
    max_open: Annotated[int, Field(ge=1, lt=2**31)]
    clip: ClipBody


class QueryBody(BaseModel):
    run: Id
    clips: tuple[str, str]
    sums: tuple[Finite | None, Finite | None]


class StatusBody(BaseModel):
    global_step: Count
    total_timesteps: Count
    labels_used: Count
    labels_due: Count
    labels: Count
    accuracy_heldout: Finite | None
    waiting: bool
    finished: bool


class ClaimBody(BaseModel):
    labeller: Name
    run: Id | None = None
    wait: Seconds = 0.0


class AnswerBody(BaseModel):
    id: Id
    serving: Id
    labeller: Name
    answer: Literal["left", "right", "equal", "cant-tell"]
    seconds: Annotated[float, Field(ge=0, le=1e6)]


class RetractBody(BaseModel):
    id: Id
    labeller: Name


HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'",
}


class Guard:
    """What a request must pass before its body is read: host, token, origin. And the headers of every reply."""

    def __init__(self, app, role_of: Callable[[str], str | None], cookie: str, hosts: set[str] | None):
        self.app, self.role_of, self.cookie, self.hosts = app, role_of, cookie, hosts

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request = Request(scope)
        limit, received = QUERY_BYTES if request.url.path.startswith("/api/queries/") else OTHER_BYTES, 0

        async def receive_some():
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise HTTPException(413, f"a body of more than {limit} bytes is too large here")
            return message

        async def send_with_headers(message):
            if message["type"] == "http.response.start":
                kept = {name for name, _ in message["headers"]}
                message["headers"] += [(n.encode(), v.encode()) for n, v in HEADERS.items() if n.encode() not in kept]
            await send(message)

        refusal = self.refuse(request)
        answer = JSONResponse({"detail": refusal[1]}, refusal[0]) if refusal else self.app
        await answer(scope, receive_some, send_with_headers)

    def refuse(self, request: Request) -> tuple[int, str] | None:
        host = request.headers.get("host", "").lower()
        # A page whose name was rebound to 127.0.0.1 reaches a local server, but under its own name
        if self.hosts is not None and re.sub(r":\d+$", "", host) not in self.hosts:
            return 400, "this server does not go by that name; see --public-url"
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        by_bearer = scheme.lower() == "bearer"  # any other scheme is meant for a proxy before this server
        by_cookie = not by_bearer and self.cookie in request.cookies
        token = request.cookies[self.cookie] if by_cookie else token if by_bearer else ""
        request.state.role = self.role_of(token)
        if request.url.path in ("/", "/stats", "/openapi.json"):  # the pages look at the token of their link
            return None
        if request.state.role is None:
            return 401, "a valid token is needed: open the link that the server printed, or send it as a bearer token"
        if by_cookie and request.method not in ("GET", "HEAD"):  # the browser adds it, whichever site asked
            site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin", "")
            if site not in ("same-origin", "none") if site else origin.partition("://")[2] != host:
                return 403, "this request comes from another site"
        return None


def needs(role: str):
    """An endpoint for this role, and for the admin."""

    async def check(request: Request):  # async, as it waits for nothing: a plain function would cost a thread
        if request.state.role not in (role, "admin"):
            raise HTTPException(403, f"this needs the {role}'s token, not the {request.state.role}'s")

    return Depends(check)


def read_tokens(path: Path, url: str) -> dict[str, str]:
    """The tokens of the last start, so that links stay valid, or new ones; only the owner may read the file."""
    tokens = {role: secrets.token_urlsafe(32) for role in ("trainer", "labeller", "admin")}
    try:
        if path.exists():
            known = json.loads(path.read_text())
            tokens = {role: str(known[role]) for role in tokens}
        fresh = path.with_name(f"{path.name}.new")
        fresh.unlink(missing_ok=True)
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump({"url": url} | tokens, file)
        fresh.replace(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"the tokens in {path} can't be kept ({error!r}); remove the file to make new ones")
    return tokens


def make_app(store: Store, tokens: dict[str, str], args: Args, stopping: Callable[[], bool] = lambda: False) -> FastAPI:
    instructions = {"rules": GENERAL, "tasks": read_instructions(args.instructions)}
    edition = hashlib.sha256(json.dumps(instructions).encode()).hexdigest()[:16]  # tells an open page of a new text
    digests = {role: hashlib.sha256(tokens[role].encode()).digest() for role in ("trainer", "labeller", "admin")}
    cookie = f"label_server_{args.port}"  # browsers keep one jar for all ports of a host
    hosts = {"localhost", "127.0.0.1", "[::1]", args.host} if is_local(args.host) else None
    if hosts and args.public_url:
        hosts.add(re.sub(r"^\w+://|(:\d+)?/?$", "", args.public_url).lower())  # as browsers send it
    heard = {}  # by run: when its trainer last asked for something
    news = {"queries": threading.Condition(), "answers": threading.Condition()}
    waiting = threading.Semaphore(WAITING_REQUESTS)

    def role_of(token: str) -> str | None:
        digest = hashlib.sha256(token.encode(errors="surrogatepass")).digest()
        return next((role for role, known in digests.items() if hmac.compare_digest(known, digest)), None)

    def ring(topic: str) -> None:
        with news[topic]:
            news[topic].notify_all()

    def poll(attempt: Callable, topic: str, seconds: float):
        """Try until it gives something or the time is over. The bell tells of news, only the clock of ended leases."""
        deadline = time.monotonic() + seconds
        found = attempt()
        if found or not seconds or not waiting.acquire(blocking=False):
            return found
        try:
            while not found and time.monotonic() < deadline and not stopping():
                with news[topic]:
                    news[topic].wait(min(1.0, max(0.0, deadline - time.monotonic())))
                found = attempt()
            return found
        finally:
            waiting.release()

    @asynccontextmanager
    async def lifespan(_):
        anyio.to_thread.current_default_thread_limiter().total_tokens = WAITING_REQUESTS + 40
        yield

    app = FastAPI(title="label_server", version="1", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(Guard, role_of=role_of, cookie=cookie, hosts=hosts)

    @app.exception_handler(RequestValidationError)
    async def refuse_values(_, error: RequestValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return JSONResponse({"detail": f"{where}: {first['msg']}".encode(errors="replace").decode()}, 422)

    @app.exception_handler(sa.exc.OperationalError)
    @app.exception_handler(sa.exc.TimeoutError)
    async def database_away(*_):
        return JSONResponse({"detail": "the database can't be reached; try again"}, 503)

    def page(request: Request, token: str | None, body: str, script: str, roles: set[str]):
        """The page itself, not a redirect: a cookie for this site only would not survive one that began in a web mail.

        Nor would it be sent if such a page is loaded again. So a stranger gets the page too, with a 401, and its script
        asks the API, with the cookie if there is one.
        """
        role = request.state.role if token is None else role_of(token)
        nonce = secrets.token_urlsafe(16)
        only = f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
        only += "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        html = PAGE.replace("NONCE", nonce).format(style=STYLE, body=body, script=script)
        reply = HTMLResponse(html, 200 if role in roles else 403 if role else 401, {"content-security-policy": only})
        if token and role:
            secure = request.url.scheme == "https"
            reply.set_cookie(cookie, token, 365 * 86400, httponly=True, samesite="strict", secure=secure)
        return reply

    @app.get("/", response_class=HTMLResponse)
    def label_page(request: Request, token: str | None = None):
        return page(request, token, LABEL_BODY, LABEL_SCRIPT, {"labeller", "admin"})

    @app.get("/stats", response_class=HTMLResponse)
    def stats_page(request: Request, token: str | None = None):
        return page(request, token, STATS_BODY, STATS_SCRIPT, {"admin"})

    # Trainer
    @app.put("/api/runs/{run_id}", dependencies=[needs("trainer")])
    def put_run_(run_id: Annotated[Id, UrlPath()], body: RunBody):
        with store.begin() as conn:
            reply = put_run(conn, store.clock(), run_id, body.model_dump())
        heard[run_id] = store.clock()
        return reply

    @app.put("/api/queries/{query_id}", dependencies=[needs("trainer")])
    def put_query_(query_id: Annotated[Id, UrlPath()], body: QueryBody):
        with store.begin() as conn:
            reply = put_query(conn, store.clock(), query_id, body, args)
        heard[body.run] = store.clock()
        ring("queries")
        return reply

    @app.get("/api/runs/{run_id}/events", dependencies=[needs("trainer")])
    def read_events_(run_id: Annotated[Id, UrlPath()], after: Count = 0, wait: Seconds = 0.0):
        def attempt():
            with store.begin() as conn:
                replies.append(read_events(conn, store.clock(), run_id, after))
            heard[run_id] = store.clock()
            return replies[-1]["events"]

        replies = []
        poll(attempt, "answers", wait)
        return replies[-1]

    @app.post("/api/runs/{run_id}/status", dependencies=[needs("trainer")], status_code=204)
    def put_status_(run_id: Annotated[Id, UrlPath()], body: StatusBody):
        with store.begin() as conn:
            known = conn.execute(run.update().where(run.c.id == run_id).values(finished=body.finished))
            if not known.rowcount:
                raise HTTPException(404, "no such run")
            conn.execute(status.insert().values(run=run_id, status=body.model_dump(), time=store.clock()))

    # Labeller
    @app.post("/api/claim", dependencies=[needs("labeller")])
    async def claim_(request: Request, body: ClaimBody):
        def attempt():
            if gone.is_set():
                return None
            with store.begin() as conn:
                return claim(conn, store.clock(), heard, body.labeller, body.run, request.state.role == "admin")

        async def watch():  # a page that was closed while it waits would keep the next pair from everybody
            while (await request.receive())["type"] != "http.disconnect":
                pass
            gone.set()

        gone, watcher = threading.Event(), asyncio.create_task(watch())
        try:
            pair = await run_in_threadpool(poll, attempt, "queries", body.wait)
        finally:
            watcher.cancel()
        return {"pair": pair, "edition": edition}

    @app.get("/api/sprites/{sprite_id}", dependencies=[needs("labeller")])
    def read_sprite_(sprite_id: Annotated[Id, UrlPath()]):
        with store.begin(write=False) as conn:
            data = conn.scalar(sa.select(sprite.c.data).where(sprite.c.id == sprite_id))
        if data is None:
            raise HTTPException(404, "no such sprite")
        return Response(data, 200, {"cache-control": "private, max-age=31536000, immutable"}, "image/webp")

    @app.get("/api/instructions", dependencies=[needs("labeller")])
    def read_instructions_():
        return instructions | {"edition": edition}

    @app.post("/api/servings/{serving_id}/extend", dependencies=[needs("labeller")], status_code=204)
    def extend_(serving_id: Annotated[Id, UrlPath()]):
        with store.begin() as conn:
            extend(conn, store.clock(), serving_id)

    @app.post("/api/answers", dependencies=[needs("labeller")])
    def record_answer_(body: AnswerBody):
        with store.begin() as conn:
            reply = record_answer(conn, store.clock(), body)
        ring("answers")
        return reply

    @app.post("/api/answers/{answer_id}/retract", dependencies=[needs("labeller")])
    def record_retract_(request: Request, answer_id: Annotated[Id, UrlPath()], body: RetractBody):
        with store.begin() as conn:
            reply = record_retract(conn, store.clock(), answer_id, body, request.state.role == "admin")
        ring("answers")
        return reply

    @app.get("/api/progress", dependencies=[needs("labeller")])
    def progress_(labeller: Annotated[Name, Query()]):
        with store.begin(write=False) as conn:
            return progress(conn, store.clock(), heard, labeller)

    # Admin
    @app.get("/api/stats", dependencies=[needs("admin")])
    def statistics_():
        with store.begin(write=False) as conn:
            journal = read_journal(conn)
        return statistics(*journal)

    @app.get("/export.jsonl", dependencies=[needs("admin")])
    def export_():
        with store.begin(write=False) as conn:
            events = export(conn)
        headers = {"content-disposition": 'attachment; filename="labels.jsonl"'}
        return StreamingResponse((json.dumps(e) + "\n" for e in events), 200, headers, "application/jsonl")

    return app


# ----------------------------------------------------------------------------------------------------------------------
# The pages
# ----------------------------------------------------------------------------------------------------------------------
STYLE = r"""
:root { color-scheme: dark; --ground: #0f1115; --panel: #171a21; --line: #2a303b; --text: #dde1e8; --soft: #8b93a3;
  --accent: #8ab4f8; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
button, input { font: inherit; color: inherit; background: var(--panel); border: 1px solid var(--line);
  border-radius: 10px; padding: 8px 14px; white-space: nowrap; }
button { cursor: pointer; touch-action: manipulation; }
button:hover { border-color: var(--soft); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
kbd { font: inherit; font-size: .85em; color: var(--soft); border: 1px solid var(--line); border-radius: 5px;
  padding: 1px 6px; background: #1f242d; }
progress { width: 120px; height: 5px; appearance: none; border: 0; border-radius: 3px; background: var(--line); }
progress::-webkit-progress-bar { background: var(--line); border-radius: 3px; }
progress::-webkit-progress-value { background: var(--accent); border-radius: 3px; }
progress::-moz-progress-bar { background: var(--accent); border-radius: 3px; }
[hidden] { display: none !important; }
.label { height: 100dvh; padding: 14px 20px; display: grid; grid-template: auto 1fr auto auto / minmax(0, 1fr);
  gap: 12px; overflow: hidden; user-select: none; -webkit-user-select: none; }
header, footer { display: flex; flex-wrap: wrap; align-items: center; gap: 8px 18px; color: var(--soft); }
#question { color: var(--text); font-size: 1.15em; font-weight: 600; margin-right: auto; }
#budget { display: flex; align-items: center; gap: 10px; }
header button { padding: 2px 10px; color: var(--soft); }
:is(#own, #unsent):empty { display: none; }
.label main { position: relative; display: grid; grid-template-columns: 1fr 1fr; gap: 20px; min-height: 0; }
.clip { display: grid; grid-template-rows: 1fr auto; gap: 10px; padding: 14px 14px 10px; border-radius: 16px;
  min-width: 0; min-height: 0; outline: 3px solid transparent; color: var(--soft); }
.clip:hover { border-color: var(--accent); color: var(--text); }
.screen { container-type: size; display: grid; place-items: center; min-height: 0; }
canvas { width: min(100cqw, 100cqh * var(--aspect)); aspect-ratio: var(--aspect); border-radius: 6px;
  background: #000; }
.pixelated canvas { image-rendering: pixelated; }
#notice { position: absolute; inset: 0; display: none; place-content: center; justify-items: center; gap: 18px;
  text-align: center; font-size: 1.15em; color: var(--soft); }
#notice i { width: 12px; height: 12px; border-radius: 50%; background: var(--accent); }
@media (prefers-reduced-motion: no-preference) { #notice i { animation: breathe 2.4s ease-in-out infinite; } }
@keyframes breathe { 50% { opacity: .15; transform: scale(.7); } }
body:not([data-state=label], [data-state=practice]) :is(.clip, #seek, footer) { visibility: hidden; }
body:not([data-state=label], [data-state=practice]) #notice { display: grid; }
body:not([data-state=practice]) #skip, [data-state=practice] #budget { display: none; }
#seek { height: 3px; background: var(--line); border-radius: 2px; overflow: hidden; }
#seek i { display: block; height: 100%; background: var(--accent); transform: scaleX(0); transform-origin: left; }
footer { display: grid; grid-template-columns: 1fr auto minmax(max-content, 1fr); }
footer > div { display: flex; gap: 8px; align-items: center; }
footer > div:last-child { justify-content: flex-end; }
footer > :not(.choices) button { padding: 5px 10px; font-size: .9em; color: var(--soft); }
.choices button { min-width: clamp(120px, 13vw, 170px); padding: 11px 16px; }
#said { min-width: 8em; opacity: 0; color: var(--accent); }
dialog { background: var(--panel); color: var(--text); border: 1px solid var(--line); border-radius: 16px;
  padding: 26px 30px; width: min(620px, calc(100vw - 24px)); max-height: calc(100dvh - 24px); overflow: auto; }
dialog::backdrop { background: #0009; }
dialog h2 { margin: 0 0 8px; font-size: 1.25em; }
dialog p { margin: 0 0 10px; }
dialog .keys { color: var(--soft); }
dialog form { display: flex; gap: 10px; margin-top: 18px; }
dialog form button { background: var(--accent); color: #0b1220; border-color: var(--accent); font-weight: 600; }
dialog input { flex: 1; min-width: 0; background: var(--ground); }
@media (orientation: portrait), (max-width: 759px) {
  .label, footer { gap: 8px; }
  .label { padding: 10px; }
  .clip { padding: 8px 8px 6px; gap: 4px; }
  .choices button { min-width: 0; }
  #said { min-width: 0; position: fixed; bottom: 62px; left: 0; right: 0; text-align: center; pointer-events: none; }
}
@media (orientation: portrait) {
  .label main { grid-template: 1fr 1fr / 1fr; gap: 8px; }
  header { gap: 2px 12px; font-size: .9em; }
  #question { width: 100%; }
  footer { grid-template-columns: auto 1fr; }
  .choices { grid-column: 1 / -1; grid-row: 1; }
  .choices button { flex: 1; padding: 14px 8px; }
  #said { bottom: 128px; }
}
@media (pointer: coarse), (max-width: 999px) { kbd { display: none; } }
.stats { max-width: 1100px; margin: 0 auto; padding: 24px; }
.stats h2 { margin: 34px 0 8px; font-size: 1.1em; }
.stats p { color: var(--soft); }
.stats a { color: var(--accent); }
.stats .wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 500; }
th:first-child, td:first-child { text-align: left; }
td small { color: var(--soft); }
svg { width: min(100%, 500px); height: auto; margin: 6px 14px 6px 0; font-size: 11px; fill: var(--soft); }
svg polyline { fill: none; stroke: var(--accent); stroke-width: 1.8; }
svg path { stroke: var(--line); fill: none; }
"""
LABEL_BODY = """<body class="label" data-state="start">
<header>
  <span id="question"></span>
  <button id="skip">skip practice</button>
  <span id="budget" hidden><progress value="0"></progress><span></span></span>
  <span id="own"></span>
  <span id="unsent"></span>
  <button id="who" title="change your name"></button>
</header>
<main>
  <button class="clip" id="left" aria-label="the left clip is better">
    <span class="screen"><canvas></canvas></span><span><kbd>←</kbd> this one is better</span></button>
  <button class="clip" id="right" aria-label="the right clip is better">
    <span class="screen"><canvas></canvas></span><span>this one is better <kbd>→</kbd></span></button>
  <div id="notice"><i></i><span></span></div>
</main>
<div id="seek" aria-hidden="true"><i></i></div>
<footer>
  <div><button id="undo"><kbd>U</kbd> undo</button><span id="said" role="status"></span></div>
  <div class="choices"><button id="equal"><kbd>↑</kbd> equally good</button>
    <button id="cant-tell"><kbd>↓</kbd> can't tell</button></div>
  <div><button id="pause"><kbd>space</kbd> <span>pause</span></button>
    <button id="back" aria-label="one frame back"><kbd>,</kbd> ‹</button>
    <button id="forth" aria-label="one frame on">› <kbd>.</kbd></button>
    <button id="speed" aria-label="speed"><kbd>S</kbd> <span>1×</span></button>
    <button id="help" aria-label="instructions"><kbd>?</kbd> help</button></div>
</footer>
<dialog id="dialog"><h2></h2><div></div>
  <form method="dialog"><input maxlength="40" autocomplete="nickname" aria-label="your name"><button></button></form>
</dialog>
"""
LABEL_SCRIPT = r"""
"use strict";
const HOLD = 0.4;  // seconds for which the last frame stays
const GUARD = 250;  // milliseconds in which a new pair takes no answer: that press was meant for the one before
const AHEAD = 2;  // pairs that are fetched and decoded beforehand
const UNDOS = 5;
const HEARTBEAT = 30_000, IDLE = 300_000;  // who has not touched anything for so long lets the leases run out
const TIMEOUT = 40_000;  // milliseconds after which a request is given up; a claim may wait for 25 s
const KEYS = {ArrowLeft: "left", a: "left", ArrowRight: "right", d: "right", ArrowUp: "equal", "=": "equal",
  ArrowDown: "cant-tell", u: "undo", " ": "pause", ",": "back", ".": "forth", s: "speed", "?": "help"};
const $ = (id) => document.getElementById(id);
const still = matchMedia("(prefers-reduced-motion: reduce)"), portrait = matchMedia("(orientation: portrait)");
const sleep = (ms) => new Promise((done) => setTimeout(done, ms));
// Not crypto.randomUUID: that exists on https and localhost only
const hex = (byte) => byte.toString(16).padStart(2, "0");
const newId = () => [...crypto.getRandomValues(new Uint8Array(16))].map(hex).join("");

let labeller = localStorage.getItem("labeller") || "";
let texts = {rules: "", tasks: {}}, standing = null;
let lessons = [], held = [], undoable = [];  // of held the first is on screen, the others follow
let shown = null, shownAt = 0, touchedAt = 0, offline = false;
let clock = 0, frame = -1, last = 0, paused = false, speed = Number(localStorage.getItem("speed")) || 1;

history.replaceState(null, "", location.pathname);  // the token stays in the cookie only

// The two clips: one clock, one frame index -------------------------------------------------------------------------
function tick(now) {
  if (shown && !paused && !$("dialog").open) clock += (now - last) / 1000 * speed;
  last = now;
  draw();
  requestAnimationFrame(tick);
}

function draw() {
  if (!shown) return;
  const {frames, fps, width, height, columns} = shown.clip;
  clock %= frames / fps + HOLD;
  const next = Math.min(frames - 1, Math.floor(clock * fps));
  $("seek").firstChild.style.transform = `scaleX(${Math.min(1, clock * fps / frames)})`;
  if (next === frame) return;
  frame = next;
  for (const side of ["left", "right"]) {
    const canvas = $(side).querySelector("canvas");
    const [x, y] = [frame % columns * width, Math.floor(frame / columns) * height];
    canvas.getContext("2d").drawImage(shown[side], x, y, width, height, 0, 0, width, height);
    canvas.dataset.frame = frame;
  }
}

function step(by) {
  if (!shown) return;
  const {frames, fps} = shown.clip;
  setPaused(true);
  clock = ((frame + by + frames) % frames + 0.5) / fps;
  draw();
}

function setPaused(value) {
  paused = value;
  $("pause").lastChild.textContent = paused ? "play" : "pause";
}

function present() {
  shown = lessons[0] || held[0] || null;
  document.body.dataset.state = !labeller ? "name" : lessons.length ? "practice" : shown ? "label" : "waiting";
  document.body.dataset.serving = shown?.serving || "";
  [clock, frame, shownAt] = [0, -1, performance.now()];
  setPaused(still.matches);
  if (shown) {
    const {width, height, pixelated} = shown.clip;
    document.body.classList.toggle("pixelated", pixelated);
    for (const canvas of document.querySelectorAll("canvas")) {
      [canvas.width, canvas.height] = [width, height];
      canvas.style.setProperty("--aspect", width / height);
      if (!still.matches) canvas.animate({opacity: [0.2, 1]}, 140);
    }
    if (document.hidden) document.title = "● Clips are here";
  }
  explain();
  draw();
  paint();
}

// Words -------------------------------------------------------------------------------------------------------------
const task = () => texts.tasks[held[0]?.instructions] || texts.tasks.general || "";

async function readTexts() {
  const reply = await ask("/api/instructions").catch(() => null);
  if (reply?.ok) texts = await reply.json();
  explain();
  return reply;
}

function paint() {
  $("question").textContent = lessons.length ? `Practice, ${4 - lessons.length} of 3: ${lessons[0].question}`
    : shown ? task().split("\n")[0] : "";
  $("who").textContent = labeller;
  $("speed").lastChild.textContent = `${speed}×`;
  const waiting = Object.keys(localStorage).filter((key) => key.startsWith("out:")).length;
  $("unsent").textContent = offline && waiting ? `${waiting} kept here until the server is back` : "";
  const live = standing?.runs.filter((run) => !run.finished) || [];
  $("budget").hidden = !live.length;
  if (standing) {
    const [used, labels] = ["labels_used", "labels"].map((name) => live.reduce((sum, run) => sum + run[name], 0));
    $("budget").firstChild.max = labels || 1;
    $("budget").firstChild.value = used;
    $("budget").lastChild.textContent = `${used} of ${labels} labels`;
    const {today, per_minute} = standing;
    $("own").textContent = today ? `${today} by you today, ${Math.round(per_minute)} a minute` : "";
  }
  $("notice").lastChild.textContent = document.body.dataset.state === "stranger"
    ? "Please open the link that you were given: this page needs its token."
    : offline ? "The server can't be reached. This page tries again by itself; your answers are kept."
    : standing && !standing.runs.length ? "No clips yet. They appear here as soon as a trainer starts."
    : standing && !live.length ? "All labels are in. Thank you!"
    : "No clips to compare right now: the agent is training. This page goes on by itself.";
}

function say(text) {
  $("said").textContent = text;
  $("said").animate({opacity: [1, 1, 0]}, {duration: 1200 + 50 * text.length, easing: "ease-in"});
}

function show(title, paragraphs, name) {
  const [heading, text] = $("dialog").children, [input, ok] = $("dialog").querySelector("form").children;
  heading.textContent = title;
  text.replaceChildren(...paragraphs.filter(Boolean).map((line) => {
    const p = document.createElement("p");
    p.textContent = line;
    return p;
  }));
  const asks = name !== undefined;
  [input.hidden, input.value, ok.textContent] = [!asks, name || "", asks ? "start" : "go on"];
  $("dialog").showModal();
  (asks ? input : ok).focus();
  return new Promise((done) => $("dialog").onclose = () => {
    shownAt = performance.now();
    done(input.value.trim());
    explain();
  });
}

function explain() {  // once for each task, and again when its text is another
  if (!shown || lessons.length || $("dialog").open) return;
  if (localStorage.getItem(`read:${shown.instructions}`) !== task() + texts.rules) help();
}

function help() {
  const [question, ...lines] = task().trim().split("\n");
  if (held[0]) localStorage.setItem(`read:${held[0].instructions}`, task() + texts.rules);
  const keys = "Keys: ← → (or A D) better · ↑ equally good · ↓ can't tell · U undo · space pause · , . step · S speed";
  return show(question, [...lines, ...texts.rules.split("\n"), matchMedia("(pointer: coarse)").matches
    ? "Tap the clip that is better." : keys]);
}

async function askName() {
  document.body.dataset.state = "name";
  const why = ["It tells your answers from those of others."];
  let name = "";
  while (!name) name = await show("What is your name?", why, labeller);
  if (name !== labeller) [held, undoable] = [[], []];  // those were served to somebody else
  localStorage.setItem("labeller", labeller = name);
  remember();
  present();
  fill();
}

// Pairs -------------------------------------------------------------------------------------------------------------
const ask = (url, more) => fetch(url, {signal: AbortSignal.timeout(TIMEOUT), ...more});
const post = (url, body, more) => ask(url, {method: "POST", headers: {"content-type": "application/json"},
  body: JSON.stringify(body), ...more});

// A proxy whose server is away has a 4xx of its own; this server's are told by their detail
async function refuses(reply, ...codes) {
  return codes.includes(reply.status) && typeof (await reply.json().catch(() => null))?.detail === "string";
}

async function load(url) {
  const reply = await ask(url);
  if (!reply.ok) throw new Error(reply.status);
  return createImageBitmap(await reply.blob());
}

async function take(pair) {
  if (held.some((other) => other.serving === pair.serving)) return;
  const [left, right] = await Promise.all([load(pair.left), load(pair.right)]);
  if (pair.labeller !== labeller) return;  // the name was changed meanwhile: the server would refuse the answer
  held.push({...pair, left, right, pair});
  remember();
  if (held.length === 1) present();
}

// A page that is loaded again goes on with the pairs it had
const remember = () => sessionStorage.setItem("held", JSON.stringify(held.map((entry) => entry.pair)));

let filling = false, patience = 1000;
async function fill() {
  if (filling || !labeller || lessons.length || document.body.dataset.state === "stranger") return;
  filling = true;
  try {
    while (held.length <= AHEAD) {
      const asked = labeller;
      const reply = await post("/api/claim", {labeller, wait: held.length ? 0 : 25});
      if (await refuses(reply, 401, 403)) return stranger();
      if (!reply.ok) throw new Error(reply.status);
      const {pair, edition} = await reply.json();
      if (edition !== texts.edition) await readTexts();
      [offline, patience] = [false, 1000];
      if (pair) await take({...pair, labeller: asked});
      else if (held.length) break;
      else await sleep(500);
      paint();
    }
  } catch {
    offline = true;
    paint();
    setTimeout(fill, patience);
    patience = Math.min(2 * patience, 15_000);
  } finally {
    filling = false;
  }
}

async function beat() {
  if (document.hidden || performance.now() - touchedAt > IDLE || outbox().length) return;
  for (const {serving} of [...held]) {
    const reply = await post(`/api/servings/${serving}/extend`, {}).catch(() => null);
    if (!reply || !await refuses(reply, 404, 409)) continue;
    const seen = held[0]?.serving === serving;
    held = held.filter((entry) => entry.serving !== serving);
    remember();
    if (seen) present();
  }
  fill();
}

async function comeBack() {  // others may have been given the pairs by now: this press answers none of them
  [touchedAt, shownAt] = [performance.now(), Infinity];
  await Promise.race([beat(), sleep(3000)]);
  shownAt = performance.now();
}

function touch() {
  if (performance.now() - touchedAt > IDLE) comeBack();
  touchedAt = performance.now();
}

function stranger() {
  [held, undoable, shown] = [[], [], null];
  document.body.dataset.state = "stranger";
  paint();
}

// Answers: kept in local storage from the press until the server has them --------------------------------------------
const outbox = () => Object.keys(localStorage).filter((key) => key.startsWith("out:")).sort();
let sending = false, retry = 0, delay = 1000, count = 0;

function send(url, body) {
  const time = Math.floor(performance.timeOrigin + performance.now());  // of a clock that is never set back
  const key = `out:${time}:${String(count++).padStart(6, "0")}:${newId()}`;
  localStorage.setItem(key, JSON.stringify({url, body}));
  flush();
}

async function flush() {
  if (sending) return;
  sending = true;
  clearTimeout(retry);
  try {
    for (let key; (key = outbox()[0]);) {  // in order: a retract after its answer
      const item = JSON.parse(localStorage.getItem(key));
      const reply = item && await post(item.url, item.body, {keepalive: true});
      // Such a refusal is for good, and must not stop what comes behind it; a 403 ends with a link of the right role
      if (reply && !reply.ok && !await refuses(reply, 404, 409, 422)) throw new Error(reply.status);
      localStorage.removeItem(key);
      [offline, delay] = [false, 1000];
    }
    report();
  } catch {
    offline = true;
    retry = setTimeout(flush, delay);
    delay = Math.min(2 * delay, 30_000);
    paint();
  } finally {
    sending = false;
  }
}

function answer(which) {
  if (!shown || $("dialog").open || performance.now() - shownAt < GUARD) return;
  if (lessons.length) return practise(which);
  const id = newId(), {serving} = shown, seconds = (performance.now() - shownAt) / 1000;
  send("/api/answers", {id, serving, labeller, answer: which, seconds});
  undoable.push({id, pair: shown});
  if (undoable.length > UNDOS) {
    const {pair} = undoable.shift();
    pair.left.close();
    pair.right.close();
  }
  held.shift();
  remember();
  confirm(which);
  present();
  fill();
}

function confirm(which) {
  const [left, right] = portrait.matches ? ["upper", "lower"] : ["left", "right"];
  const words = {left: `${left} is better`, right: `${right} is better`, equal: "equally good"};
  say(words[which] || "can't tell");
  for (const side of which === "equal" ? ["left", "right"] : [which])
    $(side).animate({outlineColor: ["#8ab4f8", "#8ab4f800"]}, 450);
}

function undo() {
  const entry = undoable.pop();
  if (lessons.length || !entry) return say("nothing to undo");
  send(`/api/answers/${entry.id}/retract`, {id: newId(), labeller});
  held.unshift(entry.pair);
  remember();
  present();
  say("undone");
}

let reporting = 0, reportedAt = -Infinity;
function report() {  // every three seconds at most
  clearTimeout(reporting);
  reporting = setTimeout(askProgress, reportedAt + 3000 - performance.now());
}

async function askProgress() {
  reportedAt = performance.now();
  const reply = labeller && await ask(`/api/progress?labeller=${encodeURIComponent(labeller)}`).catch(() => null);
  if (reply && reply.ok) standing = await reply.json();
  paint();
}

// Practice: a dot that gets to a ring, or not -------------------------------------------------------------------------
function makeLessons() {
  const clip = {frames: 36, width: 160, height: 160, columns: 6, fps: 20, pixelated: false};
  const sheet = (path) => {
    const canvas = document.createElement("canvas"), context = canvas.getContext("2d");
    [canvas.width, canvas.height] = [clip.width * clip.columns, clip.height * clip.frames / clip.columns];
    const circle = (x, y, radius) => {
      context.beginPath();
      context.arc(x, y, radius, 0, 2 * Math.PI);
    };
    for (let i = 0; i < clip.frames; i++) {
      const [left, top] = [i % clip.columns * clip.width, Math.floor(i / clip.columns) * clip.height];
      const [x, y] = path(i / (clip.frames - 1));
      context.fillStyle = "#1c2430";
      context.fillRect(left, top, clip.width, clip.height);
      [context.strokeStyle, context.lineWidth, context.fillStyle] = ["#f2c26b", 4, "#8ab4f8"];
      circle(left + 115, top + 45, 16);
      context.stroke();
      circle(left + x, top + y, 8);
      context.fill();
    }
    return canvas;
  };
  const to = (x, y, ease) => (t) => [35 + (x - 35) * ease(t), 125 + (y - 125) * ease(t)];
  const even = (t) => t, early = (t) => Math.min(1, 1.6 * t), away = (t) => [35 + 20 * Math.sin(9 * t), 125];
  const make = (left, right, expected, why) =>
    ({clip, left: sheet(left), right: sheet(right), expected, why, question: "which dot gets to the ring?"});
  return [
    make(to(115, 45, early), away, "left", "one dot reaches the ring, the other stays where it was"),
    make(to(55, 120, even), to(90, 72, even), "right", "neither arrives, but one gets much closer"),
    make(to(115, 45, early), (t) => [35 + 80 * early(t), 125 - 80 * early(t) ** 2], "equal",
      "both get there, in the same time"),
  ];
}

function practise(which) {
  const {expected, why} = lessons[0];
  if (which !== expected) {
    shownAt = performance.now();
    return say(`look again: ${why}`);
  }
  confirm(which);
  say(`yes: ${why}`);
  lessons.shift();
  endPractice();
}

function endPractice() {
  if (!lessons.length) localStorage.setItem("practised", "yes");
  present();
  fill();
}

// Keys, buttons, and the start ----------------------------------------------------------------------------------------
const actions = {
  left: () => answer("left"), right: () => answer("right"), equal: () => answer("equal"),
  "cant-tell": () => answer("cant-tell"), undo, pause: () => setPaused(!paused), back: () => step(-1),
  forth: () => step(1), help, who: askName,
  skip: () => {
    lessons = [];
    endPractice();
  },
  speed: () => {
    speed = {0.5: 1, 1: 2, 2: 0.5}[speed];
    localStorage.setItem("speed", speed);
    paint();
  },
};
for (const [id, action] of Object.entries(actions))
  $(id).addEventListener("click", (event) => {
    if (event.detail) $(id).blur();  // the next press of space is for the clips
    if (event.detail < 2 || !["left", "right", "equal", "cant-tell"].includes(id)) action();
  });

addEventListener("keydown", (event) => {
  touch();
  if (event.ctrlKey || event.altKey || event.metaKey || event.target.tagName === "INPUT") return;
  const id = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if ($("dialog").open) {
    if (id === "help" && !event.repeat && $("dialog").querySelector("input").hidden) $("dialog").close();
    return;
  }
  if (id || event.repeat) event.preventDefault();  // a held Enter would press the focused button again and again
  if (id && (!event.repeat || id === "back" || id === "forth")) $(id).click();
});
addEventListener("pointerdown", touch);
addEventListener("online", () => (flush(), fill()));
addEventListener("visibilitychange", () => {
  if (document.hidden) return;
  document.title = "Which clip is better?";
  comeBack();
});
addEventListener("pagehide", () => {  // they stay in the outbox, and are sent again if nothing acknowledges them
  for (const key of outbox()) {
    const {url, body} = JSON.parse(localStorage.getItem(key));
    navigator.sendBeacon(url, new Blob([JSON.stringify(body)], {type: "application/json"}));
  }
});

async function start() {
  requestAnimationFrame(tick);
  for (;;) {
    const reply = await readTexts();
    offline = false;
    if (reply?.ok) break;
    if (reply && await refuses(reply, 401, 403)) return stranger();
    offline = true;
    paint();
    await sleep(2000);
  }
  if (!localStorage.getItem("practised")) lessons = makeLessons();
  if (labeller) present();
  else await askName();
  flush();
  const kept = JSON.parse(sessionStorage.getItem("held") || "[]");
  for (const pair of kept.filter((pair) => pair.labeller === labeller)) {
    const reply = await post(`/api/servings/${pair.serving}/extend`, {}).catch(() => null);
    if (reply?.ok) await take(pair).catch(() => null);
  }
  report();
  fill();
  setInterval(beat, HEARTBEAT);
  setInterval(() => document.hidden || (report(), fill()), 10_000);
}
start();
"""
STATS_BODY = """<body class="stats"><main></main>
"""
STATS_SCRIPT = r"""
"use strict";
history.replaceState(null, "", location.pathname);
const main = document.querySelector("main");
const svgTag = (name) => document.createElementNS("http://www.w3.org/2000/svg", name);
function put(parent, node, text, attributes = {}) {
  const element = typeof node === "string" ? document.createElement(node) : node;
  if (text !== undefined) element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return parent.appendChild(element);
}
const percent = (x) => x === null ? "–" : `${Math.round(100 * x)} %`;
const number = (x, digits) => x === null ? "–" : x.toFixed(digits);
const interval = (s) => s.n ? ` ${s.interval.map((x) => Math.round(100 * x)).join("–")}, n ${s.n}` : "";
const COLUMNS = [
  ["answers", (s) => s.answers], ["a minute", (s) => number(s.per_minute, 1)],
  ["seconds", (s) => number(s.seconds, 1)], ["equal", (s) => percent(s.equal.share)],
  ["can't tell", (s) => percent(s.cant_tell.share)], ["chose left", (s) => s.left],
  ["same again", (s) => s.consistent], ["agree", (s) => s.agree], ["κ", (s) => number(s.kappa, 2)],
  ["as true sums", (s) => s.true],
];

function table(parent, head, rows) {
  const element = put(put(parent, "div", undefined, {class: "wide"}), "table");
  const line = put(element, "tr");
  for (const title of [head, ...COLUMNS.map(([title]) => title)]) put(line, "th", title);
  for (const [name, stats] of rows) {
    const line = put(element, "tr");
    put(line, "td", name);
    for (const [, read] of COLUMNS) {
      const value = read(stats), cell = put(line, "td", value?.n === undefined ? value : percent(value.share));
      if (value?.n !== undefined) put(cell, "small", interval(value));
    }
  }
}

function plot(parent, title, points, top) {
  const svg = put(parent, svgTag("svg"), undefined, {viewBox: "0 0 520 170", role: "img", "aria-label": title});
  put(svg, svgTag("text"), title, {x: 40, y: 12});
  const [from, to] = points.length ? [points[0][0], points.at(-1)[0]] : [0, 1];
  const highest = top || Math.max(1, ...points.map(([, y]) => y));
  const x = (t) => 40 + 470 * (t - from) / (to - from || 1), y = (v) => 145 - 120 * v / highest;
  for (const value of [0, highest / 2, highest]) {
    put(svg, svgTag("path"), undefined, {d: `M40 ${y(value)}H510`});
    const text = top ? value.toFixed(1) : Math.round(value);
    put(svg, svgTag("text"), text, {x: 34, y: y(value) + 4, "text-anchor": "end"});
  }
  for (const [time, anchor] of points.length ? [[from, "start"], [to, "end"]] : []) {
    const text = new Date(1000 * time).toLocaleString([], {dateStyle: "short", timeStyle: "short"});
    put(svg, svgTag("text"), text, {x: x(time), y: 163, "text-anchor": anchor});
  }
  put(svg, svgTag("polyline"), undefined, {points: points.map(([t, v]) => `${x(t)},${y(v)}`).join(" ")});
}

async function refresh() {
  const reply = await fetch("/api/stats").catch(() => null);
  if (!reply?.ok) {
    if (!main.firstChild || reply) main.textContent = reply ? "Please open the stats link that the server printed."
      : "The server can't be reached.";
    return;
  }
  const {all, labellers, runs} = await reply.json();
  main.replaceChildren();
  put(main, "h1", "Labels");
  const legend = put(main, "p", "Small: 95 % interval in per cent, and number of answers. Same again: one person, "
    + "the same pair twice. Agree, κ: one pair, two people. As true sums: decisive answers where the sums are known. ");
  put(legend, "a", "Download all answers (JSON lines)", {href: "/export.jsonl"});
  table(main, "people", [["all", all], ...labellers.map((s) => [s.labeller, s])]);
  for (const run of [...runs].reverse()) {
    const {status} = run;
    put(main, "h2", `${run.env_id}: ${run.counted} of ${run.labels} labels${run.finished ? ", finished" : ""}`);
    const steps = status.global_step === undefined ? "has not reported yet"
      : `step ${status.global_step.toLocaleString()} of ${status.total_timesteps.toLocaleString()}, `
      + `${status.labels_due} labels due${status.waiting ? ", waiting for them" : ""}`;
    put(main, "p", `${run.name} (${run.script}), ${run.open} pairs open, ${run.late} answers late; ${steps}`);
    plot(main, "labels", run.labels_over_time);
    plot(main, "reward model: held-out accuracy", run.accuracy_over_time, 1);
    table(main, "run", [[run.id.slice(0, 8), run]]);
  }
}
refresh();
setInterval(() => document.hidden || refresh(), 10_000);
"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Which clip is better?</title><link rel="icon" href="data:,">
<meta name="viewport" content="width=device-width, initial-scale=1"><style nonce="NONCE">{style}</style></head>
{body}<script nonce="NONCE">{script}</script></body></html>
"""


# ----------------------------------------------------------------------------------------------------------------------
def main(argv: list[str] | None = None):
    args = tyro.cli(Args, args=argv, description=__doc__)
    check_args(args)
    read_instructions(args.instructions)
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    # asyncio turns Nagle's algorithm off for sockets that call themselves TCP only; with it a reply takes 40 ms
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:  # before anything is written
        listener.bind((args.host, args.port))
        listener.listen(128)
    except OSError as error:
        fail(f"can't listen on {args.host} port {args.port}: {error.strerror or error}; choose another --port")
    args.port = listener.getsockname()[1]
    store = Store(args.database_url)
    if store.is_sqlite and store.url.database in (None, "", ":memory:"):
        fail(f"--database-url {args.database_url} is no file: what people label would go with the server")
    named = socket.gethostname() if args.host in ("0.0.0.0", "::") else args.host
    url = args.public_url or f"http://{f'[{named}]' if ':' in named else named}:{args.port}"
    url = url.rstrip("/")
    folder = Path(store.url.database).parent if store.is_sqlite else Path()
    tokens = read_tokens(folder / "label_server.tokens", url)
    server = None
    app = make_app(store, tokens, args, stopping=lambda: server.should_exit)
    options = {"log_level": "warning", "server_header": False, "timeout_graceful_shutdown": 5, "timeout_keep_alive": 75}
    server = uvicorn.Server(uvicorn.Config(app, **options))
    shown = store.url.render_as_string(hide_password=True)
    if store.is_sqlite:
        shown += f" (SQLite {sqlite3.sqlite_version}, one connection, synchronous=FULL)"
    print(f"label here:       {url}/?token={tokens['labeller']}")
    # A trainer in this directory finds its token in the file; one elsewhere needs it in the line
    is_here = is_local(args.host) and not args.public_url and folder.resolve() == Path.cwd()
    server_url = url if is_here else f"'{url}/?token={tokens['trainer']}'"
    print(f"start a trainer:  python ppo_mujoco_rlhf.py --human --labels 700 --label-server {server_url}")
    print(f"watch the labels: {url}/stats?token={tokens['admin']}")
    print(f"kept in:          {shown}", flush=True)
    with suppress(KeyboardInterrupt):
        server.run(sockets=[listener])


if __name__ == "__main__":
    main()
