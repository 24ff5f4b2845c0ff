"""SIGKILLs at random moments, each resumed: does the run end in the parameters of the undisturbed one?

    python benchmarks/kill_resume.py --kills 10                                  # half an hour on 2 cores
    python benchmarks/kill_resume.py --script ppo_mujoco_rlhf.py --kills 10      # three minutes

Every third kill hits a run that is still starting, and before each resumption the run's
directory gets another name. Other flags go to the script.

Writes a line of JSON per kill and run. Ends with exit code 1 where anything of the last checkpoint differs, parameters,
optimizers, statistics, pool or counters, or the answers in the run's directory do; only times may.
"""

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
FLAGS = {
    "ppo_atari_rlhf.py": "--labels 200 --total-timesteps 100000 --reset-every 3 --pretrain-pairs 2048",
    "a2c_atari_rlhf.py": "--labels 200 --total-timesteps 100000 --reset-every 60 --pretrain-pairs 2048",
    "ppo_mujoco_rlhf.py": "--labels 200 --total-timesteps 200000 --reset-every 3 --env-id Reacher-v5",
}


def flatten(value, name: str = "") -> dict[str, object]:
    """Nested dicts and lists as one dict."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for k, each in items for key, leaf in flatten(each, f"{name}.{k}").items()}
    return {name: value}


def differences(one: dict, other: dict) -> list[str]:
    """Names of what differs by a bit between two checkpoints, but for what a clock says."""
    one, other = (
        {k: v for k, v in flatten(each).items() if not k.endswith(("seconds", "SPS"))} for each in (one, other)
    )
    differ = sorted(one.keys() ^ other.keys())
    for name in one.keys() & other.keys():
        values = one[name], other[name]
        if all(isinstance(value, torch.Tensor) for value in values):
            same = values[0].dtype == values[1].dtype and values[0].shape == values[1].shape
            same = same and values[0].contiguous().numpy().tobytes() == values[1].contiguous().numpy().tobytes()
        else:
            same = values[0] == values[1] or (values[0] != values[0] and values[1] != values[1])
        differ += [] if same else [name]
    return differ


def read(run_dir: Path) -> dict:
    """A run's last checkpoint, and its answers."""
    state = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)
    return state | {"answers": (run_dir / "preferences" / "answers.jsonl").read_text().splitlines()}


def described(what: str, run_dir: Path) -> dict:
    state, summary = read(run_dir), json.loads((run_dir / "summary.json").read_text())
    sha = hashlib.sha256()
    for name, tensor in sorted(flatten({"agent": state["agent"], "ensemble": state["ensemble"]}).items()):
        sha.update(name.encode() + tensor.contiguous().numpy().tobytes())
    kept = ("labels_used", "global_step", "final_return_mean", "reward_loss", "commit")
    return {"run": what, "params_sha256": sha.hexdigest()} | {name: summary[name] for name in kept}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", choices=FLAGS, default="ppo_atari_rlhf.py")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args, flags = parser.parse_known_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        script = [sys.executable, str(ROOT / args.script)]
        command = [*script, "--oracle", *FLAGS[args.script].split(), "--eval-episodes", "2", "--device", "cpu", *flags]
        commit = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=10"]
        commit = {"commit": subprocess.run(commit, capture_output=True, text=True).stdout.strip()}

        began = time.monotonic()
        process = subprocess.Popen([*command, "--runs-dir", str(folder / "whole")], stdout=subprocess.PIPE, text=True)
        process.stdout.readline()  # its directory's name
        start = time.monotonic() - began
        process.communicate()
        length = time.monotonic() - began
        (whole,) = (folder / "whole").iterdir()
        print(json.dumps(described("undisturbed", whole) | commit), flush=True)

        runs = folder / "cut"
        process = subprocess.Popen([*command, "--runs-dir", str(runs)], stdout=subprocess.DEVNULL)
        for kill in range(1, args.kills + 1):
            if kill % 3 == 0:
                seconds = rng.uniform(0, 1.5 * start)
            else:  # the first may hit the initial phase
                seconds = start + rng.uniform(0, 1.3 * (length - start) / args.kills)
            time.sleep(seconds)
            hit = process.poll() is None
            process.kill()
            process.wait()
            found, iteration = list(runs.glob("*/args.json")), None
            again = [*command, "--runs-dir", str(runs)]
            if found:
                renamed = found[0].parent.rename(runs / f"called run {kill}")
                again = [*script, "--resume", str(renamed)]
                if (renamed / "checkpoint.pt").exists():
                    iteration = read(renamed)["progress"]["iteration"]
            shown = {"kill": kill, "after_seconds": round(seconds, 1), "hit": hit, "checkpoint_of_iteration": iteration}
            print(json.dumps(shown), flush=True)
            process = subprocess.Popen(again, stdout=subprocess.DEVNULL)
        if process.wait():
            sys.exit("the last resumption failed")
        (cut,) = (path.parent for path in runs.glob("*/args.json"))
        differ = differences(read(whole), read(cut))
        print(json.dumps(described(f"killed {args.kills} times", cut) | commit | {"differ": differ[:20]}), flush=True)
    sys.exit(bool(differ))


if __name__ == "__main__":
    main()
