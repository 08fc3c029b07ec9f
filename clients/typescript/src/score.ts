// node dist/score.js ADDRESS PROMPT RESPONSE...   one JSON line a response
// TRIMTAB_CA: PEM file of the server's authorities; TRIMTAB_TOKEN_FILE: file with a bearer token.

import { readFileSync } from "node:fs";
import { RewardClient } from "./reward.js";

const [address, prompt, ...responses] = process.argv.slice(2);
if (address === undefined || prompt === undefined || responses.length === 0) {
  console.error("usage: node dist/score.js ADDRESS PROMPT RESPONSE...");
  process.exit(2);
}
const { TRIMTAB_CA, TRIMTAB_TOKEN_FILE } = process.env;
const client = new RewardClient(address, {
  ca: TRIMTAB_CA ? readFileSync(TRIMTAB_CA) : undefined,
  token: TRIMTAB_TOKEN_FILE ? readFileSync(TRIMTAB_TOKEN_FILE, "utf8").trim() : undefined,
  timeoutS: 30,
});
try {
  const found = await client.scoreTexts(responses.map((response) => ({ prompt, response })));
  responses.forEach((response, index) => {
    console.log(JSON.stringify({ response, score: found.scores[index], version: found.version }));
  });
} catch (error) {
  console.error(`score: ${(error as Error).message}`);
  process.exitCode = 1;
} finally {
  client.close();
}
