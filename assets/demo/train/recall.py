"""Recall with overwriting: what things hold, cost or are; some of it changes; then questions.

A task has so many `statements`; `say()` makes the next one, `ask()` a question about those said so far, with its answer.
"""
from words import *


class Fact:
    """One kind of fact: how it is stated, changed and asked for. {k} is the key, {v} the value."""

    def __init__(self, keys, values, state, change, question, answer, unknown):
        self.keys, self.values = keys, values
        self.state, self.change, self.question, self.answer, self.unknown = state, change, question, answer, unknown


def fill(form, key, value=""):
    """A sentence; a variable keeps its case."""
    text = form.format(k=key, v=value)
    return text if len(key) == 1 else upper_first(text)


def number(rng):
    return rng.choice(NUMBERS)


def thing(rng):
    return a(rng.choice(THINGS))


HOLDS = dict(
    keys=lambda rng: f"the {rng.choice(COLOURS)} {rng.choice(CONTAINERS)}",
    state=["{k} holds {v}.", "{k} holds {v}.", "{k} has {v}.", "{k} contains {v}.", "{k} has {v} in it.", "There is {v} in {k}.", "I put {v} in {k}.",
           "In {k} there is {v}.", "{v} is in {k}."],
    change=["Now {k} holds {v}.", "{k} now holds {v}.", "Now {k} has {v}.", "Now {k} contains {v}.", "{k} now contains {v}.", "Now there is {v} in {k}.",
            "I replace it: {k} holds {v}.", "Then I put {v} in {k}.", "Actually, {k} holds {v}.", "Change {k} to {v}."],
    question=["What does {k} hold?", "What does {k} hold?", "What is in {k}?", "What's in {k}?", "What does {k} contain?",
              "What does {k} have?", "What does {k} hold now?", "What is in {k} now?", "Tell me what {k} holds.", "And {k}?",
              "What is inside {k}?", "What about {k}?", "Do you know what is in {k}?"],
    answer="{k} holds {v}.", unknown="I don't know what {k} holds.")
COSTS = dict(
    keys=lambda rng: f"the {rng.choice(THINGS)}", values=number,
    state=["{k} costs {v}.", "{k} costs {v}.", "The price of {k} is {v}.", "{k} is priced at {v}.", "{k} sells for {v}."],
    change=["Now {k} costs {v}.", "{k} now costs {v}.", "The price of {k} is now {v}.", "Now the price of {k} is {v}.",
            "{k} goes up to {v}.", "{k} goes down to {v}.", "Actually, {k} costs {v}."],
    question=["How much does {k} cost?", "What does {k} cost?", "How much is {k}?", "What is the price of {k}?", "What does {k} cost now?",
              "How much does {k} cost now?", "Tell me the price of {k}.", "What about {k}?", "And {k}?"],
    answer="{k} costs {v}.", unknown="I don't know what {k} costs.")
COLOUR = dict(
    keys=lambda rng: f"the {rng.choice(COLOURED + THINGS[:10])}", values=lambda rng: rng.choice(COLOURS),
    state=["{k} is {v}.", "{k} is {v}.", "The colour of {k} is {v}.", "I paint {k} {v}."],
    change=["Now {k} is {v}.", "{k} is now {v}.", "I paint {k} {v}.", "{k} turns {v}.", "The colour of {k} is now {v}.", "Actually, {k} is {v}."],
    question=["What colour is {k}?", "What color is {k}?", "What is the colour of {k}?", "Which colour is {k}?", "What colour is {k} now?",
              "Tell me the colour of {k}.", "What colour does {k} have?"],
    answer="{k} is {v}.", unknown="I don't know what colour {k} is.")
AGE = dict(
    keys=lambda rng: rng.choice(PEOPLE), values=number,
    state=["{k} is {v}.", "{k} is {v} years old.", "The age of {k} is {v}."],
    change=["Now {k} is {v}.", "{k} is now {v}.", "{k} is now {v} years old.", "{k} turns {v}.", "Actually, {k} is {v}."],
    question=["How old is {k}?", "How old is {k} now?", "What is the age of {k}?", "Tell me how old {k} is.", "What age is {k}?"],
    answer="{k} is {v}.", unknown="I don't know how old {k} is.")
LABEL = dict(
    keys=lambda rng: f"the {rng.choice(LABELS)}", values=number,
    state=["{k} is {v}.", "{k} is {v}.", "Remember that {k} is {v}.", "Let {k} be {v}."],
    change=["Now {k} is {v}.", "{k} is now {v}.", "{k} changes to {v}.", "Actually, {k} is {v}."],
    question=["What is {k}?", "What's {k}?", "What is {k} now?", "Tell me {k}.", "Do you remember {k}?"],
    answer="{k} is {v}.", unknown="I don't know {k}.")
VARIABLE = dict(
    keys=lambda rng: rng.choice("abcdefghklmnpqrstuvwxyz"), values=number,
    state=["{k} is {v}.", "{k} = {v}.", "Let {k} be {v}.", "Set {k} to {v}."],
    change=["Now {k} is {v}.", "{k} is now {v}.", "{k} = {v}.", "Set {k} to {v}.", "Now {k} = {v}."],
    question=["What is {k}?", "What's {k}?", "What is {k} now?", "What is the value of {k}?"],
    answer="{k} is {v}.", unknown="I don't know {k}.")
KINDS = [Fact(values=number, **HOLDS), Fact(values=thing, **HOLDS), Fact(**COSTS), Fact(**COLOUR), Fact(**AGE), Fact(**LABEL),
         Fact(**VARIABLE)]
SHARE = [34, 20, 16, 12, 6, 6, 6]


def keys_of(rng, kind, n):
    keys, misses = [], 0
    while len(keys) < n and misses < 50:
        key = kind.keys(rng)
        if key in keys:
            misses += 1
        else:
            keys.append(key)
    return keys


def some_keys(rng, kind, n):
    """Half of the time, boxes of one noun only: `the red box`, `the blue box`, ..."""
    if kind.keys is HOLDS["keys"] and rng.random() < 0.5:
        noun = "box" if rng.random() < 0.6 else rng.choice(CONTAINERS)
        return [f"the {c} {noun}" for c in rng.sample(COLOURS, min(n, len(COLOURS)))]
    return keys_of(rng, kind, n)


def same_form(rng, forms):
    """One wording for a whole conversation, or any of them for each sentence."""
    return [rng.choice(forms)] if rng.random() < 0.4 else forms


class Recall:
    """n statements about keys of one kind: first values, changes of them, and remarks beside the point."""

    def __init__(self, rng, n, unknown=0.0):
        self.rng, self.statements, self.unknown = rng, n, unknown
        self.kind = rng.choices(KINDS, SHARE)[0]
        changes, self.noise = rng.randint(n // 4, n // 2), rng.randint(0, n // 4) / n
        self.waiting = some_keys(rng, self.kind, max(1, round((n - changes) * (1 - self.noise))) + 1)
        self.missing = self.waiting.pop() if len(self.waiting) > 1 else None
        self.state, self.change = same_form(rng, self.kind.state), same_form(rng, self.kind.change)
        self.known, self.left = {}, n

    def say(self):
        rng = self.rng
        self.left -= 1
        if self.known and rng.random() < self.noise:
            return rng.choice(DISTRACTORS)
        fresh = self.waiting and (not self.known or rng.random() < len(self.waiting) / (self.left + 1))
        key = self.waiting.pop() if fresh else rng.choice(list(self.known))
        value = self.kind.values(rng)
        while value == self.known.get(key):
            value = self.kind.values(rng)
        form = rng.choice(self.change if key in self.known else self.state)
        self.known[key] = value
        return fill(form, key, value)

    def ask(self):
        form = self.rng.choice(self.kind.question)
        if self.missing and self.rng.random() < self.unknown:
            return fill(form, self.missing), fill(self.kind.unknown, self.missing)
        key = self.rng.choice(list(self.known))
        return fill(form, key), fill(self.kind.answer, key, self.known[key])


class MultiQuery:
    """Many keys, then several asked for at once; answered as a list in the order asked."""

    def __init__(self, rng, n):
        keys = rng.sample(rng.choice([THINGS, THINGS, COLOURS if n <= len(COLOURS) else PLACES]), n)
        value = rng.choice([number, number, lambda rng: rng.choice(LETTERS)])
        self.rng, self.statements, self.known = rng, 1, {key: value(rng) for key in keys}

    def say(self):
        form = self.rng.choice(["{k} is {v}", "{k} {v}", "{k}: {v}", "{k} = {v}"])
        opening = self.rng.choice(["Remember: ", "Remember this: ", "Learn this: ", "Here is a list: ", "Pairs: ", ""])
        return opening + ", ".join(form.format(k=k, v=v) for k, v in self.known.items()) + "."

    def ask(self):
        n = len(self.known)
        asked = self.rng.sample(list(self.known), self.rng.randint(min(n, 2), max(1, n // 2)) if n > 3 else n)
        form = self.rng.choice(["What are {k}?", "What is {k}?", "Give me {k}.", "Tell me {k}.", "Look up {k}.", "And {k}?",
                                "Find {k}."])
        return form.format(k=listing(asked)), "Found: " + ", ".join(f"{k} {self.known[k]}" for k in asked) + "."
