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
from collections import Counter, defaultdict, deque
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import quote

import numpy as np
import sqlalchemy as sa
import tyro
import uvicorn
from fastapi import Body, FastAPI, HTTPException, Request, Response
from fastapi import Path as UrlPath
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel, Field, StringConstraints

LEASE = 90.0  # seconds that a pair is kept for one person; the page prolongs it
GRACE = 15.0  # seconds in which an answer can be undone, unless the same person has given two more
YOUNG = 60.0  # seconds for which a status.json proves that its trainer lives
REPEAT_GAP = 20  # answers between a pair and its repetition
MOST_HELD = 12  # pairs that one name may hold, in all its tabs
QUERY_BATCH = 16  # a trainer asks as soon as so many labels are due
BODY_BYTES = 64 * 2**10
MU = {"first": 1.0, "second": 0.0, "equal": 0.5, "cant-tell": None}  # the probability that the first clip is preferred
SAID = {mu: answer for answer, mu in MU.items()}


def fail(message: str):
    """End on bad input: one sentence on stderr, exit code 2."""
    print(f"label_server: {message}", file=sys.stderr)
    raise SystemExit(2)


# ---- Arguments -------------------------------------------------------------------------------------------------------
@dataclass
class Args:
    runs_dir: Path = Path("runs")  # the directory in which trainers make their runs; tokens and database lie there too
    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0 opens the page to the network
    port: int = 8765  # port to listen on; 0 takes a free one
    public_url: str | None = None  # where people reach the page through a tunnel or proxy: https://example.org/labels
    instructions: Path | None = None  # text file with your own for every task: the question first, the rest below
    repeat_frac: float = 0.05  # share of pairs shown to the same person again, sides swapped; does not train
    overlap_frac: float = 0.05  # share of pairs shown to a second person; does not train. 0: no pair goes to two people


def check_args(args: Args) -> None:
    for flag, share in (("--repeat-frac", args.repeat_frac), ("--overlap-frac", args.overlap_frac)):
        if not 0 <= share <= 1:
            fail(f"{flag} {share} lies outside [0, 1]")
    if not 0 <= args.port < 2**16:
        fail(f"--port {args.port} lies outside [0, 65535]")
    if args.public_url and not re.fullmatch(r"https?://[\w.:\[\]-]+(/[\w./~-]*)?", args.public_url):
        fail("--public-url is not of the form https://host/path")  # not shown: it may hold a password


# ---- What people are told: the gist of appendix B, as a question and three points ------------------------------------
GENERAL = """\
Judge only what you see in the two clips, not how the agent got there. Where it jumps, it has started anew.
You need not be sure, and a slip can be undone. Equally good, or equally bad, is an answer too; "can't tell" is for \
pairs in which you really don't see what is going on.
"""
GAME = """Dying, or being about to, is clearly bad; an agent that is dead all the time counts as average play. How \
many lives are left, or which level it is, does not matter."""
ROBOT = "The camera follows the robot. The lines on the floor are a metre apart, and the arrow points to the right."
INSTRUCTIONS = {
    "general": "Which clip is better?\nChoose the clip in which better things happen.",
    "Hopper-v5": f"""Which hopper gets further to the right?
Follow its orange part. Moving left is worse than standing still. If both get equally far, the one whose orange part \
stays higher is better. {ROBOT}""",
    "Walker2d-v5": f"""Which walker gets further to the right?
Follow its orange part. If both get equally far, the one whose orange part stays higher is better. {ROBOT}""",
    "Swimmer-v5": f"Which swimmer is faster to the right?\nFollow its orange part. {ROBOT}",
    "HalfCheetah-v5": f"Which cheetah is faster to the right?\nFollow its orange back. {ROBOT}",
    "Ant-v5": f"""Which ant stands better?
Standing upright comes first; if neither does, the one whose orange body is higher is better. If both stand, the one \
that is faster to the right is better. {ROBOT}""",
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
    """The text of each task, those of "general" for any other."""
    if path is None:
        return {task: f"{text}\n{GENERAL}" for task, text in INSTRUCTIONS.items()}
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"--instructions {path} can't be read as text ({error})")
    if not text:
        fail(f"--instructions {path} is empty")
    return {"general": f"{text}\n{GENERAL}"}


# ---- Runs: what trainers write ---------------------------------------------------------------------------------------
class Clip(BaseModel):
    """How the frames of a clip lie in its picture: in reading order, `columns` in a row."""

    frames: Annotated[int, Field(ge=1, le=10_000)]
    width: Annotated[int, Field(ge=1, le=4096)]
    height: Annotated[int, Field(ge=1, le=4096)]
    columns: Annotated[int, Field(ge=1, le=10_000)]
    fps: Annotated[float, Field(gt=0, le=1000)]
    pixelated: bool


class Status(BaseModel):
    phase: Literal["initial", "pretraining", "training", "finished"] = "initial"
    progress: float | None = None  # of pre-training
    step: int = 0
    total_timesteps: int = 0
    labels: int | None = None
    labels_due: int | None = None
    wanted: int | None = None  # labels for which the trainer stands still
    accuracy_heldout: float | None = None
    time: float = 0.0

    # From one to the next of a kind its numbers grow at a pace
    kind = property(lambda self: (self.phase, self.wanted is None, self.labels_due is None))


@dataclass
class Run:
    """A run directory, as it was at the last look."""

    folder: Path
    env_id: str
    labels: int
    clip: dict
    status: Status = field(default_factory=Status)
    status_text: bytes = b""
    told: float = -math.inf  # when status.json was written, on this process's clock
    history: deque = field(default_factory=lambda: deque(maxlen=120))  # of one kind: when, and the status then
    seen_locked: bool = False
    live: bool = False
    settled: bool = False  # what an earlier server left pending is written
    position: int = 0  # bytes of answers.jsonl that were read
    lines: dict[int, dict] = field(default_factory=dict)  # the first of each pair: the one that counts
    seen: set[int] = field(default_factory=set)  # pairs whose files were looked at

    name = property(lambda self: self.folder.name)
    finished = property(lambda self: self.status.phase == "finished")
    answers = property(lambda self: self.folder / "preferences" / "answers.jsonl")
    pending = property(lambda self: self.folder / "preferences" / "pending.jsonl")


def open_run(folder: Path) -> Run | None:
    """A run of --human; None for any other. ValueError says what is wrong."""
    try:
        found = json.loads((folder / "args.json").read_bytes())
        args = found["args"]
        if not args.get("human"):
            return None
        clip = Clip.model_validate(found["clip"]).model_dump()
        return Run(folder, str(args["env_id"])[:200], int(args["labels"]), clip)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__} {error}".split("\n")[0]
        raise ValueError(f"args.json is damaged, or of the first version of these scripts ({what})") from None


def is_locked(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def look_at(run: Run, now: float, wall: float) -> None:
    """Whether its trainer is there. Where the lock was seen held, it decides; a folder that is shared from another
    machine has only the age of its status.json: on this machine's clock, since the other's may be wrong."""
    with suppress(OSError, ValueError):
        text = (run.folder / "status.json").read_bytes()
        if text != run.status_text:
            status = Status.model_validate_json(text)
            run.told = now if run.status_text else now - max(0.0, wall - status.time)
            if status.kind != run.status.kind:
                run.history.clear()
            run.history.append((run.told, status))
            run.status, run.status_text, run.labels = status, text, status.labels or run.labels
    locked = is_locked(run.folder / "run.lock")
    run.seen_locked |= locked
    run.live = not run.finished and (locked or (now - run.told < YOUNG and not run.seen_locked))


def read_lines(path: Path, position: int = 0) -> tuple[list[dict], int]:
    """The objects on the lines from this byte on, and the byte after them. A last line without its newline is not
    whole yet; what is no object is passed over."""
    with open(path, "rb") as file:
        file.seek(position)
        text = file.read()
    text, found = text[: text.rfind(b"\n") + 1], []
    for line in text.splitlines():
        with suppress(ValueError):
            found += [row for row in [json.loads(line)] if isinstance(row, dict)]
    return found, position + len(text)


def append(path: Path, rows: list[dict]) -> None:
    """Add lines in one write, and flush them to the disk. A line that was torn by a crash is ended first."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(file).st_size
        torn = size and os.pread(file, 1, size - 1) != b"\n"
        data = b"\n" * torn + b"".join(json.dumps(row).encode() + b"\n" for row in rows)
        if data:
            if os.write(file, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file)
    finally:
        os.close(file)


def clip_url(run: str, number: int, clip: int) -> str:
    """Where the page gets a picture, relative to it. A run may have any name."""
    return f"api/clips/{quote(run)}/{number}/{clip}"


def picture_path(run: Run, number: int, clip: int) -> Path:
    return run.folder / "preferences" / f"{number:08d}.{clip}.webp"


def read_pair(run: Run, number: int) -> list | None:
    """The true sums of a pair whose files are all there and whole; None if some are missing. ValueError says what is
    wrong: a folder that is copied while it grows may be whole at the next look."""
    pictures = [picture_path(run, number, clip) for clip in (0, 1)]
    if not all(path.exists() for path in pictures):
        return None
    for path in pictures:
        data = path.read_bytes()
        if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 8 + int.from_bytes(data[4:8], "little"):
            raise ValueError(f"{path.name} is not a whole WebP picture")
    path = run.folder / "preferences" / f"{number:08d}.npz"
    try:
        with np.load(path, allow_pickle=False) as arrays:
            first, second = (float(x) if math.isfinite(x) else None for x in arrays["sums"])
    except Exception as error:  # a damaged file fails in as many ways as it has bytes
        raise ValueError(f"{path.name} can't be read ({type(error).__name__})") from None
    return [first, second]


# ---- The store: a log of who was shown what and said what, and what follows from it ----------------------------------
metadata = sa.MetaData()
log = sa.Table("log", metadata, sa.Column("number", sa.Integer, primary_key=True), sa.Column("row", sa.JSON))


@dataclass(eq=False)
class Serving:
    """A pair before one person, and the answer that stands. `leased` and `ripe` are on the clock that never goes back:
    until then nobody else gets the pair, and the answer can be undone."""

    id: str
    run: str
    pair: int
    who: str
    shown: str  # new, repeat (to the same person) or overlap (to a second one)
    swapped: bool
    sums: list | None
    time: float
    leased: float = 0.0
    answer: str | None = None  # its id
    said: str = ""  # a key of MU
    seconds: float | None = None
    answered: float = 0.0
    late: bool = False
    counted: bool = False  # it trains
    turn: int = 0  # how many answers this person had given before
    ripe: float = 0.0


@dataclass(eq=False)
class Pair:
    servings: list[Serving] = field(default_factory=list)
    trains: Serving | None = None  # the one whose answer does
    sums: list | None = None  # known once its files were seen whole: only then it is shown
    due: set = field(default_factory=set)  # repeat, overlap

    def is_held(self, now: float) -> bool:
        """Somebody has it on the screen: that needs no sweeper to end."""
        return any(not one.answer and one.leased > now for one in self.servings)


class Store:
    """The runs, and the log beside them; one thread at a time.

    SQLite has a single connection: all versions up to 3.51.2 can corrupt a database in WAL mode if two connections
    write and checkpoint at the same instant. FULL, since with NORMAL a commit that somebody was told of can vanish with
    the power. `wall` is for the record only.
    """

    def __init__(self, runs_dir: Path, clock=time.monotonic, wall=time.time):
        self.runs_dir, self.clock, self.wall = runs_dir.expanduser(), clock, wall
        self.lock, self.runs, self.others, self.told_of = threading.Lock(), {}, set(), set()
        self.pairs, self.servings, self.answers = defaultdict(Pair), {}, {}  # the last by the id of each answer
        self.shown = []  # pairs whose files were seen whole, and their keys, oldest first
        self.pending, self.here = [], {}  # servings whose answer can still be undone; when people were here last
        self.marks, self.turns = set(), Counter()  # (what, whose); answers of each person
        path = self.runs_dir / "label_server.sqlite"
        try:
            self.runs_dir.mkdir(exist_ok=True)
            os.scandir(self.runs_dir).close()
            self.lock_file = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        except BlockingIOError:
            fail(f"another label server is running on --runs-dir {self.runs_dir}")
        except OSError as error:
            fail(f"--runs-dir {self.runs_dir} is no directory to read and write in: {error.strerror}")
        options = {"poolclass": sa.StaticPool, "connect_args": {"check_same_thread": False, "timeout": 1}}
        self.engine = sa.create_engine(f"sqlite:///{path}", **options)
        try:
            with self.engine.begin() as conn:
                for pragma in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=FULL"):
                    conn.exec_driver_sql(f"PRAGMA {pragma}")
                if sa.inspect(conn).get_table_names() not in ([], ["log"]):
                    raise ValueError("it is not a label server's")
                metadata.create_all(conn)
            for row in self.read():
                self.apply(row)
        except (sa.exc.DBAPIError, ValueError, LookupError) as error:
            self.close()
            fail(f"{path} can't be opened: {getattr(error, 'orig', error)}; move it away: the labels lie in the runs")
        self.pending.clear()
        for one in self.servings.values():
            one.leased = self.clock() + LEASE  # a page that has it goes on, whoever was killed
            self.pairs[one.run, one.pair].trains = None  # what trains is what the runs' files say

    def close(self):
        self.engine.dispose()
        os.close(self.lock_file)

    def read(self) -> list[dict]:
        with self.engine.begin() as conn:
            return conn.scalars(sa.select(log.c.row).order_by(log.c.number)).all()

    def write(self, *rows: dict) -> None:
        """Put rows into the log for good, then into what follows from it."""
        with self.engine.begin() as conn:
            conn.execute(log.insert(), [{"row": row} for row in rows])
        for row in rows:
            self.apply(row)

    def apply(self, row: dict) -> None:
        match row["kind"]:
            case "serving":
                one = Serving(**{name: value for name, value in row.items() if name != "kind"})
                one.leased = self.clock() + LEASE
                self.servings[one.id] = one
                self.pairs[one.run, one.pair].servings.append(one)
            case "answer":
                one = self.answers[row["id"]] = self.servings[row["serving"]]
                one.answer, one.said, one.seconds = row["id"], row["said"], row["seconds"]
                one.answered, one.late, one.counted = row["time"], row["late"], row["counted"]
                one.turn, one.ripe = self.turns[one.who], self.clock() + GRACE
                self.turns[one.who] += 1
                self.pending.append(one)
                if one.counted:
                    self.pairs[one.run, one.pair].trains = one
            case "undo":
                one = self.answers[row["answer"]]
                self.forget(one)
                one.answer, one.leased = None, self.clock() + LEASE
                self.turns[one.who] -= 1
            case "mark":
                (self.marks.add if row["on"] else self.marks.discard)((row["mark"], row["name"]))
                for one in map(self.answers.get, row["dropped"]):
                    self.forget(one)
            case other:
                raise ValueError(f"it holds rows of another version ({other})")

    def forget(self, one: Serving) -> None:
        """Its answer trains no more."""
        self.pending = [other for other in self.pending if other is not one]
        one.counted, pair = False, self.pairs[one.run, one.pair]
        if pair.trains is one:
            pair.trains = None

    def tell(self, message: str) -> None:
        """Say once on the terminal what is wrong."""
        if message not in self.told_of:
            self.told_of.add(message)
            print(f"label_server: {message}", file=sys.stderr, flush=True)

    def listed(self, name: str | None = None) -> list[Run]:
        """The runs that people hear of; only that of a link, if it names one."""
        runs = [run for run in self.runs.values() if name in (None, run.name)]
        return [run for run in runs if ("archived", run.name) not in self.marks]

    def served(self, name: str | None = None) -> list[Run]:
        """Those whose pairs are shown."""
        return [run for run in self.listed(name) if run.live and ("paused", run.name) not in self.marks]


# ---- The watch: once a second, what is new in the runs, and what can't be undone any more ----------------------------
def look(store: Store, args: Args) -> None:
    """Look at every run of people, take up its new pairs and answers."""
    seen = {}
    for folder in sorted(store.runs_dir.iterdir()):
        try:
            if folder.name in store.others or not (folder / "args.json").exists():
                continue
            run = store.runs.get(folder.name) or open_run(folder)
            if not run:
                store.others.add(folder.name)
                continue
            seen[run.name] = run
            look_into(store, run, args)
        except Exception as error:  # whatever is wrong with one folder, the others go on
            store.tell(f"{folder}: {error if isinstance(error, (OSError, ValueError)) else repr(error)}")
    store.runs = seen
    with store.lock:
        release(store)


def look_into(store: Store, run: Run, args: Args) -> None:
    look_at(run, store.clock(), store.wall())
    found, names = {}, os.listdir(run.answers.parent) if run.live else []
    for number in sorted({int(name[:8]) for name in names if re.fullmatch(r"\d{8}\.npz", name)} - run.seen):
        try:
            found[number] = read_pair(run, number)
        except ValueError as error:
            store.tell(f"{run.folder}: {error}; that pair is not shown")
    with store.lock:
        if not run.settled:
            settle(store, run)
        take_in(store, run)
        for number, sums in found.items():
            pair, key = store.pairs[run.name, number], (run.name, number)
            if sums and not pair.sums:
                shares = {"repeat": args.repeat_frac, "overlap": args.overlap_frac}
                draws = {kind: random.Random(f"{kind} {key}").random() for kind in shares}  # the same at every start
                pair.sums, pair.due = sums, {kind for kind, share in shares.items() if draws[kind] < share}
                store.shown.append((key, pair))
            if sums or number in run.lines:
                run.seen.add(number)


def settle(store: Store, run: Run) -> None:
    """Write what an earlier server had acknowledged and not written yet."""
    for path in (run.answers, run.pending):
        append(path, [])  # ends a torn line
    folder = os.open(run.answers.parent, os.O_RDONLY)
    os.fsync(folder)  # both files are there for good
    os.close(folder)
    rows, _ = read_lines(run.pending)
    undone, kept = {row["undone"] for row in rows if "undone" in row}, {}
    for row in sorted(rows, key=lambda row: row.get("id") not in store.answers):  # what was acknowledged comes first
        if "id" in row and row["id"] not in undone and ("barred", row["who"]) not in store.marks:
            kept.setdefault(row["pair"], row)
    write_answers(store, run, list(kept.values()))
    for one in filter(None, map(store.answers.get, undone)):  # it was killed before this was in the log
        if one.answer in undone and one.counted and one.pair not in run.lines:
            store.write({"kind": "undo", "answer": one.answer, "time": store.wall()})
    os.truncate(run.pending, 0)
    run.settled = True


def take_in(store: Store, run: Run) -> None:
    """Read what is new in answers.jsonl; the first line of a pair counts. The log may lack some: it was removed, or
    somebody else wrote them."""
    rows, position = read_lines(run.answers, run.position)
    lines, news = {}, []
    for line in rows:
        number, mu = line.get("pair"), line.get("mu", "")
        is_answer = type(number) is int and isinstance(mu, float | int | None) and mu in SAID
        if not is_answer or number in run.lines or number in lines:
            continue
        lines[number] = line
        if line.get("loaded"):  # of another run
            continue
        pair, answer = store.pairs[run.name, number], str(line.get("id", f"{run.name}/{number}"))
        if answer in store.answers and (store.answers[answer].run, store.answers[answer].pair) != (run.name, number):
            answer = f"{run.name}/{number}"  # the run was renamed or copied: that answer is the other one's
        if answer in store.answers:
            pair.trains = store.answers[answer]
            continue
        who, when = str(line.get("who", "unknown"))[:40], line["time"] if is_number(line.get("time")) else 0.0
        mine = [one.id for one in pair.servings if (one.who, one.shown, one.answer) == (who, "new", None)]
        serving = mine[0] if mine else secrets.token_hex(16)
        if not mine:
            row = {"kind": "serving", "id": serving, "run": run.name, "pair": number, "who": who, "shown": "new"}
            news.append(row | {"swapped": line.get("swapped") is True, "sums": pair.sums, "time": when})
        row = {"kind": "answer", "id": answer, "serving": serving, "said": SAID[mu], "time": when, "late": False}
        news.append(row | {"counted": True, "seconds": line["seconds"] if is_number(line.get("seconds")) else None})
    if news:
        store.write(*news)
    run.lines |= lines  # not before the log has them: they are read again
    run.position = position


def is_number(x) -> bool:
    return isinstance(x, (int, float)) and math.isfinite(x)


def write_answers(store: Store, run: Run, rows: list[dict]) -> None:
    take_in(store, run)
    rows = [row for row in rows if row.get("pair") not in run.lines]
    if rows:
        append(run.answers, rows)
        take_in(store, run)


def release(store: Store, everything: bool = False) -> None:
    """Write what nobody can undo any more where the trainers read it."""
    for name in {one.run for one in store.pending}:
        run, mine = store.runs.get(name), [one for one in store.pending if one.run == name]
        if not run or not run.settled:
            store.tell(f"{store.runs_dir / name} is gone; answers wait for it")
            continue
        two_more = [one for one in mine if store.turns[one.who] - one.turn > 2]  # that the same person has given since
        ripe = [one for one in mine if everything or one in two_more or one.ripe <= store.clock()]
        try:
            write_answers(store, run, [line_of(one) for one in ripe if one.counted])
            store.pending = [one for one in store.pending if one not in ripe]
            if ripe == mine:
                os.truncate(run.pending, 0)
        except OSError as error:
            store.tell(f"answers wait, as {run.answers} can't be written: {error.strerror}")


def line_of(one: Serving) -> dict:
    """An answer as it lies in the run."""
    line = {"pair": one.pair, "mu": MU[one.said], "who": one.who, "seconds": one.seconds, "time": one.answered}
    return line | {"id": one.answer, "swapped": one.swapped}


# ---- Servings and answers: what a person does ------------------------------------------------------------------------
def choose(store: Store, who: str, name: str | None) -> tuple:
    """What to show next, and as what: a repetition or second opinion that is due, else the newest open pair."""
    now, runs, found = store.clock(), {run.name for run in store.served(name)}, {}
    for key, pair in store.shown:
        if key[0] not in runs or (pair.trains and not pair.due) or pair.is_held(now):
            continue
        mine = [one for one in pair.servings if one.who == who]
        wanted = pair.due - {one.shown for one in pair.servings if one.answer}
        if pair.trains is None:  # so no answer to it counts: who may label can give another
            if not any(one.answer for one in mine) or ("barred", who) not in store.marks:
                found["new"] = key
        elif pair.trains.who == who:
            if "repeat" in wanted - found.keys() and store.turns[who] - pair.trains.turn > REPEAT_GAP:
                found["repeat"] = key
        elif "overlap" in wanted and pair.trains not in store.pending and all(one.shown == "overlap" for one in mine):
            found["overlap"] = key
    return next(((kind, found[kind]) for kind in ("repeat", "overlap", "new") if kind in found), (None, None))


def count_open(store: Store, runs: list[Run], free: bool = False) -> int:
    """Pairs without an answer; only those that nobody has before him, if they are to be free."""
    names, now = {run.name for run in runs}, store.clock()
    pairs = [pair for key, pair in store.shown if key[0] in names and not pair.trains]
    return sum(not (free and pair.is_held(now)) for pair in pairs)


def count_labels(store: Store, run: Run, who: str | None = None) -> int:
    """Answers that train. The trainer counts the same, some seconds later."""
    written = [line for line in run.lines.values() if not line.get("loaded")]
    waiting = [one for one in store.pending if one.run == run.name and one.counted and one.pair not in run.lines]
    given = written + [line_of(one) for one in waiting]
    return sum(line["mu"] is not None and who in (None, line.get("who")) for line in given)


def is_open(store: Store, one: Serving, runs: set[str]) -> bool:
    """Whether it still waits for its answer; runs: names of those whose pairs are shown."""
    is_late = one.shown == "new" and store.pairs[one.run, one.pair].trains
    return one.run in runs and not one.answer and not is_late


def claim(store: Store, body: "ClaimBody") -> Serving | None:
    now, who, runs = store.clock(), body.labeller, {run.name for run in store.served()}
    mine = [one for one in store.servings.values() if one.who == who]
    held = [one for one in mine if one.leased > now and is_open(store, one, runs)]
    # A pair beyond the one on the screen is for who has enough of them: with few open, others would go without
    here = sum(now - since < LEASE for since in store.here.values())
    if len(held) >= MOST_HELD or (body.held and count_open(store, store.served(body.run), free=True) <= 2 * here):
        return None
    kind, key = choose(store, who, body.run)
    if not key:
        return None
    pair = store.pairs[key]
    for one in pair.servings:
        if (one.who, one.shown, one.answer) == (who, kind, None):  # its lease ran out: who still has it sees it once
            one.leased = now + LEASE
            return one
    swapped = not pair.trains.swapped if kind == "repeat" else random.random() < 0.5
    row = {"kind": "serving", "id": secrets.token_hex(16), "run": key[0], "pair": key[1], "who": who, "shown": kind}
    store.write(row | {"swapped": swapped, "sums": pair.sums, "time": store.wall()})
    return store.servings[row["id"]]


def renew(store: Store, body: "ClaimBody") -> list[str]:
    """End the leases of the pairs that a page left, prolong those of the pairs that it has; those that it must drop."""
    now, runs, kept = store.clock(), {run.name for run in store.served()}, set()
    for one in filter(None, map(store.servings.get, body.left)):
        one.leased = min(one.leased, now) if one.who == body.labeller else one.leased
    for one in filter(None, map(store.servings.get, body.held)):
        pair = store.pairs[one.run, one.pair]
        is_taken = any(other.leased > now and not other.answer for other in pair.servings if other is not one)
        if one.who == body.labeller and is_open(store, one, runs) and not is_taken:
            one.leased = now + LEASE
            kept.add(one.id)
    return [name for name in body.held if name not in kept]


def find_run(store: Store, name: str) -> Run:
    run = store.runs.get(name)
    if not run or not run.answers.parent.is_dir():
        raise HTTPException(410, "this pair is gone: its run was moved or deleted")
    if not run.settled:
        raise HTTPException(503, "this run can't be written to at the moment; try again")
    return run


def record_answer(store: Store, body: "AnswerBody") -> Serving:
    known = store.answers.get(body.id)
    if known:
        if (known.id, known.who) != (body.serving, body.labeller):
            raise HTTPException(409, "this id belongs to another answer")
        return known
    one = store.servings.get(body.serving)
    if not one:
        raise HTTPException(404, "this pair is not known here any more")
    run, pair = find_run(store, one.run), store.pairs[one.run, one.pair]
    if one.who != body.labeller:
        raise HTTPException(409, "this pair was served to somebody else")
    if one.answer:
        raise HTTPException(409, "this pair has been answered; undo that answer first")
    sides = {"left": ("first", "second")[one.swapped], "right": ("second", "first")[one.swapped]}
    said, now, late = sides.get(body.answer, body.answer), store.wall(), one.leased < store.clock()
    is_first = one.shown == "new" and not pair.trains and one.pair not in run.lines
    counted = is_first and ("barred", one.who) not in store.marks
    if counted:
        append(run.pending, [line_of(replace(one, answer=body.id, said=said, seconds=body.seconds, answered=now))])
    row = {"kind": "answer", "id": body.id, "serving": one.id, "said": said, "seconds": body.seconds, "time": now}
    store.write(row | {"late": late, "counted": counted})
    release(store)
    return one


def record_undo(store: Store, answer: str, who: str) -> Serving:
    one = store.answers.get(answer)
    if not one:
        raise HTTPException(404, "no such answer")
    if one.who != who:
        raise HTTPException(409, "this answer is somebody else's")
    if one.answer == answer:  # or it is undone already
        run = find_run(store, one.run)
        if one not in store.pending or (one.counted and one.pair in run.lines):
            raise HTTPException(409, "the agent has learned from this answer already")
        if one.counted:
            append(run.pending, [{"undone": answer}])
        store.write({"kind": "undo", "answer": answer, "time": store.wall()})
    return one


def set_mark(store: Store, name: str, mark: str, on: bool) -> None:
    """Bar a person, pause or archive a run. What a barred person said and the trainer does not have yet, and says from
    now on, trains nothing."""
    dropped = [one for one in store.pending if (mark, on, name) == ("barred", True, one.who) and one.counted]
    answers = [one.answer for one in dropped]
    store.write({"kind": "mark", "name": name, "mark": mark, "on": on, "dropped": answers, "time": store.wall()})
    for one in dropped:
        append(find_run(store, one.run).pending, [{"undone": one.answer}])


# ---- Progress: what the page tells people ----------------------------------------------------------------------------
def seconds_until(store: Store, run: Run, name: str, goal: float) -> float:
    """When a number of status.json reaches its goal, at the pace of this phase; infinity if that can't be told."""
    numbers = [(at, getattr(status, name)) for at, status in list(run.history)]
    if len(numbers) < 2 or None in (numbers[0][1], numbers[-1][1]) or run.status.wanted is not None:
        return math.inf
    (since, first), (at, last) = numbers[0], numbers[-1]
    return max(0.0, at + (goal - last) * (at - since) / (last - first) - store.clock()) if last > first else math.inf


def about(seconds: float) -> str:
    if seconds < 8:
        return "in a few seconds"
    if seconds < 90:
        return f"in about {round(seconds, -1):.0f} seconds"
    if seconds < 5400:
        return f"in about {seconds / 60:.0f} minutes"
    return f"in about {seconds / 3600:.0f} hours"


def wait_for(store: Store, run: Run) -> tuple[float, str]:
    """Why a live run has nothing to compare: how long for, and in words."""
    used, count, status = count_labels(store, run), count_open(store, [run]), run.status
    seconds = seconds_until(store, run, "labels_due", min(used + count + QUERY_BATCH, run.labels))
    then = f"The next clips come {about(seconds)}." if seconds < math.inf else "This page goes on by itself."
    if used >= run.labels:
        seconds = seconds_until(store, run, "step", status.total_timesteps)
        end = f"Its training ends {about(seconds)}." if seconds < math.inf else "It trains on with them to the end."
        return seconds, f"All {run.labels} labels that the agent asked for are in. Thank you! {end}"
    if count:
        whose = "The only open pair is" if count == 1 else f"All {count} open pairs are"
        return seconds, f"{whose} with others at the moment, or in a window that was closed. {then}"
    if status.wanted is not None:
        return GRACE, f"All open pairs are answered. The agent goes on with them {about(GRACE)}."
    if status.phase == "pretraining":
        seconds = seconds_until(store, run, "progress", 1.0)
        ready = f" It is ready {about(seconds)} at the latest." if seconds < math.inf else ""
        return seconds, f"The agent studies all answers so far, {status.progress or 0:.0%} done.{ready}"
    if status.phase == "initial":
        return YOUNG, "The agent makes its first moves. Clips of them come within a minute or so."
    done = status.step / max(1, status.total_timesteps)
    return seconds, f"No clips to compare right now: the agent is training, {done:.0%} done. {then}"


def describe_wait(store: Store, who: str, name: str | None) -> dict:
    """Why there is nothing to compare. Once a run is over, with a clip of the agent at its start, and the better one of
    the last pair."""
    runs, served = store.listed(name), store.served(name)
    if not runs:
        return {"notice": "No clips yet. They appear here as soon as a trainer starts."}
    if served:
        return {"notice": min(wait_for(store, run) for run in served)[1]}
    if any(run.live for run in runs):
        return {"notice": "The study is paused. This page goes on by itself when it does."}
    last = max(runs, key=lambda run: run.status.time)
    if not last.finished:
        return {"notice": "The training program is not running at the moment. This page goes on by itself when it is."}
    used, mine = count_labels(store, last), count_labels(store, last, who)
    told = {"notice": f"The run is over: {used} of {last.labels} labels were used, {mine} of them yours. Thank you!"}
    own = sorted(number for number, line in last.lines.items() if not line.get("loaded"))
    if own:
        films = [clip_url(last.name, own[0], 0), clip_url(last.name, own[-1], int(last.lines[own[-1]]["mu"] == 0))]
        told |= {"clip": last.clip, "films": films}
    return told


# ---- Statistics ------------------------------------------------------------------------------------------------------
def cohen_kappa(pairs: list[tuple[str, str]]) -> float | None:
    """Agreement of two raters beyond what their own habits would give by chance: 1 is perfect, 0 chance."""
    if not pairs:
        return None
    agreed = sum(a == b for a, b in pairs) / len(pairs)
    ours, theirs = zip(*pairs, strict=True)
    chance = sum(ours.count(c) * theirs.count(c) for c in set(ours)) / len(pairs) ** 2
    return (agreed - chance) / (1 - chance) if chance < 1 else None


def share(found: list[bool]) -> dict:
    return {"k": sum(found), "n": len(found), "share": sum(found) / len(found) if found else None}


def is_right(one: Serving) -> bool | None:
    """Whether the answer is what the true sums say; None where they say nothing, or the answer doesn't."""
    first, second = one.sums or (None, None)
    if one.said not in ("first", "second") or None in (first, second) or first == second:
        return None
    return (one.said == "first") == (first > second)


def summarise(answers: list[Serving], twice: list[tuple]) -> dict:
    """Of one person, or all: habits, consistency, agreement with others and with the true sums. `twice`: two answers to
    the same pair."""
    mine, said = set(answers), [one.said for one in answers]
    gaps = [b.answered - a.answered for a, b in pairwise(answers) if 0 <= b.answered - a.answered < 60]  # no breaks
    repeats = [a.said == b.said for a, b in twice if a.who == b.who and a in mine]
    others = [(a, b) if a in mine else (b, a) for a, b in twice if a.who != b.who and mine & {a, b}]
    opinions = [(a.said, b.said) for a, b in others if "cant-tell" not in (a.said, b.said)]
    lefts = [(one.said == "second") == one.swapped for one in answers if one.said in ("first", "second")]
    seconds = [one.seconds for one in answers if one.seconds is not None]
    return {
        "answers": len(answers),
        "a minute": 60 * len(gaps) / sum(gaps) if sum(gaps) else None,
        "seconds": float(np.median(seconds)) if seconds else None,
        "equal": share([one == "equal" for one in said]),
        "can't tell": share([one == "cant-tell" for one in said]),
        "chose left": share(lefts),
        "same again": share(repeats),
        "agree": share([a == b for a, b in opinions]),
        "κ": cohen_kappa(opinions) if len(opinions) >= 20 else None,
        "as true sums": share([is_right(one) for one in answers if is_right(one) is not None]),
    }


def warn(store: Store, stats: dict, answers: list[Serving]) -> list[str]:
    """What whoever runs a study should look at in a person's answers."""
    clips = [store.runs[run].clip for run in {one.run for one in answers} if run in store.runs]
    shortest = min((clip["frames"] / clip["fps"] for clip in clips), default=0)
    is_fast = len(answers) >= 10 and stats["seconds"] is not None and stats["seconds"] < shortest
    warnings = ["faster than a clip"] if is_fast else []
    guessed = sum((count / len(answers)) ** 2 for count in Counter(one.said for one in answers).values())
    for name, chance in {"as true sums": 0.5, "same again": guessed, "agree": guessed}.items():
        k, n = stats[name]["k"], stats[name]["n"]
        if n >= 20 and k < n * chance + 2 * math.sqrt(n * chance * (1 - chance)):  # two standard deviations of guessing
            warnings.append(f"{name}: near chance")
    return warnings


def statistics(store: Store) -> dict:
    answers = sorted((one for one in store.servings.values() if one.answer), key=lambda one: one.answered)
    of_pair = defaultdict(list)
    for one in answers:
        of_pair[one.run, one.pair].append(one)
    twice = [both for given in of_pair.values() for both in combinations(given, 2)]
    people, runs = [], []
    for who in sorted({one.who for one in answers}):
        mine = [one for one in answers if one.who == who]
        stats = summarise(mine, twice)
        here = store.clock() - store.here.get(who, -math.inf) < LEASE
        marks = {"labeller": who, "here": here, "barred": ("barred", who) in store.marks, "habits": stats}
        trained = sum(one.counted and one.said != "cant-tell" for one in mine)
        people.append(marks | {"trained": trained, "warnings": warn(store, stats, mine)})
    for run in store.runs.values():
        of_run = {name: getattr(run, name) for name in ("name", "env_id", "labels", "live", "finished", "clip")}
        of_run |= {mark: (mark, run.name) in store.marks for mark in ("paused", "archived")}
        of_run |= {"open": count_open(store, [run]), "used": count_labels(store, run)}
        runs.append(of_run | {"status": run.status.model_dump()})
    doubts = [("against the true rewards", [one]) for one in answers if is_right(one) is False]
    for a, b in twice:
        if a.who == b.who and a.said != b.said:
            doubts.append(("says otherwise the second time", [a, b]))
        elif a.said != b.said and "cant-tell" not in (a.said, b.said):
            doubts.append(("two people disagree", [a, b]))
    doubts = sorted(doubts, key=lambda doubt: -doubt[1][-1].answered)[:60]
    return {
        "all": summarise(answers, twice),
        "labellers": people,
        "runs": runs,
        "doubts": [
            {"why": why, "run": a[0].run, "pair": a[0].pair, "sums": a[0].sums, "said": [[b.who, b.said] for b in a]}
            for why, a in doubts
            if a[0].run in store.runs
        ],
    }


def export(store: Store) -> list[dict]:
    """The journal: a row for every answer, and one for every undoing of an answer."""
    rows, given = [], {}
    for row in store.read():
        if row["kind"] not in ("answer", "undo"):
            continue
        answer = given.setdefault(row.get("answer", row.get("id")), row)
        one = store.servings[answer["serving"]]
        stands, (first, second) = row["kind"] == "answer" and one.answer == row["id"], one.sums or (None, None)
        found = {"kind": row["kind"], "labeller": one.who, "answer": answer["said"], "mu": MU[answer["said"]]}
        found |= {"stands": stands, "counted": stands and one.counted, "barred": ("barred", one.who) in store.marks}
        found |= {name: answer[name] for name in ("id", "serving", "late", "seconds")} | {"time": row["time"]}
        found |= {name: getattr(one, name) for name in ("run", "pair", "shown", "swapped")}
        rows.append(found | {"sum_first": first, "sum_second": second})
    return rows


# ---- Requests: who may send what -------------------------------------------------------------------------------------
Id = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
PRINTABLE = r"^[^\x00-\x1f\x7f]+$"
Line = Annotated[str, StringConstraints(max_length=200, pattern=PRINTABLE)]
Name = Annotated[str, StringConstraints(max_length=40, pattern=PRINTABLE, strip_whitespace=True)]
Held = Annotated[list[Id], Field(max_length=MOST_HELD)]
Mark = Literal["barred", "paused", "archived"]


class ClaimBody(BaseModel):
    labeller: Name | None = None  # not known yet on the first page
    run: Line | None = None  # of the link
    held: Held = []  # pairs that the page has
    left: Held = []  # those that it had: it was closed, or went out of sight
    want: bool = True


class AnswerBody(BaseModel):
    id: Id
    serving: Id
    labeller: Name
    answer: Literal["left", "right", "equal", "cant-tell"]
    seconds: Annotated[float, Field(ge=0, le=1e6)]


ROLES = ("labeller", "admin")
OF_LABELLERS = ("/api/claim", "/api/clips/", "/api/answers")  # all else is the admin's
HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'",
}


def read_tokens(path: Path) -> dict[str, str]:
    """The tokens of the last start, so that links stay valid, or new ones; only the owner may read the file."""
    try:
        if not path.exists():
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                json.dump({role: secrets.token_urlsafe(32) for role in ROLES}, file)
        path.chmod(0o600)
        known = json.loads(path.read_text())
        return {role: str(known[role]) for role in ROLES}
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"the tokens in {path} can't be kept ({error!r}); remove the file to make new ones")


def make_app(store: Store, tokens: dict[str, str], args: Args) -> FastAPI:
    instructions = read_instructions(args.instructions)
    digests = {role: hashlib.sha256(tokens[role].encode()).digest() for role in ROLES}
    cookie = f"label_server_{args.port}"  # browsers keep one jar for all ports of a host
    hosts = {"localhost", "127.0.0.1", "[::1]", args.host}
    if args.host not in ("localhost", "::1") and not args.host.startswith("127."):
        hosts = None  # it is open to the network
    if hosts and args.public_url:
        hosts.add(re.sub(r"^https?://|(:\d+)?(/.*)?$", "", args.public_url).lower())  # as browsers send it
    stopping = threading.Event()

    def role_of(token: str) -> str | None:
        digest = hashlib.sha256(token.strip().encode(errors="surrogatepass")).digest()
        return next((role for role, known in digests.items() if secrets.compare_digest(known, digest)), None)

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

    def refuse(request: Request) -> tuple[int, str] | None:
        """What a request must pass before its body is read: host, token, role, origin, length."""
        host, path = request.headers.get("host", "").lower(), request.url.path
        # A page whose name was rebound to 127.0.0.1 reaches a local server, but under its own name
        if hosts is not None and re.sub(r":\d+$", "", host) not in hosts:
            return 400, "this server does not go by that name; see --public-url"
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        by_bearer = scheme.lower() == "bearer"  # any other scheme is meant for a proxy before this server
        cookies = [request.cookies.get(f"{cookie}_{role}") for role in reversed(ROLES)]  # a browser may have both
        found = [role_of(given) for given in ([token] if by_bearer else cookies) if given]
        role = request.state.role = next(filter(None, found), None)
        # Who has the statistics open may label in the same browser, and is shown no sums there
        request.state.is_robot = role == "admin" and by_bearer
        if path in ("/", "/stats", "/openapi.json"):  # the pages look at the token of their link
            return None
        if role is None:
            return 401, "a valid token is needed: open the link that the server printed, or send it as a bearer token"
        if role != "admin" and not path.startswith(OF_LABELLERS):
            return 403, "this needs the admin's token"
        if request.method in ("GET", "HEAD"):
            return None
        site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin", "")
        is_own = site in ("same-origin", "none") if site else origin.partition("://")[2] == host
        if not by_bearer and not is_own:  # the browser adds a cookie, whichever site asked
            return 403, "this request comes from another site"
        length = request.headers.get("content-length", "")
        if not length.isdigit() or int(length) > BODY_BYTES:
            return 413, f"a body of more than {BODY_BYTES} bytes, or of a length that is not told, is too large here"
        return None

    @app.middleware("http")
    async def guard(request: Request, call_next):
        refusal = refuse(request)
        reply = JSONResponse({"detail": refusal[1]}, refusal[0]) if refusal else await call_next(request)
        for name, value in HEADERS.items():
            reply.headers.setdefault(name, value)
        return reply

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

    @app.get("/", response_class=HTMLResponse)
    @app.get("/stats", response_class=HTMLResponse)
    def page(request: Request, token: str | None = None):
        """The page itself, not a redirect: a cookie for this site only would not survive one that began in a web mail.

        Nor would it be sent if such a page is loaded again. So a stranger gets the page too, with a 401, and its script
        asks the API, with the cookie if there is one.
        """
        role = request.state.role if token is None else role_of(token)
        nonce = secrets.token_urlsafe(16)
        only = f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
        only += "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        is_study = request.url.path == "/stats"
        body, script = ('<body class="stats"><main></main>', STATS_SCRIPT) if is_study else (LABEL_BODY, LABEL_SCRIPT)
        html = PAGE.replace("NONCE", nonce).format(style=STYLE, body=body, script=SHARED_SCRIPT + script)
        status = 401 if role is None else 403 if is_study and role != "admin" else 200
        reply = HTMLResponse(html, status, {"content-security-policy": only})
        if token and role:
            secure = request.url.scheme == "https"
            reply.set_cookie(f"{cookie}_{role}", token, 365 * 86400, httponly=True, samesite="strict", secure=secure)
        return reply

    def describe(one: Serving, with_sums: bool) -> dict:
        """A serving as the page gets it; who may label does not learn the true sums."""
        run = find_run(store, one.run)
        left, right = (clip_url(one.run, one.pair, int(side != one.swapped)) for side in (False, True))
        told = {"serving": one.id, "left": left, "right": right, "clip": run.clip, "task": run.env_id, "run": run.name}
        told["instructions"] = instructions.get(run.env_id, instructions["general"])
        sums = one.sums or [None, None]
        return told | ({"pair": one.pair, "sums": sums[::-1] if one.swapped else sums} if with_sums else {})

    @app.post("/api/claim")
    def claim_(request: Request, body: ClaimBody):
        """Keep the pairs that a page has, give it another one if it wants one, and tell it how things stand."""
        with store.lock:
            if body.labeller and (body.want or body.held):  # a page that is looked at
                store.here[body.labeller] = store.clock()
            gone, one = renew(store, body), claim(store, body) if body.want and body.labeller else None
            told = {"pair": describe(one, request.state.is_robot) if one else None, "gone": gone, "runs": {}}
            for run in store.served(body.run):
                used, yours = count_labels(store, run), count_labels(store, run, body.labeller)
                counts = {"labels": run.labels, "used": used, "yours": yours, "open": count_open(store, [run])}
                told["runs"][run.name] = counts
            return told | ({} if told["pair"] else describe_wait(store, body.labeller, body.run))

    @app.get("/api/clips/{run}/{pair}/{clip}")
    def read_clip_(run: Line, pair: Annotated[int, UrlPath(ge=0, lt=10**8)], clip: Annotated[int, UrlPath(ge=0, le=1)]):
        try:
            data = picture_path(find_run(store, run), pair, clip).read_bytes()
        except FileNotFoundError:
            raise HTTPException(410, "this pair is gone: its picture was removed") from None
        return Response(data, 200, {"cache-control": "private, max-age=31536000, immutable"}, "image/webp")

    @app.post("/api/answers")
    def record_answer_(body: AnswerBody):
        with store.lock:
            one = record_answer(store, body)
            return {"late": one.late, "counted": one.counted}

    @app.post("/api/answers/{answer}/undo")
    def record_undo_(request: Request, answer: Annotated[Id, UrlPath()], labeller: Annotated[Name, Body(embed=True)]):
        with store.lock:
            one = record_undo(store, answer, labeller)
            return {"pair": None if one.answer else describe(one, request.state.is_robot)}

    # The admin's
    @app.get("/api/stats")
    def statistics_():
        with store.lock:
            return statistics(store)

    @app.post("/api/marks", status_code=204)
    def mark_(name: Annotated[Line, Body()], mark: Annotated[Mark, Body()], on: Annotated[bool, Body()]):
        with store.lock:
            set_mark(store, name, mark, on)

    @app.get("/export.{form}")
    def export_(form: Literal["jsonl", "csv"]):
        """The journal as JSON lines, or a table of the answers that stand."""
        with store.lock:
            rows = export(store)
        headers, text = {"content-disposition": f'attachment; filename="labels.{form}"'}, io.StringIO()
        if form == "jsonl":
            text.writelines(json.dumps(row) + "\n" for row in rows)
            return Response(text.getvalue(), 200, headers, "application/jsonl")
        writer = csv.DictWriter(text, rows[0] if rows else ["answer"])
        writer.writeheader()
        for row in rows:
            if row["stands"]:  # a spreadsheet would take such a name for a formula
                writer.writerow(row | {"labeller": re.sub(r"^(?=[=+@-])", "'", row["labeller"])})
        return Response(text.getvalue(), 200, headers, "text/csv; charset=utf-8")

    return app


# ---- The pages -------------------------------------------------------------------------------------------------------
STYLE = r"""
:root { color-scheme: light dark; --ground: light-dark(#f4f5f7, #0f1115); --panel: light-dark(#fff, #171a21);
  --line: light-dark(#d3d8e0, #2a303b); --text: light-dark(#1a1f28, #dde1e8); --soft: light-dark(#5b6474, #99a1b0);
  --accent: light-dark(#1a5fd0, #8ab4f8); --on-accent: light-dark(#fff, #0b1220); --gap: clamp(6px, 1.8vmin, 14px); }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
button, input { font: inherit; color: inherit; background: var(--panel); border: 1px solid var(--line);
  border-radius: 10px; padding: 2px 10px; white-space: nowrap; }
button { cursor: pointer; touch-action: manipulation; -webkit-tap-highlight-color: transparent; }
/* Not before the mouse has moved: a mark on the side that was chosen last would speak for the same side again */
@media (hover: hover) { body:not(.fresh) button:hover { border-color: var(--accent); } }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
kbd { font: inherit; font-size: .85em; color: var(--soft); border: 1px solid var(--line); border-radius: 5px;
  padding: 1px 6px; background: var(--ground); }
progress { width: 5em; height: 8px; vertical-align: middle; accent-color: var(--accent); }
[hidden] { display: none !important; }
.label { height: 100dvh; padding: var(--gap) calc(1.4 * var(--gap)); display: grid; gap: var(--gap); overflow: hidden;
  grid-template: auto 1fr auto auto / minmax(0, 1fr); user-select: none; -webkit-user-select: none; }
header { display: flex; flex-wrap: wrap; align-items: center; gap: 2px 18px; color: var(--soft); }
header :is(#question, button) { overflow: hidden; text-overflow: ellipsis; }
#who { max-width: 12em; margin-left: auto; }
#question { color: var(--text); font-size: 1.15em; font-weight: 600; margin-right: auto; }
header :empty:not(progress) { display: none; }
main { position: relative; display: grid; grid: 1fr / 1fr 1fr; gap: var(--gap); min-height: 0; }
.clip { display: grid; grid-template-rows: 1fr auto; gap: var(--gap); padding: var(--gap); border-radius: 16px;
  min-width: 0; min-height: 0; color: var(--soft); }
.clip canvas { width: 100%; height: 100%; min-height: 0; object-fit: contain; }
.pixelated { image-rendering: pixelated; }
#notice { position: absolute; inset: 0; display: none; place-content: center; text-align: center; overflow: auto;
  font-size: 1.15em; color: var(--soft); }
.films { display: flex; flex-wrap: wrap; gap: 14px; justify-content: center; margin: 12px 0; }
.films figure { margin: 0; text-align: center; color: var(--soft); font-size: .9rem; }
.films canvas { height: min(150px, 22vh); display: block; margin: 0 auto 4px; border-radius: 6px; }
.example { position: relative; width: 160px; height: 100px; margin: 0 auto; border-radius: 6px; background: #1c2430; }
.example::before, .example::after { content: ""; position: absolute; border-radius: 50%; }
.example::before { left: 105px; top: 18px; width: 28px; height: 28px; border: 4px solid #f2c26b; }
.example::after { left: 22px; top: 70px; width: 14px; height: 14px; background: #8ab4f8; }
.arrives::after { animation: arrives 2.4s infinite; }
.stays::after { animation: stays 2.4s infinite; }
@keyframes arrives { 70%, 100% { transform: translate(90px, -45px); } }
@keyframes stays { 30%, 90% { transform: translateX(18px); } 60% { transform: translateX(-6px); } }
body:not([data-state=label]) :is(.clip, #seek, footer) { visibility: hidden; }
#said, body[data-state=waiting] #undo { visibility: visible; }
body:not([data-state=label]) #notice { display: grid; }
#seek { width: 100%; height: 4px; }
footer { display: grid; grid: auto / minmax(max-content, 1fr) auto minmax(max-content, 1fr); gap: var(--gap); }
footer > div { display: flex; gap: calc(var(--gap) / 2); align-items: center; }
footer > div:last-child { justify-content: flex-end; }
footer button { padding: 5px calc(var(--gap) / 1.6); font-size: .9em; color: var(--soft); }
.choices button { min-width: 11vw; padding: var(--gap); font-size: 1em; color: inherit; }
#said { position: fixed; top: 8px; left: 50%; transform: translateX(-50%); max-width: 90vw; padding: 6px 16px;
  border-radius: 10px; background: var(--accent); color: var(--on-accent); opacity: 0; pointer-events: none; }
dialog { background: var(--panel); color: var(--text); border: 1px solid var(--line); border-radius: 16px;
  padding: 26px 30px; width: min(620px, calc(100vw - 24px)); max-height: calc(100dvh - 24px); overflow: auto; }
dialog::backdrop { background: #0009; }
dialog ul { padding-left: 1.2em; }
dialog form { display: flex; gap: 10px; }
dialog :is(button, input) { padding: 8px 14px; min-width: 0; }
dialog button { background: var(--accent); color: var(--on-accent); font-weight: 600; }
dialog input { flex: 1; background: var(--ground); }
@media (orientation: portrait) and (pointer: coarse) {
  main { grid: 1fr 1fr / 1fr; }
  header { font-size: .9em; }
  #question { width: 100%; }
  footer { grid: auto / auto 1fr; }
  .choices { grid-area: 1 / 1 / 2 / -1; }
  .choices button { flex: 1; padding: 14px 8px; }
}
@media (max-width: 899px) { footer > div:last-child kbd { display: none; } }
@media (pointer: coarse), (max-width: 619px) { kbd, .keys { display: none; } }
h2 { margin: 0 0 8px; font-size: 1.2em; }
.stats { max-width: 1150px; margin: 0 auto; padding: 24px; overflow-wrap: anywhere; }
.stats main { display: block; }
.stats h2 { margin-top: 34px; }
.stats button { margin-right: 6px; }
.stats a { color: var(--accent); margin-right: 14px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
:is(th, td):first-child { text-align: left; max-width: 14em; overflow: hidden; text-overflow: ellipsis; }
td div { white-space: normal; }
:is(th, small, .stats p) { color: var(--soft); font-weight: 400; }
small.warn { color: light-dark(#a34700, #f2a65a); }
"""
LABEL_BODY = """<body class="label" data-state="start">
<header><span id="question"></span><span><progress value="0" hidden></progress> <span id="budget"></span></span>
  <span id="unsent"></span><button id="who" title="change your name"></button></header>
<main>
  <button class="clip" id="left" aria-label="the left clip is better">
    <canvas></canvas><span><kbd>←</kbd> this one is better</span></button>
  <button class="clip" id="right" aria-label="the right clip is better">
    <canvas></canvas><span>this one is better <kbd>→</kbd></span></button>
  <div id="notice"><span role="status"><noscript>This page needs JavaScript.</noscript></span><div class="films"></div>
  </div>
</main>
<progress id="seek" aria-hidden="true"></progress>
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
<dialog id="hello"><h2>What is your name?</h2>
  <p>You will see two short clips of an agent at work, side by side. Say which one is better: it learns from your
    answers alone. Here it is the one whose dot reaches the ring.</p>
  <div class="films"><figure><div class="example arrives"></div>this one is better</figure>
    <figure><div class="example stays"></div>this one stays where it was</figure></div>
  <form method="dialog"><input maxlength="40" autocomplete="nickname" aria-label="your name">
    <button>start</button></form>
</dialog>
<dialog id="rules"><h2></h2><ul></ul>
  <p class="keys">Keys: ← → (or A D) better · ↑ equally good · ↓ can't tell · U undo · space pause · , . step · S speed
  </p>
  <form method="dialog"><button>go on</button></form>
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

// A proxy whose server is away has a 4xx of its own; this server's are told by their detail
async function refusal(reply, ...codes) {
  const {detail} = codes.includes(reply.status) && await reply.json().catch(() => null) || {};
  return typeof detail === "string" ? detail : "";
}

async function load(url) {
  const reply = await ask(url, {signal: AbortSignal.timeout(6 * TIMEOUT)});  // a slow line has six to fetch
  if (!reply.ok) throw Object.assign(new Error(reply.status), {isGone: await refusal(reply, 404, 410)});
  return createImageBitmap(await reply.blob());
}

function drawFrame(canvas, image, {frames, width, height, columns}, frame) {
  const [x, y] = [frame % columns * width, Math.floor(frame / columns) * height];
  canvas.getContext("2d").drawImage(image, x, y, width, height, 0, 0, width, height);
}

function fit(canvas, {width, height, pixelated}) {
  [canvas.width, canvas.height] = [width, height];
  canvas.classList.toggle("pixelated", pixelated);
}

// Two clips that only play: what became of the agent, and what a doubtful answer was about
async function showFilms(parent, urls, captions, clip) {
  const images = await Promise.all(urls.map(load)).catch(() => []);
  parent.replaceChildren(...images.map((image, i) => {
    const figure = document.createElement("figure"), canvas = document.createElement("canvas");
    figure.append(canvas, captions[i]);
    fit(canvas, clip);
    const play = (time) => {
      const frame = Math.floor(time / 1000 * clip.fps) % (clip.frames + 8);
      drawFrame(canvas, image, clip, Math.min(clip.frames - 1, frame));
      if (figure.isConnected) requestAnimationFrame(play);
    };
    requestAnimationFrame(play);
    return figure;
  }));
}
"""
LABEL_SCRIPT = r"""
const HOLD = 0.4;  // seconds for which the last frame stays
const GUARD = 250;  // milliseconds in which a new pair takes no answer: that press was meant for the one before
const SURPRISE = 500;  // milliseconds more, if it came without a press
const WEEK = 7 * 86_400_000;  // milliseconds for which an answer is kept whose run or server is away
const AHEAD = 2;  // pairs that are fetched and decoded beforehand
const UNDOS = 2;
const IDLE = 300_000;  // who has not touched anything for so long lets the leases run out
const KEYS = {ArrowLeft: "left", a: "left", ArrowRight: "right", d: "right", ArrowUp: "equal", "=": "equal",
  ArrowDown: "cant-tell", u: "undo", " ": "pause", ",": "back", ".": "forth", s: "speed", "?": "help"};
const PLACES = {KeyA: "a", KeyD: "d", KeyU: "u", KeyS: "s", Comma: ",", Period: ".", Slash: "?", Equal: "="};
const still = matchMedia("(prefers-reduced-motion: reduce)");
const portrait = matchMedia("(orientation: portrait) and (pointer: coarse)");  // the clips lie one above the other
const now = () => Math.floor(performance.timeOrigin + performance.now());  // a clock that is never set back
// Not crypto.randomUUID: that exists on https and localhost only
const hex = (byte) => byte.toString(16).padStart(2, "0");
const newId = () => [...crypto.getRandomValues(new Uint8Array(16))].map(hex).join("");

// The state of the page: what render draws
let labeller = "", offline = false;
let problem = null;  // that ends it: the name of the state, and words
let told = {runs: {}};  // how things stand, as the server said last
let held = [], undoable = [];  // pairs and their pictures: of held the first is on screen, the others follow
let shown = null, shownAt = 0, touchedAt = 0;
let pressed = null;  // the pair on which a finger or mouse button went down
let clock = 0, frame = -1, last = 0, paused = false, speed = 1;
const out = new Map();  // answers that the server has not acknowledged, in their order
let unkept = false;  // there is no room for them in the local storage

// The two clips: one clock, one frame index -------------------------------------------------------------------------
function tick(time) {
  if (shown && !paused && !isTalking()) clock += (time - last) / 1000 * speed;
  last = time;
  draw();
  requestAnimationFrame(tick);
}

function draw() {
  if (!shown) return;
  const {clip} = shown.pair, {frames, fps} = clip;
  clock %= frames / fps + HOLD;
  const next = Math.min(frames - 1, Math.floor(clock * fps));
  $("seek").value = Math.min(1, clock * fps / frames);
  if (next === frame) return;
  frame = next;
  ["left", "right"].forEach((side, i) => {
    const canvas = $(side).querySelector("canvas");
    drawFrame(canvas, shown.images[i], clip, frame);
    canvas.dataset.frame = frame;
  });
}

function step(by) {
  if (!shown) return;
  const {frames, fps} = shown.pair.clip;
  paused = true;
  clock = ((frame + by + frames) % frames + 0.5) / fps;
  draw();
  render();
}

// Put the first pair on the screen, once its pictures are here
function present() {
  const next = held[0]?.images ? held[0] : null;
  if (next !== shown && next) {
    [clock, frame, shownAt, paused] = [0, -1, performance.now(), still.matches];
    document.body.classList.add("fresh");
    for (const side of ["left", "right"]) {
      const canvas = $(side).querySelector("canvas");
      fit(canvas, next.pair.clip);
      if (!still.matches) canvas.animate({opacity: [0.2, 1]}, 140);
    }
  }
  shown = next;
  draw();
  render();
  // The instructions: once for each task, and again when its text is another
  if (shown && !isTalking() && localStorage.getItem(`read:${shown.pair.task}`) !== shown.pair.instructions) showRules();
}

// A pair on the screen may go without a press, and another take its place
function drop(isGone) {
  const before = shown;
  held = held.filter((entry) => !isGone(entry));
  present();
  if (shown !== before) shownAt += SURPRISE;
}

// Words -------------------------------------------------------------------------------------------------------------
function render() {
  const run = shown && told.runs[shown.pair.run], {films = [], clip, runs} = told;
  document.body.dataset.state = problem?.[0] || (!labeller ? "name" : shown ? "label" : "waiting");
  document.body.dataset.serving = shown?.pair.serving || "";
  document.title = document.hidden && Object.values(runs).some(({open}) => open) ? "● Clips are here"
    : "Which clip is better?";
  $("question").textContent = shown ? shown.pair.instructions.split("\n")[0] : "";
  $("who").textContent = $("who").title = labeller;
  $("pause").lastChild.textContent = paused ? "play" : "pause";
  $("speed").lastChild.textContent = `${speed}×`;
  $("unsent").textContent = offline && out.size ? `${out.size} kept here until the server is back` : "";
  const bar = document.querySelector("progress");
  bar.hidden = !run;
  [bar.max, bar.value] = [run?.labels || 1, run?.used || 0];
  $("budget").textContent = run ? `${run.used} of ${run.labels} labels, ${run.yours} by you` : "";
  const [words, parent] = $("notice").children;
  words.textContent = problem?.[1]
    || (offline ? "The server can't be reached. This page tries again by itself; your answers are kept."
    : held.length ? "Two clips are on their way to you." : !labeller ? ""
    : isIdle() && Object.values(told.runs).some(({open}) => open)
    ? "Are you still there? Press a key, or touch this page." : told.notice);
  if (parent.dataset.films === films.join()) return;
  parent.dataset.films = films.join();
  showFilms(parent, films, ["at the start", "at the end"], clip);
}

function say(text) {
  $("said").textContent = $("said").title = text;
  $("said").animate({opacity: [1, 1, 0]}, {duration: 1200 + 50 * text.length, easing: "ease-in"});
}

const isTalking = () => $("hello").open || $("rules").open;
function openDialog(dialog) {
  dialog.showModal();
  dialog.querySelector("input, button").focus({preventScroll: true});
  dialog.scrollTop = 0;
}

function showRules() {
  if (!shown) return;
  const {instructions, task} = shown.pair, [question, ...points] = instructions.trim().split("\n");
  const [heading, list] = $("rules").children;
  heading.textContent = question;
  list.replaceChildren(...points.filter(Boolean).map((point) => {
    const item = document.createElement("li");
    item.textContent = point;
    return item;
  }));
  keep(`read:${task}`, instructions);
  openDialog($("rules"));
}

function sayHello() {
  $("hello").querySelector("input").value = labeller;
  openDialog($("hello"));
}

$("rules").onclose = () => shownAt = performance.now();
$("hello").oncancel = () => $("hello").querySelector("input").value = labeller;
$("hello").onclose = () => {
  const name = $("hello").querySelector("input").value.replace(/[\x00-\x1f\x7f]+/g, " ").trim();
  if (!name) return sayHello();
  if (name !== labeller) {
    letGo();
    [held, undoable] = [[], []];  // those were served to somebody else
  }
  keep("labeller", labeller = name);
  shownAt = performance.now();
  present();
  talk();
};

// What is said to the server: one thing after the other --------------------------------------------------------------
let talking = null, again = false, timer = 0;
function talk() {
  again = true;
  return talking ??= converse().finally(() => talking = null);
}

async function converse() {
  clearTimeout(timer);
  try {
    while (again) {
      again = false;
      await sendAnswers();
      await claim();
    }
    offline = false;
  } catch {
    offline = true;
    if (unkept) say("Please leave this page open: your last answers are neither sent nor kept yet.");
  }
  present();
  timer = setTimeout(talk, offline ? 3000 : held.length || problem ? 10_000 : 1000);
}

async function sendAnswers() {
  for (const [key, {url, body}] of out) {  // in order: an undoing after its answer
    const reply = await post(url, body, {keepalive: true});
    // Only JSON is this server's word: a captive portal or a login page says 200 too
    const why = reply.ok ? (await reply.json(), "") : await refusal(reply, 404, 409, 410, 422);
    if (await refusal(reply, 401, 403)) return;  // until the right link was opened
    if (!reply.ok && !why) throw new Error(reply.status);
    // Its run is away, or another server is at this address: an answer and its undoing are kept
    const isKept = [...out.values()].some(({body: {id}}) => id === (body.id || url.split("/")[2]));
    const isAway = reply.status === 410 || (reply.status === 404 && isKept);
    if (isAway && now() - key.split(":")[1] < WEEK) continue;
    // Any other refusal is for good, and must not stop what comes behind it
    out.delete(key);
    localStorage.removeItem(key);
    if (!why) continue;
    say(`not taken: ${why}`);
    drop(({id}) => id && url.includes(id));  // it can't be undone
  }
}

// Prolong the pairs that are here, drop those that somebody else answered or whose run has stopped, ask for another
async function claim() {
  const asked = labeller || null, away = document.hidden || isIdle();
  const have = away ? [] : held.map(({pair}) => pair.serving), want = !away && held.length <= AHEAD;
  const reply = await post("api/claim", {labeller: asked, held: have, want, run: link});
  if (await refusal(reply, 401, 403)) {
    problem = ["stranger", "Please open the link that you were given: this page needs its token."];
    [held, undoable] = [[], []];
    return;
  }
  if (!reply.ok) throw new Error(reply.status);
  const {pair, gone, ...news} = await reply.json();
  [problem, told] = [null, news];
  drop(({pair}) => gone.includes(pair.serving));
  if (!pair || labeller !== asked) return;  // of the name before: the server would refuse the answer
  again = true;
  const entry = {pair};
  held.push(entry);
  fetchPictures(entry);
  if (document.hidden) letGo();
}

// While they come, a slow line keeps no claim waiting
async function fetchPictures(entry) {
  try {
    entry.images = await Promise.all([load(entry.pair.left), load(entry.pair.right)]);
  } catch (error) {
    if (!error.isGone) return held.includes(entry) && setTimeout(fetchPictures, 2000, entry);
    held = held.filter((other) => other !== entry);
    talk();
  }
  present();
}

const beacon = (url, body) => navigator.sendBeacon(url, new Blob([JSON.stringify(body)], {type: "application/json"}));
function letGo() {
  if (held.length) beacon("api/claim", {labeller, left: held.map(({pair}) => pair.serving), want: false});
}

async function comeBack() {  // others may have been given the pairs by now: this press answers none of them
  [touchedAt, shownAt] = [performance.now(), Infinity];
  await Promise.race([talk(), new Promise((done) => setTimeout(done, 3000))]);
  shownAt = performance.now();
}

const isIdle = () => performance.now() - touchedAt > IDLE;
function touch() {
  if (isIdle()) comeBack();
  touchedAt = performance.now();
}

// Answers: kept from the press until the server has them, in local storage too where there is room -------------------
function keep(key, value) {
  try {
    localStorage.setItem(key, value);
    return true;
  } catch {  // it is full
    return false;
  }
}

function send(url, body) {
  const key = `out:${now()}:${newId()}`;
  out.set(key, {url, body});
  unkept = !keep(key, JSON.stringify({url, body}));
  talk();
}

function answer(which) {
  if (!shown || isTalking() || performance.now() - shownAt < GUARD) return;
  const id = newId(), {pair, images} = held.shift(), seconds = (performance.now() - shownAt) / 1000;
  send("api/answers", {id, serving: pair.serving, labeller, answer: which, seconds});
  undoable.push({id, pair, images});
  if (undoable.length > UNDOS) undoable.shift().images?.forEach((image) => image.close());
  const [left, right] = portrait.matches ? ["upper", "lower"] : ["left", "right"];
  say({left: `${left} is better`, right: `${right} is better`, equal: "equally good"}[which] || "can't tell");
  present();
}

function undo() {
  const entry = undoable.pop();
  if (!entry) return say("nothing to undo");
  send(`api/answers/${entry.id}/undo`, {labeller});
  held.unshift(entry);
  if (!entry.images) fetchPictures(entry);
  say("undone");
  present();
}

// Keys, buttons, and the start ----------------------------------------------------------------------------------------
const choices = ["left", "right", "equal", "cant-tell"];
const actions = {
  ...Object.fromEntries(choices.map((which) => [which, () => answer(which)])),
  undo, help: showRules, who: sayHello, back: () => step(-1), forth: () => step(1),
  pause: () => render(paused = !paused),
  speed: () => render(speed = {0.5: 1, 1: 2, 2: 0.5}[speed]),
};
for (const [id, action] of Object.entries(actions))
  $(id).addEventListener("click", (event) => {
    if (event.detail) $(id).blur();  // the next press of space is for the clips
    const isStale = event.detail > 1 || (event.detail && pressed && pressed !== shown);
    if (!isStale || !choices.includes(id)) action();
  });

addEventListener("keydown", (event) => {
  touch();
  if (event.ctrlKey || event.altKey || event.metaKey || event.target.tagName === "INPUT") return;
  const key = event.key.charCodeAt(0) > 127 ? PLACES[event.code] : event.key;  // a layout without Latin letters
  const id = KEYS[key?.length === 1 ? key.toLowerCase() : key];
  if (isTalking()) return id === "help" && !event.repeat && $("rules").close();
  if (id || event.repeat) event.preventDefault();  // a held Enter would press the focused button again and again
  if (id && (!event.repeat || id === "back" || id === "forth")) $(id).click();
});
addEventListener("pointerdown", () => pressed = shown);
addEventListener("pointerdown", touch);
addEventListener("click", touch, true);  // of a screen reader, which may press nothing
addEventListener("pointermove", () => document.body.classList.remove("fresh"));
addEventListener("online", talk);
addEventListener("pageshow", (event) => event.persisted && comeBack());
addEventListener("visibilitychange", () => {
  if (!document.hidden) comeBack();
  else letGo();  // a phone may never say more of a page than this
  render();
});
// What can be undone outlives a reload. It is kept as the page ends and not before: a tab that is duplicated starts
// with a copy of the session storage
addEventListener("pagehide", () => {
  const session = {labeller, undoable: undoable.map(({id, pair}) => ({id, pair}))};
  try {
    sessionStorage.setItem("page", JSON.stringify(session));
  } catch { /* it is full */ }
  // Sent again later if nothing acknowledges them. They may overtake each other: an answer that is undone is not sent
  const undone = [...out.values()].flatMap(({url}) => url.split("/").slice(2, 3));
  for (const {url, body} of out.values())
    if (!undone.includes(body.id)) beacon(url, body);
  letGo();
});

async function start() {
  try {
    labeller = localStorage.getItem("labeller") || "";
    for (const key of Object.keys(localStorage).filter((key) => key.startsWith("out:")).sort())
      out.set(key, JSON.parse(localStorage.getItem(key)));
    const session = JSON.parse(sessionStorage.getItem("page") || "null");
    sessionStorage.removeItem("page");
    if (session?.labeller === labeller) undoable = session.undoable;
  } catch {
    problem = ["blocked", "Your browser keeps no data of this page. Please allow cookies and site data for this "
      + "address, and load it again."];
    return render();
  }
  requestAnimationFrame(tick);
  await talk();
  if (!labeller && !problem) sayHello();
}
start();
"""
STATS_SCRIPT = r"""
const main = document.querySelector("main");
function put(parent, name, text, attributes = {}) {
  const element = parent.appendChild(document.createElement(name));
  if (text !== undefined) element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}
const percent = (x) => x === null ? "–" : `${Math.round(100 * x)} %`;

// A button that marks a person or a run, or takes the mark away
function button(parent, name, mark, isOn, text) {
  put(parent, "button", text).onclick = async () => {
    const reply = await post("api/marks", {name, mark, on: !isOn}).catch(() => null);
    if (!reply?.ok) alert("The server did not take this; try again.");
    refresh();
  };
}

function describePeople(all, labellers) {
  const table = put(put(main, "div", undefined, {class: "wide"}), "table"), head = put(table, "tr");
  for (const title of ["people", ...Object.keys(all)]) put(head, "th", title);
  const total = labellers.reduce((sum, {trained}) => sum + trained, 0);
  for (const {labeller, habits, here, barred, trained, warnings} of [{labeller: "all", habits: all}, ...labellers]) {
    const line = put(table, "tr"), first = put(line, "td", labeller, {title: labeller});
    for (const x of Object.values(habits)) {
      const cell = put(line, "td", x?.n === undefined ? x === null ? "–" : Math.round(10 * x) / 10 : percent(x.share));
      if (x?.n) put(cell, "small", ` of ${x.n}`);
    }
    if (!warnings) continue;
    const words = [percent(total ? trained / total : null), here && "here now", barred && "barred"];
    const more = put(first, "div");
    put(more, "small", words.filter(Boolean).join(", ") + " ");
    put(more, "small", `${warnings.join("; ")} `, {class: "warn"});
    button(more, labeller, "barred", barred, barred ? "let in again" : "bar");
  }
}

function describeRun(run) {
  const {name, paused, archived, status} = run;
  const state = archived ? "archived" : run.finished ? "finished" : !run.live ? "not running"
    : paused ? "paused" : status.phase;
  const due = status.wanted === null ? `${status.labels_due ?? 0} labels due` : `waits for ${status.wanted} labels`;
  put(main, "h2", `${run.env_id}: ${run.used} of ${run.labels} labels, ${state}`);
  const line = put(main, "p", `${name}, ${run.open} pairs open, ${due}; step `
    + `${status.step.toLocaleString()} of ${status.total_timesteps.toLocaleString()}; held-out accuracy of the `
    + `reward model: ${percent(status.accuracy_heldout)} `);
  put(line, "a", "link of this run", {href: `./?run=${encodeURIComponent(name)}`});
  button(line, name, "paused", paused, paused ? "go on" : "pause");
  button(line, name, "archived", archived, archived ? "take back" : "archive");
}

// The clips behind a doubtful answer are fetched when somebody wants to see them
function describeDoubt({why, run, pair, said, sums}, {clip}) {
  const words = {first: "the first", second: "the second", equal: "equal", "cant-tell": "can't tell"};
  const details = put(main, "details");
  put(details, "summary", `${why}: ${said.map(([who, what]) => `${who} said ${words[what]}`).join(", ")}`);
  const films = put(details, "div", undefined, {class: "films"});
  details.ontoggle = () => {
    if (!details.open || films.firstChild) return;
    const urls = [0, 1].map((side) => `api/clips/${encodeURIComponent(run)}/${pair}/${side}`);
    const sum = (side) => typeof sums?.[side] === "number" ? `, true sum ${sums[side].toFixed(2)}` : "";
    showFilms(films, urls, ["the first" + sum(0), "the second" + sum(1)], clip);
  };
}

async function refresh() {
  const reply = await ask("api/stats").catch(() => null);
  if (!reply?.ok) {
    if (!main.firstChild || reply) main.textContent = reply ? "Please open the stats link that the server printed."
      : "The server can't be reached.";
    return;
  }
  const {all, labellers, runs, doubts} = await reply.json();
  main.replaceChildren();
  put(main, "h1", "Labels");
  const legend = put(main, "p", "Same again: one person, the same pair twice. Agree, κ (from 20 pairs on): one pair, "
    + "two people. As true sums: decisive answers where the sums are known. Below a name: their share of the labels. ");
  put(legend, "a", "all answers (JSON lines)", {href: "export.jsonl"});
  put(legend, "a", "those that stand (CSV)", {href: "export.csv"});
  describePeople(all, labellers);
  runs.reverse().forEach(describeRun);
  if (doubts.length) put(main, "h2", "Answers to look at");
  for (const doubt of doubts) describeDoubt(doubt, runs.find(({name}) => name === doubt.run));
}
refresh();
setInterval(() => document.hidden || document.querySelector("details[open]") || refresh(), 10_000);
"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Which clip is better?</title><link rel="icon" href="data:,">
<meta name="viewport" content="width=device-width, initial-scale=1"><style nonce="NONCE">{style}</style></head>
{body}<script nonce="NONCE">{script}</script></body></html>
"""


# ---- Start -----------------------------------------------------------------------------------------------------------
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
    tokens = read_tokens(store.runs_dir / "label_server.tokens")
    look(store, args)
    named = socket.gethostname() if args.host in ("0.0.0.0", "::") else args.host
    url = args.public_url or f"http://{f'[{named}]' if ':' in named else named}:{args.port}"
    print(f"label here:       {url.rstrip('/')}/?token={tokens['labeller']}")
    print(f"watch the labels: {url.rstrip('/')}/stats?token={tokens['admin']}")
    print(f"watches:          {store.runs_dir.resolve()}, for runs of --human", flush=True)
    options = {"log_level": "warning", "server_header": False, "timeout_graceful_shutdown": 5, "timeout_keep_alive": 75}
    server = uvicorn.Server(uvicorn.Config(make_app(store, tokens, args), **options))
    with suppress(KeyboardInterrupt):
        server.run(sockets=[listener])


if __name__ == "__main__":
    main()
