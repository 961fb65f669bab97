"""The asyncio client with several users at the same time."""

import asyncio

from imprint import AsyncClient

CATS = {"ada": "Miso", "bo": "Udon", "cy": "Nori"}


async def main() -> None:
    """Teach each user's session the name of a cat, and complete a sentence about the cat."""
    async with AsyncClient() as client:

        async def teach_and_ask(user: str, cat: str) -> None:
            session = f"async-{user}"
            await client.observe(session, f"My cat is called {cat}. I said {cat}!")
            stream = client.stream("My cat is called", session=session, adapt="predict", max_tokens=3, temperature=0)
            async for chunk in stream:
                assert chunk.text is not None
            print(f"{user}:{stream.text}")
            await client.delete(session)

        await asyncio.gather(*(teach_and_ask(user, cat) for user, cat in CATS.items()))


asyncio.run(main())
