"""How one update of the paper's run spreads over TPU slices, on paper.

python benchmarks/pod_scaling.py v5p:4x4x8 v6e:16x16   # plans these (10 CPU-minutes each), saves
python benchmarks/pod_scaling.py                       # only compares what is saved

Physics: the operations of an update are fixed, so those of a chip must fall as one over the chips;
what does not (work done by every chip alike, rows or heads that do not divide) shows as a product
of operations and chips that grows. Needs the extra `plan`; pgpo_jax/plan.py says what is counted.
The last line is JSON: that product, over the smallest slice's, for every topology.
"""

import argparse
import json
import subprocess
import sys
from typing import Any

from support.measure import RESULTS

CONFIG = "configs/tpu_pod.yaml"
# Topology -> mesh (data, fsdp, tensor), micro-batches, slots of the sampler. One row at a time on
# a chip; 4 chips have no room for the cache of more than 64 responses.
SLICES = {
    "v5p:2x2x1": ((1, 4, 1), 64, 64),
    "v5p:2x2x2": ((1, 8, 1), 32, 128),
    "v5p:2x2x4": ((1, 16, 1), 16, 128),
    "v5p:2x4x4": ((1, 32, 1), 8, 128),
    "v5p:4x4x4": ((1, 64, 1), 4, 128),
    "v5p:4x4x8": ((2, 64, 1), 2, 128),
    "v5p:4x8x8": ((4, 64, 1), 1, 256),
    "v5p:8x8x8": ((4, 64, 2), 1, 256),
    "v6e:8x8": ((1, 64, 1), 4, 128),
    "v6e:16x16": ((4, 64, 1), 1, 256),
}


def plan(topology: str) -> dict[str, Any]:
    """Runs the command as a user would, and keeps its last line."""
    mesh, micro_batches, slots = SLICES[topology]
    sizes = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), mesh, strict=True))
    sizes |= {"data.micro_batches": micro_batches, "sampling.slots": slots}
    options = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, "-m", "pgpo_jax.plan", CONFIG, "--topology", topology, *options],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    print(done.stdout)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("topologies", nargs="*", choices=[[], *SLICES], metavar="TOPOLOGY")
    for topology in parser.parse_args().topologies:
        file = RESULTS / f"plan_{topology.replace(':', '_')}.json"
        file.write_text(json.dumps(plan(topology), indent=2) + "\n")
    saved = [json.loads(file.read_text()) for file in RESULTS.glob("plan_*.json")]
    saved = sorted((row for row in saved if row["flops_per_chip"]), key=lambda row: row["chips"])
    if not saved:
        raise SystemExit(f"no results; name some of {', '.join(SLICES)}")
    whole = saved[0]["flops_per_chip"] * saved[0]["chips"]
    product = {row["topology"]: row["flops_per_chip"] * row["chips"] / whole for row in saved}
    for topology, value in product.items():
        print(f"{topology:<12} operations x chips {value:.4f}")
    print(json.dumps({"flops_times_chips": product, "largest": max(product.values())}))


if __name__ == "__main__":
    main()
