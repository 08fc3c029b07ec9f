"""One step of TRL's own GRPOTrainer with our reward function: `python trl_trains.py TRL POLICY REWARD OUTPUT`.

A process of its own, since TRL changes what it imports. It prints a JSON line: the logged metrics.
"""

import json
import sys

sys.path.insert(0, sys.argv[1])

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from trimtab_client.adapters.trl import TrlReward


def main(policy: str, reward: str, output: str) -> None:
    config = GRPOConfig(
        output_dir=output,
        max_steps=1,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        seed=1,
        disable_tqdm=True,
    )
    rows = Dataset.from_list([{"prompt": "w1 w2"}, {"prompt": "w3"}] * 4)
    asked: list[tuple[list, list, list]] = []

    class Watched(TrlReward):
        def __call__(self, prompts, completions, **columns):
            found = super().__call__(prompts, completions, **columns)
            asked.append((list(prompts), list(completions), found))
            return found

    trainer = GRPOTrainer(model=policy, reward_funcs=Watched(reward, name="helpful"), args=config, train_dataset=rows)
    trainer.train()
    print(json.dumps({"asked": asked, "logged": trainer.state.log_history}))


if __name__ == "__main__":
    main(*sys.argv[2:])
