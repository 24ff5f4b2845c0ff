"""Ten SIGKILLs at random moments, each resumed: does the run end in the parameters of the undisturbed one?

    python benchmarks/kill_resume.py --kills 10        # half an hour on 2 cores

Writes a line of JSON per run; ends with exit code 1 where a hash differs.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "ppo_atari_rlhf.py"
FLAGS = ["--oracle", "--labels", "200", "--total-timesteps", "100000", "--checkpoint-every", "4", "--reset-every", "10"]
FLAGS += ["--eval-episodes", "2", "--pretrain-pairs", "2048"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args, flags = parser.parse_known_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(SCRIPT), *FLAGS, *flags]
        started = time.time()
        subprocess.run([*command, "--runs-dir", f"{folder}/whole"], check=True, stdout=subprocess.DEVNULL)
        length = time.time() - started
        (whole,) = Path(folder).glob("whole/*")
        expected = json.loads((whole / "summary.json").read_text())
        print(json.dumps({"run": "undisturbed", **{k: expected[k] for k in KEPT}}), flush=True)

        process = subprocess.Popen([*command, "--runs-dir", f"{folder}/cut"], stdout=subprocess.DEVNULL)
        for kill in range(args.kills):
            # The first leaves time for a checkpoint; all of them come before the end, even of a run that lost nothing
            time.sleep(length * (rng.uniform(0.15, 0.3) if kill == 0 else rng.uniform(0.02, 0.7 / args.kills)))
            alive = process.poll() is None
            process.kill()
            process.wait()
            (cut,) = Path(folder).glob("cut/*")
            saved = (cut / "checkpoint.pt").exists()
            print(json.dumps({"kill": kill + 1, "hit": alive, "had_checkpoint": saved}), flush=True)
            again = ["--resume", str(cut)] if saved else [*FLAGS, *flags, "--runs-dir", f"{folder}/cut"]
            process = subprocess.Popen([sys.executable, str(SCRIPT), *again], stdout=subprocess.DEVNULL)
        process.wait()
        found = json.loads((cut / "summary.json").read_text())
        print(json.dumps({"run": f"killed {args.kills} times", **{k: found[k] for k in KEPT}}), flush=True)
    sys.exit(found["params_sha256"] != expected["params_sha256"])


KEPT = ("params_sha256", "labels_used", "global_step", "final_return_mean", "reward_loss", "commit")

if __name__ == "__main__":
    main()
