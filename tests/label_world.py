"""What the tests of the label server share: a trainer that writes run directories, a clock that they move, a socket."""

import contextlib
import json
import socket
import threading
import time
import uuid

import cv2
import filelock
import numpy as np
import uvicorn
from fastapi.testclient import TestClient

import label_server

TOKENS = {"labeller": "l" * 43, "admin": "a" * 43}
CLIP = {"frames": 5, "width": 8, "height": 6, "columns": 3, "fps": 20.0, "pixelated": True}


def webp(grey: int, width: int = 24, height: int = 12, quality: int = 101) -> bytes:
    image = np.full((height, width, 3), grey, np.uint8)
    return cv2.imencode(".webp", image, [cv2.IMWRITE_WEBP_QUALITY, quality])[1].tobytes()


def new_id() -> str:
    return uuid.uuid4().hex


class Trainer:
    """The files of a run of --human, as the training scripts write them. It lives until it is stopped."""

    def __init__(self, folder, env_id="Hopper-v5", labels=100, clip=CLIP, **changes):
        self.folder, self.asked = folder, 0
        (folder / "preferences").mkdir(parents=True)
        args = {"env_id": env_id, "human": True, "labels": labels, "segment_length": clip["frames"]}
        self.write("args.json", {"script": "ppo_mujoco_rlhf", "args": args, "clip": clip} | changes)
        self.told = {"phase": "initial", "progress": None, "step": 0, "total_timesteps": 1000}
        self.told |= {"labels": labels, "labels_used": 0, "labels_due": None, "wanted": None, "asked": 0}
        self.told |= {"accuracy_heldout": None}
        self.start()

    def write(self, name, found):
        beside = self.folder / f"{name}.tmp"
        beside.write_text(json.dumps(found))
        beside.replace(self.folder / name)

    def status(self, **changes):
        self.told |= changes
        self.write("status.json", self.told | {"time": changes.get("time", time.time())})

    def start(self):
        self.lock = filelock.FileLock(self.folder / "run.lock")
        self.lock.acquire(timeout=5)

    def stop(self):
        self.lock.release()

    def ask(self, pictures=None, sums=(np.nan, np.nan)) -> int:
        number, self.asked = self.asked, self.asked + 1
        for side, picture in enumerate(pictures or (webp(10), webp(20))):
            self.path(number, f".{side}.webp").write_bytes(picture)
        with open(self.path(number, ".tmp"), "wb") as file:
            np.savez_compressed(file, sums=np.array(sums, np.float32))
        self.path(number, ".tmp").replace(self.path(number, ".npz"))
        return number

    def path(self, number, end):
        return self.folder / "preferences" / f"{number:08d}{end}"

    def lines(self, name="answers.jsonl") -> list[dict]:
        path = self.folder / "preferences" / name
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines() if line]

    def answers(self) -> dict:
        """As a trainer reads them: the first line of a pair counts."""
        found = {}
        for line in self.lines():
            found.setdefault(line["pair"], line["mu"])
        return found


class World:
    """A server with a clock that tests move, and short words for what trainers and people do."""

    def __init__(self, folder, repeat: float = 0.0, overlap: float = 0.0, now: float = 1e6, **flags):
        self.now, self.folder, self.trainers = now, folder, []
        self.args = label_server.Args(folder, repeat_frac=repeat, overlap_frac=overlap, **flags)
        self.open()

    def open(self):
        self.store = label_server.Store(self.folder, clock=lambda: self.now, wall=lambda: self.now)
        label_server.look(self.store, self.args)
        self.app = label_server.make_app(self.store, TOKENS, self.args)
        self.client = TestClient(self.app, base_url="http://127.0.0.1:8765")

    def close(self):
        """As SIGKILL does: nothing is written."""
        self.client.close()
        self.store.close()

    def look(self, seconds: float = 0.0):
        self.now += seconds
        label_server.look(self.store, self.args)

    def call(self, method, path, body=None, role="labeller", expect=200):
        headers = {"authorization": f"Bearer {TOKENS[role]}"} if role else {}
        reply = self.client.request(method, path, json=body, headers=headers)
        assert reply.status_code == expect, (path, reply.status_code, reply.text)
        if expect >= 400:
            assert list(reply.json()) == ["detail"]
            assert isinstance(reply.json()["detail"], str)
        return reply.json() if reply.content and reply.headers["content-type"] == "application/json" else reply

    def run(self, name=None, **changes) -> Trainer:
        self.trainers.append(Trainer(self.folder / (name or new_id()), **changes))
        return self.trainers[-1]

    def ask(self, run: Trainer, greys=(10, 20), sums=(np.nan, np.nan)) -> int:
        number = run.ask([webp(grey) for grey in greys], sums)
        self.look()
        return number

    def claim(self, labeller="Ann", run=None, role="admin", held=(), want=True):
        body = {"labeller": labeller, "run": run, "held": list(held), "want": want}
        self.claimed = self.call("POST", "/api/claim", body, role)
        return self.claimed["pair"]

    def answer(self, pair, answer="equal", labeller="Ann", id=None, expect=200, seconds=2.0):
        body = {"id": id or new_id(), "serving": pair["serving"], "labeller": labeller, "answer": answer}
        return self.call("POST", "/api/answers", body | {"seconds": seconds}, "labeller", expect) | {"id": body["id"]}

    def undo(self, answer, labeller="Ann", expect=200):
        return self.call("POST", f"/api/answers/{answer}/undo", {"labeller": labeller}, "labeller", expect)

    def told(self, labeller="Ann", held=()):
        """What the page of somebody who has these pairs hears."""
        self.claim(labeller, held=held, want=False)
        return self.claimed

    def mark(self, name, mark, on=True):
        self.call("POST", "/api/marks", {"name": name, "mark": mark, "on": on}, "admin", 204)

    def journal(self):
        return [json.loads(line) for line in self.call("GET", "/export.jsonl", role="admin").text.splitlines()]


@contextlib.contextmanager
def listening(world):
    """The application behind a real socket, in a thread."""
    server = uvicorn.Server(uvicorn.Config(world.app, log_level="error"))
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
