"""What people put around a sentence, and how they correct one: shared by the tasks."""
from words import QUESTION_WORDS, lower_first, made_up, upper_first

OPENERS = ["So, ", "So ", "And ", "And ", "Now, ", "OK, ", "Okay, ", "Well, ", "Hey, ", "Then ", "Right, ", "But ", "Tell me: ", "Please tell me: ",
           "Quick question: ", "Next question: ", "One more thing: ", "Let me ask: ", "Say, ", "By the way, ", "Hmm, ", "Alright, ",
           "Just checking: "]
CLOSERS = [" now", " now", " right now", " today", " currently", " again", " then", ", please", " please", " by now", " at present", " still",
           " in the end",
           " after all", " this time", ", do you know", " exactly", " now, please", ", my friend", " as of now"]
INDIRECT = ["Can you tell me {i}?", "Could you tell me {i}?", "Tell me {i}.", "Do you know {i}?", "Do you remember {i}?", "Please tell me {i}.",
            "I want to know {i}.", "I would like to know {i}.", "I forgot {i}.", "Any idea {i}?", "Say {i}.", "Let me know {i}.",
            "Would you tell me {i}?",
            "Please say {i}.", "Can you say {i}?", "Can you remember {i}?", "I need to know {i}.", "Remember {i}?", "Remind me {i}.", "Show me {i}.",
            "Help me remember {i}.", "I wonder {i}.", "Find out {i}.", "You know {i}, right?", "Give me a hint: {i}?", "I am asking {i}."]
BEFORE = ["And ", "Also, ", "Then ", "Well, ", "Listen: ", "Note that ", "I think ", "I know that ", "Today ", "So ", "Okay, ", "Look, ",
          "Besides, ", "Next, ",
          "As you know, ", "I heard that ", "It seems that ", "I see that ", "Let us say ", "Suppose ", "Remember that ", "Keep in mind: ",
          "Imagine "]
AFTER = [" today", " as I said", ", I think", ", you know", " again", ", okay", ", I believe", " too", " already", ", for sure", " at last",
         ", of course"]
JOINS = [" and ", " and ", ", and ", ", ", ", ", "; ", ", but ", ", then ", " and then ", " - ", " while ", ", whereas "]
FILLERS = ("really just please actually maybe still also then quickly again once finally definitely exactly probably now ever simply truly possibly only currently "
           "kindly honestly usually apparently roughly").split()

# After a statement: its value is another.
FIX = """
Actually, make it {v}.|Make it {v}.|Make that {v}.|make it {v}|No, {v}.|No, {v}.|no, {v}|No, it is {v}.|no, it's {v}|No, {v}, not {w}.
Not {w}, {v}.|Not {w} but {v}.|Change it to {v}.|Change that to {v}.|Please change it to {v}.|Sorry, {v}.|sorry, {v}|Sorry, it is {v}.
Sorry, it's {v}.|I mean {v}.|I mean {v}, not {w}.|Wait, {v}.|Wait, it is {v}.|Wait, it's {v}!|Correction: {v}.|Correction, {v}.|It is {v} now.
It's {v} now.|Now it is {v}.|It is {v}, not {w}.|It's {v} and not {w}.|Rather {v}.|Or rather {v}.|Set it to {v}.|Let it be {v}.
It should be {v}.|It should say {v}.|That should be {v}.|Turn it into {v}.|It became {v}.|Wrong, it is {v}.|That was wrong: {v}.
That is wrong, it's {v}.|I said {w} but it is {v}.|I said {w}, but it's {v}.|{v} is right.|{v}, sorry.|{v} instead.|{v} instead of {w}.
Take {v} instead.|Replace it with {v}.|Replace {w} with {v}.|Replace {w} by {v}.|Actually {v}.|Actually, {v}.|Actually it is {v}.
Actually, it's {v}.|Hm, {v}.|Let me correct that: {v}.|Let me correct myself: it's {v}.|Update: {v}.|Update it to {v}.|I changed my mind: {v}.
Oh, it is {v}.|Oh, {v}.|Oh no, {v}.|Ah, it's {v}.|I misspoke: {v}.|I must correct that, it is {v}.|Um, {v}.|Nope, {v}.|Nope, it's {v}.
Err, {v}.|Not quite: {v}.|Better: {v}.|Use {v}.|Use {v} instead.|Fix that: {v}.|Fix: {v}.|A mistake: it is {v}.|I made a mistake, it's {v}.
On second thought, {v}.|On second thought, make it {v}.|The right one is {v}.|Switch it to {v}.|Swap {w} for {v}.|Turns out it is {v}.
It turns out to be {v}.|In fact {v}.|In fact, it is {v}.|I meant to say {v}.
""".replace("\n", "|").strip("|").split("|")
# It was about another of the same noun: the {a} one, not the {b} one.
FIX_KEY = """
Sorry, the {a} one.|sorry, the {a} one|No, the {a} one.|no, the {a} one|I mean the {a} one.|The {a} one, I mean.|Not the {b} one, the {a} one.
It was the {a} one.|No, that is the {a} one.|Wait, the {a} one.|Actually, the {a} one.|Correction: the {a} one.|The {a} one, not the {b} one.
Rather the {a} one.|Oh, the {a} one.|I mean the {a} {n}.|Sorry, the {a} {n}.|No, the {a} {n}.|Not the {b} {n}, the {a} {n}.
That was the {a} {n}.|It is the {a} one, not the {b} one.|The {a} one instead.|Wrong one: it was the {a} one.|Hm, the {a} one.
Nope, the {a} one.
""".replace("\n", "|").strip("|").split("|")
FORGET = """
Forget {k}.|Forget {k}.|Forget {k}, please.|Please forget {k}.|Delete {k}.|Please delete {k}.|Remove {k}.|You can forget {k}.
Forget all about {k}.|Forget everything about {k}.|Clear {k}.|Cancel {k}.|Do not remember {k}.|Don't remember {k}.|Now forget {k}.
Forget what I told you about {k}.|Ignore {k}.|Drop {k} from memory.|Lose {k}.|Undo {k}.|Never mind {k}.|Wipe {k}.|Strike {k}.
Forget that {k} exists.
""".replace("\n", "|").strip("|").split("|")
FORGET_LAST = """
Forget that.|Forget it.|Please forget that.|Delete that.|Forget the last one.|Ignore that.|Forget what I just said.|Undo that.|Cancel that.
Never mind that.|Remove that.|Delete the last one.|Drop that.|Take that back.|Clear that.|Erase that.|No, forget it.|Strike that.
""".replace("\n", "|").strip("|").split("|")


def question(rng, direct, indirect=()):
    """One wording of a question: direct, with words around it, or as part of another sentence."""
    if indirect and rng.random() < 0.2:
        text = rng.choice(INDIRECT).replace("{i}", rng.choice(indirect))
    else:
        text = rng.choice(direct)
        first, _, rest = text.partition(" ")
        if rest and first in QUESTION_WORDS and rng.random() < 0.08:
            text = f"{first} {rng.choice(FILLERS) if rng.random() < 0.7 else made_up(rng)} {rest}"
        if rng.random() < 0.2 and text[-1] == "?":
            text = text[:-1] + rng.choice(CLOSERS) + "?"
    if rng.random() < 0.2:
        text = rng.choice(OPENERS) + lower_first(text)
    elif rng.random() < 0.03:
        text = upper_first(made_up(rng)) + ", " + lower_first(text)
    return text


def statement(rng, text):
    """The sentence, now and then with words around it."""
    if rng.random() < 0.1:
        text = rng.choice(BEFORE) + lower_first(text)
    if rng.random() < 0.05 and text[-1] == ".":
        text = text[:-1] + rng.choice(AFTER) + "."
    if rng.random() < 0.02:
        text = upper_first(made_up(rng)) + ", " + lower_first(text)
    return text


def joined(rng, sentences):
    """Sentences in a row, each with its last mark; some are joined to one."""
    out = []
    for text in sentences:
        if out and out[-1][-1] == "." and "\n" not in text and rng.random() < 0.12:
            out[-1] = out[-1][:-1] + rng.choice(JOINS) + lower_first(text)
        else:
            if out and out[-1][-1].isalnum():
                out[-1] += "."
            out.append(text)
    return out
