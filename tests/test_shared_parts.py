"""What is the same text in several scripts, as tests/test_siblings.py sees to, against numbers worked out by hand."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import a2c_atari_rlhf as a2c
import ppo_atari_rlhf as atari
import ppo_mujoco_rlhf as mujoco

SCRIPTS = [atari, mujoco, a2c]


class Stub(torch.nn.Module):
    """In place of an agent; what it says about a minibatch goes to a stub of policy_loss."""

    def __init__(self, outputs: int):
        super().__init__()
        self.layer, self.outputs = torch.nn.Linear(1, 1), outputs
        self.actor_logstd = torch.nn.Parameter(torch.zeros(1))  # ppo_mujoco_rlhf.py bounds it

    def get_action_and_value(self, obs, actions):
        return (self.layer(obs).sum(),) * self.outputs


@pytest.mark.parametrize(("target", "epochs"), [("0.02", 2), ("0.04", 3), ("1", 4)])
def test_no_further_epoch_after_one_that_went_too_far(monkeypatch, target, epochs):
    """The mean over the minibatches of one epoch counts: not its last one, not those of earlier epochs."""
    flags = ["--num-envs", "2", "--num-steps", "2", "--num-minibatches", "2", "--update-epochs", "4"]
    args = mujoco.parse_args(["--true-reward", *flags, "--target-kl", target])
    kls = iter([0.03, 0.0, 0.0, 0.05, 0.09, 0.01, 0.0, 0.9])  # means 0.015, 0.025, 0.05, 0.45
    monkeypatch.setattr(mujoco, "policy_loss", lambda loss, *_: (loss, {"approx_kl": torch.tensor(next(kls))}))
    rows = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    agent = Stub(5)
    optimizer = torch.optim.SGD(agent.parameters(), lr=0.0)
    logged = mujoco.update_policy(agent, optimizer, [rows] + [rows[:, 0]] * 5, np.random.default_rng(0), args)
    assert logged["epochs"] == epochs and len(list(kls)) == 8 - 2 * epochs


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_summary_is_json_for_everybody(script):
    """NaN and infinity, of a run whose labels are all ties, are Python's words."""
    args = script.parse_args(["--oracle"])
    labels = SimpleNamespace(first=0, used=9, loaded=0, skipped=0, ties=9)
    scalars = {"reward_model/accuracy_heldout": math.nan, "reward_model/loss": math.nan, "losses/entropy": 1.5}
    progress = script.Progress(iteration=1, asked=9, scalars=scalars)
    summary = script.summarise(np.array([1.0, 3.0]), labels, progress, {"commit": None}, args)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    found = {
        name: summary[name] for name in ("final_return_mean", "final_return_std", "entropy", "teacher_beta", "asked")
    }
    assert list(found.values()) == [2.0, 1.0, 1.5, None, 9]
    assert summary["reward_accuracy_heldout"] is None


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_correlation_is_of_rewards_that_were_paid(script):
    """The untrained policy's rows were paid nothing, NaN: they count neither as zeros nor as NaN."""
    args = script.parse_args(["--oracle", "--segment-length", "5", "--num-envs", "2", "--query-pool-steps", "1000000"])
    rng = np.random.default_rng(0)
    pool = script.SegmentPool(10, 2, *((3, 2) if script is mujoco else ()), "cpu")
    truth, noise = (torch.tensor(rng.normal(size=(2000, 2)), dtype=torch.float32) for _ in range(2))
    paid, unpaid = truth + 0.75 * noise, torch.full((2000, 2), math.nan)  # correlation 1 / 1.25
    pool.streams = {"oracle_rewards": torch.cat([noise, truth]), "pred_rewards": torch.cat([unpaid, paid])}
    pool.rows = pool.count = 4000
    assert script.reward_correlation(pool, args) == pytest.approx(0.8, abs=0.06)
    pool.streams["pred_rewards"][:] = math.nan
    assert math.isnan(script.reward_correlation(pool, args))
    pool.streams["pred_rewards"][:] = 1.0  # constant
    assert math.isnan(script.reward_correlation(pool, args))
    pool.count = 4
    assert math.isnan(script.reward_correlation(pool, args))  # no whole segment yet


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_docstring_of_compute_gae_is_true(script):
    """An end cuts the trace and nothing else: the value of what a row led to counts unless the caller leaves it 0."""
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    for next_value, done, error in ((3.0, 1, 1 + 0.5 * 3 - 2), (0.0, 1, 1 - 2), (3.0, 0, 1 + 0.5 * 3 - 2)):
        rewards, values = torch.cat([one, 7 * one]), torch.cat([2 * one, zero])
        next_values, dones = torch.cat([next_value * one, zero]), torch.cat([done * one, zero])
        advantages, returns = script.compute_gae(rewards, values, next_values, dones, 0.5, 0.5)
        assert advantages.flatten().tolist() == [error + (1 - done) * 0.25 * 7, 7]
        assert torch.equal(returns, advantages + values)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_help_survives_any_terminals_encoding(script, encoding):
    """In a process of its own; every field is listed, and no word of the file needs more than Latin-1 to be shown."""
    environment = {"PYTHONIOENCODING": encoding, "COLUMNS": "200", "PATH": "", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, script.__file__, "--help"]
    done = subprocess.run(command, capture_output=True, env=environment)
    shown = done.stdout.decode(encoding)
    assert done.returncode == 0 and not done.stderr
    assert all(f"--{name.replace('_', '-')}" in shown for name in script.Args.__dataclass_fields__)


@pytest.mark.parametrize("script", SCRIPTS)
def test_commands_in_the_docstring_parse(script, monkeypatch):
    """What a reader pastes first; and the numbers of steps that are told there are the defaults'."""
    text = Path(script.__file__).read_text().split('"""')[1]
    commands = re.findall(r"^    python (\w+)\.py (.*?)  +#", text, flags=re.MULTILINE)
    assert len(commands) == 4 and {name for name, _ in commands} == {script.SCRIPT}
    for _, flags in commands:
        script.parse_args(flags.split())
    assert f"{script.Args().total_timesteps // 1_000_000}M steps" in text
