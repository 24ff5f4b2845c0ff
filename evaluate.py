"""Score, figure and video of a run of any of the three scripts, or of a random policy in its task.

    python evaluate.py RUN              # its policy, into RUN/evaluation/
    python evaluate.py RUN --random     # a random policy, as its reward model sees it, into RUN/random/
    python evaluate.py RUN --gif        # also a moving picture for a README

The copy of the script that lies in the run's directory plays: whatever the script has become since does not matter. The
default seed is the run's, with which the score is the one that the training ended with.

    episode.png     predicted beside true reward over the first episode
    episode.webm    the first thousand steps of that, at the pace at which people see clips
    episode.webp    --gif: twelve seconds of the picture alone, 1.5 MB at most
    summary.json    score, and what it is the score of: columns of results/
"""

import importlib.util
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import cv2
import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro

EPISODE_STEPS, VIDEO_STEPS = 5000, 1000  # of the first episode, at most, in the figure and in the video
GIF_SECONDS, GIF_WIDTH, GIF_BYTES = 12, 320, 1_500_000
COLOURS = {"predicted": (31, 119, 180), "true": (255, 127, 14)}


def fail(message: str, error: Exception | None = None):
    """End on bad input: one sentence on stderr, exit code 2."""
    why = f" ({error.__class__.__name__}: {error}".partition("\n")[0] + ")" if error else ""
    print(f"evaluate: {message}{why}", file=sys.stderr)
    sys.exit(2)


@dataclass
class Args:
    run: tyro.conf.Positional[Path]  # directory of the run
    random: bool = False  # a random policy instead of the run's
    episodes: int | None = None  # one per environment; default: as many as at the end of the training
    seed: int | None = None  # of environments and actions; default: the run's
    gif: bool = False  # also write a moving picture, small enough for a README
    device: str | None = None  # "cpu", "cuda", ...; default: the run's


def open_run(args: Args) -> tuple:
    """The copy of the script, imported; args.json; and the run's arguments, as they are to be used here."""
    try:
        run = json.loads((args.run / "args.json").read_text())
        name, given, _ = f"{run['script']}.py", run["args"], run["commit"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"{args.run} is not a run directory, or its args.json is damaged", error)
    try:
        spec = importlib.util.spec_from_file_location(run["script"], args.run / name)
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        used = script.Args(**given)
    except FileNotFoundError as error:
        fail(f"{args.run} is of the first version of these scripts, which alone can evaluate it", error)
    except Exception as error:  # a damaged script fails in as many ways as it has lines
        fail(f"{args.run / name} and args.json beside it can't be used", error)
    used.seed = used.seed if args.seed is None else args.seed
    used.eval_episodes = used.eval_episodes if args.episodes is None else args.episodes
    used.device = args.device or used.device
    if used.eval_episodes < 1 or not 0 <= used.seed < 2**31 - used.eval_episodes:  # each episode has a seed of its own
        fail("--episodes must be 1 or more, and --seed from 0 to 2147483646, less the episodes")
    if used.device == "cpu" and not torch.cpu.get_capabilities().get("avx512_bf16"):
        used.bf16 = False  # of no use where a GPU's run comes to such a CPU
    return script, run, used


class Recorder:
    """Stands before the environments of an evaluation, and keeps the first episode of the first one."""

    def __init__(self, envs):
        self.envs, self.camera, self.rows, self.over = envs, None, [], False

    def reset(self, seed: int) -> np.ndarray:
        if hasattr(self.camera, "reset"):  # Atari's plays the game once more
            self.camera.reset(seed)
        self.obs = self.envs.reset(seed)
        return self.obs

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, dict]:
        if self.camera and not self.over and len(self.camera.kept) < VIDEO_STEPS:
            self.camera.record(self.envs, actions[:1])
        row, (self.obs, told) = {"obs": torch.tensor(self.obs[0])}, self.envs.step(actions)
        if not self.over:
            self.rows.append(row | {name: torch.as_tensor(x[0]) for name, x in told.items()})
        self.over |= bool(told["ended"][0]) or len(self.rows) == EPISODE_STEPS
        return self.obs, told

    def series(self, script, ensemble, used) -> dict[str, np.ndarray]:
        """The true reward of each step, and before it what the ensemble, if there is one, would have paid."""
        rows = {name: torch.stack([row[name] for row in self.rows]).to(used.device) for name in self.rows[0]}
        series = {"true": rows["env_rewards"]}
        if ensemble is not None:
            inputs = rows["obs"]  # Atari's clips are frames, of which the model reads the stacks that the agent saw
            if rows.keys() >= set(script.CLIP_ARRAYS):
                inputs = script.model_inputs({name: rows[name].unsqueeze(0) for name in script.CLIP_ARRAYS})
            series = {"predicted": ensemble.normalise(ensemble.score(inputs), used.reward_std)} | series
        return {name: values.cpu().numpy().astype(float) for name, values in series.items()}


def correlation(series: dict, length: int) -> float:
    """Pearson's, of predicted and true sums over all clips of this length; NaN where one is constant."""
    sums = [np.convolve(values, np.ones(length), "valid") for values in series.values()]
    return np.corrcoef(sums)[0, 1] if min(np.ptp(x) for x in sums) > 1e-9 else math.nan


def draw_figure(series: dict, title: str, path: Path) -> None:
    plt.switch_backend("Agg")
    plt.rc("font", size=16)
    figure, axes = plt.subplots(len(series), 1, figsize=(9, 6), sharex=True, squeeze=False, layout="constrained")
    for ax, (name, values) in zip(axes[:, 0], series.items(), strict=True):
        ax.plot(values, color=np.array(COLOURS[name]) / 255, linewidth=1)
        ax.set(ylabel=f"{name} reward", xmargin=0.01)
        ax.grid(alpha=0.3)
    axes[0, 0].set_title(title, fontsize=16)
    axes[-1, 0].set_xlabel("step of the first episode")
    figure.align_ylabels()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_frame(picture: np.ndarray, series: dict, t: int) -> np.ndarray:
    """A frame of the video. Left: the picture. Right: the last 100 steps of each reward, and what it has come to."""

    def write(text: str, x: int, y: int, size: float, colour: tuple):
        cv2.putText(panel, text, (x, int(y)), cv2.FONT_HERSHEY_SIMPLEX, size, colour, 1, cv2.LINE_AA)

    zoom = max(1, round(400 / len(picture)))
    picture = picture.repeat(zoom, 0).repeat(zoom, 1)
    panel, box = np.full((len(picture), 320, 3), 24, np.uint8), len(picture) // len(series)
    for row, (name, values) in enumerate(series.items()):
        top, bottom, colour = row * box + 60, (row + 1) * box - 20, tuple(min(255, c + 60) for c in COLOURS[name])
        levels = np.array([min(0, values.min()), 0, max(0, values.max())])
        window = values[max(0, t - 99) : t + 1]
        heights = np.interp(np.concatenate([levels, window]), levels[[0, 2]], [bottom, top]).round().astype(np.int32)
        for level, y in zip(levels, heights[:3].tolist(), strict=True):
            cv2.line(panel, (16, y), (256, y), (70, 70, 70), 1)
            if level == 0 or abs(y - heights[1]) > 12:  # else one number would lie on the other
                write(f"{level:.3g}", 262, y + 5, 0.4, (170, 170, 170))
        points = np.stack([16 + np.arange(len(window)) * 12 // 5, heights[3:]], 1)
        cv2.polylines(panel, [points.astype(np.int32)], False, colour, 1, cv2.LINE_AA)
        write(f"{name} reward {values[t]:+.3f}", 16, row * box + 26, 0.6, colour)
        write(f"sum {values[: t + 1].sum():.1f}", 16, row * box + 46, 0.4, (170, 170, 170))
    return np.concatenate([picture, panel], 1)


def write_video(frames: list[np.ndarray], fps: float, path: Path) -> None:
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)  # where OpenCV remarks on the codec's tag
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"VP80"), fps, frames[0].shape[1::-1])
    os.dup2(stderr, 2)
    for frame in frames:
        writer.write(frame[..., ::-1])
    writer.release()


def write_gif(pictures: list[np.ndarray], fps: float, path: Path) -> None:
    """As good as GIF_BYTES allow. WebP, which GitHub shows: a GIF takes seven times as many, for fewer colours."""
    size = (GIF_WIDTH, len(pictures[0]) * GIF_WIDTH // pictures[0].shape[1])
    animation, pictures = cv2.Animation(), pictures[: int(GIF_SECONDS * fps)]
    animation.frames = [cv2.resize(x[..., ::-1], size, interpolation=cv2.INTER_AREA) for x in pictures]
    animation.durations = [round(1000 / fps)] * len(pictures)
    for quality in (101, *range(90, 0, -10)):  # 101 is lossless
        cv2.imwriteanimation(str(path), animation, [cv2.IMWRITE_WEBP_QUALITY, quality])
        if path.stat().st_size <= GIF_BYTES:
            break


def evaluate(args: Args) -> dict:
    """Play, and write what the top of this file lists. Returns what summary.json holds."""
    script, run, used = open_run(args)
    state = script.read_checkpoint(args.run)
    folder = args.run / ("random" if args.random else "evaluation")
    torch.set_num_threads(used.threads)
    try:
        recorder = Recorder(script.Envs(used, used.eval_episodes))
        agent, ensemble = script.make_models(used, recorder.envs)
        agent.load_state_dict(state["agent"])
        ensemble.load_state_dict(state["ensemble"])
        step = 0 if args.random else state["progress"]["global_step"]
        folder.mkdir(exist_ok=True)
    except Exception as error:  # no such task or device here, a checkpoint of another run, no right to write
        fail(f"{used.env_id} of {args.run} can't be played on {used.device}", error)
    for old in folder.glob("episode.*"):  # what is not drawn anew would be of another score
        old.unlink()
    if args.random:
        envs = recorder.envs
        rng = np.random.default_rng(used.seed)
        agent.get_action_and_value = lambda _: [torch.as_tensor(envs.random_actions(rng))]
    try:
        recorder.camera = script.Camera(used, 1, VIDEO_STEPS)
        recorder.camera.env_id = None  # whose score it would hide
    except (Exception, SystemExit) as error:  # a task of one's own that takes no size of a picture ends so
        print(f"no video: nothing can be drawn here ({error.__class__.__name__}); Debian's libegl1 has what it needs")

    script.Envs = lambda *_: recorder  # what the script's own evaluation plays in
    scores = script.evaluate(agent, used, used.seed)
    series = recorder.series(script, None if used.true_reward else ensemble, used)
    title = f"{used.env_id}, " + ("random policy" if args.random else f"{used.feedback}, {step:,} steps")
    if "predicted" in series:
        title += f"\ncorrelation {correlation(series, 1):.2f} per step"
        if 1 < used.clip_length < len(series["true"]):
            title += f", {correlation(series, used.clip_length):.2f} per clip of {used.clip_length}"
    draw_figure(series, title, folder / "episode.png")
    if recorder.camera:
        pace = script.CLIP.get("fps") or used.segment_length / 1.5  # steps per second
        shown = range(0, len(recorder.camera.kept), math.ceil(pace / 30))
        pictures = [recorder.camera.frames(0, t, 1)[0] for t in shown]
        frames = [draw_frame(picture, series, t) for picture, t in zip(pictures, shown, strict=True)]
        write_video(frames, pace / shown.step, folder / "episode.webm")
        if args.gif:
            write_gif(pictures, pace / shown.step, folder / "episode.webp")
    summary = {"script": run["script"], "env_id": used.env_id, "feedback": "random" if args.random else used.feedback}
    summary |= {"seed": used.seed, "global_step": step, "final_return_mean": float(scores.mean())}
    summary |= {"final_return_std": float(scores.std()), "final_episodes": len(scores), "commit": run["commit"]}
    (folder / "summary.json").write_text(json.dumps(summary, indent=2))
    after = "" if args.random else f", after {step:,} steps"
    print(f"return {scores.mean():.1f} +- {scores.std():.1f} over {len(scores)} episodes{after}; see {folder}")
    if recorder.camera and run.get("wandb_id"):
        import wandb

        where = {"project": used.wandb_project_name, "entity": used.wandb_entity, "id": run["wandb_id"]}
        with wandb.init(**where, resume="allow") as wandb_run:
            video = wandb.Video(str(folder / "episode.webm"))
            wandb_run.log({f"{folder.name}/video": video, "global_step": step})
    return summary


if __name__ == "__main__":
    sys.path.append(os.getcwd())  # for tasks of one's own
    evaluate(tyro.cli(Args, description=__doc__))
