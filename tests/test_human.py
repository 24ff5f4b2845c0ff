"""--human: the scripts' side of human labels, alone and with a real label server that robots answer."""

import http.server
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import a2c_atari_rlhf as a2c
import ppo_atari_rlhf as atari
import ppo_mujoco_rlhf as mujoco
from robot_labeller import Robot

ROOT = Path(atari.__file__).parent

PENDULUM = [
    "--human",
    "--env-id",
    "InvertedPendulum-v5",
    "--num-envs",
    "4",
    "--num-steps",
    "32",
    "--update-epochs",
    "1",
]
PENDULUM += ["--num-minibatches", "2", "--segment-length", "5", "--query-pool-steps", "800", "--pretrain-pairs", "256"]
PENDULUM += ["--reward-minibatch-size", "8", "--eval-episodes", "1", "--checkpoint-every", "5", "--log-every", "5"]
PONG_A2C = ["--human", "--num-envs", "4", "--query-pool-steps", "1200", "--pretrain-pairs", "64", "--device", "cpu"]
PONG_A2C += ["--reward-minibatch-size", "4", "--torch-threads", "1", "--eval-episodes", "1", "--segment-length", "10"]
PONG = [*PONG_A2C, "--num-steps", "32", "--update-epochs", "1", "--num-minibatches", "2"]


class Server:
    """label_server.py in a process of its own, with its database in a folder."""

    def __init__(self, folder: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.url, self.robots = folder, f"http://127.0.0.1:{self.port}", []
        self.start()

    def start(self):
        command = [sys.executable, str(ROOT / "label_server.py"), "--port", str(self.port)]
        command += ["--overlap-frac", "0", "--repeat-frac", "0"]
        self.process = subprocess.Popen(command, cwd=self.folder, stdout=subprocess.PIPE, text=True)
        self.process.stdout.readline()  # the link is shown when it can be opened
        for _ in range(100):
            with socket.socket() as ready:
                if ready.connect_ex(("127.0.0.1", self.port)) == 0:
                    break
            time.sleep(0.05)
        self.tokens = json.loads((self.folder / "label_server.tokens").read_text())

    def kill(self):
        self.process.kill()
        self.process.wait()

    def robot(self, name="robot", **kwargs) -> Robot:
        self.robots.append(Robot(self.url, self.tokens["admin"], name, **kwargs))
        self.robots[-1].start()
        return self.robots[-1]

    def close(self):
        for robot in self.robots:
            robot.stopping.set()
        for robot in self.robots:
            robot.join()
        self.kill()


@pytest.fixture
def server(tmp_path, monkeypatch):
    (tmp_path / "server").mkdir()
    server = Server(tmp_path / "server")
    monkeypatch.setenv("LABEL_SERVER_TOKEN", server.tokens["trainer"])
    yield server
    server.close()


def unscored(monkeypatch, script):
    """No evaluation at the end: it takes longer than the run."""
    result = {"returns": np.zeros(1), "screens": []}
    monkeypatch.setattr(script, "evaluate", lambda *_, **__: result)
    monkeypatch.setattr(script, "draw_episode", lambda result, folder, title: None)
    monkeypatch.setattr(script, "STATISTICS_ROWS", 100)


def only(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def labels_of(script, run_dir, *shape):
    """All labels of a run in one dict of arrays, and its checkpoint's progress."""
    shards = list(script.read_shards(run_dir / "preferences", script.clip_shapes(*shape)))
    progress = script.read_checkpoint(run_dir)["progress"]
    return {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0]}, progress


def check_answers(script, run_dir, server, *shape):
    """Every answer in the server's stream, up to the last that the run has counted, is a label of its own pair."""
    labels, progress = labels_of(script, run_dir, *shape)
    path = f"/api/runs/{progress['run_id']}/events?after=0&wait=0"
    request = urllib.request.Request(server.url + path, headers={"Authorization": f"Bearer {server.tokens['trainer']}"})
    with urllib.request.urlopen(request) as reply:
        events = json.load(reply)["events"]
    given = {}
    for event in events:
        if event["seq"] <= progress["last_event"]:
            if event["kind"] == "retract":
                del given[event["query"]]
            else:
                given[event["query"]] = {"first": 1.0, "second": 0.0, "equal": 0.5}[event["answer"]]
    assert {query: labels["mu"][label] for query, label in progress["answered"].items()} == given
    for query, label in progress["answered"].items():
        with np.load(run_dir / "queries" / f"{query}.npz") as pair:
            for name in script.clip_shapes(*shape):
                assert np.array_equal(pair[name], labels[name][label])
            first, second = pair["returns"]
        assert labels["mu"][label] == (0.5 if first == second else float(first > second))  # robots know no sides
    return labels, progress


# ----------------------------------------------------------------------------------------------------------------------
# Clips
# ----------------------------------------------------------------------------------------------------------------------
def decode(sheet: bytes, count: int, shape: dict) -> np.ndarray:
    image = cv2.imdecode(np.frombuffer(sheet, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    h, w, columns = shape["height"], shape["width"], shape["columns"]
    assert image.shape == (math.ceil(count / columns) * h, columns * w, 3)
    cells = [
        image[i // columns * h : (i // columns + 1) * h, i % columns * w : (i % columns + 1) * w] for i in range(count)
    ]
    return np.stack(cells)


def test_a_sheet_holds_the_frames_of_a_clip_in_reading_order_without_loss():
    frames = np.random.default_rng(1).integers(0, 256, (12, 210, 160, 3), np.uint8)
    assert np.array_equal(decode(atari.sprite_sheet(frames), 12, atari.SHEET), frames)
    assert atari.sprite_sheet(frames)[8:12] == b"WEBP"


def test_people_see_thirty_steps_at_most_of_a_robot():
    for task, steps in (("Hopper-v5", 30), ("Walker2d-v5", 23), ("Reacher-v5", 15), ("HalfCheetah-v5", 30)):
        args = mujoco.parse_args(["--human", "--env-id", task])
        shown = mujoco.shown_steps(args)
        assert len(shown) == steps and shown[-1] < args.clip_length


def simulation_and_camera(env_id: str):
    args = mujoco.parse_args(["--human", "--env-id", env_id])
    envs = mujoco.make_envs(args, 2)
    twin = mujoco.make_twin(args, envs, 0, 64, 64)
    if twin is None:
        pytest.skip("MuJoCo can't render here")
    envs.reset(seed=1)
    return envs, twin


def test_people_see_the_states_that_the_clip_is_made_of():
    """Another state is another picture; the same state is the same picture, however the robot came there."""
    envs, twin = simulation_and_camera("Hopper-v5")
    states = []
    for _ in range(60):
        states.append(mujoco.simulator_state(envs.envs[1]))
        envs.step(envs.action_space.sample())
    assert states[0].shape == (12,)
    pictures = mujoco.render_states(twin, [states[0], states[50], states[0]])
    assert pictures.shape == (3, 64, 64, 3) and np.array_equal(pictures[0], pictures[2])
    assert (pictures[0] != pictures[1]).mean() > 0.05
    twin.close()


def test_a_robot_that_has_run_far_away_is_still_in_the_picture():
    """Gymnasium 1.4's unnamed camera stays at the start."""
    envs, twin = simulation_and_camera("HalfCheetah-v5")
    near = mujoco.simulator_state(envs.envs[0])
    far, gone = near.copy(), near.copy()
    far[0] += 8
    gone[1] += 30  # above the picture
    near, far, gone = (picture.astype(int) for picture in mujoco.render_states(twin, [near, far, gone]))
    assert np.abs(far - gone).mean() > 0.5 * np.abs(near - gone).mean() > 1
    twin.close()


# ----------------------------------------------------------------------------------------------------------------------
# What the trainer does with answers, events worked out by hand
# ----------------------------------------------------------------------------------------------------------------------
class Scripted(mujoco.LabelServer):
    """A server that answers what the test says."""

    def __init__(self, *replies):
        self.run_id, self.path, self.polled_at = "a" * 32, "/api/runs/" + "a" * 32, 0.0
        self.unsent, self.replies, self.requests = [], list(replies), []

    def request(self, method, path, body=None, wait=0):
        self.requests.append((method, path, body))
        if not self.replies and method == "GET":
            return {"events": [], "open": self.open}
        reply = self.replies.pop(0)
        self.open = reply and reply["open"]
        return reply


SHAPES = mujoco.clip_shapes(2, 3, 1)


def asked(server, folder, value: float) -> str:
    pair = {name: np.full((2, *shape), value, dtype) for name, (shape, dtype) in SHAPES.items()}
    pair |= {"returns": np.array([value, 0], np.float32), "segments": np.array([[0, len(server.unsent)], [1, 9]])}
    server.ask(folder, **pair, sheet_0=np.frombuffer(b"one", np.uint8), sheet_1=np.frombuffer(b"two", np.uint8))
    return server.unsent[-1]


def event(seq, query, answer, kind="answer"):
    return {"seq": seq, "query": query, "kind": kind, "answer": answer}


def make_preferences(folder, capacity=8):
    folder.mkdir(exist_ok=True)
    return mujoco.Preferences(folder, capacity, SHAPES, 3, "cpu")


def test_answers_become_labels_of_their_own_pairs(tmp_path):
    server, progress, labels = Scripted(), mujoco.Progress(open=4), make_preferences(tmp_path / "preferences")
    queries = [asked(server, tmp_path, value) for value in (5.0, 6.0, 7.0, 8.0)]
    assert len(set(queries)) == 4 and all(len(query) == 32 for query in queries)
    kinds = [
        (11, queries[2], "second"),
        (12, queries[0], "first"),
        (13, queries[3], "cant-tell"),
        (14, queries[1], "equal"),
    ]
    server.unsent, server.replies = [], [{"events": [event(*kind) for kind in kinds], "open": 0}]
    server.receive(tmp_path, labels, progress)
    assert server.requests == [("GET", f"{server.path}/events?after={seq}&wait=0", None) for seq in (0, 14)]
    assert labels.arrays["mu"][:3].tolist() == [0.0, 1.0, 0.5] and labels.count == 3
    assert labels.arrays["obs"][:3, 0, 0, 0].tolist() == [7.0, 5.0, 6.0]
    assert (progress.labels_used, progress.skipped, progress.ties) == (3, 1, 1)
    assert progress.last_event == 14 and progress.open == 0
    assert progress.answered == {queries[2]: 0, queries[0]: 1, queries[1]: 2, queries[3]: -1}


def test_what_is_taken_back_is_no_label_any_more_and_may_be_answered_anew(tmp_path):
    server, progress, labels = Scripted(), mujoco.Progress(), make_preferences(tmp_path / "preferences")
    one, two = asked(server, tmp_path, 5.0), asked(server, tmp_path, 6.0)
    server.unsent, server.replies = [], [{"events": [event(1, one, "first"), event(2, two, "cant-tell")], "open": 0}]
    server.receive(tmp_path, labels, progress)
    assert (progress.labels_used, progress.skipped, progress.open) == (1, 1, 0)
    server.replies, server.polled_at = [{"events": [event(3, one, "first", "retract")], "open": 1}], 0.0
    server.receive(tmp_path, labels, progress)
    assert (progress.labels_used, progress.skipped, progress.open) == (0, 1, 1)
    assert labels.arrays["mu"][0] == 0.5 and labels.weights[0].tolist() == [0, 0, 0]
    events = [event(4, two, "cant-tell", "retract"), event(5, one, "second")]
    server.replies, server.polled_at = [{"events": events, "open": 1}], 0.0
    server.receive(tmp_path, labels, progress)
    assert (progress.labels_used, progress.skipped, progress.ties) == (1, 0, 0) and progress.answered == {one: 1}
    assert labels.arrays["mu"][1] == 0.0 and labels.weights[1].tolist() == mujoco.bootstrap_weights([1], 3)[0].tolist()
    # It stays so after a restart, and for another run that starts from these labels
    again = make_preferences(tmp_path / "preferences")
    again.restore(2)
    assert again.arrays["mu"].tolist()[:2] == [0.5, 0.0] and again.weights[0].tolist() == [0, 0, 0]
    mus = [shard["mu"][0] for shard in mujoco.read_shards(tmp_path / "preferences", SHAPES)]
    assert math.isnan(mus[0]) and mus[1] == 0.0


def test_a_label_that_was_taken_back_moves_nothing(tmp_path):
    """Neither the loss and its gradient, nor what is said about held-out labels."""
    args = mujoco.parse_args(["--oracle"])
    torch.manual_seed(1)
    ensemble = mujoco.RewardEnsemble(4, 3, 1e-4)
    rng, labels = np.random.default_rng(1), make_preferences(tmp_path / "preferences")
    answers = {name: rng.normal(size=(8, 2, *shape)).astype(dtype) for name, (shape, dtype) in SHAPES.items()}
    answers |= {"mu": np.array([1, 0] * 4, np.float32), "returns": np.zeros((8, 2), np.float32)}
    labels.add(answers | {"segments": np.arange(32).reshape(8, 2, 2)})
    without = mujoco.decisive_sums(ensemble, labels, [0, 1, 2, 4, 5, 6, 7], args)
    assert without.sum() < mujoco.decisive_sums(ensemble, labels, np.arange(8), args).sum()
    labels.retract(3)
    assert torch.allclose(mujoco.decisive_sums(ensemble, labels, np.arange(8), args), without)
    _, mu, _, weights = labels.batch([3])
    losses = mujoco.preference_loss(torch.ones(1, 3), mu)
    assert (losses * weights).sum() == 0


def test_no_proxy_sees_what_goes_to_this_machine(server, monkeypatch):
    """Clusters set http_proxy."""
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    args = mujoco.parse_args([*PENDULUM, "--label-server", server.url])
    assert mujoco.LabelServer(args, mujoco.Progress(), 1, 10.0).known == set()


def test_what_could_not_be_sent_is_sent_later_and_counts_as_open(tmp_path):
    server, progress = Scripted({"open": 7}, None), mujoco.Progress()
    _, two, three = (asked(server, tmp_path, value) for value in (1.0, 2.0, math.nan))
    server.post(tmp_path, progress)
    assert server.unsent == [two, three] and progress.open == 9
    server.replies = [{"open": 8}, {"open": 9}]
    server.post(tmp_path, progress)
    assert server.unsent == [] and progress.open == 9
    method, path, body = server.requests[-1]
    assert (method, path) == ("PUT", f"/api/queries/{three}")
    assert body == {"run": "a" * 32, "clips": ["b25l", "dHdv"], "sums": [None, 0.0]}


def test_every_answer_is_asked_for_again_at_the_sign_in(server, tmp_path):
    """Another server, or an empty database, numbers its events anew."""
    args, progress = mujoco.parse_args([*PENDULUM, "--label-server", server.url + "/"]), mujoco.Progress(last_event=412)
    signed_in = mujoco.LabelServer(args, progress, 1, 10.0)
    assert args.label_server == server.url and signed_in.known == set() and progress.last_event == 0
    sheet = np.frombuffer(mujoco.sprite_sheet(np.zeros((1, 256, 256, 3), np.uint8)), np.uint8)
    pair = {"returns": np.zeros(2), "sheet_0": sheet, "sheet_1": sheet}
    signed_in.ask(tmp_path, **pair)
    signed_in.post(tmp_path, progress)
    progress.last_event = 3
    assert len(mujoco.LabelServer(args, progress, 1, 10.0).known) == progress.open == 1 and progress.last_event == 0


def test_what_is_told_again_changes_nothing(tmp_path):
    """Of each pair the last event counts, however many replies tell of it; one that stands is not added again."""
    server, progress, labels = Scripted(), mujoco.Progress(), make_preferences(tmp_path / "preferences")
    one, two, three = (asked(server, tmp_path, value) for value in (5.0, 6.0, 7.0))
    events = [event(1, one, "first"), event(2, two, "cant-tell"), event(3, three, "equal")]
    events += [event(4, three, "equal", "retract"), event(5, three, "second")]
    server.unsent, server.replies = [], [{"events": events, "open": 0}]
    server.receive(tmp_path, labels, progress)
    state = (labels.count, labels.mu, dict(progress.answered), progress.labels_used, progress.skipped, progress.ties)
    assert state == (2, [1.0, 0.0], {one: 0, two: -1, three: 1}, 2, 1, 0)
    progress.last_event = server.polled_at = 0
    retracted = event(6, one, "first", "retract")
    server.replies = [{"events": events[:3], "open": 0}, {"events": [*events[3:], retracted], "open": 1}]
    server.receive(tmp_path, labels, progress)  # in two replies, the first of which ends between answer and undo
    assert progress.answered == {two: -1, three: 1} and labels.count == 2 and progress.last_event == 6
    assert math.isnan(labels.mu[0]) and (progress.labels_used, progress.skipped, progress.ties) == (1, 1, 0)


def test_whether_people_are_waited_for():
    args = mujoco.parse_args(["--human", "--labels", "100", "--total-timesteps", "204800"])

    def wait(**state):
        return mujoco.behind_schedule(mujoco.Progress(**state), args)

    assert not wait(labels_used=10, open=10), "not all of the initial pairs are there yet"
    assert wait(labels_used=10, open=15) and wait(labels_used=24, open=1)
    assert not wait(labels_used=24, open=0), "one can't be told: another must be asked"
    assert not wait(labels_used=25, open=0)
    middle = {"paid_from": 4096, "global_step": 104448}  # of 0.95: 25 + 75 ln 6.26 / ln 11 = 82.4 are due, 61.5 suffice
    assert wait(**middle, labels_used=61, open=20) and not wait(**middle, labels_used=62, open=20)
    assert not wait(**middle, labels_used=60, open=0)
    args.wait_for_labels = False
    assert not wait(**middle, labels_used=60, open=20) and wait(labels_used=24, open=1)


def test_open_pairs_count_as_labels_that_are_on_their_way():
    args = mujoco.parse_args(["--human", "--labels", "100", "--total-timesteps", "204800", "--env-id", "Reacher-v5"])
    pool = mujoco.SegmentPool(args.pool_rows, 16, 1, 1, "cpu")
    pool.count = 1000

    def due(**state):
        return mujoco.labels_due(mujoco.Progress(**state), pool, False, args)

    assert due(labels_used=3, open=5) == (17, 0) and due(labels_used=3, open=22)[0] == 0
    middle = {"paid_from": 4096, "global_step": 104448}
    assert due(**middle, labels_used=50, open=10) == (22, 0)
    assert due(**middle, labels_used=50, open=25)[0] == 7 and due(**middle, labels_used=50, open=26)[0] == 0
    assert due(**middle, labels_used=50, shown_from=900) == (min(32, (100 - 15) * 16 // 60), 900)


@pytest.mark.parametrize("labels", [1, 2, 10, 20, 50, 100, 350, 700])
def test_people_are_asked_for_the_whole_budget_before_the_end(labels):
    """Nobody would answer what is asked at the last update; and a small budget does not wait for sixteen to be due."""
    args = mujoco.parse_args(["--human", "--labels", str(labels), "--total-timesteps", "409600"])
    pool, progress, asked_at = mujoco.SegmentPool(args.pool_rows, 16, 1, 1, "cpu"), mujoco.Progress(), []
    for iteration in range(1, args.num_iterations):
        pool.count += args.num_steps
        progress.global_step += args.batch_size
        due, _ = mujoco.labels_due(progress, pool, False, args)
        progress.labels_used += due
        asked_at += [iteration / args.num_iterations] * due
        progress.fresh_from = pool.count if due else progress.fresh_from
        if progress.paid_from < 0 and progress.labels_used >= args.initial_labels:
            progress.paid_from = progress.global_step
    assert len(asked_at) == labels and (labels == 1 or 0.5 < max(asked_at) < 0.97)


# ----------------------------------------------------------------------------------------------------------------------
# Bad input
# ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("script", [atari, mujoco, a2c])
def test_people_give_answers_not_sums(script, capsys):
    for flags in (["--teacher-mistake", "0.1"], ["--ablation", "target"], ["--oracle"]):
        with pytest.raises(SystemExit) as stopped:
            script.parse_args(["--human", *flags])
        assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "said, token",
    [("no label server at", "x"), ("no label server here", None), ("no label server here", "damaged")],
    ids=["unreachable", "no token", "damaged"],
)
def test_without_a_server_nothing_begins(tmp_path, monkeypatch, capsys, said, token):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mujoco, "make_twin", lambda *_: "twin")
    if token == "damaged":
        (tmp_path / "label_server.tokens").write_text('{"trainer"')
    monkeypatch.delenv("LABEL_SERVER_TOKEN", raising=False)
    if token == "x":
        monkeypatch.setenv("LABEL_SERVER_TOKEN", token)
    with pytest.raises(SystemExit) as stopped:
        mujoco.train(mujoco.parse_args([*PENDULUM, "--label-server", "http://127.0.0.1:9"]))
    assert stopped.value.code == 2 and said in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_a_server_that_is_not_there_is_one_sentence(tmp_path):
    """In a process of its own: what a renderer that outlives the interpreter would say comes after everything."""
    command = [sys.executable, str(ROOT / "ppo_mujoco_rlhf.py"), *PENDULUM, "--label-server", "http://127.0.0.1:9"]
    environment = os.environ | {"LABEL_SERVER_TOKEN": "x"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize("reply", [b"", b"[]", b'{"hello": 1}'])
def test_what_is_no_label_server_is_refused(monkeypatch, capsys, reply):
    class Other(http.server.BaseHTTPRequestHandler):
        def do_PUT(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(reply)

    monkeypatch.setenv("LABEL_SERVER_TOKEN", "x")
    with http.server.HTTPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        args = mujoco.parse_args([*PENDULUM, "--label-server", f"http://127.0.0.1:{other.server_port}"])
        with pytest.raises(SystemExit) as stopped:
            mujoco.LabelServer(args, mujoco.Progress(), 1, 10.0)
        other.shutdown()
    assert stopped.value.code == 2 and "is no label server" in capsys.readouterr().err


@pytest.mark.parametrize("slash", ["/", ""])
def test_a_token_in_the_address_is_not_written_anywhere(monkeypatch, tmp_path, slash):
    monkeypatch.delenv("LABEL_SERVER_TOKEN", raising=False)
    flags = ["--human", "--runs-dir", str(tmp_path), "--label-server", f"http://10.0.0.1:8765{slash}?token=secret"]
    monkeypatch.setattr(sys, "argv", ["ppo_mujoco_rlhf.py", *flags])
    args = mujoco.parse_args()
    assert args.label_server == "http://10.0.0.1:8765" and os.environ.pop("LABEL_SERVER_TOKEN") == "secret"
    run_dir = mujoco.make_run_dir(args)
    assert "--label-server http://10.0.0.1:8765" in (run_dir / "args.json").read_text()
    assert "secret" not in (run_dir / "args.json").read_text()


def test_a_clip_that_fits_on_no_sheet_is_refused(capsys):
    atari.parse_args(["--human", "--segment-length", "390"])
    with pytest.raises(SystemExit) as stopped:
        atari.parse_args(["--human", "--segment-length", "391"])
    assert stopped.value.code == 2 and "--segment-length 391" in capsys.readouterr().err


def test_a_run_without_questions_needs_no_server():
    assert not mujoco.Args(human=True, labels=0).asks_people and mujoco.Args(human=True, labels=1).asks_people


def test_a_wrong_token_is_refused(server, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("LABEL_SERVER_TOKEN", "wrong")
    monkeypatch.setattr(mujoco, "make_twin", lambda *_: "twin")
    flags = ["--label-server", server.url, "--runs-dir", str(tmp_path / "runs")]
    with pytest.raises(SystemExit) as stopped:
        mujoco.train(mujoco.parse_args([*PENDULUM, *flags]))
    assert stopped.value.code == 2 and "401" in capsys.readouterr().err and not (tmp_path / "runs").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Whole runs on a real server
# ----------------------------------------------------------------------------------------------------------------------
def test_pong_is_labelled_through_the_server(server, tmp_path, monkeypatch):
    """What people see of a step is what the agent sees of it, in colour and with the score hidden; the true reward
    is not read."""
    unscored(monkeypatch, atari)
    seen = []

    def settle(*sheets_and_layout):
        seen.append(sheets_and_layout)
        return "equal"

    robots = [server.robot("one", settle=settle), server.robot("two", settle=settle)]
    flags = ["--label-server", server.url, "--runs-dir", str(tmp_path / "runs"), "--total-timesteps", "3840"]
    summary = atari.train(atari.parse_args([*PONG, *flags, "--labels", "16"]))
    assert summary["feedback"] == "human" and summary["finished"] and 4 <= summary["labels_used"] <= 16
    run_dir = only(tmp_path / "runs")
    check_answers(atari, run_dir, server, 10)
    assert not set(robots[0].answers) & set(robots[1].answers)
    assert len(seen) >= summary["ties"]
    posted = set()
    for path in (run_dir / "queries").glob("*.npz"):
        with np.load(path) as pair:
            posted |= {pair["sheet_0"].tobytes(), pair["sheet_1"].tobytes()}
    assert seen and all({left, right} <= posted and layout["frames"] == 10 for left, right, layout in seen)
    distances = {-1: [], 0: [], 1: []}
    for path in (run_dir / "queries").glob("*.npz"):
        with np.load(path) as pair:
            for side in range(2):
                screens = decode(pair[f"sheet_{side}"].tobytes(), 10, atari.SHEET)
                assert not screens[:, 1:21].any(), "the score is hidden"
                grey = np.stack(
                    [cv2.resize(cv2.cvtColor(s, cv2.COLOR_RGB2GRAY), (84, 84), cv2.INTER_AREA) for s in screens]
                )
                frames = pair["frames"][side, 3:].astype(int)
                for lag in distances:
                    moved = np.abs(np.roll(grey.astype(int), lag, 0) - frames)[1:-1, 34:, 10:74]  # without the edges
                    distances[lag].append((moved > 40).mean())
    aligned, late, early = (np.mean(distances[lag]) for lag in (0, 1, -1))
    assert aligned < 0.2 * min(late, early), (aligned, late, early)


@pytest.mark.parametrize("script, small", [(mujoco, PENDULUM), (a2c, PONG_A2C)], ids=["mujoco", "a2c"])
def test_the_true_reward_is_only_logged(server, tmp_path, monkeypatch, script, small):
    """With NaN in its place people's answers train both models as ever."""
    unscored(monkeypatch, script)
    make_envs = script.make_envs

    def blind_envs(*args, **kwargs):
        envs = make_envs(*args, **kwargs)
        step = envs.step
        envs.step = lambda action: (lambda o, r, *rest: (o, np.full(len(o), np.nan), *rest))(*step(action))
        return envs

    monkeypatch.setattr(script, "make_envs", blind_envs)
    robot = server.robot()
    robot.judge = lambda pair: robot.random.choice(["left", "right", "equal"])
    flags = ["--label-server", server.url, "--runs-dir", str(tmp_path / "runs"), "--total-timesteps", "1920"]
    summary = script.train(script.parse_args([*small, *flags, "--labels", "8"]))
    assert summary["finished"] and summary["labels_used"] >= 2
    checkpoint = script.read_checkpoint(only(tmp_path / "runs"))
    assert checkpoint["ensemble"]["renewals"] > 0
    for name in ("agent", "ensemble"):
        assert all(value.isfinite().all() for value in checkpoint[name].values())


def test_a_run_lives_through_the_death_of_its_server_and_its_own(server, tmp_path):
    """Both are killed at random moments: in the end every answer that was acknowledged is one label, of the
    pair it was given for, and the budget is spent."""
    server.robot("one", delay=0.02, undo=0.2)
    runs = tmp_path / "runs"
    command = [
        sys.executable,
        str(ROOT / "ppo_mujoco_rlhf.py"),
        *PENDULUM,
        "--labels",
        "60",
        "--total-timesteps",
        "25600",
    ]
    command += ["--label-server", server.url, "--runs-dir", str(runs)]
    rng, started = np.random.default_rng(1), time.time()
    trainer = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not list(runs.glob("*/checkpoint.pt")):
        assert time.time() < started + 60 and trainer.poll() is None
        time.sleep(0.1)
    run_dir = only(runs)
    resume = [sys.executable, str(ROOT / "ppo_mujoco_rlhf.py"), "--resume", str(run_dir)]
    time.sleep(rng.uniform(0.5, 2))
    server.kill()
    time.sleep(rng.uniform(0.1, 0.5))
    server.start()
    time.sleep(rng.uniform(0.5, 2))
    assert trainer.poll() is None, "it was to be killed while it runs"
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    trainer = subprocess.Popen(resume, stdout=subprocess.DEVNULL)
    assert trainer.wait(timeout=120) == 0
    labels, progress = check_answers(mujoco, run_dir, server, 5, 4, 1)
    summary = json.loads((run_dir / "summary.json").read_text())
    standing = [label for label in progress["answered"].values() if label >= 0]
    assert len(standing) == len(set(standing)) == summary["labels_used"] and summary["labels_used"] >= 45
    mus = labels["mu"][sorted(standing)]
    assert np.isfinite(mus).all() and np.isnan(labels["mu"]).sum() == len(labels["mu"]) - len(standing) > 0


@pytest.mark.parametrize("begins_with", ["nothing", "labels"])
def test_no_pair_is_posted_before_its_run_can_be_gone_on_with(server, tmp_path, monkeypatch, begins_with):
    """What people answered would be lost with a run that is killed before its first checkpoint."""
    unscored(monkeypatch, mujoco)
    flags, posted, post = ["--total-timesteps", "3840", "--labels", "16"], [], mujoco.LabelServer.post
    if begins_with == "labels":
        mujoco.train(mujoco.parse_args([*PENDULUM[1:], "--oracle", *flags, "--runs-dir", str(tmp_path / "other")]))
        flags += ["--preferences", str(only(tmp_path / "other"))]

    def checked_post(self, folder, progress):
        assert not self.unsent or (folder.parent / "checkpoint.pt").exists()
        posted.append(len(self.unsent))
        post(self, folder, progress)

    monkeypatch.setattr(mujoco.LabelServer, "post", checked_post)
    server.robot()
    flags += ["--label-server", server.url, "--runs-dir", str(tmp_path / "runs")]
    assert mujoco.train(mujoco.parse_args([*PENDULUM, *flags]))["labels_used"] > 0 and sum(posted)


def test_another_database_costs_no_label_and_doubles_none(server, tmp_path, monkeypatch):
    """A run goes on beside an empty database, then beside the first again; labels that were written after its
    checkpoint are on its own disk alone then."""
    unscored(monkeypatch, mujoco)
    server.robot()
    flags = ["--label-server", server.url, "--runs-dir", str(tmp_path / "runs"), "--total-timesteps", "3840"]
    first = mujoco.train(mujoco.parse_args([*PENDULUM, *flags, "--labels", "16"]))
    run_dir = only(tmp_path / "runs")
    labels, progress = check_answers(mujoco, run_dir, server, 5, 4, 1)
    assert first["labels_used"] == len(labels["mu"]) >= 12
    checkpoint = mujoco.read_checkpoint(run_dir)
    early = {query: label for query, label in progress["answered"].items() if label < 5}
    checkpoint["progress"] |= {"answered": early, "labels_used": 5, "ties": 0}
    torch.save(checkpoint | {"labels_on_disk": 5}, run_dir / "checkpoint.pt")
    databases = [server.folder / "label_server.sqlite", tmp_path / "aside"]
    for new in (True, False):
        server.close()
        if new:
            databases[0].rename(databases[1])
        else:
            databases[1].rename(databases[0])
        for left in server.folder.glob("label_server.sqlite-*"):
            left.unlink()
        server.robots = []
        server.start()
        monkeypatch.setenv("LABEL_SERVER_TOKEN", server.tokens["trainer"])
        again = mujoco.train(mujoco.parse_args(["--resume", str(run_dir)]))
        assert (again["labels_used"], again["ties"]) == (first["labels_used"], first["ties"])
        assert len(list((run_dir / "preferences").glob("*.npz"))) == len(labels["mu"])
