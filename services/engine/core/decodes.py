"""Takes in what nearly every row of a step is: a running sequence drew its next token, nothing else happened.

These rows are most of the host's time, so they cost one call each; whatever is special about a row is left to
the core.
"""

from __future__ import annotations

from collections.abc import Iterable

from services.engine.core.batch import Chunk, SampledToken
from services.engine.core.events import Tokens
from services.engine.core.executor import Output
from services.engine.core.sequence import FinishReason, Sequence, SequenceStatus


def take_decodes(
    chunks: Iterable[Chunk], outputs: Iterable[Output], tokens: Tokens, now: float
) -> tuple[list[tuple[Sequence, FinishReason]], list[tuple[Chunk, Output]]]:
    """Append each plain row's token to its sequence and to the columns of `tokens`. `now` in seconds of the
    core's clock.

    Returns the sequences that end with it, and why; and the rows that were left alone: prompts, first tokens
    and those after a pause, log-probabilities, failures, sequences that have ended or lost their blocks.
    """
    running = SequenceStatus.RUNNING
    add_key, add_token_id = tokens.keys.append, tokens.token_ids.append
    add_position, add_itl_s = tokens.positions.append, tokens.itls_s.append
    last: list[tuple[Sequence, FinishReason]] = []
    others: list[tuple[Chunk, Output]] = []
    for chunk, output in zip(chunks, outputs, strict=True):
        sequence = chunk.sequence
        last_token_at = sequence.last_token_at
        if (
            last_token_at is None
            or chunk.length > 1
            or sequence.status is not running
            or type(output) is not SampledToken
            or output.logprob is not None
        ):
            others.append((chunk, output))
            continue
        token_id = output.token_id
        try:
            reason = sequence.append(token_id)
        except Exception as error:
            others.append((chunk, error))
            continue
        if reason is not None:
            last.append((sequence, reason))
        sequence.num_computed_tokens = end = chunk.start + 1
        sequence.last_token_at = now
        sequence.last_itl_s = itl_s = now - last_token_at
        add_key(sequence.key)
        add_token_id(token_id)
        add_position(end - len(sequence.prompt_token_ids))
        add_itl_s(itl_s)
    return last, others
