"""Robots that answer a label server's questions, through the HTTP interface that a person's browser uses.

    LABEL_SERVER_TOKEN=<admin> python tests/robot_labeller.py --labellers 2 --delay 0.5 --mistakes 0.1

With the admin's token a claim tells the true sums of both clips. A robot prefers the larger one, and answers "equal"
where they are the same, as the scripts' --oracle does.
"""

import argparse
import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
import uuid


class Robot(threading.Thread):
    """A labeller of its own name. `answers` are those that were acknowledged, by run and pair.

    delay: seconds per answer; mistakes: share of answers that are turned around; undo: share of answers that it takes
    back, after the next one, and gives again where it is in time; settle: what answers a pair of equal sums, from its
    two WebP sheets and the layout of their frames.
    """

    def __init__(self, url: str, token: str, name: str, delay=0.0, mistakes=0.0, undo=0.0, seed=0, settle=None):
        super().__init__(daemon=True)
        self.url, self.token, self.labeller = url, token, name
        self.delay, self.mistakes, self.undo, self.settle = delay, mistakes, undo, settle
        self.random, self.stopping, self.answers = random.Random(f"{name} {seed}"), threading.Event(), {}

    def call(self, method: str, path: str, body: dict | None = None) -> bytes:
        """The reply; asked again until the server is there, as a page does."""
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        while True:
            try:
                request = urllib.request.Request(self.url + path, data, headers, method=method)
                with urllib.request.urlopen(request, timeout=40) as reply:
                    return reply.read()
            except urllib.error.HTTPError as error:
                if error.code < 500:
                    raise RuntimeError(f"{error.code} {error.read().decode()}") from error
            except (OSError, ValueError, http.client.HTTPException):
                if self.stopping.is_set():
                    raise
            time.sleep(0.2)

    def judge(self, pair: dict) -> str:
        left, right = pair["sums"]
        if left == right:
            if not self.settle:
                return "equal"
            left, right = (self.call("GET", f"/{pair[side]}") for side in ("left", "right"))
            return self.settle(left, right, pair["clip"])
        return "left" if (left > right) != (self.random.random() < self.mistakes) else "right"

    def answer(self, pair: dict) -> str:
        """Answer one pair; the answer's id."""
        time.sleep(self.delay)
        answer, body = uuid.uuid4().hex, {"labeller": self.labeller, "seconds": self.delay}
        body |= {"id": answer, "serving": pair["serving"], "answer": self.judge(pair)}
        self.call("POST", "/api/answers", body)
        self.answers[pair["run"], pair["pair"]] = body["answer"]
        return answer

    def run(self):
        before = None
        while not self.stopping.is_set():
            pair = json.loads(self.call("POST", "/api/claim", {"labeller": self.labeller}))["pair"]
            if not pair:
                self.stopping.wait(0.5)
                continue
            last = self.answer(pair)
            if before and self.random.random() < self.undo:
                body = {"labeller": self.labeller}
                try:
                    again = json.loads(self.call("POST", f"/api/answers/{before}/undo", body))["pair"]
                except RuntimeError:  # the agent has learned from it
                    again = None
                last = self.answer(again) if again else last
            before = last


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8765")
    parser.add_argument("--labellers", type=int, default=1)
    parser.add_argument("--delay", type=float, default=0.0, help="seconds per answer")
    parser.add_argument("--mistakes", type=float, default=0.0, help="share of answers that are turned around")
    args = parser.parse_args()
    robots = [
        Robot(args.url, os.environ["LABEL_SERVER_TOKEN"], f"robot {i}", args.delay, args.mistakes)
        for i in range(args.labellers)
    ]
    for robot in robots:
        robot.start()
    for robot in robots:
        robot.join()


if __name__ == "__main__":
    main()
