"""python several.py HOST:PORT: sixteen completions at once on a connection, then a conversation; asyncio."""

from __future__ import annotations

import asyncio
import os
import sys

from weft.client import AsyncClient

PROMPTS = [f"Chapter {number}. The " for number in range(1, 17)]


async def main(target: str = "127.0.0.1:50052") -> None:
    """Print one line for each."""
    async with AsyncClient(target, api_key=os.environ.get("WEFT_API_KEY")) as client:
        streams = [client.generate(prompt, max_tokens=24, seed=seed) for seed, prompt in enumerate(PROMPTS)]
        for prompt, text in zip(PROMPTS, await asyncio.gather(*(s.text() for s in streams)), strict=True):
            print(f"{prompt}{text!r}")
        session = await client.create_session()
        try:
            for turn in ("Once upon a time", " And then"):
                # Only the new turn is sent: the server holds what came before, token for token.
                text = await client.generate(turn, max_tokens=24, session_id=session.session_id).text()
                print(f"{turn}{text!r}")
        finally:
            await client.delete_session(session.session_id)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:2]))
