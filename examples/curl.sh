#!/usr/bin/env bash
# Every endpoint of the REST API with curl and jq: bagel serve --http 127.0.0.1:8000; examples/curl.sh http://127.0.0.1:8000 pictures
set -euo pipefail
url=${1:-http://127.0.0.1:8000}
folder=${2:-pictures}
mkdir -p "$folder"

get() { curl -sS --fail-with-body "$url$1"; }
post() { curl -sS --fail-with-body -N -H 'Content-Type: application/json' "$url$1" -d @-; }
events() { sed -n 's/^data: //p' | grep -v '^\[DONE\]$'; }  # of server-sent events, their JSON

echo "alive: $(get /healthz), $(get /readyz)"
model=$(get /v1/models | jq -r '.data[0].id')
echo "model: $(get "/v1/models/$model" | jq -r .owned_by)/$model"

# A picture.
post /v1/images/generations <<JSON | jq -r '.data[0].b64_json' | base64 -d > "$folder/drawn.png"
{"prompt": "a large red circle", "seed": 7, "num_inference_steps": 24}
JSON

# The same as a stream: previews on the way, then the picture.
post /v1/images/generations <<JSON | events | while read -r event; do
{"prompt": "a large red circle", "seed": 7, "num_inference_steps": 24, "stream": true, "partial_images": 2}
JSON
  name=$(jq -r '.type + "-\(.partial_image_index // 0)"' <<< "$event")
  jq -r .b64_json <<< "$event" | base64 -d > "$folder/$name.png"
  echo "stream: $name"
done

# An edit: a multipart form with its files.
curl -sS --fail-with-body "$url/v1/images/edits" -F "image[]=@$folder/drawn.png" -F 'prompt=make the circle blue' -F seed=7 \
  | jq -r '.data[0].b64_json' | base64 -d > "$folder/edited.png"

# A question about a picture, its answer as it is written.
image="data:image/png;base64,$(base64 < "$folder/edited.png" | tr -d '\n')"
post /v1/chat/completions <<JSON | events | jq -j '.choices[0].delta.content // ""'
{"model": "$model", "stream": true, "messages": [{"role": "user", "content": [
  {"type": "image_url", "image_url": {"url": "$image"}}, {"type": "text", "text": "describe the image"}]}]}
JSON
echo

# What is refused says why.
curl -sS "$url/v1/images/generations" -H 'Content-Type: application/json' -d '{"prompt": "a star", "n": 99}' | jq -c .error

echo "counters: $(get /metrics | grep -c '^bagel_')"
echo "documented: $(get /openapi.json | jq -c '.paths | keys')"
