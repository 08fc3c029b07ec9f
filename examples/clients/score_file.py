"""Scores a JSON-lines file of any length in bounded memory: python score_file.py REWARD < rows.jsonl > scored.jsonl

A row is {"prompt": …, "response": …}; it comes back with its score and with the version that gave it.
"""

import json
import sys

from trimtab_client import RewardClient

rows = (json.loads(line) for line in sys.stdin)
pairs = ((row["prompt"], row["response"]) for row in rows)
with RewardClient(sys.argv[1]) as reward:
    for one in reward.score_many(pairs, progress=True, truncate=True):
        prompt, response = one.row
        row = {"prompt": prompt, "response": response, "score": one.score, "version": str(one.version)}
        print(json.dumps(row))
