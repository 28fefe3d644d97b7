"""The kinds of facts that can be told: their keys and values, and the wordings of statements, changes and questions."""
from words import *

TOO_BIG = "I know numbers up to 99. Try a smaller one."
CALCULATE = "I can't count, calculate or compare. Ask me for what you told me."
UNKNOWN = "I don't know. I only know what you tell me here. Try: What can I ask you?"
WHY = "I don't know why. I only know what you tell me here."
BEFORE = "I don't know what it was before. I only keep what is true now."


class Key:
    """What a fact is about. `said` and `asked` are its wordings in a sentence, `named` the one in the answer."""

    def __init__(self, named, noun, adjective=None, forms=None):
        self.named, self.noun, self.adjective, self.forms = named, noun, adjective, forms or [named]

    def said(self, rng):
        return rng.choice(self.forms)

    def asked(self, rng):
        return rng.choice(self.forms[:2])

    def sibling(self, rng, taken):
        """Another key of the same noun, for `the other one`."""
        if self.adjective is None:
            return None
        word = several(colour, rng, 1, [k.adjective for k in taken])[0]
        return Key(f"the {word} {self.noun}", self.noun, word)


def plain(noun):
    return Key("the " + noun, noun)


def loose(noun):
    """A thing that may also stand without its article."""
    return Key("the " + noun, noun, None, ["the " + noun, "the " + noun, "the " + noun, a(noun), noun])


def mine(noun):
    return Key("your " + noun, noun, None, ["my " + noun])


def owned(rng, noun):
    name = person(rng)
    return Key(f"{name}'s {noun}", noun)


def keys_of(draw_one, rng, n):
    keys = {}
    while len(keys) < n:
        key = draw_one(rng)
        keys.setdefault(key.named, key)
    return list(keys.values())


def boxes(rng, n):
    """Half of the time of one noun only: `the red box`, `the blue box`, ..."""
    if rng.random() < 0.6:
        noun = "box" if rng.random() < 0.45 else container(rng) if rng.random() < 0.9 else rng.choice(ANIMALS)
        return [Key(f"the {word} {noun}", noun, word) for word in several(adjective, rng, n)]
    return keys_of(box, rng, n)


def box(rng):
    kind = rng.random()
    noun = container(rng) if kind < 0.9 else rng.choice(ANIMALS)
    if kind < 0.12:
        return plain(noun)
    if kind < 0.2:
        return owned(rng, noun)
    if kind < 0.25:
        return mine(noun)
    word = adjective(rng)
    return Key(f"the {word} {noun}", noun, word)


def coloured(rng):
    kind = rng.random()
    noun = draw(rng, COLOURED + THINGS[:10], MORE_COLOURED + MORE_THINGS + ANIMALS)
    if kind < 0.15:
        return owned(rng, noun)
    if kind < 0.25:
        return mine(noun)
    if kind < 0.4:
        return plain(noun + " " + draw(rng, COLOURED, MORE_COLOURED)) if rng.random() < 0.5 else plain(f"{rng.choice(ADJECTIVES)} {noun}")
    return loose(noun) if kind < 0.5 else plain(noun)


def label(rng):
    noun = draw(rng, LABELS, MORE_LABELS)
    if rng.random() < 0.2:
        noun = draw(rng, LABELS + THINGS, MORE_LABELS + MORE_COLOURED) + " " + rng.choice(LABELS)
    return rng.choices([plain, mine, lambda n: owned(rng, n)], [4, 4, 1])[0](noun)


def number(rng):
    return rng.choice(NUMBERS) if rng.random() < 0.9 else str(rng.choice([rng.randint(100, 999), rng.randint(100, 999), rng.randint(1000, 999999),
                                                                         rng.randint(1, 99) * 100]))


def object_(rng):
    return rng.choices([a, lambda n: "the " + n, lambda n: n], [8, 3, 1])[0](thing(rng))


def split(text):
    return [form for line in text.strip().split("\n") for form in line.split("|")]


class Kind:
    """One kind of fact: {k} is the key, {v} its value, {w} its old value, {o} any other."""

    def __init__(self, value, state, change, question, indirect, it, answer, unknown, one=None, many=None, whether="", reverse="", fix="",
                 empty="", emptied="",
                 emptied_last="", impossible=()):
        self.value, self.one, self.many = value, one, many
        names = dict(state=state, change=change, question=question, indirect=indirect, it=it, whether=whether, reverse=reverse, fix=fix, empty=empty,
                     emptied=emptied, emptied_last=emptied_last)
        for name, text in names.items():
            setattr(self, name, split(text) if text else [])
        self.answer, self.unknown = answer, unknown
        self.impossible = [*impossible, ("Why?", WHY), ("What was it before?", BEFORE)]
        if not self.whether:
            self.whether = self.question

    def several_keys(self, rng, n):
        return self.many(rng, n) if self.many else keys_of(self.one, rng, n)

    def too_big(self, value):
        return isinstance(value, str) and value.isdigit() and int(value) > 99


HOLDS = dict(
    many=boxes, state="""
{k} holds {v}.|{k} holds {v}.|{k} has {v}.|{k} contains {v}.|{k} has {v} in it.|There is {v} in {k}.|I put {v} in {k}.|In {k} there is {v}.
{v} is in {k}.|{k} keeps {v}.|{k} stores {v}.|{k} has {v} inside.|I put {v} into {k}.|I place {v} in {k}.|Put {v} in {k}.|Put {v} into {k}.
{v} goes into {k}.|{k} is filled with {v}.|{v} lies in {k}.|Inside {k} is {v}.|Inside {k} there is {v}.|I keep {v} in {k}.|There's {v} in {k}.
{k}: {v}.|We put {v} in {k}.|Someone put {v} in {k}.|{k} carries {v}.|{v} sits in {k}.|You find {v} in {k}.|I hide {v} in {k}.
I left {v} in {k}.|{k}'s content is {v}.|Into {k} goes {v}.|I store {v} in {k}.|First {k} held {o}, now it holds {v}.|{k} has got {v}.
I drop {v} into {k}.|{k} got {v}.|{k} {v}.|{k} = {v}.|{k} is holding {v}.|Let {k} hold {v}.""",
    change="""
Now {k} holds {v}.|{k} now holds {v}.|Now {k} has {v}.|Now {k} contains {v}.|{k} now contains {v}.|Now there is {v} in {k}.
I replace it: {k} holds {v}.|Then I put {v} in {k}.|Actually, {k} holds {v}.|Change {k} to {v}.|{k} holds {v} now.|Set {k} to {v}.
No, {k} holds {v}.|Later {k} holds {v}.|Make {k} hold {v}.|{k} has {v} now.|Then {k} holds {v}.|Instead, {k} holds {v}.|{k} gets {v} instead.
I swap it, {k} has {v}.|{k} holds {v}, not {o}.|I put {v} in {k} instead.|From now on {k} holds {v}.|Sorry, {k} holds {v}.
{k} is now holding {v}.|Replace what is in {k} with {v}.|Correction: {k} holds {v}.|{k} changes to {v}.|Make that {v} in {k}.
Update {k} to {v}.|Let {k} have {v}.""",
    question="""
What does {k} hold?|What does {k} hold?|What does {k} hold?|What is in {k}?|What's in {k}?|What does {k} contain?|What does {k} have?
What does {k} hold now?|What is in {k} now?|Tell me what {k} holds.|And {k}?|What is inside {k}?|What about {k}?|What does {k} have in it?
What do I have in {k}?|What do I find in {k}?|What did I put in {k}?|What is {k} holding?|What is there in {k}?|Which thing is in {k}?
What does {k} keep?|What has {k}?|What lies in {k}?|The content of {k}?|What is the content of {k}?|{k}?|In {k} there is what?|Look into {k}.
Open {k}.|How many does {k} hold?|How many are in {k}?|What number is in {k}?|Check {k}.|Is {k} empty?|Is there anything in {k}?
Is anything in {k}?|What can you find in {k}?|What do we have in {k}?|What has {k} in it?|Look in {k}: what is there?""",
    indirect="""what {k} holds|what is in {k}|what {k} contains|what {k} has in it|what I put in {k}|what's in {k}|what is inside {k}
what I have in {k}|what we find in {k}""",
    it="""What does it hold?|What does it hold?|What is in it?|What's in it?|What is inside?|What does it contain?|And now?
What is in there?|What does it have?|What does it hold now?""",
    whether="""Does {k} hold {o}?|Is {o} in {k}?|Does {k} contain {o}?|Is there {o} in {k}?|{k} holds {o}, right?|Does {k} have {o}?
Is it true that {k} holds {o}?""",
    reverse="""Which {n} holds {v}?|What holds {v}?|Which {n} has {v}?|Where is {v}?|Which one holds {v}?|Which {n} contains {v}?
In which {n} is {v}?|Which one has {v}?""",
    fix="""It holds {v}.|It holds {v} now.|No, it holds {v}.|Actually, it holds {v}.|Put {v} in it.|Put {v} in there instead.
I meant it holds {v}.|It contains {v}, not {w}.""",
    empty="""{k} is empty.|{k} is empty.|{k} holds nothing.|There is nothing in {k}.|{k} has nothing in it.|{k} contains nothing.
Nothing is in {k}.|{k} is still empty.|I left {k} empty.""",
    emptied="""I empty {k}.|Now {k} is empty.|{k} is empty now.|I clear out {k}.|{k} was emptied.|I take {v} out of {k}.
I remove {v} from {k}.|I took everything out of {k}.|Empty {k}.|Someone takes {v} from {k}.|{k} is now empty.|I take {v} from {k}.
{v} falls out of {k}.|Take {v} out of {k}.|{v} is no longer in {k}.|{k} gets emptied.""",
    emptied_last="""It is empty now.|I take it out.|Take it out.|I took it out again.|It is gone.|I remove it.|Now it is empty.|It is empty.
I empty it.|Empty it.|I take {w} out.|Someone took {w} out.|Take {w} out again.|{w} is gone.|I remove {w}.""",
    answer="{k} holds {v}.", unknown="I don't know what {k} holds.",
    impossible=[("How many {n}s are there?", CALCULATE), ("Why does {k} hold {v}?", WHY), ("What did {k} hold before?", BEFORE),
                ("What did it hold before?", BEFORE),
                ("What is {k} plus {j}?", CALCULATE), ("Does {k} hold more than {j}?", CALCULATE), ("What do all hold together?", CALCULATE),
                ("Who put {v} in {k}?", "I don't know who. I only know what you tell me here."), ("What is the sum of {k} and {j}?", CALCULATE),
                ("What was in {k} at first?", BEFORE), ("How much do {k} and {j} hold in total?", CALCULATE),
                ("Which {n} holds the most?", CALCULATE),
                ("What was the old value of {k}?", BEFORE), ("How heavy is {k}?", UNKNOWN)])
COSTS = dict(
    value=number, one=lambda rng: loose(thing(rng)), state="""
{k} costs {v}.|{k} costs {v}.|The price of {k} is {v}.|{k} is priced at {v}.|{k} sells for {v}.|{k} is {v}.|{k} is {v} euros.
{k} costs {v} dollars.|You pay {v} for {k}.|I paid {v} for {k}.|{k} goes for {v}.|They ask {v} for {k}.|{k} cost me {v}.|{k}: {v}.
The cost of {k} is {v}.|{k} comes at {v}.|It costs {v} to buy {k}.|You can buy {k} for {v}.|I bought {k} for {v}.
{k} was {o}, now it costs {v}.|{k} is on sale for {v}.|{k} has a price of {v}.|They sell {k} for {v}.|{k} is worth {v}.|{k} {v}.
For {k} I pay {v}.|{k} will cost {v}.""",
    change="""
Now {k} costs {v}.|{k} now costs {v}.|The price of {k} is now {v}.|Now the price of {k} is {v}.|{k} goes up to {v}.|{k} goes down to {v}.
Actually, {k} costs {v}.|{k} costs {v} now.|{k} drops to {v}.|{k} rises to {v}.|{k} falls to {v}.|The price of {k} changes to {v}.
No, {k} costs {v}.|Change {k} to {v}.|Change the price of {k} to {v}.|From today {k} costs {v}.|{k} is {v} now.|{k} is now {v}.
{k} costs {v}, not {o}.|Set the price of {k} to {v}.|Sorry, {k} costs {v}.|Later {k} costs {v}.|{k} is down to {v}.|{k} is up to {v}.""",
    question="""
How much does {k} cost?|What does {k} cost?|How much is {k}?|What is the price of {k}?|What does {k} cost now?|How much does {k} cost now?
Tell me the price of {k}.|What about {k}?|And {k}?|What's the price of {k}?|The price of {k}?|How much for {k}?|What do you pay for {k}?
How much did I pay for {k}?|What will {k} cost?|How much money is {k}?|{k}?|How expensive is {k}?|What does {k} sell for?
For how much can I buy {k}?|What must I pay for {k}?|Which price has {k}?|What is {k} worth?|How much would {k} cost me?|What price is {k}?
What did {k} cost?""",
    indirect="""what {k} costs|how much {k} costs|the price of {k}|how much {k} is|what I pay for {k}|how much to pay for {k}
what {k} is worth|what the price of {k} is""",
    it="How much is it?|How much does it cost?|What does it cost?|What is the price?|And now?|What's its price?|How much?|The price?",
    whether="Does {k} cost {o}?|Is {k} {o}?|Is the price of {k} {o}?|{k} costs {o}, right?",
    reverse="What costs {v}?|Which one costs {v}?|Which thing costs {v}?|What can I buy for {v}?",
    fix="It costs {v}.|No, it costs {v}.|The price is {v}.|It costs {v}, not {w}.|Make the price {v}.",
    answer="{k} costs {v}.", unknown="I don't know what {k} costs.",
    impossible=[("Is {k} cheaper than {j}?", CALCULATE), ("Which is more expensive, {k} or {j}?", CALCULATE),
                ("What do {k} and {j} cost together?", CALCULATE),
                ("What is the cheapest thing?", CALCULATE), ("How much are two of {k}?", CALCULATE), ("What did {k} cost before?", BEFORE),
                ("Why does {k} cost {v}?", WHY), ("What costs the most?", CALCULATE), ("Where can I buy {k}?", UNKNOWN)])
COLOUR = dict(
    value=colour, one=coloured, state="""
{k} is {v}.|{k} is {v}.|{k} is {v}.|The colour of {k} is {v}.|I paint {k} {v}.|{k} looks {v}.|{k} has the colour {v}.|The color of {k} is {v}.
{k} was painted {v}.|{k} is painted {v}.|{k} comes in {v}.|We paint {k} {v}.|I have {k} in {v}.|{k}: {v}.|{k} was {o} and now it is {v}.
{k} seems to be {v}.|The colour {v} is on {k}.|I made {k} {v}.|{k} is all {v}.|{k} has a {v} colour.|They painted {k} {v}.|I coloured {k} {v}.
{k} is a nice {v}.|{k} is bright {v}.|{k} is dark {v}.|{v} is the colour of {k}.|I see that {k} is {v}.""",
    change="""
Now {k} is {v}.|{k} is now {v}.|I paint {k} {v}.|{k} turns {v}.|The colour of {k} is now {v}.|Actually, {k} is {v}.|{k} becomes {v}.
Then I paint {k} {v}.|Paint {k} {v}.|No, {k} is {v}.|{k} is {v} now.|We painted {k} {v}.|Change {k} to {v}.|{k} changes to {v}.
{k} changed from {o} to {v}.|Make {k} {v}.|I repaint {k} in {v}.|{k} is not {o} but {v}.|Sorry, {k} is {v}.|Someone paints {k} {v}.
{k} is {v}, not {o}.|{k} became {v}.|{k} gets a new colour: {v}.|Later {k} is {v}.""",
    question="""
What colour is {k}?|What color is {k}?|What is the colour of {k}?|Which colour is {k}?|What colour is {k} now?|Tell me the colour of {k}.
What colour does {k} have?|And {k}?|What color does {k} have?|What is the color of {k}?|What's the colour of {k}?|In which colour is {k}?
How is {k} painted?|The colour of {k}?|What does {k} look like?|What about {k}?|What colour did I paint {k}?|Which color is {k}?
What colour has {k}?|{k} has which colour?|{k} is what colour?|How does {k} look?|What's the color of {k}?
What did I say is the colour of {k}?""",
    indirect="""what colour {k} is|which colour {k} is|the colour of {k}|what color {k} is|what colour {k} has|the color of {k}
how {k} looks|which colour {k} has""",
    it="What colour is it?|What color is it?|Which colour is it?|And now?|What is its colour?|What colour does it have?|How does it look?",
    whether="Is {k} {o}?|Is {k} {o} now?|{k} is {o}, right?|Is it true that {k} is {o}?",
    reverse="What is {v}?|Which one is {v}?|Which thing is {v}?|What has the colour {v}?",
    fix="It is {v}.|Paint it {v}.|No, it is {v}, not {w}.|The colour is {v}.|I meant {v}.",
    answer="{k} is {v}.", unknown="I don't know what colour {k} is.",
    impossible=[("What colour was {k} before?", BEFORE), ("Why is {k} {v}?", WHY), ("Which colour is nicer?", UNKNOWN),
                ("How many things are {v}?", CALCULATE)])
AGE = dict(
    value=number, one=lambda rng: Key(*[person(rng)] * 2), state="""
{k} is {v}.|{k} is {v}.|{k} is {v} years old.|The age of {k} is {v}.|{k} is aged {v}.|{k} has turned {v}.|{k}'s age is {v}.|{k}: {v}.
{k} is a {v} year old.|{k} was born {v} years ago.|{k} turned {v} today.|At the moment {k} is {v}.|{k} has the age of {v}.|{k} is {v} now.
{k} will be {v}.|{k} is about {v}.|{k} was {o} and is now {v}.|My friend {k} is {v}.|{k}, {v}.""",
    change="""
Now {k} is {v}.|{k} is now {v}.|{k} is now {v} years old.|{k} turns {v}.|Actually, {k} is {v}.|{k} is {v} now.|No, {k} is {v}.
{k} becomes {v}.|The age of {k} is now {v}.|{k} has a birthday and is {v}.|{k} is {v}, not {o}.|Sorry, {k} is {v}.|Change {k} to {v}.
Later {k} is {v}.|Then {k} turns {v}.|{k} is not {o} but {v}.""",
    question="""
How old is {k}?|How old is {k}?|How old is {k} now?|What is the age of {k}?|Tell me how old {k} is.|What age is {k}?|And {k}?
What is {k}'s age now?|The age of {k}?|What about {k}?|How many years old is {k}?|What age has {k}?|What's the age of {k}?|{k} is how old?
How old did I say {k} is?|At what age is {k}?|{k}'s age?|How old was {k}?|How many years is {k}?""",
    indirect="how old {k} is|the age of {k}|what age {k} is|{k}'s age|what age {k} has|how many years old {k} is",
    it="How old?|And now?|What age?|And the age?",
    whether="Is {k} {o}?|Is {k} {o} years old?|{k} is {o}, right?|Did {k} turn {o}?",
    reverse="Who is {v}?|Who is {v} years old?|Who turned {v}?|Which person is {v}?|Who has the age {v}?|Who is aged {v}?",
    answer="{k} is {v}.", unknown="I don't know how old {k} is.",
    impossible=[("Is {k} older than {j}?", CALCULATE), ("Who is the oldest?", CALCULATE), ("Who is younger, {k} or {j}?", CALCULATE),
                ("How old was {k} before?", BEFORE),
                ("How old are {k} and {j} together?", CALCULATE), ("When was {k} born?", UNKNOWN),
                ("What is the difference in age?", CALCULATE), ("How old will {k} be in 5 years?", CALCULATE)])
LABEL = dict(
    value=number, one=label, state="""
{k} is {v}.|{k} is {v}.|Remember that {k} is {v}.|Let {k} be {v}.|{k} = {v}.|{k}: {v}.|Set {k} to {v}.|{k} equals {v}.|Please note {k}: {v}.
Remember {k}: {v}.|{k} was {o}, now it is {v}.|I choose {v} as {k}.|{k} shall be {v}.|{k} reads {v}.|{k} has the value {v}.
Keep in mind that {k} is {v}.|As {k} I take {v}.|{v} is {k}.|Don't forget: {k} is {v}.|Write down that {k} is {v}.""",
    change="""
Now {k} is {v}.|{k} is now {v}.|{k} changes to {v}.|Actually, {k} is {v}.|{k} is {v} now.|Change {k} to {v}.|Set {k} to {v}.|No, {k} is {v}.
{k} becomes {v}.|{k} goes up to {v}.|{k} goes down to {v}.|Make {k} {v}.|{k} is {v}, not {o}.|Sorry, {k} is {v}.|Update {k} to {v}.
The new value of {k} is {v}.|{k} is not {o} but {v}.""",
    question="""
What is {k}?|What is {k}?|What's {k}?|What is {k} now?|Tell me {k}.|Do you remember {k}?|Give me {k}.|Say {k}.|And {k}?|{k}?|What about {k}?
How much is {k}?|What is the value of {k}?|Which number is {k}?|What did I say {k} is?|I forgot {k}.|I need {k}.|Do you know {k}?|Show {k}.
What number is {k}?|What value has {k}?|Can I have {k}?""",
    indirect="what {k} is|{k}|what {k} was|the value of {k}|what the value of {k} is|which number {k} is",
    it="What is it?|What is it now?|And now?|What's the value?|What was it?|Which number is it?|Which is it?",
    whether="Is {k} {o}?|Is {k} still {o}?|{k} is {o}, right?|Was {k} {o}?",
    answer="{k} is {v}.", unknown="I don't know {k}.",
    impossible=[("What was {k} before?", BEFORE), ("Is {k} more than 5?", CALCULATE), ("What is {k} plus 1?", CALCULATE),
                ("What is {k} times two?", CALCULATE),
                ("Why is {k} {v}?", WHY)])
VARIABLE = LABEL | dict(
    one=lambda rng: Key(*[rng.choice("bcdefghjklmnopqrstuvwxyz" if rng.random() < 0.7 else "BCDEFGHJKLMNOPQRSTUVWXYZ")] * 2),
    many=lambda rng, n: keys_of(LABEL_VARIABLE, rng, min(n, 18)))
LABEL_VARIABLE = VARIABLE["one"]
KINDS = [Kind(value=number, **HOLDS), Kind(value=object_, **HOLDS), Kind(**COSTS), Kind(**COLOUR), Kind(**AGE), Kind(**LABEL), Kind(**VARIABLE)]
SHARE = [26, 24, 14, 14, 8, 10, 4]
