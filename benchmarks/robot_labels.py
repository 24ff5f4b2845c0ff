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
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "label_server.py"), "--port", str(args.port)]
        server = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
        try:
            if not server.stdout.readline():  # its link
                raise SystemExit("the label server did not start")
            tokens = json.loads((Path(folder) / "label_server.tokens").read_text())
            url, robots = f"http://127.0.0.1:{args.port}", []
            for i in range(args.labellers):
                robots.append(Robot(url, tokens["admin"], f"robot {i}", args.delay, args.mistakes))
                robots[-1].start()
            for labeller, source in (
                (f"{args.labellers} robots", ["--human", "--label-server", url]),
                ("oracle", ["--oracle"]),
            ):
                train = [sys.executable, str(ROOT / args.script), *flags, *source]
                runs[labeller] = Path(args.runs_dir) / labeller.replace(" ", "_") / time.strftime("%Y%m%d-%H%M%S")
                environment = os.environ | {"LABEL_SERVER_TOKEN": tokens["trainer"]}
                subprocess.run([*train, "--runs-dir", str(runs[labeller])], check=True, env=environment)
        finally:
            server.terminate()
    for labeller, folder in runs.items():
        (run_dir,) = folder.iterdir()
        detail = f", {args.delay:g} s per answer, {args.mistakes:.0%} mistakes" if labeller != "oracle" else ""
        collect(run_dir, "human.csv", labeller=labeller + detail)
    draw_human()


if __name__ == "__main__":
    main()
