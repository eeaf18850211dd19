"""Answers: generated tokens as text, and the questions of records, answered in batches."""

import codecs
import itertools
import sys

import torch
from tqdm import tqdm

from data.records import record_media, record_turns, segments
from data.text import PLACEHOLDER, TEMPLATES, get_tokenizer


class Answer:
    """The text of an answer, token by token: no character is split, and what may be the start of `end` is held back."""

    def __init__(self, tokenizer, end):
        self.tokenizer, self.end = tokenizer, end
        self.decoder, self.held, self.ended = codecs.getincrementaldecoder("utf-8")("replace"), "", False

    def add(self, token, last):
        """The new piece of text, up to the end; last: no token follows."""
        self.held += self.decoder.decode(self.tokenizer.decode([token]), last)
        n = self.held.find(self.end) if self.end else -1
        self.ended = n >= 0
        if not self.ended:
            starts = (n for n in range(len(self.end) - 1, 0, -1) if self.held.endswith(self.end[:n]))
            n = len(self.held) - (0 if last else next(starts, 0))
        piece, self.held = self.held[:n], self.held[n:]
        return piece


@torch.inference_mode()
def generate_text(model, samples, state=None, max_new_tokens=256, end="", **gen_kwargs):
    """ModRWKV.generate as text, each answer until `end` (by default the template's; None: no text ends it).

    Yields: at each step the list of new pieces of text, "" for samples at rest.
    Returns (as StopIteration.value): for a batch of one, the state after the answer and its end, to go on from.
    """
    tokenizer = get_tokenizer(model.config.tokenizer)
    end = TEMPLATES[model.config.template].end if end == "" else end or ""
    answers = [Answer(tokenizer, end) for _ in samples]
    steps = model.generate(samples, state, max_new_tokens, end=(tokenizer.end,), **gen_kwargs)
    tokens = next(steps)
    for step in itertools.count(1):
        pieces = []
        for answer, token in zip(answers, tokens):
            last = token == tokenizer.end or step == max_new_tokens
            pieces.append("" if token is None else answer.add(token, last))
        yield pieces
        try:
            tokens = steps.send([answer.ended for answer in answers])
        except StopIteration as stop:
            state = stop.value
            break
    if len(answers) == 1 and end and not answers[0].ended:
        _, state = model(torch.tensor([tokenizer.encode(end)], device=model.emb.weight.device), state)
    return state


def ask(model, records, batch_size=64, **sampling):
    """Answers to every question of the records, in order; later turns see the true earlier answers."""
    samples = []
    for record in records:
        media, turns = record_media(record), record_turns(record)
        for i in range(len(turns)):
            asked = turns[:i] + [(turns[i][0], None)]
            n = len(PLACEHOLDER.findall("".join(question for question, _ in asked)))
            samples.append((asked, media[:n], record["_at"]))
    answers = []
    quiet = len(samples) <= batch_size or not sys.stderr.isatty()
    for i in tqdm(range(0, len(samples), batch_size), unit="batch", leave=False, disable=quiet):
        batch = [segments(model, turns, media, at=at) for turns, media, at in samples[i : i + batch_size]]
        steps = generate_text(model, batch, **sampling)
        answers += ["".join(pieces).strip() for pieces in zip(*steps)]
    return answers
