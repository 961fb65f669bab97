"""The Python client: learn a text, complete, stream, score and roll back."""

from dataclasses import asdict

from imprint import Client

with Client() as client:  # IMPRINT_URL and IMPRINT_API_KEY, or Client("http://…", api_key="…")
    learned = client.observe("python", "My cat is called Miso and she sleeps on the radiator.")
    print(f"learned {learned.tokens_learned} tokens, now at version {learned.version}")

    print(client.complete("My cat is called", session="python", adapt="predict", max_tokens=8, temperature=0).text)

    question = [{"role": "user", "content": "Where does Miso sleep?"}]
    suggested = client.model().sampling  # temperature and penalty that suit the model
    sampling = asdict(suggested) if suggested else {}
    with client.stream_chat(question, session="python", learn="all", max_tokens=40, **sampling) as stream:
        for chunk in stream:
            print(chunk.text, end="", flush=True)
    print(f"\n{stream.adaptation}")

    score = client.score("python", "Miso sleeps on the radiator.")
    print(f"{score.frozen_loss:.2f} nats a token without the memory, {score.loss:.2f} with it")

    client.rollback("python", learned.version)  # forget the chat, but not the cat
    for entry in client.log("python"):
        print(entry.version, entry.kind, entry.tokens)
    client.delete("python")
