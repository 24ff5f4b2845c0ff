"""SIGKILL the label server at random moments under four writers: is every acknowledged answer there, and none twice?

    python benchmarks/label_server_kills.py --kills 20                                     # SQLite; a minute
    python benchmarks/label_server_kills.py --kills 20 --database-url postgresql+psycopg://user@localhost/empty

Appends a row to label_server_kills.csv beside it; ends with exit code 1 where an answer was lost or doubled.
"""

import argparse
import base64
import csv
import http.client
import itertools
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
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "label_server.py"
# The smallest lossless WebP: one pixel
PIXEL = base64.b64encode(bytes.fromhex("524946461a000000574542505650384c0e0000002f00000000071011fd0f4444ff03")).decode()
CLIP = {"frames": 1, "width": 1, "height": 1, "columns": 1, "fps": 10.0, "pixelated": True}
RUN = {"name": "storm", "env_id": "Storm-v0", "script": "kills", "labels": 9, "max_open": 10**6, "clip": CLIP}


class Server:
    """A label server in its own process, which can be killed and started again."""

    def __init__(self, folder: Path, database_url: str | None, *flags: str):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.folder, self.url = folder, f"http://127.0.0.1:{port}"
        self.command = [sys.executable, str(SCRIPT), "--port", str(port), *flags]
        self.command += ["--database-url", database_url] if database_url else []
        self.start()

    def start(self):
        self.process = subprocess.Popen(self.command, cwd=self.folder, stdout=subprocess.PIPE, text=True)
        self.links = [self.process.stdout.readline() for _ in range(4)]
        self.tokens = json.loads((self.folder / "label_server.tokens").read_text())

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
        """As the page and the trainers do: the same request again until the server has acknowledged it."""
        while True:
            try:
                return json.loads(self.call(*request))
            except urllib.error.HTTPError as error:
                if error.code < 500:
                    raise
            except (OSError, ValueError, http.client.HTTPException):  # gone before, after or in the middle of the reply
                pass
            time.sleep(0.02)


def storm(server: Server, kills: int, rng: random.Random, pause: tuple[float, float] = (0.3, 1.5)) -> dict:
    run, stop, acknowledged, read = uuid.uuid4().hex, threading.Event(), {}, []
    server.insist("PUT", f"/api/runs/{run}", RUN, "trainer")

    def put():
        while not stop.is_set():
            body = {"run": run, "clips": [PIXEL, PIXEL], "sums": [None, None]}
            if server.insist("PUT", f"/api/queries/{uuid.uuid4().hex}", body, "trainer")["open"] > 50:
                time.sleep(0.05)

    def label(name: str):
        while not stop.is_set():
            pair = server.insist("POST", "/api/claim", {"labeller": name})["pair"]
            if not pair:
                time.sleep(0.05)
                continue
            choice = ("left", "right", "equal", "cant-tell")[len(acknowledged) % 4]
            body = {
                "id": uuid.uuid4().hex,
                "serving": pair["serving"],
                "labeller": name,
                "answer": choice,
                "seconds": 1,
            }
            acknowledged[body["id"]] = server.insist("POST", "/api/answers", body)["counted"]

    def train():
        while not stop.is_set():
            after = read[-1]["seq"] if read else 0
            read.extend(server.insist("GET", f"/api/runs/{run}/events?after={after}", None, "trainer")["events"])
            time.sleep(0.02)

    threads = [threading.Thread(target=label, args=(f"writer {i}",)) for i in range(4)]
    threads += [threading.Thread(target=put), threading.Thread(target=train)]
    for thread in threads:
        thread.start()
    for _ in range(kills):
        time.sleep(rng.uniform(*pause))
        server.kill()
        server.start()
    time.sleep(0.5)
    died = sum(not thread.is_alive() for thread in threads)  # of something that a page or trainer would not survive
    stop.set()
    for thread in threads:
        thread.join()
    after = read[-1]["seq"] if read else 0
    read += server.insist("GET", f"/api/runs/{run}/events?after={after}", None, "trainer")["events"]
    journal = [json.loads(line) for line in server.call("GET", "/export.jsonl", role="admin").splitlines()]
    last = {row["labeller"]: row["id"] for row in journal}.values()  # each writer's last answer may still be withheld
    ids, queries = [row["id"] for row in journal], [row["query"] for row in journal if row["counted"]]
    ripe = {row["query"] for row in journal if row["counted"] and row["id"] not in last}
    return {
        "kills": kills,
        "died": died,
        "acknowledged": len(acknowledged),
        "lost": len(acknowledged.keys() - set(ids)),
        "doubled": len(ids) - len(set(ids)) + len(queries) - len(set(queries)),
        "trainer_missed": len(ripe - {row["query"] for row in read}),
        "trainer_doubled": len(read) - len({row["query"] for row in read}),
        "out_of_order": sum(a["seq"] >= b["seq"] for a, b in itertools.pairwise(read)),
    }


def append_row(path: Path, database_url: str | None, figures: dict) -> dict:
    """Add a row to a csv, with the commit and the kind of database before the figures; the row."""
    git = ["git", "-C", str(SCRIPT.parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    row = {"commit": commit, "database": (database_url or "sqlite").partition("+")[0]} | figures
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
    parser.add_argument("--database-url")
    parser.add_argument("--csv", type=Path, default=Path(__file__).with_suffix(".csv"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), args.database_url, "--repeat-frac", "0", "--overlap-frac", "0")
        try:
            result = storm(server, args.kills, random.Random(args.seed))
        finally:
            server.kill()
    print(json.dumps(append_row(args.csv, args.database_url, result)))
    bad = ("died", "lost", "doubled", "trainer_missed", "trainer_doubled", "out_of_order")
    sys.exit(any(result[name] for name in bad))


if __name__ == "__main__":
    main()
