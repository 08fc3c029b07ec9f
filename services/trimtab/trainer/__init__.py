"""The trainer service and the three stages: SFT, reward model, PPO."""
