"""Embed one text through the gateway and look at the vector. Standard library only."""

import json
import math
import os
import ssl
import sys
import time
import urllib.error
import urllib.request

url = os.environ["GATEWAY_URL"].rstrip("/") + "/v1/embeddings"
body = {"model": os.environ["MODEL"], "input": "hello world", "normalized": True}
headers = {"Content-Type": "application/json"}
if os.environ.get("API_KEY"):
    headers["Authorization"] = "Bearer " + os.environ["API_KEY"]
ca_file = os.environ.get("CA_FILE", "")
context = None
if url.startswith("https:"):
    context = ssl.create_default_context(cafile=ca_file if os.path.exists(ca_file) else None)

deadline = time.monotonic() + float(os.environ.get("PATIENCE_SECONDS", "60"))
while True:
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=30, context=context) as response:
            answer = json.load(response)
        break
    except (urllib.error.URLError, OSError) as error:
        detail = error.read().decode() if isinstance(error, urllib.error.HTTPError) else str(error)
        status = getattr(error, "code", 0)
        if (status and status not in (502, 503, 504)) or time.monotonic() > deadline:
            sys.exit(f"FAILED: {url} answered {status or 'nothing'}: {detail}")
        time.sleep(2)

vector = answer["data"][0]["embedding"]
length = math.sqrt(sum(x * x for x in vector))
if not vector or not 0.98 < length < 1.02:
    sys.exit(f"FAILED: a vector of {len(vector)} numbers and length {length:.3f}")
print(f"OK: {answer['model']} gave {len(vector)} numbers for {answer['usage']['total_tokens']} tokens")
