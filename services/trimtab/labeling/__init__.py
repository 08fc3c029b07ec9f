"""The ranking page: campaigns of prompts whose answers people rank, its database, its REST API.

It is not a trainer and knows none: rankings leave as JSONL (`exporting`) in the form that the reward model's data
loader takes. New answers come from the generator through `trimtab_client` (`feeding`).
"""
