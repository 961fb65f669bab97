#!/bin/sh
# Plain HTTP: teach a session, complete with its memory, show it, roll it back, erase it.
set -eu
url=${IMPRINT_URL:-http://127.0.0.1:8000}
alias send='curl --silent --show-error --fail-with-body --header "Content-Type: application/json" --header "Authorization: Bearer ${IMPRINT_API_KEY:-none}"'

# Learn. With an Idempotency-Key, a request that is sent again (here by --retry) is learned once.
send --retry 5 --header "Idempotency-Key: first-lesson" "$url/v1/sessions/curl/observe" \
    --data '{"text": "My cat is called Miso and she sleeps on the radiator."}'
echo

# Complete with the memory, without learning; --no-buffer shows the stream as it arrives.
model=$(send "$url/v1/models" | sed 's/.*"data":\[{"id":"\([^"]*\)".*/\1/')
send --no-buffer "$url/v1/completions" \
    --data '{"model": "'"$model"'", "prompt": "My cat is called", "max_tokens": 8, "temperature": 0,
             "stream": true, "session": "curl", "adapt": "predict"}'

# Show the session; roll it back to its empty state, which is a new version; erase it.
send "$url/v1/sessions/curl"
echo
send "$url/v1/sessions/curl/rollback" --data '{"version": 0}'
echo
send --request DELETE "$url/v1/sessions/curl"
echo
