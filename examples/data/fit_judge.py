"""Fits the example's judge anew: `python fit_judge.py OUT judge.json`, OUT as `prepare.py OUT` made it.

Needs `pip install 'trimtab[demo]'`. judge.json beside this file came from it; fitting takes about a minute on one core.
"""

import json
import sys
from pathlib import Path

from trimtab.rounds.judge import Judge, SentenceEncoder

prepared, file = map(Path, sys.argv[1:])
rows = [json.loads(line) for line in (prepared / "judge" / "train.jsonl").read_text(encoding="utf-8").splitlines()]
judge = Judge.fit([row["text"] for row in rows], [row["label"] for row in rows], SentenceEncoder.load())
judge.save(file)
print(f"{file}: {judge.text_count:,} sentences, accuracy {judge.accuracy:.3f} (5-fold)")
