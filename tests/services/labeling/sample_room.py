"""A database with campaigns, people and rankings to look at: for the browser tests and for screenshots."""

import json
import random
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sqlalchemy import update

from trimtab.labeling.campaigns import CampaignPlan, create_campaign
from trimtab.labeling.database import Database
from trimtab.labeling.importing import import_rows
from trimtab.labeling.labelers import add_labeler
from trimtab.labeling.rows import read_rows
from trimtab.labeling.tables import Judgment
from trimtab.labeling.vocabulary import Ask, Kind, Role

CODE = """Use a dictionary to count the words:

```python
from collections import Counter

def most_common(text: str, n: int = 3) -> list[tuple[str, int]]:
    \"\"\"The n most common words of a text.\"\"\"
    words = text.lower().split()  # good enough for plain text
    return Counter(words).most_common(n)
```

`Counter.most_common` sorts by count, so this is **O(m log m)** in the number of distinct words."""
TABLE = """| way | time | memory |
|---|---|---|
| `Counter` | O(m) | O(u) |
| sorting | O(m log m) | O(m) |

1. Read the text.
2. Count.
3. Take the first three."""
LONG = "\n\n".join(
    f"{i}. First of all, it helps to think about what the question really asks. Counting words sounds simple, but "
    "what is a word? Punctuation, capital letters, apostrophes and hyphens all change the answer, and so does the "
    "language of the text. A robust answer names these choices before it writes any code."
    for i in range(1, 9)
)
SHORT = "You could count them by hand."
HOSTILE = (
    'Sure! <script>document.title = "owned"</script> <img src=x onerror="document.title=1"> '
    "[click](javascript:alert(1)) ![picture](https://example.com/x.png)"
)
CHINESE = (  # Chinese has commas and colons of its own
    "可以先把文本转换成小写，再按空白切分，最后用字典统计每个词出现的次数。例如：\n\n"  # noqa: RUF001
    "> “今天 天气 今天” → 今天 2 次，天气 1 次\n\n这样最清楚。"  # noqa: RUF001
)


def ranking_rows() -> list[dict]:
    """Tasks whose answers are short, long, code, a table, hostile HTML, and Chinese."""
    chat = [
        {"role": "system", "content": "You are a helpful programming assistant."},
        {"role": "user", "content": "How do I find the three most common words of a text in Python?"},
    ]
    first = {"messages": chat, "responses": [CODE, LONG, SHORT, TABLE, CHINESE, HOSTILE], "task": "words"}
    stories = [
        {
            "prompt": f"Once upon a time there was a {animal} who lived by the sea. One day",
            "responses": [
                f"the {animal} found a shiny shell and gave it to a friend. They were both very happy.",
                f"the {animal} was sad because the rain did not stop. It went home and slept.",
                f"the {animal} saw a big boat. The boat was big. The boat was big. The boat was big.",
                f"a kind girl came and said: “Do you want to play?” The {animal} jumped up and down with joy.",
            ],
            "versions": ["run-1/policy@40", "run-1/policy@40", "run-1/policy@0", "run-1/policy@0"],
        }
        for animal in ("crab", "seal", "gull", "fox", "cat", "otter", "hare", "duck", "bee", "frog")
    ]
    return [first, *stories]


@dataclass(frozen=True)
class SampleRoom:
    """The tokens of the people, by name."""

    tokens: dict[str, str]


def fill(database: Database) -> SampleRoom:
    """Ann and Bob label, Lea leads, Root administers; four campaigns, two of them with rankings by three people."""
    now = datetime.now(UTC)
    roles = {"ann": Role.LABELER, "bob": Role.LABELER, "lea": Role.LEAD, "root": Role.ADMIN}
    with database.write() as session:
        tokens = {name: add_labeler(session, name, role, now)[1] for name, role in roles.items()}
        plans = (
            CampaignPlan("helpful", title="Helpful answers", ratings=Ask.OPTIONAL, overlap=3),
            CampaignPlan("new-or-old", title="Is the new policy better?", kind=Kind.COMPARISON),
            CampaignPlan("write", title="Ideal answers", kind=Kind.DEMONSTRATION),
            CampaignPlan("done", title="Bedtime stories", overlap=3),
        )
        for plan in plans:
            create_campaign(session, plan, None, now)
    rows = ranking_rows()
    _import(database, "helpful", rows, now)
    _import(database, "helpful", _judged(rows[3:], now), now)
    _import(database, "done", _judged(rows[1:4], now), now)
    pairs = [
        {"prompt": row["prompt"], "responses": row["responses"][1:3], "versions": row["versions"][1:3]}
        for row in rows[1:]
    ]
    _import(database, "new-or-old", pairs, now)
    questions = ("Explain to a child why the sky is blue.", "Write a polite reminder about an unpaid bill.")
    _import(database, "write", [{"prompt": question} for question in questions], now)
    with database.write() as session:  # as if they had ranked here: their pace is shown
        session.execute(update(Judgment).values(is_imported=False))
    return SampleRoom(tokens)


def _judged(rows: list[dict], now: datetime) -> list[dict]:
    dice = random.Random(7)
    judged = []
    for i, row in enumerate(rows):
        for labeler, noise in (("ann", 0.6), ("bob", 0.9), ("cy", 2.5)):
            quality = [3.0, 1.5, 0.5, 3.2]
            noisy = [q + dice.gauss(0, noise) for q in quality]
            order = sorted(range(4), key=lambda j: -noisy[j])
            ranks = [order.index(j) + 1 for j in range(4)]
            ratings = [max(1, min(7, round(2 * q))) for q in noisy]
            at = (now - timedelta(minutes=7 * i + dice.randrange(5))).isoformat()
            about = {"labeler": labeler, "seconds": dice.randrange(35, 110), "submitted_at": at, "started_at": at}
            judged.append(row | {"ranks": ranks, "ratings": ratings} | about)
    return judged


def _import(database: Database, campaign: str, rows: list[dict], now: datetime) -> None:
    import_rows(database, campaign, read_rows(json.dumps(row) for row in rows), now)


def make(path: Path) -> SampleRoom:
    """The sample database in a SQLite file."""
    database = Database(str(path))
    database.migrate()
    room = fill(database)
    database.close()
    return room
