"""Text: tokenizers, templates and prompt styles; turns to token ids and places of media."""

import ast
import functools
import importlib.util
import os
import re
from dataclasses import dataclass

import tiktoken

from data.media import reading
from modrwkv import MEDIA, InputError


class TiktokenTokenizer:
    """GPT-2's tokens, or single bytes: byte b as id b + 1, as in RWKV World, and each mark of the default template.

    `end` is the id that ends a document.
    """

    def __init__(self, name):
        if name == "bytes":
            ranks = {bytes([b]): b + 1 for b in range(256)}
            marks = {"\n\n": 257, "User:": 258, "Assistant:": 259}
            self.bpe = tiktoken.Encoding("bytes", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens=marks)
            self.end, self.vocab_size, self.marks = 0, 260, "all"
            return
        try:
            self.bpe = tiktoken.get_encoding(name)
        except Exception as e:  # requests' own exceptions: tiktoken fetches the vocabulary once, then caches it
            raise InputError(
                f"the tokenizer {name} could not be fetched ({type(e).__name__}): connect once, or set "
                "TIKTOKEN_CACHE_DIR to a folder that holds it, or use --tokenizer=bytes"
            ) from e
        self.end, self.vocab_size, self.marks = self.bpe.eot_token, self.bpe.n_vocab, set()

    def encode(self, text):
        """str -> ids"""
        return self.bpe.encode(text, allowed_special=self.marks, disallowed_special=())

    def decode(self, ids):
        """ids -> bytes, none of the end's"""
        return self.bpe.decode_bytes([i for i in ids if i != self.end and i < self.vocab_size])  # a model may have more


class WorldTokenizer:
    """RWKV World: the longest vocabulary entry that matches the UTF-8 bytes, again and again, as RWKV-LM's.

    path: rwkv_vocab_v20230424.txt or one like it; each line `id literal length`.
    """

    def __init__(self, path):
        self.end, self.vocab_size, self.bytes_of, self.trie = 0, 65536, {}, {}
        with reading(path, "an RWKV World vocabulary"), open(path, encoding="utf-8") as f:
            for n, line in enumerate(f, 1):
                with reading(f"{path}, line {n},", "a line of an RWKV World vocabulary"):
                    self.add(line)

    def add(self, line):
        index, rest = line.split(" ", 1)
        literal, length = rest.rsplit(" ", 1)
        token = ast.literal_eval(literal)
        token = token.encode("utf-8") if isinstance(token, str) else token
        if len(token) != int(length):
            raise ValueError(f"{len(token)} bytes, not {int(length)}")
        self.bytes_of[int(index)] = token
        node = self.trie
        for byte in token:
            node = node.setdefault(byte, {})
        node[-1] = int(index)

    def encode(self, text):
        data, ids, i = text.encode("utf-8", "surrogateescape"), [], 0  # bytes that a console could not decode stay
        while i < len(data):
            node, j, longest = self.trie, i, None
            while j < len(data) and (node := node.get(data[j])) is not None:
                j += 1
                if -1 in node:
                    longest = node[-1], j
            if longest is None:
                raise InputError(f"the tokenizer's vocabulary has no entry for byte {data[i]}")
            index, i = longest
            ids.append(index)
        return ids

    def decode(self, ids):
        return b"".join(self.bytes_of.get(i, b"") for i in ids)  # ids above the vocabulary have no text


VOCABULARY = "rwkv_vocab_v20230424.txt"  # of every released model


def look_beside(checkpoint):
    """From now on a VOCABULARY beside this checkpoint is found, also by processes that are started to read data."""
    folder = checkpoint if os.path.isdir(checkpoint) else os.path.dirname(checkpoint)
    path = os.path.abspath(os.path.join(folder, VOCABULARY))
    if os.path.isfile(path):
        os.environ["RWKV_VOCABULARY"] = path


@functools.lru_cache
def get_tokenizer(name):
    """The tokenizer of a Config: bytes, gpt2, or the path of an RWKV World vocabulary; raises InputError.

    VOCABULARY is also found in the current folder, beside a checkpoint that was read, and in the package rwkv.
    """
    if name in ("bytes", "gpt2"):
        return TiktokenTokenizer(name)
    places, is_official = [name], os.path.basename(name) == VOCABULARY
    if is_official:
        package = importlib.util.find_spec("rwkv")  # without importing it
        folders = package.submodule_search_locations if package else None
        places += [VOCABULARY, os.environ.get("RWKV_VOCABULARY", "")]
        places += [os.path.join(folder, VOCABULARY) for folder in folders or ()]
    for path in places:
        if os.path.isfile(path):
            return WorldTokenizer(path)
    if is_official:
        places = "here, nor beside the checkpoint, nor in the package rwkv"
        raise InputError(f"{name} is not {places}: pip install rwkv brings it, or take it from BlinkDL's RWKV-LM")
    raise InputError(f"there is no tokenizer {name}: it is bytes, gpt2, or the path of {VOCABULARY}")


@dataclass
class Template:
    before: str  # before the first turn
    human: str  # a question; {} is its text
    gpt: str  # what calls for the answer
    answer: str  # before the answer's text: learned, as the answer and its end are
    end: str  # ends an answer, and nothing else: it never occurs inside a message


TEMPLATES = {
    "world": Template("", "User: {}\n\n", "Assistant:", " ", "\n\n"),  # RWKV World models; VisualRWKV 6.0
    "v1": Template("\x16", "User: {}\x17", "Assistant:", " ", "\x17"),  # ModRWKV, first released checkpoints
    "v2": Template("", "\x16User: {}\x17", "\x16Assistant:", " ", "\x17"),  # ModRWKV, the paper's code
    "v3": Template("", "\x16User:{}\x17", "\x16Assistant:", "", "\x17"),  # ModRWKV, August 2025 on
}
PROMPT_STYLES = {  # where a question has its `placeholders`; context: all questions of the conversation
    "written": "{question}",  # where they are written
    "first": "{placeholders}\n{text}",
    "last": "{text}\n{placeholders}",
    "sandwich": "{context}\n{placeholders}\n{text}",  # the state is ready for the picture, and the question is fresh
    "before": "{placeholders}{text}",  # ahead of the turn, as the first ModRWKV models have them
    "tagged": "{placeholders}{text}",  # each between two tokens of their own, as ModRWKV from August 2025 on
}
IMAGE_TAGS = 65530, 65531  # <|vision_start|> and <|vision_end|>, beyond the vocabulary of RWKV World
SHORT_ANSWER = "Answer the question using a single word or phrase."
PLACEHOLDER = re.compile("(" + "|".join(f"<{kind}>" for kind in MEDIA) + ")")  # where media stand in a question


def arrange(question, questions, style):
    """A question with its media where the style wants them (VisualRWKV, arXiv:2406.13362, section 3.2)."""
    placeholders = PLACEHOLDER.findall(question)
    if not placeholders:
        return question
    others = [q.replace(SHORT_ANSWER, "") if q == question else q for q in questions]
    return PROMPT_STYLES[style].format(
        question=question,
        placeholders=("" if style in ("before", "tagged") else "\n").join(placeholders),
        text=PLACEHOLDER.sub("", question).strip(),
        context="\n".join(PLACEHOLDER.sub("", q).strip() for q in others),
    )


def clean(text):
    """A message without what ends one in any template: empty lines and control characters."""
    return re.sub(r"\n\s*\n", "\n", re.sub("[\x16\x17]", "", text).strip())


def conversation(config, turns, media, first=True):
    """Segments of a conversation.

    Args: turns [(question, answer)], an answer of None is left for the model to give; media: an iterator
    of segments such as ("image", pixels), used up in the order of the placeholders <image>; first: False where
    the turns continue a conversation whose state is kept.
    """
    encode, template = get_tokenizer(config.tokenizer).encode, TEMPLATES[config.template]
    segments, text = [], template.before if first else ""
    for question, answer in turns:
        question = clean(arrange(question, [q for q, _ in turns], config.prompt_style))
        if question == "<audio>":  # nothing asked: a transcription task (ModRWKV's code: sound, and no human turn)
            text = question + text
        else:
            ahead = "".join(PLACEHOLDER.findall(question)) if config.prompt_style == "before" else ""
            text = ahead + text + template.human.format(question.removeprefix(ahead))
        for piece in PLACEHOLDER.split(text + template.gpt):
            if piece == "<image>" and config.prompt_style == "tagged":
                segments += [("text", [IMAGE_TAGS[0]]), next(media), ("text", [IMAGE_TAGS[1]])]
            elif PLACEHOLDER.match(piece):
                segments.append(next(media))
            elif piece:
                segments.append(("text", encode(piece)))
        if answer is not None:  # the end is encoded by itself: "。\n" and the like are tokens of RWKV World
            segments.append(("answer", encode(template.answer + clean(answer)) + encode(template.end)))
        text = ""
    return segments
