"""Makes the example's training and evaluation sets from the sources beside this file: `python prepare.py OUT`.

Plain Python, no randomness but a fixed seed: equal sources give equal bytes. README.md says where the sources come from
and under which licences; docs/data.md describes the rows. Who may see which text is decided here, and only here:

    stories   the last 330 of the sample are for evaluation alone; the others are for SFT and for PPO's openings
    movies    the rating tasks (30 sentences each) fall into three parts: reward training, reward held-out, judge
    tweets    blocks of 30 in file order fall into two parts: reward training, reward held-out
"""

import argparse
import gzip
import html
import json
import random
import re
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parent / "sources"
SEED = 20240501
EVALUATION_STORIES = 330
VALIDATION_STORIES = 60
HELD_OUT_BLOCKS = 24  # of each source
JUDGE_TASKS = 120
BLOCK = 30  # items of a rating task; tweets are put into blocks of the same size
K_RANGE = (4, 9)
TIE = 0.3  # points of the −4..+4 scale; about one standard error of the difference of two means of 20 ratings
LONGEST_RANKED_TEXT = 140  # characters
OPENING_CHARACTERS = (50, 160)


@dataclass(frozen=True)
class Item:
    """A rated text: the mean of its raters, and their own ratings where the source names persons."""

    text: str
    mean: float
    ratings: tuple[int, ...] = ()


@dataclass(frozen=True)
class Block:
    """Items that are ranked with one another; the unit by which rows are held out."""

    name: str
    items: tuple[Item, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--passes", type=int, default=3, help="rankings that each training item appears in")
    arguments = parser.parse_args()
    manifest = prepare(arguments.out, arguments.passes)
    for name, count in manifest["rows"].items():
        print(f"{count:7,}  {name}")


def prepare(out: Path, passes: int = 3) -> dict:
    """Write every set under `out` and a manifest.json that counts them; returns the manifest."""
    rows = {}
    rows |= story_sets()
    reward, agreement = reward_sets(passes)
    rows |= reward
    for name, lines in rows.items():
        write_jsonl(out / name, lines)
    manifest = {
        "rows": {name: len(lines) for name, lines in rows.items()},
        "seed": SEED,
        "tie_points": TIE,
        "rater_agreement": agreement,
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def story_sets() -> dict[str, list[dict]]:
    """SFT texts, PPO openings, and evaluation openings of stories that neither saw.

    The sample breaks some stories in two, so the split is by place in the file, not by a shuffle that would put two
    halves of one story on both sides. Evaluation openings that begin any training story are left out.
    """
    stories = read_stories()
    seen, unseen = stories[:-EVALUATION_STORIES], stories[-EVALUATION_STORIES:]
    openings = unique(filter(None, map(opening, seen)))
    held_out = [text for text in unique(filter(None, map(opening, unseen))) if text not in set(openings)]
    shuffled = random.Random(SEED).sample(seen, len(seen))
    return {
        "sft/train.jsonl": [{"text": story} for story in shuffled[VALIDATION_STORIES:]],
        "sft/validation.jsonl": [{"text": story} for story in shuffled[:VALIDATION_STORIES]],
        "ppo/openings.jsonl": [{"prompt": text} for text in openings],
        "evaluation/openings.jsonl": [{"prompt": text} for text in held_out],
    }


def reward_sets(passes: int) -> tuple[dict[str, list[dict]], dict[str, float]]:
    """Rankings for the reward model, labelled sentences for the judge, and how well one rater knows the others."""
    chance = random.Random(SEED)
    movies = read_movies()
    chance.shuffle(movies)
    movies_held_out, rest = movies[:HELD_OUT_BLOCKS], movies[HELD_OUT_BLOCKS:]
    judge_blocks, movies_train = rest[:JUDGE_TASKS], rest[JUDGE_TASKS:]
    tweets = read_tweets()
    chance.shuffle(tweets)
    tweets_held_out, tweets_train = tweets[:HELD_OUT_BLOCKS], tweets[HELD_OUT_BLOCKS:]

    train: list[dict] = []
    for _ in range(passes):
        one = rankings([short(block) for block in movies_train + tweets_train], chance)
        chance.shuffle(one)
        train += one
    reward_keys = {key(item.text) for block in movies_held_out + movies_train for item in block.items}
    judge_keys = {key(item.text) for block in judge_blocks for item in block.items} - reward_keys
    rows = {
        "reward/train.jsonl": train,
        "reward/heldout.jsonl": rankings(movies_held_out + tweets_held_out, chance),
        "reward/heldout_persons.jsonl": person_rankings(movies_held_out, chance),
        "judge/train.jsonl": [row for row in read_polarity() if key(row["text"]) in judge_keys],
    }
    return rows, rater_agreement(movies_held_out)


def rankings(blocks: Sequence[Block], chance: random.Random) -> list[dict]:
    """Each item once: a block's items, shuffled, in groups of 4 to 9 ranked by their mean rating."""
    rows = []
    for block in blocks:
        for group in groups(block.items, chance):
            rows.append(ranking_row(group, [item.mean for item in group], TIE, "mean of raters", block.name))
    return [row for row in rows if len(set(row["ranks"])) > 1]


def person_rankings(blocks: Sequence[Block], chance: random.Random) -> list[dict]:
    """Each item once, ranked by the ratings of one person, drawn anew for each group."""
    rows = []
    for block in blocks:
        for group in groups(block.items, chance):
            person = chance.randrange(len(group[0].ratings))
            ratings = [item.ratings[person] for item in group]
            rows.append(ranking_row(group, ratings, 0, f"{block.name}/{person}", block.name))
    return [row for row in rows if len(set(row["ranks"])) > 1]


def groups(items: Sequence[Item], chance: random.Random) -> Iterable[list[Item]]:
    left = chance.sample(items, len(items))
    while len(left) >= K_RANGE[0]:
        k = chance.randint(*K_RANGE)
        yield left[:k] if len(left) - k >= K_RANGE[0] else left[: K_RANGE[1]]
        left = left[k:] if len(left) - k >= K_RANGE[0] else left[K_RANGE[1] :]


def ranking_row(group: Sequence[Item], values: Sequence[float], tie: float, labeler: str, task: str) -> dict:
    """A ranking of texts that stand alone. `ended` false: a sentence does not end a story, so no end token follows."""
    return {
        "prompt": "",
        "responses": [item.text for item in group],
        "ranks": ranks(values, tie),
        "ended": False,
        "labeler": labeler,
        "task": task,
    }


def ranks(values: Sequence[float], tie: float) -> list[int]:
    """1 for the highest value. From the top down, a value within `tie` of the best of its rank shares that rank."""
    result = [0] * len(values)
    best = rank = 0
    for place, index in enumerate(sorted(range(len(values)), key=lambda i: -values[i]), start=1):
        if place == 1 or best - values[index] > tie:
            best, rank = values[index], place
        result[index] = rank
    return result


def rater_agreement(blocks: Sequence[Block]) -> dict[str, float]:
    """How often one person orders a pair of sentences as the mean of the others does, over the pairs both tell apart.

    The interval is a 95 % bootstrap over tasks. It is the ceiling to hold the reward model's accuracy against.
    """
    counts = []
    for block in blocks:
        agreed = told_apart = 0
        for person in range(len(block.items[0].ratings)):
            own = [item.ratings[person] for item in block.items]
            others = [sum(item.ratings) - rating for item, rating in zip(block.items, own, strict=True)]
            for i in range(len(own)):
                for j in range(i):
                    product = (own[i] - own[j]) * (others[i] - others[j])
                    agreed += product > 0
                    told_apart += product != 0
        counts.append((agreed, told_apart))
    chance = random.Random(SEED)
    shares = []
    for _ in range(2000):
        drawn = chance.choices(counts, k=len(counts))
        shares.append(sum(agreed for agreed, _ in drawn) / sum(pairs for _, pairs in drawn))
    shares.sort()
    share = sum(agreed for agreed, _ in counts) / sum(pairs for _, pairs in counts)
    return {"share": share, "low": shares[50], "high": shares[1949], "tasks": len(blocks)}


def opening(story: str) -> str | None:
    """The first sentences of a story, as few as make 50 characters; None where the story is a fragment."""
    sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z])", story)
    text = ""
    while sentences and len(text) < OPENING_CHARACTERS[0]:
        text = f"{text} {sentences.pop(0)}".strip()
    whole = len(story) >= 300 and story[0].isalpha() and '"' not in text
    return text if whole and OPENING_CHARACTERS[0] <= len(text) <= OPENING_CHARACTERS[1] else None


def short(block: Block) -> Block:
    return Block(block.name, tuple(item for item in block.items if len(item.text) <= LONGEST_RANKED_TEXT))


def read_stories() -> list[str]:
    """The sample's stories in file order. A story ends at a newline with no neighbour; two newlines part paragraphs."""
    text = gzip.decompress((SOURCES / "tinystories_sample_1097.txt.gz").read_bytes()).decode("utf-8")
    # The sample was once decoded as Windows-1252: put its quotes and dashes back as plain ones.
    for wrong, right in {"â€œ": '"', "â€™": "'", "â€“": "-", "â€”": "-", "â€": '"', "“": '"', "”": '"'}.items():
        text = text.replace(wrong, right)
    return unique(story.strip() for story in re.split(r"(?<!\n)\n(?!\n)", text) if story.strip())


def read_tweets() -> list[Block]:
    lines = gzip.decompress((SOURCES / "tweets_GroundTruth.txt.gz").read_bytes()).decode("utf-8").splitlines()
    items = []
    for line in lines:
        _, mean, text = line.split("\t", 2)
        items.append(Item(html.unescape(text), float(mean)))
    items = list({key(item.text): item for item in items}.values())
    return [Block(f"tweets-{i // BLOCK}", tuple(items[i : i + BLOCK])) for i in range(0, len(items) - BLOCK + 1, BLOCK)]


def read_movies() -> list[Block]:
    lines = gzip.decompress((SOURCES / "movie_rater_hits.jsonl.gz").read_bytes()).decode("utf-8").splitlines()
    blocks = []
    for task in map(json.loads, lines):
        items = []
        for i, item in enumerate(task["items"]):
            ratings = tuple(rater[i] for rater in task["raters"])
            items.append(Item(re.sub(r"\s+", " ", item["text"]), sum(ratings) / len(ratings), ratings))
        blocks.append(Block(f"movies-{task['hit']}", tuple(items)))
    return blocks


def read_polarity() -> list[dict]:
    """Critics' sentences with label 1 (fresh) or 0 (rotten)."""
    with zipfile.ZipFile(SOURCES / "sentence_polarity.zip") as archive:
        rows = []
        for label, name in ((1, "pos"), (0, "neg")):
            text = archive.read(f"sentence_polarity/rt-polarity.{name}").decode("utf-8")
            rows += [{"text": line.strip(), "label": label} for line in text.splitlines() if line.strip()]
    return random.Random(SEED).sample(rows, len(rows))


def key(text: str) -> str:
    """Equal for two spellings of one text: the movie raters saw the critics' sentences in another letter case."""
    return re.sub(r"[^a-z0-9]", "", text.lower())


def unique(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
