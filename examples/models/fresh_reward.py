"""A reward model with an untrained head beside a policy, for a system to come up with: `fresh_reward.py POLICY OUT`."""

import sys
from pathlib import Path

from trimtab.models.policy import Policy
from trimtab.models.scalar_head import ScalarModel


def main(policy: str, out: str) -> None:
    """Write to `out` the body of `policy` with a random head, its score's mean 0 and deviation 1."""
    model = ScalarModel.from_policy(Policy.load(policy), seed=0)
    model.set_normalization(0.0, 1.0)
    model.save(Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
