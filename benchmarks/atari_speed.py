"""Speed on Atari, side by side in one run: the scripts, their first generation, CleanRL's PPO, and the simulator alone.

    python benchmarks/atari_speed.py --rounds 3        # half an hour on 2 cores; nothing else should run
    python benchmarks/atari_speed.py --only ppo_atari --rounds 2

Rounds go A B C A B C, each in a process of its own, so that a machine that changes its speed does so for all. Adds to
benchmarks/atari_speed.csv a row per round and candidate, with the ratio to CleanRL's of the same round. The first
generation comes out of this repository's history (--before COMMIT).
"""

import argparse
import csv
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from mujoco_speed import checkout

HERE = Path(__file__).resolve().parent
SCRIPT = HERE.parent / "ppo_atari_rlhf.py"
OURS = [sys.executable, str(SCRIPT), "--eval-episodes", "1"]
A2C = [sys.executable, str(HERE.parent / "a2c_atari_rlhf.py"), *OURS[2:]]
# Twenty iterations of policy and reward learning behind the initial labels; a label per 680 steps, against 1,820 at 10M
ORACLE = ["--oracle", "--labels", "60", "--pretrain-pairs", "1024"]
SIMULATOR = """
import numpy as np, sys, time; sys.path.insert(0, sys.argv[1]); import ppo_atari_rlhf as script
args = script.parse_args(["--true-reward", "--threads", sys.argv[2]])
envs = script.make_games(args, args.num_envs); envs.reset(seed=1); rng = np.random.default_rng(0)
for _ in range(100): envs.step(rng.integers(0, 6, args.num_envs))
started = time.time()
for _ in range(1500): envs.step(rng.integers(0, 6, args.num_envs))
print("sps", 1500 * args.num_envs / (time.time() - started))
"""


def candidates(threads: int, device: str, steps: int, before: Path) -> dict:
    small = ["--device", device, "--total-timesteps", str(steps)]
    given = ["--threads", str(threads), *small]
    first = [sys.executable, str(before / SCRIPT.name), *OURS[2:], *small]
    first += ["--torch-threads", str(threads), "--env-threads", str(threads)]
    return {
        "CleanRL's ppo_atari.py, true reward": [
            sys.executable, str(HERE / "cleanrl_style_ppo_atari.py"), str(max(2, steps // 5120)), str(threads),
        ],
        "ppo_atari_rlhf.py --oracle, a pair per 32 steps": [*OURS, *ORACLE, *given],
        "ppo_atari_rlhf.py --oracle, a pair per 32 steps, first generation": [*first, *ORACLE],
        "ppo_atari_rlhf.py --oracle, a pair per 10 steps": [*OURS, *ORACLE, *given, "--pairs-per-step", "0.1"],
        "ppo_atari_rlhf.py --true-reward": [*OURS, "--true-reward", *given],
        "ppo_atari_rlhf.py --true-reward, first generation": [*first, "--true-reward"],
        "a2c_atari_rlhf.py --oracle, a pair per 10 steps": [*A2C, *ORACLE, *given],
        "a2c_atari_rlhf.py --oracle, a pair per 50 steps": [*A2C, *ORACLE, *given, "--pairs-per-step", "0.02"],
        "simulator alone, 16 environments": [sys.executable, "-c", SIMULATOR, str(SCRIPT.parent), str(threads)],
    }  # fmt: skip


def measure(command: list[str]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        if "--eval-episodes" in command:
            subprocess.run([*command, "--runs-dir", folder], check=True, stdout=subprocess.DEVNULL)
            (summary,) = Path(folder).glob("*/summary.json")
            return json.loads(summary.read_text())["sps"]
        shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return float(re.search(r"sps ([\d.]+)", shown)[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--steps", type=int, default=40_960, help="of each")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--before", default="11a5f94", metavar="COMMIT", help="of the first generation")
    parser.add_argument("--only", default="", help="candidates whose name holds this, and CleanRL's")
    parser.add_argument("--out", default=str(HERE / "atari_speed.csv"))
    args = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, cwd=HERE)
    machine = f"{platform.machine()} {args.threads} threads {args.device}"
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        tried = candidates(args.threads, args.device, args.steps, checkout(args.before, Path(folder), SCRIPT.name))
        tried = {name: command for name, command in tried.items() if args.only in name or "CleanRL" in name}
        for number in range(args.rounds):
            speeds = {}
            for name, command in tried.items():
                speeds[name] = measure(command)
                print(f"round {number + 1}: {speeds[name]:8.0f} steps/s  {name}", flush=True)
            first = next(iter(speeds.values()))
            for name, speed in speeds.items():
                rows.append({
                    "round": number + 1, "candidate": name, "steps_per_second": round(speed, 1),
                    "ratio_to_cleanrl": round(speed / first, 2), "machine": machine,
                    "commit": args.before if "first generation" in name else commit.stdout.strip(),
                    "date": time.strftime("%Y-%m-%d"),
                })  # fmt: skip
    is_new = not Path(args.out).exists()
    with open(args.out, "a", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        if is_new:
            writer.writeheader()
        writer.writerows(rows)
    print("\nmedian over rounds: steps/s, ratio to CleanRL's")
    for name in tried:
        mine = [row for row in rows if row["candidate"] == name]
        speed, ratio = (median(row[key] for row in mine) for key in ("steps_per_second", "ratio_to_cleanrl"))
        print(f"{speed:9.0f} {ratio:9.2f}  {name}")


if __name__ == "__main__":
    main()
