"""Two answers to a prompt, and what the reward model says of them: python quick_start.py [GENERATOR] [REWARD]"""

import sys

from trimtab_client import GeneratorClient, RewardClient, Sampling

generator, reward = sys.argv[1:3] if len(sys.argv) > 2 else ("127.0.0.1:7101", "127.0.0.1:7102")
prompt = "Once upon a time"
with GeneratorClient(generator) as sampling, RewardClient(reward) as scoring:
    answers = [one.text for one in sampling.generate([prompt], Sampling(n=2, max_tokens=24))]
    scores = scoring.score_texts([(prompt, answer) for answer in answers]).scores
for answer, score in zip(answers, scores, strict=True):
    print(f"{score:+.3f} {answer!r}")
