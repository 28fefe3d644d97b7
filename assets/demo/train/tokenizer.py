"""The tokenizer: trained on the generator's own text, written in the published format, with the published special tokens.

    python tokenizer.py OUT_DIR
"""
import base64, json, pathlib, random, sys
from collections import Counter

import regex, tiktoken
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

import words

HAN_FREE_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
HAN_FREE_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join([
    r"[\p{Han}]+",
    r"[^\r\n\p{L}\p{N}]?" + HAN_FREE_UPPER + "*" + HAN_FREE_LOWER + "+" + CONTRACTION,
    r"[^\r\n\p{L}\p{N}]?" + HAN_FREE_UPPER + "+" + HAN_FREE_LOWER + "*" + CONTRACTION,
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
])
# Offsets from the number of ordinary tokens.
SPECIAL = {
    0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 4: "<|im_assistant|>", 6: "<|start_header_id|>",
    7: "<|end_header_id|>", 9: "[EOT]", 10: "<|im_system|>", 11: "<|tool_calls_section_begin|>",
    12: "<|tool_calls_section_end|>", 13: "<|tool_call_begin|>", 14: "<|tool_call_argument_begin|>",
    15: "<|tool_call_end|>", 17: "<|im_middle|>", 254: "[UNK]", 255: "[PAD]",
}
SPECIALS = 256
ORDINARY = 1152
PAIRS = [f"{i:02}" for i in range(100)]
SPACED = 212  # words with a space before them
KNOWN = set("Mary John Reverse Backwards Copy Repeat Push Pop".split() + words.PLACES + words.THINGS + words.COLOURS + words.KINDS_OF_BOX)
BOOST = 4  # how much more these words count, so that they are whole tokens
DAMPING = 0.75  # words count by this power of their frequency, so that rare ones get pieces too


def byte_tokens():
    """The 256 single bytes, printable ones first: a byte's rank is not its value."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [bytes([b]) for b in plain + sorted(set(range(256)) - set(plain))]


def pieces(counts, vocab):
    """`vocab` merges of byte-pair encoding, in order, trained on words with so many occurrences; words are given without spaces."""
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), "isolated", invert=False),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    t.train_from_iterator((word for word, count in counts.items() for _ in range(count)), trainers.BpeTrainer(
        vocab_size=len(alphabet) + vocab, initial_alphabet=alphabet, show_progress=False))
    # ByteLevel writes each byte as one printable character: the printable bytes as themselves, the rest from 256 on.
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    byte_of = {chr(b): b for b in plain}
    byte_of |= {chr(256 + i): b for i, b in enumerate(sorted(set(range(256)) - set(plain)))}
    tokens = sorted(t.get_vocab().items(), key=lambda kv: kv[1])
    return [bytes(byte_of[ch] for ch in token) for token, _ in tokens if len(token) > 1]


def train(texts):
    """The tokens in order of rank: bytes, numbers of two digits, pieces of words, and the most frequent whole words with a space before them.

    A space is part of a token only before a whole word. So a word that comes in pieces has the same pieces at the start of a text and within it,
    which makes it easy to copy."""
    counts, spaced = Counter(), Counter()
    for text in texts:
        for piece in regex.findall(PATTERN.replace("&&[^\\p{Han}]", ""), text):
            word = piece.strip()
            if word and word[0].isalpha():
                counts[word] += 1
                spaced[word] += piece[0] == " "
    weights = {word: round(10 * count ** DAMPING * (BOOST if word in KNOWN else 1)) for word, count in counts.items()}
    merges = pieces(weights, ORDINARY - 256 - len(PAIRS) - SPACED)
    whole = [w for w, _ in spaced.most_common() if w in ("a", "I") or w.encode() in set(merges)][:SPACED]
    return byte_tokens() + [p.encode() for p in PAIRS] + merges + [b" " + w.encode() for w in whole]


class ChatTokenizer:
    """Encodes (user, assistant) turns as `chat_template.jinja` renders them, with a mask of what the assistant says."""

    def __init__(self, folder):
        lines = (pathlib.Path(folder) / "tiktoken.model").read_text().split("\n")
        ranks = {base64.b64decode(l.split()[0]): int(l.split()[1]) for l in lines if l}
        self.ordinary = len(ranks)
        self.vocab = self.ordinary + SPECIALS
        self.id = {s: self.ordinary + i for i, s in SPECIAL.items()}
        self.enc = tiktoken.Encoding("kimi", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
        self.user = self.header("<|im_user|>", "user")
        self.assistant = self.header("<|im_assistant|>", "assistant")
        self.end = self.id["<|im_end|>"]

    def header(self, token, role):
        return [self.id[token], *self.enc.encode_ordinary(role), self.id["<|im_middle|>"]]

    def encode(self, turns):
        ids, said = [], []
        for user, assistant in turns:
            asked = [*self.user, *self.enc.encode_ordinary(user), self.end, *self.assistant]
            answer = [*self.enc.encode_ordinary(assistant), self.end]
            ids += asked + answer
            said += [False] * len(asked) + [True] * len(answer)
        return ids, said

    def prompt(self, messages):
        ids = []
        for m in messages:
            ids += [*(self.user if m["role"] == "user" else self.assistant), *self.enc.encode_ordinary(m["content"]), self.end]
        return ids + self.assistant

    def decode(self, ids):
        return self.enc.decode([i for i in ids if i < self.ordinary])


def write(out):
    from data import conversation
    rng = random.Random(5)
    texts = [text for _ in range(20000) for turn in conversation(rng) for text in turn]
    texts += ["user", "assistant", "system"] * 20000
    tokens = train(texts)
    out.mkdir(parents=True, exist_ok=True)
    (out / "tiktoken.model").write_text("".join(f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(tokens)))
    added = {str(len(tokens) + i): {"content": s, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
                                    "special": not s.startswith("<|tool_call")} for i, s in SPECIAL.items()}
    (out / "tokenizer_config.json").write_text(json.dumps({
        "added_tokens_decoder": added, "bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]", "unk_token": "[UNK]",
        "clean_up_tokenization_spaces": False, "model_max_length": 8192, "tokenizer_class": "TikTokenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]}}, indent=2) + "\n")
    template = pathlib.Path(__file__).parent / "chat_template.jinja"
    (out / "chat_template.jinja").write_text(template.read_text())
    return tokens


if __name__ == "__main__":
    print(len(write(pathlib.Path(sys.argv[1]))), "ordinary tokens")
