"""Does a run by --human, on a real label server, reach what --oracle reaches with as many labels?

    python benchmarks/robot_labels.py ppo_mujoco_rlhf.py --env-id Reacher-v5 --labels 700 --total-timesteps 1000000

Robots answer by the oracle's rule through the interface that the page uses. Runs --human and then --oracle with the
flags given, and adds both to results/human.csv, which results/draw.py draws.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "tests"), str(ROOT / "results")]

from draw import collect, draw_human  # noqa: E402
from robot_labeller import Robot  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", help="one of the three training scripts")
    parser.add_argument("--port", type=int, default=8799)
    parser.add_argument("--labellers", type=int, default=3)
    parser.add_argument("--delay", type=float, default=0.0, help="seconds that a robot takes for an answer")
    parser.add_argument("--mistakes", type=float, default=0.0, help="share of its answers that are turned around")
    parser.add_argument("--runs-dir", default="runs")
    args, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "label_server.py"), "--port", str(args.port)]
        server = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
        while not (Path(folder) / "label_server.tokens").exists():
            time.sleep(0.2)
        tokens = json.loads((Path(folder) / "label_server.tokens").read_text())
        time.sleep(2)
        url, robots = f"http://127.0.0.1:{args.port}", []
        for i in range(args.labellers):
            robots.append(Robot(url, tokens["admin"], f"robot {i}", args.delay, args.mistakes))
            robots[-1].start()
        train = [sys.executable, str(ROOT / args.script), *flags, "--runs-dir", args.runs_dir]
        environment = os.environ | {"LABEL_SERVER_TOKEN": tokens["trainer"]}
        subprocess.run([*train, "--human", "--label-server", url], check=True, env=environment)
        for robot in robots:
            robot.stopping.set()
        for robot in robots:
            robot.join()
        server.terminate()
        server.wait()
    subprocess.run([*train, "--oracle"], check=True)
    runs = sorted(Path(args.runs_dir).iterdir(), key=lambda path: path.stat().st_ctime)[-2:]
    labeller = f"{args.labellers} robots, {args.delay:g} s per answer, {args.mistakes:.0%} mistakes"
    for run_dir, name in zip(runs, (labeller, "oracle"), strict=True):
        collect(run_dir, "human.csv", labeller=name)
    draw_human()


if __name__ == "__main__":
    main()
