"""Score, figure and video of a run of any of the three scripts, or of the random policy in its task.

    python evaluate.py RUN              # its policy: score, figure and video, into RUN/evaluation/
    python evaluate.py RUN --random     # a random policy in its task, seen by its reward model, into RUN/random/
    python evaluate.py RUN --gif        # besides, a moving picture for a README

The policy is played by the copy of the script that lies in the run's directory, so what the script has become since
does not matter. With the run's own seed, which is the default, the score is the one that ended the training.

    episode.png     reward as the model predicts it beside the true one, over the first episode
    episode.webm    the first thousand steps of that, at the pace at which people see clips
    episode.webp    with --gif: fifteen seconds of the picture alone, 1.5 MB at most
    summary.json    score, and what it is the score of: a row of results/
"""

import importlib.util
import json
import math
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import tyro

EPISODE_STEPS = 5000  # of the first episode are in the figure, at most
VIDEO_STEPS = 1000  # and in the video
GIF_SECONDS, GIF_BYTES = 15, 1_500_000
COLOURS = {"predicted": (31, 119, 180), "true": (255, 127, 14)}  # RGB


def fail(message: str):
    """End on bad input: one sentence on stderr, exit code 2."""
    print(f"evaluate: {message}", file=sys.stderr)
    raise SystemExit(2)


@dataclass
class Args:
    run: tyro.conf.Positional[Path]  # directory of a run
    random: bool = False  # a random policy instead of the run's
    episodes: int | None = None  # one per environment; default: as many as at the end of the training
    seed: int | None = None  # of environments and actions; default: the run's
    gif: bool = False  # also write a moving picture small enough for a README
    device: str | None = None  # "cpu", "cuda", ...; default: the run's


def open_run(args: Args) -> tuple[ModuleType, dict, object]:
    """The copy of the script in the run's directory, imported; args.json; and its arguments, as they are to be used."""
    try:
        run = json.loads((args.run / "args.json").read_text())
        name, given = f"{run['script']}.py", run["args"]
        _ = run["commit"], given["env_id"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"{args.run} is not a run directory ({error.__class__.__name__} at args.json)")
    if not (args.run / name).exists():
        fail(f"{args.run} has no copy of {name}: the first version of these scripts wrote it, and can evaluate it")
    try:
        spec = importlib.util.spec_from_file_location(run["script"], args.run / name)
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        run_args = script.Args(**given)
    except Exception as error:  # a damaged script fails in as many ways as it has lines
        fail(f"{args.run / name} can't be used with args.json beside it ({error.__class__.__name__}: {error})")
    for name, value, default in (("episodes", args.episodes, 1), ("seed", args.seed, 0)):
        if value is not None and not default <= value < 2**31:
            fail(f"--{name} {value} is not in [{default}, {2**31 - 1}]")
    run_args.seed = run_args.seed if args.seed is None else args.seed
    run_args.eval_episodes = args.episodes or run_args.eval_episodes
    run_args.device = args.device or run_args.device
    try:
        torch.empty(0, device=run_args.device)
    except (RuntimeError, AssertionError) as error:
        fail(f"device {run_args.device} can't be used here ({str(error).splitlines()[0]}): try --device cpu")
    if run_args.device == "cpu" and not torch.cpu.get_capabilities().get("avx512_bf16", False):
        run_args = replace(run_args, **{name: False for name in given if name == "bf16"})  # far too slow there
    return script, run, run_args


def build(script: ModuleType, envs, run_args, state: dict) -> tuple:
    """Policy, reward model (None if none was learned), and the actions to choose from. Here alone the scripts differ."""
    if hasattr(envs, "games"):
        agent, space = script.Agent(envs.num_actions, run_args.bf16), envs.games.single_action_space
        ensemble = script.RewardEnsemble(run_args.members, run_args.dropout, 0.0, run_args.bf16)
        layout = {"memory_format": torch.channels_last}
    else:
        agent = script.Agent(envs.num_obs, torch.as_tensor(envs.low), torch.as_tensor(envs.high))
        ensemble, space = script.RewardEnsemble(envs.num_obs + len(envs.low), run_args.members, 0.0), None
        space, layout = envs.tasks[0].action_space, {}
    agent.load_state_dict(state["agent"])
    ensemble.load_state_dict(state["ensemble"])
    agent, ensemble = (module.to(run_args.device, **layout) for module in (agent, ensemble))
    return agent, None if run_args.true_reward else ensemble, space


class RandomAgent:
    """Any action is as likely as another."""

    def __init__(self, space, seed: int):
        self.space = space
        self.space.seed(seed)

    def get_action_and_value(self, x):
        return (torch.as_tensor(np.stack([self.space.sample() for _ in x])),)


class Recorder:
    """The environments of an evaluation, and what was seen of the first one's first episode."""

    def __init__(self, envs, camera):
        self.envs, self.camera = envs, camera
        self.rows, self.filmed, self.over = [], 0, False

    def reset(self, seed: int) -> np.ndarray:
        if hasattr(self.camera, "reset"):
            self.camera.reset(seed)
        self.obs = self.envs.reset(seed)
        return self.obs

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, dict]:
        self.over |= len(self.rows) == EPISODE_STEPS
        if self.camera and not self.over and self.filmed < VIDEO_STEPS:
            self.camera.record(self.envs, actions[:1])
            self.filmed += 1
        before = self.obs[0].copy()
        self.obs, told = self.envs.step(actions)
        if not self.over:
            self.rows.append({name: torch.as_tensor(x[0]) for name, x in told.items()} | {"obs": torch.tensor(before)})
        self.over |= bool(told["ended"][0])
        return self.obs, told

    def series(self, script: ModuleType, ensemble, run_args) -> dict[str, np.ndarray]:
        """True reward of each step, and what the ensemble would have paid."""
        rows = {name: torch.stack([row[name] for row in self.rows]) for name in self.rows[0]}
        series = {"true": rows["env_rewards"].numpy().astype(float)}
        if ensemble is not None:
            inputs = rows["obs"].to(run_args.device)  # Atari's stacks are what the model reads
            if set(script.CLIP_ARRAYS) <= rows.keys():
                inputs = script.model_inputs({name: rows[name].to(inputs).unsqueeze(0) for name in script.CLIP_ARRAYS})
            paid = ensemble.normalise(ensemble.score(inputs), run_args.reward_std)
            series = {"predicted": paid.cpu().numpy().astype(float)} | series
        return series


def make_camera(script: ModuleType, run_args):
    """A camera for the first environment; None, and one line, where nothing can be drawn."""
    try:
        camera = script.Camera(run_args, 1, VIDEO_STEPS)
        camera.env_id = None  # hides no score: nobody judges this
        return camera
    except Exception as error:
        print(f"no video: nothing can be drawn here ({error.__class__.__name__}); Debian has it in libegl1")


def correlation(series: dict, length: int) -> float:
    """Pearson correlation of predicted and true sums over all clips of this length; NaN where one is constant."""
    sums = [np.convolve(values, np.ones(length), "valid") for values in series.values()]
    return np.corrcoef(sums)[0, 1] if min(np.ptp(x) for x in sums) > 1e-9 else math.nan


def draw_figure(series: dict, title: str, path: Path) -> None:
    import matplotlib.pyplot as plt

    plt.switch_backend("Agg")
    with plt.rc_context({"font.size": 16}):
        figure, axes = plt.subplots(len(series), 1, figsize=(9, 6), sharex=True, squeeze=False, layout="constrained")
        for ax, (name, values) in zip(axes[:, 0], series.items(), strict=True):
            ax.plot(values, color=np.array(COLOURS[name]) / 255, linewidth=1)
            ax.set_ylabel(f"{name} reward")
            ax.grid(alpha=0.3)
            ax.margins(x=0.01)
        axes[0, 0].set_title(title, fontsize=16)
        axes[-1, 0].set_xlabel("step of the first episode")
        figure.savefig(path, dpi=120)
        plt.close(figure)


def canvas(picture: np.ndarray, series: dict, t: int) -> np.ndarray:
    """A frame of the video, BGR. Left: the picture. Right: the last 100 steps of each reward."""
    import cv2

    def write(text: str, x: int, y: int, size: float, colour: tuple):
        cv2.putText(panel, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, size, colour, 1, cv2.LINE_AA)

    zoom = max(1, round(400 / len(picture)))
    picture = picture.repeat(zoom, 0).repeat(zoom, 1)
    panel, box = np.full((len(picture), 320, 3), 24, np.uint8), len(picture) // len(series)
    for row, (name, values) in enumerate(series.items()):
        low, high = min(0.0, values.min()), max(0.0, values.max())
        top, bottom = row * box + 60, (row + 1) * box - 20

        def height(value, top=top, bottom=bottom, low=low, high=high):
            return bottom - (bottom - top) * (value - low) / max(high - low, 1e-9)

        window, colour = values[max(0, t - 99) : t + 1], tuple(min(255, c + 60) for c in COLOURS[name])
        points = np.stack([16 + 2.4 * np.arange(len(window)), height(window)], 1)
        for level in (low, 0.0, high):
            cv2.line(panel, (16, round(height(level))), (256, round(height(level))), (70, 70, 70), 1)
            write(f"{level:.3g}", 264, round(height(level)) + 5, 0.4, (170, 170, 170))
        cv2.polylines(panel, [points.round().astype(np.int32)], False, colour, 1, cv2.LINE_AA)
        write(f"{name} reward {values[t]:+.3f}", 16, row * box + 34, 0.6, colour)
    return np.concatenate([picture, panel], 1)[..., ::-1]


def write_video(frames: list[np.ndarray], fps: float, path: Path) -> None:
    import cv2

    with open(os.devnull, "w") as null:  # OpenCV's remark on the codec's tag goes to file descriptor 2
        stderr = os.dup(2)
        os.dup2(null.fileno(), 2)
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"VP80"), fps, frames[0].shape[1::-1])
        os.dup2(stderr, 2)
        os.close(stderr)
    for frame in frames:
        writer.write(frame)
    writer.release()


def write_gif(pictures: list[np.ndarray], fps: float, path: Path) -> None:
    """Animated WebP, which GitHub shows: half the size of a GIF, in all colours. As good as GIF_BYTES allow."""
    import cv2

    animation = cv2.Animation()
    animation.frames = [np.ascontiguousarray(picture[..., ::-1]) for picture in pictures[: round(GIF_SECONDS * fps)]]
    animation.durations = [round(1000 / fps)] * len(animation.frames)
    for quality in (90, 80, 70, 60, 50, 40, 30, 20, 10):
        cv2.imwriteanimation(str(path), animation, [cv2.IMWRITE_WEBP_QUALITY, quality])
        if path.stat().st_size <= GIF_BYTES:
            break


def send_to_wandb(run: dict, run_args, path: Path, global_step: int) -> None:
    """The video, to the W&B run of a training with --track."""
    import wandb

    where = {"project": run_args.wandb_project_name, "entity": run_args.wandb_entity, "id": run["wandb_id"]}
    try:
        with wandb.init(**where, resume="allow") as wandb_run:
            video = wandb.Video(str(path), format="webm")
            wandb_run.log({f"{path.parent.name}/{path.stem}": video, "global_step": global_step})
    except wandb.errors.Error as error:
        print(f"the video is not at W&B: {error}")


def evaluate(args: Args) -> dict:
    """Play, and write what the top of this file lists. Returns what summary.json holds."""
    script, run, run_args = open_run(args)
    state = script.read_checkpoint(args.run)
    torch.set_num_threads(run_args.threads)
    try:
        envs = script.Envs(run_args, run_args.eval_episodes)
    except Exception as error:
        fail(f"{run_args.env_id} can't be made here ({error.__class__.__name__}: {str(error).splitlines()[0]})")
    try:
        agent, ensemble, space = build(script, envs, run_args, state)
        global_step = 0 if args.random else state["progress"]["global_step"]
    except (KeyError, TypeError, RuntimeError) as error:
        fail(f"{args.run}/checkpoint.pt is not of this run ({error.__class__.__name__})")
    folder = args.run / ("random" if args.random else "evaluation")
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        fail(f"can't write to {folder}: {error.strerror}")

    recorder = Recorder(envs, make_camera(script, run_args))
    script.Envs = lambda *_: recorder
    scores = script.evaluate(RandomAgent(space, run_args.seed) if args.random else agent, run_args, run_args.seed)
    series = recorder.series(script, ensemble, run_args)
    title = [
        f"{run_args.env_id}, " + ("random policy" if args.random else f"{run_args.feedback}, {global_step:,} steps")
    ]
    if ensemble is not None:
        lengths = [n for n in (1, run_args.clip_length) if n < len(series["true"])]
        pairs = [f"{correlation(series, n):.2f} per {'step' if n == 1 else f'clip of {n}'}" for n in lengths]
        title.append("correlation " + ", ".join(dict.fromkeys(pairs)))
    draw_figure(series, "\n".join(title), folder / "episode.png")
    if recorder.camera:
        pace = script.CLIP.get("fps") or run_args.segment_length / 1.5  # steps per second
        every = math.ceil(pace / 30)
        shown = range(0, recorder.filmed, every)
        pictures = [recorder.camera.frames(0, t, 1)[0] for t in shown]
        frames = [canvas(picture, series, t) for picture, t in zip(pictures, shown, strict=True)]
        write_video(frames, pace / every, folder / "episode.webm")
        if args.gif:
            write_gif(pictures, pace / every, folder / "episode.webp")
    summary = {
        "script": run["script"],
        "env_id": run_args.env_id,
        "feedback": "random" if args.random else run_args.feedback,
        "seed": run_args.seed,
        "global_step": global_step,
        "final_return_mean": float(scores.mean()),
        "final_return_std": float(scores.std()),
        "final_episodes": len(scores),
        "commit": run["commit"],
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2))
    print(f"return {scores.mean():.1f} +- {scores.std():.1f} over {len(scores)} episodes; see {folder}")
    if recorder.camera and run.get("wandb_id"):
        send_to_wandb(run, run_args, folder / "episode.webm", global_step)
    return summary


if __name__ == "__main__":
    evaluate(tyro.cli(Args, description=__doc__))
