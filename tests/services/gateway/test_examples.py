"""The examples of calling trimtab from elsewhere, as their readers run them."""

import asyncio
import json
import shutil
import sys
from pathlib import Path

import pytest

from trimtab_client import AsyncRewardClient

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROOT = Path(__file__).parents[3]
EXAMPLES = ROOT / "examples" / "clients"
TYPESCRIPT = ROOT / "clients" / "typescript"


async def ran(*command: str, stdin: str = "", cwd: Path = ROOT, within_s: float = 120) -> str:
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=cwd,
    )
    out, err = await asyncio.wait_for(process.communicate(stdin.encode()), within_s)
    assert process.returncode == 0, f"{out.decode()}\n{err.decode()}"
    return out.decode()


async def test_the_quick_start_samples_and_scores(upstreams):
    lines = (await ran(sys.executable, str(EXAMPLES / "quick_start.py"), *_both(upstreams))).splitlines()
    assert len(lines) == 2 and all(line[0] in "+-" for line in lines)


async def test_the_readme_s_five_lines_score(upstreams):
    readme = (ROOT / "clients" / "python" / "README.md").read_text()
    first = readme.split("```python\n")[1].split("```")[0]
    assert len([line for line in first.splitlines() if line]) <= 5 and "127.0.0.1:7102" in first
    score, _ = (await ran(sys.executable, "-c", first.replace("127.0.0.1:7102", upstreams["reward"]))).split(maxsplit=1)
    float(score)


async def test_a_file_of_rows_is_scored_in_order(upstreams):
    rows = [{"prompt": f"w{i % 9}", "response": f"w{i % 7}"} for i in range(600)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    out = await ran(sys.executable, str(EXAMPLES / "score_file.py"), upstreams["reward"], stdin=text)
    scored = [json.loads(line) for line in out.splitlines()]
    assert [{"prompt": one["prompt"], "response": one["response"]} for one in scored] == rows


async def test_curl_gets_scores_and_a_stream(edge):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    out = await ran("sh", str(EXAMPLES / "score.sh"), edge.url)
    assert json.loads(out.splitlines()[0])["scores"]
    assert out.count("event: completion") == 2 and "event: done" in out


async def test_reflection_is_enough_to_score(upstreams):
    request = '{"texts": {"items": [{"prompt": "w1", "response": "w2"}]}}'
    command = str(EXAMPLES / "reflect.py"), upstreams["reward"], "trimtab.v1.RewardService/Score", request
    out = await ran(sys.executable, *command)
    async with AsyncRewardClient(upstreams["reward"]) as client:
        own = await client.score_texts([("w1", "w2")])
    assert float(out.splitlines()[1].split()[1]) == pytest.approx(float(own.scores[0]), rel=1e-6)


async def test_typescript_scores_over_grpc(upstreams, tmp_path):
    npm, node = shutil.which("npm"), shutil.which("node")
    if npm is None or node is None:
        pytest.skip("node and npm are not installed: the TypeScript example is not run")
    lock, installed = TYPESCRIPT / "package-lock.json", TYPESCRIPT / "node_modules" / ".package-lock.json"
    if not installed.exists() or installed.stat().st_mtime < lock.stat().st_mtime:
        await ran(npm, "ci", "--no-audit", "--no-fund", "--ignore-scripts", cwd=TYPESCRIPT, within_s=240)
    await ran(npm, "run", "build", cwd=TYPESCRIPT)
    command = [node, "dist/score.js", upstreams["reward"], "w1 w2", "w3", "w4 w5"]
    told = [json.loads(line) for line in (await ran(*command, cwd=TYPESCRIPT)).splitlines()]
    async with AsyncRewardClient(upstreams["reward"]) as client:
        own = await client.score_texts([("w1 w2", "w3"), ("w1 w2", "w4 w5")])
    assert [one["score"] for one in told] == pytest.approx(own.scores.tolist(), rel=1e-6)
    assert [one["response"] for one in told] == ["w3", "w4 w5"] and told[0]["version"] == str(own.version)


def _both(upstreams: dict[str, str]) -> tuple[str, str]:
    return upstreams["generator"], upstreams["reward"]
