"""Do two checkouts end in the same parameters? A short run of each script, feedback and ablation in both, on the CPU.

    python benchmarks/same_parameters.py ../before .       # some minutes on one core

Prints a line per run, and exits with 1 if any differ: what only restructures must not move a bit.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

SMALL = "--total-timesteps 6144 --device cpu --threads 1 --pretrain-pairs 300 --eval-episodes 1 --segment-length 10"
ORACLE = "--oracle --labels 240 --query-pool-steps 6000"
ABLATIONS = ("random-queries", "no-ensemble", "no-online-queries", "no-regularization", "no-segments", "target")
FLAGS = ["--true-reward", ORACLE, *(f"{ORACLE} --ablation {ablation}" for ablation in ABLATIONS)]
FLAGS += [f"{ORACLE} --teacher-beta 1 --teacher-gamma 0.9 --teacher-mistake 0.1 --teacher-skip 0.1 --teacher-equal 0.1"]
SCRIPTS = {
    "ppo_atari_rlhf": "--env-id ALE/Breakout-v5",
    "a2c_atari_rlhf": "--env-id ALE/Breakout-v5",
    "ppo_mujoco_rlhf": "--env-id Reacher-v5",
}


def digest(checkout: Path, script: str, flags: str) -> str:
    """Hash of all parameters and buffers at the end of a run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, f"{script}.py", *flags.split(), *SMALL.split(), "--runs-dir", folder]
        subprocess.run(command, cwd=checkout, check=True, capture_output=True, text=True)
        (path,) = Path(folder).glob("*/checkpoint.pt")
        state = torch.load(path, map_location="cpu", weights_only=True)
    sha = hashlib.sha256()
    for module in ("agent", "ensemble"):
        for name, tensor in sorted(state[module].items()):
            sha.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="+", type=Path)
    parser.add_argument("--scripts", nargs="+", default=list(SCRIPTS))
    args, differ = parser.parse_args(), 0
    for script in args.scripts:
        for flags in FLAGS:
            found = [digest(checkout, script, f"{SCRIPTS[script]} {flags}") for checkout in args.checkouts]
            differ += len(set(found)) > 1
            same = "" if len(set(found)) == 1 else "DIFFERS"
            print(script, flags.replace(ORACLE, "--oracle"), *found, same, flush=True)
    sys.exit(differ > 0)
