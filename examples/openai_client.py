"""OpenAI's client with a session that learns the conversation. Needs `pip install openai`."""

import os

from openai import OpenAI

url = os.environ.get("IMPRINT_URL", "http://127.0.0.1:8000")
client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("IMPRINT_API_KEY", "none"))
served = client.models.list().data[0]
model, sampling = served.id, (served.model_extra or {})["sampling"]  # temperature and penalty that suit the model

stream = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "My cat is called Miso and she sleeps on the radiator."}],
    max_tokens=60,  # without a limit a reply may fill the context, as with OpenAI
    extra_body={"session": "openai"},  # or the header X-Imprint-Session, or the model's name: f"{model}@openai"
    stream=True,
    **sampling,
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print(f"\n{(chunk.model_extra or {})['adaptation']}")

# Use the memory without learning:
reply = client.completions.create(
    model=model,
    prompt="My cat is called",
    max_tokens=8,
    temperature=0,
    extra_body={"session": "openai", "adapt": "predict"},
)
print(reply.choices[0].text)
