"""PPO on MuJoCo, paid by a reward model that is learned from comparisons of short clips. More: docs/mujoco.md

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

    python ppo_mujoco_rlhf.py --oracle --labels 100 --env-id HalfCheetah-v5 --total-timesteps 100000   # a minute or two
    python ppo_mujoco_rlhf.py --oracle --labels 700    # Hopper, 5M steps: 15 to 60 minutes on one CPU core
    python ppo_mujoco_rlhf.py --human --labels 700     # people answer; beside it: python label_server.py
    python ppo_mujoco_rlhf.py --true-reward            # the same observations, paid by the task; no entropy bonus

Where this differs from the paper, and why (the evidence is in docs/mujoco.md):
  * PPO instead of TRPO. Passes over a rollout end after one of mean KL divergence over 0.02.
  * Mean actions out of bounds are penalised: wrong first rewards lead a policy there, and nothing leads it back.
  * The paper's entropy bonus falls to zero by half of the run: to the end it held the std of Walker2d's actions near 1.
  * In Swimmer that bonus is 0.03, not 0.001: with less the policy stays with the first gait that it finds.
  * The torso's angle is wrapped to half a turn: no fall ends an episode, and a robot that tumbles winds it up.
  * Actions keep a std of 0.14: a policy that a wrong first reward has led astray does not come back without noise.
  * 5M steps instead of 20M; labels per run are the paper's, so they come four times as densely.
  * The label rate falls smoothly: L(T) = L(0) + (N - L(0)) ln(1 + T/tau) / ln 11.
  * Rewards of std 0.1, not 1: PPO learns its value function by the same gradient steps as its policy, TRPO does not.
  * Gymnasium's v5 tasks on today's MuJoCo, in the paper's form: fixed length, no end before it, no torque penalties.
  * Episodes of 250 steps in InvertedPendulum; the paper does not give its length.
"""

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
from collections import deque
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import filelock
import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter

RENDERER = os.environ.pop("MUJOCO_GL", "egl")  # import fails on one that this machine lacks; only pictures need it
import mujoco  # noqa: E402
from gymnasium.envs.mujoco import MujocoEnv  # noqa: E402

SCRIPT = Path(__file__).stem
PACKAGES = ("torch", "gymnasium", "mujoco", "numpy")  # whose versions a run records
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
QUERY_BATCH = 16  # ask when at least this many labels are missing
QUERY_CANDIDATES = 10  # candidate pairs per pair asked (section 2.2.4)
OPEN_PAIRS = 100  # --human: during the training at most this many pairs wait for an answer
REWARD_MINIBATCHES = 4  # update the reward model when at least this many minibatches are due
STATISTICS_ROWS = 1000  # recent rows over which predicted rewards are normalised
STD_FLOOR = 0.01  # a member is divided by at least this as its std: blowing up an uninformed model would pay for noise
LEAST_LOGSTD = -2.0  # logarithm of the least std of the actions
SHOWN = {"entropy": "losses/entropy", "labels": "labels/used", "ties": "labels/ties"}  # on the progress line
SHOWN |= {"accuracy": "reward_model/accuracy_heldout", "correlation": "reward_model/correlation"}
CHANGEABLE = {"total_timesteps", "labels", "wait_for_labels", "device", "threads", "bf16", "reset_every", "log_every",
              "eval_episodes", "track", "wandb_project_name", "wandb_entity"}  # beside --resume  # fmt: skip
CLIP = {"width": 384, "height": 384, "columns": 5, "pixelated": False, "quality": 60}  # what people see of a clip
MOST_FRAMES = 30  # of a clip's 1.5 seconds; of a longer one people see every second step, and so on


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
    true_reward: bool = False  # no reward learning: the baseline, paid by the task's reward
    seed: Seed = 1  # of all that is random; on a CPU the same arguments end in the same parameters
    total_timesteps: Count = 5_000_000  # steps over all environments after the initial phase, in whole rollouts
    device: str = "cpu"  # "cpu", "cuda", "cuda:1", ...; these networks are too small for a GPU to gain
    threads: Count = 1  # PyTorch's on the CPU; for these networks more than one does not help
    runs_dir: str = "runs"  # where the run's own directory is made
    resume: str | None = None  # go on with the run in this directory; with nothing else given exact to the bit on a CPU
    reset_every: Count = 100  # iterations after which a checkpoint is saved and all environments start anew

    # Environment
    env_id: str = "Hopper-v5"  # any MuJoCo task registered with Gymnasium, or module:MyTask-v0
    num_envs: Count = 16  # environments stepped in turn

    # Policy optimisation (names of CleanRL's ppo_continuous_action.py; gamma and lambda from A.1; the rest was tuned)
    learning_rate: Positive = 3e-4  # of the policy's Adam
    anneal_lr: bool = True  # let that rate fall linearly to zero
    num_steps: Count = 128  # steps per environment in one rollout
    gamma: Share = 0.995  # discount
    gae_lambda: Share = 0.97  # lambda of generalized advantage estimation
    num_minibatches: Count = 8  # per epoch
    update_epochs: Count = 10  # passes over each rollout, at most
    target_kl: Weight = 0.02  # end the passes after one whose mean KL divergence exceeds this
    clip_coef: Weight = 0.2  # PPO's clipping of the probability ratio
    clip_vloss: bool = False  # clip the value loss likewise
    ent_coef: Weight | None = None  # of the entropy bonus, 0 by half of the run; None: 0.01, Swimmer 0.03, baseline 0
    vf_coef: Weight = 0.5  # weight of the value loss
    init_logstd: Annotated[float, within(float, LEAST_LOGSTD, 2)] = -1.0  # log std of the untrained policy's actions
    bound_coef: Weight = 0.1  # weight of the penalty on mean actions out of bounds: the square of how far
    max_grad_norm: Positive = 0.5  # gradients are clipped to this norm

    # Reward model
    num_members: Count = 3  # predictors in the ensemble
    reward_learning_rate: Positive = 1e-3  # of the ensemble's Adam
    reward_minibatch_size: Count = 64  # pairs of clips per minibatch of the reward model
    pairs_per_step: Weight = 1 / 8  # label presentations per environment step
    pretrain_pairs: Count = 50_000  # label presentations before the training, at most; rounds of 32 minibatches
    l2_coef: Annotated[float, within(float, 1e-6, 1e-3)] = 1e-4  # weight decay to start with; it adapts
    reward_std: Positive = 0.1  # std of the reward that the policy is paid

    # Preferences
    labels: Number | None = None  # label budget: new labels of this run; None: 700, with --true-reward 0
    segment_length: Count | None = None  # steps per clip; None: as in the paper 15 to 60, by the task
    ablation: Ablation = "none"  # leave one part of the method out, as the paper does (its Figures 5 and 6)
    query_pool_steps: Count = 20_000  # segments are drawn from the last so many steps
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
    eval_episodes: Count | None = None  # episodes of the evaluation at the end; None: 10, of Reacher's short ones 100

    # What follows from these
    feedback = property(lambda self: "oracle" if self.oracle else "human" if self.human else "true-reward")
    batch_size = property(lambda self: self.num_envs * self.num_steps)
    num_iterations = property(lambda self: math.ceil(self.total_timesteps / self.batch_size))
    clip_length = property(lambda self: 1 if self.ablation == "no-segments" else self.segment_length)
    members = property(lambda self: 1 if self.ablation == "no-ensemble" else self.num_members)
    pool_rows = property(lambda self: math.ceil(self.query_pool_steps / self.num_envs))

    @property
    def initial_labels(self) -> int:
        if self.ablation == "no-online-queries":
            return self.labels
        return 0 if self.preferences or not self.labels else max(1, self.labels // 4)


def refuse(args: Args) -> None:
    """End on what would train for hours on nothing, or would fail after something was written."""
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
        args.labels = 0 if args.true_reward else 700
    task = make_task(args.env_id)
    if task.spec.id in SEGMENT_LENGTH:  # one of the paper's: to Gymnasium, Hopper is Hopper-v5
        args.env_id = task.spec.id
    if args.segment_length is None:  # the paper's, or 1.5 s within the range of its tasks
        steps = round(1.5 / task.unwrapped.dt)
        args.segment_length = SEGMENT_LENGTH.get(args.env_id, int(np.clip(steps, 15, 60)))
    if args.eval_episodes is None:
        args.eval_episodes = 100 if args.env_id == "Reacher-v5" else 10
    if args.ent_coef is None:  # the paper's but for Swimmer's 0.001
        args.ent_coef = 0.0 if args.true_reward else 0.03 if args.env_id == "Swimmer-v5" else 0.01
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
# Steps per clip in the paper's tasks: 1.5 seconds (A.1) at the rates at which its authors' rl-teacher plays them.
SEGMENT_LENGTH = {
    "Walker2d-v5": 45,
    "Hopper-v5": 60,
    "Swimmer-v5": 60,
    "HalfCheetah-v5": 30,
    "Ant-v5": 30,
    "Reacher-v5": 15,
    "InvertedDoublePendulum-v5": 15,
    "InvertedPendulum-v5": 15,
}
# Place in the observation of the angle that nothing limits: no fall ends an episode, so a tumbling robot winds it up
UNLIMITED = {"Walker2d-v5": 1, "Hopper-v5": 1, "HalfCheetah-v5": 1, "Swimmer-v5": 0}
EPISODE_LENGTH = {"InvertedPendulum-v5": 250}  # its pole falls within 20 steps: of 1,000, too little to learn from


def make_task(env_id: str, **kwargs) -> gym.Env:
    """The task as Gymnasium has it, but without a time limit, and in Ant without contact forces: 27 numbers."""
    if env_id == "Ant-v5":
        kwargs["include_cfrc_ext_in_observation"] = False
    mujoco.set_mju_user_warning(lambda _: None)  # of all kinds: HalfCheetah's model has an outdated attribute
    try:
        task = gym.make(env_id, max_episode_steps=-1, disable_env_checker=True, **kwargs)
    except Exception as error:  # Gymnasium's, which names what is near, or of somebody's own module
        fail(f"{env_id} can't be made: {error}")
    if not isinstance(task.unwrapped, MujocoEnv):
        fail(f"{env_id} is not a MuJoCo task, as Hopper-v5 is one")
    if not (task.action_space.low < task.action_space.high).all():
        fail(f"{env_id} has an actuator without a ctrlrange: there would be one action only")
    return task


def paper_reward(env_id: str, robot: MujocoEnv, x_before: float) -> float:
    """Reward of the step that led from position x_before to the state in robot.data (A.1; rl-teacher's coefficients).

    Without torque penalties, which people can't see in a clip. A fall ends nothing: standing is paid instead.
    """
    data = robot.data
    match env_id:
        case "Walker2d-v5":
            return (data.qpos[0] - x_before) / robot.dt + data.qpos[1] - 1
        case "Hopper-v5":
            return (data.qpos[0] - x_before) / robot.dt + data.qpos[1]
        case "Swimmer-v5" | "HalfCheetah-v5":
            return (data.qpos[0] - x_before) / robot.dt
        case "Ant-v5":
            return (data.qpos[0] - x_before) / robot.dt + data.qpos[2] - 1.2
        case "Reacher-v5":
            return -np.linalg.norm(robot.get_body_com("fingertip") - robot.get_body_com("target"))
        case "InvertedDoublePendulum-v5":  # Gymnasium pays the 10 while the tip is above 1 only, rl-teacher always
            x, _, y = data.site_xpos[0]
            _, v1, v2 = data.qvel
            return 10 - 0.01 * x**2 - (y - 2) ** 2 - 1e-3 * v1**2 - 5e-3 * v2**2 + 10 * (y - 1)
        case "InvertedPendulum-v5":
            return 1 - data.qpos[1] ** 2


class Envs:
    """num_envs robots, stepped in turn, in the paper's form (A.1): episodes of one length that nothing ends before.

    Observations: (N, D) float32, raw. The paper's tasks are stepped by MuJoCo itself, since a quarter to a half of
    Gymnasium's time goes into infos, checks and wrappers; any other task steps itself, and pays its own reward.
    """

    def __init__(self, args: Args, num_envs: int):
        self.tasks = [make_task(args.env_id) for _ in range(num_envs)]
        self.robots, self.env_id = [task.unwrapped for task in self.tasks], args.env_id
        space = self.tasks[0].action_space
        self.low, self.high, self.num_obs = space.low, space.high, self.tasks[0].observation_space.shape[0]
        self.episode = EPISODE_LENGTH.get(args.env_id) or gym.spec(self.tasks[0].spec.id).max_episode_steps or 1000
        self.finished: list[tuple[float, int]] = []  # true return and length of the episodes that have ended

    def reset(self, seed: int) -> np.ndarray:
        self.finished.clear()  # those of the initial phase: a resumed run has not seen them
        self.left = np.full(len(self.tasks), self.episode)  # steps to the end of each episode
        self.score, self.length = np.zeros(len(self.tasks)), np.zeros(len(self.tasks), int)
        return np.stack([task.reset(seed=seed + i)[0] for i, task in enumerate(self.tasks)]).astype(np.float32)

    def stagger(self) -> None:
        """End the episodes that have just begun one after the other. Environments that start together would otherwise
        be in the same part of an episode for ever, and so would be each rollout."""
        self.left = np.ceil(self.episode * (1 + np.arange(len(self.tasks))) / len(self.tasks)).astype(int)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, dict]:
        """Observations, and (N, ...) each: executed, the actions within bounds; led_to, the observation that the step
        led to, which is not the next one where the episode ended; ended, by its time limit; and, for oracle, baseline,
        evaluation and log only, env_rewards."""
        executed = actions.clip(self.low, self.high)
        led_to, rewards = np.empty((len(actions), self.num_obs), np.float32), np.empty(len(actions))
        for i, robot in enumerate(self.robots):
            if self.env_id in SEGMENT_LENGTH:
                x_before = robot.data.qpos[0]
                robot.data.ctrl[:] = executed[i]
                mujoco.mj_step(robot.model, robot.data, nstep=robot.frame_skip)
                led_to[i], rewards[i] = robot._get_obs(), paper_reward(self.env_id, robot, x_before)
            else:
                led_to[i], rewards[i], *_ = self.tasks[i].step(executed[i])
        if self.env_id in UNLIMITED:
            angles = led_to[:, UNLIMITED[self.env_id]]
            angles -= 2 * np.pi * np.rint(angles / (2 * np.pi))
        self.left, self.score, self.length = self.left - 1, self.score + rewards, self.length + 1
        obs, ended = led_to.copy(), self.left == 0
        for i in np.flatnonzero(ended):
            if self.length[i] == self.episode:  # the first after `stagger` is shorter
                self.finished.append((float(self.score[i]), int(self.length[i])))
            self.left[i], self.score[i], self.length[i] = self.episode, 0, 0
            obs[i] = self.tasks[i].reset()[0]
        return obs, {"env_rewards": rewards, "ended": ended, "executed": executed, "led_to": led_to}

    def random_actions(self, rng) -> np.ndarray:
        return rng.uniform(self.low, self.high, (len(self.tasks), len(self.low))).astype(np.float32)


class Camera:
    """Pictures for people: the positions and velocities of the last `rows` steps, drawn when they are asked for."""

    def __init__(self, args: Args, num_envs: int, rows: int):
        if sys.platform == "linux":
            os.environ["MUJOCO_GL"] = RENDERER  # by default egl, which needs no screen
        sys.unraisablehook = lambda _: None  # Gymnasium's viewers complain when they go
        self.num_envs, self.kept = num_envs, deque(maxlen=rows)
        model = make_task(args.env_id).unwrapped.model
        self.follows = "track" in [model.camera(i).name for i in range(model.ncam)]
        named = {"camera_name": "track"} if self.follows else {}
        named |= {"width": CLIP["width"], "height": CLIP["height"]}
        self.robot = make_task(args.env_id, render_mode="rgb_array", **named).unwrapped
        if self.follows:  # the question names the orange torso; without the floor's squares a picture has a third
            geoms = self.robot.model
            geoms.geom_matid[:] = -1
            geoms.geom_rgba[geoms.geom_bodyid == 1] = (1, 0.35, 0, 1)
            geoms.geom_rgba[geoms.geom_bodyid == 0] = (0.35, 0.4, 0.4, 1)
        self.robot.reset()
        self.robot.render()
        for effect in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self.robot.mujoco_renderer.viewer.scn.flags[effect] = 0  # they take four fifths of the time to draw

    def record(self, envs: Envs, actions: np.ndarray):
        states = [np.concatenate([robot.data.qpos, robot.data.qvel]) for robot in envs.robots[: self.num_envs]]
        self.kept.append(states)

    def frames(self, env: int, row: int, length: int) -> np.ndarray:
        """(n, H, W, 3) RGB of an environment from this row of what is kept on; the newest row is -1."""
        frames = []
        for t in range(0, length, math.ceil(length / MOST_FRAMES)):
            self.robot.set_state(*np.split(self.kept[row + t][env], [self.robot.model.nq]))
            if self.follows:
                self.add_marks()
            frames.append(self.robot.render())
        return np.stack(frames)

    def add_marks(self):
        """To the next picture: a line across the floor at every metre, and an arrow to the right. The floor goes along:
        its edge is 20 or 40 metres from the start."""
        add, (x, y, _) = self.robot.mujoco_renderer.viewer.add_marker, self.robot.data.xpos[1]
        self.robot.data.geom_xpos[self.robot.model.geom_type == mujoco.mjtGeom.mjGEOM_PLANE, :2] = x, y
        for metre in range(round(x) - 3, round(x) + 4):
            line = {"pos": (metre, y, 0), "size": (0.02, 1, 0.001), "rgba": (0.55, 0.6, 0.6, 1)}
            add(type=mujoco.mjtGeom.mjGEOM_BOX, **line)
        arrow = {"pos": (x - 0.4, y + 0.9, 0.6), "size": (0.03, 0.03, 0.8), "rgba": (1, 0.8, 0.1, 1)}
        arrow["mat"] = (0, 0, 1, 0, 1, 0, -1, 0, 0)  # its length is along z: turned to x
        add(type=mujoco.mjtGeom.mjGEOM_ARROW, **arrow)


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
    """Gaussian policy with a std of its own per action, and value: networks 64-64-tanh. x: (B, D) raw observations;
    low, high: (A,) bounds of what the task executes."""

    def __init__(self, num_inputs: int, low, high, init_logstd: float):
        super().__init__()
        self.register_buffer("low", low.clone())
        self.register_buffer("high", high.clone())
        self.register_buffer("obs_mean", torch.zeros(num_inputs, dtype=torch.float64))
        self.register_buffer("obs_var", torch.ones(num_inputs, dtype=torch.float64))
        self.register_buffer("obs_count", torch.zeros((), dtype=torch.float64))
        self.actor_mean, self.critic = (
            nn.Sequential(
                layer_init(nn.Linear(num_inputs, 64)),
                nn.Tanh(),
                layer_init(nn.Linear(64, 64)),
                nn.Tanh(),
                layer_init(nn.Linear(64, outputs), std=std),
            )
            for outputs, std in ((len(low), 0.01), (1, 1.0))
        )
        self.actor_logstd = nn.Parameter(torch.full((len(low),), init_logstd))

    def normalise(self, x):
        return ((x - self.obs_mean.float()) / (self.obs_var.float() + 1e-8).sqrt()).clamp(-10, 10)

    @torch.no_grad()
    def renew_statistics(self, x):
        """Add a rollout's observations (B, D) to the running mean and variance. Called between updates only: inside
        of one, the first minibatch's ratio would no longer be 1."""
        x, n = x.double(), len(x)
        delta, total = x.mean(0) - self.obs_mean, self.obs_count + n
        squares = self.obs_var * self.obs_count + x.var(0, correction=0) * n + delta**2 * self.obs_count * n / total
        self.obs_mean.add_(delta * n / total)
        self.obs_var.copy_(squares / total)
        self.obs_count.copy_(total)

    def get_value(self, x):
        return self.critic(self.normalise(x)).flatten()

    def get_action_and_value(self, x, action=None):
        """Actions (B, A), not clamped yet, and (B,) each: their log-probability, entropy, value, and the square of how
        far the mean lies out of bounds."""
        x = self.normalise(x)
        mean, logstd = self.actor_mean(x), self.actor_logstd
        std = logstd.exp()
        if action is None:
            action = mean + std * torch.empty_like(mean).normal_()
        logprob = (-0.5 * ((action - mean) / std) ** 2 - logstd - 0.5 * math.log(2 * math.pi)).sum(-1)
        entropy = (logstd + 0.5 * math.log(2 * math.pi * math.e)).sum().expand(len(x))
        excess = ((mean - mean.clamp(self.low, self.high)) ** 2).sum(-1)
        return action, logprob, entropy, self.critic(x).flatten(), excess


# ---- Reward model ----------------------------------------------------------------------------------------------------
class RewardEnsemble(nn.Module):
    """All members of the ensemble in one batched pass (sections 2.2.3 and A.1).

    Per member: two layers of 64 leaky ReLUs on (observation, action), and one output. In: (B, D) raw; normalised here,
    so that a stored clip means the same for ever. Out: (B, M), a raw reward per member.
    """

    def __init__(self, num_inputs: int, members: int, l2_coef: float):
        super().__init__()
        self.members = members
        # No output bias: a constant cancels in every comparison, and the normaliser takes it out.
        shapes = ((num_inputs, 64), (64, 64), (64, 1))
        self.layers = nn.ParameterList(
            torch.empty(members, *shape).uniform_(-1 / math.sqrt(shape[0]), 1 / math.sqrt(shape[0])) for shape in shapes
        )
        self.biases = nn.ParameterList(torch.zeros(members, 1, 64) for _ in range(2))
        self.register_buffer("input_mean", torch.zeros(num_inputs))
        self.register_buffer("input_std", torch.ones(num_inputs))
        # Normaliser and the adaptive weight decay are part of the model: saved and restored with it.
        self.register_buffer("mean", torch.zeros(members))
        self.register_buffer("std", torch.ones(members))
        self.register_buffer("average_std", torch.ones(()))
        self.register_buffer("l2_coef", torch.full((members,), l2_coef))
        self.register_buffer("decisive", torch.zeros(2, 3, members))  # running `decisive_sums`

    def forward(self, x):
        x = ((x - self.input_mean) / self.input_std).clamp(-10, 10)
        h = x.expand(self.members, -1, -1)
        for weight, bias in zip(self.layers[:2], self.biases, strict=True):
            h = F.leaky_relu(torch.baddbmm(bias, h, weight), 0.01)
        return torch.bmm(h, self.layers[-1]).squeeze(-1).T

    def weights(self) -> list[torch.Tensor]:
        """The weights that decay, each (M, ...): no biases."""
        return [weight.flatten(1) for weight in self.layers]

    @torch.no_grad()
    def renew_inputs(self, x):
        """Mean and std of the inputs, from all rows (B, D) of the labels that the model is about to be fitted to."""
        self.input_mean.copy_(x.mean(0))
        self.input_std.copy_(x.std(0))
        self.input_std[self.input_std < 1e-4] = 1.0  # constant so far: the least move would be taken for ten stds

    @torch.no_grad()
    def score(self, x, batch: int = 4096) -> torch.Tensor:
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
    agent = Agent(envs.num_obs, torch.as_tensor(envs.low), torch.as_tensor(envs.high), args.init_logstd)
    l2_coef = 0.0 if args.ablation == "no-regularization" else args.l2_coef
    ensemble = RewardEnsemble(envs.num_obs + len(envs.low), args.members, l2_coef)
    return agent.to(args.device), ensemble.to(args.device)


# ---- Pairs and answers -----------------------------------------------------------------------------------------------
def model_inputs(clips: dict) -> torch.Tensor:
    """n clips -> what the reward model reads of their rows, (n L, D): observation and action."""
    return torch.cat([clips["obs"], clips["executed"]], -1).flatten(0, 1)


CLIP_ARRAYS = ("obs", "executed")  # that a clip consists of


class SegmentPool:
    """The last rows of every environment's stream, from which segments are drawn. Row numbers count from the start
    of the run; a row lies at its number modulo the pool's size."""

    def __init__(self, rows: int, num_envs: int, num_obs: int, num_actions: int, device):
        self.rows, self.count = rows, 0  # capacity, and rows since the start of the run, per environment
        self.streams = {
            "obs": torch.zeros(rows, num_envs, num_obs, device=device),
            "executed": torch.zeros(rows, num_envs, num_actions, device=device),
            "oracle_rewards": torch.zeros(rows, num_envs, device=device),
            "pred_rewards": torch.zeros(rows, num_envs, device=device),
        }

    def add(self, rollout: dict, oracle_rewards: torch.Tensor, pred_rewards: torch.Tensor):
        """Append a rollout, (T, N, ...) of every stream. Only the newest rows fit."""
        given = rollout | {"oracle_rewards": oracle_rewards, "pred_rewards": pred_rewards}
        for name, stream in self.streams.items():
            new = given[name]
            at = (torch.arange(len(new), device=stream.device) + self.count)[-self.rows :] % self.rows
            stream[at] = new[-self.rows :].to(stream)
        self.count += len(new)

    def first_row(self) -> int:
        """The oldest row that is still there."""
        return max(0, self.count - self.rows)

    def gather(self, name: str, starts: np.ndarray, first: int, last: int) -> torch.Tensor:
        """Rows start+first ... start+last-1 of a stream. starts: (n, 2) of (environment, row)."""
        stream = self.streams[name]
        envs, rows = torch.as_tensor(starts, device=stream.device).unbind(1)
        return stream[(rows[:, None] + torch.arange(first, last, device=stream.device)) % self.rows, envs[:, None]]

    def clips(self, starts: np.ndarray, length: int) -> dict:
        """Copies of the segments at starts, (n, ...) as `model_inputs` reads them."""
        return {name: self.gather(name, starts, 0, length) for name in CLIP_ARRAYS}


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
    (T N, ...). They end after one of mean KL divergence over target_kl. Out: means of what was logged, as tensors."""
    *_, b_returns, b_values = rollout
    logged = []
    for _ in range(args.update_epochs):
        b_inds = torch.as_tensor(rng.permutation(len(b_values)), device=b_values.device)
        for mb_inds in b_inds.tensor_split(args.num_minibatches):
            obs, actions, *rest = (b[mb_inds] for b in rollout)
            _, newlogprob, entropy, newvalue, excess = agent.get_action_and_value(obs, actions)
            loss, info = policy_loss(newlogprob, entropy, newvalue, *rest, args)
            # Far out of bounds all actions are one action, so nothing in PPO's loss leads a mean back that got there
            loss, info["out_of_bounds"] = loss + args.bound_coef * excess.mean(), excess.detach().mean()
            optimizer.zero_grad()
            loss.backward()
            info["grad_norm"] = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
            optimizer.step()
            # Not in the forward pass: beneath a clamp there is no gradient, and a std that got there stays
            agent.actor_logstd.data.clamp_(min=LEAST_LOGSTD)
            logged.append(info)
        approx_kl = torch.stack([info["approx_kl"] for info in logged[-args.num_minibatches :]]).mean()
        if approx_kl > args.target_kl:
            break
    means = {name: torch.stack([info[name] for info in logged]).mean() for name in logged[0]}
    means["epochs"] = torch.tensor(len(logged) / args.num_minibatches)
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
    """Train on minibatches drawn from all labels. Out: means of what was logged, as tensors.

    Member losses are summed, each normalised by its own weights, so that members don't share a gradient's size.
    """
    ensemble.renew_inputs(preferences.batch(range(len(preferences.labels)))[0])
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
    frames = math.ceil(args.clip_length / math.ceil(args.clip_length / MOST_FRAMES))
    gpu = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else "no GPU used"
    run = {
        "script": SCRIPT,
        "args": asdict(args),
        "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": {name: version(name) for name in PACKAGES},
        "commit": state[0] + "+" * (len(state) > 1) if state else None,  # "+": this file is not what the commit has
        "hardware": f"{platform.machine()}, {CORES} cores, {gpu}, Python {platform.python_version()}",
        "clip": CLIP | {"frames": frames, "fps": frames / 1.5},
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


def start_anew(key: list[int], envs: Envs) -> tuple[np.ndarray, np.random.Generator]:
    """Seed environments and generators by (seed, phase, progress), so that a checkpoint need not hold their states."""
    rng = np.random.default_rng(key)
    seed = int(rng.integers(2**31))
    torch.manual_seed(seed)  # actions
    obs = envs.reset(seed)
    envs.stagger()
    return obs, rng


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
    torch.manual_seed(args.seed)  # initial parameters

    envs = Envs(args, args.num_envs)
    agent, ensemble = make_models(args, envs)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    reward_optimizer = torch.optim.Adam(ensemble.parameters(), lr=args.reward_learning_rate, fused=True)
    modules = {"agent": agent, "optimizer": optimizer, "ensemble": ensemble, "reward_optimizer": reward_optimizer}
    pool = SegmentPool(args.pool_rows, args.num_envs, envs.num_obs, len(envs.low), args.device)
    progress = Progress() if is_new else load_checkpoint(run_dir, modules, pool)
    write_json(run_dir / "args.json", run)
    (run_dir / "summary.json").unlink(missing_ok=True)  # of a finished run that is trained on
    preferences = Preferences(run_dir / "preferences", progress.asked, None, args)
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
    if args.env_id not in SEGMENT_LENGTH:
        print(f"{args.env_id} is not one of the paper's tasks: its own reward, and clips of {args.clip_length} steps")
    started = time.monotonic() - progress.wall_seconds
    tell("initial" if is_new else "training", preferences, progress, args)
    if camera and is_new:
        print("the first clips are being drawn: start label_server.py in the same directory", flush=True)

    # 1. Roll the untrained policy out, ask about L(0) pairs of its segments, fit the ensemble to the answers
    if is_new and not args.true_reward:
        if args.reward_model:
            ensemble.load_state_dict(read_checkpoint(args.reward_model)["ensemble"])
        obs, rng = start_anew([args.seed, 0, preferences.asked], envs)
        first_fresh = 0  # clips start at or after this row, so that no two batches of questions share one
        wanted = min(args.labels, args.initial_labels + QUERY_BATCH * args.human)  # people get more for the meantime
        while not pool.count or preferences.used < args.initial_labels:
            tell("initial", preferences, progress, args)  # drawing takes long, and an old status looks dead
            rollout, obs = roll_out(agent, envs, camera, obs, args)
            progress.global_step += args.batch_size
            pool.add(rollout, rollout["env_rewards"], torch.full_like(rollout["values"], math.nan))
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
            obs, rng = start_anew([args.seed, 1, progress.iteration], envs)
        began = time.monotonic()
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - progress.iteration / args.num_iterations)
        now = replace(args, ent_coef=args.ent_coef * max(0.0, 1 - 2 * progress.iteration / args.num_iterations))
        progress.iteration += 1
        progress.global_step += args.batch_size

        # 2. Roll the policy out
        rollout, obs = roll_out(agent, envs, camera, obs, args)
        values = rollout["values"]

        # 3. Pay it: the whole rollout by one model, in one go. Only the baseline and the oracle read env_rewards
        if args.true_reward:
            pool.add(rollout, rollout["env_rewards"], values)  # nothing reads the third
            recent = pool.streams["oracle_rewards"][: pool.count]  # normalised over the pool, as the predictor's are
            pred_rewards = (rollout["env_rewards"].to(values) - recent.mean()) / recent.std().clamp(min=STD_FLOOR)
            pred_rewards *= args.reward_std
        else:
            raw = ensemble.score(model_inputs({name: rollout[name].to(values) for name in CLIP_ARRAYS}))
            pred_rewards = ensemble.normalise(raw, args.reward_std).view_as(values)
            pool.add(rollout, rollout["env_rewards"], pred_rewards)

        # 4. Update the policy. next_values are of led_to, not of the next row: after an end that is a reset's
        dones = rollout["ended"].to(values)
        with torch.no_grad():
            next_values = agent.get_value(rollout["led_to"].to(args.device).flatten(0, 1)).view_as(values)
        advantages, returns = compute_gae(pred_rewards, values, next_values, dones, args.gamma, args.gae_lambda)
        if not advantages.isfinite().all():  # before clips of such a policy are stored
            stop_at_infinity(run_dir, progress)
        batch = (rollout["obs"], rollout["actions"], rollout["logprobs"], advantages, returns, values)
        policy_log = update_policy(agent, optimizer, [x.flatten(0, 1) for x in batch], rng, now)
        agent.renew_statistics(rollout["obs"].flatten(0, 1))

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
    sys.path.append(os.getcwd())  # for tasks of one's own, whichever copy of this script runs
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
