#!/usr/bin/env bash
# Refuse a wire change that breaks clients: compare protos/ with where this work left main; on main itself with the
# commit before. A history without such a commit (the first one, a shallow clone) has nothing to compare with.
# usage: proto_breaking.sh BUF
set -euo pipefail
buf=$1
base=""
for main in origin/main main; do
  if git rev-parse --quiet --verify "$main^{commit}" >/dev/null; then
    base=$(git merge-base HEAD "$main" 2>/dev/null || true)
    break
  fi
done
head=$(git rev-parse --quiet --verify HEAD || true)
if [ -z "$base" ] || [ "$base" = "$head" ]; then
  base=$(git rev-parse --quiet --verify 'HEAD~1^{commit}' || true)
fi
if [ -z "$base" ] || ! git cat-file -e "$base:protos" 2>/dev/null; then
  echo "buf breaking: no earlier protos in this history to compare with"
  exit 0
fi
earlier=$(mktemp -d)
trap 'rm -rf "$earlier"' EXIT
git archive "$base" buf.yaml protos | tar -x -C "$earlier"
"$buf" breaking --against "$earlier"
echo "buf breaking: compatible with $(git rev-parse --short "$base")"
