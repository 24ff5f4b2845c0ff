"""Fifty people with two seconds of think time label for a minute: how long do they wait for a claim, for an answer?

    python benchmarks/label_server_load.py                    # writes label_server_load.csv beside it

Each person keeps a connection, claims a pair while the one before is on the screen, fetches its two clips, thinks,
answers, and asks for progress as the page does; a trainer, which only writes files, keeps pairs open. Ends with
exit code 1 on any error.
"""

import argparse
import http.client
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path
from urllib.parse import urlsplit

import cv2
import numpy as np
from label_server_kills import Server, append_row, train

CLIP = {"frames": 25, "width": 160, "height": 210, "columns": 5, "fps": 15.0, "pixelated": True}


def make_sheet(rng: np.random.Generator) -> bytes:
    """About two kilobytes, as a lossless sheet of an Atari game."""
    image = np.zeros((1050, 800, 3), np.uint8)
    for x, y in rng.integers(0, (780, 1030), (60, 2)):
        image[y : y + 16, x : x + 4] = rng.integers(0, 255, 3)
    return cv2.imencode(".webp", image, [cv2.IMWRITE_WEBP_QUALITY, 101])[1].tobytes()


class Caller:
    """A kept connection that notes how long each kind of request took."""

    def __init__(self, server: Server, role: str, times: dict):
        self.connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
        self.headers = {"authorization": f"Bearer {server.tokens[role]}", "content-type": "application/json"}
        self.times = times

    def __call__(self, kind: str, method: str, path: str, body: dict | None = None):
        started = time.perf_counter()
        self.connection.request(method, path, json.dumps(body) if body is not None else None, self.headers)
        reply = self.connection.getresponse()
        data = reply.read()
        self.times.setdefault(kind, []).append(time.perf_counter() - started)
        if reply.status >= 400:
            raise RuntimeError(f"{path}: {reply.status} {data[:200]}")
        return data if reply.headers["content-type"] == "image/webp" else json.loads(data)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=int, default=50)
    parser.add_argument("--think", type=float, default=2.0, help="mean of an exponential distribution, in seconds")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--train", type=Path, help="be the trainer of this run directory")
    parser.add_argument("--csv", type=Path, default=Path(__file__).with_suffix(".csv"))
    args = parser.parse_args()
    if args.train:
        train(args.train, [make_sheet(np.random.default_rng(seed)) for seed in range(8)], CLIP, ahead=4 * args.people)
    stop, times, errors = threading.Event(), {}, []

    def guarded(work, *arguments):
        try:
            work(*arguments)
        except Exception as error:
            errors.append(repr(error))

    def label(server, name, rng):
        call = Caller(server, "labeller", times)
        stop.wait(rng.uniform(0, args.think))
        while not stop.is_set():
            pair = call("claim", "POST", "/api/claim", {"labeller": name})["pair"]
            if pair is None:
                errors.append("no pair was open")
                return
            for side in ("left", "right"):
                call("clip", "GET", f"/{pair[side]}")
            seconds = rng.expovariate(1 / args.think)
            if stop.wait(seconds):  # the end, which would make all answer at once
                return
            body = {"id": uuid.uuid4().hex, "serving": pair["serving"], "labeller": name, "seconds": seconds}
            call("answer", "POST", "/api/answers", body | {"answer": rng.choice(["left", "right", "equal"])})
            call("progress", "POST", "/api/claim", {"labeller": name, "want": False})

    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder))
        run = server.runs / "load"
        trainer = subprocess.Popen([sys.executable, __file__, "--train", str(run), "--people", str(args.people)])
        try:
            while len(list(run.glob("preferences/*.npz"))) < 4 * args.people:
                time.sleep(0.5)
            time.sleep(3)  # until the server has looked
            jobs = [(label, server, f"person {i}", random.Random(i)) for i in range(args.people)]
            threads = [threading.Thread(target=guarded, args=job) for job in jobs]
            for thread in threads:
                thread.start()
            time.sleep(args.seconds)
            stop.set()
            for thread in threads:
                thread.join()
        finally:
            server.kill()
            trainer.kill()
            trainer.wait()

    row = {"people": args.people, "think_seconds": args.think, "seconds": args.seconds, "errors": len(errors)}
    for kind in ("claim", "answer", "clip", "progress"):
        took = 1000 * np.array(times[kind])
        row |= {f"{kind}_n": len(took), f"{kind}_p50_ms": round(np.median(took), 1)}
        row |= {f"{kind}_p95_ms": round(np.quantile(took, 0.95), 1), f"{kind}_max_ms": round(took.max(), 1)}
    row |= {
        "cpus": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
    }
    for name, value in append_row(args.csv, row).items():
        print(f"{name:>18} {value}")
    for error in errors[:5]:
        print(error, file=sys.stderr)
    sys.exit(bool(errors))


if __name__ == "__main__":
    main()
