"""Ollama's client: the session is part of the model's name. Needs `pip install ollama`."""

import os

from ollama import Client

url = os.environ.get("IMPRINT_URL", "http://127.0.0.1:8000")
client = Client(url, headers={"Authorization": f"Bearer {os.environ.get('IMPRINT_API_KEY', 'none')}"})
name = client.list().models[0].model

told = [{"role": "user", "content": "My cat is called Miso and she sleeps on the radiator."}]
for part in client.chat(f"{name}@ollama", told, stream=True, options={"num_predict": 24}):
    print(part.message.content, end="", flush=True)
print()

question = [{"role": "user", "content": "Who sleeps on the radiator?"}]
reply = client.chat(f"{name}@ollama", question, options={"num_predict": 12, "temperature": 0})
print(reply.message.content)
