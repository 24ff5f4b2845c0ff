"""Whole runs of ppo_mujoco_rlhf.py on the real simulator: learning, seeds, ablations, resume, saved labels.

InvertedPendulum-v5 is the cheapest task. Its first episodes end after 63, 125, 188 and 250 steps with four
environments, so the small runs below (640 steps each) hold time limits, and with --reset-every resets, too.
"""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import ppo_mujoco_rlhf as script

ROOT = Path(script.__file__).parent
SCRIPT_NAME = "ppo_mujoco_rlhf"

SMALL = ["--env-id", "InvertedPendulum-v5", "--num-envs", "4", "--num-steps", "32", "--num-minibatches", "2"]
SMALL += ["--update-epochs", "1", "--segment-length", "5", "--query-pool-steps", "800", "--pretrain-pairs", "256"]
SMALL += ["--reward-minibatch-size", "8", "--torch-threads", "1", "--device", "cpu", "--eval-episodes", "1"]
SMALL += ["--checkpoint-every", "5", "--reset-every", "12", "--log-every", "5"]
FEEDBACK = ["--oracle", "--labels", "48", "--total-timesteps", "2560"]


@pytest.fixture
def quick(monkeypatch):
    """No picture of the last episode: that takes longer than a small run."""
    monkeypatch.setattr(script, "draw_episode", lambda result, folder, title: folder.mkdir(exist_ok=True))
    monkeypatch.setattr(script, "make_twin", lambda *_: None)
    monkeypatch.setattr(script, "REWARD_MINIBATCHES", 1)
    monkeypatch.setattr(script, "STATISTICS_ROWS", 100)
    return monkeypatch


def run(tmp_path, *flags, small=SMALL):
    where = [] if "--resume" in flags or "--evaluate" in flags else ["--runs-dir", str(tmp_path)]
    return script.train(script.parse_args([*small, *where, *flags]))


def only(tmp_path) -> Path:
    (run_dir,) = tmp_path.iterdir()
    return run_dir


def shards(run_dir, length=5, num_obs=4, num_actions=1):
    return list(script.read_shards(run_dir / "preferences", script.clip_shapes(length, num_obs, num_actions)))


class Witness:
    """Stands beside the simulator: every row that it produced, per environment in the order of their creation."""

    def __init__(self, monkeypatch):
        self.rows: dict = {}  # environment -> [(obs before, action, reward, obs after, truncated)]
        self.current: dict = {}
        reset, step = script.FixedLength.reset, script.FixedLength.step

        def seen_reset(env, **kwargs):
            obs, info = reset(env, **kwargs)
            self.rows.setdefault(env, [])
            self.current[env] = obs.copy()
            return obs, info

        def seen_step(env, action):
            obs, reward, terminated, truncated, info = step(env, action)
            self.rows[env].append((self.current[env], np.array(action), reward, obs.copy(), truncated))
            self.current[env] = obs.copy()
            return obs, reward, terminated, truncated, info

        monkeypatch.setattr(script.FixedLength, "reset", seen_reset)
        monkeypatch.setattr(script.FixedLength, "step", seen_step)

    def __getitem__(self, i):
        """Columns of environment i's rows."""
        return [np.array(column) for column in zip(*list(self.rows.values())[i], strict=True)]


# --------------------------------------------------------------------------------------------------- runs and numbers
def test_a_run_counts_right_and_writes_what_it_promises(tmp_path, quick):
    """Traps 28, 36 and 41: labels and steps are counted once, and there are exactly as many as asked for."""
    witness = Witness(quick)
    summary = run(tmp_path, *FEEDBACK)
    assert summary["finished"] and summary["labels_used"] == summary["labels"] == 48
    assert summary["asked"] == 48 and summary["skipped"] == 0
    assert sum(len(witness[i][0]) for i in range(4)) == summary["global_step"] == summary["total_timesteps"] == 2560
    assert len(witness.rows) == 5 and len(witness[4][0]) == 250  # and an evaluation
    assert summary["final_return_mean"] == pytest.approx(witness[4][2].sum())
    run_dir = only(tmp_path)
    stored = shards(run_dir)
    assert sum(len(s["mu"]) for s in stored) == 48
    assert sum((s["mu"] == 0.5).sum() for s in stored) == summary["ties"]
    assert json.loads((run_dir / "summary.json").read_text()) == summary
    assert all(np.isfinite(summary[name]) for name in ("reward_loss", "pg_loss", "v_loss", "entropy"))
    assert {path.name.split(".")[0] for path in run_dir.iterdir()} == {
        "args", "checkpoint", "summary", "preferences", "events", "episode",
    }  # fmt: skip
    with pytest.raises(SystemExit):  # a finished run is not run on with other arguments
        run(tmp_path, "--resume", str(run_dir), "--seed", "3", small=[])


def test_the_summary_has_the_columns_of_the_results(tmp_path, quick):
    columns = """finished script env_id feedback labels labels_used asked skipped ties labels_loaded ablation
        teacher_beta teacher_gamma teacher_mistake teacher_skip teacher_equal seed total_timesteps global_step
        wall_seconds sps pairs_per_step final_return_mean final_return_std final_episodes reward_accuracy_heldout
        reward_correlation reward_loss pg_loss v_loss entropy params_sha256 commit device"""
    summary = run(tmp_path, "--true-reward", "--total-timesteps", "1000")
    assert set(summary) >= set(columns.split())
    assert summary["script"] == SCRIPT_NAME and summary["feedback"] == "true-reward"
    assert summary["total_timesteps"] == summary["global_step"] == 1024  # whole rollouts of 128
    assert summary["labels"] == summary["labels_used"] == 0 and summary["sps"] > 0
    for name in ("teacher_beta", "reward_accuracy_heldout", "reward_correlation", "reward_loss"):
        assert summary[name] is None  # infinite, or absent


def test_stored_clips_are_the_rows_that_the_simulator_saw(tmp_path, quick):
    """Traps 1, 14, 36 and 37: (o_t, a_t, r_t), raw, actions as executed, across episode ends and resets; and the
    answer is the sign of the difference of what the task paid."""
    witness = Witness(quick)
    run(tmp_path, "--oracle", "--labels", "60", "--total-timesteps", "2560", "--env-id", "Reacher-v5")
    (low, high), ends, clipped = (-1, 1), 0, 0
    rows = [witness[i] for i in range(4)]
    stored = shards(only(tmp_path), num_obs=10, num_actions=2)
    for shard in stored:
        for i, pair in enumerate(shard["segments"]):
            sums = []
            for side, (env, start) in enumerate(pair):
                obs, actions, rewards, _, truncated = (column[start : start + 5] for column in rows[env])
                assert np.array_equal(shard["obs"][i, side], obs.astype(np.float32))
                assert np.array_equal(shard["actions"][i, side], actions)
                sums.append(rewards.sum())
                ends += truncated[:-1].any()
                clipped += (np.abs(actions) == high).any()
                assert low <= actions.min() and actions.max() <= high
            assert shard["returns"][i] == pytest.approx(sums, abs=1e-5)
            assert shard["mu"][i] == (sums[0] > sums[1])
    assert ends >= 3 and clipped > 50  # else nothing is tested
    pairs = np.concatenate([shard["segments"] for shard in stored])
    assert len({frozenset(map(tuple, pair)) for pair in pairs.tolist()}) == 60


@pytest.mark.parametrize("flags", [["--true-reward"], ["--oracle", "--labels", "16"]], ids=["true reward", "oracle"])
def test_at_a_time_limit_the_final_observation_is_valued_and_the_trace_cut(tmp_path, quick, flags):
    """Traps 32 and 35, in every mode: neither the reset observation after it nor zero."""
    witness, seen, gae = Witness(quick), [], script.compute_gae
    quick.setattr(script, "compute_gae", lambda *a: seen.append([x.clone() for x in a[:4]]) or gae(*a))
    quick.setattr(script.Agent, "get_value", lambda self, x: x.double().sum(-1).float())  # tells which one it was
    flags = [*flags, "--total-timesteps", "1920", "--env-id", "Reacher-v5", "--reset-every", "4"]
    run(tmp_path, *flags)
    rows = [witness[i] for i in range(4)]
    ends, first = 0, 15 * 32 - len(seen) * 32  # rollouts before the first labels are not trained on
    for iteration, (_, values, next_values, dones) in enumerate(seen):
        at = slice(first + 32 * iteration, first + 32 * iteration + 32)
        after = np.stack([columns[3][at].sum(-1) for columns in rows], 1)  # of the state that each row led to
        truncated = np.stack([columns[4][at] for columns in rows], 1)
        assert np.array_equal(dones.bool().numpy(), truncated)
        assert np.allclose(next_values.numpy()[truncated], after[truncated], atol=1e-4)
        assert torch.equal(next_values[:-1][~dones[:-1].bool()], values[1:][~dones[:-1].bool()])
        last = ~truncated[-1]  # the value of the state after the rollout
        assert np.allclose(next_values.numpy()[-1][last], after[-1][last], atol=1e-4)
        begins = np.stack([columns[0][at].sum(-1) for columns in rows], 1)[1:]
        assert (np.abs(begins - after[:-1])[truncated[:-1]] > 1e-3).all()  # a reset's observation is another
        ends += truncated.sum()
    assert ends > 10


def test_the_first_minibatchs_ratio_is_one(tmp_path, quick):
    """Statistics of the observations stand still during an iteration; else it shows here."""
    ratios, counts, updates = [], [], []
    loss, update = script.policy_loss, script.update_policy

    def seen_loss(newlogprob, entropy, newvalue, logprobs, *rest):
        ratios.append((newlogprob - logprobs).exp().detach())
        return loss(newlogprob, entropy, newvalue, logprobs, *rest)

    def seen_update(agent, *rest):
        updates.append(len(ratios))
        counts.append(agent.obs_count.item())
        return update(agent, *rest)

    quick.setattr(script, "policy_loss", seen_loss)
    quick.setattr(script, "update_policy", seen_update)
    run(tmp_path, *FEEDBACK, "--learning-rate", "1e-3")
    assert len(updates) > 10 and np.array_equal(np.diff(counts), [128] * (len(counts) - 1))  # they do move in between
    for i in updates:
        assert torch.allclose(ratios[i], torch.ones(64), rtol=0, atol=2e-6)
    assert max((ratios[i + 1] - 1).abs().max() for i in updates) > 1e-3  # and those of the second one do not


def test_same_seed_same_parameters_other_seed_others_whatever_is_evaluated(tmp_path, quick):
    first = run(tmp_path / "a", *FEEDBACK)["params_sha256"]
    again = run(tmp_path / "b", *FEEDBACK, "--eval-every", "7", "--log-every", "3")["params_sha256"]
    other = run(tmp_path / "c", *FEEDBACK, "--seed", "2")["params_sha256"]
    assert first == again != other


def test_every_ablation_trains_parameters_of_its_own(tmp_path, quick):
    hashes, initial, pretrain = {}, [], script.pretrain
    quick.setattr(
        script, "pretrain", lambda e, o, labels, *rest: initial.append(labels.count) or pretrain(e, o, labels, *rest)
    )
    for ablation in script.Ablation.__args__:
        summary = run(tmp_path / ablation, *FEEDBACK, "--ablation", ablation)
        assert summary["labels_used"] == 48 and summary["ablation"] == ablation
        assert np.isfinite(summary["reward_loss"])
        hashes[ablation] = summary["params_sha256"]
        stored = shards(only(tmp_path / ablation), 1 if ablation == "no-segments" else 5)
        checkpoint = script.read_checkpoint(str(only(tmp_path / ablation)))
        assert len(checkpoint["ensemble"]["mean"]) == (1 if ablation == "no-ensemble" else 3)
        assert (checkpoint["ensemble"]["l2_coef"] == 0).all() == (ablation == "no-regularization")
        assert sum(len(shard["mu"]) for shard in stored) == 48
        assert initial.pop() == (48 if ablation == "no-online-queries" else 12) and not initial
    assert len(set(hashes.values())) == 7


def noise_for(quick):
    """The task pays noise from now on."""
    step, noise = script.FixedLength.step, np.random.default_rng(0)

    def noisy(self, action):
        obs, _, *rest = step(self, action)
        return obs, noise.normal(), *rest

    quick.setattr(script.FixedLength, "step", noisy)


def test_given_the_labels_the_true_reward_changes_nothing(tmp_path, quick):
    """Trap 38: with the reward replaced by noise, labels loaded from before, the run ends in the same parameters."""
    run(tmp_path / "labels", *FEEDBACK)
    loaded = ["--oracle", "--labels", "0", "--preferences", str(only(tmp_path / "labels")), "--total-timesteps", "1280"]
    honest = run(tmp_path / "honest", *loaded)
    noise_for(quick)
    noisy = run(tmp_path / "noise", *loaded)
    assert noisy["params_sha256"] == honest["params_sha256"]
    assert noisy["final_return_mean"] != honest["final_return_mean"]  # the noise was there
    assert honest["labels_loaded"] == 48 and honest["labels_used"] == honest["asked"] == 0


def test_the_true_reward_pays_the_baseline_centred_and_scaled(tmp_path, quick):
    witness, paid, gae = Witness(quick), [], script.compute_gae
    quick.setattr(script, "compute_gae", lambda *a: paid.append(a[0].clone()) or gae(*a))
    honest = run(tmp_path / "a", "--true-reward", "--total-timesteps", "1280", "--reward-std", "0.3")
    env_rewards = np.stack([witness[i][2] for i in range(4)], 1).reshape(10, 32, 4)
    mean = var = 0.0
    for i, rewards in enumerate(env_rewards):
        keep = 0.9 ** (128 / 2048) if i else 0.0  # however long a rollout is: 20,000 steps
        mean, var = keep * mean + (1 - keep) * rewards.mean(), keep * var + (1 - keep) * rewards.var()
        assert np.allclose(paid[i], 0.3 * (rewards - mean) / np.sqrt(var), atol=1e-5)
    noise_for(quick)
    noisy = run(tmp_path / "b", "--true-reward", "--total-timesteps", "1280", "--reward-std", "0.3")
    assert noisy["params_sha256"] != honest["params_sha256"]


def test_imperfect_teachers_and_skips_keep_the_budget(tmp_path, quick):
    summary = run(tmp_path, *FEEDBACK, "--teacher-skip", "0.7", "--teacher-mistake", "0.2", "--teacher-equal", "0.3")
    assert summary["labels_used"] == 48 and summary["skipped"] > 0 and summary["ties"] > 0
    assert summary["asked"] == summary["labels_used"] + summary["skipped"]


def test_a_frozen_reward_model_pays_a_new_agent(tmp_path, quick):
    run(tmp_path / "first", *FEEDBACK)
    source = only(tmp_path / "first")
    learned = script.read_checkpoint(str(source))["ensemble"]
    flags = ["--oracle", "--labels", "0", "--reward-model", str(source), "--total-timesteps", "1280"]
    summary = run(tmp_path / "b", *flags, "--seed", "5")
    assert summary["finished"] and summary["asked"] == 0
    frozen = script.read_checkpoint(str(only(tmp_path / "b")))["ensemble"]
    rescaled = {name for name in learned if not torch.equal(frozen[name], learned[name])}
    assert rescaled == {"mean", "std", "average_std", "renewals"}  # on what the new agent does; nothing else moves
    noise_for(quick)
    assert run(tmp_path / "c", *flags, "--seed", "5")["params_sha256"] == summary["params_sha256"]


def test_labels_can_be_reused_and_added_to(tmp_path, quick):
    run(tmp_path / "first", *FEEDBACK)
    source = str(only(tmp_path / "first"))
    summary = run(tmp_path / "b", "--oracle", "--labels", "40", "--preferences", source, "--total-timesteps", "1280")
    assert (summary["labels_loaded"], summary["labels_used"]) == (48, 40)
    assert sum(len(s["mu"]) for s in shards(only(tmp_path / "b"))) == 88  # the run directory needs no other


@pytest.mark.parametrize(
    "flags",
    [
        ["--labels", "1", "--total-timesteps", "1280"],
        ["--labels", "3", "--total-timesteps", "1280", "--num-envs", "1", "--num-steps", "64"],
        ["--labels", "24", "--query-pool-steps", "240", "--total-timesteps", "2560"],  # no room for a batch
        ["--labels", "12", "--total-timesteps", "1280", "--env-id", "Pusher-v5"],  # not the paper's form
    ],
    ids=["one label", "one environment", "small pool", "another task"],
)
def test_small_runs_use_their_budget(tmp_path, quick, flags):
    summary = run(tmp_path, "--oracle", *flags)
    assert summary["labels_used"] == summary["labels"] and summary["entropy"] is not None


@pytest.mark.parametrize("env_id", [task for task in script.SEGMENT_LENGTH if task != "InvertedPendulum-v5"])
def test_every_task_of_the_paper_trains(tmp_path, quick, env_id):
    """With its own segment length; what is paid is sane from the start; nothing is written beside the run."""
    quick.chdir(tmp_path)
    at = SMALL.index("--segment-length")
    small = SMALL[:at] + SMALL[at + 2 :]
    quick.setattr(script, "evaluate", lambda *_, **__: {"returns": np.zeros(1)})
    paid, gae = [], script.compute_gae
    quick.setattr(script, "compute_gae", lambda *a: paid.append(a[0].clone()) or gae(*a))
    flags = ["--oracle", "--labels", "8", "--total-timesteps", "2560", "--query-pool-steps", "4000"]
    summary = run(tmp_path / "runs", *flags, "--env-id", env_id, small=small)
    assert summary["labels_used"] == 8 and np.isfinite(summary["v_loss"]) and summary["reward_correlation"] is not None
    assert all(rewards.isfinite().all() and rewards.std() < 1 for rewards in paid) and len(paid) >= 5
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]  # MuJoCo likes to leave a log


# ------------------------------------------------------------------------------------------------------------- resume
def same(one, other) -> bool:
    """Whether two checkpoints, or parts of them, are equal."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize(
    "flags",
    [
        [*FEEDBACK, "--teacher-mistake", "0.2", "--teacher-equal", "0.3", "--teacher-skip", "0.3"],
        ["--true-reward", "--total-timesteps", "2560"],
        [*FEEDBACK, "--env-id", "Reacher-v5", "--reset-every", "1000"],
    ],
    ids=["imperfect teacher", "true reward", "many time limits"],
)
def test_stopped_and_resumed_equals_undisturbed(tmp_path, quick, flags):
    """Trap 40. Stopped in order by SIGTERM: while initial labels are asked; at row 352, after the time limit of
    environment 0 at 250 and before the common reset at 384; just before that reset, when nothing need be replayed; and
    at row 448, after it."""
    whole = run(tmp_path / "whole", *flags)
    renew, updates, stops = script.Agent.renew_statistics, [], (2, 11, 12, 14)

    def interrupted(self, x):
        updates.append(1)
        if len(updates) in stops:
            os.kill(os.getpid(), signal.SIGTERM)
        return renew(self, x)

    quick.setattr(script.Agent, "renew_statistics", interrupted)
    cut = None
    for stop in stops:
        summary = run(tmp_path, "--resume", str(cut), small=[]) if cut else run(tmp_path / "cut", *flags)
        cut = only(tmp_path / "cut")
        assert not summary["finished"] and summary["final_return_mean"] is None
        assert summary["global_step"] == stop * 128
    resumed = run(tmp_path, "--resume", str(cut), small=[])
    different = {name for name in whole if whole[name] != resumed[name]}
    assert different <= {"wall_seconds", "sps"} and resumed["params_sha256"] == whole["params_sha256"]
    ends = [script.read_checkpoint(str(run_dir)) for run_dir in (only(tmp_path / "whole"), cut)]
    for end in ends:  # all else is the same to the bit: pool, generators, counters, returns of episodes that were cut
        for name in ("wall_seconds", "timed_steps", "timed_seconds"):
            del end["progress"][name]
    assert same(*ends) and ("Reacher-v5" not in flags or len(ends[0]["progress"]["recent_returns"]) == 20)
    shape = (5, 10, 2) if "Reacher-v5" in flags else (5, 4, 1)
    for before, after in zip(shards(only(tmp_path / "whole"), *shape), shards(cut, *shape), strict=True):
        assert all(np.array_equal(before[name], after[name]) for name in before)


def test_the_entropy_bonus_falls_to_zero_by_half_of_the_run(tmp_path, quick):
    """Also across a resume, which knows the first weight from the run's arguments."""
    seen, update = [], script.update_policy

    def seen_update(*given):
        seen.append(given[-1].ent_coef)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(*given)

    quick.setattr(script, "update_policy", seen_update)
    assert not run(tmp_path, "--true-reward", "--ent-coef", "0.4", "--total-timesteps", "1024")["finished"]
    assert run(tmp_path, "--resume", str(only(tmp_path)), small=[])["finished"]
    assert seen == pytest.approx([0.4, 0.3, 0.2, 0.1, 0, 0, 0, 0])


def test_what_is_compiled_is_compiled_once(tmp_path, quick):
    """A number that changes with every update, as the bonus does, would be a reason to compile anew each time."""
    from torch._dynamo.testing import CompileCounter  # counts, and runs uncompiled: no compiler is needed

    torch._dynamo.reset()
    quick.setattr(script.shutil, "which", lambda name: name)  # wherever this runs
    counter, compile = CompileCounter(), torch.compile
    quick.setattr(torch, "compile", lambda function, **flags: compile(function, backend=counter, **flags))
    run(tmp_path, "--compile", *FEEDBACK, "--seed", "3")
    assert counter.frame_count == 1


def test_the_policy_follows_a_predictor_as_far_as_it_has_labels(tmp_path, quick):
    """The divergence at which passes end, against the labels of the log; all of it where none are to come."""
    seen, update, loss = [], script.update_policy, script.update_reward_model

    def seen_update(*given):
        seen.append(given[-1].target_kl)
        return update(*given)

    def seen_loss(ensemble, optimizer, preferences, *rest):
        stored.append(preferences.count)
        return loss(ensemble, optimizer, preferences, *rest)

    quick.setattr(script, "update_policy", seen_update)
    quick.setattr(script, "update_reward_model", seen_loss)
    stored = []
    run(tmp_path / "a", *FEEDBACK, "--target-kl", "0.48")
    assert seen[0] == pytest.approx(0.12) and seen == sorted(seen) and 0.4 < seen[-1] <= 0.48
    assert {round(kl * 100) for kl in seen} <= set(stored)
    seen.clear()
    more = ["--preferences", str(only(tmp_path / "a")), "--total-timesteps", "1024", "--target-kl", "0.48"]
    run(tmp_path / "b", "--oracle", "--labels", "0", *more)  # has all that it will ever have
    assert seen and set(seen) == {0.48}
    seen.clear()
    run(tmp_path / "c", "--oracle", "--labels", "48", *more)  # 48 of 96 to begin with
    assert seen[0] == pytest.approx(0.24) and seen == sorted(seen)
    seen.clear()
    run(tmp_path / "d", "--true-reward", "--total-timesteps", "512")
    assert set(seen) == {0.02}


def test_a_crash_is_an_exception_and_the_last_checkpoint_goes_on(tmp_path, quick):
    """Trap 43; and labels on the disk that are newer than the checkpoint do not come twice."""
    whole, update, calls = run(tmp_path / "whole", *FEEDBACK), script.update_reward_model, []

    def failing(*args):
        calls.append(args[2].count)
        if len(calls) > 12 and calls[-1] > calls[-2]:  # right after labels have come
            raise ZeroDivisionError
        return update(*args)

    with quick.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(script, "update_reward_model", failing)
        run(tmp_path / "cut", *FEEDBACK)
    cut = only(tmp_path / "cut")
    assert not (cut / "summary.json").exists()
    assert sum(len(s["mu"]) for s in shards(cut)) > script.read_checkpoint(str(cut))["labels_on_disk"] > 0
    assert run(tmp_path, "--resume", str(cut), small=[])["params_sha256"] == whole["params_sha256"]
    assert sum(len(s["mu"]) for s in shards(cut)) == 48


def test_a_resumed_run_needs_no_other_run(tmp_path, quick):
    """Labels and reward models that a run started from are in its own directory."""
    run(tmp_path / "first", *FEEDBACK)
    source = only(tmp_path / "first")
    for name, flag in (("labels", "--preferences"), ("model", "--reward-model")):
        run(tmp_path / name, "--oracle", "--labels", "0", flag, str(source), "--total-timesteps", "640")
    shutil.rmtree(source)
    for name in ("labels", "model"):
        run_dir = only(tmp_path / name)
        before = json.loads((run_dir / "summary.json").read_text())
        (run_dir / "summary.json").unlink()
        after = run(tmp_path, "--resume", str(run_dir), small=[])
        assert after["params_sha256"] == before["params_sha256"] and after["finished"]
        assert after["labels_loaded"] == before["labels_loaded"]


# ---------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("signals", [1, 2])
def test_ctrl_c_once_saves_and_twice_ends(tmp_path, signals):
    """The first is answered at once, whatever the run is at; neither leaves a traceback."""
    flags = ["--true-reward", "--env-id", "InvertedPendulum-v5", "--runs-dir", str(tmp_path), "--num-steps", "1024"]
    command = [sys.executable, str(ROOT / "ppo_mujoco_rlhf.py"), *flags, "--num-envs", "64"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    shown = [next(process.stdout) for _ in range(2)]
    for _ in range(signals):
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=120)
    assert "InvertedPendulum" in shown[1] and "stopping after" in rest and "Traceback" not in errors
    assert ("go on with --resume" in rest) == (only(tmp_path) / "checkpoint.pt").exists() == (signals == 1)
    assert process.returncode == (0 if signals == 1 else -signal.SIGINT)


def test_what_does_not_fit_a_run_is_refused(tmp_path, quick, capsys):
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
    refused("holds other clips", *labels, "--segment-length", "6", small=SMALL)
    refused("a run of", *labels, "--env-id", "Hopper-v5", small=SMALL)
    model = ["--oracle", "--labels", "0", "--reward-model", str(good)]
    refused("a run of", *model, "--env-id", "Hopper-v5", small=SMALL)
    run(tmp_path / "true", "--true-reward", "--total-timesteps", "640")
    unpaid = str(only(tmp_path / "true"))
    refused("has learned no reward model", "--oracle", "--labels", "0", "--reward-model", unpaid, small=SMALL)
    refused("has no labels", "--oracle", "--labels", "0", "--preferences", unpaid, small=SMALL)
    shard = sorted((good / "preferences").iterdir())[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    refused("truncated", *labels, small=SMALL)
    refused("truncated", "--resume", str(good))
    shard.unlink()
    refused("has lost the file of label", *labels, small=SMALL)
    shard.write_bytes(whole)
    newest = sorted((good / "preferences").iterdir())[-1]
    whole = newest.read_bytes()
    newest.unlink()
    refused("labels that the checkpoint counts", "--resume", str(good))
    newest.write_bytes(whole)
    args = json.loads((good / "args.json").read_text()) | {"script": "ppo_atari_rlhf"}
    (good / "args.json").write_text(json.dumps(args))
    refused("written by ppo_atari_rlhf", "--resume", str(good))


def test_sweeps_spell_booleans_their_own_way():
    args = script.parse_args(["--oracle=True", "--true_reward=False", "--anneal_lr=False", "--learning_rate=0.001"])
    assert args.oracle and not args.true_reward and not args.anneal_lr and args.learning_rate == 0.001


# ------------------------------------------------------------------------------------------------------- from outside
def command(*flags):
    return [sys.executable, str(ROOT / "ppo_mujoco_rlhf.py"), *flags]


def test_help_tells_what_the_defaults_do():
    shown = subprocess.run(command("--help"), capture_output=True, text=True, check=True).stdout
    assert "2M steps" in shown and "minutes" in shown
    assert all(f"--{field.name.replace('_', '-')}" in shown for field in dataclasses.fields(script.Args))


def test_killed_at_random_moments_and_resumed_equals_undisturbed(tmp_path, quick):
    """SIGKILL of a process of its own, wherever it hits; with video, without warnings, nothing written elsewhere."""
    work = tmp_path / "work"
    work.mkdir()
    quick.undo()  # as the script comes, since that is what the other process runs
    real = [*SMALL, "--oracle=True", "--labels", "64", "--total-timesteps", "5120", "--checkpoint-every", "3"]
    whole = run(tmp_path / "whole", *real, small=[])
    process = subprocess.Popen(command(*real, "--runs-dir", str(tmp_path / "cut")), stdout=subprocess.DEVNULL, cwd=work)
    deadline = time.time() + 120
    while not list(tmp_path.glob("cut/*/checkpoint.pt")) and time.time() < deadline:
        time.sleep(0.02)
    time.sleep(random.random())
    assert process.poll() is None  # else nothing is tested
    process.kill()
    process.wait()
    cut = only(tmp_path / "cut")
    end = subprocess.run(command("--resume", str(cut)), capture_output=True, text=True, cwd=work)
    assert end.returncode == 0 and "warning" not in end.stdout, end.stderr
    summary = json.loads((cut / "summary.json").read_text())
    assert summary["params_sha256"] == whole["params_sha256"] and summary["labels_used"] == 64
    assert summary["final_return_mean"] == whole["final_return_mean"]
    assert (cut / "episode" / "episode.png").stat().st_size > 10_000
    if "no video" not in end.stdout:  # half a renderer complains on its way out
        assert not end.stderr
        assert (cut / "episode" / "episode.webm").stat().st_size > 10_000
    assert not list(work.iterdir())


def test_evaluation_of_a_run_and_of_the_random_policy(tmp_path, quick):
    run(tmp_path, *FEEDBACK)
    run_dir = only(tmp_path)
    checkpoint = (run_dir / "checkpoint.pt").read_bytes()
    row = run(tmp_path, "--evaluate", str(run_dir), "--eval-episodes", "2", small=[])
    assert row == run(tmp_path, "--evaluate", str(run_dir), "--eval-episodes", "2", small=[])
    assert row["final_episodes"] == 2 and row["feedback"] == "oracle" and row["global_step"] == 2560
    assert row == json.loads((run_dir / "evaluation" / "summary.json").read_text())
    other = run(tmp_path, "--evaluate", str(run_dir), "--eval-episodes", "2", "--seed", "7", small=[])
    assert other["final_return_mean"] != row["final_return_mean"]
    random_row = run(tmp_path, "--evaluate", str(run_dir), "--random", "--eval-episodes", "3", small=[])
    assert random_row["feedback"] == "random" and random_row["final_episodes"] == 3
    assert random_row["global_step"] == 0 and -400 < random_row["final_return_mean"] < -250
    assert (run_dir / "checkpoint.pt").read_bytes() == checkpoint


# ---------------------------------------------------------------------------------------------------------- learning
LEARNING = ["--env-id", "InvertedPendulum-v5", "--total-timesteps", "60000", "--num-envs", "16", "--num-steps", "64"]
LEARNING += ["--num-minibatches", "4", "--gamma", "0.98"]
LEARNING += ["--oracle", "--labels", "1000", "--segment-length", "3", "--query-pool-steps", "8000"]
LEARNING += ["--pairs-per-step", "1", "--reward-minibatch-size", "128", "--pretrain-pairs", "8192"]


@pytest.fixture
def short_episodes(quick):
    """Of 100 steps, so that the little that so short a run sees shows the pole standing more often; with the reward
    model's own batches and statistics, since a coin's reward that 100 rows normalise pays for noise."""
    quick.setitem(script.EPISODE_LENGTH, "InvertedPendulum-v5", 100)
    quick.setattr(script, "REWARD_MINIBATCHES", 4)
    quick.setattr(script, "STATISTICS_ROWS", 1000)


def test_the_policy_learns_from_comparisons(tmp_path, short_episodes):
    """All of it together: from answers about pairs of clips to a pole that stands.

    Lying for most of the 100 steps scores about -110, standing 100."""
    summary = run(tmp_path, *LEARNING, small=[])
    assert summary["labels_used"] == 1000 and summary["final_episodes"] == 10
    assert summary["final_return_mean"] > 50
    row = run(tmp_path, "--evaluate", str(only(tmp_path)), "--random", small=[])
    assert row["final_return_mean"] < -80


def test_the_policy_learns_nothing_where_half_of_the_answers_are_wrong(tmp_path, short_episodes):
    """There is no other source of reward: the same run, with a coin for a teacher."""
    summary = run(tmp_path, *LEARNING, "--teacher-mistake", "0.5", small=[])
    assert summary["labels_used"] == 1000 and summary["final_return_mean"] < -50
    assert summary["reward_accuracy_heldout"] < 0.6
