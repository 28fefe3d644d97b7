"""Recall with overwriting: what things hold, cost or are; some of it changes, is corrected, emptied or forgotten; then questions.

A task has so many `statements`; `say()` makes the next one, `ask()` a question about those said so far, with its answer.
"""
from facts import KINDS, SHARE, TOO_BIG
from phrases import FIX, FIX_KEY, FORGET, FORGET_LAST, question, statement
from words import *

EMPTY = object()


class Recall:
    """n statements about keys of one kind: first values, changes and corrections of them, and remarks beside the point."""

    def __init__(self, rng, n, unknown=0.0, fixes=0.15):
        self.rng, self.statements, self.unknown, self.fixes = rng, n, unknown, fixes
        self.kind = rng.choices(KINDS, SHARE)[0]
        changes, self.noise = rng.randint(n // 4, n // 2), rng.choice([0, 0.05, 0.15, 0.25])
        self.waiting = self.kind.several_keys(rng, max(1, round((n - changes) * (1 - self.noise))) + 2)
        self.missing = self.waiting.pop()
        self.same = rng.random() < 0.3
        self.forms = {}
        self.known, self.left, self.last, self.fresh, self.gone = {}, n, None, False, []
        self.note = None  # what the assistant says if the last statement ends a turn

    def form(self, name):
        """One wording for a whole conversation, or a new one for each sentence."""
        if not self.same or name not in self.forms:
            self.forms[name] = self.rng.choice(getattr(self.kind, name))
        return self.forms[name]

    def fill(self, form, key, value="", old=""):
        key_said = key.said(self.rng)
        text = form.format(k=key_said, v=value, w=old, o=self.kind.value(self.rng))
        return text if len(key_said) == 1 or form[0] == "{" and form[1] in "vw" and value[0].isdigit() else upper_first(text)

    def new_value(self, key):
        value = self.kind.value(self.rng)
        while value == self.known.get(key):
            value = self.kind.value(self.rng)
        return value

    def say(self):
        rng, self.note = self.rng, None
        self.left -= 1
        if self.known and rng.random() < self.noise:
            return rng.choice(DISTRACTORS)
        if self.last in self.known and rng.random() < self.fixes:
            return self.fix()
        fresh = self.waiting and (not self.known or rng.random() < len(self.waiting) / (self.left + 1))
        if not fresh and rng.random() < 0.12:
            return self.forget()
        key = self.waiting.pop() if fresh else rng.choice(list(self.known))
        self.fresh, self.last, old = fresh, key, self.known.get(key)
        if self.kind.empty and rng.random() < 0.14:
            self.known[key] = EMPTY
            text = self.fill(rng.choice(self.kind.empty if old in (None, EMPTY) else self.kind.emptied), key, old if isinstance(old, str) else "")
            return statement(rng, text)
        value = self.known[key] = self.new_value(key)
        self.note = TOO_BIG if self.kind.too_big(value) else None
        name = "state" if fresh or old is EMPTY else "change"
        text = self.fill(self.form(name), key, value)
        if fresh and self.waiting and text.endswith(f"{value}.") and rng.random() < 0.06:
            other = self.last = self.waiting.pop()
            self.known[other] = self.new_value(other)
            text = f"{text[:-1]}{rng.choice([' and ', ', ', ', and '])}{other.said(rng)} {self.known[other]}."
        return statement(rng, text)

    def fix(self):
        """The last statement is corrected: its value, or which key it was about."""
        rng, key = self.rng, self.last
        old = self.known[key]
        other = key.sibling(rng, [*self.known, *self.waiting, self.missing])
        if other and self.fresh and rng.random() < 0.3:
            del self.known[key]
            self.known[other], self.last = old, other
            self.gone.append(key)
            return rng.choice(FIX_KEY).format(a=other.adjective, b=key.adjective, n=key.noun)
        if old is EMPTY:
            return rng.choice(DISTRACTORS)
        if self.kind.empty and rng.random() < 0.12:
            self.known[key] = EMPTY
            return upper_first(rng.choice(self.kind.emptied_last).format(w=old))
        value = self.known[key] = self.new_value(key)
        self.note = TOO_BIG if self.kind.too_big(value) else None
        forms = FIX + self.kind.fix if rng.random() < 0.85 else self.kind.change
        return self.fill(rng.choice(forms), key, value, old)

    def forget(self):
        rng = self.rng
        key = self.last if self.last in self.known and rng.random() < 0.4 else rng.choice(list(self.known))
        if len(self.known) < 2 and rng.random() < 0.5:
            return rng.choice(DISTRACTORS)
        del self.known[key]
        self.gone.append(key)
        self.note = "Forgotten."
        last, self.last = self.last, None
        return rng.choice(FORGET_LAST) if key is last and rng.random() < 0.6 else self.fill(rng.choice(FORGET), key)

    def ask(self):
        rng, kind = self.rng, self.kind
        topic, self.last, self.fresh = self.last, None, False
        # What was forgotten is asked about as often as a few other things: otherwise its old value is the likeliest answer.
        gone = [key for key in self.gone if key not in self.known]
        forgotten = gone and rng.random() < 0.3
        if not self.known or forgotten or rng.random() < self.unknown:
            key = rng.choice(gone) if gone and (forgotten or rng.random() < 0.5) else self.missing
            return self.asked(kind.question, kind.indirect, key), upper_first(kind.unknown.format(k=key.named))
        key = self.last = rng.choice(list(self.known))
        value = self.known[key]
        if rng.random() < 0.06:
            return self.impossible(key)
        if kind.reverse and rng.random() < 0.06 and value is not EMPTY and list(self.known.values()).count(value) == 1:
            return question(rng, [f.format(v=value, n=key.noun) for f in kind.reverse]), self.answer(key)
        if topic in self.known and rng.random() < 0.15:
            self.last = topic
            return question(rng, kind.it), self.answer(topic)
        if rng.random() < 0.06:
            other = rng.choice([kind.value(rng), str(self.shown(key))])
            return question(rng, [f.format(k=key.said(rng), o=other) for f in kind.whether]), self.answer(key)
        return self.asked(kind.question, kind.indirect, key), self.answer(key)

    def asked(self, direct, indirect, key):
        said = key.asked(self.rng)
        return question(self.rng, [f.format(k=said) if len(said) == 1 else upper_first(f.format(k=said)) for f in direct],
                        [f.format(k=said) for f in indirect])

    def shown(self, key):
        return "nothing" if self.known[key] is EMPTY else self.known[key]

    def answer(self, key):
        value = self.known[key]
        if value is EMPTY:
            text = f"{key.named} is empty."
        elif self.kind.too_big(value):
            return TOO_BIG
        else:
            text = self.kind.answer.format(k=key.named, v=value)
        return text if len(key.named) == 1 else upper_first(text)

    def impossible(self, key):
        rng = self.rng
        form, answer = rng.choice(self.kind.impossible)
        other = rng.choice(list(self.known))
        return question(rng, [upper_first(form.format(k=key.said(rng), v=self.shown(key), j=other.said(rng), n=key.noun))]), answer


class Corrections(Recall):
    """The same with many corrections."""

    def __init__(self, rng, n, unknown=0.0):
        super().__init__(rng, n, unknown, fixes=0.6)


class MultiQuery:
    """Many keys, then several asked for at once; answered as a list in the order asked."""

    def __init__(self, rng, n):
        keys = several(rng.choice([thing, thing, colour, place, person, lambda r: r.choice(ANIMALS + THINGS)]), rng, n)
        if rng.random() < 0.5:
            keys = [k.lower() for k in keys]
        value = rng.choice([lambda r: r.choice(NUMBERS)] * 3 + [lambda r: r.choice(LETTERS), thing, colour])
        self.rng, self.statements, self.note = rng, 1, None
        self.known = {key: value(rng) for key in keys}

    def say(self):
        form = self.rng.choice(["{k} is {v}", "{k} {v}", "{k}: {v}", "{k} = {v}", "{k}={v}", "{k} has {v}", "the {k} has {v}",
                                "the {k} is {v}", "{k} costs {v}",
                                "{k}:{v}", "{k} - {v}", "{k} gets {v}", "{v} for {k}", "the {k} costs {v}"])
        opening = self.rng.choice(["Remember: ", "Remember this: ", "Learn this: ", "Here is a list: ", "Pairs: ", "My list: ", "Note: ",
                                   "Prices: ", "", "", "", ""])
        join = self.rng.choice([", ", ", ", ", ", "; ", ","])
        pairs = [form.format(k=k, v=v) for k, v in self.known.items()]
        text = join.join(pairs) if self.rng.random() < 0.7 or len(pairs) == 1 else listing(pairs)
        return upper_first(opening + text) + "." if self.rng.random() < 0.5 else opening + text + "."

    def ask(self):
        rng, n = self.rng, len(self.known)
        count = rng.randint(min(n, 2), max(1, n // 2)) if n > 3 else rng.choice([n, max(1, n - 1)])
        asked = rng.sample(list(self.known), count)
        the = rng.choice(["", "", "the "])
        said = listing([the + k for k in asked])
        forms = ["What are {k}?", "What is {k}?", "Give me {k}.", "Tell me {k}.", "Look up {k}.", "And {k}?", "Find {k}.", "How much are {k}?",
                 "How much is {k}?", "What do {k} have?", "What does {k} have?", "What do {k} cost?", "What number is {k}?",
                 "Which numbers have {k}?",
                 "What belongs to {k}?", "What about {k}?", "I need {k}.", "Show me {k}.", "What did I say for {k}?", "Values of {k}?",
                 "What are the values for {k}?",
                 "Read me {k}.", "Now {k}.", "Please give me {k}.", "Which values do {k} have?", "What goes with {k}?", "{k}?", "Say {k}."]
        return question(rng, [upper_first(f.format(k=said)) if f[0] != "{" else f.format(k=said) for f in forms]), \
            "Found: " + ", ".join(f"{k} {self.known[k]}" for k in asked) + "."
