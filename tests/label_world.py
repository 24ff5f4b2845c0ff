"""What the tests of the label server share: a server with a clock that they move, real sprites, a real socket."""

import base64
import contextlib
import json
import socket
import threading
import uuid

import cv2
import numpy as np
import uvicorn
from fastapi.testclient import TestClient

import label_server

TOKENS = {"trainer": "t" * 43, "labeller": "l" * 43, "admin": "a" * 43}
CLIP = {"frames": 5, "width": 8, "height": 6, "columns": 3, "fps": 20.0, "pixelated": True}
RUN = {"name": "first", "env_id": "Hopper-v5", "script": "ppo", "labels": 100, "max_open": 1000, "clip": CLIP}


def webp(grey: int, width: int = 24, height: int = 12, quality: int = 101) -> bytes:
    image = np.full((height, width, 3), grey, np.uint8)
    return cv2.imencode(".webp", image, [cv2.IMWRITE_WEBP_QUALITY, quality])[1].tobytes()


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def new_id() -> str:
    return uuid.uuid4().hex


class World:
    """A server with a clock that tests move, and short words for what trainers and people do."""

    def __init__(self, url: str, repeat: float = 0.0, overlap: float = 0.0, now: float = 1e6, **flags):
        self.now, self.url = now, url
        self.args = label_server.Args(repeat_frac=repeat, overlap_frac=overlap, **flags)
        self.open()

    def open(self):
        self.store = label_server.Store(self.url, clock=lambda: self.now)
        self.stopping = False
        self.app = label_server.make_app(self.store, TOKENS, self.args, stopping=lambda: self.stopping)
        self.client = TestClient(self.app, base_url="http://127.0.0.1:8765")

    def call(self, method, path, body=None, role="labeller", expect=200):
        headers = {"authorization": f"Bearer {TOKENS[role]}"} if role else {}
        reply = self.client.request(method, path, json=body, headers=headers)
        assert reply.status_code == expect, (path, reply.status_code, reply.text)
        if expect >= 400:
            assert list(reply.json()) == ["detail"]
            assert isinstance(reply.json()["detail"], str)
        return reply.json() if reply.content and reply.headers["content-type"] == "application/json" else reply

    def run(self, **changes):
        run = new_id()
        self.call("PUT", f"/api/runs/{run}", RUN | changes, "trainer")
        return run

    def query(self, run, greys=(10, 20), sums=(None, None), query=None, expect=200):
        query = query or new_id()
        body = {"run": run, "clips": [text(webp(grey)) for grey in greys], "sums": sums}
        reply = self.call("PUT", f"/api/queries/{query}", body, "trainer", expect)
        return query if expect == 200 else reply

    def claim(self, labeller="Ann", run=None, role="admin"):
        return self.call("POST", "/api/claim", {"labeller": labeller, "run": run}, role)["pair"]

    def answer(self, pair, answer="equal", labeller="Ann", id=None, expect=200, seconds=2.0):
        body = {"id": id or new_id(), "serving": pair["serving"], "labeller": labeller, "answer": answer}
        return self.call("POST", "/api/answers", body | {"seconds": seconds}, "labeller", expect) | {"id": body["id"]}

    def retract(self, answer, labeller="Ann", id=None, expect=200):
        body = {"id": id or new_id(), "labeller": labeller}
        return self.call("POST", f"/api/answers/{answer}/retract", body, "labeller", expect)

    def events(self, run, after=0):
        return self.call("GET", f"/api/runs/{run}/events?after={after}", None, "trainer")["events"]

    def journal(self):
        return [json.loads(line) for line in self.call("GET", "/export.jsonl", role="admin").text.splitlines()]

    def status(self, run, **changes):
        body = {"global_step": 1, "total_timesteps": 9, "labels_used": 0, "labels_due": 0, "labels": 100}
        body |= {"accuracy_heldout": None, "waiting": False, "finished": False}
        self.call("POST", f"/api/runs/{run}/status", body | changes, "trainer", 204)

    def close(self):
        self.client.close()
        self.store.engine.dispose()


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
            world.stopping = server.should_exit = True
            thread.join()
