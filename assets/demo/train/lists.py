"""Lists and stacks: copy, reverse, push and pop."""
from facts import TOO_BIG, split
from phrases import CLOSERS, OPENERS
from words import *

COPY = split("""Repeat: {x}.|Repeat: {x}.|Copy: {x}.|Copy: {x}.|Copy this list: {x}.|Repeat this list: {x}.|Say this again: {x}.
Repeat after me: {x}.|Write down: {x}.|Say {x}.|Repeat {x}.|Copy {x}.|Say: {x}.|Say this list: {x}.|Say the list {x}.|Repeat the list {x}.
Say this list again: {x}.|Say again: {x}.|Echo: {x}.|Echo {x}.|Write {x}.|Write this: {x}.|Read this: {x}.|Read out {x}.|List {x}.|Show {x}.
Print {x}.|Print: {x}.|Copy these: {x}.|Repeat these: {x}.|Repeat what I say: {x}.|Tell me this list again: {x}.|Give me back {x}.
Reproduce: {x}.|Read back: {x}.|Spell out {x}.|Say after me: {x}.|Tell me {x} again.|Say {x} again.|Repeat {x} once.|Repeat this: {x}.
Copy this: {x}.|Repeat the following: {x}.|Copy the following list: {x}.|Make a copy of {x}.|{x} - repeat that.|{x}. Repeat that.
{x}. Say it again.|Write the list {x} again.|copy {x}|repeat {x}|say {x}|Repeat the same: {x}.|Now say {x}.""")
COPY_LATER = split("""Repeat the list.|Say it again.|Copy the list.|Repeat it.|What was the list?|Say the list.|What is the list?
Give me the list.|Tell me the list.|Read it back.|Show the list.|What is on the list?|What did I say?|Which things are on my list?
Repeat what I said.|Repeat that.|Copy it.|List them.|Say them again.|Repeat them.|What is on my list?|What were they?|Read the list.
What was on it?|Write it down.|Write the list.|Tell me my list.|What did the list say?|Name them.|Print it.|The list?|What was my list?
Which ones were they?""")
REVERSE = split("""Reverse: {x}.|Reverse: {x}.|Reverse: {x}.|Reverse this list: {x}.|Say this backwards: {x}.|Say {x} backwards.
Backwards: {x}.|Reverse {x}.|Turn this list around: {x}.|Reverse the list {x}.|Turn around: {x}.|Turn {x} around.|Invert: {x}.
Invert this list: {x}.|Say {x} in reverse.|What is {x} backwards?|What is {x} reversed?|{x} backwards.|{x} reversed.|Write {x} backwards.
Write backwards: {x}.|Backwards, please: {x}.|Reverse these: {x}.|Reverse the order: {x}.|Reverse the order of {x}.|Give me {x} backwards.
Give {x} in reverse.|Reversed: {x}.|Say in the opposite order: {x}.|In reverse order: {x}.|List {x} in reverse order.
Go through {x} backwards.|Read {x} from the back.|Read backwards: {x}.|{x} from back to front.|Back to front: {x}.|Say {x} from the end.
Say these from the last to the first: {x}.|Reverse this: {x}.|{x} the other way.|Show {x} backwards.|Spell {x} backwards.
Repeat {x} backwards.|Repeat in reverse: {x}.|{x}. Now backwards.|{x}. Reverse that.|{x}, but backwards.|How is {x} backwards?
Put {x} in reverse order.|Mirror {x}.|reverse {x}|Backwards {x}.""")
REVERSE_LATER = split("""Reverse the list.|Say it backwards.|Reverse it.|Now backwards.|Now reverse it.|Reverse that.|Say them backwards.
Reverse them.|Turn it around.|Backwards.|What is it backwards?|In reverse.|In reverse order.|Say the list backwards.
What is the list in reverse?|Give it to me backwards.|Read it backwards.|Read it from the end.|Invert it.|Turn the list around.
Tell me the list backwards.|The other way.|Start at the end.|Begin with the last.|Repeat it backwards.|List them backwards.
From the last to the first.|Give me the reverse.""")
STORE = split("""Here is a list: {x}.|The list is {x}.|Remember this list: {x}.|Remember: {x}.|My list: {x}.|List: {x}.|I have a list: {x}.
Take this list: {x}.|Note this list: {x}.|This is my list: {x}.|Keep this list: {x}.|A list: {x}.|Let the list be {x}.|On my list: {x}.
On the list are {x}.|Learn this list: {x}.|Things to buy: {x}.|Memorise: {x}.|I bought {x}.|I need {x}.|Consider {x}.
Here are some words: {x}.|Here they are: {x}.|These are {x}.|We have {x}.""")
POLITE = ["Please ", "please ", "Can you ", "Could you ", "Would you ", "Now ", "Then ", "I want you to ", "Try to ", "Let's ", "You should ",
          "Can you please ", "Will you "]

PUSH = split("""Push {x}.|Push {x}.|Push {x} on the stack.|Put {x} on the stack.|Put {x} on top.|Add {x}.|push {x}.|Push {x} onto the stack.
Place {x} on top.|Then push {x}.|Put {x} on it.|Lay {x} on top.|Stack {x}.|{x} goes on top.|Add {x} on top.|Now push {x}.|I push {x}.
I put {x} on the stack.|Add {x} to the stack.|Put {x} on the pile.|Next push {x}.|Drop {x} on top.|Put another on top: {x}.|{x} comes on top.
Push: {x}.|Throw {x} on the stack.|On top comes {x}.""")
POP = split("""Pop.|Pop.|Pop it.|Pop the top.|Remove the top.|Take the top off.|pop.|Pop one.|Then pop.|Take one off.|Remove the top one.
Now pop.|I pop.|Pop the stack.|Take it off.|Remove it.|Take away the top.|I take one off.|Pop again.|Take the top one away.|Drop the top.
Remove the last one.|Pop off the top.|Lift off the top.|Throw away the top one.""")
TOP = split("""What is on top?|What is on top?|What is on top of the stack?|What's on top?|What is the top?|What is on top now?
Which one is on top?|Tell me the top.|What is at the top?|Top?|What is the top one?|What lies on top?|And the top?|What do I see on top?
What is the top of the stack?|Show the top.|What would I pop?|What comes off next?|What is the last one?|The top?|Which is the top?
What's the top?|What's at the top?|What is uppermost?|Is anything on top?|What is next on the stack?|What is there on top?
Which thing is on top?|Is the stack empty?|What remains on top?|Look at the top.|What is now the top?|Say the top.|What do we have on top?""")
TOP_INDIRECT = ["Tell me what is on top.", "Do you know what is on top?", "Can you tell me what is on top?", "Tell me what's at the top.",
                "Say what is on top.",
                "I forgot what is on top.", "Please tell me the top.", "Can you say which one is on top?"]
DEEPEST = 6


def pool(rng):
    """A way to draw items, and what they are called."""
    return rng.choices([(lambda r: r.choice(THINGS), "things"), (thing, "things"), (lambda r: r.choice(LETTERS), "letters"),
                        (lambda r: r.choice(NUMBERS), "numbers"),
                        (colour, "colours"), (person, "names"), (place, "places"), (lambda r: r.choice(ANIMALS), "animals"), (made_up, "words"),
                        (lambda r: r.choice(LETTERS).lower(), "letters"), (lambda r: str(r.randint(0, 12)), "numbers")],
                       [14, 12, 12, 16, 4, 10, 5, 5, 5, 6, 4])[0]


def items(rng, n):
    """n different items; small pools give way to large ones."""
    while True:
        draw_one, called = pool(rng)
        found, tries = [], 0
        while len(found) < n and tries < 12 * n:
            word, tries = draw_one(rng), tries + 1
            if word not in found:
                found.append(word)
        if len(found) == n:
            return found, called


def shown(rng, words, called):
    kind = rng.random()
    text = listing(words) if kind < 0.12 else rng.choices([", ", " ", ",", "; ", " , ", "\n", ", then ", " - "],
                                                          [50, 22, 15, 3, 2, 1, 2, 2])[0].join(words)
    if rng.random() < 0.15:
        text = rng.choice([f"the {called} {text}", f"these {called}: {text}", f"{called}: {text}", f"this: {text}", f"my {called} {text}"])
    return f'"{text}"' if rng.random() < 0.03 else text


def polite(rng, text):
    kind = rng.random()
    if kind < 0.15 and text[0].isalpha():
        before = rng.choice(POLITE)
        text = before + text[0].lower() + text[1:]
        if before.split()[0] in ("Can", "Could", "Would", "Will") and text[-1] == ".":
            text = text[:-1] + "?"
    elif kind < 0.2:
        text = rng.choice(OPENERS) + text[0].lower() + text[1:]
    elif kind < 0.28 and text[-1] in ".?":
        text = text[:-1] + rng.choice([", please", " please", ", now", " for me", ", thanks", " now"]) + text[-1]
    return text


class List:
    """Copy or reverse; in some conversations the list comes first and is asked for later."""

    def __init__(self, rng, n, now, later, answer):
        words, called = items(rng, n)
        self.rng, self.later, self.note = rng, later if rng.random() < 0.3 else None, None
        text = shown(rng, words, called)
        self.said = rng.choice(STORE).format(x=text) if self.later else polite(rng, rng.choice(now).format(x=text))
        self.statements = 1 if self.later else 0
        self.answer = answer(words)

    def say(self):
        return self.said

    def ask(self):
        return polite(self.rng, self.rng.choice(self.later)) if self.later else self.said, self.answer


def copy(rng, n):
    return List(rng, n, COPY, COPY_LATER, lambda words: "You said: " + ", ".join(words) + ".")


def reverse(rng, n):
    return List(rng, n, REVERSE, REVERSE_LATER, lambda words: "Backwards: " + ", ".join(words[::-1]) + ".")


class Stack:
    """n operations, from empty; never deeper than DEEPEST."""

    def __init__(self, rng, n):
        self.rng, self.statements, self.stack, self.note = rng, n, [], None
        self.draw, self.called = pool(rng)
        self.article = rng.choice(["", "the ", "a "]) if self.called == "things" else ""
        fixed = rng.random() < 0.4
        self.push, self.pop = ([rng.choice(PUSH)], [rng.choice(POP)]) if fixed else (PUSH, POP)

    def item(self):
        if self.called == "numbers" and self.rng.random() < 0.02:
            return str(self.rng.randint(100, 999))
        return several(self.draw, self.rng, 1, self.stack)[0]

    def say(self):
        rng = self.rng
        if self.stack and (len(self.stack) >= DEEPEST or rng.random() < 0.42):
            self.stack.pop()
            return rng.choice(self.pop)
        new = [self.item()]
        if len(self.stack) < DEEPEST - 3 and rng.random() < 0.06:
            new = several(self.draw, rng, rng.choice([2, 3]), self.stack)
        self.stack += new
        said = [a(x) if self.article == "a " else self.article + x for x in new]
        return upper_first(rng.choice(self.push).format(x=listing(said) if rng.random() < 0.6 else ", ".join(said)))

    def ask(self):
        rng = self.rng
        form = rng.choice(TOP if rng.random() < 0.8 else TOP_INDIRECT)
        if rng.random() < 0.1 and form[-1] == "?":
            form = form[:-1] + rng.choice(CLOSERS) + "?"
        form = polite(rng, form) if rng.random() < 0.3 else form
        if self.stack and self.stack[-1].isdigit() and int(self.stack[-1]) > 99:
            return form, TOO_BIG
        return form, f"The top is {self.stack[-1]}." if self.stack else "The stack is empty."
