#!/bin/sh
# Scores and a streamed completion over HTTP with curl. Usage: score.sh [http://HOST:PORT]
# A gateway that wants credentials gets them from TRIMTAB_TOKEN.
set -eu
gateway=${1:-http://127.0.0.1:7120}

post() {
    curl -sS --fail-with-body --no-buffer "$gateway$1" -H 'content-type: application/json' -H 'x-timeout-s: 30' \
        ${TRIMTAB_TOKEN:+-H "authorization: Bearer $TRIMTAB_TOKEN"} -d "$2"
    echo
}

post /v1/score '{"items": [{"prompt": "Once upon a time", "response": " there was a happy dog."}]}'
post /v1/generate '{"prompts": ["Once upon a time"], "sampling": {"max_tokens": 8, "n": 2, "seed": 1}, "stream": true}'
