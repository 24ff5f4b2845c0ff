"""evaluate.py on short runs of the three scripts: scores, what the pictures show, what it refuses."""

import importlib
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

import evaluate
from evaluate import Args

SMALL = "--seed 3 --threads 1 --device cpu --num-envs 4 --num-steps 32 --eval-episodes 2 "
MUJOCO = "--env-id InvertedPendulum-v5 --num-minibatches 2 --update-epochs 1 --segment-length 5 --total-timesteps 640 "
ATARI = "--env-id ALE/Breakout-v5 --total-timesteps 256 "
ORACLE = "--oracle --labels 12 --query-pool-steps 800 --pretrain-pairs 32 "
RUNS = {
    "ppo_mujoco_rlhf": SMALL + MUJOCO + ORACLE,
    "ppo_atari_rlhf": SMALL + ATARI + ORACLE + "--segment-length 5",
    "a2c_atari_rlhf": SMALL + ATARI + "--true-reward",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Trains a short run of a script at its first use."""
    runs = {}

    def run_of(name: str) -> Path:
        if name not in runs:
            script, folder = importlib.import_module(name), tmp_path_factory.mktemp(name)
            script.train(script.parse_args([*RUNS[name].split(), "--runs-dir", str(folder)]))
            (runs[name],) = folder.iterdir()
        return runs[name]

    return run_of


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the MuJoCo run, under another name in another place."""
    return Path(shutil.copytree(trained("ppo_mujoco_rlhf"), tmp_path / "moved"))


def change_args(run: Path, **changes):
    path = run / "args.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def drawn(monkeypatch):
    """What would be drawn: titles, and series of rewards."""
    seen = []
    monkeypatch.setattr(evaluate, "draw_figure", lambda series, title, path: seen.append((title, series)))
    return seen


@pytest.mark.parametrize("name", RUNS)
def test_score_is_the_one_that_ended_the_training(name, trained, tmp_path, drawn, capsys):
    run = Path(shutil.copytree(trained(name), tmp_path / "moved"))
    trained_to = json.loads((run / "summary.json").read_text())
    capsys.readouterr()
    summary = evaluate.evaluate(Args(run, gif=True))
    columns = ("script", "env_id", "feedback", "seed", "global_step", "final_return_mean", "final_return_std")
    columns += ("final_episodes", "commit")
    assert summary == {column: trained_to[column] for column in columns}
    assert summary == json.loads((run / "evaluation" / "summary.json").read_text())
    assert len(capsys.readouterr().out.splitlines()) == 1

    ((title, series),) = drawn
    assert list(series) == (["true"] if name == "a2c_atari_rlhf" else ["predicted", "true"])
    assert len({len(values) for values in series.values()}) == 1
    assert title.startswith(f"{summary['env_id']}, {summary['feedback']}, {summary['global_step']:,} steps")
    video = cv2.VideoCapture(str(run / "evaluation" / "episode.webm"))
    assert video.get(cv2.CAP_PROP_FRAME_COUNT) == len(series["true"]) <= 1000
    assert video.get(cv2.CAP_PROP_FPS) == pytest.approx(15 if "atari" in name else 5 / 1.5, rel=0.01)
    assert (run / "evaluation" / "episode.webp").stat().st_size <= evaluate.GIF_BYTES


def test_the_rewards_are_those_of_the_first_episode_row_by_row(run, drawn):
    script = importlib.import_module("ppo_mujoco_rlhf")
    args = script.Args(**json.loads((run / "args.json").read_text())["args"])
    args.eval_episodes = 1
    state, envs = script.read_checkpoint(run), script.Envs(args, 1)
    agent, ensemble = script.make_models(args, envs)
    agent.load_state_dict(state["agent"])
    ensemble.load_state_dict(state["ensemble"])
    torch.manual_seed(7)
    obs, paid, true = torch.as_tensor(envs.reset(7)), [], []
    for _ in range(250):
        with torch.no_grad():
            action = agent.get_action_and_value(obs)[0].clamp(-3, 3)
            raw = ensemble(torch.cat([obs, action], 1))
        paid.append(ensemble.normalise(raw, args.reward_std).item())
        obs, told = envs.step(action.numpy())
        obs = torch.as_tensor(obs)
        true.append(told["env_rewards"].item())
    summary = evaluate.evaluate(Args(run, episodes=1, seed=7))
    ((_, series),) = drawn
    np.testing.assert_allclose(series["true"], true)
    np.testing.assert_allclose(series["predicted"], paid, atol=1e-5)
    assert summary["final_return_mean"] == pytest.approx(sum(true))
    assert (summary["final_episodes"], summary["final_return_std"], summary["seed"]) == (1, 0.0, 7)


def test_atari_rewards_are_those_of_the_stacks_that_the_agent_saw(trained, tmp_path, drawn, monkeypatch):
    run = Path(shutil.copytree(trained("ppo_atari_rlhf"), tmp_path / "moved"))
    recorders = []
    recorder = evaluate.Recorder
    monkeypatch.setattr(evaluate, "Recorder", lambda envs: recorders.append(recorder(envs)) or recorders[0])
    evaluate.evaluate(Args(run, episodes=1))
    ((_, series),) = drawn
    rows, screens = recorders[0].rows, recorders[0].camera
    assert not any(row["obs"][:, :6].any() for row in rows)  # the score is hidden from the agent
    assert screens.frames(0, 0, 1)[0, :16].any()  # and shown in the video, the game being the same
    for t in (0, 40, len(rows) - 1):
        seen, shown = rows[t]["obs"][-1, 10:].numpy(), screens.frames(0, t, 1)[0]
        grey = cv2.resize(cv2.cvtColor(shown, cv2.COLOR_RGB2GRAY), (84, 84), interpolation=cv2.INTER_AREA)[10:]
        assert np.abs(seen.astype(float) - grey).mean() < 3
    assert series["true"].sum() == json.loads((run / "evaluation" / "summary.json").read_text())["final_return_mean"]


def test_the_copy_in_the_run_plays(run, drawn):
    before = evaluate.evaluate(Args(run))["final_return_mean"]
    with open(run / "ppo_mujoco_rlhf.py", "a") as file:
        file.write("\nscore = evaluate\ndef evaluate(*args):\n    return score(*args) + 1000\n")
    assert evaluate.evaluate(Args(run))["final_return_mean"] == pytest.approx(before + 1000)


def test_random_policy(run, drawn):
    rows = [evaluate.evaluate(Args(run, random=True, episodes=20, seed=seed)) for seed in (1, 1, 2)]
    assert rows[0] == rows[1] != rows[2]
    assert (rows[0]["feedback"], rows[0]["global_step"], rows[0]["final_episodes"]) == ("random", 0, 20)
    assert (run / "random" / "episode.webm").exists() and not (run / "evaluation").exists()
    assert drawn[0][0].startswith("InvertedPendulum-v5, random policy\ncorrelation ")


def test_nothing_can_be_drawn(run, capsys):
    evaluate.evaluate(Args(run, gif=True))
    with open(run / "ppo_mujoco_rlhf.py", "a") as file:
        file.write("\nclass Camera:\n    def __init__(self, *_):\n        raise ImportError('no libEGL')\n")
    capsys.readouterr()
    evaluate.evaluate(Args(run, gif=True))
    assert {path.name for path in (run / "evaluation").iterdir()} == {"episode.png", "summary.json"}
    told, score = capsys.readouterr().out.splitlines()
    assert told.startswith("no video") and score.startswith("return")


def test_the_video_goes_to_the_training_at_wandb(run, drawn, monkeypatch):
    sent = []

    class Run:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            sent.append("finished")

        def log(self, row):
            sent.append(row)

    fake = SimpleNamespace(init=lambda **where: sent.append(where) or Run(), Video=lambda path: ("video", path))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    change_args(run, wandb_id="abc123")
    step = evaluate.evaluate(Args(run))["global_step"]
    assert sent[0] == {"project": "rlhf", "entity": None, "id": "abc123", "resume": "allow"}
    video = ("video", str(run / "evaluation" / "episode.webm"))
    assert sent[1:] == [{"evaluation/video": video, "global_step": step}, "finished"]


def test_correlation():
    series = {"predicted": np.array([0.0, 1, 0, 1, 0]), "true": np.array([1.0, 0, 1, 0, 1])}
    assert evaluate.correlation(series, 1) == pytest.approx(-1)
    assert math.isnan(evaluate.correlation(series, 2))  # each clip of two sums to one
    late = {"predicted": np.array([1.0, 0, 0, 1, 0, 0]), "true": np.array([0.0, 1, 0, 0, 1, 0])}
    assert evaluate.correlation(late, 1) == pytest.approx(-0.5)
    assert evaluate.correlation(late, 4) == pytest.approx(-0.5)  # sums 2, 1, 1 and 1, 2, 1


def test_a_frame_shows_the_rewards_where_they_are():
    true = np.concatenate([np.zeros(150), np.full(50, 2.0)])
    picture = np.full((210, 160, 3), (200, 10, 30), np.uint8)
    frame = evaluate.draw_frame(picture, {"predicted": -true, "true": true}, 199)
    assert frame.shape == (420, 640, 3) and (frame[:, :320] == (200, 10, 30)).all()
    last = 320 + 16 + 99 * 12 // 5
    assert frame[190, last - 2].argmax() == 2  # predicted, blue: down at the bottom of its box
    assert frame[270, last - 2].argmax() == 0  # true, orange: up at the top of its own
    assert frame[400, 340].argmax() == 0  # and at zero before
    alone = evaluate.draw_frame(np.zeros((384, 384, 3), np.uint8), {"true": np.zeros(5)}, 4)
    assert alone.shape == (384, 704, 3)


def test_gif_is_lossless_where_it_may_be_and_small_where_not(tmp_path, monkeypatch):
    path, rng = tmp_path / "moving.webp", np.random.default_rng(0)
    flat = [np.full((210, 160, 3), (10 * i, 200, 30), np.uint8) for i in range(20)]
    evaluate.write_gif(flat, 1.0, path)
    _, read = cv2.imreadanimation(str(path))
    assert len(read.frames) == evaluate.GIF_SECONDS and set(read.durations.ravel()) == {1000}
    assert read.frames[5].shape[:2] == (420, 320) and (read.frames[5][..., :3] == (30, 200, 50)).all()
    monkeypatch.setattr(evaluate, "GIF_BYTES", 400_000)
    evaluate.write_gif([rng.integers(0, 256, (384, 384, 3), dtype=np.uint8) for _ in range(6)], 20.0, path)
    assert path.stat().st_size <= 400_000


@pytest.mark.parametrize(
    ("spoil", "flags", "says"),
    [
        (lambda run: (run / "args.json").unlink(), {}, "is not a run directory"),
        (lambda run: (run / "args.json").write_text('{"script": "ppo'), {}, "its args.json is damaged"),
        (lambda run: (run / "args.json").write_text("[]"), {}, "its args.json is damaged"),
        (lambda run: (run / "ppo_mujoco_rlhf.py").unlink(), {}, "first version"),
        (lambda run: (run / "ppo_mujoco_rlhf.py").write_text("def"), {}, "SyntaxError"),
        (lambda run: change_args(run, args={"env_id": "Hopper-v5", "fps": 1}), {}, "args.json beside it"),
        (lambda run: (run / "checkpoint.pt").unlink(), {}, "has no checkpoint.pt yet"),
        (lambda run: (run / "checkpoint.pt").write_bytes(b"PK\x03\x04"), {}, "can't be read"),
        (lambda run: torch.save({"agent": {}}, run / "checkpoint.pt"), {}, "can't be played"),
        (lambda run: None, {"device": "cuda:77"}, "can't be played on cuda:77"),
        (lambda run: None, {"episodes": 0}, "--episodes"),
        (lambda run: None, {"seed": -1}, "--seed"),
        (lambda run: None, {"seed": 2**31 - 1}, "--seed"),
    ],
)
def test_bad_input(spoil, flags, says, run, capsys):
    spoil(run)
    before = {path.name for path in run.iterdir()}
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        evaluate.evaluate(Args(run, **flags))
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert {path.name for path in run.iterdir()} - {"__pycache__"} == before


def test_command_line(run):
    """The figure is drawn, nothing is said on stderr, and a task of one's own that isn't here any more is refused."""
    command = [sys.executable, str(Path(evaluate.__file__)), str(run), "--episodes", "1", "--seed", "5"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("return ") and done.stdout.endswith(f"see {run}/evaluation\n")
    height, width, _ = cv2.imread(str(run / "evaluation" / "episode.png")).shape
    assert (height, width) == (720, 1080)
    given = json.loads((run / "args.json").read_text())["args"]
    change_args(run, args=given | {"env_id": "somewhere.else:MyTask-v0"})
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "somewhere" in done.stderr and len(done.stderr.splitlines()) == 1
