"""Speed on Hopper, side by side in one run: ppo_mujoco_rlhf.py, its first generation, CleanRL's PPO, and the simulator.

    python benchmarks/mujoco_speed.py --rounds 3        # half an hour on 2 cores; nothing else should run

Rounds go A B C A B C, each in a process of its own on one core, so that a machine that changes its speed does so for
all; the last candidate is two runs at a time, on two cores, and counts their sum. The scripts are told to make 5M steps
and are stopped once their progress lines are --steps apart; the first line that counts is at 80,000 steps, behind
initial labels and pre-training. The clock is this script's. Appends to benchmarks/mujoco_speed.csv: a row per round and
candidate with the ratios to CleanRL's, to --oracle's and to the first generation's of the same round.

The first generation comes out of this repository's history (--before COMMIT; --before "" leaves it out).
"""

import argparse
import csv
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import gymnasium as gym
import numpy as np

HERE = Path(__file__).resolve().parent
SCRIPT = "ppo_mujoco_rlhf.py"
FLAGS = ["--env-id", "Hopper-v5", "--total-timesteps", "5000000", "--device", "cpu"]
ORACLE = ["--oracle", "--labels", "700"]
CLEANRL, ONE = "CleanRL's ppo_continuous_action.py, true reward", f"{SCRIPT} --oracle"
BEFORE, TWO = f"{ONE}, first generation", "two such at once"
TIMED_FROM = 80_000  # steps, of which the first generation counts the initial labels' 57,000 too: it is timed earlier


def candidates(steps: int, before: Path | None) -> dict:
    now = [sys.executable, str(HERE.parent / SCRIPT), *FLAGS, "--threads", "1"]
    then = [sys.executable, str(before / SCRIPT), *FLAGS, "--torch-threads", "1"] if before else []
    return {
        CLEANRL: [sys.executable, str(HERE / "cleanrl_style_ppo_continuous.py"), str(max(1, steps // 2048)), "1"],
        ONE: [*now, *ORACLE],
        **({BEFORE: [*then, *ORACLE]} if then else {}),
        f"{SCRIPT} --true-reward": [*now, "--true-reward"],
        **({f"{SCRIPT} --true-reward, first generation": [*then, "--true-reward"]} if then else {}),
        "simulator alone, 16 environments": [sys.executable, str(Path(__file__).resolve()), "--simulator"],
        TWO: [*now, *ORACLE],
    }


def checkout(commit: str, folder: Path, script: str) -> Path:
    """That commit's script, in a folder of its own."""
    shown = subprocess.run(["git", "-C", str(HERE), "show", f"{commit}:{script}"], capture_output=True)
    if shown.returncode:
        sys.exit(f"--before {commit}: {shown.stderr.decode().strip()}; a shallow clone has no history")
    (folder / script).write_bytes(shown.stdout)
    return folder


def simulate(num_steps: int = 5000):
    envs = gym.vector.SyncVectorEnv([lambda: gym.make("Hopper-v5")] * 16)
    envs.reset(seed=1)
    actions = np.random.default_rng(0).uniform(-1, 1, (num_steps + 100, *envs.action_space.shape)).astype(np.float32)
    for step, action in enumerate(actions):
        if step == 100:
            started = time.time()
        envs.step(action)
    print("sps", 16 * num_steps / (time.time() - started))


def speed_of(process: subprocess.Popen, steps: int) -> float | None:
    """Steps per second between two progress lines, so many steps apart, or what the process says at its end."""
    begun = None
    for line in process.stdout:
        if said := re.search(r"sps ([\d.]+)", line):
            return float(said[1])
        if progress := re.match(r" *([\d,]+) steps .*/s ", line):
            step, now = int(progress[1].replace(",", "")), time.monotonic()
            if begun and step >= begun[0] + steps:
                return (step - begun[0]) / (now - begun[1])
            if not begun and step >= TIMED_FROM:
                begun = step, now
    return None


def measure(command: list[str], cores: list[int], steps: int) -> float:
    """Steps per second of this command, one process per core, summed."""
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "errors", "w+") as errors:
        processes = []
        for core in cores:
            runs = ["--runs-dir", f"{folder}/{core}"] if Path(command[1]).name == SCRIPT else []
            pinned = ["taskset", "-c", str(core), *command, *runs]
            processes.append(subprocess.Popen(pinned, stdout=subprocess.PIPE, stderr=errors, text=True))
        with ThreadPoolExecutor() as pool:  # none is stopped while another is timed
            speeds = list(pool.map(speed_of, processes, [steps] * len(processes)))
        for process in processes:
            process.kill()
            process.communicate()
        if None in speeds:
            errors.seek(0)
            sys.exit(f"{errors.read()}\n{shlex.join(command)} ended before it was timed")
    return sum(speeds)


def hardware() -> str:
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return f"{platform.machine()} {model[1].strip() if model else ''} {os.cpu_count()} cores, 1 thread per process"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, default=200_000, help="that are timed of each; progress is told every 20,480"
    )
    parser.add_argument("--before", default="11a5f94", metavar="COMMIT", help="of the first generation")
    parser.add_argument("--out", default=str(HERE / "mujoco_speed.csv"))
    parser.add_argument("--simulator", action="store_true", help="measure the simulator alone, here and now")
    args = parser.parse_args()
    if args.simulator:
        return simulate()
    cores = sorted(os.sched_getaffinity(0))[:2]
    commit = subprocess.run(["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, cwd=HERE)
    with tempfile.TemporaryDirectory() as folder:
        tried = candidates(args.steps, checkout(args.before, Path(folder), SCRIPT) if args.before else None)
        if len(cores) < 2:
            del tried[TWO]
        rows = []
        for number in range(args.rounds):
            speeds = {}
            for name, command in tried.items():
                speeds[name] = measure(command, cores if name == TWO else cores[:1], args.steps)
                print(f"round {number + 1}: {speeds[name]:8.0f} steps/s  {name}", flush=True)
            for name, speed in speeds.items():
                shown = [arg.replace(f"{folder}/", "").replace(f"{HERE.parent}/", "") for arg in tried[name][1:]]
                first = speeds.get(f"{name}, first generation")
                rows.append({
                    "round": number + 1, "candidate": name, "steps_per_second": round(speed, 1),
                    "ratio_to_cleanrl": round(speed / speeds[CLEANRL], 2),
                    "ratio_to_one": round(speed / speeds[ONE], 2),
                    "ratio_to_first_generation": round(speed / first, 2) if first else "",
                    "steps": args.steps, "machine": hardware(),
                    "commit": args.before if "first generation" in name else commit.stdout.strip(),
                    "date": time.strftime("%Y-%m-%d"), "command": shlex.join(["python", *shown]),
                })  # fmt: skip
    old = []
    if Path(args.out).exists():
        with open(args.out, newline="") as file:
            old = list(csv.DictReader(file))
    with open(args.out, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], restval="")
        writer.writeheader()
        writer.writerows([*old, *rows])
    print(f"\nmedian over rounds: steps/s, ratio to CleanRL's, ratio to {ONE}")
    for name in tried:
        mine = [row for row in rows if row["candidate"] == name]
        keys = ("steps_per_second", "ratio_to_cleanrl", "ratio_to_one")
        speed, ratio, to_one = (median(row[key] for row in mine) for key in keys)
        print(f"{speed:9.0f} {ratio:9.2f} {to_one:9.2f}  {name}")
        if mine[0]["ratio_to_first_generation"]:
            times = [row["ratio_to_first_generation"] for row in mine]
            print(f"{'':31}{median(times):.2f} times as fast as before [{min(times):.2f}, {max(times):.2f}]")


if __name__ == "__main__":
    main()
