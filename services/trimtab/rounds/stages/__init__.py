"""The stages of a round: training, ranking (with the sampling before it), evaluation, publishing; see `plan`."""
