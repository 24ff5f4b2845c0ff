"""Speed on Hopper, side by side in one run: ppo_mujoco_rlhf.py, CleanRL's PPO, and the simulator alone.

    python benchmarks/mujoco_speed.py --rounds 3        # a quarter of an hour on 2 cores; nothing else should run

Rounds go A B C A B C, each in a process of its own on one core, so that a machine that changes its speed does so for
all; the last candidate is two runs at a time, on two cores, and counts their sum. The scripts run at their defaults,
2M steps, and are stopped after --steps; their speed is that of the updates that trained the policy, so initial labels
and pre-training are left out. Appends to benchmarks/mujoco_speed.csv: a row per round and candidate with the ratio to
CleanRL's of the same round.
"""

import argparse
import csv
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import gymnasium as gym
import numpy as np

HERE = Path(__file__).resolve().parent
SCRIPT = HERE.parent / "ppo_mujoco_rlhf.py"
OURS = [sys.executable, str(SCRIPT), "--env-id", "Hopper-v5", "--torch-threads", "1", "--device", "cpu"]
CLEANRL, ONE, TWO = "CleanRL's ppo_continuous_action.py, true reward", "ppo_mujoco_rlhf.py --oracle", "two such at once"


def candidates(steps: int) -> dict:
    oracle = [*OURS, "--oracle", "--labels", "700"]
    return {
        CLEANRL: [sys.executable, str(HERE / "cleanrl_style_ppo_continuous.py"), str(max(1, steps // 2048)), "1"],
        ONE: oracle,
        "ppo_mujoco_rlhf.py --true-reward": [*OURS, "--true-reward"],
        "simulator alone, 16 environments": [sys.executable, str(Path(__file__).resolve()), "--simulator"],
        TWO: oracle,
    }


def simulate(num_steps: int = 5000):
    envs = gym.vector.SyncVectorEnv([lambda: gym.make("Hopper-v5")] * 16)
    envs.reset(seed=1)
    actions = np.random.default_rng(0).uniform(-1, 1, (num_steps + 100, *envs.action_space.shape)).astype(np.float32)
    for step, action in enumerate(actions):
        if step == 100:
            started = time.time()
        envs.step(action)
    print("sps", 16 * num_steps / (time.time() - started))


def measure(command: list[str], cores: list[int], steps: int) -> float:
    """Steps per second of this command, one process per core, summed."""
    speed = 0.0
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for core in cores:
            runs = ["--runs-dir", f"{folder}/{core}"] if str(SCRIPT) in command else []
            pinned = ["taskset", "-c", str(core), *command, *runs]
            processes.append(subprocess.Popen(pinned, stdout=subprocess.PIPE, text=True))
        for core, process in zip(cores, processes, strict=True):
            shown = ""
            for line in process.stdout:
                shown += line
                progress = re.match(r" *([\d,]+) steps .*/s ", line)
                if progress and int(progress[1].replace(",", "")) >= steps:
                    process.send_signal(signal.SIGINT)  # it ends its update and writes summary.json
                    break
            shown += process.communicate()[0]
            if process.returncode:
                sys.exit(f"{shown}\n{shlex.join(command)} ended with exit code {process.returncode}")
            if str(SCRIPT) in command:
                (summary,) = Path(folder).glob(f"{core}/*/summary.json")
                speed += json.loads(summary.read_text())["sps"]
            else:
                speed += float(re.search(r"sps ([\d.]+)", shown)[1])
    return speed


def hardware() -> str:
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return f"{platform.machine()} {model[1].strip() if model else ''} {os.cpu_count()} cores, 1 thread per process"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200_000, help="per candidate; 80,000 at least")
    parser.add_argument("--out", default=str(HERE / "mujoco_speed.csv"))
    parser.add_argument("--simulator", action="store_true", help="measure the simulator alone, here and now")
    args = parser.parse_args()
    if args.simulator:
        return simulate()
    if args.steps < 80_000:
        parser.error("initial labels are of the first 57,000 steps, and they are not timed: --steps 80000 at least")
    cores = sorted(os.sched_getaffinity(0))[:2]
    commit = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, cwd=HERE)
    machine, rows, tried = hardware(), [], candidates(args.steps)
    if len(cores) < 2:
        del tried[TWO]
    for number in range(args.rounds):
        speeds = {}
        for name, command in tried.items():
            speeds[name] = measure(command, cores if name == TWO else cores[:1], args.steps)
            print(f"round {number + 1}: {speeds[name]:8.0f} steps/s  {name}", flush=True)
        for name, speed in speeds.items():
            rows.append({
                "round": number + 1, "candidate": name, "steps_per_second": round(speed, 1),
                "ratio_to_cleanrl": round(speed / speeds[CLEANRL], 2), "ratio_to_one": round(speed / speeds[ONE], 2),
                "steps": args.steps, "machine": machine, "commit": commit.stdout.strip(),
                "date": time.strftime("%Y-%m-%d"),
                "command": shlex.join(["python", *(arg.removeprefix(f"{HERE.parent}/") for arg in tried[name][1:])]),
            })  # fmt: skip
    new = not Path(args.out).exists()
    with open(args.out, "a", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        if new:
            writer.writeheader()
        writer.writerows(rows)
    print(f"\nmedian over rounds: steps/s, ratio to CleanRL's, ratio to {ONE}")
    for name in tried:
        mine = [row for row in rows if row["candidate"] == name]
        keys = ("steps_per_second", "ratio_to_cleanrl", "ratio_to_one")
        speed, ratio, to_one = (median(row[key] for row in mine) for key in keys)
        print(f"{speed:9.0f} {ratio:9.2f} {to_one:9.2f}  {name}")


if __name__ == "__main__":
    main()
