"""Many clients at once: N streams of completions from a running server, by the OpenAI client. Prints JSON.

    ingot serve ARTIFACT --port 8000 &
    python benchmarks/http_streams.py --url http://127.0.0.1:8000 --streams 64

Prompts are random token ids, so that models without a tokenizer are served too. Every stream must end with the number of tokens it
asked for; otherwise the script fails.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time

from openai import AsyncOpenAI


async def stream(client: AsyncOpenAI, model: str, prompt: list[int], tokens: int) -> tuple[float, float, int]:
    """(seconds to the first chunk, seconds in all, completion tokens)."""
    start = time.perf_counter()
    first, count = 0.0, 0
    options = {"stream": True, "stream_options": {"include_usage": True}, "extra_body": {"ignore_eos": True}}
    async for chunk in await client.completions.create(model=model, prompt=prompt, max_tokens=tokens, temperature=0.8, **options):  # type: ignore[call-overload]
        first = first or time.perf_counter() - start
        if chunk.usage is not None:
            count = chunk.usage.completion_tokens
    return first, time.perf_counter() - start, count


async def run(url: str, streams: int, prompt_tokens: int, tokens: int) -> dict[str, object]:
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
    model = (await client.models.list()).data[0].id
    rng = random.Random(0)
    prompts = [[rng.randrange(3, 2000) for _ in range(prompt_tokens)] for _ in range(streams)]
    start = time.perf_counter()
    results = await asyncio.gather(*(stream(client, model, p, tokens) for p in prompts))
    seconds = time.perf_counter() - start
    wrong = [count for _, _, count in results if count != tokens]
    if wrong:
        raise SystemExit(f"{len(wrong)} of {streams} streams ended with {wrong} tokens instead of {tokens}")
    return {
        "model": model, "streams": streams, "prompt_tokens": prompt_tokens, "tokens": tokens, "seconds": seconds,
        "tokens_per_second": streams * tokens / seconds, "first_token_ms_median": statistics.median(f for f, _, _ in results) * 1e3,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=128)
    args = parser.parse_args()
    print(json.dumps(asyncio.run(run(args.url, args.streams, args.prompt_tokens, args.tokens))))


if __name__ == "__main__":
    main()
