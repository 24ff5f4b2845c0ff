"""Do the tests that train hold on other instruction sets and seeds? Their scores, beside what they ask for.

    python benchmarks/learning_anywhere.py > rows.csv      # 120 runs of half a minute each

Each setting is a process of its own. Where this CPU lacks one, oneDNN falls back to what there is; PyTorch may die of
an illegal instruction, and it is said so.
"""

import argparse
import contextlib
import csv
import io
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = [{"ATEN_CPU_CAPABILITY": name} for name in ("default", "avx2", "avx512")]
SETTINGS += [{"ONEDNN_MAX_CPU_ISA": name} for name in ("SSE41", "AVX2", "AVX512_CORE")]
# tests/test_*_runs.py: right answers must end above the first score, wrong ones below the second
ASKED = {"atari": (24, 7), "mujoco": (25, -20)}


def train(setting: str, seeds: int) -> None:
    """One row per script and seed, on stdout."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import pytest

    import test_atari_runs as atari
    import test_mujoco_runs as mujoco

    for name, (least, most) in ASKED.items():
        for seed in range(1, seeds + 1):
            scores = []
            for flags in ([], ["--teacher-mistake", "1"]):
                with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
                    with contextlib.redirect_stdout(io.StringIO()):
                        if name == "atari":
                            atari.play_toy(patch, atari.script)
                            summary = atari.run(folder, *atari.LEARNING, "--seed", str(seed), *flags)
                        else:
                            summary = mujoco.run(folder, *mujoco.LEARNING, "--seed", str(seed), *flags, small=[])
                    scores.append(summary["final_return_mean"])
            held = scores[0] > least and scores[1] < most
            csv.writer(sys.stdout).writerow([setting, name, seed, *(f"{x:.1f}" for x in scores), least, most, held])
            sys.stdout.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--setting", help="run this one here, in this process")
    args = parser.parse_args()
    if args.setting:
        train(args.setting, args.seeds)
    else:
        print("setting,script,seed,right answers,wrong answers,at least,at most,holds", flush=True)
        for setting in SETTINGS:
            ((name, value),) = setting.items()
            command = [sys.executable, __file__, "--seeds", str(args.seeds), "--setting", f"{name}={value}"]
            ended = subprocess.run(command, env=os.environ | setting).returncode
            if ended == -signal.SIGILL:
                print(f"{name}={value}: this CPU lacks it", file=sys.stderr)
            elif ended:
                sys.exit(ended)
