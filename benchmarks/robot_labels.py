"""Does a run by --human, on a real label server, reach what --oracle reaches with as many labels?

    python benchmarks/robot_labels.py ppo_mujoco_rlhf.py --env-id Reacher-v5 --labels 700 --total-timesteps 1000000

Robots answer by the oracle's rule through the interface that the page uses. Runs --human and then --oracle with the
flags given, and adds both to results/human.csv, which results/draw.py draws.

    python benchmarks/robot_labels.py ppo_atari_rlhf.py --env-id ALE/Enduro-v5 --labels 290 --total-timesteps 500000 \\
        --ties-by-speed --true-reward

In Enduro most clips have the same score. There, robots that see the clips prefer the faster one, as people do; and the
true reward's agent runs too.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main():
    sys.path += [str(ROOT / "tests"), str(ROOT / "results")]
    from draw import collect, draw_human
    from enduro_eye import fit_eye

    from robot_labeller import Robot

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", help="one of the three training scripts")
    parser.add_argument("--labels", type=int, default=700)
    parser.add_argument("--port", type=int, default=8799)
    parser.add_argument("--labellers", type=int, default=3)
    parser.add_argument("--delay", type=float, default=0.0, help="seconds that a robot takes for an answer")
    parser.add_argument("--mistakes", type=float, default=0.0, help="share of its answers that are turned around")
    parser.add_argument("--ties-by-speed", action="store_true", help="Enduro: equal scores are settled by speed")
    parser.add_argument("--true-reward", action="store_true", help="run the agent of the true reward too")
    parser.add_argument("--runs-dir", default="runs")
    args, flags = parser.parse_known_args()
    settle = fit_eye().faster if args.ties_by_speed else None
    runs_dir = Path(args.runs_dir) / time.strftime("robots-%Y%m%d-%H%M%S")
    runs_dir.mkdir(parents=True)
    command = [sys.executable, str(ROOT / "label_server.py"), "--port", str(args.port), "--runs-dir", str(runs_dir)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        if not server.stdout.readline():  # its link
            raise SystemExit("the label server did not start")
        tokens = json.loads((runs_dir / "label_server.tokens").read_text())
        url = f"http://127.0.0.1:{args.port}"
        for i in range(args.labellers):
            Robot(url, tokens["admin"], f"robot {i}", args.delay, args.mistakes, settle=settle).start()
        robots = f"{args.labellers} robots, {args.delay:g} s per answer, {args.mistakes:.0%} mistakes"
        robots += ", ties by speed" * args.ties_by_speed
        labels = ["--labels", str(args.labels)]
        sources = {robots: ["--human", *labels], "oracle": ["--oracle", *labels]}
        if args.true_reward:
            sources["true reward"] = ["--true-reward"]
        for labeller, source in sources.items():
            before = set(runs_dir.glob("*/args.json"))
            train = [sys.executable, str(ROOT / args.script), *flags, *source, "--runs-dir", str(runs_dir)]
            subprocess.run(train, check=True)
            (fresh,) = set(runs_dir.glob("*/args.json")) - before
            collect(fresh.parent, "human.csv", labeller=labeller)
    finally:
        server.terminate()
    draw_human()


if __name__ == "__main__":
    main()
