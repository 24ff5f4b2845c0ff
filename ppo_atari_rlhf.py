"""PPO on Atari, paid by a reward model that is learned from comparisons of short clips. More: docs/atari.md

"Deep Reinforcement Learning from Human Preferences", Christiano et al. 2017, arXiv:1706.03741, in one file. `train` is
this plot, with the same numbers:

    1. roll the untrained policy out, ask about L(0) pairs of its segments, fit the ensemble to the answers
    for each iteration (every reset_every of them: save, and seed environments and generators anew)
        2. roll the policy out                              the agent never sees env_rewards, score, ends
        3. pay it: the ensemble's rewards, normalised       one model for the whole rollout
        4. advantages, returns = compute_gae(...); update_policy
        5. when enough labels are due: ask about the most disputed pairs of segments from the recent pool
        6. update_reward_model on minibatches of the labels so far, then renew its statistics
        7. log

A pair is a file, preferences/<number>.npz in the run's directory; an answer is a line in answers.jsonl beside it. The
oracle appends that line at once, label_server.py when somebody has looked.

    python ppo_atari_rlhf.py --oracle --labels 40 --total-timesteps 20000   # some minutes
    python ppo_atari_rlhf.py --oracle --labels 5500    # Pong, 10M steps: 3 to 12 hours on two CPU cores
    python ppo_atari_rlhf.py --human --labels 5500     # people answer; beside it: python label_server.py
    python ppo_atari_rlhf.py --true-reward             # the same learner on the same observations, paid by the score

Where this differs from the paper, and why (the evidence is in docs/atari.md):
  * PPO instead of A2C: more return per step of the simulator. a2c_atari_rlhf.py has the paper's A2C.
  * 10M agent steps instead of 50M; labels per run are the paper's, so they come five times as densely.
  * The label rate falls smoothly, not in steps every 5M frames: L(T) = L(0) + (N - L(0)) ln(1 + T/tau) / ln 11.
  * One label presentation per 32 environment steps, not 10 (--pairs-per-step 0.1 is the paper's; it costs speed).
  * Pre-training ends when the held-out loss stops falling, not after 200 epochs: those fit 500 labels by heart.
  * No dropout: without it the reward model learns faster to judge another run's clips.
  * Rewards of std 0.15, as Pong's clipped score has, not 0.05: to PPO it only weighs and clips the value loss.
  * Lives are hidden too, but in Space Invaders: a falling counter tells of the ends that the paper hides.
"""

import ctypes
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections import deque
from dataclasses import asdict, dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import ale_py
import filelock
import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode
from torch.utils.tensorboard import SummaryWriter

gym.register_envs(ale_py)
SCRIPT = Path(__file__).stem
PACKAGES = ("torch", "gymnasium", "ale-py", "numpy")  # whose versions a run records
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
QUERY_BATCH = 16  # ask when at least this many labels are missing
QUERY_CANDIDATES = 10  # candidate pairs per pair asked (section 2.2.4)
OPEN_PAIRS = 100  # --human: during the training at most this many pairs wait for an answer
REWARD_MINIBATCHES = 4  # update the reward model when at least this many minibatches are due
STATISTICS_ROWS = 1000  # recent rows over which predicted rewards are normalised
STD_FLOOR = 0.01  # a member is divided by at least this as its std: blowing up an uninformed model would pay for noise
SHOWN = {"entropy": "losses/entropy", "labels": "labels/used", "ties": "labels/ties"}  # on the progress line
SHOWN |= {"accuracy": "reward_model/accuracy_heldout", "correlation": "reward_model/correlation"}
CHANGEABLE = {"total_timesteps", "labels", "wait_for_labels", "device", "threads", "bf16", "reset_every", "log_every",
              "eval_episodes", "track", "wandb_project_name", "wandb_entity"}  # beside --resume  # fmt: skip
CLIP = {"width": 160, "height": 210, "columns": 5, "fps": 15.0, "pixelated": True, "quality": 101}  # for people


def fail(message: str):
    """End on bad input: one sentence on stderr, exit code 2."""
    print(f"{SCRIPT}: {message}", file=sys.stderr)
    sys.exit(2)


# ---- Arguments -------------------------------------------------------------------------------------------------------
def within(kind: type, least: float, most: float):
    """The type of an argument in least...most; tyro refuses others by the flag's name. NaN lies in no range."""

    def read(words: list[str]):
        if not least <= kind(words[0]) <= most:
            raise ValueError(f"{words[0]} is not in [{least}, {most}]")
        return kind(words[0])

    name, is_kind = kind.__name__.upper(), lambda value: isinstance(value, kind)
    return tyro.constructors.PrimitiveConstructorSpec(1, name, read, is_kind, lambda value: [str(value)])


Count = Annotated[int, within(int, 1, 2**32 - 1)]
Number = Annotated[int, within(int, 0, 2**32 - 1)]
Seed = Annotated[int, within(int, 0, 2**30)]  # ALE's seeds end at 2^31, and each environment has one more
Share = Annotated[float, within(float, 0, 1)]
Weight = Annotated[float, within(float, 0, 1e9)]
Positive = Annotated[float, within(float, 1e-12, 1e9)]
Ablation = Literal[
    "none", "random-queries", "no-ensemble", "no-online-queries", "no-regularization", "no-segments", "target"
]


@dataclass
class Args:
    # Run
    oracle: bool = False  # reward learned from a synthetic oracle's answers; give this, --human or --true-reward
    human: bool = False  # reward learned from people's answers, through label_server.py
    true_reward: bool = False  # no reward learning: the baseline, paid by the clipped score
    seed: Seed = 1  # of all that is random; on a CPU the same arguments end in the same parameters
    total_timesteps: Count = 10_000_000  # agent steps (4 frames each) after the initial phase, in whole rollouts
    device: str = "auto"  # "cpu", "cuda", "cuda:1", ...; auto takes a GPU where there is one
    threads: Count = CORES  # PyTorch's on the CPU, and the emulator's
    bf16: bool = True  # networks up to their heads in bfloat16 where the hardware has it
    runs_dir: str = "runs"  # where the run's own directory is made
    resume: str | None = None  # go on with the run in this directory; with nothing else given exact to the bit on a CPU
    reset_every: Count = 100  # iterations after which a checkpoint is saved and all environments start anew

    # Environment
    env_id: str = "ALE/Pong-v5"  # any ALE game
    num_envs: Count = 16  # environments stepped in parallel
    repeat_action_probability: Share = 0.0  # sticky actions; 0 as in the paper, 0.25 is ALE's later recommendation

    # Policy optimisation (CleanRL's ppo_atari.py but for 2 epochs, not 4, and 16 environments in 8 minibatches of 256)
    learning_rate: Positive = 2.5e-4  # of the policy's Adam
    anneal_lr: bool = True  # let that rate fall linearly to zero
    num_steps: Count = 128  # steps per environment in one rollout
    gamma: Share = 0.99  # discount
    gae_lambda: Share = 0.95  # lambda of generalized advantage estimation
    num_minibatches: Count = 8  # per epoch
    update_epochs: Count = 2  # passes over each rollout
    clip_coef: Weight = 0.1  # PPO's clipping of the probability ratio
    clip_vloss: bool = True  # clip the value loss likewise
    ent_coef: Weight = 0.01  # weight of the entropy bonus
    vf_coef: Weight = 0.5  # weight of the value loss
    max_grad_norm: Positive = 0.5  # gradients are clipped to this norm

    # Reward model
    num_members: Count = 3  # predictors in the ensemble
    reward_learning_rate: Positive = 3e-4  # of the ensemble's Adam
    reward_minibatch_size: Count = 16  # pairs of clips per minibatch of the reward model
    pairs_per_step: Weight = 1 / 32  # label presentations per environment step; the paper's is 0.1
    pretrain_pairs: Count = 12_000  # label presentations before the training, at most; rounds of 32 minibatches
    l2_coef: Annotated[float, within(float, 1e-6, 1e-3)] = 1e-4  # weight decay to start with; it adapts
    label_window: Count = 3000  # the reward model trains on the newest so many; on all with no-online-queries
    reward_std: Positive = 0.15  # std of the reward that the policy is paid

    # Preferences
    labels: Number | None = None  # label budget: new labels of this run; None: 5,500, with --true-reward 0
    segment_length: Count = 25  # steps per clip: 25 are 1.7 seconds at 15 frames per second
    ablation: Ablation = "none"  # leave one part of the method out, as the paper does (its Figures 5 and 6)
    query_pool_steps: Count = 20_000  # segments are drawn from the last so many steps
    oracle_end_penalty: Weight | None = None  # the oracle takes this off for a lost life or game; default 1, in Pong 0
    teacher_beta: Annotated[float, within(float, 0, math.inf)] = math.inf  # answers from sigmoid(beta * difference)
    teacher_gamma: Share = 1.0  # weight gamma^(L-1-t) on step t, so early steps are forgotten
    teacher_mistake: Share = 0.0  # probability that a decided answer is flipped
    teacher_skip: Share = 0.0  # no answer if both sums lie below this quantile of the last 1,000 sums
    teacher_equal: Weight = 0.0  # "equal" if the sums differ by less than this times the std of the last 1,000 sums
    preferences: str | None = None  # run directory whose labels this run starts from
    reward_model: str | None = None  # run directory whose reward model pays this run's agent; needs --labels 0
    wait_for_labels: bool = True  # --human: stand still while people are far behind, and for all before the last tenth

    # Logging
    track: bool = False  # log to Weights & Biases too (TensorBoard is always written)
    wandb_project_name: str = "rlhf"  # the W&B project
    wandb_entity: str | None = None  # the W&B team
    log_every: Count = 10  # iterations between two progress lines
    eval_episodes: Count = 10  # episodes of the evaluation at the end

    # What follows from these
    feedback = property(lambda self: "oracle" if self.oracle else "human" if self.human else "true-reward")
    batch_size = property(lambda self: self.num_envs * self.num_steps)
    num_iterations = property(lambda self: math.ceil(self.total_timesteps / self.batch_size))
    clip_length = property(lambda self: 1 if self.ablation == "no-segments" else self.segment_length)
    members = property(lambda self: 1 if self.ablation == "no-ensemble" else self.num_members)
    pool_rows = property(lambda self: math.ceil(self.query_pool_steps / self.num_envs) + 3)  # 3 make up the first stack

    @property
    def initial_labels(self) -> int:
        if self.ablation == "no-online-queries":
            return self.labels
        return 0 if self.preferences or not self.labels else max(1, min(500, self.labels // 4))


def refuse(args: Args) -> None:
    """End on what would train for hours on nothing, or would fail after something was written."""
    try:
        known = args.env_id.startswith("ALE/") and gym.spec(args.env_id)
    except gym.error.Error as error:  # names what is near
        fail(str(error))
    if not known:
        fail(f"{args.env_id} is not an ALE game, as ALE/Pong-v5 is one")
    ablated, target = args.ablation != "none", args.ablation == "target"
    taught = any(getattr(args, name) != getattr(Args, name) for name in asdict(args) if name.startswith("teacher_"))
    sources = [run for run in (args.preferences, args.reward_model) if run]
    shown = 2 * args.clip_length * (args.labels - args.initial_labels)
    pool = 4 * QUERY_BATCH * args.clip_length + args.num_envs * (args.clip_length + args.num_steps)
    refused = {  # sentence: whether it applies
        "give exactly one of --oracle, --human and --true-reward": args.oracle + args.human + args.true_reward != 1,
        "--true-reward learns no reward": args.true_reward and (args.labels or taught or ablated or sources),
        "--human takes no --teacher-* and no --ablation target: people give answers": args.human and (taught or target),
        "--ablation target has true sums in place of answers: it takes no --teacher-*": target and taught,
        "--reward-model takes --labels 0 and no --ablation": args.reward_model and (args.labels or ablated),
        "give --preferences or --reward-model, not both": len(sources) == 2,
        "--labels 0 needs --preferences or --reward-model": not (args.labels or args.true_reward or sources),
        f"--labels {args.labels}: their clips have more steps than the run": shown > args.total_timesteps,
        f"--query-pool-steps must be {pool} at least for such clips": args.labels and args.query_pool_steps < pool,
        "--human takes clips of 300 steps at most: no picture holds more": args.human and args.clip_length > 300,
        "--num-minibatches: fewer than two steps for each": args.batch_size < 2 * args.num_minibatches,
    }
    for message in [message for message, wrong in refused.items() if wrong]:
        fail(message)
    if args.resume:
        return  # it was looked at when the run began
    for source in sources:
        other = read_run(source)["args"]
        if other["env_id"] != args.env_id:
            fail(f"{source} is a run of {other['env_id']}, not of {args.env_id}")
    if args.preferences:
        answers, _ = read_answers(Path(args.preferences) / "preferences" / "answers.jsonl")
        if not any(answer["mu"] is not None for answer in answers):
            fail(f"{args.preferences} has no answers: no label yet, or written by the first version of these scripts")
        clips = [Path(args.preferences) / "preferences" / f"{answer['pair']:08d}.npz" for answer in answers]
        if not all(path.exists() for path in clips):
            fail(f"{args.preferences} lacks clips that were answered")
        if args.clip_length != (1 if other["ablation"] == "no-segments" else other["segment_length"]):
            fail(f"{args.preferences} has clips of another length")
    if args.reward_model and other["true_reward"]:
        fail(f"{args.reward_model} has learned no reward model")


def parse_args(argv: list[str] | None = None) -> Args:
    """Parse the command line, fill in what depends on the rest, refuse what is wrong with exit code 2.

    --resume RUN takes that run's arguments. What is given beside it overrides them, and is said in a line. W&B sweeps
    write `--oracle=True`, which tyro spells `--oracle`. No shell expands the ~ of `--runs-dir=~/x`.
    """
    argv = sys.argv[1:] if argv is None else argv
    spelled = r"^--(?!no-)([\w-]+)=(True|False)$"
    argv = [re.sub(r"^(--[\w-]+=)~(?=/)", lambda m: m[1] + str(Path.home()), arg) for arg in argv]
    argv = [re.sub(spelled, lambda m: ("--" if m[2] == "True" else "--no-") + m[1], arg) for arg in argv]
    args = tyro.cli(Args, args=argv, description=__doc__)
    if args.resume:
        run = read_run(args.resume)
        copy = Path(args.resume) / f"{SCRIPT}.py"
        is_same = copy.exists() and copy.read_bytes() == Path(__file__).read_bytes()
        if not is_same or run["args"].keys() != asdict(args).keys():
            fail(f"{args.resume} was begun by another script or version: go on with the copy that lies in it")
        args = tyro.cli(Args, args=argv, default=Args(**run["args"]))
        for name in run["args"]:
            flag, now, before = f"--{name.replace('_', '-')}", getattr(args, name), run["args"][name]
            if now != before and name in CHANGEABLE:
                print(f"{flag} is {now} from now on, not {before}")
            elif now != before and name != "resume":
                fail(f"{flag} can't be changed beside --resume: begin a new run")
    if args.labels is None:
        args.labels = 0 if args.true_reward else 5500
    if args.oracle_end_penalty is None:
        args.oracle_end_penalty = 0.0 if args.env_id == "ALE/Pong-v5" else 1.0
    if args.device in ("auto", "cuda"):
        args.device = "cuda:0" if args.device == "cuda" or torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {args.device} can't be used here ({str(error).splitlines()[0]})")
    refuse(args)
    if args.reward_model and not args.resume:
        args.num_members = len(read_checkpoint(args.reward_model)["ensemble"]["mean"])
    return args


# ---- Environment -----------------------------------------------------------------------------------------------------
# What would give the reward away is painted black: the score (A.2), and lives and level. Seaquest's oxygen stays.
# Not Space Invaders' lives: a digit that shows for 1 or 2 seconds at each start, where the cannon passes.
# Inclusive rows and columns of the raw 210 x 160 screen, whole bands where digits grow to the left.
HUD = {
    "ALE/BeamRider-v5": [(10, 28, 0, 159), (32, 39, 20, 30), (183, 189, 32, 45)],
    "ALE/Breakout-v5": [(5, 14, 0, 159)],
    "ALE/Enduro-v5": [(161, 190, 48, 111)],
    "ALE/Pong-v5": [(1, 20, 0, 159)],
    "ALE/Qbert-v5": [(6, 12, 0, 70), (16, 27, 33, 48)],
    "ALE/Seaquest-v5": [(9, 16, 0, 104), (22, 29, 58, 80)],
    "ALE/SpaceInvaders-v5": [(10, 19, 0, 159)],
}


def hide(screens: np.ndarray, env_id: str) -> None:
    """Paint the game's HUD black on screens (..., H, W), rounded outward: a pixel mixed from any of it is hidden."""
    height, width = screens.shape[-2:]
    for top, bottom, left, right in HUD.get(env_id, []):
        rows = slice(math.floor(top * height / 210), math.ceil((bottom + 1) * height / 210))
        columns = slice(math.floor(left * width / 160), math.ceil((right + 1) * width / 160))
        screens[..., rows, columns] = 0


def hidden_band(env_id: str | None) -> int:
    """Rows at the top of the raw screen that show nothing but what is hidden: people need not look at them."""
    return max([bottom + 1 for _, bottom, *columns in HUD.get(env_id, []) if columns == [0, 159]], default=0)


def make_games(args: Args, num_envs: int, **kwargs) -> AtariVectorEnv:
    """ALE's own vector environment: (N, 4, 84, 84) grey, frameskip 4, maximum of two frames, up to 30 no-ops.

    Rewards are clipped, and lost lives noticed, by this script.
    SAME_STEP: every row is a real step (the default inserts one with reward 0 after each end). FIRE is pressed at a
    reset, not after every lost life as CleanRL does: the agent has the button.
    """
    return AtariVectorEnv(
        gym.spec(args.env_id).kwargs["game"],
        num_envs,
        num_threads=min(args.threads, num_envs),
        repeat_action_probability=args.repeat_action_probability,
        reward_clipping=False,
        autoreset_mode=AutoresetMode.SAME_STEP,
        **kwargs,
    )


class Envs:
    """num_envs games as the agent may see them: (N, 4, 84, 84) uint8 without score, lives or ends.

    history: (N,), how many frames of the same episode came before the newest one, at most 3. The others of the stack
    are zero in ALE. Here they repeat the episode's first frame, as in Gym's FrameStack: to a reward model that has
    hardly seen empty frames those were worth plus or minus ten standard deviations, at every start of a game.
    """

    def __init__(self, args: Args, num_envs: int):
        self.games, self.env_id = make_games(args, num_envs), args.env_id
        self.num_actions = int(self.games.single_action_space.n)
        self.finished: list[tuple[float, int]] = []  # true return and length of the episodes that have ended

    def reset(self, seed: int) -> np.ndarray:
        self.finished.clear()  # those of the initial phase: a resumed run has not seen them
        stacks, infos = self.games.reset(seed=seed)
        self.lives, self.history = infos["lives"], np.zeros(len(stacks), np.uint8)
        self.score, self.length = np.zeros(len(stacks)), np.zeros(len(stacks), int)
        return self.observe(stacks)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, dict]:
        """Observations, and (N,) each: history, of the observation that was acted on. For oracle, baseline, evaluation
        and log only: env_rewards, raw; lost, a life or the game; ended, the game's end or a time limit."""
        before = self.history
        stacks, rewards, terminated, truncated, infos = self.games.step(actions)
        ended = terminated | truncated
        lost = terminated | (~truncated & (infos["lives"] < self.lives))  # after an end, infos are the next game's
        self.lives, self.history = infos["lives"], np.where(ended, 0, np.minimum(before + 1, 3)).astype(np.uint8)
        self.score, self.length = self.score + rewards, self.length + 1
        self.finished += zip(self.score[ended].tolist(), self.length[ended].tolist(), strict=True)
        self.score, self.length = np.where(ended, 0, self.score), np.where(ended, 0, self.length)
        told = {"env_rewards": rewards, "lost": lost, "ended": ended, "history": before}
        return self.observe(stacks), told

    def random_actions(self, rng) -> np.ndarray:
        return rng.integers(self.num_actions, size=len(self.history))

    def observe(self, stacks: np.ndarray) -> np.ndarray:
        """What the agent sees of ALE's stacks, in place."""
        hide(stacks, self.env_id)
        for i in np.flatnonzero(self.history < 3):
            stacks[i, : 3 - int(self.history[i])] = stacks[i, 3 - int(self.history[i])]
        return stacks


class Camera:
    """Pictures for people: the same games once more, in colour, of which the last `rows` steps are kept."""

    def __init__(self, args: Args, num_envs: int, rows: int):
        self.games = make_games(args, num_envs, grayscale=False, img_height=210, img_width=160, stack_num=1)
        self.env_id, self.kept = args.env_id, deque(maxlen=rows)

    def reset(self, seed: int):
        self.screens, _ = self.games.reset(seed=seed)

    def record(self, envs: Envs, actions: np.ndarray):
        """Keep what the games show, (N, 1, 210, 160, 3), and follow them."""
        hide(np.moveaxis(self.screens, -1, 0), self.env_id)
        self.kept.append([zlib.compress(screen, 1) for screen in self.screens])
        self.screens, *_ = self.games.step(actions)

    def frames(self, env: int, row: int, length: int) -> np.ndarray:
        """(length, H, 160, 3) RGB of an environment from this row of what is kept on; the newest row is -1."""
        kept = [self.kept[row + t][env] for t in range(length)]
        screens = [np.frombuffer(zlib.decompress(screen), np.uint8).reshape(210, 160, 3) for screen in kept]
        return np.stack(screens)[:, hidden_band(self.env_id) :]


def sprite_sheet(frames: np.ndarray) -> bytes:
    """The frames of a clip, (L, H, W, 3) RGB, on one WebP image, CLIP["columns"] in a row."""
    import cv2

    columns, (height, width) = CLIP["columns"], frames.shape[1:3]
    cells = np.zeros((math.ceil(len(frames) / columns) * columns, height, width, 3), np.uint8)
    cells[: len(frames)] = frames[..., ::-1]  # OpenCV's order
    image = cells.reshape(-1, columns, height, width, 3).swapaxes(1, 2).reshape(-1, columns * width, 3)
    return cv2.imencode(".webp", image, [cv2.IMWRITE_WEBP_QUALITY, CLIP["quality"]])[1].tobytes()


# ---- Policy ----------------------------------------------------------------------------------------------------------
def layer_init(layer, std=2**0.5, bias_const=0.0):
    torch.nn.init.orthogonal_(layer.weight, std)
    torch.nn.init.constant_(layer.bias, bias_const)
    return layer


class Agent(nn.Module):
    """Policy and value on the network of Mnih et al. 2015. x: (B, 4, 84, 84) uint8."""

    def __init__(self, num_actions: int, bf16: bool):
        super().__init__()
        self.bf16 = bf16
        self.network = nn.Sequential(
            layer_init(nn.Conv2d(4, 32, 8, stride=4)),
            nn.ReLU(),
            layer_init(nn.Conv2d(32, 64, 4, stride=2)),
            nn.ReLU(),
            layer_init(nn.Conv2d(64, 64, 3, stride=1)),
            nn.ReLU(),
            nn.Flatten(),
            layer_init(nn.Linear(64 * 7 * 7, 512)),
            nn.ReLU(),
        )
        self.actor = layer_init(nn.Linear(512, num_actions), std=0.01)
        self.critic = layer_init(nn.Linear(512, 1), std=1)

    def hidden(self, x):
        dtype = torch.bfloat16 if self.bf16 else torch.float32  # bfloat16 holds 0...255 exactly
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            return self.network(x.to(dtype, memory_format=torch.channels_last).div_(255)).float()

    def get_value(self, x):
        return self.critic(self.hidden(x)).flatten()

    def get_action_and_value(self, x, action=None):
        """(B,) each: actions, their log-probability, entropy and value."""
        hidden = self.hidden(x)
        logprobs = self.actor(hidden).log_softmax(-1)
        probs = logprobs.exp()
        if action is None:  # the argmax of probs / Exp(1) is drawn from probs; multinomial would wait for the GPU
            action = (probs / torch.empty_like(probs).exponential_()).argmax(-1)
        logprob = logprobs.gather(-1, action.unsqueeze(-1)).squeeze(-1)
        return action, logprob, -(probs * logprobs).sum(-1), self.critic(hidden).flatten()


# ---- Reward model ----------------------------------------------------------------------------------------------------
class RewardEnsemble(nn.Module):
    """All members of the ensemble in one batched pass (sections 2.2.3 and A.2).

    Per member: convolutions 7x7/3, 5x5/2, 3x3/1, 3x3/1 of 16 channels, each with batch norm and leaky ReLU; then
    64 units and one output. The first convolution is dense (all members read the same frames), the others are grouped
    by member. In: (B, 4, 84, 84) uint8. Out: (B, M), a raw reward per member.
    """

    def __init__(self, members: int, l2_coef: float, bf16: bool):
        super().__init__()
        self.members, self.bf16 = members, bf16
        layers, channels_in, groups = [], 4, 1
        for kernel, stride in ((7, 3), (5, 2), (3, 1), (3, 1)):
            layers += [
                # no bias: batch norm would take it out again
                nn.Conv2d(channels_in, 16 * members, kernel, stride, groups=groups, bias=False),
                # with PyTorch's 0.1 the statistics, by which rewards are paid, lag behind the weights
                nn.BatchNorm2d(16 * members, momentum=0.5),
                nn.LeakyReLU(0.01),
            ]
            channels_in, groups = 16 * members, members
        self.network = nn.Sequential(*layers)
        bound = 1 / math.sqrt(16 * 7 * 7)
        self.hidden_weight = nn.Parameter(torch.empty(members, 16 * 7 * 7, 64).uniform_(-bound, bound))
        self.hidden_bias = nn.Parameter(torch.zeros(members, 1, 64))
        self.out_weight = nn.Parameter(torch.empty(members, 64, 1).uniform_(-1 / 8, 1 / 8))
        # No output bias: a constant cancels in every comparison, and the normaliser takes it out.
        # Normaliser and the adaptive weight decay are part of the model: saved and restored with it.
        self.register_buffer("mean", torch.zeros(members))
        self.register_buffer("std", torch.ones(members))
        self.register_buffer("average_std", torch.ones(()))
        self.register_buffer("l2_coef", torch.full((members,), l2_coef))
        self.register_buffer("decisive", torch.zeros(2, 3, members))  # running `decisive_sums`

    def forward(self, x):
        dtype = torch.bfloat16 if self.bf16 else torch.float32  # bfloat16 holds 0...255 exactly
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            h = self.network(x.to(dtype, memory_format=torch.channels_last))  # batch norm takes the scale out
        h = h.reshape(len(x), self.members, -1).transpose(0, 1).float()  # (M, B, 784)
        h = F.leaky_relu(torch.baddbmm(self.hidden_bias, h, self.hidden_weight), 0.01)
        return torch.bmm(h, self.out_weight).squeeze(-1).T

    def weights(self) -> list[torch.Tensor]:
        """The weights that decay, each (M, ...): neither biases nor batch norm."""
        convolutions = [layer.weight for layer in self.network if isinstance(layer, nn.Conv2d)]
        return [weight.reshape(self.members, -1) for weight in (*convolutions, self.hidden_weight, self.out_weight)]

    @torch.no_grad()
    def score(self, x, batch: int = 512) -> torch.Tensor:
        """Raw rewards (B, M) in evaluation mode; moves no statistics."""
        self.eval()
        return torch.cat([self(part) for part in x.split(batch)])

    def normalise(self, raw, reward_std: float) -> torch.Tensor:
        """(B, M) raw -> (B,) reward: each member normalised, then averaged, then scaled to reward_std (section 2.2.1).

        The average of members that don't agree has less than unit std. Dividing by it undoes that, by sqrt(M) at most:
        a smaller std comes from STD_FLOOR or from members at odds, and such a model should pay little.
        """
        average = ((raw - self.mean) / self.std.clamp(min=STD_FLOOR)).mean(1)
        return reward_std * average / self.average_std.clamp(min=1 / math.sqrt(self.members))

    @torch.no_grad()
    def renew_statistics(self, x):
        """Mean and std of each member, and std of their average, over recent rows (B, ...).

        Not smoothed: a constant added to a member changes no comparison, so its mean drifts, by half a std per update.
        A mean that lags is an offset in the reward, and GAE turns that into a slope over each rollout.
        """
        raw = self.score(x)
        self.mean.copy_(raw.mean(0))
        self.std.copy_(raw.std(0))
        self.average_std.copy_(((raw - self.mean) / self.std.clamp(min=STD_FLOOR)).mean(1).std())


def make_models(args: Args, envs: Envs) -> tuple[Agent, RewardEnsemble]:
    """Policy and reward model, untrained."""
    if args.device.startswith("cuda"):
        bf16 = args.bf16 and torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        bf16 = args.bf16 and torch.cpu.get_capabilities().get("avx512_bf16", False)
    agent = Agent(envs.num_actions, bf16)
    l2_coef = 0.0 if args.ablation == "no-regularization" else args.l2_coef
    ensemble = RewardEnsemble(args.members, l2_coef, bf16)
    return tuple(model.to(args.device, memory_format=torch.channels_last) for model in (agent, ensemble))


# ---- Pairs and answers -----------------------------------------------------------------------------------------------
def model_inputs(clips: dict) -> torch.Tensor:
    """n clips -> what the reward model reads of their rows, (n L, 4, 84, 84): the stacks that the agent saw.

    frames: (n, L + 3, 84, 84), a clip's and the three before it. history: (n, L), how many frames of the same episode
    lie before a row, at most 3: what lies before a reset is replaced by the episode's first frame.
    """
    frames, history = clips["frames"], clips["history"]
    n, length = history.shape
    age = torch.arange(3, -1, -1, device=frames.device)  # of the four frames in a stack, newest last
    rows = torch.arange(3, length + 3, device=frames.device)[:, None] - torch.minimum(age, history.unsqueeze(-1).long())
    return frames[torch.arange(n, device=frames.device)[:, None, None], rows].flatten(0, 1)


CLIP_ARRAYS = ("frames", "history")  # that a clip consists of


class SegmentPool:
    """The last rows of every environment's stream, from which segments are drawn. Row numbers count from the start
    of the run; a row lies at its number modulo the pool's size. Of o_t, the newest frame is kept."""

    def __init__(self, rows: int, num_envs: int, device):
        self.rows, self.count = rows, 0  # capacity, and rows since the start of the run, per environment
        self.streams = {
            "frames": torch.zeros(rows, num_envs, 84, 84, dtype=torch.uint8, device=device),
            "history": torch.zeros(rows, num_envs, dtype=torch.uint8, device=device),
            "oracle_rewards": torch.zeros(rows, num_envs, device=device),
            "pred_rewards": torch.zeros(rows, num_envs, device=device),
        }

    def add(self, rollout: dict, oracle_rewards: torch.Tensor, pred_rewards: torch.Tensor):
        """Append a rollout, (T, N, ...) of every stream. Only the newest rows fit."""
        new_frames = rollout["obs"][:, :, -1]
        given = rollout | {"frames": new_frames, "oracle_rewards": oracle_rewards, "pred_rewards": pred_rewards}
        for name, stream in self.streams.items():
            new = given[name]
            at = (torch.arange(len(new), device=stream.device) + self.count)[-self.rows :] % self.rows
            stream[at] = new[-self.rows :].to(stream)
        self.count += len(new)

    def first_row(self) -> int:
        """The oldest row whose stack can still be built: the three frames before it are there, or never existed."""
        return max(0, self.count - self.rows + 3)

    def gather(self, name: str, starts: np.ndarray, first: int, last: int) -> torch.Tensor:
        """Rows start+first ... start+last-1 of a stream. starts: (n, 2) of (environment, row)."""
        stream = self.streams[name]
        envs, rows = torch.as_tensor(starts, device=stream.device).unbind(1)
        return stream[(rows[:, None] + torch.arange(first, last, device=stream.device)) % self.rows, envs[:, None]]

    def clips(self, starts: np.ndarray, length: int) -> dict:
        """Copies of the segments at starts, (n, ...) as `model_inputs` reads them."""
        frames = self.gather("frames", starts, -3, length)
        return {"frames": frames, "history": self.gather("history", starts, 0, length)}


def sample_segments(rng, num: int, first: int, last: int, num_envs: int) -> np.ndarray:
    """Segments, (num, 2) of (environment, start row); every start in first...last is equally likely."""
    return np.stack([rng.integers(num_envs, size=num), rng.integers(first, last + 1, size=num)], 1)


def write_whole(path: Path, write) -> None:
    """Write beside, flush, rename: a name stands for whole content, whatever is killed or full meanwhile."""
    beside = path.with_suffix(".tmp")
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, content: dict) -> None:
    write_whole(path, lambda file: file.write(json.dumps(content, indent=2).encode()))


def read_answers(journal: Path, position: int = 0) -> tuple[list[dict], int]:
    """The answers from this byte of answers.jsonl on, and the byte after them. A last line without its newline is not
    whole yet. What is no answer is passed over: whoever wrote there may have been killed in the middle of a line."""
    answers, text = [], b""
    if journal.exists():
        with open(journal, "rb") as file:
            file.seek(position)
            text = file.read()
        text = text[: text.rfind(b"\n") + 1]
    for line in text.splitlines():
        try:
            answer = json.loads(line)
            if isinstance(answer["pair"], int) and answer["pair"] >= 0 and answer["mu"] in (0, 0.5, 1, None):
                answers.append(answer)
        except (ValueError, KeyError, TypeError):
            continue
    return answers, position + len(text)


class Preferences:
    """Pairs of clips and the answers to them: files in the run's preferences/, and the newest labels in memory.

    00000012.npz is a pair: both clips' arrays, (2, ...) each, and their true `sums`; written once, never changed.
    A line {"pair": 12, "mu": 1.0} of answers.jsonl is its answer, the probability that the first clip is preferred:
    1 or 0, 0.5 for "equal", null for "can't tell" or a teacher's skip. The first line of a pair counts. Lines marked
    "loaded" came with --preferences.
    """

    def __init__(self, folder: Path, asked: int, window: int | None, args: Args):
        """Take up what lies in the folder. asked: the checkpoint's count. Later pairs of the oracle are deleted: a
        resumed run asks them again. Later pairs for people stay."""
        self.folder, self.journal, self.window = folder, folder / "answers.jsonl", window or sys.maxsize
        self.device, self.members, self.position = args.device, args.members, 0  # bytes of the journal that were read
        self.answered: set[int] = set()
        self.labels: list[dict] = []  # arrays of the newest `window`
        self.used = self.ties = self.skipped = self.loaded = 0  # labels of this run, ties among them; no answer; loaded
        lines = read_answers(self.journal)[0]
        self.first = 1 + max([line["pair"] for line in lines if line.get("loaded")], default=-1)  # own pair's number
        stored = sorted(int(path.stem) for path in folder.glob("*.npz") if path.stem.isdigit())
        self.asked = max([self.first, asked, *(number + 1 for number in stored if args.human)])
        if args.oracle:
            for number in [number for number in stored if number >= self.asked]:
                self.path(number).unlink()
                stored.remove(number)
            kept = "".join(json.dumps(line) + "\n" for line in lines if line["pair"] < self.asked)
            write_whole(self.journal, lambda file: file.write(kept.encode()))
        self.recent_sums = deque([x for number in stored[-500:] for x in self.pair(number)["sums"]], maxlen=1000)
        self.read()

    @property
    def open(self) -> int:
        """Pairs that wait for an answer."""
        return self.asked - self.first - self.used - self.skipped

    def path(self, number: int) -> Path:
        return self.folder / f"{number:08d}.npz"

    def pair(self, number: int) -> dict:
        try:
            with np.load(self.path(number), allow_pickle=False) as arrays:
                return dict(arrays)
        except Exception as error:  # a damaged file fails in as many ways as it has bytes
            fail(f"{self.path(number)} can't be read ({error.__class__.__name__})")

    def ask(self, arrays: dict, pictures: list[bytes]) -> int:
        """Store a pair, its pictures first, and return its number."""
        number, self.asked = self.asked, self.asked + 1
        self.recent_sums.extend(arrays["sums"])
        for side, picture in enumerate(pictures):
            seen = self.path(number).with_suffix(f".{side}.webp")
            write_whole(seen, lambda file, picture=picture: file.write(picture))
        write_whole(self.path(number), lambda file: np.savez_compressed(file, **arrays))
        return number

    def answer(self, number: int, mu: float | None):
        with open(self.journal, "a") as file:
            file.write(json.dumps({"pair": number, "mu": mu}) + "\n")
            file.flush()
            os.fsync(file.fileno())  # before a checkpoint counts the pair

    def read(self):
        """Make labels of the answers that are new."""
        lines, self.position = read_answers(self.journal, self.position)
        first = {}
        for line in lines:
            if line["pair"] < self.asked and line["pair"] not in self.answered:
                first.setdefault(line["pair"], line)
        new = list(first.values())
        self.answered |= {line["pair"] for line in new}
        own = [line["mu"] for line in new if not line.get("loaded")]
        self.skipped, self.ties = self.skipped + own.count(None), self.ties + own.count(0.5)
        self.used, self.loaded = self.used + len(own) - own.count(None), self.loaded + len(new) - len(own)
        labels = [line for line in new if line["mu"] is not None]
        for line in labels[-self.window :]:
            label = {name: torch.as_tensor(x, device=self.device) for name, x in self.pair(line["pair"]).items()}
            label["mu"] = torch.tensor(line["mu"], dtype=torch.float32, device=self.device)
            label["weights"] = bootstrap_weights(line["pair"], self.members).to(self.device)
            self.labels.append(label)
        if labels:
            self.labels = self.labels[-self.window :]
            sums = torch.stack([label["sums"] for label in self.labels])
            self.mean_sum, self.std_sum = sums.mean(), sums.std().clamp(min=1e-6)

    def batch(self, at) -> tuple:
        """Labels at these places of the window: model inputs (2 n L, ...), mu (n,), sums (n, 2), weights (n, M).

        The sums are standardised for the ablation `target`: its model has a scale of its own, and no output bias.
        """
        labels = [self.labels[i] for i in at]
        clips = {name: torch.cat([label[name] for label in labels]) for name in CLIP_ARRAYS}
        mu, sums, weights = (torch.stack([label[name] for label in labels]) for name in ("mu", "sums", "weights"))
        return model_inputs(clips), mu, (sums - self.mean_sum) / self.std_sum, weights


# ---- Maths of preferences (section 2.2) ------------------------------------------------------------------------------
def preference_probability(difference):
    """P[clip 0 preferred] of Bradley-Terry with 10 % uniformly random answers: 0.9 sigma + 0.05 (section 2.2.3)."""
    return 0.9 * torch.sigmoid(difference) + 0.05


def preference_loss(difference, mu):
    """Cross-entropy of the answers. difference: (B, M) of predicted segment sums; mu: (B,), ties 1/2. Out: (B, M).

    Stable for any difference: the logarithms' arguments are at least 0.05, and a confidently contradicted label has
    gradient 0 where plain Bradley-Terry has 1.
    """
    mu = mu.unsqueeze(-1)
    return -mu * preference_probability(difference).log() - (1 - mu) * preference_probability(-difference).log()


def label_losses(sums, mu, true_sums, ablation: str):
    """Loss of each label and member, (B, M). sums: (B, 2, M); mu: (B,); true_sums: (B, 2). Ablation `target`: both
    clips' sums are regressed on the true ones."""
    if ablation == "target":
        return (sums - true_sums.unsqueeze(-1)).square().mean(1)
    return preference_loss(sums[:, 0] - sums[:, 1], mu)


def disagreement(sums, ablation: str):
    """Variance over members of the predicted preference, or difference for `target`; (B, 2, M) -> (B,)."""
    difference = sums[:, 0] - sums[:, 1]
    return (difference if ablation == "target" else preference_probability(difference)).var(-1, correction=0)


def bootstrap_weights(pair: int, members: int) -> torch.Tensor:
    """Poisson(1) weight of a label for each member, (M,): the bootstrap of a set that still grows.

    Depends on nothing but (pair, member). Weight 0, of probability 1/e, holds the label out for that member for ever
    (section 2.2.3), whether it is saved, loaded or leaves the window.
    """
    draws = [np.random.default_rng((pair, member)).poisson(1.0) for member in range(members)]
    return torch.tensor(draws, dtype=torch.float32)


def oracle_rewards_of(rollout: dict, args: Args) -> torch.Tensor:
    """What the oracle adds up, (T, N): sign(reward), as the paper's agents are paid, less a penalty for a lost life or
    game. None for time limits."""
    return rollout["env_rewards"].sign().float() - args.oracle_end_penalty * rollout["lost"]


def teacher_answer(rng, rewards: np.ndarray, recent_sums, args: Args) -> float | None:
    """The oracle's answer to a pair, or an imperfect teacher's after B-Pref (Lee et al. 2021).

    rewards: (2, L), what the oracle adds up. recent_sums: the last 1,000 segment sums, this pair's included. Out: mu,
    or None for "can't tell". Equal (weighted) sums are ties. B-Pref's thresholds are a share of the mean return, which
    turns around where rewards are negative; here `equal` is a share of the sums' std, and `skip` is a quantile of them.
    """
    sums = rewards.sum(1)
    if args.teacher_skip and (sums < np.quantile(recent_sums, args.teacher_skip)).all():
        return None
    weighted = rewards * args.teacher_gamma ** np.arange(rewards.shape[1] - 1, -1, -1)
    difference = round(float(weighted[0].sum() - weighted[1].sum()), 5)  # 0.9 and 1 - 0.1 are the same
    if difference == 0 or abs(sums[0] - sums[1]) < args.teacher_equal * np.std(recent_sums):
        return 0.5
    prefers_first = difference > 0
    if args.teacher_beta < math.inf:  # a sigmoid that can't overflow
        prefers_first = rng.random() < 0.5 * (1 + math.tanh(0.5 * args.teacher_beta * difference))
    return float(prefers_first != (rng.random() < args.teacher_mistake))


def label_schedule(step: float, total_steps: float, initial: int, budget: int) -> int:
    """Labels due after `step` environment steps: the rate falls like 1 / (T + tau), tau = total / 10 (A.1, A.2)."""
    share = min(step / total_steps, 1)
    return int(initial + (budget - initial) * math.log1p(10 * share) / math.log(11) + 1e-6)


# ---- Maths of the policy ---------------------------------------------------------------------------------------------
def compute_gae(rewards, values, next_values, dones, gamma: float, gae_lambda: float):
    """Generalized advantage estimation; all (T, N).

    next_values[t]: value of the state that row t led to; the caller gives 0 for none. dones[t]: 1 where row t is
    the last of its episode; the trace stops there. Out: advantages, returns.
    """
    deltas = rewards + gamma * next_values - values
    decays = gamma * gae_lambda * (1 - dones)
    advantages = torch.empty_like(deltas)
    lastgaelam = torch.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        advantages[t] = lastgaelam = deltas[t] + decays[t] * lastgaelam
    return advantages, advantages + values


def policy_loss(newlogprob, entropy, newvalue, logprobs, advantages, returns, values, args: Args):
    """PPO's clipped loss on a minibatch; all (B,). Out: the loss, and a dict of tensors to log."""
    logratio = newlogprob - logprobs
    ratio = logratio.exp()
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    pg_loss1 = -advantages * ratio
    pg_loss2 = -advantages * torch.clamp(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
    pg_loss = torch.max(pg_loss1, pg_loss2).mean()
    v_error = (newvalue - returns) ** 2
    if args.clip_vloss:
        v_clipped = values + torch.clamp(newvalue - values, -args.clip_coef, args.clip_coef)
        v_error = torch.max(v_error, (v_clipped - returns) ** 2)
    v_loss = 0.5 * v_error.mean()
    entropy_loss = entropy.mean()
    loss = pg_loss - args.ent_coef * entropy_loss + args.vf_coef * v_loss
    info = {"policy_loss": pg_loss, "value_loss": v_loss, "entropy": entropy_loss}
    info["approx_kl"] = ((ratio - 1) - logratio).mean()
    info["clipfrac"] = ((ratio - 1).abs() > args.clip_coef).float().mean()
    return loss, {name: value.detach() for name, value in info.items()}


# ---- Updates ---------------------------------------------------------------------------------------------------------
def update_policy(agent, optimizer, rollout, rng, args: Args) -> dict:
    """Passes in minibatches over a rollout: observations, actions, logprobs, advantages, returns and values, each
    (T N, ...). Out: means of what was logged, as tensors."""
    *_, b_returns, b_values = rollout
    logged = []
    for _ in range(args.update_epochs):
        b_inds = torch.as_tensor(rng.permutation(len(b_values)), device=b_values.device)
        for mb_inds in b_inds.tensor_split(args.num_minibatches):
            obs, actions, *rest = (b[mb_inds] for b in rollout)
            _, newlogprob, entropy, newvalue = agent.get_action_and_value(obs, actions)
            loss, info = policy_loss(newlogprob, entropy, newvalue, *rest, args)
            optimizer.zero_grad()
            loss.backward()
            info["grad_norm"] = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
            optimizer.step()
            logged.append(info)
    means = {name: torch.stack([info[name] for info in logged]).mean() for name in logged[0]}
    return means | {"explained_variance": 1 - (b_returns - b_values).var() / b_returns.var()}


@torch.no_grad()
def decisive_sums(ensemble: RewardEnsemble, preferences: Preferences, at, args: Args) -> torch.Tensor:
    """Over the decisive labels at these places: summed loss, right answers and labels, (2, 3, M).

    [0] over the labels held out for a member, [1] over those it is fitted to. Evaluation mode. Ties are left out:
    their loss is at least ln 2 for seen and unseen labels alike, which would hide overfitting.
    """
    inputs, mu, true_sums, weights = preferences.batch(at)
    sums = ensemble.score(inputs).view(len(mu), 2, -1, ensemble.members).sum(2)
    losses = label_losses(sums, mu, true_sums, args.ablation)
    right = ((sums[:, 0] > sums[:, 1]) == (mu > 0.5).unsqueeze(-1)).float()
    decisive = (mu != 0.5).unsqueeze(-1)
    masks = torch.stack([(weights == 0) & decisive, (weights > 0) & decisive])  # (2, B, M)
    return (torch.stack([losses, right, torch.ones_like(losses)]) * masks.unsqueeze(1)).sum(2)


def held_out(ensemble: RewardEnsemble, preferences: Preferences, args: Args) -> tuple[float, float]:
    """Loss and accuracy on the window's decisive labels, each member on those held out for it; mean over members."""
    parts = torch.arange(len(preferences.labels)).split(args.reward_minibatch_size)
    loss, right, labels = sum(decisive_sums(ensemble, preferences, at, args) for at in parts)[0]
    return (loss / labels).nanmean().item(), (right / labels).nanmean().item()


def adapt_l2(ensemble: RewardEnsemble) -> None:
    """Move each member's weight decay by 5 % towards a held-out / training loss within [1.1, 1.5] (section 2.2.3).

    The paper gives neither step nor start nor bounds. Few labels, seen hundreds of times, keep the ratio above 1.5 and
    the decay at its upper bound. An upper bound of 1 destroys what the model has learned.
    """
    (held_out_loss, _, held_out_labels), (train_loss, _, train_labels) = ensemble.decisive
    ratio = (held_out_loss / held_out_labels) / (train_loss / train_labels)  # NaN while a side is empty: no move
    factor = torch.where(ratio > 1.5, 1.05, torch.where(ratio < 1.1, 1 / 1.05, 1.0))
    ensemble.l2_coef.mul_(factor).clamp_(1e-6, 1e-3)


def update_reward_model(ensemble, optimizer, preferences, minibatches: int, rng, args: Args) -> dict:
    """Train on minibatches drawn from the label window. Out: means of what was logged, as tensors.

    Member losses are summed, each normalised by its own weights, so that members don't share a gradient's size. Both
    clips of a pair are in one batch, so batch norm can't tell them apart.
    """
    logged = []
    for minibatch in range(minibatches):
        at = rng.integers(len(preferences.labels), size=args.reward_minibatch_size)
        inputs, mu, true_sums, weights = preferences.batch(at)
        ensemble.train()
        sums = ensemble(inputs).view(len(mu), 2, -1, ensemble.members).sum(2)
        losses = label_losses(sums, mu, true_sums, args.ablation)
        loss = ((losses * weights).sum(0) / weights.sum(0).clamp(min=1)).sum()
        decay = sum((weight**2).sum(1) for weight in ensemble.weights())  # (M,)
        optimizer.zero_grad()
        (loss + (ensemble.l2_coef * decay).sum()).backward()
        optimizer.step()
        logged.append(loss.detach() / ensemble.members)
        if minibatch % 4 == 0:
            at = rng.integers(len(preferences.labels), size=args.reward_minibatch_size)
            checked = decisive_sums(ensemble, preferences, at, args)
            ensemble.decisive.mul_(0.98).add_(checked)  # reaches 50 checks back: 200 minibatches
            if args.ablation != "no-regularization":
                adapt_l2(ensemble)
    (loss_heldout, right, labels), (loss_train, _, labels_train) = ensemble.decisive
    info = {"loss": torch.stack(logged), "loss_heldout": loss_heldout / labels, "accuracy_heldout": right / labels}
    info |= {"loss_train": loss_train / labels_train, "l2_coef": ensemble.l2_coef}
    return {name: value.nanmean() for name, value in info.items()}


def pretrain(ensemble, optimizer, preferences, progress, rng, args: Args) -> None:
    """Fit the ensemble before the first policy update, until the decisive held-out loss has stopped falling."""
    best, stale, presented = math.inf, 0, 0
    while stale < 4 and presented < args.pretrain_pairs:  # stale: rounds without a new best
        tell("pretraining", preferences, progress, args, progress=presented / args.pretrain_pairs)
        update_reward_model(ensemble, optimizer, preferences, 32, rng, args)
        presented += 32 * args.reward_minibatch_size
        loss, accuracy = held_out(ensemble, preferences, args)
        best, stale = (loss, 0) if loss < best else (best, stale + 1)
        print(f"pre-training, {presented:,} pairs shown: loss {loss:.3f}, accuracy {accuracy:.3f} held out", flush=True)


def renew_statistics(ensemble: RewardEnsemble, pool: SegmentPool, rng, args: Args) -> None:
    """Normalise by rows of the recent pool; after each update, since it has changed what they are worth."""
    rows = sample_segments(rng, STATISTICS_ROWS, pool.first_row(), pool.count - 1, args.num_envs)
    ensemble.renew_statistics(model_inputs(pool.clips(rows, 1)))


def select_pairs(ensemble, pool: SegmentPool, num: int, first: int, rng, args: Args) -> np.ndarray:
    """Pairs of segments to ask about, (<= num, 2, 2) of (environment, start row), none of a row before `first`.

    With an ensemble, the most disputed of 10 x num candidates (section 2.2.4); without, the first of as many. No
    segment is in two of these pairs, or twice in one.
    """
    length, num_candidates = args.clip_length, QUERY_CANDIDATES * num
    segments = sample_segments(rng, 2 * num_candidates, first, pool.count - length, args.num_envs)
    candidates = segments.reshape(-1, 2, 2)
    if ensemble is not None:
        raw = torch.cat([ensemble.score(model_inputs(pool.clips(part, length))) for part in np.split(segments, num)])
        disputed = disagreement(raw.view(num_candidates, 2, length, -1).sum(2), args.ablation)
        candidates = candidates[disputed.argsort(descending=True, stable=True).cpu().numpy()]
    chosen, used = [], set()
    for pair in candidates.tolist():
        clips = {tuple(segment) for segment in pair}
        if len(chosen) < num and len(clips - used) == 2:
            chosen.append(pair)
            used |= clips
    return np.array(chosen, dtype=np.int64).reshape(-1, 2, 2)


def ask(ensemble, pool: SegmentPool, preferences: Preferences, camera, num: int, first: int, rng, args: Args) -> None:
    """Store up to num pairs of segments; the oracle answers at once, people when they have looked (label_server.py)."""
    for pair in select_pairs(ensemble, pool, num, first, rng, args):
        clips = {name: x.cpu().numpy() for name, x in pool.clips(pair, args.clip_length).items()}
        rewards = pool.gather("oracle_rewards", pair, 0, args.clip_length).cpu().numpy().astype(np.float64)
        shown = [camera.frames(e, row - pool.count, args.clip_length) for e, row in pair.tolist()] if camera else []
        number = preferences.ask(clips | {"sums": rewards.sum(1).astype(np.float32)}, [sprite_sheet(x) for x in shown])
        if args.oracle:
            preferences.answer(number, teacher_answer(rng, rewards, preferences.recent_sums, args))
    preferences.read()


def wait_for_people(phase: str, wanted: int, preferences: Preferences, progress, args: Args) -> float:
    """Stand still until so many labels have come or no pair is open: a simulator is a hundred times faster. Out: the
    seconds that it took."""
    if not args.human:
        return 0.0  # the oracle has answered
    began = time.monotonic()
    preferences.read()
    if preferences.used < wanted and preferences.open:
        print(f"waiting for people: {preferences.used} of {wanted} labels, {preferences.open} open pairs", flush=True)
    while preferences.used < wanted and preferences.open:
        tell(phase, preferences, progress, args, wanted=wanted)
        time.sleep(1)
        preferences.read()
    return time.monotonic() - began


# ---- Run state -------------------------------------------------------------------------------------------------------
@dataclass
class Progress:
    """What a run counts; saved in every checkpoint."""

    iteration: int = 0  # begun
    global_step: int = 0  # the untrained policy's steps included
    asked: int = 0  # number of the next pair
    pairs_presented: int = 0  # to the reward model, since the policy is trained
    seconds: float = 0.0  # of training: without the initial phase, waiting, evaluating and saving
    wall_seconds: float = 0.0
    returns: list[float] = field(default_factory=list)  # of the last 20 finished episodes
    scalars: dict[str, float] = field(default_factory=dict)  # that were logged last


def make_run_dir(args: Args) -> tuple[Path, dict]:
    """Make the run's own directory, with a copy of this script and what --preferences gives. Out: the directory, and
    what its args.json is to hold."""
    name = f"{args.env_id.replace('/', '-').replace(':', '-')}__{SCRIPT}__{args.seed}"
    run_dir = Path(args.runs_dir) / f"{name}__{datetime.now():%Y%m%d-%H%M%S-%f}"  # agents of a sweep start together
    try:
        (run_dir / "preferences").mkdir(parents=True)
    except OSError as error:
        fail(f"can't write to {run_dir}: {error.strerror}")
    shutil.copy(__file__, run_dir / f"{SCRIPT}.py")
    if args.preferences:
        source, lines = Path(args.preferences) / "preferences", {}
        for answer in read_answers(source / "answers.jsonl")[0]:
            lines.setdefault(answer["pair"], {"pair": answer["pair"], "mu": answer["mu"], "loaded": True})
        lines = [line for line in lines.values() if line["mu"] is not None]
        for line in lines:
            shutil.copy(source / f"{line['pair']:08d}.npz", run_dir / "preferences")
        journal = run_dir / "preferences" / "answers.jsonl"
        journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    git = f"git rev-parse --short=10 HEAD && git status --short --ignored {shlex.quote(Path(__file__).name)}"
    here = Path(__file__).resolve().parent
    state = subprocess.run(git, shell=True, cwd=here, capture_output=True, text=True).stdout.splitlines()
    gpu = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else "no GPU used"
    run = {
        "script": SCRIPT,
        "args": asdict(args),
        "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": {name: version(name) for name in PACKAGES},
        "commit": state[0] + "+" * (len(state) > 1) if state else None,  # "+": this file is not what the commit has
        "hardware": f"{platform.machine()}, {CORES} cores, {gpu}, Python {platform.python_version()}",
        "clip": CLIP | {"frames": args.clip_length, "height": CLIP["height"] - hidden_band(args.env_id)},
        "wandb_id": None,
    }
    return run_dir, run


def read_run(run_dir: str | Path) -> dict:
    """A run directory's args.json; ends with exit code 2 if it is missing or broken."""
    try:
        run = json.loads((Path(run_dir) / "args.json").read_text())
        _ = run["script"], run["commit"], [run["args"][name] for name in ("env_id", "ablation", "segment_length")]
        return run
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"{run_dir} is not a run directory ({error.__class__.__name__} at args.json)")


def open_run(args: Args) -> tuple[Path, dict, filelock.FileLock, object]:
    """The run's directory, new or that of --resume; what its args.json is to hold; the lock that keeps other processes
    out; and its W&B run, the same one whatever the directory is called now, or None."""
    if args.track:
        import wandb
    if args.resume:
        run_dir, run = Path(args.resume), read_run(args.resume) | {"args": asdict(args) | {"resume": None}}
    else:
        run_dir, run = make_run_dir(args)
    lock = filelock.FileLock(run_dir / "run.lock")
    try:
        lock.acquire(timeout=1)  # the label server looks in for a moment
    except filelock.Timeout:
        fail(f"another process is running {run_dir}")
    if not args.track:
        return run_dir, run, lock, None
    where = {"project": args.wandb_project_name, "entity": args.wandb_entity, "id": run["wandb_id"]}
    try:
        wandb_run = wandb.init(**where, name=run_dir.resolve().name, config=asdict(args), resume="allow")
    except wandb.errors.Error as error:
        if not args.resume:
            shutil.rmtree(run_dir)
        fail(f"--track: {error}")
    wandb_run.define_metric("*", step_metric="global_step")
    return run_dir, run | {"wandb_id": wandb_run.id}, lock, wandb_run


def tell(phase: str, preferences: Preferences, counts: Progress, args: Args, **more) -> None:
    """status.json, for the label page. phase: initial, pretraining, training, finished; wanted: labels waited for."""
    if args.human:
        status = {"phase": phase, "labels_used": preferences.used, "asked": preferences.asked, "time": time.time()}
        status |= {"labels": args.labels, "total_timesteps": args.num_iterations * args.batch_size, "wanted": None}
        status |= {"step": counts.iteration * args.batch_size, "progress": None} | more
        accuracy = counts.scalars.get("reward_model/accuracy_heldout", math.nan)
        status |= {"accuracy_heldout": accuracy if math.isfinite(accuracy) else None}
        write_json(preferences.folder.parent / "status.json", status)


def stop_at_infinity(run_dir: Path, progress: Progress):
    """End a run whose numbers are no longer finite, with exit code 1."""
    sys.exit(f"{SCRIPT}: parameters or rewards are not finite after step {progress.global_step}: try lower learning "
             f"rates; {run_dir}/checkpoint.pt, if it is there, is good")  # fmt: skip


def save_checkpoint(run_dir: Path, modules: dict, pool: SegmentPool, progress: Progress) -> None:
    """Tensors and numbers only; parameters and statistics are finite."""
    state = {name: module.state_dict() for name, module in modules.items()}
    values = [*state["agent"].values(), *state["ensemble"].values()]
    if not all(value.isfinite().all() for value in values):
        stop_at_infinity(run_dir, progress)
    state |= {"progress": asdict(progress), "pool": vars(pool)}
    write_whole(run_dir / "checkpoint.pt", lambda file: torch.save(state, file))


def read_checkpoint(run_dir: str | Path) -> dict:
    """checkpoint.pt (nothing in it can run code), on the CPU; exit code 2 if it is missing or damaged."""
    try:
        return torch.load(Path(run_dir) / "checkpoint.pt", map_location="cpu", weights_only=True)
    except FileNotFoundError:
        fail(f"{run_dir} has no checkpoint.pt yet")
    except Exception as error:  # a truncated file fails in as many ways as it has bytes
        fail(f"{run_dir}/checkpoint.pt can't be read ({error.__class__.__name__}): is it truncated?")


def load_checkpoint(run_dir: Path, modules: dict, pool: SegmentPool) -> Progress:
    """Put a checkpoint's contents where they belong."""
    state = read_checkpoint(run_dir)
    for name, module in modules.items():
        module.load_state_dict(state[name])
    pool.count = state["pool"]["count"]
    for name, stream in pool.streams.items():
        stream.copy_(state["pool"]["streams"][name])
    return Progress(**state["progress"])


def start_anew(key: list[int], envs: Envs, camera: Camera | None) -> tuple[np.ndarray, np.random.Generator]:
    """Seed environments and generators by (seed, phase, progress), so that a checkpoint need not hold their states."""
    rng = np.random.default_rng(key)
    seed = int(rng.integers(2**31))
    torch.manual_seed(seed)  # actions
    if camera:
        camera.reset(seed)
    return envs.reset(seed), rng


@torch.no_grad()
def roll_out(agent: Agent, envs: Envs, camera: Camera | None, next_obs: np.ndarray, args: Args):
    """num_steps steps of all environments. Out: (T, N, ...) of each stream, and the observations that come next."""
    torch.set_num_threads(min(args.threads, math.ceil(args.num_envs / 16)))  # more would only wait for the simulator's
    rows = []
    for _ in range(args.num_steps):
        obs = torch.as_tensor(next_obs, device=args.device)
        action, logprob, _, value = agent.get_action_and_value(obs)[:4]
        chosen = action.cpu().numpy()
        if camera:
            camera.record(envs, chosen)
        next_obs, told = envs.step(chosen)
        rows.append({"obs": obs, "actions": action, "logprobs": logprob, "values": value} | told)
    torch.set_num_threads(args.threads)
    return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}, next_obs


@torch.no_grad()
def evaluate(agent: Agent, args: Args, seed: int) -> np.ndarray:
    """True, unclipped scores of eval_episodes episodes, one per environment; sampled actions. Changes no training."""
    with torch.random.fork_rng([args.device] if args.device.startswith("cuda") else []):
        torch.manual_seed(seed)
        envs = Envs(args, args.eval_episodes)
        obs, scores, playing = envs.reset(seed), np.zeros(args.eval_episodes), np.ones(args.eval_episodes, bool)
        while playing.any():
            action = agent.get_action_and_value(torch.as_tensor(obs, device=args.device))[0]
            obs, told = envs.step(action.cpu().numpy())
            scores += told["env_rewards"] * playing
            playing &= ~told["ended"]
    return scores


def reward_correlation(pool: SegmentPool, args: Args) -> float:
    """Pearson correlation of paid and oracle's sums over 500 segments of the pool; NaN where one is constant."""
    last = pool.count - args.clip_length
    if last < pool.first_row():
        return math.nan
    rng = np.random.default_rng(0)  # of its own: logging does not move training
    starts = sample_segments(rng, 500, pool.first_row(), last, args.num_envs)
    sums = [pool.gather(name, starts, 0, args.clip_length).sum(1) for name in ("pred_rewards", "oracle_rewards")]
    paid = sums[0].isfinite()  # nothing was paid for the untrained policy's rows
    return torch.corrcoef(torch.stack(sums)[:, paid])[0, 1].item() if paid.sum() > 1 else math.nan


def keep_large_buffers() -> None:
    """glibc maps and unmaps every buffer over 32 MB anew: 40 % of a reward-model step."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def summarise(scores: np.ndarray, preferences: Preferences, progress: Progress, run: dict, args: Args) -> dict:
    """What summary.json holds. JSON has neither infinity nor NaN: what is absent or infinite is null."""
    summary = asdict(args) | asdict(progress) | {"finished": True, "script": SCRIPT, "feedback": args.feedback}
    del summary["scalars"]
    summary |= {"total_timesteps": args.num_iterations * args.batch_size, "asked": progress.asked - preferences.first}
    summary |= {"labels_used": preferences.used, "labels_loaded": preferences.loaded}
    summary |= {"skipped": preferences.skipped, "ties": preferences.ties}
    summary |= {"sps": progress.iteration * args.batch_size / max(progress.seconds, 1e-9)}
    summary |= {"final_return_mean": float(scores.mean()), "final_return_std": float(scores.std())}
    summary |= {"final_episodes": len(scores), "commit": run["commit"]}  # that this run began with
    for name in ("accuracy_heldout", "correlation", "loss"):
        summary[f"reward_{name}"] = progress.scalars.get(f"reward_model/{name}")
    for name, metric in {"pg_loss": "policy_loss", "v_loss": "value_loss", "entropy": "entropy"}.items():
        summary[name] = progress.scalars.get(f"losses/{metric}")
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in summary.items()}


# ---- Training --------------------------------------------------------------------------------------------------------
def train(args: Args) -> dict:
    """Train, or go on with a run. Returns what summary.json holds."""
    try:
        camera = Camera(args, args.num_envs, args.pool_rows) if args.human and args.labels else None
    except Exception as error:  # of whatever draws
        fail(f"--human: no pictures can be drawn here ({error})")
    run_dir, run, lock, wandb_run = open_run(args)
    is_new = not (run_dir / "checkpoint.pt").exists()
    args.resume = str(run_dir)  # for who presses Ctrl-C
    torch.set_num_threads(args.threads)
    keep_large_buffers()
    torch.manual_seed(args.seed)  # initial parameters

    envs = Envs(args, args.num_envs)
    agent, ensemble = make_models(args, envs)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    reward_optimizer = torch.optim.Adam(ensemble.parameters(), lr=args.reward_learning_rate, fused=True)
    modules = {"agent": agent, "optimizer": optimizer, "ensemble": ensemble, "reward_optimizer": reward_optimizer}
    pool = SegmentPool(0 if args.true_reward else args.pool_rows, args.num_envs, args.device)
    progress = Progress() if is_new else load_checkpoint(run_dir, modules, pool)
    write_json(run_dir / "args.json", run)
    (run_dir / "summary.json").unlink(missing_ok=True)  # of a finished run that is trained on
    window = None if args.ablation == "no-online-queries" else args.label_window
    preferences = Preferences(run_dir / "preferences", progress.asked, window, args)
    writer = SummaryWriter(str(run_dir), purge_step=progress.global_step + 1)

    def log(scalars: dict):
        """To TensorBoard, and to W&B with steps and labels beside it: either can be the x axis there."""
        for name, value in scalars.items():
            writer.add_scalar(name, value, progress.global_step)
        if wandb_run and scalars:
            wandb_run.log(scalars | {"global_step": progress.global_step, "labels": preferences.used})

    total_steps = args.num_iterations * args.batch_size
    loaded = f" and {preferences.loaded:,} loaded" if preferences.loaded else ""
    print(f"{run_dir}\n{args.env_id}, {args.feedback}, {args.labels:,} labels{loaded}, {args.device}, steps "
          f"{progress.iteration * args.batch_size:,} to {total_steps:,}", flush=True)  # fmt: skip
    if args.env_id not in HUD:
        print(f"nothing on the screen of {args.env_id} is hidden, since where its score stands is not known")
    started = time.monotonic() - progress.wall_seconds
    tell("initial" if is_new else "training", preferences, progress, args)
    if camera and is_new:
        print("the first clips are being drawn: start label_server.py in the same directory", flush=True)

    # 1. Roll the untrained policy out, ask about L(0) pairs of its segments, fit the ensemble to the answers
    if is_new and not args.true_reward:
        if args.reward_model:
            ensemble.load_state_dict(read_checkpoint(args.reward_model)["ensemble"])
        obs, rng = start_anew([args.seed, 0, preferences.asked], envs, camera)
        first_fresh = 0  # clips start at or after this row, so that no two batches of questions share one
        wanted = min(args.labels, args.initial_labels + QUERY_BATCH * args.human)  # people get more for the meantime
        while not pool.count or preferences.used < args.initial_labels:
            tell("initial", preferences, progress, args)  # drawing takes long, and an old status looks dead
            rollout, obs = roll_out(agent, envs, camera, obs, args)
            progress.global_step += args.batch_size
            pool.add(rollout, oracle_rewards_of(rollout, args), torch.full_like(rollout["values"], math.nan))
            first_fresh = max(first_fresh, pool.first_row())
            missing = wanted - preferences.used - preferences.open
            # Pairs that the fresh rows have room for, if half of them end up in no clip
            room = (pool.count - first_fresh - args.clip_length) * args.num_envs // (4 * args.clip_length)
            if missing > 0 and room >= min(missing, QUERY_BATCH):
                ask(None, pool, preferences, camera, min(missing, room), first_fresh, rng, args)
                first_fresh = pool.count
            elif missing <= 0:
                wait_for_people("initial", args.initial_labels, preferences, progress, args)
        if not args.reward_model:
            pretrain(ensemble, reward_optimizer, preferences, progress, rng, args)
        renew_statistics(ensemble, pool, rng, args)

    judge = None if args.ablation in ("random-queries", "no-ensemble") else ensemble  # None: pairs at random
    reward_log, obs = {}, None
    while progress.iteration < args.num_iterations:
        if obs is None or progress.iteration % args.reset_every == 0:
            progress.asked, progress.wall_seconds = preferences.asked, time.monotonic() - started
            save_checkpoint(run_dir, modules, pool, progress)
            obs, rng = start_anew([args.seed, 1, progress.iteration], envs, camera)
        began = time.monotonic()
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - progress.iteration / args.num_iterations)
        progress.iteration += 1
        progress.global_step += args.batch_size

        # 2. Roll the policy out
        rollout, obs = roll_out(agent, envs, camera, obs, args)
        values = rollout["values"]

        # 3. Pay it: the whole rollout by one model, in one go. Only the baseline and the oracle read env_rewards
        if args.true_reward:
            pred_rewards = rollout["env_rewards"].sign().to(values)
        else:
            raw = ensemble.score(rollout["obs"].flatten(0, 1))
            pred_rewards = ensemble.normalise(raw, args.reward_std).view_as(values)
            pool.add(rollout, oracle_rewards_of(rollout, args), pred_rewards)

        # 4. Update the policy. Only the baseline sees lost lives and ends, as CleanRL's agent does
        dones = ((rollout["lost"] | rollout["ended"]) & args.true_reward).to(values)
        with torch.no_grad():
            next_value = agent.get_value(torch.as_tensor(obs, device=args.device))
        next_values = (1 - dones) * torch.cat([values[1:], next_value.unsqueeze(0)])
        advantages, returns = compute_gae(pred_rewards, values, next_values, dones, args.gamma, args.gae_lambda)
        if not advantages.isfinite().all():  # before clips of such a policy are stored
            stop_at_infinity(run_dir, progress)
        batch = (rollout["obs"], rollout["actions"], rollout["logprobs"], advantages, returns, values)
        policy_log = update_policy(agent, optimizer, [x.flatten(0, 1) for x in batch], rng, args)

        # 5. Ask for what is due and neither answered nor open: a skipped pair is replaced. People's schedule ends early
        step, schedule = progress.iteration * args.batch_size, total_steps * (0.9 if args.human else 1.0)
        due = label_schedule(step, schedule, args.initial_labels, args.labels)
        missing = due - preferences.used - preferences.open
        if args.human:
            missing = min(missing, OPEN_PAIRS - preferences.open)
        # After --resume the camera lacks the pool's older rows
        first = max(pool.first_row(), pool.count - len(camera.kept) if camera else 0)
        enough = QUERY_BATCH if due < args.labels else 1
        if missing >= enough and pool.count >= first + args.clip_length:
            ask(judge, pool, preferences, camera, missing, first, rng, args)
        wanted = (due if due == args.labels else int(0.75 * due)) if args.wait_for_labels else 0
        waited = wait_for_people("training", wanted, preferences, progress, args)

        # 6. Update the reward model, then renew its statistics over rows of the recent pool
        minibatches = int((step * args.pairs_per_step - progress.pairs_presented) / args.reward_minibatch_size)
        if minibatches >= REWARD_MINIBATCHES and not args.true_reward:
            progress.pairs_presented += minibatches * args.reward_minibatch_size
            if not args.reward_model:  # one that was loaded stays as it is, but for the scale of what it pays
                reward_log = update_reward_model(ensemble, reward_optimizer, preferences, minibatches, rng, args)
            renew_statistics(ensemble, pool, rng, args)

        # 7. Log
        progress.seconds += time.monotonic() - began - waited
        tell("training", preferences, progress, args, labels_due=due)
        scalars = {}
        if envs.finished:
            mean_return, mean_length = np.mean(envs.finished, axis=0).tolist()
            scalars |= {"charts/episodic_return": mean_return, "charts/episodic_length": mean_length}
            progress.returns = (progress.returns + [score for score, _ in envs.finished])[-20:]
            envs.finished.clear()
        if progress.iteration == args.num_iterations or progress.iteration % args.log_every == 0:
            speed = step / progress.seconds
            scalars |= {"charts/learning_rate": optimizer.param_groups[0]["lr"], "charts/SPS": speed}
            scalars |= {f"losses/{name}": float(value) for name, value in policy_log.items()}
            if not args.true_reward:
                scalars |= {f"reward_model/{name}": float(value) for name, value in reward_log.items()}
                scalars["reward_model/correlation"] = reward_correlation(pool, args)
                scalars["reward_model/raw_std"] = ensemble.std.mean().item()
                scalars["reward_model/pred_std"] = pred_rewards.std().item()
                scalars |= {"labels/used": preferences.used, "labels/skipped": preferences.skipped}
                scalars["labels/ties"] = preferences.ties / max(preferences.used, 1)
            left = (total_steps - step) / speed / 60
            line = f"{step:>10,} steps {step / total_steps:4.0%} {speed:6,.0f}/s  {left:4.0f} min left"
            line += f"  return {np.mean(progress.returns):.1f}" if progress.returns else "  no episode has ended yet"
            print(line, *(f" {name} {scalars[key]:.4g}" for name, key in SHOWN.items() if key in scalars), flush=True)
            if scalars.get("labels/ties", 0) > 0.9:
                print("warning: nine of ten labels are ties, which teach little")
            # Of fewer labels too few are held out to tell
            if scalars.get("reward_model/accuracy_heldout", 1) < 0.55 and len(preferences.labels) >= 200:
                print("warning: the reward model judges by chance")
            if scalars["losses/entropy"] < 0.05:
                print("warning: the policy's entropy is near zero: it has stopped exploring")
        progress.scalars |= scalars
        log(scalars)

    progress.asked, progress.wall_seconds = preferences.asked, time.monotonic() - started
    save_checkpoint(run_dir, modules, pool, progress)
    scores = evaluate(agent, args, args.seed)
    log({"charts/eval_return": scores.mean()})
    if not args.true_reward and not args.reward_model:
        # Over all labels of the window; what is logged is a running mean
        progress.scalars["reward_model/accuracy_heldout"] = held_out(ensemble, preferences, args)[1]
    summary = summarise(scores, preferences, progress, run, args)
    write_json(run_dir / "summary.json", summary)
    tell("finished", preferences, progress, args)
    writer.close()
    if wandb_run:
        wandb_run.summary.update(summary)
        wandb_run.finish()
    if preferences.used < args.labels:
        print(f"warning: {args.labels - preferences.used} of {args.labels} labels were not given")
    print(f"return {scores.mean():.1f} +- {scores.std():.1f} over {len(scores)} episodes")
    print(f"figure and video: python evaluate.py {shlex.quote(str(run_dir))}")
    lock.release()
    return summary


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # no terminal's encoding ends a run
    args = parse_args()
    try:
        train(args)
    except KeyboardInterrupt:  # a shell's loop ends only if this process dies of the signal itself
        if args.resume:
            print(f"\nto go on from the last checkpoint, at most {args.reset_every * args.batch_size:,} steps back: "
                  f"{shlex.join(['python', sys.argv[0], '--resume', args.resume])}")  # fmt: skip
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
