"""Whole runs of ppo_atari_rlhf.py: learning, numbers, ablations, resume, other runs' labels, bad input, logging.

Most play a toy of a few steps per episode in place of the emulator, through the same `train`; kills, signals and
Weights & Biases run on the real one in a process of their own.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ppo_atari_rlhf as script
from runs import REFUSED, Killed, answer_open, answers, ended, kill, only, refused_here

ROOT = Path(script.__file__).parent


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
        colour = self.stack[:, -1:, :, :, None].repeat(3, 2).repeat(2, 3).repeat(3, 4)
        return np.ascontiguousarray(colour[:, :, :210, :160])

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
    """Let a script's runs play the toy; its A2C sibling's tests use this too."""
    monkeypatch.setattr(script, "make_games", lambda args, num_envs, **kwargs: Toy(num_envs, **kwargs))
    monkeypatch.setattr(script, "QUERY_BATCH", 3)
    monkeypatch.setattr(script, "QUERY_CANDIDATES", 3)
    monkeypatch.setattr(script, "REWARD_MINIBATCHES", 1)
    monkeypatch.setattr(script, "STATISTICS_ROWS", 100)
    return monkeypatch


@pytest.fixture
def toy(monkeypatch):
    return play_toy(monkeypatch, script)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The directory of an undisturbed run, to compare with. Who changes it copies it first."""
    with pytest.MonkeyPatch.context() as patch:
        play_toy(patch, script)
        return Path(run(tmp_path_factory.mktemp("whole"), *FEEDBACK)["resume"])


SMALL = ["--num-envs", "4", "--num-steps", "16", "--num-minibatches", "2", "--update-epochs", "1", "--device", "cpu"]
SMALL += ["--segment-length", "4", "--query-pool-steps", "600", "--pretrain-pairs", "64", "--pairs-per-step", "0.125"]
SMALL += ["--reward-minibatch-size", "2", "--threads", "1", "--eval-episodes", "1", "--reset-every", "4"]
FEEDBACK = ["--oracle", "--labels", "48", "--total-timesteps", "768"]  # 12 iterations, labels in batches of three
TEACHER = ["--teacher-mistake", "0.2", "--teacher-equal", "0.3", "--teacher-skip", "0.3", "--teacher-beta", "2"]


def run(folder, *flags, small=SMALL, script=script):
    return script.train(script.parse_args([*small, "--runs-dir", str(folder), *flags]))


def resume(run_dir, *flags, script=script):
    return script.train(script.parse_args(["--resume", str(run_dir), *flags]))


def digest(run_dir) -> str:
    """Of everything in a checkpoint that later parameters depend on."""
    state, sha = torch.load(Path(run_dir) / "checkpoint.pt", weights_only=True), hashlib.sha256()
    for module in ("agent", "ensemble"):
        for name, tensor in sorted(state[module].items()):
            sha.update(name.encode() + tensor.contiguous().numpy().tobytes())
    counts = {
        name: state["progress"][name] for name in ("iteration", "global_step", "asked", "pairs_presented", "returns")
    }
    return sha.hexdigest() + json.dumps(counts)


# ---------------------------------------------------------------------------------------------------------- learning
LEARNING = ["--oracle", "--labels", "120", "--total-timesteps", "2560", "--learning-rate", "1e-3"]
LEARNING += ["--pretrain-pairs", "256", "--reward-minibatch-size", "8", "--reset-every", "6", "--update-epochs", "2"]
LEARNING += ["--reward-learning-rate", "1e-3", "--pairs-per-step", "0.25", "--num-steps", "32", "--eval-episodes", "4"]


def test_the_policy_learns_from_comparisons(tmp_path, toy):
    """All of it together: from answers about pairs of clips to an agent that does what was preferred.

    A random agent scores a third of an episode's 37 to 40 steps, the best one nearly all."""
    summary = run(tmp_path, *LEARNING)
    assert summary["labels_used"] == 120 and summary["reward_accuracy_heldout"] > 0.75
    assert summary["final_return_mean"] > 24


def test_wrong_answers_teach_the_opposite(tmp_path, toy):
    """The agent has no other source of reward: with every answer flipped it learns to avoid what pays."""
    assert run(tmp_path, *LEARNING, "--teacher-mistake", "1")["final_return_mean"] < 7


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

    toy.setattr(script, "make_games", lambda args, num_envs, **kwargs: Limited(num_envs, **kwargs))
    envs = script.Envs(script.parse_args(["--true-reward"]), 3)
    envs.reset(0)
    told = [envs.step(np.ones(3, int))[1] for _ in range(100)]
    assert sum(t["ended"].sum() for t in told) == 6 and not any(t["lost"].any() for t in told)


def test_a_run_counts_right_and_writes_what_it_promises(tmp_path, toy):
    """Traps 28, 36 and 41: labels and steps are counted once, and there are exactly as many as asked for."""
    made = []
    toy.setattr(script, "make_games", lambda args, n, **kwargs: made.append(Toy(n, **kwargs)) or made[-1])
    summary = run(tmp_path, *FEEDBACK, "--log-every", "5")
    assert summary["finished"] and summary["labels_used"] == summary["labels"] == summary["asked"] == 48
    assert summary["skipped"] == summary["labels_loaded"] == 0 and summary["total_timesteps"] == 768
    untrained = summary["global_step"] - 768  # the untrained policy's steps come on top
    assert made[0].total_steps == summary["global_step"] and untrained >= 12 * 4 * 4 and untrained % 64 == 0
    run_dir = only(tmp_path)
    given = answers(run_dir)
    assert [answer["pair"] for answer in given] == list(range(48)) and sum(a["mu"] == 0.5 for a in given) == summary[
        "ties"
    ]
    for answer in given:  # the oracle's
        with np.load(run_dir / "preferences" / f"{answer['pair']:08d}.npz") as pair:
            assert answer["mu"] == (np.sign(pair["sums"][0] - pair["sums"][1]) + 1) / 2
            assert pair["frames"].shape == (2, 7, 84, 84) and pair["history"].shape == (2, 4)
    assert json.loads((run_dir / "summary.json").read_text()) == summary
    assert all(math.isfinite(summary[name]) for name in ("reward_loss", "pg_loss", "v_loss", "entropy", "sps"))
    assert summary["teacher_beta"] is None  # infinite
    assert {path.name.split(".")[0] for path in run_dir.iterdir()} == {
        "args", "checkpoint", "summary", "preferences", "events", "run", "ppo_atari_rlhf",
    }  # fmt: skip
    assert (run_dir / "ppo_atari_rlhf.py").read_text() == (ROOT / "ppo_atari_rlhf.py").read_text()


def test_labels_come_when_they_are_due(tmp_path, toy):
    """L(0) = 12 before the first update, then as the schedule says, to within a batch of three; all at the end."""
    used, update = [], script.update_policy
    preferences, make = [], script.Preferences
    toy.setattr(script, "Preferences", lambda *given: preferences.append(make(*given)) or preferences[-1])
    toy.setattr(script, "update_policy", lambda *given: used.append(preferences[-1].used) or update(*given))
    run(tmp_path, *FEEDBACK)
    due = [script.label_schedule(64 * i, 768, 12, 48) for i in range(12)]
    assert used[0] == 12 and all(0 <= d - u < 3 for d, u in zip(due, used, strict=True)) and preferences[-1].used == 48


def test_initial_pairs_are_of_fresh_rows(tmp_path, toy):
    """No row of the untrained policy is in two batches of questions."""
    asked, select = [], script.select_pairs
    toy.setattr(script, "select_pairs", lambda *given: asked.append((given[3], select(*given))) or asked[-1][1])
    run(tmp_path, *FEEDBACK, "--ablation", "no-online-queries")
    assert sum(len(pairs) for _, pairs in asked) == 48 and len(asked) >= 3
    for (_, pairs), (first, _) in itertools.pairwise(asked):
        assert pairs[..., 1].max() + 4 <= first


def test_same_seed_same_parameters_other_seed_others(tmp_path, toy, whole):
    run(tmp_path / "again", *FEEDBACK)
    run(tmp_path / "other", *FEEDBACK, "--seed", "2")
    assert digest(whole) == digest(only(tmp_path / "again")) != digest(only(tmp_path / "other"))


def test_every_ablation_trains_parameters_of_its_own(tmp_path, toy):
    digests, initial, pretrain = set(), [], script.pretrain
    toy.setattr(script, "pretrain", lambda *given: initial.append(given[2].used) or pretrain(*given))
    for ablation in script.Ablation.__args__:
        fast = ["--total-timesteps", "576", "--pairs-per-step", "0.1"]
        summary = run(tmp_path / ablation, *FEEDBACK, "--ablation", ablation, *fast)
        assert summary["labels_used"] == 48 and summary["ablation"] == ablation
        assert math.isfinite(summary["reward_loss"])
        run_dir = only(tmp_path / ablation)
        digests.add(digest(run_dir))
        ensemble = script.read_checkpoint(run_dir)["ensemble"]
        assert len(ensemble["mean"]) == (1 if ablation == "no-ensemble" else 3)
        assert (ensemble["l2_coef"] == 0).all() == (ablation == "no-regularization")
        with np.load(run_dir / "preferences" / "00000047.npz") as pair:
            assert pair["history"].shape == (2, 1 if ablation == "no-segments" else 4)
        assert initial.pop() == (48 if ablation == "no-online-queries" else 12) and not initial
    assert len(digests) == 7


def test_the_baseline_is_paid_the_clipped_score_and_sees_ends(tmp_path, toy):
    paid, gae, step = [], script.compute_gae, Toy.step
    toy.setattr(script, "compute_gae", lambda *given: paid.append((given[0], given[2], given[3])) or gae(*given))
    toy.setattr(Toy, "step", lambda self, action: (lambda out: (out[0], 7 * out[1], *out[2:]))(step(self, action)))
    summary = run(tmp_path, "--true-reward", "--total-timesteps", "1280")
    assert summary["labels"] == summary["labels_used"] == 0 and summary["reward_accuracy_heldout"] is None
    rewards, next_values, dones = (torch.cat(x) for x in zip(*paid, strict=True))
    assert rewards.unique().tolist() == [0.0, 1.0]
    assert dones.sum() >= 16 and not next_values[dones.bool()].any()  # less those that resets cut


def test_ends_are_hidden_from_who_learns_from_labels(tmp_path, toy, whole):
    """Trap 32. The value runs through resets: row t + 1's, whatever ended at row t."""
    seen, gae = [], script.compute_gae
    toy.setattr(script, "compute_gae", lambda *given: seen.append(given) or gae(*given))
    run(tmp_path, "--oracle", "--labels", "0", "--preferences", str(whole), "--total-timesteps", "256")
    for rewards, values, next_values, dones, *_ in seen:
        assert not dones.any() and torch.equal(next_values[:-1], values[1:]) and rewards.isfinite().all()


def test_given_the_labels_the_true_reward_changes_nothing(tmp_path, toy, whole):
    """Trap 38: with the reward replaced by noise, labels loaded from before, the run ends in the same parameters."""
    loaded = ["--oracle", "--labels", "0", "--preferences", str(whole), "--total-timesteps", "384"]
    honest = run(tmp_path / "honest", *loaded)
    assert honest["labels_loaded"] == 48 and honest["labels_used"] == honest["asked"] == 0
    step, noise = Toy.step, np.random.default_rng(0)

    def noisy(self, action):
        frames, rewards, *rest = step(self, action)
        return frames, noise.normal(size=rewards.shape), *rest

    toy.setattr(Toy, "step", noisy)
    run(tmp_path / "noise", *loaded)
    parameters = [script.read_checkpoint(only(tmp_path / name))["agent"] for name in ("honest", "noise")]
    assert all(torch.equal(parameters[0][name], parameters[1][name]) for name in parameters[0])


def test_what_a_teacher_skips_is_asked_anew(tmp_path, toy):
    numbers, answer = itertools.count(), script.teacher_answer  # what is skipped hangs on no sum here
    toy.setattr(script, "teacher_answer", lambda *given: None if next(numbers) % 3 == 0 else answer(*given))
    summary = run(tmp_path, *FEEDBACK, "--teacher-mistake", "0.2")
    assert summary["skipped"] > 3 and summary["asked"] == summary["labels_used"] + summary["skipped"]
    assert summary["labels_used"] >= 48 - 3  # but for the last batch


def test_a_frozen_reward_model_pays_a_new_agent(tmp_path, toy, whole):
    learned = script.read_checkpoint(whole)["ensemble"]
    flags = ["--oracle", "--labels", "0", "--reward-model", str(whole), "--total-timesteps", "384"]
    summary = run(tmp_path / "b", *flags)
    assert summary["finished"] and summary["asked"] == 0
    frozen = script.read_checkpoint(only(tmp_path / "b"))["ensemble"]
    rescaled = {name for name in learned if not torch.equal(frozen[name], learned[name])}
    assert rescaled == {"mean", "std", "average_std"}  # on what the new agent does; nothing else moves


def test_labels_can_be_reused_and_added_to(tmp_path, toy, whole):
    """Of another run that had loaded some itself. Each directory needs no other."""
    shutil.copytree(whole, tmp_path / "first" / "run")
    more = ["--oracle", "--labels", "40", "--total-timesteps", "384", "--preferences"]
    for before, name in (("first", "second"), ("second", "third")):
        summary = run(tmp_path / name, *more, str(only(tmp_path / before)))
        assert summary["labels_used"] == summary["asked"] == 40
        shutil.rmtree(tmp_path / before)
    assert summary["labels_loaded"] == 88 and len(answers(only(tmp_path / "third"))) == 128


def test_a_run_starts_from_what_was_answered_in_the_other(tmp_path, toy, whole):
    """Not from pairs without an answer, nor "can't tell"; of two answers from the first. Numbers stay as they are."""
    source = shutil.copytree(whole, tmp_path / "source")
    lines = [(3, 1.0), (0, None), (7, 0.5), (3, 0.0), (0, 1.0)]
    text = "".join(json.dumps({"pair": pair, "mu": mu, "who": "Ann"}) + "\n" for pair, mu in lines)
    (source / "preferences" / "answers.jsonl").write_text(text + '{"pair": 5, "mu": 1.0}')  # not a whole line
    args = script.parse_args([*SMALL, "--oracle", "--labels", "0", "--preferences", str(source)])
    args.runs_dir = str(tmp_path / "new")
    folder = script.make_run_dir(args)[0] / "preferences"
    assert {path.name for path in folder.iterdir()} == {"00000003.npz", "00000007.npz", "answers.jsonl"}
    given = [{"pair": 3, "mu": 1.0, "loaded": True}, {"pair": 7, "mu": 0.5, "loaded": True}]
    assert answers(folder.parent) == given
    labels = script.Preferences(folder, 0, None, args)
    assert (labels.first, labels.asked, labels.loaded, labels.used, labels.open) == (8, 8, 2, 0, 0)


@pytest.mark.parametrize(
    "flags", ["--labels 1", "--labels 3 --num-envs 1 --num-steps 64", "--labels 24 --query-pool-steps 128"]
)
def test_small_runs_use_their_budget(tmp_path, toy, flags):
    summary = run(tmp_path, "--oracle", *flags.split(), "--total-timesteps", "384")
    assert summary["labels_used"] == summary["labels"] and summary["entropy"] is not None


# ------------------------------------------------------------------------------------------------------------- resume
@pytest.mark.parametrize(
    "flags", [[*FEEDBACK, *TEACHER], ["--true-reward", "--total-timesteps", "768"]], ids=["oracle", "score"]
)
def test_killed_and_resumed_equals_undisturbed(tmp_path, toy, flags):
    """Trap 40. Killed in the initial phase, twice after the same checkpoint, and once later, in a renamed folder."""
    run(tmp_path / "whole", *flags)
    step, left = Toy.step, {"initial": 40, "training": 70}

    def mortal(self, action):
        phase = "training" if list(tmp_path.glob("cut/*/checkpoint.pt")) else "initial"
        left[phase] -= 1
        if left[phase] == 0:
            raise Killed
        return step(self, action)

    toy.setattr(Toy, "step", mortal)
    if "--oracle" in flags:
        kill(run, tmp_path / "cut", *flags)
        left["initial"] = -1
        kill(resume, only(tmp_path / "cut"))
    else:
        kill(run, tmp_path / "cut", *flags)
    run_dir, at = only(tmp_path / "cut"), [4]
    for steps in (30, 80):
        assert script.read_checkpoint(run_dir)["progress"]["iteration"] == at[-1]
        left["training"] = steps
        kill(resume, run_dir)
        at.append(at[-1] + steps // 64 * 4)
    assert at == [4, 4, 8] and script.read_checkpoint(run_dir)["progress"]["iteration"] == 8
    run_dir = run_dir.rename(tmp_path / "cut" / "best run #1")
    left["training"] = -1
    resume(run_dir)
    assert digest(run_dir) == digest(only(tmp_path / "whole"))
    if "--oracle" in flags:
        assert answers(run_dir) == answers(only(tmp_path / "whole"))


def test_a_checkpoint_is_saved_where_all_starts_anew(tmp_path, toy):
    saved, save, anew = [], script.save_checkpoint, script.start_anew
    toy.setattr(script, "save_checkpoint", lambda *given: saved.append(given[-1].iteration) or save(*given))
    toy.setattr(script, "start_anew", lambda key, *given: saved.append(key) or anew(key, *given))
    run(tmp_path / "labels", *FEEDBACK)
    assert saved == [[1, 0, 0], 0, [1, 1, 0], 4, [1, 1, 4], 8, [1, 1, 8], 12]
    saved.clear()
    run(tmp_path / "score", "--true-reward", "--total-timesteps", "768")
    assert saved == [0, [1, 1, 0], 4, [1, 1, 4], 8, [1, 1, 8], 12]


def test_a_finished_run_can_be_trained_on(tmp_path, toy, whole, capsys):
    """With nothing given it ends at once as it was; with more steps it goes on, and says so."""
    run_dir = shutil.copytree(whole, tmp_path / "run")
    before = json.loads((run_dir / "summary.json").read_text())
    again = resume(run_dir)
    assert digest(run_dir) == digest(whole) and again["resume"] == str(run_dir)
    assert {**again, "resume": 0, "wall_seconds": 0} == {**before, "resume": 0, "wall_seconds": 0}
    capsys.readouterr()
    summary = resume(run_dir, "--total-timesteps", "1152", "--labels", "60")
    shown = capsys.readouterr().out
    assert "--total-timesteps is 1152 from now on, not 768" in shown and "--labels is 60" in shown
    assert summary["finished"] and summary["labels_used"] == 60 and summary["total_timesteps"] == 1152
    assert script.read_checkpoint(run_dir)["progress"]["iteration"] == 18
    assert script.read_run(run_dir)["args"]["labels"] == 60  # the next --resume needs no flags again


@pytest.mark.parametrize("flag", ["--preferences", "--reward-model"])
def test_a_resumed_run_needs_no_other_run(tmp_path, toy, whole, flag):
    """Labels and reward models that a run started from are in its own directory."""
    source = shutil.copytree(whole, tmp_path / "source")
    run(tmp_path / "new", "--oracle", "--labels", "0", flag, str(source), "--total-timesteps", "256")
    run_dir = only(tmp_path / "new")
    before = digest(run_dir)
    shutil.rmtree(source)
    assert resume(run_dir)["finished"] and digest(run_dir) == before


def test_a_full_disk_loses_no_checkpoint(tmp_path, toy, whole):
    """The disk fills at the second checkpoint: the run dies, and goes on from the first one to the same end."""
    save, calls = torch.save, []

    def full(state, file):
        calls.append(file)
        if len(calls) == 2:
            file.write(b"half")
            raise Killed
        save(state, file)

    toy.setattr(torch, "save", full)
    kill(run, tmp_path / "cut", *FEEDBACK)
    cut = only(tmp_path / "cut")
    assert not (cut / "checkpoint.tmp").exists() and not (cut / "summary.json").exists()
    resume(cut)
    assert digest(cut) == digest(whole)


def test_a_crash_is_an_exception_not_a_finished_run(tmp_path, toy):
    """Trap 43."""
    toy.setattr(script, "update_policy", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, *FEEDBACK)
    assert not (only(tmp_path) / "summary.json").exists()


def test_a_second_process_is_kept_out_of_a_run(tmp_path, toy, whole, capsys):
    run_dir = shutil.copytree(whole, tmp_path / "run")
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    toy.setitem(sys.modules, "wandb", SimpleNamespace())  # of which any use would fail: the lock comes first
    with script.filelock.FileLock(run_dir / "run.lock"):
        end = ended(SystemExit, resume, run_dir, "--total-timesteps", "1152", "--track")
    assert end.code == 2 and f"another process is running {run_dir}" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    assert resume(run_dir, "--total-timesteps", "1152")["finished"]  # the lock has gone


def test_numbers_that_are_not_finite_end_the_run_and_spare_the_checkpoint(tmp_path, toy, whole):
    """A sentence in place of a number makes Python's exit code 1."""
    gae, calls = script.compute_gae, []

    def broken(*given):
        calls.append(1)
        return tuple(x * (math.nan if len(calls) > 6 else 1) for x in gae(*given))

    with toy.context() as patch:
        patch.setattr(script, "compute_gae", broken)
        end = ended(SystemExit, run, tmp_path / "cut", *FEEDBACK)
    assert "are not finite after step" in end.code and "learning rates" in end.code
    cut = only(tmp_path / "cut")
    assert not (cut / "summary.json").exists() and script.read_checkpoint(cut)["progress"]["iteration"] == 4
    resume(cut)
    assert digest(cut) == digest(whole)


@pytest.mark.parametrize("module", ["agent", "ensemble"])
def test_one_number_that_is_not_finite_keeps_a_checkpoint_from_being_saved(tmp_path, module):
    modules = {"agent": torch.nn.Linear(2, 2), "ensemble": torch.nn.Linear(2, 2)}
    modules[module].register_buffer("mean", torch.zeros(1))
    pool, progress = script.SegmentPool(0, 1, "cpu"), script.Progress()
    script.save_checkpoint(tmp_path, modules, pool, progress)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    for broken in (modules[module].weight.data[1], modules[module].mean):
        broken[0] = math.inf
        with pytest.raises(SystemExit) as end:
            script.save_checkpoint(tmp_path, modules, pool, progress)
        assert "are not finite" in end.value.code and (tmp_path / "checkpoint.pt").read_bytes() == before
        broken[0] = 0.0


def test_a_learning_rate_that_is_far_too_high_ends_the_run(tmp_path, toy):
    end = ended(SystemExit, run, tmp_path, "--true-reward", "--total-timesteps", "768", "--learning-rate", "1e9")
    assert isinstance(end.code, str) and f"{only(tmp_path)}/checkpoint.pt, if it is there" in end.code
    agent = script.read_checkpoint(only(tmp_path))["agent"]
    assert all(tensor.isfinite().all() for tensor in agent.values()) and not (only(tmp_path) / "summary.json").exists()


def test_a_clock_that_goes_back_changes_nothing(tmp_path, toy):
    real, calls = time.time, []
    toy.setattr(script.time, "time", lambda: calls.append(1) or real() - 3600 * len(calls))
    summary = run(tmp_path, *FEEDBACK, "--log-every", "1")
    assert 0 < summary["wall_seconds"] < 600 and summary["sps"] > 0


# ------------------------------------------------------------------------------------------------------------- people
def people(run_dir: Path, say) -> int:
    """Answer what is open, of which there are pictures."""
    for path in (run_dir / "preferences").glob("*.npz"):
        assert all(path.with_suffix(f".{side}.webp").read_bytes()[:4] == b"RIFF" for side in (0, 1))
    return answer_open(run_dir, say)


def test_people_are_waited_for_and_all_labels_are_used(tmp_path, toy):
    """One in five is "can't tell", and is asked anew. Initial labels are waited for, and all before the last tenth."""
    waits = []

    def answer_while_waiting(seconds):
        status = json.loads((only(tmp_path) / "status.json").read_text())
        assert status["wanted"] > status["labels_used"] and status["labels"] == 40
        waits.append((status["phase"], status["step"]))
        people(only(tmp_path), lambda n, a, b: None if n % 5 == 3 else float(np.sign(a - b) + 1) / 2)

    told, inner = [], script.ask

    def seen_ask(*given):
        told.append(json.loads((only(tmp_path) / "status.json").read_text())["asked"] == given[2].asked)
        return inner(*given)

    toy.setattr(script, "ask", seen_ask)
    toy.setattr(script.time, "sleep", answer_while_waiting)
    summary = run(tmp_path, "--human", "--labels", "40", "--total-timesteps", "1280")
    assert summary["labels_used"] == 40 and summary["skipped"] > 5
    assert len(told) > 3 and all(told)  # the page never knows less than it did before a batch was drawn
    assert waits[0] == ("initial", 0) and any(phase == "training" for phase, _ in waits)
    assert json.loads((only(tmp_path) / "status.json").read_text())["phase"] == "finished"


def test_initial_pairs_that_replace_skipped_ones_are_of_rows_that_are_still_there(tmp_path, toy):
    """While people answer one more rollout is played, and the next one's rows push the last questions' out."""
    fresh, select = [], script.select_pairs
    toy.setattr(script, "select_pairs", lambda *given: fresh.append(given[3] >= given[1].first_row()) or select(*given))

    def answer_while_waiting(seconds):
        people(only(tmp_path), lambda n, a, b: None if n % 3 == 0 else float(a > b))

    toy.setattr(script.time, "sleep", answer_while_waiting)
    flags = ["--num-steps", "100", "--total-timesteps", "400", "--labels", "40", "--no-wait-for-labels"]
    run(tmp_path, "--human", *flags)
    assert len(fresh) >= 3 and all(fresh)


def test_a_resumed_run_of_people_keeps_every_answer_and_its_open_pairs(tmp_path, toy):
    """Killed while it waits: what was answered meanwhile counts, what is open stays open, nothing is asked twice."""
    calls = []

    def mortal(seconds):
        calls.append(1)
        if len(calls) in (1, 3):
            raise Killed
        people(only(tmp_path), lambda n, a, b: float(n % 2))

    toy.setattr(script.time, "sleep", mortal)
    flags = ["--human", "--labels", "40", "--total-timesteps", "1280"]
    kill(run, tmp_path, *flags)
    run_dir = only(tmp_path)
    asked = len(list((run_dir / "preferences").glob("*.npz")))
    assert asked == 10 + 3 and people(run_dir, lambda n, a, b: float(n % 2)) == asked  # three for the next to do
    kill(resume, run_dir)
    people(run_dir, lambda n, a, b: float(n % 2))
    summary = resume(run_dir)
    assert summary["labels_used"] == 40 == summary["asked"] == len(answers(run_dir))


# ---------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "flags, said",
    [
        *REFUSED,
        (
            ["--oracle", "--num-envs", "1", "--num-minibatches", "8", "--num-steps", "15"],
            "fewer than two steps for each",
        ),
        (["--human", "--segment-length", "301", "--query-pool-steps", "40000"], "clips of 300 steps at most"),
        (["--oracle", "--env-id", "ALE/Pnog-v5"], "Did you mean: `Pong`"),
        (["--oracle", "--env-id", "Hopper-v5"], "not an ALE game"),
        (["--oracle", "--labels", "-3"], "--labels"),
        (["--oracle", "--labels", "5500", "--total-timesteps", "10000"], "more steps than the run"),
        (["--oracle", "--l2-coef", "0.01"], "not in [1e-06, 0.001]"),
        (["--oracle", "--oracle-end-penalty", "nan"], "nan is not in"),
    ],
)
def test_bad_input_ends_with_a_sentence_and_code_2_before_anything_is_written(
    tmp_path, monkeypatch, capfd, flags, said
):
    monkeypatch.chdir(tmp_path)
    assert said in refused_here(script, flags, capfd)


def test_broken_run_directories_are_refused(tmp_path, toy, whole, capsys):
    good = shutil.copytree(whole, tmp_path / "good")
    labels = ["--oracle", "--labels", "0", "--total-timesteps", "640", "--preferences", str(good)]
    more = ["--total-timesteps", "1152"]

    def refused(said, act, *given):
        (tmp_path / "new").mkdir(exist_ok=True)
        assert ended(SystemExit, act, *given).code == 2 and said in capsys.readouterr().err

    new = tmp_path / "new"
    refused("clips of another length", run, new, *labels, "--segment-length", "5")
    refused("a run of ALE/Pong-v5, not of", run, new, *labels, "--env-id", "ALE/Breakout-v5")
    run(tmp_path / "score", "--true-reward", "--total-timesteps", "64")
    score = str(only(tmp_path / "score"))
    refused("has no answers", run, new, *labels, "--preferences", score)
    refused("has learned no reward model", run, new, "--oracle", "--labels", "0", "--reward-model", score)
    pair = good / "preferences" / "00000007.npz"
    whole = pair.read_bytes()
    pair.unlink()
    refused("lacks clips that were answered", run, new, *labels)
    assert not list(new.iterdir())
    pair.write_bytes(whole[: len(whole) // 2])
    refused("00000007.npz can't be read", resume, good, *more)
    pair.write_bytes(whole)
    (good / "summary.json").write_text("kept")
    before, checkpoint = (good / "args.json").read_text(), (good / "checkpoint.pt").read_bytes()
    (good / "checkpoint.pt").write_bytes(checkpoint[: len(checkpoint) // 2])
    refused("truncated", resume, good, *more)
    assert (good / "args.json").read_text() == before and (good / "summary.json").read_text() == "kept"
    (good / "checkpoint.pt").write_bytes(checkpoint)
    args = json.loads((good / "args.json").read_text())
    refused("--reward-learning-rate can't be changed beside --resume", resume, good, "--reward-learning-rate", "0.1")
    copy = good / "ppo_atari_rlhf.py"
    text = copy.read_text()
    copy.write_text(text.replace("momentum=0.5", "momentum=0.1"))  # no argument tells of it
    refused("another script or version", resume, good)
    copy.write_text(text)
    (good / "args.json").write_text(json.dumps(args | {"args": args["args"] | {"new": 1}}))
    refused("another script or version", resume, good)
    for text in ("{", "{}"):
        (good / "args.json").write_text(text)
        refused("not a run directory", resume, good)


def test_tracking_without_a_key_is_refused_before_a_run_begins(tmp_path):
    unknown = {"HOME": str(tmp_path), "WANDB_MODE": "online", "WANDB_CONFIG_DIR": str(tmp_path / "wandb")}
    environment = {name: value for name, value in os.environ.items() if name not in ("WANDB_API_KEY", "NETRC")}
    done = subprocess.run(
        command("--oracle", "--track"), cwd=tmp_path, env=environment | unknown, stdin=subprocess.DEVNULL,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "--track" in done.stderr and "API key" in done.stderr
    assert not any((tmp_path / "runs").iterdir())


def test_two_runs_of_one_second_have_directories_of_their_own(tmp_path):
    args = script.parse_args(["--oracle", "--runs-dir", str(tmp_path / "new")])
    assert len({script.make_run_dir(args)[0] for _ in range(20)}) == len(list((tmp_path / "new").iterdir())) == 20


def test_a_changed_or_copied_script_is_not_recorded_as_the_commit(tmp_path, monkeypatch):
    """Nor is one that git does not know, or is told to ignore, as the copies in run directories are."""
    repo, args = tmp_path / "repo", script.parse_args(["--oracle", "--runs-dir", str(tmp_path / "runs")])
    for folder in ("", "runs", "mine"):
        (repo / folder).mkdir()
        shutil.copy(ROOT / "ppo_atari_rlhf.py", repo / folder)
    (repo / ".gitignore").write_text("runs")
    author = ["-c", "user.name=Ann", "-c", "user.email=ann@example.org"]
    for words in (["init", "-q"], ["add", "ppo_atari_rlhf.py", ".gitignore"], [*author, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(repo), *words], check=True)

    def recorded(file):
        monkeypatch.setattr(script, "__file__", str(file))
        return script.make_run_dir(args)[1]["commit"]

    commit = recorded(repo / "ppo_atari_rlhf.py")
    assert len(commit) == 10 and int(commit, 16)
    assert (
        recorded(repo / "runs" / "ppo_atari_rlhf.py") == recorded(repo / "mine" / "ppo_atari_rlhf.py") == commit + "+"
    )
    with open(repo / "ppo_atari_rlhf.py", "a") as file:
        file.write("# changed")
    assert recorded(repo / "ppo_atari_rlhf.py") == commit + "+"
    shutil.rmtree(repo / ".git")
    assert recorded(repo / "ppo_atari_rlhf.py") is None
    monkeypatch.setenv("PATH", "")
    assert recorded(ROOT / "ppo_atari_rlhf.py") is None  # no git here


def test_the_home_directory_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    script.make_run_dir(script.parse_args(["--oracle", "--runs-dir=~/x y"]))
    assert [path.name for path in tmp_path.iterdir()] == ["x y"]


def test_sweeps_spell_booleans_their_own_way():
    args = script.parse_args(["--oracle=True", "--true_reward=False", "--anneal_lr=False", "--learning_rate=0.001"])
    assert args.oracle and not args.true_reward and not args.anneal_lr and args.learning_rate == 0.001
    with pytest.raises(SystemExit):
        script.parse_args(["--oracle", "--no-anneal-lr=True"])  # which of the two?


# ------------------------------------------------------------------------------------------------------- from outside
def command(*flags, script="ppo_atari_rlhf.py"):
    return [sys.executable, str(ROOT / script), *flags]


REAL = ["--num-envs", "4", "--num-steps", "32", "--num-minibatches", "2", "--update-epochs", "1", "--device", "cpu"]
REAL += ["--threads", "1", "--pretrain-pairs", "128", "--query-pool-steps", "2000", "--reset-every", "3"]
REAL += ["--eval-episodes", "1", "--log-every", "1", "--reward-minibatch-size", "4", "--env-id", "ALE/Seaquest-v5"]
REAL += ["--oracle", "--labels", "8", "--segment-length", "8", "--total-timesteps", "1024"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437"])
def test_help_tells_what_the_defaults_do_on_any_terminal(encoding):
    environment = os.environ | {"PYTHONIOENCODING": encoding, "COLUMNS": "200"}
    shown = subprocess.run(command("--help"), capture_output=True, check=True, env=environment).stdout.decode(encoding)
    assert "10M steps" in shown and "hours" in shown
    assert all(f"--{field.name.replace('_', '-')}" in shown for field in dataclasses.fields(script.Args))


def test_signals_end_a_run_as_a_shell_expects_and_what_resumes_it_is_the_same_run(tmp_path):
    """SIGKILL and Ctrl-C on the real emulator, wherever they hit; the printed line goes on with it."""
    whole = subprocess.run(command(*REAL, "--runs-dir", str(tmp_path / "whole")), capture_output=True, text=True)
    assert whole.returncode == 0 and not whole.stderr, whole.stderr
    flags, shown = [*REAL, "--runs-dir", str(tmp_path / "cut run")], ""
    for number in (signal.SIGKILL, signal.SIGINT):
        process = subprocess.Popen(command(*flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for line in process.stdout:
            if " left  " in line:  # the policy is being trained
                time.sleep(0.2 * (number != signal.SIGINT))
                process.send_signal(number)
                break
        shown, errors = process.communicate()
        assert process.returncode == -number, errors
        cut = only(tmp_path / "cut run")
        flags = ["--resume", str(cut)]
    assert "Traceback" not in errors and f"--resume '{cut}'" in shown
    printed = shown.split(" steps back: ", 1)[1]  # a warning of the run may come before it
    end = subprocess.run(printed.replace("python", sys.executable, 1), shell=True)
    assert end.returncode == 0 and digest(cut) == digest(only(tmp_path / "whole"))


def test_a_copy_of_the_script_is_a_script_of_its_own(tmp_path):
    shutil.copy(ROOT / "ppo_atari_rlhf.py", tmp_path / "mine.py")
    flags = [*REAL[:-1], "128", "--labels", "1", "--runs-dir", str(tmp_path / "runs")]
    subprocess.run([sys.executable, str(tmp_path / "mine.py"), *flags], check=True, capture_output=True)
    run_dir = only(tmp_path / "runs")
    assert "__mine__" in run_dir.name and (run_dir / "mine.py").exists()
    assert json.loads((run_dir / "summary.json").read_text())["script"] == "mine"


def test_weights_and_biases_gets_it_all_and_a_renamed_run_goes_on_as_itself(tmp_path, toy):
    """Its id is W&B's own, or that which a sweep's agent gives, whatever the directory is called."""
    runs = []

    class FakeRun(SimpleNamespace):
        def log(self, row):
            self.rows.append(row)

        def define_metric(self, *_, **__):
            pass

        def finish(self):
            self.finished = True

    def init(id, **given):
        made_by = os.environ.get("WANDB_RUN_ID", "fresh")
        runs.append(FakeRun(id=id or made_by, rows=[], summary={}, given=given))
        return runs[-1]

    errors = SimpleNamespace(Error=ValueError)
    toy.setitem(sys.modules, "wandb", SimpleNamespace(init=init, errors=errors))
    toy.setenv("WANDB_RUN_ID", "of-the-sweep")
    run(tmp_path, *FEEDBACK, "--track", "--log-every", "1")
    run_dir = only(tmp_path).rename(tmp_path / "best run #1")
    toy.delenv("WANDB_RUN_ID")
    resume(run_dir, "--total-timesteps", "1088")
    assert [r.id for r in runs] == ["of-the-sweep"] * 2 and runs[1].given["name"] == "best run #1"
    assert runs[0].given["config"]["labels"] == 48 and runs[0].given["resume"] == "allow"
    steps = [[row["global_step"] for row in r.rows if "losses/entropy" in row] for r in runs]
    assert len(steps[0]) == 12 and len(steps[1]) == 5 and max(steps[0]) < min(steps[1])
    assert all({"global_step", "labels"} <= row.keys() for r in runs for row in r.rows)
    logged = {name for row in runs[0].rows for name in row}
    assert {"charts/eval_return", "charts/episodic_return", "charts/SPS", "reward_model/accuracy_heldout"} <= logged
    assert all(r.finished and r.summary["finished"] and r.summary["labels_used"] == 48 for r in runs)
