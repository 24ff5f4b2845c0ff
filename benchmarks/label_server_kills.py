"""SIGKILL label server and trainer at random moments under four writers: is every acknowledged answer there, once?

    python benchmarks/label_server_kills.py --kills 20        # of each; a minute

The trainer only writes pairs, as the training scripts do, and counts answers. One answer in five is taken back. Appends
a row to label_server_kills.csv beside it; ends with exit code 1 where an answer was lost or doubled.
"""

import argparse
import csv
import http.client
import json
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid
from contextlib import suppress
from pathlib import Path

import filelock
import numpy as np

SCRIPT = Path(__file__).resolve().parent.parent / "label_server.py"
# The smallest lossless WebP: one pixel
PIXEL = bytes.fromhex("524946461a000000574542505650384c0e0000002f00000000071011fd0f4444ff03")
CLIP = {"frames": 1, "width": 1, "height": 1, "columns": 1, "fps": 10.0, "pixelated": True}


class Server:
    """A label server in its own process, which can be killed and started again."""

    def __init__(self, folder: Path, *flags: str):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.runs, self.url = folder / "runs", f"http://127.0.0.1:{port}"
        self.command = [sys.executable, str(SCRIPT), "--port", str(port), "--runs-dir", str(self.runs), *flags]
        self.start()

    def start(self):
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, text=True)
        self.links = [self.process.stdout.readline() for _ in range(3)]
        self.tokens = json.loads((self.runs / "label_server.tokens").read_text())

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def call(self, method: str, path: str, body: dict | None = None, role: str = "labeller"):
        data = None if body is None else json.dumps(body).encode()
        headers = {"authorization": f"Bearer {self.tokens[role]}", "content-type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=10) as reply:
            return reply.read()

    def insist(self, *request):
        """As the page does: the same request again until the server has acknowledged or refused it; None if refused."""
        for _ in range(1500):
            try:
                return json.loads(self.call(*request))
            except urllib.error.HTTPError as error:
                if error.code in (404, 409):
                    return None
                if error.code < 500:
                    raise
            except (OSError, ValueError, http.client.HTTPException):  # gone before, after or in the middle of the reply
                pass
            time.sleep(0.02)
        raise TimeoutError(f"no answer from {self.url}")


def train(run: Path, pictures: tuple[bytes, ...] = (PIXEL,), clip: dict = CLIP, ahead: int = 50) -> None:
    """A trainer that keeps so many pairs open, and reads the answers, until it is killed; then it may start again."""
    folder = run / "preferences"
    folder.mkdir(parents=True, exist_ok=True)

    def write(path: Path, put) -> None:
        beside = path.with_suffix(".tmp")
        with open(beside, "wb") as file:
            put(file)
        beside.replace(path)

    lock = filelock.FileLock(run / "run.lock")
    lock.acquire(timeout=5)
    args = {"env_id": "Storm-v0", "human": True, "labels": 10**6, "segment_length": clip["frames"]}
    found = json.dumps({"script": "storm", "args": args, "clip": clip}).encode()
    write(run / "args.json", lambda file: file.write(found))
    asked = 1 + max((int(path.stem) for path in folder.glob("*.npz")), default=-1)
    while True:
        journal = folder / "answers.jsonl"
        lines = journal.read_bytes().split(b"\n")[:-1] if journal.exists() else []
        while asked - len(lines) < ahead:
            for side in (0, 1):
                picture = random.choice(pictures)
                write(folder / f"{asked:08d}.{side}.webp", lambda file, picture=picture: file.write(picture))
            write(folder / f"{asked:08d}.npz", lambda file: np.savez(file, sums=[np.nan, np.nan]))
            asked += 1
        status = {"phase": "training", "labels_used": len(lines), "asked": asked, "time": time.time()}
        write(run / "status.json", lambda file, status=status: file.write(json.dumps(status).encode()))
        time.sleep(0.1)


class TrainerProcess:
    def __init__(self, run: Path):
        self.run = run
        self.start()

    def start(self):
        self.process = subprocess.Popen([sys.executable, __file__, "--train", str(self.run)])

    def kill(self):
        self.process.kill()
        self.process.wait()


def storm(server: Server, kills: int, rng: random.Random, pause: tuple[float, float] = (0.3, 1.5)) -> dict:
    run, stop, standing, undone = server.runs / "storm", threading.Event(), {}, set()
    trainer = TrainerProcess(run)

    def label(name: str, rng: random.Random):
        while not stop.is_set():
            pair = server.insist("POST", "/api/claim", {"labeller": name})["pair"]
            if not pair:
                time.sleep(0.05)
                continue
            body = {"id": uuid.uuid4().hex, "serving": pair["serving"], "labeller": name, "seconds": 1}
            reply = server.insist("POST", "/api/answers", body | {"answer": rng.choice(["left", "equal", "cant-tell"])})
            if not reply or not reply["counted"]:
                continue
            standing[body["id"]] = pair["left"]
            undo = ("POST", f"/api/answers/{body['id']}/undo", {"labeller": name})
            if rng.random() < 0.2 and server.insist(*undo):
                undone.add(body["id"])

    threads = [threading.Thread(target=label, args=(f"writer {i}", random.Random(i))) for i in range(4)]
    for thread in threads:
        thread.start()
    for killed in [server, trainer] * kills:
        time.sleep(rng.uniform(*pause))
        killed.kill()
        killed.start()
    time.sleep(0.5)
    died = sum(not thread.is_alive() for thread in threads)  # of something that a page would not survive
    stop.set()
    for thread in threads:
        thread.join()
    server.process.terminate()  # which writes what is still pending
    server.process.wait()
    trainer.kill()
    lines = []
    for line in (run / "preferences" / "answers.jsonl").read_text().split("\n"):
        with suppress(ValueError):  # torn by a kill, and ended by the next start
            lines.append(json.loads(line))
    ids, pairs = [line["id"] for line in lines], [line["pair"] for line in lines]
    return {
        "kills": kills,
        "died": died,
        "acknowledged": len(standing),
        "undone": len(undone),
        "lost": len(standing.keys() - undone - set(ids)),
        "doubled": len(pairs) - len(set(pairs)),
        "undone_and_written": len(undone & set(ids)),
    }


def append_row(path: Path, figures: dict) -> dict:
    """Add a row to a csv, with the commit before the figures; the row."""
    git = ["git", "-C", str(SCRIPT.parent), "rev-parse", "--short", "HEAD"]
    row = {"commit": subprocess.run(git, capture_output=True, text=True).stdout.strip()} | figures
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if fresh:
            writer.writeheader()
        writer.writerow(row)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=Path, help="be the trainer of this run directory")
    parser.add_argument("--csv", type=Path, default=Path(__file__).with_suffix(".csv"))
    args = parser.parse_args()
    if args.train:
        train(args.train)
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), "--repeat-frac", "0", "--overlap-frac", "0")
        try:
            result = storm(server, args.kills, random.Random(args.seed))
        finally:
            server.kill()
    print(json.dumps(append_row(args.csv, result)))
    sys.exit(any(result[name] for name in ("died", "lost", "doubled", "undone_and_written")))


if __name__ == "__main__":
    main()
