"""Print the command lines of a sweep, one per line, as W&B's agent would make them.

    python sweeps/expand.py sweeps/figure2_labels.yaml
    python sweeps/expand.py sweeps/figure2_labels.yaml --no-track | xargs -P 2 -I{} sh -c "{}"      # two at a time
    sbatch --array=1-105 --wrap 'eval "$(python sweeps/expand.py FILE --no-track | sed -n ${SLURM_ARRAY_TASK_ID}p)"'

A search over a distribution has no list: three random draws of it are printed, with each of the other values.
"""

import argparse
import itertools
import math
import random

import yaml


def values(parameter: dict) -> list:
    """What a parameter may be; of a distribution, three draws."""
    if "distribution" in parameter:
        low, high = math.log(parameter["min"]), math.log(parameter["max"])
        return [math.exp(random.Random(i).uniform(low, high)) for i in range(3)]
    return parameter.get("values", [parameter.get("value")])


def command_lines(path: str) -> list[str]:
    """The commands of a sweep file, booleans as --flag=True; the last parameter changes fastest."""
    with open(path) as file:
        sweep = yaml.safe_load(file)
    names, choices = list(sweep["parameters"]), [values(parameter) for parameter in sweep["parameters"].values()]
    lines = (zip(names, chosen, strict=True) for chosen in itertools.product(*choices))
    return [" ".join(["python", sweep["program"], *(f"--{k}={v}" for k, v in line)]) for line in lines]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep")
    parser.add_argument("--no-track", action="store_true", help="leave W&B out")
    args = parser.parse_args()
    for line in command_lines(args.sweep):
        print(line.replace(" --track=True", "") if args.no_track else line)
