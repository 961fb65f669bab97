"""Anthropic's client: the session is part of the model's name. Needs `pip install anthropic`."""

import os

from anthropic import Anthropic

url = os.environ.get("IMPRINT_URL", "http://127.0.0.1:8000")
client = Anthropic(base_url=url, api_key=os.environ.get("IMPRINT_API_KEY", "none"))
model = f"{client.models.list().data[0].id}@anthropic"

with client.messages.stream(
    model=model,
    max_tokens=24,
    messages=[{"role": "user", "content": "My cat is called Miso and she sleeps on the radiator."}],
) as stream:
    for text in stream.text_stream:
        print(text, end="", flush=True)
print()

reply = client.messages.create(
    model=model,
    max_tokens=12,
    messages=[{"role": "user", "content": "Who sleeps on the radiator?"}],
    extra_body={"temperature": 0},
)
print("".join(block.text for block in reply.content if block.type == "text"))
