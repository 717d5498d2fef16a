"""Trains the models beyond the paper on 8 faked devices; prints one JSON object for the tests.

python -m tests.support.variants_worker
"""

# First: it sets the number of devices.
from tests.support.parallel_worker import CONFIG, compare  # isort: skip

import json
import sys

import jax

from lory_jax.parallel import make_mesh
from tests.support.variants import VARIANTS


def main() -> None:
    single = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    report = {}
    for name, fields in VARIANTS.items():
        config = CONFIG(**fields)
        report[name] = compare(config, single, [(2, 2, 2)])["(2, 2, 2)"]
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
