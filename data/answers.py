"""Answers: generated tokens as text, and the questions of records, answered in batches."""

import codecs
import itertools
import sys

import torch
from tqdm import tqdm

from data.records import located, media_segments, record_media, record_turns
from data.text import TEMPLATES, conversation, get_tokenizer


class Answer:
    """The text of an answer, token by token: no character is split, and what may be the start of one of `ends` is held
    back. ended: which of them ended it, or ""."""

    def __init__(self, tokenizer, ends):
        self.tokenizer, self.ends = tokenizer, ends
        self.decoder, self.held, self.ended = codecs.getincrementaldecoder("utf-8")("replace"), "", ""

    def add(self, token, last):
        """The new piece of text, up to the first end; last: no token follows."""
        self.held += self.decoder.decode(self.tokenizer.decode([token]), last)
        found = [(self.held.find(end), end) for end in self.ends if end in self.held]
        if found:
            n, self.ended = min(found)
        else:
            n = len(self.held) - (0 if last else self.overlap())
        piece, self.held = self.held[:n], self.held[n:]
        return piece

    def overlap(self):
        """How many of the last characters may be the start of an end."""
        starts = [end[:n] for end in self.ends for n in range(1, len(end))]
        return max((len(start) for start in starts if self.held.endswith(start)), default=0)


@torch.inference_mode()
def generate_text(model, samples, state=None, max_new_tokens=256, end="", stop=(), **gen_kwargs):
    """ModRWKV.generate as text, each answer until `end` (by default the template's; None: no text ends it) or until a
    text of `stop`.

    Yields: at each step the list of new pieces of text, "" for samples at rest.
    Returns (as StopIteration.value): for a batch of one, the state after the answer and its end, to go on from.
    """
    tokenizer = get_tokenizer(model.config.tokenizer)
    end = TEMPLATES[model.config.template].end if end == "" else end or ""
    read = samples if isinstance(samples, tuple) else model.read(samples, state)
    answers = [Answer(tokenizer, [text for text in (end, *stop) if text]) for _ in read[0]]
    steps, n, stopped = model.generate(read, None, max_new_tokens, end=(tokenizer.end,), **gen_kwargs), 0, None
    while True:
        try:
            tokens = steps.send(stopped)
        except StopIteration as ended:
            state = ended.value
            break
        n += 1
        pieces = []
        for answer, token in zip(answers, tokens):
            last = token == tokenizer.end or n == max_new_tokens
            pieces.append("" if token is None else answer.add(token, last))
        yield pieces
        stopped = [answer.ended != "" for answer in answers]
    if len(answers) == 1 and end and answers[0].ended != end:
        _, state = model.read([[("text", tokenizer.encode(end))]], state)
    return state


@torch.inference_mode()
def ask(model, records, batch_size=64, **sampling):
    """
    Answers to every question of the records, in order; later turns see the true earlier answers.

    What a question shares with the one before, a picture and earlier turns, is read once: all of it, unless the prompt
    style puts the question before the picture.
    """
    answers = []
    quiet = len(records) <= batch_size or not sys.stderr.isatty()
    for i in tqdm(range(0, len(records), batch_size), unit="batch", leave=False, disable=quiet):
        part = records[i : i + batch_size]
        answered = [[] for _ in part]
        media = [media_segments(model, record_media(record), record["_at"]) for record in part]
        rows, known, state = list(range(len(part))), [[] for _ in part], None
        n_turns = [len(record_turns(record)) for record in part]
        for turn in range(max(n_turns)):
            going = [k for k, row in enumerate(rows) if turn < n_turns[row]]
            rows = [rows[k] for k in going]
            samples = [question_segments(model, part[row], media[row], turn) for row in rows]
            if max(n_turns) > 1:
                state = state and [tuple(x[going] for x in s) for s in state]
                state = read_on(model, [sample[:-1] for sample in samples], [known[row] for row in rows], state)
                for row, sample in zip(rows, samples):
                    known[row] = sample[:-1]
                samples = [sample[-1:] for sample in samples]
            steps = generate_text(model, samples, state, **sampling)
            for row, pieces in zip(rows, zip(*steps)):
                answered[row].append("".join(pieces).strip())
        answers += itertools.chain(*answered)
    return answers


def question_segments(model, record, media, turn):
    """The segments that ask the question of a turn, after the true earlier answers."""
    turns = record_turns(record)
    with located(record["_at"]):
        return conversation(model.config, [*turns[:turn], (turns[turn][0], None)], iter(media))


def read_on(model, samples, known, state):
    """The state after samples, of which `known` have led to `state`; a sample that does not begin so is read anew."""
    new = []
    for row, (sample, before) in enumerate(zip(samples, known)):
        same = len(before) <= len(sample) and all(map(same_segment, before, sample))
        new.append(sample[len(before) :] if same else sample)
        for x in () if same else itertools.chain(*state):
            x[row] = 0
    return model.read(new, state)[1] if any(new) else state


def same_segment(a, b):
    return a is b or a[0] == b[0] and a[0] in ("text", "answer") and a[1] == b[1]
