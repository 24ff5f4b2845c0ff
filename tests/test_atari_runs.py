"""Whole runs of ppo_atari_rlhf.py: learning, seeds, ablations, resume, saved labels, bad input, logging.

Most play a toy of a few steps per episode in place of the emulator, through the same `train`; the headline command,
kills and Weights & Biases run on the real one in a process of their own.
"""

import dataclasses
import io
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ppo_atari_rlhf as script

ROOT = Path(script.__file__).parent
SCRIPT_NAME = "ppo_atari_rlhf"


class Toy:
    """A vector environment with ALE's interface: the screen is bright after action 1, and bright screens pay.

    Episodes last 37 steps plus the environment's number, so ends fall inside of clips.
    """

    single_action_space = SimpleNamespace(n=3)

    def __init__(self, num_envs, stack_num=4, grayscale=True, **_):
        self.num_envs, self.stack_num, self.grayscale = num_envs, stack_num, grayscale
        self.total_steps = 0

    def reset(self, seed):
        self.length = 37 + np.arange(self.num_envs)
        self.age = np.zeros(self.num_envs, dtype=int)
        self.rng = np.random.default_rng(seed)
        self.bright = self.rng.integers(0, 2, self.num_envs)
        self.stack = np.zeros((self.num_envs, 4, 84, 84), np.uint8)
        self.stack[:, -1] = self.frame()
        return self.observe(), {"lives": np.ones(self.num_envs, dtype=int)}

    def frame(self):
        frame = np.full((self.num_envs, 84, 84), 40, np.uint8)
        frame[:, 40:60, 30:60] += (150 * self.bright[:, None, None]).astype(np.uint8)
        return frame

    def observe(self):
        if self.grayscale:
            return self.stack.copy()
        return np.repeat(np.repeat(self.stack[:, -1:, :, :, None], 3, -1), 2, 2)

    def step(self, action):
        assert action.shape == (self.num_envs,)
        rewards, self.bright = self.bright.astype(np.int32), (np.asarray(action) == 1).astype(int)
        self.age += 1
        self.total_steps += self.num_envs
        ended = self.age == self.length
        self.age[ended] = 0
        self.stack = np.roll(self.stack, -1, 1)
        self.stack[ended] = 0
        self.stack[:, -1] = self.frame()
        return self.observe(), rewards, ended, np.zeros_like(ended), {"lives": np.ones(self.num_envs, dtype=int)}

    def close(self):
        pass


def play_toy(monkeypatch, script):
    """Let a script's runs play the toy, without a picture at the end; its A2C sibling's tests use this too."""
    monkeypatch.setattr(script, "make_envs", lambda args, num_envs, **kwargs: Toy(num_envs, **kwargs))
    monkeypatch.setattr(script, "draw_episode", lambda *_: None)
    monkeypatch.setattr(script, "REWARD_MINIBATCHES", 1)
    monkeypatch.setattr(script, "STATISTICS_ROWS", 100)
    return monkeypatch


@pytest.fixture
def toy(monkeypatch):
    return play_toy(monkeypatch, script)


SMALL = ["--num-envs", "4", "--num-steps", "16", "--num-minibatches", "2", "--update-epochs", "1"]
SMALL += ["--segment-length", "4", "--query-pool-steps", "600", "--pretrain-pairs", "256", "--pairs-per-step", "0.25"]
SMALL += ["--reward-minibatch-size", "8", "--torch-threads", "1", "--env-threads", "1"]
SMALL += ["--eval-episodes", "2", "--checkpoint-every", "5", "--reset-every", "8"]
FEEDBACK = ["--oracle", "--labels", "48", "--total-timesteps", "1280"]


def run(tmp_path, *flags, small=SMALL):
    where = [] if "--resume" in flags or "--evaluate" in flags else ["--runs-dir", str(tmp_path)]
    return script.train(script.parse_args([*small, *where, *flags]))


def only(tmp_path) -> Path:
    (run_dir,) = tmp_path.iterdir()
    return run_dir


# ---------------------------------------------------------------------------------------------------------- learning
def test_the_policy_learns_from_comparisons(tmp_path, toy):
    """All of it together: from answers about pairs of clips to an agent that does what was preferred.

    A random agent scores a third of an episode's 37 or 38 steps, the best one nearly all."""
    more = ["--labels", "120", "--total-timesteps", "5120", "--learning-rate", "1e-3", "--update-epochs", "2"]
    summary = run(tmp_path, "--oracle", *more, "--reward-learning-rate", "1e-3", "--num-steps", "32")
    assert summary["labels_used"] == 120 and summary["reward_accuracy_heldout"] > 0.8
    assert summary["final_return_mean"] > 25


def test_wrong_answers_teach_the_opposite(tmp_path, toy):
    """The agent has no other source of reward: with every answer flipped it learns to avoid what pays."""
    more = ["--labels", "120", "--total-timesteps", "5120", "--learning-rate", "1e-3", "--update-epochs", "2"]
    more += ["--reward-learning-rate", "1e-3", "--num-steps", "32", "--teacher-mistake", "1"]
    assert run(tmp_path, "--oracle", *more)["final_return_mean"] < 6


# --------------------------------------------------------------------------------------------------- runs and numbers
def test_a_time_limit_costs_no_life(tmp_path, toy):
    """After it, ALE tells of the next game's lives, which may be fewer."""

    class Limited(Toy):
        def reset(self, seed):
            obs, infos = super().reset(seed)
            return obs, {"lives": 3 * infos["lives"]}

        def step(self, action):
            obs, rewards, ended, none, infos = super().step(action)
            return obs, rewards, none, ended, infos | {"lives": np.where(self.age, 3, 2)}  # 2 after an end

    losses = []
    toy.setattr(script, "make_envs", lambda args, num_envs, **kwargs: Limited(num_envs, **kwargs))
    toy.setattr(script, "oracle_rewards_of", lambda rewards, lost, args: losses.append(lost.sum()) or rewards)
    toy.setattr(script, "evaluate", lambda *_, **__: {"returns": np.zeros(1), "screens": []})
    run(tmp_path, *FEEDBACK)
    assert len(losses) == 20 and sum(losses) == 0


def test_a_run_counts_right_and_writes_what_it_promises(tmp_path, toy):
    """Traps 28, 36 and 41: labels and steps are counted once, and there are exactly as many as asked for."""
    made = []
    toy.setattr(script, "make_envs", lambda args, n, **kwargs: made.append(Toy(n, **kwargs)) or made[-1])
    summary = run(tmp_path, *FEEDBACK, "--log-every", "5")
    assert summary["finished"] and summary["labels_used"] == summary["labels"] == 48
    assert summary["asked"] == 48 and summary["skipped"] == 0
    assert made[0].total_steps == summary["global_step"] == summary["total_timesteps"] == 1280
    run_dir = only(tmp_path)
    stored = list(script.read_shards(run_dir / "preferences", script.clip_shapes(4)))
    assert sum(len(s["mu"]) for s in stored) == 48
    assert sum((s["mu"] == 0.5).sum() for s in stored) == summary["ties"] > 0
    for s in stored:  # the answers are the oracle's
        assert np.array_equal(s["mu"], (np.sign(s["returns"][:, 0] - s["returns"][:, 1]) + 1) / 2)
    pairs = np.concatenate([s["segments"] for s in stored])
    assert len({frozenset(map(tuple, pair)) for pair in pairs.tolist()}) == 48
    assert json.loads((run_dir / "summary.json").read_text()) == summary
    assert all(np.isfinite(summary[name]) for name in ("reward_loss", "pg_loss", "v_loss", "entropy"))
    assert summary["teacher_beta"] is None  # infinite
    assert {path.name.split(".")[0] for path in run_dir.iterdir()} == {
        "args", "checkpoint", "summary", "preferences", "events",
    }  # fmt: skip
    with pytest.raises(SystemExit):  # a finished run is not run on
        run(tmp_path, "--resume", str(run_dir), "--seed", "3", small=[])


def test_same_seed_same_parameters_other_seed_others(tmp_path, toy):
    first, again = (run(tmp_path / name, *FEEDBACK)["params_sha256"] for name in "ab")
    other = run(tmp_path / "c", *FEEDBACK, "--seed", "2")["params_sha256"]
    assert first == again != other


def test_every_ablation_trains_parameters_of_its_own(tmp_path, toy):
    hashes, initial, pretrain = {}, [], script.pretrain
    toy.setattr(
        script, "pretrain", lambda e, o, labels, *rest: initial.append(labels.count) or pretrain(e, o, labels, *rest)
    )
    for ablation in script.Ablation.__args__:
        fast = ["--pretrain-pairs", "64", "--pairs-per-step", "0.1"]
        summary = run(tmp_path / ablation, *FEEDBACK, "--ablation", ablation, *fast)
        assert summary["labels_used"] == 48 and summary["ablation"] == ablation
        assert np.isfinite(summary["reward_loss"])
        hashes[ablation] = summary["params_sha256"]
        length = 1 if ablation == "no-segments" else 4
        stored = list(script.read_shards(only(tmp_path / ablation) / "preferences", script.clip_shapes(length)))
        checkpoint = script.read_checkpoint(str(only(tmp_path / ablation)))
        assert len(checkpoint["ensemble"]["mean"]) == (1 if ablation == "no-ensemble" else 3)
        assert (checkpoint["ensemble"]["l2_coef"] == 0).all() == (ablation == "no-regularization")
        assert sum(len(shard["mu"]) for shard in stored) == 48
        assert initial.pop() == (48 if ablation == "no-online-queries" else 12) and not initial
    assert len(set(hashes.values())) == 7


def test_true_reward_pays_the_score_and_sees_ends(tmp_path, toy):
    dones = []
    gae = script.compute_gae
    toy.setattr(script, "compute_gae", lambda *a: dones.append((a[0], a[3])) or gae(*a))
    summary = run(tmp_path, "--true-reward", "--total-timesteps", "1600")
    assert summary["labels"] == summary["labels_used"] == 0 and summary["reward_accuracy_heldout"] is None
    assert torch.cat([d for _, d in dones]).sum() >= 4 * 400 // 40 - 12  # ends, less those that resets cut
    rewards = dones[5][0]
    assert set(rewards.unique().tolist()) <= {0.0, rewards.max().item()} and rewards.max() > 0.05
    dones.clear()
    run(tmp_path / "labels", *FEEDBACK)
    assert not torch.cat([d for _, d in dones]).any()  # trap 32: hidden


def test_given_the_labels_the_true_reward_changes_nothing(tmp_path, toy):
    """Trap 38: with the reward replaced by noise, labels loaded from before, the run ends in the same parameters."""
    run(tmp_path / "labels", *FEEDBACK)
    loaded = ["--oracle", "--labels", "0", "--preferences", str(only(tmp_path / "labels")), "--total-timesteps", "640"]
    honest = run(tmp_path / "honest", *loaded)
    step, noise = Toy.step, np.random.default_rng(0)

    def noisy(self, action):
        frames, rewards, *rest = step(self, action)
        return frames, noise.normal(size=rewards.shape), *rest

    toy.setattr(Toy, "step", noisy)
    assert run(tmp_path / "noise", *loaded)["params_sha256"] == honest["params_sha256"]
    assert honest["labels_loaded"] == 48 and honest["labels_used"] == honest["asked"] == 0


def test_imperfect_teachers_and_skips_keep_the_budget(tmp_path, toy):
    summary = run(tmp_path, *FEEDBACK, "--teacher-skip", "0.7", "--teacher-mistake", "0.2", "--teacher-equal", "0.3")
    assert summary["labels_used"] == 48 and summary["skipped"] > 0
    assert summary["asked"] == summary["labels_used"] + summary["skipped"]


def test_a_frozen_reward_model_pays_a_new_agent(tmp_path, toy):
    run(tmp_path / "first", *FEEDBACK)
    source = only(tmp_path / "first")
    learned = script.read_checkpoint(str(source))["ensemble"]
    summary = run(
        tmp_path / "b", "--oracle", "--labels", "0", "--reward-model", str(source), "--total-timesteps", "640"
    )
    assert summary["finished"] and summary["asked"] == 0
    frozen = script.read_checkpoint(str(only(tmp_path / "b")))["ensemble"]
    rescaled = {name for name in learned if not torch.equal(frozen[name], learned[name])}
    assert rescaled == {"mean", "std", "average_std", "renewals"}  # on what the new agent does; nothing else moves


def test_labels_can_be_reused_and_added_to(tmp_path, toy):
    run(tmp_path / "first", *FEEDBACK)
    source = str(only(tmp_path / "first"))
    summary = run(tmp_path / "b", "--oracle", "--labels", "40", "--preferences", source, "--total-timesteps", "640")
    assert (summary["labels_loaded"], summary["labels_used"]) == (48, 40)
    stored = list(script.read_shards(only(tmp_path / "b") / "preferences", script.clip_shapes(4)))
    assert sum(len(s["mu"]) for s in stored) == 88  # the run directory needs no other


@pytest.mark.parametrize(
    "flags",
    [
        ["--labels", "1", "--total-timesteps", "640"],
        ["--labels", "3", "--total-timesteps", "640", "--num-envs", "1", "--num-steps", "64"],
        [
            "--labels",
            "24",
            "--query-pool-steps",
            "200",
            "--total-timesteps",
            "1280",
        ],  # fewer pairs fit than a batch has
    ],
    ids=["one label", "one environment", "small pool"],
)
def test_small_runs_use_their_budget(tmp_path, toy, flags):
    summary = run(tmp_path, "--oracle", *flags)
    assert summary["labels_used"] == summary["labels"] and summary["entropy"] is not None


def test_labels_due_by_hand():
    args = script.parse_args([*SMALL, "--oracle", "--labels", "80", "--total-timesteps", "6400"])
    pool, progress = script.SegmentPool(args.pool_rows, 4, "cpu"), script.Progress(paid_from=0)
    assert (args.initial_labels, args.query_limit) == (20, (150 - 4) * 4 // 16)

    def due(rows, used, step, fresh_from=0, last=False):
        pool.count, progress.labels_used, progress.global_step, progress.fresh_from = rows, used, step, fresh_from
        return script.labels_due(progress, pool, last, args)

    assert due(67, 0, 268) == (0, 0)  # (67 - 4) * 4 / 16 = 15 pairs: not yet a batch
    assert due(68, 0, 272) == (16, 0)
    assert due(100, 16, 400, fresh_from=68) == (4, 68)  # the last four, from rows that are new
    assert due(400, 32, 640) == (0, 400 - 150)  # 20 + 60 ln 2 / ln 11 = 37.3: 5 are due, a batch is (80 - 20) / 10
    assert due(400, 31, 640) == (6, 250)
    assert due(1600, 75, 6400, last=True) == (5, 1450)  # the rest at the end


# ------------------------------------------------------------------------------------------------------------- resume
@pytest.mark.parametrize(
    "flags",
    [
        [*FEEDBACK, "--teacher-mistake", "0.2", "--teacher-equal", "0.3", "--teacher-skip", "0.3"],
        ["--true-reward", "--total-timesteps", "1280"],
    ],
    ids=["imperfect teacher", "true reward"],
)
def test_stopped_and_resumed_equals_undisturbed(tmp_path, toy, flags):
    """Trap 40. Stopped in order by SIGTERM twice, between two checkpoints, once while initial labels are asked."""
    whole = run(tmp_path / "whole", *flags)
    stops, step = iter([5, 130]), Toy.step

    def interrupted(self, action):
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, action)

    toy.setattr(Toy, "step", interrupted)
    toy.setattr(Toy, "stop_at", next(stops), raising=False)
    summary = run(tmp_path / "cut", *flags)
    assert not summary["finished"] and summary["final_return_mean"] is None
    cut = only(tmp_path / "cut")
    toy.setattr(Toy, "stop_at", next(stops))
    assert not run(tmp_path, "--resume", str(cut), small=[])["finished"]
    toy.setattr(Toy, "stop_at", 0)
    resumed = run(tmp_path, "--resume", str(cut), small=[])
    different = {name for name in whole if whole[name] != resumed[name]}
    assert different <= {"wall_seconds", "sps"} and resumed["params_sha256"] == whole["params_sha256"]


def test_a_stop_signal_while_logging_is_saved_too(tmp_path, toy):
    correlation, sent = script.reward_correlation, []

    def interrupted(*args):
        if not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        return correlation(*args)

    toy.setattr(script, "reward_correlation", interrupted)
    assert not run(tmp_path, *FEEDBACK, "--log-every", "2")["finished"]
    assert script.read_checkpoint(str(only(tmp_path)))["progress"]["iteration"] == 3  # noted at 2, in time for 3


def test_a_resumed_run_needs_no_other_run(tmp_path, toy):
    """Labels and reward models that a run started from are in its own directory."""
    run(tmp_path / "first", *FEEDBACK)
    source = only(tmp_path / "first")
    begun = []
    for name, flag in (("labels", "--preferences"), ("model", "--reward-model")):
        run(tmp_path / name, "--oracle", "--labels", "0", flag, str(source), "--total-timesteps", "640")
        begun.append((only(tmp_path / name), script.read_checkpoint(str(only(tmp_path / name)))))
    shutil.rmtree(source)
    for run_dir, checkpoint in begun:
        before = json.loads((run_dir / "summary.json").read_text())
        (run_dir / "summary.json").unlink()
        after = run(tmp_path, "--resume", str(run_dir), small=[])
        assert after["params_sha256"] == before["params_sha256"] and after["finished"]
        assert after["labels_loaded"] == checkpoint["progress"]["labels_loaded"]


def test_a_full_disk_loses_no_checkpoint(tmp_path, toy):
    """The disk fills at the second checkpoint: the run dies, and goes on from the first one to the same end."""
    whole, save, calls = run(tmp_path / "whole", *FEEDBACK), torch.save, []

    def full(state, file):
        calls.append(file)
        if len(calls) == 2:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        save(state, file)

    toy.setattr(torch, "save", full)
    with pytest.raises(OSError):
        run(tmp_path / "cut", *FEEDBACK)
    cut = only(tmp_path / "cut")
    assert not (cut / "checkpoint.tmp").exists() and not (cut / "summary.json").exists()
    assert run(tmp_path, "--resume", str(cut), small=[])["params_sha256"] == whole["params_sha256"]


def test_a_crash_is_an_exception_not_a_finished_run(tmp_path, toy):
    """Trap 43."""
    toy.setattr(script, "update_policy", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, *FEEDBACK)
    assert not (only(tmp_path) / "summary.json").exists()


# ---------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "flags, said",
    [
        ([], "exactly one of"),
        (["--oracle", "--true-reward"], "exactly one of"),
        (["--oracle", "--env-id", "ALE/Pnog-v5"], "ALE/Pong-v5"),
        (["--oracle", "--env-id", "Hopper-v5"], "not an ALE game"),
        (["--oracle", "--ablation", "no-labels"], "invalid choice"),
        (["--oracle", "--labels", "-3"], "negative"),
        (["--oracle", "--labels", "0"], "nothing to learn from"),
        (["--oracle", "--labels", "5500", "--total-timesteps", "10000"], "more than"),
        (["--oracle", "--num-minibatches", "7"], "does not divide"),
        (["--oracle", "--teacher-mistake", "1.5"], "outside [0, 1]"),
        (["--oracle", "--gamma", "nan"], "outside [0, 1]"),
        (["--oracle", "--l2-coef", "0.01"], "outside [1e-6, 1e-3]"),
        (["--oracle", "--num-envs", "0"], "at least 1"),
        (["--oracle", "--learning-rate", "-1"], "at least 0"),
        (["--oracle", "--ablation", "target", "--teacher-mistake", "0.1"], "--teacher"),
        (["--true-reward", "--labels", "10"], "learns no reward"),
        (["--oracle", "--labels", "0", "--preferences", "nowhere"], "not a run directory"),
        (["--oracle", "--labels", "0", "--reward-model", "nowhere"], "not a run directory"),
        (["--oracle", "--device", "cuda:99"], "not available"),
        (["--resume", "nowhere"], "not a run directory"),
        (["--evaluate", "nowhere"], "not a run directory"),
        (["--human"], "label server"),
        (["--oracle", "--query-pool-steps", "500"], "more than"),
        (["--oracle", "--oracle-end-penalty", "nan"], "at least 0"),
        (["--oracle", "--learning-rate", "inf"], "at least 0"),
        (["--oracle", "--num-envs", "4", "--num-steps", "16", "--num-minibatches", "64"], "one step per minibatch"),
        (["--oracle", "--torch-threads", "0"], "at least 1"),
        (["--oracle", "--seed", "99999999999999999999"], "below 2^32"),
        (["--oracle", "--device", "meta"], "none of"),
        (["--oracle", "--random"], "goes with"),
        (["--true-reward", "--teacher-mistake", "0.1"], "learns no reward"),
        (["--resume", "a", "--evaluate", "b"], "give one of"),
        (["--oracle", "--labels", "0", "--reward-model", "x", "--ablation", "no-ensemble"], "no --ablation"),
        (["--oracle", "--labels", "0", "--preferences", "x", "--ablation", "random-queries"], "asks nothing"),
        (["--oracle", "--labels", "0", "--reward-model", "x", "--teacher-skip", "0.1"], "asks nothing"),
        (["--human", "--labels", "5500", "--total-timesteps", "600000"], "more than"),
        (["--human", "--label-server", "http://[::1"], "--label-server"),
    ],
)
def test_bad_input_ends_with_one_sentence_and_code_2(tmp_path, monkeypatch, capfd, flags, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        script.train(script.parse_args(flags))
    assert end.value.code == 2 and not list(tmp_path.iterdir())
    shown = capfd.readouterr().err
    assert said in " ".join(shown.replace("│", " ").split())
    if "invalid choice" not in said:  # that one is drawn by the command line's library
        assert len(shown.strip().splitlines()) == 1


def test_broken_run_directories_are_refused(tmp_path, toy, capsys):
    run(tmp_path / "good", *FEEDBACK)
    good = only(tmp_path / "good")
    labels = ["--oracle", "--labels", "0", "--total-timesteps", "640", "--preferences", str(good)]

    def refused(said, *flags, small=()):
        (tmp_path / "new").mkdir(exist_ok=True)
        with pytest.raises(SystemExit) as end:
            run(tmp_path / "new", *flags, small=small)
        assert end.value.code == 2 and said in capsys.readouterr().err
        assert not list((tmp_path / "new").iterdir())

    refused("--seed can't be changed", "--resume", str(good), "--seed", "4")
    refused("is negative", "--resume", str(good), "--torch-threads", "-1")
    refused("other clips", *labels, "--segment-length", "5", small=SMALL)
    refused("a run of", *labels, "--env-id", "ALE/Breakout-v5", small=SMALL)
    (good / "evaluation").write_text("")
    toy.setattr(script, "evaluate", lambda *_, **__: pytest.fail("it was to be refused before an episode is played"))
    refused("can't write to", "--evaluate", str(good))
    shard = sorted((good / "preferences").iterdir())[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    refused("truncated", *labels, small=SMALL)
    refused("truncated", "--resume", str(good))
    assert shard.exists()
    shard.unlink()
    refused("has lost the file of label", *labels, small=SMALL)
    refused("has lost the file of label", "--resume", str(good))
    shard.write_bytes(whole)
    newest = sorted((good / "preferences").iterdir())[-1]
    whole = newest.read_bytes()
    newest.unlink()
    refused("labels that the checkpoint counts", "--resume", str(good))
    newest.write_bytes(whole)
    checkpoint = (good / "checkpoint.pt").read_bytes()
    (good / "checkpoint.pt").write_bytes(checkpoint[: len(checkpoint) // 2])
    refused("truncated", "--resume", str(good))
    of_another = torch.load(io.BytesIO(checkpoint))
    of_another["progress"]["unheard_of"] = 1
    torch.save(of_another, good / "checkpoint.pt")
    refused("of another version", "--resume", str(good))
    (good / "checkpoint.pt").unlink()
    refused("no checkpoint", "--evaluate", str(good))
    args = json.loads((good / "args.json").read_text()) | {"script": "a2c_atari_rlhf"}
    (good / "args.json").write_text(json.dumps(args))
    refused("written by a2c_atari_rlhf", "--resume", str(good))
    (good / "args.json").write_text("{")
    refused("not a run directory", "--resume", str(good))
    (good / "args.json").write_text("{}")
    refused("not a run directory", "--resume", str(good))
    (good / "args.json").write_text(json.dumps(args | {"script": SCRIPT_NAME, "args": {"env_id": "x", "new": 1}}))
    refused("another version", "--resume", str(good))
    (good / "args.json").write_text(
        json.dumps(args | {"script": SCRIPT_NAME, "args": dict([*args["args"].items()][1:])})
    )
    refused("another version", "--resume", str(good))  # not with today's default for what it did not know
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("")
    link.symlink_to(tmp_path / "disk that is not there")
    for place in (file / "sub", link):
        with pytest.raises(SystemExit) as end:
            run(place, *FEEDBACK)
        assert end.value.code == 2 and "can't write to" in capsys.readouterr().err


def test_tracking_without_a_key_is_refused_before_a_run_begins(tmp_path):
    command = [sys.executable, str(ROOT / f"{SCRIPT_NAME}.py"), "--oracle", "--track"]
    unknown = {"HOME": str(tmp_path), "WANDB_MODE": "online", "WANDB_CONFIG_DIR": str(tmp_path / "wandb")}
    environment = {name: value for name, value in os.environ.items() if name not in ("WANDB_API_KEY", "NETRC")}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment | unknown, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 2 and "API key" in done.stderr and not (tmp_path / "runs").exists()


def test_a_copy_that_was_changed_is_not_the_commit(tmp_path, monkeypatch):
    """However it was changed: in place, or as a new file beside the others."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=Ann", "-c", "user.email=ann@example.org"]
    monkeypatch.setattr(script, "__file__", str(tmp_path / "ppo.py"))
    assert script.git_commit() is None
    (tmp_path / "ppo.py").write_text("1")
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "ppo.py"], check=True)
    subprocess.run([*git, "commit", "-qm", "First"], check=True)
    assert re.fullmatch("[0-9a-f]{10}", script.git_commit())
    (tmp_path / "ppo.py").write_text("2")
    assert re.fullmatch(r"[0-9a-f]{10}\+", script.git_commit())
    monkeypatch.setattr(script, "__file__", str(tmp_path / "mine.py"))
    (tmp_path / "mine.py").write_text("1")
    assert re.fullmatch(r"[0-9a-f]{10}\+", script.git_commit())


def test_two_runs_of_one_second_have_directories_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(script.time, "strftime", lambda _: "now")
    dirs = {script.make_run_dir(script.Args(runs_dir=str(tmp_path / "new"), seed=3)) for _ in range(3)}
    assert len(dirs) == 3 and all((path / "args.json").exists() and (path / "preferences").is_dir() for path in dirs)


def test_sweeps_spell_booleans_their_own_way():
    args = script.parse_args(["--oracle=True", "--true_reward=False", "--anneal_lr=False", "--learning_rate=0.001"])
    assert args.oracle and not args.true_reward and not args.anneal_lr and args.learning_rate == 0.001
    with pytest.raises(SystemExit):
        script.parse_args(["--oracle", "--no-anneal-lr=True"])  # which of the two?


# ------------------------------------------------------------------------------------------------- from outside
def command(*flags):
    return [sys.executable, str(ROOT / "ppo_atari_rlhf.py"), *flags]


REAL = ["--num-envs", "4", "--num-steps", "32", "--num-minibatches", "2", "--update-epochs", "1"]
REAL += ["--torch-threads", "1", "--env-threads", "1", "--pretrain-pairs", "128", "--query-pool-steps", "2000"]
REAL += ["--checkpoint-every", "3", "--reset-every", "7", "--eval-episodes", "1", "--log-every", "5"]
REAL += ["--reward-minibatch-size", "4"]  # so that it is updated every 512 steps
REAL += ["--oracle", "--labels", "12", "--total-timesteps", "1792", "--env-id", "ALE/Seaquest-v5"]


def test_help_tells_what_the_defaults_do():
    shown = subprocess.run(command("--help"), capture_output=True, text=True, check=True).stdout
    assert "10M steps" in shown and "hours" in shown
    assert all(f"--{field.name.replace('_', '-')}" in shown for field in dataclasses.fields(script.Args))


def test_killed_at_random_moments_and_resumed_equals_undisturbed(tmp_path):
    """SIGKILL on the real emulator, wherever it hits; benchmarks/kill_resume.py does this ten times at length."""
    whole = subprocess.run(command(*REAL, "--runs-dir", str(tmp_path / "whole")), capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen(command(*REAL, "--runs-dir", str(tmp_path / "cut")), stdout=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not list(tmp_path.glob("cut/*/checkpoint.pt")) and time.time() < deadline:
        time.sleep(0.05)
    time.sleep(random.random() * 2)
    assert process.poll() is None  # else nothing is tested
    process.kill()
    process.wait()
    cut = only(tmp_path / "cut")
    end = subprocess.run(command("--resume", str(cut)), capture_output=True, text=True)
    assert end.returncode == 0, end.stderr
    summaries = [json.loads((d / "summary.json").read_text()) for d in (only(tmp_path / "whole"), cut)]
    assert summaries[0]["params_sha256"] == summaries[1]["params_sha256"]
    assert summaries[0]["labels_used"] == summaries[1]["labels_used"] == 12
    assert all(s["final_episodes"] == 1 and s["final_return_mean"] >= 0 for s in summaries)
    assert (cut / "episode" / "episode.webm").stat().st_size > 10_000
    assert not whole.stderr and "warning" not in whole.stdout + end.stdout + end.stderr

    shown = subprocess.run(command("--evaluate", str(cut), "--random", "--eval-episodes", "2"), capture_output=True)
    assert shown.returncode == 0, shown.stderr
    row = json.loads((cut / "random" / "summary.json").read_text())
    assert row["feedback"] == "random" and row["final_episodes"] == 2 and row["final_return_mean"] > 0


def wandb_records(path: Path):
    """What an offline run of W&B wrote: protobufs in blocks of 32 KiB, as in LevelDB's log."""
    from wandb.proto import wandb_internal_pb2

    data, at, record = path.read_bytes(), 7, b""
    while at + 7 < len(data):
        left = 32768 - at % 32768
        if left < 7:  # no room for a header
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def values_of(items) -> dict:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def test_weights_and_biases_gets_it_all_and_a_resumed_run_goes_on(tmp_path):
    env = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    flags = [*REAL, "--track", "--runs-dir", str(tmp_path), "--log-every", "1"]
    cut = subprocess.Popen(command(*flags), stdout=subprocess.PIPE, text=True, env=env)
    for line in cut.stdout:
        if "entropy" in line and "entropy  nan" not in line:  # the policy is being trained
            cut.send_signal(signal.SIGTERM)
            break
    cut.communicate()
    run_dir, runs, steps = only(tmp_path), [], []
    assert not json.loads((run_dir / "summary.json").read_text())["finished"]
    done = subprocess.run(command("--resume", str(run_dir)), capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    logs = sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(logs) == 2
    for log in logs:
        records = list(wandb_records(log))
        runs.append(next(record.run for record in records if record.HasField("run")))
        rows = [values_of(record.history.item) for record in records if record.HasField("history")]
        assert all(
            {"global_step", "labels"} <= row.keys() for row in rows if "episode/path" not in row
        )  # either as x axis
        steps.append([row["global_step"] for row in rows if "losses/entropy" in row])
    assert runs[0].run_id == runs[1].run_id == run_dir.name  # which W&B continues
    assert steps[0] and steps[1] and max(steps[0]) < min(steps[1]) and max(steps[1]) == 1792
    config = values_of(runs[0].config.update)
    assert config["labels"] == 12 and config["env_id"] == "ALE/Seaquest-v5" and config["oracle"]
    logged = set().union(*rows)
    assert {"charts/eval_return", "reward_model/accuracy_heldout", "reward_model/correlation"} <= logged
    summary = values_of(item for record in records for item in record.summary.update)
    assert summary["finished"] is True and summary["final_return_mean"] >= 0 and summary["labels_used"] == 12
    (video,) = (row["episode/path"] for row in rows if "episode/path" in row)
    assert video.endswith(".webm") and (log.parent / "files" / video).stat().st_size > 10_000
