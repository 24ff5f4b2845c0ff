"""A web page where people compare two short clips, over the run directories of the three training scripts.

    python label_server.py                       # prints a link for the people who label
    python label_server.py --instructions backflip.txt
    python label_server.py --runs-dir /data/runs --host 0.0.0.0

"Deep Reinforcement Learning from Human Preferences", Christiano et al. 2017, arXiv:1706.03741, appendix B. The plot:

    a trainer with --human writes pairs: RUN/preferences/00000012.npz and its two pictures, .0.webp and .1.webp
    this server finds the pairs of live runs; a person claims a serving of the newest that nobody holds, sides at random
    an answer is stored before it is acknowledged, and so is its undoing
    once the person can undo it no more, it is a line of RUN/preferences/answers.jsonl, which the trainer reads

Nothing that was acknowledged is lost, and nothing is written twice, whatever is killed and when. An answer that trains
is first a line of RUN/preferences/pending.jsonl, flushed to the disk, then a row of the log, then acknowledged. Once it
is a flushed line of answers.jsonl, pending.jsonl is emptied. A start writes what is pending and not in answers.jsonl
yet. So the labels live in the run alone. The log, label_server.sqlite beside the runs, remembers who was shown what:
sides, repeats, second opinions, for statistics; without it the server takes up from the runs.

Docs: docs/human_labels.md. /openapi.json lists the requests.
"""

import csv
import errno
import fcntl
import hashlib
import hmac
import io
import json
import math
import os
import random
import re
import secrets
import socket
import sys
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Annotated, Literal
from urllib.parse import urlsplit

import numpy as np
import sqlalchemy as sa
import tyro
import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi import Path as UrlPath
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from pydantic import BaseModel, Field, StringConstraints, ValidationError

SCHEMA_VERSION = 2
LEASE = 90.0  # seconds that a pair is kept for one person; the page prolongs it
RELOAD = 5.0  # seconds that it is kept for a page that was closed: it may only have been loaded again
GRACE = 15.0  # seconds in which an answer can be undone, unless the same person has given two more
YOUNG = 60.0  # seconds for which a status.json proves that its trainer lives
REPEAT_GAP = 20  # answers between a pair and its repetition
MOST_HELD = 12  # pairs that one name may hold, in all its tabs
BODY_BYTES = 64 * 2**10
MU = {"first": 1.0, "second": 0.0, "equal": 0.5, "cant-tell": None}  # the probability that the first clip is preferred
SAID = {mu: answer for answer, mu in MU.items()}


def fail(message: str):
    """End on bad input: one sentence on stderr, exit code 2."""
    print(f"label_server: {message}", file=sys.stderr)
    raise SystemExit(2)


# ----------------------------------------------------------------------------------------------------------------------
# Arguments
# ----------------------------------------------------------------------------------------------------------------------
@dataclass
class Args:
    runs_dir: Path = Path("runs")
    """the directory in which the trainers make their runs; tokens and database lie there too"""
    host: str = "127.0.0.1"
    """address to listen on; 0.0.0.0 opens the page to the network"""
    port: int = 8765
    """port to listen on; 0 takes a free one"""
    public_url: str | None = None
    """where people reach the page, if a tunnel or proxy stands before it: https://example.org/labels"""
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
    if args.public_url and not re.fullmatch(r"https?://[\w.:\[\]-]+(/[\w./~-]*)?", args.public_url):
        fail("--public-url is not of the form https://host/path")  # not shown: it may hold a password


# ----------------------------------------------------------------------------------------------------------------------
# What people are told: the gist of appendix B, as a question and three points
# ----------------------------------------------------------------------------------------------------------------------
GENERAL = """\
Judge only what you see in the two clips: how the agent got there, its lives or its level do not matter.
You need not be sure, and a slip can be undone. Equally good, or equally bad, is an answer too; "can't tell" is for \
pairs in which you really don't see what is going on.
"""
GAME = "Dying, or being about to, is clearly bad; an agent that is dead all the time counts as average play."
ROBOT = "The camera follows the robot: its speed shows in the floor that passes by."
INSTRUCTIONS = {
    "general": "Which clip is better?\nChoose the clip in which better things happen.",
    "Hopper-v5": f"""Which hopper gets further to the right?
Follow its centre, the joint next to the pointed end. Moving left is worse than standing still. If both get equally \
far, the one whose centre stays higher is better. {ROBOT}""",
    "Walker2d-v5": f"""Which walker gets further to the right?
Follow its centre, where the three limbs meet. If both get equally far, the higher one is better. {ROBOT}""",
    "Swimmer-v5": f"Which swimmer is faster to the right?\nFollow the mark in the middle of its body. {ROBOT}",
    "HalfCheetah-v5": f"Which cheetah is faster to the right?\n{ROBOT}",
    "Ant-v5": f"""Which ant stands better?
Standing upright comes first; if neither does, the one whose centre is higher is better. If both stand, the one that \
is faster to the right is better. {ROBOT}""",
    "Reacher-v5": """In which clip is the green dot closer to the red one?
All of the clip counts: a dot that starts near and drifts away is worse than one that keeps a middle distance.""",
    "InvertedPendulum-v5": """Which pole points up more?
Many pairs are ties, as both poles have fallen. One that you see upright is better than one that you don't see.""",
    "InvertedDoublePendulum-v5": """Which double pole stands up better?
Both poles should point up; after a fall, swinging back up is good, and so is a cart near the middle of its track. A \
pole that is high and then low is worse than one at a medium height throughout.""",
    "ALE/BeamRider-v5": f"""Who shoots more ships without being hit?
Shooting enemy ships is good. Being shot is very bad. {GAME}""",
    "ALE/Breakout-v5": f"""Who plays the better ball?
Hitting the ball and breaking blocks is good. Losing the ball is bad. {GAME}""",
    "ALE/Enduro-v5": "Who overtakes more cars?\nPassing cars is good, being passed is bad. An empty road is fine.",
    "ALE/Pong-v5": """Which clip goes better for the green paddle?
The ball past the orange paddle on the left is good. The ball past the green paddle, on the right, is bad.""",
    "ALE/Qbert-v5": f"""Who changes the colour of more blocks?
Jumping on new blocks is good. Jumping off the edge or into an enemy is bad. {GAME}""",
    "ALE/Seaquest-v5": f"""Who does better under water?
Shooting fish and submarines and picking up divers is good. Running out of air or being hit is bad. {GAME}""",
    "ALE/SpaceInvaders-v5": f"""Who shoots more invaders without being hit?
Shooting invaders is good. Being shot is bad. {GAME}""",
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
# Runs: what trainers write
# ----------------------------------------------------------------------------------------------------------------------
class Clip(BaseModel):
    """How the frames of a clip lie in its picture: in reading order, `columns` in a row."""

    frames: Annotated[int, Field(ge=1, le=10_000)]
    width: Annotated[int, Field(ge=1, le=4096)]
    height: Annotated[int, Field(ge=1, le=4096)]
    columns: Annotated[int, Field(ge=1, le=10_000)]
    fps: Annotated[float, Field(gt=0, le=1000)]
    pixelated: bool


class Status(BaseModel):
    phase: Literal["initial", "pretraining", "training", "waiting", "finished"]
    progress: float | None = None  # of pre-training
    global_step: int = 0
    total_timesteps: int = 0
    labels: int | None = None
    labels_due: int = 0
    wanted: int | None = None  # labels that the trainer waits for
    accuracy_heldout: float | None = None
    seconds_to_next_pairs: float | None = None
    time: float = 0.0


@dataclass
class Run:
    """A run directory, as it was at the last look."""

    folder: Path
    env_id: str
    script: str
    budget: int
    clip: dict
    status: Status | None = None
    status_text: bytes = b""
    told: float = -math.inf  # when status.json was written, on this process's clock
    seen_locked: bool = False
    live: bool = False
    finished: bool = False
    settled: bool = False  # what an earlier server left pending is written
    position: int = 0  # bytes of answers.jsonl that were read
    lines: dict[int, dict] = field(default_factory=dict)  # the first of each pair: the one that counts
    fresh: list[dict] = field(default_factory=list)  # those that the log may not have
    seen: set[int] = field(default_factory=set)  # pairs whose files were looked at

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def labels(self) -> int:
        return self.budget if self.status is None or self.status.labels is None else self.status.labels

    @property
    def answers(self) -> Path:
        return self.folder / "preferences" / "answers.jsonl"

    @property
    def pending(self) -> Path:
        return self.folder / "preferences" / "pending.jsonl"

    @property
    def expected(self) -> float:
        """When the next pairs come, as the trainer estimated it when it wrote its status."""
        known = self.status is not None and self.status.seconds_to_next_pairs is not None
        return self.told + self.status.seconds_to_next_pairs if known else math.inf


def read_json(path: Path) -> dict:
    """An object from a file; ValueError where it holds something else."""
    found = json.loads(path.read_bytes())
    if not isinstance(found, dict):
        raise ValueError("holds no object")
    return found


def is_locked(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def open_run(folder: Path) -> Run | None:
    """A run of --human; None for any other. ValueError says what is wrong."""
    try:
        found = read_json(folder / "args.json")
    except ValueError as error:
        raise ValueError(f"has an args.json that can't be read ({error})") from None
    args = found.get("args", {})
    if not isinstance(args, dict) or not args.get("human"):
        return None
    if "clip" not in found:
        raise ValueError("was written by the first version of these scripts")
    try:
        clip = Clip.model_validate(found["clip"]).model_dump()
        return Run(folder, str(args["env_id"])[:200], str(found["script"])[:200], int(args["labels"]), clip)
    except (ValidationError, KeyError, TypeError) as error:
        raise ValueError(f"has a damaged args.json ({error.__class__.__name__})") from None


def look_at(run: Run, now: float, wall: float) -> None:
    """Whether its trainer is there. Where the lock was seen held, it decides; a folder that is shared from another
    machine has only the age of its status.json: on this machine's clock, since the other's may be wrong."""
    with suppress(OSError, ValueError):
        text = (run.folder / "status.json").read_bytes()
        if text != run.status_text:
            status = Status.model_validate_json(text)
            run.told = now if run.status else now - max(0.0, wall - status.time)
            run.status, run.status_text = status, text
    if run.status:
        run.finished = run.status.phase == "finished"
    else:
        with suppress(OSError, ValueError):
            run.finished = bool(read_json(run.folder / "summary.json").get("finished"))
    locked = is_locked(run.folder / "run.lock")
    run.seen_locked |= locked
    run.live = not run.finished and (locked or (now - run.told < YOUNG and not run.seen_locked))


def read_lines(path: Path, position: int = 0) -> tuple[list[dict], int]:
    """The objects on the lines from this byte on, and the byte after them. A last line without its newline is not
    whole yet; what is no object is passed over."""
    try:
        with open(path, "rb") as file:
            file.seek(position)
            text = file.read()
    except FileNotFoundError:
        return [], position
    text, found = text[: text.rfind(b"\n") + 1], []
    for line in text.splitlines():
        with suppress(ValueError):
            found += [row for row in [json.loads(line)] if isinstance(row, dict)]
    return found, position + len(text)


def append(path: Path, rows: list[dict]) -> None:
    """Add lines in one write, and flush them to the disk. A line that was torn by a crash is ended first."""
    is_new = not path.exists()
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(file).st_size
        torn = size and os.pread(file, 1, size - 1) != b"\n"
        data = b"\n" * torn + b"".join(json.dumps(row).encode() + b"\n" for row in rows)
        if os.write(file, data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file)
    finally:
        os.close(file)
    if is_new:
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def read_answers(run: Run) -> None:
    """Take note of the lines of answers.jsonl that are new; the first line of a pair counts."""
    rows, run.position = read_lines(run.answers, run.position)
    for row in rows:
        number, mu = row.get("pair"), row.get("mu", "")
        is_answer = type(number) is int and isinstance(mu, float | int | None) and mu in SAID
        if is_answer and number not in run.lines:
            run.lines[number] = row
            run.fresh.append(row)


def write_answers(run: Run, rows: list[dict]) -> None:
    read_answers(run)
    rows = [row for row in rows if row.get("pair") not in run.lines]
    if rows:
        append(run.answers, rows)
        read_answers(run)


def empty(path: Path) -> None:
    with suppress(FileNotFoundError):
        os.truncate(path, 0)


def is_whole_webp(path: Path) -> bool:
    with open(path, "rb") as file:
        head, length = file.read(12), os.fstat(file.fileno()).st_size
    return head[:4] == b"RIFF" and head[8:] == b"WEBP" and length >= 8 + int.from_bytes(head[4:8], "little")


def picture_path(run: Run, number: int, clip: int) -> Path:
    return run.folder / "preferences" / f"{number:08d}.{clip}.webp"


def read_pair(run: Run, number: int) -> list | None:
    """The true sums of a pair whose files are all there and whole; None if some are missing. ValueError says what is
    wrong: a folder that is copied while it grows may be whole at the next look."""
    pictures = [picture_path(run, number, clip) for clip in (0, 1)]
    if not all(path.exists() for path in pictures):
        return None
    for path in pictures:
        if not is_whole_webp(path):
            raise ValueError(f"{path.name} is not a whole WebP picture")
    path = run.folder / "preferences" / f"{number:08d}.npz"
    try:
        with np.load(path, allow_pickle=False) as arrays:
            sums = [float(x) for x in arrays["sums"]] if "sums" in arrays else [math.nan] * 2
        first, second = (x if math.isfinite(x) else None for x in sums)
    except Exception as error:  # a damaged file fails in as many ways as it has bytes
        raise ValueError(f"{path.name} can't be read ({error.__class__.__name__})") from None
    return [first, second]


# ----------------------------------------------------------------------------------------------------------------------
# The store: a log of who was shown what and said what, and what follows from it
# ----------------------------------------------------------------------------------------------------------------------
metadata = sa.MetaData()
log = sa.Table("log", metadata, sa.Column("number", sa.Integer, primary_key=True), sa.Column("row", sa.JSON))


@dataclass(eq=False)
class Serving:
    """A pair before one person. `leased` is on the clock that never goes back: until then nobody else gets the pair."""

    id: str
    run: str
    pair: int
    who: str
    shown: str  # new, repeat (to the same person) or overlap (to a second one)
    swapped: bool
    sums: list
    time: float
    leased: float = 0.0
    answer: "Answer | None" = None  # that stands


@dataclass(eq=False)
class Answer:
    id: str
    serving: Serving
    said: str  # a key of MU
    late: bool
    counted: bool  # it trains
    seconds: float | None
    time: float
    turn: int  # how many answers this person had given before
    ripe: float = 0.0  # when it can't be undone any more, on the clock that never goes back


@dataclass(eq=False)
class Pair:
    servings: list[Serving] = field(default_factory=list)
    trains: Answer | None = None
    sums: list | None = None  # known once its files were seen whole: only then it is shown
    due: set = field(default_factory=set)  # repeat, overlap

    def is_held(self, now: float) -> bool:
        """Somebody has it on the screen: that needs no sweeper to end."""
        return any(one.answer is None and one.leased > now for one in self.servings)

    def of(self, who: str) -> list[Serving]:
        return [one for one in self.servings if one.who == who]


class Store:
    """The runs, and the log beside them; one thread at a time.

    SQLite has a single connection: all versions up to 3.51.2 can corrupt a database in WAL mode if two connections
    write and checkpoint at the same instant. FULL, since with NORMAL a commit that somebody was told of can vanish with
    the power. `wall` is for the record only.
    """

    def __init__(self, runs_dir: Path, clock: Callable[[], float] = time.monotonic, wall=time.time):
        self.runs_dir, self.clock, self.wall = runs_dir.expanduser(), clock, wall
        self.lock, self.runs, self.others, self.told_of = threading.Lock(), {}, set(), set()
        self.pairs, self.servings, self.answers, self.undone = defaultdict(Pair), {}, {}, {}
        self.shown = []  # pairs whose files were seen whole, and their keys, oldest first
        self.pending, self.here = [], {}  # answers that can still be undone; when people were here last
        self.barred, self.settings, self.heldout, self.turns = set(), {}, [], Counter()
        try:
            self.runs_dir.mkdir(exist_ok=True)
            os.scandir(self.runs_dir).close()
            self.lock_file = os.open(self.runs_dir / "label_server.lock", os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path = self.runs_dir / "label_server.sqlite"
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        except BlockingIOError:
            fail(f"another label server is running on --runs-dir {self.runs_dir}")
        except OSError as error:
            fail(f"--runs-dir {self.runs_dir} is no directory to read and write in: {error.strerror}")
        options = {"poolclass": sa.StaticPool, "connect_args": {"check_same_thread": False, "timeout": 1}}
        self.engine = sa.create_engine(f"sqlite:///{path}", **options)
        sa.event.listen(self.engine, "connect", prepare_sqlite)
        try:
            with self.engine.begin() as conn:
                if not sa.inspect(conn).get_table_names():
                    metadata.create_all(conn)
                    conn.exec_driver_sql(f"PRAGMA user_version = {SCHEMA_VERSION}")
                if conn.exec_driver_sql("PRAGMA user_version").scalar() != SCHEMA_VERSION:
                    raise ValueError(f"is not a label server's of version {SCHEMA_VERSION}")
                for row in conn.scalars(sa.select(log.c.row).order_by(log.c.number)):
                    self.apply(row)
        except (sa.exc.DBAPIError, ValueError) as error:
            self.close()
            fail(f"{path} can't be opened: {getattr(error, 'orig', error)}; move it away: the labels lie in the runs")
        for one in self.servings.values():  # a page that has it goes on, whoever was killed
            one.leased = self.clock() + LEASE
        self.pending.clear()
        for pair in self.pairs.values():  # what trains is what the runs' files say
            pair.trains = None

    def close(self):
        self.engine.dispose()
        os.close(self.lock_file)

    def write(self, *rows: dict) -> None:
        """Put rows into the log for good, then into what follows from it."""
        with self.engine.begin() as conn:
            conn.execute(log.insert(), [{"row": row} for row in rows])
        for row in rows:
            self.apply(row)

    def apply(self, row: dict) -> None:
        values = {name: value for name, value in row.items() if name != "kind"}
        match row["kind"]:
            case "serving":
                one = Serving(**values, leased=self.clock() + LEASE)
                self.servings[one.id] = one
                self.pairs[one.run, one.pair].servings.append(one)
            case "answer":
                one = self.servings[row["serving"]]
                values |= {"serving": one, "turn": self.turns[one.who], "ripe": self.clock() + GRACE}
                self.answers[row["id"]] = one.answer = Answer(**values)
                self.turns[one.who] += 1
                self.pending.append(one.answer)
                if one.answer.counted:
                    self.pairs[one.run, one.pair].trains = one.answer
            case "undo":
                answer = self.answers[row["answer"]]
                self.undone[row["id"]] = answer
                answer.serving.answer, answer.serving.leased = None, self.clock() + LEASE
                self.forget(answer)
            case "person":
                (self.barred.add if row["barred"] else self.barred.discard)(row["who"])
                for answer in map(self.answers.get, row["dropped"]):
                    self.forget(answer)
                    answer.counted = False
            case "run":
                self.settings[row["run"]] = row
            case "heldout":
                self.heldout.append(row)

    def forget(self, answer: Answer) -> None:
        """It trains no more."""
        self.pending = [one for one in self.pending if one is not answer]
        pair = self.pairs[answer.serving.run, answer.serving.pair]
        if pair.trains is answer:
            pair.trains = None

    def tell(self, message: str) -> None:
        """Say once on the terminal what is wrong."""
        if message not in self.told_of:
            self.told_of.add(message)
            print(f"label_server: {message}", file=sys.stderr, flush=True)

    def has(self, run: "Run", setting: str) -> bool:
        return self.settings.get(run.name, {}).get(setting, False)

    def served(self, name: str | None = None) -> list["Run"]:
        """Live runs whose pairs are shown; only that of a link, if it names one."""
        runs = [run for run in self.runs.values() if run.live and name in (None, run.name)]
        return [run for run in runs if not self.has(run, "paused") and not self.has(run, "archived")]


def prepare_sqlite(connection, _):
    for pragma in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=FULL"):
        connection.execute(f"PRAGMA {pragma}")


# ----------------------------------------------------------------------------------------------------------------------
# The watch: once a second, what is new in the runs, and what can't be undone any more
# ----------------------------------------------------------------------------------------------------------------------
def look(store: Store, args: Args) -> None:
    """Look at every run of people, take up its new pairs and answers."""
    seen = {}
    for folder in sorted(path for path in store.runs_dir.iterdir() if (path / "args.json").exists()):
        try:
            run = store.runs.get(folder.name) or (None if folder.name in store.others else open_run(folder))
            if run:
                seen[run.name] = run
            else:
                store.others.add(folder.name)
        except (OSError, ValueError) as error:
            store.tell(f"{folder} is passed over: it {error}")
    for run in seen.values():
        try:
            look_into(store, run, args)
        except (OSError, sa.exc.DBAPIError) as error:
            store.tell(f"{run.folder}: {error}")
    store.runs = seen
    with store.lock:
        release(store)


def look_into(store: Store, run: Run, args: Args) -> None:
    before = run.status
    look_at(run, store.clock(), store.wall())
    found = {}
    if run.live:
        names = os.listdir(run.answers.parent)
        numbers = {int(name[:8]) for name in names if re.fullmatch(r"\d{8}\.npz", name)}
        for number in sorted(numbers - run.seen):
            try:
                found[number] = read_pair(run, number)
            except ValueError as error:
                store.tell(f"{run.folder}: {error}; that pair is not shown")
    with store.lock:
        if not run.settled:
            settle(store, run)
        read_answers(run)
        for number, sums in found.items():
            if sums and not store.pairs[run.name, number].sums:
                key, shares = (run.name, number), {"repeat": args.repeat_frac, "overlap": args.overlap_frac}
                pair = store.pairs[key]
                pair.sums, pair.due = sums, {kind for kind, share in shares.items() if is_due(key, kind, share)}
                store.shown.append((key, pair))
            if sums or number in run.lines:
                run.seen.add(number)
        take_up_answers(store, run)
        heard = run.status and run.status.accuracy_heldout
        if heard is not None and (before is None or before.accuracy_heldout != heard):
            store.write({"kind": "heldout", "run": run.name, "heldout": heard, "time": store.wall()})


def settle(store: Store, run: Run) -> None:
    """Write what an earlier server had acknowledged and not written yet."""
    if run.answers.exists():
        append(run.answers, [])  # ends a torn line
    rows, _ = read_lines(run.pending)
    undone, kept = {row["undone"]: row.get("by") for row in rows if "undone" in row}, {}
    for row in rows:
        if "id" in row and row["id"] not in undone and row["who"] not in store.barred:
            kept.setdefault(row["pair"], row)
    write_answers(run, list(kept.values()))
    for answer in map(store.answers.get, undone):  # it was killed before this was in the log
        if answer and answer.serving.answer is answer and undone[answer.id]:
            store.write({"kind": "undo", "id": undone[answer.id], "answer": answer.id, "time": store.wall()})
    empty(run.pending)
    run.settled = True


def take_up_answers(store: Store, run: Run) -> None:
    """Lines of answers.jsonl that the log may not have: it was removed, or somebody else wrote them."""
    rows = []
    for line in run.fresh:
        if line.get("loaded"):  # of another run
            continue
        key, pair = (run.name, line["pair"]), store.pairs[run.name, line["pair"]]
        made = uuid.uuid5(uuid.NAMESPACE_URL, f"{run.name}/{line['pair']}").hex  # the same at every start
        answer = line["id"] if re.fullmatch("[0-9a-f]{32}", str(line.get("id"))) else made
        if answer in store.answers:
            pair.trains = store.answers[answer]
            continue
        who, when = str(line.get("who", "unknown"))[:40], line["time"] if is_number(line.get("time")) else 0.0
        one = next((one for one in pair.of(who) if one.shown == "new" and not one.answer), None)
        if one is None:
            values = {"run": key[0], "pair": key[1], "who": who, "shown": "new", "sums": pair.sums, "time": when}
            values |= {"id": uuid.uuid4().hex, "swapped": line.get("swapped") is True}
            rows.append({"kind": "serving"} | values)
        seconds = line["seconds"] if is_number(line.get("seconds")) else None
        values = {"id": answer, "serving": one.id if one else values["id"], "said": SAID[line["mu"]], "time": when}
        rows.append({"kind": "answer"} | values | {"late": False, "counted": True, "seconds": seconds})
    if rows:
        store.write(*rows)
    run.fresh.clear()
    store.pending = [a for a in store.pending if a.serving.run != run.name or a.serving.pair not in run.lines]


def is_number(x) -> bool:
    return isinstance(x, (int, float)) and math.isfinite(x)


def release(store: Store, everything: bool = False) -> None:
    """Write what nobody can undo any more where the trainers read it."""
    for run_name in {answer.serving.run for answer in store.pending}:
        run = store.runs.get(run_name)
        mine = [answer for answer in store.pending if answer.serving.run == run_name]
        ripe = [a for a in mine if everything or a.ripe <= store.clock() or is_followed(store, a)]
        if run is None:
            store.tell(f"{store.runs_dir / run_name} is gone; answers wait for it")
            continue
        try:
            write_answers(run, [line_of(answer) for answer in ripe if answer.counted])
            store.pending = [answer for answer in store.pending if answer not in ripe]
            if not any(answer.counted for answer in store.pending if answer.serving.run == run_name):
                empty(run.pending)
        except OSError as error:
            store.tell(f"answers wait, as {run.answers} can't be written: {error.strerror}")


def is_followed(store: Store, answer: Answer) -> bool:
    """The same person gave two more answers."""
    at = store.pending.index(answer)
    return sum(later.serving.who == answer.serving.who for later in store.pending[at + 1 :]) >= 2


def line_of(answer: Answer) -> dict:
    """An answer as it lies in the run."""
    one = answer.serving
    line = {"pair": one.pair, "mu": MU[answer.said], "who": one.who, "seconds": answer.seconds, "time": answer.time}
    return line | {"id": answer.id, "swapped": one.swapped}


# ----------------------------------------------------------------------------------------------------------------------
# Servings and answers: what a person does
# ----------------------------------------------------------------------------------------------------------------------
def is_due(key: tuple, kind: str, share: float) -> bool:
    """Whether a pair is one of those that are shown again; the same after every start."""
    return int.from_bytes(hashlib.sha256(f"{kind} {key}".encode()).digest()[:4]) < share * 2**32


def choose(store: Store, who: str, name: str | None) -> tuple:
    """What to show next, and as what: a repetition or second opinion that is due, else the newest open pair."""
    now, runs, found = store.clock(), {run.name for run in store.served(name)}, {}
    for key, pair in store.shown:
        if key[0] not in runs or (pair.trains and not pair.due) or pair.is_held(now):
            continue
        mine, given = pair.of(who), {one.shown for one in pair.servings if one.answer}
        if pair.trains is None:
            if not any(one.answer for one in mine):
                found["new"] = key
        elif pair.trains.serving.who == who:
            is_old = store.turns[who] - pair.trains.turn > REPEAT_GAP
            if is_old and "repeat" in pair.due - given - found.keys():
                found["repeat"] = key
        elif "overlap" in pair.due - given and all(one.shown == "overlap" for one in mine):
            found["overlap"] = key
    return next(((kind, found[kind]) for kind in ("repeat", "overlap", "new") if kind in found), (None, None))


def count_open(store: Store, runs: list[Run], free: bool = False) -> int:
    """Pairs without an answer; only those that nobody has before him, if they are to be free."""
    names, now = {run.name for run in runs}, store.clock()
    pairs = [pair for key, pair in store.shown if key[0] in names and not pair.trains]
    return sum(not (free and pair.is_held(now)) for pair in pairs)


def count_labels(store: Store, run: Run, who: str | None = None) -> int:
    """Answers that train. The trainer counts the same, some seconds later."""
    written = [line for line in run.lines.values() if line["mu"] is not None and not line.get("loaded")]
    waiting = [line_of(answer) for answer in store.pending if answer.serving.run == run.name and answer.counted]
    given = written + [line for line in waiting if line["mu"] is not None]
    return sum(who in (None, line.get("who")) for line in given)


def claim(store: Store, body: "ClaimBody") -> Serving | None:
    now, who = store.clock(), body.labeller
    store.here[who] = now
    held = [one for one in store.servings.values() if one.who == who and not one.answer and one.leased > now]
    # A pair beyond the one on the screen is for who has enough of them: with few open, others would go without
    here = sum(now - since < LEASE for since in store.here.values())
    if len(held) >= MOST_HELD or (body.held and count_open(store, store.served(body.run), free=True) <= 2 * here):
        return None
    kind, key = choose(store, who, body.run)
    if not key:
        return None
    pair = store.pairs[key]
    mine = {one.shown: one for one in pair.of(who)}
    if kind in mine:  # its lease ran out: a page that still has it shows it once
        mine[kind].leased = now + LEASE
        return mine[kind]
    swapped = not mine["new"].swapped if kind == "repeat" else random.random() < 0.5
    made = body.serving if body.serving and body.serving not in store.servings else uuid.uuid4().hex
    row = {"kind": "serving", "id": made, "run": key[0], "pair": key[1], "who": who, "shown": kind}
    store.write(row | {"swapped": swapped, "sums": pair.sums, "time": store.wall()})
    return store.servings[made]


def describe(store: Store, one: Serving, with_sums: bool) -> dict:
    """A serving as the page gets it; who may label does not learn the true sums."""
    run = find_run(store, one.run)
    left, right = (f"api/clips/{one.run}/{one.pair}/{int(side != one.swapped)}" for side in (False, True))
    told = {"serving": one.id, "left": left, "right": right, "clip": run.clip, "task": run.env_id, "run": run.name}
    told["instructions"] = run.env_id if run.env_id in INSTRUCTIONS else "general"
    sums = one.sums or [None, None]
    return told | ({"pair": one.pair, "sums": sums[::-1] if one.swapped else sums} if with_sums else {})


def find_serving(store: Store, serving_id: str) -> Serving:
    if serving_id not in store.servings:
        raise HTTPException(404, "this pair is not known here any more")
    return store.servings[serving_id]


def find_run(store: Store, name: str) -> Run:
    run = store.runs.get(name)
    if not run or not run.answers.parent.is_dir():
        raise HTTPException(410, "this pair is gone: its run was moved or deleted")
    if not run.settled:
        raise HTTPException(503, "this run can't be written to at the moment; try again")
    return run


def renew(store: Store, body: "ClaimBody") -> list[str]:
    """Prolong the leases of the pairs that a page has; those that it must drop."""
    gone, now, runs = [], store.clock(), {run.name for run in store.served()}
    for name in body.held:
        one = store.servings.get(name)
        if one and one.who == body.labeller and not one.answer and one.run in runs:
            pair = store.pairs[one.run, one.pair]
            taken = any(other.leased > now and not other.answer for other in pair.servings if other is not one)
            if not taken and (one.shown != "new" or pair.trains is None):
                one.leased = now + LEASE
                continue
        gone.append(name)
    return gone


def let_go(store: Store, body: "ReleaseBody") -> None:
    """A page was closed. It keeps its pairs for a moment, in case that it is only loaded again."""
    for one in filter(None, map(store.servings.get, body.held)):
        if one.who == body.labeller:
            one.leased = min(one.leased, store.clock() + RELOAD)


def record_answer(store: Store, body: "AnswerBody") -> Answer:
    known = store.answers.get(body.id)
    if known:
        if (known.serving.id, known.serving.who) != (body.serving, body.labeller):
            raise HTTPException(409, "this id belongs to another answer")
        return known
    one = find_serving(store, body.serving)
    run, pair = find_run(store, one.run), store.pairs[one.run, one.pair]
    if one.who != body.labeller:
        raise HTTPException(409, "this pair was served to somebody else")
    if one.answer or body.id in store.undone:
        raise HTTPException(409, "this pair has been answered; undo that answer first")
    sides = {"left": ("first", "second")[one.swapped], "right": ("second", "first")[one.swapped]}
    counted = one.shown == "new" and not pair.trains and one.pair not in run.lines and one.who not in store.barred
    row = {"id": body.id, "said": sides.get(body.answer, body.answer), "seconds": body.seconds, "time": store.wall()}
    row |= {"late": one.leased < store.clock(), "counted": counted}
    if counted:
        append(run.pending, [line_of(Answer(**row, serving=one, turn=0))])
    store.write({"kind": "answer", "serving": one.id} | row)
    release(store)
    return store.answers[body.id]


def record_undo(store: Store, answer_id: str, body: "UndoBody") -> Serving | None:
    answer = store.answers.get(answer_id)
    if not answer:
        raise HTTPException(404, "no such answer")
    one = answer.serving
    if one.who != body.labeller:
        raise HTTPException(409, "this answer is somebody else's")
    if body.id in store.answers or store.undone.get(body.id, answer) is not answer:
        raise HTTPException(409, "this id belongs to another event")
    if one.answer is not answer:
        return None if one.answer else one
    if answer not in store.pending:
        raise HTTPException(409, "the agent has learned from this answer already")
    if answer.counted:
        append(find_run(store, one.run).pending, [{"undone": answer_id, "by": body.id}])
    store.write({"kind": "undo", "id": body.id, "answer": answer_id, "time": store.wall()})
    return one


def bar(store: Store, who: str, barred: bool) -> None:
    """What a barred person said and the trainer does not have yet, and says from now on, trains nothing."""
    dropped = [a for a in store.pending if barred and a.counted and a.serving.who == who]
    store.write({"kind": "person", "who": who, "barred": barred, "dropped": [answer.id for answer in dropped]})
    for answer in dropped:
        append(find_run(store, answer.serving.run).pending, [{"undone": answer.id}])


# ----------------------------------------------------------------------------------------------------------------------
# Progress: what the page tells people
# ----------------------------------------------------------------------------------------------------------------------
def about(seconds: float) -> str:
    if seconds < 8:
        return "in a few seconds"
    if seconds < 90:
        return f"in about {round(seconds, -1):.0f} seconds"
    if seconds < 5400:
        return f"in about {seconds / 60:.0f} minutes"
    return f"in about {seconds / 3600:.0f} hours"


def notice(store: Store, who: str, name: str | None) -> str:
    """Why there is nothing to compare, and for how long."""
    runs = [run for run in store.runs.values() if name in (None, run.name) and not store.has(run, "archived")]
    live, served = [run for run in runs if run.live], store.served(name)
    if not runs:
        return "No clips yet. They appear here as soon as a trainer starts."
    if not live:
        last = max(runs, key=lambda run: run.status.time if run.status else 0)
        if not last.finished:
            return "The training program is not running at the moment. This page goes on by itself when it is."
        used, mine = count_labels(store, last), count_labels(store, last, who)
        return f"The run is over: {used} of {last.labels} labels were used, {mine} of them yours. Thank you!"
    if not served:
        return "The study is paused. This page goes on by itself when it does."
    soonest = min(served, key=lambda run: run.expected)
    then = "This page goes on by itself."
    if -YOUNG < soonest.expected - store.clock() < math.inf:
        then = f"The next clips come {about(soonest.expected - store.clock())}."
    count = count_open(store, served)
    if count:
        whose = "The only open pair is" if count == 1 else f"All {count} open pairs are"
        return f"{whose} with others at the moment. {then}"
    phase = soonest.status.phase if soonest.status else "initial"
    if phase == "waiting" or (soonest.status and soonest.status.wanted is not None):
        return "All open pairs are answered. The agent goes on with them in a few seconds."
    if phase == "pretraining":
        done = f", {soonest.status.progress:.0%} done" if soonest.status.progress is not None else ""
        return f"The agent studies all answers so far{done}. {then}"
    if phase == "initial":
        return f"The agent makes its first moves. {then}"
    return f"No clips to compare right now: the agent is training. {then}"


def show_end(store: Store, name: str | None) -> dict | None:
    """Once a run is over: a clip of the agent at its start, and the better one of the last pair."""
    runs = [run for run in store.runs.values() if name in (None, run.name) and not store.has(run, "archived")]
    last = max(runs, key=lambda run: run.status.time if run.status else 0, default=None)
    if last is None or any(run.live for run in runs) or not last.finished:
        return None
    shown = [number for number in sorted(last.lines) if picture_path(last, number, 0).exists()]
    if not shown:
        return None
    after = f"{shown[-1]}/{int(last.lines[shown[-1]]['mu'] == 0)}"
    clips = f"api/clips/{last.name}/"
    return {"clip": last.clip, "before": f"{clips}{shown[0]}/0", "after": clips + after}


def progress(store: Store, who: str, name: str | None) -> dict:
    runs = []
    for run in store.runs.values():
        if (run.live or run.finished) and not store.has(run, "archived"):
            entry = {"run": run.name, "task": run.env_id, "labels": run.labels, "finished": run.finished}
            entry |= {"labels_used": count_labels(store, run), "open": count_open(store, [run])}
            runs.append(entry | {"labels_due": run.status.labels_due if run.status else 0})
    now = store.wall()
    midnight = datetime.fromtimestamp(now).replace(hour=0, minute=0, second=0, microsecond=0).timestamp()
    mine = [answer.time for answer in store.answers.values() if answer.serving.who == who]
    recent = [time for time in mine if time > now - 300]
    minutes = (now - recent[0]) / 60 if recent else 0
    standing = [one for one in store.servings.values() if one.who == who and one.answer]
    return {
        "runs": runs,
        "notice": notice(store, who, name),
        "end": show_end(store, name),
        "answered": len(standing),
        "today": sum(one.answer.time >= midnight for one in standing),
        "per_minute": (len(recent) - 1) / minutes if len(recent) > 1 and minutes > 0 else 0.0,
    }


# ----------------------------------------------------------------------------------------------------------------------
# Statistics
# ----------------------------------------------------------------------------------------------------------------------
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


def judged(answer: Answer) -> bool | None:
    """Whether it is what the true sums say; None where they say nothing, or the answer doesn't."""
    first, second = answer.serving.sums or (None, None)
    if answer.said not in ("first", "second") or None in (first, second) or first == second:
        return None
    return (answer.said == "first") == (first > second)


def summarise(answers: list[Answer], repeats: list[tuple], opinions: list[tuple]) -> dict:
    """Of one person, one run, or all: habits, consistency, agreement with others and with the true sums."""
    n, decisive = len(answers), [a for a in answers if a.said in ("first", "second")]
    gaps = [b.time - a.time for a, b in pairwise(answers) if 0 <= b.time - a.time < 60]  # longer ones are breaks
    right = [judged(a) for a in answers if judged(a) is not None]
    seconds = [a.seconds for a in answers if a.seconds is not None]
    return {
        "answers": n,
        "per_minute": 60 * len(gaps) / sum(gaps) if sum(gaps) else None,
        "seconds": median(seconds) if seconds else None,
        "equal": share(sum(a.said == "equal" for a in answers), n),
        "cant_tell": share(sum(a.said == "cant-tell" for a in answers), n),
        "left": share(sum((a.said == "second") == a.serving.swapped for a in decisive), len(decisive)),
        "consistent": share(sum(a.said == b.said for a, b in repeats), len(repeats)),
        "agree": share(sum(a.said == b.said for a, b in opinions), len(opinions)),
        "kappa": cohen_kappa([(a.said, b.said) for a, b in opinions]) if len(opinions) >= 20 else None,
        "true": share(sum(right), len(right)),
    }


def thin(points: list) -> list:
    """At most 500 points of a curve, the last one always."""
    step = math.ceil(len(points) / 500) or 1
    return points[::-1][::step][::-1]


def warn(store: Store, stats: dict, answers: list[Answer]) -> list[str]:
    """What whoever runs a study should look at in a person's answers."""
    lengths = [store.runs[run].clip for run in {a.serving.run for a in answers} if run in store.runs]
    shortest = min((clip["frames"] / clip["fps"] for clip in lengths), default=0)
    warnings = ["faster than a clip"] if len(answers) >= 10 and stats["seconds"] < shortest else []
    for name in ("true", "consistent", "agree"):
        found = stats[name]
        if found["n"] >= 20 and found["interval"][0] <= 0.5:
            warnings.append(f"{name}: near chance")
    return warnings


def statistics(store: Store) -> dict:
    answers = [a for a in store.answers.values() if a.serving.answer is a]
    repeats, opinions = [], []
    for pair in store.pairs.values():
        given = sorted((one.answer for one in pair.servings if one.answer), key=lambda answer: answer.time)
        for i, b in enumerate(given):
            for a in given[:i]:
                if a.serving.who == b.serving.who:
                    repeats.append((a, b))
                elif "cant-tell" not in (a.said, b.said):
                    opinions.append((a, b))

    def of_labeller(who):
        mine = [a for a in answers if a.serving.who == who]
        turned = [pair if pair[0].serving.who == who else pair[::-1] for pair in opinions]
        stats = summarise(
            mine,
            [pair for pair in repeats if pair[0].serving.who == who],
            [pair for pair in turned if pair[0].serving.who == who],
        )
        here = store.clock() - store.here.get(who, -math.inf) < LEASE
        marks = {"labeller": who, "here": here, "barred": who in store.barred, "trained": sum(a.counted for a in mine)}
        return marks | stats | {"warnings": warn(store, stats, mine)}

    def of_run(run):
        mine = [a for a in answers if a.serving.run == run.name]
        labels = [a.time for a in mine if a.counted and a.said != "cant-tell"]
        rates = [[pair for pair in pairs if pair[0].serving.run == run.name] for pairs in (repeats, opinions)]
        heard = [[row["time"], row["heldout"]] for row in store.heldout if row["run"] == run.name]
        return {
            **{name: getattr(run, name) for name in ("name", "env_id", "script", "labels", "live", "finished", "clip")},
            **{name: store.has(run, name) for name in ("paused", "archived")},
            "open": count_open(store, [run]),
            "status": run.status.model_dump() if run.status else None,
            "counted": len(labels),
            "late": sum(a.late for a in mine),
            "labels_over_time": thin([[t, i + 1] for i, t in enumerate(labels)]),
            "accuracy_over_time": thin(heard),
        } | summarise(mine, *rates)

    doubts = [("says otherwise the second time", [a, b]) for a, b in repeats if a.said != b.said]
    doubts += [("two people disagree", [a, b]) for a, b in opinions if a.said != b.said]
    doubts += [("against the true sums", [a]) for a in answers if judged(a) is False]
    doubts.sort(key=lambda doubt: -doubt[1][-1].time)
    people = sorted({a.serving.who for a in answers})
    return {
        "all": summarise(answers, repeats, opinions),
        "labellers": [of_labeller(who) for who in people],
        "runs": [of_run(run) for run in store.runs.values()],
        "doubts": [
            {"why": why, "run": a[0].serving.run, "pair": a[0].serving.pair, "sums": a[0].serving.sums}
            | {"said": [[b.serving.who, b.said] for b in a]}
            for why, a in doubts[:60]
            if a[0].serving.run in store.runs
        ],
    }


def export(store: Store) -> list[dict]:
    """The journal: a row for every answer, and one for every undoing of an answer."""
    with store.engine.begin() as conn:
        rows = conn.scalars(sa.select(log.c.row).order_by(log.c.number)).all()
    found = []
    for row in rows:
        if row["kind"] not in ("answer", "undo"):
            continue
        answer = store.answers[row["answer" if row["kind"] == "undo" else "id"]]
        one, about_it = answer.serving, {"kind": row["kind"], "id": row["id"], "answer": answer.said}
        about_it["mu"] = MU[answer.said]
        about_it |= {"undone": row.get("answer"), "stands": row["kind"] == "answer" and one.answer is answer}
        about_it |= {"labeller": one.who, "run": one.run, "pair": one.pair, "shown": one.shown, "swapped": one.swapped}
        about_it |= {name: getattr(answer, name) for name in ("counted", "late", "seconds")}
        about_it |= {"barred": one.who in store.barred, "time": row["time"], "serving": one.id}
        found.append(about_it | dict(zip(("sum_first", "sum_second"), one.sums or (None, None), strict=True)))
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Requests: who may send what
# ----------------------------------------------------------------------------------------------------------------------
Id = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
PRINTABLE = r"^[^\x00-\x1f\x7f]+$"
Line = Annotated[str, StringConstraints(max_length=200, pattern=PRINTABLE)]
Name = Annotated[str, StringConstraints(max_length=40, pattern=PRINTABLE, strip_whitespace=True)]
Held = Annotated[list[Id], Field(max_length=MOST_HELD)]


class ClaimBody(BaseModel):
    labeller: Name
    run: Line | None = None
    serving: Id | None = None  # of the page's making: it can let go of a pair whose arrival it did not live to see
    held: Held = []
    want: bool = True


class ReleaseBody(BaseModel):
    labeller: Name
    held: Held


class AnswerBody(BaseModel):
    id: Id
    serving: Id
    labeller: Name
    answer: Literal["left", "right", "equal", "cant-tell"]
    seconds: Annotated[float, Field(ge=0, le=1e6)]


class UndoBody(BaseModel):
    id: Id
    labeller: Name


class PersonBody(BaseModel):
    who: Name
    barred: bool


class SettingBody(BaseModel):
    run: Line
    paused: bool
    archived: bool


ROLES = ("labeller", "admin")
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
        received = 0

        async def receive_some():
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > BODY_BYTES:
                raise HTTPException(413, f"a body of more than {BODY_BYTES} bytes is too large here")
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
        cookies = [request.cookies.get(f"{self.cookie}_{role}") for role in reversed(ROLES)]  # a browser may have both
        found = [self.role_of(given) for given in ([token] if by_bearer else cookies) if given]
        request.state.role, request.state.by_bearer = next(filter(None, found), None), by_bearer
        if request.url.path in ("/", "/stats", "/openapi.json"):  # the pages look at the token of their link
            return None
        if request.state.role is None:
            return 401, "a valid token is needed: open the link that the server printed, or send it as a bearer token"
        if not by_bearer and request.method not in ("GET", "HEAD"):  # the browser adds it, whichever site asked
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


def is_robot(request: Request) -> bool:
    """Who has the statistics open may label in the same browser, and is shown no sums there."""
    return request.state.role == "admin" and request.state.by_bearer


def read_tokens(path: Path, url: str) -> dict[str, str]:
    """The tokens of the last start, so that links stay valid, or new ones; only the owner may read the file."""
    tokens = {role: secrets.token_urlsafe(32) for role in ROLES}
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


def make_app(store: Store, tokens: dict[str, str], args: Args) -> FastAPI:
    instructions = {"rules": GENERAL, "tasks": read_instructions(args.instructions)}
    edition = hashlib.sha256(json.dumps(instructions).encode()).hexdigest()[:16]  # tells an open page of a new text
    digests = {role: hashlib.sha256(tokens[role].encode()).digest() for role in ROLES}
    cookie = f"label_server_{args.port}"  # browsers keep one jar for all ports of a host
    hosts = {"localhost", "127.0.0.1", "[::1]", args.host} if is_local(args.host) else None
    if hosts and args.public_url:
        hosts.add(re.sub(r":\d+$", "", urlsplit(args.public_url).netloc).lower())  # as browsers send it
    stopping = threading.Event()

    def role_of(token: str) -> str | None:
        digest = hashlib.sha256(token.strip().encode(errors="surrogatepass")).digest()
        return next((role for role, known in digests.items() if hmac.compare_digest(known, digest)), None)

    def watch() -> None:
        while not stopping.wait(1.0):
            try:
                look(store, args)
            except Exception as error:  # whatever is wrong with one look, the next one may be better
                store.tell(f"can't look at {store.runs_dir}: {error!r}")

    @asynccontextmanager
    async def lifespan(_):
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        yield
        stopping.set()
        watcher.join()
        with store.lock:
            release(store, everything=True)

    app = FastAPI(title="label_server", version="1", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(Guard, role_of=role_of, cookie=cookie, hosts=hosts)

    @app.exception_handler(RequestValidationError)
    async def refuse_values(_, error: RequestValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return JSONResponse({"detail": f"{where}: {first['msg']}".encode(errors="replace").decode()}, 422)

    @app.exception_handler(sa.exc.DBAPIError)
    @app.exception_handler(OSError)
    async def disk_away(_, error: Exception):
        store.tell(f"an answer can't be stored: {getattr(error, 'orig', error)}")
        return JSONResponse({"detail": "the server can't store this at the moment; try again"}, 503)

    def page(request: Request, token: str | None, body: str, script: str, roles: set[str]):
        """The page itself, not a redirect: a cookie for this site only would not survive one that began in a web mail.

        Nor would it be sent if such a page is loaded again. So a stranger gets the page too, with a 401, and its script
        asks the API, with the cookie if there is one.
        """
        role = request.state.role if token is None else role_of(token)
        nonce = secrets.token_urlsafe(16)
        only = f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
        only += "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        html = PAGE.replace("NONCE", nonce).format(style=STYLE, body=body, script=SHARED_SCRIPT + script)
        reply = HTMLResponse(html, 200 if role in roles else 403 if role else 401, {"content-security-policy": only})
        if token and role:
            secure = request.url.scheme == "https"
            reply.set_cookie(f"{cookie}_{role}", token, 365 * 86400, httponly=True, samesite="strict", secure=secure)
        return reply

    @app.get("/", response_class=HTMLResponse)
    def label_page(request: Request, token: str | None = None):
        return page(request, token, LABEL_BODY, LABEL_SCRIPT, {"labeller", "admin"})

    @app.get("/stats", response_class=HTMLResponse)
    def stats_page(request: Request, token: str | None = None):
        return page(request, token, STATS_BODY, STATS_SCRIPT, {"admin"})

    # Labeller
    @app.post("/api/claim", dependencies=[needs("labeller")])
    def claim_(request: Request, body: ClaimBody):
        with store.lock:
            gone, one = renew(store, body), claim(store, body) if body.want else None
            pair = describe(store, one, is_robot(request)) if one else None
            told = "" if pair else notice(store, body.labeller, body.run)
        return {"pair": pair, "gone": gone, "notice": told, "edition": edition}

    @app.post("/api/release", dependencies=[needs("labeller")], status_code=204)
    def release_(body: ReleaseBody):
        with store.lock:
            let_go(store, body)

    @app.get("/api/clips/{run}/{pair}/{clip}", dependencies=[needs("labeller")])
    def read_clip_(run: Line, pair: Annotated[int, UrlPath(ge=0, lt=10**8)], clip: Annotated[int, UrlPath(ge=0, le=1)]):
        try:
            data = picture_path(find_run(store, run), pair, clip).read_bytes()
        except FileNotFoundError:
            raise HTTPException(410, "this pair is gone: its picture was removed") from None
        return Response(data, 200, {"cache-control": "private, max-age=31536000, immutable"}, "image/webp")

    @app.get("/api/instructions", dependencies=[needs("labeller")])
    def read_instructions_():
        return instructions | {"edition": edition}

    @app.post("/api/answers", dependencies=[needs("labeller")])
    def record_answer_(body: AnswerBody):
        with store.lock:
            answer = record_answer(store, body)
        return {"late": answer.late, "counted": answer.counted}

    @app.post("/api/answers/{answer_id}/undo", dependencies=[needs("labeller")])
    def record_undo_(request: Request, answer_id: Annotated[Id, UrlPath()], body: UndoBody):
        with store.lock:
            one = record_undo(store, answer_id, body)
            return {"pair": describe(store, one, is_robot(request)) if one else None}

    @app.get("/api/progress", dependencies=[needs("labeller")])
    def progress_(labeller: Annotated[Name, Query()], run: Annotated[Line | None, Query()] = None):
        with store.lock:
            return progress(store, labeller, run)

    # Admin
    @app.get("/api/stats", dependencies=[needs("admin")])
    def statistics_():
        with store.lock:
            return statistics(store)

    @app.post("/api/people", dependencies=[needs("admin")], status_code=204)
    def bar_(body: PersonBody):
        with store.lock:
            bar(store, body.who, body.barred)

    @app.post("/api/runs", dependencies=[needs("admin")], status_code=204)
    def set_run_(body: SettingBody):
        with store.lock:
            find_run(store, body.run)
            store.write({"kind": "run"} | body.model_dump())

    @app.get("/export.jsonl", dependencies=[needs("admin")])
    def export_jsonl():
        """The journal."""
        with store.lock:
            rows = export(store)
        headers = {"content-disposition": 'attachment; filename="labels.jsonl"'}
        return StreamingResponse((json.dumps(row) + "\n" for row in rows), 200, headers, "application/jsonl")

    @app.get("/export.csv", dependencies=[needs("admin")])
    def export_csv():
        """The answers that stand."""
        with store.lock:
            rows = [row for row in export(store) if row["stands"]]
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0] if rows else ["answer"])
        writer.writeheader()
        for row in rows:  # a spreadsheet would take such a name for a formula
            writer.writerow(row | {"labeller": re.sub(r"^(?=[=+@-])", "'", row["labeller"])})
        headers = {"content-disposition": 'attachment; filename="labels.csv"'}
        return Response(text.getvalue(), 200, headers, "text/csv; charset=utf-8")

    return app


# ----------------------------------------------------------------------------------------------------------------------
# The pages
# ----------------------------------------------------------------------------------------------------------------------
STYLE = r"""
:root { color-scheme: light dark; --ground: light-dark(#f4f5f7, #0f1115); --panel: light-dark(#fff, #171a21);
  --line: light-dark(#d3d8e0, #2a303b); --text: light-dark(#1a1f28, #dde1e8); --soft: light-dark(#5b6474, #99a1b0);
  --accent: light-dark(#1a5fd0, #8ab4f8); }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
button, input { font: inherit; color: inherit; background: var(--panel); border: 1px solid var(--line);
  border-radius: 10px; padding: 8px 14px; white-space: nowrap; }
button { cursor: pointer; touch-action: manipulation; -webkit-tap-highlight-color: transparent; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
kbd { font: inherit; font-size: .85em; color: var(--soft); border: 1px solid var(--line); border-radius: 5px;
  padding: 1px 6px; background: var(--ground); }
progress { width: 120px; height: 6px; appearance: none; border: 0; border-radius: 3px; background: var(--line); }
progress::-webkit-progress-bar { background: var(--line); border-radius: 3px; }
progress::-webkit-progress-value { background: var(--accent); border-radius: 3px; }
progress::-moz-progress-bar { background: var(--accent); border-radius: 3px; }
[hidden] { display: none !important; }
.label { height: 100dvh; padding: 14px 20px; display: grid; grid-template: auto 1fr auto auto / minmax(0, 1fr);
  gap: 12px; overflow: hidden; user-select: none; -webkit-user-select: none; }
header, footer { display: flex; flex-wrap: wrap; align-items: center; gap: 8px 18px; color: var(--soft); }
#question { color: var(--text); font-size: 1.15em; font-weight: 600; margin-right: auto; }
#budget { display: flex; align-items: center; gap: 10px; }
header button { padding: 2px 10px; color: var(--soft); max-width: 12em; overflow: hidden; text-overflow: ellipsis; }
:is(#own, #unsent):empty { display: none; }
.label main { position: relative; display: grid; grid-template-columns: 1fr 1fr; gap: 20px; min-height: 0; }
.clip { display: grid; grid-template-rows: 1fr auto; gap: 10px; padding: 14px 14px 10px; border-radius: 16px;
  min-width: 0; min-height: 0; color: var(--soft); }
/* Not before the mouse has moved: a mark on the side that was chosen last would speak for the same side again */
@media (hover: hover) { body:not(.fresh) button:hover { border-color: var(--accent); } }
.screen { container-type: size; display: grid; place-items: center; min-height: 0; }
canvas { width: min(100cqw, 100cqh * var(--aspect)); aspect-ratio: var(--aspect); border-radius: 6px;
  background: #000; }
.pixelated { image-rendering: pixelated; }
#notice { position: absolute; inset: 0; display: none; place-content: center; justify-items: center; gap: 18px;
  text-align: center; font-size: 1.15em; color: var(--soft); overflow: auto; }
#notice i { width: 12px; height: 12px; border-radius: 50%; background: var(--accent); }
@media (prefers-reduced-motion: no-preference) { #notice i { animation: breathe 2.4s ease-in-out infinite; } }
@keyframes breathe { 50% { opacity: .15; transform: scale(.7); } }
.films { display: flex; flex-wrap: wrap; gap: 14px; justify-content: center; margin: 12px 0; }
.films:empty { display: none; }
.films figure { margin: 0; text-align: center; color: var(--soft); font-size: .9rem; }
.films canvas { width: auto; height: min(150px, 22vh); display: block; margin: 0 auto 4px; }
.example { position: relative; width: 160px; height: 100px; margin: 0 auto 4px; border-radius: 6px;
  background: #1c2430; }
.example::before, .example::after { content: ""; position: absolute; border-radius: 50%; }
.example::before { left: 105px; top: 18px; width: 28px; height: 28px; border: 4px solid #f2c26b; }
.example::after { left: 22px; top: 70px; width: 14px; height: 14px; background: #8ab4f8;
  animation: arrives 2.4s infinite; }
.stays::after { animation-name: stays; }
@keyframes arrives { 70%, 100% { transform: translate(90px, -45px); } }
@keyframes stays { 30%, 90% { transform: translateX(18px); } 60% { transform: translateX(-6px); } }
body:not([data-state=label]) :is(.clip, #seek, footer) { visibility: hidden; }
body:not([data-state=label]) #notice { display: grid; }
#seek { height: 3px; background: var(--line); border-radius: 2px; overflow: hidden; }
#seek i { display: block; height: 100%; background: var(--accent); transform: scaleX(0); transform-origin: left; }
footer { display: grid; grid-template-columns: minmax(max-content, 1fr) auto minmax(max-content, 1fr); }
footer > div { display: flex; gap: 8px; align-items: center; }
footer > div:last-child { justify-content: flex-end; }
footer > :not(.choices) button { padding: 5px 10px; font-size: .9em; color: var(--soft); }
.choices button { min-width: clamp(90px, 13vw, 170px); padding: 11px 16px; }
#said { position: fixed; top: 8px; left: 50%; transform: translateX(-50%); max-width: 90vw; padding: 6px 16px;
  border-radius: 10px; background: var(--accent); color: light-dark(#fff, #0b1220); opacity: 0; pointer-events: none; }
dialog { background: var(--panel); color: var(--text); border: 1px solid var(--line); border-radius: 16px;
  padding: 26px 30px; width: min(620px, calc(100vw - 24px)); max-height: calc(100dvh - 24px); overflow: auto; }
dialog::backdrop { background: #0009; }
dialog h2 { margin: 0 0 8px; font-size: 1.25em; }
dialog p { margin: 0 0 10px; }
.points p:not(:last-child) { display: list-item; margin-left: 1.2em; }
dialog form { display: flex; gap: 10px; margin-top: 18px; }
dialog form button { background: var(--accent); color: light-dark(#fff, #0b1220); font-weight: 600; }
dialog input { flex: 1; min-width: 0; background: var(--ground); }
@media (orientation: portrait), (max-width: 759px) {
  .label, footer { gap: 8px; }
  .label { padding: 10px; }
  .clip { padding: 8px 8px 6px; gap: 4px; }
  .choices button { min-width: 0; padding: 8px 10px; }
  footer > :not(.choices) button { padding: 5px 7px; }
  footer > div { gap: 5px; }
}
@media (orientation: portrait) {
  .label main { grid-template: 1fr 1fr / 1fr; gap: 8px; }
  header { gap: 2px 12px; font-size: .9em; }
  #question { width: 100%; }
  footer { grid-template-columns: auto 1fr; }
  .choices { grid-column: 1 / -1; grid-row: 1; }
  .choices button { flex: 1; padding: 14px 8px; }
}
@media (max-width: 899px) { footer > div:last-child kbd { display: none; } }
@media (pointer: coarse), (max-width: 619px) { kbd { display: none; } }
.stats { max-width: 1150px; margin: 0 auto; padding: 24px; }
.stats h2 { margin: 34px 0 8px; font-size: 1.1em; }
.stats p { color: var(--soft); overflow-wrap: anywhere; }
.stats a { color: var(--accent); margin-right: 14px; }
.stats button { padding: 1px 10px; }
.stats .wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 500; }
th:first-child, td:first-child { text-align: left; max-width: 20em; overflow: hidden; text-overflow: ellipsis; }
td div { white-space: normal; }
td small { color: var(--soft); }
.warn { color: light-dark(#a34700, #f2a65a); }
svg { width: min(100%, 500px); height: auto; margin: 6px 14px 6px 0; font-size: 11px; fill: var(--soft); }
svg polyline { fill: none; stroke: var(--accent); stroke-width: 1.8; }
svg path { stroke: var(--line); fill: none; }
"""
LABEL_BODY = """<body class="label" data-state="start">
<header>
  <span id="question"></span>
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
  <div id="notice"><i></i><span role="status"><noscript>This page needs JavaScript.</noscript></span>
    <div class="films"></div></div>
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
<dialog id="dialog"><h2></h2><div></div><div class="films"></div>
  <form method="dialog"><input maxlength="40" autocomplete="nickname" aria-label="your name"><button></button></form>
</dialog>
"""
SHARED_SCRIPT = r"""
"use strict";
const $ = (id) => document.getElementById(id);
const TIMEOUT = 20_000;  // milliseconds after which a request is given up
const ask = (url, more) => fetch(url, {signal: AbortSignal.timeout(TIMEOUT), ...more});
const post = (url, body, more) => ask(url, {method: "POST", headers: {"content-type": "application/json"},
  body: JSON.stringify(body), ...more});
const link = new URLSearchParams(location.search).get("run");  // the run that this link is for
// The token stays in the cookie only
history.replaceState(null, "", location.pathname + (link ? `?run=${encodeURIComponent(link)}` : ""));

async function load(url) {
  const reply = await ask(url);
  if (!reply.ok) throw new Error(reply.status);
  return createImageBitmap(await reply.blob());
}

function drawFrame(canvas, image, {frames, width, height, columns}, frame) {
  const [x, y] = [frame % columns * width, Math.floor(frame / columns) * height];
  canvas.getContext("2d").drawImage(image, x, y, width, height, 0, 0, width, height);
}

function fit(canvas, {width, height, pixelated}) {
  [canvas.width, canvas.height] = [width, height];
  canvas.style.setProperty("--aspect", width / height);
  canvas.classList.toggle("pixelated", pixelated);
}

// Clips that only play: an example, and what became of the agent
function film(parent, caption, image, clip) {
  const figure = parent.appendChild(document.createElement("figure"));
  const canvas = figure.appendChild(document.createElement("canvas"));
  figure.append(caption);
  fit(canvas, clip);
  const play = (now) => {
    const frame = Math.floor(now / 1000 * clip.fps) % (clip.frames + 8);
    if (figure.offsetParent) drawFrame(canvas, image, clip, Math.min(clip.frames - 1, frame));
    if (figure.isConnected) requestAnimationFrame(play);
  };
  requestAnimationFrame(play);
}
"""
LABEL_SCRIPT = r"""
const HOLD = 0.4;  // seconds for which the last frame stays
const GUARD = 250;  // milliseconds in which a new pair takes no answer: that press was meant for the one before
const AHEAD = 2;  // pairs that are fetched and decoded beforehand
const UNDOS = 2, UNDO_TIME = 14_000;  // then the server writes the answer where the agent learns from it
const HEARTBEAT = 30_000, IDLE = 300_000;  // who has not touched anything for so long lets the leases run out
const KEYS = {ArrowLeft: "left", a: "left", ArrowRight: "right", d: "right", ArrowUp: "equal", "=": "equal",
  ArrowDown: "cant-tell", u: "undo", " ": "pause", ",": "back", ".": "forth", s: "speed", "?": "help"};
const PLACES = {KeyA: "a", KeyD: "d", KeyU: "u", KeyS: "s", Comma: ",", Period: ".", Slash: "?", Equal: "="};
const still = matchMedia("(prefers-reduced-motion: reduce)"), portrait = matchMedia("(orientation: portrait)");
const sleep = (ms) => new Promise((done) => setTimeout(done, ms));
const now = () => Math.floor(performance.timeOrigin + performance.now());  // a clock that is never set back
// Not crypto.randomUUID: that exists on https and localhost only
const hex = (byte) => byte.toString(16).padStart(2, "0");
const newId = () => [...crypto.getRandomValues(new Uint8Array(16))].map(hex).join("");

let labeller = "", texts = {rules: "", tasks: {}}, standing = null, told = "", over = "";
let held = [], arriving = [], undoable = [];  // of held the first is on screen, the others follow
let shown = null, shownAt = 0, touchedAt = 0, offline = false;
let clock = 0, frame = -1, last = 0, paused = false, speed = 1;

// The two clips: one clock, one frame index -------------------------------------------------------------------------
function tick(time) {
  if (shown && !paused && !$("dialog").open) clock += (time - last) / 1000 * speed;
  last = time;
  draw();
  requestAnimationFrame(tick);
}

function draw() {
  if (!shown) return;
  const {frames, fps} = shown.clip;
  clock %= frames / fps + HOLD;
  const next = Math.min(frames - 1, Math.floor(clock * fps));
  $("seek").firstChild.style.transform = `scaleX(${Math.min(1, clock * fps / frames)})`;
  if (next === frame) return;
  frame = next;
  for (const side of ["left", "right"]) {
    const canvas = $(side).querySelector("canvas");
    drawFrame(canvas, shown[side], shown.clip, frame);
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
  shown = held[0] || null;
  setState(!labeller ? "name" : shown ? "label" : "waiting");
  document.body.dataset.serving = shown?.serving || "";
  document.body.classList.add("fresh");
  [clock, frame, shownAt] = [0, -1, performance.now()];
  setPaused(still.matches);
  if (shown) {
    for (const side of ["left", "right"]) {
      const canvas = $(side).querySelector("canvas");
      fit(canvas, shown.clip);
      if (!still.matches) canvas.animate({opacity: [0.2, 1]}, 140);
    }
  }
  explain();
  draw();
  paint();
}

// Words -------------------------------------------------------------------------------------------------------------
const task = () => texts.tasks[held[0]?.instructions] || texts.tasks.general || "";
const state = () => document.body.dataset.state;
const setState = (name) => document.body.dataset.state = name;

async function readTexts() {
  const reply = await ask("api/instructions").catch(() => null);
  if (reply?.ok) texts = await reply.json();
  explain();
  return reply;
}

function paint() {
  $("question").textContent = shown ? task().split("\n")[0] : "";
  $("who").textContent = $("who").title = labeller;
  $("speed").lastChild.textContent = `${speed}×`;
  $("unsent").textContent = offline && out.size ? `${out.size} kept here until the server is back` : "";
  const run = shown && standing?.runs.find((run) => run.run === shown.run);
  $("budget").hidden = !run;
  if (run) {
    $("budget").firstChild.max = run.labels || 1;
    $("budget").firstChild.value = run.labels_used;
    $("budget").lastChild.textContent = `${run.labels_used} of ${run.labels} labels`;
  }
  const {today, per_minute} = standing || {};
  const pace = per_minute >= 0.5 ? `, ${Math.round(per_minute)} a minute` : "";
  $("own").textContent = today ? `${today} by you today${pace}` : "";
  if (state() === "start") return;
  $("notice").querySelector("span").textContent = state() === "stranger"
    ? "Please open the link that you were given: this page needs its token."
    : state() === "blocked"
    ? "Your browser keeps no data of this page. Please allow cookies and site data for this address, and load it again."
    : offline ? "The server can't be reached. This page tries again by itself; your answers are kept."
    : arriving.length ? "Two clips are on their way to you." : told || "";
  $("notice").querySelector("i").hidden = state() !== "waiting" || over !== "";
}

// What became of the agent, once its run is over
async function showEnd(end) {
  const films = $("notice").querySelector(".films"), name = end?.after || "";
  if (name === over) return;
  over = name;
  films.replaceChildren();
  if (!end) return;
  const images = await Promise.all([load(end.before), load(end.after)]).catch(() => []);
  images.forEach((image, i) => film(films, ["at the start", "at the end"][i], image, end.clip));
}

function say(text) {
  $("said").textContent = $("said").title = text;
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
  text.classList.toggle("points", !asks);
  [input.hidden, input.value, ok.textContent] = [!asks, name || "", asks ? "start" : "go on"];
  $("dialog").showModal();
  (asks ? input : ok).focus({preventScroll: true});
  $("dialog").scrollTop = 0;
  return new Promise((done) => $("dialog").onclose = () => {
    shownAt = performance.now();
    $("dialog").querySelector(".films").replaceChildren();
    done(input.value.trim());
    explain();
  });
}

function explain() {  // once for each task, and again when its text is another
  if (!shown || $("dialog").open) return;
  if (localStorage.getItem(`read:${shown.instructions}`) !== task() + texts.rules) help();
}

function help() {
  const [question, ...lines] = task().trim().split("\n");
  if (held[0]) keep(`read:${held[0].instructions}`, task() + texts.rules);
  const keys = "Keys: ← → (or A D) better · ↑ equally good · ↓ can't tell · U undo · space pause · , . step · S speed";
  return show(question, [...lines, ...texts.rules.split("\n"), matchMedia("(pointer: coarse)").matches
    ? "Tap the clip that is better." : keys]);
}

async function askName() {
  setState("name");
  const films = $("dialog").querySelector(".films"), why = [
    "You will see two short clips of an agent at work, side by side. Say which one is better: it learns from your "
    + "answers alone. Here it is the one whose dot reaches the ring."];
  let name = "";
  while (!name) {
    for (const [path, caption] of [["arrives", "this one is better"], ["stays", "this one stays where it was"]]) {
      const figure = films.appendChild(document.createElement("figure"));
      figure.appendChild(document.createElement("div")).className = `example ${path}`;
      figure.append(caption);
    }
    name = await show("What is your name?", why, labeller);
  }
  if (name !== labeller) {
    letGo();
    [held, undoable] = [[], []];  // those were served to somebody else
  }
  keep("labeller", labeller = name);
  present();
  fill();
}

// Pairs -------------------------------------------------------------------------------------------------------------
// A proxy whose server is away has a 4xx of its own; this server's are told by their detail
async function refusal(reply, ...codes) {
  const {detail} = codes.includes(reply.status) && await reply.json().catch(() => null) || {};
  return typeof detail === "string" ? detail : "";
}

async function loadBoth({left, right}) {
  for (let wait = 1000; ; wait *= 2)
    try {
      return await Promise.all([load(left), load(right)]);
    } catch (error) {
      if (wait > 8000) throw error;
      await sleep(wait);
    }
}

// Fetch the pictures of a pair, and its time while they come; a slow line keeps no other claim waiting
async function take(pair) {
  if ([...held, ...arriving].some((other) => other.serving === pair.serving)) return;
  arriving.push(pair);
  try {
    const [left, right] = await loadBoth(pair);
    if (pair.labeller !== labeller) return;  // the name was changed meanwhile: the server would refuse the answer
    held.push({...pair, left, right, pair});
    if (held.length === 1) present();
  } finally {
    arriving = arriving.filter((other) => other !== pair);
  }
}

// Prolong the pairs that are here, drop those that somebody else answered or whose run has stopped, ask for another
async function claim(want) {
  const asked = labeller, have = [...held, ...arriving].map((entry) => entry.serving);
  const body = {labeller, held: have, want, run: link};
  if (want) body.serving = asking = newId();
  const reply = await post("api/claim", body);
  if (await refusal(reply, 401, 403)) return stranger();
  if (!reply.ok) throw new Error(reply.status);
  const {pair, gone, notice, edition} = await reply.json();
  if (edition !== texts.edition) await readTexts();
  [offline, patience] = [false, 1000];
  if (notice) told = notice;
  if (gone.length) drop(gone);
  return pair && {...pair, labeller: asked};
}

function drop(gone) {
  const seen = gone.includes(held[0]?.serving);
  held = held.filter((entry) => !gone.includes(entry.serving));
  if (seen) present();
}

let filling = false, patience = 1000, asking = null;
async function fill() {
  if (filling || !labeller || state() === "stranger") return;
  filling = true;
  try {
    while (held.length + arriving.length <= AHEAD && state() !== "stranger" && !document.hidden) {
      const pair = await claim(true);
      if (pair) take(pair).then(fill, () => setTimeout(fill, patience)).finally(paint);
      else if (held.length + arriving.length) break;
      else await sleep(1000);
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
  if (document.hidden || performance.now() - touchedAt > IDLE || out.size || !held.length) return;
  await claim(false).catch(() => null);
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
  setState("stranger");
  paint();
}

const beacon = (url, body) => navigator.sendBeacon(url, new Blob([JSON.stringify(body)], {type: "application/json"}));
function letGo() {
  const servings = [...held, ...arriving].map((entry) => entry.serving).concat(asking || []);
  if (labeller && servings.length) beacon("api/release", {labeller, held: servings});
}

// A page that is loaded again goes on with the pairs it had; others get them if it is not. They are kept as it ends and
// not before: a tab that is duplicated starts with a copy of the session storage, and needs pairs of its own
addEventListener("pagehide", () => {
  const bare = ({pair, ...entry}) => ({...entry, pair: pair.pair});
  const session = {held: held.map((entry) => entry.pair), undoable: undoable.map(bare), labeller};
  try {
    sessionStorage.setItem("page", JSON.stringify(session));
  } catch { /* then it begins with new pairs */ }
  for (const {url, body} of out.values()) beacon(url, body);  // sent again later if nothing acknowledges them
  letGo();
});

async function goOn() {
  const session = JSON.parse(sessionStorage.getItem("page") || "null");
  sessionStorage.removeItem("page");
  if (session?.labeller !== labeller) return;
  for (const pair of session.held) await take(pair).catch(() => null);
  if (held.length) await claim(false).catch(() => null);
  for (const {pair, ...entry} of session.undoable) {
    const images = await loadBoth(pair).catch(() => null);
    if (images) undoable.push({...entry, pair: {...pair, left: images[0], right: images[1], pair}});
  }
}

// Answers: kept from the press until the server has them, in local storage too where there is room -------------------
const out = new Map();
let sending = false, retry = 0, delay = 1000, count = 0, unkept = false;

function keep(key, value) {
  try {
    localStorage.setItem(key, value);
    return true;
  } catch {  // it is full
    return false;
  }
}

function send(url, body) {
  const key = `out:${now()}:${String(count++).padStart(6, "0")}:${newId()}`;
  out.set(key, {url, body});
  unkept = !keep(key, JSON.stringify({url, body}));
  flush();
}

async function flush() {
  if (sending) return;
  sending = true;
  clearTimeout(retry);
  try {
    while (out.size) {  // in order: an undoing after its answer
      const key = [...out.keys()].sort()[0], {url, body} = out.get(key);
      const reply = await post(url, body, {keepalive: true});
      // Such a refusal is for good, and must not stop what comes behind it; a 403 ends with a link of the right role
      const why = reply.ok ? "" : await refusal(reply, 404, 409, 410, 422);
      if (!reply.ok && !why) throw new Error(reply.status);
      if (why) refused(url, why);
      out.delete(key);
      localStorage.removeItem(key);
      [offline, delay] = [false, 1000];
    }
    report();
  } catch {
    offline = true;
    if (unkept) say("Please leave this page open: your last answers are neither sent nor kept yet.");
    retry = setTimeout(flush, delay);
    delay = Math.min(2 * delay, 30_000);
    paint();
  } finally {
    sending = false;
  }
}

function refused(url, why) {
  say(`not taken: ${why}`);
  const entry = held.find(({undoes}) => undoes && url.includes(undoes));
  if (entry) drop([entry.serving]);
}

function answer(which) {
  if (!shown || $("dialog").open || performance.now() - shownAt < GUARD) return;
  const id = newId(), {serving} = shown, seconds = (performance.now() - shownAt) / 1000;
  send("api/answers", {id, serving, labeller, answer: which, seconds});
  undoable.push({id, pair: shown, at: now()});
  if (undoable.length > UNDOS) {
    const {pair} = undoable.shift();
    pair.left.close();
    pair.right.close();
  }
  held.shift();
  confirm(which);
  present();
  fill();
}

function confirm(which) {
  const [left, right] = portrait.matches ? ["upper", "lower"] : ["left", "right"];
  const words = {left: `${left} is better`, right: `${right} is better`, equal: "equally good"};
  say(words[which] || "can't tell");
}

function undo() {
  if (!undoable.length) return say("nothing to undo");
  const entry = undoable.pop();
  if (now() - entry.at > UNDO_TIME) return say("the agent has learned from that answer already");
  send(`api/answers/${entry.id}/undo`, {id: newId(), labeller});
  held.unshift({...entry.pair, undoes: entry.id});
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
  const run = link ? `&run=${encodeURIComponent(link)}` : "";
  const reply = labeller && await ask(`api/progress?labeller=${encodeURIComponent(labeller)}${run}`).catch(() => null);
  if (reply && reply.ok) {
    standing = await reply.json();
    showEnd(standing.end);
    if (document.hidden && standing.runs.some((run) => run.open)) document.title = "● Clips are here";
  }
  paint();
}

// Keys, buttons, and the start ----------------------------------------------------------------------------------------
const actions = {
  left: () => answer("left"), right: () => answer("right"), equal: () => answer("equal"),
  "cant-tell": () => answer("cant-tell"), undo, pause: () => setPaused(!paused), back: () => step(-1),
  forth: () => step(1), help, who: askName,
  speed: () => {
    speed = {0.5: 1, 1: 2, 2: 0.5}[speed];
    keep("speed", speed);
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
  const key = event.key.charCodeAt(0) > 127 ? PLACES[event.code] : event.key;  // a layout without Latin letters
  const id = KEYS[key?.length === 1 ? key.toLowerCase() : key];
  if ($("dialog").open) {
    if (id === "help" && !event.repeat && $("dialog").querySelector("input").hidden) $("dialog").close();
    return;
  }
  if (id || event.repeat) event.preventDefault();  // a held Enter would press the focused button again and again
  if (id && (!event.repeat || id === "back" || id === "forth")) $(id).click();
});
addEventListener("pointerdown", touch);
addEventListener("pointermove", () => document.body.classList.remove("fresh"));
addEventListener("online", () => (flush(), fill()));
addEventListener("pageshow", (event) => event.persisted && (sessionStorage.removeItem("page"), comeBack()));
addEventListener("visibilitychange", () => {
  if (document.hidden) return letGo();  // a phone may never say more of a page than this
  document.title = "Which clip is better?";
  comeBack();
  fill();
});

async function start() {
  try {
    labeller = localStorage.getItem("labeller") || "";
    speed = Number(localStorage.getItem("speed")) || 1;
    for (const key of Object.keys(localStorage).filter((key) => key.startsWith("out:")))
      out.set(key, JSON.parse(localStorage.getItem(key)));
  } catch {
    setState("blocked");
    return paint();
  }
  requestAnimationFrame(tick);
  for (;;) {
    const reply = await readTexts();
    offline = false;
    if (reply?.ok) break;
    if (reply && await refusal(reply, 401, 403)) return stranger();
    offline = true;
    setState("waiting");
    paint();
    await sleep(2000);
  }
  if (labeller) present();
  else await askName();
  flush();
  await goOn();
  report();
  fill();
  setInterval(beat, HEARTBEAT);
  setInterval(() => (report(), fill()), 10_000);
}
start();
"""
STATS_BODY = """<body class="stats"><main></main>
"""
STATS_SCRIPT = r"""
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
  for (const [name, stats, more] of rows) {
    const line = put(element, "tr");
    const first = put(line, "td", name, {title: name});
    if (more) more(put(first, "div"));
    for (const [, read] of COLUMNS) {
      const value = read(stats), cell = put(line, "td", value?.n === undefined ? value : percent(value.share));
      if (value?.n !== undefined) put(cell, "small", interval(value));
    }
  }
}

// A button that asks before it does something to a study
function button(parent, text, question, url, body) {
  put(parent, "button", text).onclick = async () => {
    if (!confirm(question)) return;
    const reply = await post(url, body).catch(() => null);
    if (!reply?.ok) alert("The server did not take this; try again.");
    refresh();
  };
}

function person(stats, total) {
  return [stats.labeller, stats, (cell) => {
    const who = stats.labeller, words = [percent(total ? stats.trained / total : null)];
    if (stats.here) words.push("here now");
    if (stats.barred) words.push("barred");
    put(cell, "small", words.join(", ") + " ");
    for (const warning of stats.warnings) put(cell, "small", `${warning} `, {class: "warn"});
    button(cell, stats.barred ? "let in again" : "bar", stats.barred ? `Let answers of ${who} train again?`
      : `Bar ${who}? Answers from now on train nothing, and are marked.`, "api/people", {who, barred: !stats.barred});
  }];
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

function describeRun(run) {
  const {status} = run, step = (n) => n.toLocaleString();
  const state = run.archived ? "archived" : run.finished ? "finished" : !run.live ? "not running"
    : run.paused ? "paused" : status?.phase || "starting";
  put(main, "h2", `${run.env_id}: ${run.counted} of ${run.labels} labels, ${state}`);
  const line = put(main, "p", `${run.name} (${run.script}), ${run.open} pairs open, ${run.late} answers late; `
    + (status ? `step ${step(status.global_step)} of ${step(status.total_timesteps)}, ${status.labels_due} labels due `
    : "has not reported yet "));
  const {name, paused, archived} = run;
  put(line, "a", "link of this run", {href: `./?run=${encodeURIComponent(run.name)}`});
  button(line, paused ? "go on" : "pause", paused ? "Show its pairs again?" : "Show its pairs to nobody for now?",
    "api/runs", {run: name, paused: !paused, archived});
  button(line, archived ? "take back" : "archive", archived ? "Show this run again?" : "Put this run away?",
    "api/runs", {run: name, paused, archived: !archived});
  if (archived) return;
  plot(main, "labels", run.labels_over_time);
  plot(main, "reward model: held-out accuracy", run.accuracy_over_time, 1);
  table(main, "run", [[run.env_id, run]]);
}

// The clips behind an answer that is doubtful are fetched when somebody wants to see them
function describeDoubts(doubts, runs) {
  if (!doubts.length) return;
  put(main, "h2", "Answers to look at");
  const words = {first: "the first", second: "the second", equal: "equal", "cant-tell": "can't tell"};
  for (const {why, run, pair, said, sums} of doubts) {
    const key = `${run}/${pair}/${why}/${said.join()}`, details = put(main, "details");
    details.open = opened.has(key);
    put(details, "summary", `${why}: ${said.map(([who, what]) => `${who}: ${words[what]}`).join(", ")}`);
    const films = put(details, "div", undefined, {class: "films"}), {clip} = runs.find(({name}) => name === run);
    const see = async () => {
      opened[details.open ? "add" : "delete"](key);
      if (!details.open || films.firstChild) return;
      const urls = [0, 1].map((side) => `api/clips/${encodeURIComponent(run)}/${pair}/${side}`);
      const images = await Promise.all(urls.map(load)).catch(() => []);
      const sum = (side) => sums?.[side] === null || !sums ? "" : `, true sum ${sums[side].toFixed(2)}`;
      images.forEach((image, i) => film(films, ["the first", "the second"][i] + sum(i), image, clip));
    };
    details.ontoggle = see;
  }
}

const opened = new Set();
let before = "";
async function refresh() {
  const reply = await ask("api/stats").catch(() => null);
  if (!reply?.ok) {
    if (!main.firstChild || reply) main.textContent = reply ? "Please open the stats link that the server printed."
      : "The server can't be reached.";
    return;
  }
  const text = await reply.text(), {all, labellers, runs, doubts} = JSON.parse(text);
  if (text === before) return;
  before = text;
  main.replaceChildren();
  put(main, "h1", "Labels");
  const legend = put(main, "p", "Small: 95 % interval in per cent, and number of answers. Same again: one person, "
    + "the same pair twice. Agree, κ (from 20 pairs on): one pair, two people. As true sums: decisive answers where "
    + "the sums are known. Below a name: that person's share of the labels. ");
  put(legend, "a", "all answers (JSON lines)", {href: "export.jsonl"});
  put(legend, "a", "those that stand (CSV)", {href: "export.csv"});
  const total = labellers.reduce((sum, stats) => sum + stats.trained, 0);
  table(main, "people", [["all", all], ...labellers.map((stats) => person(stats, total))]);
  [...runs].reverse().forEach(describeRun);
  describeDoubts(doubts, runs);
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
    for stream in (sys.stdout, sys.stderr):  # of a terminal that lacks a character of the help
        stream.reconfigure(errors="replace")
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
    store = Store(args.runs_dir)
    named = socket.gethostname() if args.host in ("0.0.0.0", "::") else args.host
    url = args.public_url or f"http://{f'[{named}]' if ':' in named else named}:{args.port}"
    url = url.rstrip("/")
    tokens = read_tokens(store.runs_dir / "label_server.tokens", url)
    look(store, args)
    app = make_app(store, tokens, args)
    options = {"log_level": "warning", "server_header": False, "timeout_graceful_shutdown": 5, "timeout_keep_alive": 75}
    server = uvicorn.Server(uvicorn.Config(app, **options))
    print(f"label here:       {url}/?token={tokens['labeller']}")
    print(f"watch the labels: {url}/stats?token={tokens['admin']}")
    print(f"watches:          {store.runs_dir.resolve()}, for runs of --human", flush=True)
    with suppress(KeyboardInterrupt):
        server.run(sockets=[listener])


if __name__ == "__main__":
    main()
