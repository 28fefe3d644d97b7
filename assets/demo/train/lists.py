"""Lists and stacks: copy, reverse, push and pop."""
from words import *

COPY = ["Repeat: {x}.", "Repeat: {x}.", "Copy: {x}.", "Copy this list: {x}.", "Repeat this list: {x}.", "Say this again: {x}.", "Repeat after me: {x}.",
        "Write down: {x}.", "Say {x}.", "Repeat {x}.", "Copy {x}."]
COPY_LATER = ["Repeat the list.", "Say it again.", "Copy the list.", "Repeat it.", "What was the list?"]
REVERSE = ["Reverse: {x}.", "Reverse: {x}.", "Reverse this list: {x}.", "Say this backwards: {x}.", "Say {x} backwards.", "Backwards: {x}.",
           "Reverse {x}.", "Turn this list around: {x}.", "Reverse the list {x}."]
REVERSE_LATER = ["Reverse the list.", "Say it backwards.", "Reverse it.", "Now backwards.", "Now reverse it."]
STORE = ["Here is a list: {x}.", "The list is {x}.", "Remember this list: {x}.", "Remember: {x}.", "My list: {x}."]

PUSH = ["Push {x}.", "Push {x}.", "Push {x} on the stack.", "Put {x} on the stack.", "Put {x} on top.", "Add {x}.", "push {x}."]
POP = ["Pop.", "Pop.", "Pop it.", "Pop the top.", "Remove the top.", "Take the top off.", "pop."]
TOP = ["What is on top?", "What is on top?", "What is on top of the stack?", "What's on top?", "What is the top?", "What is on top now?",
       "Which one is on top?", "Tell me the top.", "What is at the top?", "Top?"]
DEEPEST = 6


def pool(rng):
    return rng.choices([THINGS, LETTERS, NUMBERS, COLOURS + PEOPLE, PLACES], [4, 3, 4, 1, 1])[0]


def items(rng, n):
    words = pool(rng)
    return rng.sample(words if len(words) >= n else THINGS, n)


def shown(rng, words):
    return rng.choice([", ", ", ", " "]).join(words)


class List:
    """Copy or reverse; in some conversations the list comes first and is asked for later."""

    def __init__(self, rng, n, now, later, answer):
        words = items(rng, n)
        self.rng, self.later = rng, later if rng.random() < 0.3 else None
        self.said = rng.choice(STORE if self.later else now).format(x=shown(rng, words))
        self.statements = 1 if self.later else 0
        self.answer = answer(words)

    def say(self):
        return self.said

    def ask(self):
        return self.rng.choice(self.later) if self.later else self.said, self.answer


def copy(rng, n):
    return List(rng, n, COPY, COPY_LATER, lambda words: "You said: " + ", ".join(words) + ".")


def reverse(rng, n):
    return List(rng, n, REVERSE, REVERSE_LATER, lambda words: "Backwards: " + ", ".join(words[::-1]) + ".")


class Stack:
    """n operations, from empty; never deeper than DEEPEST."""

    def __init__(self, rng, n):
        self.rng, self.statements, self.words, self.stack = rng, n, pool(rng), []
        self.article = "the " if self.words is THINGS and rng.random() < 0.5 else ""
        fixed = rng.random() < 0.5
        self.push, self.pop = ([rng.choice(PUSH)], [rng.choice(POP)]) if fixed else (PUSH, POP)

    def say(self):
        rng = self.rng
        if self.stack and (len(self.stack) == DEEPEST or rng.random() < 0.42):
            self.stack.pop()
            return rng.choice(self.pop)
        self.stack.append(rng.choice([w for w in self.words if w not in self.stack]))
        return rng.choice(self.push).format(x=self.article + self.stack[-1])

    def ask(self):
        return self.rng.choice(TOP), f"The top is {self.stack[-1]}." if self.stack else "The stack is empty."
