"""PPO (arXiv:1707.06347) as InstructGPT runs it: rollouts → experience → advantages → update → publish."""
