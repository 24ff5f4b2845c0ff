"""PPO on Atari, paid by a reward model that is learned from comparisons of short clips.

"Deep Reinforcement Learning from Human Preferences", Christiano et al. 2017, arXiv:1706.03741, in one file:

    label L(0) pairs of segments from the untrained policy, fit the ensemble to them
    for each iteration
        roll the policy out                                   the agent never sees env_rewards, score, lives, ends
        pred_rewards  = the ensemble's, normalised, averaged  one model, one batch, just before the advantages
        advantages, returns = compute_gae(pred_rewards, values, ...)
        update_policy
        when enough labels are due: ask about the most disputed pairs of segments from the recent pool
        store each answer with a copy of its clips
        update_reward_model on minibatches of these labels, then renew its statistics

    python ppo_atari_rlhf.py --oracle --labels 40 --total-timesteps 20000 --query-pool-steps 4000   # some minutes
    python ppo_atari_rlhf.py --oracle --labels 5500       # Pong, 10M steps: 4.5 hours on two CPU cores
    python ppo_atari_rlhf.py --human --labels 5500        # people answer, on the page of label_server.py
    python ppo_atari_rlhf.py --true-reward                # the same learner on the same observations, paid by the score

Where this differs from the paper, and why:
  * PPO instead of A2C: more return per step of the simulator. a2c_atari_rlhf.py has the paper's A2C.
  * 10M agent steps instead of 50M; labels per run are the paper's, so they come five times as densely.
  * The label rate falls smoothly, not in steps every 5M frames: L(T) = L(0) + (N - L(0)) ln(1 + T/tau) / ln 11.
  * One label presentation per 32 environment steps, not 10 (--pairs-per-step 0.1 is the paper's; it costs speed).
  * Pre-training ends when the held-out loss stops falling, not after 200 epochs: those fit 500 labels by heart.
  * Dropout after the last two of the four convolutions only: with it after all four, the held-out loss of a model that
    sees each label a few times only falls more slowly, and drawing it costs a CPU a third more time.
  * Rewards of std 0.15, not 0.05. A2C's step scales with the reward; PPO's advantages are normalised, so its reward's
    scale is the weight of the value loss alone. 0.15 is what Pong's clipped score has: CleanRL's balance of losses.
  * Lives are hidden besides the score: a falling counter tells of the ends that the paper hides.
"""

import base64
import ctypes
import difflib
import hashlib
import http.client
import itertools
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
import urllib.error
import urllib.parse
import urllib.request
import uuid
import zlib
from collections import deque
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import ale_py
import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

gym.register_envs(ale_py)
SCRIPT = Path(__file__).stem
PACKAGES = ("torch", "gymnasium", "ale-py", "numpy")  # whose versions a run records
QUERY_BATCH = 16  # ask as soon as so many labels are due
QUERY_CANDIDATES = 10  # candidate pairs per pair asked (section 2.2.4)
REWARD_MINIBATCHES = 4  # update the reward model as soon as so many minibatches are due
STATISTICS_ROWS = 1000  # recent rows over which predicted rewards are normalised
SHEET = {"width": 160, "height": 210, "columns": 5, "pixelated": True}  # of the clips that people see
WEBP_QUALITY = 101  # lossless
OPEN_QUERIES = 100  # --human: so many pairs wait at most, or all initial ones; newer ones replace older


def fail(message: str):
    """End on bad input: one sentence on stderr, exit code 2."""
    print(f"{SCRIPT}: {message}", file=sys.stderr)
    raise SystemExit(2)


# ----------------------------------------------------------------------------------------------------------------------
# Arguments
# ----------------------------------------------------------------------------------------------------------------------
Ablation = Literal[
    "none", "random-queries", "no-ensemble", "no-online-queries", "no-regularization", "no-segments", "target"
]


@dataclass
class Args:
    # Run
    oracle: bool = False
    """reward learned from a synthetic oracle's answers (one of --oracle, --human, --true-reward is needed)"""
    human: bool = False
    """reward learned from people's answers"""
    true_reward: bool = False
    """no reward learning: the baseline, paid by the clipped score"""
    seed: int = 1
    """seed of everything: two runs with the same arguments end in the same parameters (on a CPU)"""
    total_timesteps: int = 10_000_000
    """agent steps (4 emulator frames each) over all environments; rounded up to whole rollouts"""
    device: str = "auto"
    """"cpu", "cuda", "cuda:1", …; auto takes a GPU where there is one"""
    torch_threads: int | None = None
    """threads of PyTorch on the CPU; default: as many as this process may use"""
    env_threads: int | None = None
    """threads of the emulator; default: as many as this process may use"""
    bf16: bool = True
    """convolutions in bfloat16 (heads and losses stay in float32) where the hardware has it"""
    compile: bool = False
    """compile the policy's minibatch loss with torch.compile; gained nothing on the CPUs that it was tried on"""
    runs_dir: str = "runs"
    """where the run's own directory is made"""
    resume: str | None = None
    """continue the run in this directory, with that run's arguments; exact to the bit on a CPU"""
    evaluate: str | None = None
    """no training: score, video and predicted-against-true figure of the run in this directory"""
    random: bool = False
    """with --evaluate: score the uniformly random policy instead"""

    # Environment
    env_id: str = "ALE/Pong-v5"
    """any ALE game"""
    num_envs: int = 16
    """environments stepped in parallel"""
    repeat_action_probability: float = 0.0
    """sticky actions; 0 as in the paper, 0.25 is ALE's later recommendation"""
    reset_every: int = 100
    """updates after which all environments start anew; a resumed run replays the actions since then"""

    # Policy optimisation (CleanRL's ppo_atari.py but for 2 epochs, not 4, and 16 environments in 8 minibatches of 256)
    learning_rate: float = 2.5e-4
    """learning rate of the policy's Adam"""
    anneal_lr: bool = True
    """let that rate fall linearly to zero"""
    num_steps: int = 128
    """steps per environment in one rollout"""
    gamma: float = 0.99
    """discount"""
    gae_lambda: float = 0.95
    """lambda of generalized advantage estimation"""
    num_minibatches: int = 8
    """minibatches per epoch"""
    update_epochs: int = 2
    """passes over each rollout, at most"""
    target_kl: float | None = None
    """end the passes after one whose mean KL divergence from the policy that acted exceeds this; None: never"""
    norm_adv: bool = True
    """give the advantages of each minibatch zero mean and unit std"""
    clip_coef: float = 0.1
    """PPO's clipping of the probability ratio"""
    clip_vloss: bool = True
    """clip the value loss likewise"""
    ent_coef: float = 0.01
    """weight of the entropy bonus"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    max_grad_norm: float = 0.5
    """gradients are clipped to this norm"""

    # Reward model
    num_members: int = 3
    """predictors in the ensemble"""
    reward_learning_rate: float = 3e-4
    """learning rate of the ensemble's Adam"""
    reward_minibatch_size: int = 16
    """pairs of clips per minibatch of the reward model"""
    pairs_per_step: float = 1 / 32
    """label presentations to the reward model per environment step; the paper's is 0.1"""
    pretrain_pairs: int = 12_000
    """label presentations before the first policy update, at most (in rounds of 32 minibatches); ends sooner when the
    held-out loss stops falling"""
    dropout: float = 0.5
    """dropout after the third and fourth convolution of the reward model"""
    l2_coef: float = 1e-4
    """weight decay to start with; adapted per member, within 1e-6 ... 1e-3, to bring held-out / training loss into
    [1.1, 1.5]; --ablation no-regularization has none"""
    label_window: int = 3000
    """the reward model trains on the newest labels only"""
    reward_std: float = 0.15
    """standard deviation of the reward that the policy is paid"""
    reward_std_floor: float = 0.01
    """a member's raw std is taken for at least this: blowing up an uninformed model would pay for noise"""

    # Preferences
    labels: int | None = None
    """label budget: new labels of this run; 5,500 unless --true-reward"""
    segment_length: int = 25
    """steps per clip: 25 are 1.7 seconds at 15 frames per second"""
    ablation: Ablation = "none"
    """the paper's ablations"""
    query_pool_steps: int = 20_000
    """segments are drawn from the last so many steps"""
    oracle_clip: bool = True
    """the oracle sums sign(reward), as the paper's agents are paid; --no-oracle-clip sums the raw score"""
    oracle_end_penalty: float | None = None
    """the oracle takes this off for a lost life or a game over; default 1, in Pong 0 (the paper gives no number)"""
    teacher_beta: float = math.inf
    """imperfect teacher (B-Pref): answers are drawn from sigmoid(beta * difference)"""
    teacher_gamma: float = 1.0
    """imperfect teacher: weight gamma^(L-1-t) on step t, so early steps are forgotten"""
    teacher_mistake: float = 0.0
    """imperfect teacher: probability that a decided answer is flipped"""
    teacher_skip: float = 0.0
    """imperfect teacher: no answer if both sums lie below this quantile of the last 1,000 sums"""
    teacher_equal: float = 0.0
    """imperfect teacher: "equal" if the sums differ by less than this times the std of the last 1,000 sums"""
    preferences: str | None = None
    """run directory whose labels this run starts from"""
    label_server: str = "http://127.0.0.1:8765"
    """with --human: where label_server.py runs; its token: LABEL_SERVER_TOKEN, this URL, or ./label_server.tokens"""
    wait_for_labels: bool = True
    """with --human: wait for people while under 75 % of what is due is answered; for the initial labels in any case"""
    reward_model: str | None = None
    """run directory whose reward model pays this run's agent; unchanged but for its scale; needs --labels 0"""

    # Logging and checkpoints
    track: bool = False
    """log to Weights & Biases too (TensorBoard is always written)"""
    wandb_project_name: str = "rlhf"
    """the W&B project"""
    wandb_entity: str | None = None
    """the W&B team"""
    log_every: int = 10
    """updates between two progress lines"""
    eval_every: int = 0
    """updates between two evaluations during training; 0 evaluates at the end only"""
    eval_episodes: int = 10
    """episodes per evaluation"""
    checkpoint_every: int = 50
    """updates between two checkpoints"""

    @property
    def feedback(self) -> str:
        return "oracle" if self.oracle else "human" if self.human else "true-reward"

    @property
    def asks_people(self) -> bool:
        return self.human and bool(self.labels)

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def minibatch_size(self) -> int:
        size, rest = divmod(self.batch_size, self.num_minibatches)
        if rest:
            fail(f"--num-minibatches {self.num_minibatches} does not divide the rollout of {self.batch_size} steps")
        if size < 2:
            fail(f"--num-minibatches {self.num_minibatches} leaves one step per minibatch, which has no std")
        return size

    @property
    def num_iterations(self) -> int:
        return math.ceil(self.total_timesteps / self.batch_size)

    @property
    def clip_length(self) -> int:
        return 1 if self.ablation == "no-segments" else self.segment_length

    @property
    def members(self) -> int:
        return 1 if self.ablation == "no-ensemble" else self.num_members

    @property
    def pool_rows(self) -> int:
        """Rows per environment in the query pool: 3 more, since a segment needs the frames before its first stack."""
        return math.ceil(self.query_pool_steps / self.num_envs) + 3

    @property
    def initial_labels(self) -> int:
        if self.ablation == "no-online-queries":
            return self.labels
        return 0 if self.preferences or not self.labels else max(1, min(500, self.labels // 4))

    @property
    def query_limit(self) -> int:
        """Pairs asked at one occasion at most: so many fill half of the pool, and find room without overlap."""
        return (self.pool_rows - 3 - self.clip_length) * self.num_envs // (4 * self.clip_length)


def check_values(args: Args) -> None:
    """Refuse numbers out of range and devices that are not there."""
    probabilities = {"repeat_action_probability", "gamma", "gae_lambda", "dropout"}
    probabilities |= {"teacher_gamma", "teacher_mistake", "teacher_skip", "teacher_equal"}
    for name, value in asdict(args).items():
        flag = f"--{name.replace('_', '-')} {value}"
        most = 1 if name in probabilities else math.inf if name == "teacher_beta" else sys.float_info.max
        if isinstance(value, float) and not 0 <= value <= most:  # nor does NaN lie in any range
            fail(f"{flag} lies outside [0, 1]" if most == 1 else f"{flag} must be a number of at least 0")
        if value == 0 and name in ("learning_rate", "reward_learning_rate", "reward_std", "reward_std_floor"):
            fail(f"{flag} must be above 0")
        least = 0 if name in ("seed", "labels", "eval_every") else 1
        if isinstance(value, int) and not isinstance(value, bool) and not least <= value < 2**32:
            fail(f"{flag} is negative" if value < 0 else f"{flag} must be at least {least} and below 2^32")
    if not 1e-6 <= args.l2_coef <= 1e-3:
        fail(f"--l2-coef {args.l2_coef} lies outside [1e-6, 1e-3], where it is kept")
    if args.dropout == 1:
        fail("--dropout 1 leaves nothing")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", args.device):
        fail(f"--device {args.device} is none of auto, cpu, cuda, cuda:1, ...")
    if args.device.startswith("cuda") and int(args.device[5:] or 0) >= torch.cuda.device_count():
        fail(f"--device {args.device} is not available here")


def check_args(args: Args) -> None:
    """Refuse what can't be trained, before anything is written, and fill in the defaults that depend on the rest."""
    if args.random:
        fail("--random goes with --evaluate")
    if args.oracle + args.human + args.true_reward != 1:
        fail("give exactly one of --oracle, --human and --true-reward")
    if args.env_id not in gym.registry or not args.env_id.startswith("ALE/"):
        games = [name for name in gym.registry if name.startswith("ALE/")]
        near = difflib.get_close_matches(args.env_id, games, 3, 0.4)
        fail(f"{args.env_id} is not an ALE game; did you mean {' or '.join(near or ['ALE/Pong-v5'])}?")
    if args.labels is None:
        args.labels = 0 if args.true_reward else 5500
    if args.oracle_end_penalty is None:
        args.oracle_end_penalty = 0.0 if game_name(args.env_id) == "pong" else 1.0
    check_values(args)
    if args.human and math.ceil(args.clip_length / SHEET["columns"]) * SHEET["height"] > 16383:
        fail(f"--segment-length {args.segment_length} is too long for people: WebP has no room for its frames")
    imperfect = any(value != getattr(Args, name) for name, value in asdict(args).items() if name.startswith("teacher_"))
    if args.ablation == "target" and imperfect:
        fail("--ablation target gives true sums as targets: it takes no --teacher-* flags")
    if args.human and (args.ablation == "target" or imperfect):
        fail("--human takes no --teacher-* flags and no --ablation target: people give answers, not sums")
    learning = imperfect or args.labels or args.preferences or args.reward_model or args.ablation != "none"
    if args.true_reward and learning:
        fail("--true-reward learns no reward: it takes no labels, teacher, ablation, --preferences or --reward-model")
    if args.reward_model and (args.labels or args.preferences or args.ablation != "none"):
        fail("--reward-model is used as it is: it takes --labels 0, no --preferences and no --ablation")
    if not (args.labels or args.true_reward or args.preferences or args.reward_model):
        fail("--labels 0 leaves nothing to learn from: give --preferences or --reward-model")
    if not args.labels and (imperfect or args.ablation in ("random-queries", "no-online-queries")):
        fail("--labels 0 asks nothing: it takes no --teacher-* flags and no --ablation of the queries")
    _ = args.minibatch_size  # fails where the division is inexact
    if args.labels:
        batch = max(1, min(QUERY_BATCH, args.initial_labels, args.query_limit))  # pairs per initial occasion
        rows = batch * 4 * args.clip_length / args.num_envs + args.clip_length  # and the fresh rows that it needs
        initial_updates = math.ceil(args.initial_labels / batch) * math.ceil(rows / args.num_steps)
        updates = args.num_iterations - initial_updates  # that are left for the other labels
        limit = args.query_limit
        if args.asks_people:  # who are shown a batch at a time, and nothing at the last update
            limit, updates = min(limit, QUERY_BATCH), updates - 1
        if min(limit, updates) < 1 or args.labels - args.initial_labels > updates * limit:
            fail(
                f"--labels {args.labels} is more than {args.total_timesteps} steps can give with clips of "
                f"{args.clip_length} and a pool of {args.query_pool_steps}: ask for fewer, or train longer"
            )
    for source in (args.preferences, args.reward_model):
        if source and read_run(source)["args"]["env_id"] != args.env_id:
            fail(f"{source} is a run of {read_run(source)['args']['env_id']}, not of {args.env_id}")


def resolve_hardware(args: Args) -> None:
    """Replace "as fits this machine" by what that is, so that args.json and a resumed run name the same numbers."""
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    args.torch_threads = args.torch_threads or cores
    args.env_threads = args.env_threads or cores
    on_cuda = args.device.startswith("cuda")
    has_bf16 = (
        torch.cuda.is_bf16_supported(including_emulation=False)
        if on_cuda
        else torch.cpu.get_capabilities().get("avx512_bf16", False)
    )
    args.bf16 &= has_bf16
    if args.compile and not any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
        print("no C++ compiler found: the policy update runs uncompiled")
        args.compile = False


def parse_args(argv: list[str] | None = None) -> Args:
    """Parse the command line; W&B sweeps write `--oracle=True`, which tyro spells `--oracle`."""
    argv = sys.argv[1:] if argv is None else argv
    spelled = r"^--(?!no-)([\w-]+)=(True|False)$"
    argv = [re.sub(spelled, lambda m: ("--" if m[2] == "True" else "--no-") + m[1], arg) for arg in argv]
    args = tyro.cli(Args, args=argv, description=__doc__)
    address, _, token = args.label_server.partition("?token=")
    args.label_server = address.rstrip("/")
    if token:  # a secret: args.json and W&B keep the command line
        os.environ["LABEL_SERVER_TOKEN"] = token
        sys.argv = [re.sub(r"\?token=\S*", "", arg) for arg in sys.argv]
    given = {re.sub(r"^--(no-)?", "", arg.split("=")[0]).replace("-", "_") for arg in argv if arg.startswith("--")}
    source = args.resume or args.evaluate
    if args.resume and args.evaluate:
        fail("give one of --resume and --evaluate")
    if not source:
        check_args(args)
        return args
    kept = {"device", "torch_threads", "env_threads", "track", "wandb_project_name", "wandb_entity"}
    resuming = {"resume", "label_server", "wait_for_labels"}
    kept |= {"evaluate", "random", "eval_episodes", "seed"} if args.evaluate else resuming
    if given - kept:
        flag = min(given - kept).replace("_", "-")
        fail(f"--{'resume' if args.resume else 'evaluate'} takes its arguments from the run: --{flag} can't be changed")
    run = read_run(source)
    if run["script"] != SCRIPT:
        fail(f"{source} was written by {run['script']}, not by {SCRIPT}")
    if other := run["args"].keys() ^ asdict(args).keys():
        fail(f"{source} is of another version of {SCRIPT}: {min(other)} is not an argument of both")
    saved = Args(**run["args"])
    for name in given:
        setattr(saved, name, getattr(args, name))
    check_values(saved)
    return saved


# ----------------------------------------------------------------------------------------------------------------------
# Environment
# ----------------------------------------------------------------------------------------------------------------------
# What would give the reward away is painted black: score, lives, level (appendix A.2; Seaquest's oxygen stays).
# Not Space Invaders' lives: a digit that shows for 1 or 2 seconds at each start, where the cannon passes.
# Inclusive rows and columns of the raw 210 x 160 screen, whole bands where digits grow to the left.
HUD = {
    "beam_rider": [(10, 28, 0, 159), (32, 39, 20, 30), (183, 189, 32, 45)],
    "breakout": [(5, 14, 0, 159)],
    "enduro": [(161, 190, 48, 111)],
    "pong": [(1, 20, 0, 159)],
    "qbert": [(6, 12, 0, 70), (16, 27, 33, 48)],
    "seaquest": [(9, 16, 0, 104), (22, 29, 58, 80)],
    "space_invaders": [(10, 19, 0, 159)],
}


def game_name(env_id: str) -> str:
    """ "ALE/SpaceInvaders-v5" -> "space_invaders", the name of the ROM."""
    return gym.spec(env_id).kwargs["game"]


def hud_boxes(env_id: str, height: int = 84, width: int = 84) -> list[tuple[slice, slice]]:
    """The game's HUD on a screen of this size, rounded outward: a pixel mixed from any HUD pixel is hidden."""
    return [
        (
            slice(math.floor(top * height / 210), math.ceil((bottom + 1) * height / 210)),
            slice(math.floor(left * width / 160), math.ceil((right + 1) * width / 160)),
        )
        for top, bottom, left, right in HUD.get(game_name(env_id), [])
    ]


def observe(stacks: np.ndarray, history: np.ndarray, boxes: list[tuple[slice, slice]]) -> np.ndarray:
    """What the agent sees of ALE's stacks (N, 4, 84, 84), in place: boxes black, no empty frames after a reset.

    history: (N,), how many frames of the same episode came before the newest one, at most 3. ALE leaves the others of
    the stack zero. They take the episode's first frame instead, as Gym's FrameStack does: to a reward model that has
    seen hardly any empty frames they are worth plus or minus ten standard deviations, at every start of a game.
    """
    for rows, columns in boxes:
        stacks[..., rows, columns] = 0
    for i in np.flatnonzero(history < 3):
        stacks[i, : 3 - int(history[i])] = stacks[i, 3 - int(history[i])]
    return stacks


def make_envs(args: Args, num_envs: int, **kwargs) -> AtariVectorEnv:
    """ALE's own vector environment: (N, 4, 84, 84) grey, frameskip 4, maximum of two frames, up to 30 no-ops.

    No reward clipping and no end at a lost life: both are derived from the raw reward and the lives, in `train`.
    SAME_STEP: every row is a real step (the default inserts one with reward 0 after each end). FIRE is pressed at a
    reset, not after every lost life as CleanRL does: the agent has the button.
    """
    return AtariVectorEnv(
        game_name(args.env_id),
        num_envs,
        num_threads=min(args.env_threads, num_envs),
        repeat_action_probability=args.repeat_action_probability,
        reward_clipping=False,
        autoreset_mode=AutoresetMode.SAME_STEP,
        **kwargs,
    )


def derive_seed(*key: int) -> int:
    """A 31-bit seed from (run seed, purpose, index): purposes never share a stream."""
    return int(np.random.SeedSequence(key).generate_state(1)[0]) >> 1


def oracle_rewards_of(env_rewards, penalised, args: Args) -> np.ndarray:
    """What the oracle adds up: sign(reward) or the raw reward, less a penalty for each lost life or game over.

    env_rewards, penalised: (T, N); penalised is True where a life or the game was lost, not at time limits.
    """
    rewards = np.sign(env_rewards) if args.oracle_clip else env_rewards
    return (rewards - args.oracle_end_penalty * penalised).astype(np.float32)


# ----------------------------------------------------------------------------------------------------------------------
# Policy
# ----------------------------------------------------------------------------------------------------------------------
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

    def get_action_and_value(self, x, action=None, generator=None):
        hidden = self.hidden(x)
        logprobs = self.actor(hidden).log_softmax(-1)
        probs = logprobs.exp()
        if action is None:  # the race of exponential clocks draws from probs; multinomial would wait for the GPU
            action = (probs / torch.empty_like(probs).exponential_(generator=generator)).argmax(-1)
        logprob = logprobs.gather(-1, action.unsqueeze(-1)).squeeze(-1)
        return action, logprob, -(probs * logprobs).sum(-1), self.critic(hidden).flatten()


# ----------------------------------------------------------------------------------------------------------------------
# Reward model
# ----------------------------------------------------------------------------------------------------------------------
class Dropout(nn.Module):
    """nn.Dropout at a third of its time on a CPU: its Bernoulli numbers took a quarter of a reward-model step."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x):
        return x * (torch.rand_like(x, dtype=torch.float32) >= self.p) / (1 - self.p) if self.training else x


class RewardEnsemble(nn.Module):
    """All members of the ensemble in one batched pass (sections 2.2.3 and A.2).

    Per member: convolutions 7x7/3, 5x5/2, 3x3/1, 3x3/1 of 16 channels, each with batch norm and leaky ReLU, the last
    two with dropout; then 64 units and one output. The first convolution is dense (all members read the same frames),
    the others are grouped by member. In: (B, 4, 84, 84) uint8. Out: (B, M), a raw reward per member.
    """

    def __init__(self, members: int, dropout: float, l2_coef: float, bf16: bool):
        super().__init__()
        self.members, self.bf16 = members, bf16
        layers, channels_in, groups = [], 4, 1
        for kernel, stride in ((7, 3), (5, 2), (3, 1), (3, 1)):
            layers += [
                # no bias: batch norm would take it out again
                nn.Conv2d(channels_in, 16 * members, kernel, stride, groups=groups, bias=False),
                nn.BatchNorm2d(16 * members),
                nn.LeakyReLU(0.01, inplace=True),
                *([Dropout(dropout)] if kernel == 3 else []),
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
        self.register_buffer("renewals", torch.zeros((), dtype=torch.int64))
        self.register_buffer("l2_coef", torch.full((members,), l2_coef))
        self.register_buffer("decisive", torch.zeros(2, 3, members))  # running `decisive_sums`

    def forward(self, x):
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            h = self.network(x.to(dtype, memory_format=torch.channels_last).div_(255))
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

    def normalise(self, raw, floor: float, reward_std: float) -> torch.Tensor:
        """(B, M) raw -> (B,) reward: each member normalised, then averaged, then scaled to reward_std (section 2.2.1).

        The average of members that don't agree has less than unit std, 1 / sqrt(M) if they are independent; that much
        is scaled back up. What is smaller still is the floor's doing: an uninformed model pays little.
        """
        average = ((raw - self.mean) / self.std.clamp(min=floor)).mean(1)
        return reward_std * average / self.average_std.clamp(min=1 / math.sqrt(self.members))

    @torch.no_grad()
    def renew_statistics(self, x, floor: float):
        """Mean and std of each member, and std of their average, over recent rows (B, 4, 84, 84).

        The means are not smoothed: nothing in the loss holds a member's level, which wanders by half a std per update.
        A mean that lags is an offset in the reward, and GAE turns that into a slope over each rollout.
        """
        raw = self.score(x)
        self.mean.copy_(raw.mean(0))
        self.std.lerp_(raw.std(0), 0.5 if self.renewals else 1.0)
        average = ((raw - self.mean) / self.std.clamp(min=floor)).mean(1)
        self.average_std.lerp_(average.std(), 0.5 if self.renewals else 1.0)
        self.renewals += 1


# ----------------------------------------------------------------------------------------------------------------------
# Preferences
# ----------------------------------------------------------------------------------------------------------------------
def clip_shapes(length: int) -> dict:
    """What is kept of a clip of L steps: its frames and the three before them, and each step's history.

    history: how many frames of the same episode lie before a row, at most 3.
    """
    return {"frames": ((length + 3, 84, 84), "uint8"), "history": ((length,), "uint8")}


def model_inputs(clips: dict) -> torch.Tensor:
    """n clips -> what the reward model reads of their rows, (n L, 4, 84, 84): the stacks that `observe` gave.

    What lies before a reset is replaced by the episode's first frame: an unfold alone would show the last episode's
    frames there.
    """
    frames, history = clips["frames"], clips["history"]
    n, length = history.shape
    age = torch.arange(3, -1, -1, device=frames.device)  # of the four frames in a stack, newest last
    rows = torch.arange(3, length + 3, device=frames.device)[:, None] - torch.minimum(age, history.unsqueeze(-1).long())
    return frames[torch.arange(n, device=frames.device)[:, None, None], rows].flatten(0, 1)


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

    def add(self, **streams):
        """Append a rollout: (T, N, ...) of every stream. Only the newest rows fit."""
        for name, stream in self.streams.items():
            new = torch.as_tensor(streams[name])
            at = (torch.arange(len(new), device=stream.device) + self.count)[-self.rows :] % self.rows
            stream[at] = new[-self.rows :].to(stream)
        self.count += len(new)

    def first_start(self) -> int:
        """The oldest row whose stack can still be built: the three frames before it are there, or never existed."""
        return max(0, self.count - self.rows + 3)

    def gather(self, name: str, starts: np.ndarray, first: int, last: int) -> torch.Tensor:
        """Rows start+first ... start+last-1 of a stream. starts: (n, 2) of (environment, row)."""
        stream = self.streams[name]
        envs, rows = torch.as_tensor(starts, device=stream.device).unbind(1)
        return stream[(rows[:, None] + torch.arange(first, last, device=stream.device)) % self.rows, envs[:, None]]

    def clips(self, starts: np.ndarray, length: int) -> dict:
        """Copies of the segments at starts, (n, ...) as in `clip_shapes`."""
        return {
            "frames": self.gather("frames", starts, -3, length),
            "history": self.gather("history", starts, 0, length),
        }


def sample_pairs(rng, num: int, first: int, last: int, num_envs: int) -> np.ndarray:
    """Pairs of segments, (num, 2, 2) of (environment, start row); every start in first...last is equally likely."""
    envs = rng.integers(num_envs, size=(num, 2))
    return np.stack([envs, rng.integers(first, last + 1, size=(num, 2))], -1)


def take_disjoint(pairs: np.ndarray, num: int, length: int) -> np.ndarray:
    """The first num pairs of which no row is used twice, neither within a pair nor between pairs; (<= num, 2, 2)."""
    chosen, taken = [], set()
    for pair in pairs.tolist():
        rows = {(env, start + t) for env, start in pair for t in range(length)}
        if len(chosen) < num and len(rows) == 2 * length and not rows & taken:
            chosen.append(pair)
            taken |= rows
    return np.array(chosen, dtype=np.int64).reshape(-1, 2, 2)


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


def target_loss(sums, returns):
    """Ablation `target`: both clips' sums regressed on the true ones, standardised. (B, 2, M), (B, 2) -> (B, M)."""
    return (sums - returns.unsqueeze(-1)).square().mean(1)


def label_losses(sums, mu, returns, ablation: str):
    """Loss of each label and member, (B, M). sums: (B, 2, M); mu: (B,); returns: (B, 2)."""
    return target_loss(sums, returns) if ablation == "target" else preference_loss(sums[:, 0] - sums[:, 1], mu)


def disagreement(sums, ablation: str):
    """Variance over members of the predicted preference, or difference for `target`; (B, 2, M) -> (B,)."""
    difference = sums[:, 0] - sums[:, 1]
    return (difference if ablation == "target" else preference_probability(difference)).var(-1, correction=0)


def bootstrap_weights(label_ids, members: int) -> np.ndarray:
    """Poisson(1) weight of each label for each member, (n, M): the bootstrap of a set that still grows.

    Depends on nothing but (label, member). Weight 0, of probability 1/e, holds the label out for that member for
    ever (section 2.2.3), whether it is saved, loaded or leaves the window.
    """
    draws = [[np.random.default_rng((i, m)).poisson(1.0) for m in range(members)] for i in label_ids]
    return np.array(draws, dtype=np.float32).reshape(-1, members)


def teacher_answers(rng, rewards, recent_sums, args: Args):
    """Answers of the oracle, or of an imperfect teacher after B-Pref (Lee et al. 2021).

    rewards: (n, 2, L), what the oracle adds up. recent_sums: the last 1,000 segment sums. Out: mu (n,), the
    probability that clip 0 is preferred: 1, 0 or 1/2 for "equal"; and skipped (n,). Equal (weighted) sums are ties.
    B-Pref's thresholds are a share of the mean return, which turns around where rewards are negative; here `equal`
    is a share of the sums' standard deviation, and `skip` is a quantile of the sums.
    """
    sums = rewards.sum(-1)
    weighted = rewards * args.teacher_gamma ** np.arange(rewards.shape[-1] - 1, -1, -1)
    difference = np.round(weighted[:, 0].sum(-1) - weighted[:, 1].sum(-1), 5)  # 0.9 and 1 - 0.1 are the same
    if math.isinf(args.teacher_beta):
        prefers_first = difference > 0
    else:
        p = 0.5 * (1 + np.tanh(0.5 * args.teacher_beta * difference))  # sigmoid that can't overflow
        prefers_first = rng.random(len(sums)) < p
    mu = np.where(difference == 0, 0.5, prefers_first)
    flipped = rng.random(len(sums)) < args.teacher_mistake
    mu = np.where(flipped, 1 - mu, mu)
    recent = recent_sums if len(recent_sums) else [math.nan]  # no sum lies below, before the first answers
    mu = np.where(np.abs(sums[:, 0] - sums[:, 1]) < args.teacher_equal * np.std(recent), 0.5, mu)
    skipped = (sums < np.quantile(recent, args.teacher_skip)).all(1) & (args.teacher_skip > 0)
    return mu.astype(np.float32), skipped


def label_schedule(step: int, total_steps: int, initial: int, budget: int) -> int:
    """Labels due after `step` environment steps: the rate falls like 1 / (T + tau), tau = total / 10 (A.1, A.2)."""
    return int(initial + (budget - initial) * math.log1p(10 * step / max(total_steps, 1)) / math.log(11) + 1e-6)


def label_shapes(clips: dict) -> dict:
    """A label: two clips, answer mu, the oracle's two sums, and (environment, row) of both in the run that asked."""
    of_clips = {name: ((2, *shape), dtype) for name, (shape, dtype) in clips.items()}
    return of_clips | {"mu": ((), "float32"), "returns": ((2,), "float32"), "segments": ((2, 2), "int64")}


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


class Preferences:
    """The newest labels, each with copies of its two clips, and the files that hold all labels ever given.

    A shard preferences/<first label>.npz is written once, when its answers come in, and never changed: the arrays of
    `label_shapes`, (n, ...) each. `count` labels were added so far; label i has id i, and lies at i % capacity here.
    """

    def __init__(self, folder: Path, capacity: int, clips: dict, members: int, device):
        self.folder, self.capacity, self.members, self.clips, self.count = folder, capacity, members, clips, 0
        self.arrays = {
            name: torch.as_tensor(np.empty((capacity, *shape), dtype), device=device)
            for name, (shape, dtype) in label_shapes(clips).items()
        }
        self.weights = torch.empty(capacity, members, device=device)
        self.known: dict[frozenset, int] = {}  # pairs of segments asked about -> their label, -1: not answered yet
        self.mu: list[float] = []  # of all labels ever given, NaN: taken back

    def __len__(self):
        return min(self.count, self.capacity)

    def add(self, answers: dict, save: bool = True):
        """Append n labels (numpy, shapes as in a shard) to the disk and to the window."""
        n = len(answers["mu"])
        if save and n:
            write_whole(self.folder / f"{self.count:08d}.npz", lambda file: np.savez_compressed(file, **answers))
        ids = np.arange(self.count, self.count + n)[-self.capacity :]
        at = torch.as_tensor(ids % self.capacity, device=self.weights.device)
        for name, array in self.arrays.items():
            array[at] = torch.as_tensor(answers[name][-len(ids) :]).to(array)
        self.weights[at] = torch.as_tensor(bootstrap_weights(ids, self.members)).to(self.weights)
        self.remember(answers["segments"], self.count)
        self.mu += answers["mu"].tolist()
        self.count += n
        for i in np.flatnonzero(np.isnan(answers["mu"])):
            self.retract(self.count - n + int(i))

    def retract(self, label: int):
        """Take a label back: an empty file says so for ever, and nothing is trained or judged on it any more: a tie,
        which is not decisive, of weight 0."""
        (self.folder / f"{label:08d}.retracted").touch()
        self.mu[label] = math.nan
        if label >= self.count - self.capacity:
            self.arrays["mu"][label % self.capacity] = 0.5
            self.weights[label % self.capacity] = 0

    def restore(self, count: int, by_people: bool = False):
        """Read the labels that a checkpoint counts back from the disk. Later ones are removed where the oracle gave
        them, since the same will come again, and kept where people did."""
        for answers in read_shards(self.folder, self.clips, math.inf if by_people else count):
            self.add(answers, save=False)
        if self.count < count:
            fail(f"{self.folder} holds {self.count} of the {count} labels that the checkpoint counts")
        for path in self.folder.iterdir():
            if path.suffix == ".tmp" or (path.stem.isdigit() and int(path.stem) >= self.count):
                path.unlink()

    def remember(self, pairs: np.ndarray, label: int | None = None):
        """These pairs of segments, (n, 2, 2), were asked about; labels from `label` on, if they are answered."""
        for i, pair in enumerate(pairs.tolist()):
            self.known[frozenset(map(tuple, pair))] = -1 if label is None else label + i

    def standing(self, pair: np.ndarray) -> int | None:
        """The label of a pair of segments, (2, 2); None where there is none, or it was taken back."""
        label = self.known.get(frozenset(map(tuple, pair.tolist())), -1)
        return label if label >= 0 and math.isfinite(self.mu[label]) else None

    def asked(self, pairs: np.ndarray) -> np.ndarray:
        """(n,) True where this pair of segments, in either order, was asked about already."""
        return np.array([frozenset(map(tuple, pair)) in self.known for pair in pairs.tolist()], dtype=bool)

    def batch(self, at):
        """Labels at these places of the window: model inputs (2 n L, ...), mu, returns, weights.

        The returns are standardised over the window: the scale of what is fitted to them is free, and their mean, for
        which the ensemble has no bias, is the same constant in every step.
        """
        at = torch.as_tensor(at, device=self.weights.device)
        clips = {name: self.arrays[name][at].flatten(0, 1) for name in self.clips}
        returns = self.arrays["returns"][: len(self)]
        returns = (self.arrays["returns"][at] - returns.mean()) / returns.std().clamp(min=1e-6)
        return model_inputs(clips), self.arrays["mu"][at], returns, self.weights[at]


def read_shards(folder: Path, clips: dict, until: float = math.inf):
    """Yield the arrays of each shard in a run's preferences/ that begins before label `until`; exit code 2 if unfit.

    mu is NaN where somebody took an answer back.
    """
    shapes, label = label_shapes(clips), 0
    for path in sorted(path for path in folder.glob("*.npz") if path.stem.isdigit() and int(path.stem) < until):
        if int(path.stem) != label:
            fail(f"{folder} has lost the file of label {label}")
        try:
            with np.load(path, allow_pickle=False) as shard:
                arrays = {name: shard[name] for name in shapes}
        except Exception as error:
            fail(f"{path} can't be read ({error.__class__.__name__}): is it truncated?")
        if any(arrays[name].shape != (*arrays["mu"].shape[:1], *shape) for name, (shape, _) in shapes.items()):
            fail(f"{path} holds other clips than this run's: {clips}")
        for i in range(len(arrays["mu"])):
            if (folder / f"{label + i:08d}.retracted").exists():
                arrays["mu"][i] = np.nan
        label += len(arrays["mu"])
        yield arrays


# ----------------------------------------------------------------------------------------------------------------------
# Policy maths
# ----------------------------------------------------------------------------------------------------------------------
def compute_gae(rewards, values, next_values, dones, gamma: float, gae_lambda: float):
    """Generalized advantage estimation; all (T, N).

    next_values[t]: value of the state that row t led to; the caller puts 0 after a true end and V(final_obs) at a
    time limit. dones[t]: 1 where row t is the last of its episode; the trace stops there. Out: advantages, returns.
    """
    deltas = rewards + gamma * next_values - values
    advantages = torch.empty_like(deltas)
    lastgaelam = torch.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        advantages[t] = lastgaelam = deltas[t] + gamma * gae_lambda * (1 - dones[t]) * lastgaelam
    return advantages, advantages + values


def policy_loss(newlogprob, entropy, newvalue, logprobs, advantages, returns, values, args: Args):
    """PPO's clipped loss on a minibatch; all (B,). Out: the loss, and a dict of tensors to log."""
    logratio = newlogprob - logprobs
    ratio = logratio.exp()
    if args.norm_adv:
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


def minibatch_loss(agent: Agent, args: Args, obs, actions, *rest):
    """Forward pass and loss of one minibatch, apart from `update_policy` so that it can be compiled."""
    _, newlogprob, entropy, newvalue = agent.get_action_and_value(obs, actions)
    return policy_loss(newlogprob, entropy, newvalue, *rest, args)


# ----------------------------------------------------------------------------------------------------------------------
# Updates
# ----------------------------------------------------------------------------------------------------------------------
def update_policy(agent, optimizer, loss_function, rollout, rng, args: Args) -> dict:
    """Passes in minibatches over a rollout: observations, actions, logprobs, advantages, returns and values, each
    (T N, ...). None after one that went further than target_kl. Out: means of what was logged, as tensors."""
    *_, b_returns, b_values = rollout
    logged = []
    for _ in range(args.update_epochs):
        b_inds = torch.as_tensor(rng.permutation(len(b_values)), device=b_values.device)
        for mb_inds in b_inds.split(args.minibatch_size):
            loss, info = loss_function(agent, args, *(b[mb_inds] for b in rollout))
            optimizer.zero_grad()
            loss.backward()
            info["grad_norm"] = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
            optimizer.step()
            logged.append(info)
        approx_kl = torch.stack([info["approx_kl"] for info in logged[-args.num_minibatches :]]).mean()
        if args.target_kl is not None and approx_kl > args.target_kl:
            break
    means = {name: torch.stack([info[name] for info in logged]).mean() for name in logged[0]}
    means["epochs"] = torch.tensor(len(logged) / args.num_minibatches)
    return means | {"explained_variance": 1 - (b_returns - b_values).var() / b_returns.var()}


@torch.no_grad()
def decisive_sums(ensemble: RewardEnsemble, preferences: Preferences, at, args: Args) -> torch.Tensor:
    """Over the decisive labels at these places: summed loss, right answers and labels, (2, 3, M).

    [0] over the labels held out for a member, [1] over those it is fitted to. Evaluation mode. Ties are left out:
    they put ln 2 into both and hide that a member learns its labels by heart.
    """
    stacks, mu, returns, weights = preferences.batch(at)
    sums = ensemble.score(stacks).view(len(mu), 2, -1, ensemble.members).sum(2)
    losses = label_losses(sums, mu, returns, args.ablation)
    right = ((sums[:, 0] > sums[:, 1]) == (mu > 0.5).unsqueeze(-1)).float()
    decisive = (mu != 0.5).unsqueeze(-1)
    masks = torch.stack([(weights == 0) & decisive, (weights > 0) & decisive])  # (2, B, M)
    return (torch.stack([losses, right, torch.ones_like(losses)]) * masks.unsqueeze(1)).sum(2)


def held_out(ensemble: RewardEnsemble, preferences: Preferences, args: Args) -> tuple[float, float]:
    """Loss and accuracy on the window's decisive labels, each member on those held out for it; mean over members."""
    parts = torch.arange(len(preferences)).split(args.reward_minibatch_size)
    loss, right, labels = sum(decisive_sums(ensemble, preferences, at, args) for at in parts)[0]
    return (loss / labels).nanmean().item(), (right / labels).nanmean().item()


def adapt_l2(ensemble: RewardEnsemble) -> None:
    """Move each member's weight decay by 5 % towards a held-out / training loss within [1.1, 1.5] (section 2.2.3).

    The paper gives neither step nor start nor bounds. Few labels, seen hundreds of times, keep the ratio above 1.5, so
    that the decay rests at its upper bound: one of 1e-2 or 1e-1 costs what the model has learned.
    """
    (held_out_loss, _, held_out_labels), (train_loss, _, train_labels) = ensemble.decisive
    ratio = (held_out_loss / held_out_labels) / (train_loss / train_labels)  # NaN while a side is empty: no move
    factor = torch.where(ratio > 1.5, 1.05, torch.where(ratio < 1.1, 1 / 1.05, 1.0))
    ensemble.l2_coef.mul_(factor).clamp_(1e-6, 1e-3)


def update_reward_model(ensemble, optimizer, preferences, minibatches: int, rng, args: Args) -> dict:
    """Train on minibatches drawn from the label window. Out: means of what was logged, as tensors.

    Member losses are summed, each normalised by its own weights: with their mean, Adam aside, every member would
    learn at a third of the rate. Both clips of a pair are in one batch, so batch norm can't tell them apart.
    """
    logged = []
    for minibatch in range(minibatches):
        at = rng.integers(len(preferences), size=args.reward_minibatch_size)
        stacks, mu, returns, weights = preferences.batch(at)
        ensemble.train()
        sums = ensemble(stacks).view(len(mu), 2, -1, ensemble.members).sum(2)
        losses = label_losses(sums, mu, returns, args.ablation)
        loss = ((losses * weights).sum(0) / weights.sum(0).clamp(min=1)).sum()
        decay = sum((weight**2).sum(1) for weight in ensemble.weights())  # (M,)
        optimizer.zero_grad()
        (loss + (ensemble.l2_coef * decay).sum()).backward()
        grad_norm = nn.utils.get_total_norm([weight.grad for weight in ensemble.parameters()])
        optimizer.step()
        logged.append(torch.stack([loss.detach() / ensemble.members, grad_norm]))
        if minibatch % 4 == 0:
            at = rng.integers(len(preferences), size=args.reward_minibatch_size)
            checked = decisive_sums(ensemble, preferences, at, args)
            ensemble.decisive.mul_(0.98).add_(checked)  # reaches 50 checks back: 200 minibatches
            if args.ablation != "no-regularization":
                adapt_l2(ensemble)
    (held_out_loss, held_out_right, held_out_labels), (train_loss, _, train_labels) = ensemble.decisive
    mean_loss, mean_grad_norm = torch.stack(logged).mean(0)
    return {
        "loss": mean_loss,
        "grad_norm": mean_grad_norm,
        "loss_heldout": (held_out_loss / held_out_labels).nanmean(),
        "loss_train": (train_loss / train_labels).nanmean(),
        "accuracy_heldout": (held_out_right / held_out_labels).nanmean(),
        "l2_coef": ensemble.l2_coef.mean(),
    }


def pretrain(ensemble, optimizer, preferences, rng, args: Args) -> None:
    """Fit the ensemble before the first policy update, until the decisive held-out loss has stopped falling."""
    best, stale, presented = math.inf, 0, 0
    while stale < 4 and presented < args.pretrain_pairs:
        update_reward_model(ensemble, optimizer, preferences, 32, rng, args)
        presented += 32 * args.reward_minibatch_size
        loss, accuracy = held_out(ensemble, preferences, args)
        tqdm.write(f"pre-training: {presented:,} pairs, held-out loss {loss:.3f}, accuracy {accuracy:.3f}")
        sys.stdout.flush()
        best, stale = (loss, 0) if loss < best else (best, stale + 1)


def labels_scheduled(progress, args: Args) -> int:
    """Labels due by now; the paper's clock starts with the policy's training."""
    if progress.paid_from < 0:
        return args.initial_labels
    steps, total = (x - progress.paid_from for x in (progress.global_step, args.num_iterations * args.batch_size))
    if args.human:
        total *= 0.95  # people need some time for the last ones
    return label_schedule(min(steps, total), total, args.initial_labels, args.labels)


def labels_due(progress, pool: SegmentPool, last: bool, args: Args) -> tuple[int, int]:
    """How many labels to ask for now, and the first row that their segments may come from.

    While initial labels are missing, segments come from fresh rows only, twice as many as they fill, so that they
    hardly overlap with earlier ones. 0 until a batch is due, but for what is left at the last update.
    """
    first = max(pool.first_start(), progress.shown_from)
    missing = args.initial_labels - progress.labels_used - progress.open
    if missing > 0:
        wanted, first = missing, max(first, progress.fresh_from)
        enough = min(QUERY_BATCH, args.query_limit, missing)
    else:
        wanted = labels_scheduled(progress, args) - progress.labels_used - progress.open
        left, tenth = args.labels - progress.labels_used - progress.open, (args.labels - args.initial_labels) // 10
        enough = 1 if last else max(1, min(QUERY_BATCH, args.query_limit, left, tenth))
    room = max(0, pool.count - first - args.clip_length) * args.num_envs // (4 * args.clip_length)
    due = min(wanted, room)
    return (due if due >= enough else 0), first


def select_pairs(ensemble, pool: SegmentPool, preferences, num: int, first: int, rng, args: Args) -> np.ndarray:
    """Pairs of segments to ask about, (<= num, 2, 2) of (environment, start row), none of a row before `first`.

    With an ensemble, the most disputed of 10 x num candidates (section 2.2.4); without, the first of as many. All
    pairs are equally likely, but where they must be scored, a segment stands in four of them: a quarter of the work.
    """
    length, uses = args.clip_length, 1 if ensemble is None else 4
    starts = sample_pairs(rng, math.ceil(QUERY_CANDIDATES * num / uses), first, pool.count - length, args.num_envs)
    starts = starts.reshape(-1, 2)
    order = np.concatenate([rng.permutation(len(starts)) for _ in range(uses)]).reshape(-1, 2)  # into `starts`
    order = order[~preferences.asked(starts[order])]
    if ensemble is not None and len(order):
        parts = np.array_split(starts, math.ceil(len(starts) / 32))
        raw = torch.cat([ensemble.score(model_inputs(pool.clips(part, length))) for part in parts])
        sums = raw.view(len(starts), length, -1).sum(1)[torch.as_tensor(order, device=raw.device)]
        order = order[disagreement(sums, args.ablation).argsort(descending=True, stable=True).cpu().numpy()]
    return take_disjoint(starts[order], num, length)


# ----------------------------------------------------------------------------------------------------------------------
# Run state
# ----------------------------------------------------------------------------------------------------------------------
@dataclass
class Progress:
    """What a run counts; saved in every checkpoint."""

    iteration: int = 0  # updates done
    global_step: int = 0
    labels_used: int = 0  # answers stored, ties included
    labels_loaded: int = 0
    asked: int = 0
    skipped: int = 0
    ties: int = 0
    open: int = 0  # pairs that wait for people's answers
    run_id: str = ""  # of this run, for the label server
    last_event: int = 0  # the newest of the label server's events that is counted here
    answered: dict[str, int] = field(default_factory=dict)  # query of the label server -> label, -1 for "can't tell"
    shown_from: int = 0  # first row of the streams that people can be shown
    fresh_from: int = 0  # first row of the streams that no initial pair could have come from yet
    paid_from: int = -1  # global_step at which the predictor began to pay the policy; -1: not yet
    pairs_presented: int = 0  # since then
    true_reward_var: float = 0.0  # running variance of the clipped score, for --true-reward
    wall_seconds: float = 0.0
    timed_steps: int = 0  # steps and seconds of updates that trained the policy, without compilation and evaluation
    timed_seconds: float = 0.0
    recent_sums: list[float] = field(default_factory=list)  # oracle's, of the last 1,000 segments asked about
    recent_returns: list[float] = field(default_factory=list)  # of the last 20 finished episodes
    policy_log: dict = field(default_factory=dict)  # of the last update of each model
    reward_log: dict = field(default_factory=dict)


def git_commit() -> str | None:
    """Commit of this file's repository, with a "+" where this file is not as in it; None outside of one."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "--", __file__], capture_output=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if changed else "")


def make_run_dir(args: Args) -> Path:
    """Make the run's own directory and write args.json: resolved arguments, versions, commit, hardware."""
    name = f"{args.env_id.replace('/', '-')}__{SCRIPT}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    gpu = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else "no GPU used"
    run = {
        "script": SCRIPT,
        "args": asdict(args),
        "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": {name: version(name) for name in PACKAGES},
        "commit": git_commit(),
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, {gpu}, Python {platform.python_version()}",
    }
    for attempt in itertools.count(2):  # two agents of a sweep may start in the same second
        run_dir = Path(args.runs_dir) / (name if attempt == 2 else f"{name}-{attempt}")
        try:
            (run_dir / "preferences").mkdir(parents=True)
            (run_dir / "args.json").write_text(json.dumps(run, indent=2))
            return run_dir
        except OSError as error:
            if not isinstance(error, FileExistsError) or not run_dir.is_dir():
                fail(f"can't write to {run_dir}: {error.strerror}")


def read_run(run_dir: str) -> dict:
    """A run directory's args.json; ends with exit code 2 if it is missing or broken."""
    try:
        run = json.loads((Path(run_dir) / "args.json").read_text())
        _ = run["script"], run["commit"], run["args"]["env_id"]
        return run
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"{run_dir} is not a run directory ({error.__class__.__name__} at args.json)")


def read_checkpoint(run_dir: str) -> dict:
    """checkpoint.pt (tensors, numbers and strings only: nothing in it can run code), on the CPU."""
    try:
        checkpoint = torch.load(Path(run_dir) / "checkpoint.pt", map_location="cpu", weights_only=True)
        _ = Progress(**checkpoint["progress"])
        return checkpoint
    except FileNotFoundError:
        fail(f"{run_dir} has no checkpoint.pt yet")
    except Exception as error:  # a truncated file fails in as many ways as it has bytes
        fail(f"{run_dir}/checkpoint.pt can't be read ({error.__class__.__name__}): truncated, or of another version?")


def load_reward_model(run_dir: str, checkpoint: dict, args: Args) -> RewardEnsemble:
    """The learned reward of a run, normaliser included."""
    state = checkpoint["ensemble"]
    if not state or not state["renewals"]:
        fail(f"{run_dir} has learned no reward model")
    ensemble = RewardEnsemble(len(state["mean"]), args.dropout, args.l2_coef, args.bf16)
    ensemble.load_state_dict(state)
    return ensemble.to(args.device, memory_format=torch.channels_last)


def params_sha256(*modules: nn.Module) -> str:
    """Hash of all parameters and buffers, in the order of their names."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def evaluate(agent: Agent | None, ensemble: RewardEnsemble | None, args: Args, seed: int, record: int = 0) -> dict:
    """Play args.eval_episodes episodes, one per environment, with sampled actions, for the true, unclipped score.

    Own environments and generators: training is not moved by it. agent None plays at random. Of environment 0, the
    first `record` steps come back too: screens of a twin with the same seed and actions, as (step, RGB), and
    env_rewards and pred_rewards.
    """
    envs = make_envs(args, args.eval_episodes)
    twin = make_envs(args, 1, grayscale=False, img_height=210, img_width=160, stack_num=1)
    boxes, num_actions = hud_boxes(args.env_id), int(envs.single_action_space.n)
    generator = torch.Generator(args.device).manual_seed(derive_seed(seed, 1))
    frames, screen = envs.reset(seed=seed)[0], twin.reset(seed=seed)[0]
    playing, returns = np.ones(args.eval_episodes, dtype=bool), np.zeros(args.eval_episodes)
    history = np.zeros(args.eval_episodes)
    stacks, screens, env_rewards = [], [], []
    while playing.any():
        obs = torch.as_tensor(observe(frames, history, boxes), device=args.device)
        if agent is None:
            action = torch.randint(num_actions, (len(obs),), device=args.device, generator=generator)
        else:
            action = agent.get_action_and_value(obs, generator=generator)[0]
        action = action.cpu().numpy()
        frames, rewards, terminated, truncated, _ = envs.step(action)
        returns += rewards * playing
        history += 1  # no reset matters here: an environment is done after one episode
        if playing[0] and len(screens) < record:
            stacks.append(obs[0].clone())
            screens.append((len(screens), screen[0, 0]))
            env_rewards.append(float(rewards[0]))
            screen = twin.step(action[:1])[0]
        playing &= ~(terminated | truncated)
    pred_rewards = []
    if ensemble is not None and stacks:
        raw = ensemble.score(torch.stack(stacks))
        pred_rewards = ensemble.normalise(raw, args.reward_std_floor, args.reward_std).tolist()
    return {
        "returns": returns, "screens": screens, "fps": 15.0, "env_rewards": env_rewards, "pred_rewards": pred_rewards,
    }  # fmt: skip


def draw_episode(result: dict, folder: Path, title: str) -> None:
    """Figure and short video (VP8 .webm) of a recorded episode, with predicted beside true reward."""
    import cv2
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    series = {"true": np.array(result["env_rewards"])}
    if result["pred_rewards"]:
        series = {"predicted": np.array(result["pred_rewards"])} | series
    plt.switch_backend("Agg")
    figure, axes = plt.subplots(len(series), 1, figsize=(9, 5), sharex=True, squeeze=False, layout="constrained")
    for ax, (name, values) in zip(axes[:, 0], series.items(), strict=True):
        ax.plot(values, linewidth=0.8)
        ax.set_ylabel(f"{name} reward")
    axes[0, 0].set_title(title)
    axes[-1, 0].set_xlabel("step")
    figure.savefig(folder / "episode.png", dpi=120)
    plt.close(figure)

    if not result["screens"]:
        return
    # Left half: the game. Right half: the last 100 steps of each reward, zero in the middle of its box.
    with open(os.devnull, "w") as null:  # OpenCV's remark on the codec's tag goes to file descriptor 2
        stderr = os.dup(2)
        os.dup2(null.fileno(), 2)
        codec = cv2.VideoWriter_fourcc(*"VP80")
        writer = cv2.VideoWriter(str(folder / "episode.webm"), codec, result["fps"], (640, 420))
        os.dup2(stderr, 2)
        os.close(stderr)
    for t, screen in result["screens"]:
        canvas = np.full((420, 640, 3), 24, np.uint8)
        canvas[:, :320] = cv2.resize(screen[..., ::-1], (320, 420), interpolation=cv2.INTER_NEAREST)
        for row, (name, values) in enumerate(series.items()):
            zero, colour = 120 + 200 * row, [(255, 160, 60), (60, 160, 255)][row]
            window = values[max(0, t - 99) : t + 1]
            heights = 75 * window / max(np.abs(values).max(), 1e-6)
            points = np.stack([340 + 2.8 * np.arange(len(window)), zero - heights], 1)
            cv2.line(canvas, (340, zero), (620, zero), (80, 80, 80), 1)
            cv2.polylines(canvas, [points.astype(np.int32)], False, colour, 1, cv2.LINE_AA)
            text = f"{name} reward {values[t]:+.3f}"
            cv2.putText(canvas, text, (340, zero - 85), cv2.FONT_HERSHEY_SIMPLEX, 0.45, colour, 1, cv2.LINE_AA)
        writer.write(canvas)
    writer.release()


def evaluate_run(args: Args) -> dict:
    """--evaluate: score, figure and video of a run's policy, or of the random policy, into the run's directory."""
    run_dir, checkpoint = Path(args.evaluate), read_checkpoint(args.evaluate)
    resolve_hardware(args)
    torch.set_num_threads(args.torch_threads)
    agent = None
    if not args.random:
        agent = Agent(len(checkpoint["agent"]["actor.bias"]), args.bf16)
        agent.load_state_dict(checkpoint["agent"])
        agent.to(args.device, memory_format=torch.channels_last)
    learned = checkpoint["ensemble"] and checkpoint["ensemble"]["renewals"]
    ensemble = load_reward_model(args.evaluate, checkpoint, args) if learned else None
    folder = run_dir / ("random" if args.random else "evaluation")
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        fail(f"can't write to {folder}: {error.strerror}")
    result = evaluate(agent, ensemble, args, derive_seed(args.seed, 15), record=1000)
    returns = result["returns"]
    draw_episode(result, folder, f"{args.env_id}, {folder.name} of {run_dir.name}")
    row = {
        "script": SCRIPT,
        "env_id": args.env_id,
        "feedback": "random" if args.random else args.feedback,
        "seed": args.seed,
        "global_step": 0 if args.random else checkpoint["progress"]["global_step"],
        "final_return_mean": float(returns.mean()),
        "final_return_std": float(returns.std()),
        "final_episodes": len(returns),
        "commit": git_commit(),
    }
    (folder / "summary.json").write_text(json.dumps(row, indent=2))
    print(f"return {returns.mean():.1f} +- {returns.std():.1f} over {len(returns)} episodes; see {folder}")
    return row


def reward_correlation(pool: SegmentPool, progress, args: Args) -> float:
    """Pearson correlation of paid and oracle's sums over 500 segments of the pool; NaN where one is constant."""
    first = max(pool.first_start(), progress.paid_from // args.num_envs)  # nothing was predicted for earlier rows
    last = pool.count - args.clip_length
    if last < first:
        return math.nan
    rng = np.random.default_rng(progress.iteration)  # of its own: logging does not move training
    starts = sample_pairs(rng, 500, first, last, args.num_envs)[:, 0]
    sums = [pool.gather(name, starts, 0, args.clip_length).sum(1) for name in ("pred_rewards", "oracle_rewards")]
    return torch.corrcoef(torch.stack(sums))[0, 1].item()


# ----------------------------------------------------------------------------------------------------------------------
# Human labels
# ----------------------------------------------------------------------------------------------------------------------
def decode_screens(screens: list[bytes]) -> np.ndarray:
    """What `train` keeps of each step for people, (L, 210, 160, 3) RGB, its HUD black."""
    return np.stack([np.frombuffer(zlib.decompress(screen), np.uint8).reshape(210, 160, 3) for screen in screens])


def sprite_sheet(frames: np.ndarray) -> bytes:
    """The frames of a clip, (L, H, W, 3) RGB, on one WebP image, as SHEET says."""
    import cv2

    columns, (height, width) = SHEET["columns"], frames.shape[1:3]
    rows = math.ceil(len(frames) / columns)
    cells = np.zeros((rows * columns, height, width, 3), np.uint8)
    cells[: len(frames)] = frames[..., ::-1]  # OpenCV's order
    image = cells.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, columns * width, 3)
    return cv2.imencode(".webp", image, [cv2.IMWRITE_WEBP_QUALITY, WEBP_QUALITY])[1].tobytes()


def count_answers(preferences: Preferences, progress) -> None:
    """How many of people's answers stand."""
    own = np.array(preferences.mu[progress.labels_loaded :])
    progress.labels_used, progress.ties = int(np.isfinite(own).sum()), int((own == 0.5).sum())
    progress.skipped = list(progress.answered.values()).count(-1)


class LabelServer:
    """The run's side of label_server.py: posts pairs of clips, and reads what people answer.

    A pair lies in the run's queries/ under a random id before it is posted, and stays there: whatever is killed or
    away, an answer finds the clips that it is about.
    """

    def __init__(self, args: Args, progress, frames: int, fps: float):
        """Sign the run in, with clips of so many frames; exit code 2 where the server is not there or refuses."""
        self.run_id = progress.run_id = progress.run_id or uuid.uuid4().hex
        self.url, self.path, self.unsent = args.label_server, f"/api/runs/{self.run_id}", []
        self.away_until, self.patience, self.polled_at = 0.0, 1, 0.0
        try:
            local = urllib.parse.urlsplit(self.url).hostname in ("localhost", "127.0.0.1", "::1")
        except ValueError as error:
            fail(f"--label-server {self.url}: {error}")
        self.opener = urllib.request.build_opener(*[urllib.request.ProxyHandler({})] * local)  # http_proxy can't see it
        tokens = Path("label_server.tokens")  # what a server that was started in this directory wrote
        try:
            self.token = os.environ.get("LABEL_SERVER_TOKEN") or json.loads(tokens.read_text())["trainer"]
        except (OSError, ValueError, KeyError, TypeError):  # not there, not ours to read, or damaged
            fail("no label server here: start python label_server.py in this directory, or give --label-server and set "
                 "LABEL_SERVER_TOKEN to the trainer's token in the label_server.tokens that it wrote")  # fmt: skip
        reply = self.request("PUT", self.path, {
            "name": f"{args.env_id}, {SCRIPT}, seed {args.seed}", "env_id": args.env_id, "script": SCRIPT,
            "labels": args.labels, "max_open": max(OPEN_QUERIES, args.initial_labels),
            "clip": SHEET | {"frames": frames, "fps": fps},
        })  # fmt: skip
        if not isinstance(reply, dict) or "known" not in reply:
            fail(f"what answers at {self.url} is no label server; python label_server.py starts one")
        self.known = set(reply["known"])
        progress.last_event = 0  # another server or database numbers its events anew, so be told all of them again

    def request(self, method: str, path: str, body: dict | None = None, wait: float = 0) -> dict | None:
        """The reply; None while the server is away or refuses. It is left alone then for a while, up to half a minute.

        Only the sign-in ends the run: a proxy whose server starts anew has a 4xx for what is welcome a minute later.
        """
        if time.monotonic() < self.away_until:
            return None
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self.url + path, data, headers, method=method)
            with self.opener.open(request, timeout=wait + 20) as reply:
                content = reply.read()
            self.patience = 1
            return json.loads(content) if content else {}
        except urllib.error.HTTPError as error:
            reason = f"{error.code} {error.read(500).decode(errors='replace')}"
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = str(getattr(error, "reason", error))  # the exception itself would keep `train` alive till exit
        if path == self.path:
            fail(f"no label server at {self.url} that takes this run ({reason}); python label_server.py starts one")
        self.away_until, self.patience = time.monotonic() + self.patience, min(2 * self.patience, 30)
        tqdm.write(f"the label server does not take {method} {path} ({reason}): trying again")

    def ask(self, folder: Path, **pair):
        """Keep a pair (arrays of `label_shapes`, and its two sprite sheets) for `post`."""
        query = uuid.uuid4().hex  # the run's generators would give a resumed run the same ids again
        write_whole(folder / f"{query}.npz", lambda file: np.savez_compressed(file, **pair))
        self.unsent.append(query)

    def post(self, folder: Path, progress) -> None:
        """Send what has not been sent yet, as long as the server is there."""
        for query in list(self.unsent):
            with np.load(folder / f"{query}.npz", allow_pickle=False) as pair:
                sheets = [base64.b64encode(pair[f"sheet_{i}"].tobytes()).decode() for i in range(2)]
                sums = [float(x) if math.isfinite(x) else None for x in pair["returns"]]  # for the server's statistics
            body = {"run": self.run_id, "clips": sheets, "sums": sums}
            reply = self.request("PUT", f"/api/queries/{query}", body)
            if reply is None:
                return
            self.unsent.remove(query)
            progress.open = reply["open"] + len(self.unsent)

    def receive(self, folder: Path, preferences: Preferences, progress, wait: float = 0) -> None:
        """Store what people have answered since the last time, or taken back; wait so many seconds for it.

        Of each pair only the last event counts, so that what is told again changes nothing.
        """
        if not wait and time.monotonic() < self.polled_at + 1:
            return  # A2C's rollouts take less time than a question
        self.polled_at = time.monotonic()
        events, more = [], True
        while more:  # a reply has at most 1,000
            after = events[-1]["seq"] if events else progress.last_event
            reply = self.request("GET", f"{self.path}/events?after={after}&wait={wait}", wait=wait)
            if reply is None:
                time.sleep(min(wait, 1))
                return
            more, wait = reply["events"], 0
            events += more
        for query, event in {event["query"]: event for event in events}.items():
            label = progress.answered.get(query)
            before = None if label is None else preferences.mu[label] if label >= 0 else -1  # -1: can't tell
            mu = None  # taken back
            if event["kind"] == "answer":
                mu = {"first": 1.0, "second": 0.0, "equal": 0.5, "cant-tell": -1}[event["answer"]]
            if mu == before:
                continue
            if label is not None:
                del progress.answered[query]
                if label >= 0:
                    preferences.retract(label)
            if mu == -1:
                progress.answered[query] = -1
            elif mu is not None:
                progress.answered[query] = preferences.count
                with np.load(folder / f"{query}.npz", allow_pickle=False) as pair:
                    arrays = {name: pair[name][None] for name in label_shapes(preferences.clips) if name != "mu"}
                preferences.add(arrays | {"mu": np.array([mu], np.float32)})
        count_answers(preferences, progress)
        progress.open = reply["open"] + len(self.unsent)
        if events:
            progress.last_event = events[-1]["seq"]
            self.polled_at = 0.0  # somebody is answering: there may be more at once


def behind_schedule(progress, args: Args) -> bool:
    """Whether to wait for people: for the initial labels in any case, then while under 75 % of what is due is answered.
    Where no pair is open there is nothing to wait for: the next rollout brings new ones."""
    if not progress.open:
        return False
    if progress.paid_from < 0:
        return progress.labels_used < args.initial_labels <= progress.labels_used + progress.open
    return args.wait_for_labels and progress.labels_used < 0.75 * labels_scheduled(progress, args)


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------
def train(args: Args) -> dict:
    """Train (or resume, or evaluate) as args say; returns what summary.json holds."""
    if args.evaluate:
        return evaluate_run(args)

    # 1. Read whatever may be refused, before anything is written
    recorded = {name: getattr(args, name) for name in ("device", "torch_threads", "bf16", "compile")}
    checkpoint = read_checkpoint(args.resume) if args.resume else None
    resolve_hardware(args)
    if checkpoint:
        if (args.bf16, args.compile) != (recorded["bf16"], recorded["compile"]):
            fail(f"{args.resume} ran with bfloat16 {recorded['bf16']} and compilation {recorded['compile']}: not here")
        if [args.device, args.torch_threads] != checkpoint["hardware"]:
            print(f"the checkpoint is of {checkpoint['hardware']}: going on elsewhere is not exact to the bit")
    learns_reward = not args.true_reward and not args.reward_model
    progress = Progress(**checkpoint["progress"]) if checkpoint else Progress()
    ensemble = None
    if args.reward_model:
        ensemble = load_reward_model(args.reward_model, checkpoint or read_checkpoint(args.reward_model), args)
        progress.paid_from = 0
    shards, clips = Path(args.preferences or "") / "preferences", clip_shapes(args.clip_length)
    if args.preferences and not checkpoint:
        progress.labels_loaded = sum(int(np.isfinite(arrays["mu"]).sum()) for arrays in read_shards(shards, clips))
        if not progress.labels_loaded:
            fail(f"{args.preferences} has no labels")
    if args.track:
        import wandb

        try:
            if wandb.setup().settings.mode == "online":
                wandb.login()  # else `wandb.init` would fail when the run's directory is there already
        except wandb.errors.Error as error:
            fail(f"--track: {error}")
    if args.asks_people:
        server = LabelServer(args, progress, args.clip_length, fps=15.0)
    run_dir = Path(args.resume) if args.resume else make_run_dir(args)

    # 2. Hardware and seeds
    device = torch.device(args.device)
    torch.set_num_threads(args.torch_threads)
    if sys.platform == "linux":  # glibc maps and unmaps every buffer over 32 MB: 40 % of a reward-model step
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt:
            mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
            mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
    torch.manual_seed(args.seed)  # initial parameters and dropout; all else has a generator of its own
    names = ("policy", "query", "teacher", "reward")
    rngs = {name: np.random.default_rng([args.seed, i]) for i, name in enumerate(names)}
    generator = torch.Generator(device).manual_seed(derive_seed(args.seed, 10))  # actions

    # 3. Environments, policy, reward model, preferences
    envs, boxes = make_envs(args, args.num_envs), hud_boxes(args.env_id)
    if not boxes:
        print(f"{args.env_id}: nothing on the screen is hidden, since where its score stands is not known")
    agent = Agent(int(envs.single_action_space.n), args.bf16).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    modules = {"agent": agent, "optimizer": optimizer}
    pool = None if args.true_reward else SegmentPool(args.pool_rows, args.num_envs, device)
    if learns_reward:
        l2_coef = 0.0 if args.ablation == "no-regularization" else args.l2_coef
        ensemble = RewardEnsemble(args.members, args.dropout, l2_coef, args.bf16)
        ensemble = ensemble.to(device, memory_format=torch.channels_last)
        reward_optimizer = torch.optim.Adam(ensemble.parameters(), lr=args.reward_learning_rate, fused=True)
        modules |= {"ensemble": ensemble, "reward_optimizer": reward_optimizer}
        capacity = progress.labels_loaded + args.labels
        if args.human:
            capacity += capacity // 4 + 100  # an answer that is taken back keeps its place
        if args.ablation != "no-online-queries":
            capacity = min(capacity, args.label_window)
        preferences = Preferences(run_dir / "preferences", capacity, clips, args.members, device)
        if args.preferences and not checkpoint:  # copied, so that this run needs no other
            for arrays in read_shards(shards, clips):
                arrays = {name: array[np.isfinite(arrays["mu"])] for name, array in arrays.items()}
                preferences.add(arrays | {"segments": np.full_like(arrays["segments"], -1)})  # not rows of this run

    if args.asks_people:  # the same games in colour, for people; the agent's observations stay what they are
        twin = make_envs(args, args.num_envs, grayscale=False, img_height=210, img_width=160, stack_num=1)
        colour_boxes, shown = hud_boxes(args.env_id, 210, 160), deque(maxlen=args.pool_rows)
        queries = run_dir / "queries"
        queries.mkdir(exist_ok=True)

    # 4. What lasts from one rollout to the next: streams per environment, and what a resumed run replays
    streams = np.zeros((4, args.num_envs))
    history, lives, episode_return, episode_length = streams  # history: earlier frames of the same episode, at most 3
    actions_since_reset: list[torch.Tensor] = []
    if checkpoint:
        for name, module in modules.items():
            module.load_state_dict(checkpoint[name])
        if pool:
            pool.count = checkpoint["pool"]["count"]
            pool.streams = {name: stream.to(device) for name, stream in checkpoint["pool"]["streams"].items()}
        for name, state in checkpoint["rngs"].items():
            rngs[name].bit_generator.state = json.loads(state)
        torch.set_rng_state(checkpoint["torch_rng"])
        if device.type == torch.device(checkpoint["hardware"][0]).type:
            generator.set_state(checkpoint["generator"])
            if device.type == "cuda":
                torch.cuda.set_rng_state(checkpoint["cuda_rng"], device)
        if learns_reward:
            preferences.restore(checkpoint["labels_on_disk"], args.human)
        if args.asks_people:
            progress.shown_from = pool.count  # what people would see of older rows is not in the checkpoint
            files = sorted(queries.glob("*.npz"), key=lambda path: path.stat().st_mtime)
            progress.answered = {query: -1 for query, label in progress.answered.items() if label == -1}
            for path in files:
                with np.load(path, allow_pickle=False) as pair:
                    segments = pair["segments"]
                label = preferences.standing(segments)
                if label is None:
                    preferences.remember(segments[None])
                else:
                    progress.answered[path.stem] = label
                if path.stem not in server.known and path.stem not in progress.answered:
                    server.unsent.append(path.stem)
            progress.asked = len(files)  # some were asked and answered after the checkpoint
            count_answers(preferences, progress)
            server.post(queries, progress)
            server.receive(queries, preferences, progress)
        if progress.iteration % args.reset_every:  # else the next rollout begins with a reset
            last_reset = progress.iteration // args.reset_every * args.reset_every
            next_frames, _ = envs.reset(seed=derive_seed(args.seed, 11, last_reset))
            actions_since_reset = list(checkpoint["actions_since_reset"])
            if args.asks_people:
                screens, _ = twin.reset(seed=derive_seed(args.seed, 11, last_reset))
            for action in torch.cat(actions_since_reset).numpy():  # ALE's vector can't save its state
                next_frames, *_ = envs.step(action.astype(np.int64))
                if args.asks_people:
                    screens, *_ = twin.step(action.astype(np.int64))
            streams[:] = checkpoint["streams"].numpy()
            if not np.array_equal(observe(next_frames, history, boxes), checkpoint["next_obs"]):
                print("the emulator did not come back to where it was (another version?): this is another run now")

    # 5. Storage of one rollout, logging, signals
    shape = (args.num_steps, args.num_envs)
    obs = torch.zeros(*shape, 4, 84, 84, dtype=torch.uint8, device=device)
    actions = torch.zeros(shape, dtype=torch.int64, device=device)
    logprobs, values = torch.zeros(shape, device=device), torch.zeros(shape, device=device)
    histories, env_rewards = np.zeros(shape, dtype=np.uint8), np.zeros(shape)
    lost, ended = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    loss_function = torch.compile(minibatch_loss, dynamic=False) if args.compile else minibatch_loss
    commit = read_run(str(run_dir))["commit"]  # what this run began with, whatever is checked out when it ends
    writer = SummaryWriter(str(run_dir), purge_step=progress.global_step + 1)
    if args.track:
        wandb_run = wandb.init(
            project=args.wandb_project_name, entity=args.wandb_entity, name=run_dir.name, id=run_dir.name,
            group=f"{args.env_id}-{args.feedback}", config=asdict(args), dir=str(run_dir), resume="allow",
        )  # fmt: skip
        wandb_run.define_metric("*", step_metric="global_step")

    def log(scalars: dict):
        """To TensorBoard, and to W&B with steps and labels beside it: either can be the x axis there."""
        for name, value in scalars.items():
            writer.add_scalar(name, value, progress.global_step)
        if args.track:
            wandb_run.log(scalars | {"global_step": progress.global_step, "labels": progress.labels_used})

    def report(waiting: bool):
        """To the label server, for the page's progress and the admin's statistics."""
        accuracy = progress.reward_log.get("accuracy_heldout", math.nan)
        server.request("POST", f"{server.path}/status", {
            "global_step": progress.global_step, "total_timesteps": total_steps, "labels": args.labels,
            "labels_used": progress.labels_used, "labels_due": labels_scheduled(progress, args), "waiting": waiting,
            "accuracy_heldout": float(accuracy) if math.isfinite(accuracy) else None,
            "finished": progress.iteration == args.num_iterations,
        })  # fmt: skip

    stop: list[int] = []
    signals = (signal.SIGTERM, signal.SIGINT)

    def stop_soon(number, _):
        stop.append(number)
        signal.signal(number, signal.SIG_DFL)
        tqdm.write("stopping after this rollout and its updates; once more, and it stops at once")

    handlers = [signal.signal(number, stop_soon) for number in signals]
    total_steps = args.num_iterations * args.batch_size  # whole rollouts
    print(
        f"{run_dir}\n{args.env_id}, {args.feedback}, {args.labels:,} labels, {total_steps:,} steps (--total-timesteps "
        f"rounded up to {args.num_iterations:,} rollouts), {args.device}, {args.torch_threads} threads", flush=True
    )  # fmt: skip
    bar = tqdm(total=total_steps, initial=progress.global_step, unit="step", unit_scale=True, disable=None)
    warned: set[str] = set()
    asked_at = 0.0
    trained = False  # a policy update of this process is done, so whatever compiles is compiled
    started, line_time, line_step = time.time() - progress.wall_seconds, time.time(), progress.global_step

    stopping = False
    while progress.iteration < args.num_iterations and not stopping:
        update_started, evaluation_seconds = time.time(), 0.0

        # 6. Roll the policy out. All environments start anew every reset_every updates, so that a resumed run can
        #    replay them; the agent sees neither that nor any other end.
        if progress.iteration % args.reset_every == 0:
            next_frames, infos = envs.reset(seed=derive_seed(args.seed, 11, progress.iteration))
            if args.asks_people:
                screens, _ = twin.reset(seed=derive_seed(args.seed, 11, progress.iteration))
            streams[:], lives[:] = 0, infos["lives"]
            actions_since_reset = []
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - progress.iteration / args.num_iterations)
        progress.iteration += 1
        progress.global_step += args.batch_size
        finished_episodes = []
        # A batch of 16 screens is too small to share: threads that wait for more only take the emulator's cores
        torch.set_num_threads(min(args.torch_threads, math.ceil(args.num_envs / 16)))
        next_obs = torch.as_tensor(observe(next_frames, history, boxes), device=device)
        for step in range(args.num_steps):
            obs[step], histories[step] = next_obs, history
            with torch.no_grad():
                action, logprobs[step], _, values[step] = agent.get_action_and_value(next_obs, generator=generator)
            actions[step] = action
            action = action.cpu().numpy()
            if args.asks_people:
                for rows, columns in colour_boxes:
                    screens[:, :, rows, columns] = 0
                shown.append([zlib.compress(screen, 1) for screen in screens])
                screens, *_ = twin.step(action)
            next_frames, env_rewards[step], terminated, truncated, infos = envs.step(action)
            ended[step] = terminated | truncated
            lost[step] = terminated | (~truncated & (infos["lives"] < lives))  # after an end, infos are the next game's
            lives[:] = infos["lives"]
            history[:] = np.where(ended[step], 0, np.minimum(history + 1, 3))
            next_obs = torch.as_tensor(observe(next_frames, history, boxes), device=device)
            episode_return += env_rewards[step]
            episode_length += 1
            for i in np.flatnonzero(ended[step]):
                finished_episodes.append((episode_return[i], episode_length[i]))
                episode_return[i] = episode_length[i] = 0
        torch.set_num_threads(args.torch_threads)
        actions_since_reset.append(actions.to("cpu", torch.uint8))
        progress.recent_returns = (progress.recent_returns + [float(r) for r, _ in finished_episodes])[-20:]

        # 7. Rewards: the whole rollout by one model, in one go. Beside the log, only the oracle reads env_rewards.
        oracle_rewards = oracle_rewards_of(env_rewards, lost, args)
        if args.true_reward:  # scaled by a running std, as the predictor's are; its average reaches 20,000 steps back
            keep = 0.9 ** (args.batch_size / 2048)
            progress.true_reward_var += (1 - keep) * (float(np.sign(env_rewards).var()) - progress.true_reward_var)
            var = progress.true_reward_var / (1 - keep**progress.iteration)  # it began with zero
            scale = args.reward_std / max(math.sqrt(var), args.reward_std_floor)
            pred_rewards = torch.as_tensor(scale * np.sign(env_rewards), dtype=torch.float32, device=device)
        elif progress.paid_from < 0:
            pred_rewards = torch.zeros(shape, device=device)
        else:
            raw = ensemble.score(obs.flatten(0, 1))
            pred_rewards = ensemble.normalise(raw, args.reward_std_floor, args.reward_std).view(shape)
        if pool:
            pool.add(frames=obs[:, :, -1], history=histories, oracle_rewards=oracle_rewards, pred_rewards=pred_rewards)

        # 8. Update the policy, unless the first labels are still being collected: those are of the untrained one
        pays = args.true_reward or progress.paid_from >= 0
        if pays:
            # Only the baseline sees lost lives and ends, as CleanRL's agent does
            dones = torch.as_tensor((lost | ended) & args.true_reward, dtype=torch.float32, device=device)
            with torch.no_grad():
                next_values = (1 - dones) * torch.cat([values[1:], agent.get_value(next_obs).unsqueeze(0)])
            advantages, returns = compute_gae(pred_rewards, values, next_values, dones, args.gamma, args.gae_lambda)
            rollout = [x.flatten(0, 1) for x in (obs, actions, logprobs, advantages, returns, values)]
            progress.policy_log = update_policy(agent, optimizer, loss_function, rollout, rngs["policy"], args)

        # 9. Ask when enough labels are due, and store each answer with copies of its clips
        last = progress.iteration == args.num_iterations
        for _ in range(20 if last else 1):  # what a teacher skips is asked anew at the next occasion, if there is one
            due, first = labels_due(progress, pool, last, args) if learns_reward else (0, 0)
            busy = progress.paid_from >= 0 and progress.open >= OPEN_QUERIES and time.monotonic() < asked_at + 60
            if args.asks_people and (last or busy):
                due = 0  # nobody would answer in time; or there is enough to do, and what is newer may wait a minute
            if args.asks_people and progress.paid_from >= 0:
                due = min(due, QUERY_BATCH)  # however far they are behind: more would not be looked at
            disputed = progress.paid_from >= 0 and args.ablation not in ("random-queries", "no-ensemble")
            judge = ensemble if disputed else None
            pairs = select_pairs(judge, pool, preferences, due, first, rngs["query"], args) if due else []
            if not len(pairs):
                break
            starts = pairs.reshape(-1, 2)
            rewards = pool.gather("oracle_rewards", starts, 0, args.clip_length).cpu().numpy().astype(np.float64)
            rewards = rewards.reshape(len(pairs), 2, -1)
            sums = rewards.sum(-1)
            copies = pool.clips(starts, args.clip_length)
            answers = {name: x.cpu().numpy().reshape(len(pairs), 2, *x.shape[1:]) for name, x in copies.items()}
            answers |= {"returns": sums.astype(np.float32), "segments": pairs}
            progress.fresh_from = pool.count
            progress.asked += len(pairs)
            if args.asks_people:
                oldest, asked_at = pool.count - len(shown), time.monotonic()
                for i, pair in enumerate(pairs.tolist()):
                    sheets = {}
                    for side, (env, row) in enumerate(pair):
                        views = [shown[row - oldest + t][env] for t in range(args.clip_length)]
                        sheets[f"sheet_{side}"] = np.frombuffer(sprite_sheet(decode_screens(views)), np.uint8)
                    server.ask(queries, **{name: array[i] for name, array in answers.items()}, **sheets)
                preferences.remember(pairs)
                progress.open += len(pairs)
                break
            mu, skipped = teacher_answers(rngs["teacher"], rewards, progress.recent_sums, args)
            progress.recent_sums = (progress.recent_sums + sums.flatten().tolist())[-1000:]
            answers["mu"] = mu
            preferences.add({name: array[~skipped] for name, array in answers.items()})
            progress.skipped += int(skipped.sum())
            progress.labels_used += int((~skipped).sum())
            progress.ties += int((mu[~skipped] == 0.5).sum())

        # 10. Update the reward model, then renew its statistics over rows of the recent pool
        if ensemble and (progress.paid_from >= 0 or progress.labels_used >= args.initial_labels):
            if progress.paid_from < 0:
                pretrain(ensemble, reward_optimizer, preferences, rngs["reward"], args)
                progress.paid_from = progress.global_step
            owed = (progress.global_step - progress.paid_from) * args.pairs_per_step - progress.pairs_presented
            minibatches = int(owed) // args.reward_minibatch_size
            if minibatches >= REWARD_MINIBATCHES:
                progress.pairs_presented += minibatches * args.reward_minibatch_size
                if learns_reward:  # one that was loaded stays as it is, but for the scale of what it pays
                    progress.reward_log = update_reward_model(
                        ensemble, reward_optimizer, preferences, minibatches, rngs["reward"], args
                    )
            if minibatches >= REWARD_MINIBATCHES or not ensemble.renewals:
                first, newest = pool.first_start(), pool.count - 1
                rows = sample_pairs(rngs["reward"], STATISTICS_ROWS, first, newest, args.num_envs)[:, 0]
                ensemble.renew_statistics(model_inputs(pool.clips(rows, 1)), args.reward_std_floor)

        # 11. Log, evaluate, save
        if finished_episodes:
            mean_return, mean_length = np.mean(finished_episodes, axis=0)
            log({"charts/episodic_return": mean_return, "charts/episodic_length": mean_length})
        if args.eval_every and progress.iteration % args.eval_every == 0:
            evaluation_started = time.time()
            result = evaluate(agent, None, args, derive_seed(args.seed, 12, progress.iteration))
            log({"charts/eval_return": result["returns"].mean()})
            evaluation_seconds = time.time() - evaluation_started
        progress.wall_seconds = time.time() - started
        bar.update(args.batch_size)
        stopping = bool(stop)
        waiting = args.asks_people and behind_schedule(progress, args) and not (stopping or last)
        due_to_save = stopping or last or progress.iteration % args.checkpoint_every == 0
        if args.asks_people:  # a pair that people see must be of a run that can be gone on with
            due_to_save |= progress.iteration == 1 or (progress.paid_from < 0 and progress.fresh_from == pool.count)
        if due_to_save or progress.iteration % args.log_every == 0:
            progress.policy_log = {name: float(value) for name, value in progress.policy_log.items()}
            progress.reward_log = {name: float(value) for name, value in progress.reward_log.items()}
            entropy = progress.policy_log.get("entropy", math.nan)
            accuracy = progress.reward_log.get("accuracy_heldout", math.nan)
            correlation = reward_correlation(pool, progress, args) if ensemble else math.nan
            speed = (progress.global_step - line_step) / (time.time() - line_time)
            line_time, line_step = time.time(), progress.global_step
            ties = progress.ties / max(progress.labels_used, 1)
            charts = {f"losses/{name}": value for name, value in progress.policy_log.items()}
            charts |= {"charts/learning_rate": optimizer.param_groups[0]["lr"], "charts/SPS": speed}
            if ensemble:
                charts |= {f"reward_model/{name}": value for name, value in progress.reward_log.items()}
                charts |= {"labels/used": progress.labels_used, "labels/ties": ties, "labels/skipped": progress.skipped}
                charts |= {"reward_model/correlation": correlation, "reward_model/raw_std": ensemble.std.mean().item()}
                charts |= {"reward_model/pred_std": pred_rewards.std().item()}
            log(charts)
            if args.asks_people:
                report(waiting)
            left = (total_steps - progress.global_step) / speed
            line = f"{progress.global_step:>10,} steps {progress.global_step / total_steps:4.0%} {speed:6,.0f}/s"
            line += f"  {left // 3600:.0f}:{left % 3600 // 60:02.0f} h left  entropy {entropy:4.2f}"
            line += f"  return {np.mean(progress.recent_returns) if progress.recent_returns else math.nan:7.1f}"
            if ensemble:
                line += f"  labels {progress.labels_used:,}/{args.labels:,} ({ties:.0%} ties)"
                line += f"  held-out accuracy {accuracy:4.2f}  correlation {correlation:5.2f}"
            tqdm.write(line)
            sys.stdout.flush()
            for message, bad in {
                "nine of ten labels are ties: they teach little": progress.labels_used > 99 and ties > 0.9,
                "the policy's entropy is near zero: it has stopped exploring": entropy < 0.05,
                "the reward model judges no better than chance": accuracy < 0.55 and progress.pairs_presented > 5000,
            }.items():
                if bad and message not in warned:
                    warned.add(message)
                    tqdm.write(f"warning: {message}")
        if due_to_save:
            state = {name: module.state_dict() for name, module in modules.items()}
            state |= {
                "progress": asdict(progress),
                "ensemble": ensemble.state_dict() if ensemble else None,
                "hardware": [args.device, args.torch_threads],
                "labels_on_disk": preferences.count if learns_reward else 0,
                "pool": vars(pool) if pool else None,
                "rngs": {name: json.dumps(rng.bit_generator.state) for name, rng in rngs.items()},
                "generator": generator.get_state(),
                "torch_rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
                "next_obs": next_obs,
                "actions_since_reset": torch.stack(actions_since_reset),
                "streams": torch.as_tensor(streams),
            }
            write_whole(run_dir / "checkpoint.pt", partial(torch.save, state))
        if device.type == "cuda":
            torch.cuda.synchronize()
        if pays and trained:
            progress.timed_steps += args.batch_size
            progress.timed_seconds += time.time() - update_started - evaluation_seconds
        trained |= pays

        # 12. Wait for people. While they answer, the agent stands still: a simulator is a hundred times faster.
        if args.asks_people:
            server.post(queries, progress)  # now that the checkpoint can be gone on from
            server.receive(queries, preferences, progress)
        line_at, waiting_since = 0.0, time.time()
        while waiting and not stop:
            if time.time() > line_at + 15:
                line_at = time.time()
                tqdm.write(f"waiting for people: {progress.labels_used:,} labels, {progress.open} pairs are open")
                sys.stdout.flush()
                report(waiting)
            server.post(queries, progress)
            server.receive(queries, preferences, progress, wait=5)
            waiting = behind_schedule(progress, args)
        stopping |= bool(stop) and due_to_save
        if line_at:
            report(waiting)
            line_time += time.time() - waiting_since  # not the script's time

    # 13. The final score, figure, video and summary
    bar.close()
    for number, handler in zip(signals, handlers, strict=True):
        signal.signal(number, handler)
    finished = progress.iteration == args.num_iterations
    returns = np.array([math.nan])
    if finished:
        result = evaluate(agent, ensemble, args, derive_seed(args.seed, 14), record=1000)
        returns = result["returns"]
        log({"charts/eval_return": returns.mean()})
    accuracy = held_out(ensemble, preferences, args)[1] if learns_reward and len(preferences) else None
    of_args = ("env_id", "feedback", "labels", "ablation", "teacher_beta", "teacher_gamma", "teacher_mistake")
    of_args += ("teacher_skip", "teacher_equal", "seed", "pairs_per_step", "device")
    of_progress = ("global_step", "labels_used", "asked", "skipped", "ties", "labels_loaded")
    summary = {"finished": finished, "script": SCRIPT, "total_timesteps": total_steps}
    summary |= {name: getattr(args, name) for name in of_args}
    summary |= {name: getattr(progress, name) for name in of_progress}
    summary |= {
        "wall_seconds": time.time() - started,
        "sps": progress.timed_steps / progress.timed_seconds if progress.timed_seconds else None,
        "final_return_mean": float(returns.mean()),
        "final_return_std": float(returns.std()),
        "final_episodes": len(returns) if finished else None,
        "reward_accuracy_heldout": accuracy,
        "reward_correlation": reward_correlation(pool, progress, args) if ensemble else None,
        "reward_loss": progress.reward_log.get("loss"),
        "pg_loss": progress.policy_log.get("policy_loss"),
        "v_loss": progress.policy_log.get("value_loss"),
        "entropy": progress.policy_log.get("entropy"),
        "params_sha256": params_sha256(agent, *([ensemble] if ensemble else [])),
        "commit": commit,
    }
    # JSON has neither infinity nor NaN: what is absent or infinite is null
    summary = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in summary.items()}
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=2))
    writer.close()
    if finished:
        draw_episode(result, run_dir / "episode", f"{args.env_id}, {args.feedback}, {progress.labels_used:,} labels")
        if progress.labels_used < args.labels:
            print(f"warning: {args.labels - progress.labels_used} of {args.labels} labels were not answered in time")
    if args.track:
        wandb_run.summary.update(summary)
        if finished and result["screens"]:
            wandb_run.log({"episode": wandb.Video(str(run_dir / "episode" / "episode.webm"), format="webm")})
        wandb_run.finish()
    score = f"return {returns.mean():.1f} +- {returns.std():.1f} over {len(returns)} episodes"
    print(f"{run_dir}: " + (score if finished else f"stopped; go on with --resume {run_dir}"))
    return summary


if __name__ == "__main__":
    try:
        train(parse_args())
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # --resume goes on from the last checkpoint
