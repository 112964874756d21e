"""python generate.py HOST:PORT "Once upon a time": streams a completion that outlives a lost connection."""

from __future__ import annotations

import os
import sys

from weft.client import Client, StatusError


def main(target: str = "127.0.0.1:50052", prompt: str = "Once upon a time") -> int:
    """Print the text as it comes."""
    with Client(target, api_key=os.environ.get("WEFT_API_KEY")) as client:
        try:
            for delta in client.generate(prompt, max_tokens=60, temperature=0, resumable=True):
                print(delta.text, end="", flush=True)
        except StatusError as error:
            print(f"\n{error.code.name}: {error.message}", file=sys.stderr)
            return 1
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
