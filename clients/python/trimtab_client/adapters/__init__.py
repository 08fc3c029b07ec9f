"""Rewards for other trainers: TRL, OpenRLHF and verl. None of them is needed to import this."""
